"""Draws the measurements in results/ as pictures for docs/, each for a light and a dark page.

python benchmarks/plot.py                    # all pictures
python benchmarks/plot.py speed curves-ppo   # these
"""

import sys
from statistics import median

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from scores import CURVES, GPU_TABLE, RESULTS, ROOT, SCORES, TABLE, key, read
from tables import PEERS, reference, speeds, task_name

# Colours that GitHub uses on white and on black: blue is this project, orange what it is compared with.
COLORS = {
    "light": ("#0969da", "#bc4c00", "#1a7f37", "#8250df", "#8c959f"),
    "dark": ("#4493f8", "#f0883e", "#3fb950", "#ab7df8", "#6e7681"),
}
INK = {"light": "#424a53", "dark": "#b7bdc8"}
OURS, OTHER, THIRD, FOURTH, GREY = (f"C{i}" for i in range(5))


def theme(name: str) -> dict:
    """The settings of matplotlib for a light or a dark page; the page itself is the background."""
    inked = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    return {
        **dict.fromkeys(inked, INK[name]),
        "axes.prop_cycle": matplotlib.cycler(color=COLORS[name]),
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 11,
        "axes.titleweight": "bold",
        "legend.frameon": False,
        "svg.fonttype": "none",  # text stays text
        "svg.hashsalt": "solorl",  # the same measurements give the same file
    }


def panels(script: str) -> dict:
    """The curves, each (points, 2), of each task of a script that has some; by flags and environment."""
    env_ids = {key(row): row["env_id"] for row in read(SCORES)}
    runs, found = {}, {}
    for row in read(CURVES):
        runs.setdefault(key(row), []).append((int(row["step"]), float(row["return"])))
    for name, flags, seeds in (*TABLE, *GPU_TABLE):
        for task in ((script, flags, str(seed)) for seed in seeds):
            if name == script and task in runs:
                found.setdefault((flags, env_ids[task]), []).append(np.array(runs[task]))
    return found


def draw_curves(script: str) -> Figure:
    """A panel for each task: the evaluations of each seed as a thin line, their mean as a thick one."""
    found = panels(script)
    columns = min(3, len(found))
    lines = -(-len(found) // columns)
    figure = Figure(figsize=(4 * columns, 2.9 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False)
    for axis in axes.flat[len(found) :]:
        axis.remove()
    for axis, ((flags, env_id), curves) in zip(axes.flat, found.items()):
        steps = curves[0][:, 0]  # nearly the same with other seeds
        unit, name = (1e6, "million") if steps[-1] >= 1e6 else (1e3, "thousand")
        if len(curves) > 1:
            for curve in curves:
                axis.plot(curve[:, 0] / unit, curve[:, 1], color=OURS, linewidth=0.8, alpha=0.5)
        returns = np.array([np.interp(steps, *curve.T) for curve in curves])
        seeds = f"mean of {len(curves)} seeds" if len(curves) > 1 else "1 seed"
        axis.plot(steps / unit, returns.mean(0), color=OURS, linewidth=2.4, label=seeds)
        value, text = reference(script, flags)
        bottom, top = axis.get_ylim()
        above = value is not None and value > 1.5 * top > 0  # the line would press the curves onto the floor
        if value is not None:
            text += " (above)" if above else ""
            axis.axhline(value, color=OTHER, linestyle="--", linewidth=1.2, label=text)
        if above:
            axis.set_ylim(bottom, top)
        axis.legend(loc="best", fontsize=8.5)
        axis.set(title=task_name(env_id, flags), xlabel=f"{name} steps", ylabel="return", xlim=(0, None))
    figure.suptitle(f"{script}.py", fontsize=11)
    return figure


def draw_speed() -> Figure:
    """For each task, the steps per second of each program as a multiple of Stable-Baselines3's."""
    tasks = {task: rates for task, rates in speeds().items() if "sb3" in rates}
    bars = [(task, name) for task, rates in tasks.items() for name in PEERS if name in rates]
    height = 0.27 * len(bars) + 0.3 * len(tasks) + 0.9
    axis = (figure := Figure(figsize=(9, height), layout="constrained")).subplots()
    position, places, drawn = 0.0, [], {}
    for task, rates in tasks.items():
        shown = [name for name in PEERS if name in rates]
        places.append((position + (len(shown) - 1) / 2, task.replace(", ", "\n", 1)))
        for name in shown:
            ratios = [rate / rival for rate, rival in zip(rates[name], rates["sb3"])]
            color = {"ours": OURS, "ours, float32": FOURTH, "sb3": GREY, "sbx": THIRD}[name]
            drawn[name] = axis.barh(position, median(ratios), height=0.85, color=color)
            axis.text(median(ratios) + 0.03, position, f"{median(rates[name]):,.0f} steps/s", va="center", fontsize=8.5)
            position += 1
        position += 1.1
    axis.set_yticks(*zip(*places), fontsize=9)
    axis.tick_params(axis="y", length=0)
    axis.invert_yaxis()
    axis.set(xlabel="times the steps per second of Stable-Baselines3", xlim=(0, axis.get_xlim()[1] + 0.35))
    shown = [name for name in PEERS if name in drawn]
    figure.legend([drawn[name] for name in shown], [PEERS[name] for name in shown], loc="outside upper right", ncols=4)
    return figure


def draw_scaling() -> Figure:
    """Steps per second over the number of environments, and memory over the size of the replay."""
    figure = Figure(figsize=(12, 3.1), layout="constrained")
    *axes, last = figure.subplots(1, 3)
    for axis, script in zip(axes, ("ppo", "ppo_atari")):
        for contender, label, style, color in (("ours", "training", "-", OURS), ("ceiling", "random play", "--", GREY)):
            rounds = {}
            for row in read(RESULTS / "scaling.csv"):
                if (row["script"], row["contender"]) == (script, contender):
                    rounds.setdefault(int(row["num_envs"]), []).append(int(row["steps_per_second"]))
            axis.loglog(list(rounds), [median(x) for x in rounds.values()], style, color=color, marker="o", label=label)
            axis.fill_between(list(rounds), *zip(*((min(x), max(x)) for x in rounds.values())), color=color, alpha=0.2)
        axis.set(title=f"{script}.py", xlabel="environments", ylabel="steps per second")
        axis.set_xticks(list(rounds), map(str, rounds), minor=False)
        axis.legend()
    memory = read(RESULTS / "memory.csv")
    sizes = [int(row["buffer_size"]) / 1e6 for row in memory]
    last.plot(sizes, [int(row["peak_memory_mib"]) * 1024**2 / 1e9 for row in memory], color=OURS, marker="o")
    last.set(title="dqn_atari.py", xlabel="million steps in the replay", ylabel="peak memory, GB")
    last.set(xlim=(0, None), ylim=(0, None))
    return figure


def draw_baselines() -> Figure:
    """REINFORCE with each baseline: the return, and how far the return is from the baseline."""
    axes = (figure := Figure(figsize=(10, 3.8), layout="constrained")).subplots(1, 2)
    for baseline, color in (("none", OTHER), ("mean", THIRD), ("learned", OURS)):
        rows = [row for row in read(RESULTS / "baselines.csv") if row["baseline"] == baseline]
        seeds = list(dict.fromkeys(row["seed"] for row in rows))
        steps = np.array([int(row["step"]) for row in rows if row["seed"] == seeds[0]]) / 1000
        for axis, column in zip(axes, ("return", "scatter")):
            runs = [[float(row[column]) for row in rows if row["seed"] == seed] for seed in seeds]
            for run in runs:
                axis.plot(steps, run, color=color, linewidth=0.7, alpha=0.35)
            axis.plot(steps, np.nanmean(runs, axis=0), color=color, linewidth=2.4, label=baseline)
    axes[0].set(title="What is learned", ylabel="return of the training episodes", ylim=(0, 510))
    axes[1].set(title="The noise that is left", ylabel="RMS of return-to-go minus baseline", ylim=(0, None))
    for axis in axes:
        axis.set(xlabel="thousand steps", xlim=(0, None))
    axes[0].legend(title="--baseline")
    return figure


def draw_overestimation() -> Figure:
    """What DQN and Double DQN expect as solid lines, what they get as dashed ones. Thin: a seed. Thick: the mean."""
    axis = (figure := Figure(figsize=(7, 3.8), layout="constrained")).subplots()
    for script, name, color in (("dqn_atari", "DQN", OTHER), ("ddqn_atari", "Double DQN", OURS)):
        rows = [row for row in read(RESULTS / "overestimation.csv") if row["script"] == script]
        seeds = dict.fromkeys(row["seed"] for row in rows)
        steps = [int(row["step"]) / 1000 for row in rows if row["seed"] == rows[0]["seed"]]  # the same with all seeds
        for column, style, verb in (("expected", "-", "expects"), ("return", "--", "gets")):
            curves = np.array([[float(row[column]) for row in rows if row["seed"] == seed] for seed in seeds])
            axis.plot(steps, curves.T, style, color=color, linewidth=0.8, alpha=0.4)
            axis.plot(steps, curves.mean(0), style, color=color, linewidth=2, label=f"{name} {verb}")
    axis.set(xlabel="thousand steps on Space Invaders", ylabel="discounted return of a life", xlim=(0, None))
    axis.legend()
    return figure


def draw_first_weights() -> Figure:
    """The loss of DQN's network on random play, from different first weights. Thin: a seed. Thick: the mean."""
    axis = (figure := Figure(figsize=(7, 3.4), layout="constrained")).subplots()
    names = {"torchs_own": ("torch's own", OTHER), "he": ("He's", THIRD), "orthogonal": ("orthogonal", OURS)}
    for weights, (name, color) in names.items():
        rows = [row for row in read(RESULTS / "first_weights.csv") if row["weights"] == weights]
        seeds = dict.fromkeys(row["seed"] for row in rows)
        minibatches = [int(row["minibatch"]) for row in rows if row["seed"] == rows[0]["seed"]]
        curves = np.array([[float(row["loss"]) for row in rows if row["seed"] == seed] for seed in seeds])
        axis.plot(minibatches, curves.T, color=color, linewidth=0.8, alpha=0.4)
        axis.plot(minibatches, curves.mean(0), color=color, linewidth=2, label=name)
    constant = float(rows[0]["loss_of_a_constant"])
    axis.axhline(constant, color=GREY, linestyle="--", linewidth=1.2, label="a constant value")
    axis.set(xlabel="minibatches of random play in Pong", ylabel="loss", xlim=(0, None), ylim=(0, None))
    axis.legend()
    return figure


def draw_bfloat16() -> Figure:
    """PPO on Breakout in both formats, a line for each seed."""
    axis = (figure := Figure(figsize=(7, 3.8), layout="constrained")).subplots()
    for name, color in (("bfloat16", OURS), ("float32", OTHER)):
        rows = [row for row in read(RESULTS / "bfloat16.csv") if row["format"] == name]
        seeds = list(dict.fromkeys(row["seed"] for row in rows))
        for seed in seeds:
            curve = [(int(row["step"]) / 1000, float(row["return"])) for row in rows if row["seed"] == seed]
            axis.plot(*zip(*curve), color=color, linewidth=1.8, label=name if seed == seeds[0] else None)
    axis.set(xlabel="thousand steps on Breakout", ylabel="score of the training games", xlim=(0, None), ylim=(0, None))
    axis.legend()
    return figure


def draw_elo() -> Figure:
    """The Elo rating in training, a line for each seed; what the yardsticks have on average as dashed lines."""
    axis = (figure := Figure(figsize=(8, 3.6), layout="constrained")).subplots()
    rows = read(RESULTS / "elo.csv")
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    for variant, color in zip(variants, (OURS, OTHER)):
        runs = {}
        for row in rows:
            if row["variant"] == variant:
                runs.setdefault(row["seed"], []).append((int(row["step"]) / 1e6, float(row["agent"])))
        for seed, run in runs.items():
            label = f"{variant}, {len(runs)} seed{'s' * (len(runs) > 1)}" if seed == next(iter(runs)) else None
            axis.plot(*zip(*run), color=color, linewidth=1.8, label=label)
    for name in ("random", "minimax-1", "minimax-2", "minimax-4"):
        rating = np.mean([float(row[name]) for row in rows])
        axis.axhline(rating, color=GREY, linestyle="--", linewidth=1)
        axis.text(1.01, rating, name, transform=axis.get_yaxis_transform(), va="center", fontsize=8.5)
    axis.set(xlabel="million steps", ylabel="Elo", xlim=(0, None))
    axis.legend(loc="lower right")
    return figure


def pictures() -> dict:
    """The function that draws each picture, by the picture's name."""
    scripts = dict.fromkeys(row["script"] for row in read(CURVES))
    drawn = {f"curves-{script}": lambda script=script: draw_curves(script) for script in scripts}
    return drawn | {
        "speed": draw_speed,
        "scaling": draw_scaling,
        "baselines": draw_baselines,
        "overestimation": draw_overestimation,
        "first_weights": draw_first_weights,
        "bfloat16": draw_bfloat16,
        "elo": draw_elo,
    }


def main(wanted: list):
    """Draw the pictures with these names, or all."""
    for name, draw in pictures().items():
        if not wanted or name in wanted:
            for page in COLORS:
                with matplotlib.rc_context(theme(page)):
                    path = ROOT / "docs" / f"{name}-{page}.svg"
                    draw().savefig(path, transparent=True, metadata={"Date": None})


if __name__ == "__main__":
    main(sys.argv[1:])
