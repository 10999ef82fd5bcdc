"""Packaging and pushing: every script's checkpoint, the real Hub client against a server on loopback, and faults."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import pytest
import torch

import ppo
import push_to_hub
from conftest import ROOT
from hub_server import TOKEN, serve
from runs import HAS_DOOM, SCRIPTS, load, run
from runs import results as training_results

OPTIONS = ["--video-seconds", "1"]


def package(checkpoint, *flags):
    """Run push_to_hub.py in process; returns the results it wrote."""
    import tyro

    options = tyro.cli(push_to_hub.Options, args=["--checkpoint", str(checkpoint), *OPTIONS, *flags])
    push_to_hub.main(options)
    name = options.checkpoint.removeprefix("hf://").replace("/", "-")
    if "hf://" not in options.checkpoint:
        name = Path(checkpoint).resolve().name
    return Path(options.output, name if name != "checkpoint.pt" else Path(checkpoint).resolve().parent.name)


def results(folder):
    scores = json.loads((folder / "results.json").read_text())
    return scores["mean_reward"], scores["std_reward"], scores["n_eval_episodes"]


# --- the package ---


@pytest.mark.parametrize("name", SCRIPTS)
def test_one_number(name, trained, capsys):
    """Training, checkpoint.pt and package have the same score, digit for digit."""
    expected = training_results(trained(name).folder)
    expected = expected["mean_reward"], expected["std_reward"], expected["n_eval_episodes"]
    capsys.readouterr()  # what training printed
    folder = package(trained(name).folder / "checkpoint.pt")
    assert results(folder) == expected
    out = capsys.readouterr().out
    mean, std, episodes = expected
    assert f"{mean:.2f} +/- {std:.2f} over {episodes} episodes, mean - std {mean - std:.2f}" in out
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    wanted = {"README.md", "model.safetensors", "config.json", "results.json", "replay.mp4", "learning_curve.png"}
    assert wanted | {f"{name}.py", "logs/episodes.csv"} <= files
    assert any(file.startswith("logs/events.out.tfevents.") for file in files)
    shutil.move(folder, "moved")
    assert results(package("moved", "--video-seconds", "0.1")) == expected
    assert {path.name for path in Path("hub/moved").iterdir()} == {path.name for path in Path("moved").iterdir()}


def test_sampled_actions_give_the_same_number_too():
    folder = run("ppo", "--no-eval-deterministic", "--eval-episodes", "5")
    expected = training_results(folder)
    assert results(package(folder)) == (expected["mean_reward"], expected["std_reward"], 5)


def test_another_seed_and_other_episodes(trained):
    own = results(package(trained("ppo").folder))
    assert results(package(trained("ppo").folder, "--num-eval-episodes", "7"))[2] == 7
    assert results(package(trained("ppo").folder, "--seed", "7")) != own


@pytest.mark.parametrize("name", ["ppo", "dqn_atari"])
def test_video_plays_in_browsers_and_is_short(name, trained):
    path = package(trained(name).folder, "--video-seconds", "0.2") / "replay.mp4"
    frames, meta = imageio.imread(path), imageio.immeta(path)
    assert meta["codec"] == "h264"
    assert meta["pix_fmt"].startswith("yuv420p")
    assert frames.shape[1] % 2 == frames.shape[2] % 2 == 0
    assert len(frames) == round(0.2 * meta["fps"])
    assert frames.std() > 5  # not black
    assert len(np.unique(frames.mean(axis=(1, 2, 3)))) > 1 or (frames[0] != frames[-1]).any()


def test_video_ends_with_the_episode(trained):
    """CartPole: the first frame, and one for each step of the first episode of the evaluation."""
    folder = package(trained("ppo").folder, "--video-seconds", "60")
    _, args, agent = push_to_hub.rebuild(push_to_hub.read(str(folder)), push_to_hub.Options(checkpoint=""))
    assert len(imageio.imread(folder / "replay.mp4")) == ppo.evaluate(agent, args, 1)[0] + 1


def test_an_environment_that_does_not_render_is_packaged_without_video(capsys):
    folder = run("ppo", "--env-id", "toy_envs:Constant-v0")
    folder = package(folder, "--trust-env-package")
    assert results(folder) == (8, 0, 2)
    assert "no video: toy_envs:Constant-v0 has no render mode rgb_array" in capsys.readouterr().err
    assert not (folder / "replay.mp4").exists()
    assert "<video" not in (folder / "README.md").read_text()


def test_model_card_is_what_the_course_reads(trained):
    from huggingface_hub import ModelCard, metadata_load

    folder = package(trained("ppo").folder, "--tags", "CartPole-v0", "extra")
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
    assert {"FrozenLake-v1-4x4", "q-learning"} <= set(
        ModelCard.load(package(trained("q_learning").folder) / "README.md").data.tags
    )


def test_the_card_shows_the_elo_ratings(trained):
    folder = package(trained("ppo_selfplay").folder)
    assert "![Elo](logs/elo.png)" in (folder / "README.md").read_text()
    assert (folder / "logs/elo.png").read_bytes() == (trained("ppo_selfplay").folder / "elo.png").read_bytes()
    assert (folder / "logs/elo.csv").exists()
    assert "elo" not in (package(trained("ppo").folder) / "README.md").read_text()


# --- the Deep RL Course ---


class FakeScript:
    """A script whose evaluation returns `value`, and keeps the seeds that it is given."""

    Args = ppo.Args

    def __init__(self, value=0.0):
        self.value, self.seeds = value, []

    def evaluate(self, agent, args, episodes, seeds=None):
        self.seeds.append(seeds)
        return np.full(episodes, self.value)


def scored(capsys, script, *flags):
    """What push_to_hub.py prints about a score."""
    options = push_to_hub.Options(checkpoint="")
    _, course_returns = push_to_hub.score(script, ppo.parse_args(list(flags)), None, options)
    return capsys.readouterr().out, course_returns


def test_taxi_is_scored_on_the_seeds_of_the_course(capsys):
    script = FakeScript(5.0)
    out, course_returns = scored(capsys, script, "--env-id", "Taxi-v4", "--eval-episodes", "10")
    assert script.seeds == [None, push_to_hub.TAXI_SEEDS]
    assert len(course_returns) == len(push_to_hub.TAXI_SEEDS) == 100
    assert (push_to_hub.TAXI_SEEDS[:3], sum(push_to_hub.TAXI_SEEDS)) == ([16, 54, 165], 8859)
    assert "Taxi-v4 on the seeds of the Deep RL Course: 5.00 +/- 0.00 over 100 episodes" in out
    assert "Deep RL Course: 4.5 asked for, passed" in out


def test_the_verdict_of_the_course(capsys):
    """None for another environment, for changed keyword arguments, or where episodes are stopped early."""
    assert "200.0 asked for, passed" in scored(capsys, FakeScript(200.0))[0]
    assert "200.0 asked for, not reached" in scored(capsys, FakeScript(199.9))[0]
    assert "200.0 asked for" in scored(capsys, FakeScript(), "--max-eval-steps", "1000")[0]
    assert "Course" not in scored(capsys, FakeScript(), "--max-eval-steps", "999")[0]
    assert "Course" not in scored(capsys, FakeScript(), "--env-kwargs", '{"gravity": -1}')[0]
    assert "Course" not in scored(capsys, FakeScript(), "--env-id", "Acrobot-v1")[0]
    script = FakeScript(9.0)
    assert "Course" not in scored(capsys, script, "--env-id", "Taxi-v4", "--env-kwargs", '{"is_rainy": true}')[0]
    assert script.seeds == [None]


@pytest.mark.skipif(not HAS_DOOM, reason="VizDoom is not installed: pip install -r requirements-extra.txt")
def test_doom_is_scored_and_tagged_as_in_the_course(trained, capsys):
    """The card of Sample Factory's agents names the task doom_health_gathering_supreme; so does ours."""
    from huggingface_hub import ModelCard, metadata_load

    run("ppo_doom", "--env-id", "doom_health_gathering_supreme", "--total-timesteps", "32", "--num-checkpoints", "1")
    (folder,) = Path("runs").iterdir()
    folder = package(folder)
    assert "Deep RL Course: 5.0 asked for, not reached" in capsys.readouterr().out
    tags = ModelCard.load(folder / "README.md").data.tags
    assert {"reinforcement-learning", "deep-rl-course", "doom_health_gathering_supreme"} <= set(tags)
    dataset = metadata_load(folder / "README.md")["model-index"][0]["results"][0]["dataset"]
    assert dataset == {"name": "doom_health_gathering_supreme", "type": "doom_health_gathering_supreme"}
    package(trained("ppo_doom").folder)  # another scenario
    assert "Course" not in capsys.readouterr().out


# --- files of the user ---


def test_a_package_never_replaces_what_is_not_a_package(trained, capsys, tmp_path):
    """Neither a run, nor a folder of the user that has the same name; nothing is evaluated before that is known."""
    name = trained("ppo").folder.name
    Path(name).mkdir()
    Path(name, "thesis.txt").write_text("mine")
    Path("file").mkdir()
    Path("file", name).write_text("mine")
    for output in (trained("ppo").folder.parent, ".", "file"):
        with pytest.raises(SystemExit) as stop:
            package(trained("ppo").folder, "--output", str(output))
        assert stop.value.code == 2
        out, err = capsys.readouterr()
        assert "is not a package" in err
        assert "episodes" not in out
    assert (trained("ppo").folder / "checkpoint.pt").exists()
    assert Path(name, "thesis.txt").read_text() == Path("file", name).read_text() == "mine"


def test_an_earlier_package_is_replaced_and_other_files_in_it_stay(trained):
    folder = package(trained("ppo").folder)
    (folder / "notes.txt").write_text("mine")
    (folder / "logs/old").write_text("of an earlier run")
    (folder / "old.py").write_text("of an earlier run")
    package(trained("ppo").folder)
    assert (folder / "notes.txt").read_text() == "mine"
    assert not (folder / "logs/old").exists()
    assert not (folder / "old.py").exists()
    assert [path.name for path in Path("hub").iterdir()] == [folder.name]  # no temporary folder is left


@pytest.mark.parametrize(
    "text", ["", "step,return,length\n1,2", "\0\0\0", "a,b\n1,2,3,4\n,,\n", "step,return,length\n5,nan,1\n"]
)
def test_a_torn_or_foreign_episodes_csv_is_no_reason_to_fail(text, trained):
    shutil.copytree(trained("q_learning").folder, "run")
    Path("run/episodes.csv").write_text(text)
    assert not (package("run", "--num-eval-episodes", "1") / "learning_curve.png").exists()
    Path("run/episodes.csv").write_bytes(b"step,return,length\n1,2.5,3\n4,-1e-05,6\n\xff\xfe,1\n7,8")
    assert (package("run", "--num-eval-episodes", "1") / "learning_curve.png").exists()


def test_links_in_a_package_are_not_followed(trained):
    folder = package(trained("ppo").folder)
    Path("secret").write_text("token")
    (folder / "logs/events.out.tfevents.link").symlink_to(Path("secret").resolve())
    shutil.move(folder, "moved")
    assert not (package("moved") / "logs/events.out.tfevents.link").exists()


def test_local_package_needs_no_display_git_or_ffmpeg(trained):
    """With nothing but Python on the PATH, and no account."""
    checkpoint = str(trained("ppo").folder / "checkpoint.pt")
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
    folder = package(trained("ppo").folder, "--repo-id", "me/cart", "--commit-message", "first")
    ours = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert {key: value for key, value in hub.repos["me/cart"].items() if key != ".gitattributes"} == ours
    assert f"pushed: {hub.address}/me/cart" in capsys.readouterr().out
    assert len(hub.blobs) == (len(set(ours.values())) if lfs else 0)
    expected = results(folder)
    hub.repos["me/cart"] |= {"logs/stale": b"old", "old.py": b"old", "notes.txt": b"the user's own"}
    package(trained("ppo").folder, "--repo-id", "me/cart", "--commit-message", "second")
    assert set(hub.repos["me/cart"]) == {*ours, ".gitattributes", "notes.txt"}
    assert hub.commits == [("me/cart", "first"), ("me/cart", "second")]
    fetched = package("hf://me/cart")
    assert fetched == Path("hub/me-cart")
    assert results(fetched) == expected


def test_usage_snippet_of_the_card_works(hub, trained):
    folder = package(trained("ppo").folder, "--repo-id", "me/cart")
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
        package(trained("ppo").folder, "--repo-id", "me/cart", "--private", "--tags", "a", "b")
    assert stop.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "push to me/cart" in line]
    assert message in lines[-1]
    folder = Path("hub", trained("ppo").folder.name)
    retry = f"python push_to_hub.py --checkpoint={folder} --repo-id=me/cart --private --tags a b --video-seconds=1"
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
        package(trained("ppo").folder, "--repo-id", "me/cart")
    assert stop.value.code == 2
    assert "ConnectError" in capsys.readouterr().err


def test_a_failed_file_upload_is_a_fault_like_others(hub, trained, capsys):
    hub.lfs, hub.fail_blobs = True, True
    with pytest.raises(SystemExit) as stop:
        package(trained("ppo").folder, "--repo-id", "me/cart")
    assert stop.value.code == 2
    assert "to try again: python push_to_hub.py" in capsys.readouterr().err


def test_500_twice_then_fine(hub, trained, capsys):
    hub.faults = [500, 500]
    package(trained("ppo").folder, "--repo-id", "me/cart")
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


KINDS = (
    "truncated evil path sibling nothing text flags weights missing list step zero type episodes nan package".split()
)


@pytest.mark.parametrize("kind", KINDS)
def test_bad_checkpoints_are_refused(kind, trained, capsys, monkeypatch):
    good = torch.load(trained("ppo").folder / "checkpoint.pt", weights_only=True)
    path = Path("run/checkpoint.pt")
    path.parent.mkdir()
    changes = {
        "evil": {"step": Evil()},
        "path": {"script": "../ppo.py"},
        "sibling": {"script": "other.py"},
        "missing": {"script": "no_such_script.py"},
        "flags": {"config": {"new_flag": 1}},
        "weights": {"config": good["config"] | {"env_id": "Acrobot-v1"}},
        "step": {"step": "many"},
        "zero": {"config": good["config"] | {"max_eval_steps": 0}},
        "type": {"config": good["config"] | {"gamma": "high"}},
        "episodes": {"config": good["config"] | {"eval_episodes": 10**9}},
        "nan": {"agent": {name: tensor * torch.nan for name, tensor in good["agent"].items()}},
        "package": {"config": good["config"] | {"env_id": "evil_package:CartPole-v1"}},
    }
    capsys.readouterr()  # what training printed
    if kind == "sibling":
        Path("other.py").write_text("open('evil.txt', 'w')")
        monkeypatch.setattr(push_to_hub, "SCRIPT", Path("push_to_hub.py").resolve())
    if kind == "package":
        Path("evil_package.py").write_text("open('evil.txt', 'w')")
        monkeypatch.syspath_prepend(Path.cwd())
    if kind in changes:
        torch.save(good | changes[kind], path)
    elif kind == "list":
        torch.save([1, 2], path)
    elif kind == "truncated":
        path.write_bytes((trained("ppo").folder / "checkpoint.pt").read_bytes()[:-500])
    elif kind == "text":
        path.write_text("no checkpoint")
    with pytest.raises(SystemExit) as stop:
        package(path)
    assert stop.value.code == 2 or (kind == "nan" and "actor.0.weight is NaN" in stop.value.code)
    if kind not in ("nan", "type"):  # tyro says the second in a box
        err = capsys.readouterr().err
        assert re.match(r"(push_to_hub|ppo)\.py: error: ", err)
        assert err.count("\n") == 1
    assert not Path("evil.txt").exists()
    assert not Path("hub").exists()


def test_a_downloaded_agent_imports_no_package_unasked(hub, trained, capsys):
    folder = package(trained("ppo").folder, "--repo-id", "me/cart")
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


HOSTILE = ["a\n```\n# Fake title", "a`b", "a|b | c", "<x>\r\n| `gamma` | `7` |", "a\u2028b"]


@pytest.mark.parametrize("text", HOSTILE)
def test_no_flag_breaks_out_of_its_place_in_the_card(text, trained):
    """A card is pushed under the user's name: a flag of somebody's package must not add text to it."""
    good = load(trained("ppo").folder)
    shutil.copytree(trained("ppo").folder, "run")
    torch.save(good | {"config": good["config"] | {"wandb_project_name": text}}, "run/checkpoint.pt")
    usual = package(trained("ppo").folder, "--num-eval-episodes", "1") / "README.md"
    card = package("run", "--num-eval-episodes", "1") / "README.md"
    usual, card = usual.read_text().splitlines(), card.read_text().splitlines()
    assert len(card) == len(usual)
    rows = [line for line in card if line.startswith("| `wandb_project_name`")]
    assert len(rows) == 1
    assert len(re.findall(r"(?<!\\)\|", rows[0])) == 3
    assert rows[0].count("`") == 4
    assert sum(line.startswith("```") for line in card) == sum(line.startswith("```") for line in usual)


@pytest.mark.parametrize(
    "flags", ["--num-eval-episodes 0", "--video-seconds nan", "--repo-id nouser", "--device cuda:99", "--seed -1"]
)
def test_bad_flags_are_refused(flags, trained, capsys):
    trained("ppo")
    capsys.readouterr()  # what training printed
    with pytest.raises(SystemExit) as stop:
        package(trained("ppo").folder, *flags.split())
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not Path("hub").exists()
