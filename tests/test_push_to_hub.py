"""Packaging and pushing: every script's checkpoint, the real Hub client against a server on loopback, and faults."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import imageio.v3 as imageio
import numpy as np
import pytest
import torch
from conftest import ROOT
from hub_server import TOKEN, serve
from test_scripts import every_script, run

import ppo
import push_to_hub

OPTIONS = "--num-eval-episodes 12 --video-episodes 2 --video-seconds 2".split()


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """trained("ppo") is the folder of a short run, made once."""
    folders = {}

    def train_once(name):
        if name not in folders:
            here = Path.cwd()
            os.chdir(tmp_path_factory.mktemp(name))
            folders[name] = run(name).resolve()
            os.chdir(here)
        return folders[name]

    return train_once


def package(checkpoint, *flags):
    """Run push_to_hub.py in process; returns the results it wrote."""
    import tyro

    options = tyro.cli(push_to_hub.Options, args=["--checkpoint", str(checkpoint), *OPTIONS, *flags])
    push_to_hub.main(options)
    name = options.checkpoint.removeprefix("hf://").replace("/", "-")
    name = name if "hf://" in options.checkpoint else Path(checkpoint).resolve().name
    return Path("hub", name if name != "checkpoint.pt" else Path(checkpoint).parent.name)


def results(folder):
    scores = json.loads((folder / "results.json").read_text())
    return scores["mean_reward"], scores["std_reward"], scores["n_eval_episodes"]


# --- the package ---


@every_script
def test_every_script_is_packaged_and_read_back(name, trained, capsys):
    """From checkpoint.pt, the run's folder and the package: the same score to the last digit."""
    folder = package(trained(name) / "checkpoint.pt")
    expected = results(folder)
    assert expected[2] == 12
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    wanted = {"README.md", "model.safetensors", "config.json", "results.json", "replay.mp4", "learning_curve.png"}
    assert wanted | {f"{name}.py", "logs/episodes.csv"} <= files
    assert any(file.startswith("logs/events.out.tfevents.") for file in files)
    out = capsys.readouterr().out
    assert (
        f"{expected[0]:.2f} +/- {expected[1]:.2f} over 12 episodes, mean - std {expected[0] - expected[1]:.2f}" in out
    )
    assert results(package(trained(name))) == expected
    shutil.move(folder, "moved")
    assert results(package("moved")) == expected
    assert {path.name for path in Path("hub/moved").iterdir()} == {path.name for path in Path("moved").iterdir()}


@every_script
def test_video_has_the_frames_of_whole_episodes(name, trained):
    folder = package(trained(name), "--video-seconds", "0.2")
    path = folder / "replay.mp4"
    frames, meta = imageio.imread(path), imageio.immeta(path)
    assert meta["codec"] == "h264"
    assert meta["pix_fmt"].startswith("yuv420p")
    assert frames.shape[1] % 2 == frames.shape[2] % 2 == 0
    assert 2 <= len(frames) <= max(2, round(0.2 * meta["fps"]))
    assert frames.std() > 5  # not black
    assert len(np.unique(frames.mean(axis=(1, 2, 3)))) > 1 or (frames[0] != frames[-1]).any()


def test_video_ends_with_the_episode(trained):
    """CartPole: one frame a step and the first; two short episodes one after the other."""
    folder = package(trained("ppo"), "--video-seconds", "60", "--seed", "5")
    saved = push_to_hub.read(str(trained("ppo")))
    _, args, agent = push_to_hub.rebuild(saved, push_to_hub.Options(checkpoint=str(trained("ppo"))))
    steps = sum(ppo.evaluate(agent, args, 1, [seed])[0] for seed in (5, 6))
    assert len(imageio.imread(folder / "replay.mp4")) == steps + 2


def test_taxi_is_scored_on_the_seeds_of_the_course():
    seen = []
    script = SimpleNamespace(evaluate=lambda agent, args, n, seeds: seen.extend(seeds) or np.zeros(n))
    options = push_to_hub.Options(checkpoint="")
    push_to_hub.score(script, SimpleNamespace(env_id="Taxi-v4"), None, options)
    assert seen[:5] == [16, 54, 165, 177, 191]
    assert seen[-3:] == [11, 28, 148]
    assert (len(seen), sum(seen)) == (100, 8859)
    seen.clear()
    push_to_hub.score(script, SimpleNamespace(env_id="CartPole-v1"), None, options)
    assert len(set(seen)) == 100


def test_model_card_is_what_the_course_reads(trained):
    from huggingface_hub import ModelCard, metadata_load

    folder = package(trained("ppo"), "--tags", "CartPole-v0", "extra")
    mean, std, _ = results(folder)
    metric = metadata_load(folder / "README.md")["model-index"][0]["results"][0]["metrics"][0]
    assert (metric["type"], metric["value"]) == ("mean_reward", f"{mean:.2f} +/- {std:.2f}")
    card = ModelCard.load(folder / "README.md")
    assert {"reinforcement-learning", "CartPole-v1", "deep-rl-course", "CartPole-v0", "extra"} <= set(card.data.tags)
    assert "stable-baselines3" not in card.data.tags
    assert card.data.pipeline_tag == "reinforcement-learning"
    assert card.data.library_name == "solorl"
    command = re.search(r"^python ppo.py (.*)$", card.text, re.MULTILINE)[1]
    config = json.loads((folder / "config.json").read_text())["config"]
    assert ppo.parse_args(shlex.split(command)) == ppo.Args(**config)


def test_an_environment_that_does_not_render_is_packaged_without_video(capsys):
    folder = package(run("ppo", "--env-id", "toy_envs:Constant-v0"))
    assert results(folder) == (8, 0, 12)
    assert "no video, toy_envs:Constant-v0 does not render" in capsys.readouterr().err
    assert not (folder / "replay.mp4").exists()
    assert "<video" not in (folder / "README.md").read_text()


def test_the_policy_of_frozen_lake_is_in_the_card(trained):
    from huggingface_hub import ModelCard

    folder = package(trained("q_learning"))
    assert (folder / "policy.png").read_bytes() == (trained("q_learning") / "policy.png").read_bytes()
    text = (folder / "README.md").read_text()
    assert "![The greedy policy](policy.png)" in text
    assert {"FrozenLake-v1-4x4", "q-learning"} <= set(ModelCard(text).data.tags)
    shutil.move(folder, "moved")
    assert (package("moved") / "policy.png").exists()


def test_a_package_never_replaces_a_run(trained, capsys):
    with pytest.raises(SystemExit):
        package(trained("ppo"), "--output", str(trained("ppo").parent))
    assert "would overwrite" in capsys.readouterr().err
    assert (trained("ppo") / "checkpoint.pt").exists()


def test_links_in_a_package_are_not_followed(trained):
    folder = package(trained("ppo"))
    Path("secret").write_text("token")
    (folder / "logs/events.out.tfevents.link").symlink_to(Path("secret").resolve())
    shutil.move(folder, "moved")
    assert not (package("moved") / "logs/events.out.tfevents.link").exists()


def test_local_package_needs_no_display_git_or_ffmpeg(trained):
    """With nothing but Python on the PATH, and no account."""
    checkpoint = str(trained("ppo") / "checkpoint.pt")
    env = {key: value for key, value in os.environ.items() if key not in ("DISPLAY", "HF_TOKEN")}
    env |= {"PATH": "", "HOME": str(Path.cwd()), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(ROOT / "push_to_hub.py"), "--checkpoint", checkpoint, *OPTIONS]
    result = subprocess.run(command, capture_output=True, text=True, env=env)
    assert result.returncode == 0, result.stderr
    assert "package: hub/" in result.stdout
    assert "Deep RL Course: 350.0 asked for, not reached" in result.stdout


# --- the Hub ---


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub on loopback that the real client talks to. The client reads its settings at import: patch them."""
    from huggingface_hub import constants, hf_api

    with serve() as (server, address):
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(hf_api.api, "endpoint", address)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
        monkeypatch.setattr(push_to_hub.time, "sleep", lambda seconds: None)
        server.address = address
        yield server


@pytest.mark.parametrize("lfs", [False, True])
def test_push_update_and_fetch_back(hub, trained, lfs, capsys):
    hub.lfs = lfs
    folder = package(trained("ppo"), "--repo-id", "me/cart", "--commit-message", "first")
    ours = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert {key: value for key, value in hub.repos["me/cart"].items() if key != ".gitattributes"} == ours
    assert f"pushed: {hub.address}/me/cart" in capsys.readouterr().out
    assert len(hub.blobs) == (len(set(ours.values())) if lfs else 0)
    expected = results(folder)
    hub.repos["me/cart"] |= {"logs/stale": b"old", "old.py": b"old", "notes.txt": b"the user's own"}
    package(trained("ppo"), "--repo-id", "me/cart", "--commit-message", "second")
    assert set(hub.repos["me/cart"]) == {*ours, ".gitattributes", "notes.txt"}
    assert hub.commits == [("me/cart", "first"), ("me/cart", "second")]
    fetched = package("hf://me/cart")
    assert fetched == Path("hub/me-cart")
    assert results(fetched) == expected


def test_usage_snippet_of_the_card_works(hub, trained):
    folder = package(trained("ppo"), "--repo-id", "me/cart")
    snippet = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)[1]
    env = os.environ | {"HF_ENDPOINT": hub.address, "PYTHONPATH": str(ROOT), "HF_HUB_DISABLE_XET": "1"}
    result = subprocess.run([sys.executable, "-c", snippet], capture_output=True, text=True, env=env)
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) > 5


def cut_after(count):
    return [None] * count + ["cut"] * 50


FAULTS = {
    "wrong token": (lambda hub, patch: patch.setenv("HF_TOKEN", "hf_bad"), "the token is missing or wrong"),
    "no token": (lambda hub, patch: patch.delenv("HF_TOKEN"), "no token; log in with: hf auth login"),
    "forbidden": (lambda hub, patch: setattr(hub, "forbidden", True), "this token is not allowed to"),
    "cut half-way": (lambda hub, patch: hub.faults.extend(cut_after(3)), "RemoteProtocolError"),
    "500 for ever": (lambda hub, patch: hub.faults.extend([500] * 50), "HfHubHTTPError"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_failed_push_keeps_the_package_and_says_how_to_retry(hub, trained, fault, monkeypatch, capsys):
    inject, message = FAULTS[fault]
    inject(hub, monkeypatch)
    with pytest.raises(SystemExit) as stop:
        package(trained("ppo"), "--repo-id", "me/cart", "--private", "--tags", "a", "b")
    assert stop.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "push to me/cart" in line]
    assert message in lines[-1]
    folder = Path("hub", trained("ppo").name)
    retry = f"python push_to_hub.py --checkpoint {folder} --repo-id me/cart --private --tags a b --num-eval-episodes 12"
    assert retry in lines[-1]
    assert (folder / "replay.mp4").exists()
    assert not hub.commits
    hub.faults.clear()
    hub.forbidden = False
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    package(folder, "--repo-id", "me/cart")
    assert hub.commits == [("me/cart", "Add a trained agent")]


def test_server_down(hub, trained, monkeypatch, capsys):
    from huggingface_hub import hf_api

    monkeypatch.setattr(hf_api.api, "endpoint", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(SystemExit) as stop:
        package(trained("ppo"), "--repo-id", "me/cart")
    assert stop.value.code == 2
    assert "ConnectError" in capsys.readouterr().err


def test_a_failed_file_upload_is_a_fault_like_others(hub, trained, capsys):
    hub.lfs, hub.fail_blobs = True, True
    with pytest.raises(SystemExit) as stop:
        package(trained("ppo"), "--repo-id", "me/cart")
    assert stop.value.code == 2
    assert "to try again: python push_to_hub.py" in capsys.readouterr().err


def test_500_twice_then_fine(hub, trained, capsys):
    hub.faults = [500, 500]
    package(trained("ppo"), "--repo-id", "me/cart")
    assert capsys.readouterr().err.count("trying again in") == 2
    assert hub.commits == [("me/cart", "Add a trained agent")]


def test_fetch_of_what_is_not_there(hub, capsys):
    with pytest.raises(SystemExit) as stop:
        package("hf://me/nothing")
    assert stop.value.code == 2
    assert "cannot fetch hf://me/nothing" in capsys.readouterr().err


# --- bad input ---


class Evil:
    def __reduce__(self):
        return (open, ("evil.txt", "w"))


@pytest.mark.parametrize("kind", "truncated evil path sibling nothing text flags weights missing".split())
def test_bad_checkpoints_are_refused(kind, trained, capsys, monkeypatch):
    good = torch.load(trained("ppo") / "checkpoint.pt", weights_only=True)
    path = Path("run/checkpoint.pt")
    path.parent.mkdir()
    changes = {
        "evil": {"step": Evil()},
        "path": {"script": "../ppo.py"},
        "sibling": {"script": "other.py"},
        "missing": {"script": "no_such_script.py"},
        "flags": {"config": {"new_flag": 1}},
        "weights": {"config": good["config"] | {"env_id": "Acrobot-v1"}},
    }
    capsys.readouterr()  # what training printed
    if kind == "sibling":
        Path("other.py").write_text("open('evil.txt', 'w')")
        monkeypatch.setattr(push_to_hub, "SCRIPT", Path("push_to_hub.py").resolve())
    if kind in changes:
        torch.save(good | changes[kind], path)
    elif kind == "truncated":
        path.write_bytes((trained("ppo") / "checkpoint.pt").read_bytes()[:-500])
    elif kind == "text":
        path.write_text("no checkpoint")
    with pytest.raises(SystemExit) as stop:
        package(path)
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("push_to_hub.py: error: ")
    assert err.count("\n") == 1
    assert not Path("evil.txt").exists()
    assert not Path("hub").exists()


def test_a_downloaded_agent_imports_no_package_unasked(hub, trained, capsys):
    folder = package(trained("ppo"), "--repo-id", "me/cart")
    config = json.loads((folder / "config.json").read_text())
    config["config"]["env_id"] = "evil_package:CartPole-v1"
    hub.repos["me/cart"]["config.json"] = json.dumps(config).encode()
    Path("evil_package.py").write_text("open('evil.txt', 'w')")
    sys.path.insert(0, str(Path.cwd()))
    try:
        with pytest.raises(SystemExit):
            package("hf://me/cart")
        assert "--trust-env-package" in capsys.readouterr().err
        assert not Path("evil.txt").exists()
        package("hf://me/cart", "--trust-env-package")
        assert Path("evil.txt").exists()
    finally:
        sys.path.remove(str(Path.cwd()))


@pytest.mark.parametrize(
    "flags", ["--num-eval-episodes 0", "--video-seconds nan", "--repo-id nouser", "--device cuda:99"]
)
def test_bad_flags_are_refused(flags, trained, capsys):
    trained("ppo")
    capsys.readouterr()  # what training printed
    with pytest.raises(SystemExit) as stop:
        package(trained("ppo"), *flags.split())
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not Path("hub").exists()
