"""The games of ppo_doom.py against VizDoom as it comes, played by hand; and what Doom changes in PPO."""

import gc
import json
import os
import signal
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import psutil
import pytest
import torch
from gymnasium.vector import AutoresetMode, VectorWrapper

import ppo_atari
import ppo_doom
from oracles import no_evaluation, spy
from runs import ROOT, load, same_weights

vizdoom = pytest.importorskip("vizdoom", reason="VizDoom is not installed: pip install -r requirements-extra.txt")
pytest.importorskip("cv2", reason="OpenCV is not installed: pip install -r requirements-extra.txt")

COURSE = "doom_health_gathering_supreme"
BASIC = "VizdoomBasic-v1"
TINY = "--num-envs 2 --num-steps 16 --num-minibatches 2 --update-epochs 1 --num-threads 1 --eval-episodes 2".split()


@pytest.fixture(autouse=True)
def one_thread():
    """Small batches are quicker with one, and other tests run at the same time."""
    torch.set_num_threads(1)


def parse(*flags, env_id=COURSE, **env_kwargs):
    words = ["--env-id", env_id, "--env-kwargs", json.dumps(env_kwargs), "--num-threads", "1", *flags]
    return ppo_doom.parse_args(words)


class ByHand:
    """One game, played tic by tic through VizDoom's own interface, without gymnasium.

    `screens` are all that the agent could see, (H, W) or (H, W, 3) uint8, and `healths` the health with each; there are
    none after the end.
    """

    def __init__(self, seed, resolution="RES_160X120", screen_format="GRAY8", **settings):
        self.game = vizdoom.DoomGame()
        self.game.load_config(f"{vizdoom.scenarios_path}/health_gathering_supreme.cfg")
        self.game.set_living_reward(0.01)
        self.game.set_death_penalty(0)
        names = ("TURN_LEFT", "TURN_RIGHT", "MOVE_FORWARD", "MOVE_BACKWARD")
        self.game.set_available_buttons([getattr(vizdoom.Button, name) for name in names])
        self.game.set_screen_resolution(getattr(vizdoom.ScreenResolution, resolution))
        self.game.set_screen_format(getattr(vizdoom.ScreenFormat, screen_format))
        self.game.set_doom_config_path(os.devnull)
        self.game.set_window_visible(False)
        for name, value in settings.items():
            getattr(self.game, f"set_{name}")(value)
        self.random, _ = gym.utils.seeding.np_random(seed)
        self.game.set_seed(self.new_seed())
        self.game.init()
        self.see()

    def new_seed(self):
        """The seed of the next episode: VizDoom's environment draws it from gymnasium's generator."""
        return int(self.random.integers(0, 2**32, dtype=np.uint32))

    def see(self):
        state = self.game.get_state()
        self.screens = [state.screen_buffer.copy()]
        self.healths = [self.game.get_game_variable(vizdoom.GameVariable.HEALTH)]

    def restart(self):
        self.game.set_seed(self.new_seed())
        self.game.new_episode()
        self.see()

    def act(self, action, tics=4):
        """Press one button for some tics, one after the other; returns the sum of their rewards."""
        buttons = [0, 0, 0, 0]
        if action > 0:
            buttons[4 - action] = 1  # VizDoom counts from the last button
        reward = 0.0
        for _ in range(tics):
            if not self.game.is_episode_finished():
                reward += self.game.make_action(buttons, 1)
        if not self.game.is_episode_finished():
            self.screens.append(self.game.get_state().screen_buffer.copy())
            self.healths.append(self.game.get_game_variable(vizdoom.GameVariable.HEALTH))
        return reward


def overlap(size, parts):
    """(parts, size): the share of each of `size` pixels in each of `parts` equal parts of the line."""
    edges = np.arange(parts + 1) * size / parts
    starts, ends = np.maximum.outer(edges[:-1], np.arange(size)), np.minimum.outer(edges[1:], np.arange(1, size + 1))
    return np.maximum(ends - starts, 0) * parts / size


def small(screen):
    """A screen (H, W) scaled to (84, 84): every pixel is the mean of the area that it covers."""
    height, width = screen.shape
    return overlap(height, 84) @ screen @ overlap(width, 84).T


def stacked(screens):
    """The last four screens as the agent sees them, (4, 84, 84); before the first one, the first one again."""
    padded = [screens[0]] * 3 + screens
    return np.stack([small(screen) for screen in padded[-4:]])


def random_actions(count, num_envs=None, seed=0):
    """Mostly forward, so that something happens."""
    size = count if num_envs is None else (count, num_envs)
    return np.random.default_rng(seed).choice(5, size=size, p=[0.05, 0.1, 0.6, 0.05, 0.2])


# --- what the agent sees ---


def test_a_step_is_four_tics_and_an_observation_the_last_four_screens():
    """Beside a game played tic by tic, through the end of an episode: same screens, rewards and lengths."""
    envs = ppo_doom.make_envs(parse("--health-bonus", "0", "--reward-scale", "1"), 1)
    hand = ByHand(7)
    obs, _ = envs.reset(seed=7)
    assert (obs.shape, obs.dtype) == ((1, 4, 84, 84), np.uint8)
    np.testing.assert_allclose(obs[0], stacked(hand.screens), atol=0.51)
    total, length, ends = 0.0, 0, 0
    for action in random_actions(260):
        reward = hand.act(action)
        total += reward
        length += 1
        obs, given, terminated, truncated, infos = envs.step(np.array([action]))
        assert given[0] == pytest.approx(reward)
        assert (terminated[0], truncated[0]) == (hand.game.is_episode_finished(), False)
        assert ("final_info" in infos) == terminated[0]
        if terminated[0]:
            assert infos["final_info"]["_episode"][0]
            assert infos["final_info"]["episode"]["r"][0] == pytest.approx(total)
            assert infos["final_info"]["episode"]["l"][0] == length
            assert total == pytest.approx(0.01 * hand.game.get_episode_time(), abs=0.011)  # 0.01 a tic
            hand.restart()
            total, length, ends = 0.0, 0, ends + 1
        np.testing.assert_allclose(obs[0], stacked(hand.screens), atol=0.51)
    assert ends >= 2
    envs.close()


def test_colour_and_resolution_reach_the_game():
    """Red, green and blue of the oldest screen come first."""
    args = parse(screen_format="RGB24", screen_resolution="RES_320X240")
    envs = ppo_doom.make_envs(args, 1)
    agent = ppo_doom.Agent(envs, args)
    hand = ByHand(3, "RES_320X240", "RGB24")
    obs, _ = envs.reset(seed=3)
    for action in (3, 3, 2, 1, 4):
        obs, *_ = envs.step(np.array([action]))
        hand.act(action)
    assert obs.shape == (1, 12, 84, 84)
    expected = [stacked([screen[..., c] for screen in hand.screens]) for c in range(3)]
    np.testing.assert_allclose(obs[0], np.stack(expected, 1).reshape(12, 84, 84), atol=0.51)
    assert agent(torch.as_tensor(obs))[0].logits.shape == (1, 5)
    envs.close()


def test_buttons_rewards_and_time_limit_reach_the_game():
    args = parse(available_buttons=["MOVE_FORWARD", "USE"], living_reward=-3, episode_timeout=18)
    envs = ppo_doom.make_envs(args, 1, evaluation=True)
    assert envs.single_action_space == gym.spaces.Discrete(3)
    envs.reset(seed=[1])
    steps = [envs.step(np.array([t % 3])) for t in range(5)]
    assert [reward[0] for _, reward, *_ in steps] == [-12, -12, -12, -12, -6]
    assert [truncated[0] for *_, truncated, _ in steps] == [False] * 4 + [True]
    envs.close()


def test_observations_are_copies():
    """Neither a later step nor a restart changes what was given, and nothing that is done to it comes back."""
    envs = ppo_doom.make_envs(parse(episode_timeout=40), 2)
    first, _ = envs.reset(seed=1)
    given = [first]
    for t in range(25):
        obs, _, _, truncated, infos = envs.step(np.array([3, 2]))
        given.append(obs)
        if truncated.any():
            given.extend(infos["final_obs"])
        if t == 12:
            kept = [obs.copy() for obs in given]
            for obs in given:
                obs += 1
    for obs, before in zip(given, kept):
        np.testing.assert_array_equal(obs, before + 1)
    fresh = ppo_doom.make_envs(parse(episode_timeout=40), 2)
    np.testing.assert_array_equal(fresh.reset(seed=1)[0], kept[0])
    for _ in range(25):
        obs, *_ = fresh.step(np.array([3, 2]))
    np.testing.assert_array_equal(obs, given[-1])
    for each in (envs, fresh):
        each.close()


# --- the end of an episode ---


@pytest.mark.parametrize("evaluation", [False, True])
def test_at_the_time_limit_an_episode_is_truncated_and_its_last_screen_is_not_black(evaluation):
    """VizDoom itself says `terminated`, too, and gives a black screen; here the screen before it comes again."""
    settings = {"frame_skip": 4, "max_buttons_pressed": 1, "episode_timeout": 41, "doom_config_path": os.devnull}
    raw = gym.make(COURSE, **settings)
    raw.reset(seed=5)
    envs = ppo_doom.make_envs(parse(episode_timeout=41), 1, evaluation)
    hand = ByHand(5, episode_timeout=41)
    obs, _ = envs.reset(seed=5)
    for t, action in enumerate([3, 2, 3, 3, 1, 3, 3, 2, 3, 3, 3]):
        before = obs[0]
        hand.act(action)
        black, _, was_terminated, was_truncated, _ = raw.step(action)
        obs, _, terminated, truncated, infos = envs.step(np.array([action]))
        assert not terminated[0]
        assert truncated[0] == (t == 10)
    assert (was_terminated, was_truncated, black["screen"].max()) == (True, True, 0)
    last = obs[0] if evaluation else infos["final_obs"][0]
    np.testing.assert_array_equal(last[:3], before[1:])
    np.testing.assert_array_equal(last[3], before[3])
    assert len(hand.screens) == 11  # at the start and after each action but the last
    np.testing.assert_allclose(last[3], small(hand.screens[-1]), atol=0.51)
    if evaluation:
        obs, reward, _, truncated, _ = envs.step(np.array([3]))
        assert (reward[0], truncated[0]) == (0, False)
    hand.restart()
    np.testing.assert_allclose(obs[0], stacked(hand.screens), atol=0.51)
    for each in (envs, raw):
        each.close()


def test_death_is_terminated():
    """Standing still, the floor kills."""
    envs = ppo_doom.make_envs(parse(), 1)
    envs.reset(seed=1)
    terminated, length = [False], 0
    while not terminated[0]:
        _, reward, terminated, truncated, infos = envs.step(np.array([0]))
        length += 1
        assert not truncated[0]
    assert 50 < length < 400
    assert infos["final_obs"][0].max() > 0  # the last screen of the living
    assert infos["final_info"]["episode"]["r"][0] == pytest.approx(0.04 * length, abs=0.04)
    envs.close()


def test_games_end_with_their_environments():
    """No process and no file of a game is left behind."""
    before = set(psutil.Process().children())
    envs = ppo_doom.make_envs(parse(), 2, evaluation=True, render=True)
    envs.reset(seed=[1, 2])
    assert len(set(psutil.Process().children()) - before) == 4
    envs.close()
    del envs
    gc.collect()
    assert not [child for child in set(psutil.Process().children()) - before if child.is_running()]
    assert not [path for path in Path().iterdir() if path.is_file()]


# --- rewards ---


def test_training_adds_a_bonus_when_the_health_rises_and_no_score_has_it():
    """In training rewards are scaled, and each medikit adds the bonus once; the score stays 0.01 for each tic."""
    args = parse("--reward-scale", "10", "--health-bonus", "0.5")
    training, evaluation = ppo_doom.make_envs(args, 1), ppo_doom.make_envs(args, 1, evaluation=True)
    hand = ByHand(2)
    training.reset(seed=2)
    evaluation.reset(seed=[2])
    total, medikits = 0.0, 0
    for action in random_actions(600):
        before = hand.healths[-1]
        reward = hand.act(action)
        total += reward
        over = hand.game.is_episode_finished()
        has_risen = not over and hand.healths[-1] > before
        medikits += has_risen
        _, given, *_, infos = training.step(np.array([action]))
        assert given[0] == pytest.approx(10 * reward + 0.5 * has_risen)
        assert evaluation.step(np.array([action]))[1][0] == pytest.approx(reward)
        if over:
            assert infos["final_info"]["episode"]["r"][0] == pytest.approx(total)
            total = 0.0
            hand.restart()
            evaluation.step(np.array([action]))  # which only restarts
    assert medikits > 2
    for each in (training, evaluation):
        each.close()


def test_a_new_episode_begins_without_a_bonus():
    """The health rises from 0 to 100 when a dead player starts again: no medikit."""
    envs = ppo_doom.make_envs(parse(), 1)
    envs.reset(seed=1)
    rewards = [envs.step(np.array([0]))[1][0] for _ in range(250)]
    assert max(rewards) < 0.1
    envs.close()


def test_an_evaluation_is_the_score_of_the_course():
    """0.01 for each tic until the player dies or the time is over; one episode after the other by hand."""
    args = parse("--eval-deterministic", episode_timeout=600)
    agent = ppo_doom.Agent(ppo_doom.make_envs(args, 1), args)
    agent.act = lambda obs, deterministic: 2 + np.asarray(obs)[:, -1].sum((-2, -1), dtype=np.int64) % 2
    returns = []
    for seed in (11, 12, 13):
        envs = ppo_doom.make_envs(args, 1, evaluation=True)
        obs, _ = envs.reset(seed=[seed])
        hand = ByHand(seed, episode_timeout=600)
        returns.append(0.0)
        while not hand.game.is_episode_finished():
            action = agent.act(obs, True)
            obs, *_ = envs.step(action)
            returns[-1] += hand.act(action[0])
        envs.close()
    np.testing.assert_allclose(ppo_doom.evaluate(agent, args, 3, seeds=[11, 12, 13]), returns)
    assert max(returns) <= 6
    assert len(set(returns)) > 1


# --- seeds ---


def play(envs, actions, seed):
    """All that the games give, as bytes."""
    obs, _ = envs.reset(seed=seed)
    given = [obs]
    for action in actions:
        given.extend(envs.step(action)[:4])
    return b"".join(x.tobytes() for x in given)


def test_seeded_episodes_repeat():
    """New games with the same seed give the same, also in the episodes after the first; other seeds give another."""
    actions = random_actions(300, 2)
    runs = []
    for seed in (4, 4, 5):
        envs = ppo_doom.make_envs(parse(episode_timeout=200), 2)
        runs.append(play(envs, actions, seed))
        envs.close()
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


def test_a_game_that_was_played_before_starts_anew_with_the_seed():
    envs = ppo_doom.make_envs(parse(episode_timeout=200), 2)
    actions = random_actions(120, 2)
    first = play(envs, actions, 4)
    for action in actions[:33]:
        envs.step(action)
    assert play(envs, actions, 4) == first
    envs.close()


def test_the_games_of_one_run_differ():
    envs = ppo_doom.make_envs(parse(), 3)
    obs, _ = envs.reset(seed=1)
    assert len({one.tobytes() for one in obs}) == 3
    envs.close()


# --- the film ---


def test_the_film_shows_the_game_that_is_scored():
    """In colour, and each frame shows what the agent saw at that step, to the end of the episode."""
    args = parse(episode_timeout=160)
    agent = ppo_doom.Agent(ppo_doom.make_envs(args, 1), args)
    seen = []
    agent.act = lambda obs, deterministic: seen.append(obs[0, -1].numpy()) or random_actions(1, seed=len(seen))
    alone = ppo_doom.evaluate(agent, args, 1, seeds=[4])
    watched = seen.copy()
    seen.clear()
    frames = []
    assert ppo_doom.evaluate(agent, args, 1, seeds=[4], film=frames.append) == alone
    np.testing.assert_array_equal(seen, watched)
    assert len(frames) == len(seen) + 1 == 41
    assert frames[0].shape == (480, 640, 3)
    assert np.ptp(frames[20], axis=2).max() > 50  # colour
    assert frames[-1].max() > 0  # not the black screen of VizDoom
    grey = [small(frame @ [0.299, 0.587, 0.114]) for frame in frames]

    def distance(shift):
        return np.mean([np.square(grey[t] - seen[t + shift]).mean() for t in range(10, 30)])

    assert distance(0) < 0.5 * min(distance(shift) for shift in (-10, -2, 2, 10))


def test_the_film_is_as_fast_as_the_game():
    envs = ppo_doom.make_envs(parse(), 1, evaluation=True)
    assert envs.metadata["render_fps"] == vizdoom.DEFAULT_TICRATE / 4
    assert envs.metadata["autoreset_mode"] == AutoresetMode.NEXT_STEP


# --- flags ---


SCENARIOS = {
    BASIC: 4,
    f"vizdoom.gymnasium_wrapper:{BASIC}": 4,
    "VizdoomHealthGatheringSupreme-v1": 4,
    "VizdoomBasic-MultiBinary-v1": 4,
    "VizdoomFreedoom1E1M1-S3-v0": None,
}


@pytest.mark.parametrize("env_id", SCENARIOS)
def test_other_scenarios_are_played_with_one_button_at_a_time(env_id):
    envs = ppo_doom.make_envs(parse(env_id=env_id), 2)
    obs, _ = envs.reset(seed=1)
    assert obs.shape == (2, 4, 84, 84)
    buttons = envs.envs[0].unwrapped.game.get_available_buttons_size()
    assert envs.single_action_space.n == buttons + 1
    assert SCENARIOS[env_id] in (buttons + 1, None)
    envs.close()


BAD_INPUT = [
    ("CartPole-v1", {}, "must be a scenario of VizDoom"),
    ("toy_envs:Identity-v0", {}, "must be a scenario of VizDoom"),
    ("VizdoomBasic-v0", {}, "v1"),
    ("VizdoomNothing-v1", {}, "doesn't exist"),
    ("VizdoomDeathmatch-v1", {}, "are not Discrete"),
    (COURSE, {"foo": 1}, "VizDoom does not take these settings"),
    (COURSE, {"living_reward": "much"}, "VizDoom does not take these settings"),
    (COURSE, {"screen_resolution": "RES_1X1"}, "VizDoom does not take these settings"),
    (COURSE, {"available_buttons": ["FLY"]}, "VizDoom does not take these settings"),
    (COURSE, {"available_buttons": None}, ""),
    (COURSE, {"frame_skip": 2}, "VizDoom does not take these settings"),
]


@pytest.mark.parametrize(("env_id", "env_kwargs", "message"), BAD_INPUT)
def test_bad_input_is_refused_in_one_line(env_id, env_kwargs, message, capsys):
    with pytest.raises(SystemExit) as stop:
        ppo_doom.open_envs(parse(env_id=env_id, **env_kwargs), 1)
    out, err = capsys.readouterr()
    assert (stop.value.code, out) == (2, "")
    assert err.startswith("ppo_doom.py: error: --env-")
    assert err.count("\n") == 1
    assert message in err


def test_without_vizdoom_one_line_says_so(monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "vizdoom.gymnasium_wrapper", None)
    with pytest.raises(SystemExit) as stop:
        ppo_doom.open_envs(parse(), 1)
    assert stop.value.code == 2
    assert "vizdoom" in capsys.readouterr().err


# --- training ---


def test_a_rollout_is_what_the_games_gave(monkeypatch):
    """Death stops bootstrap and sum; at the time limit the value of the last screen is in the last reward."""
    no_evaluation(monkeypatch, ppo_doom)
    gaes = spy(monkeypatch, ppo_doom, "compute_gae")
    losses = spy(monkeypatch, ppo_doom, "ppo_loss")
    happened = []

    class Spy(VectorWrapper):
        def step(self, action):
            obs, reward, terminated, truncated, infos = self.env.step(action)
            final_obs = obs.copy()
            for n in np.flatnonzero(terminated | truncated):
                final_obs[n] = infos["final_obs"][n]
            happened.append((reward.copy(), terminated.copy(), truncated.copy(), final_obs))
            return obs, reward, terminated, truncated, infos

    make_envs = ppo_doom.make_envs
    monkeypatch.setattr(ppo_doom, "make_envs", lambda *args, **kwargs: Spy(make_envs(*args, **kwargs)))
    flags = "--num-envs 4 --num-steps 120 --num-minibatches 2 --update-epochs 1 --total-timesteps 480".split()
    ppo_doom.train(parse(*flags, episode_timeout=420))  # some die before
    reward, terminated, truncated, final_obs = (torch.as_tensor(np.stack(x)) for x in zip(*happened))
    assert terminated.sum() > 0
    assert truncated.sum() > 0
    assert not (terminated & truncated).any()
    agent = losses[0][0][0]  # as it was before its first update
    with torch.no_grad():
        next_value = agent.value(final_obs[truncated])
    reward = reward.float()
    reward[truncated] += 0.99 * next_value
    (rewards, values, last_value, dones, *_), advantages = gaes[0]
    torch.testing.assert_close(rewards, reward)
    assert torch.equal(dones, terminated | truncated)
    assert next_value.abs().min() > 0
    torch.testing.assert_close(advantages[terminated], (rewards - values)[terminated])


class Stop(Exception):
    pass


def test_stopped_and_resumed_is_the_uninterrupted_run(monkeypatch):
    """Bit for bit: the second checkpoint is written, and then the run is stopped."""
    args = parse(*TINY, "--total-timesteps", "1280", "--num-checkpoints", "2", episode_timeout=80)
    whole = ppo_doom.train(args)
    save_checkpoint = ppo_doom.Run.save_checkpoint

    def save_and_stop(self, final=False):
        returns = save_checkpoint(self, final)
        if self.step > 0:
            raise Stop
        return returns

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(ppo_doom.Run, "save_checkpoint", save_and_stop)
        ppo_doom.train(args)
    (stopped,) = (folder for folder in Path("runs").iterdir() if folder != whole)
    assert 0 < load(stopped)["step"] < load(whole)["step"]
    assert not same_weights(stopped, whole)
    resumed = ppo_doom.train(ppo_doom.parse_args(["--resume", str(stopped)]))
    assert same_weights(resumed, whole)
    assert (resumed / "episodes.csv").read_text() == (whole / "episodes.csv").read_text()
    scores = [json.loads((folder / "results.json").read_text())["mean_reward"] for folder in (whole, resumed)]
    assert scores[0] == scores[1]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_and_kill_leave_at_once(number, code, start):
    """VizDoom would take both signals for itself, and end with a traceback."""
    words = ["--env-kwargs", '{"episode_timeout": 80}', *TINY, "--total-timesteps", "1_000_000", "--learning-rate", "0"]
    process = start("ppo_doom.py", *words, start_new_session=True)
    deadline = time.monotonic() + 120
    while not list(Path().glob("runs/*/episodes.csv")) or not os.path.getsize(*Path().glob("runs/*/events*")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    time.sleep(3)
    os.killpg(process.pid, number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == code, stderr
    assert "Traceback" not in stderr
    time.sleep(0.5)
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)  # no game is left


# --- the text ---


def test_a_diff_with_ppo_atari_is_the_lesson():
    """Only the docstring, the imports, Args and the section of the environment differ, and Args in few lines."""
    atari, doom = ((ROOT / f"{name}.py").read_text(encoding="utf-8") for name in ("ppo_atari", "ppo_doom"))
    assert atari[atari.index("# --- network ---") :] == doom[doom.index("# --- network ---") :]

    def flags(text):
        return text[text.index("class Args:") : text.index("# --- environment ---")].splitlines()

    ours, theirs = set(flags(doom)), set(flags(atari))
    changed = {line.split(":")[0].strip() for line in ours ^ theirs}
    added = {"reward_scale", "health_bonus", "episodic_life"}
    assert changed == {"env_id", "total_timesteps", "max_eval_steps", "learning_rate", "update_epochs"} | added
    names = set(vars(ppo_doom)) ^ set(vars(ppo_atari))
    wrappers = {"FrameStackObservation", "RecordEpisodeStatistics", "ResizeObservation", "TransformObservation"}
    imports = {"AtariVectorEnv", "VectorWrapper", "SyncVectorEnv", "Discrete"} | wrappers
    assert names == {"AtariGames", "DoomScreen", "COURSE"} | imports
