"""Proximal policy optimization (PPO) on vector observations.

Collect a rollout with the current policy, estimate advantages, then take several epochs of minibatch
gradient steps on the clipped surrogate, which gains nothing from moving the policy further than the clip.
Actions may be Discrete or Box; observations are a Box (Dict and Tuple are flattened into one).

    python ppo.py                          # LunarLander-v3: 264 to 273 for 5 of 6 seeds, 145 for one, in 80 to 104 s
    python ppo.py --env-id CartPole-v1 --total-timesteps 1e5 --num-envs 8 --num-minibatches 4 \
        --learning-rate 1e-3 --gamma 0.98 --ent-coef 0                              # 500 in 11 s
    python ppo.py --env-id LunarLanderContinuous-v3 --ent-coef 0                    # 193, 262, 269 in 83 s
    python ppo.py --env-id Pendulum-v1 --total-timesteps 2e5 --num-envs 4 --num-steps 512 \
        --learning-rate 1e-3 --gamma 0.9 --gae-lambda 0.95 --ent-coef 0  # -163, -188, -168 in 23 to 30 s

Papers
    [PPO]  Schulman et al. 2017, Proximal Policy Optimization Algorithms, arXiv:1707.06347
    [GAE]  Schulman et al. 2016, High-Dimensional Continuous Control Using Generalized Advantage
           Estimation, arXiv:1506.02438
    [Chan] Chan et al. 1979, Updating Formulae and a Pairwise Algorithm for Computing Sample Variances
    [37]   Huang et al. 2022, The 37 Implementation Details of Proximal Policy Optimization, ICLR blog
    [KL]   Schulman 2020, Approximating KL Divergence, joschu.net/blog/kl-approx.html

Deviations: the value loss is not clipped; a truncated episode bootstraps from its true last observation;
at every checkpoint the environments start afresh, so that a resumed run repeats the uninterrupted one.
"""

import gc
import json
import math
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections import deque
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Literal

import gymnasium as gym
import numpy as np
import torch
import tyro
from gymnasium.spaces import Box, Discrete
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv
from torch import nn
from torch.utils._pytree import tree_map
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

# --- config ---


@dataclass
class Args:
    """The flags: first those that all scripts share, then those of this algorithm."""

    env_id: str = "LunarLander-v3"  # gymnasium id, or package:EnvId to import the package first
    env_kwargs: str = "{}"  # keyword arguments of the environment, as JSON
    seed: int = 1  # seed of the weights, the environments and the sampling
    total_timesteps: int = 700_000  # environment steps, all environments together
    device: str = "auto"  # auto (GPU for pixels, CPU for small networks), cpu, cuda, cuda:1, mps
    num_threads: int = 1  # CPU threads of torch; small networks gain nothing from more than one
    num_checkpoints: int = 20  # times to evaluate and save, evenly over the run
    eval_episodes: int = 100  # episodes of the final evaluation; a tenth of them at each checkpoint
    eval_deterministic: bool = True  # evaluate the most likely action instead of a sampled one
    max_eval_steps: int = 10_000  # steps after which an evaluation episode is broken off
    capture_video: bool = False  # film one evaluation episode at each checkpoint
    track: bool = False  # log to Weights & Biases too
    wandb_project_name: str = "solorl"  # project of --track
    wandb_entity: str | None = None  # user or team of --track
    resume: str | None = None  # run folder to continue from its last checkpoint, with its flags

    num_envs: int = 16  # parallel environments (N)
    num_steps: int = 128  # steps per environment in a rollout (T); a run is whole rollouts
    vectorization_mode: Literal["sync", "async"] = "sync"  # async: one process an environment, if slow
    normalize_observations: bool = False  # by their running mean and variance, saved with the agent
    compile: bool = False  # compile the network first, which takes a minute; for long runs on a GPU
    learning_rate: float = 7e-4  # of Adam
    anneal_lr: bool = True  # lower the learning rate linearly towards zero
    gamma: float = 0.999  # discount factor
    gae_lambda: float = 0.98  # λ of generalized advantage estimation
    num_minibatches: int = 16  # minibatches per epoch
    update_epochs: int = 10  # passes over each rollout
    clip_coef: float = 0.2  # ε of the clipped surrogate
    ent_coef: float = 0.01  # weight of the entropy bonus
    vf_coef: float = 0.5  # weight of the value loss
    max_grad_norm: float = 10.0  # gradients are scaled down to this norm
    target_kl: float | None = None  # stop the epochs of an update early above this KL

    def check(self):
        """Refuse values that do not fit together, before anything is built."""
        batch_size = self.num_envs * self.num_steps
        if batch_size % self.num_minibatches or batch_size == self.num_minibatches:
            refuse(f"--num-minibatches {self.num_minibatches}: {batch_size} steps need equal minibatches of 2 or more")
        if self.total_timesteps < batch_size:
            refuse(f"--total-timesteps {self.total_timesteps}: less than the {batch_size} steps of one rollout")
        if max(self.gamma, self.gae_lambda) > 1:
            refuse(f"--gamma {self.gamma} --gae-lambda {self.gae_lambda}: must be at most 1")


# --- environment ---


def make_envs(args: Args, num_envs: int, evaluation: bool = False, render: bool = False) -> VectorEnv:
    """`num_envs` copies of the environment with float32 vector observations.

    Training resets an ended episode within the step; infos["final_obs"] then holds the true last observation.
    Evaluation resets at the next step, so that render() still shows the end.
    """

    def make_env():
        """One environment, its spaces checked and its observations flattened."""
        if re.search("^ALE/|NoFrameskip", args.env_id):
            refuse(f"--env-id {args.env_id}: an Atari game, see ppo_atari.py")
        render_mode = {"render_mode": "rgb_array"} if render else {}  # not every environment takes it
        env = gym.make(args.env_id, **render_mode, **json.loads(args.env_kwargs))
        if isinstance(env.observation_space, Discrete) and isinstance(env.action_space, Discrete):
            refuse(f"--env-id {args.env_id}: observations {env.observation_space} need a table, see q_learning.py")
        if not isinstance(env.action_space, (Box, Discrete)):
            refuse(f"--env-id {args.env_id}: actions {env.action_space} are neither Discrete nor Box")
        if not isinstance(env.observation_space, Box) or len(env.observation_space.shape) != 1:
            with suppress(NotImplementedError):  # of a space that is not gymnasium's own
                env = gym.wrappers.FlattenObservation(env)
        if not isinstance(env.observation_space, Box):
            refuse(f"--env-id {args.env_id}: observations {env.observation_space} cannot be flattened; wrap them")
        if env.observation_space.dtype != np.float32:
            env = gym.wrappers.DtypeObservation(env, np.float32)
        return env

    if evaluation:
        return SyncVectorEnv([make_env] * num_envs, autoreset_mode=AutoresetMode.NEXT_STEP)
    vector_env = AsyncVectorEnv if args.vectorization_mode == "async" else SyncVectorEnv
    envs = vector_env([make_env] * num_envs, autoreset_mode=AutoresetMode.SAME_STEP)
    return gym.wrappers.vector.RecordEpisodeStatistics(envs)


# --- network ---


class Normalizer(nn.Module):
    """Scales its input by the mean and variance of all that `update` was shown, (..., D) float32."""

    def __init__(self, size: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("var", torch.ones(size))
        self.register_buffer("count", torch.zeros(()))

    def forward(self, obs):
        return ((obs - self.mean) / (self.var + 1e-8).sqrt()).clamp(-10, 10)

    def update(self, obs):
        """Merge the moments of `obs` (..., D) into the running ones, as for two samples [Chan]."""
        var, mean = torch.var_mean(obs.flatten(end_dim=-2), dim=0, correction=0)
        count = obs.numel() / obs.shape[-1]
        weight = count / (self.count + count)
        delta = mean - self.mean
        self.mean += delta * weight
        self.var += (var - self.var) * weight + delta.square() * weight * (1 - weight)
        self.count += count


def make_layer(num_inputs: int, num_outputs: int, gain: float = 2**0.5) -> nn.Linear:
    """A linear layer with orthogonal weights and zero bias [37, detail 2]."""
    layer = nn.Linear(num_inputs, num_outputs)
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


def make_mlp(num_inputs: int, num_outputs: int, gain: float) -> nn.Sequential:
    """Two hidden layers of 64 tanh units [PPO, §6.1], and a linear one scaled by `gain`."""
    hidden = [make_layer(num_inputs, 64), nn.Tanh(), make_layer(64, 64), nn.Tanh()]
    return nn.Sequential(*hidden, make_layer(64, num_outputs, gain))


class Categorical:
    """The distribution over actions 0 to A - 1 with `logits` (B, A); torch's own makes an update 14 % slower."""

    def __init__(self, logits):
        self.logprobs = logits.log_softmax(-1)

    @property
    def mode(self):
        """The most likely action, (B,) int64."""
        return self.logprobs.argmax(-1)

    def sample(self):
        """A random action, (B,) int64: the shortest of waiting times whose rates are the probabilities."""
        waiting = torch.empty_like(self.logprobs).exponential_() / self.logprobs.exp()
        return waiting.argmin(-1)

    def log_prob(self, action):
        """Log-probability (B,) of `action` (B,)."""
        return self.logprobs.gather(-1, action[:, None]).squeeze(-1)

    def entropy(self):
        """Entropy (B,) in nats."""
        return -(self.logprobs.exp() * self.logprobs).sum(-1)


class Gaussian:
    """Independent normal distributions of D numbers; torch's own takes 1.6 times as long to act."""

    def __init__(self, mean, log_std):
        self.mode, self.log_std = mean, log_std

    def sample(self):
        """A random action, (B, D)."""
        return self.mode + self.log_std.exp() * torch.randn_like(self.mode)

    def log_prob(self, action):
        """Logarithm (B,) of the density at `action` (B, D)."""
        z = (action - self.mode) / self.log_std.exp()
        return -(z.square() / 2 + self.log_std + math.log(2 * math.pi) / 2).sum(-1)

    def entropy(self):
        """Entropy () in nats, which does not depend on the mean."""
        return (self.log_std + (1 + math.log(2 * math.pi)) / 2).sum(-1)


class Agent(nn.Module):
    """A policy and a value function, two networks that share nothing but the normalised observation."""

    def __init__(self, envs: VectorEnv, args: Args):
        super().__init__()
        self.action_space = envs.single_action_space
        self.discrete = isinstance(self.action_space, Discrete)
        num_inputs = envs.single_observation_space.shape[0]
        num_outputs = int(self.action_space.n) if self.discrete else int(np.prod(self.action_space.shape))
        self.normalize = Normalizer(num_inputs) if args.normalize_observations else nn.Identity()
        self.actor = make_mlp(num_inputs, num_outputs, 0.01)
        self.critic = make_mlp(num_inputs, 1, 1.0)
        if not self.discrete:
            self.log_std = nn.Parameter(torch.zeros(num_outputs))  # the same in every state [37, continuous actions 2]

    def forward(self, obs):
        """The policy's distribution over actions and the value (N,) of `obs` (N, D) float32."""
        obs = self.normalize(obs)
        output, value = self.actor(obs), self.critic(obs).squeeze(-1)
        if self.discrete:
            return Categorical(logits=output), value
        return Gaussian(output, self.log_std), value

    def observe(self, obs):
        """Let the running statistics of --normalize-observations see `obs` (..., D)."""
        if isinstance(self.normalize, Normalizer):
            self.normalize.update(obs)

    def to_env(self, action) -> np.ndarray:
        """`action` as the environment wants it. Only the environment sees it clipped: the log-probability
        that PPO learns from is that of the action that was sampled."""
        action = action.cpu().numpy()
        if self.discrete:
            return action + self.action_space.start
        low, high = self.action_space.low, self.action_space.high
        return action.reshape(-1, *low.shape).clip(low, high).astype(low.dtype)

    @torch.no_grad()
    def act(self, obs, deterministic: bool) -> np.ndarray:
        """Actions for the environment from `obs` (N, D) float32: the most likely ones, or sampled."""
        policy, _ = self(obs)
        return self.to_env(policy.mode if deterministic else policy.sample())


# --- algorithm ---


def compute_gae(rewards, values, next_values, terminated, done, gamma, gae_lambda):
    """Generalized advantage estimates [GAE, Eq. 16]. All inputs (T, N), flags bool; returns (T, N).

    `next_values[t]` is the value of the true successor, also where the episode was truncated: `terminated`
    stops the bootstrap, `done` (terminated or truncated) stops the sum.
    """
    advantages = rewards + gamma * next_values * ~terminated - values  # [GAE, §3]
    decay = gamma * gae_lambda * ~done
    for t in reversed(range(len(rewards) - 1)):
        advantages[t] += decay[t] * advantages[t + 1]  # [GAE, Eq. 16]
    return advantages


def sample_action(agent, obs):
    """Actions that the policy takes in `obs` (N, ...), their log-probabilities, and the values, each (N, ...)."""
    policy, value = agent(obs)
    action = policy.sample()
    return action, policy.log_prob(action), value


def ppo_loss(agent, obs, action, old_logprob, advantage, value_target, clip_coef, vf_coef, ent_coef):
    """The loss of one minibatch, every tensor (B, ...), and a dict of scalar tensors worth logging."""
    policy, value = agent(obs)
    log_ratio = policy.log_prob(action) - old_logprob
    ratio = log_ratio.exp()  # [PPO, §3]
    clipped_ratio = ratio.clamp(1 - clip_coef, 1 + clip_coef)
    advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)  # [37, detail 7]
    policy_loss = -torch.min(ratio * advantage, clipped_ratio * advantage).mean()  # [PPO, Eq. 7]
    value_loss = (value - value_target).square().mean()  # [PPO, §5]
    entropy = policy.entropy().mean()
    loss = policy_loss + vf_coef * value_loss - ent_coef * entropy  # [PPO, Eq. 9]
    return loss, {
        "loss/policy": policy_loss.detach(),
        "loss/value": value_loss.detach(),
        "loss/entropy": entropy.detach(),
        "train/approx_kl": (ratio - 1 - log_ratio).detach().mean(),  # old to new policy [KL]
        "train/clip_fraction": (ratio != clipped_ratio).float().mean(),
    }


# --- training ---


def train(args: Args) -> Path:
    """Train one agent, evaluate it, and return the run folder."""
    torch.set_num_threads(args.num_threads)
    envs = open_envs(args, args.num_envs)
    device = pick_device(args.device, envs.single_observation_space)
    seed_everything(args.seed)
    agent = Agent(envs, args).to(device)
    parameters = list(agent.parameters())
    optimizer = torch.optim.Adam(parameters, lr=args.learning_rate, eps=1e-5, fused=True)  # [37, detail 3]
    act, loss_function = (compiled(function, args, device) for function in (sample_action, ppo_loss))
    batch_size = args.num_envs * args.num_steps

    with Run(args, batch_size, agent=agent, optimizer=optimizer) as run:
        while run.step < run.last_step:
            if run.step >= run.next_cut:  # evaluate, save, start fresh environments
                envs, obs = run.cut(envs)
            start, start_time = run.step, time.perf_counter()

            # 1. collect: T steps in N environments; `rollout` holds tensors (N, ...), `outcomes` arrays (N,)
            rollout, outcomes, final_obs = [], [], []
            for _ in range(args.num_steps):
                obs = torch.as_tensor(obs, device=device)
                with torch.no_grad():
                    rollout.append((obs, *act(agent, obs)))
                obs, reward, terminated, truncated, infos = envs.step(agent.to_env(rollout[-1][1]))
                outcomes.append((reward.astype(np.float32), terminated, terminated | truncated))
                final_obs += [infos["final_obs"][i] for i in np.flatnonzero(truncated & ~terminated)]
                run.step += args.num_envs
                run.record(obs, reward, infos)

            # 2. advantages: a truncated episode could have gone on, so its last observation has a value too
            all_obs, actions, logprobs, values = (torch.stack(x) for x in zip(*rollout))
            rewards, terminated, done = (torch.as_tensor(np.stack(x), device=device) for x in zip(*outcomes))
            with torch.no_grad():
                next_values = torch.cat([values[1:], agent(torch.as_tensor(obs, device=device))[1][None]])
                if final_obs:  # in the order of the mask, by t and then n
                    next_values[done & ~terminated] = agent(torch.as_tensor(np.stack(final_obs), device=device))[1]
            advantages = compute_gae(rewards, values, next_values, terminated, done, args.gamma, args.gae_lambda)
            value_targets = advantages + values  # [37, detail 5]
            batch = all_obs, actions, logprobs, advantages, value_targets
            batch = [x.flatten(end_dim=1) for x in batch]  # (T, N, ...) to (T * N, ...)

            # 3. update: several epochs of minibatches, each rollout step once an epoch
            if args.anneal_lr:  # from the full rate to one rollout's share above zero [37, detail 4]
                optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - start / run.last_step)
            history = []
            for _ in range(args.update_epochs):
                shuffled = torch.randperm(batch_size).to(device)
                for minibatch in zip(*(x[shuffled].chunk(args.num_minibatches) for x in batch)):
                    loss, metrics = loss_function(agent, *minibatch, args.clip_coef, args.vf_coef, args.ent_coef)
                    optimizer.zero_grad()
                    loss.backward()
                    grad_norm = nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
                    optimizer.step()
                    history.append(metrics | {"train/grad_norm": grad_norm})
                if args.target_kl is not None and history[-1]["train/approx_kl"] > args.target_kl:
                    break
            agent.observe(all_obs)  # last, so that the policy that is updated is the one that acted

            # 4. log: losses are means over the iteration
            metrics = {name: torch.stack([m[name] for m in history]).mean().item() for name in history[0]}
            metrics["train/explained_variance"] = (1 - advantages.var() / (value_targets.var() + 1e-8)).item()
            metrics["train/learning_rate"] = optimizer.param_groups[0]["lr"]
            metrics["time/sps"] = batch_size / (time.perf_counter() - start_time)
            run.log(metrics)
        run.finish(envs)
    return run.folder


# --- plumbing: the same text in every script ---

SCRIPT = Path(__file__)


def refuse(message: str):
    """End the program for bad input: one line on stderr, exit code 2."""
    print(f"{SCRIPT.name}: error: {message}", file=sys.stderr)
    sys.exit(2)


def parse_args(argv: list[str]) -> Args:
    """The flags in `argv`, checked. Beside tyro's spellings, `--flag=True` and `--flag=0`, which is what
    `wandb agent` sends, and whole numbers like `1e6`. With --resume, the flags of that run."""
    switches = {field.name for field in fields(Args) if field.type is bool}

    def tidy(word):
        """`word` as tyro takes it."""
        flag, equals, value = word.rpartition("=")
        if flag[2:].replace("-", "_") in switches and value.lower() in ("true", "1", "false", "0"):
            return ("--" if value.lower() in ("true", "1") else "--no-") + flag[2:]
        if re.fullmatch(r"\d+(\.\d*)?e\+?\d+", value, re.IGNORECASE) and float(value).is_integer():
            return f"{flag}{equals}{float(value):.0f}"
        return word

    argv = [tidy(word) for word in argv]
    args = tyro.cli(Args, args=argv, description=__doc__.partition("\n")[0])
    if args.resume:
        stored = Args(**load_checkpoint(args.resume)["config"])
        args = tyro.cli(Args, args=argv, default=stored)
        free = {"resume", "device", "track", "wandb_project_name", "wandb_entity"}
        for name, old in asdict(stored).items():
            new = getattr(args, name)
            if new != old and name not in free and not (name == "total_timesteps" and new > old):
                refuse(f"--{name.replace('_', '-')} {new}: the run to resume has {old}")
    may_be_zero = {"seed", "gamma", "gae_lambda", "ent_coef", "vf_coef", "start_e", "end_e", "eval_epsilon"}
    for name, value in asdict(args).items():
        if type(value) in (int, float) and not (0 < value < float("inf") or value == 0 and name in may_be_zero):
            refuse(f"--{name.replace('_', '-')} {value}: must be finite and {'>= 0' if name in may_be_zero else '> 0'}")
    args.check()
    return args


def open_envs(args: Args, num_envs: int) -> VectorEnv:
    """The training environments; a wrong --env-id or --env-kwargs is refused with the reason given."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of an old id, which the error names too
            if args.capture_video:
                make_envs(args, 1, evaluation=True, render=True).close()
            return make_envs(args, num_envs)
    except (gym.error.Error, ImportError, AssertionError, TypeError, ValueError, LookupError, AttributeError) as error:
        reason = repr(error) if isinstance(error, LookupError) else str(error)  # of which the text is only a key
        package = args.env_id.partition(":")[0]
        pip = f" (pip install {package}?)" if f"No module named '{package}'" in reason else ""
        refuse(f"--env-id {args.env_id} --env-kwargs '{args.env_kwargs}': {reason.partition(chr(10))[0]}{pip}")


def pick_device(name: str, obs_space: gym.Space) -> torch.device:
    """The device called `name`; auto is a GPU for images, and the CPU for vectors, whose networks are small."""
    if name == "auto":
        gpu = len(obs_space.shape) == 3 and torch.accelerator.is_available()
        name = torch.accelerator.current_accelerator().type if gpu else "cpu"
    try:
        torch.zeros(1, device=name).item()
    except Exception:  # every backend raises its own
        refuse(f"--device {name}: not available on this machine; cpu is")
    return torch.device(name)


def compiled(function, args: Args, device: torch.device):
    """`function` itself, or with --compile a faster one, which on a GPU becomes a CUDA graph. It is compiled when it
    is first called; what it returns is copied, because a CUDA graph writes into the same memory every time."""
    if not args.compile:
        return function
    try:
        torch.compile(torch.square)(torch.ones(2, device=device))
    except Exception as error:  # every compiler fails in its own way
        refuse(f"--compile: no working compiler for {device}: {str(error).partition(chr(10))[0]}")
    fast = torch.compile(function, mode="reduce-overhead")
    return lambda *inputs: tree_map(torch.clone, fast(*inputs))


def seed_everything(*key: int) -> int:
    """Seed all random number generators from `key`; returns their seed, 31 bits, for the environments."""
    seed = int(np.random.SeedSequence(key).generate_state(1)[0] >> 1)
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    return seed


def evaluate(agent: nn.Module, args: Args, episodes: int, seed, film=None) -> np.ndarray:
    """Raw returns (episodes,) float64 of one whole episode in each of `episodes` environments.

    `seed`, an int or a list of one int per episode, seeds environments and actions. `film` is called with
    every frame (H, W, 3) uint8 of the first environment.
    """
    seed_everything(*np.atleast_1d(seed).tolist())
    envs = make_envs(args, episodes, evaluation=True, render=film is not None)
    device = next(agent.parameters()).device
    obs, _ = envs.reset(seed=seed)
    returns, running = np.zeros(episodes), np.ones(episodes, dtype=bool)
    for step in range(args.max_eval_steps + 1):
        if film:
            film(envs.render()[0])
        if step == args.max_eval_steps or not running.any():
            break
        action = agent.act(torch.as_tensor(obs, device=device), args.eval_deterministic)
        obs, reward, terminated, truncated, _ = envs.step(action)
        returns += reward * running
        running &= ~(terminated | truncated)
    envs.close()
    return returns


def load_checkpoint(folder: str) -> dict:
    """The checkpoint in a run folder of this script, on the CPU. Refuses all else, and runs no code in it."""
    path = Path(folder, "checkpoint.pt")
    if not path.is_file():
        refuse(f"--resume {folder}: not the folder of a run, it holds no checkpoint.pt")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if checkpoint["script"] != SCRIPT.name:
            refuse(f"--resume {folder}: a run of {checkpoint['script']}, to be resumed with that script")
        Args(**checkpoint["config"])
    except Exception:  # a damaged or foreign file can raise anything
        refuse(f"--resume {folder}: its checkpoint.pt is damaged or none of this program's")
    return checkpoint


def versions() -> dict:
    """What a run was made with: packages, system, and the commit of this file if git knows one."""
    wanted = {"torch", "gymnasium", "ale-py", "numpy"}
    packages = {package.name: package.version for package in metadata.distributions() if package.name in wanted}
    status, commit = subprocess.getstatusoutput(f'git -C "{SCRIPT.resolve().parent}" rev-parse HEAD')
    return packages | {"python": sys.version, "platform": sys.platform, "commit": None if status else commit}


class Run:
    """One training run: its folder, logs, checkpoints and progress bar.

    `parts` have a state_dict and are what a checkpoint holds beside the step: agent, optimizer, ...
    """

    def __init__(self, args: Args, steps_per_iteration: int, **parts):
        self.args, self.parts, self.config = args, parts, asdict(args) | {"resume": None}
        if args.resume:
            self.folder, state = Path(args.resume), load_checkpoint(args.resume)
            for name, part in parts.items():
                part.load_state_dict(state[name])
        else:
            name = f"{args.env_id}__{SCRIPT.stem}__{args.seed}__{datetime.now():%Y%m%d-%H%M%S-%f}"
            self.folder = Path("runs", re.sub("[/:]", "-", name))
            state = {"step": 0, "episodes_size": 0, "wandb_id": None}
        self.step, self.wandb_id, self.wandb = state["step"], state["wandb_id"], None
        iterations, cuts = args.total_timesteps // steps_per_iteration, args.num_checkpoints
        self.last_step = iterations * steps_per_iteration
        self.cuts = [iterations * i // cuts * steps_per_iteration for i in range(cuts)]
        self.next_cut = self.step
        if args.track:
            import wandb

            who = {"project": args.wandb_project_name, "entity": args.wandb_entity, "id": self.wandb_id}
            try:
                wandb.init(**who, resume="allow", name=self.folder.name, config=self.config)
            except wandb.Error as error:
                refuse(f"--track: {error} (or set WANDB_MODE=offline)")
            wandb.define_metric("*", step_metric="global_step")
            self.wandb, self.wandb_id = wandb, wandb.run.id
        if not args.resume:
            self.folder.mkdir(parents=True)
            shutil.copy(SCRIPT, self.folder)
        if self.wandb:
            self.wandb.run.log_code(str(self.folder))
        about = versions() | {"device": str(next(parts["agent"].parameters()).device)}
        (self.folder / "config.json").write_text(json.dumps(self.config | about, indent=2))
        self.writer = SummaryWriter(self.folder, purge_step=self.step + 1 if args.resume else None)
        self.episodes = open(self.folder / "episodes.csv", "ab")
        self.episodes.truncate(state["episodes_size"])  # what came after the checkpoint comes again
        self.episodes.write(b"" if args.resume else b"step,return,length\n")
        self.ended, self.returns = [], deque(maxlen=100)
        self.bar = tqdm(total=self.last_step, initial=self.step, unit="step", dynamic_ncols=True)

    def __enter__(self):
        gc.freeze()  # what is imported by now is no garbage: not looking at it again saves 5 % of the time
        return self

    def __exit__(self, error_type, error, traceback):
        self.bar.close()
        if error_type is not KeyboardInterrupt and getattr(error, "code", None) != 143:
            self.writer.close()  # interrupted it may hold its own lock, and would wait for ever
        self.episodes.close()
        if self.wandb:
            self.wandb.finish(exit_code=int(error_type is not None))
        failed = error_type and not isinstance(getattr(error, "code", None), str)  # a NaN would come again
        if failed and (self.folder / "checkpoint.pt").exists():
            resume = f"python {SCRIPT.name} --resume {self.folder}"
            print(f"stopped at step {self.step}; to continue from the last checkpoint: {resume}", file=sys.stderr)
        if error_type is KeyboardInterrupt:
            sys.exit(130)

    def record(self, obs, reward, infos: dict):
        """Keep the episodes that ended at this step of the environments; stop at a NaN."""
        self.check_finite(observation=obs, reward=reward)
        if "episode" in infos:  # numbers or arrays, these perhaps with a mask of those that ended
            ended = infos.get("_episode", slice(None))
            for episode in zip(*(np.ravel(infos["episode"][key])[ended].tolist() for key in ("r", "l"))):
                self.ended.append(episode)
                self.returns.append(episode[0])
                self.episodes.write(f"{self.step},{episode[0]},{episode[1]}\n".encode())

    def log(self, metrics: dict):
        """Write scalars for this step, and the means of the episodes since the last; stop at a NaN."""
        self.check_finite(**metrics)
        if self.ended:
            metrics = dict(zip(("episode/return", "episode/length"), np.mean(self.ended, axis=0))) | metrics
            self.bar.set_postfix_str(f"return {np.mean(self.returns):.2f}", refresh=False)
            self.ended = []
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, self.step)
        if self.wandb:
            self.wandb.log(metrics | {"global_step": self.step})
        self.bar.update(min(self.step, self.last_step) - self.bar.n)

    def check_finite(self, **values):
        """End the run where a value is NaN or infinite; the last checkpoint stays."""
        for name, value in values.items():
            if not np.isfinite(np.asarray(value)).all():
                sys.exit(f"{SCRIPT.name}: error: {name} is NaN or infinite at step {self.step}")

    def cut(self, envs: VectorEnv) -> tuple:
        """Evaluate, save, and start fresh environments seeded by (seed, step), with nothing carried over: so a
        resumed run goes on as if never stopped. Returns the environments and their first observations."""
        self.save(envs, max(1, self.args.eval_episodes // 10))
        self.next_cut = min((cut for cut in self.cuts if cut > self.step), default=float("inf"))
        seed = seed_everything(self.args.seed, self.step, 0)
        envs = make_envs(self.args, envs.num_envs)
        return envs, envs.reset(seed=seed)[0]

    def save(self, envs: VectorEnv, episodes: int) -> np.ndarray:
        """Close the environments, evaluate, write the checkpoint; returns the evaluation's returns."""
        envs.close()
        agent, seed = self.parts["agent"], seed_everything(self.args.seed, self.step, 1)
        returns = evaluate(agent, self.args, episodes, seed)
        if self.args.capture_video:
            import imageio

            path, fps = self.folder / f"step-{self.step}.mp4", envs.metadata.get("render_fps", 30)
            with imageio.get_writer(path, fps=fps, macro_block_size=2) as video:
                evaluate(agent, self.args, 1, seed, film=video.append_data)
            if self.wandb:
                self.wandb.log({"eval/video": self.wandb.Video(str(path)), "global_step": self.step})
        self.log({"eval/return_mean": returns.mean(), "eval/return_std": returns.std()})
        self.writer.flush()
        self.episodes.flush()
        state = {name: part.state_dict() for name, part in self.parts.items()}
        state |= {"script": SCRIPT.name, "config": self.config, "step": self.step, "wandb_id": self.wandb_id}
        state["episodes_size"] = (self.folder / "episodes.csv").stat().st_size
        torch.save(state, self.folder / "checkpoint.tmp")
        (self.folder / "checkpoint.tmp").replace(self.folder / "checkpoint.pt")  # whole, or the one before
        return returns

    def finish(self, envs: VectorEnv):
        """The last checkpoint and the final evaluation, for results.json and the terminal."""
        returns = self.save(envs, self.args.eval_episodes)
        mean, std = float(returns.mean()), float(returns.std())
        results = {"env_id": self.args.env_id, "mean_reward": mean, "std_reward": std}
        results |= {"is_deterministic": self.args.eval_deterministic, "n_eval_episodes": len(returns)}
        results |= {"eval_datetime": datetime.now(timezone.utc).isoformat()}
        (self.folder / "results.json").write_text(json.dumps(results, indent=2))
        self.bar.close()
        print(f"{self.args.env_id}: {mean:.2f} +/- {std:.2f} over {len(returns)} episodes, mean - std {mean - std:.2f}")
        print(f"run folder: {self.folder}")
        print(f"package it: python push_to_hub.py --checkpoint {self.folder / 'checkpoint.pt'}")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    train(parse_args(sys.argv[1:]))
