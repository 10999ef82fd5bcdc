"""Trains all rows of TABLE: the scores are in results/scores.csv beside it, the evaluations on the way in curves.csv.

Rows that are in the files are skipped, and a run that was stopped continues from its last checkpoint. So this program
can be stopped at any time and started again. The runs are in runs/scores.

    python benchmarks/scores.py
    python benchmarks/scores.py --gpu                           # 10 million steps of the papers' games, on a GPU
    python benchmarks/scores.py --only "ppo CartPole"           # only the rows with both words
    python benchmarks/scores.py --only "ppo CartPole" --redo    # forget their results first
"""

import csv
import importlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import patch
from zlib import crc32

import gymnasium as gym
import numpy as np
import torch
import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from speed import RESULTS, ROOT, commit, cpu_name

sys.path.insert(0, str(ROOT))
import push_to_hub  # noqa: E402

SEEDS = [1, 2, 3]
# script, flags, seeds
TABLE = [
    ("q_learning", "--eval-episodes 10_000", SEEDS),
    ("q_learning", """--env-kwargs '{"is_slippery": false}'""", SEEDS),
    ("q_learning", "--env-id FrozenLake8x8-v1 --total-timesteps 2_000_000 --eval-episodes 10_000", SEEDS),
    ("q_learning", "--env-id Taxi-v4 --eval-episodes 100", SEEDS),
    ("q_learning", "--env-id CliffWalking-v1", SEEDS),
    ("reinforce", "", SEEDS),
    ("reinforce", "--env-id flappy_bird_gymnasium:FlappyBird-v0 "
     """--env-kwargs '{"use_lidar": false, "score_limit": 20}' """
     "--normalize-observations --total-timesteps 4_000_000 --learning-rate 3e-3 --gamma 0.97", SEEDS),
    ("a2c_continuous", "", SEEDS),
    ("a2c_continuous", "--env-id LunarLanderContinuous-v3 --total-timesteps 3_000_000 --num-steps 8 "
     "--optimizer rmsprop --no-normalize-advantages --learning-rate 7e-4 --gamma 0.999 --gae-lambda 0.98", SEEDS),
    ("a2c_continuous", "--env-id panda_gym:PandaReachDense-v3 --total-timesteps 400_000 --num-steps 8 --gamma 0.95",
     SEEDS),
    ("a2c_continuous", "--env-id Pendulum-v1 --total-timesteps 1_000_000 --num-envs 8 --num-steps 8 --gamma 0.95 "
     "--action-std 1 --hold-noise 8 --no-normalize-advantages", range(201, 204)),
    ("a2c_continuous", "--env-id HalfCheetah-v5 --total-timesteps 1_000_000 --num-steps 8 --action-std 0.135", SEEDS),
    ("a2c_continuous", "--env-id Hopper-v5 --total-timesteps 1_000_000 --num-steps 8 --action-std 0.135", SEEDS),
    ("a2c_continuous", "--env-id Walker2d-v5 --total-timesteps 1_000_000 --num-steps 8 --action-std 0.135 "
     "--hold-noise 8", SEEDS),
    ("sac_continuous", "", SEEDS),
    ("sac_continuous", "--env-id LunarLanderContinuous-v3 --total-timesteps 500_000 --num-envs 4 "
     "--learning-starts 5_000 --policy-frequency 2 --anneal-lr --num-threads 1", [7, 8, 9]),
    ("ppo", "", [1, *range(201, 213)]),
    ("ppo", "--env-id CartPole-v1 --total-timesteps 100_000 --num-envs 8 --num-steps 128 --num-minibatches 4 "
     "--learning-rate 1e-3 --gamma 0.98 --ent-coef 0", SEEDS),
    ("ppo", "--env-id Acrobot-v1 --total-timesteps 1_000_000 --num-steps 256 --num-minibatches 32 --learning-rate 1e-3 "
     "--gamma 0.99 --gae-lambda 0.94 --ent-coef 0 --normalize-observations", SEEDS),
    ("ppo", "--env-id LunarLanderContinuous-v3 --ent-coef 0", range(201, 204)),
    ("ppo", "--env-id Pendulum-v1 --total-timesteps 200_000 --num-envs 4 --num-minibatches 16 --update-epochs 10 "
     "--learning-rate 1e-3 --gamma 0.95 --gae-lambda 0.95 --ent-coef 0", SEEDS),
    ("ppo_atari", "--env-id PongNoFrameskip-v4 --total-timesteps 3_000_000 --learning-rate 5e-4 --num-threads 1",
     SEEDS),
    ("ppo_atari", "--num-threads 1", [1]),
    ("ppo_doom", "--num-threads 1", SEEDS),
    ("ppo_doom", "--env-id VizdoomBasic-v1 --total-timesteps 60_000 --learning-rate 1e-3 --update-epochs 4 "
     "--num-threads 1", SEEDS),
    ("dqn_atari", "--env-id PongNoFrameskip-v4 --total-timesteps 1_000_000 --buffer-size 200_000 "
     "--learning-starts 10_000 --learning-rate 2.5e-4 --anneal-last 0.5 --train-frequency 3 --num-checkpoints 10 "
     "--num-threads 1", SEEDS),
    ("dqn_atari", "--env-id SpaceInvadersNoFrameskip-v4 --total-timesteps 600_000 --buffer-size 200_000 "
     "--learning-starts 10_000 --learning-rate 2.5e-4 --anneal-last 0.5 --num-threads 1", SEEDS),
    ("ddqn_atari", "--env-id PongNoFrameskip-v4 --total-timesteps 1_000_000 --buffer-size 200_000 "
     "--learning-starts 10_000 --learning-rate 2.5e-4 --anneal-last 0.5 --train-frequency 3 --num-checkpoints 10 "
     "--num-threads 1", SEEDS),
    ("ddqn_atari", "--env-id SpaceInvadersNoFrameskip-v4 --total-timesteps 600_000 --buffer-size 200_000 "
     "--learning-starts 10_000 --learning-rate 2.5e-4 --anneal-last 0.5 --num-threads 1", SEEDS),
]  # fmt: skip
GPU_TABLE = [
    (script, f"--env-id {game}NoFrameskip-v4 --device cuda --compile {flags}", [1])
    for game in ("Pong", "Breakout", "SpaceInvaders", "BeamRider", "Qbert", "Seaquest")
    for script, flags in (
        ("ppo_atari", "--num-envs 32 --num-steps 32"),  # as many steps in a rollout as by default, in more environments
        ("dqn_atari", "--num-envs 32"),
        ("ddqn_atari", "--num-envs 32"),
    )
]
SCORES = RESULTS / "scores.csv"
CURVES = RESULTS / "curves.csv"
KEY = ("script", "flags", "seed")


def main(only: str = "", curves: bool = False, redo: bool = False, gpu: bool = False):
    """Train what is not in scores.csv yet.

    Args:
        only: train only the rows in which each of these words is the beginning of a word of the script and its flags.
        curves: train also what is not in curves.csv; an equal score keeps its old row.
        redo: delete the old results first; to continue after a stop, leave it out.
        gpu: train the rows of GPU_TABLE instead.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # stops the training, too
    rows = [row for row in (GPU_TABLE if gpu else TABLE) if selected(only, *row[:2])]
    tasks = [(script, flags, str(seed)) for script, flags, seeds in rows for seed in seeds]
    if redo:
        for task in tasks:
            shutil.rmtree(run_folder(*task), ignore_errors=True)
            replace(SCORES, task, [])
            replace(CURVES, task, [])
    for task in tasks:
        scored, drawn = (any(key(row) == task for row in read(path)) for path in (SCORES, CURVES))
        if not scored or (curves and not drawn):
            run, seconds = train(*task, [str(ROOT / f"{task[0]}.py")])
            row, curve = collect(*task, run, seconds)
            print(row, flush=True)
            same = [old for old in read(SCORES) if key(old) == task and float(old["mean"]) == row["mean"]]
            replace(SCORES, task, same or [row])
            replace(CURVES, task, curve)


def selected(only: str, script: str, flags: str) -> bool:
    """Whether each word of `only` is the beginning of a word of the script and its flags."""
    words = re.split("[ :]", f"{script} {flags}")
    return all(any(word.startswith(start) for word in words) for start in only.split())


def key(row: dict) -> tuple:
    """The columns that identify a run."""
    return tuple(row[name] for name in KEY)


def read(path: Path) -> list:
    """The rows of a CSV file, none if it does not exist."""
    return list(csv.DictReader(path.open())) if path.exists() else []


def replace(path: Path, task: tuple, rows: list):
    """Replace the rows of a task in a CSV file, and move the new file into place: another process may read it."""
    unfinished = path.with_suffix(f".{os.getpid()}")
    rows = [row for row in read(path) if key(row) != task] + rows
    with unfinished.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[-1] if rows else KEY, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted(rows, key=position))
    unfinished.replace(path)


def position(row: dict) -> int:
    """The position of a row in a CSV file: in the order of the tables, whatever was trained first."""
    tasks = [task[:2] for task in (*TABLE, *GPU_TABLE)]
    return (tasks.index(key(row)[:2]) if key(row)[:2] in tasks else len(tasks)) * 1000 + int(row["seed"])


def run_folder(script: str, flags: str, seed: str) -> Path:
    """The working directory of a task."""
    return ROOT / "runs" / "scores" / f"{script}-{crc32(flags.encode()):08x}-{seed}"


def train(script: str, flags: str, seed: str, program: list) -> tuple:
    """Train an agent with `program` in a process of its own, or continue a run that was stopped.

    Returns the run folder and the wall time in seconds, without the time between a stop and the next start.
    """
    folder = run_folder(script, flags, seed)
    folder.mkdir(parents=True, exist_ok=True)
    words = [*shlex.split(flags), "--seed", seed]
    seconds = 0.0
    for run in folder.glob("runs/*"):
        if not (run / "checkpoint.pt").exists():  # stopped before its first checkpoint
            shutil.rmtree(run)
            continue
        seconds = wall_time(run)
        if (run / "results.json").exists():
            return run, seconds
        words += ["--resume", str(run)]
    start = time.perf_counter()
    subprocess.run([sys.executable, *program, *words], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    (run,) = folder.glob("runs/*")
    return run, seconds + time.perf_counter() - start


def wall_time(run: Path) -> float:
    """The seconds from the first to the last entry of each log, summed; each start of the run writes one log."""
    times = [[event.wall_time for event in EventFileLoader(str(log)).Load()] for log in run.glob("events.*")]
    return sum(max(entries) - min(entries) for entries in times if entries)


def collect(script: str, flags: str, seed: str, run: Path, seconds: float) -> tuple:
    """The row of scores.csv and the rows of curves.csv for a finished run."""
    results = json.loads((run / "results.json").read_text())
    config = json.loads((run / "config.json").read_text())
    task = {"script": script, "flags": flags, "seed": seed}
    events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    means = {event.step: event.value for event in events.Scalars("eval/return_mean")}  # a resumed run repeats one
    curve = [task | {"step": step, "return": round(mean, 4)} for step, mean in means.items()]
    starts = len(list(run.glob("events.*")))
    note = f"in {starts} sittings" if starts > 1 else ""
    if results["env_id"] == "Taxi-v4":
        returns, _ = evaluate(script, run, push_to_hub.TAXI_SEEDS)
        results |= {"mean_reward": returns.mean(), "std_reward": returns.std(), "n_eval_episodes": len(returns)}
        note = "on the 100 seeds of the Deep RL Course"
    if "FlappyBird" in results["env_id"]:
        _, pipes = evaluate(script, run)
        note = f"{np.mean(pipes):.2f} +/- {np.std(pipes):.2f} pipes"
    row = {
        "script": script,
        "env_id": results["env_id"],
        "seed": seed,
        "steps": config["total_timesteps"],
        "mean": round(results["mean_reward"], 4),
        "std": round(results["std_reward"], 4),
        "episodes": results["n_eval_episodes"],
        "seconds": round(seconds),
        "machine": machine(script, config["device"]),
        "torch": config["torch"],
        "gymnasium": config["gymnasium"],
        "commit": commit(),
        "flags": flags,
        "note": note,
    }
    return row, curve


def machine(script: str, device: str) -> str:
    """The machine that a run on `device` used: the CPU, and the GPU if it used one."""
    cpu = f"{os.cpu_count()} cores, {cpu_name()}"
    used = importlib.import_module(script).pick_device(device)
    if used.type == "cpu":
        return cpu
    return f"{cpu}, {torch.cuda.get_device_name(used) if used.type == 'cuda' else used.type}"


class CountPipes(gym.vector.VectorWrapper):
    """Keeps the last infos["score"] of each environment's first episode in `pipes`, if there is one."""

    def reset(self, **kwargs):
        self.pipes = np.zeros(self.num_envs)
        self.running = np.ones(self.num_envs, dtype=bool)
        return self.env.reset(**kwargs)

    def step(self, actions):
        obs, reward, terminated, truncated, infos = self.env.step(actions)
        if "score" in infos:
            self.pipes[self.running] = infos["score"][self.running]
        self.running &= ~(terminated | truncated)
        return obs, reward, terminated, truncated, infos


def evaluate(script: str, run: Path, seeds: list | None = None) -> tuple:
    """Evaluate the agent of a run as the script does, or on `seeds`; its returns, and the pipes of Flappy Bird."""
    module = importlib.import_module(script)
    checkpoint = module.load_checkpoint(run)
    args = module.Args(**checkpoint["config"])
    episodes = len(seeds) if seeds else args.eval_episodes
    envs = CountPipes(module.make_envs(args, episodes, evaluation=True))
    agent = module.Agent(envs, args)
    agent.load_state_dict(checkpoint["agent"])
    with patch.object(module, "make_envs", lambda *args, **kwargs: envs):
        returns = module.evaluate(agent, args, episodes, seeds)
    return returns, envs.pipes


if __name__ == "__main__":
    tyro.cli(main, description=__doc__.partition("\n")[0])
