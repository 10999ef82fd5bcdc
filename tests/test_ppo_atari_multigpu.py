"""ppo_atari_multigpu.py with two processes on the CPU; with one it has to be ppo_atari.py."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from test_scripts import flags_of, load, run

import ppo_atari_multigpu

SPY = """
import os, sys
import torch
import ppo_atari_multigpu as script

STOP_AT = int(os.environ["STOP_AT"])
steps, average = [], script.average

def spy_average(tensors):
    before = [tensor.clone() for tensor in tensors]
    average(tensors)
    steps.append((before, [tensor.clone() for tensor in tensors]))

class Stopped:
    def cut(self, envs):
        if self.step == STOP_AT:
            os._exit(9)
        envs, obs = super().cut(envs)
        seen.append(torch.as_tensor(obs))
        return envs, obs

    def log(self, metrics):
        super().log(metrics)
        if "time/sps" in metrics:
            networks.append({k: v.clone() for k, v in self.parts["agent"].state_dict().items()})

class Run(Stopped, script.Run):
    pass

class Worker(Stopped, script.Worker):
    def __init__(self, args, steps_per_iteration, **parts):
        super().__init__(args, steps_per_iteration, **parts)
        self.parts = parts

seen, networks = [], []
script.average, script.Run, script.Worker = spy_average, Run, Worker
script.train(script.parse_args(sys.argv[1:]))
torch.save({"steps": steps, "networks": networks, "seen": seen}, f"rank-{script.RANK}.pt")
"""
FLAGS = [*flags_of("ppo_atari_multigpu"), "--num-checkpoints", "4"]


@pytest.mark.parametrize(("local_rank", "gpus", "name", "expected"), [
    (0, 1, "cuda", "cuda:0"), (1, 2, "cuda", "cuda:1"), (0, 2, "cuda:1", "cuda:1"), (1, 1, "cuda", None),
])  # fmt: skip
def test_each_process_has_a_gpu_of_its_own_or_is_refused(local_rank, gpus, name, expected, monkeypatch, capsys):
    joined = {}
    monkeypatch.setattr(ppo_atari_multigpu, "LOCAL_RANK", local_rank)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)
    monkeypatch.setattr(
        torch.distributed, "init_process_group", lambda backend, **options: joined.update(options, backend=backend)
    )
    if expected is None:
        with pytest.raises(SystemExit) as error:
            ppo_atari_multigpu.join_processes(torch.device(name))
        assert error.value.code == 2 and "each process needs a GPU, and this machine has 1" in capsys.readouterr().err
    else:
        assert ppo_atari_multigpu.join_processes(torch.device(name)) == torch.device(expected)
        assert joined["backend"] == "nccl" and joined["device_id"] == torch.device(expected)


def torchrun(*flags, stop_at=-1, processes=2):
    """Start SPY in `processes` processes; returns the exit code and stderr."""
    Path("spy.py").write_text(SPY)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    env = os.environ | {"PYTHONPATH": str(ROOT), "STOP_AT": str(stop_at), "OMP_NUM_THREADS": "1"}
    result = subprocess.run([*command, "spy.py", *flags], env=env, capture_output=True, text=True)
    return result.returncode, result.stderr


def test_one_process_has_the_weights_of_ppo_atari():
    ours, theirs = (load(run(name))["agent"] for name in ("ppo_atari_multigpu", "ppo_atari"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_two_processes_average_their_gradients_and_stay_the_same():
    returncode, stderr = torchrun(*FLAGS, "--target-kl", "1")
    assert returncode == 0, stderr
    (folder,) = Path("runs").iterdir()
    first, second = (torch.load(f"rank-{rank}.pt") for rank in (0, 1))
    assert len(first["steps"]) == len(second["steps"]) == 16 * 4 * (2 + 1)  # iterations, epochs, minibatches and KL
    for (mine, averaged), (yours, received) in zip(first["steps"], second["steps"]):
        for a, b, mean, same in zip(mine, yours, averaged, received):
            assert torch.equal(mean, same)
            torch.testing.assert_close(mean, (a + b) / 2)
    assert any(not torch.equal(a, b) for a, b in zip(first["steps"][0][0], second["steps"][0][0]))
    for mine, yours in zip(first["networks"], second["networks"]):
        assert all(torch.equal(mine[name], yours[name]) for name in mine)
    assert [len(obs) for obs in first["seen"]] == [len(obs) for obs in second["seen"]] == [1] * 4
    assert len(first["networks"]) == 16
    checkpoint = load(folder)
    assert checkpoint["step"] == 512
    assert all(torch.equal(checkpoint["agent"][name], first["networks"][-1][name]) for name in first["networks"][-1])
    steps = np.genfromtxt(folder / "episodes.csv", delimiter=",", names=True)["step"]
    assert steps.max() <= 512 and (steps % 2 == 0).all()


def test_two_processes_play_different_games():
    """After a random number of idle frames at the start, of which the seed decides."""
    import ppo_atari_multigpu as script

    args = script.parse_args(FLAGS)
    seeds = set()
    for rank in range(4):
        script_rank, script.RANK = script.RANK, rank
        try:
            worker = script.Worker(args, 32)
        finally:
            script.RANK = script_rank
        seeds.add(script.seed_everything(worker.args.seed, 0, 0))
    assert len(seeds) == 4
    assert args.seed == 1


def test_two_processes_resume_where_they_were():
    assert torchrun(*FLAGS)[0] == 0
    whole = load(next(Path("runs").iterdir()))
    shutil.rmtree("runs")
    assert torchrun(*FLAGS, stop_at=256)[0] != 0
    (folder,) = Path("runs").iterdir()
    assert load(folder)["step"] == 128
    returncode, stderr = torchrun("--resume", str(folder))
    assert returncode == 0, stderr
    resumed = load(folder)
    assert resumed["step"] == whole["step"] == 512
    assert all(torch.equal(whole["agent"][name], resumed["agent"][name]) for name in whole["agent"])


@pytest.mark.parametrize(("flags", "message"), [(["--num-envs", "3"], "--num-envs 3: 2 processes need equal shares")])
def test_bad_input_with_two_processes(flags, message):
    returncode, stderr = torchrun(*FLAGS, *flags)
    assert returncode != 0
    assert message in stderr
    assert not Path("runs").exists()
