"""Tabular Q-learning: learn from every single step what each action is worth in each state.

A table holds, for each state and action, the return to expect from taking that action and only best ones after it.
It starts at zero. Each step moves one entry a little towards the reward plus the discounted value of the best action in
the next state. That target asks for the best next action whatever the agent really does next (off-policy), so the
agent may explore: it behaves ε-greedily, which is to take a random action now and then, and the best one otherwise.
Observations and actions must be Discrete. It runs on the CPU.

    python q_learning.py                                                  # FrozenLake-v1: 0.74 reach the goal
    python q_learning.py --env-kwargs '{"is_slippery": false}'            # 1.00 in 7 s
    python q_learning.py --env-id FrozenLake8x8-v1 --total-timesteps 2e6  # 0.89 to 0.90
    python q_learning.py --env-id Taxi-v4 --eval-episodes 100             # 7.56 on the Deep RL Course's seeds, in 8 s
    python q_learning.py --env-id CliffWalking-v1                         # -13 in 10 s

Sources
    [SB]   Sutton and Barto 2018, Reinforcement Learning: An Introduction, 2nd edition
    [W]    Watkins 1989, Learning from Delayed Rewards, PhD thesis, King's College, Cambridge: the first account

Deviations: ε and the learning rate, which are constant in [SB, §6.5], fall with time, in steps of --num-steps. At every
checkpoint the environment starts afresh, so that a resumed run repeats the uninterrupted one.
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
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
import tyro
from gymnasium.envs.toy_text.frozen_lake import FrozenLakeEnv
from gymnasium.spaces import Discrete
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

# --- config ---


@dataclass
class Args:
    """The flags: first those that all scripts share, then those of this algorithm."""

    env_id: str = "FrozenLake-v1"  # gymnasium id, or package:EnvId to import the package first
    env_kwargs: str = "{}"  # keyword arguments of the environment, as JSON
    seed: int = 1  # seed of the weights, the environments and the sampling
    total_timesteps: int = 500_000  # environment steps, all environments together
    device: str = "auto"  # auto (GPU for pixels, CPU for small networks), cpu, cuda, cuda:1, mps
    num_threads: int = 1  # CPU threads of torch; small networks gain nothing from more than one
    num_checkpoints: int = 20  # times to evaluate and save, evenly over the run
    eval_episodes: int = 1_000  # episodes of the final evaluation; a tenth of them at each checkpoint
    eval_deterministic: bool = True  # evaluate the most likely action instead of a sampled one
    max_eval_steps: int = 1_000  # steps after which an evaluation episode is broken off
    capture_video: bool = False  # film one evaluation episode at each checkpoint
    track: bool = False  # log to Weights & Biases too
    wandb_project_name: str = "solorl"  # project of --track
    wandb_entity: str | None = None  # user or team of --track
    resume: str | None = None  # run folder to continue from its last checkpoint, with its flags

    num_steps: int = 1_000  # steps between two log entries and two values of ε; a run is whole multiples
    learning_rate: float = 0.1  # share of the way that an entry moves towards its target (α)
    anneal_lr: bool = True  # lower the learning rate linearly towards zero
    gamma: float = 0.995  # discount factor
    start_e: float = 1.0  # ε, the probability of a random action, at the start
    end_e: float = 0.1  # ε at the end
    exploration_fraction: float = 0.5  # share of the run in which ε falls linearly from one to the other

    def check(self):
        """Refuse values that do not fit together, before anything is built."""
        if self.total_timesteps < self.num_steps:
            refuse(f"--total-timesteps {self.total_timesteps}: less than the {self.num_steps} of --num-steps")
        for name in ("learning_rate", "gamma", "start_e", "end_e", "exploration_fraction"):
            if getattr(self, name) > 1:
                refuse(f"--{name.replace('_', '-')} {getattr(self, name)}: must be at most 1")


# --- environment ---


def make_envs(args: Args, num_envs: int, evaluation: bool = False, render: bool = False) -> VectorEnv:
    """`num_envs` copies of the environment, states and actions numbered from 0.

    Evaluation resets an ended episode at the next step, so that render() still shows the end.
    """

    def make_env():
        """One environment, its spaces checked and numbered from 0."""
        render_mode = {"render_mode": "rgb_array"} if render else {}  # not every environment takes it
        env = gym.make(args.env_id, **render_mode, **json.loads(args.env_kwargs))
        states, actions = env.observation_space, env.action_space
        for space in (states, actions):
            if not isinstance(space, Discrete):
                refuse(f"--env-id {args.env_id}: a table has no place for {space}, see reinforce.py and ppo.py")
        if states.start != 0:
            env = gym.wrappers.TransformObservation(env, lambda state: state - states.start, Discrete(states.n))
        if actions.start != 0:
            env = gym.wrappers.TransformAction(env, lambda action: action + actions.start, Discrete(actions.n))
        return env if evaluation else gym.wrappers.RecordEpisodeStatistics(env)

    mode = AutoresetMode.NEXT_STEP if evaluation else AutoresetMode.SAME_STEP
    return SyncVectorEnv([make_env] * num_envs, autoreset_mode=mode)


# --- network ---


class Agent(nn.Module):
    """A table in place of a network: the value of each action (column) in each state (row)."""

    def __init__(self, envs: VectorEnv, args: Args):
        super().__init__()
        shape = int(envs.single_observation_space.n), int(envs.single_action_space.n)
        self.q_values = nn.Parameter(torch.zeros(shape), requires_grad=False)
        self.epsilon = args.end_e

    def act(self, obs, deterministic: bool) -> np.ndarray:
        """Actions (N,) in the states `obs` (N,): the best ones, or ε-greedy with the last ε of training."""
        values = self.q_values[obs.long()]
        if deterministic:
            return values.argmax(-1).cpu().numpy()
        return np.array([epsilon_greedy(row, self.epsilon) for row in values.tolist()])


# --- algorithm ---


def linear_schedule(start: float, end: float, progress: float) -> float:
    """A straight line from `start` at progress 0 to `end` at progress 1, and constant from there."""
    return start + (end - start) * min(progress, 1)


def epsilon_greedy(action_values: list[float], epsilon: float) -> int:
    """A random action with probability ε, else one of the best: a zero table must not favour the first action."""
    if random.random() < epsilon:
        return random.randrange(len(action_values))
    best = max(action_values)
    return random.choice([action for action, value in enumerate(action_values) if value == best])


def td_error(value: float, reward: float, next_action_values: list[float], terminated: bool, gamma: float) -> float:
    """How far the value of an action is from the reward and what follows, if the best action follows.

    Nothing follows once the episode has terminated. If it was truncated, it could have gone on.
    """
    target = reward + gamma * max(next_action_values) * (not terminated)
    return target - value  # [SB, Eq. 6.8]


# --- training ---


def train(args: Args) -> Path:
    """Train one agent, evaluate it, and return the run folder."""
    torch.set_num_threads(args.num_threads)
    envs = open_envs(args, num_envs=1)
    if pick_device(args.device, envs.single_observation_space).type != "cpu":
        refuse(f"--device {args.device}: only the CPU is quick at reading single numbers from a table")
    agent = Agent(envs, args)
    q_values = agent.q_values.numpy()  # the same memory, and much faster to read and write

    with Run(args, args.num_steps, agent=agent) as run:
        while run.step < run.last_step:
            if run.step >= run.next_cut:  # evaluate, save, start a fresh environment
                envs, obs = run.cut(envs)
                env, state = envs.envs[0], obs[0]  # stepped directly: a vector of one would double the time
            start_time, progress = time.perf_counter(), run.step / run.last_step
            epsilon = linear_schedule(args.start_e, args.end_e, progress / args.exploration_fraction)
            learning_rate = args.learning_rate * (1 - progress if args.anneal_lr else 1)
            errors = []
            for _ in range(args.num_steps):
                # 1. act
                action = epsilon_greedy(q_values[state].tolist(), epsilon)
                next_state, reward, terminated, truncated, info = env.step(action)
                run.step += 1

                # 2. learn
                next_action_values = q_values[next_state].tolist()
                error = td_error(q_values[state, action], reward, next_action_values, terminated, args.gamma)
                q_values[state, action] += learning_rate * error  # [SB, Eq. 6.8]
                errors.append(error)

                # 3. go on, in a new episode where this one is over
                state = next_state
                if terminated or truncated:
                    run.record(state, reward, info)
                    state, _ = env.reset()

            # 4. log
            metrics = {"loss/td": np.abs(errors).mean(), "train/q_value": q_values.max(axis=1).mean()}
            metrics |= {"train/epsilon": epsilon, "train/learning_rate": learning_rate}
            metrics["time/sps"] = args.num_steps / (time.perf_counter() - start_time)
            run.log(metrics)
        run.finish(envs)
    show_policy(args, q_values, run.folder)
    return run.folder


def show_policy(args: Args, q_values: np.ndarray, folder: Path):
    """Draw the best action in each state over FrozenLake's map, in the terminal and as policy.png."""
    env = make_envs(args, num_envs=1).envs[0].unwrapped
    if not isinstance(env, FrozenLakeEnv):
        return
    lake = env.desc.astype(str)  # (rows, columns) of letters: S start, F frozen, H hole, G goal
    is_end = np.isin(lake, ["H", "G"])
    arrows = np.array([*"←↓→↑"])[q_values.argmax(axis=1)]  # actions are 0 left, 1 down, 2 right, 3 up
    arrows[np.ptp(q_values, axis=1) == 0] = "."  # nothing learned there
    letters = np.where(is_end, lake, arrows.reshape(lake.shape))

    from matplotlib.figure import Figure

    figure = Figure(figsize=(lake.shape[1] + 1.5, lake.shape[0]), layout="constrained")
    axes = figure.subplots()
    values = np.ma.array(q_values.max(axis=1).reshape(lake.shape), mask=is_end)
    figure.colorbar(axes.imshow(values, cmap="YlGn", alpha=0.7), label="value of the best action")
    for (y, x), letter in np.ndenumerate(letters):
        axes.text(x, y, letter, ha="center", va="center", fontsize=20)
    axes.set(xticks=[], yticks=[], facecolor="lightsteelblue")
    figure.savefig(folder / "policy.png", dpi=120)
    for row in letters:
        print(" ", *(letter.translate(str.maketrans("←↓→↑", "<v>^")) for letter in row))  # fit for any terminal


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
