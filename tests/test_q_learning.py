"""Q-learning: its formulas on small numbers, and its table against value iteration."""

import json
from collections import Counter
from pathlib import Path

import gymnasium as gym
import imageio.v3 as imageio
import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from test_scripts import assert_refused, load, mean_reward, scalars

import q_learning
from push_to_hub import TAXI_SEEDS

# Learns the exact values where nothing is random, from random actions: off-policy, so they need not be good ones.
EXACT = "--learning-rate 1 --no-anneal-lr --end-e 1 --num-checkpoints 1".split()


def run(*flags):
    """Train as the command line would; returns the run folder."""
    return q_learning.train(q_learning.parse_args([str(flag) for flag in flags]))


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


def test_linear_schedule():
    values = [q_learning.linear_schedule(1.0, 0.2, progress) for progress in (0, 0.25, 0.5, 1, 3)]
    assert values == pytest.approx([1, 0.8, 0.6, 0.2, 0.2])


# --- the table ---


def test_the_table_is_that_of_value_iteration_on_ice():
    flags = "--end-e 0.5 --gamma 0.95 --learning-rate 0.05 --num-checkpoints 1 --eval-episodes 300"
    folder = run(*flags.split())
    expected = value_iteration(gym.make("FrozenLake-v1"), 0.95)
    np.testing.assert_allclose(q_values(folder), expected, atol=0.1)  # six seeds were off by 0.02 to 0.04
    assert mean_reward(folder) == pytest.approx(0.74, abs=0.1)  # the optimum, four standard errors


@pytest.mark.parametrize(
    ("env_id", "optimum", "blind"), [("FrozenLake-v1", 0.744, 0.740), ("FrozenLake8x8-v1", 0.913, 0.894)]
)
def test_what_the_readme_says_can_be_reached(env_id, optimum, blind):
    """With the step of the episode in view, and without, by the policy that is the best one for the discount."""
    env = gym.make(env_id)
    policy = value_iteration(env, q_learning.Args.gamma).argmax(axis=1)
    best = ours = np.zeros(len(policy))
    for _ in range(env.spec.max_episode_steps):
        outcomes = np.array(
            [
                [
                    [sum(p * (r + values[s] * (not end)) for p, s, r, end in action) for action in state.values()]
                    for state in env.unwrapped.P.values()
                ]
                for values in (best, ours)
            ]
        )
        best, ours = outcomes[0].max(axis=1), outcomes[1][np.arange(len(policy)), policy]
    assert (round(best[0], 3), round(ours[0], 3)) == (optimum, blind)


def test_the_table_is_that_of_value_iteration_in_a_taxi():
    """Exactly, for all that was tried. The time limit breaks most episodes off: no value may come from that."""
    folder = run("--env-id", "Taxi-v4", *EXACT, "--total-timesteps", "4e5", "--gamma", "0.9", "--eval-episodes", "10")
    table, expected = q_values(folder), value_iteration(gym.make("Taxi-v4"), 0.9)
    tried = table != 0
    assert tried.sum() > 2350  # of 404 states that occur before the end, with six actions
    np.testing.assert_allclose(table[tried], expected[tried], atol=1e-4)
    args = q_learning.parse_args(["--env-id", "Taxi-v4"])
    agent = q_learning.Agent(q_learning.make_envs(args, 1), args)
    agent.load_state_dict(load(folder)["agent"])
    returns = q_learning.evaluate(agent, args, 100, TAXI_SEEDS)
    assert f"{returns.mean():.2f} +/- {returns.std():.2f}" == "7.56 +/- 2.71"


def test_only_termination_stops_the_bootstrap():
    """Reward 1 for ever is worth 1 / (1 - gamma) = 10, though every episode is cut off after 8 steps."""
    folder = run("--env-id", "toy_envs:Endless-v0", *EXACT, "--total-timesteps", "2000", "--gamma", "0.9")
    np.testing.assert_allclose(q_values(folder), [[10]], atol=1e-3)
    assert mean_reward(folder) == 8


def test_schedules_reach_the_loop(monkeypatch):
    epsilons, epsilon_greedy = [], q_learning.epsilon_greedy

    def spy(values, epsilon):
        epsilons.append(epsilon)
        return epsilon_greedy(values, epsilon)

    monkeypatch.setattr(q_learning, "epsilon_greedy", spy)
    run(
        "--total-timesteps",
        "100",
        "--num-steps",
        "10",
        "--end-e",
        "0.2",
        "--num-checkpoints",
        "1",
        "--eval-episodes",
        "2",
    )
    assert epsilons[::10] == pytest.approx([1, 0.84, 0.68, 0.52, 0.36, 0.2, 0.2, 0.2, 0.2, 0.2])
    flags = "--env-id toy_envs:Endless-v0 --total-timesteps 20 --num-steps 10 --gamma 0 --learning-rate 0.02"
    for flag, left in ("--anneal-lr", 0.98**10 * 0.99**10), ("--no-anneal-lr", 0.98**20):
        folder = run(*flags.split(), flag, "--end-e", "0.2")
        assert q_values(folder) == pytest.approx(1 - left, abs=1e-6)
    rates = [event.value for event in scalars(folder, "train/learning_rate")]
    assert rates == pytest.approx([0.02, 0.02])
    assert [event.value for event in scalars(folder, "train/epsilon")] == pytest.approx([1, 0.2])


def test_metrics_of_the_table():
    """Reward -1 throughout: the errors are negative and halve with every step."""
    flags = (
        "--env-id toy_envs:Endless-v0 --total-timesteps 10 --num-steps 10 --gamma 0 --learning-rate 0.5 --no-anneal-lr"
    )
    folder = run(*flags.split(), "--env-kwargs", '{"reward": -1}')
    assert scalars(folder, "loss/td")[0].value == pytest.approx(sum(0.5**k for k in range(10)) / 10)
    folder = run("--total-timesteps", "5000", "--env-kwargs", '{"is_slippery": false}', "--eval-episodes", "10")
    assert scalars(folder, "train/q_value")[-1].value == pytest.approx(q_values(folder).max(axis=1).mean(), rel=1e-5)


def test_spaces_that_do_not_start_at_zero():
    """The environment asserts that each action is in its space."""
    kwargs = json.dumps({"obs": "shifted", "action": "shifted"})
    folder = run("--env-id", "toy_envs:Spaces-v0", "--env-kwargs", kwargs, "--total-timesteps", "2000")
    assert q_values(folder).shape == (5, 3)
    assert (q_values(folder) != 0).all()


def test_small_integers_are_states_too():
    args = q_learning.parse_args([])
    agent = q_learning.Agent(q_learning.make_envs(args, 1), args)
    assert agent.act(torch.tensor([3, 0], dtype=torch.uint8), deterministic=True).shape == (2,)


def test_act():
    args = q_learning.parse_args(["--end-e", "0.4"])
    agent = q_learning.Agent(q_learning.make_envs(args, 1), args)
    agent.q_values[3] = torch.tensor([0.0, 1.0, 0.5, 0.0])
    obs = torch.full((4000,), 3)
    assert (agent.act(obs, deterministic=True) == 1).all()
    assert (agent.act(obs, deterministic=False) == 1).mean() == pytest.approx(0.7, abs=0.05)


# --- the map ---


def test_the_policy_is_drawn_over_the_map(capsys, monkeypatch):
    drawn, text = [], Axes.text
    monkeypatch.setattr(Axes, "text", lambda self, x, y, s, **kw: drawn.append((y, x, s)) or text(self, x, y, s, **kw))
    kwargs = json.dumps({"is_slippery": False, "desc": ["SFF", "FHF", "FFG"]})
    folder = run("--env-kwargs", kwargs, *EXACT, "--total-timesteps", "5000", "--eval-episodes", "10")
    assert mean_reward(folder) == 1
    lines = capsys.readouterr().out.splitlines()[-3:]
    rows = [line.split() for line in lines]
    assert rows[1][1] == "H"
    assert rows[2][2] == "G"
    position, path = (0, 0), []
    while rows[position[0]][position[1]] != "G":
        path.append(position)
        down, right = {"<": (0, -1), "v": (1, 0), ">": (0, 1), "^": (-1, 0)}[rows[position[0]][position[1]]]
        position = position[0] + down, position[1] + right
        assert len(path) < 9
    assert len(path) == 4  # the shortest way
    assert (rows[1][2], rows[2][1]) == ("v", ">")
    letters = [letter for _, _, letter in sorted(drawn)]
    assert [letter.translate(str.maketrans("←↓→↑", "<v>^")) for letter in letters] == sum(rows, [])
    assert {"→", "↓"} <= set(letters)
    picture = imageio.imread(folder / "policy.png")
    assert picture.shape[0] > 200
    assert picture.std() > 5


def test_no_arrow_where_nothing_was_learned(capsys):
    run("--env-id", "FrozenLake8x8-v1", "--total-timesteps", "1000", "--eval-episodes", "2")
    lines = capsys.readouterr().out.splitlines()[-8:]
    assert set("".join(lines).replace(" ", "")) == {".", "H", "G"}


def test_no_map_no_picture(capsys):
    folder = run("--env-id", "CliffWalking-v1", "--total-timesteps", "1000", "--eval-episodes", "2")
    assert "package it" in capsys.readouterr().out.splitlines()[-1]
    assert not (folder / "policy.png").exists()


# --- bad input ---

BAD_INPUT = {
    "--env-id CartPole-v1": "see reinforce.py and ppo.py",
    "--env-id Blackjack-v1": "see reinforce.py and ppo.py",
    '--env-id toy_envs:Spaces-v0 --env-kwargs {"obs":"discrete","action":"matrix"}': "no place for Box",
    "--env-id Taxi-v3": "use `Taxi-v4` instead",
    "--total-timesteps 999": "less than the 1000 of --num-steps",
    "--learning-rate 1.5": "--learning-rate 1.5: must be at most 1",
    "--start-e 2": "--start-e 2.0: must be at most 1",
    "--end-e 2": "--end-e 2.0: must be at most 1",
    '--env-kwargs {"map_name":"5x5"}': "KeyError('5x5')",
    "--end-e -0.1": "--end-e -0.1: must be finite and >= 0",
    "--exploration-fraction 0": "--exploration-fraction 0.0: must be finite and > 0",
    "--exploration-fraction 1.1": "must be at most 1",
    "--device meta": "--device meta",
}


def test_a_gpu_is_refused(capsys, monkeypatch):
    monkeypatch.setattr(q_learning, "pick_device", lambda *_: torch.device("cuda"))
    with pytest.raises(SystemExit):
        run("--device", "cuda")
    assert "only the CPU" in capsys.readouterr().err


def test_bad_input_is_refused_in_one_line(capsys, tmp_path):
    assert_refused("q_learning", BAD_INPUT, tmp_path, capsys)


def test_nan_stops_the_run():
    with pytest.raises(SystemExit, match="q_learning.py: error: loss/td is NaN or infinite at step 1000"):
        run("--env-id", "toy_envs:Endless-v0", "--env-kwargs", '{"bad_reward_at": 20}', "--num-checkpoints", "1")
    assert load(next(Path().glob("runs/*")))["step"] == 0
