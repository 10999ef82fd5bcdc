"""The README's own environment: the code and the command as they are printed there."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from runs import ROOT, results

README = (ROOT / "README.md").read_text(encoding="utf-8")


def train_printed(file, folder):
    """Write the README's `file` beside ppo.py, and run its command; returns the code and the run folder."""
    code = re.search(rf"This is `{re.escape(file)}`.*?```python\n(.*?)```", README, re.DOTALL)[1]
    Path(folder, file).write_text(code, encoding="utf-8")
    shutil.copy(ROOT / "ppo.py", folder)
    command = re.search(rf"^python (ppo.py --env-id {Path(file).stem}:.*)$", README, re.MULTILINE)[1]
    process = subprocess.run([sys.executable, *shlex.split(command)], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    (run_folder,) = Path("runs").iterdir()
    return code, run_folder


def test_own_environment_is_learned(in_empty_folder):
    code, folder = train_printed("corridor.py", in_empty_folder)
    assert len(code.splitlines()) <= 30
    length = json.loads(json.loads((folder / "config.json").read_text())["env_kwargs"])["length"]
    assert results(folder)["mean_reward"] == -length  # every step goes towards the goal


def test_wrapped_environment_is_learned(in_empty_folder):
    pytest.importorskip("minigrid")
    _, folder = train_printed("grid.py", in_empty_folder)
    assert results(folder)["mean_reward"] > 0.9  # the shortest way has 0.96
