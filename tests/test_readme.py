"""The README and docs/: their own environments, as printed there, their links, and their length."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from runs import ROOT, results

PAGES = {page: page.read_text(encoding="utf-8") for page in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")))}
README, USAGE = PAGES[ROOT / "README.md"], PAGES[ROOT / "docs" / "usage.md"]


def train_printed(page, file, folder):
    """Write the `file` of a page beside ppo.py, and run its command; returns the code and the run folder."""
    code = re.search(rf"This is `{re.escape(file)}`.*?```python\n(.*?)```", page, re.DOTALL)[1]
    Path(folder, file).write_text(code, encoding="utf-8")
    shutil.copy(ROOT / "ppo.py", folder)
    command = re.search(rf"^python (ppo.py --env-id {Path(file).stem}:.*)$", page, re.MULTILINE)[1]
    process = subprocess.run([sys.executable, *shlex.split(command)], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    (run_folder,) = Path("runs").iterdir()
    return code, run_folder


def test_own_environment_is_learned(in_empty_folder):
    code, folder = train_printed(README, "corridor.py", in_empty_folder)
    assert len(code.splitlines()) <= 30
    length = json.loads(json.loads((folder / "config.json").read_text())["env_kwargs"])["length"]
    assert results(folder)["mean_reward"] == -length  # every step goes towards the goal


def test_wrapped_environment_is_learned(in_empty_folder):
    pytest.importorskip("minigrid")
    _, folder = train_printed(USAGE, "grid.py", in_empty_folder)
    assert results(folder)["mean_reward"] > 0.9  # the shortest way has 0.96


def test_readme_is_short():
    assert len(README.splitlines()) <= 160


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    """Files exist, and anchors are headings, in the spelling of GitHub."""
    for link in re.findall(r"\]\(([^)\s]+)\)|(?:src|srcset)=\"([^\"]+)\"", PAGES[page]):
        path, _, anchor = "".join(link).partition("#")
        if not path.startswith("https://") and not path.startswith("http://"):
            target = (page.parent / path).resolve() if path else page
            assert target.exists(), link
            if anchor:
                titles = re.findall(r"^#+ (.+)$", PAGES[target], re.MULTILINE)
                assert anchor in [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles], link
