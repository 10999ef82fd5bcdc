"""Trains every row of TABLE, seed after seed: benchmarks/scores.csv has the scores, curves.csv the way there.

What is there is skipped, and a run that was stopped goes on from its last checkpoint, so this can be stopped at any
time and started again (after `kill -9` stop the training itself too). The runs stay in runs/scores.

    python benchmarks/scores.py
    python benchmarks/scores.py --gpu                           # the 10 million steps of the papers' games, on a GPU
    python benchmarks/scores.py --only "ppo CartPole"           # the rows with all of these words
    python benchmarks/scores.py --only "ppo CartPole" --redo    # forget them first
"""

import csv
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
from zlib import crc32

import gymnasium as gym
import numpy as np
import torch
import tyro
from speed import HERE, ROOT, cpu_name
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

sys.path.insert(0, str(ROOT))
import push_to_hub  # noqa: E402

# script, flags, seeds
TABLE = [
    ("q_learning", "--eval-episodes 10000", 3),
    ("q_learning", """--env-kwargs '{"is_slippery": false}'""", 3),
    ("q_learning", "--env-id FrozenLake8x8-v1 --total-timesteps 2e6 --eval-episodes 10000", 3),
    ("q_learning", "--env-id Taxi-v4 --eval-episodes 100", 3),
    ("q_learning", "--env-id CliffWalking-v1", 3),
    ("reinforce", "", 3),
    ("reinforce", "--env-id flappy_bird_gymnasium:FlappyBird-v0 "
     """--env-kwargs '{"use_lidar": false, "score_limit": 20}' """
     "--normalize-observations --total-timesteps 4e6 --learning-rate 3e-3 --gamma 0.97", 3),
    ("a2c_continuous", "", 3),
    ("a2c_continuous", "--env-id LunarLanderContinuous-v3 --total-timesteps 3e6 --num-steps 8 --optimizer rmsprop "
     "--no-normalize-advantages --learning-rate 7e-4 --gamma 0.999 --gae-lambda 0.98", 3),
    ("a2c_continuous", "--env-id panda_gym:PandaReachDense-v3 --total-timesteps 4e5 --num-steps 8 --gamma 0.95 "
     "--gae-lambda 0.9", 3),
    ("a2c_continuous", "--env-id Pendulum-v1 --total-timesteps 1e6 --num-envs 8 --num-steps 4 --gamma 0.9 "
     "--gae-lambda 0.9 --action-std 1 --no-normalize-advantages --max-grad-norm 1", 3),
    ("a2c_continuous", "--env-id HalfCheetah-v5 --total-timesteps 1e6 --num-steps 8 --action-std 0.135", 3),
    ("ppo", "", 6),
    ("ppo", "--env-id CartPole-v1 --total-timesteps 1e5 --num-envs 8 --num-minibatches 4 --learning-rate 1e-3 "
     "--gamma 0.98 --ent-coef 0", 3),
    ("ppo", "--env-id Acrobot-v1 --total-timesteps 1e6 --num-steps 256 --num-minibatches 32 --learning-rate 1e-3 "
     "--gamma 0.99 --gae-lambda 0.94 --ent-coef 0 --normalize-observations", 3),
    ("ppo", "--env-id LunarLanderContinuous-v3 --ent-coef 0", 3),
    ("ppo", "--env-id Pendulum-v1 --total-timesteps 2e5 --num-envs 4 --num-steps 512 --learning-rate 1e-3 "
     "--gamma 0.9 --gae-lambda 0.95 --ent-coef 0", 3),
    ("ppo_atari", "--env-id PongNoFrameskip-v4 --total-timesteps 2e6 --learning-rate 5e-4 --num-threads 1", 1),
    ("dqn_atari", "--env-id PongNoFrameskip-v4 --total-timesteps 1e6 --buffer-size 2e5 --learning-starts 10000 "
     "--train-frequency 2", 1),
    ("dqn_atari", "--env-id SpaceInvadersNoFrameskip-v4 --total-timesteps 6e5 --buffer-size 2e5 "
     "--learning-starts 10000 --num-threads 1", 1),
    ("ddqn_atari", "--env-id PongNoFrameskip-v4 --total-timesteps 6e5 --buffer-size 2e5 --learning-starts 10000 "
     "--train-frequency 2 --num-threads 1", 1),
    ("ddqn_atari", "--env-id SpaceInvadersNoFrameskip-v4 --total-timesteps 6e5 --buffer-size 2e5 "
     "--learning-starts 10000 --num-threads 1", 1),
]  # fmt: skip
GPU_TABLE = [
    (script, f"--env-id {game}NoFrameskip-v4 --device cuda --compile {flags}", 1)
    for game in ("Pong", "Breakout", "SpaceInvaders", "BeamRider", "Qbert", "Seaquest")
    for script, flags in (
        ("ppo_atari", "--num-envs 32 --num-steps 32"),  # the default's steps in a rollout, from more environments
        ("dqn_atari", "--num-envs 32"),
        ("ddqn_atari", "--num-envs 32"),
    )
]
SCORES, CURVES = HERE / "scores.csv", HERE / "curves.csv"
KEY = ("script", "flags", "seed")


def main(only: str = "", curves: bool = False, redo: bool = False, gpu: bool = False):
    """Train what is not in scores.csv yet.

    Args:
        only: words with which one of script and flags has to begin, each.
        curves: train also what is not in curves.csv; a score that comes out the same stays as it was measured.
        redo: forget first what was measured; if stopped, to be continued without.
        gpu: the rows of GPU_TABLE instead.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # which stops the training too
    rows = [row for row in (GPU_TABLE if gpu else TABLE) if selected(only, *row[:2])]
    tasks = [(script, flags, str(seed)) for script, flags, seeds in rows for seed in range(1, seeds + 1)]
    for task in tasks if redo else ():
        shutil.rmtree(run_folder(*task), ignore_errors=True)
        replace(SCORES, task, [])
        replace(CURVES, task, [])
    for task in tasks:
        scored, drawn = (any(key(row) == task for row in read(path)) for path in (SCORES, CURVES))
        if not scored or (curves and not drawn):
            run = train(*task, [str(ROOT / f"{task[0]}.py")])
            row, curve = collect(*task, *run)
            print(row, flush=True)
            same = [old for old in read(SCORES) if key(old) == task and float(old["mean"]) == row["mean"]]
            replace(SCORES, task, same or [row])
            replace(CURVES, task, curve)


def selected(only: str, script: str, flags: str) -> bool:
    """Whether each word of `only` begins one of script and flags; "Pendulum" and "a2c" do in a2c's Pendulum."""
    words = re.split("[ :]", f"{script} {flags}")
    return all(any(word.startswith(start) for word in words) for start in only.split())


def key(row: dict) -> tuple:
    """What tells one run from all others."""
    return tuple(row[name] for name in KEY)


def read(path: Path) -> list:
    """The rows of a CSV file, none if it is not there."""
    return list(csv.DictReader(path.open())) if path.exists() else []


def replace(path: Path, task: tuple, rows: list):
    """Put the rows of a task into a CSV file, which stays whole until the new one is; read anew, others write too."""
    unfinished = path.with_suffix(f".{os.getpid()}")
    rows = [row for row in read(path) if key(row) != task] + rows
    with unfinished.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[-1] if rows else KEY, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted(rows, key=position))
    unfinished.replace(path)


def position(row: dict) -> int:
    """Where the row's task is in the table, so that the files are in its order whatever was trained first."""
    tasks = [task[:2] for task in (*TABLE, *GPU_TABLE)]
    return (tasks.index(key(row)[:2]) if key(row)[:2] in tasks else len(tasks)) * 100 + int(row["seed"])


def run_folder(script: str, flags: str, seed: str) -> Path:
    """The working directory of a task's run."""
    return ROOT / "runs" / "scores" / f"{script}-{crc32(flags.encode()):08x}-{seed}"


def train(script: str, flags: str, seed: str, program: list) -> tuple:
    """Train one agent as a user would, by `program` and its flags, or go on with it where it was stopped.

    Returns the run's folder and its wall time in seconds over all sittings.
    """
    (folder := run_folder(script, flags, seed)).mkdir(parents=True, exist_ok=True)
    for run in folder.glob("runs/*"):
        if not (run / "checkpoint.pt").exists():  # stopped before its first
            shutil.rmtree(run)
    words = [*shlex.split(flags), "--seed", seed]
    before, start = 0.0, time.perf_counter()
    for run in folder.glob("runs/*"):
        if (run / "results.json").exists():
            return run, wall_time(run)
        words, before = ["--resume", str(run)], wall_time(run)
    subprocess.run([sys.executable, *program, *words], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    (run,) = folder.glob("runs/*")
    return run, before + time.perf_counter() - start


def wall_time(run: Path) -> float:
    """The seconds from the first to the last entry of the logs, of which each sitting writes one."""
    times = [[event.wall_time for event in EventFileLoader(str(log)).Load()] for log in run.glob("events.*")]
    return sum(max(sitting) - min(sitting) for sitting in times if sitting)


def collect(script: str, flags: str, seed: str, run: Path, seconds: float) -> tuple:
    """The row of a finished run's score and those of its evaluations on the way."""
    results, config = (json.loads((run / name).read_text()) for name in ("results.json", "config.json"))
    events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    task = {"script": script, "flags": flags, "seed": seed}
    means = {event.step: event.value for event in events.Scalars("eval/return_mean")}  # a sitting repeats the last one
    curve = [task | {"step": step, "return": round(mean, 4)} for step, mean in means.items()]
    sittings = len(list(run.glob("events.*")))
    note = f"in {sittings} sittings" if sittings > 1 else ""
    if results["env_id"] == "Taxi-v4":
        returns, _ = evaluate(run)
        note = "on the 100 seeds of the Deep RL Course"
        results |= {"mean_reward": returns.mean(), "std_reward": returns.std(), "n_eval_episodes": len(returns)}
    if "FlappyBird" in results["env_id"]:
        returns, pipes = evaluate(run)
        results |= {"mean_reward": returns.mean(), "std_reward": returns.std(), "n_eval_episodes": len(returns)}
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
        "machine": machine(config["device"]),
        "torch": config["torch"],
        "gymnasium": config["gymnasium"],
        "commit": config["commit"],
        "flags": flags,
        "note": note,
    }
    return row, curve


def machine(device: str) -> str:
    """The machine that a run on `device` needed."""
    gpu = torch.cuda.get_device_name(device) if torch.cuda.is_available() and "cuda" in device else device
    return f"{os.cpu_count()} cores, {cpu_name()}" + ("" if gpu == "cpu" else f", {gpu}")


def evaluate(run: Path) -> tuple:
    """Returns of 100 episodes, evaluated by push_to_hub.py, and the score that the environment counted, if it does."""
    options, scores = push_to_hub.Options(checkpoint=str(run)), []
    module, args, agent = push_to_hub.rebuild(push_to_hub.read(str(run)), options)
    make_envs = module.make_envs

    class KeepScores(gym.vector.VectorWrapper):
        """Keeps infos["score"] of the first episode of every environment."""

        def reset(self, **kwargs):
            self.running = np.ones(self.num_envs, dtype=bool)
            return self.env.reset(**kwargs)

        def step(self, actions):
            obs, reward, terminated, truncated, infos = self.env.step(actions)
            ended = self.running & (terminated | truncated)
            self.running &= ~ended
            if "score" in infos:
                scores.extend(infos["score"][ended].tolist())
            return obs, reward, terminated, truncated, infos

    module.make_envs = lambda *args, **kwargs: KeepScores(make_envs(*args, **kwargs))
    returns = push_to_hub.score(module, args, agent, options)
    module.make_envs = make_envs
    return returns, scores


if __name__ == "__main__":
    tyro.cli(main, description=__doc__.partition("\n")[0])
