"""Steps per second of this version against another one, in turns: benchmarks/results/compare.csv.

git worktree add ../before HEAD~1
python benchmarks/compare.py --before ../before --what "GAE in fewer calls" --only CartPole --rounds 5
"""

import os
from pathlib import Path
from statistics import median

import tyro

from speed import PIXELS, RESULTS, ROOT, TASKS, run_child, write


def main(before: Path, what: str, only: str = "", rounds: int = 5, contender: str = "ours"):
    """Measure our scripts in steady state.

    Args:
        before: the other version's folder.
        what: what is different, in a few words.
        only: measure only the tasks whose names contain this.
        rounds: how many times to measure each version.
        contender: "ours", or "ours, float32" for the pixel scripts without bfloat16.
    """
    rows = []
    tasks = [task for task in TASKS if only in task]
    for task in tasks:
        for round_number in range(1, rounds + 1):
            row = {"what": what, "task": task, "round": round_number}
            for version, folder in (("before", before.resolve()), ("after", ROOT)):
                threads = os.cpu_count() if TASKS[task][0] in PIXELS else 1
                words = ("--child", "--task", task, "--contender", contender, "--threads", threads)
                row[version] = run_child(*words, scripts=folder)["steady"]
            rows.append(row)
            write(RESULTS / "compare.csv", rows, keep=lambda old: old["what"] != what or old["task"] not in tasks)
            print(row, flush=True)
        ratios = [row["after"] / row["before"] for row in rows if row["task"] == task]
        print(f"{task}: {median(ratios):.2f} [{min(ratios):.2f} to {max(ratios):.2f}]", flush=True)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__.partition("\n")[0])
