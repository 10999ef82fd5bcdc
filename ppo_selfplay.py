"""Self-play: proximal policy optimization (PPO) for two-player games, against one's own past.

To the learner, the opponent is a part of the environment: it makes a move, the opponent answers inside `step`, and
the learner sees the board when it is its turn again. So `train` is that of ppo.py but for the lines marked with
"self-play". Opponents are drawn from a pool of earlier snapshots of the agent. Illegal moves get probability zero. An
Elo rating says how strong the agent is, beside a player of random moves and minimax players that look 1 to 4 moves
ahead.

    python ppo_selfplay.py                                      # connect_four_v3; 91 to 93 % against minimax of depth 2
    python ppo_selfplay.py --env-id tictactoe_v3 --total-timesteps 300_000 --num-envs 128 --num-steps 16 \
        --num-minibatches 4 --learning-rate 4e-3 --gamma 0.99 --gae-lambda 0.9
    python ppo_selfplay.py --play RUN_FOLDER                    # you against the agent, in the terminal

The games have the names, the moves and the rules of PettingZoo's, for many boards at once. --env-kwargs changes the
board: --env-id tictactoe_v3 --env-kwargs '{"rows": 6, "columns": 6, "length": 4}' is four in a row on 6 x 6 squares.

Papers
    [PPO]  Schulman et al. 2017, Proximal Policy Optimization Algorithms, arXiv:1707.06347
    [GAE]  Schulman et al. 2016, High-Dimensional Continuous Control Using Generalized Advantage Estimation,
           arXiv:1506.02438
    [37]   Huang et al. 2022, The 37 Implementation Details of Proximal Policy Optimization, ICLR blog
    [KL]   Schulman 2020, Approximating KL Divergence, joschu.net/blog/kl-approx.html
    [Mask] Huang and Ontanon 2022, A Closer Look at Invalid Action Masking in Policy Gradient Algorithms, 
           arXiv:2006.14171
    [Elo]  Elo 1978, The Rating of Chessplayers, Past and Present
    [BT]   Bradley and Terry 1952, Rank Analysis of Incomplete Block Designs: I. The Method of Paired Comparisons
    [MM]   Hunter 2004, MM Algorithms for Generalized Bradley-Terry Models

Deviations from [PPO]: advantages are normalized per minibatch; the environments start anew at each checkpoint.
"""

import copy
import itertools
import json
import math
import random
import re
import signal
import sys
import time
import traceback
import warnings
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Literal

import gymnasium as gym
import imageio
import numpy as np
import torch
import tyro
from gymnasium.spaces import Box, Discrete
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

# --- config ---


@dataclass
class Args:
    """Command-line flags: first those that every script has, then those of this algorithm."""

    env_id: str = "connect_four_v3"  # gymnasium id, or package:EnvId to import the package first
    env_kwargs: str = "{}"  # keyword arguments of the environment, as JSON
    seed: int = 1  # seed of the weights, the environments and the sampling
    total_timesteps: int = 6_000_000  # environment steps, summed over all environments
    device: str = "cpu"  # cpu, cuda, cuda:1, mps or auto; networks this small are fastest on the CPU
    num_threads: int = 1  # CPU threads used by torch
    num_checkpoints: int = 20  # at most this many checkpoints and evaluations, evenly over the run
    eval_episodes: int = 100  # episodes of the final evaluation; a tenth of them at each checkpoint
    eval_deterministic: bool = True  # evaluate with the most likely or best action, not with a random one
    max_eval_steps: int = 10_000  # an evaluation episode is stopped after this many steps
    capture_video: bool = False  # record an evaluation episode at each checkpoint
    track: bool = False  # log to Weights & Biases as well as TensorBoard
    wandb_project_name: str = "solorl"  # wandb project of --track
    wandb_entity: str | None = None  # wandb user or team of --track
    resume: str | None = None  # run folder to continue from its last checkpoint

    num_envs: int = 256  # games played at once (N)
    num_steps: int = 32  # moves of the agent in each game in each rollout (T)
    learning_rate: float = 3e-3  # of Adam, at the start
    anneal_lr: bool = True  # decrease the learning rate linearly to zero
    gamma: float = 0.95  # discount factor
    gae_lambda: float = 0.85  # λ of generalized advantage estimation
    num_minibatches: int = 8  # minibatches per epoch, of B steps each
    update_epochs: int = 3  # passes over each rollout
    clip_coef: float = 0.2  # ε of the clipped surrogate objective
    ent_coef: float = 0.2  # weight of the entropy bonus
    vf_coef: float = 0.5  # weight of the value loss
    max_grad_norm: float = 0.5  # larger gradients are scaled down to this norm
    target_kl: float | None = None  # end the epochs early when the KL of the last minibatch is above this
    snapshot_interval: int = 50_000  # environment steps between two snapshots of the agent
    pool_size: int = 10  # how many of the last snapshots are kept as opponents
    latest_ratio: float = 0.5  # probability that the opponent of a game is the newest snapshot, not any of the pool
    eval_opponent: Literal["random", "minimax-1", "minimax-2", "minimax-3", "minimax-4"] = "minimax-2"  # of evaluations
    rated_games: int = 10  # games between each two players for the Elo rating at each checkpoint
    play: str | None = None  # run folder of an agent to play against in the terminal, instead of training

    def check(self):
        """Refuse values that do not fit together."""
        batch_size = self.num_envs * self.num_steps
        if batch_size % self.num_minibatches or batch_size == self.num_minibatches:
            fail(f"--num-minibatches {self.num_minibatches}: must divide {batch_size} steps into parts of 2 or more")
        if self.total_timesteps < batch_size:
            fail(f"--total-timesteps {self.total_timesteps}: less than the {batch_size} steps of one rollout")
        if max(self.gamma, self.gae_lambda, self.latest_ratio) > 1:
            fail("--gamma, --gae-lambda and --latest-ratio must be at most 1")


# --- environment ---


class Board:
    """The rules: two players put stones on a board in turn, and the first one with a line of `length` stones wins.

    A position is (2, C) float32: the stones of the player to move, and those of the other one, in C cells row by row.
    An action is a cell or, with `gravity`, a column, in which the stone falls down. B is a number of positions.
    """

    def __init__(self, rows: int, columns: int, length: int, gravity: bool):
        if not 0 < length <= min(rows, columns):
            fail(f"--env-kwargs: no line of {length} stones on {rows} rows and {columns} columns")
        self.shape = (rows, columns)
        self.length = length
        self.gravity = gravity
        self.size = rows * columns  # C
        self.num_actions = columns if gravity else self.size  # A
        lines = []
        directions = [(0, 1), (1, 0), (1, 1), (1, -1)]
        for row, column, (down, right) in itertools.product(range(rows), range(columns), directions):
            cells = [(row + i * down, column + i * right) for i in range(length)]
            if all(r < rows and 0 <= c < columns for r, c in cells):
                line = np.zeros(self.shape, np.float32)
                line[tuple(zip(*cells))] = 1
                lines.append(line.ravel())
        self.lines = np.stack(lines, axis=1)  # (C, L): which cells are on each of the L lines

    def legal(self, stones) -> np.ndarray:
        """Which actions are legal in `stones` (B, 2, C), (B, A) bool: those whose cell, or top cell, is free."""
        return stones.sum(1)[:, : self.num_actions] == 0

    def move(self, stones, action) -> tuple[np.ndarray, np.ndarray]:
        """The positions (B, 2, C) after `action` (B,), as the other player sees them, and who has won with it, (B,)."""
        boards = np.arange(len(action))
        cell = action
        if self.gravity:
            height = stones.sum(1).reshape(-1, *self.shape).sum(1)[boards, action]
            cell = (self.shape[0] - 1 - height.astype(int)) * self.shape[1] + action
        mine = stones[:, 0].copy()
        mine[boards, cell] = 1
        won = (mine @ self.lines == self.length).any(-1)  # the matrix product counts the stones on each line
        return np.stack([stones[:, 1], mine], axis=1), won

    def observe(self, stones) -> np.ndarray:
        """The observation (B, A + 2C) float32: 1 for each legal action, then both players' stones."""
        return np.concatenate([self.legal(stones), stones.reshape(len(stones), -1)], axis=1, dtype=np.float32)


def minimax(board: Board, stones, depth: int) -> np.ndarray:
    """The value (B, A) of each action in `stones` (B, 2, C), looking `depth` moves ahead: 1 wins, -1 loses, else 0."""
    legal = board.legal(stones)
    values = np.where(legal, 0, -np.inf)
    if depth > 0 and legal.any():
        boards, action = legal.nonzero()
        next_stones, won = board.move(stones[boards], action)
        replies = minimax(board, next_stones, depth - 1).max(-1)  # -inf where the board is full
        values[legal] = np.where(won, 1, np.where(np.isfinite(replies), -replies, 0))
    return values


class Minimax:
    """A player who looks `depth` moves ahead, and takes one of the best moves at random; depth 0 is random play."""

    def __init__(self, board: Board, depth: int):
        self.board = board
        self.depth = depth

    def choose(self, stones, luck, rngs) -> np.ndarray:
        """Actions (B,) in the positions `stones` (B, 2, C), with the random generators of these B games."""
        noise = np.stack([rng.random(self.board.num_actions) for rng in rngs])
        return (minimax(self.board, stones, self.depth) + 0.5 * noise).argmax(-1)


class TwoPlayerGames(VectorEnv):
    """N games against `opponent`, who moves inside reset() and step(): after them it is the learner's turn.

    A player is anything with the method `choose` of Minimax. Who begins is drawn for each game. The reward comes at the
    end: 1 for a win, 0 for a draw, -1 for a loss; in evaluation 1, 0.5 or 0, so that the return is the score.
    """

    def __init__(self, board: Board, num_envs: int, opponent, evaluation: bool = False, random_moves: int = 0):
        mode = AutoresetMode.NEXT_STEP if evaluation else AutoresetMode.SAME_STEP
        self.metadata = {"autoreset_mode": mode, "render_modes": ["rgb_array"], "render_fps": 1}
        self.board = board
        self.num_envs = num_envs
        self.opponent = opponent
        self.evaluation = evaluation
        self.random_moves = random_moves  # at the start of each game, an even number
        self.single_observation_space = Box(0, 1, board.observe(np.zeros((1, 2, board.size)))[0].shape, np.float32)
        self.single_action_space = Discrete(board.num_actions)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)

    def reset(self, *, seed=None, options=None):
        """Begin all games; `seed` is a number, or a list of one number for each game."""
        seeds = seed if isinstance(seed, list) else np.random.SeedSequence(seed).spawn(self.num_envs)
        self.rngs = [np.random.default_rng(seed) for seed in seeds]
        self.stones = np.zeros((self.num_envs, 2, self.board.size), np.float32)  # the learner's stones are the first
        self.luck = np.zeros((self.num_envs, 2))  # random numbers by which a pool chooses the player of each game
        self.lengths = np.zeros(self.num_envs, dtype=int)
        self.over = np.zeros(self.num_envs, dtype=bool)
        self.begin(np.arange(self.num_envs))
        return self.board.observe(self.stones), {}

    def begin(self, games):
        """Begin the games with the numbers `games` (B,)."""
        stones = np.zeros((len(games), 2, self.board.size), np.float32)
        for _ in range(self.random_moves):
            action = Minimax(self.board, depth=0).choose(stones, None, [self.rngs[n] for n in games])
            stones, _ = self.board.move(stones, action)
        self.stones[games] = stones
        self.lengths[games] = 0
        self.luck[games] = [self.rngs[n].random(2) for n in games]
        is_second = np.array([self.rngs[n].random() < 0.5 for n in games], dtype=bool)
        self.stones[games[is_second]] = stones[is_second][:, ::-1]
        self.answer(games[is_second])

    def answer(self, games) -> np.ndarray:
        """Let the opponent move in the games with the numbers `games` (B,); returns who has lost by it, (N,)."""
        lost = np.zeros(self.num_envs, dtype=bool)
        if len(games):
            stones = self.stones[games][:, ::-1]  # as the opponent sees it
            action = self.opponent.choose(stones, self.luck[games], [self.rngs[n] for n in games])
            self.stones[games], lost[games] = self.board.move(stones, action)
        return lost

    def step(self, action):
        """Make a move (N,) in each game, and let the opponent answer. (In evaluation an ended game begins anew.)"""
        again = self.over
        games = np.flatnonzero(~again)
        assert self.board.legal(self.stones[games])[np.arange(len(games)), action[games]].all(), "an illegal move"
        won = np.zeros(self.num_envs, dtype=bool)
        stones, won[games] = self.board.move(self.stones[games], action[games])
        self.stones[games] = stones[:, ::-1]
        self.lengths[games] += 1
        lost = self.answer(np.flatnonzero(~again & ~won & self.board.legal(self.stones).any(-1)))
        ended = ~again & (won | lost | ~self.board.legal(self.stones).any(-1))
        reward = won * 1.0 - lost
        infos = {}
        if self.evaluation:
            reward = (reward + 1) / 2 * ended
            self.over = ended
            if again.any():
                self.begin(np.flatnonzero(again))
        elif ended.any():
            infos["final_info"] = {"_episode": ended, "episode": {"r": reward, "l": self.lengths.copy()}}
            self.begin(np.flatnonzero(ended))
        return self.board.observe(self.stones), reward, ended, np.zeros(self.num_envs, dtype=bool), infos

    def render(self) -> list:
        """A picture (H, W, 3) uint8 of each game. The learner's stones are yellow, the opponent's red."""
        y, x = np.mgrid[-1:1:64j, -1:1:64j]
        colors = np.array([[240, 240, 240], [250, 200, 40], [220, 60, 50]], dtype=np.uint8)
        blue = np.array([40, 90, 160], dtype=np.uint8)
        pictures = []
        for stones in self.stones:
            cells = colors[(stones[0] + 2 * stones[1]).astype(int)].reshape(*self.board.shape, 1, 1, 3)
            squares = np.where((x**2 + y**2 < 0.7)[:, :, None], cells, blue)  # (rows, columns, 64, 64, 3)
            pictures.append(np.concatenate(np.concatenate(squares, axis=1), axis=1))
        return pictures


OPPONENTS = ("random", "minimax-1", "minimax-2", "minimax-3", "minimax-4")  # how many moves each looks ahead
GAMES = {  # PettingZoo's names
    "connect_four_v3": {"rows": 6, "columns": 7, "length": 4, "gravity": True},
    "tictactoe_v3": {"rows": 3, "columns": 3, "length": 3, "gravity": False},
}


def make_envs(args: Args, num_envs: int, evaluation: bool = False, render: bool = False) -> VectorEnv:
    """`num_envs` games. In training the opponent plays at random, until `train` puts a pool in its place."""
    if args.env_id not in GAMES:
        fail(f"--env-id {args.env_id}: must be one of {', '.join(GAMES)}")
    board = Board(**GAMES[args.env_id] | json.loads(args.env_kwargs))
    depth = OPPONENTS.index(args.eval_opponent) if evaluation else 0
    return TwoPlayerGames(board, num_envs, Minimax(board, depth), evaluation)


# --- network ---


def init_layer(layer: nn.Module, gain: float = 2**0.5) -> nn.Module:
    """`layer` with orthogonal weights and zero bias [37, detail 2]."""
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


class Categorical:
    """A distribution over the actions 0 to A - 1. (torch's own makes training a fifth to a third slower.)"""

    def __init__(self, logits):
        self.logprobs = logits.log_softmax(-1)  # (B, A)

    @property
    def mode(self):
        """The most likely action (B,)."""
        return self.logprobs.argmax(-1)

    def sample(self):
        """A random action (B,): with exponential noise, p[a] / noise[a] is the largest with probability p[a]."""
        noise = torch.empty_like(self.logprobs).exponential_()
        return (self.logprobs.exp() / noise).argmax(-1)

    def log_prob(self, action):
        """Log-probability (B,) of `action` (B,)."""
        return self.logprobs.gather(-1, action[:, None]).squeeze(-1)

    def entropy(self):
        """Entropy (B,) in nats."""
        return -(self.logprobs.exp() * self.logprobs).sum(-1)


class Agent(nn.Module):
    """The policy (actor) and the value function (critic), two layers on one network."""

    def __init__(self, envs: VectorEnv, args: Args):
        super().__init__()
        self.board = envs.board
        length = self.board.length
        rows, columns = [size - length + 1 for size in self.board.shape]
        self.network = nn.Sequential(
            init_layer(nn.Conv2d(2, 64, length)), nn.ReLU(), nn.Flatten(),  # each line is in a window of this size
            init_layer(nn.Linear(64 * rows * columns, 128)), nn.LayerNorm(128), nn.ReLU(),
        )  # fmt: skip
        self.actor = init_layer(nn.Linear(128, self.board.num_actions), gain=0.01)
        self.critic = init_layer(nn.Linear(128, 1), gain=1.0)

    def forward(self, obs):
        """The policy and the value (B,) for the observations `obs` (B, A + 2C) float32."""
        legal, stones = obs.split([self.board.num_actions, 2 * self.board.size], dim=-1)
        features = self.network(stones.view(-1, 2, *self.board.shape))
        logits = self.actor(features).masked_fill(legal == 0, -1e8)  # their probability is 0 [Mask]
        return Categorical(logits), self.critic(features).squeeze(-1)

    def policy(self, obs):
        """The distribution over actions for the observations `obs` (B, A + 2C) float32."""
        return self(obs)[0]

    def value(self, obs):
        """The value (B,) of the observations `obs` (B, A + 2C) float32."""
        return self(obs)[1]

    def update_normalizer(self, obs):
        """Nothing to do. It is here because train is the text of ppo.py."""

    def to_env(self, action) -> np.ndarray:
        """`action` as the environment takes it."""
        return action.cpu().numpy()

    @torch.no_grad()
    def act(self, obs, deterministic: bool) -> np.ndarray:
        """Actions for the environment, the most likely ones or sampled ones, for `obs` (N, A + 2C) float32."""
        policy = self.policy(obs)
        return self.to_env(policy.mode if deterministic else policy.sample())

    def choose(self, stones, luck, rngs, deterministic: bool = True) -> np.ndarray:
        """Actions (B,) in the positions `stones` (B, 2, C), as a player of TwoPlayerGames."""
        obs = torch.as_tensor(self.board.observe(stones), device=self.critic.weight.device)
        return self.act(obs, deterministic)


# --- algorithm ---


def compute_gae(rewards, values, last_value, dones, gamma, gae_lambda):
    """Generalized advantage estimates (T, N) of a rollout.

    `rewards`, `values` and `dones` are (T, N); the last reward of a truncated episode includes its bootstrap.
    `last_value` (N,) is the value of the observation after the last step.
    """
    next_values = torch.cat([values[1:], last_value[None]])
    advantages = rewards + gamma * next_values * ~dones - values  # the TD errors [GAE, §3]
    decay = gamma * gae_lambda * ~dones
    for t in reversed(range(len(rewards) - 1)):
        advantages[t] += decay[t] * advantages[t + 1]  # [GAE, Eq. 16]
    return advantages


def ppo_loss(agent, obs, action, old_logprob, advantage, value_target, args):
    """The loss of a minibatch, whose tensors are (B, ...), and a dict of scalar tensors to log."""
    policy, value = agent(obs)
    log_ratio = policy.log_prob(action) - old_logprob
    ratio = log_ratio.exp()  # [PPO, §3]
    clipped_ratio = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
    advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)  # [37, detail 7]
    policy_loss = -torch.min(ratio * advantage, clipped_ratio * advantage).mean()  # [PPO, Eq. 7]
    value_loss = (value - value_target).square().mean()  # [PPO, §5]
    entropy = policy.entropy().mean()
    loss = policy_loss + args.vf_coef * value_loss - args.ent_coef * entropy  # [PPO, Eq. 9]
    return loss, {
        "loss/policy": policy_loss.detach(),
        "loss/value": value_loss.detach(),
        "loss/entropy": entropy.detach(),
        "train/approx_kl": (ratio - 1 - log_ratio).detach().mean(),  # [KL]
        "train/clip_fraction": (ratio != clipped_ratio).float().mean(),
    }


class Pool:
    """The opponents in training: the last snapshots of the agent."""

    def __init__(self, agent: nn.Module, args: Args):
        self.agent = agent
        self.args = args
        self.snapshots = {}  # step: copy of the agent, in order
        self.ratings = {}  # step: Elo of random play, of the minimax players and of the agent
        self.yardstick_points = {}  # (i, j): points of player i against player j

    def add_snapshot(self, agent: nn.Module, step: int):
        """Keep a copy of the agent, if the last one is older than --snapshot-interval."""
        if not self.snapshots or step - max(self.snapshots) >= self.args.snapshot_interval:
            self.snapshots[step] = copy.deepcopy(agent)
        if len(self.snapshots) > self.args.pool_size:
            del self.snapshots[min(self.snapshots)]

    def choose(self, stones, luck, rngs) -> np.ndarray:
        """Actions (B,) of the opponents in the positions `stones` (B, 2, C); `luck` (B, 2) tells which one plays."""
        snapshots = list(self.snapshots.values())
        is_newest = luck[:, 0] < self.args.latest_ratio
        number = np.where(is_newest, len(snapshots) - 1, luck[:, 1] * len(snapshots)).astype(int)
        action = np.zeros(len(stones), dtype=int)
        for i in np.unique(number):
            action[number == i] = snapshots[i].choose(stones[number == i], luck, rngs, deterministic=False)
        return action

    def state_dict(self) -> dict:
        """What a checkpoint needs; its keys are strings."""
        snapshots = {str(step): agent.state_dict() for step, agent in self.snapshots.items()}
        return {"snapshots": snapshots, "ratings": {str(step): ratings for step, ratings in self.ratings.items()}}

    def load_state_dict(self, state: dict):
        """Restore the pool."""
        for step, weights in state["snapshots"].items():
            self.snapshots[int(step)] = copy.deepcopy(self.agent)
            self.snapshots[int(step)].load_state_dict(weights)
        self.ratings = {int(step): ratings for step, ratings in state["ratings"].items()}


def play_match(board: Board, first, second, num_games: int) -> float:
    """The points of `first` against `second`: 1 for a win, 0.5 for a draw. Two random moves begin each game."""
    envs = TwoPlayerGames(board, num_games, second, evaluation=True, random_moves=2)
    envs.reset(seed=0)
    points = 0.0
    running = np.ones(num_games, dtype=bool)
    while running.any():
        _, reward, ended, _, _ = envs.step(first.choose(envs.stones, envs.luck, envs.rngs))
        points += (reward * running).sum()
        running &= ~ended
    return points


def elo(points) -> np.ndarray:
    """The ratings (P,) by maximum likelihood, from the points (P, P) of each player against each other one.

    A player who is 400 above another one is ten times as likely to win [Elo]. Each pair has one draw more than it
    played, or the rating of a player who never lost would be infinite.
    """
    points = points + 0.5 * (1 - np.eye(len(points)))
    games = points + points.T
    strength = np.ones(len(points))
    for _ in range(3_000):
        strength = points.sum(1) / (games / (strength[:, None] + strength)).sum(1)  # [MM, §2]
        strength /= strength.mean()
    return 400 * np.log10(strength)  # [BT]


def rate(agent: nn.Module, pool: Pool, args: Args, run):
    """Rate the agent, log eval/elo, write elo.csv and draw elo.png. The player of random moves has 0."""
    yardsticks = [Minimax(agent.board, depth) for depth in range(len(OPPONENTS))]
    snapshots = list(pool.snapshots.values())
    players = [*yardsticks, agent, *snapshots[:: max(1, len(snapshots) // 3)]]
    points = np.zeros((len(players), len(players)))
    for i, j in itertools.combinations(range(len(players)), 2):
        known = pool.yardstick_points.get((i, j))
        points[i, j] = play_match(agent.board, players[i], players[j], args.rated_games) if known is None else known
        points[j, i] = args.rated_games - points[i, j]
        if j < len(yardsticks):  # their games are always the same
            pool.yardstick_points[i, j] = points[i, j]
    ratings = elo(points)
    ratings -= ratings[0]
    pool.ratings[run.step] = ratings[: len(yardsticks) + 1].round(1).tolist()
    run.log({"eval/elo": ratings[len(yardsticks)]})
    rows = [f"{step},{','.join(map(str, row))}\n" for step, row in pool.ratings.items()]
    (run.folder / "elo.csv").write_text(f"step,{','.join(OPPONENTS)},agent\n{''.join(rows)}")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    for name, curve in zip((*OPPONENTS, "agent"), zip(*pool.ratings.values())):
        axes.plot(list(pool.ratings), curve, label=name, linewidth=2.5 if name == "agent" else 1)
    axes.set(xlabel="environment steps", ylabel="Elo")
    figure.legend(loc="outside right center", frameon=False)
    figure.savefig(run.folder / "elo.png", dpi=120)


class Human:
    """A player at the terminal."""

    def __init__(self, board: Board):
        self.board = board

    def show(self, stones):
        """Print the position (2, C) as this player sees it: X for the own stones, O for the agent's."""
        marks = np.array([".", "X", "O"])[(stones[0] + 2 * stones[1]).astype(int)].reshape(self.board.shape)
        numbers = np.arange(self.board.num_actions).reshape(-1, self.board.shape[1])
        print("\n".join(" ".join(f"{mark:>2}" for mark in row) for row in (*marks, *numbers)))

    def choose(self, stones, luck, rngs) -> np.ndarray:
        """Ask for an action (1,) in the position `stones` (1, 2, C)."""
        self.show(stones[0])
        legal = np.flatnonzero(self.board.legal(stones)[0])
        while True:
            answer = input("your move: ")
            if answer.isdecimal() and int(answer) in legal:
                return np.array([int(answer)])
            print(f"one of {', '.join(map(str, legal))}")


def play_in_terminal(args: Args):
    """Play a game against the agent of --play, which says what it expects."""
    checkpoint = load_checkpoint(args.play)
    args = Args(**checkpoint["config"])
    envs = make_envs(args, 1, evaluation=True)
    agent = Agent(envs, args)
    agent.load_state_dict(checkpoint["agent"])
    envs.opponent = Human(envs.board)
    obs, _ = envs.reset(seed=None)
    while not envs.over.any():
        policy, value = agent(torch.as_tensor(obs))
        print(f"the agent expects {value.item():+.2f} (1: it wins, -1: you win); its favourite moves:")
        for probability, action in zip(*policy.logprobs[0].exp().topk(3)):
            print(f"    {action.item()} with probability {probability.item():.2f}")
        obs, reward, _, _, _ = envs.step(agent.act(torch.as_tensor(obs), deterministic=True))
    envs.opponent.show(envs.stones[0, ::-1])
    print({0: "you win", 0.5: "a draw", 1: "the agent wins"}[reward[0]])


# --- training ---


def train(args: Args) -> Path:
    """Train an agent, evaluate it, and return the run folder."""
    if args.play is not None:  # self-play: no training, you are the opponent
        return play_in_terminal(args)  # self-play
    torch.set_num_threads(args.num_threads)
    device = pick_device(args.device)
    seed_everything(args.seed)
    envs = open_envs(args, args.num_envs)
    agent = Agent(envs, args).to(device)
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5, fused=True)  # [37, detail 3]
    pool = Pool(agent, args)  # self-play: the opponents
    run = Run(args, agent=agent, optimizer=optimizer, pool=pool)  # self-play: the checkpoint holds them, too

    # room for one rollout of T steps in N environments: observations as the environment gives them, (T, N, ...)
    T, N = args.num_steps, args.num_envs
    all_obs = torch.as_tensor(np.zeros((T, *envs.observation_space.shape), envs.observation_space.dtype), device=device)
    action_dtype = torch.float32 if isinstance(envs.action_space, Box) else torch.int64
    actions = torch.zeros(T, *envs.action_space.shape, dtype=action_dtype, device=device)
    rewards = torch.zeros(T, N, device=device)
    dones = torch.zeros(T, N, dtype=torch.bool, device=device)

    while run.step < args.total_timesteps:
        pool.add_snapshot(agent, run.step)  # self-play: if one is due
        if run.step >= run.next_checkpoint:  # at once at the start
            run.save_checkpoint()
            rate(agent, pool, args, run)  # self-play: Elo
            envs.close()  # a resumed run has to start new environments; to get the same result, every run does
            envs = open_envs(args, args.num_envs)
            envs.opponent = pool  # self-play: it answers in envs.step
            obs, _ = envs.reset(seed=seed_everything(args.seed, run.step))
        start_time = time.perf_counter()

        # 1. collect T steps in each of N environments
        for t in range(T):
            all_obs[t] = torch.as_tensor(obs)
            with torch.no_grad():
                actions[t] = agent.policy(all_obs[t]).sample()
            obs, reward, terminated, truncated, infos = envs.step(agent.to_env(actions[t]))
            rewards[t] = torch.as_tensor(reward)
            dones[t] = torch.as_tensor(terminated | truncated)
            run.step += N
            ended = infos.get("final_info", {})
            for n in np.flatnonzero(ended.get("_episode", False)):  # environments whose episode ended
                run.record_episode(ended["episode"]["r"][n], ended["episode"]["l"][n])

            # A truncated episode would have gone on: add the discounted value of what follows to its last reward.
            cut_short = truncated & ~terminated
            if cut_short.any():
                final_obs = torch.as_tensor(np.stack(infos["final_obs"][cut_short]), device=device)
                with torch.no_grad():
                    rewards[t, torch.as_tensor(cut_short)] += args.gamma * agent.value(final_obs)

        # 2. estimate advantages, with one pass over all steps: the agent is still the one that acted
        flat_obs = all_obs.flatten(end_dim=1)  # (T * N, ...)
        flat_actions = actions.flatten(end_dim=1)
        with torch.no_grad():
            policy, flat_values = agent(flat_obs)
            logprobs = policy.log_prob(flat_actions)  # (T * N,)
            last_value = agent.value(torch.as_tensor(obs, device=device))
        advantages = compute_gae(rewards, flat_values.view(T, N), last_value, dones, args.gamma, args.gae_lambda)
        flat_advantages = advantages.flatten()
        flat_targets = flat_advantages + flat_values  # [37, detail 5]

        # 3. update: several epochs of minibatches
        progress = (run.step - T * N) / args.total_timesteps if args.anneal_lr else 0
        optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - progress)
        history = []
        for _ in range(args.update_epochs):
            for i in torch.randperm(T * N, device=device).chunk(args.num_minibatches):  # (B,) indices
                loss, metrics = ppo_loss(
                    agent, flat_obs[i], flat_actions[i], logprobs[i], flat_advantages[i], flat_targets[i], args
                )
                optimizer.zero_grad()
                loss.backward()
                metrics["train/grad_norm"] = nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
                optimizer.step()
                history.append(metrics)
            if args.target_kl is not None and metrics["train/approx_kl"] > args.target_kl:
                break
        agent.update_normalizer(flat_obs)  # last, because it changes the policy, and logprobs are of the old one

        # 4. log the means over the update
        metrics = {name: torch.stack([m[name] for m in history]).mean().item() for name in metrics}
        metrics["train/explained_variance"] = (1 - flat_advantages.var() / (flat_targets.var() + 1e-8)).item()
        metrics["train/learning_rate"] = optimizer.param_groups[0]["lr"]
        metrics["time/sps"] = T * N / (time.perf_counter() - start_time)
        run.log(metrics)
    envs.close()
    rate(agent, pool, args, run)  # self-play: Elo
    return run.finish()


# --- plumbing: the same text in every script ---

SCRIPT = Path(__file__)


def fail(message):
    """End the program because of bad input: one line on stderr, exit code 2."""
    print(f"{SCRIPT.name}: error: {str(message).splitlines()[0]}", file=sys.stderr)
    sys.exit(2)


def parse_args(argv: list[str]) -> Args:
    """The checked flags. `wandb agent` writes a boolean as --flag=True; tyro wants --flag or --no-flag."""
    switches = "|".join(field.name.replace("_", "[-_]") for field in fields(Args) if field.type is bool)
    argv = [re.sub(f"^--({switches})=[Tt]rue$", r"--\1", word) for word in argv]
    argv = [re.sub(f"^--({switches})=[Ff]alse$", r"--no-\1", word) for word in argv]
    args = tyro.cli(Args, args=argv, description=__doc__.partition("\n")[0])
    if args.resume is not None:  # take the flags of that run; flags given beside --resume override them
        stored = Args(**load_checkpoint(args.resume)["config"])
        if ":" in stored.env_id and args.env_id != stored.env_id:
            fail(f"--resume {args.resume}: its environment is in a package; to import it, add --env-id {stored.env_id}")
        args = tyro.cli(Args, args=argv, default=stored)
        for name, old in asdict(stored).items():
            if name != "resume" and getattr(args, name) != old:
                print(f"--{name.replace('_', '-')} {getattr(args, name)} overrides {old}", file=sys.stderr)
    for name, value in asdict(args).items():
        smallest = 1 if type(value) is int and name != "seed" else 0
        if type(value) in (int, float) and not smallest <= value < math.inf:
            fail(f"--{name.replace('_', '-')} {value}: must be {smallest} or more, and finite")
    args.check()
    return args


def open_envs(args: Args, num_envs: int) -> VectorEnv:
    """make_envs for training. Wrong flags end the program; a bug inside an environment shows its traceback."""
    warnings.simplefilter("ignore", DeprecationWarning)  # about an old id; the error says the same
    try:
        envs = make_envs(args, num_envs)
    except (gym.error.Error, json.JSONDecodeError, ModuleNotFoundError, TypeError, NotImplementedError) as error:
        frames = traceback.extract_tb((error.__cause__ or error).__traceback__)
        bugs = [f for f in frames if {"gymnasium", "ale_py", "functools.py", SCRIPT.name}.isdisjoint(Path(f[0]).parts)]
        if isinstance(error, (TypeError, NotImplementedError)) and bugs:
            raise  # a bug inside the environment
        fail(f"--env-id {args.env_id} --env-kwargs '{args.env_kwargs}': {str(error) or 'cannot flatten observations'}")
    if args.capture_video and "rgb_array" not in envs.metadata.get("render_modes", []):
        fail(f"--capture-video: {args.env_id} has no render mode rgb_array")
    return envs


def pick_device(name: str) -> torch.device:
    """The device called `name`; one that is not there ends the program."""
    accelerator = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    try:
        return torch.zeros(1, device=accelerator if name == "auto" else name).device
    except (RuntimeError, AssertionError) as error:
        fail(f"--device {name}: {error}")


def seed_everything(seed: int, *key: int) -> int:
    """Seed all random number generators; returns a seed (31 bits) for the environments.

    Keys separate the random streams: () is for the weights, (step,) for training from then on, (0, 1) for evaluations.
    """
    seed = int(np.random.SeedSequence(seed, spawn_key=key).generate_state(1)[0] >> 1)
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    return seed


def evaluate(agent: nn.Module, args: Args, episodes: int, seeds=None, film=None) -> np.ndarray:
    """The return, undiscounted and unclipped, of one episode in each of `episodes` environments, (episodes,).

    Episode i starts from seeds[i]. By default the seeds depend on args.seed alone, so every evaluation has the same
    starts. `film(frame)` gets each frame (H, W, 3) uint8 of the first environment.
    """
    envs = make_envs(args, episodes, evaluation=True, render=film is not None)
    if seeds is None:
        seeds = np.random.SeedSequence(args.seed, spawn_key=(0, 1)).generate_state(episodes) >> 1
    seed_everything(args.seed, 0, 1)
    obs, _ = envs.reset(seed=[int(seed) for seed in seeds])
    returns = np.zeros(episodes)
    running = np.ones(episodes, dtype=bool)  # still in the first episode
    with tqdm(total=episodes, desc="evaluate", unit="episode", leave=False, dynamic_ncols=True) as bar:
        for _ in range(args.max_eval_steps):
            if film:
                film(envs.render()[0])
            if not running.any():
                break
            check_finite({"observation": obs})
            action = agent.act(torch.as_tensor(obs, device=next(agent.parameters()).device), args.eval_deterministic)
            obs, reward, terminated, truncated, _ = envs.step(action)
            returns += reward * running
            running &= ~(terminated | truncated)
            bar.update(episodes - running.sum() - bar.n)
    envs.close()
    return returns


def load_checkpoint(folder: str, **parts) -> dict:
    """The checkpoint in a run folder, also loaded into `parts`. weights_only: reading it runs no code."""
    try:
        checkpoint = torch.load(Path(folder, "checkpoint.pt"), map_location="cpu", weights_only=True)
        assert checkpoint["script"] == SCRIPT.name, f"it is a run of {checkpoint['script']}"
        Args(**checkpoint["config"])  # an error if it has other flags
        for name, part in parts.items():
            part.load_state_dict(checkpoint[name])
        return checkpoint
    except Exception as error:  # a damaged file can raise anything
        fail(f"no checkpoint in '{folder}' that fits this script and these flags: {error}")


def check_finite(values: dict):
    """End the program at a NaN or infinity in a nested dict of numbers, arrays and tensors; skip settings and bytes."""
    for name, value in values.items():
        if isinstance(value, dict):
            check_finite(value)
        elif name not in ("param_groups", "screens") and not torch.as_tensor(value).sum().isfinite():
            sys.exit(f"\n{SCRIPT.name}: error: {name} is NaN or infinite; the last checkpoint is kept")


class Run:
    """The folder of a training run with its logs and checkpoints, and the progress bar.

    `parts` are what training changes and a checkpoint must hold: agent, optimizer, ... Each has a state_dict.
    """

    def __init__(self, args: Args, **parts):
        self.args = args
        self.parts = parts
        saved = {"step": 0, "csv_size": 0}
        name = f"{args.env_id}__{SCRIPT.stem}__{args.seed}__{datetime.now():%Y%m%d-%H%M%S-%f}"
        self.folder = Path("runs", re.sub("[/:]", "-", name))
        if args.resume is not None:
            saved = load_checkpoint(args.resume, **parts)
            self.folder = Path(args.resume)
        self.step = self.next_checkpoint = saved["step"]  # the first checkpoint is due at once
        if args.track:  # all that goes to TensorBoard goes to wandb, too
            import wandb

            self.wandb = wandb
            where = {"project": args.wandb_project_name, "entity": args.wandb_entity, "id": self.folder.name}
            try:
                wandb.init(**where, resume="allow", config=asdict(args), sync_tensorboard=True, save_code=True)
            except wandb.Error as error:
                fail(f"--track: {error}")
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / SCRIPT.name).write_bytes(SCRIPT.read_bytes())
        self.csv = open(self.folder / "episodes.csv", "a")
        self.csv.seek(self.csv.truncate(min(saved["csv_size"], self.csv.tell())))  # drop rows newer than the checkpoint
        if self.csv.tell() == 0:
            self.csv.write("step,return,length\n")
        config = asdict(args) | {"torch": torch.__version__, "gymnasium": gym.__version__, "python": sys.version}
        (self.folder / "config.json").write_text(json.dumps(config, indent=2))
        self.writer = SummaryWriter(self.folder, purge_step=self.step + 1)  # hide points newer than the checkpoint
        self.episodes = []  # (return, length) of each finished training episode
        self.num_logged = 0
        print(f"to continue: python {SCRIPT.name} --resume {self.folder} --env-id {args.env_id}", file=sys.stderr)
        self.bar = tqdm(total=args.total_timesteps, initial=self.step, unit="step", dynamic_ncols=True)

    def record_episode(self, episode_return: float, length: int):
        """Keep a finished training episode for episodes.csv, the next log entry and the progress bar."""
        self.csv.write(f"{self.step},{episode_return},{length}\n")
        self.episodes.append((episode_return, length))

    def log(self, metrics: dict):
        """Write scalars, and the means of the episodes since the last call; a NaN stops the run."""
        if len(self.episodes) > self.num_logged:
            episode_return, length = np.mean(self.episodes[self.num_logged :], axis=0)
            metrics = metrics | {"episode/return": episode_return, "episode/length": length}
            self.bar.set_postfix_str(f"return {np.mean(self.episodes[-100:], axis=0)[0]:.2f}", refresh=False)
            self.num_logged = len(self.episodes)
        check_finite(metrics)
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, self.step)
        self.bar.update(min(self.step, self.bar.total) - self.bar.n)

    def save_checkpoint(self, final: bool = False) -> np.ndarray:
        """Write checkpoint.pt, then evaluate the agent; gives the returns of that evaluation."""
        state = {name: part.state_dict() for name, part in self.parts.items()}
        check_finite(state)
        state |= {"script": SCRIPT.name, "config": asdict(self.args) | {"resume": None}}
        state |= {"step": self.step, "csv_size": self.csv.tell()}  # tell() also flushes
        torch.save(state, self.folder / "checkpoint.tmp")
        (self.folder / "checkpoint.tmp").replace(self.folder / "checkpoint.pt")  # atomic: never half a file
        episodes = max(1, self.args.eval_episodes // 10)
        # Train for at least 400 steps per evaluation episode, or evaluations would dominate a short run.
        interval = max(self.args.total_timesteps / self.args.num_checkpoints, 400 * episodes)
        self.next_checkpoint = (self.step // interval + 1) * interval
        returns = evaluate(self.parts["agent"], self.args, self.args.eval_episodes if final else episodes)
        self.log({"eval/return_mean": returns.mean(), "eval/return_std": returns.std()})
        if self.args.capture_video:
            path = self.folder / f"step-{self.step}.mp4"
            fps = make_envs(self.args, 1, evaluation=True).metadata.get("render_fps", 30)
            with imageio.get_writer(path, fps=fps, macro_block_size=2) as video:
                evaluate(self.parts["agent"], self.args, 1, film=video.append_data)
            if self.args.track:
                self.wandb.log({"eval/video": self.wandb.Video(str(path)), "global_step": self.step})
        self.writer.flush()
        return returns

    def finish(self) -> Path:
        """Save the last checkpoint, evaluate for results.json, and return the run folder."""
        returns = self.save_checkpoint(final=True)
        self.bar.close()
        self.writer.close()
        mean = float(returns.mean())
        std = float(returns.std())
        results = {"env_id": self.args.env_id, "mean_reward": mean, "std_reward": std}
        results |= {"is_deterministic": self.args.eval_deterministic, "n_eval_episodes": len(returns)}
        results["eval_datetime"] = datetime.now(timezone.utc).isoformat()
        (self.folder / "results.json").write_text(json.dumps(results, indent=2))
        print(f"{self.args.env_id}: {mean:.2f} +/- {std:.2f} over {len(returns)} episodes, mean - std {mean - std:.2f}")
        print(f"package it: python push_to_hub.py --checkpoint {self.folder}")
        return self.folder


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):  # Ctrl-C and kill: leave at once, the last checkpoint is kept
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    train(parse_args(sys.argv[1:]))
