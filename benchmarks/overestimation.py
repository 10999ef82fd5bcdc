"""The lesson of Double DQN: the value that an agent expects, and the return that it gets [DDQN, Fig. 3].

Trains DQN and Double DQN on Space Invaders. At every checkpoint each agent plays for a while. The mean of max Q(s, a)
over the states it meets, and the mean discounted return that follows them, go to results/overestimation.csv. The runs
are those of scores.py; one that was stopped continues from its last checkpoint.

    python benchmarks/overestimation.py                  # one after the other
    python benchmarks/overestimation.py dqn_atari        # only this one; a second terminal can train the other

Papers
    [DDQN] van Hasselt et al. 2015, Deep Reinforcement Learning with Double Q-learning, arXiv:1509.06461
"""

import csv
import importlib
import shutil
import sys

import numpy as np
import torch

from scores import RESULTS, TABLE, read, run_folder, train
from speed import write

SCRIPTS = ["dqn_atari", "ddqn_atari"]
NUM_ENVS = 10
NUM_STEPS = 1500
HORIZON = 500  # later rewards are ignored, because their weight is less than a hundredth: gamma^500
PATH = RESULTS / "overestimation.csv"
COLUMNS = ("script", "seed", "step", "expected", "return")


@torch.no_grad()
def measure(make_envs, agent, args, seed: int) -> tuple:
    """The mean of max Q over the states of a rollout, and the mean discounted return from these states.

    The environments are those of training: the reward is clipped to its sign, and a return ends with the life.
    """
    envs = make_envs(args, NUM_ENVS)
    obs, _ = envs.reset(seed=seed)
    expected, rewards, terminated = (np.zeros((NUM_STEPS, NUM_ENVS)) for _ in range(3))
    for t in range(NUM_STEPS):
        obs = torch.as_tensor(obs, device=next(agent.parameters()).device)
        expected[t] = agent(obs).amax(-1).cpu()
        obs, rewards[t], terminated[t], _, _ = envs.step(agent.epsilon_greedy(obs, args.eval_epsilon))
    envs.close()
    returns = rewards.copy()
    for t in reversed(range(NUM_STEPS - 1)):
        returns[t] += args.gamma * (1 - terminated[t]) * returns[t + 1]
    return expected[:-HORIZON].mean(), returns[:-HORIZON].mean()


def child(script: str, argv: list):
    """Train with a script, and append what `measure` finds at each checkpoint to a file in the run folder."""
    module = importlib.import_module(script)

    class Run(module.Run):
        def save_checkpoint(self, final: bool = False):
            returns = super().save_checkpoint(final)
            seed = module.seed_everything(self.args.seed, self.step, 2)  # training is seeded again after this
            expected, got = measure(module.make_envs, self.parts["agent"], self.args, seed)
            with (self.folder / "overestimation.csv").open("a") as file:
                file.write(f"{self.step},{expected:.4f},{got:.4f}\n")
            return returns

    module.Run = Run
    module.train(module.parse_args(argv))


def main(wanted: list):
    """Train what is not in the CSV file, and write the file."""
    rows = [row for row in TABLE if row[0] in wanted and "SpaceInvaders" in row[1]]
    for script, flags, seed in ((script, flags, str(seed)) for script, flags, seeds in rows for seed in seeds):
        if not any((row["script"], row["seed"]) == (script, seed) for row in read(PATH)):
            folder = run_folder(script, flags, seed)
            if not any(folder.glob("runs/*/overestimation.csv")):  # it was trained without measuring
                shutil.rmtree(folder, ignore_errors=True)
            run, _ = train(script, flags, seed, [__file__, "--child", script])
            found = {}  # by step, because a resumed run measures its last checkpoint twice
            for line in csv.reader((run / "overestimation.csv").open()):
                found[int(line[0])] = dict(zip(COLUMNS, (script, seed, *line)))
            write(PATH, list(found.values()), keep=lambda row: True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], sys.argv[3:])
    else:
        main(sys.argv[1:] or SCRIPTS)
