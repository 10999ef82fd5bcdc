"""Small environments whose answers are known, used as `--env-id toy_envs:Name-v0`."""

import builtins

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, Tuple

NUM_STATES = 4


class Identity(gym.Env):
    """Reward 1 for repeating the shown state, else 0. Observation one-hot (4,), 16 steps an episode."""

    observation_space = Box(0, 1, (NUM_STATES,), np.float32)
    action_space = Discrete(NUM_STATES)

    def _observe(self):
        self.state = int(self.np_random.integers(NUM_STATES))
        return np.eye(NUM_STATES, dtype=np.float32)[self.state]

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self._observe(), {}

    def step(self, action):
        reward = float(action == self.state)
        return self._observe(), reward, False, False, {}


class Constant(gym.Env):
    """Reward `reward`, the same observation and no end but the time limit."""

    observation_space = Box(-1, 1, (1,), np.float32)
    action_space = Discrete(2)

    def __init__(self, reward=1.0, bad_reward_at=None, bad_observation_at=None, box=False):
        self.reward, self.steps = reward, 0
        if box:
            self.action_space = Box(-1, 1, (1,), np.float32)
        self.bad_reward_at, self.bad_observation_at = bad_reward_at, bad_observation_at

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.ones(1, np.float32), {}

    def step(self, action):
        self.steps += 1
        obs = np.full(1, np.nan if self.steps == self.bad_observation_at else 1, np.float32)
        return obs, np.nan if self.steps == self.bad_reward_at else self.reward, False, False, {}


class Spaces(gym.Env):
    """Random observations and rewards in any spaces; refuses actions that are not in its action space."""

    def __init__(self, obs="dict", action="shifted"):
        self.observation_space = {
            "dict": Dict(a=Box(0, 1, (2, 3), np.float64), b=Discrete(3)),
            "opaque": Dict(a=Box(0, 1, (2,), np.float32), b=gym.Space()),
            "tuple": Tuple((Box(0, 1, (2,), np.float32), Discrete(3))),
            "image": Box(0, 255, (4, 4, 3), np.uint8),
            "float64": Box(0, 1, (3,), np.float64),
            "multibinary": MultiBinary(3),
            "discrete": Discrete(5),
            "shifted": Discrete(5, start=3),
        }[obs]
        self.action_space = {
            "shifted": Discrete(3, start=5),
            "matrix": Box(-0.1, 0.1, (2, 3), np.float32),
            "float64": Box(-0.1, 0.1, (2,), np.float64),
            "unbounded": Box(-np.inf, np.inf, (2,), np.float32),
            "multibinary": MultiBinary(3),
        }[action]

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        assert self.action_space.contains(action), action
        terminated = bool(self.np_random.random() < 0.1)
        return self.observation_space.sample(), float(self.np_random.random()), terminated, False, {}


class Clock(gym.Env):
    """The observation counts the steps of the episode, which is truncated after 3 to 6 of them.

    `gives`: what the observation is, which is declared as float32: "float32", "float64", "list", or "reused", the same
    array each time.
    """

    observation_space = Box(0, 100, (1,), np.float32)
    action_space = Box(-1, 1, (1,), np.float32)

    def __init__(self, both=False, gives="float32"):
        self.both, self.gives, self.buffer = both, gives, np.zeros(1, np.float32)

    def _observe(self):
        self.buffer[0] = self.time
        return {
            "float32": self.buffer.copy(),
            "float64": self.buffer.astype(np.float64),
            "list": [float(self.time)],
            "reused": self.buffer,
        }[self.gives]

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.time, self.limit = 0, self.np_random.integers(3, 7)
        return self._observe(), {}

    def step(self, action):
        self.time += 1
        over = bool(self.time >= self.limit)
        return self._observe(), 1.0, over and self.both, over, {}


class Target(gym.Env):
    """Reward minus the squared distance of the action from 0.5, 1 step an episode."""

    observation_space = Box(-1, 1, (1,), np.float32)
    action_space = Box(-2, 2, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.ones(1, np.float32), {}

    def step(self, action):
        return np.ones(1, np.float32), -float((action[0] - 0.5) ** 2), True, False, {}


class TwoStates(gym.Env):
    """One-hot (2,). An action above 0 goes to the second state, another one to the first; the second one gives 1.

    Every episode is terminated after 5 steps.
    """

    observation_space = Box(0, 1, (2,), np.float32)
    action_space = Box(-1, 1, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return np.eye(2, dtype=np.float32)[0], {}

    def step(self, action):
        self.steps += 1
        state = int(action[0] > 0)
        return np.eye(2, dtype=np.float32)[state], float(state), self.steps == 5, False, {}


class Endless(gym.Env):
    """One state, one action, reward `reward`, no end but the time limit."""

    observation_space = Discrete(1)
    action_space = Discrete(1)

    def __init__(self, reward=1.0, bad_reward_at=None):
        self.reward, self.bad_reward_at, self.steps = reward, bad_reward_at, 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return 0, {}

    def step(self, action):
        self.steps += 1
        return 0, np.nan if self.steps == self.bad_reward_at else self.reward, False, False, {}


class Buggy(gym.Env):
    """Raises the error `kind` in the method `where`, itself or (`deep`) by a wrong call of gymnasium."""

    observation_space = Discrete(2)
    action_space = Discrete(2)

    def __init__(self, where, kind="TypeError", deep=False):
        self.where, self.kind, self.deep = where, kind, deep
        self._fail_in("__init__")

    def _fail_in(self, method):
        if method == self.where:
            if self.deep:
                Discrete("two")
            raise getattr(builtins, self.kind)("a bug of mine")

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self._fail_in("reset")
        return 0, {}

    def step(self, action):
        self._fail_in("step")
        return 0, 0.0, False, False, {}


gym.register("Buggy-v0", Buggy, max_episode_steps=8)
gym.register("Identity-v0", Identity, max_episode_steps=16)
gym.register("Constant-v0", Constant, max_episode_steps=8)
gym.register("Target-v0", Target)
gym.register("Clock-v0", Clock)
gym.register("TwoStates-v0", TwoStates)
gym.register("Endless-v0", Endless, max_episode_steps=8)
gym.register("Spaces-v0", Spaces, max_episode_steps=20)
