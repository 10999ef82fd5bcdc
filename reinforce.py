"""REINFORCE: play whole episodes, then make each action more likely, the more so the higher the return that followed.

The return after an action estimates what the action was worth, without any model or table: Monte Carlo. It is right
on average but scatters widely. Subtracting a baseline, something close to the return to be expected anyhow,
leaves the average gradient as it is and takes away much of the scatter. --baseline is none, the mean of the other
episodes of the batch, or a learned value function; loss/value shows what scatter each of them leaves.
Actions may be Discrete or Box; observations are a Box (Dict and Tuple are flattened into one).

    python reinforce.py                                             # CartPole-v1: 500 in 25 s
    python reinforce.py --env-id flappy_bird_gymnasium:FlappyBird-v0 \
        --env-kwargs '{"use_lidar": false, "score_limit": 20}' --normalize-observations \
        --total-timesteps 4e6 --learning-rate 3e-3 --gamma 0.97     # 12 to 18 pipes of 20 in 2 min

Sources
    [W]    Williams 1992, Simple Statistical Gradient-Following Algorithms for Connectionist Reinforcement
           Learning, Machine Learning 8
    [SB]   Sutton and Barto 2018, Reinforcement Learning: An Introduction, 2nd edition
    [RLOO] Kool et al. 2019, Buy 4 REINFORCE Samples, Get a Baseline for Free!, ICLR workshop
    [Chan] Chan et al. 1979, Updating Formulae and a Pairwise Algorithm for Computing Sample Variances

An episode that is truncated, by its time limit or by --num-steps, counts as if it had ended there: Monte Carlo
puts nothing in place of the rewards that are missing, so the agent learns to maximise the return within the limit.
To put a learned value there is to bootstrap, as ppo.py does.

A batch is one episode of each environment. To take those that end first would favour short ones, so all wait for the
longest; what the others play meanwhile is thrown away, though its steps count.

Deviations: the return from each step on in place of the whole [W, §5]; one gradient step of Adam for a batch; no factor
gamma^t before the gradient of step t [SB, §13.3]; at every checkpoint the environments start afresh, so that
a resumed run repeats the uninterrupted one.
"""

import gc
import json
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
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv
from torch import nn
from torch.distributions import Categorical, Independent, Normal
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

# --- config ---


@dataclass
class Args:
    """The flags: first those that all scripts share, then those of this algorithm."""

    env_id: str = "CartPole-v1"  # gymnasium id, or package:EnvId to import the package first
    env_kwargs: str = "{}"  # keyword arguments of the environment, as JSON
    seed: int = 1  # seed of the weights, the environments and the sampling
    total_timesteps: int = 1_000_000  # environment steps, all environments together
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

    num_envs: int = 8  # parallel environments (N), each of which plays one episode of a batch
    num_steps: int = 1_000  # steps after which an episode is broken off (T); the last may pass --total-timesteps
    baseline: Literal["none", "mean", "learned"] = "learned"  # what is subtracted from the returns
    normalize_observations: bool = True  # by their running mean and variance, saved with the agent
    hidden_size: int = 64  # units of the hidden layer
    learning_rate: float = 5e-3  # of Adam
    anneal_lr: bool = True  # lower the learning rate linearly towards zero
    gamma: float = 0.99  # discount factor

    def check(self):
        """Refuse values that do not fit together, before anything is built."""
        if self.gamma > 1:
            refuse(f"--gamma {self.gamma}: must be at most 1")
        if self.baseline == "mean" and self.num_envs == 1:
            refuse("--baseline mean --num-envs 1: the mean is that of the other episodes, so there must be some")


# --- environment ---


def make_envs(args: Args, num_envs: int, evaluation: bool = False, render: bool = False) -> VectorEnv:
    """`num_envs` copies of the environment with float32 vector observations.

    Evaluation resets an ended episode at the next step, so that render() still shows the end.
    """

    def make_env():
        """One environment, its spaces checked and its observations flattened."""
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
    return SyncVectorEnv([make_env] * num_envs, autoreset_mode=AutoresetMode.SAME_STEP)


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


def make_network(num_inputs: int, num_outputs: int, hidden_size: int) -> nn.Sequential:
    """One hidden layer of ReLU units."""
    return nn.Sequential(nn.Linear(num_inputs, hidden_size), nn.ReLU(), nn.Linear(hidden_size, num_outputs))


class Agent(nn.Module):
    """A policy, and with --baseline learned a value function, two networks that share only the normalised input."""

    def __init__(self, envs: VectorEnv, args: Args):
        super().__init__()
        self.action_space = envs.single_action_space
        self.discrete = isinstance(self.action_space, Discrete)
        num_inputs = envs.single_observation_space.shape[0]
        num_outputs = int(self.action_space.n) if self.discrete else int(np.prod(self.action_space.shape))
        self.normalize = Normalizer(num_inputs) if args.normalize_observations else nn.Identity()
        self.actor = make_network(num_inputs, num_outputs, args.hidden_size)
        if not self.discrete:
            self.log_std = nn.Parameter(torch.zeros(num_outputs))  # the same in every state
        if args.baseline == "learned":
            self.critic = make_network(num_inputs, 1, args.hidden_size)

    def forward(self, obs):
        """The policy's distribution over actions in `obs` (..., D) float32."""
        output = self.actor(self.normalize(obs))
        if self.discrete:
            return Categorical(logits=output, validate_args=False)
        return Independent(Normal(output, self.log_std.exp(), validate_args=False), 1, validate_args=False)

    def value(self, obs):
        """The return (...) that the learned baseline expects from `obs` (..., D) on."""
        return self.critic(self.normalize(obs)).squeeze(-1)

    def observe(self, obs):
        """Let the running statistics of --normalize-observations see `obs` (..., D)."""
        if isinstance(self.normalize, Normalizer):
            self.normalize.update(obs)

    def to_env(self, action) -> np.ndarray:
        """`action` as the environment wants it. Only the environment sees it clipped: the log-probability
        is that of the action that was sampled."""
        action = action.cpu().numpy()
        if self.discrete:
            return action + self.action_space.start
        low, high = self.action_space.low, self.action_space.high
        return action.reshape(-1, *low.shape).clip(low, high).astype(low.dtype)

    @torch.no_grad()
    def act(self, obs, deterministic: bool) -> np.ndarray:
        """Actions for the environment from `obs` (N, D) float32: the most likely ones, or sampled."""
        policy = self(obs)
        return self.to_env(policy.mode if deterministic else policy.sample())


# --- algorithm ---


def discounted_returns(rewards, gamma):
    """The return from every step on, called reward-to-go. `rewards` (T, N) are 0 once an episode is over."""
    returns, following = torch.zeros_like(rewards), torch.zeros_like(rewards[0])
    for t in reversed(range(len(rewards))):
        returns[t] = following = rewards[t] + gamma * following  # [SB, Eq. 3.9]
    return returns


def mean_of_the_others(returns, running):
    """For each step (T, N) the mean return, from the same step on, of the other episodes that still run then.

    Without the episode itself the mean does not depend on its actions, and so does not bias the gradient [RLOO].
    The one that runs longest is compared with 0 once it is alone.
    """
    others = running.sum(1, keepdim=True) - running.float()
    return (returns.sum(1, keepdim=True) - returns) / others.clamp(min=1)


def reinforce_loss(agent, obs, action, returns, baseline, num_episodes):
    """The loss of the B steps of `num_episodes` episodes, every tensor (B, ...), and a dict of scalars to log.

    The baseline of a step must not depend on its action. A learned one learns from the value loss, which has no weight
    of its own because it moves no other weights than the baseline's.
    """
    policy = agent(obs)
    advantage = returns - baseline.detach()
    policy_loss = -(advantage * policy.log_prob(action)).sum() / num_episodes  # [SB, §13.4]
    value_loss = (returns - baseline).square().mean()
    return policy_loss + value_loss, {
        "loss/policy": policy_loss.item(),
        "loss/value": value_loss.item(),  # what the baseline leaves; of none, all
        "loss/entropy": policy.entropy().mean().item(),
    }


# --- training ---


def train(args: Args) -> Path:
    """Train one agent, evaluate it, and return the run folder."""
    torch.set_num_threads(args.num_threads)
    envs = open_envs(args, args.num_envs)
    device = pick_device(args.device, envs.single_observation_space)
    seed_everything(args.seed)
    agent = Agent(envs, args).to(device)
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, fused=True)

    with Run(args, 1, agent=agent, optimizer=optimizer) as run:
        while run.step < run.last_step:
            if run.step >= run.next_cut:  # evaluate, save, start fresh environments
                envs, obs = run.cut(envs)
            else:
                obs, _ = envs.reset()
            start, start_time = run.step, time.perf_counter()

            # 1. collect: an episode in each of N environments, until the longest is over
            rollout, outcomes, running = [], [], np.ones(args.num_envs, dtype=bool)
            while running.any() and len(rollout) < args.num_steps:
                obs = torch.as_tensor(obs, device=device)
                with torch.no_grad():
                    action = agent(obs).sample()
                rollout.append((obs, action))
                obs, reward, terminated, truncated, _ = envs.step(agent.to_env(action))
                outcomes.append((reward * running, running))
                running = running & ~(terminated | truncated)
                run.step += args.num_envs
                run.check_finite(observation=obs, reward=reward)
            obs, actions = (torch.stack(x) for x in zip(*rollout))  # (T, N, ...)
            rewards, valid = (np.stack(x) for x in zip(*outcomes))  # (T, N); valid is False after an episode's end
            run.record(obs.cpu(), rewards, {"episode": {"r": rewards.sum(axis=0), "l": valid.sum(axis=0)}})

            # 2. returns, and what they are compared with
            returns = discounted_returns(torch.as_tensor(rewards.astype(np.float32), device=device), args.gamma)
            valid = torch.as_tensor(valid, device=device)
            baseline = torch.zeros_like(returns)[valid]  # (B,), B steps of all episodes
            if args.baseline == "mean":
                baseline = mean_of_the_others(returns, valid)[valid]
            elif args.baseline == "learned":
                baseline = agent.value(obs[valid])

            # 3. update: one gradient step, then these episodes are of no more use
            if args.anneal_lr:
                optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - start / run.last_step)
            obs, actions, returns = obs[valid], actions[valid], returns[valid]  # (T, N, ...) to (B, ...)
            loss, metrics = reinforce_loss(agent, obs, actions, returns, baseline, args.num_envs)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            agent.observe(obs)  # last, so that the policy that is updated is the one that acted

            # 4. log
            metrics["train/learning_rate"] = optimizer.param_groups[0]["lr"]
            metrics["time/sps"] = (run.step - start) / (time.perf_counter() - start_time)
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
