"""Where the time of PPO's training goes: environments, acting, update and the rest: benchmarks/results/split.csv.

python benchmarks/split.py
python benchmarks/split.py --only ppo_doom
"""

import importlib
import json
import time

import numpy as np
import tyro

from speed import RESULTS, TASKS, logged_speeds, run_child, write


class Clock:
    """Sums the wall time of the calls of a function."""

    def __init__(self):
        self.seconds = 0.0

    def time(self, function):
        """`function` with its time taken."""

        def timed(*args, **kwargs):
            start = time.perf_counter()
            result = function(*args, **kwargs)
            self.seconds += time.perf_counter() - start
            return result

        return timed


def measure(task: str) -> dict:
    """Train without evaluations; returns the steps per second and the seconds of each part."""
    script, steps, flags, _, _ = TASKS[task]
    module = importlib.import_module(script)
    environments, acting = Clock(), Clock()
    make_envs = module.make_envs

    def timed_envs(*args, **kwargs):
        envs = make_envs(*args, **kwargs)
        envs.step = environments.time(envs.step)
        return envs

    module.make_envs = timed_envs
    module.Agent.policy = acting.time(module.Agent.policy)
    module.evaluate = lambda *args, **kwargs: np.zeros(1)
    args = module.parse_args([*flags.split(), "--device", "cpu", "--total-timesteps", str(steps)])
    batch_size = args.num_envs * args.num_steps
    seconds = sum(batch_size / speed for speed in logged_speeds(module.train(args)))
    row = {"steps_per_second": round(steps / seconds), "threads": args.num_threads}
    row |= {"environments": round(environments.seconds, 2), "acting": round(acting.seconds, 2)}
    return row | {"update_and_rest": round(seconds - environments.seconds - acting.seconds, 2)}


def main(only: str = "", rounds: int = 3, child: str | None = None):
    """Measure the tasks of PPO.

    Args:
        only: measure only the tasks whose names contain this.
        rounds: how many times to measure each.
        child: measure this task and print the result as JSON; what this program calls itself with.
    """
    if child:
        print("RESULT", json.dumps(measure(child)))
        return
    tasks = [task for task in TASKS if task.startswith("ppo") and only in task]
    rows = []
    for round_number in range(1, rounds + 1):
        for task in tasks:
            rows.append({"task": task, "round": round_number} | run_child("--child", task, program=__file__))
            print(rows[-1], flush=True)
            write(RESULTS / "split.csv", rows, keep=lambda row: row["task"] not in tasks)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__.partition("\n")[0])
