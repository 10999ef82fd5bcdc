"""ppo_atari_multigpu.py with two processes on the CPU; with one process it has to be ppo_atari.py."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import ppo_atari_multigpu as multigpu
from oracles import no_evaluation
from runs import ROOT, flags_of, load, tensors

pytestmark = pytest.mark.xdist_group("ppo_atari_multigpu")  # in one process, so that torchrun starts only twice

# Trains in each process, and keeps the run folder as it was after the second checkpoint.
SPY = """
import shutil, sys
from pathlib import Path
import numpy as np
import torch
import ppo_atari_multigpu as script

averaged, seeds, networks, rollouts = [], [], [], []
average, reset, save = script.average, script.AtariGames.reset, script.Run.save_checkpoint

def spy_average(tensors):
    before = [tensor.clone() for tensor in tensors]
    average(tensors)
    averaged.append((before, [tensor.clone() for tensor in tensors]))

def spy_reset(self, *, seed=None, options=None):
    seeds.append(seed)
    return reset(self, seed=seed)

def spy_save(self, final=False):
    returns = save(self, final)
    if self.step == 400 and not Path("stopped").exists():
        shutil.copytree(self.folder, "stopped")
    return returns

def end_of_update(self, obs):
    networks.append({name: weight.clone() for name, weight in self.state_dict().items()})
    rollouts.append(obs.clone())

script.average, script.AtariGames.reset, script.Run.save_checkpoint = spy_average, spy_reset, spy_save
script.Agent.update_normalizer = end_of_update
script.evaluate = lambda *args, **kwargs: np.zeros(1)
folder = script.train(script.parse_args(sys.argv[1:]))
seen = {"averaged": averaged, "seeds": seeds, "networks": networks, "rollouts": rollouts}
torch.save(seen | {"folder": folder and str(folder), "num_envs": script.Args().num_envs}, f"rank-{script.RANK}.pt")
"""
FLAGS = "--num-envs 4 --num-steps 20 --total-timesteps 800 --num-checkpoints 4 --target-kl 1000".split()


def torchrun(folder, *flags):
    """Train in two processes; returns what each of them saw."""
    (folder / "spy.py").write_text(SPY)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "spy.py", *flags]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=env, cwd=folder, stderr=subprocess.PIPE, text=True)
    try:
        _, stderr = process.communicate(timeout=200)
    finally:
        process.terminate()  # torchrun ends the processes that it started
    assert process.returncode == 0, stderr
    return [torch.load(folder / f"rank-{rank}.pt") for rank in (0, 1)]


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """The folder in which two processes ran, and what each of them saw."""
    folder = tmp_path_factory.mktemp("two_processes")
    return folder, *torchrun(folder, *flags_of("ppo_atari_multigpu"), *FLAGS)


def test_one_process_has_the_weights_of_ppo_atari(trained):
    ours, theirs = (trained(name).checkpoint for name in ("ppo_atari_multigpu", "ppo_atari"))
    for part in ("agent", "optimizer"):
        assert ours[part].keys() == theirs[part].keys()
        assert all(torch.equal(a, b) for a, b in zip(tensors(ours[part]), tensors(theirs[part]), strict=True))


def test_two_processes_average_their_gradients(two_processes):
    _, first, second = two_processes
    assert len(first["averaged"]) == len(second["averaged"]) == 10 * (2 + 1)  # two minibatches, and the KL
    for (mine, mean), (yours, same) in zip(first["averaged"], second["averaged"]):
        assert len(mine) == len(yours) == len(mean) == len(same) in (1, 12)
        for a, b, c, d in zip(mine, yours, mean, same):
            assert torch.equal(c, d)
            torch.testing.assert_close(c, (a + b) / 2)
        assert not all(torch.equal(a, b) for a, b in zip(mine, yours))


def test_two_processes_have_one_network(two_processes):
    """The one that the first process saves."""
    folder, first, second = two_processes
    assert len(first["networks"]) == 10
    for mine, yours in zip(first["networks"], second["networks"], strict=True):
        assert all(torch.equal(mine[name], yours[name]) for name in mine)
    checkpoint = load(folder / first["folder"])
    assert checkpoint["step"] == 800
    assert all(torch.equal(checkpoint["agent"][name], weight) for name, weight in first["networks"][-1].items())


def test_two_processes_play_different_games(two_processes):
    _, first, second = two_processes
    assert len({*first["seeds"], *second["seeds"]}) == 2 * 2  # two processes, each started anew at two checkpoints
    assert all(len(obs) == 20 * 2 for obs in first["rollouts"] + second["rollouts"])
    assert not any(torch.equal(a, b) for a, b in zip(first["rollouts"], second["rollouts"]))


def test_only_the_first_process_writes(two_processes):
    folder, first, second = two_processes
    assert second["folder"] is None
    assert [folder / first["folder"]] == list((folder / "runs").iterdir())
    episodes = np.genfromtxt(folder / first["folder"] / "episodes.csv", delimiter=",", names=True)
    assert episodes["step"].tolist() == [80, 80, 160, 160, 240, 240, 320, 320, 400, 400,
                                         480, 480, 560, 560, 640, 640, 720, 720, 800, 800]  # fmt: skip


def test_two_processes_resume_where_they_were(two_processes):
    folder, first, _ = two_processes
    again, _ = torchrun(folder, "--resume", "stopped")
    assert len(again["networks"]) == 5
    whole, resumed = load(folder / first["folder"]), load(folder / "stopped")
    assert resumed["step"] == whole["step"] == 800
    for part in ("agent", "optimizer"):
        assert all(torch.equal(a, b) for a, b in zip(tensors(whole[part]), tensors(resumed[part]), strict=True))


def test_each_process_has_eight_games_unless_you_say_so(two_processes):
    assert two_processes[1]["num_envs"] == 16
    assert multigpu.Args().num_envs == 8


@pytest.mark.parametrize("step", [0, 400, 1200])
@pytest.mark.parametrize("flags", [[], ["--eval-episodes", "100"], ["--num-checkpoints", "50"]])
def test_all_processes_have_their_checkpoints_at_the_same_steps(step, flags, monkeypatch):
    no_evaluation(monkeypatch, multigpu)
    args = multigpu.parse_args([*flags_of("ppo_atari_multigpu"), "--total-timesteps", "30_000", *flags])
    next_checkpoints = []
    for run in (multigpu.Run(args), multigpu.Worker(args)):
        assert run.next_checkpoint == 0
        run.parts = {"agent": torch.nn.Linear(1, 1)}
        run.step = step
        run.save_checkpoint()
        next_checkpoints.append(run.next_checkpoint)
    assert next_checkpoints[0] == next_checkpoints[1] > step


@pytest.mark.parametrize(("local_rank", "gpus", "name", "expected"), [
    (0, 1, "auto", "cuda:0"), (0, 2, "cuda", "cuda:0"), (1, 2, "cuda", "cuda:1"), (1, 1, "auto", None),
    (1, 1, "cuda", None), (1, 2, "cpu", "cpu"), (1, 1, "cpu", "cpu"),
])  # fmt: skip
def test_each_process_has_a_gpu_of_its_own_or_is_refused(local_rank, gpus, name, expected, monkeypatch, capsys):
    current = []
    joined = []
    monkeypatch.setattr(multigpu, "LOCAL_RANK", local_rank)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend, **options: joined.append(backend))

    def pick_device(name):
        return torch.device("cpu") if name == "cpu" else torch.device("cuda", current[-1] if current else 0)

    monkeypatch.setattr(multigpu, "pick_device", pick_device)
    if expected is None:
        with pytest.raises(SystemExit) as stop:
            multigpu.join_processes(name)
        assert stop.value.code == 2
        assert f"--device {name}: each process needs its own GPU, and this machine has 1" in capsys.readouterr().err
        assert not joined
    else:
        assert multigpu.join_processes(name) == torch.device(expected)
        assert joined == ["gloo" if name == "cpu" else "nccl"]
        assert bool(current) == (name != "cpu")


BAD_INPUT = {
    "--num-envs 3": "--num-envs 3: 2 processes need equal shares",
    "--num-envs 2 --num-steps 15 --num-minibatches 2": "15 steps",
    "--num-envs 2 --num-steps 4 --num-minibatches 4": "4 steps",
    "--num-envs 2 --num-steps 16 --num-minibatches 2 --total-timesteps 31": "less than the 32 steps of one rollout",
}


@pytest.mark.parametrize("flags", BAD_INPUT)
def test_bad_input_with_two_processes(flags, monkeypatch, capsys):
    monkeypatch.setattr(multigpu, "WORLD_SIZE", 2)
    with pytest.raises(SystemExit) as stop:
        multigpu.parse_args(flags.split())
    assert stop.value.code == 2
    assert BAD_INPUT[flags] in capsys.readouterr().err
    assert not Path("runs").exists()
