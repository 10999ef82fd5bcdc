"""Short trainings of each script, and how the tests read them."""

import importlib.util
import json
import shlex
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).parent.parent

# Flags with which each script trains for one to four seconds: two checkpoints, a final one, and some finished episodes.
SHORT = "--num-checkpoints 2 --eval-episodes 2"
PIXELS = """--env-id BreakoutNoFrameskip-v4 --env-kwargs '{"max_num_frames_per_episode": 80}' --num-threads 1"""
PPO = "--num-envs 2 --num-steps 16 --num-minibatches 2"
DQN = """--total-timesteps 1024 --num-envs 2 --buffer-size 400 --learning-starts 32 --batch-size 4 --train-frequency 32
--target-network-frequency 64 --log-interval 100 --save-replay"""
FLAGS = {
    "q_learning": "--total-timesteps 2000 --num-steps 100",
    "reinforce": "--total-timesteps 2000 --num-envs 2",
    "a2c_continuous": "--env-id LunarLanderContinuous-v3 --total-timesteps 1600 --num-envs 2 --log-interval 3",
    "sac_continuous": "--env-id LunarLanderContinuous-v3 --total-timesteps 1600 --num-envs 2 --hidden-size 16 "
    "--learning-starts 200 --batch-size 8 --buffer-size 1000 --log-interval 100 --save-replay",
    "ppo": f"--env-id CartPole-v1 --total-timesteps 1600 {PPO} --update-epochs 2",
    "ppo_selfplay": f"--total-timesteps 1600 {PPO} --update-epochs 2 --snapshot-interval 200 --rated-games 2",
    "ppo_atari": f"{PIXELS} --total-timesteps 1024 {PPO} --update-epochs 1",
    "ppo_doom": f"--env-id VizdoomBasic-v1 --num-threads 1 --total-timesteps 512 {PPO} --update-epochs 1",
    "ppo_atari_multigpu": f"{PIXELS} --total-timesteps 1024 {PPO} --update-epochs 1",
    "dqn_atari": f"{PIXELS} {DQN}",
    "ddqn_atari": f"{PIXELS} {DQN}",
}
HAS_DOOM = importlib.util.find_spec("vizdoom") is not None  # without it, ppo_doom.py does not run
SCRIPTS = [name for name in FLAGS if HAS_DOOM or name != "ppo_doom"]
every_script = pytest.mark.parametrize("name", SCRIPTS)


def flags_of(name: str) -> list[str]:
    """The short flags of a script as words."""
    return shlex.split(f"{FLAGS[name]} {SHORT}")


def run(name: str, *flags) -> Path:
    """Train a script in this process with its short flags and `flags`; returns the run folder."""
    module = importlib.import_module(name)
    return module.train(module.parse_args([*flags_of(name), *map(str, flags)]))


def resume(name: str, folder, *flags) -> Path:
    """Go on with a run in this process."""
    module = importlib.import_module(name)
    return module.train(module.parse_args(["--resume", str(folder), *map(str, flags)]))


def load(folder) -> dict:
    """The checkpoint of a run."""
    return torch.load(Path(folder, "checkpoint.pt"), weights_only=True)


def results(folder) -> dict:
    """The results.json of a run."""
    return json.loads(Path(folder, "results.json").read_text())


def tensors(state) -> list:
    """All tensors in a nested state_dict, in order."""
    if isinstance(state, torch.Tensor):
        return [state]
    parts = state.values() if isinstance(state, dict) else state if isinstance(state, (list, tuple)) else []
    return [tensor for part in parts for tensor in tensors(part)]


def scalars(folder, name: str) -> list:
    """The TensorBoard events (step, value) of one metric."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return events.Scalars(name)


def same_weights(first, second) -> bool:
    """Whether two runs ended with the same weights, optimizer and replay, bit for bit."""
    first, second = ([tensors(part) for part in load(folder).values()] for folder in (first, second))
    return all(torch.equal(a, b) for parts in zip(first, second, strict=True) for a, b in zip(*parts, strict=True))


def module_of(name: str):
    """The script as a module."""
    return importlib.import_module(name)


def metric_names(folder) -> set:
    """The names of all TensorBoard scalars of a run."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    return set(events.Reload().Tags()["scalars"])


def files(folder) -> dict:
    """The bytes of every file in a folder and in the folders in it."""
    return {path: path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file()}


def refusal(name: str, *flags, capsys) -> str:
    """The one line with which a script refuses `flags`, with exit code 2."""
    module = module_of(name)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        module.train(module.parse_args([*map(str, flags)]))
    out, err = capsys.readouterr()
    assert (stop.value.code, out) == (2, ""), (flags, out, err)
    assert err.startswith(f"{name}.py: error: "), err
    assert err.count("\n") == 1, err
    return err


def watch_make_envs(module, monkeypatch) -> list:
    """A list that gets every vector of training environments that the script makes from now on."""
    make_envs, made = module.make_envs, []

    def make_and_keep(args, num_envs, evaluation=False, render=False):
        envs = make_envs(args, num_envs, evaluation, render)
        if not evaluation:
            made.append(envs)
        return envs

    monkeypatch.setattr(module, "make_envs", make_and_keep)
    return made
