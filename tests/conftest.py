"""Fixtures shared by all tests."""

import contextlib
import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from runs import ROOT, load, run


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    """Every test runs in a folder of its own, so that runs/ starts empty and leaves nothing behind."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(autouse=True)
def seeded():
    """Every test draws the same random numbers, alone or after others."""
    torch.manual_seed(0)


@pytest.fixture
def start():
    """Start a script as a user would: start("ppo.py", "--seed", "2") returns the process."""
    processes = []
    # A shell's background job ignores Ctrl-C, and so would all that it starts, this test run among them.
    hear_ctrl_c = None if os.name == "nt" else lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)

    def start_script(script, *flags, **options):
        paths = [str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
        env = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
        process = subprocess.Popen(
            [sys.executable, str(ROOT / script), *flags],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, preexec_fn=hear_ctrl_c, **options,
        )  # fmt: skip
        processes.append(process)
        return process

    yield start_script
    for process in processes:
        process.kill()
        process.communicate()


class Trained:
    """A finished run with the short flags of its script, which tests may read but not change."""

    def __init__(self, parent: Path):
        self.parent = parent
        self.stopped = parent / "stopped"  # the run folder as it was just before the last checkpoint
        (self.folder,) = (parent / "runs").iterdir()
        self.stdout, self.stderr = ((parent / name).read_text() for name in ("stdout", "stderr"))

    @classmethod
    def train(cls, name: str, parent: Path):
        """Train in this process, and keep what is printed and each checkpoint."""
        save, before, count = torch.save, os.getcwd(), itertools.count()

        def save_and_keep(state, path):
            number = next(count)
            if number == 2:
                shutil.copytree(Path(path).parent, parent / "stopped")
            save(state, path)
            save(state, parent / f"checkpoint-{number}.pt")

        os.chdir(parent)
        torch.save = save_and_keep
        patched = sys.modules.pop(name, None)  # the test that comes first may have patched the script already
        try:
            with open("stdout", "w") as stdout, open("stderr", "w") as stderr:
                with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
                    run(name)
        finally:
            torch.save = save
            sys.modules[name] = patched or sys.modules[name]
            os.chdir(before)
            (parent / "done").touch()

    @property
    def checkpoints(self) -> list:
        """Every checkpoint that was written, in order."""
        return [torch.load(self.parent / f"checkpoint-{number}.pt", weights_only=True) for number in range(3)]

    @property
    def checkpoint(self) -> dict:
        """The last checkpoint."""
        return load(self.folder)

    def copy(self, stopped: bool = False) -> Path:
        """A copy of the run folder, finished or stopped, for a test that changes it."""
        return Path(shutil.copytree(self.stopped if stopped else self.folder, Path("copied", self.folder.name)))


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """trained("ppo") is a run of ppo.py that many tests read. One of pytest's processes trains, the others wait."""
    temp = tmp_path_factory.getbasetemp()
    shared = temp.parent if "PYTEST_XDIST_WORKER" in os.environ else temp

    def train_once(name):
        parent = shared / f"trained-{name}"
        try:
            parent.mkdir()
        except FileExistsError:
            deadline = time.monotonic() + 300
            while not (parent / "done").exists() and time.monotonic() < deadline:
                time.sleep(0.05)
        else:
            Trained.train(name, parent)
        return Trained(parent)

    return train_once
