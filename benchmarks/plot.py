"""Draws benchmarks/curves.csv into docs/curves.png: how the evaluations of each task rise over its steps.

python benchmarks/plot.py
"""

import sys

import numpy as np
from matplotlib.figure import Figure
from scores import CURVES, ROOT, SCORES, TABLE, key, read

# script and a part of its flags: the score to compare with, and whose it is; the first that fits counts
REFERENCES = [
    ("q_learning", "is_slippery", 1, "optimum"),
    ("q_learning", "FrozenLake8x8", 0.913, "optimum"),
    ("q_learning", "Taxi", 7.56, "optimum"),
    ("q_learning", "CliffWalking", -13, "optimum"),
    ("q_learning", "", 0.744, "optimum"),
    ("reinforce", "Flappy", None, None),
    ("reinforce", "", 350, "the Deep RL Course asks for"),
    ("a2c_continuous", "LunarLander", 84, "RL Zoo, 5 M steps"),
    ("a2c_continuous", "Panda", -0.24, "best card on the Hub"),
    ("a2c_continuous", "Pendulum", -163, "RL Zoo, 1 M steps"),
    ("a2c_continuous", "HalfCheetah", 3041, "RL Zoo, v3"),
    ("a2c_continuous", "", 300, "RL Zoo, 5 M steps"),
    ("ppo", "CartPole", 500, "RL Zoo, 100 k steps"),
    ("ppo", "Continuous", None, None),
    ("ppo", "Pendulum", None, None),
    ("ppo", "", 242, "RL Zoo, 1 M steps"),
    ("ppo_atari", "Pong", 21.0, "RL Zoo, 10 M steps"),
    ("dqn_atari", "Pong", 20.6, "RL Zoo, 10 M steps"),
]
COLOR, REFERENCE_COLOR = "#1f4e79", "#b5541c"


def panels() -> dict:
    """The curves of each (script, flags, environment) that has some, in the order of the table: arrays (steps, 2)."""
    env_ids, runs, found = {key(row): row["env_id"] for row in read(SCORES)}, {}, {}
    for row in read(CURVES):
        runs.setdefault(key(row), []).append((int(row["step"]), float(row["return"])))
    for script, flags, seeds in TABLE:
        for task in ((script, flags, str(seed)) for seed in range(1, seeds + 1)):
            if task in runs:
                found.setdefault((script, flags, env_ids[task]), []).append(np.array(runs[task]))
    return found


def draw(found: dict):
    """A panel a task: the mean over the seeds, between the worst and the best of them."""
    columns = min(3, len(found))
    lines = -(-len(found) // columns)
    figure = Figure(figsize=(4 * columns, 3 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False)
    for axis in axes.flat[len(found) :]:
        axis.remove()
    for axis, ((script, flags, env_id), curves) in zip(axes.flat, found.items()):
        steps = curves[0][:, 0]  # of the others nearly the same
        returns = np.array([np.interp(steps, *curve.T) for curve in curves])
        unit, name = (1e6, "M") if steps[-1] >= 1e6 else (1e3, "thousand")
        axis.plot(steps / unit, returns.mean(0), color=COLOR)
        axis.fill_between(steps / unit, returns.min(0), returns.max(0), color=COLOR, alpha=0.15)
        value, whose = next(row[2:] for row in REFERENCES if row[0] == script and row[1] in flags)
        if value is not None:
            axis.axhline(value, color=REFERENCE_COLOR, linestyle="--", linewidth=1, label=f"{value}, {whose}")
            axis.legend(frameon=False, loc="lower right")
        seeds = f"{len(curves)} seeds" if len(curves) > 1 else "1 seed"
        axis.set(title=f"{script}.py, {env_id.rpartition(':')[2]}", xlabel=f"{name} steps, {seeds}", xlim=(0, None))
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(ROOT / "docs" / "curves.png", dpi=100)


if __name__ == "__main__":
    draw(panels() or sys.exit(f"{CURVES} is empty: python benchmarks/scores.py"))
