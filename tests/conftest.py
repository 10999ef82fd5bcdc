"""Fixtures shared by all tests."""

import contextlib
import io
import os
import shutil
import signal
import subprocess
import sys
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

    def __init__(self, name: str, parent: Path):
        self.checkpoints = []  # every checkpoint that was written, in order
        self.stopped = parent / "stopped"  # the run folder as it was just before the last checkpoint
        stdout, stderr, save, before = io.StringIO(), io.StringIO(), torch.save, os.getcwd()

        def save_and_keep(state, path):
            if len(self.checkpoints) == 2:
                shutil.copytree(Path(path).parent, self.stopped)
            save(state, path)
            self.checkpoints.append(torch.load(path, weights_only=True))

        os.chdir(parent)
        torch.save = save_and_keep
        try:
            with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
                self.folder = parent / run(name)
        finally:
            torch.save = save
            os.chdir(before)
        self.stdout, self.stderr = stdout.getvalue(), stderr.getvalue()

    def copy(self, stopped: bool = False) -> Path:
        """A copy of the run folder, finished or stopped, for a test that changes it."""
        return Path(shutil.copytree(self.stopped if stopped else self.folder, Path("copied", self.folder.name)))

    @property
    def checkpoint(self) -> dict:
        return load(self.folder)


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """trained("ppo") is a run of ppo.py that many tests read. Each script is trained once in each process of pytest."""
    runs = {}

    def train_once(name):
        if name not in runs:
            runs[name] = Trained(name, tmp_path_factory.mktemp(name))
        return runs[name]

    return train_once
