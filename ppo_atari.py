"""Proximal policy optimization (PPO) from the pixels of Atari games.

The algorithm is that of ppo.py, word for word: `diff ppo.py ppo_atari.py` shows what changes for pixels. The agent sees
the last four screens, in grey and scaled to 84 x 84. An action is repeated for four frames, which is one step. Training
clips rewards to their sign, and a lost life ends the episode; scores are those of whole games. One convolutional
network serves both the policy and the value.

    python ppo_atari.py                                           # Breakout, 10 M steps: 426 with one seed
    python ppo_atari.py --env-id PongNoFrameskip-v4 --total-timesteps 3_000_000 --learning-rate 5e-4 --num-threads 1
    python ppo_atari.py --env-id ALE/Breakout-v5                  # sticky actions [Sticky]

Papers
    [PPO]    Schulman et al. 2017, Proximal Policy Optimization Algorithms, arXiv:1707.06347
    [GAE]    Schulman et al. 2016, High-Dimensional Continuous Control Using Generalized Advantage Estimation
    [DQN]    Mnih et al. 2015, Human-level control through deep reinforcement learning, Nature 518
    [37]     Huang et al. 2022, The 37 Implementation Details of Proximal Policy Optimization, ICLR blog
    [KL]     Schulman 2020, Approximating KL Divergence, joschu.net/blog/kl-approx.html
    [Sticky] Machado et al. 2018, Revisiting the Arcade Learning Environment, arXiv:1709.06009

Deviations from [PPO]: four epochs instead of three, value loss weight 0.5 instead of 1, constant clip range 0.1; the
network computes in bfloat16 if the CPU has AVX512-BF16; games start with the fire button; a game stopped after 108,000
frames bootstraps from its last screen; the games start anew at each checkpoint.
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
import torch
import tyro
from ale_py.vector_env import AtariVectorEnv
from gymnasium.spaces import Box
from gymnasium.vector import AutoresetMode, VectorEnv, VectorWrapper
from torch import nn
from torch.distributions import Categorical
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

    num_envs: int = 8  # parallel environments (N)
    num_steps: int = 128  # steps per environment in each rollout (T)
    episodic_life: bool = True  # in training, a lost life ends the episode
    bfloat16: bool = torch.cpu.get_capabilities().get("avx512_bf16", False)  # all but the last layers in bfloat16
    compile: bool = False  # compile the network, which takes a minute; for long runs on a GPU
    learning_rate: float = 2.5e-4  # of Adam, at the start
    anneal_lr: bool = True  # decrease the learning rate linearly to zero
    gamma: float = 0.99  # discount factor
    gae_lambda: float = 0.95  # λ of generalized advantage estimation
    num_minibatches: int = 4  # minibatches per epoch, of B steps each
    update_epochs: int = 4  # passes over each rollout
    clip_coef: float = 0.1  # ε of the clipped surrogate objective
    ent_coef: float = 0.01  # weight of the entropy bonus
    vf_coef: float = 0.5  # weight of the value loss
    max_grad_norm: float = 0.5  # larger gradients are scaled down to this norm
    target_kl: float | None = None  # end the epochs early when the KL of the last minibatch is above this

    def check(self):
        """Refuse values that do not fit together."""
        batch_size = self.num_envs * self.num_steps
        if batch_size % self.num_minibatches or batch_size == self.num_minibatches:
            fail(f"--num-minibatches {self.num_minibatches}: must divide {batch_size} steps into parts of 2 or more")
        if self.total_timesteps < batch_size:
            fail(f"--total-timesteps {self.total_timesteps}: less than the {batch_size} steps of one rollout")
        if max(self.gamma, self.gae_lambda) > 1:
            fail("--gamma and --gae-lambda must be at most 1")


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
    """The policy (actor) and the value function (critic), two layers on one convolutional network [DQN, Methods]."""

    def __init__(self, envs: VectorEnv, args: Args):
        super().__init__()
        self.bfloat16 = args.bfloat16
        self.network = nn.Sequential(
            init_layer(nn.Conv2d(envs.single_observation_space.shape[0], 32, 8, stride=4)), nn.ReLU(),
            init_layer(nn.Conv2d(32, 64, 4, stride=2)), nn.ReLU(),
            init_layer(nn.Conv2d(64, 64, 3, stride=1)), nn.ReLU(), nn.Flatten(),
            init_layer(nn.Linear(64 * 7 * 7, 512)), nn.ReLU(),
        )  # fmt: skip
        self.actor = init_layer(nn.Linear(512, int(envs.single_action_space.n)), gain=0.01)
        self.critic = init_layer(nn.Linear(512, 1), gain=1.0)
        if args.compile:
            self.features = torch.compile(self.features, mode="reduce-overhead")

    def features(self, obs):
        """Features (B, 512) float32 of the screens `obs` (B, 4, 84, 84) uint8."""
        obs = obs if self.bfloat16 else obs.contiguous(memory_format=torch.channels_last)  # faster in float32
        with torch.autocast(obs.device.type, torch.bfloat16, enabled=self.bfloat16):
            return self.network(obs.to(torch.bfloat16 if self.bfloat16 else torch.float32) / 255).float()

    def policy(self, obs):
        """The distribution over actions for the screens `obs` (B, 4, 84, 84) uint8."""
        return Categorical(logits=self.actor(self.features(obs)), validate_args=False)

    def value(self, obs):
        """The value (B,) of the screens `obs` (B, 4, 84, 84) uint8."""
        return self.critic(self.features(obs)).squeeze(-1)

    def forward(self, obs):
        """The policy and the value (B,) for `obs` (B, 4, 84, 84) uint8, from one pass through the network."""
        features = self.features(obs)
        policy = Categorical(logits=self.actor(features), validate_args=False)
        return policy, self.critic(features).squeeze(-1)

    def update_normalizer(self, obs):
        """Nothing to do. It is here because train is the text of ppo.py."""

    def to_env(self, action) -> np.ndarray:
        """`action` as the environment takes it."""
        return action.cpu().numpy()

    @torch.no_grad()
    def act(self, obs, deterministic: bool) -> np.ndarray:
        """Actions for the environment, the most likely ones or sampled ones, for `obs` (N, 4, 84, 84) uint8."""
        policy = self.policy(obs)
        return self.to_env(policy.mode if deterministic else policy.sample())


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


# --- training ---


def train(args: Args) -> Path:
    """Train an agent, evaluate it, and return the run folder."""
    torch.set_num_threads(args.num_threads)
    device = pick_device(args.device)
    seed_everything(args.seed)
    envs = open_envs(args, args.num_envs)
    agent = Agent(envs, args).to(device)
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5, fused=True)  # [37, detail 3]
    run = Run(args, agent=agent, optimizer=optimizer)

    # room for one rollout of T steps in N environments: observations as the environment gives them, (T, N, ...)
    T, N = args.num_steps, args.num_envs
    all_obs = torch.as_tensor(np.zeros((T, *envs.observation_space.shape), envs.observation_space.dtype), device=device)
    action_dtype = torch.float32 if isinstance(envs.action_space, Box) else torch.int64
    actions = torch.zeros(T, *envs.action_space.shape, dtype=action_dtype, device=device)
    rewards = torch.zeros(T, N, device=device)
    dones = torch.zeros(T, N, dtype=torch.bool, device=device)

    while run.step < args.total_timesteps:
        if run.step >= run.next_checkpoint:  # at once at the start
            run.save_checkpoint()
            envs.close()  # a resumed run has to start new environments; to get the same result, every run does
            envs = open_envs(args, args.num_envs)
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
