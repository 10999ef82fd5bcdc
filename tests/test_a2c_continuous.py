"""A2C: oracles for its formulas, its kinship with PPO, and its loop on environments whose answers are known."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from test_scripts import assert_refused, load, mean_reward, scalars, tensors

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
    np.testing.assert_allclose(a2c.compute_gae(*arrays, 0.9, 1.0).numpy() + values, expected, rtol=1e-5)


def test_loss_is_the_policy_gradient_and_the_squared_error():
    agent, _ = make_agent("--env-id", "Pendulum-v1")
    obs, action, target = torch.randn(6, 3), torch.randn(6, 1), torch.arange(6.0)
    advantage = torch.tensor([1.0, -2.0, 3.0, -1.0, 0.5, -0.5])
    loss, metrics = a2c.a2c_loss(agent, obs, action, advantage, target, 0.7, 0.03)
    policy, value = agent.policy(obs), agent.value(obs)
    mean, std = policy.mode.detach().numpy(), 0.6
    logprob = (-(((action.numpy() - mean) / std) ** 2) / 2 - np.log(std) - np.log(2 * np.pi) / 2)[:, 0]
    squared_error = np.mean((value.detach().numpy() - np.arange(6)) ** 2)
    entropy = np.log(2 * np.pi * np.e * std**2) / 2
    assert metrics["loss/policy"].item() == pytest.approx(-np.mean(advantage.numpy() * logprob), rel=1e-4)
    assert metrics["loss/value"].item() == pytest.approx(squared_error, rel=1e-5)
    assert metrics["loss/entropy"].item() == pytest.approx(entropy, rel=1e-5)
    expected = -np.mean(advantage.numpy() * logprob) + 0.7 * squared_error - 0.03 * entropy
    assert loss.item() == pytest.approx(expected, rel=1e-4)


def test_a2c_is_ppo_with_one_epoch_and_one_minibatch(seen):
    """One update of both on the same rollout gives the same weights [Same]: the ratio is 1, nothing is clipped."""
    agent, envs = make_agent(*PENDULUM)
    train(*PENDULUM)
    _, obs, action, advantage, target, _, _ = seen[-1][1]
    args = ppo.parse_args(["--env-id", "Pendulum-v1", "--normalize-observations"])
    other = ppo.Agent(envs, args)
    agent.observe(obs)
    shared = {name: tensor for name, tensor in agent.state_dict().items() if not name.startswith("return_stats.")}
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
    policy = agent.policy(torch.zeros(2, 9))
    action = torch.full((2, 6), 5.0)
    normal = torch.distributions.Normal(policy.mode, policy.log_std.exp())
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


@pytest.mark.parametrize("env_id", ["Pendulum-v1", "LunarLanderContinuous-v3"])  # truncated, terminated
def test_rewards_are_divided_by_the_deviation_of_the_discounted_return(seen, monkeypatch, env_id):
    """The statistics of all earlier rollouts, where the return starts again with every episode."""
    raw, record = [], a2c.Run.record
    monkeypatch.setattr(a2c.Run, "record", lambda self, o, r, i: raw.append((r, i)) or record(self, o, r, i))
    folder = train(
        *PENDULUM,
        "--env-id",
        env_id,
        "--num-steps",
        "150",
        "--total-timesteps",
        "900",
        "--num-checkpoints",
        "1",
        "--gamma",
        "0.9",
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
    assert saved["return_stats.var"].item() == pytest.approx(np.var(returns), rel=1e-3)
    assert saved["return_stats.count"] == 900
    train(*PENDULUM, "--env-id", env_id, "--no-normalize-rewards")
    np.testing.assert_allclose(seen[-1][0][0].numpy(), np.stack([r for r, _ in raw[-16:]]), rtol=1e-5)


def test_the_policy_that_is_updated_is_the_one_that_acted(monkeypatch):
    """The statistics move between updates only: those of acting, of the advantages and of the loss are the same."""
    counts, values, differences = [], [], []
    policy, gae, loss = a2c.Agent.policy, a2c.compute_gae, a2c.a2c_loss

    def spy_loss(agent, obs, *rest):
        differences.append((agent.value(obs) - values[-1].flatten()).abs().max().item())
        return loss(agent, obs, *rest)

    monkeypatch.setattr(a2c, "compute_gae", lambda *args: values.append(args[1]) or gae(*args))
    monkeypatch.setattr(a2c, "a2c_loss", spy_loss)
    monkeypatch.setattr(
        a2c.Agent, "policy", lambda self, obs: counts.append(int(self.normalize.count)) or policy(self, obs)
    )
    monkeypatch.setattr(a2c, "evaluate", lambda *args, **kwargs: np.zeros(1))
    train(*PENDULUM)
    assert counts == [32 * i for i in range(8) for _ in range(16 + 1)]  # 16 actions and a loss
    assert len(differences) == 8
    assert max(differences) < 1e-4


@pytest.mark.parametrize("both", [False, True])
def test_the_successor_of_a_truncated_step_is_its_own_last_observation(seen, both):
    """Environments whose observation says which step it is, truncated at different steps (`both`: and terminated)."""
    kwargs = json.dumps({"both": both})
    flags = ["--env-id", "toy_envs:Clock-v0", "--env-kwargs", kwargs, *TINY, "--no-normalize-observations"]
    train(*flags, "--num-envs", "3", "--num-steps", "12", "--total-timesteps", "36", "--num-checkpoints", "1")
    (_, values, next_values, terminated, done, _, _), (agent, obs, *_) = seen[0]
    monitored = obs.reshape(12, 3, 1)
    assert done.sum() >= 4
    assert terminated.equal(done if both else torch.zeros_like(done))
    agent, _ = make_agent(*flags)
    same = {tuple(o): v for o, v in zip(monitored.reshape(-1, 1).tolist(), values.flatten().tolist())}
    for t, n in np.argwhere(done.numpy()):
        last = (monitored[t, n, 0].item() + 1,)
        if not both and last in same:
            assert next_values[t, n].item() == pytest.approx(same[last], abs=1e-5)
    assert (torch.diff(monitored[:, :, 0], dim=0)[~done[:-1]] == 1).all()


def test_advantages_are_normalized_in_each_update(seen, monkeypatch):
    made, gae = [], a2c.compute_gae
    monkeypatch.setattr(a2c, "compute_gae", lambda *args: made.append(gae(*args)) or made[-1])
    train(*PENDULUM)
    for advantages, (_, (_, _, _, advantage, target, _, _)) in zip(made, seen):
        expected = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
        torch.testing.assert_close(advantage, expected.flatten())
        assert not torch.equal(target, advantage)
    made.clear()
    seen.clear()
    train(*PENDULUM, "--no-normalize-advantages")
    assert all(torch.equal(a.flatten(), calls[1][3]) for a, calls in zip(made, seen))


def test_every_flag_arrives(seen, monkeypatch):
    flags = "--gamma 0.8 --gae-lambda 0.7 --vf-coef 0.3 --ent-coef 0.2 --action-std 0.9 --no-normalize-observations"
    starts = []
    monkeypatch.setattr(
        a2c, "evaluate", lambda agent, *_, **__: starts.append(agent.log_std.exp().item()) or np.zeros(1)
    )
    folder = train(*PENDULUM, *flags.split())
    (*_, gamma, gae_lambda), (*_, vf_coef, ent_coef) = seen[0]
    assert (gamma, gae_lambda, vf_coef, ent_coef) == (0.8, 0.7, 0.3, 0.2)
    assert starts[0] == pytest.approx(0.9)
    assert not any(name.startswith("normalize") for name in load(folder)["agent"])
    train(*PENDULUM, "--no-normalize-rewards")
    assert load(sorted(Path().glob("runs/*"))[-1])["agent"]["return_stats.count"] == 0


def test_async_equals_sync():
    first, second = train(*PENDULUM), train(*PENDULUM, "--vectorization-mode", "async")
    assert all(torch.equal(a, b) for a, b in zip(tensors(load(first)["agent"]), tensors(load(second)["agent"])))


def test_sampled_and_most_likely_actions():
    agent, _ = make_agent("--env-id", "Pendulum-v1")
    obs = torch.zeros(200, 3)
    assert len(set(agent.act(obs, deterministic=False)[:, 0])) > 100
    assert len(set(agent.act(obs, deterministic=True)[:, 0])) == 1


@pytest.mark.parametrize("name", ["adam", "rmsprop"])
def test_two_updates_by_hand(seen, name):
    """The optimizer with eps 1e-5 on fresh gradients, clipped, gives the weights of the checkpoint."""
    flags = ["--total-timesteps", "64", "--num-checkpoints", "1", "--no-anneal-lr", "--no-normalize-observations"]
    flags += ["--max-grad-norm", "0.3", "--learning-rate", "2e-3", "--optimizer", name]
    folder = train(*PENDULUM, *flags)
    args = a2c.parse_args([*PENDULUM, *flags])
    a2c.seed_everything(args.seed)
    agent = a2c.Agent(a2c.make_envs(args, 1), args)
    optimizer = {"adam": torch.optim.Adam, "rmsprop": torch.optim.RMSprop}[name](agent.parameters(), lr=2e-3, eps=1e-5)
    batches = [batch for _, (_, *batch) in seen]
    assert len(batches) == 2
    for batch in batches:
        optimizer.zero_grad()
        a2c.a2c_loss(agent, *batch)[0].backward()
        torch.nn.utils.clip_grad_norm_(agent.parameters(), 0.3)
        optimizer.step()
    saved = load(folder)["agent"]
    for name, parameter in agent.named_parameters():
        torch.testing.assert_close(saved[name], parameter.detach(), atol=1e-6, rtol=1e-5)


def test_statistics_stand_still_in_evaluation():
    folder = train(*PENDULUM)
    saved = load(folder)["agent"]
    assert saved["normalize.count"] == saved["return_stats.count"] == 256


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
    folder = train(*PENDULUM, "--log-interval", "3", "--num-checkpoints", "2")  # nothing is pending at a checkpoint
    assert [event.step for event in scalars(folder, "time/sps")] == [96, 128, 224, 256]


def test_it_learns_to_hold_a_target():
    """Reward -(action - 0.5)²: the best action is 0.5 and reaches 0; a random one of deviation 0.6 about -0.6."""
    flags = "--env-id toy_envs:Target-v0 --total-timesteps 20e3 --num-envs 8 --num-steps 8 --gamma 0.5".split()
    assert mean_reward(train(*flags, "--eval-episodes", "20", "--learning-rate", "3e-3")) > -0.1


# --- bad input ---

BAD_INPUT = {
    '--env-id toy_envs:Spaces-v0 --env-kwargs {"action":"matrix","obs":"opaque"}': "cannot be flattened; wrap them",
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
    flags = ["--env-id", "BipedalWalker-v3", *TINY, "--learning-rate", "1e38", "--log-interval", "25"]
    with pytest.raises(SystemExit, match="action is NaN or infinite at step 32"):
        train(*flags)


def test_ends_and_truncations_in_one_rollout(seen):
    """Only a truncated step gets another successor's value."""
    flags = ["--env-id", "LunarLanderContinuous-v3", "--env-kwargs", '{"max_episode_steps": 100}', "--num-steps", "128"]
    train(*flags, "--num-envs", "8", "--total-timesteps", "2048", "--num-checkpoints", "1", "--eval-episodes", "1")
    both = 0
    for call in seen:
        _, values, next_values, terminated, done, *_ = call[0]
        truncated, inside = done & ~terminated, ~done[:-1]
        both += bool(terminated.any() and truncated.any())
        assert torch.equal(next_values[:-1][inside], values[1:][inside])
        assert not torch.equal(next_values[:-1][truncated[:-1]], values[1:][truncated[:-1]]) or not truncated.any()
    assert both
