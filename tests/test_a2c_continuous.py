"""A2C: oracles for its formulas, its kinship with PPO, and its loop on environments whose answers are known."""

import json

import numpy as np
import pytest
import torch
from gymnasium.vector import AsyncVectorEnv, SyncVectorEnv

import a2c_continuous as a2c
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

TINY = "--num-envs 2 --num-steps 16 --total-timesteps 128 --eval-episodes 2 --log-interval 1".split()
PENDULUM = ["--env-id", "Pendulum-v1", *TINY]


def run(*flags):
    """Train as the command line would; returns the run folder."""
    return a2c.train(a2c.parse_args([str(flag) for flag in flags]))


def make_agent(*flags):
    """The agent with which a run with these flags starts, and its environments."""
    args = a2c.parse_args(list(flags))
    a2c.seed_everything(args.seed)
    envs = a2c.make_envs(args, 2)
    return a2c.Agent(envs, args), envs


# --- formulas ---


@pytest.mark.parametrize("gae_lambda", [0.0, 0.8, 1.0])
def test_gae_is_the_double_sum(gae_lambda):
    rollout = random_rollout()
    advantages = a2c.compute_gae(*gae_inputs(*rollout, 0.9), 0.9, gae_lambda)
    np.testing.assert_allclose(advantages.numpy(), brute_force_gae(*rollout, 0.9, gae_lambda), rtol=1e-5, atol=1e-6)


def test_with_lambda_1_the_target_is_the_n_step_return():
    """Rewards until the episode or the rollout ends, then the value of what would have followed [A3C, §4]."""
    rewards, values, next_values, terminated, truncated = rollout = random_rollout()
    targets = a2c.compute_gae(*gae_inputs(*rollout, 0.9), 0.9, 1.0).numpy() + values
    np.testing.assert_allclose(targets, n_step_returns(rewards, next_values, terminated, truncated, 0.9), rtol=1e-5)


def test_loss_is_the_policy_gradient_and_the_squared_error():
    flags = "--vf-coef 0.7 --ent-coef 0.03".split()
    agent, _ = make_agent("--env-id", "Pendulum-v1", *flags)
    obs, action, target = torch.randn(6, 3), torch.randn(6, 1), torch.arange(6.0)
    advantage = torch.tensor([1.0, -2.0, 3.0, -1.0, 0.5, -0.5])
    loss, metrics = a2c.a2c_loss(agent, obs, action, advantage, target, a2c.parse_args(flags))
    gradients = torch.autograd.grad(loss, list(agent.parameters()))

    policy = torch.distributions.Normal(agent.actor(obs)[:, 0], agent.log_std.exp())
    gradient_term = sum(-advantage[i] * policy.log_prob(action[:, 0])[i] for i in range(6)) / 6
    squared_error = sum((agent.critic(obs[i]).squeeze() - target[i]) ** 2 for i in range(6)) / 6
    expected = gradient_term + 0.7 * squared_error - 0.03 * policy.entropy()[0]
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, list(agent.parameters())))
    assert metrics["loss/policy"].item() == pytest.approx(gradient_term.item(), rel=1e-4)
    assert metrics["loss/value"].item() == pytest.approx(squared_error.item(), rel=1e-5)
    assert metrics["loss/entropy"].item() == pytest.approx(np.log(2 * np.pi * np.e * 0.6**2) / 2, rel=1e-5)


def test_only_the_environment_sees_the_clipped_action():
    agent, envs = make_agent("--env-id", "toy_envs:Spaces-v0", "--env-kwargs", '{"action": "matrix"}')
    policy, action = agent.policy(torch.zeros(2, 9)), torch.full((2, 2, 3), 5.0)
    normal = torch.distributions.Normal(policy.mode, policy.log_std.exp())
    torch.testing.assert_close(policy.log_prob(action), normal.log_prob(action).sum((1, 2)))
    torch.testing.assert_close(policy.entropy(), normal.entropy()[0].sum())
    assert envs.action_space.contains(agent.to_env(action))
    np.testing.assert_array_equal(agent.to_env(action), np.full((2, 2, 3), 0.1, np.float32))


def test_both_networks_see_normalized_observations():
    agent, _ = make_agent("--env-id", "Pendulum-v1")
    obs = torch.randn(50, 3) * 3 + 7
    agent.update_normalizer(obs)
    scaled = (obs - obs.mean(0)) / obs.std(0, correction=0)
    torch.testing.assert_close(agent.policy(obs).mode, agent.actor(scaled), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(agent.value(obs), agent.critic(scaled)[:, 0], atol=1e-4, rtol=1e-4)


def test_sampled_and_most_likely_actions():
    agent, _ = make_agent("--env-id", "Pendulum-v1", "--action-std", "0.3")
    obs = torch.zeros(2000, 3)
    sampled = agent.act(obs, deterministic=False)
    most_likely = agent.act(obs, deterministic=True)
    assert sampled.std() == pytest.approx(0.3, rel=0.1)
    assert len(set(most_likely[:, 0])) == 1
    assert sampled.mean() == pytest.approx(most_likely[0, 0], abs=0.03)


# --- the loop ---


def test_noise_is_held_and_drawn_anew(monkeypatch):
    """--hold-noise 4: the same noise for four steps in each environment, and new noise for each rollout."""
    no_evaluation(monkeypatch, a2c)
    losses = spy(monkeypatch, a2c, "a2c_loss")
    run(*PENDULUM, "--hold-noise", 4, "--num-steps", 6)
    drawn = []
    for (agent, obs, action, *_), _ in losses:  # the agent as it was while acting
        with torch.no_grad():
            policy = agent.policy(obs)
            noise = ((action - policy.mode) / policy.log_std.exp()).view(6, 2)  # (T, N)
        torch.testing.assert_close(noise[:4], noise[:1].expand(4, 2), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(noise[4:], noise[4:5].expand(2, 2), atol=1e-4, rtol=1e-4)
        drawn += [*noise[0], *noise[4]]
    assert len(losses) > 5
    assert len({round(number.item(), 2) for number in drawn}) > 0.8 * len(drawn)
    assert torch.stack(drawn).std() == pytest.approx(1, abs=0.4)


ROLLOUTS = [
    ("--env-id Pendulum-v1 --num-steps 80", {}),  # truncated at 200, in the third rollout
    ("--env-id LunarLanderContinuous-v3 --num-steps 128", {"max_episode_steps": 90}),  # terminated or truncated
    ("--env-id toy_envs:Clock-v0 --num-steps 16", {}),  # truncated, each environment at another step
    ("--env-id toy_envs:Clock-v0 --num-steps 16", {"gives": "reused"}),  # in the same array each time
    ("--env-id toy_envs:Clock-v0 --num-steps 16", {"both": True}),  # both at once is terminated
    ("--env-id toy_envs:Clock-v0 --num-steps 16 --no-normalize-rewards --no-normalize-advantages", {}),
    ("--env-id toy_envs:Constant-v0 --num-steps 16", {"reward": 30, "box": True}),  # clipped
]


@pytest.mark.parametrize(("flags", "env_kwargs"), ROLLOUTS, ids=lambda x: x if isinstance(x, str) else json.dumps(x))
def test_rollouts_are_what_single_environments_give(monkeypatch, flags, env_kwargs):
    """Scaled rewards, the bootstrap on top, values, dones, advantages, and what the loss gets, in three rollouts.

    A reward is divided by the deviation of the discounted returns in all earlier rollouts; a return starts again with
    every episode. The bootstrap is a value of scaled rewards already, so it is neither scaled nor clipped.
    """
    no_evaluation(monkeypatch, a2c)
    gaes, losses, actions = (
        spy(monkeypatch, *where) for where in ((a2c, "compute_gae"), (a2c, "a2c_loss"), (a2c.Agent, "to_env"))
    )
    args = a2c.parse_args([*f"{flags} --gamma 0.9 --gae-lambda 0.8".split(), "--env-kwargs", json.dumps(env_kwargs)])
    T, N = args.num_steps, args.num_envs = args.num_steps, 3
    args.total_timesteps = 3 * T * N
    folder = a2c.train(args)
    played = play(args, a2c.seed_everything(args.seed, 0), np.stack([result for _, result in actions]))
    assert (len(gaes), len(losses), len(actions)) == (3, 3, 3 * T)
    assert (played.terminated | played.truncated).any()
    running, returns = torch.zeros(N), []
    for k in range(3):
        rollout = slice(k * T, (k + 1) * T)
        agent, seen_obs, seen_action, seen_advantage, seen_target, seen_args = losses[k][0]  # as it was while acting
        obs, next_obs, reward, terminated, truncated = (
            x[rollout] for x in (played.obs, played.next_obs, played.reward, played.terminated, played.truncated)
        )
        if args.normalize_rewards:
            deviation = torch.stack(returns).std(correction=0) if k else 1
            expected = (reward / deviation).clamp(-10, 10)
        for t in range(T):
            running = reward[t] + 0.9 * running
            returns.append(running)
            running = torch.where(terminated[t] | truncated[t], 0, running)
        with torch.no_grad():
            values, next_values = agent.value(obs), agent.value(next_obs)
        inputs = expected if args.normalize_rewards else reward, values, next_values, terminated, truncated
        (rewards, seen_values, last_value, dones, *coefficients), advantages = gaes[k]
        expected = gae_inputs(*inputs, 0.9)
        torch.testing.assert_close(rewards, expected[0], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(seen_values, values, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(last_value[~dones[-1]], expected[2][~dones[-1]], rtol=1e-4, atol=1e-4)
        assert torch.equal(dones, expected[3])
        assert coefficients == [0.9, 0.8]
        expected = torch.as_tensor(brute_force_gae(*(x.numpy() for x in inputs), 0.9, 0.8), dtype=torch.float32)
        torch.testing.assert_close(advantages, expected, rtol=1e-3, atol=2e-2)

        sampled = torch.stack([action for (_, action), _ in actions[rollout]]).flatten(end_dim=1)
        policy = agent.policy(obs.flatten(end_dim=1))
        noise = ((sampled - policy.mode) / policy.log_std.exp()).std().item()
        assert noise == pytest.approx(1, abs=0.4)  # the actions were sampled
        normalized = (advantages - advantages.mean()) / advantages.std() if args.normalize_advantages else advantages
        rows = [obs.flatten(end_dim=1), sampled, normalized.flatten(), (advantages + values).flatten()]
        assert_same_rows([seen_obs, seen_action, seen_advantage, seen_target], rows, atol=1e-3)
        assert seen_args is args
    saved = load(folder)["agent"]
    var = torch.stack(returns).var(correction=0) if args.normalize_rewards else torch.tensor(1.0)
    torch.testing.assert_close(saved["return_norm.var"][0], var, rtol=1e-3, atol=0)
    assert saved["return_norm.count"] == (3 * T * N if args.normalize_rewards else 0)
    assert saved["normalize.count"] == 3 * T * N


def test_the_policy_that_is_updated_is_the_one_that_acted(monkeypatch):
    """The statistics move between updates only: those of acting, of the advantages and of the loss are the same."""
    no_evaluation(monkeypatch, a2c)
    policy, losses = spy(monkeypatch, a2c.Agent, "policy"), spy(monkeypatch, a2c, "a2c_loss")
    gaes = spy(monkeypatch, a2c, "compute_gae")
    run(*PENDULUM)
    counts = [int(agent.normalize.count) for (agent, _), _ in policy]
    assert counts == [32 * k for k in range(4) for _ in range(16 + 1)]  # 16 actions and a loss
    for (loss_args, _), (gae_args, _) in zip(losses, gaes, strict=True):
        torch.testing.assert_close(loss_args[0].value(loss_args[1]), gae_args[1].flatten())


def test_a2c_is_ppo_with_one_epoch_and_one_minibatch(monkeypatch):
    """Both train to the same weights [Same]: the ratio is 1, and nothing is clipped."""
    monkeypatch.setattr(torch, "randperm", lambda n, device: torch.arange(n))  # draws nothing, so both act alike
    shared = [*PENDULUM[:-2], "--normalize-observations", "--learning-rate", "1e-3", "--gamma", "0.9"]
    shared += "--gae-lambda 0.8 --ent-coef 0.01 --max-grad-norm 0.3".split()
    folder = run(*shared, "--no-normalize-rewards", "--action-std", "1")
    other = ppo.train(ppo.parse_args([*shared, "--num-minibatches", "1", "--update-epochs", "1"]))
    weights, expected = load(folder)["agent"], load(other)["agent"]
    torch.testing.assert_close({name: weights[name] for name in expected}, expected, atol=1e-5, rtol=1e-4)
    assert (weights["critic.0.weight"] - make_agent(*shared)[0].critic[0].weight).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["adam", "rmsprop"])
@pytest.mark.parametrize("anneal", [True, False])
def test_updates_by_hand(monkeypatch, name, anneal):
    """The optimizer with eps 1e-5 on fresh, clipped gradients gives the weights of the checkpoint."""
    losses = spy(monkeypatch, a2c, "a2c_loss")
    flags = [*PENDULUM, "--max-grad-norm", "0.3", "--learning-rate", "2e-3", "--optimizer", name]
    flags += [f"--anneal-lr={anneal}", "--no-normalize-observations"]
    folder = run(*flags)
    agent, _ = make_agent(*flags)
    optimizer = {"adam": torch.optim.Adam, "rmsprop": torch.optim.RMSprop}[name](agent.parameters(), eps=1e-5)
    rates = [2e-3, 1.5e-3, 1e-3, 0.5e-3] if anneal else [2e-3] * 4  # the first in full, never 0
    steps = [lambda agent, batch=args[1:]: a2c.a2c_loss(agent, *batch)[0] for args, _ in losses]
    expected = by_hand(agent, optimizer, steps, rates, 0.3)
    saved = load(folder)["agent"]
    torch.testing.assert_close({name: saved[name] for name in expected}, expected, atol=1e-5, rtol=1e-5)
    assert [event.value for event in scalars(folder, "train/learning_rate")] == pytest.approx(rates)
    assert not any(name.startswith("normalize") for name in saved)


def test_log_entries_are_means_of_an_interval(monkeypatch):
    losses = spy(monkeypatch, a2c, "a2c_loss")
    folder = run(*PENDULUM, "--log-interval", "2")
    for name in ("loss/policy", "loss/value", "loss/entropy"):
        events = scalars(folder, name)
        assert [event.step for event in events] == [64, 128]
        for k, event in enumerate(events):
            mean = np.mean([metrics[name] for _, (_, metrics) in losses[2 * k : 2 * k + 2]])
            assert event.value == pytest.approx(mean, rel=1e-5)
    assert scalars(folder, "train/grad_norm")[0].value > 0
    # The checkpoints lie 416 steps apart, the log entries 96: nothing is pending at a checkpoint.
    folder = run(*PENDULUM, "--log-interval", "3", "--total-timesteps", "832", "--num-checkpoints", "2")
    steps = [event.step for event in scalars(folder, "time/sps")]
    assert steps == [96, 192, 288, 384, 416, 512, 608, 704, 800, 832]


def test_the_optimizer_cannot_be_changed_by_resume(capsys):
    """The averages of one are of no use to the other; nothing is written."""
    folder = run(*PENDULUM)
    checkpoint = (folder / "checkpoint.pt").read_bytes()
    with pytest.raises(SystemExit) as stop:
        run("--resume", folder, "--optimizer", "rmsprop", "--total-timesteps", 256)
    assert stop.value.code == 2
    assert "--optimizer: cannot be changed by --resume" in capsys.readouterr().err
    assert (folder / "checkpoint.pt").read_bytes() == checkpoint
    run("--resume", folder, "--total-timesteps", 256)


def test_explained_variance(monkeypatch):
    gaes = spy(monkeypatch, a2c, "compute_gae")
    folder = run(*PENDULUM)
    for event, ((_, values, *_), advantages) in zip(scalars(folder, "train/explained_variance"), gaes, strict=True):
        assert event.value == pytest.approx(1 - (advantages.var() / (advantages + values).var()).item(), abs=1e-4)


def test_every_flag_reaches_the_loop(monkeypatch):
    """The others are in the tests above."""
    losses, gaes = spy(monkeypatch, a2c, "a2c_loss"), spy(monkeypatch, a2c, "compute_gae")
    flags = "--num-envs 3 --num-steps 8 --total-timesteps 40 --gamma 0.7 --gae-lambda 0.6 --action-std 0.9"
    flags = ["--env-id", "Pendulum-v1", *flags.split(), "--eval-episodes", "2", "--vectorization-mode", "async"]
    args = a2c.parse_args(flags)
    envs, evaluation = a2c.make_envs(args, 2), a2c.make_envs(args, 2, evaluation=True)
    assert isinstance(envs.unwrapped, AsyncVectorEnv)
    assert isinstance(evaluation.unwrapped, SyncVectorEnv)
    envs.close()
    folder = a2c.train(args)
    assert len(gaes) == len(losses) == 2
    assert gaes[0][0][0].shape == (8, 3)
    assert gaes[0][0][4:] == [0.7, 0.6]
    assert losses[0][0][0].log_std.exp().item() == pytest.approx(0.9)
    assert load(folder)["step"] == 48
    args.vectorization_mode = "sync"
    torch.testing.assert_close(load(a2c.train(args))["agent"], load(folder)["agent"])


# --- learning ---


def test_observations_of_a_goal_are_flattened():
    pytest.importorskip("panda_gym")
    folder = run("--env-id", "panda_gym:PandaReachDense-v3", *TINY, "--total-timesteps", "32")
    assert load(folder)["agent"]["normalize.mean"].shape == (12,)


@pytest.mark.parametrize("action", ["matrix", "float64", "unbounded"])
def test_any_observation_and_box_action(action):
    """The environment asserts that each action is in its space."""
    for obs in ("dict", "tuple", "image", "float64", "multibinary", "discrete"):
        kwargs = json.dumps({"obs": obs, "action": action})
        envs = a2c.make_envs(a2c.parse_args(["--env-id", "toy_envs:Spaces-v0", "--env-kwargs", kwargs]), 3)
        agent = a2c.Agent(envs, a2c.Args())
        observation, _ = envs.reset(seed=1)
        for _ in range(5):
            assert observation.dtype == np.float32
            observation, *_ = envs.step(agent.act(torch.as_tensor(observation), deterministic=False))
    folder = run("--env-id", "toy_envs:Spaces-v0", "--env-kwargs", kwargs, *TINY)
    assert load(folder)["step"] == 128


def test_constant_reward_with_truncation_learns_the_value_of_an_endless_episode():
    """Reward 1 for ever is worth 1 / (1 - gamma) = 10, though every episode is cut off after 8 steps."""
    flags = "--num-envs 4 --num-steps 8 --gamma 0.9 --total-timesteps 6_000 --eval-episodes 2 --learning-rate 5e-3"
    flags = ["--env-id", "toy_envs:Constant-v0", "--env-kwargs", '{"box": true}', *flags.split()]
    folder = run(*flags, "--no-normalize-rewards", "--max-grad-norm", "5")
    agent, _ = make_agent(*flags)
    agent.load_state_dict(load(folder)["agent"])
    assert agent.value(torch.ones(1, 1)).item() == pytest.approx(10, abs=0.01)
    assert results(folder)["mean_reward"] == 8


def test_it_learns_to_hold_a_target():
    """Reward -(action - 0.5)²: the best action is 0.5 and reaches 0; a random one of deviation 0.6 about -0.6."""
    flags = "--env-id toy_envs:Target-v0 --total-timesteps 5_000 --num-envs 8 --num-steps 8 --gamma 0.5".split()
    assert results(run(*flags, "--eval-episodes", "20", "--learning-rate", "1e-2"))["mean_reward"] > -0.02
