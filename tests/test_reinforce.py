"""REINFORCE: oracles for its formulas, and its training loop on environments whose answers are known."""

import csv
import json
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from test_scripts import assert_refused, load, mean_reward, scalars, tensors
from torch import nn
from torch.distributions import Categorical

import reinforce

TINY = "--num-envs 3 --total-timesteps 300 --num-checkpoints 2 --eval-episodes 10".split()
BASELINES = ["none", "mean", "learned"]


def run(*flags):
    """Train as the command line would; returns the run folder."""
    return reinforce.train(reinforce.parse_args([str(flag) for flag in flags]))


def make_agent(*flags):
    args = reinforce.parse_args(list(flags))
    envs = reinforce.make_envs(args, 2)
    torch.manual_seed(0)
    return reinforce.Agent(envs, args), envs


# --- formulas ---


def test_discounted_returns_are_the_brute_force_sum():
    rewards = np.random.default_rng(0).normal(size=(7, 3))
    expected = np.zeros_like(rewards)
    for t, n in np.ndindex(rewards.shape):
        expected[t, n] = sum(0.9 ** (k - t) * rewards[k, n] for k in range(t, 7))
    np.testing.assert_allclose(reinforce.discounted_returns(torch.as_tensor(rewards), 0.9), expected)


def test_mean_of_the_others_is_over_those_that_still_run():
    returns = torch.tensor([[1.0, 2.0, 6.0], [3.0, 0.0, 5.0], [7.0, 0.0, 0.0]])
    running = torch.tensor([[True, True, True], [True, False, True], [True, False, False]])
    expected = [[4.0, 3.5, 1.5], [5.0, 4.0, 3.0], [0.0, 7.0, 7.0]]
    baseline = reinforce.mean_of_the_others(returns, running)
    torch.testing.assert_close(baseline[running], torch.tensor(expected)[running])


class Softmax(nn.Module):
    """A policy over two arms that ignores the observation."""

    def __init__(self):
        super().__init__()
        self.preferences = nn.Parameter(torch.tensor([0.3, -0.5], dtype=torch.float64))

    def forward(self, obs):
        return Categorical(logits=self.preferences.expand(len(obs), 2))


REWARDS = torch.tensor([[1.0, 4.0], [-2.0, 0.5]], dtype=torch.float64)  # of each arm, at two pulls in a row


@pytest.mark.parametrize("kind", ["none", "constant", "mean"])
def test_expected_gradient_is_the_policy_gradient_of_a_two_armed_bandit(kind):
    """Two episodes of two pulls each: the loss's gradient, averaged over all outcomes, against the analytic one.

    The expected return is J = sum of p(a) * r(t, a), and dJ/dpreference(a) = sum over t of p(a) * (r(t, a) - J(t)).
    A baseline changes every single gradient, but not their mean.
    """
    agent = Softmax()
    p = agent.preferences.detach().softmax(-1)
    analytic = sum(p * (rewards - (p * rewards).sum()) for rewards in REWARDS)
    expected, single = torch.zeros(2, dtype=torch.float64), []
    for actions in product([0, 1], repeat=4):
        action = torch.tensor(actions).reshape(2, 2)  # (T, N)
        rewards = REWARDS.gather(1, action)
        returns = reinforce.discounted_returns(rewards, 1.0)
        baseline = {
            "none": torch.zeros_like(returns),
            "constant": torch.full_like(returns, 3.0),
            "mean": reinforce.mean_of_the_others(returns, torch.ones(2, 2, dtype=torch.bool)),
        }[kind]
        batch = [x.flatten() for x in (action, returns, baseline)]
        loss, _ = reinforce.reinforce_loss(agent, torch.zeros(4, 1), *batch, num_episodes=2)
        agent.zero_grad()
        loss.backward()
        expected += p[action].prod() * agent.preferences.grad
        single.append(agent.preferences.grad)
    torch.testing.assert_close(expected, -analytic)
    assert torch.stack(single).std(0).min() > 0.1


def test_a_learned_baseline_learns_from_its_own_loss_only():
    agent, _ = make_agent("--baseline", "learned")
    obs, action, returns = torch.randn(5, 4), torch.tensor([0, 1, 1, 0, 1]), torch.randn(5) * 10
    values = agent.value(obs)
    loss, metrics = reinforce.reinforce_loss(agent, obs, action, returns, values, 2)
    loss.backward()
    assert metrics["loss/value"] == pytest.approx((returns - values).square().mean().item())
    with_learned = [parameter.grad.clone() for parameter in agent.actor.parameters()]
    critic = [parameter.grad.clone() for parameter in agent.critic.parameters()]
    agent.zero_grad()
    loss, _ = reinforce.reinforce_loss(agent, obs, action, returns, values.detach(), 2)
    loss.backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(agent.actor.parameters(), with_learned))
    agent.zero_grad()
    (returns - agent.value(obs)).square().mean().backward()
    torch.testing.assert_close([p.grad for p in agent.critic.parameters()], critic)


def test_only_the_environment_sees_the_clipped_action():
    agent, envs = make_agent("--env-id", "toy_envs:Spaces-v0", "--env-kwargs", '{"action": "matrix"}')
    action = torch.full((2, 6), 5.0)
    assert agent(torch.zeros(2, 9)).log_prob(action).shape == (2,)
    np.testing.assert_array_equal(agent.to_env(action), np.full((2, 2, 3), 0.1, np.float32))


@pytest.mark.parametrize("action", ["shifted", "matrix", "float64", "unbounded"])
@pytest.mark.parametrize("obs", ["dict", "tuple", "image", "float64", "multibinary"])
def test_any_box_observation_and_discrete_or_box_action(obs, action):
    """The environment asserts that each action is in its space."""
    kwargs = json.dumps({"obs": obs, "action": action})
    folder = run("--env-id", "toy_envs:Spaces-v0", "--env-kwargs", kwargs, *TINY)
    assert load(folder)["step"] >= 300


# --- training ---


@pytest.fixture
def seen(monkeypatch):
    """The arguments of every call of reinforce_loss."""
    calls, loss = [], reinforce.reinforce_loss
    monkeypatch.setattr(reinforce, "reinforce_loss", lambda *args: calls.append(args) or loss(*args))
    return calls


def test_a_batch_is_one_whole_episode_of_each_environment(seen):
    """No step of a second episode counts, though the environments go on until the longest first one ends."""
    folder = run("--env-id", "CartPole-v1", *TINY, "--gamma", "1", "--num-checkpoints", "1")
    rows = list(csv.DictReader((folder / "episodes.csv").open()))
    assert len(rows) == 3 * len(seen)
    steps = 0
    for i, (_, obs, action, returns, baseline, num_episodes) in enumerate(seen):
        episodes = rows[3 * i : 3 * i + 3]
        lengths = sorted(int(row["length"]) for row in episodes)
        assert num_episodes == 3
        assert len(obs) == len(action) == len(returns) == len(baseline) == sum(lengths)
        assert sorted(returns.tolist()) == sorted(n for length in lengths for n in range(1, length + 1))
        assert len(torch.unique(obs, dim=0)) == len(obs)
        steps += 3 * lengths[-1]
        assert int(episodes[-1]["step"]) == steps
    assert load(folder)["step"] == steps
    assert len({row["length"] for row in rows}) > 5


def test_obs_action_and_return_belong_together(seen):
    """Reward 1 for repeating the shown state: with gamma 0 the return says whether action and state agree."""
    run("--env-id", "toy_envs:Identity-v0", *TINY, "--gamma", "0")
    for _, obs, action, returns, _, _ in seen:
        assert torch.equal(returns, (obs.argmax(-1) == action).float())
        assert len(obs) == 3 * 16


def test_a_truncated_episode_counts_as_it_is(seen):
    """8 steps of reward 1, then the time limit; nothing is added for what would have followed."""
    run("--env-id", "toy_envs:Constant-v0", *TINY, "--gamma", "0.5", "--baseline", "none")
    expected = [sum(0.5**k for k in range(8 - t)) for t in range(8)]
    for _, _, _, returns, baseline, _ in seen:
        np.testing.assert_allclose(returns.reshape(8, 3)[:, 0], expected)
        assert (baseline == 0).all()


def test_num_steps_breaks_an_episode_off(seen):
    flags = ["--env-id", "toy_envs:Constant-v0", *TINY, "--gamma", "1", "--num-steps", "5"]
    folder = run(*flags)
    assert all(returns.reshape(5, 3)[0].tolist() == [5, 5, 5] for _, _, _, returns, _, _ in seen)
    rows = list(csv.DictReader((folder / "episodes.csv").open()))
    assert len(rows) == 3 * len(seen)  # or the curve would show the short episodes only
    assert {(row["return"], row["length"]) for row in rows} == {("5.0", "5")}


def test_baselines(seen):
    """Each flag gives its own baseline; a learned one comes to expect the return."""
    flags = ["--env-id", "toy_envs:Constant-v0", *TINY, "--gamma", "1"]
    run(*flags, "--baseline", "mean")
    assert all(torch.equal(baseline, returns) for _, _, _, returns, baseline, _ in seen)  # all episodes are alike
    seen.clear()
    folder = run(*flags, "--baseline", "learned", "--total-timesteps", "20e3")
    losses = [event.value for event in scalars(folder, "loss/value")]
    assert losses[0] > 20
    assert losses[-1] < 6.5  # 5.25, the variance of 1 to 8, is what a constant baseline leaves
    assert "critic.0.weight" in load(folder)["agent"]
    assert "critic.0.weight" not in load(run(*flags, "--baseline", "none"))["agent"]


def test_the_mean_is_that_of_the_other_running_episodes(seen):
    run("--env-id", "CartPole-v1", *TINY, "--gamma", "1", "--baseline", "mean")
    for _, _, _, returns, baseline, _ in seen:
        lengths, expected = returns[:3].tolist(), []  # with gamma 1 a return is the number of steps left
        for t in range(int(max(lengths))):
            for n, length in enumerate(lengths):
                others = [other - t for m, other in enumerate(lengths) if m != n and other > t]
                if length > t:
                    expected.append(sum(others) / max(1, len(others)))
        assert baseline.tolist() == pytest.approx(expected)


def test_observations_are_normalized(seen):
    folder = run("--env-id", "CartPole-v1", *TINY, "--normalize-observations")
    assert load(folder)["agent"]["normalize.count"] == sum(len(args[1]) for args in seen)
    agent, _ = make_agent("--normalize-observations")
    obs = torch.randn(50, 4) * 3 + 7
    before = agent.value(obs)
    agent.observe(obs)
    scaled = (obs - obs.mean(0)) / obs.std(0, correction=0)
    torch.testing.assert_close(agent(obs).logits, torch.log_softmax(agent.actor(scaled), -1), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(agent.value(obs), agent.critic(scaled)[:, 0], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(before, agent.value(obs))


def test_a_box_policy_learns_its_deviation_too():
    agent, _ = make_agent("--env-id", "Pendulum-v1", "--hidden-size", "9")
    assert agent.actor[0].weight.shape == (9, 3)
    obs, action = torch.zeros(2, 3), torch.ones(2, 1)
    loss, metrics = reinforce.reinforce_loss(agent, obs, action, torch.ones(2), torch.zeros(2), 1)
    loss.backward()
    assert agent.log_std.grad.abs().item() > 0
    assert metrics["loss/entropy"] == pytest.approx(0.5 * np.log(2 * np.pi * np.e), rel=1e-5)


@pytest.mark.parametrize("baseline", BASELINES)
def test_identity_is_solved(baseline):
    flags = "--env-id toy_envs:Identity-v0 --gamma 0 --total-timesteps 20e3 --num-envs 8 --eval-episodes 100".split()
    assert mean_reward(run(*flags, "--baseline", baseline)) == 16


def test_learning_rate_falls_and_never_reaches_zero():
    rates = [event.value for event in scalars(run(*TINY, "--learning-rate", "0.8"), "train/learning_rate")]
    assert rates[0] == pytest.approx(0.8)
    assert rates == sorted(rates, reverse=True)
    assert 0 < rates[-1] < 0.5
    folder = run(*TINY, "--learning-rate", "0.8", "--no-anneal-lr")
    rates = [event.value for event in scalars(folder, "train/learning_rate")]
    assert rates == pytest.approx([0.8] * len(rates))


def test_sampled_and_most_likely_actions():
    agent, _ = make_agent()
    obs = torch.zeros(200, 4)
    assert len(set(agent.act(obs, deterministic=False))) == 2
    assert len(set(agent.act(obs, deterministic=True))) == 1


def test_flappy_bird(seen):
    """The docstring's command, shortened: pipes are counted by the environment, the limit ends the episode."""
    pytest.importorskip("flappy_bird_gymnasium")
    kwargs = '{"use_lidar": false, "score_limit": 20}'
    folder = run("--env-id", "flappy_bird_gymnasium:FlappyBird-v0", "--env-kwargs", kwargs, *TINY)
    assert folder.name.startswith("flappy_bird_gymnasium-FlappyBird-v0__reinforce__1__")
    assert seen[0][1].shape[1] == 12


# --- bad input ---

BAD_INPUT = {
    '--env-id toy_envs:Spaces-v0 --env-kwargs {"obs":"opaque"}': "cannot be flattened; wrap them",
    "--env-id FrozenLake-v1": "Discrete(16) need a table, see q_learning.py",
    '--env-id toy_envs:Spaces-v0 --env-kwargs {"action":"multibinary"}': "MultiBinary(3) are neither",
    "--baseline mean --num-envs 1": "--num-envs 1",
    "--num-envs 0": "--num-envs 0: must be finite and > 0",
    "--num-steps 0": "--num-steps 0: must be finite and > 0",
    "--hidden-size 0": "--hidden-size 0: must be finite and > 0",
    "--baseline best": None,
}


def test_bad_input_is_refused_in_one_line(capsys, tmp_path):
    assert_refused("reinforce", BAD_INPUT, tmp_path, capsys)


def test_nan_stops_the_run(capsys):
    for name in ("reward", "observation"):
        with pytest.raises(SystemExit) as stop:
            run("--env-id", "toy_envs:Constant-v0", *TINY, "--env-kwargs", json.dumps({f"bad_{name}_at": 20}))
        assert stop.value.code == f"reinforce.py: error: {name} is NaN or infinite at step 60"
        assert "--resume" not in capsys.readouterr().err  # it would end in the same NaN
    with pytest.raises(SystemExit, match="loss/value is NaN or infinite at step 24"):
        run("--env-id", "toy_envs:Constant-v0", *TINY, "--env-kwargs", '{"reward": 1e30}')
    folder = next(Path().glob("runs/*"))
    assert load(folder)["step"] == 0
    assert tensors(load(folder)["agent"])
