"""PPO: oracles for its formulas, and its training loop on environments whose answers are known."""

import json
import math

import numpy as np
import pytest
import torch
from gymnasium.vector import AsyncVectorEnv, SyncVectorEnv

import ppo
from oracles import (
    assert_same_rows,
    brute_force_gae,
    by_hand,
    gae_inputs,
    n_step_returns,
    no_evaluation,
    play,
    random_rollout,
    spy,
)
from runs import load, results, scalars

TINY = "--num-envs 2 --num-steps 16 --num-minibatches 2 --update-epochs 2 --total-timesteps 128 --eval-episodes 2"
CARTPOLE = ["--env-id", "CartPole-v1", *TINY.split()]
PENDULUM = ["--env-id", "Pendulum-v1", *TINY.split()]


def run(*flags):
    """Train as the command line would; returns the run folder."""
    return ppo.train(ppo.parse_args([str(flag) for flag in flags]))


def make_agent(*flags):
    """The agent with which a run with these flags starts, and its environments."""
    args = ppo.parse_args(list(flags))
    ppo.seed_everything(args.seed)
    envs = ppo.make_envs(args, 2)
    return ppo.Agent(envs, args), envs


# --- formulas ---


@pytest.mark.parametrize("gae_lambda", [0.0, 0.8, 1.0])
def test_gae_is_the_double_sum(gae_lambda):
    rollout = random_rollout()
    advantages = ppo.compute_gae(*gae_inputs(*rollout, 0.9), 0.9, gae_lambda)
    np.testing.assert_allclose(advantages.numpy(), brute_force_gae(*rollout, 0.9, gae_lambda), rtol=1e-5, atol=1e-6)


def test_gae_with_lambda_0_is_the_td_error_and_with_1_the_return():
    rewards, values, next_values, terminated, truncated = rollout = random_rollout()
    td_error = rewards + 0.9 * next_values * ~terminated - values
    np.testing.assert_allclose(ppo.compute_gae(*gae_inputs(*rollout, 0.9), 0.9, 0.0), td_error, rtol=1e-5, atol=1e-6)
    returns = n_step_returns(rewards, next_values, terminated, truncated, 0.9)
    advantages = ppo.compute_gae(*gae_inputs(*rollout, 0.9), 0.9, 1.0)
    np.testing.assert_allclose(advantages.numpy() + values, returns, rtol=1e-5, atol=1e-6)


def test_loss_is_the_clipped_surrogate():
    """Against the paper's formula, one sample at a time, with ratios inside and outside of the clip."""
    flags = "--clip-coef 0.3 --vf-coef 0.7 --ent-coef 0.03".split()
    agent, _ = make_agent(*CARTPOLE, *flags)
    obs, action, target = torch.randn(6, 4), torch.tensor([0, 1, 0, 1, 0, 1]), torch.arange(6.0)
    advantage = torch.tensor([1.0, -2.0, 3.0, -1.0, 0.5, -0.5])
    ratio = torch.tensor([0.5, 0.9, 1.0, 1.2, 1.5, 3.0])
    policy = torch.distributions.Categorical(logits=agent.actor(obs))
    old_logprob = (policy.log_prob(action) - ratio.log()).detach()
    loss, metrics = ppo.ppo_loss(agent, obs, action, old_logprob, advantage, target, ppo.parse_args(flags))
    gradients = torch.autograd.grad(loss, list(agent.parameters()))

    normalized = (advantage - advantage.mean()) / advantage.std()
    surrogate, squared_error = 0, 0
    for i in range(6):
        r = (policy.log_prob(action)[i] - old_logprob[i]).exp()
        surrogate += min(r * normalized[i], max(0.7, min(1.3, r)) * normalized[i]) / 6
        squared_error += (agent.critic(obs[i]).squeeze() - target[i]) ** 2 / 6
    entropy = policy.entropy().mean()
    expected = -surrogate + 0.7 * squared_error - 0.03 * entropy
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, list(agent.parameters())))
    assert metrics["loss/policy"].item() == pytest.approx(-surrogate.item(), rel=1e-5)
    assert metrics["loss/value"].item() == pytest.approx(squared_error.item(), rel=1e-5)
    assert metrics["loss/entropy"].item() == pytest.approx(entropy.item(), rel=1e-5)
    assert metrics["train/clip_fraction"].item() == pytest.approx(3 / 6)
    assert metrics["train/approx_kl"].item() == pytest.approx((ratio - 1 - ratio.log()).mean().item(), rel=1e-4)


def test_running_norm_has_the_moments_of_all_data():
    norm = ppo.RunningNorm(3)
    data = np.random.default_rng(0).normal(5, [1, 10, 100], size=(350, 3)).astype(np.float32)
    for batch in np.split(data, [50, 57, 200]):  # of different sizes
        norm.update(torch.as_tensor(batch))
    np.testing.assert_allclose(norm.mean, data.mean(0, dtype=np.float64), rtol=1e-4)
    np.testing.assert_allclose(norm.var, data.var(0, dtype=np.float64), rtol=1e-4)
    assert norm.count == 350
    scaled = norm(torch.as_tensor(data)).numpy()
    np.testing.assert_allclose(scaled, (data - data.mean(0)) / data.std(0), atol=1e-3)
    assert norm(torch.tensor([[1e9, -1e9, 5.0]])).tolist()[0][:2] == [10, -10]
    norm.update(torch.full((10**6, 3), 7.0))
    assert norm(torch.full((1, 3), 7.0)).abs().max() < 0.1


def test_categorical_is_that_of_torch():
    logits, action = torch.randn(5, 3) * 3, torch.tensor([0, 1, 2, 0, 1])
    ours, theirs = ppo.Categorical(logits), torch.distributions.Categorical(logits=logits)
    torch.testing.assert_close(ours.log_prob(action), theirs.log_prob(action))
    torch.testing.assert_close(ours.entropy(), theirs.entropy())
    assert torch.equal(ours.mode, theirs.mode)
    probs = torch.tensor([0.1, 0.3, 0.6])
    counts = torch.bincount(ppo.Categorical(probs.log().expand(20_000, 3)).sample(), minlength=3)
    torch.testing.assert_close(counts / 20_000, probs, atol=0.015, rtol=0)


@pytest.mark.parametrize("shape", [(3,), (2, 3)])
def test_gaussian_is_that_of_torch(shape):
    mean, action = torch.randn(2, 5, *shape)
    log_std = torch.linspace(-1, 0.5, math.prod(shape)).view(shape)
    normal = torch.distributions.Normal(mean, log_std.exp())
    ours, theirs = ppo.Gaussian(mean, log_std), torch.distributions.Independent(normal, len(shape))
    torch.testing.assert_close(ours.log_prob(action), theirs.log_prob(action))
    torch.testing.assert_close(ours.entropy(), theirs.entropy()[0])
    assert torch.equal(ours.mode, theirs.mode)
    sample = ppo.Gaussian(mean[:1].expand(20_000, *shape), log_std).sample()
    torch.testing.assert_close(sample.mean(0), mean[0], atol=0.05, rtol=0)
    torch.testing.assert_close(sample.std(0), log_std.exp(), atol=0, rtol=0.03)


def test_only_the_environment_sees_the_clipped_action():
    agent, envs = make_agent("--env-id", "toy_envs:Spaces-v0", "--env-kwargs", '{"action": "matrix"}')
    policy, action = agent.policy(torch.zeros(2, 9)), torch.full((2, 2, 3), 5.0)
    normal = torch.distributions.Normal(policy.mode, policy.log_std.exp())
    torch.testing.assert_close(policy.log_prob(action), normal.log_prob(action).sum((1, 2)))
    assert envs.action_space.contains(agent.to_env(action))
    np.testing.assert_array_equal(agent.to_env(action), np.full((2, 2, 3), 0.1, np.float32))


def test_the_networks_at_the_start():
    """Orthogonal weights: sqrt(2) inside, 0.01 for the actor's output and 1 for the critic's. Deviation 1."""
    agent, _ = make_agent("--env-id", "Pendulum-v1")
    for network, gain in ((agent.actor, 0.01), (agent.critic, 1)):
        layers = [layer for layer in network if isinstance(layer, torch.nn.Linear)]
        for layer, expected in zip(layers, [2**0.5, 2**0.5, gain], strict=True):
            singular_values = torch.linalg.svdvals(layer.weight)
            torch.testing.assert_close(singular_values, torch.full_like(singular_values, expected))
            assert (layer.bias == 0).all()
    assert (agent.log_std == 0).all()


def test_both_networks_see_normalized_observations():
    agent, _ = make_agent("--env-id", "CartPole-v1", "--normalize-observations")
    obs = torch.randn(50, 4) * 3 + 7
    agent.update_normalizer(obs)
    scaled = (obs - obs.mean(0)) / obs.std(0, correction=0)
    torch.testing.assert_close(agent.policy(obs).logprobs, agent.actor(scaled).log_softmax(-1), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(agent.value(obs), agent.critic(scaled)[:, 0], atol=1e-4, rtol=1e-4)


def test_sampled_and_most_likely_actions():
    agent, _ = make_agent("--env-id", "CartPole-v1")
    obs = torch.zeros(200, 4)
    assert len(set(agent.act(obs, deterministic=False))) == 2
    assert len(set(agent.act(obs, deterministic=True))) == 1


# --- the loop ---

LUNAR = "--env-id LunarLanderContinuous-v3 --num-steps 256"
ROLLOUTS = [
    ("--env-id CartPole-v1 --num-steps 64", {}),  # terminated
    ("--env-id Pendulum-v1 --num-steps 120", {}),  # truncated at 200, in the second rollout
    (LUNAR, {"max_episode_steps": 90}),  # either
    ("--env-id toy_envs:Clock-v0 --num-steps 16", {}),  # truncated, each environment at another step
    ("--env-id toy_envs:Clock-v0 --num-steps 16", {"gives": "reused"}),  # in the same array each time
    ("--env-id toy_envs:Clock-v0 --num-steps 16", {"both": True}),  # both at once is terminated
    ("--env-id toy_envs:Clock-v0 --num-steps 16 --vectorization-mode async", {}),
]


@pytest.mark.parametrize(("flags", "env_kwargs"), ROLLOUTS, ids=lambda x: x if isinstance(x, str) else json.dumps(x))
def test_rollouts_are_what_single_environments_give(monkeypatch, flags, env_kwargs):
    """Rewards with the bootstrap, values, dones and advantages; and each epoch of minibatches is the whole rollout."""
    no_evaluation(monkeypatch, ppo)
    gaes, losses, actions = (
        spy(monkeypatch, *where) for where in ((ppo, "compute_gae"), (ppo, "ppo_loss"), (ppo.Agent, "to_env"))
    )
    flags = f"{flags} --num-envs 3 --num-minibatches 2 --update-epochs 2 --gamma 0.9 --gae-lambda 0.8".split()
    args = ppo.parse_args([*flags, "--env-kwargs", json.dumps(env_kwargs)])
    T, N = args.num_steps, args.num_envs
    args.total_timesteps = 2 * T * N
    ppo.train(args)
    played = play(args, ppo.seed_everything(args.seed, 0), np.stack([result for _, result in actions]))
    assert (len(gaes), len(losses), len(actions)) == (2, 8, 2 * T)
    assert (played.terminated | played.truncated).any()
    for k in range(2):
        rollout = slice(k * T, (k + 1) * T)
        agent = losses[4 * k][0][0]  # as it was before its first update
        obs, next_obs, terminated, truncated = (
            x[rollout] for x in (played.obs, played.next_obs, played.terminated, played.truncated)
        )
        with torch.no_grad():
            values, next_values = agent.value(obs), agent.value(next_obs)
        inputs = played.reward[rollout], values, next_values, terminated, truncated
        (rewards, seen_values, last_value, dones, *coefficients), advantages = gaes[k]
        expected = gae_inputs(*inputs, 0.9)
        torch.testing.assert_close(rewards, expected[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(seen_values, values, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(last_value[~dones[-1]], expected[2][~dones[-1]], rtol=1e-4, atol=1e-4)
        assert torch.equal(dones, expected[3])
        assert coefficients == [0.9, 0.8]
        expected = torch.as_tensor(brute_force_gae(*(x.numpy() for x in inputs), 0.9, 0.8), dtype=torch.float32)
        torch.testing.assert_close(advantages, expected, rtol=1e-4, atol=1e-3)

        sampled = torch.stack([action for (_, action), _ in actions[rollout]]).flatten(end_dim=1)
        flat_obs = obs.flatten(end_dim=1)
        policy = agent.policy(flat_obs)
        logprob = policy.log_prob(sampled).detach()
        assert (sampled != policy.mode).float().mean() > 0.2  # they were sampled
        rows = [flat_obs, sampled, logprob, advantages.flatten(), (advantages + values).flatten()]
        for epoch in (losses[4 * k : 4 * k + 2], losses[4 * k + 2 : 4 * k + 4]):
            assert_same_rows([torch.cat(x) for x in zip(*(call[1:6] for call, _ in epoch))], rows, atol=1e-3)
        assert not torch.equal(losses[4 * k][0][1], losses[4 * k + 2][0][1])  # another order


@pytest.mark.parametrize("flags", [CARTPOLE, PENDULUM], ids=["discrete", "box"])
@pytest.mark.parametrize("normalize", [True, False])
def test_the_first_minibatch_has_ratio_1(monkeypatch, flags, normalize):
    """In every iteration: the policy that acted is the one that is updated, also while the statistics move."""
    losses = spy(monkeypatch, ppo, "ppo_loss")
    folder = run(*flags, f"--normalize-observations={normalize}", "--learning-rate", "1e-2")
    first = [metrics for _, (_, metrics) in losses[::4]]
    assert len(first) == 4
    assert all(metrics["train/clip_fraction"] == 0 and abs(metrics["train/approx_kl"]) < 1e-6 for metrics in first)
    assert any(metrics["train/approx_kl"] > 1e-4 for _, (_, metrics) in losses)
    if normalize:  # by all that was seen, each observation once
        obs = torch.cat([args[1] for i, (args, _) in enumerate(losses) if i % 4 < 2])
        agent = load(folder)["agent"]
        assert agent["normalize.count"] == 128
        torch.testing.assert_close(agent["normalize.mean"], obs.mean(0))
        torch.testing.assert_close(agent["normalize.var"], obs.var(0, correction=0), rtol=1e-4, atol=1e-5)
    else:
        assert not any(name.startswith("normalize") for name in load(folder)["agent"])


@pytest.mark.parametrize("anneal", [True, False])
def test_updates_by_hand(monkeypatch, anneal):
    """Adam with eps 1e-5 on fresh, clipped gradients gives the weights of the checkpoint."""
    losses = spy(monkeypatch, ppo, "ppo_loss")
    flags = [*PENDULUM, "--learning-rate", "2e-3", "--max-grad-norm", "0.3", f"--anneal-lr={anneal}"]
    folder = run(*flags)
    agent, _ = make_agent(*flags)
    rates = np.repeat([2e-3, 1.5e-3, 1e-3, 0.5e-3] if anneal else [2e-3] * 4, 4)  # the first in full, never 0
    steps = [lambda agent, batch=args[1:]: ppo.ppo_loss(agent, *batch)[0] for args, _ in losses]
    expected = by_hand(agent, torch.optim.Adam(agent.parameters(), eps=1e-5), steps, rates, 0.3)
    torch.testing.assert_close(load(folder)["agent"], expected, atol=1e-5, rtol=1e-5)
    logged = [event.value for event in scalars(folder, "train/learning_rate")]
    assert logged == pytest.approx(rates[::4].tolist())


def test_target_kl_ends_an_update_after_the_epoch_that_went_too_far(monkeypatch):
    losses = spy(monkeypatch, ppo, "ppo_loss")
    run(*CARTPOLE, "--target-kl", "0.02", "--update-epochs", "9", "--learning-rate", "5e-3", "--no-anneal-lr")
    divergence = [float(metrics["train/approx_kl"]) for _, (_, metrics) in losses]
    starts = [i for i, (args, _) in enumerate(losses) if abs(divergence[i]) < 1e-6 and i % 2 == 0]
    epochs = []
    for start, end in zip(starts, [*starts[1:], len(losses)]):
        last = divergence[start + 1 : end : 2]  # of each epoch's second minibatch
        assert all(kl <= 0.02 for kl in last[:-1])
        assert last[-1] > 0.02 or len(last) == 9
        epochs.append(len(last))
    assert len(epochs) == 4
    assert min(epochs) < 9


def test_log_entries_are_means_over_the_update(monkeypatch):
    losses, gaes = spy(monkeypatch, ppo, "ppo_loss"), spy(monkeypatch, ppo, "compute_gae")
    folder = run(*CARTPOLE)
    for name in ("loss/policy", "loss/value", "loss/entropy", "train/approx_kl", "train/clip_fraction"):
        events = scalars(folder, name)
        assert [event.step for event in events] == [32, 64, 96, 128]
        for k, event in enumerate(events):
            mean = np.mean([float(metrics[name]) for _, (_, metrics) in losses[4 * k : 4 * k + 4]])
            assert event.value == pytest.approx(mean, rel=1e-4, abs=1e-7)
    for event, ((_, values, *_), advantages) in zip(scalars(folder, "train/explained_variance"), gaes):
        assert event.value == pytest.approx(1 - (advantages.var() / (advantages + values).var()).item(), rel=1e-3)
    assert all(event.value > 0 for name in ("train/grad_norm", "time/sps") for event in scalars(folder, name))


def test_every_flag_reaches_the_loop(monkeypatch):
    """The others are in the tests above."""
    losses, gaes = spy(monkeypatch, ppo, "ppo_loss"), spy(monkeypatch, ppo, "compute_gae")
    flags = "--num-envs 3 --num-steps 8 --num-minibatches 4 --update-epochs 3 --total-timesteps 40 --gamma 0.7"
    flags += " --gae-lambda 0.6 --clip-coef 0.5 --vf-coef 0.4 --ent-coef 0.3 --vectorization-mode async"
    args = ppo.parse_args(["--env-id", "CartPole-v1", *flags.split()])
    envs, evaluation = ppo.make_envs(args, 2), ppo.make_envs(args, 2, evaluation=True)
    assert isinstance(envs.unwrapped, AsyncVectorEnv)
    assert isinstance(evaluation.unwrapped, SyncVectorEnv)
    envs.close()
    args.vectorization_mode = "sync"
    folder = ppo.train(args)
    assert (len(gaes), len(losses)) == (2, 2 * 3 * 4)
    assert gaes[0][0][0].shape == (8, 3)
    assert gaes[0][0][4:] == [0.7, 0.6]
    assert all(len(call[1]) == 6 and call[6] is args for call, _ in losses)
    assert load(folder)["step"] == 48


# --- learning ---


@pytest.mark.parametrize("action", ["shifted", "matrix", "float64", "unbounded"])
@pytest.mark.parametrize("obs", ["dict", "tuple", "image", "float64", "multibinary"])
def test_any_observation_and_discrete_or_box_action(obs, action):
    """The environment asserts that each action is in its space."""
    kwargs = json.dumps({"obs": obs, "action": action})
    envs = ppo.make_envs(ppo.parse_args(["--env-id", "toy_envs:Spaces-v0", "--env-kwargs", kwargs]), 3)
    agent = ppo.Agent(envs, ppo.Args())
    observation, _ = envs.reset(seed=1)
    for _ in range(5):
        assert observation.dtype == np.float32
        observation, *_ = envs.step(agent.act(torch.as_tensor(observation), deterministic=False))


def test_a_matrix_of_actions_trains():
    kwargs = '{"action": "matrix", "obs": "tuple"}'
    folder = run("--env-id", "toy_envs:Spaces-v0", "--env-kwargs", kwargs, *TINY.split())
    assert load(folder)["agent"]["log_std"].shape == (2, 3)


def test_constant_reward_with_truncation_learns_the_value_of_an_endless_episode():
    """Reward 1 for ever is worth 1 / (1 - gamma) = 10, though every episode is cut off after 8 steps."""
    flags = "--env-id toy_envs:Constant-v0 --num-envs 4 --num-steps 32 --num-minibatches 2 --learning-rate 5e-3"
    folder = run(*flags.split(), "--gamma", "0.9", "--total-timesteps", "3_000", "--eval-episodes", "2")
    agent, _ = make_agent("--env-id", "toy_envs:Constant-v0")
    agent.load_state_dict(load(folder)["agent"])
    assert agent.value(torch.ones(1, 1)).item() == pytest.approx(10, abs=0.01)
    assert results(folder)["mean_reward"] == 8


def test_identity_is_solved():
    flags = "--env-id toy_envs:Identity-v0 --num-envs 8 --num-steps 32 --num-minibatches 4 --learning-rate 3e-3"
    folder = run(*flags.split(), "--gamma", "0.5", "--total-timesteps", "3_000", "--eval-episodes", "20")
    assert (results(folder)["mean_reward"], results(folder)["std_reward"]) == (16, 0)
