"""dqn_atari.py and ddqn_atari.py: the replay against what the games showed, and the targets against the book."""

import copy
import json
import re
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import psutil
import pytest
import torch
from test_scripts import assert_refused, definitions, load, run, scalars, source

import ddqn_atari
import dqn_atari as dqn

both = pytest.mark.parametrize("module", [dqn, ddqn_atari])


def games(env_id, num_envs, max_frames=108_000):
    kwargs = json.dumps({"max_num_frames_per_episode": max_frames})
    args = dqn.parse_args(["--env-id", env_id, "--env-kwargs", kwargs])
    return dqn.make_envs(args, num_envs)


# --- the replay ---


@pytest.mark.parametrize("num_rows", [60, 500])  # a full ring, and one with room
@pytest.mark.parametrize(
    ("env_id", "max_frames", "num_steps"),
    [("BreakoutNoFrameskip-v4", 108_000, 480), ("ALE/Breakout-v5", 160, 240), ("PongNoFrameskip-v4", 100, 240)],
)
def test_replay_returns_what_the_games_showed(env_id, max_frames, num_steps, num_rows):
    """Each stack and next stack, across ends, lost lives, truncations, fresh starts and the head of the ring."""
    envs, rng = games(env_id, 3, max_frames), np.random.default_rng(0)
    replay = dqn.Replay(num_rows * 3 + 2, 3, envs.single_observation_space.shape, "cpu")
    obs, _ = envs.reset(seed=5)
    truth, seen = [], {"life": 0, "end": 0, "truncated": 0}
    for t in range(num_steps):
        if t in (30, 31, 100):
            replay.break_off()
            obs, _ = envs.reset(seed=t)
            truth[-1] = [step if step["terminated"] else None for step in truth[-1]]
        action = rng.integers(envs.single_action_space.n, size=3)
        next_obs, _, terminated, truncated, infos = envs.step(action)
        label = rng.normal(size=3).astype(np.float32)  # in place of the reward: it tells which step was drawn
        new_game = infos.get("_episode", np.zeros(3, dtype=bool))
        replay.add(obs, action, label, terminated, truncated, new_game)
        names = ("obs", "action", "reward", "next_obs", "terminated", "truncated", "new_game")
        values = zip(obs, action, label, next_obs, terminated, truncated, new_game)
        truth.append([dict(zip(names, step)) for step in values])
        truth[-1] = [None if step["truncated"] and not step["terminated"] else step for step in truth[-1]]
        seen["life"] += (terminated & ~new_game).sum()
        seen["end"] += (terminated & new_game).sum()
        seen["truncated"] += truncated.sum()
        obs = next_obs
        if t >= 8 and t % 4 == 0:
            steps = {step["reward"]: step for row in truth[-num_rows:-1] for step in row if step}
            for drawn in zip(*replay.sample(32)):
                expected = steps[drawn[2].item()]
                assert torch.equal(drawn[0], torch.as_tensor(expected["obs"]))
                assert drawn[1] == expected["action"]
                assert drawn[4] == expected["terminated"]
                if not (expected["terminated"] and expected["new_game"]):  # then the next is another game's
                    assert torch.equal(drawn[3], torch.as_tensor(expected["next_obs"]))
    assert seen["life" if env_id[:4] != "Pong" else "truncated"] > 5
    assert seen["end" if max_frames == 108_000 else "truncated"] > 0


@pytest.mark.parametrize("num_steps", [7, 40])
def test_replay_draws_every_step_it_may_and_no_other(num_steps):
    replay = dqn.Replay(20, 2, (4, 2, 2), "cpu")  # 10 rows
    no = np.zeros(2, dtype=bool)
    for t in range(num_steps):
        truncated = np.array([t == num_steps - 4, t == num_steps - 5])
        terminated = np.array([False, t in (num_steps - 5, num_steps - 3)])
        replay.add(np.zeros((2, 4, 2, 2), np.uint8), [0, 0], np.array([t, -t]), terminated, truncated, no)
        if t == num_steps - 3:
            replay.break_off()  # the first of the two had not terminated, the second had
    drawn = set(replay.sample(5_000)[2].tolist())
    steps = range(0 if num_steps == 7 else num_steps - 7, num_steps - 1)  # without the newest, and 3 of a full ring
    assert drawn == {float(t) for t in steps if t < num_steps - 4 or t > num_steps - 3} | {-float(t) for t in steps}


def test_replay_of_a_million_steps_takes_memory_only_as_it_fills():
    before = psutil.Process().memory_info().rss
    replay = dqn.Replay(1_000_000, 16, (4, 84, 84), "cpu")
    assert replay.frames.nbytes == 16 * 62_500 * 84 * 84 == 7_056_000_000
    assert psutil.Process().memory_info().rss - before < 200e6


@both
def test_a_replay_that_does_not_fit_is_refused(module, capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        module.train(module.parse_args(["--buffer-size", "1e9"]))
    out, err = capsys.readouterr()
    assert (stop.value.code, out) == (2, "")
    assert re.fullmatch(r".*--buffer-size 1000000000: 7056.0 GB do not fit into [\d.]+ GB of free memory; .*\n", err)
    assert not list(tmp_path.iterdir())


def test_saving_the_replay_needs_its_memory_twice(monkeypatch):
    obs_shape, flags = (4, 84, 84), ["--buffer-size", "1e5"]  # 0.7 GB, and half a GB for the rest
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1.3e9))
    assert dqn.make_replay(dqn.parse_args(flags), obs_shape, torch.device("cpu")).num_rows == 6250
    with pytest.raises(SystemExit):
        dqn.make_replay(dqn.parse_args([*flags, "--save-replay"]), obs_shape, torch.device("cpu"))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1.1e9))
    with pytest.raises(SystemExit):
        dqn.make_replay(dqn.parse_args(flags), obs_shape, torch.device("cpu"))


def test_replay_is_in_the_checkpoint_only_on_demand():
    with_replay, without = load(run("dqn_atari")), load(run("dqn_atari", "--no-save-replay"))
    assert set(with_replay) - set(without) == {"replay"}
    assert with_replay["replay"]["frames"].shape == (100, 2, 84, 84)


def test_a_resumed_run_without_its_replay_fills_a_new_one_first(monkeypatch):
    flags = ["--no-save-replay", "--learning-starts", "100"]
    folder, drawn = run("dqn_atari", *flags), []
    sample = dqn.Replay.sample
    monkeypatch.setattr(dqn.Replay, "sample", lambda self, n: drawn.append(self.size) or sample(self, n))
    dqn.train(dqn.parse_args(["--resume", str(folder), "--total-timesteps", "1024"]))
    assert len(drawn) == (512 - 100) // 16 + 1
    assert min(drawn) == 55  # the first multiple of 16 steps after 100 of them, without the step that is under way


# --- formulas ---


class Table(torch.nn.Module):
    """Q-values looked up: states (B,) to (B, A), of B tables (B, S, A)."""

    def __init__(self, values):
        super().__init__()
        self.values = values

    def forward(self, state):
        return self.values[torch.arange(len(state)), state]


def test_td_target_where_the_two_algorithms_differ():
    agent = Table(torch.tensor([[[1.0, 2.0, 0.0]]] * 3))
    target_network = Table(torch.tensor([[[10.0, 20.0, 30.0]], [[-1.0, -5.0, -2.0]], [[1.0, 2.0, 3.0]]]))
    reward, state = torch.tensor([1.0, 2.0, 3.0]), torch.zeros(3, dtype=torch.int64)
    terminated = torch.tensor([False, False, True])
    rest = reward, state, terminated, 0.5
    torch.testing.assert_close(dqn.td_target(agent, target_network, *rest), torch.tensor([16.0, 1.5, 3.0]))
    torch.testing.assert_close(ddqn_atari.td_target(agent, target_network, *rest), torch.tensor([11.0, -0.5, 3.0]))


def share_of_left(module, double, runs=2_000, episodes=100):
    """Share of episodes that go left in Sutton and Barto's Example 6.7, where it costs 0.1 on average.

    In A, state 0, left leads to B without a reward, and right ends it; each of B's ten actions ends it with a random
    reward. Double learning keeps two tables and updates one of them, drawn anew each time.
    """
    torch.manual_seed(0)
    tables = torch.zeros(2, runs, 2, 10)
    tables[:, :, 0, 2:] = -torch.inf
    yes, count = torch.ones(runs, dtype=torch.bool), 0

    def play(state, reward, terminated_if, learns):
        values = tables.sum(0)[:, state] if double else tables[0, :, state]
        best = (values + 1e-6 * torch.rand(runs, 10)).argmax(-1)
        action = torch.where(torch.rand(runs) < 0.1, torch.randint((2, 10)[state], (runs,)), best)
        coin = torch.rand(runs) < 0.5
        for mine, other, turn in ((0, 1, coin), (1, 0, ~coin)) if double else ((0, 0, yes),):
            networks, next_state = (Table(tables[mine]), Table(tables[other])), torch.ones(runs, dtype=torch.int64)
            target = module.td_target(*networks, reward, next_state, terminated_if(action), 1.0)
            rows = torch.nonzero(turn & learns).squeeze(-1)
            old = tables[mine, rows, state, action[rows]]
            tables[mine, rows, state, action[rows]] = old + 0.1 * (target[rows] - old)
        return action

    for _ in range(episodes):
        left = play(0, torch.zeros(runs), lambda action: action == 1, yes) == 0
        play(1, torch.randn(runs) - 0.1, lambda action: yes, left)
        count += left.sum().item()
    return count / runs / episodes


def test_maximisation_bias_of_sutton_and_barto():
    biased, unbiased = share_of_left(dqn, double=False), share_of_left(ddqn_atari, double=True)
    assert biased > 0.6
    assert unbiased < 0.45


def test_loss_is_hubers_and_of_the_action_taken():
    agent = Table(torch.tensor([[[1.0, 9.0]], [[9.0, 2.0]], [[3.0, 9.0]]]))
    target_network = Table(torch.tensor([[[0.0, 1.0]]] * 3))
    state, action, reward = torch.zeros(3, dtype=torch.int64), torch.tensor([0, 1, 0]), torch.tensor([1.0, 2.0, 6.5])
    terminated = torch.tensor([False, True, False])
    loss, metrics = dqn.dqn_loss(agent, target_network, state, action, reward, state, terminated, 0.5)
    assert loss.item() == pytest.approx((0.5 * 0.5**2 + 0 + (4 - 0.5)) / 3)  # targets 1.5, 2 and 7
    assert metrics["loss/td"].item() == loss.item()
    assert metrics["train/q_value"].item() == pytest.approx(2)


# --- acting and learning ---


@both
def test_exploration(module):
    args = module.parse_args(["--env-id", "PongNoFrameskip-v4", "--eval-epsilon", "0.5"])
    envs = module.make_envs(args, 2)
    agent = module.Agent(envs, args)
    agent.forward = lambda obs: torch.arange(6.0).expand(len(obs), 6)
    obs = torch.zeros(4_000, 1)
    assert (agent.act(obs[:8], True) == 5).all()
    counts = np.bincount(agent.act(obs, False), minlength=6) / 4_000
    np.testing.assert_allclose(counts, [0.5 / 6] * 5 + [0.5 + 0.5 / 6], atol=0.03)
    assert set(agent.explore(agent.best_action(obs[:500]), 1.0)) == set(range(6))


@both
def test_replay_ratio_target_network_and_epsilon(module, monkeypatch):
    """Gradient steps and copies of the network fall on the steps they would fall on with one game."""
    name, events = module.__name__, []
    loss, copy = module.dqn_loss, torch.nn.Module.load_state_dict
    epsilons, explore = [], module.Agent.explore
    monkeypatch.setattr(module, "dqn_loss", lambda *args: events.append("learn") or loss(*args))
    monkeypatch.setattr(torch.nn.Module, "load_state_dict", lambda *args: events.append("copy") or copy(*args))
    monkeypatch.setattr(module.Agent, "explore", lambda self, a, e: epsilons.append(e) or explore(self, a, e))
    flags = ["--num-envs", "3", "--total-timesteps", "600", "--train-frequency", "4", "--learning-starts", "60"]
    flags += [
        "--start-e",
        "0.9",
        "--end-e",
        "0.1",
        "--exploration-fraction",
        "0.5",
        "--target-network-frequency",
        "100",
    ]
    folder = run(name, *flags, "--num-checkpoints", "1", "--eval-epsilon", "0.01")
    assert events.count("learn") == 600 // 4 - 60 // 4
    assert events.count("copy") == 6
    epsilons = [e for e in epsilons if e != 0.01]
    expected = [0.9 - 0.8 * min(step / 300, 1) for step in range(0, 600, 3)]
    np.testing.assert_allclose(epsilons, expected, atol=1e-9)
    assert [event.step for event in scalars(folder, "train/epsilon")] == [102, 204, 306, 408, 510, 600]


def test_what_is_stored_is_what_happened_and_what_is_drawn_is_learned_from(monkeypatch):
    """train() beside the environments it steps, the replay it fills and the two networks it has."""
    happened, stored, drawn, learned, networks = [], [], [], [], []
    make_envs, replay, loss = dqn.make_envs, dqn.Replay, dqn.dqn_loss

    class Spy(gym.vector.VectorWrapper):
        def reset(self, **kwargs):
            self.obs, infos = self.env.reset(**kwargs)
            return self.obs, infos

        def send(self, action):
            self.action = action
            self.env.send(action)

        def recv(self):
            result = self.env.recv()
            over = result[4].get("_episode", np.zeros(2, dtype=bool))
            happened.append([x.copy() for x in (self.obs, self.action, *result[1:4], over)])
            self.obs = result[0]
            return result

    def spy_envs(args, num_envs, evaluation=False, render=False):
        envs = make_envs(args, num_envs, evaluation, render)
        return envs if evaluation else Spy(envs)

    class SpyReplay(replay):
        def add(self, *step):
            stored.append([np.array(x) for x in step])
            super().add(*step)

        def sample(self, batch_size):
            assert batch_size == 8  # two minibatches at once
            batch = super().sample(batch_size)
            drawn.extend(zip(*(x.split(4) for x in batch)))
            return batch

    def spy_loss(agent, target_network, *minibatch):
        learned.append(minibatch)
        networks.append((agent, target_network))
        return loss(agent, target_network, *minibatch)

    backward = torch.Tensor.backward

    def spy_backward(tensor):
        assert all(p.grad is None for p in networks[-1][0].parameters())  # each update has a gradient of its own
        backward(tensor)

    monkeypatch.setattr(torch.Tensor, "backward", spy_backward)
    monkeypatch.setattr(dqn, "make_envs", spy_envs)
    monkeypatch.setattr(dqn, "Replay", SpyReplay)
    monkeypatch.setattr(dqn, "dqn_loss", spy_loss)
    folder = run("dqn_atari", "--target-network-frequency", "500", "--train-frequency", "1")
    assert len(happened) == len(stored) == 256
    for expected, actual in zip(happened, stored):
        assert len(expected) == len(actual)
        assert all(np.array_equal(a, b) for a, b in zip(expected, actual))
    assert len(drawn) == len(learned) > 20
    for expected, (*actual, gamma) in zip(drawn, learned):
        assert all(torch.equal(a, b) for a, b in zip(expected, actual))
        assert gamma == 0.99
    agents, targets = ({id(pair[i]) for pair in networks} for i in (0, 1))
    assert len(agents) == len(targets) == 1
    assert agents != targets
    checkpoint = load(folder)
    assert all(torch.equal(checkpoint["agent"][k], v) for k, v in networks[0][0].state_dict().items())
    assert all(torch.equal(checkpoint["target_network"][k], v) for k, v in networks[0][1].state_dict().items())


def test_the_target_network_is_the_agent_of_the_last_copy(monkeypatch):
    first = load(run("dqn_atari", "--target-network-frequency", "512"))
    agent, target = first["agent"], first["target_network"]
    assert all(torch.equal(agent[name], target[name]) for name in agent)
    states, log = [], dqn.Run.log

    def spy_log(run, metrics):
        states.append((run.step, copy.deepcopy(run.parts["agent"].state_dict())))
        log(run, metrics)

    monkeypatch.setattr(dqn.Run, "log", spy_log)
    later = load(run("dqn_atari", "--target-network-frequency", "400", "--log-interval", "2"))
    agent, target = later["agent"], later["target_network"]
    then = dict(states)[400]
    assert all(torch.equal(then[name], target[name]) for name in agent)
    assert not all(torch.equal(agent[name], target[name]) for name in agent)
    assert not all(torch.equal(states[0][1][name], target[name]) for name in agent)


@pytest.mark.skipif("not torch.cpu.get_capabilities().get('avx512_bf16')", reason="no bfloat16 in hardware")
def test_bfloat16_gives_the_gradient_of_float32():
    envs, gradients = games("BreakoutNoFrameskip-v4", 32), []
    obs, _ = envs.reset(seed=1)
    envs.action_space.seed(1)
    for _ in range(40):
        obs, *_ = envs.step(envs.action_space.sample())
    agent = dqn.Agent(envs, dqn.parse_args([]))
    minibatch = torch.as_tensor(obs), torch.arange(32) % 4, torch.randn(32), torch.as_tensor(obs)
    for agent.bfloat16 in (False, True):
        loss, _ = dqn.dqn_loss(agent, agent, *minibatch, torch.ones(32, dtype=torch.bool), 0.99)
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(agent.parameters()))]))
    assert torch.cosine_similarity(*gradients, dim=0) > 0.99


# --- the pair, and bad input ---


def test_the_two_differ_in_docstring_and_target_alone():
    texts = []
    for name in ("dqn_atari", "ddqn_atari"):
        text = source(name).replace(definitions(name)["td_target"], "")
        texts.append(text[text.index("\nimport copy\n") :])
    assert texts[0] == texts[1]


BAD_INPUT = {
    "--env-id CartPole-v1": "the Atari games; others: ppo.py",
    "--eval-epsilon 1.5": "--eval-epsilon 1.5: must be at most 1",
    "--start-e 2": "--start-e 2.0: must be at most 1",
    "--learning-starts 100 --num-envs 16": "--learning-starts 100: must be at least 8 * --num-envs",
    "--buffer-size 80015": "--buffer-size 80015: must be --learning-starts + --num-envs or more",
    "--num-checkpoints 400000": "less than 2 * --num-envs steps between two",
    "--total-timesteps 80000": "--total-timesteps 80000: must be above --learning-starts 80000",
}


@both
def test_bad_input_is_refused_in_one_line(module, capsys, tmp_path):
    assert_refused(module.__name__, BAD_INPUT, tmp_path, capsys)


def test_flags_of_the_shared_tests_learn_something():
    """The shared tests are worth as much as the run they look at: it learns, and games end in it."""
    folder = run("dqn_atari")
    assert len(Path(folder, "episodes.csv").read_text().splitlines()) > 5
    assert len(scalars(folder, "loss/td")) >= 2
