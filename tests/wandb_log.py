"""Reads what wandb has written offline: LevelDB's log format, of which the records are wandb's protocol buffers."""

import json
import struct
from pathlib import Path


def read_wandb(folder: Path) -> dict:
    """Of one offline run: its `config`, `history` (a list of rows), `summary`, `metrics`, `code`, `exit_code`."""
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = folder.glob("*.wandb")
    data, position, record = path.read_bytes(), 7, b""
    run = {"config": {}, "history": [], "summary": {}, "metrics": {}, "code": [], "exit_code": None}
    while position + 7 <= len(data):
        if 32_768 - position % 32_768 < 7:  # too little for a header before the next block
            position += 32_768 - position % 32_768
        _, size, kind = struct.unpack("<IHB", data[position : position + 7])
        record += data[position + 7 : position + 7 + size]
        position += 7 + size
        if kind in (1, 4):  # whole, or its last part
            add(run, Record.FromString(record))
            record = b""
    return run


def add(run, record):
    def values(items):
        return {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}

    kind = record.WhichOneof("record_type")
    if kind == "run":
        run["config"] |= values(record.run.config.update)
    elif kind == "history":
        run["history"].append(values(record.history.item))
    elif kind == "summary":
        run["summary"] |= values(record.summary.update)
    elif kind == "metric":
        run["metrics"][record.metric.glob_name or record.metric.name] = record.metric.step_metric
    elif kind == "artifact" and record.artifact.type == "code":
        run["code"] += [(entry.path, entry.size) for entry in record.artifact.manifest.contents]
    elif kind == "exit":
        run["exit_code"] = record.exit.exit_code
