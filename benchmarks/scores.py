"""Trains every row of TABLE, seed after seed, and writes benchmarks/scores.csv. Rows that are in it are skipped.

python benchmarks/scores.py
"""

import csv
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from speed import HERE, ROOT, cpu_name

# script, flags, seeds
TABLE = [
    ("ppo", "", 6),
    ("ppo", "--env-id CartPole-v1 --total-timesteps 1e5 --num-envs 8 --num-minibatches 4 --learning-rate 1e-3 "
     "--gamma 0.98 --ent-coef 0", 3),
    ("ppo", "--env-id LunarLanderContinuous-v3 --ent-coef 0", 1),
    ("ppo", "--env-id Pendulum-v1 --total-timesteps 2e5 --num-envs 4 --num-steps 512 --learning-rate 1e-3 "
     "--gamma 0.9 --gae-lambda 0.95 --ent-coef 0", 1),
]  # fmt: skip
PATH = HERE / "scores.csv"


def main():
    """Train what is not in the CSV yet."""
    rows = list(csv.DictReader(PATH.open())) if PATH.exists() else []
    done = {(row["script"], row["flags"], row["seed"]) for row in rows}
    for script, flags, seeds in TABLE:
        for seed in range(1, seeds + 1):
            if (script, flags, str(seed)) not in done:
                rows.append(train(script, flags, seed))
                print(rows[-1], flush=True)
                with PATH.open("w", newline="") as file:
                    writer = csv.DictWriter(file, rows[-1], lineterminator="\n")
                    writer.writeheader()
                    writer.writerows(rows)


def train(script: str, flags: str, seed: int) -> dict:
    """Train one agent as a user would; its row."""
    with TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / f"{script}.py"), *shlex.split(flags), "--seed", str(seed)]
        start = time.perf_counter()
        subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - start
        (run,) = Path(folder, "runs").iterdir()
        results, config = (json.loads((run / name).read_text()) for name in ("results.json", "config.json"))
    return {
        "script": script,
        "env_id": results["env_id"],
        "seed": str(seed),
        "steps": config["total_timesteps"],
        "mean": round(results["mean_reward"], 2),
        "std": round(results["std_reward"], 2),
        "episodes": results["n_eval_episodes"],
        "seconds": round(seconds),
        "machine": f"{os.cpu_count()} cores, {cpu_name()}",
        "torch": config["torch"],
        "gymnasium": config["gymnasium"],
        "commit": config["commit"],
        "flags": flags,
    }


if __name__ == "__main__":
    main()
