"""AtariGames, which all pixel scripts share, against AtariVectorEnv as it comes; and what pixels change in PPO."""

import json

import numpy as np
import pytest
import torch
from ale_py.vector_env import AtariVectorEnv
from gymnasium.vector import AutoresetMode, VectorWrapper

import ppo_atari
from oracles import no_evaluation, spy
from runs import scalars

BREAKOUT = "BreakoutNoFrameskip-v4"
STICKY = "ALE/Breakout-v5"


@pytest.fixture(autouse=True)
def one_thread():
    """Small batches are quicker with one, and other tests run at the same time."""
    torch.set_num_threads(1)


def parse(*flags, env_id=BREAKOUT, **env_kwargs):
    words = ["--env-id", env_id, "--env-kwargs", json.dumps(env_kwargs), "--num-threads", "1", *flags]
    return ppo_atari.parse_args(words)


def plain_games(game, num_envs, mode=AutoresetMode.SAME_STEP, **kwargs):
    """Games that know nothing of lives and clipping."""
    return AtariVectorEnv(game, num_envs, reward_clipping=False, autoreset_mode=mode, **kwargs)


def spy_actions(envs) -> list:
    """From now on, the actions that reach the games."""
    actions = []
    send = envs.env.send
    envs.env.send = lambda action: actions.append(action.copy()) or send(action)
    return actions


def never_fire(obs, deterministic=True):
    """Actions 2 and 3, left and right; the screen decides which."""
    return 2 + np.asarray(obs)[:, -1].sum((-2, -1), dtype=np.int64) % 2


def often_fire(obs, deterministic=True):
    """Actions 1 to 3, of which 1 is fire; the screen decides which."""
    return 1 + np.asarray(obs)[:, -1].sum((-2, -1), dtype=np.int64) % 3


# --- training ---


@pytest.mark.parametrize(("env_id", "game", "num_games"), [
    (BREAKOUT, "breakout", 3), ("SpaceInvadersNoFrameskip-v4", "space_invaders", 1)
])  # fmt: skip
def test_an_episode_is_a_whole_game_and_its_return_the_raw_score(env_id, game, num_games):
    """Beside plain games with the same seeds and actions: same screens, clipped rewards, lost lives are ends."""
    envs = ppo_atari.make_envs(parse(env_id=env_id), 2)
    sent = spy_actions(envs)
    plain = plain_games(game, 2)
    obs, _ = envs.reset(seed=3)
    plain_obs, plain_infos = plain.reset(seed=3)
    np.testing.assert_array_equal(obs, plain_obs)
    rng = np.random.default_rng(0)
    score = np.zeros(2)
    length = np.zeros(2)
    finished = highest = lost_lives = 0
    while finished < num_games:
        action = rng.integers(envs.single_action_space.n, size=2)
        lives = plain_infos["lives"]
        obs, reward, terminated, truncated, infos = envs.step(action)
        plain_obs, plain_reward, over, _, plain_infos = plain.step(action)
        np.testing.assert_array_equal(sent[-1], action)
        np.testing.assert_array_equal(obs, plain_obs)
        np.testing.assert_array_equal(reward, np.sign(plain_reward))
        np.testing.assert_array_equal(terminated, over | (plain_infos["lives"] < lives))
        assert not truncated.any()
        score += plain_reward
        length += 1
        np.testing.assert_array_equal(infos["final_info"]["_episode"], over)
        np.testing.assert_array_equal(infos["final_info"]["episode"]["r"], score)
        np.testing.assert_array_equal(infos["final_info"]["episode"]["l"], length)
        finished += over.sum()
        lost_lives += (terminated & ~over).sum()
        highest = max(highest, plain_reward.max())
        score *= ~over
        length *= ~over
    assert lost_lives >= 2 * num_games
    assert highest > 1 or game == "breakout"


def test_a_lost_life_is_no_end_if_you_say_so():
    envs = ppo_atari.make_envs(parse("--no-episodic-life"), 2)
    envs.reset(seed=1)
    lives = []
    for _ in range(40):
        _, _, terminated, _, infos = envs.step(np.ones(2, dtype=np.int64))
        lives.append(infos["lives"])
        assert not terminated.any()
        assert not infos["final_info"]["_episode"].any()
    assert np.min(lives) < 5


def test_a_truncated_game_shows_its_last_screen():
    """30 steps are 120 frames. The same game with a later limit has the same screens, but for the very last frame."""
    short, long = (ppo_atari.make_envs(parse(max_num_frames_per_episode=frames), 2) for frames in (120, 400))
    short.reset(seed=1)
    long.reset(seed=1)
    for t in range(30):
        action = np.full(2, 1 + t % 3)
        obs, _, terminated, truncated, infos = short.step(action)
        expected, *_ = long.step(action)
    assert truncated.all()
    assert not terminated.any()
    np.testing.assert_array_equal(infos["final_obs"][:, :3], expected[:, :3])
    assert np.abs(infos["final_obs"][:, 3].astype(int) - expected[:, 3]).mean() < 1
    assert infos["final_info"]["_episode"].all()
    assert (infos["final_info"]["episode"]["l"] == 30).all()
    assert (obs[:, :3] == 0).all()  # the new game's first screen, and none before it
    *_, infos = short.step(action)
    assert (infos["final_info"]["episode"]["l"] == 1).all()


# --- evaluation ---


@pytest.mark.parametrize(("env_id", "game", "act"), [
    (BREAKOUT, "breakout", never_fire), ("SpaceInvadersNoFrameskip-v4", "space_invaders", often_fire)
])  # fmt: skip
def test_evaluation_scores_whole_games_with_raw_rewards(env_id, game, act):
    """One game after another by hand, with fire after each lost life, gives the returns of the batch."""
    args = parse("--eval-deterministic", "--max-eval-steps", "250", env_id=env_id)
    agent = ppo_atari.Agent(ppo_atari.make_envs(args, 1), args)
    agent.act = act
    returns = []
    lost_lives = 0
    for seed in (11, 12):
        alone = plain_games(game, 1, AutoresetMode.NEXT_STEP)
        obs, infos = alone.reset(seed=seed)
        returns.append(0.0)
        fire = False
        for _ in range(250):
            lives = infos["lives"][0]
            obs, reward, terminated, _, infos = alone.step(np.ones(1, dtype=np.int64) if fire else act(obs))
            returns[-1] += reward[0]
            fire = infos["lives"][0] < lives
            lost_lives += fire
            if terminated[0]:
                break
    assert ppo_atari.evaluate(agent, args, 2, seeds=[11, 12]).tolist() == returns
    assert lost_lives > 0
    assert max(returns) > (0 if game == "breakout" else 20)


def test_fire_is_pressed_after_a_lost_life_in_evaluation_and_only_there():
    """An agent that never presses it loses all lives in evaluation; in training it waits for ever after the first."""
    ends = []
    for evaluation in (True, False):
        envs = ppo_atari.make_envs(parse(), 2, evaluation=evaluation)
        sent = spy_actions(envs)
        _, infos = envs.reset(seed=1)
        lives = infos["lives"]
        fire = np.zeros(2, dtype=bool)
        ends.append(0)
        for _ in range(150):
            _, _, terminated, _, infos = envs.step(np.zeros(2, dtype=np.int64))
            np.testing.assert_array_equal(sent[-1], fire & evaluation)
            fire = infos["lives"] < lives
            lives = infos["lives"]
            ends[-1] += terminated
    assert (ends[0] == 1).all()  # one whole game in each
    assert (ends[1] == 1).all()  # one lost life in each
    assert (lives == 4).all()


def test_the_film_shows_the_game_that_is_scored(monkeypatch):
    """Each frame is the plain game in colour after the same actions, and shows what the agent saw at that step."""
    args = parse("--max-eval-steps", "120", env_id=STICKY)
    agent = ppo_atari.Agent(ppo_atari.make_envs(args, 1), args)
    seen = []
    agent.act = lambda obs, deterministic: seen.append(obs[0, -1].float()) or never_fire(obs)
    alone = ppo_atari.evaluate(agent, args, 1, seeds=[4])
    seen.clear()
    made = []
    make_envs = ppo_atari.make_envs

    def spy_envs(*args, **kwargs):
        made.append(make_envs(*args, **kwargs))
        made.append(spy_actions(made[0]))
        return made[0]

    monkeypatch.setattr(ppo_atari, "make_envs", spy_envs)
    frames = []
    assert ppo_atari.evaluate(agent, args, 1, seeds=[4], film=frames.append) == alone
    assert len(frames) == len(seen) == len(made[1]) == 120

    in_colour = {"img_height": 210, "img_width": 160, "grayscale": False, "stack_num": 1}
    plain = plain_games("breakout", 1, AutoresetMode.NEXT_STEP, repeat_action_probability=0.25, **in_colour)
    obs, _ = plain.reset(seed=4)
    lives = []
    for frame, action in zip(frames, made[1]):
        np.testing.assert_array_equal(frame, obs[0, -1])
        obs, *_, infos = plain.step(action)
        lives.append(infos["lives"][0])
    assert min(lives) < 4  # fire was pressed once at least

    grey = (torch.as_tensor(np.stack(frames)) * torch.tensor([0.299, 0.587, 0.114])).sum(-1)
    small = torch.nn.functional.interpolate(grey[:, None], (84, 84), mode="area")[:, 0]
    shown = torch.stack(seen)

    def distance(shift):
        return (small[10:-10] - shown[10 + shift : len(shown) - 10 + shift]).square().mean().item()

    assert distance(0) < 0.7 * min(distance(shift) for shift in (-10, -1, 1, 10))


# --- flags ---


def test_sticky_actions_are_those_of_the_id():
    screens = []
    for args in (parse(), parse(env_id=f"ale_py:{STICKY}"), parse(env_id=STICKY, repeat_action_probability=0)):
        envs = ppo_atari.make_envs(args, 1)
        envs.reset(seed=1)
        screens.append(np.stack([envs.step(np.array([t % 4]))[0] for t in range(40)]))
    assert (screens[0] != screens[1]).any()
    np.testing.assert_array_equal(screens[0], screens[2])


def test_keyword_arguments_reach_the_game():
    args = parse(full_action_space=True, stack_num=2)
    envs = ppo_atari.make_envs(args, 2, render=True)
    agent = ppo_atari.Agent(envs, args)
    obs, _ = envs.reset(seed=1)
    assert obs.shape == (2, 2, 84, 84)
    assert envs.render()[1].shape == (210, 160, 3)
    assert agent(torch.as_tensor(obs))[0].logits.shape == (2, 18)


BAD_INPUT = [
    ("CartPole-v1", {}, "Atari game"),
    ("toy_envs:Identity-v0", {}, "Atari game"),
    ("Breakout-v4", {}, "Atari game"),  # a frameskip drawn at random
    ("Breakot-v4", {}, "doesn't exist"),
    ("ALE/Breakout-ram-v5", {}, "doesn't exist"),
    (BREAKOUT, {"game": "pong"}, "'game'"),
    (BREAKOUT, {"num_envs": 3}, "'num_envs'"),
    (BREAKOUT, {"batch_size": 3}, "'batch_size'"),
    (BREAKOUT, {"continuous": True}, "'continuous'"),
    (BREAKOUT, {"episodic_life": True}, "'episodic_life'"),
    (BREAKOUT, {"life_loss_info": True}, "'life_loss_info'"),
    (BREAKOUT, {"reward_clipping": True}, "'reward_clipping'"),
    (BREAKOUT, {"img_height": 42}, "'img_height'"),
    (BREAKOUT, {"grayscale": False}, "'grayscale'"),
    (BREAKOUT, {"frameskip": 0}, "frameskip"),
    (BREAKOUT, {"stack_num": "a"}, "incompatible function arguments"),
]


@pytest.mark.parametrize(("env_id", "env_kwargs", "message"), BAD_INPUT)
def test_bad_input_is_refused_in_one_line(env_id, env_kwargs, message, capsys):
    with pytest.raises(SystemExit) as stop:
        ppo_atari.open_envs(parse(env_id=env_id, **env_kwargs), 1)
    out, err = capsys.readouterr()
    assert (stop.value.code, out) == (2, "")
    assert err.startswith(f"ppo_atari.py: error: --env-id {env_id}")
    assert err.count("\n") == 1
    assert message in err


# --- network ---


def test_the_first_policy_is_almost_uniform():
    args = parse()
    policy, _ = ppo_atari.Agent(ppo_atari.make_envs(args, 1), args)(torch.randint(256, (8, 4, 84, 84)))
    assert policy.entropy().min() > np.log(4) - 0.001


def test_policy_and_value_come_from_the_same_features():
    args = parse("--no-bfloat16")
    agent = ppo_atari.Agent(ppo_atari.make_envs(args, 1), args)
    obs = torch.randint(256, (8, 4, 84, 84), dtype=torch.uint8)
    policy, value = agent(obs)
    features = agent.network(obs / 255)
    torch.testing.assert_close(agent.actor(features).log_softmax(-1), policy.logits)
    torch.testing.assert_close(agent.critic(features)[:, 0], value)
    assert torch.equal(agent.policy(obs).logits, policy.logits)
    assert torch.equal(agent.value(obs), value)
    for loss in (policy.logits[:, 0].sum(), value.sum()):
        gradients = torch.autograd.grad(loss, list(agent.network.parameters()), retain_graph=True)
        assert all(gradient.any() for gradient in gradients)


def test_compiled_network_gives_the_output_and_gradient_of_the_plain_one(monkeypatch):
    """With a quick backend in place of the real one, which takes a minute; `graphs` are what it gets to compile."""
    compiler = torch.compile
    graphs = []

    def backend(graph, inputs):
        graphs.append(str(graph.graph))
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda function, **options: compiler(function, backend=backend))
    plain_args = parse("--no-bfloat16")
    args = parse("--no-bfloat16", "--compile")
    envs = ppo_atari.make_envs(args, 1)
    plain = ppo_atari.Agent(envs, plain_args)
    fast = ppo_atari.Agent(envs, args)
    assert list(fast.state_dict()) == list(plain.state_dict())
    fast.load_state_dict(plain.state_dict())
    obs = torch.randint(256, (8, 4, 84, 84), dtype=torch.uint8)
    for agent in (plain, fast):
        policy, value = agent(obs)
        (policy.logits[:, 0].sum() + value.sum()).backward()
    torch.testing.assert_close(fast.value(obs), plain.value(obs))
    torch.testing.assert_close(fast.policy(obs).logits, plain.policy(obs).logits)
    for ours, theirs in zip(fast.parameters(), plain.parameters()):
        torch.testing.assert_close(ours.grad, theirs.grad)
    assert any("conv2d" in graph for graph in graphs)


@pytest.mark.skipif("not torch.cpu.get_capabilities().get('avx512_bf16')", reason="no bfloat16 in hardware")
def test_bfloat16_gives_the_gradient_of_float32():
    args = parse()
    envs = ppo_atari.make_envs(args, 64)
    obs, _ = envs.reset(seed=1)
    envs.action_space.seed(1)
    for _ in range(20):
        obs, *_ = envs.step(envs.action_space.sample())
    agent = ppo_atari.Agent(envs, args)
    obs = torch.as_tensor(obs)
    action = torch.arange(64) % 4
    advantage, target = torch.randn(2, 64)
    with torch.no_grad():
        agent.actor.weight *= 100  # else the policy is uniform, and its gradient small beside the value's
    gradients = []
    for agent.bfloat16 in (False, True):
        with torch.no_grad():
            old_logprob = agent(obs)[0].log_prob(action)
        loss, _ = ppo_atari.ppo_loss(agent, obs, action, old_logprob, advantage, target, args)
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(agent.parameters()))]))
    assert torch.cosine_similarity(*gradients, dim=0) > 0.99


# --- training loop ---


def test_a_rollout_is_what_the_games_gave(monkeypatch):
    """A lost life stops bootstrap and sum; a truncated game has the value of its own last screen in its last reward."""
    no_evaluation(monkeypatch, ppo_atari)
    gaes = spy(monkeypatch, ppo_atari, "compute_gae")
    losses = spy(monkeypatch, ppo_atari, "ppo_loss")
    happened = []

    class Spy(VectorWrapper):
        def step(self, action):
            obs, reward, terminated, truncated, infos = self.env.step(action)
            happened.append((reward.copy(), terminated.copy(), truncated.copy(), infos.get("final_obs", obs).copy()))
            return obs, reward, terminated, truncated, infos

    make_envs = ppo_atari.make_envs
    monkeypatch.setattr(ppo_atari, "make_envs", lambda *args, **kwargs: Spy(make_envs(*args, **kwargs)))
    flags = "--num-envs 2 --num-steps 80 --num-minibatches 2 --update-epochs 1 --total-timesteps 160".split()
    ppo_atari.train(parse(*flags, max_num_frames_per_episode=160))
    reward, terminated, truncated, final_obs = (torch.as_tensor(np.stack(x)) for x in zip(*happened))
    lost_life = terminated & ~truncated
    assert lost_life.sum() > 1
    assert truncated.sum() > 1
    agent = losses[0][0][0]  # as it was before its first update
    with torch.no_grad():
        next_value = agent.value(final_obs[truncated])
    reward = reward.float()
    reward[truncated] += 0.99 * next_value
    (rewards, values, last_value, dones, *_), advantages = gaes[0]
    torch.testing.assert_close(rewards, reward)
    assert torch.equal(dones, terminated | truncated)
    assert next_value.abs().min() > 0
    torch.testing.assert_close(advantages[lost_life], (rewards - values)[lost_life])


def test_the_learning_rate_falls_and_never_reaches_zero(trained):
    rates = [event.value for event in scalars(trained("ppo_atari").folder, "train/learning_rate")]
    np.testing.assert_allclose(rates, 2.5e-4 * (1 - np.arange(32) / 32), rtol=1e-4)
