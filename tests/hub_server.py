"""A small Hugging Face Hub on loopback: what the real client asks for when it pushes and fetches a model."""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_good"


class Hub:
    """State of the server: files of each repository, and faults to inject."""

    def __init__(self):
        self.repos, self.blobs, self.commits, self.requests = {}, {}, [], []
        self.lfs = False  # upload big and small files by lfs
        self.faults = []  # status to answer the next requests with, "cut" to break off the connection
        self.forbidden = False
        self.fail_blobs = False  # refuse the bytes of files sent by lfs


@contextmanager
def serve():
    """Run a Hub; yields it and its address."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": hub}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


class Handler(BaseHTTPRequestHandler):
    hub = None
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, status, body=b"", **headers):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": len(body)} | headers).items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def sha(self, repo):
        state = sorted((path, hashlib.sha256(data).hexdigest()) for path, data in self.hub.repos[repo].items())
        return hashlib.sha1(repr(state).encode()).hexdigest()

    def handle_any(self):
        body = self.read_body()
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path))
        if self.hub.faults:
            fault = self.hub.faults.pop(0)
            if fault == "cut":
                self.close_connection = True
                self.connection.close()
                return None
            if fault:
                return self.answer(fault, {"error": "injected"})
        writes = self.command in ("POST", "PUT") and path != "/api/validate-yaml"
        if writes and not path.startswith("/lfs/"):
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                return self.answer(401, {"error": "Invalid credentials"})
            if self.hub.forbidden:
                return self.answer(403, {"error": "Forbidden"})
        return self.route(path, body)

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def read_body(self):
        if self.headers.get("Transfer-Encoding") == "chunked":
            chunks = []
            while size := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def route(self, path, body):
        hub, address = self.hub, f"http://{self.headers['Host']}"
        if path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if path == "/api/repos/create":
            request = json.loads(body)
            repo = f"{request['organization']}/{request['name']}" if request.get("organization") else request["name"]
            status = 409 if repo in hub.repos else 200
            hub.repos.setdefault(repo, {".gitattributes": b""})
            return self.answer(status, {"url": f"{address}/{repo}", "name": repo})
        if path.startswith("/lfs/"):
            hub.blobs[path.removeprefix("/lfs/")] = body
            return self.answer(400 if hub.fail_blobs else 200)
        if match := re.fullmatch(r"/(.+/.+)\.git/info/lfs/objects/batch", path):
            objects = json.loads(body)["objects"]
            for entry in objects:
                entry["actions"] = {"upload": {"href": f"{address}/lfs/{entry['oid']}"}}
            return self.answer(200, {"transfer": "basic", "objects": objects})
        match = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(.*))?", path)
        if match and match[1] in hub.repos:
            return self.model(match[1], match[2] or "", body, address)
        if (match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path)) and match[1] in hub.repos:
            data = hub.repos[match[1]].get(match[2])
            if data is not None:
                return self.answer(
                    200, data, ETag=f'"{hashlib.sha1(data).hexdigest()}"', X_Repo_Commit=self.sha(match[1])
                )
        return self.answer(404, {"error": "not found"}, X_Error_Code="RepoNotFound")

    def model(self, repo, what, body, address):
        files = self.hub.repos[repo]
        if what.startswith("preupload/"):
            mode = "lfs" if self.hub.lfs else "regular"
            paths = [entry["path"] for entry in json.loads(body)["files"]]
            answer = [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path in paths]
            return self.answer(200, {"files": answer})
        if what.startswith("commit/"):
            operations = [json.loads(line) for line in body.splitlines()]
            for operation in operations:
                value = operation["value"]
                if operation["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif operation["key"] == "lfsFile":
                    files[value["path"]] = self.hub.blobs[value["oid"]]
                elif operation["key"] == "deletedFile":
                    files.pop(value["path"], None)
            self.hub.commits.append((repo, operations[0]["value"]["summary"]))
            sha = self.sha(repo)
            return self.answer(200, {"commitUrl": f"{address}/{repo}/commit/{sha}", "commitOid": sha, "success": True})
        if what.startswith("tree/"):
            entries = [
                {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for path, data in sorted(files.items())
            ]
            return self.answer(200, entries)
        siblings = [{"rfilename": path} for path in sorted(files)]
        return self.answer(200, {"id": repo, "modelId": repo, "sha": self.sha(repo), "siblings": siblings, "tags": []})
