"""Soft actor-critic (SAC) for continuous actions.

Like DQN, SAC learns Q-values from a replay of past steps. But an action here is a vector of real numbers, and no loop
can try them all to find the best one. So a second network, the policy (actor), learns to choose actions with high
Q-values. Three ideas are new. The policy is a squashed Gaussian: tanh keeps its actions within their bounds. The
policy is paid for its entropy, so it stays as random as the task allows, and explores. The weight of the entropy, the
temperature α, is learned too. Actions must be Box.

    python sac_continuous.py                                      # Pendulum-v1: -157, -140 and -137 with three seeds
    python sac_continuous.py --env-id LunarLanderContinuous-v3 --total-timesteps 500_000 --num-envs 4 \
        --learning-starts 5_000 --policy-frequency 2 --anneal-lr
    python sac_continuous.py --env-id HalfCheetah-v5 --total-timesteps 1_000_000 --learning-starts 10_000

The lander lands with two seeds of three (277, 250), and hovers with one. HalfCheetah is not measured yet. The replay is
not in the checkpoint, unless you add --save-replay: without it, a resumed run first fills a new replay.

Papers
    [SAC]  Haarnoja et al. 2018, Soft Actor-Critic: Off-Policy Maximum Entropy Deep RL, arXiv:1801.01290
    [SAC2] Haarnoja et al. 2018, Soft Actor-Critic Algorithms and Applications, arXiv:1812.05905
    [TD3]  Fujimoto et al. 2018, Addressing Function Approximation Error in Actor-Critic Methods, arXiv:1802.09477

Deviations from [SAC2]: the Q-networks and α learn with a rate of their own; the first actions are random; several
environments take a step together, and then come the updates of these steps; a truncated episode bootstraps from
its last observation; the environments start anew at each checkpoint.
"""

import copy
import json
import math
import random
import re
import signal
import sys
import time
import traceback
import warnings
from collections import defaultdict
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Literal

import gymnasium as gym
import imageio
import numpy as np
import psutil
import torch
import tyro
from gymnasium.spaces import Box
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.wrappers import DtypeObservation
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

# --- config ---


@dataclass
class Args:
    """Command-line flags: first those that every script has, then those of this algorithm."""

    env_id: str = "Pendulum-v1"  # gymnasium id, or package:EnvId to import the package first
    env_kwargs: str = "{}"  # keyword arguments of the environment, as JSON
    seed: int = 1  # seed of the weights, the environments and the sampling
    total_timesteps: int = 20_000  # environment steps, summed over all environments
    device: str = "cpu"  # cpu, cuda, cuda:1, mps or auto; networks this small are fastest on the CPU
    num_threads: int = psutil.cpu_count() or 1  # CPU threads used by torch
    num_checkpoints: int = 20  # at most this many checkpoints and evaluations, evenly over the run
    eval_episodes: int = 100  # episodes of the final evaluation; a tenth of them at each checkpoint
    eval_deterministic: bool = True  # evaluate with the most likely or best action, not with a random one
    max_eval_steps: int = 2_000  # an evaluation episode is stopped after this many steps
    capture_video: bool = False  # record an evaluation episode at each checkpoint
    track: bool = False  # log to Weights & Biases as well as TensorBoard
    wandb_project_name: str = "solorl"  # wandb project of --track
    wandb_entity: str | None = None  # wandb user or team of --track
    resume: str | None = None  # run folder to continue from its last checkpoint

    num_envs: int = 1  # parallel environments (N)
    vectorization_mode: Literal["sync", "async"] = "sync"  # async: one process per environment, for slow environments
    hidden_size: int = 256  # units in each of the two hidden layers
    q_lr: float = 1e-3  # learning rate of the Q-networks and of the temperature
    policy_lr: float = 3e-4  # learning rate of the policy
    anneal_lr: bool = False  # decrease both learning rates linearly to zero
    gamma: float = 0.99  # discount factor
    autotune: bool = True  # learn the temperature
    alpha: float = 0.2  # temperature α, the weight of the entropy; with --autotune only at the start
    buffer_size: int = 1_000_000  # steps that the replay holds
    save_replay: bool = False  # save the replay in the checkpoint, so that a resumed run goes on exactly
    learning_starts: int = 1_000  # steps with random actions before learning starts
    batch_size: int = 256  # steps in a minibatch (B)
    updates_per_step: float = 1.0  # gradient steps per environment step
    policy_frequency: int = 1  # gradient steps of the Q-networks per gradient step of the policy
    target_network_frequency: int = 1  # gradient steps per update of the target networks
    tau: float = 0.005  # τ, how far an update moves the target networks towards the Q-networks
    log_interval: int = 200  # environment steps between two log entries

    def check(self):
        """Refuse values that do not fit together."""
        if max(self.gamma, self.tau) > 1:
            fail("--gamma and --tau must be at most 1")
        if min(self.alpha, self.updates_per_step) == 0:
            fail("--alpha and --updates-per-step must be more than 0")
        if not self.learning_starts <= min(self.buffer_size, self.total_timesteps - 1):
            fail("--learning-starts: must be at most --buffer-size, and less than --total-timesteps")


# --- environment ---


def make_envs(args: Args, num_envs: int, evaluation: bool = False, render: bool = False) -> VectorEnv:
    """`num_envs` copies of the environment with float32 vector observations.

    In training, step() resets an ended episode at once; its last observation is in infos["final_obs"]. In evaluation
    the reset waits for the next step, so that render() can still show the end.
    """
    envs = gym.make_vec(
        args.env_id,
        num_envs,
        vectorization_mode="sync" if evaluation else args.vectorization_mode,
        vector_kwargs={"autoreset_mode": AutoresetMode.NEXT_STEP if evaluation else AutoresetMode.SAME_STEP},
        wrappers=[
            gym.wrappers.RecordEpisodeStatistics,
            gym.wrappers.FlattenObservation,  # copies what the environment returns, and casts it to the declared dtype
            lambda env: env if env.observation_space.dtype == np.float32 else DtypeObservation(env, np.float32),
        ],
        **({"render_mode": "rgb_array"} if render else {}),
        **json.loads(args.env_kwargs),
    )
    space = envs.single_action_space
    if not isinstance(space, Box) or not np.isfinite(space.high - space.low).all():
        fail(f"--env-id {args.env_id}: actions {space} are not continuous (Box) with finite bounds; see ppo.py")
    return envs


# --- network ---


class SquashedGaussian:
    """Independent normal distributions of numbers u, squashed to actions tanh(u) between -1 and 1 [SAC, App. C]."""

    def __init__(self, mean, log_std):
        self.mean = mean  # (B, A), of u
        self.log_std = log_std  # (B, A), of u
        self.mode = mean.tanh()  # (B, A), the action of the most likely u

    def sample(self):
        """Random actions (B, A) and their log-densities (B,). Gradients pass through both to the mean and log_std."""
        noise = torch.randn_like(self.mean)
        u = self.mean + self.log_std.exp() * noise  # [SAC, §4.2]
        logprob = -(noise.square() / 2 + self.log_std + math.log(2 * math.pi) / 2)  # of u
        log_slope = 2 * (math.log(2) - u - nn.functional.softplus(-2 * u))  # log(1 - tanh(u)²), but never log 0
        return u.tanh(), (logprob - log_slope).sum(-1)  # [SAC, App. C]


def make_relu_mlp(num_inputs: int, hidden_size: int, num_outputs: int) -> nn.Sequential:
    """Two hidden layers of ReLU units [SAC, App. D]."""
    hidden = [nn.Linear(num_inputs, hidden_size), nn.ReLU(), nn.Linear(hidden_size, hidden_size), nn.ReLU()]
    return nn.Sequential(*hidden, nn.Linear(hidden_size, num_outputs))


class TwinQ(nn.Module):
    """Two Q-networks that learn from the same targets [TD3, §4.2]."""

    def __init__(self, num_inputs: int, num_actions: int, hidden_size: int):
        super().__init__()
        self.first = make_relu_mlp(num_inputs + num_actions, hidden_size, 1)
        self.second = make_relu_mlp(num_inputs + num_actions, hidden_size, 1)

    def forward(self, obs, action):
        """The values (2, B) of `action` (B, A) in `obs` (B, D)."""
        both = torch.cat([obs, action], dim=-1)
        return torch.stack([self.first(both), self.second(both)]).squeeze(-1)


class Agent(nn.Module):
    """The policy (actor), the Q-networks (critics) and the temperature. Inside, actions lie between -1 and 1."""

    def __init__(self, envs: VectorEnv, args: Args):
        super().__init__()
        self.action_space = envs.single_action_space
        self.num_actions = math.prod(self.action_space.shape)
        self.num_inputs = envs.single_observation_space.shape[0]
        self.actor = make_relu_mlp(self.num_inputs, args.hidden_size, 2 * self.num_actions)
        self.q_network = TwinQ(self.num_inputs, self.num_actions, args.hidden_size)
        self.log_alpha = nn.Parameter(torch.tensor(math.log(args.alpha)))  # the logarithm keeps α above 0

    def policy(self, obs):
        """The distribution over actions for the observations `obs` (B, D) float32."""
        mean, log_std = self.actor(obs).chunk(2, dim=-1)
        return SquashedGaussian(mean, log_std.clamp(-20, 2))

    def to_env(self, action) -> np.ndarray:
        """`action` (N, A), between -1 and 1, as the environment takes it."""
        check_finite({"action": action})  # because Box2D would end the process at a NaN
        space = self.action_space
        action = space.low + (action.cpu().numpy().reshape(-1, *space.shape) + 1) / 2 * (space.high - space.low)
        return action.clip(space.low, space.high).astype(space.dtype)  # clipped, because sums are rounded

    @torch.no_grad()
    def act(self, obs, deterministic: bool) -> np.ndarray:
        """Actions for the environment, the most likely ones or sampled ones, for `obs` (N, D) float32."""
        policy = self.policy(obs)
        return self.to_env(policy.mode if deterministic else policy.sample()[0])


# --- algorithm ---


class ReplayBuffer:
    """The last steps of all environments, as a ring of rows; one row is one step of one environment."""

    def __init__(self, buffer_size: int, num_inputs: int, num_actions: int, device, saved: bool = False):
        needed = 4 * buffer_size * (2 * num_inputs + num_actions + 2) * (2 if saved else 1)  # bytes; saving copies
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
        if needed + 5e8 > free:  # the rest of the program needs half a gigabyte
            fail(f"--buffer-size {buffer_size}: needs {needed / 1e9:.1f} GB, but only {free / 1e9:.1f} GB are free")
        self.buffer_size = buffer_size
        self.size = 0  # rows in use
        self.next_row = 0
        self.columns = {
            "obs": torch.empty(buffer_size, num_inputs, device=device),  # takes memory as it fills
            "action": torch.empty(buffer_size, num_actions, device=device),
            "reward": torch.empty(buffer_size, device=device),
            "next_obs": torch.empty(buffer_size, num_inputs, device=device),
            "terminated": torch.empty(buffer_size, dtype=torch.bool, device=device),
        }

    def add(self, **step):
        """Add one step of N environments: obs and next_obs (N, D), action (N, A), reward and terminated (N,)."""
        num_envs = len(step["reward"])
        rows = (self.next_row + torch.arange(num_envs)) % self.buffer_size
        for name, value in step.items():
            self.columns[name][rows] = torch.as_tensor(value).to(self.columns[name])
        self.next_row = (self.next_row + num_envs) % self.buffer_size
        self.size = min(self.size + num_envs, self.buffer_size)

    def sample(self, batch_size: int) -> dict:
        """A random minibatch, under the names of `add`, with B rows instead of N."""
        rows = torch.randint(self.size, (batch_size,), device=self.columns["obs"].device)
        return {name: column[rows] for name, column in self.columns.items()}

    def state_dict(self) -> dict:
        """The rows in use, for --save-replay."""
        columns = {name: column[: self.size].clone() for name, column in self.columns.items()}
        return {"buffer_size": self.buffer_size, "size": self.size, "next_row": self.next_row, "columns": columns}

    def load_state_dict(self, state: dict):
        """Restore the rows; ValueError if this replay has another size."""
        if state["buffer_size"] != self.buffer_size:
            raise ValueError(f"a replay of {state['buffer_size']} rows, not {self.buffer_size}")
        self.size = state["size"]
        self.next_row = state["next_row"]
        for name, column in state["columns"].items():
            self.columns[name][: self.size] = column


def td_target(agent, target_network, reward, next_obs, terminated, gamma):
    """The target (B,): the reward plus the discounted value of what follows, in which entropy counts as well."""
    next_action, logprob = agent.policy(next_obs).sample()
    next_q = target_network(next_obs, next_action).amin(0)  # the smaller one is less overestimated [TD3, §4.2]
    next_value = next_q - agent.log_alpha.exp() * logprob  # [SAC2, §4.1]
    return reward + gamma * next_value * ~terminated  # [SAC2, §4.1]


def q_loss(agent, target_network, obs, action, reward, next_obs, terminated, gamma):
    """The loss of the Q-networks in a minibatch, and a dict of scalar tensors to log."""
    with torch.no_grad():
        target = td_target(agent, target_network, reward, next_obs, terminated, gamma)
    q_value = agent.q_network(obs, action)  # (2, B)
    loss = (q_value - target).square().mean(-1).sum() / 2  # [SAC2, §4.2]
    return loss, {"loss/td": loss.detach(), "train/q_value": q_value.detach().mean()}


def policy_loss(agent, obs):
    """The loss of the policy in the observations `obs` (B, D), its log-densities (B,), and scalars to log."""
    action, logprob = agent.policy(obs).sample()
    q_value = agent.q_network(obs, action).amin(0)  # (B,) [SAC2, §6]
    loss = (agent.log_alpha.exp() * logprob - q_value).mean()  # [SAC2, §4.2]
    return loss, logprob.detach(), {"loss/policy": loss.detach(), "loss/entropy": -logprob.detach().mean()}


def alpha_loss(log_alpha, logprob, target_entropy):
    """The loss of the temperature α: α rises while the entropy (the mean of -logprob (B,)) is below its target."""
    return -log_alpha.exp() * (logprob + target_entropy).mean()  # [SAC2, §5]


@torch.no_grad()
def update_target(target_network, q_network, tau):
    """Move the weights of the target networks a fraction τ towards those of the Q-networks [SAC2, Algorithm 1]."""
    for target, weight in zip(target_network.parameters(), q_network.parameters()):
        target.lerp_(weight, tau)


# --- training ---


def train(args: Args) -> Path:
    """Train an agent, evaluate it, and return the run folder."""
    torch.set_num_threads(args.num_threads)
    device = pick_device(args.device)
    seed_everything(args.seed)
    envs = open_envs(args, args.num_envs)
    agent = Agent(envs, args).to(device)
    target_network = copy.deepcopy(agent.q_network).requires_grad_(False)
    q_optimizer = torch.optim.Adam(agent.q_network.parameters(), lr=args.q_lr, fused=True)
    policy_optimizer = torch.optim.Adam(agent.actor.parameters(), lr=args.policy_lr, fused=True)
    alpha_optimizer = torch.optim.Adam([agent.log_alpha], lr=args.q_lr, fused=True)
    replay = ReplayBuffer(args.buffer_size, agent.num_inputs, agent.num_actions, device, args.save_replay)
    parts = {"agent": agent, "target_network": target_network, "q_optimizer": q_optimizer}
    parts |= {"policy_optimizer": policy_optimizer, "alpha_optimizer": alpha_optimizer}
    run = Run(args, **parts, **({"replay": replay} if args.save_replay else {}))
    if not args.autotune:
        agent.log_alpha.data.fill_(math.log(args.alpha))  # not the one of the checkpoint

    while run.step < args.total_timesteps:
        if run.step >= run.next_checkpoint:  # at once at the start
            run.save_checkpoint()
            envs.close()  # a resumed run has to start new environments; to get the same result, every run does
            envs = open_envs(args, args.num_envs)
            obs, _ = envs.reset(seed=seed_everything(args.seed, run.step))
            history = defaultdict(list)
            start_step = run.step
            start_time = time.perf_counter()

        # 1. take a step in each of N environments, at first with random actions
        if run.step < args.learning_starts:
            action = 2 * torch.rand(args.num_envs, agent.num_actions, device=device) - 1  # (N, A)
        else:
            action = agent.policy(torch.as_tensor(obs, device=device)).sample()[0].detach()
        next_obs, reward, terminated, truncated, infos = envs.step(agent.to_env(action))
        last_step = run.step
        run.step += args.num_envs

        # 2. store it; where an episode ended, next_obs is already the first observation of the next episode
        true_next_obs = next_obs.copy()
        for n in np.flatnonzero(terminated | truncated):
            true_next_obs[n] = infos["final_obs"][n]
            run.record_episode(infos["final_info"]["episode"]["r"][n], infos["final_info"]["episode"]["l"][n])
        replay.add(obs=obs, action=action, reward=reward, next_obs=true_next_obs, terminated=terminated)
        obs = next_obs

        # 3. learn: --updates-per-step gradient steps for each environment step
        remaining = 1 - last_step / args.total_timesteps if args.anneal_lr else 1
        q_optimizer.param_groups[0]["lr"] = alpha_optimizer.param_groups[0]["lr"] = args.q_lr * remaining
        policy_optimizer.param_groups[0]["lr"] = args.policy_lr * remaining
        if replay.size >= args.learning_starts:
            for update in range(int(last_step * args.updates_per_step), int(run.step * args.updates_per_step)):
                minibatch = replay.sample(args.batch_size)
                loss, metrics = q_loss(agent, target_network, **minibatch, gamma=args.gamma)
                q_optimizer.zero_grad()
                loss.backward()
                q_optimizer.step()
                if update % args.policy_frequency == 0:
                    loss, logprob, policy_metrics = policy_loss(agent, minibatch["obs"])
                    policy_optimizer.zero_grad()
                    loss.backward(inputs=list(agent.actor.parameters()))  # no gradients of the Q-networks' weights
                    policy_optimizer.step()
                    metrics |= policy_metrics
                    if args.autotune:
                        alpha_optimizer.zero_grad()
                        alpha_loss(agent.log_alpha, logprob, -agent.num_actions).backward()  # [SAC2, App. D]
                        alpha_optimizer.step()
                if update % args.target_network_frequency == 0:
                    update_target(target_network, agent.q_network, args.tau)
                for name, value in metrics.items():
                    history[name].append(value)

        # 4. log the means since the last time
        if run.step - start_step >= args.log_interval or run.step >= min(run.next_checkpoint, args.total_timesteps):
            metrics = {name: torch.stack(values).mean().item() for name, values in history.items()}
            metrics["train/alpha"] = agent.log_alpha.exp().item()
            metrics["train/learning_rate"] = policy_optimizer.param_groups[0]["lr"]
            metrics["time/sps"] = (run.step - start_step) / (time.perf_counter() - start_time)
            run.log(metrics)
            history.clear()
            start_step = run.step
            start_time = time.perf_counter()
    envs.close()
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
