"""Double deep Q-learning (Double DQN) from the pixels of Atari games.

The best of several uncertain values is more likely overestimated than underestimated, and DQN bootstraps from the best.
Double DQN lets one network choose the action and the other value it. Nothing else is different from dqn_atari.py:
`diff dqn_atari.py ddqn_atari.py` is the lesson.

    python ddqn_atari.py                                          # Breakout, 10 M steps: not measured yet
    python ddqn_atari.py --env-id PongNoFrameskip-v4 --total-timesteps 6e5 --buffer-size 2e5 --learning-starts 10000 \
        --train-frequency 2 --num-threads 1                       # -7.1 ± 5.7 in 114 min, and still rising
    python ddqn_atari.py --env-id SpaceInvadersNoFrameskip-v4 --total-timesteps 6e5 --buffer-size 2e5 \
        --learning-starts 10000 --num-threads 1                   # 597 ± 180 in 79 min

A step is four frames. The replay holds each screen once, a byte a pixel: 7.1 GB for a million steps. It is not part of
the checkpoint: a resumed run fills a new one before it learns on, and so is not exactly the uninterrupted one, except
with --save-replay.

Papers
    [DDQN] van Hasselt, Guez, Silver 2015, Deep Reinforcement Learning with Double Q-learning, arXiv:1509.06461
    [DQN]  Mnih et al. 2015, Human-level control through deep reinforcement learning, Nature 518

Deviations: Adam instead of RMSprop; exploration ends at 1 % random actions after a tenth of the run, as in later work,
and so does evaluation (the paper: 10 % and 5 %); the target network follows every 1,000 steps instead of every 40,000;
all but the last layer is computed in bfloat16 where the hardware does; games that wait for the fire button are
started with it; the last step of a game that is broken off is not learned from, as the screen after it is not in the
replay; at every checkpoint the environments start afresh.
"""

import copy
import gc
import importlib
import json
import math
import os
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
import psutil
import torch
import tyro
from ale_py.vector_env import AtariVectorEnv
from gymnasium.vector import AutoresetMode, VectorEnv, VectorWrapper
from torch import nn
from torch.utils._pytree import tree_map
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

# --- config ---

HAS_BFLOAT16 = torch.cpu.get_capabilities().get("avx512_bf16", False)
if torch.cuda.is_available():  # then what the GPU has counts, for --device cpu too
    HAS_BFLOAT16 = torch.cuda.is_bf16_supported(including_emulation=False)


@dataclass
class Args:
    """The flags: first those that all scripts share, then those of this algorithm."""

    env_id: str = "BreakoutNoFrameskip-v4"  # gymnasium id, or package:EnvId to import the package first
    env_kwargs: str = "{}"  # keyword arguments of the environment, as JSON
    seed: int = 1  # seed of the weights, the environments and the sampling
    total_timesteps: int = 10_000_000  # environment steps, all environments together
    device: str = "auto"  # auto (GPU for pixels, CPU for small networks), cpu, cuda, cuda:1, mps
    num_threads: int = os.cpu_count() or 1  # CPU threads of torch; small networks gain nothing from more than one
    num_checkpoints: int = 20  # times to evaluate and save, evenly over the run
    eval_episodes: int = 100  # episodes of the final evaluation; a tenth of them at each checkpoint
    eval_deterministic: bool = False  # evaluate the most likely action instead of a sampled one
    max_eval_steps: int = 27_000  # steps after which an evaluation episode is broken off
    capture_video: bool = False  # film one evaluation episode at each checkpoint
    track: bool = False  # log to Weights & Biases too
    wandb_project_name: str = "solorl"  # project of --track
    wandb_entity: str | None = None  # user or team of --track
    resume: str | None = None  # run folder to continue from its last checkpoint, with its flags

    num_envs: int = 16  # parallel environments (N)
    episodic_life: bool = True  # in training a lost life ends the return, though the game goes on
    bfloat16: bool = HAS_BFLOAT16  # compute all but the last layer in bfloat16; on where the hardware does
    compile: bool = False  # compile the network first, which takes a minute; for long runs on a GPU
    learning_rate: float = 1e-4  # of Adam
    gamma: float = 0.99  # discount factor
    buffer_size: int = 1_000_000  # steps that the replay holds, 7 kB each
    replay_on_device: bool = True  # keep the replay on the training device, not in main memory
    save_replay: bool = False  # write the replay into the checkpoint, so that a resumed run is exact
    learning_starts: int = 80_000  # steps in the replay before learning starts
    batch_size: int = 32  # steps in a minibatch (B)
    train_frequency: int = 4  # steps for each gradient step
    target_network_frequency: int = 1_000  # steps from one update of the target network to the next
    start_e: float = 1.0  # ε, the probability of a random action, at the start
    end_e: float = 0.01  # ε at the end
    exploration_fraction: float = 0.1  # share of the run in which ε falls linearly from one to the other
    eval_epsilon: float = 0.01  # ε in evaluation
    log_interval: int = 1_000  # steps from one log entry to the next, which holds their means

    def check(self):
        """Refuse values that do not fit together, before anything is built."""
        for name in ("gamma", "start_e", "end_e", "exploration_fraction", "eval_epsilon"):
            if getattr(self, name) > 1:
                refuse(f"--{name.replace('_', '-')} {getattr(self, name)}: must be at most 1")
        if self.learning_starts < 8 * self.num_envs:
            refuse(f"--learning-starts {self.learning_starts}: must be at least 8 * --num-envs")
        if self.buffer_size < self.learning_starts + self.num_envs:
            refuse(f"--buffer-size {self.buffer_size}: must be --learning-starts + --num-envs or more")
        if self.num_checkpoints * self.num_envs * 2 > self.total_timesteps:
            refuse(f"--num-checkpoints {self.num_checkpoints}: leaves less than 2 * --num-envs steps between two")
        if self.total_timesteps <= self.learning_starts:
            refuse(f"--total-timesteps {self.total_timesteps}: must be above --learning-starts {self.learning_starts}")


# --- environment ---


class AtariGames(VectorWrapper):
    """AtariVectorEnv that reports like any other vector environment: an episode is a game, its return the raw score.

    Training sees the sign of each reward [DQN, Methods]. With a `camera`, a second AtariVectorEnv in colour that is
    given the same seeds and actions, there is something to render.
    """

    def __init__(self, envs: AtariVectorEnv, training: bool, camera: AtariVectorEnv | None):
        super().__init__(envs)
        self.training, self.camera, self.metadata = training, camera, envs.metadata | {"render_fps": 15}

    def reset(self, *, seed=None, options=None):
        """Start new games; `seed` is an int or one int per environment."""
        seed = np.array(seed) if isinstance(seed, list) else seed
        obs, infos = self.env.reset(seed=seed)
        self.score, self.length = np.zeros(self.num_envs), np.zeros(self.num_envs, int)
        self.frame_number = infos["episode_frame_number"]
        self.frames = self.camera.reset(seed=seed)[0] if self.camera else None
        return obs, infos

    def send(self, action):
        """Begin a step, which the games play in threads of their own."""
        self.env.send(action)
        self.frames = self.camera.step(action)[0] if self.camera else None

    def step(self, action):
        """A whole step, see `recv`."""
        self.send(action)
        return self.recv()

    def recv(self):
        """The end of a step, as AtariVectorEnv; infos["episode"] has score and length of the games that ended here."""
        obs, reward, terminated, truncated, infos = self.env.recv()
        self.score, self.length = self.score + reward, self.length + 1
        # A lost life is reported as `terminated` too, but only after the end of a game are its frames counted anew.
        restarted = infos["episode_frame_number"] < self.frame_number
        over = truncated | terminated & (restarted | (not self.training))
        if over.any():
            infos |= {"episode": {"r": self.score, "l": self.length}, "_episode": over}
        self.score, self.length = self.score * ~over, self.length * ~over
        self.frame_number = infos["episode_frame_number"]
        return obs, np.sign(reward) if self.training else reward, terminated, truncated, infos

    def render(self):
        """The screen (210, 160, 3) uint8 of each game."""
        return list(self.frames[:, -1])


def make_envs(args: Args, num_envs: int, evaluation: bool = False, render: bool = False) -> VectorEnv:
    """`num_envs` games whose observations are the last four screens, (4, 84, 84) uint8.

    Training restarts an ended game within the step; infos["final_obs"] then holds the true last observation.
    Evaluation restarts at the next step, plays whole games, and shows raw rewards.
    """
    package, _, env_id = args.env_id.rpartition(":")
    importlib.import_module(package or "ale_py")
    spec = gym.spec(env_id)
    if spec.entry_point != "ale_py.env:AtariEnv" or spec.kwargs["frameskip"] not in (1, 4):
        refuse(f"--env-id {args.env_id}: neither ALE/...-v5 nor ...NoFrameskip-v4, the Atari games; others: ppo.py")
    game = {"repeat_action_probability": spec.kwargs["repeat_action_probability"]} | json.loads(args.env_kwargs)
    fixed = {"game": spec.kwargs["game"], "num_envs": num_envs, "reward_clipping": False, "episodic_life": False}
    fixed |= {"autoreset_mode": AutoresetMode.NEXT_STEP if evaluation else AutoresetMode.SAME_STEP}
    fixed |= {"batch_size": 0, "continuous": False}
    envs = AtariVectorEnv(**game, **fixed, life_loss_info=args.episodic_life and not evaluation)
    stack, *screen = envs.single_observation_space.shape
    if stack < 1 or screen != [84, 84]:
        refuse(f"--env-kwargs '{args.env_kwargs}': the network is made for one or more grey screens of 84 x 84 pixels")
    colour = {"grayscale": False, "img_height": 210, "img_width": 160, "stack_num": 1}
    return AtariGames(envs, not evaluation, AtariVectorEnv(**game | colour, **fixed) if render else None)


# --- network ---


class Agent(nn.Module):
    """The Q-network [DQN, Methods], and how it acts: the best action, or with probability ε a random one."""

    def __init__(self, envs: VectorEnv, args: Args):
        super().__init__()
        self.bfloat16, self.eval_epsilon = args.bfloat16, args.eval_epsilon
        self.num_actions = int(envs.single_action_space.n)
        self.network = nn.Sequential(
            nn.Conv2d(envs.single_observation_space.shape[0], 32, 8, stride=4),
            nn.ReLU(),
            nn.Conv2d(32, 64, 4, stride=2),
            nn.ReLU(),
            nn.Conv2d(64, 64, 3, stride=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(64 * 7 * 7, 512),
            nn.ReLU(),
        )
        self.head = nn.Linear(512, self.num_actions)

    def forward(self, obs):
        """The Q-values (N, A) float32 of the actions in `obs` (N, 4, 84, 84) uint8."""
        with torch.autocast(obs.device.type, torch.bfloat16, enabled=self.bfloat16):
            hidden = self.network(obs.to(torch.bfloat16 if self.bfloat16 else torch.float32) / 255)
        return self.head(hidden.float())

    @torch.no_grad()
    def best_action(self, obs):
        """The action (N,) int64 of the highest value in each of `obs` (N, 4, 84, 84) uint8."""
        return self(obs).argmax(-1)

    def explore(self, action, epsilon: float) -> np.ndarray:
        """Actions for the environment: `action` (N,) int64, but with probability ε each a random one."""
        exploring = np.random.rand(len(action)) < epsilon
        return np.where(exploring, np.random.randint(self.num_actions, size=len(action)), action.cpu().numpy())

    def act(self, obs, deterministic: bool) -> np.ndarray:
        """Actions for the environment from `obs` (N, 4, 84, 84) uint8: the best ones, or ε-greedy ones."""
        return self.explore(self.best_action(obs), 0 if deterministic else self.eval_epsilon)


# --- algorithm ---


class Replay:
    """The last steps of N environments in a ring of C rows; a row holds step t of all of them [DQN, Methods].

    Of an observation only the newest screen is stored; the others are in the rows before it. `age` tells how many of
    them belong to the same game, the rest are black.
    """

    columns = ("frames", "action", "reward", "terminated", "truncated", "age")

    def __init__(self, buffer_size: int, num_envs: int, obs_shape: tuple, device):
        self.stack, *screen = obs_shape
        self.num_rows, self.size, self.next_row = buffer_size // num_envs, 0, 0
        self.new_game = np.ones(num_envs, dtype=bool)
        size = (self.num_rows, num_envs)
        self.frames = torch.empty(*size, *screen, dtype=torch.uint8, device=device)  # main memory is taken as it fills
        self.action = torch.zeros(size, dtype=torch.int64)
        self.reward = torch.zeros(size)
        self.terminated, self.truncated = torch.zeros(2, *size, dtype=torch.bool)
        self.age = torch.zeros(size, dtype=torch.int64)

    def add(self, obs, action, reward, terminated, truncated, new_game):
        """One step of all environments. `new_game` (N,): the observation after it is the first of another game."""
        row, age = self.next_row, self.age[self.next_row - 1] + 1
        self.frames[row] = torch.as_tensor(obs[:, -1])
        self.age[row] = age.clamp(max=self.stack - 1) * ~torch.as_tensor(self.new_game)
        self.action[row], self.reward[row] = torch.as_tensor(action), torch.as_tensor(reward)
        self.terminated[row] = torch.as_tensor(terminated)
        self.truncated[row] = torch.as_tensor(truncated & ~terminated)
        self.new_game = new_game
        self.next_row, self.size = (row + 1) % self.num_rows, min(self.size + 1, self.num_rows)

    def break_off(self):
        """The environments start afresh: what they would have shown next will never be known."""
        self.truncated[self.next_row - 1] = ~self.terminated[self.next_row - 1]
        self.new_game = np.ones_like(self.new_game)

    def state_dict(self) -> dict:
        """What --save-replay adds to the checkpoint: the rows in use."""
        rows = {name: getattr(self, name) for name in self.columns}
        if self.size < self.num_rows:
            rows = {name: column[: self.size].clone() for name, column in rows.items()}
        return rows | {"size": self.size, "next_row": self.next_row}

    def load_state_dict(self, state: dict):
        """The inverse, for a replay of the same size."""
        self.size, self.next_row = state["size"], state["next_row"]
        for name in self.columns:
            getattr(self, name)[: self.size] = state[name]

    def sample(self, batch_size: int) -> tuple:
        """A random minibatch: obs (B, 4, 84, 84) uint8, action, reward, next_obs, terminated (B,).

        Left out are the newest row, whose successor is yet to come, truncated steps, and in a full ring the oldest
        rows, of which earlier screens are overwritten.
        """
        first = self.next_row + self.stack - 1 if self.size == self.num_rows else 0
        count = self.size - 1 - (self.stack - 1) * (self.size == self.num_rows)

        def draw(n):
            """n random steps: their rows and environments."""
            return (first + torch.randint(count, (n,))) % self.num_rows, torch.randint(self.age.shape[1], (n,))

        row, env = draw(batch_size)
        while (bad := self.truncated[row, env]).any():
            row[bad], env[bad] = draw(int(bad.sum()))
        device, back = self.frames.device, torch.arange(self.stack - 1, -2, -1)  # 3, 2, 1, 0, and -1 for the next
        rows = (row[:, None] - back) % self.num_rows
        screens = self.frames[rows.to(device), env[:, None].to(device)]
        screens *= (self.age[row, env][:, None] >= back).to(device)[..., None, None]
        action, reward, terminated = (x[row, env].to(device) for x in (self.action, self.reward, self.terminated))
        return screens[:, :-1], action, reward, screens[:, 1:], terminated


def td_target(agent, target_network, reward, next_obs, terminated, gamma):
    """What the value of an action should have been, (B,): the reward and the value of the best action after it.

    The agent's network says which action is best, the target network what it is worth.
    """
    best_action = agent(next_obs).argmax(-1, keepdim=True)
    next_value = target_network(next_obs).gather(-1, best_action).squeeze(-1)  # [DDQN, Double DQN]
    return reward + gamma * next_value * ~terminated  # [DQN, Algorithm 1]


def dqn_loss(agent, target_network, obs, action, reward, next_obs, terminated, gamma):
    """The loss of one minibatch, every tensor (B, ...), and a dict of scalar tensors worth logging."""
    with torch.no_grad():
        target = td_target(agent, target_network, reward, next_obs, terminated, gamma)
    q_value = agent(obs).gather(-1, action[:, None]).squeeze(-1)
    loss = nn.functional.huber_loss(q_value, target)  # errors beyond 1 count linearly [DQN, Methods]
    return loss, {"loss/td": loss.detach(), "train/q_value": q_value.detach().mean()}


def linear_schedule(start: float, end: float, progress: float) -> float:
    """A straight line from `start` at progress 0 to `end` at progress 1, and constant from there."""
    return start + (end - start) * min(progress, 1)


# --- training ---


def make_replay(args: Args, obs_shape: tuple, device: torch.device) -> Replay:
    """An empty replay, unless the memory it will take is not free."""
    place = device if args.replay_on_device else torch.device("cpu")
    needed = args.buffer_size * math.prod(obs_shape[1:]) * (2 if args.save_replay else 1)  # a copy while it is saved
    free = torch.cuda.mem_get_info(place)[0] if place.type == "cuda" else psutil.virtual_memory().available
    if needed + 5e8 > free:  # the rest of the program takes about as much
        other = ", or --no-replay-on-device" if place.type != "cpu" else ""
        room = f"{needed / 1e9:.1f} GB do not fit into {free / 1e9:.1f} GB of free memory"
        refuse(f"--buffer-size {args.buffer_size}: {room}; take a smaller one{other}")
    print(f"the replay will take {needed / 1e9:.1f} GB of {free / 1e9:.1f} GB of free memory", file=sys.stderr)
    return Replay(args.buffer_size, args.num_envs, obs_shape, place)


def train(args: Args) -> Path:
    """Train one agent, evaluate it, and return the run folder."""
    torch.set_num_threads(args.num_threads)
    envs = open_envs(args, args.num_envs)
    device = pick_device(args.device, envs.single_observation_space)
    seed_everything(args.seed)
    agent = Agent(envs, args).to(device)
    target_network = copy.deepcopy(agent)
    optimizer = torch.optim.Adam(list(agent.parameters()), lr=args.learning_rate, fused=True)
    best_action, loss_function = (compiled(function, args, device) for function in (agent.best_action, dqn_loss))
    replay = make_replay(args, envs.single_observation_space.shape, device)
    parts = {"agent": agent, "target_network": target_network, "optimizer": optimizer}
    parts |= {"replay": replay} if args.save_replay else {}

    with Run(args, args.num_envs, **parts) as run:
        while run.step < run.last_step:
            if run.step >= run.next_cut:  # evaluate, save, start fresh environments
                envs, obs = run.cut(envs)
                replay.break_off()
                history, start, start_time = [], run.step, time.perf_counter()

            # 1. act: N environments begin a step
            progress = run.step / run.last_step
            epsilon = linear_schedule(args.start_e, args.end_e, progress / args.exploration_fraction)
            action = agent.explore(best_action(torch.as_tensor(obs, device=device)), epsilon)
            envs.send(action)
            last_step, run.step = run.step, run.step + args.num_envs

            # 2. learn, while they are at work: a gradient step every few environment steps
            updates = run.step // args.train_frequency - last_step // args.train_frequency
            if updates and replay.size * args.num_envs >= args.learning_starts:
                batch = [x.to(device).chunk(updates) for x in replay.sample(updates * args.batch_size)]
                for minibatch in zip(*batch):
                    loss, metrics = loss_function(agent, target_network, *minibatch, args.gamma)
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    history.append(metrics)
            if run.step // args.target_network_frequency > last_step // args.target_network_frequency:
                target_network.load_state_dict(agent.state_dict())

            # 3. remember: the step is over
            next_obs, reward, terminated, truncated, infos = envs.recv()
            new_game = infos.get("_episode", np.zeros(args.num_envs, dtype=bool))
            replay.add(obs, action, reward, terminated, truncated, new_game)
            obs = next_obs
            run.record(obs, reward, infos)

            # 4. log: losses are means since the last time
            if run.step - start >= args.log_interval or run.step >= min(run.next_cut, run.last_step):
                names = history[0] if history else ()
                metrics = {name: torch.stack([m[name] for m in history]).mean().item() for name in names}
                metrics |= {"train/epsilon": epsilon, "train/learning_rate": args.learning_rate}
                metrics["time/sps"] = (run.step - start) / (time.perf_counter() - start_time)
                run.log(metrics)
                history, start, start_time = [], run.step, time.perf_counter()
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
