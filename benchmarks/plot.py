"""Draws benchmarks/curves.csv into docs/curves.png: how the evaluations of each task rise over its steps.

python benchmarks/plot.py
"""

import numpy as np
from matplotlib.figure import Figure
from scores import CURVES, ROOT, SCORES, TABLE, key, read

# script, environment: the score to compare with, and whose it is
REFERENCES = {
    ("q_learning", "FrozenLake-v1"): (0.744, "optimum"),
    ("reinforce", "CartPole-v1"): (350, "the course asks for"),
    ("ppo", "CartPole-v1"): (500, "RL Zoo, 100 k steps"),
    ("ppo", "LunarLander-v3"): (242, "RL Zoo, 1 M steps"),
    ("a2c_continuous", "BipedalWalker-v3"): (300, "RL Zoo, 5 M steps"),
    ("a2c_continuous", "Pendulum-v1"): (-163, "RL Zoo, 1 M steps"),
    ("ppo_atari", "PongNoFrameskip-v4"): (21.0, "RL Zoo, 10 M steps"),
    ("dqn_atari", "PongNoFrameskip-v4"): (20.6, "RL Zoo, 10 M steps"),
}
COLOR, REFERENCE_COLOR = "#1f4e79", "#b5541c"


def panels() -> dict:
    """The curves of each (script, environment, flags) that has some, in the order of the table: arrays (steps, 2)."""
    env_ids, runs = {key(row): row["env_id"] for row in read(SCORES)}, {}
    for row in read(CURVES):
        runs.setdefault(key(row), []).append((int(row["step"]), float(row["return"])))
    found = {}
    for script, flags, seeds in TABLE:
        curves = [
            np.array(runs[script, flags, str(seed)])
            for seed in range(1, seeds + 1)
            if (script, flags, str(seed)) in runs
        ]
        if curves:
            found[script, env_ids[script, flags, "1"], flags] = curves
    return found


def draw(found: dict):
    """A panel a task: the mean over the seeds, between the worst and the best of them."""
    columns = min(3, len(found))
    lines = -(-len(found) // columns)
    axes = (figure := Figure(figsize=(4 * columns, 3 * lines), layout="constrained")).subplots(
        lines, columns, squeeze=False
    )
    for axis in axes.flat[len(found) :]:
        axis.remove()
    for axis, ((script, env_id, _), curves) in zip(axes.flat, found.items()):
        steps, returns = curves[0][:, 0], np.array([curve[:, 1] for curve in curves])
        unit, name = (1e6, "M") if steps[-1] >= 1e6 else (1e3, "thousand")
        axis.plot(steps / unit, returns.mean(0), color=COLOR)
        axis.fill_between(steps / unit, returns.min(0), returns.max(0), color=COLOR, alpha=0.15)
        if (script, env_id) in REFERENCES:
            value, whose = REFERENCES[script, env_id]
            axis.axhline(value, color=REFERENCE_COLOR, linestyle="--", linewidth=1, label=f"{value}, {whose}")
            axis.legend(frameon=False, loc="lower right")
        seeds = f"{len(curves)} seeds" if len(curves) > 1 else "1 seed"
        axis.set(title=f"{script}.py, {env_id.rpartition(':')[2]}", xlabel=f"{name} steps, {seeds}", xlim=(0, None))
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(ROOT / "docs" / "curves.png", dpi=100)


if __name__ == "__main__":
    draw(panels())
