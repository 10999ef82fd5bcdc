"""What the tests of the training loops share: formulas term by term, spies, and single environments."""

import copy
import json
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import torch

# --- formulas ---


def random_rollout(T=12, N=3):
    """Random numbers with terminations, truncations, and both at once; `next_values` belong to the true successors."""
    rng = np.random.default_rng(0)
    rewards, values, next_values = rng.normal(size=(3, T, N))
    terminated, truncated = np.zeros((2, T, N), dtype=bool)
    terminated[4, 0] = truncated[6, 1] = truncated[T - 1, 1] = True
    terminated[8, 2] = truncated[8, 2] = truncated[2, 2] = True
    goes_on = ~(terminated | truncated)[:-1]
    next_values[:-1][goes_on] = values[1:][goes_on]
    return rewards, values, next_values, terminated, truncated


def gae_inputs(rewards, values, next_values, terminated, truncated, gamma):
    """The first four arguments of compute_gae: the bootstrap of a truncated step is in its reward."""
    rewards = rewards + gamma * next_values * (truncated & ~terminated)
    return [torch.as_tensor(x) for x in (rewards, values, next_values[-1], terminated | truncated)]


def brute_force_gae(rewards, values, next_values, terminated, truncated, gamma, gae_lambda):
    """The sum of [GAE, Eq. 16] term by term, until the episode is over or the rollout ends."""
    T, N = rewards.shape
    advantages = np.zeros((T, N))
    for t, n in np.ndindex(T, N):
        for k in range(t, T):
            following = 0 if terminated[k, n] else next_values[k, n]
            td_error = rewards[k, n] + gamma * following - values[k, n]
            advantages[t, n] += (gamma * gae_lambda) ** (k - t) * td_error
            if terminated[k, n] or truncated[k, n]:
                break
    return advantages


def n_step_returns(rewards, next_values, terminated, truncated, gamma):
    """The rewards until the episode or the rollout ends, then the value of what would have followed."""
    T, N = rewards.shape
    returns = np.zeros((T, N))
    for t, n in np.ndindex(T, N):
        for k in range(t, T):
            returns[t, n] += gamma ** (k - t) * rewards[k, n]
            if terminated[k, n]:
                break
            if truncated[k, n] or k == T - 1:
                returns[t, n] += gamma ** (k - t + 1) * next_values[k, n]
                break
    return returns


# --- loops ---


def frozen(x):
    """A copy that later changes do not reach."""
    if isinstance(x, torch.Tensor):
        return x.detach().clone()
    return copy.deepcopy(x) if isinstance(x, (torch.nn.Module, np.ndarray)) else x


def spy(monkeypatch, owner, name) -> list:
    """From now on, (arguments, result) of each call of owner.name, as they are at that time."""
    calls, function = [], getattr(owner, name)

    def wrapper(*args, **kwargs):
        before = [frozen(x) for x in (*args, *kwargs.values())]
        result = function(*args, **kwargs)
        calls.append((before, frozen(result)))
        return result

    monkeypatch.setattr(owner, name, wrapper)
    return calls


def no_evaluation(monkeypatch, module):
    """Evaluations take no time, so that spies see the training alone."""
    monkeypatch.setattr(module, "evaluate", lambda *args, **kwargs: np.zeros(1))


def play(args, seed, actions) -> SimpleNamespace:
    """Play `actions` (T, N, ...) in N single environments, environment i seeded with seed + i.

    The result has obs and next_obs (T, N, D), and reward, terminated, truncated (T, N). next_obs is what step()
    returned, also where an episode ended and a new one started.
    """
    steps = []
    for i in range(actions.shape[1]):
        env = gym.wrappers.FlattenObservation(gym.make(args.env_id, **json.loads(args.env_kwargs)))
        obs, _ = env.reset(seed=seed + i)
        for action in actions[:, i]:
            next_obs, reward, terminated, truncated, _ = env.step(action)
            steps.append((obs, next_obs, reward, terminated, truncated))
            obs = env.reset()[0] if terminated or truncated else next_obs
    columns = [np.array(column) for column in zip(*steps)]
    columns = [x.reshape(actions.shape[1], len(actions), *x.shape[1:]).swapaxes(0, 1) for x in columns]
    columns = [torch.as_tensor(x, dtype=torch.bool if x.dtype == bool else torch.float32) for x in columns]
    return SimpleNamespace(**dict(zip(["obs", "next_obs", "reward", "terminated", "truncated"], columns)))


def assert_same_rows(actual, expected, atol=1e-4):
    """Two lists of columns (B, ...) hold the same rows, each once, in any order."""
    actual, expected = (torch.cat([x.reshape(len(x), -1).double() for x in rows], 1) for rows in (actual, expected))
    distance = torch.cdist(actual, expected, compute_mode="donot_use_mm_for_euclid_dist")
    nearest = distance.min(dim=1)
    assert actual.shape == expected.shape
    assert nearest.values.max() < atol
    assert len(set(nearest.indices.tolist())) == len(expected)


def by_hand(agent, optimizer, losses, rates, max_grad_norm=float("inf")) -> dict:
    """The weights after one step of `optimizer` for each of `losses`, functions of the agent, at these rates."""
    for loss, rate in zip(losses, rates, strict=True):
        optimizer.param_groups[0]["lr"] = rate
        agent.zero_grad()
        loss(agent).backward()
        torch.nn.utils.clip_grad_norm_(agent.parameters(), max_grad_norm)
        optimizer.step()
    return {name: parameter.detach() for name, parameter in agent.named_parameters()}
