"""Fixtures shared by all tests."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent


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

    def start_script(script, *flags):
        paths = [str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
        env = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
        process = subprocess.Popen(
            [sys.executable, str(ROOT / script), *flags],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, preexec_fn=hear_ctrl_c,
        )  # fmt: skip
        processes.append(process)
        return process

    yield start_script
    for process in processes:
        process.kill()
        process.communicate()
