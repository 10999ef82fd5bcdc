"""ppo_atari.py, and AtariGames, which all three pixel scripts share, against AtariVectorEnv as it comes."""

import json

import numpy as np
import pytest
import torch
from ale_py.vector_env import AtariVectorEnv
from gymnasium.vector import AutoresetMode
from test_scripts import assert_refused, load, run, scalars

import ppo_atari

BREAKOUT = "BreakoutNoFrameskip-v4"


def parse(env_id=BREAKOUT, *flags, **kwargs):
    return ppo_atari.parse_args(["--env-id", env_id, "--env-kwargs", json.dumps(kwargs), *flags])


# --- the games ---


@pytest.mark.parametrize(
    ("env_id", "game", "lives"),
    [
        (BREAKOUT, "breakout", 5),
        ("PongNoFrameskip-v4", "pong", 1),
        ("SpaceInvadersNoFrameskip-v4", "space_invaders", 3),
    ],
)
def test_an_episode_is_a_whole_game_and_its_return_the_raw_score(env_id, game, lives):
    """Beside an environment that knows nothing of lives and clipping, with the same seeds and actions."""
    envs = ppo_atari.make_envs(parse(env_id), 4)
    mode = AutoresetMode.SAME_STEP
    plain = AtariVectorEnv(game, 4, reward_clipping=False, autoreset_mode=mode, life_loss_info=False)
    obs, _ = envs.reset(seed=3)
    np.testing.assert_array_equal(obs, plain.reset(seed=3)[0])
    score, length, ends, finished, rng = np.zeros(4), np.zeros(4), np.zeros(4), 0, np.random.default_rng(0)
    highest = 0
    while finished < 6:
        action = rng.integers(envs.single_action_space.n, size=4)
        obs, reward, terminated, truncated, infos = envs.step(action)
        raw_obs, raw_reward, over, _, _ = plain.step(action)
        np.testing.assert_array_equal(obs, raw_obs)
        np.testing.assert_array_equal(reward, np.sign(raw_reward))
        highest = max(highest, raw_reward.max())
        score, length, ends = score + raw_reward, length + 1, ends + terminated
        assert not (over & ~terminated).any()
        assert not truncated.any()
        assert ("episode" in infos) == over.any()
        if over.any():
            np.testing.assert_array_equal(infos["_episode"], over)
            np.testing.assert_array_equal(infos["episode"]["r"][over], score[over])
            np.testing.assert_array_equal(infos["episode"]["l"][over], length[over])
            assert (ends[over] == lives).all()
            finished += over.sum()
        score, length, ends = score * ~over, length * ~over, ends * ~over
    assert highest > 1 or game != "space_invaders"


def test_evaluation_reports_each_game_once_with_its_score():
    """There a lost life is no end, and the next game begins at the step after one."""
    envs = ppo_atari.make_envs(parse(), 4, evaluation=True)
    envs.reset(seed=3)
    score, ends, rng = np.zeros(4), 0, np.random.default_rng(0)
    while ends < 6:
        _, reward, terminated, _, infos = envs.step(rng.integers(4, size=4))
        score += reward
        np.testing.assert_array_equal(infos.get("_episode", np.zeros(4, dtype=bool)), terminated)
        if terminated.any():
            np.testing.assert_array_equal(infos["episode"]["r"][terminated], score[terminated])
        score, ends = score * ~terminated, ends + terminated.sum()


def test_a_broken_off_game_is_truncated_and_shows_its_last_screen():
    """30 steps are 120 frames: the same game played longer has the same screens there, but for the very last frame."""
    short, long = (ppo_atari.make_envs(parse(max_num_frames_per_episode=frames), 2) for frames in (120, 400))
    short.reset(seed=1)
    long.reset(seed=1)
    for t in range(30):
        action = np.full(2, 1 + t % 3)
        (obs, _, terminated, truncated, infos), (expected, *_) = short.step(action), long.step(action)
    assert truncated.all()
    assert not terminated.any()
    np.testing.assert_array_equal(infos["final_obs"][:, :3], expected[:, :3])
    assert np.abs(infos["final_obs"][:, 3].astype(int) - expected[:, 3]).mean() < 1
    assert infos["_episode"].all()
    assert (infos["episode"]["l"] == 30).all()
    assert (obs[:, :3] == 0).all()  # the new game's first screen, and none before it


def test_a_lost_life_ends_the_return_on_demand_only():
    ends = []
    for flag in ("--episodic-life", "--no-episodic-life"):
        envs = ppo_atari.make_envs(parse(BREAKOUT, flag), 2)
        envs.reset(seed=1)
        ends.append(sum(envs.step(np.ones(2, dtype=np.int64))[2].sum() for _ in range(60)))
    assert ends[0] > 0
    assert ends[1] == 0


def test_sticky_actions_are_those_of_the_id():
    screens = []
    for env_id in (BREAKOUT, "ale_py:ALE/Breakout-v5", BREAKOUT):
        envs = ppo_atari.make_envs(parse(env_id), 2)
        envs.reset(seed=1)
        screens.append(np.stack([envs.step(np.full(2, t % 4))[0] for t in range(40)]))
    np.testing.assert_array_equal(screens[0], screens[2])
    assert (screens[0] != screens[1]).any()


def test_keyword_arguments_reach_the_game():
    assert ppo_atari.make_envs(parse(full_action_space=True), 1).single_action_space.n == 18
    folder = run("ppo_atari", "--env-kwargs", '{"stack_num": 2, "max_num_frames_per_episode": 100}')
    assert load(folder)["agent"]["network.0.weight"].shape[1] == 2


def test_the_film_shows_the_game_that_is_scored():
    """The film in grey and small is what the agent saw, at the same step and not ten steps later."""
    args = parse(max_num_frames_per_episode=1200)
    envs = ppo_atari.make_envs(args, 1, evaluation=True)
    agent, frames, shown = ppo_atari.Agent(envs, args), [], []
    alone = ppo_atari.evaluate(agent, args, 1, seed=4)
    act = agent.act
    agent.act = lambda obs, deterministic: shown.append(obs) or act(obs, deterministic)
    assert ppo_atari.evaluate(agent, args, 1, seed=4, film=frames.append) == alone
    assert len(frames) == len(shown) + 1
    assert frames[0].shape == (210, 160, 3)
    weights = torch.tensor([0.299, 0.587, 0.114])
    grey = (torch.as_tensor(np.stack(frames)).float() * weights).sum(-1)
    small = torch.nn.functional.interpolate(grey[:, None], (84, 84), mode="area")[:, 0]
    seen = torch.stack([obs[0, -1].float() for obs in shown])

    def distance(shift):
        return (small[10 : len(seen) - 10] - seen[10 + shift : len(seen) - 10 + shift]).square().mean().item()

    assert distance(0) < 0.7 * min(distance(shift) for shift in (-10, -1, 1, 10))


@pytest.mark.parametrize("game", ["Breakout", "SpaceInvaders"])
def test_evaluation_scores_whole_games_with_raw_rewards(game):
    """One game after another by hand gives the returns of the batch, if the actions are the same ones."""
    args = parse(f"ALE/{game}-v5", "--eval-deterministic", "--max-eval-steps", "300")
    envs = ppo_atari.make_envs(args, 3, evaluation=True)
    agent = ppo_atari.Agent(envs, args)
    agent.act = lambda obs, deterministic: 1 + obs[:, -1].sum((-2, -1)).numpy().astype(np.int64) % 3
    returns = []
    for seed in (11, 12, 13):
        rom = {"Breakout": "breakout", "SpaceInvaders": "space_invaders"}[game]
        alone = AtariVectorEnv(rom, 1, reward_clipping=False, repeat_action_probability=0.25)
        obs, _ = alone.reset(seed=seed)
        total, over, steps = 0.0, False, 0
        while not over and steps < 300:
            obs, reward, terminated, _, _ = alone.step(agent.act(torch.as_tensor(obs), True))
            total, over, steps = total + reward[0], terminated[0], steps + 1
        returns.append(total)
    assert ppo_atari.evaluate(agent, args, 3, seed=[11, 12, 13]).tolist() == returns
    assert max(returns) > (0 if game == "Breakout" else 20)


# --- learning ---


def test_a_lost_life_stops_the_bootstrap_and_the_sum(monkeypatch):
    seen, gae = [], ppo_atari.compute_gae
    monkeypatch.setattr(ppo_atari, "compute_gae", lambda *args: seen.append(args) or gae(*args))
    run("ppo_atari", "--env-kwargs", "{}", "--num-steps", "128", "--max-eval-steps", "20", "--eval-episodes", "1")
    rewards, values, _, terminated, done, *_ = seen[0]
    assert terminated.any()
    assert torch.equal(terminated, done)
    advantages = gae(*seen[0])
    torch.testing.assert_close(advantages[terminated], (rewards - values)[terminated])


@pytest.mark.skipif("not torch.cpu.get_capabilities().get('avx512_bf16')", reason="no bfloat16 in hardware")
def test_bfloat16_gives_the_gradient_of_float32():
    args, gradients = parse(), []
    envs = ppo_atari.make_envs(args, 64)
    obs, _ = envs.reset(seed=1)
    envs.action_space.seed(1)
    for _ in range(40):
        obs, *_ = envs.step(envs.action_space.sample())
    agent, obs, action = ppo_atari.Agent(envs, args), torch.as_tensor(obs), torch.arange(64) % 4
    advantage, target = torch.randn(2, 64)
    with torch.no_grad():
        agent.actor.weight *= 100  # else the policy is uniform, and its gradient small beside the value's
    for agent.bfloat16 in (False, True):
        with torch.no_grad():
            old_logprob = agent(obs)[0].log_prob(action)
        loss, _ = ppo_atari.ppo_loss(agent, obs, action, old_logprob, advantage, target, 0.1, 0.5, 0.01)
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(agent.parameters()))]))
    assert torch.cosine_similarity(*gradients, dim=0) > 0.99


def test_the_first_policy_is_almost_uniform():
    envs = ppo_atari.make_envs(parse(), 8)
    policy, _ = ppo_atari.Agent(envs, parse())(torch.as_tensor(envs.reset(seed=1)[0]))
    assert policy.entropy().min() > np.log(4) - 0.001


def test_the_value_of_a_screen_can_be_learned():
    """The rollouts of one run again and again: the loss of the value falls far below the variance of the targets."""
    args = parse()
    envs = ppo_atari.make_envs(args, 32)
    obs, _ = envs.reset(seed=1)
    envs.action_space.seed(1)
    for _ in range(40):
        obs, *_ = envs.step(envs.action_space.sample())
    agent = ppo_atari.Agent(envs, args)
    optimizer = torch.optim.Adam(agent.parameters(), lr=1e-3)
    obs, action, target, zeros = torch.as_tensor(obs), torch.arange(32) % 4, torch.randn(32), torch.zeros(32)
    for _ in range(100):
        loss, metrics = ppo_atari.ppo_loss(agent, obs, action, zeros - 1.4, zeros, target, 0.1, 0.5, 0.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert metrics["loss/value"] < target.var() / 5


def test_learning_rate_falls_and_never_reaches_zero():
    rates = [event.value for event in scalars(run("ppo_atari"), "train/learning_rate")]
    assert rates[0] == pytest.approx(2.5e-4)
    assert rates[-1] == pytest.approx(2.5e-4 / len(rates), rel=1e-3)


# --- bad input ---

BAD_INPUT = {
    "--env-id CartPole-v1": "neither ALE/...-v5 nor ...NoFrameskip-v4, the Atari games; others: ppo.py",
    "--env-id Breakout-v4": "neither ALE/...-v5 nor ...NoFrameskip-v4",
    "--env-id Breakot-v4": "doesn't exist",
    '--env-kwargs {"game":"pong"}': "'game'",
    '--env-kwargs {"num_envs":3}': "'num_envs'",
    '--env-kwargs {"batch_size":3}': "'batch_size'",
    '--env-kwargs {"continuous":true}': "'continuous'",
    '--env-kwargs {"episodic_life":true}': "'episodic_life'",
    '--env-kwargs {"frameskip":0}': "frameskip",
    '--env-kwargs {"img_height":42}': "grey screens of 84 x 84 pixels",
    '--env-kwargs {"img_height":"a"}': "incompatible function arguments",
    '--env-kwargs {"grayscale":false}': "grey screens of 84 x 84 pixels",
    '--env-kwargs {"stack_num":0}': "one or more grey screens",
    "--num-minibatches 3": "--num-minibatches 3: 1024 steps need equal minibatches of 2 or more",
    "--total-timesteps 1000": "less than the 1024 steps of one rollout",
    "--gae-lambda 1.5": "at most 1",
}


def test_bad_input_is_refused_in_one_line(capsys, tmp_path):
    assert_refused("ppo_atari", BAD_INPUT, tmp_path, capsys)
