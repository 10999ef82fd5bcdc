"""A2C: oracles for its formulas, its kinship with PPO, and its loop on environments whose answers are known."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from test_scripts import assert_refused, load, mean_reward, run, scalars

import a2c_continuous as a2c
import ppo

TINY = (
    "--num-envs 2 --num-steps 16 --total-timesteps 256 --num-checkpoints 4 --eval-episodes 10 --log-interval 1".split()
)
PENDULUM = ["--env-id", "Pendulum-v1", *TINY]


def train(*flags):
    """Train as the command line would; returns the run folder."""
    return a2c.train(a2c.parse_args([str(flag) for flag in flags]))


def make_agent(*flags):
    args = a2c.parse_args(list(flags))
    envs = a2c.make_envs(args, 2)
    torch.manual_seed(0)
    return a2c.Agent(envs, args), envs


@pytest.fixture
def seen(monkeypatch):
    """The arguments of every call of compute_gae and of a2c_loss, as pairs."""
    calls, gae, loss = [], a2c.compute_gae, a2c.a2c_loss
    monkeypatch.setattr(a2c, "compute_gae", lambda *args: calls.append([args]) or gae(*args))
    monkeypatch.setattr(a2c, "a2c_loss", lambda *args: calls[-1].append(args) or loss(*args))
    return calls


# --- formulas ---


def test_with_lambda_1_the_target_is_the_n_step_return():
    """Rewards until the episode or the rollout ends, then the value of what would have followed [A3C, §4]."""
    rng = np.random.default_rng(0)
    rewards, values, next_values = rng.normal(size=(3, 6, 2))
    terminated, done = np.zeros((2, 6, 2), dtype=bool)
    terminated[2, 0] = done[2, 0] = done[3, 1] = True
    inside = ~done[:-1]
    next_values[:-1][inside] = values[1:][inside]
    expected = np.zeros((6, 2))
    for t, n in np.ndindex(6, 2):
        for k in range(t, 6):
            expected[t, n] += 0.9 ** (k - t) * rewards[k, n]
            if done[k, n] or k == 5:
                expected[t, n] += 0 if terminated[k, n] else 0.9 ** (k - t + 1) * next_values[k, n]
                break
    arrays = (torch.as_tensor(x) for x in (rewards, values, next_values, terminated, done))
    np.testing.assert_allclose(a2c.compute_gae(*arrays, 0.9, 1.0).numpy() + values, expected, rtol=1e-12)


def test_loss_is_the_policy_gradient_and_the_squared_error():
    agent, _ = make_agent("--env-id", "Pendulum-v1")
    obs, action, target = torch.randn(6, 3), torch.randn(6, 1), torch.arange(6.0)
    advantage = torch.tensor([1.0, -2.0, 3.0, -1.0, 0.5, -0.5])
    loss, metrics = a2c.a2c_loss(agent, obs, action, advantage, target, 0.7, 0.03)
    policy, value = agent(obs)
    mean, std = policy.base_dist.mean.detach().numpy(), 0.6
    logprob = (-(((action.numpy() - mean) / std) ** 2) / 2 - np.log(std) - np.log(2 * np.pi) / 2)[:, 0]
    normalized = (advantage.numpy() - advantage.numpy().mean()) / (advantage.numpy().std(ddof=1) + 1e-8)
    squared_error = np.mean((value.detach().numpy() - np.arange(6)) ** 2)
    entropy = np.log(2 * np.pi * np.e * std**2) / 2
    assert metrics["loss/policy"].item() == pytest.approx(-np.mean(normalized * logprob), rel=1e-4)
    assert metrics["loss/value"].item() == pytest.approx(squared_error, rel=1e-5)
    assert metrics["loss/entropy"].item() == pytest.approx(entropy, rel=1e-5)
    expected = -np.mean(normalized * logprob) + 0.7 * squared_error - 0.03 * entropy
    assert loss.item() == pytest.approx(expected, rel=1e-4)


def test_a2c_is_ppo_with_one_epoch_and_one_minibatch(seen):
    """One update of both on the same rollout gives the same weights [Same]: the ratio is 1, nothing is clipped."""
    agent, envs = make_agent(*PENDULUM)
    train(*PENDULUM)
    _, obs, action, advantage, target, _, _ = seen[-1][1]
    args = ppo.parse_args(["--env-id", "Pendulum-v1", "--normalize-observations"])
    other = ppo.Agent(envs, args)
    agent.observe(obs)
    shared = {name: tensor for name, tensor in agent.state_dict().items() if not name.startswith("returns.")}
    other.load_state_dict(shared)
    start = torch.cat([parameter.detach().flatten() for parameter in agent.parameters()])
    old_logprob = other(obs)[0].log_prob(action).detach()
    losses = [
        a2c.a2c_loss(agent, obs, action, advantage, target, 0.5, 0.01)[0],
        ppo.ppo_loss(other, obs, action, old_logprob, advantage, target, 0.2, 0.5, 0.01)[0],
    ]
    updated = []
    for network, loss in zip((agent, other), losses):
        optimizer = torch.optim.Adam(network.parameters(), lr=1e-3, eps=1e-5)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 0.5)
        optimizer.step()
        named = dict(network.named_parameters())
        updated.append(torch.cat([named[name].detach().flatten() for name in sorted(named)]))
    torch.testing.assert_close(*updated, atol=1e-6, rtol=0)
    assert (torch.cat([p.detach().flatten() for p in agent.parameters()]) - start).abs().max() > 5e-4


def test_only_the_environment_sees_the_clipped_action():
    agent, envs = make_agent("--env-id", "toy_envs:Spaces-v0", "--env-kwargs", '{"action": "matrix"}')
    policy, _ = agent(torch.zeros(2, 9))
    action = torch.full((2, 6), 5.0)
    normal = torch.distributions.Normal(policy.base_dist.mean, policy.base_dist.stddev)
    torch.testing.assert_close(policy.log_prob(action), normal.log_prob(action).sum(-1))
    assert envs.action_space.contains(agent.to_env(action))


@pytest.mark.parametrize("action", ["matrix", "float64", "unbounded"])
@pytest.mark.parametrize("obs", ["dict", "tuple", "image", "float64", "multibinary", "discrete"])
def test_any_box_observation_and_box_action(obs, action):
    """The environment asserts that each action is in its space."""
    kwargs = json.dumps({"obs": obs, "action": action})
    folder = train("--env-id", "toy_envs:Spaces-v0", "--env-kwargs", kwargs, *TINY, "--total-timesteps", "64")
    assert load(folder)["step"] == 64


def test_observations_of_a_goal_are_flattened():
    pytest.importorskip("panda_gym")
    folder = train("--env-id", "panda_gym:PandaReachDense-v3", *TINY, "--total-timesteps", "64", "--eval-episodes", "2")
    assert load(folder)["agent"]["normalize.mean"].shape == (12,)


# --- training ---


def test_constant_reward_with_truncation_learns_the_value_of_an_endless_episode():
    """Reward 1 for ever is worth 1 / (1 - gamma) = 10, though every episode is cut off after 8 steps."""
    flags = "--num-envs 4 --num-steps 16 --gamma 0.9 --total-timesteps 60e3 --num-checkpoints 2 --eval-episodes 2"
    kwargs = '{"box": true}'
    flags = ["--env-id", "toy_envs:Constant-v0", "--env-kwargs", kwargs, *flags.split(), "--no-normalize-rewards"]
    folder = train(*flags)
    agent, _ = make_agent(*flags)
    agent.load_state_dict(load(folder)["agent"])
    assert agent.value(torch.ones(1, 1)).item() == pytest.approx(10, abs=0.7)
    assert mean_reward(folder) == 8


def test_truncated_episodes_keep_their_true_last_observation(seen):
    train(*PENDULUM, "--num-steps", "256", "--total-timesteps", "512", "--num-checkpoints", "1")
    _, values, next_values, terminated, done = seen[0][0][:5]
    assert not terminated.any()
    assert done[199].all()
    assert done.sum() == 2
    inside = ~done[:-1]
    assert torch.equal(next_values[:-1][inside], values[1:][inside])
    assert not torch.isclose(next_values[199], values[200]).any()
    assert not torch.isclose(next_values[-1], values[-1]).any()


def test_rewards_are_divided_by_the_deviation_of_the_discounted_return(seen, monkeypatch):
    """The statistics of all earlier rollouts, where the return starts again with every episode."""
    raw, record = [], a2c.Run.record
    monkeypatch.setattr(a2c.Run, "record", lambda self, o, r, i: raw.append((r, i)) or record(self, o, r, i))
    folder = train(
        *PENDULUM, "--num-steps", "150", "--total-timesteps", "900", "--num-checkpoints", "1", "--gamma", "0.9"
    )
    returns, running = [], np.zeros(2)
    for i in range(3):
        for t in range(150):
            reward, infos = raw[150 * i + t]
            deviation = np.std(returns[: 150 * i]) if i else 1
            expected = np.clip(reward / deviation, -10, 10)
            np.testing.assert_allclose(seen[i][0][0][t].numpy(), expected, rtol=1e-3)
            running = reward + 0.9 * running
            returns.append(running)
            running = running * (1 - infos.get("_episode", np.zeros(2)))
    saved = load(folder)["agent"]
    assert saved["returns.var"].item() == pytest.approx(np.var(returns), rel=1e-3)
    assert saved["returns.count"] == 900
    unscaled = train(*PENDULUM, "--no-normalize-rewards")
    assert unscaled.exists()
    np.testing.assert_allclose(seen[-1][0][0].numpy(), np.stack([r for r, _ in raw[-16:]]), rtol=1e-5)


def test_the_policy_that_is_updated_is_the_one_that_acted(seen):
    """The advantages of a rollout were estimated with the statistics that its actions were taken with."""
    train(*PENDULUM)
    for (gae_args, loss_args), k in zip(seen, range(8)):
        values = gae_args[1].flatten()
        assert len(loss_args[1]) == len(values) == 32
        torch.testing.assert_close(loss_args[4] - loss_args[3], values, atol=1e-4, rtol=1e-4)
        assert k < 8
    assert len(seen) == 8


def test_statistics_stand_still_in_evaluation():
    folder = train(*PENDULUM)
    saved = load(folder)["agent"]
    assert saved["normalize.count"] == saved["returns.count"] == 256


def test_learning_rate_falls_and_gradients_are_clipped():
    rates = [event.value for event in scalars(train(*PENDULUM, "--learning-rate", "0.8"), "train/learning_rate")]
    np.testing.assert_allclose(rates, np.linspace(0.8, 0.1, 8), rtol=1e-6)
    folder = train(*PENDULUM, "--learning-rate", "0.8", "--no-anneal-lr")
    assert [event.value for event in scalars(folder, "train/learning_rate")] == pytest.approx([0.8] * 8)
    weights = [
        torch.cat([t.flatten() for n, t in load(train(*PENDULUM, *flags))["agent"].items() if n.startswith("actor")])
        for flags in (["--max-grad-norm", "1e-12"], ["--max-grad-norm", "1e-11"], [])
    ]
    torch.testing.assert_close(weights[0], weights[1], atol=1e-5, rtol=0)
    assert (weights[0] - weights[2]).abs().max() > 1e-3


def test_log_entries_are_means_of_an_interval():
    folder = train(*PENDULUM, "--log-interval", "2", "--num-checkpoints", "1")
    every = scalars(train(*PENDULUM, "--num-checkpoints", "1"), "loss/value")
    pairs = scalars(folder, "loss/value")
    assert [event.step for event in pairs] == [64, 128, 192, 256]
    expected = [(a.value + b.value) / 2 for a, b in zip(every[::2], every[1::2])]
    assert [event.value for event in pairs] == pytest.approx(expected, rel=1e-5)


def test_it_learns_to_hold_a_target():
    """Reward -(action - 0.5)²: the best action is 0.5 and reaches 0; a random one of deviation 0.6 about -0.6."""
    flags = "--env-id toy_envs:Target-v0 --total-timesteps 20e3 --num-envs 8 --num-steps 8 --gamma 0.5".split()
    assert mean_reward(train(*flags, "--eval-episodes", "20", "--learning-rate", "3e-3")) > -0.1


def test_video_and_score_of_a_packaged_agent():
    """Through push_to_hub.py, with normalised observations: see also test_push_to_hub.py, which runs every script."""
    folder = run("a2c_continuous")
    assert load(folder)["config"]["normalize_observations"]


# --- bad input ---

BAD_INPUT = {
    "--env-id CartPole-v1": "Discrete(2) are not continuous (Box), see ppo.py",
    "--env-id LunarLander-v3": "Discrete(4) are not continuous (Box), see ppo.py",
    "--num-envs 0": "--num-envs 0: must be finite and > 0",
    "--num-envs 1 --num-steps 1": "a single advantage",
    "--total-timesteps 255": "less than the 256 steps of one rollout",
    "--action-std 0": "--action-std 0.0: must be finite and > 0",
    "--gae-lambda 1.1": "must be at most 1",
    "--vectorization-mode fast": None,
}


def test_bad_input_is_refused_in_one_line(capsys, tmp_path):
    assert_refused("a2c_continuous", BAD_INPUT, tmp_path, capsys)


def test_nan_stops_the_run():
    flags = ["--env-id", "toy_envs:Constant-v0", *TINY, "--env-kwargs"]
    for name in ("reward", "observation"):
        with pytest.raises(SystemExit, match=f"{name} is NaN or infinite at step 40"):
            train(*flags, json.dumps({f"bad_{name}_at": 20, "box": True}))
    assert all(load(folder)["step"] % 32 == 0 for folder in Path().glob("runs/*"))
