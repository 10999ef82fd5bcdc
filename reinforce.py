"""REINFORCE: play whole episodes, then make each action more likely in proportion to the return that followed it.

The return estimates what an action was worth. It needs no model and no table, but it is noisy: it depends on everything
that happens later. Subtracting a baseline, an estimate of the return that does not depend on the action, keeps the
expected gradient and removes much of the noise. --baseline is none, the mean of the other episodes in the batch, or a
learned value function. Actions must be Discrete.

    python reinforce.py                                             # CartPole-v1
    python reinforce.py --env-id flappy_bird_gymnasium:FlappyBird-v0 --env-kwargs \
        '{"use_lidar": false, "score_limit": 20}' --total-timesteps 4_000_000 --learning-rate 3e-3 --gamma 0.97

Sources
    [W]    Williams 1992, Simple Statistical Gradient-Following Algorithms for Connectionist Reinforcement Learning,
           Machine Learning 8
    [SB]   Sutton and Barto 2018, Reinforcement Learning: An Introduction, 2nd edition
    [RLOO] Kool et al. 2019, Buy 4 REINFORCE Samples, Get a Baseline for Free!, ICLR workshop
    [Chan] Chan et al. 1979, Updating Formulae and a Pairwise Algorithm for Computing Sample Variances

A batch is one episode from each environment. All wait for the longest, because taking the first that end would favour
short episodes. A truncated episode counts as finished: REINFORCE adds no estimate of the missing rewards. That would be
bootstrapping, which a2c_continuous.py and ppo.py do.

Deviations: the return from each step on instead of the whole return [W, §5]; one step of Adam per batch; no factor
gamma^t in the gradient of step t [SB, §13.3]; the environments start anew at each checkpoint.
"""

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
from gymnasium.spaces import Discrete
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.wrappers import DtypeObservation
from torch import nn
from torch.distributions import Categorical
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

# --- config ---


@dataclass
class Args:
    """Command-line flags: first those that every script has, then those of this algorithm."""

    env_id: str = "CartPole-v1"  # gymnasium id, or package:EnvId to import the package first
    env_kwargs: str = "{}"  # keyword arguments of the environment, as JSON
    seed: int = 1  # seed of the weights, the environments and the sampling
    total_timesteps: int = 1_000_000  # environment steps, summed over all environments
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

    num_envs: int = 8  # parallel environments (N); each plays one episode of a batch
    num_steps: int = 1_000  # an episode is stopped after this many steps (T)
    baseline: Literal["none", "mean", "learned"] = "learned"  # what is subtracted from the returns
    normalize_observations: bool = True  # scale by the running mean and variance, which are saved with the agent
    hidden_size: int = 64  # units of the hidden layer
    learning_rate: float = 5e-3  # of Adam, at the start
    anneal_lr: bool = True  # decrease the learning rate linearly to zero
    gamma: float = 0.99  # discount factor

    def check(self):
        """Refuse values that do not fit together."""
        if self.gamma > 1:
            fail(f"--gamma {self.gamma}: must be at most 1")
        if self.baseline == "mean" and self.num_envs == 1:
            fail("--baseline mean: takes the mean of the other episodes, so it needs --num-envs 2 or more")


# --- environment ---


def make_envs(args: Args, num_envs: int, evaluation: bool = False, render: bool = False) -> VectorEnv:
    """`num_envs` copies of the environment with float32 vector observations.

    In evaluation, an episode that ended is reset only at the next step, so that render() can still show the end.
    """
    envs = gym.make_vec(
        args.env_id,
        num_envs,
        vectorization_mode="sync",
        vector_kwargs={"autoreset_mode": AutoresetMode.NEXT_STEP if evaluation else AutoresetMode.SAME_STEP},
        wrappers=[
            gym.wrappers.FlattenObservation,  # copies what the environment returns, and casts it to the declared dtype
            lambda env: env if env.observation_space.dtype == np.float32 else DtypeObservation(env, np.float32),
        ],
        **({"render_mode": "rgb_array"} if render else {}),
        **json.loads(args.env_kwargs),
    )
    if not isinstance(envs.single_action_space, Discrete):
        fail(f"--env-id {args.env_id}: actions {envs.single_action_space} are not Discrete; see a2c_continuous.py")
    return envs


# --- network ---


class RunningNorm(nn.Module):
    """Normalizes observations (..., D) by the mean and variance of all those passed to `update`."""

    def __init__(self, size: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("var", torch.ones(size))
        self.register_buffer("count", torch.zeros(()))

    def forward(self, obs):
        return ((obs - self.mean) / (self.var + 1e-8).sqrt()).clamp(-10, 10)

    def update(self, obs):
        """Merge the mean and variance of `obs` (B, D) into the running ones [Chan]."""
        batch_var, batch_mean = torch.var_mean(obs, dim=0, correction=0)
        weight = len(obs) / (self.count + len(obs))
        delta = batch_mean - self.mean
        self.mean += weight * delta
        self.var += weight * (batch_var - self.var) + weight * (1 - weight) * delta.square()
        self.count += len(obs)


def make_network(num_inputs: int, num_outputs: int, hidden_size: int) -> nn.Sequential:
    """One hidden layer of ReLU units."""
    return nn.Sequential(nn.Linear(num_inputs, hidden_size), nn.ReLU(), nn.Linear(hidden_size, num_outputs))


class Agent(nn.Module):
    """The policy (actor) and the learned baseline (critic), two separate networks."""

    def __init__(self, envs: VectorEnv, args: Args):
        super().__init__()
        self.first_action = int(envs.single_action_space.start)
        num_inputs = envs.single_observation_space.shape[0]
        self.normalize = RunningNorm(num_inputs) if args.normalize_observations else nn.Identity()
        self.actor = make_network(num_inputs, int(envs.single_action_space.n), args.hidden_size)
        self.critic = make_network(num_inputs, 1, args.hidden_size)

    def policy(self, obs):
        """The distribution over actions for the observations `obs` (B, D) float32."""
        return Categorical(logits=self.actor(self.normalize(obs)), validate_args=False)

    def value(self, obs):
        """The learned baseline: the return (B,) expected from `obs` (B, D) float32 on."""
        return self.critic(self.normalize(obs)).squeeze(-1)

    def update_normalizer(self, obs):
        """Update the running mean and variance of --normalize-observations with `obs` (B, D)."""
        if isinstance(self.normalize, RunningNorm):
            self.normalize.update(obs)

    def to_env(self, action) -> np.ndarray:
        """`action` as the environment takes it."""
        return action.cpu().numpy() + self.first_action

    @torch.no_grad()
    def act(self, obs, deterministic: bool) -> np.ndarray:
        """Actions for the environment, the most likely ones or sampled ones, for `obs` (N, D) float32."""
        policy = self.policy(obs)
        return self.to_env(policy.mode if deterministic else policy.sample())


# --- algorithm ---


def discounted_returns(rewards, gamma):
    """The return (T, N) from each step on. `rewards` (T, N) are 0 after the end of an episode."""
    returns = torch.zeros_like(rewards)
    following = 0
    for t in reversed(range(len(rewards))):
        following = rewards[t] + gamma * following  # [SB, Eq. 3.9]
        returns[t] = following
    return returns


def mean_of_the_others(returns, running):
    """The mean return (T, N) of the other episodes that are still running at step t [RLOO].

    The episode itself is left out, so that its baseline does not depend on its actions. The last one that runs has no
    others; its baseline is 0.
    """
    num_others = running.sum(1, keepdim=True) - running.float()
    return (returns.sum(1, keepdim=True) - returns) / num_others.clamp(min=1)


def reinforce_loss(agent, obs, action, returns, baseline, num_episodes):
    """The loss of B steps from `num_episodes` episodes, whose tensors are (B, ...), and a dict of scalars to log."""
    policy = agent.policy(obs)
    advantage = returns - baseline.detach()
    policy_loss = -(advantage * policy.log_prob(action)).sum() / num_episodes  # [SB, §13.4]
    value_loss = (returns - baseline).square().mean()  # has a gradient only if the baseline is learned
    return policy_loss + value_loss, {
        "loss/policy": policy_loss.item(),
        "loss/value": value_loss.item(),  # mean squared advantage
        "loss/entropy": policy.entropy().mean().item(),
    }


# --- training ---


def train(args: Args) -> Path:
    """Train an agent, evaluate it, and return the run folder."""
    torch.set_num_threads(args.num_threads)
    device = pick_device(args.device)
    seed_everything(args.seed)
    envs = open_envs(args, args.num_envs)
    agent = Agent(envs, args).to(device)
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, fused=True)
    run = Run(args, agent=agent, optimizer=optimizer)

    # room for one batch: at most T steps of N episodes
    T, N = args.num_steps, args.num_envs
    all_obs = torch.zeros(T, *envs.observation_space.shape, device=device)
    actions = torch.zeros(T, N, dtype=torch.int64, device=device)
    rewards = torch.zeros(T, N, device=device)
    running = torch.zeros(T, N, dtype=torch.bool, device=device)  # whether the episode is still going at step t

    while run.step < args.total_timesteps:
        seed = None
        if run.step >= run.next_checkpoint:  # at once at the start
            run.save_checkpoint()
            envs.close()  # a resumed run has to start new environments; to get the same result, every run does
            envs = open_envs(args, args.num_envs)
            seed = seed_everything(args.seed, run.step)
        progress = run.step / args.total_timesteps if args.anneal_lr else 0
        start_time = time.perf_counter()

        # 1. play one episode in each of N environments, until the longest is over
        obs, _ = envs.reset(seed=seed)
        alive = np.ones(N, dtype=bool)
        for t in range(T):
            all_obs[t] = torch.as_tensor(obs)
            with torch.no_grad():
                actions[t] = agent.policy(all_obs[t]).sample()
            obs, reward, terminated, truncated, _ = envs.step(agent.to_env(actions[t]))
            rewards[t] = torch.as_tensor(reward * alive)
            running[t] = torch.as_tensor(alive)
            alive &= ~(terminated | truncated)
            if not alive.any():
                break
        length = t + 1  # of the longest episode
        run.step += length * N  # including the unused steps after the end of shorter episodes
        for episode_return, steps in zip(rewards[:length].sum(0).tolist(), running[:length].sum(0).tolist()):
            run.record_episode(episode_return, steps)

        # 2. compute the returns and the baseline
        valid = running[:length]
        returns = discounted_returns(rewards[:length], args.gamma)
        flat_obs = all_obs[:length][valid]  # (B, D): the B steps of all episodes
        flat_actions = actions[:length][valid]
        flat_returns = returns[valid]
        if args.baseline == "learned":
            baseline = agent.value(flat_obs)
        elif args.baseline == "mean":
            baseline = mean_of_the_others(returns, valid)[valid]
        else:
            baseline = torch.zeros_like(flat_returns)

        # 3. update: one gradient step, then these episodes are used up
        optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - progress)
        loss, metrics = reinforce_loss(agent, flat_obs, flat_actions, flat_returns, baseline, N)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        agent.update_normalizer(flat_obs)  # last, because it changes the policy that acted

        # 4. log
        metrics["train/learning_rate"] = optimizer.param_groups[0]["lr"]
        metrics["time/sps"] = length * N / (time.perf_counter() - start_time)
        run.log(metrics)
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
