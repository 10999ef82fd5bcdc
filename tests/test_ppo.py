"""PPO: oracles for its formulas, and its training loop on environments whose answers are known."""

import csv
import json
import random
import signal
import sys
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import ROOT
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import ppo

TINY = "--num-envs 2 --num-steps 16 --num-minibatches 2 --update-epochs 2 --eval-episodes 10".split()
TINY += "--total-timesteps 256 --num-checkpoints 4".split()
CARTPOLE = ["--env-id", "CartPole-v1", *TINY]


def run(*flags):
    """Train as the command line would; returns the run folder."""
    return ppo.train(ppo.parse_args([str(flag) for flag in flags]))


def load(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def weights(folder):
    return torch.cat([tensor.flatten().float() for tensor in load(folder)["agent"].values()])


def make_agent(*flags):
    args = ppo.parse_args(list(flags))
    envs = ppo.make_envs(args, 2)
    torch.manual_seed(0)
    return ppo.Agent(envs, args), envs


# --- formulas ---


def brute_force_gae(rewards, values, next_values, terminated, done, gamma, gae_lambda):
    """The sum of [GAE, Eq. 16] term by term, until the episode is over or the rollout ends."""
    T, N = rewards.shape
    advantages = np.zeros((T, N))
    for n in range(N):
        for t in range(T):
            for k in range(t, T):
                bootstrap = 0 if terminated[k, n] else next_values[k, n]
                delta = rewards[k, n] + gamma * bootstrap - values[k, n]
                advantages[t, n] += (gamma * gae_lambda) ** (k - t) * delta
                if done[k, n]:
                    break
    return advantages


@pytest.fixture
def rollout():
    """A rollout with a termination, a truncation, and both at once in the middle."""
    rng = np.random.default_rng(0)
    T, N = 12, 3
    rewards, values, next_values = rng.normal(size=(3, T, N))
    terminated, done = np.zeros((2, T, N), dtype=bool)
    terminated[4, 0] = done[4, 0] = True
    done[6, 1] = True
    terminated[8, 2] = done[8, 2] = done[2, 2] = True
    return rewards, values, next_values, terminated, done


def test_gae_is_the_double_sum(rollout):
    expected = brute_force_gae(*rollout, 0.9, 0.8)
    actual = ppo.compute_gae(*map(torch.as_tensor, rollout), 0.9, 0.8)
    np.testing.assert_allclose(actual.numpy(), expected, rtol=1e-5, atol=1e-6)


def test_gae_with_lambda_0_is_the_td_error_and_with_1_the_return(rollout):
    rewards, values, next_values, terminated, done = rollout
    td_error = rewards + 0.9 * next_values * ~terminated - values
    actual = ppo.compute_gae(*map(torch.as_tensor, rollout), 0.9, 0.0)
    np.testing.assert_allclose(actual.numpy(), td_error, rtol=1e-5, atol=1e-6)
    next_values[:-1][~done[:-1]] = values[1:][~done[:-1]]  # consistent values: the sum telescopes
    returns = np.zeros_like(rewards)
    for n in range(3):
        for t in range(12):
            for k in range(t, 12):
                returns[t, n] += 0.9 ** (k - t) * rewards[k, n]
                if done[k, n] or k == 11:
                    returns[t, n] += 0 if terminated[k, n] else 0.9 ** (k - t + 1) * next_values[k, n]
                    break
    actual = ppo.compute_gae(*map(torch.as_tensor, rollout), 0.9, 1.0)
    np.testing.assert_allclose(actual.numpy() + values, returns, rtol=1e-5, atol=1e-6)


def test_loss_is_the_clipped_surrogate():
    """Against the paper's formula, one sample at a time, with ratios inside and outside of the clip."""
    agent, _ = make_agent("--env-id", "CartPole-v1")
    obs, action = torch.randn(6, 4), torch.tensor([0, 1, 0, 1, 0, 1])
    policy, value = agent(obs)
    ratio = torch.tensor([0.5, 0.9, 1.0, 1.1, 1.5, 3.0])
    old_logprob = (policy.log_prob(action) - ratio.log()).detach()
    advantage, target = torch.tensor([1.0, -2.0, 3.0, -1.0, 0.5, -0.5]), torch.arange(6.0)
    loss, metrics = ppo.ppo_loss(agent, obs, action, old_logprob, advantage, target, 0.2, 0.7, 0.03)
    normalized = (advantage.numpy() - advantage.numpy().mean()) / (advantage.numpy().std(ddof=1) + 1e-8)
    pairs = zip(ratio.tolist(), normalized)
    surrogate = np.mean([min(r * a, max(0.8, min(1.2, r)) * a) for r, a in pairs])
    squared_error = np.mean((value.detach().numpy() - np.arange(6)) ** 2)
    probs = policy.logprobs.detach().exp().numpy()
    entropy = np.mean(-(probs * np.log(probs)).sum(1))
    assert loss.item() == pytest.approx(-surrogate + 0.7 * squared_error - 0.03 * entropy, rel=1e-5)
    assert metrics["loss/policy"].item() == pytest.approx(-surrogate, rel=1e-5)
    assert metrics["train/clip_fraction"].item() == pytest.approx(3 / 6)
    assert metrics["train/approx_kl"].item() == pytest.approx((ratio - 1 - ratio.log()).mean().item(), rel=1e-4)


def test_normalizer_is_the_moments_of_all_data():
    normalizer = ppo.Normalizer(3)
    data = np.random.default_rng(0).normal(5, [1, 10, 100], size=(7, 50, 3)).astype(np.float32)
    for batch in data:
        normalizer.update(torch.as_tensor(batch))
    everything = data.reshape(-1, 3).astype(np.float64)
    np.testing.assert_allclose(normalizer.mean, everything.mean(0), rtol=1e-4)
    np.testing.assert_allclose(normalizer.var, everything.var(0), rtol=1e-4)
    scaled = normalizer(torch.as_tensor(data)).flatten(end_dim=1)
    np.testing.assert_allclose(scaled.std(0, correction=0), np.ones(3), rtol=1e-3)


def test_only_the_environment_sees_the_clipped_action():
    agent, envs = make_agent("--env-id", "toy_envs:Spaces-v0", "--env-kwargs", '{"action": "matrix"}')
    policy, _ = agent(torch.zeros(2, 9))
    action = torch.full((2, 6), 5.0)
    assert policy.log_prob(action).shape == (2,)
    normal = torch.distributions.Normal(policy.mode, policy.log_std.exp())
    torch.testing.assert_close(policy.log_prob(action), normal.log_prob(action).sum(-1))
    assert envs.action_space.contains(agent.to_env(action))
    np.testing.assert_array_equal(agent.to_env(action), np.full((2, 2, 3), 0.1, np.float32))


@pytest.mark.parametrize("action", ["shifted", "matrix", "float64", "unbounded"])
@pytest.mark.parametrize("obs", ["dict", "tuple", "image", "float64", "multibinary"])
def test_any_box_observation_and_discrete_or_box_action(obs, action):
    """The environment asserts that each action is in its space."""
    kwargs = json.dumps({"obs": obs, "action": action})
    folder = run("--env-id", "toy_envs:Spaces-v0", "--env-kwargs", kwargs, *TINY, "--total-timesteps", "64")
    assert load(folder)["step"] == 64


def test_gaussian_is_that_of_torch():
    mean, log_std, action = torch.randn(5, 3), torch.tensor([-1.0, 0.0, 0.5]), torch.randn(5, 3)
    normal = torch.distributions.Normal(mean, log_std.exp())
    ours, theirs = ppo.Gaussian(mean, log_std), torch.distributions.Independent(normal, 1)
    torch.testing.assert_close(ours.log_prob(action), theirs.log_prob(action))
    torch.testing.assert_close(ours.entropy(), theirs.entropy()[0])
    assert torch.equal(ours.mode, theirs.mode)
    sample = ppo.Gaussian(mean[:1].expand(20_000, 3), log_std).sample()
    torch.testing.assert_close(sample.mean(0), mean[0], atol=0.05, rtol=0)
    torch.testing.assert_close(sample.std(0), log_std.exp(), atol=0, rtol=0.03)


def test_categorical_is_that_of_torch():
    logits, action = torch.randn(5, 3) * 3, torch.tensor([0, 1, 2, 0, 1])
    ours, theirs = ppo.Categorical(logits), torch.distributions.Categorical(logits=logits)
    torch.testing.assert_close(ours.log_prob(action), theirs.log_prob(action))
    torch.testing.assert_close(ours.entropy(), theirs.entropy())
    assert torch.equal(ours.mode, theirs.mode)
    counts = torch.bincount(ppo.Categorical(logits[:1].expand(20_000, 3)).sample(), minlength=3)
    torch.testing.assert_close(counts / 20_000, theirs.probs[0], atol=0.02, rtol=0)


# --- training ---


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1"])
@pytest.mark.parametrize("normalize", [True, False])
def test_the_first_minibatch_has_ratio_1(monkeypatch, env_id, normalize):
    """In every iteration: what acted is what is updated, also while the observation statistics move."""
    seen = []
    ppo_loss = ppo.ppo_loss
    monkeypatch.setattr(ppo, "ppo_loss", lambda *args: seen.append(ppo_loss(*args)) or seen[-1])
    run("--env-id", env_id, *TINY, f"--normalize-observations={normalize}")
    assert len(seen) == 8 * 4
    for _, metrics in seen[::4]:
        assert metrics["train/clip_fraction"] == 0
        assert abs(metrics["train/approx_kl"]) < 1e-6
    assert any(metrics["train/approx_kl"] > 1e-5 for _, metrics in seen)


def test_constant_reward_with_truncation_learns_the_value_of_an_endless_episode():
    """Reward 1 for ever is worth 1 / (1 - gamma) = 10, though every episode is cut off after 8 steps."""
    flags = "--num-envs 4 --num-steps 32 --num-minibatches 2 --gamma 0.9 --total-timesteps 20e3 --num-checkpoints 2"
    folder = run("--env-id", "toy_envs:Constant-v0", *flags.split(), "--eval-episodes", "2")
    agent, _ = make_agent("--env-id", "toy_envs:Constant-v0")
    agent.load_state_dict(load(folder)["agent"])
    value = agent(torch.ones(1, 1))[1].item()
    assert value == pytest.approx(10, abs=0.5)
    assert json.loads((folder / "results.json").read_text())["mean_reward"] == 8


def test_identity_is_solved():
    folder = run("--env-id", "toy_envs:Identity-v0", "--total-timesteps", "20e3", "--num-steps", "64", "--gamma", "0.5")
    results = json.loads((folder / "results.json").read_text())
    assert (results["mean_reward"], results["std_reward"], results["n_eval_episodes"]) == (16, 0, 100)


def test_target_kl_stops_the_epochs(monkeypatch):
    calls = []
    ppo_loss = ppo.ppo_loss
    monkeypatch.setattr(ppo, "ppo_loss", lambda *args: calls.append(0) or ppo_loss(*args))
    run(*CARTPOLE, "--target-kl", "1e-12", "--update-epochs", "9")
    assert len(calls) == 8 * 2  # one epoch of two minibatches in each of 8 iterations


def test_learning_rate_falls_and_never_reaches_zero():
    events = EventAccumulator(str(run(*CARTPOLE, "--learning-rate", "0.8")))
    events.Reload()
    rates = [event.value for event in events.Scalars("train/learning_rate")]
    np.testing.assert_allclose(rates, np.linspace(0.8, 0.1, 8), rtol=1e-6)
    folder = run(*CARTPOLE, "--learning-rate", "0.8", "--no-anneal-lr")
    np.testing.assert_allclose([e.value for e in sorted_events(folder, "train/learning_rate")], [0.8] * 8, rtol=1e-6)


def test_gradients_are_clipped():
    """Cut down to a norm far below Adam's eps, they hardly move the weights."""
    ppo.seed_everything(1)
    args = ppo.parse_args(CARTPOLE)
    start = torch.cat([p.flatten() for p in ppo.Agent(ppo.make_envs(args, 1), args).state_dict().values()])
    torch.testing.assert_close(weights(run(*CARTPOLE, "--max-grad-norm", "1e-9")), start, atol=1e-5, rtol=0)
    assert (weights(run(*CARTPOLE)) - start).abs().max() > 1e-3


def test_a_checkpoint_evaluates_a_tenth_of_the_episodes(monkeypatch):
    counts = []
    evaluate = ppo.evaluate
    monkeypatch.setattr(ppo, "evaluate", lambda *args, **kw: counts.append(args[2]) or evaluate(*args, **kw))
    run(*CARTPOLE, "--eval-episodes", "30")
    assert counts == [3, 3, 3, 3, 30]


def test_sampled_and_most_likely_actions():
    agent, _ = make_agent("--env-id", "CartPole-v1")
    obs = torch.zeros(200, 4)
    assert len(set(agent.act(obs, deterministic=False))) == 2
    assert len(set(agent.act(obs, deterministic=True))) == 1
    args = ppo.parse_args(["--env-id", "CartPole-v1", "--no-eval-deterministic"])
    first, second, other = (ppo.evaluate(agent, args, 10, seed) for seed in (7, 7, 8))
    assert first.tolist() == second.tolist() != other.tolist()


def test_metrics_and_episodes_are_logged():
    folder = run(*CARTPOLE, "--total-timesteps", "1024")
    events = EventAccumulator(str(folder))
    events.Reload()
    names = "episode/return episode/length loss/policy loss/value loss/entropy train/approx_kl train/clip_fraction "
    names += "train/explained_variance train/learning_rate train/grad_norm time/sps eval/return_mean eval/return_std"
    assert set(events.Tags()["scalars"]) == set(names.split())
    assert [e.step for e in events.Scalars("eval/return_mean")] == [0, 256, 512, 768, 1024]
    rows = list(csv.DictReader(open(folder / "episodes.csv")))
    assert len(rows) > 10
    assert all(float(row["return"]) == int(row["length"]) and int(row["step"]) <= 1024 for row in rows)
    lengths = sum(int(row["length"]) for row in rows)
    assert 1024 - 2 * 5 * 200 < lengths <= 1024  # the rest was still running at a cut


def test_truncated_episodes_keep_their_true_last_observation(monkeypatch):
    """final_obs enters the value of the successor at the steps where an episode was truncated, not terminated."""
    seen = []
    compute_gae = ppo.compute_gae
    monkeypatch.setattr(ppo, "compute_gae", lambda *args: seen.append(args) or compute_gae(*args))
    run("--env-id", "Pendulum-v1", *TINY, "--num-steps", "256", "--total-timesteps", "512", "--num-checkpoints", "1")
    rewards, values, next_values, terminated, done = seen[0][:5]
    assert not terminated.any()
    assert done[199].all()
    assert done.sum() == 2
    inside = ~done[:-1]
    assert torch.equal(next_values[:-1][inside], values[1:][inside])
    assert not torch.isclose(next_values[199], values[200]).any()
    assert not torch.isclose(next_values[-1], values[-1]).any()


@pytest.mark.parametrize("flags", [[], ["--normalize-observations"], ["--vectorization-mode", "async"]])
def test_same_seed_same_weights(flags):
    first, second = run(*CARTPOLE, *flags), run(*CARTPOLE, *flags)
    assert torch.equal(weights(first), weights(second))
    assert (first / "episodes.csv").read_text() == (second / "episodes.csv").read_text()
    other = run(*CARTPOLE, *flags, "--seed", "2")
    assert not torch.equal(weights(first), weights(other))


def test_every_cut_starts_other_episodes(monkeypatch):
    starts = []
    cut = ppo.Run.cut
    monkeypatch.setattr(ppo.Run, "cut", lambda *args: starts.append(cut(*args)) or starts[-1])
    run(*CARTPOLE)
    assert len(starts) == 4
    first_obs = [tuple(obs.flatten()) for _, obs in starts]
    assert len(set(first_obs)) == 4


def test_async_equals_sync():
    assert torch.equal(weights(run(*CARTPOLE)), weights(run(*CARTPOLE, "--vectorization-mode", "async")))


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1"])
def test_loaded_agent_scores_what_training_printed(env_id, capsys):
    folder = run("--env-id", env_id, *TINY, "--normalize-observations", "--total-timesteps", "1024")
    results = json.loads((folder / "results.json").read_text())
    checkpoint = load(folder)
    assert checkpoint["agent"]["normalize.count"] == 1024
    args = ppo.Args(**checkpoint["config"])
    agent = ppo.Agent(ppo.make_envs(args, 1), args)
    agent.load_state_dict(checkpoint["agent"])
    before = {name: tensor.clone() for name, tensor in agent.state_dict().items()}
    returns = ppo.evaluate(agent, args, 10, ppo.seed_everything(args.seed, 1024, 1))
    assert (returns.mean(), returns.std()) == (results["mean_reward"], results["std_reward"])
    assert f"{returns.mean():.2f} +/- {returns.std():.2f} over 10 episodes" in capsys.readouterr().out
    assert all(torch.equal(before[name], tensor) for name, tensor in agent.state_dict().items())


def test_evaluation_is_one_whole_episode_an_environment():
    """A short episode does not make room for a second one: the returns are those of the single environment."""
    agent, _ = make_agent("--env-id", "CartPole-v1")
    args = ppo.parse_args(["--env-id", "CartPole-v1"])
    seeds = [*range(30)]
    returns = ppo.evaluate(agent, args, 30, seeds)
    for seed, actual in zip(seeds, returns):
        env, total, done = gym.make("CartPole-v1"), 0, False
        obs, _ = env.reset(seed=seed)
        while not done:
            action = agent.act(torch.as_tensor(obs[None]), deterministic=True)[0]
            obs, reward, terminated, truncated, _ = env.step(action)
            total, done = total + reward, terminated or truncated
        assert actual == total
    assert max(returns) >= min(returns) + 2  # long enough for an ended environment to start again
    args.max_eval_steps = 4
    assert ppo.evaluate(agent, args, 30, seeds).tolist() == [4] * 30


def test_evaluation_does_not_change_training(monkeypatch):
    expected = weights(run(*CARTPOLE))
    assert torch.equal(weights(run(*CARTPOLE, "--eval-episodes", "30", "--capture-video")), expected)


def test_video_of_each_checkpoint():
    import imageio.v3 as imageio

    folder = run(*CARTPOLE, "--capture-video")
    assert sorted(path.name for path in folder.glob("*.mp4")) == [f"step-{s}.mp4" for s in (0, 128, 192, 256, 64)]
    frames = imageio.imread(folder / "step-0.mp4")
    assert frames.shape[1:] == (400, 600, 3)
    assert len(frames) >= 8
    assert frames.std() > 5


# --- stopping and resuming ---


def assert_same_run(folder, expected):
    assert torch.equal(weights(folder), weights(expected))
    a, b = load(folder)["optimizer"]["state"], load(expected)["optimizer"]["state"]
    assert all(torch.equal(a[i][key], b[i][key]) for i in a for key in a[i])
    assert (folder / "episodes.csv").read_text() == (expected / "episodes.csv").read_text()
    results = [json.loads((f / "results.json").read_text()) for f in (folder, expected)]
    assert results[0]["mean_reward"] == results[1]["mean_reward"]


LONGER = [*CARTPOLE, "--num-envs", "4", "--total-timesteps", "12800", "--num-checkpoints", "10"]
LONGER += ["--normalize-observations"]


def wait_for_checkpoint(process):
    deadline = time.monotonic() + 60
    while not list(Path().glob("runs/*/checkpoint.pt")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return next(Path().glob("runs/*/checkpoint.pt")).parent


def test_killed_and_resumed_is_the_uninterrupted_run(start):
    process = start("ppo.py", *LONGER)
    folder = wait_for_checkpoint(process)
    time.sleep(random.uniform(0, 1))
    process.kill()
    process.wait()
    assert not (folder / "results.json").exists()
    time.sleep(1)  # TensorBoard orders event files by the second
    run("--resume", folder)
    assert_same_run(folder, run(*LONGER))
    steps = [e.step for e in sorted_events(folder, "train/learning_rate")]
    assert steps == sorted(set(steps))
    assert len(steps) == 200


def sorted_events(folder, name):
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return events.Scalars(name)


@pytest.mark.parametrize("stop_at", [0, 1, 2, 3])
def test_a_crash_between_any_two_files_loses_nothing(monkeypatch, stop_at):
    """The machine dies while the checkpoint is half written: the one before stays, and resuming repeats the rest."""
    save, calls = torch.save, []

    def die(state, path):
        calls.append(0)
        if len(calls) == stop_at + 2:
            Path(path).write_bytes(b"half a file")
            raise OSError("disk full")
        save(state, path)

    monkeypatch.setattr(torch, "save", die)
    with pytest.raises(OSError, match="disk full"):
        run(*CARTPOLE)
    monkeypatch.setattr(torch, "save", save)
    folder = next(Path().glob("runs/*"))
    assert load(folder)["step"] == stop_at * 64
    with open(folder / "episodes.csv", "ab") as file:
        file.write(b"99999,1.0,1\n888")  # rows after the checkpoint, the last one torn
    run("--resume", folder)
    assert_same_run(folder, run(*CARTPOLE))


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize("mode", ["sync", "async"])
@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_says_how_to_resume(start, signum, code, mode):
    process = start("ppo.py", *LONGER, "--total-timesteps", "1e6", "--vectorization-mode", mode)
    folder = wait_for_checkpoint(process)
    time.sleep(0.5)
    process.send_signal(signum)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == code
    assert f"python ppo.py --resume {folder}" in stderr
    assert "Traceback" not in stderr


def test_resume_a_finished_run_only_repeats_its_evaluation():
    folder = run(*CARTPOLE)
    before = weights(folder), (folder / "episodes.csv").read_text(), (folder / "results.json").read_text()
    run("--resume", folder)
    assert torch.equal(weights(folder), before[0])
    assert (folder / "episodes.csv").read_text() == before[1]
    assert json.loads((folder / "results.json").read_text())["mean_reward"] == json.loads(before[2])["mean_reward"]


def test_resume_with_more_steps_goes_on():
    folder = run(*CARTPOLE)
    run("--resume", folder, "--total-timesteps", "512", "--device", "cpu")
    checkpoint = load(folder)
    assert (checkpoint["step"], checkpoint["config"]["total_timesteps"]) == (512, 512)
    steps = [int(row["step"]) for row in csv.DictReader(open(folder / "episodes.csv"))]
    assert steps == sorted(steps)
    assert max(steps) > 256


def test_nan_stops_the_run(capsys):
    for name in ("reward", "observation"):
        with pytest.raises(SystemExit) as stop:
            run("--env-id", "toy_envs:Constant-v0", *TINY, "--env-kwargs", json.dumps({f"bad_{name}_at": 20}))
        assert stop.value.code == f"ppo.py: error: {name} is NaN or infinite at step 40"
        assert "--resume" not in capsys.readouterr().err  # it would end in the same NaN
    with pytest.raises(SystemExit, match="loss/value is NaN or infinite at step 32"):
        run("--env-id", "toy_envs:Constant-v0", *TINY, "--env-kwargs", '{"reward": 1e30}')
    assert all(load(folder)["step"] % 32 == 0 for folder in Path().glob("runs/*"))


# --- bad input ---


class Evil:
    def __reduce__(self):
        return (open, ("evil.txt", "w"))


@pytest.fixture
def bad_folders(tmp_path):
    """Folders that --resume must refuse."""
    folders = {name: tmp_path / name for name in ("empty", "truncated", "other", "evil", "list", "future")}
    for folder in folders.values():
        folder.mkdir()
    good = run(*CARTPOLE, "--total-timesteps", "32") / "checkpoint.pt"
    checkpoint = load(good.parent)
    (folders["truncated"] / "checkpoint.pt").write_bytes(good.read_bytes()[:-1000])
    torch.save(checkpoint | {"script": "dqn_atari.py"}, folders["other"] / "checkpoint.pt")
    torch.save(checkpoint | {"extra": Evil()}, folders["evil"] / "checkpoint.pt")
    torch.save([1, 2], folders["list"] / "checkpoint.pt")
    torch.save(checkpoint | {"config": {"new_flag": 1}}, folders["future"] / "checkpoint.pt")
    return folders | {"good": good.parent}


BAD_INPUT = {
    "--env-id Foo-v0": "doesn't exist",
    "--env-id LunarLandr-v3": "Did you mean: `LunarLander`",
    "--env-id LunarLander-v2": "use `LunarLander-v3` instead",
    "--env-id no_such_package:Foo-v0": "pip install no_such_package",
    "--env-id FrozenLake-v1": "Discrete(16) need a table, see q_learning.py",
    '--env-id toy_envs:Spaces-v0 --env-kwargs {"obs":"discrete"}': "Discrete(5) need a table",
    '--env-id toy_envs:Spaces-v0 --env-kwargs {"action":"multibinary"}': "MultiBinary(3) are neither",
    '--env-id toy_envs:Spaces-v0 --env-kwargs {"obs":"opaque"}': "cannot be flattened; wrap them",
    "--env-kwargs {": "--env-kwargs",
    "--env-kwargs [1]": "--env-kwargs",
    '--env-kwargs {"foo":1}': "unexpected keyword argument 'foo'",
    '--env-kwargs {"gravity":5}': "must be between -12 and 0",
    "--learning-rate -1": "--learning-rate -1.0: must be finite and > 0",
    "--learning-rate nan": "--learning-rate nan: must be finite and > 0",
    "--clip-coef inf": "--clip-coef inf: must be finite and > 0",
    "--num-envs 0": "--num-envs 0: must be finite and > 0",
    "--seed -1": "--seed -1",
    "--num-checkpoints 0": "--num-checkpoints 0",
    "--num-minibatches 3": "--num-minibatches 3: 2048 steps need equal minibatches",
    "--num-minibatches 2048": "--num-minibatches 2048",
    "--gamma 1.1": "--gamma 1.1 --gae-lambda 0.98: must be at most 1",
    "--total-timesteps 2047": "less than the 2048 steps of one rollout",
    "--device cuda:99": "--device cuda:99: not available",
    "--device gpu": "--device gpu: not available",
    "--resume empty": "holds no checkpoint.pt",
    "--resume missing": "holds no checkpoint.pt",
    "--resume truncated": "damaged",
    "--resume evil": "damaged",
    "--resume list": "damaged",
    "--resume future": "damaged",
    "--resume other": "a run of dqn_atari.py",
    "--resume good --seed 7": "--seed 7: the run to resume has 1",
    "--resume good --total-timesteps 16": "--total-timesteps 16: the run to resume has 32",
    "--env-id toy_envs:Constant-v0 --capture-video": "unexpected keyword argument 'render_mode'",
    "--total-timesteps 1.2.3e5": None,
    "--vectorization-mode fast": None,
    "--no-such-flag 1": None,
    "--num-envs 1.5": None,
}


def test_bad_input_is_refused_in_one_line(bad_folders, capsys, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    capsys.readouterr()
    for flags, message in BAD_INPUT.items():
        flags = [str(bad_folders.get(word, word)) for word in flags.split()]
        with pytest.raises(SystemExit) as stop:
            run(*flags)
        out, err = capsys.readouterr()
        assert stop.value.code == 2, flags
        assert out == "", flags
        if message:  # the others are refused by tyro, in a box
            assert err.startswith("ppo.py: error: "), err
            assert err.count("\n") == 1, err
            assert message in err
    assert sorted(tmp_path.rglob("*")) == before


def test_bad_input_from_the_shell(start):
    process = start("ppo.py", "--env-id", "LunarLander-v2")
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout, stderr.count("\n")) == (2, "", 1), stderr
    assert not Path("runs").exists()


def test_run_folder_has_what_it_promises():
    folder = run(*CARTPOLE)
    assert folder.parent == Path("runs")
    assert folder.name.startswith("CartPole-v1__ppo__1__")
    assert (folder / "ppo.py").read_text() == (ROOT / "ppo.py").read_text()
    config = json.loads((folder / "config.json").read_text())
    assert config["env_id"] == "CartPole-v1"
    assert {"python", "torch", "gymnasium", "ale-py", "device", "commit"} <= set(config)
    results = json.loads((folder / "results.json").read_text())
    keys = ["env_id", "mean_reward", "std_reward", "is_deterministic", "n_eval_episodes", "eval_datetime"]
    assert list(results) == keys
    assert not list(folder.glob("*.tmp"))
    assert list(folder.glob("events.out.tfevents.*"))
