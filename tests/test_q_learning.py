"""Q-learning: its formulas on small numbers, and its table against value iteration."""

import csv
import json
from collections import Counter

import gymnasium as gym
import numpy as np
import pytest
import torch

import q_learning
from oracles import no_evaluation, spy
from push_to_hub import TAXI_SEEDS
from runs import load, results, scalars

# Learns the exact values where nothing is random, from random actions: off-policy, so they need not be good ones.
EXACT = "--learning-rate 1 --no-anneal-lr --end-e 1 --num-checkpoints 1 --eval-episodes 10 --gamma 0.9".split()


def run(*flags):
    """Train as the command line would; returns the run folder."""
    return q_learning.train(q_learning.parse_args([str(flag) for flag in flags]))


def make_agent(*flags):
    args = q_learning.parse_args(list(flags))
    return q_learning.Agent(q_learning.make_envs(args, 1), args)


def q_values(folder):
    return load(folder)["agent"]["q_values"].numpy()


def value_iteration(env, gamma):
    """The optimal table (states, actions), from the environment's own transition probabilities."""
    transitions = env.unwrapped.P
    values = np.zeros((len(transitions), len(transitions[0])))
    while True:
        best, new = values.max(axis=1), np.zeros_like(values)
        for state, action in np.ndindex(values.shape):
            for probability, next_state, reward, terminated in transitions[state][action]:
                new[state, action] += probability * (reward + gamma * best[next_state] * (not terminated))
        if np.abs(new - values).max() < 1e-9:
            return new
        values = new


# --- formulas ---


def test_td_error():
    assert q_learning.td_error(0.5, 1.0, [0.0, 3.0, 2.0], False, 0.9) == pytest.approx(1 + 0.9 * 3 - 0.5)
    assert q_learning.td_error(0.5, 1.0, [0.0, 3.0, 2.0], True, 0.9) == pytest.approx(0.5)
    assert q_learning.td_error(0.0, 0.0, [-3.0, -1.0], False, 1.0) == -1


def test_epsilon_greedy():
    q_learning.seed_everything(0)
    n = 20_000
    counts = Counter(q_learning.epsilon_greedy([1.0, 2.0, 2.0, 0.0], 0.2) for _ in range(n))
    frequencies = [counts[action] / n for action in range(4)]
    np.testing.assert_allclose(frequencies, [0.05, 0.45, 0.45, 0.05], atol=0.015)  # a tie is broken at random
    assert {q_learning.epsilon_greedy([1.0, 2.0, 0.0], 0.0) for _ in range(100)} == {1}


def test_act():
    agent = make_agent("--end-e", "0.4")
    agent.q_values[3] = torch.tensor([0.0, 1.0, 0.5, 0.0])
    obs = torch.full((4000,), 3)
    assert (agent.act(obs, deterministic=True) == 1).all()
    assert (agent.act(obs, deterministic=False) == 1).mean() == pytest.approx(0.7, abs=0.05)
    assert agent.act(torch.tensor([3, 0], dtype=torch.uint8), deterministic=True).tolist() == [1, 0]


# --- the loop ---


@pytest.mark.parametrize("anneal", [True, False])
def test_the_table_by_hand(monkeypatch, anneal):
    """Each step moves one entry towards its target [SB, Eq. 6.8]. Only a termination stops the bootstrap.

    States start at 3 and actions at 5, and the environment asserts that each action is in its space.
    """
    no_evaluation(monkeypatch, q_learning)
    choices = spy(monkeypatch, q_learning, "epsilon_greedy")
    flags = ["--env-id", "toy_envs:Spaces-v0", "--env-kwargs", json.dumps({"obs": "shifted", "action": "shifted"})]
    flags += "--total-timesteps 1000 --num-steps 100 --learning-rate 0.5 --gamma 0.8 --num-checkpoints 1".split()
    flags += "--start-e 0.9 --end-e 0.1 --exploration-fraction 0.5".split()
    folder = run(*flags, f"--anneal-lr={anneal}")

    epsilons = [0.9, 0.74, 0.58, 0.42, 0.26, 0.1, 0.1, 0.1, 0.1, 0.1]
    rates = 0.5 * (1 - np.arange(10) / 10) if anneal else [0.5] * 10  # the first in full, never 0
    env = gym.make("toy_envs:Spaces-v0", obs="shifted", action="shifted")
    obs, _ = env.reset(seed=q_learning.seed_everything(1, 0))
    table, errors, ends, episode, episodes = np.zeros((5, 3)), [], Counter(), [], []
    assert len(choices) == 1000
    for i, ((action_values, epsilon), action) in enumerate(choices):
        np.testing.assert_allclose(action_values, table[obs - 3], rtol=1e-4, atol=1e-6)
        assert epsilon == pytest.approx(epsilons[i // 100])
        next_obs, reward, terminated, truncated, _ = env.step(action + 5)
        following = 0 if terminated else table[next_obs - 3].max()
        errors.append(reward + 0.8 * following - table[obs - 3, action])
        table[obs - 3, action] += rates[i // 100] * errors[-1]
        episode.append(reward)
        obs = next_obs
        if terminated or truncated:
            ends[terminated, truncated] += 1
            episodes.append((i + 1, sum(episode), len(episode)))
            episode = []
            obs, _ = env.reset()
    assert min(ends[True, False], ends[False, True]) >= 5
    np.testing.assert_allclose(q_values(folder), table, rtol=1e-4)
    rows = [tuple(map(float, row)) for row in list(csv.reader(open(folder / "episodes.csv")))[1:]]
    np.testing.assert_allclose(rows, episodes)

    logged = {
        "loss/td": np.abs(errors).reshape(10, 100).mean(1),
        "train/epsilon": epsilons,
        "train/learning_rate": rates,
    }
    for name, expected in logged.items():
        assert [event.step for event in scalars(folder, name)] == [*range(100, 1001, 100)]
        assert [event.value for event in scalars(folder, name)] == pytest.approx(list(expected), rel=1e-4)
    assert scalars(folder, "train/q_value")[-1].value == pytest.approx(table.max(axis=1).mean(), rel=1e-4)


def test_only_termination_stops_the_bootstrap():
    """Reward 1 for ever is worth 1 / (1 - gamma) = 10, though every episode is cut off after 8 steps."""
    folder = run("--env-id", "toy_envs:Endless-v0", *EXACT, "--total-timesteps", "1000")
    np.testing.assert_allclose(q_values(folder), [[10]], atol=1e-3)
    assert results(folder)["mean_reward"] == 8


# --- against value iteration ---


def test_the_table_is_that_of_value_iteration_on_ice():
    flags = "--end-e 0.5 --gamma 0.95 --total-timesteps 100_000 --num-checkpoints 1 --eval-episodes 300"
    folder = run(*flags.split())
    expected = value_iteration(gym.make("FrozenLake-v1"), 0.95)
    np.testing.assert_allclose(q_values(folder), expected, atol=0.1)  # three seeds were off by 0.04 to 0.06
    assert results(folder)["mean_reward"] == pytest.approx(0.74, abs=0.1)  # the optimum, four standard errors


def test_the_table_is_that_of_value_iteration_in_a_taxi():
    """Exactly, for all that was tried. The time limit breaks most episodes off: no value may come from that."""
    folder = run("--env-id", "Taxi-v4", *EXACT, "--total-timesteps", "250_000")
    table, expected = q_values(folder), value_iteration(gym.make("Taxi-v4"), 0.9)
    tried = table != 0
    assert tried.sum() > 2350  # of 404 states that occur before the end, with six actions
    np.testing.assert_allclose(table[tried], expected[tried], atol=1e-4)
    args = q_learning.parse_args(["--env-id", "Taxi-v4"])
    agent = make_agent("--env-id", "Taxi-v4")
    agent.load_state_dict(load(folder)["agent"])
    returns = q_learning.evaluate(agent, args, 100, TAXI_SEEDS)
    assert f"{returns.mean():.2f} +/- {returns.std():.2f}" == "7.56 +/- 2.71"


@pytest.mark.parametrize(
    ("env_id", "optimum", "ours"), [("FrozenLake-v1", 0.744, 0.740), ("FrozenLake8x8-v1", 0.913, 0.894)]
)
def test_the_discount_costs_little(env_id, optimum, ours):
    """What can be reached with the step of the episode in view, and by the best policy for the default discount."""
    env = gym.make(env_id)
    policy = value_iteration(env, q_learning.Args.gamma).argmax(axis=1)
    best = blind = np.zeros(len(policy))

    def after(values):
        """The return (states, actions) if `values` follow."""
        actions = [action for state in env.unwrapped.P.values() for action in state.values()]
        returns = [sum(p * (r + values[s] * (not end)) for p, s, r, end in outcomes) for outcomes in actions]
        return np.reshape(returns, (len(policy), -1))

    for _ in range(env.spec.max_episode_steps):
        best, blind = after(best).max(axis=1), after(blind)[np.arange(len(policy)), policy]
    assert (round(best[0], 3), round(blind[0], 3)) == (optimum, ours)
