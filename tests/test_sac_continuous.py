"""SAC: oracles for its formulas, one update by hand, its replay, and its loop in environments with known answers."""

import json
import math

import numpy as np
import pytest
import torch
from gymnasium.vector import AsyncVectorEnv

import sac_continuous as sac
from oracles import no_evaluation, play, spy
from runs import load, refusal, results, scalars

TINY = (
    "--num-envs 2 --hidden-size 8 --batch-size 16 --learning-starts 32 --total-timesteps 128 --eval-episodes 2".split()
)
PENDULUM = ["--env-id", "Pendulum-v1", *TINY]


def run(*flags):
    """Train as the command line would; returns the run folder."""
    return sac.train(sac.parse_args([str(flag) for flag in flags]))


def make_agent(*flags):
    """The agent with which a run with these flags starts, and its environments."""
    args = sac.parse_args(list(flags))
    sac.seed_everything(args.seed)
    envs = sac.make_envs(args, 2)
    return sac.Agent(envs, args), envs


# --- formulas ---


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.7, 0.5), (-1.5, 0.2), (0.0, 3.0)])
def test_the_density_of_squashed_actions(monkeypatch, mean, std):
    """It sums up to 1 over all actions, and up to the distribution function of the normal law below any action."""
    noise = torch.linspace(-8, 8, 200_001, dtype=torch.float64)[:, None]
    monkeypatch.setattr(torch, "randn_like", lambda _: noise)
    policy = sac.SquashedGaussian(torch.full_like(noise, mean), torch.full_like(noise, math.log(std)))
    action, logprob = policy.sample()
    density = logprob.exp().numpy()
    a = action[:, 0].numpy()
    below = np.concatenate([[0], np.cumsum(np.diff(a) * (density[1:] + density[:-1]) / 2)])
    expected = torch.special.ndtr(noise[:, 0]).numpy()  # the share of the numbers u with less noise
    np.testing.assert_allclose(below, expected, atol=1e-4)
    assert below[-1] == pytest.approx(1, abs=1e-4)
    np.testing.assert_allclose(a, np.tanh(mean + std * noise[:, 0].numpy()), rtol=1e-6)
    np.testing.assert_allclose(policy.mode.numpy(), math.tanh(mean))


def test_the_density_of_several_numbers_is_the_product(monkeypatch):
    noise = torch.randn(5, 3)
    monkeypatch.setattr(torch, "randn_like", lambda _: noise)
    mean, log_std = torch.randn(5, 3), torch.randn(5, 3)
    _, logprob = sac.SquashedGaussian(mean, log_std).sample()
    u = mean + log_std.exp() * noise
    expected = torch.distributions.Normal(mean, log_std.exp()).log_prob(u) - (1 - u.tanh().square()).log()
    torch.testing.assert_close(logprob, expected.sum(-1), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("mean", [-40.0, 40.0])
def test_the_density_is_finite_at_the_bounds(mean):
    """There 1 - tanh(u)² is 0 in floating point."""
    mean = torch.full((2, 1), mean, requires_grad=True)
    action, logprob = sac.SquashedGaussian(mean, torch.zeros(2, 1)).sample()
    (gradient,) = torch.autograd.grad(logprob.sum(), mean)
    assert action.abs().max() == 1
    assert logprob.isfinite().all()
    torch.testing.assert_close(gradient, 2 * mean.sign())


def test_gradients_pass_through_actions_and_densities(monkeypatch):
    """d action / d log_std = (1 - tanh²) std noise; d logprob / d log_std = -1 + 2 tanh(u) std noise."""
    noise = torch.tensor([[0.4]])
    monkeypatch.setattr(torch, "randn_like", lambda _: noise)
    log_std = torch.tensor([[-0.3]], requires_grad=True)
    action, logprob = sac.SquashedGaussian(torch.tensor([[0.2]]), log_std).sample()
    std = math.exp(-0.3)
    t = math.tanh(0.2 + std * 0.4)
    assert torch.autograd.grad(action, log_std, retain_graph=True)[0].item() == pytest.approx((1 - t * t) * std * 0.4)
    assert torch.autograd.grad(logprob, log_std)[0].item() == pytest.approx(-1 + 2 * t * std * 0.4, rel=1e-4)


def test_the_spread_of_actions_is_bounded():
    agent, _ = make_agent(*PENDULUM)
    with torch.no_grad():
        agent.actor[-1].bias.copy_(torch.tensor([0.5, 100.0]))
        agent.actor[-1].weight.zero_()
        assert agent.policy(torch.zeros(3, 3)).log_std.tolist() == [[2]] * 3
        agent.actor[-1].bias[1] = -100
        assert agent.policy(torch.zeros(3, 3)).log_std.tolist() == [[-20]] * 3


def test_the_target_takes_the_smaller_value_and_adds_the_entropy():
    class Policy:
        def sample(self):
            return torch.tensor([[0.1], [0.2], [0.3]]), torch.tensor([-1.0, 2.0, 3.0])

    agent, _ = make_agent(*PENDULUM, "--alpha", "0.5")
    agent.policy = lambda obs: Policy()
    values = torch.tensor([[4.0, 6.0, 1.0], [5.0, 2.0, 9.0]])
    asked = []

    def target_network(obs, action):
        asked.append((obs, action))
        return values

    next_obs = torch.randn(3, 3)
    reward, terminated = torch.tensor([1.0, 1.0, 7.0]), torch.tensor([False, False, True])
    target = sac.td_target(agent, target_network, reward, next_obs, terminated, 0.9)
    torch.testing.assert_close(target, torch.tensor([1 + 0.9 * (4 + 0.5), 1 + 0.9 * (2 - 1), 7.0]))
    assert asked[0][0] is next_obs
    assert asked[0][1].flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])


@pytest.mark.parametrize("alpha", [0.2, 1.5])
def test_the_gradient_of_the_temperature(alpha):
    """d/d log α of -α mean(logprob + target) is the same number again: positive, so α falls, if the entropy is high."""
    log_alpha = torch.tensor(math.log(alpha), requires_grad=True)
    logprob = torch.tensor([-3.0, 1.0, -1.0])  # entropy 1, target -2
    loss = sac.alpha_loss(log_alpha, logprob, -2)
    (gradient,) = torch.autograd.grad(loss, log_alpha)
    assert loss.item() == gradient.item() == pytest.approx(alpha * 3)
    (gradient,) = torch.autograd.grad(sac.alpha_loss(log_alpha, logprob, 4), log_alpha)
    assert gradient.item() == pytest.approx(-alpha * 3)


def test_the_target_networks_are_a_moving_average():
    first, second = sac.TwinQ(2, 1, 4), sac.TwinQ(2, 1, 4)
    expected = {name: 0.3 * weight + 0.7 * first.state_dict()[name] for name, weight in second.state_dict().items()}
    sac.update_target(first, second, 0.3)
    torch.testing.assert_close(dict(first.state_dict()), expected)


def test_the_two_q_networks_are_different():
    network = sac.TwinQ(3, 2, 16)
    values = network(torch.randn(7, 3), torch.randn(7, 2))
    assert values.shape == (2, 7)
    assert (values[0] - values[1]).abs().min() > 1e-4


# --- one update by hand ---


def perceptron(weights, prefix, x):
    """Two hidden layers of ReLU units."""
    for layer in (0, 2):
        x = (x @ weights[f"{prefix}.{layer}.weight"].T + weights[f"{prefix}.{layer}.bias"]).clamp(min=0)
    return x @ weights[f"{prefix}.4.weight"].T + weights[f"{prefix}.4.bias"]


def q_values(weights, obs, action):
    """Both Q-values (2, B) from the weights of a TwinQ by their names."""
    x = torch.cat([obs, action], 1)
    return torch.stack([perceptron(weights, name, x)[:, 0] for name in ("first", "second")])


def adam_step(weights, gradients, rate):
    """Adam's first step: the mean of the gradients over the root of the mean of their squares is their sign."""
    return {name: w - rate * gradients[name] / (gradients[name].abs() + 1e-8) for name, w in weights.items()}


def gradients_of(loss, weights):
    return dict(zip(weights, torch.autograd.grad(loss, list(weights.values()))))


@pytest.mark.parametrize("autotune", [True, False])
def test_one_update_by_hand(monkeypatch, autotune):
    """In an environment of two states, with noise 0: the Q-networks, then the policy, the temperature, the target."""
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)
    minibatches = spy(monkeypatch, sac, "q_loss")
    flags = ["--env-id", "toy_envs:TwoStates-v0", *TINY, "--num-envs", "1", "--total-timesteps", "33"]
    flags += "--alpha 0.3 --gamma 0.8 --q-lr 0.01 --policy-lr 0.002 --tau 0.1".split()
    flags += [] if autotune else ["--no-autotune"]
    checkpoint = load(run(*flags, "--updates-per-step", "0.0304"))  # 1 update for 33 steps, none for 32
    assert len(minibatches) == 1
    agent, _ = make_agent(*flags)
    obs, action, reward, next_obs, terminated = (minibatches[0][0][2 + i] for i in range(5))
    assert set(map(tuple, obs.tolist())) == {(1, 0), (0, 1)}
    assert 0 < terminated.sum() < 16

    q_weights = dict(agent.q_network.named_parameters())
    actor = {f"actor.{name}": weight for name, weight in agent.actor.named_parameters()}
    old = {name: weight.detach().clone() for name, weight in q_weights.items()}

    def act(obs):
        mean, log_std = perceptron(actor, "actor", obs).chunk(2, 1)
        logprob = -log_std - math.log(2 * math.pi) / 2 - (1 - mean.tanh() ** 2).log()
        return mean.tanh(), logprob[:, 0]

    next_action, logprob = act(next_obs)
    smaller = torch.minimum(*q_values(q_weights, next_obs, next_action))
    target = (reward + 0.8 * (smaller - 0.3 * logprob) * (1 - terminated.float())).detach()
    first, second = q_values(q_weights, obs, action)
    loss = ((first - target) ** 2).mean() / 2 + ((second - target) ** 2).mean() / 2
    q_weights = adam_step(q_weights, gradients_of(loss, q_weights), 0.01)
    now, logprob = act(obs)
    loss = (0.3 * logprob - torch.minimum(*q_values(q_weights, obs, now))).mean()
    new_actor = adam_step(actor, gradients_of(loss, actor), 0.002)
    sign = torch.sign((logprob - 1).mean())  # of the target entropy -1
    log_alpha = torch.tensor(math.log(0.3)) + 0.01 * sign * autotune

    saved = checkpoint["agent"]
    close = {"rtol": 1e-3, "atol": 2e-5}
    for name, weight in q_weights.items():
        torch.testing.assert_close(saved[f"q_network.{name}"], weight.detach(), **close)
        average = 0.1 * weight + 0.9 * old[name]
        torch.testing.assert_close(checkpoint["target_network"][name], average.detach(), **close)
    for name, weight in new_actor.items():
        torch.testing.assert_close(saved[name], weight.detach(), **close)
    torch.testing.assert_close(saved["log_alpha"], log_alpha, **close)


# --- the replay ---

PLAYED = [
    ("--env-id Pendulum-v1 --total-timesteps 1300", {}),  # truncated at 200
    ("--env-id LunarLanderContinuous-v3 --total-timesteps 900", {"max_episode_steps": 90}),  # terminated or truncated
    ("--env-id toy_envs:Clock-v0 --total-timesteps 96", {}),  # truncated, each environment at another step
    ("--env-id toy_envs:Clock-v0 --total-timesteps 96", {"gives": "reused"}),  # in the same array each time
    ("--env-id toy_envs:Clock-v0 --total-timesteps 96", {"both": True}),  # both at once is terminated
]


@pytest.mark.parametrize(("flags", "env_kwargs"), PLAYED, ids=lambda x: x if isinstance(x, str) else json.dumps(x))
def test_the_replay_holds_what_single_environments_give(monkeypatch, flags, env_kwargs):
    no_evaluation(monkeypatch, sac)
    actions = spy(monkeypatch, sac.Agent, "to_env")
    args = sac.parse_args([*TINY, *flags.split(), "--num-envs", "3", "--updates-per-step", "0.1", "--save-replay"])
    args.num_checkpoints = 1  # at a checkpoint the environments start anew
    args.env_kwargs = json.dumps(env_kwargs)
    columns = load(sac.train(args))["replay"]["columns"]
    played = play(args, sac.seed_everything(args.seed, 0), np.stack([result for _, result in actions]))
    for name in ("obs", "reward", "next_obs", "terminated"):
        torch.testing.assert_close(columns[name], getattr(played, name).flatten(end_dim=1), rtol=1e-5, atol=1e-5)
    assert torch.equal(columns["action"], torch.cat([inputs[1] for inputs, _ in actions]))
    assert (played.terminated | played.truncated).any()


def test_the_replay_is_a_ring():
    """After 17 rows of 2, the last 9 steps are in it, and sampling finds all of them, each about as often."""
    replay = sac.ReplayBuffer(9, 2, 1, torch.device("cpu"))
    for i in range(17):
        number = np.array([2.0 * i, 2.0 * i + 1])
        step = {"obs": np.stack([number, -number], 1), "next_obs": np.stack([number + 1] * 2, 1)}
        replay.add(**step, action=number[:, None], reward=number / 2, terminated=number % 3 == 0)
        newest = range(max(0, 2 * i + 2 - 9), 2 * i + 2)
        assert replay.size == len(newest)
        batch = replay.sample(2000)
        number = batch["action"][:, 0]
        assert set(number.tolist()) == set(newest)
        assert number.unique(return_counts=True)[1].min() > 0.6 * 2000 / len(newest)
        torch.testing.assert_close(batch["obs"], torch.stack([number, -number], 1))
        torch.testing.assert_close(batch["next_obs"], torch.stack([number + 1] * 2, 1))
        torch.testing.assert_close(batch["reward"], number / 2)
        assert torch.equal(batch["terminated"], number % 3 == 0)
    again = sac.ReplayBuffer(9, 2, 1, torch.device("cpu"))
    again.load_state_dict(replay.state_dict())
    torch.manual_seed(0)
    first = replay.sample(50)
    torch.manual_seed(0)
    torch.testing.assert_close(again.sample(50), first)
    assert again.next_row == replay.next_row == 34 % 9
    with pytest.raises(ValueError, match="a replay of 9 rows, not 10"):
        sac.ReplayBuffer(10, 2, 1, torch.device("cpu")).load_state_dict(replay.state_dict())


def test_a_replay_that_does_not_fit_is_refused(capsys):
    assert "GB are free" in refusal("sac_continuous", "--buffer-size", "1_000_000_000_000", capsys=capsys)


def test_another_temperature_takes_effect_in_a_resumed_run():
    folder = run(*PENDULUM)
    run("--resume", folder, "--total-timesteps", "192", "--no-autotune", "--alpha", "0.05")
    assert load(folder)["agent"]["log_alpha"].exp().item() == pytest.approx(0.05)


def test_memory_for_the_copy_that_save_replay_makes(monkeypatch):
    """A replay of 2 GB fits into 3 GB, but not a copy of it, too."""
    monkeypatch.setattr(sac.psutil, "virtual_memory", lambda: type("Memory", (), {"available": 3e9}))
    flags = [*PENDULUM, "--buffer-size", "55_000_000"]  # 36 bytes a row
    run(*flags)
    with pytest.raises(SystemExit):
        run(*flags, "--save-replay")


def test_a_resumed_run_without_its_replay_fills_a_new_one_with_the_policy(monkeypatch):
    folder = run(*PENDULUM)
    assert "replay" not in load(folder)
    losses, actions = spy(monkeypatch, sac, "q_loss"), spy(monkeypatch, sac.SquashedGaussian, "sample")
    no_evaluation(monkeypatch, sac)
    run("--resume", folder, "--total-timesteps", "192")
    # 64 more steps of 2 environments: 32 rows, then a gradient step for each step from the one that fills the 32nd row
    assert len(losses) == 64 - 30
    assert len(actions) == 32 + 2 * len(losses)


# --- the loop ---


def test_actions_are_random_before_learning_starts(monkeypatch):
    actions = spy(monkeypatch, sac.Agent, "to_env")
    no_evaluation(monkeypatch, sac)
    run(*PENDULUM, "--learning-starts", "1000", "--total-timesteps", "1002", "--num-envs", "1")
    drawn = torch.cat([inputs[1] for inputs, _ in actions])[:1000, 0].numpy()
    quarters = np.histogram(drawn, bins=4, range=(-1, 1))[0]
    assert quarters.sum() == 1000
    assert quarters.min() > 200
    np.testing.assert_allclose(np.concatenate([result for _, result in actions])[:1000, 0], 2 * drawn, rtol=1e-5)


COUNTS = [  # one environment: the updates 31 to 127
    ("", 97, 97, 97),
    ("--updates-per-step 2", 194, 194, 194),
    ("--updates-per-step 0.25", 25, 25, 25),
    ("--policy-frequency 2 --target-network-frequency 4", 97, 48, 24),
    ("--no-autotune", 97, 97, 97),
]


@pytest.mark.parametrize(("flags", "q_steps", "policy_steps", "target_steps"), COUNTS)
def test_the_number_of_updates(monkeypatch, flags, q_steps, policy_steps, target_steps):
    no_evaluation(monkeypatch, sac)
    calls = {name: spy(monkeypatch, sac, name) for name in ("q_loss", "policy_loss", "alpha_loss", "update_target")}
    run(*PENDULUM, *flags.split(), "--num-envs", "1")
    counts = [q_steps, policy_steps, policy_steps if "autotune" not in flags else 0, target_steps]
    assert [len(found) for found in calls.values()] == counts
    assert {len(inputs[1]) for inputs, _ in calls["policy_loss"]} <= {16}


def test_log_entries_are_means_of_an_interval(monkeypatch):
    losses = spy(monkeypatch, sac, "q_loss")
    folder = run(*PENDULUM, "--log-interval", "40", "--alpha", "0.7", "--no-autotune", "--policy-lr", "0.002")
    events = scalars(folder, "loss/td")
    assert [event.step for event in events] == [40, 80, 120, 128]
    means = [metrics["loss/td"].item() for _, (_, metrics) in losses]
    assert len(means) == 98
    for event, found in zip(events, (means[:10], means[10:50], means[50:90], means[90:])):
        assert event.value == pytest.approx(np.mean(found), rel=1e-4)
    assert [event.value for event in scalars(folder, "train/alpha")] == pytest.approx([0.7] * 4)
    assert [event.value for event in scalars(folder, "train/learning_rate")] == pytest.approx([0.002] * 4)


def test_other_learning_rates_take_effect():
    """With rates of zero nothing moves but the target networks."""
    folder = run(*PENDULUM, "--save-replay")
    end = load(folder)
    flags = ["--q-lr", "0", "--policy-lr", "0", "--total-timesteps", "160"]
    now = load(run("--resume", folder, *flags))
    assert now["q_optimizer"]["state"][0]["step"] > end["q_optimizer"]["state"][0]["step"]
    for name in end["agent"]:
        assert torch.equal(end["agent"][name], now["agent"][name]), name
    assert not torch.equal(end["target_network"]["first.0.weight"], now["target_network"]["first.0.weight"])


def test_all_learning_rates_decrease_to_zero():
    folder = run(*PENDULUM, "--anneal-lr", "--log-interval", "40", "--policy-lr", "0.002", "--num-envs", "2")
    rates = [event.value for event in scalars(folder, "train/learning_rate")]
    assert rates == pytest.approx([0.002 * (1 - step / 128) for step in (38, 78, 118, 126)])  # where the step began
    checkpoint = load(folder)
    for name, rate in (("q_optimizer", 1e-3), ("alpha_optimizer", 1e-3), ("policy_optimizer", 2e-3)):
        assert checkpoint[name]["param_groups"][0]["lr"] == pytest.approx(rate * 2 / 128)


@pytest.mark.parametrize("flag", ["--q-lr", "--policy-lr"])
def test_a_learning_rate_that_is_far_too_high_stops_it(flag):
    with pytest.raises(SystemExit, match="is NaN or infinite; the last checkpoint is kept"):
        run("--env-id", "LunarLanderContinuous-v3", *TINY, flag, "1e38", "--log-interval", "1000")


def test_environments_in_processes_of_their_own():
    args = sac.parse_args([*PENDULUM, "--vectorization-mode", "async"])
    envs = sac.make_envs(args, 2)
    assert isinstance(envs.unwrapped, AsyncVectorEnv)
    envs.close()
    expected = load(run(*PENDULUM))["agent"]
    torch.testing.assert_close(load(sac.train(args))["agent"], expected)


# --- actions ---


@pytest.mark.parametrize("action", ["matrix", "float64"])
@pytest.mark.parametrize("obs", ["dict", "image"])
def test_any_observation_and_bounded_action(obs, action):
    """The environment asserts that each action is in its space."""
    kwargs = json.dumps({"obs": obs, "action": action})
    folder = run("--env-id", "toy_envs:Spaces-v0", "--env-kwargs", kwargs, *TINY)
    assert results(folder)["n_eval_episodes"] == 2


def test_actions_reach_both_bounds():
    agent, _ = make_agent(*PENDULUM)
    agent.action_space = sac.Box(np.array([0, -3], np.float32), np.array([1, 5], np.float32))
    action = agent.to_env(torch.tensor([[-1.0, -1.0], [0.0, 0.0], [1.0, 1.0]]))
    np.testing.assert_allclose(action, [[0, -3], [0.5, 1], [1, 5]])
    assert action.dtype == np.float32


def test_sampled_and_most_likely_actions():
    agent, _ = make_agent(*PENDULUM)
    obs = torch.zeros(2000, 3)
    sampled, most_likely = agent.act(obs, deterministic=False), agent.act(obs, deterministic=True)
    policy = agent.policy(obs[:1])
    np.testing.assert_allclose(most_likely, 2 * policy.mean.tanh().item() * np.ones((2000, 1)), rtol=1e-5)
    u = np.arctanh(sampled / 2)
    assert u.mean() == pytest.approx(policy.mean.item(), abs=0.1)
    assert u.std() == pytest.approx(policy.log_std.exp().item(), rel=0.1)


# --- learning ---


def test_it_finds_the_best_action():
    """Target: one step an episode, and the best action is 0.5. The temperature falls as the task becomes clear."""
    flags = "--env-id toy_envs:Target-v0 --total-timesteps 1500 --learning-starts 100 --hidden-size 32 --batch-size 64"
    folder = run(*flags.split(), "--policy-lr", "3e-3", "--q-lr", "3e-3", "--eval-episodes", "2", "--alpha", "1")
    assert results(folder)["mean_reward"] > -0.02
    assert load(folder)["agent"]["log_alpha"].exp() < 0.5


def test_a_truncated_episode_goes_on():
    """Constant gives 1 for ever, but for a time limit of 8 steps, so every value is 1 / (1 - 0.8) = 5."""
    flags = "--env-id toy_envs:Constant-v0 --total-timesteps 900 --learning-starts 100 --hidden-size 16 --batch-size 32"
    flags += " --gamma 0.8 --tau 0.1 --q-lr 0.01 --alpha 1e-6 --no-autotune --eval-episodes 2"
    folder = run(*flags.split(), "--env-kwargs", '{"box": true}')
    assert scalars(folder, "train/q_value")[-1].value == pytest.approx(5, abs=0.5)
