"""Draws the measurements into docs/: curves.png, the evaluations of each task over its steps; speed.png, the speed
compared with Stable-Baselines3; scaling.png, speed over the number of environments and memory over the replay's size.

    python benchmarks/plot.py
"""

from statistics import median

import numpy as np
from matplotlib.figure import Figure
from scores import CURVES, GPU_TABLE, RESULTS, ROOT, SCORES, TABLE, key, read

# script, a part of its flags, the score to compare with, and its source; the first row that fits is used
REFERENCES = [
    ("q_learning", "is_slippery", 1, "optimum"),
    ("q_learning", "FrozenLake8x8", 0.913, "optimum"),
    ("q_learning", "Taxi", 7.56, "optimum"),
    ("q_learning", "CliffWalking", -13, "optimum"),
    ("q_learning", "", 0.744, "optimum"),
    ("reinforce", "Flappy", None, None),
    ("reinforce", "", 350, "asked for by the Deep RL Course"),
    ("a2c_continuous", "LunarLander", 84, "RL Zoo, 5 M steps"),
    ("a2c_continuous", "Panda", -0.24, "best card on the Hub"),
    ("a2c_continuous", "Pendulum", -163, "RL Zoo, 1 M steps"),
    ("a2c_continuous", "HalfCheetah", 3041, "RL Zoo, v3"),
    ("a2c_continuous", "", 300, "RL Zoo, 5 M steps"),
    ("ppo", "CartPole", 500, "RL Zoo, 100 k steps"),
    ("ppo", "Acrobot", -73.5, "RL Zoo, 1 M steps"),
    ("ppo", "Continuous", 271, "RL Zoo, 1 M steps"),
    ("ppo", "Pendulum", -172, "RL Zoo, 100 k steps"),
    ("ppo", "", 242, "RL Zoo, 1 M steps"),
    ("ppo_atari", "Pong", 21.0, "RL Zoo, 10 M steps"),
    ("ppo_atari", "Breakout", 415, "CleanRL, 10 M steps"),
    ("ppo_atari", "SpaceInvaders", 1162, "CleanRL, 10 M steps"),
    ("ppo_atari", "BeamRider", 3397, "RL Zoo, 10 M steps"),
    ("ppo_atari", "Qbert", 16431, "CleanRL, 10 M steps"),
    ("ppo_atari", "Seaquest", 1784, "RL Zoo, 10 M steps"),
    ("dqn_atari", "Pong", 20.6, "RL Zoo, 10 M steps"),
    ("dqn_atari", "Breakout", 367, "CleanRL, 10 M steps"),
    ("dqn_atari", "SpaceInvaders", 1442, "CleanRL, 10 M steps"),
    ("dqn_atari", "BeamRider", 6673, "CleanRL, 10 M steps"),
    ("dqn_atari", "Qbert", 9497, "RL Zoo, 10 M steps"),
    ("dqn_atari", "Seaquest", 2000, "RL Zoo, 10 M steps"),
    ("ddqn_atari", "", None, None),
]
COLOR, REFERENCE_COLOR = "#1f4e79", "#b5541c"


def panels() -> dict:
    """The curves (steps, 2) of each (script, flags, environment) that has some, in the order of the tables."""
    env_ids = {key(row): row["env_id"] for row in read(SCORES)}
    runs = {}
    found = {}
    for row in read(CURVES):
        runs.setdefault(key(row), []).append((int(row["step"]), float(row["return"])))
    for script, flags, seeds in (*TABLE, *GPU_TABLE):
        for task in ((script, flags, str(seed)) for seed in range(1, seeds + 1)):
            if task in runs:
                found.setdefault((script, flags, env_ids[task]), []).append(np.array(runs[task]))
    return found


def name_of(env_id: str) -> str:
    """The environment's name for a title, without its package and without the suffix of Atari games."""
    return env_id.rpartition(":")[2].removesuffix("NoFrameskip-v4")


def draw_curves(found: dict):
    """Draw a panel for each task: the mean over the seeds, and the range from the worst to the best of them."""
    columns = min(3, len(found))
    lines = -(-len(found) // columns)
    figure = Figure(figsize=(4 * columns, 3 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False)
    for axis in axes.flat[len(found) :]:
        axis.remove()
    for axis, ((script, flags, env_id), curves) in zip(axes.flat, found.items()):
        steps = curves[0][:, 0]  # nearly the same with other seeds
        returns = np.array([np.interp(steps, *curve.T) for curve in curves])
        unit, name = (1e6, "M") if steps[-1] >= 1e6 else (1e3, "thousand")
        axis.plot(steps / unit, returns.mean(0), color=COLOR)
        axis.fill_between(steps / unit, returns.min(0), returns.max(0), color=COLOR, alpha=0.15)
        value, whose = next(row[2:] for row in REFERENCES if row[0] == script and row[1] in flags)
        if value is not None:
            axis.axhline(value, color=REFERENCE_COLOR, linestyle="--", linewidth=1, label=f"{value}, {whose}")
            axis.legend(frameon=False, loc="best")
        seeds = f"{len(curves)} seeds" if len(curves) > 1 else "1 seed"
        axis.set(title=f"{script}.py, {name_of(env_id)}", xlabel=f"{name} steps, {seeds}", xlim=(0, None))
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(ROOT / "docs" / "curves.png", dpi=100)


def ratios() -> dict:
    """For each task, our speed divided by that of Stable-Baselines3, one ratio for each round."""
    rates = {}
    found = {}
    for row in read(RESULTS / "speed.csv"):
        best = rates.setdefault((row["task"], row["round"]), {})
        best[row["contender"]] = max(best.get(row["contender"], 0), int(row["steps_per_second"]))
    for (task, _), best in rates.items():
        if "sb3" in best:
            found.setdefault(task, []).append(best["ours"] / best["sb3"])
    return found


def draw_speed(found: dict):
    """Draw the median ratio of each task as a bar, with the range of the rounds."""
    axis = (figure := Figure(figsize=(8, 0.6 + 0.45 * len(found)), layout="constrained")).subplots()
    middle = {task: median(rounds) for task, rounds in sorted(found.items(), key=lambda item: median(item[1]))}
    reach = [(middle[task] - min(found[task]), max(found[task]) - middle[task]) for task in middle]
    axis.barh(list(middle), middle.values(), xerr=np.transpose(reach), color=COLOR, ecolor="#888888")
    for line, ratio in enumerate(middle.values()):
        axis.text(0.05, line, f"{ratio:.2f}", color="white", va="center")
    axis.axvline(1, color=REFERENCE_COLOR, linestyle="--", linewidth=1)
    axis.set(xlabel="steps per second, as a multiple of Stable-Baselines3's", xlim=(0, None))
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(ROOT / "docs" / "speed.png", dpi=100)


def draw_scaling(rates: list, memory: list):
    """Draw steps per second over the number of environments, and memory over the size of the replay."""
    figure = Figure(figsize=(12, 3.2), layout="constrained")
    *axes, last = figure.subplots(1, 3)
    for axis, script in zip(axes, ("ppo", "ppo_atari")):
        for contender, label, style in (("ours", "training", "-"), ("ceiling", "random actions", "--")):
            rounds = {}
            for row in rates:
                if (row["script"], row["contender"]) == (script, contender):
                    rounds.setdefault(int(row["num_envs"]), []).append(int(row["steps_per_second"]))
            color = COLOR if contender == "ours" else REFERENCE_COLOR
            axis.loglog(list(rounds), [median(x) for x in rounds.values()], style, color=color, marker="o", label=label)
            axis.fill_between(list(rounds), *zip(*((min(x), max(x)) for x in rounds.values())), color=color, alpha=0.15)
        axis.set(title=f"{script}.py", xlabel="environments", ylabel="steps per second")
        axis.set_xticks(list(rounds), map(str, rounds), minor=False)
        axis.legend(frameon=False)
    sizes = [int(row["buffer_size"]) / 1e6 for row in memory]
    last.plot(sizes, [int(row["peak_memory_mib"]) * 1024**2 / 1e9 for row in memory], color=COLOR, marker="o")
    last.set(title="dqn_atari.py", xlabel="million steps in the replay", ylabel="peak memory, GB")
    last.set(xlim=(0, None), ylim=(0, None))
    for axis in (*axes, last):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(ROOT / "docs" / "scaling.png", dpi=100)


def main():
    """Draw all of it."""
    draw_curves(panels())
    draw_speed(ratios())
    if rates := read(RESULTS / "scaling.csv"):
        draw_scaling(rates, read(RESULTS / "memory.csv"))


if __name__ == "__main__":
    main()
