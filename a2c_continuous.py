"""Advantage actor-critic (A2C) for continuous actions.

An actor and a critic learn side by side: the critic what return to expect of a state, the actor to do more often what
turned out better than the critic expected. Unlike REINFORCE it need not wait for the end of an episode: after a few
steps the critic's value of the last state stands for all that is to come (bootstrapping). Each short rollout of
many environments gives one gradient step. Actions must be Box; observations that are no vector are flattened into one.

    python a2c_continuous.py                                      # BipedalWalker-v3: 283, 299, 283 in 11 to 19 min
    python a2c_continuous.py --env-id LunarLanderContinuous-v3 --total-timesteps 3e6 --num-steps 8 --optimizer rmsprop \
        --no-normalize-advantages --learning-rate 7e-4 --gamma 0.999 --gae-lambda 0.98  # 207, 209, 223 in 3 to 5 min
    python a2c_continuous.py --env-id panda_gym:PandaReachDense-v3 --total-timesteps 4e5 --num-steps 8 \
        --gamma 0.95 --gae-lambda 0.9                             # -0.20, -0.19, -0.22 in 6 to 8 min
    python a2c_continuous.py --env-id Pendulum-v1 --total-timesteps 1e6 --num-envs 8 --num-steps 4 --gamma 0.9 \
        --gae-lambda 0.9 --action-std 1 --no-normalize-advantages --max-grad-norm 1     # -192, -236, -189 in 1 min
    python a2c_continuous.py --env-id HalfCheetah-v5 --total-timesteps 1e6 --num-steps 8 \
        --action-std 0.135                                        # 4002, 3674, 3895 in 2 min

Papers
    [A3C]  Mnih et al. 2016, Asynchronous Methods for Deep Reinforcement Learning, arXiv:1602.01783
    [GAE]  Schulman et al. 2016, High-Dimensional Continuous Control Using Generalized Advantage
           Estimation, arXiv:1506.02438
    [Chan] Chan et al. 1979, Updating Formulae and a Pairwise Algorithm for Computing Sample Variances
    [PPO]  Schulman et al. 2017, Proximal Policy Optimization Algorithms, arXiv:1707.06347
    [37]   Huang et al. 2022, The 37 Implementation Details of Proximal Policy Optimization, ICLR blog
    [Same] Huang et al. 2022, A2C is a special case of PPO, arXiv:2205.09123

Deviations: environments in step instead of asynchronous workers; GAE, of which lambda 1 is the n-step return of [A3C];
two networks, with one deviation for all states [37, continuous actions 2, 4]; rewards are divided by the deviation of
the discounted return over all rollouts so far and cut to +-10, observations normalised and cut to +-10 too [37,
continuous actions 6 to 9]; a truncated episode bootstraps from its true last observation; at every checkpoint
the environments start afresh, so that a resumed run repeats the uninterrupted one.

With Adam and normalised advantages the update is that of ppo.py with one epoch and one minibatch: the ratio is 1 then,
and the clip does nothing [Same].
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
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

# --- config ---


@dataclass
class Args:
    """The flags: first those that all scripts share, then those of this algorithm."""

    env_id: str = "BipedalWalker-v3"  # gymnasium id, or package:EnvId to import the package first
    env_kwargs: str = "{}"  # keyword arguments of the environment, as JSON
    seed: int = 1  # seed of the weights, the environments and the sampling
    total_timesteps: int = 5_000_000  # environment steps, all environments together
    device: str = "auto"  # auto (GPU for pixels, CPU for small networks), cpu, cuda, cuda:1, mps
    num_threads: int = 1  # CPU threads of torch; small networks gain nothing from more than one
    num_checkpoints: int = 20  # times to evaluate and save, evenly over the run
    eval_episodes: int = 100  # episodes of the final evaluation; a tenth of them at each checkpoint
    eval_deterministic: bool = True  # evaluate the most likely action instead of a sampled one
    max_eval_steps: int = 2_000  # steps after which an evaluation episode is broken off
    capture_video: bool = False  # film one evaluation episode at each checkpoint
    track: bool = False  # log to Weights & Biases too
    wandb_project_name: str = "solorl"  # project of --track
    wandb_entity: str | None = None  # user or team of --track
    resume: str | None = None  # run folder to continue from its last checkpoint, with its flags

    num_envs: int = 16  # parallel environments (N)
    num_steps: int = 16  # steps per environment in a rollout (T); a run is whole rollouts
    vectorization_mode: Literal["sync", "async"] = "sync"  # async: one process an environment, if slow
    normalize_observations: bool = True  # by their running mean and variance, saved with the agent
    normalize_rewards: bool = True  # in training, by the running deviation of the discounted return
    action_std: float = 0.6  # standard deviation of the actions at the start
    optimizer: Literal["adam", "rmsprop"] = "adam"  # rmsprop, as in the paper, is the better one for some tasks
    learning_rate: float = 1e-3  # of the optimizer
    anneal_lr: bool = True  # lower the learning rate linearly towards zero
    gamma: float = 0.99  # discount factor
    normalize_advantages: bool = True  # to mean 0 and deviation 1 in each update
    gae_lambda: float = 0.95  # λ of generalized advantage estimation; 1 is the n-step return
    ent_coef: float = 0.0  # weight of the entropy bonus
    vf_coef: float = 0.5  # weight of the value loss
    max_grad_norm: float = 0.5  # gradients are scaled down to this norm
    log_interval: int = 25  # updates from one log entry to the next, which holds their means

    def check(self):
        """Refuse values that do not fit together, before anything is built."""
        batch_size = self.num_envs * self.num_steps
        if batch_size == 1 and self.normalize_advantages:
            refuse("--num-envs 1 --num-steps 1: a single advantage cannot be normalised")
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
        render_mode = {"render_mode": "rgb_array"} if render else {}  # not every environment takes it
        env = gym.make(args.env_id, **render_mode, **json.loads(args.env_kwargs))
        if not isinstance(env.action_space, Box):
            other = ", see ppo.py" if isinstance(env.action_space, Discrete) else ""
            refuse(f"--env-id {args.env_id}: actions {env.action_space} are not continuous (Box){other}")
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
        num_inputs, num_actions = envs.single_observation_space.shape[0], int(np.prod(self.action_space.shape))
        self.normalize = Normalizer(num_inputs) if args.normalize_observations else nn.Identity()
        self.return_stats = Normalizer(1)  # for --normalize-rewards; here, so that a checkpoint holds it
        self.actor = make_mlp(num_inputs, num_actions, 0.01)
        self.critic = make_mlp(num_inputs, 1, 1.0)
        self.log_std = nn.Parameter(torch.full((num_actions,), math.log(args.action_std)))  # the same in every state

    def policy(self, obs):
        """The distribution over actions in `obs` (..., D) float32."""
        return Gaussian(self.actor(self.normalize(obs)), self.log_std)

    def value(self, obs):
        """The value (...) of `obs` (..., D) float32."""
        return self.critic(self.normalize(obs)).squeeze(-1)

    def observe(self, obs):
        """Let the running statistics of --normalize-observations see `obs` (..., D)."""
        if isinstance(self.normalize, Normalizer):
            self.normalize.update(obs)

    def to_env(self, action) -> np.ndarray:
        """`action` as the environment wants it. Only the environment sees it clipped: the log-probability
        is that of the action that was sampled."""
        low, high = self.action_space.low, self.action_space.high
        return action.cpu().numpy().reshape(-1, *low.shape).clip(low, high).astype(low.dtype)

    @torch.no_grad()
    def act(self, obs, deterministic: bool) -> np.ndarray:
        """Actions for the environment from `obs` (N, D) float32: the most likely ones, or sampled."""
        policy = self.policy(obs)
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


def a2c_loss(agent, obs, action, advantage, value_target, vf_coef, ent_coef):
    """The loss of one rollout, every tensor (B, ...), and a dict of scalar tensors worth logging."""
    policy, value = agent.policy(obs), agent.value(obs)
    policy_loss = -(advantage * policy.log_prob(action)).mean()  # [A3C, §4]
    value_loss = (value - value_target).square().mean()  # [A3C, §4]
    entropy = policy.entropy().mean()
    loss = policy_loss + vf_coef * value_loss - ent_coef * entropy  # [A3C, §4]
    return loss, {
        "loss/policy": policy_loss.detach(),
        "loss/value": value_loss.detach(),
        "loss/entropy": entropy.detach(),
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
    if args.optimizer == "adam":
        optimizer = torch.optim.Adam(parameters, lr=args.learning_rate, eps=1e-5, fused=True)  # [37, detail 3]
    else:
        optimizer = torch.optim.RMSprop(parameters, lr=args.learning_rate, eps=1e-5, foreach=True)  # [A3C, §4]
    batch_size, history = args.num_envs * args.num_steps, []

    with Run(args, batch_size, agent=agent, optimizer=optimizer) as run:
        while run.step < run.last_step:
            if run.step >= run.next_cut:  # evaluate, save, start fresh environments
                envs, obs = run.cut(envs)
                discounted_return = np.zeros(args.num_envs)
            if not history:
                start, start_time = run.step, time.perf_counter()

            # 1. collect: T steps in N environments; `rollout` holds tensors (N, ...), `outcomes` arrays (N,)
            rollout, outcomes, final_obs = [], [], []
            for _ in range(args.num_steps):
                obs = torch.as_tensor(obs, device=device)
                with torch.no_grad():
                    action = agent.policy(obs).sample()
                rollout.append((obs, action))
                if not outcomes:  # NaN weights show in the first action, before any environment sees it
                    run.check_finite(action=action.cpu())
                obs, reward, terminated, truncated, infos = envs.step(agent.to_env(action))
                done = terminated | truncated
                discounted_return = reward + args.gamma * discounted_return  # of the past, to see the scale of rewards
                outcomes.append((reward.astype(np.float32), terminated, done, discounted_return.astype(np.float32)))
                discounted_return = discounted_return * ~done
                final_obs += [infos["final_obs"][i] for i in np.flatnonzero(truncated & ~terminated)]
                run.step += args.num_envs
                run.record(obs, reward, infos)

            # 2. advantages: a truncated episode could have gone on, so its last observation has a value too
            all_obs, actions = (torch.stack(x) for x in zip(*rollout))
            rewards, terminated, done, past = (torch.as_tensor(np.stack(x), device=device) for x in zip(*outcomes))
            if args.normalize_rewards:
                rewards = (rewards / (agent.return_stats.var + 1e-8).sqrt()).clamp(-10, 10)
            with torch.no_grad():
                values = agent.value(torch.cat([all_obs, torch.as_tensor(obs, device=device)[None]]))
                values, next_values = values[:-1], values[1:].clone()  # a copy, since some are replaced
                if final_obs:  # in the order of the mask, by t and then n
                    next_values[done & ~terminated] = agent.value(torch.as_tensor(np.stack(final_obs), device=device))
            advantages = compute_gae(rewards, values, next_values, terminated, done, args.gamma, args.gae_lambda)
            value_targets = advantages + values  # [37, detail 5]
            if args.normalize_advantages:
                advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)  # [37, detail 7]
            batch = [x.flatten(end_dim=1) for x in (all_obs, actions, advantages, value_targets)]

            # 3. update: one gradient step
            if args.anneal_lr:  # from the full rate to one rollout's share above zero [37, detail 4]
                optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - (run.step - batch_size) / run.last_step)
            loss, metrics = a2c_loss(agent, *batch, args.vf_coef, args.ent_coef)
            optimizer.zero_grad()
            loss.backward()
            metrics["train/grad_norm"] = nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
            optimizer.step()
            agent.observe(all_obs)  # last, so that the policy that is updated is the one that acted
            if args.normalize_rewards:
                agent.return_stats.update(past[..., None])

            # 4. log
            history.append(metrics)
            if len(history) == args.log_interval or run.step >= min(run.next_cut, run.last_step):
                metrics = {name: torch.stack([m[name] for m in history]).mean().item() for name in metrics}
                unexplained = (value_targets - values).var() / (value_targets.var() + 1e-8)
                metrics["train/explained_variance"] = 1 - unexplained.item()  # of the last rollout
                metrics["train/learning_rate"] = optimizer.param_groups[0]["lr"]
                metrics["time/sps"] = (run.step - start) / (time.perf_counter() - start_time)
                run.log(metrics)
                history = []
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
