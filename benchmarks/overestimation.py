"""The lesson of Double DQN: the value that DQN and Double DQN expect beside what they then get [DDQN, Fig. 3].

Trains both on Space Invaders, and at every checkpoint plays on for a while: the mean of max Q(s, a) over the states met
there against the mean of the discounted return that followed them, drawn into docs/overestimation.png. The runs are
those of scores.py, and go on where they were stopped.

    python benchmarks/overestimation.py                  # one after the other
    python benchmarks/overestimation.py dqn_atari        # only one, to have the other at the same time

Papers
    [DDQN] van Hasselt et al. 2015, Deep Reinforcement Learning with Double Q-learning, arXiv:1509.06461
"""

import csv
import importlib
import shutil
import sys

import numpy as np
import torch
from scores import HERE, ROOT, TABLE, read, run_folder, train

NAMES = {"dqn_atari": ("DQN", "#b5541c"), "ddqn_atari": ("Double DQN", "#1f4e79")}
NUM_ENVS, NUM_STEPS, HORIZON = 10, 1500, 500  # what comes after the horizon counts less than a hundredth: γ^500
PATH = HERE / "overestimation.csv"


@torch.no_grad()
def measure(make_envs, agent, args, seed: int) -> tuple:
    """Mean over states of max Q and of the return from there, in training's currency: signs of rewards, one life."""
    envs = make_envs(args, NUM_ENVS)
    obs, _ = envs.reset(seed=seed)
    expected, rewards, terminated = (np.zeros((NUM_STEPS, NUM_ENVS)) for _ in range(3))
    for t in range(NUM_STEPS):
        obs = torch.as_tensor(obs, device=next(agent.parameters()).device)
        expected[t] = agent(obs).amax(-1).cpu()
        obs, rewards[t], terminated[t], _, _ = envs.step(agent.explore(agent.best_action(obs), args.eval_epsilon))
    envs.close()
    returns = rewards.copy()
    for t in reversed(range(NUM_STEPS - 1)):
        returns[t] += args.gamma * (1 - terminated[t]) * returns[t + 1]
    return expected[:-HORIZON].mean(), returns[:-HORIZON].mean()


def child(script: str, argv: list):
    """Run a script whose checkpoints write what `measure` finds into the run's folder too."""
    sys.path.insert(0, str(ROOT))
    module = importlib.import_module(script)

    class Run(module.Run):
        def save(self, envs, episodes):
            returns = super().save(envs, episodes)
            seed = module.seed_everything(self.args.seed, self.step, 2)
            expected, got = measure(module.make_envs, self.parts["agent"], self.args, seed)
            with (self.folder / "overestimation.csv").open("a") as file:
                file.write(f"{self.step},{expected:.4f},{got:.4f}\n")
            return returns

    module.Run = Run
    module.train(module.parse_args(argv))


def draw(rows: list):
    """A line for what each agent expects, a dashed one for what it gets."""
    from matplotlib.figure import Figure

    axis = (figure := Figure(figsize=(6, 4), layout="constrained")).subplots()
    for script, (name, color) in NAMES.items():
        curve = np.array(
            [[float(row[x]) for x in ("step", "expected", "return")] for row in rows if row["script"] == script]
        )
        if len(curve):
            axis.plot(curve[:, 0] / 1000, curve[:, 1], color=color, label=f"{name} expects")
            axis.plot(curve[:, 0] / 1000, curve[:, 2], color=color, linestyle="--", label=f"{name} gets")
    axis.set(xlabel="thousand steps on Space Invaders, one seed", ylabel="discounted return of a life", xlim=(0, None))
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    figure.savefig(ROOT / "docs" / "overestimation.png", dpi=120)


def main(wanted: list):
    """Train what is not in the CSV; write it; draw it."""
    for script in wanted:
        (flags,) = (flags for name, flags, _ in TABLE if name == script and "SpaceInvaders" in flags)
        if not any(row["script"] == script for row in read(PATH)):
            folder = run_folder(script, flags, "1")
            if not any(folder.glob("runs/*/overestimation.csv")):  # one that was trained without the measurement
                shutil.rmtree(folder, ignore_errors=True)
            run, _ = train(script, flags, "1", [__file__, "--child", script])
            found = {}  # by step: what came after the last checkpoint of a run that was stopped came again
            for line in csv.reader((run / "overestimation.csv").open()):
                found[int(line[0])] = line
            rows = [dict(zip(("script", "step", "expected", "return"), (script, *line))) for line in found.values()]
            kept = [row for row in read(PATH) if row["script"] != script]  # read late: the other may have been written
            with PATH.open("w", newline="") as file:
                writer = csv.DictWriter(file, rows[0], lineterminator="\n")
                writer.writeheader()
                writer.writerows([*kept, *rows])
    draw(read(PATH))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], sys.argv[3:])
    else:
        main(sys.argv[1:] or list(NAMES))
