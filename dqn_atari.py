"""Deep Q-learning (DQN) from the pixels of Atari games.

Q-learning with a convolutional network in place of the table. Two ideas make it stable: minibatches are drawn at random
from a replay of past steps, and the targets come from a second network, a copy that is updated only now and then. Many
games are played at once, but there is still one gradient step every --train-frequency steps.
`diff dqn_atari.py ddqn_atari.py` is the lesson on Double DQN.

    python dqn_atari.py                                           # Breakout, 10 M steps: not measured yet
    python dqn_atari.py --env-id PongNoFrameskip-v4 --total-timesteps 1_000_000 --buffer-size 200_000 \
        --learning-starts 10_000 --learning-rate 2.5e-4 --anneal-last 0.5 --train-frequency 3 --num-checkpoints 10 \
        --num-threads 1
    python dqn_atari.py --env-id SpaceInvadersNoFrameskip-v4 --total-timesteps 600_000 --buffer-size 200_000 \
        --learning-starts 10_000 --learning-rate 2.5e-4 --anneal-last 0.5 --num-threads 1

One step is four frames. The replay takes 7.1 GB of memory for a million steps. It is not in the checkpoint, unless you
add --save-replay: without it, a resumed run first fills a new replay.

Papers
    [DQN] Mnih et al. 2015, Human-level control through deep reinforcement learning, Nature 518
    [37]  Huang et al. 2022, The 37 Implementation Details of Proximal Policy Optimization, ICLR blog

Deviations: Adam instead of RMSprop; orthogonal initial weights, without which Pong was not learned in 160,000 steps;
ε falls in the first tenth of the run, to 0.01 instead of 0.1; the target network is updated every 1,000 steps instead
of 40,000; the network computes in bfloat16 if the CPU has AVX512-BF16; games start with the fire button; the last step
of a truncated game is not learned from, because the replay lacks the screen that follows; the games start anew at each
checkpoint, so take few of them where games are long (--num-checkpoints).
"""

import importlib
import json
import math
import os
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
import psutil
import torch
import tyro
from ale_py.vector_env import AtariVectorEnv
from gymnasium.vector import AutoresetMode, VectorEnv, VectorWrapper
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

# --- config ---


@dataclass
class Args:
    """Command-line flags: first those that every script has, then those of this algorithm."""

    env_id: str = "BreakoutNoFrameskip-v4"  # gymnasium id, or package:EnvId to import the package first
    env_kwargs: str = "{}"  # keyword arguments of the environment, as JSON
    seed: int = 1  # seed of the weights, the environments and the sampling
    total_timesteps: int = 10_000_000  # environment steps, summed over all environments
    device: str = "auto"  # auto (the GPU if there is one), cpu, cuda, cuda:1 or mps
    num_threads: int = os.cpu_count() or 1  # CPU threads used by torch
    num_checkpoints: int = 20  # at most this many checkpoints and evaluations, evenly over the run
    eval_episodes: int = 100  # episodes of the final evaluation; a tenth of them at each checkpoint
    eval_deterministic: bool = False  # evaluate with the most likely or best action, not with a random one
    max_eval_steps: int = 27_000  # an evaluation episode is stopped after this many steps
    capture_video: bool = False  # record an evaluation episode at each checkpoint
    track: bool = False  # log to Weights & Biases as well as TensorBoard
    wandb_project_name: str = "solorl"  # wandb project of --track
    wandb_entity: str | None = None  # wandb user or team of --track
    resume: str | None = None  # run folder to continue from its last checkpoint

    num_envs: int = 16  # parallel environments (N)
    episodic_life: bool = True  # in training, a lost life ends the episode
    bfloat16: bool = torch.cpu.get_capabilities().get("avx512_bf16", False)  # all but the last layer in bfloat16
    compile: bool = False  # compile the network, which takes a minute; for long runs on a GPU
    learning_rate: float = 1e-4  # of Adam
    anneal_last: float = 0.0  # last fraction of the run, in which the learning rate falls linearly to zero
    gamma: float = 0.99  # discount factor
    buffer_size: int = 1_000_000  # steps that the replay holds, 7 kB each
    replay_on_device: bool = True  # keep the replay's screens on the training device, not in main memory
    save_replay: bool = False  # save the replay in the checkpoint, so that a resumed run goes on exactly
    learning_starts: int = 80_000  # steps in the replay before learning starts
    batch_size: int = 32  # steps in a minibatch (B)
    train_frequency: int = 4  # environment steps per gradient step
    target_network_frequency: int = 1_000  # environment steps between two updates of the target network
    start_e: float = 1.0  # ε, the probability of a random action, at the start
    end_e: float = 0.01  # ε at the end
    exploration_fraction: float = 0.1  # fraction of the run in which ε falls linearly from start_e to end_e
    eval_epsilon: float = 0.01  # ε in evaluation
    log_interval: int = 1_000  # environment steps between two log entries

    def check(self):
        """Refuse values that do not fit together."""
        if max(self.gamma, self.start_e, self.end_e, self.eval_epsilon, self.exploration_fraction) > 1:
            fail("--gamma, --start-e, --end-e, --eval-epsilon, --exploration-fraction: must be at most 1")
        if not 8 * self.num_envs <= self.learning_starts < self.total_timesteps:  # 8: more rows than screens
            fail(f"--learning-starts {self.learning_starts}: at least 8 * --num-envs, less than --total-timesteps")
        if self.buffer_size < self.learning_starts + self.num_envs:
            fail(f"--buffer-size {self.buffer_size}: must be at least --learning-starts + --num-envs")


# --- environment ---


class AtariGames(VectorWrapper):
    """AtariVectorEnv with clipped rewards, scores of whole games, a fire button after lost lives, and colour frames.

    Training: rewards are clipped to their sign [DQN, Methods], a lost life is `terminated`, and infos["final_info"] has
    the raw score and the length of whole games. Evaluation: raw rewards, whole games, and the fire button is pressed
    after a lost life, because some games wait for it. A second environment, `camera`, renders in colour.
    """

    def __init__(self, envs: AtariVectorEnv, training: bool, camera: AtariVectorEnv | None):
        super().__init__(envs)
        self.training = training
        self.camera = camera
        self.metadata = envs.metadata | {"render_modes": ["rgb_array"], "render_fps": 15}

    def reset(self, *, seed=None, options=None):
        """Start new games; `seed` is an int or a list with one int per game."""
        seed = np.array(seed) if isinstance(seed, list) else seed
        self.frames = self.camera.reset(seed=seed)[0] if self.camera else None
        self.score = self.length = 0
        self.over = self.press_fire = np.zeros(self.num_envs, dtype=bool)
        obs, self.infos = self.env.reset(seed=seed)
        return obs, self.infos

    def send(self, action):
        """Begin a step; the games play it in threads of their own."""
        action = np.where(self.press_fire, 1, action)  # 1 is fire; without a fire button, another move
        self.env.send(action)
        self.frames = self.camera.step(action)[0] if self.camera else None

    def recv(self):
        """Wait for the end of the step; returns what `step` returns."""
        obs, reward, terminated, truncated, infos = self.env.recv()
        self.press_fire = (infos["lives"] < self.infos["lives"]) & (not self.training)
        # At a lost life the game goes on; only a new game counts its frames from 0 again.
        new_game = infos["episode_frame_number"] < self.infos["episode_frame_number"]
        self.infos = infos
        if self.training:
            self.score = self.score * ~self.over + reward
            self.length = self.length * ~self.over + 1
            self.over = truncated | (terminated & new_game)
            infos["final_info"] = {"episode": {"r": self.score, "l": self.length}, "_episode": self.over}
            reward = np.sign(reward)
        return obs, reward, terminated, truncated, infos

    def step(self, action):
        """A whole step: obs (N, 4, 84, 84) uint8, reward, terminated, truncated (N,), and infos."""
        self.send(action)
        return self.recv()

    def render(self):
        """The screen (210, 160, 3) uint8 of each game."""
        return list(self.frames[:, -1])


def make_envs(args: Args, num_envs: int, evaluation: bool = False, render: bool = False) -> VectorEnv:
    """`num_envs` games; an observation is the last four screens, (4, 84, 84) uint8.

    In training, step() restarts an ended game at once; its last observation is in infos["final_obs"]. In evaluation
    the restart waits for the next step, so that render() can still show the end.
    """
    package, _, env_id = args.env_id.rpartition(":")
    importlib.import_module(package or "ale_py")
    spec = gym.spec(env_id)
    if spec.entry_point != "ale_py.env:AtariEnv" or spec.kwargs["frameskip"] not in (1, 4):
        fail(f"--env-id {args.env_id}: must be an Atari game, ALE/...-v5 or ...NoFrameskip-v4; for others see ppo.py")
    game = {"repeat_action_probability": spec.kwargs["repeat_action_probability"]} | json.loads(args.env_kwargs)
    fixed = {"game": spec.kwargs["game"], "num_envs": num_envs, "reward_clipping": False, "episodic_life": False}
    fixed |= {"autoreset_mode": AutoresetMode.NEXT_STEP if evaluation else AutoresetMode.SAME_STEP}
    fixed |= {"life_loss_info": args.episodic_life and not evaluation, "batch_size": 0, "continuous": False}
    envs = AtariVectorEnv(**game, **fixed, img_height=84, img_width=84, grayscale=True)
    in_colour = {"img_height": 210, "img_width": 160, "grayscale": False, "stack_num": 1}
    return AtariGames(envs, not evaluation, AtariVectorEnv(**(game | in_colour), **fixed) if render else None)


# --- network ---


def init_layer(layer: nn.Module, gain: float = 2**0.5) -> nn.Module:
    """`layer` with orthogonal weights and zero bias [37, detail 2]."""
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


class Agent(nn.Module):
    """The Q-network [DQN, Methods]: from screens to the value of each action."""

    def __init__(self, envs: VectorEnv, args: Args):
        super().__init__()
        self.bfloat16 = args.bfloat16
        self.eval_epsilon = args.eval_epsilon
        self.network = nn.Sequential(
            init_layer(nn.Conv2d(envs.single_observation_space.shape[0], 32, 8, stride=4)), nn.ReLU(),
            init_layer(nn.Conv2d(32, 64, 4, stride=2)), nn.ReLU(),
            init_layer(nn.Conv2d(64, 64, 3, stride=1)), nn.ReLU(), nn.Flatten(),
            init_layer(nn.Linear(64 * 7 * 7, 512)), nn.ReLU(),
        )  # fmt: skip
        self.head = init_layer(nn.Linear(512, int(envs.single_action_space.n)), gain=0.01)  # small values at first
        if args.compile:
            self.compile(mode="reduce-overhead")

    def forward(self, obs):
        """The Q-values (B, A) float32 of all actions in `obs` (B, 4, 84, 84) uint8."""
        obs = obs if self.bfloat16 else obs.contiguous(memory_format=torch.channels_last)  # faster in float32
        with torch.autocast(obs.device.type, torch.bfloat16, enabled=self.bfloat16):
            features = self.network(obs.to(torch.bfloat16 if self.bfloat16 else torch.float32) / 255)
        return self.head(features.float())

    @torch.no_grad()
    def epsilon_greedy(self, obs, epsilon: float) -> np.ndarray:
        """Actions (N,) for the screens `obs` (N, 4, 84, 84) uint8: the best ones, or with probability ε random."""
        q_value = self(obs).cpu().numpy()  # (N, A)
        random_action = np.random.randint(q_value.shape[1], size=len(q_value))
        return np.where(np.random.rand(len(q_value)) < epsilon, random_action, q_value.argmax(-1))

    def act(self, obs, deterministic: bool) -> np.ndarray:
        """Actions (N,) for the screens `obs` (N, 4, 84, 84) uint8: the best ones, or ε-greedy ones."""
        return self.epsilon_greedy(obs, 0 if deterministic else self.eval_epsilon)


# --- algorithm ---


class Replay:
    """The last steps of N environments [DQN, Methods], as a ring of R rows; one row is one step of all environments.

    Only the newest screen of each observation is stored; the older ones are in the rows before. `age` (R, N) says how
    many of these older ones are from the same game, at most 3. The others are black, as at the start of a game.
    """

    def __init__(self, buffer_size: int, num_envs: int, obs_shape: tuple, device):
        self.num_screens = obs_shape[0]
        self.num_rows = buffer_size // num_envs
        self.size = 0  # rows in use
        self.next_row = 0
        self.new_game = np.ones(num_envs, dtype=bool)  # the next observation is the first of a game
        shape = (self.num_rows, num_envs)
        self.screens = torch.empty(*shape, *obs_shape[1:], dtype=torch.uint8, device=device)  # CPU: grows as it fills
        self.actions = torch.zeros(shape, dtype=torch.int64)
        self.rewards = torch.zeros(shape)
        self.terminated = torch.zeros(shape, dtype=torch.bool)
        self.truncated = torch.zeros(shape, dtype=torch.bool)
        self.age = torch.zeros(shape, dtype=torch.int64)

    def add(self, obs, action, reward, terminated, truncated, new_game):
        """Add one step of all environments. `new_game` (N,): the step ended a game, not only a life."""
        row = self.next_row
        self.screens[row] = torch.as_tensor(obs[:, -1])
        self.actions[row] = torch.as_tensor(action)
        self.rewards[row] = torch.as_tensor(reward)
        self.terminated[row] = torch.as_tensor(terminated)
        self.truncated[row] = torch.as_tensor(truncated & ~terminated)
        self.age[row] = (self.age[row - 1] + 1).clamp(max=self.num_screens - 1) * ~torch.as_tensor(self.new_game)
        self.new_game = new_game
        self.next_row = (row + 1) % self.num_rows
        self.size = min(self.size + 1, self.num_rows)

    def start_new_games(self):
        """The environments start anew: the last step of each game counts as truncated."""
        self.truncated[self.next_row - 1] = ~self.terminated[self.next_row - 1]
        self.new_game = np.ones_like(self.new_game)

    def sample(self, batch_size: int):
        """A random minibatch: obs, action, reward, next_obs, terminated. Screens (B, 4, 84, 84) uint8, the rest (B,).

        After a terminated step next_obs may show the next game. Some steps are not drawn: truncated ones, the newest
        row (its next screen is missing) and, once the ring is full, the oldest rows (their older screens are
        overwritten).
        """
        overwritten = self.num_screens - 1 if self.size == self.num_rows else 0
        first = self.next_row - self.size + overwritten
        num_candidates = 4 * batch_size + 100  # more than needed, because some are truncated
        row = (first + torch.randint(self.size - 1 - overwritten, (num_candidates,))) % self.num_rows
        n = torch.randint(self.age.shape[1], (num_candidates,))  # environment
        usable = ~self.truncated[row, n]
        row = row[usable][:batch_size]
        n = n[usable][:batch_size]
        if len(row) < batch_size:
            sys.exit(f"{SCRIPT.name}: error: nearly every step in the replay is truncated, so nothing can be learned")
        back = torch.arange(self.num_screens - 1, -2, -1)  # 3, 2, 1, 0 rows back, and -1: the next screen
        rows = (row[:, None] - back) % self.num_rows
        screens = self.screens[rows, n[:, None]]  # (B, 5, 84, 84)
        screens *= (self.age[row, n][:, None] >= back).to(screens.device)[..., None, None]  # black before the game
        return screens[:, :-1], self.actions[row, n], self.rewards[row, n], screens[:, 1:], self.terminated[row, n]

    def state_dict(self) -> dict:
        """The rows in use, for --save-replay."""
        state = {"size": self.size, "next_row": self.next_row, "num_rows": self.num_rows}
        for name in ("screens", "actions", "rewards", "terminated", "truncated", "age"):
            state[name] = getattr(self, name)[: self.size].clone()
        return state

    def load_state_dict(self, state: dict):
        """Restore the rows; ValueError if this replay has another size."""
        if state["num_rows"] != self.num_rows:
            raise ValueError(f"a replay of {state['num_rows']} rows, not {self.num_rows}")
        self.size = state["size"]
        self.next_row = state["next_row"]
        for name in ("screens", "actions", "rewards", "terminated", "truncated", "age"):
            getattr(self, name)[: self.size] = state[name]


def td_target(agent, target_network, reward, next_obs, terminated, gamma):
    """The target (B,): the reward plus the discounted value of the best next action. Only Double DQN uses `agent`."""
    next_value = target_network(next_obs).amax(-1)
    return reward + gamma * next_value * ~terminated  # [DQN, Algorithm 1]


def dqn_loss(agent, target_network, obs, action, reward, next_obs, terminated, gamma):
    """The loss of a minibatch, whose tensors are (B, ...), and a dict of scalar tensors to log."""
    with torch.no_grad():
        target = td_target(agent, target_network, reward, next_obs, terminated, gamma)
    q_value = agent(obs).gather(-1, action[:, None]).squeeze(-1)
    loss = nn.functional.huber_loss(q_value, target)  # linear for errors above 1 [DQN, Methods]
    return loss, {"loss/td": loss.detach(), "train/q_value": q_value.detach().mean()}


def make_replay(args: Args, obs_shape: tuple, device: torch.device) -> Replay:
    """An empty replay, on the device or in main memory; one that does not fit ends the program."""
    device = device if args.replay_on_device else torch.device("cpu")
    needed = args.buffer_size * math.prod(obs_shape[1:]) * (2 if args.save_replay else 1)  # saving makes a copy
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    if needed + 5e8 > free:  # the rest of the program needs half a gigabyte
        fail(f"--buffer-size {args.buffer_size}: needs {needed / 1e9:.1f} GB, but only {free / 1e9:.1f} GB are free")
    return Replay(args.buffer_size, args.num_envs, obs_shape, device)


# --- training ---


def train(args: Args) -> Path:
    """Train an agent, evaluate it, and return the run folder."""
    torch.set_num_threads(args.num_threads)
    device = pick_device(args.device)
    seed_everything(args.seed)
    envs = open_envs(args, args.num_envs)
    agent = Agent(envs, args).to(device)
    target_network = Agent(envs, args).to(device)
    target_network.load_state_dict(agent.state_dict())
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, fused=True)
    replay = make_replay(args, envs.single_observation_space.shape, device)
    saved_replay = {"replay": replay} if args.save_replay else {}
    run = Run(args, agent=agent, target_network=target_network, optimizer=optimizer, **saved_replay)

    while run.step < args.total_timesteps:
        if run.step >= run.next_checkpoint:  # at once at the start
            run.save_checkpoint()
            envs.close()  # a resumed run has to start new environments; to get the same result, every run does
            envs = open_envs(args, args.num_envs)
            obs, _ = envs.reset(seed=seed_everything(args.seed, run.step))
            replay.start_new_games()
            history = []
            start_step = run.step
            start_time = time.perf_counter()

        # 1. choose actions and begin a step in each of N environments
        epsilon = np.interp(run.step / args.total_timesteps, [0, args.exploration_fraction], [args.start_e, args.end_e])
        action = agent.epsilon_greedy(torch.as_tensor(obs, device=device), epsilon)
        envs.send(action)
        last_step = run.step
        run.step += args.num_envs

        # 2. learn while the environments play: one gradient step every --train-frequency environment steps
        learning_rate = np.interp(last_step / args.total_timesteps, [1 - args.anneal_last, 1], [args.learning_rate, 0])
        optimizer.param_groups[0]["lr"] = float(learning_rate)  # load_checkpoint takes no NumPy numbers
        if replay.size * args.num_envs >= args.learning_starts:
            for _ in range(run.step // args.train_frequency - last_step // args.train_frequency):
                minibatch = [tensor.to(device) for tensor in replay.sample(args.batch_size)]
                loss, metrics = dqn_loss(agent, target_network, *minibatch, args.gamma)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                history.append(metrics)
        if run.step // args.target_network_frequency > last_step // args.target_network_frequency:
            target_network.load_state_dict(agent.state_dict())

        # 3. finish the step and store it
        next_obs, reward, terminated, truncated, infos = envs.recv()
        replay.add(obs, action, reward, terminated, truncated, infos["final_info"]["_episode"])
        obs = next_obs
        for n in np.flatnonzero(infos["final_info"]["_episode"]):  # environments whose game ended
            run.record_episode(infos["final_info"]["episode"]["r"][n], infos["final_info"]["episode"]["l"][n])

        # 4. log the means since the last time
        if run.step - start_step >= args.log_interval or run.step >= min(run.next_checkpoint, args.total_timesteps):
            names = history[0] if history else ()
            metrics = {name: torch.stack([m[name] for m in history]).mean().item() for name in names}
            metrics |= {"train/epsilon": epsilon, "train/learning_rate": learning_rate}
            metrics["time/sps"] = (run.step - start_step) / (time.perf_counter() - start_time)
            run.log(metrics)
            history = []
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
