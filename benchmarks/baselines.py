"""The lesson on variance: REINFORCE on CartPole-v1 with each baseline and five seeds.

python benchmarks/baselines.py              # trains what is not in benchmarks/results/baselines.csv, plot.py draws it
"""

import csv
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from speed import RESULTS, ROOT, write

BASELINES = ["none", "mean", "learned"]
SEEDS = range(1, 6)
FLAGS = "--num-envs 4 --total-timesteps 300_000 --learning-rate 1e-2 --no-anneal-lr --no-normalize-observations"
FLAGS += " --num-checkpoints 1 --eval-episodes 10"
GRID = np.linspace(0, 300_000, 61)[1:]  # ends of the intervals of steps over which the curves are averaged
PATH = RESULTS / "baselines.csv"


def train(baseline: str, seed: int) -> list:
    """Train one agent; returns a row for each interval: the mean return, and the noise that the baseline left."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "reinforce.py"), *FLAGS.split(), "--baseline", baseline]
        subprocess.run([*command, "--seed", str(seed)], cwd=folder, check=True, capture_output=True)
        (run,) = Path(folder, "runs").iterdir()
        events = EventAccumulator(str(run), size_guidance={"scalars": 0})
        events.Reload()
    means = []
    for name in ("episode/return", "loss/value"):
        steps, values = (np.array([getattr(e, key) for e in events.Scalars(name)]) for key in ("step", "value"))
        inside = np.digitize(steps, [0, *GRID], right=True) - 1  # the interval of each update
        means.append([values[inside == i].mean() if (inside == i).any() else np.nan for i in range(len(GRID))])
    print(f"{baseline}, seed {seed}: the last return is {means[0][-1]:.0f}", flush=True)
    rows = []
    for step, mean_return, value_loss in zip(GRID, *means):
        rows.append({"baseline": baseline, "seed": seed, "step": int(step)})
        rows[-1] |= {"return": round(mean_return, 2), "scatter": round(value_loss**0.5, 3)}
    return rows


def main():
    """Train two agents at a time, write the CSV file after each."""
    old = csv.DictReader(PATH.open()) if PATH.exists() else []
    done = {(row["baseline"], int(row["seed"])) for row in old}
    todo = [(baseline, seed) for seed in SEEDS for baseline in BASELINES if (baseline, seed) not in done]
    with ThreadPoolExecutor(2) as pool:
        for rows in pool.map(lambda job: train(*job), todo):
            write(PATH, rows, keep=lambda row: True)


if __name__ == "__main__":
    main()
