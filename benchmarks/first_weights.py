"""Do the first weights matter? DQN's network learns the values of random play in Pong, from different first weights.

All networks learn from the same 20,000 steps, in a replay that does not change. The loss of a network whose value is
the same for all screens is half of the share of steps with a reward.

python benchmarks/first_weights.py        # writes benchmarks/results/first_weights.csv; plot.py draws it
"""

import copy
import sys

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from speed import RESULTS, ROOT, write

sys.path.insert(0, str(ROOT))
import dqn_atari  # noqa: E402

STEPS = 20_000
SEEDS = (1, 2, 3)
MINIBATCHES = 3_000
INTERVAL = 100  # minibatches whose mean loss is a row
FLAGS = "--env-id PongNoFrameskip-v4 --device cpu"
PATH = RESULTS / "first_weights.csv"


def torchs_own(layer):
    """As `layer` comes: uniform, up to 1 / sqrt(number of inputs)."""
    layer.reset_parameters()


def he(layer):
    """He et al. 2015, Delving Deep into Rectifiers, arXiv:1502.01852, equation 10; zero biases."""
    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    nn.init.zeros_(layer.bias)


def orthogonal(layer):
    """Nothing to do: this is what dqn_atari.py has."""


def random_play(args) -> dqn_atari.Replay:
    """A replay of STEPS steps with random actions."""
    envs = dqn_atari.make_envs(args, args.num_envs)
    replay = dqn_atari.Replay(STEPS + args.num_envs, args.num_envs, envs.single_observation_space.shape, "cpu")
    obs, _ = envs.reset(seed=dqn_atari.seed_everything(args.seed))
    for _ in range(STEPS // args.num_envs):
        action = np.random.randint(envs.single_action_space.n, size=args.num_envs)
        next_obs, reward, terminated, truncated, infos = envs.step(action)
        replay.add(obs, action, reward, terminated, truncated, infos["final_info"]["_episode"])
        obs = next_obs
    return replay


def learn(args, replay, first_weights) -> list:
    """The mean loss of each interval of minibatches, learned as in dqn_atari.py."""
    agent = dqn_atari.Agent(dqn_atari.make_envs(args, 1), args)
    for layer in agent.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            first_weights(layer)
    target_network = copy.deepcopy(agent)
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, fused=True)
    losses = []
    for i in tqdm(range(1, MINIBATCHES + 1), desc=f"{first_weights.__name__}, seed {args.seed}"):
        loss, _ = dqn_atari.dqn_loss(agent, target_network, *replay.sample(args.batch_size), args.gamma)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if i * args.train_frequency % args.target_network_frequency == 0:
            target_network.load_state_dict(agent.state_dict())
    return np.array(losses).reshape(-1, INTERVAL).mean(1).tolist()


def main():
    """Train all networks, and write the file after each."""
    torch.set_num_threads(1)
    rows = []
    for seed in SEEDS:
        args = dqn_atari.parse_args([*FLAGS.split(), "--seed", str(seed)])
        replay = random_play(args)
        constant = 0.5 * replay.rewards[: replay.size].abs().mean().item()
        for first_weights in (torchs_own, he, orthogonal):
            dqn_atari.seed_everything(seed, 1)
            for i, loss in enumerate(learn(args, replay, first_weights)):
                task = {"weights": first_weights.__name__, "seed": seed, "minibatch": (i + 1) * INTERVAL}
                rows.append(task | {"loss": round(loss, 6), "loss_of_a_constant": round(constant, 6)})
            write(PATH, rows)


if __name__ == "__main__":
    main()
