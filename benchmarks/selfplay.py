"""Connect Four by self-play, with the pool of opponents and with the newest self alone: results/selfplay.csv.

Each agent plays 100 games, about half of them in each seat, against random moves and against minimax of depth 1 to 4.
The Elo ratings of the training are in results/elo.csv. Rows that are in the files are skipped.

    python benchmarks/selfplay.py
    python benchmarks/selfplay.py --seeds 3 --only pool
"""

import csv
import re
import subprocess
import sys
import time
from pathlib import Path

import tyro

from scores import machine
from speed import RESULTS, ROOT, commit

sys.path.insert(0, str(ROOT))
import ppo_selfplay  # noqa: E402

VARIANTS = {"pool": "", "newest self alone": "--latest-ratio 1"}


def train(variant: str, seed: int) -> tuple:
    """Train an agent, or continue a run that was stopped; returns the run folder and the wall time in seconds."""
    folder = ROOT / "runs" / "selfplay" / f"{re.sub(' ', '-', variant)}-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    flags = [*VARIANTS[variant].split(), "--seed", str(seed), "--rated-games", "20"]
    flags += [word for run in folder.glob("runs/*") for word in ("--resume", str(run))]
    start = time.perf_counter()
    subprocess.run([sys.executable, str(ROOT / "ppo_selfplay.py"), *flags], cwd=folder, check=True)
    (run,) = folder.glob("runs/*")
    return run, time.perf_counter() - start


def scores(run: Path) -> dict:
    """The score of an agent against each opponent."""
    checkpoint = ppo_selfplay.load_checkpoint(run)
    found = {}
    for opponent in ppo_selfplay.OPPONENTS:
        args = ppo_selfplay.Args(**checkpoint["config"] | {"eval_opponent": opponent})
        agent = ppo_selfplay.Agent(ppo_selfplay.make_envs(args, 1), args)
        agent.load_state_dict(checkpoint["agent"])
        found[opponent] = ppo_selfplay.evaluate(agent, args, 100).mean()
    return found


def read(name: str) -> list:
    """The rows of a file in results/."""
    path = RESULTS / name
    return list(csv.DictReader(path.open())) if path.exists() else []


def write(name: str, rows: list):
    """Write the rows of a file in results/."""
    with (RESULTS / name).open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def main(seeds: tuple[int, ...] = (3, 4, 5), only: str = ""):
    """Train and play what is not in selfplay.csv yet.

    Args:
        seeds: the seeds; the flags were chosen on 1, 2 and 11.
        only: only the variant with this name.
    """
    for variant in VARIANTS:
        for seed in seeds:
            task = {"variant": variant, "seed": str(seed)}
            rows = read("selfplay.csv")
            if only in ("", variant) and not any(task.items() <= row.items() for row in rows):
                run, seconds = train(variant, seed)
                row = task | scores(run) | {"seconds": round(seconds), "machine": machine("ppo_selfplay", "cpu")}
                write("selfplay.csv", [*rows, row | {"commit": commit()}])
                ratings = [task | row for row in csv.DictReader((run / "elo.csv").open())]
                write("elo.csv", [*read("elo.csv"), *ratings])
                print(row, flush=True)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__.partition("\n")[0])
