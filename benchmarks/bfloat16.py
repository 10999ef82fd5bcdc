"""Does bfloat16 change what is learned? PPO on Breakout with and without it.

python benchmarks/bfloat16.py               # trains what is not in benchmarks/results/bfloat16.csv, plot.py draws it
"""

import csv
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from speed import RESULTS, ROOT, write

FORMATS = ["bfloat16", "float32"]
SEEDS = (1, 2, 3, 4)
STEPS = 300_000
GRID = np.linspace(0, STEPS, 16)[1:]  # ends of the intervals of steps over which the curves are averaged
PATH = RESULTS / "bfloat16.csv"


def train(name: str, seed: int) -> list:
    """Train one agent on one thread; returns a row for each interval: the mean score of the games that ended in it."""
    flags = f"--total-timesteps {STEPS} --num-threads 1 --num-checkpoints 1 --eval-episodes 10 --seed {seed}"
    flags += " --device cpu --bfloat16" if name == "bfloat16" else " --device cpu --no-bfloat16"
    flags += ' --env-kwargs {"num_threads":1}'  # one thread for the games, too
    with TemporaryDirectory() as folder:
        subprocess.run([sys.executable, str(ROOT / "ppo_atari.py"), *flags.split()], cwd=folder, check=True)
        (path,) = Path(folder, "runs").glob("*/episodes.csv")
        episodes = np.array([[float(row["step"]), float(row["return"])] for row in csv.DictReader(path.open())])
    interval = np.digitize(episodes[:, 0], [0, *GRID], right=True) - 1
    return [
        {"format": name, "seed": seed, "step": int(step), "return": round(episodes[interval == i, 1].mean(), 3)}
        for i, step in enumerate(GRID)
    ]


def main():
    """Train two agents at a time, write the CSV file after each."""
    old = csv.DictReader(PATH.open()) if PATH.exists() else []
    done = {(row["format"], int(row["seed"])) for row in old}
    todo = [(name, seed) for seed in SEEDS for name in FORMATS if (name, seed) not in done]
    with ThreadPoolExecutor(2) as pool:
        for rows in pool.map(lambda job: train(*job), todo):
            write(PATH, rows, keep=lambda row: True)


if __name__ == "__main__":
    main()
