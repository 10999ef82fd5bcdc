"""Stopping a run, however hard, and going on with it: it ends as if it had never been stopped."""

import csv
import json
import os
import pickle
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

from runs import (
    SCRIPTS,
    every_script,
    files,
    flags_of,
    load,
    module_of,
    refusal,
    results,
    resume,
    run,
    same_weights,
    scalars,
)  # fmt: skip

posix = pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
with_optimizer = [name for name in SCRIPTS if name not in ("q_learning", "sac_continuous")]  # sac has three


def episodes(folder):
    return Path(folder, "episodes.csv").read_text()


def assert_same_run(folder, expected):
    assert load(folder)["step"] == load(expected)["step"]
    assert same_weights(folder, expected)
    assert episodes(folder) == episodes(expected)
    assert results(folder)["mean_reward"] == results(expected)["mean_reward"]


def wait_for_checkpoint(process, after_step=0):
    """The folder of the run, once it has written a checkpoint at or after this step."""
    deadline = time.monotonic() + 120
    while True:
        for path in Path().glob("runs/*/checkpoint.pt"):
            if after_step == 0 or load(path.parent)["step"] >= after_step:
                return path.parent
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def next_second():
    """TensorBoard orders its files by the second in which they were begun."""
    time.sleep(1 - time.time() % 1)


# --- stopped at any moment ---


@every_script
def test_stopped_and_resumed_is_the_uninterrupted_run(name, trained):
    """Stopped while the last checkpoint was half written: the one before counts, and later rows are dropped."""
    folder, expected = trained(name).copy(stopped=True), trained(name).folder
    assert 0 < load(folder)["step"] < load(expected)["step"]
    (folder / "checkpoint.tmp").write_bytes(b"half a file")
    with open(folder / "episodes.csv", "a") as file:
        file.write("99999,1.0,1\n888")  # written after the checkpoint, the last row torn
    next_second()
    assert resume(name, folder) == folder
    assert_same_run(folder, expected)
    assert not (folder / "checkpoint.tmp").exists()
    steps = [[event.step for event in scalars(f, "time/sps")] for f in (folder, expected)]
    assert steps[0] == steps[1]


@posix
def test_killed_and_resumed_is_the_uninterrupted_run(start):
    flags = ["--total-timesteps", "6400", "--num-checkpoints", "8"]
    process = start("ppo.py", *flags_of("ppo"), *flags)
    folder = wait_for_checkpoint(process, after_step=800)
    process.kill()
    process.wait()
    assert not (folder / "results.json").exists()
    resume("ppo", folder)
    assert_same_run(folder, run("ppo", *flags))


@pytest.mark.parametrize("name", ["q_learning", "a2c_continuous"])
@pytest.mark.parametrize("saved", [0, 1, 2])
def test_a_full_disk_keeps_the_checkpoint_before(name, saved, trained, monkeypatch):
    save, count = torch.save, []

    def die(state, path):
        count.append(state["step"])
        if len(count) > saved:
            Path(path).write_bytes(b"half a file")
            raise OSError("disk full")
        save(state, path)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk full"):
        patch.setattr(torch, "save", die)
        run(name)
    (folder,) = Path("runs").iterdir()
    if saved == 0:
        assert not (folder / "checkpoint.pt").exists()
    else:
        assert load(folder)["step"] == count[saved - 1]
        resume(name, folder)
        assert_same_run(folder, trained(name).folder)


def stop_in_the_first_evaluation(monkeypatch, go_on):
    """The checkpoint is written before its evaluation."""

    def stop(*args, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module_of("ppo"), "evaluate", stop)
        go_on()


def test_stopped_during_the_first_evaluation(trained, monkeypatch):
    stop_in_the_first_evaluation(monkeypatch, lambda: run("ppo"))
    (folder,) = Path("runs").iterdir()
    assert load(folder)["step"] == 0
    resume("ppo", folder)
    assert_same_run(folder, trained("ppo").folder)


def test_stopped_again_right_after_it_was_resumed(trained, monkeypatch):
    folder = trained("ppo").copy(stopped=True)
    before = load(folder)
    stop_in_the_first_evaluation(monkeypatch, lambda: resume("ppo", folder))
    assert (load(folder)["step"], load(folder)["csv_size"]) == (before["step"], before["csv_size"])
    with open(folder / "episodes.csv", "a") as file:
        file.write("99999,1.0,1\n")
    resume("ppo", folder)
    assert_same_run(folder, trained("ppo").folder)


# --- episodes.csv ---


@pytest.mark.parametrize("damage", ["missing", "empty", "shortened", "torn", "longer"])
def test_a_damaged_episodes_file_stays_readable(damage, trained):
    """Rows of the time before the checkpoint are lost with it; those after it are written as ever."""
    folder = trained("ppo").copy(stopped=True)
    path, text, size = folder / "episodes.csv", episodes(folder), load(folder)["csv_size"]
    rows_after = episodes(trained("ppo").folder)[size:].splitlines()
    row_end = text.index("\n", size // 2) + 1
    if damage == "missing":
        path.unlink()
    else:
        path.write_text(
            {"empty": "", "shortened": text[:row_end], "torn": text[: row_end - 3], "longer": text * 2}[damage]
        )
    resume("ppo", folder)
    assert b"\0" not in path.read_bytes()
    header, *rows = episodes(folder).splitlines()
    assert header == "step,return,length"
    assert rows[-len(rows_after) + 1 :] == rows_after[1:]  # the first one ends a torn row
    assert damage == "torn" or rows[-len(rows_after)] == rows_after[0]
    assert same_weights(folder, trained("ppo").folder)


# --- signals ---


@posix
@pytest.mark.parametrize(
    ("name", "flags", "signum", "code"),
    [
        ("ppo", [], signal.SIGINT, 130),
        ("ppo", ["--vectorization-mode", "async"], signal.SIGINT, 130),
        ("ppo", ["--vectorization-mode", "async"], signal.SIGTERM, 143),
        ("dqn_atari", [], signal.SIGTERM, 143),
    ],
)
def test_a_signal_stops_it_and_says_how_to_resume(name, flags, signum, code, start):
    """Ctrl-C reaches every process of the terminal's group, also those of the environments."""
    flags = [*flags_of(name), *flags, "--total-timesteps", "100_000_000"]
    process = start(f"{name}.py", *flags, start_new_session=True)
    folder = wait_for_checkpoint(process)
    time.sleep(0.5)
    if signum == signal.SIGINT:
        os.killpg(process.pid, signum)
    else:
        process.send_signal(signum)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == code, stderr
    assert "Traceback" not in stderr
    assert f"to continue: python {name}.py --resume {folder} --env-id {load(folder)['config']['env_id']}\n" in stderr
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)  # no process of an environment is left


# --- a finished run, and other flags ---


@pytest.mark.parametrize("name", ["q_learning", "ppo", "dqn_atari"])
def test_resume_a_finished_run_only_repeats_its_evaluation(name, trained):
    folder = trained(name).copy()
    resume(name, folder)
    assert_same_run(folder, trained(name).folder)


@pytest.mark.parametrize("name", ["q_learning", "reinforce", "a2c_continuous", "ppo"])
def test_resume_with_more_steps_goes_on(name, trained, capsys):
    folder = trained(name).copy()
    resume(name, folder, "--total-timesteps", "4000")
    assert f"--total-timesteps 4000 overrides {trained(name).checkpoint['config']['total_timesteps']}\n" in (
        capsys.readouterr().err
    )
    checkpoint = load(folder)
    assert checkpoint["step"] >= 4000
    assert checkpoint["config"] == trained(name).checkpoint["config"] | {"total_timesteps": 4000}
    rows = list(csv.DictReader((folder / "episodes.csv").open()))
    steps = [int(row["step"]) for row in rows]
    assert steps == sorted(steps)
    assert max(steps) > trained(name).checkpoint["step"]
    assert episodes(folder).startswith(episodes(trained(name).folder))


@pytest.mark.parametrize("name", with_optimizer)
def test_another_learning_rate_takes_effect(name, trained, capsys):
    """One step more with a rate of zero: nothing that the optimizer moves has moved."""
    folder = trained(name).copy()
    end = trained(name).checkpoint
    flags = ["--learning-rate", "0", "--total-timesteps", str(end["step"] + 1), "--eval-episodes", "1"]
    if name in ("dqn_atari", "ddqn_atari"):
        flags[3] = str(end["step"] + 64)  # at least one gradient step
    resume(name, folder, *flags)
    assert f"--learning-rate 0.0 overrides {end['config']['learning_rate']}\n" in capsys.readouterr().err
    now = load(folder)
    assert now["step"] > end["step"]
    assert now["config"]["learning_rate"] == 0
    assert now["optimizer"]["param_groups"][0]["lr"] == 0
    steps = [[state["step"] for state in c["optimizer"]["state"].values()] for c in (end, now)]
    assert steps[1][0] > steps[0][0]
    for key in end["agent"]:
        if "norm" not in key:
            assert torch.equal(end["agent"][key], now["agent"][key]), key


def test_other_flags_take_effect_and_are_named_once(trained, capsys, monkeypatch):
    module, used = module_of("ppo"), set()
    compute_gae, ppo_loss = module.compute_gae, module.ppo_loss

    def watch_gae(*inputs):
        used.add(("gamma", inputs[4]))
        used.add(("gae_lambda", inputs[5]))
        return compute_gae(*inputs)

    def watch_loss(*inputs):
        used.add(("clip_coef", inputs[-1].clip_coef))
        return ppo_loss(*inputs)

    monkeypatch.setattr(module, "compute_gae", watch_gae)
    monkeypatch.setattr(module, "ppo_loss", watch_loss)
    folder = trained("ppo").copy(stopped=True)
    resume("ppo", folder, "--gamma", "0.9", "--gae-lambda=0.5", "--clip_coef", "0.3", "--seed", "1", "--no-anneal-lr")
    assert used == {("gamma", 0.9), ("gae_lambda", 0.5), ("clip_coef", 0.3)}
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("--")]
    expected = ["--gamma 0.9 overrides 0.999", "--gae-lambda 0.5 overrides 0.98", "--clip-coef 0.3 overrides 0.2"]
    assert sorted(lines) == sorted([*expected, "--anneal-lr False overrides True"])
    config = json.loads((folder / "config.json").read_text())
    assert (config["gamma"], load(folder)["config"]["gamma"]) == (0.9, 0.9)


def test_flags_that_say_what_the_run_has_are_not_named(trained, capsys):
    folder = trained("ppo").copy()
    resume("ppo", folder, "--seed", "1", "--env-id", "CartPole-v1")
    assert "overrides" not in capsys.readouterr().err
    assert_same_run(folder, trained("ppo").folder)


# --- checkpoints that cannot be used ---


class Evil:
    def __reduce__(self):
        return open, ("evil.txt", "w")


def checkpoint_that_is(kind, good, folder):
    """Write a checkpoint.pt of this kind, and return what its refusal says."""
    folder.mkdir()
    path, checkpoint = folder / "checkpoint.pt", load(good)
    config = checkpoint["config"]
    if kind == "damaged":
        path.write_bytes((good / "checkpoint.pt").read_bytes()[:-1000])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "pickle":
        path.write_bytes(pickle.dumps(Evil()))
    else:
        changed = {
            "of another script": checkpoint | {"script": "other.py"},
            "of another version": checkpoint | {"config": config | {"new_flag": 1}},
            "without config": {"script": checkpoint["script"]},
            "evil": checkpoint | {"extra": Evil()},
            "evil in config": checkpoint | {"config": config | {"env_id": Evil()}},
            "a list": [1, 2],
            "a tensor": torch.zeros(2),
        }
        torch.save(changed[kind], path)
    Path("evil.txt").unlink(missing_ok=True)
    return {"of another script": "it is a run of other.py", "of another version": "new_flag"}.get(kind, "")


@pytest.mark.parametrize(
    "kind",
    ["of another script", "of another version", "without config", "evil", "evil in config", "pickle", "a list",
     "a tensor", "damaged", "empty"],
)  # fmt: skip
def test_a_checkpoint_that_does_not_fit_is_refused(kind, trained, capsys, tmp_path):
    reason = checkpoint_that_is(kind, trained("ppo").folder, tmp_path / "bad")
    before = files(".")
    line = refusal("ppo", "--resume", "bad", capsys=capsys)
    assert line.startswith("ppo.py: error: no checkpoint in 'bad' that fits this script and these flags")
    assert reason in line
    assert files(".") == before  # no evil.txt: reading it ran no code


@pytest.mark.parametrize("flags", [["--env-id", "Acrobot-v1"], ["--normalize-observations"]])
def test_a_network_that_does_not_fit_is_refused(flags, trained, capsys):
    """As after a change of the environment's spaces."""
    folder = trained("ppo").copy()
    before = files(folder)
    module = module_of("ppo")
    with pytest.raises(SystemExit) as stop:
        module.train(module.parse_args(["--resume", str(folder), *flags]))
    assert stop.value.code == 2
    *overrides, line = capsys.readouterr().err.splitlines()
    assert len(overrides) == 1
    assert line.startswith(f"ppo.py: error: no checkpoint in '{folder}' that fits")
    assert files(folder) == before


def test_an_environment_that_changed_since_is_refused(trained, capsys, tmp_path, monkeypatch):
    """The same flags, but its observations have another length now."""
    import toy_envs

    module = module_of("ppo")
    flags = ["--env-id", "toy_envs:Identity-v0", "--total-timesteps", "64", "--num-envs", "2", "--num-steps", "16"]
    folder = module.train(module.parse_args([*flags, "--num-minibatches", "2", "--eval-episodes", "1"]))
    before = files(folder)
    monkeypatch.setattr(toy_envs.Identity, "observation_space", toy_envs.Box(0, 1, (9,), "float32"))
    line = refusal("ppo", "--resume", folder, "--env-id", "toy_envs:Identity-v0", capsys=capsys)
    assert line.startswith(f"ppo.py: error: no checkpoint in '{folder}' that fits")
    assert files(folder) == before


def test_the_package_that_a_checkpoint_names_is_imported_only_if_the_user_says_so(trained, capsys, monkeypatch):
    """Else whoever gives you a run folder could have any file in it run."""
    folder = trained("ppo").copy(stopped=True)
    Path("payload.py").write_text("from pathlib import Path\nPath('imported.txt').write_text('')\n")
    monkeypatch.syspath_prepend(str(Path.cwd()))
    checkpoint = load(folder)
    checkpoint["config"]["env_id"] = "payload:CartPole-v1"
    torch.save(checkpoint, folder / "checkpoint.pt")
    for flags in ([], ["--env-id", "CartPole-v1"], ["--env-id", "other:CartPole-v1"]):
        line = refusal("ppo", "--resume", folder, *flags, capsys=capsys)
        assert "add --env-id payload:CartPole-v1" in line
        assert not Path("imported.txt").exists()
    resume("ppo", folder, "--env-id", "payload:CartPole-v1")
    assert Path("imported.txt").exists()
    assert same_weights(folder, trained("ppo").folder)
