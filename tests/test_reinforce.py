"""REINFORCE: oracles for its formulas, and its training loop on environments whose answers are known."""

import csv
import json
from itertools import product

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributions import Categorical

import reinforce
from oracles import by_hand, no_evaluation, play, spy
from runs import load, results, scalars

TINY = "--num-envs 3 --total-timesteps 300 --eval-episodes 2".split()
CARTPOLE = ["--env-id", "CartPole-v1", *TINY]
CONSTANT = ["--env-id", "toy_envs:Constant-v0", *TINY]


def run(*flags):
    """Train as the command line would; returns the run folder."""
    return reinforce.train(reinforce.parse_args([str(flag) for flag in flags]))


def make_agent(*flags):
    """The agent with which a run with these flags starts."""
    args = reinforce.parse_args(list(flags))
    reinforce.seed_everything(args.seed)
    return reinforce.Agent(reinforce.make_envs(args, 2), args)


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
    expected = torch.tensor([[4.0, 3.5, 1.5], [5.0, 4.0, 3.0], [0.0, 7.0, 7.0]])
    torch.testing.assert_close(reinforce.mean_of_the_others(returns, running)[running], expected[running])


class Softmax(nn.Module):
    """A policy over two arms that ignores the observation."""

    def __init__(self):
        super().__init__()
        self.preferences = nn.Parameter(torch.tensor([0.3, -0.5], dtype=torch.float64))

    def policy(self, obs):
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
        returns = reinforce.discounted_returns(REWARDS.gather(1, action), 1.0)
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


def test_loss_and_what_is_logged():
    """A learned baseline learns from its own loss only; the policy takes it as a number."""
    agent = make_agent("--baseline", "learned")
    obs, action, returns = torch.randn(5, 4), torch.tensor([0, 1, 1, 0, 1]), torch.randn(5) * 10
    loss, metrics = reinforce.reinforce_loss(agent, obs, action, returns, agent.value(obs), 2)
    gradients = torch.autograd.grad(loss, list(agent.parameters()))
    policy, values = Categorical(logits=agent.actor(obs)), agent.critic(obs)[:, 0]
    advantage = (returns - values).detach()
    policy_loss = sum(-advantage[i] * policy.log_prob(action)[i] for i in range(5)) / 2
    value_loss = sum((returns[i] - values[i]) ** 2 for i in range(5)) / 5
    torch.testing.assert_close(loss, policy_loss + value_loss)
    torch.testing.assert_close(gradients, torch.autograd.grad(policy_loss + value_loss, list(agent.parameters())))
    assert metrics["loss/policy"] == pytest.approx(policy_loss.item(), rel=1e-5)
    assert metrics["loss/value"] == pytest.approx(value_loss.item(), rel=1e-5)
    assert metrics["loss/entropy"] == pytest.approx(policy.entropy().mean().item(), rel=1e-5)


def test_observations_are_normalized():
    agent = make_agent()
    obs = torch.randn(50, 4) * 3 + 7
    agent.update_normalizer(obs)
    scaled = (obs - obs.mean(0)) / obs.std(0, correction=0)
    torch.testing.assert_close(agent.policy(obs).logits, agent.actor(scaled).log_softmax(-1), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(agent.value(obs), agent.critic(scaled)[:, 0], atol=1e-4, rtol=1e-4)


def test_sampled_and_most_likely_actions():
    agent = make_agent()
    obs = torch.zeros(200, 4)
    assert len(set(agent.act(obs, deterministic=False))) == 2
    assert len(set(agent.act(obs, deterministic=True))) == 1


# --- the loop ---


@pytest.fixture
def losses(monkeypatch):
    """The arguments and results of every call of reinforce_loss."""
    return spy(monkeypatch, reinforce, "reinforce_loss")


def brute_force_baseline(kind, agent, obs, returns, length):
    """The baseline (T, N) of `kind`, one number at a time. Episode n runs for length[n] steps."""
    baseline = torch.zeros_like(returns)
    for t, n in np.ndindex(*returns.shape):
        others = [returns[t, m] for m in range(len(length)) if m != n and length[m] > t]
        if kind == "learned":
            baseline[t, n] = agent.value(obs[t, n : n + 1])[0].detach()
        if kind == "mean" and others:
            baseline[t, n] = sum(others) / len(others)
    return baseline


@pytest.mark.parametrize("kind", ["none", "mean", "learned"])
def test_a_batch_is_one_whole_episode_of_each_environment(monkeypatch, losses, kind):
    """Against single environments. No step of a second episode enters the loss, though the environments go on until
    the longest first one is over. No reward is added to a truncated episode."""
    no_evaluation(monkeypatch, reinforce)
    actions = spy(monkeypatch, reinforce.Agent, "to_env")
    flags = ["--env-id", "CartPole-v1", "--env-kwargs", '{"max_episode_steps": 25}', "--num-envs", "4"]
    flags += ["--gamma", "0.9", "--total-timesteps", "500", "--baseline", kind]
    args = reinforce.parse_args(flags)
    folder = reinforce.train(args)
    rows = list(csv.DictReader(open(folder / "episodes.csv")))
    assert len(rows) == 4 * len(losses)

    played = play(args, reinforce.seed_everything(1, 0), np.stack([result for _, result in actions]))
    done = played.terminated | played.truncated
    length = (done.int().argmax(0) + 1).tolist()
    T = max(length)
    valid = torch.tensor([[t < length[n] for n in range(4)] for t in range(T)])
    assert len(set(length)) > 1
    returns = torch.zeros(T, 4)
    for t, n in np.ndindex(T, 4):
        returns[t, n] = sum(0.9 ** (k - t) * played.reward[k, n] for k in range(t, length[n]))
    agent, obs, action, seen_returns, baseline, num_episodes = losses[0][0]
    assert torch.equal(obs, played.obs[:T][valid])
    assert torch.equal(action, torch.stack([action for (_, action), _ in actions[:T]])[valid])
    assert (action != agent.policy(obs).mode).float().mean() > 0.2  # they were sampled
    torch.testing.assert_close(seen_returns, returns[valid])
    torch.testing.assert_close(baseline, brute_force_baseline(kind, agent, played.obs[:T], returns, length)[valid])
    assert num_episodes == 4
    assert [int(row["length"]) for row in rows[:4]] == length
    assert [float(row["return"]) for row in rows[:4]] == length
    assert {int(row["step"]) for row in rows[:4]} == {4 * T}

    steps = 0  # and in later batches
    for k, ((_, obs, _, seen_returns, _, _), _) in enumerate(losses):
        length = [int(row["length"]) for row in rows[4 * k : 4 * k + 4]]
        expected = [sum(0.9**j for j in range(n - t)) for t in range(max(length)) for n in length if n > t]
        torch.testing.assert_close(seen_returns, torch.tensor(expected))
        assert len(torch.unique(obs, dim=0)) == len(obs)
        steps += 4 * max(length)
        assert int(rows[4 * k]["step"]) == steps
    assert load(folder)["step"] == steps
    assert any(int(row["length"]) == 25 for row in rows)


def test_obs_action_and_return_belong_together(losses):
    """Reward 1 for repeating the shown state: with gamma 0 the return says whether action and state agree."""
    run("--env-id", "toy_envs:Identity-v0", *TINY, "--gamma", "0")
    for (_, obs, action, returns, _, _), _ in losses:
        assert torch.equal(returns, (obs.argmax(-1) == action).float())
        assert len(obs) == 3 * 16


def test_num_steps_breaks_an_episode_off(losses):
    folder = run(*CONSTANT, "--gamma", "1", "--num-steps", "5")
    assert all(args[3].reshape(5, 3)[0].tolist() == [5, 5, 5] for args, _ in losses)
    rows = list(csv.DictReader(open(folder / "episodes.csv")))
    assert len(rows) == 3 * len(losses)  # or the curve would show the short episodes only
    assert {(row["return"], row["length"]) for row in rows} == {("5.0", "5")}


def test_the_policy_that_is_updated_is_the_one_that_acted(monkeypatch, losses):
    """The statistics move between updates only, by the steps that counted; then they are those of all."""
    no_evaluation(monkeypatch, reinforce)
    policy = spy(monkeypatch, reinforce.Agent, "policy")
    folder = run(*CARTPOLE)
    counts = [int(agent.normalize.count) for (agent, _), _ in policy]
    updates = [int(args[0].normalize.count) for args, _ in losses]
    assert updates == [sum(len(args[1]) for args, _ in losses[:k]) for k in range(len(losses))]
    assert sorted(set(counts)) == updates
    assert counts == sorted(counts)
    obs = torch.cat([args[1] for args, _ in losses])
    saved = load(folder)["agent"]
    assert saved["normalize.count"] == len(obs)
    torch.testing.assert_close(saved["normalize.mean"], obs.mean(0))
    torch.testing.assert_close(saved["normalize.var"], obs.var(0, correction=0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("anneal", [True, False])
def test_updates_by_hand(losses, anneal):
    """Adam on fresh gradients gives the weights of the checkpoint."""
    flags = [*CARTPOLE, "--learning-rate", "8e-3", f"--anneal-lr={anneal}", "--no-normalize-observations"]
    flags += ["--hidden-size", "9"]
    folder = run(*flags)
    agent = make_agent(*flags)
    assert agent.actor[0].weight.shape == agent.critic[0].weight.shape == (9, 4)

    def step(batch):
        obs, action, returns, _, num_episodes = batch
        return lambda agent: reinforce.reinforce_loss(agent, obs, action, returns, agent.value(obs), num_episodes)[0]

    ends = [event.step for event in scalars(folder, "loss/policy")]
    rates = [8e-3 * (1 - start / 300) if anneal else 8e-3 for start in [0, *ends[:-1]]]  # the first in full, never 0
    expected = by_hand(agent, torch.optim.Adam(agent.parameters()), [step(args[1:]) for args, _ in losses], rates)
    torch.testing.assert_close(load(folder)["agent"], expected, atol=1e-5, rtol=1e-5)
    assert [event.value for event in scalars(folder, "train/learning_rate")] == pytest.approx(rates)
    assert min(rates) > 0


def test_every_batch_is_logged(losses):
    folder = run(*CARTPOLE)
    for name in ("loss/policy", "loss/value", "loss/entropy"):
        logged = [event.value for event in scalars(folder, name)]
        assert logged == pytest.approx([metrics[name] for _, (_, metrics) in losses], rel=1e-5)


# --- learning ---


@pytest.mark.parametrize("obs", ["dict", "tuple", "image", "float64", "multibinary"])
def test_any_observation_and_discrete_action(obs):
    """The environment asserts that each action is in its space, which starts at 5."""
    kwargs = json.dumps({"obs": obs, "action": "shifted"})
    folder = run("--env-id", "toy_envs:Spaces-v0", "--env-kwargs", kwargs, *TINY)
    assert load(folder)["step"] >= 300


def test_a_learned_baseline_comes_to_expect_the_return():
    """The return is 8 at the first step and 1 at the last, and the observation does not say which step it is."""
    flags = "--gamma 1 --baseline learned --learning-rate 3e-2 --total-timesteps 4_000 --no-normalize-observations"
    folder = run(*CONSTANT, *flags.split())
    remaining = [event.value for event in scalars(folder, "loss/value")]
    assert remaining[0] > 15
    assert remaining[-1] == pytest.approx(5.25, abs=0.1)  # the variance of 1 to 8


@pytest.mark.parametrize("baseline", ["none", "mean", "learned"])
def test_identity_is_solved(baseline):
    flags = "--env-id toy_envs:Identity-v0 --gamma 0 --total-timesteps 4_000 --learning-rate 3e-2".split()
    folder = run(*flags, "--num-envs", "4", "--eval-episodes", "20", "--baseline", baseline)
    assert results(folder)["mean_reward"] == 16


def test_flappy_bird(losses):
    """The docstring's command, shortened."""
    pytest.importorskip("flappy_bird_gymnasium")
    kwargs = '{"use_lidar": false, "score_limit": 20}'
    run("--env-id", "flappy_bird_gymnasium:FlappyBird-v0", "--env-kwargs", kwargs, *TINY)
    assert losses[0][0][1].shape[1] == 12
