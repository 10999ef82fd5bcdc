"""What a run computes and leaves behind: its files, its numbers, and what stops it."""

import csv
import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import imageio.v3 as imageio
import numpy as np
import pytest
import torch

from runs import (
    ROOT,
    SCRIPTS,
    every_script,
    flags_of,
    load,
    metric_names,
    module_of,
    results,
    run,
    same_weights,
    scalars,
    tensors,
    watch_make_envs,
)
from wandb_log import read_wandb

ALWAYS = {"episode/return", "episode/length", "eval/return_mean", "eval/return_std", "time/sps", "train/learning_rate"}
PPO_METRICS = {
    "loss/policy", "loss/value", "loss/entropy", "train/approx_kl", "train/clip_fraction", "train/grad_norm",
    "train/explained_variance",
}  # fmt: skip
METRICS = {
    "q_learning": {"loss/td", "train/q_value", "train/epsilon"},
    "reinforce": {"loss/policy", "loss/value", "loss/entropy"},
    "a2c_continuous": PPO_METRICS - {"train/approx_kl", "train/clip_fraction"},
    "sac_continuous": {"loss/td", "loss/policy", "loss/entropy", "train/q_value", "train/alpha"},
    "ppo": PPO_METRICS,
    "ppo_selfplay": PPO_METRICS,
    "ppo_atari": PPO_METRICS,
    "ppo_doom": PPO_METRICS,
    "ppo_atari_multigpu": PPO_METRICS,
    "dqn_atari": {"loss/td", "train/q_value", "train/epsilon"},
    "ddqn_atari": {"loss/td", "train/q_value", "train/epsilon"},
}


def read_episodes(folder):
    """The columns of episodes.csv as numbers."""
    rows = list(csv.DictReader((folder / "episodes.csv").open()))
    return {name: np.array([float(row[name]) for row in rows]) for name in ("step", "return", "length")}


# --- files and numbers ---


@every_script
def test_the_run_folder(name, trained):
    ours = trained(name)
    args = module_of(name).parse_args(flags_of(name))
    assert ours.folder.name.startswith(f"{args.env_id}__{name}__1__")
    names = {path.name for path in ours.folder.iterdir() if "tfevents" not in path.name}
    expected = {"checkpoint.pt", "config.json", "episodes.csv", "results.json", f"{name}.py"}
    assert names == expected | ({"elo.csv", "elo.png"} if name == "ppo_selfplay" else set())
    assert len(list(ours.folder.glob("events.out.tfevents.*"))) == 1
    assert (ours.folder / f"{name}.py").read_bytes() == (ROOT / f"{name}.py").read_bytes()

    config = json.loads((ours.folder / "config.json").read_text())
    versions = {"torch": torch.__version__, "gymnasium": gym.__version__, "python": sys.version}
    assert config == dataclasses.asdict(args) | versions
    found = results(ours.folder)
    keys = "env_id mean_reward std_reward is_deterministic n_eval_episodes eval_datetime"
    assert list(found) == keys.split()
    assert (found["env_id"], found["n_eval_episodes"]) == (args.env_id, 2)
    assert found["is_deterministic"] == args.eval_deterministic


@every_script
def test_checkpoints(name, trained):
    """The first one is written before any training; only tensors and plain values, none of them NaN or float64."""
    args = module_of(name).parse_args(flags_of(name))
    steps = [checkpoint["step"] for checkpoint in trained(name).checkpoints]
    assert steps[0] == 0
    assert args.total_timesteps / 2 <= steps[1] < steps[2]
    assert steps[2] >= args.total_timesteps
    optimizers = {"q_learning": set(), "sac_continuous": {"q_optimizer", "policy_optimizer", "alpha_optimizer"}}
    parts = {"agent", "script", "config", "step", "csv_size"} | optimizers.get(name, {"optimizer"})
    parts |= {"target_network", "replay"} if "dqn" in name or "sac" in name else set()
    parts |= {"pool"} if name == "ppo_selfplay" else set()
    for checkpoint in trained(name).checkpoints:
        assert set(checkpoint) == parts
        assert checkpoint["config"] == json.loads(json.dumps(dataclasses.asdict(args)))
        for tensor in tensors(checkpoint):
            assert tensor.dtype != torch.float64  # which Apple's GPUs do not have
            assert tensor.isfinite().all()


@every_script
def test_metrics_are_logged(name, trained):
    folder = trained(name).folder
    assert metric_names(folder) == ALWAYS | METRICS[name] | ({"eval/elo"} if name == "ppo_selfplay" else set())
    evaluated = [event.step for event in scalars(folder, "eval/return_mean")]
    assert evaluated == [checkpoint["step"] for checkpoint in trained(name).checkpoints]
    assert all(event.value > 5 for event in scalars(folder, "time/sps"))  # steps a second, not seconds
    for metric in METRICS[name]:
        steps = [event.step for event in scalars(folder, metric)]
        assert len(steps) >= 4
        assert steps == sorted(set(steps))
    assert scalars(folder, "eval/return_mean")[-1].value == np.float32(results(folder)["mean_reward"])
    assert scalars(folder, "eval/return_std")[-1].value == np.float32(results(folder)["std_reward"])


@every_script
def test_every_training_episode_is_in_the_csv(name, trained):
    episodes = read_episodes(trained(name).folder)
    end = trained(name).checkpoint["step"]
    assert len(episodes["step"]) > 5
    assert (np.diff(episodes["step"]) >= 0).all()
    assert episodes["step"][0] > 0
    assert episodes["step"][-1] <= end
    assert end / 2 < episodes["length"].sum() <= end
    if "CartPole" in trained(name).folder.name:
        np.testing.assert_array_equal(episodes["return"], episodes["length"])
    # What is logged between two entries is the mean of the episodes between them.
    before = 0
    for of_return, of_length in zip(*(scalars(trained(name).folder, f"episode/{key}") for key in ("return", "length"))):
        between = (before < episodes["step"]) & (episodes["step"] <= of_return.step)
        np.testing.assert_allclose(of_return.value, episodes["return"][between].mean(), rtol=1e-6)
        np.testing.assert_allclose(of_length.value, episodes["length"][between].mean(), rtol=1e-6)
        before = of_return.step


@pytest.mark.parametrize("name", ["q_learning", "ppo"])
def test_what_is_printed(name, trained):
    ours, found = trained(name), results(trained(name).folder)
    folder = Path("runs", ours.folder.name)
    mean, std = found["mean_reward"], found["std_reward"]
    assert ours.stdout == (
        f"{found['env_id']}: {mean:.2f} +/- {std:.2f} over 2 episodes, mean - std {mean - std:.2f}\n"
        f"package it: python push_to_hub.py --checkpoint {folder}\n"
    )
    assert ours.stderr.startswith(f"to continue: python {name}.py --resume {folder} --env-id {found['env_id']}\n")
    assert "evaluate:" in ours.stderr
    assert "step/s" in ours.stderr


# --- seeds ---


@pytest.mark.parametrize("name", ["q_learning", "ppo", "reinforce"])
def test_same_seed_same_weights_other_seed_other_weights(name, trained):
    again, other = run(name), run(name, "--seed", "2")
    assert same_weights(again, trained(name).folder)
    assert (again / "episodes.csv").read_text() == (trained(name).folder / "episodes.csv").read_text()
    assert not same_weights(other, again)
    assert (other / "episodes.csv").read_text() != (again / "episodes.csv").read_text()


class Stop(Exception):
    pass


def first_weights(name, seed, monkeypatch):
    """The weights in the checkpoint at step 0."""

    def keep(state, path):
        raise Stop([tensor.clone() for tensor in tensors(state["agent"])])

    with monkeypatch.context() as patch, pytest.raises(Stop) as stop:
        patch.setattr(torch, "save", keep)
        run(name, "--seed", seed)
    return stop.value.args[0]


@pytest.mark.parametrize("name", [name for name in SCRIPTS if name not in ("q_learning", "ddqn_atari")])
def test_the_seed_decides_the_first_weights(name, monkeypatch):
    first, again, other = (first_weights(name, seed, monkeypatch) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert not all(torch.equal(a, b) for a, b in zip(first, other))


def test_each_part_of_a_run_has_random_numbers_of_its_own(monkeypatch):
    """Else the first actions would come from the numbers that made the weights, and every checkpoint repeat them."""
    module = module_of("ppo")
    streams = {}
    original = module.seed_everything

    def watch(seed, *key):
        env_seed = original(seed, *key)
        with torch.random.fork_rng():
            streams[key] = (env_seed, float(torch.rand(1)), np.random.RandomState(env_seed).rand())
        return env_seed

    monkeypatch.setattr(module, "seed_everything", watch)
    folder = run("ppo")
    step = [event.step for event in scalars(folder, "eval/return_mean")]
    assert set(streams) == {(), (0,), (step[1],), (0, 1)}
    for numbers in zip(*streams.values()):
        assert len(set(numbers)) == 4
    seeds = {original(seed, *key) for seed in range(50) for key in streams}
    assert len(seeds) == 200
    assert max(seeds) < 2**31


# --- a NaN stops it ---


def assert_stops(name, *flags, errors=(SystemExit,), message="is NaN or infinite; the last checkpoint is kept"):
    """The run ends with exit code 1, and its last checkpoint is finite."""
    with pytest.raises(errors) as stop:
        run(name, *flags)
    if stop.type is SystemExit:  # sys.exit(text) prints the text and ends with code 1
        assert message in stop.value.code
        assert f"{name}.py: error: " in stop.value.code
    (folder,) = Path("runs").iterdir()
    assert not (folder / "results.json").exists()
    for tensor in tensors(load(folder)):
        assert tensor.isfinite().all()


BAD = {"reward": '"bad_reward_at": 300', "observation": '"bad_observation_at": 300'}


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("name", ["reinforce", "a2c_continuous", "sac_continuous", "ppo"])
def test_a_nan_from_the_environment_stops_it(name, kind):
    box = ', "box": true' if name.endswith("_continuous") else ""
    flags = ["--env-id", "toy_envs:Constant-v0", "--env-kwargs", f"{{{BAD[kind]}{box}}}"]
    assert_stops(name, *flags, errors=(SystemExit, RuntimeError))  # torch refuses to sample from NaN


def test_a_nan_reward_stops_q_learning():
    flags = ["--env-id", "toy_envs:Endless-v0", "--env-kwargs", '{"bad_reward_at": 300}']
    assert_stops("q_learning", *flags)


def test_a_nan_in_a_normalized_observation_stops_it():
    flags = ["--env-id", "toy_envs:Constant-v0", "--env-kwargs", f"{{{BAD['observation']}}}"]
    assert_stops("ppo", *flags, "--normalize-observations")


@pytest.mark.parametrize("name", ["reinforce", "ppo"])
def test_a_nan_in_an_evaluation_only_stops_it(name, monkeypatch):
    module = module_of(name)
    make_envs = module.make_envs

    def make_bad_envs(args, num_envs, evaluation=False, render=False):
        if evaluation:
            args = dataclasses.replace(args, env_kwargs='{"bad_observation_at": 5}')
        return make_envs(args, num_envs, evaluation, render)

    monkeypatch.setattr(module, "make_envs", make_bad_envs)
    assert_stops(name, "--env-id", "toy_envs:Constant-v0", message="observation is NaN")


FAR_TOO_HIGH = [
    ("reinforce", ""),
    ("ppo", "--num-minibatches 1 --update-epochs 1"),
    ("a2c_continuous", ""),
    ("a2c_continuous", "--optimizer rmsprop"),
    ("a2c_continuous", "--env-id BipedalWalker-v3"),  # Box2D would end the process
    ("dqn_atari", ""),
]


@pytest.mark.parametrize(("name", "flags"), FAR_TOO_HIGH)
def test_a_learning_rate_that_is_far_too_high_stops_it(name, flags):
    """The first update is finite; the weights are not, or what is computed from them."""
    assert_stops(name, "--learning-rate", "1e38", *flags.split(), errors=(SystemExit, RuntimeError))


@pytest.mark.parametrize("part", ["agent", "optimizer"])
def test_weights_that_are_not_finite_are_not_saved(part, monkeypatch):
    """A NaN that nothing else shows: it gets into the weights, or Adam's averages, just before a checkpoint."""
    save = module_of("ppo").Run.save_checkpoint

    def spoil_and_save(self, final=False):
        if self.step > 0:
            tensors(self.parts[part].state_dict())[-1].fill_(np.nan)
        return save(self, final)

    monkeypatch.setattr(module_of("ppo").Run, "save_checkpoint", spoil_and_save)
    with pytest.raises(SystemExit, match="is NaN or infinite"):
        run("ppo")
    (folder,) = Path("runs").iterdir()
    assert load(folder)["step"] == 0
    assert all(tensor.isfinite().all() for tensor in tensors(load(folder)))


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_numbers_are_checked_at_any_depth(number):
    check_finite = module_of("ppo").check_finite
    group = {"lr": 1e-3, "maximize": False, "params": [0, 1]}
    state = {"state": {0: {"step": torch.ones(()), "exp_avg": torch.ones(2, 2)}}, "param_groups": [group]}
    check_finite({"optimizer": state, "loss": 1.0, "obs": np.ones(2)})
    state["state"][0]["exp_avg"][1, 0] = number
    for bad in (state, number, np.float32(number), np.array([1, number]), {"a": {"b": torch.tensor([number])}}):
        with pytest.raises(SystemExit, match="is NaN or infinite"):
            check_finite({"good": 1.0, "bad": bad})


def test_the_check_for_nan_needs_no_memory_for_a_replay_of_screens():
    """torch sums bytes as int64: that would be 8 bytes for each, 57 GB for a million screens."""
    program = """
import psutil, resource, torch, ppo
screens = torch.ones(100_000_000, dtype=torch.uint8)
limit = psutil.Process().memory_info().vms + 400_000_000
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
ppo.check_finite({"replay": {"screens": screens}, "next_row": 3})
"""
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def test_nan_actions_do_not_crash_the_process(start):
    """Box2D would end the process at a NaN without a word of Python."""
    flags = "--env-id LunarLanderContinuous-v3 --num-envs 2 --num-steps 32 --num-minibatches 1 --update-epochs 1"
    process = start("ppo.py", *flags.split(), "--total-timesteps", "2000", "--learning-rate", "1e38")
    _, stderr = process.communicate(timeout=100)
    assert process.returncode == 1
    assert "ppo.py: error: loss/policy is NaN or infinite; the last checkpoint is kept" in stderr
    assert "Traceback" not in stderr


# --- truncated episodes, whatever the environment's observations are ---


@pytest.mark.parametrize("gives", ["float32", "float64", "list", "reused"])
@pytest.mark.parametrize("name", ["a2c_continuous", "ppo"])
def test_a_truncated_episode_bootstraps_from_its_last_observation(name, gives, monkeypatch):
    """Clock's observation is the time, and so is the critic's value here: V(final_obs) is the length of the episode."""
    module, rollouts = module_of(name), []
    compute_gae = module.compute_gae

    def watch(rewards, values, last_value, dones, gamma, gae_lambda):
        rollouts.append((rewards.clone(), values.clone(), last_value.clone(), dones.clone(), gamma))
        return compute_gae(rewards, values, last_value, dones, gamma, gae_lambda)

    monkeypatch.setattr(module, "compute_gae", watch)
    monkeypatch.setattr(module.Agent, "value", lambda self, obs: obs.sum(-1) + 0 * self.critic(obs).squeeze(-1))
    flags = ["--env-id", "toy_envs:Clock-v0", "--env-kwargs", json.dumps({"gives": gives}), "--num-steps", "16"]
    flags += ["--no-normalize-rewards"] if name == "a2c_continuous" else []
    run(name, *flags, "--total-timesteps", "96")
    time, truncations = np.zeros(2), 0
    assert len(rollouts) == 3
    for rewards, values, last_value, dones, gamma in rollouts:
        for t in range(16):
            np.testing.assert_array_equal(values[t], time)
            time += 1
            wanted = 1 + gamma * time * dones[t].numpy()
            np.testing.assert_allclose(rewards[t], wanted, rtol=1e-6)
            truncations += int(dones[t].sum())
            time *= ~dones[t].numpy()
        np.testing.assert_array_equal(last_value, time)
    assert truncations > 10


@pytest.mark.parametrize("name", ["a2c_continuous", "ppo"])
def test_a_terminated_episode_does_not_bootstrap(name, monkeypatch):
    """Not even if it is truncated at the same time."""
    module, found = module_of(name), []
    compute_gae = module.compute_gae

    def watch(rewards, *others):
        found.append(rewards.clone())
        return compute_gae(rewards, *others)

    monkeypatch.setattr(module, "compute_gae", watch)
    flags = ["--env-id", "toy_envs:Clock-v0", "--env-kwargs", '{"both": true}', "--num-steps", "16"]
    flags += ["--no-normalize-rewards"] if name == "a2c_continuous" else []
    run(name, *flags, "--total-timesteps", "96")
    assert (torch.stack(found) == 1).all()


# --- videos ---


@pytest.mark.parametrize("name", ["q_learning", "reinforce", "a2c_continuous", "sac_continuous", "ppo", "dqn_atari"])
def test_evaluations_and_videos_change_nothing_in_training(name, trained, monkeypatch):
    """More episodes at the end, and a film at each checkpoint. After each one the environments are new ones."""
    expected = trained(name).folder
    made = watch_make_envs(module_of(name), monkeypatch)
    folder = run(name, "--eval-episodes", "12", "--capture-video")
    assert len({id(envs) for envs in made}) == 3
    assert (folder / "episodes.csv").read_text() == (expected / "episodes.csv").read_text()
    assert same_weights(folder, expected)
    videos = sorted(folder.glob("*.mp4"), key=lambda path: int(path.stem.removeprefix("step-")))
    steps = [checkpoint["step"] for checkpoint in trained(name).checkpoints]
    assert [path.name for path in videos] == [f"step-{step}.mp4" for step in steps]
    for path in videos:
        frames = imageio.imread(path)
        assert len(frames) >= 2
        assert frames.shape[1] >= 200
        assert frames.std() > 5  # not black
    fps = {"q_learning": 4, "dqn_atari": 15}.get(name, 50)  # the environment's own speed
    assert imageio.immeta(videos[-1])["fps"] == fps


# --- Weights & Biases ---


def tracked_flags(*flags):
    return [*flags_of("ppo"), "--track", *flags]


def test_tracking_offline(start, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    shutil.copy(ROOT / "ppo.py", ".")  # wandb keeps the code of a script in the current folder
    process = start(Path("ppo.py").absolute(), *tracked_flags("--capture-video"))
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    (folder,) = Path("runs").iterdir()
    (tracked,) = Path("wandb").glob("offline-run-*")
    assert tracked.name.endswith(folder.name)
    logged = read_wandb(tracked)
    assert (tracked / "files" / "code" / "ppo.py").read_bytes() == (ROOT / "ppo.py").read_bytes()
    assert load(folder)["config"].items() <= logged["config"].items()
    assert logged["exit_code"] == 0
    curves = {name: [] for name in metric_names(folder)}
    for row in logged["history"]:
        for name in row.keys() & curves:
            curves[name].append((row["global_step"], row[name]))
    for name, curve in curves.items():
        assert [step for step, _ in curve] == [event.step for event in scalars(folder, name)], name
        np.testing.assert_allclose(
            [value for _, value in curve], [event.value for event in scalars(folder, name)], rtol=1e-6, err_msg=name
        )
    videos = [(row["global_step"], row["eval/video/size"]) for row in logged["history"] if "eval/video/size" in row]
    steps = [event.step for event in scalars(folder, "eval/return_mean")]
    assert videos == [(step, (folder / f"step-{step}.mp4").stat().st_size) for step in steps]


def test_a_run_that_stops_is_not_stored_as_finished(start, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    flags = tracked_flags("--learning-rate", "1e38", "--num-minibatches", "1", "--update-epochs", "1")
    process = start("ppo.py", *flags)
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 1, errors
    (tracked,) = Path("wandb").glob("offline-run-*")
    assert read_wandb(tracked)["exit_code"] == 1


def test_tracking_without_an_account_is_refused(start, monkeypatch, in_empty_folder):
    """In one line, and before anything is written."""
    pytest.importorskip("wandb")
    for variable in [name for name in os.environ if name.startswith("WANDB")]:
        monkeypatch.delenv(variable)
    for variable in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(variable, str(in_empty_folder))
    monkeypatch.setenv("NETRC", str(in_empty_folder / "none"))
    process = start("ppo.py", *tracked_flags())
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 2, errors
    assert errors.startswith("ppo.py: error: --track: ")
    assert errors.count("\n") == 1
    assert not Path("runs").exists()
