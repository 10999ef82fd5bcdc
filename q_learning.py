"""Tabular Q-learning: after every step, improve the estimate of what that action is worth in that state.

The table holds the return to expect from each action in each state, if the agent acts greedily afterwards. Each step
moves one entry a little towards the reward plus the discounted value of the best action in the next state. The agent
mostly takes the best action it knows, and sometimes a random one, to explore (ε-greedy). Observations and actions must
be Discrete.

    python q_learning.py                                                        # FrozenLake-v1
    python q_learning.py --env-kwargs '{"is_slippery": false}'
    python q_learning.py --env-id FrozenLake8x8-v1 --total-timesteps 2_000_000
    python q_learning.py --env-id Taxi-v4 --eval-episodes 100
    python q_learning.py --env-id CliffWalking-v1

Sources
    [SB]   Sutton and Barto 2018, Reinforcement Learning: An Introduction, 2nd edition

Deviations: ε and the learning rate decrease over time; in [SB, §6.5] they are constant; the environment starts anew at
each checkpoint.
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

import gymnasium as gym
import imageio
import numpy as np
import torch
import tyro
from gymnasium.spaces import Discrete
from gymnasium.vector import AutoresetMode, VectorEnv
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

# --- config ---


@dataclass
class Args:
    """Command-line flags: first those that every script has, then those of this algorithm."""

    env_id: str = "FrozenLake-v1"  # gymnasium id, or package:EnvId to import the package first
    env_kwargs: str = "{}"  # keyword arguments of the environment, as JSON
    seed: int = 1  # seed of the weights, the environments and the sampling
    total_timesteps: int = 500_000  # environment steps, summed over all environments
    device: str = "cpu"  # cpu, the only device on which reading single numbers from a table is fast
    num_threads: int = 1  # CPU threads used by torch
    num_checkpoints: int = 20  # at most this many checkpoints and evaluations, evenly over the run
    eval_episodes: int = 1_000  # episodes of the final evaluation; a tenth of them at each checkpoint
    eval_deterministic: bool = True  # evaluate with the most likely or best action, not with a random one
    max_eval_steps: int = 1_000  # an evaluation episode is stopped after this many steps
    capture_video: bool = False  # record an evaluation episode at each checkpoint
    track: bool = False  # log to Weights & Biases as well as TensorBoard
    wandb_project_name: str = "solorl"  # wandb project of --track
    wandb_entity: str | None = None  # wandb user or team of --track
    resume: str | None = None  # run folder to continue from its last checkpoint

    num_steps: int = 1_000  # steps between two log entries; ε and the learning rate change that often, too
    learning_rate: float = 0.1  # how far a value moves towards its target (α)
    anneal_lr: bool = True  # decrease the learning rate linearly to zero
    gamma: float = 0.995  # discount factor
    start_e: float = 1.0  # ε, the probability of a random action, at the start
    end_e: float = 0.1  # ε at the end
    exploration_fraction: float = 0.5  # fraction of the run in which ε falls linearly from start_e to end_e

    def check(self):
        """Refuse values that do not fit together."""
        if max(self.learning_rate, self.gamma, self.start_e, self.end_e) > 1 or not 0 < self.exploration_fraction <= 1:
            fail("--learning-rate, --gamma, --start-e, --end-e, --exploration-fraction: at most 1, the last above 0")
        if self.device != "cpu":
            fail(f"--device {self.device}: only cpu; reading single numbers from a table is slow elsewhere")


# --- environment ---


def number_from_zero(env: gym.Env) -> gym.Env:
    """`env` with states and actions 0, 1, 2, ..., which are rows and columns of the table."""
    states, actions = env.observation_space, env.action_space
    if not isinstance(states, Discrete) or not isinstance(actions, Discrete):
        fail(f"observations {states} and actions {actions} do not fit a table; see reinforce.py and ppo.py")
    env = gym.wrappers.TransformObservation(env, lambda state: int(state - states.start), Discrete(states.n))
    return gym.wrappers.TransformAction(env, lambda action: action + actions.start, Discrete(actions.n))


def make_envs(args: Args, num_envs: int, evaluation: bool = False, render: bool = False) -> VectorEnv:
    """`num_envs` copies of the environment. In evaluation an ended episode is reset only at the next step."""
    return gym.make_vec(
        args.env_id,
        num_envs,
        vectorization_mode="sync",
        vector_kwargs={"autoreset_mode": AutoresetMode.NEXT_STEP if evaluation else AutoresetMode.SAME_STEP},
        wrappers=[number_from_zero],
        **({"render_mode": "rgb_array"} if render else {}),
        **json.loads(args.env_kwargs),
    )


# --- network ---


class Agent(nn.Module):
    """A table instead of a network: the value of each action (column) in each state (row)."""

    def __init__(self, envs: VectorEnv, args: Args):
        super().__init__()
        shape = int(envs.single_observation_space.n), int(envs.single_action_space.n)
        self.q_values = nn.Parameter(torch.zeros(shape), requires_grad=False)
        self.epsilon = args.end_e

    def act(self, obs, deterministic: bool) -> np.ndarray:
        """Actions (N,) in the states `obs` (N,): the best ones, or ε-greedy ones with --end-e as ε."""
        action_values = self.q_values[obs.long()].tolist()  # N lists
        if deterministic:
            return np.argmax(action_values, axis=-1)
        return np.array([epsilon_greedy(values, self.epsilon) for values in action_values])


# --- algorithm ---


def epsilon_greedy(action_values: list[float], epsilon: float) -> int:
    """A random action with probability ε, else the best one. Ties are broken at random: all are 0 at the start."""
    if random.random() < epsilon:
        return random.randrange(len(action_values))
    best = max(action_values)
    return random.choice([action for action, value in enumerate(action_values) if value == best])


def td_error(value: float, reward: float, next_action_values: list[float], terminated: bool, gamma: float) -> float:
    """How far `value` is below its target: the reward plus the discounted value of the best next action.

    A terminated episode has no next value. A truncated one would have gone on, so it keeps the next value.
    """
    target = reward + gamma * max(next_action_values) * (not terminated)
    return target - value  # [SB, Eq. 6.8]


# --- training ---


def train(args: Args) -> Path:
    """Train an agent, evaluate it, and return the run folder."""
    torch.set_num_threads(args.num_threads)
    envs = open_envs(args, num_envs=1)
    agent = Agent(envs, args)
    q_values = agent.q_values.numpy()  # the same memory, but faster to read and write
    run = Run(args, agent=agent)

    while run.step < args.total_timesteps:
        if run.step >= run.next_checkpoint:  # at once at the start
            run.save_checkpoint()
            envs.close()  # a resumed run has to start a new environment; to get the same result, every run does
            envs = open_envs(args, num_envs=1)
            env = envs.envs[0]  # used directly: a vector of one takes twice the time
            state, _ = env.reset(seed=seed_everything(args.seed, run.step))
            episode_return = 0.0
            length = 0
        progress = run.step / args.total_timesteps
        epsilon = args.start_e + (args.end_e - args.start_e) * min(1, progress / args.exploration_fraction)
        learning_rate = args.learning_rate * (1 - progress if args.anneal_lr else 1)
        errors = []
        start_time = time.perf_counter()
        for _ in range(args.num_steps):
            # 1. act
            action = epsilon_greedy(q_values[state].tolist(), epsilon)
            next_state, reward, terminated, truncated, _ = env.step(action)
            run.step += 1

            # 2. learn
            next_action_values = q_values[next_state].tolist()
            error = td_error(q_values[state, action], reward, next_action_values, terminated, args.gamma)
            q_values[state, action] += learning_rate * error  # [SB, Eq. 6.8]
            errors.append(error)

            # 3. go on, in a new episode if this one is over
            state = next_state
            episode_return += reward
            length += 1
            if terminated or truncated:
                run.record_episode(episode_return, length)
                state, _ = env.reset()
                episode_return = 0.0
                length = 0

        # 4. log
        metrics = {"loss/td": np.abs(errors).mean(), "train/q_value": q_values.max(axis=1).mean()}
        metrics |= {"train/epsilon": epsilon, "train/learning_rate": learning_rate}
        metrics["time/sps"] = args.num_steps / (time.perf_counter() - start_time)
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
