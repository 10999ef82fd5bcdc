"""DQN and Double DQN: the replay against what the games showed, and the targets against the book."""

import copy
import json
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from gymnasium.vector import VectorWrapper

import ddqn_atari
import dqn_atari as dqn
from oracles import no_evaluation
from runs import load, refusal, resume, run, scalars

both = pytest.mark.parametrize("module", [dqn, ddqn_atari])


@pytest.fixture(autouse=True)
def one_thread():
    """Small batches are quicker with one, and other tests run at the same time."""
    torch.set_num_threads(1)


@pytest.fixture
def time_limit():
    """A minute, after which what hangs is stopped."""

    def stop(*_):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


# --- the replay ---


@pytest.mark.parametrize(("env_id", "env_kwargs", "num_steps"), [
    ("BreakoutNoFrameskip-v4", {}, 400), ("ALE/Breakout-v5", {"max_num_frames_per_episode": 160, "stack_num": 3}, 240)
])  # fmt: skip
def test_replay_returns_what_the_games_showed(env_id, env_kwargs, num_steps):
    """Across ends, lost lives, truncations, fresh starts and the head of the ring, in a full ring and one with room."""
    args = dqn.parse_args(["--env-id", env_id, "--env-kwargs", json.dumps(env_kwargs)])
    envs = dqn.make_envs(args, 2)
    replays = [dqn.Replay(num_rows * 2 + 1, 2, envs.single_observation_space.shape, "cpu") for num_rows in (60, 500)]
    rng = np.random.default_rng(0)
    obs, _ = envs.reset(seed=5)
    rows = []  # for each step, what may be drawn: a dict for each game, or None
    seen = {"life": 0, "end": 0, "truncated": 0}
    for t in range(num_steps):
        if t in (30, 31, 100):
            for replay in replays:
                replay.start_new_games()
            obs, _ = envs.reset(seed=t)
            rows[-1] = [step | {"new_game": True} if step and step["terminated"] else None for step in rows[-1]]
        action = rng.integers(envs.single_action_space.n, size=2)
        next_obs, _, terminated, truncated, infos = envs.step(action)
        label = rng.normal(size=2).astype(np.float32)  # in place of the reward: it tells which step was drawn
        new_game = infos["final_info"]["_episode"]
        for replay in replays:
            replay.add(obs, action, label, terminated, truncated, new_game)
        names = ("obs", "action", "reward", "next_obs", "terminated", "truncated", "new_game")
        values = zip(obs, action, label, next_obs, terminated, truncated, new_game)
        steps = [dict(zip(names, step)) for step in values]
        rows.append([None if step["truncated"] and not step["terminated"] else step for step in steps])
        seen["life"] += (terminated & ~new_game).sum()
        seen["end"] += (terminated & new_game).sum()
        seen["truncated"] += truncated.sum()
        obs = next_obs
        if t >= 8 and t % 4 == 0:
            for replay in replays:
                allowed = {step["reward"]: step for row in rows[-replay.num_rows : -1] for step in row if step}
                for drawn_obs, drawn_action, reward, drawn_next, drawn_terminated in zip(*replay.sample(16)):
                    step = allowed[reward.item()]
                    assert torch.equal(drawn_obs, torch.as_tensor(step["obs"]))
                    assert drawn_action == step["action"]
                    assert drawn_terminated == step["terminated"]
                    if not (step["terminated"] and step["new_game"]):  # then the next is another game's
                        assert torch.equal(drawn_next, torch.as_tensor(step["next_obs"]))
    assert [replay.size for replay in replays] == [60, num_steps]
    assert seen["life"] > 5
    assert seen["truncated" if env_kwargs else "end"] > 1


def filled(num_steps, num_rows=10):
    """A replay of two environments; the rewards are the number of the step, and minus that number."""
    replay = dqn.Replay(num_rows * 2, 2, (4, 2, 2), "cpu")
    no = np.zeros(2, dtype=bool)
    for t in range(num_steps):
        truncated = np.array([t == num_steps - 4, t == num_steps - 5])
        terminated = np.array([False, t in (num_steps - 5, num_steps - 3)])
        replay.add(np.full((2, 4, 2, 2), t, np.uint8), [0, 1], np.array([t, -t]), terminated, truncated, no)
        if t == num_steps - 3:
            replay.start_new_games()  # the first of the two had not terminated, the second had
    return replay


@pytest.mark.parametrize("num_steps", [8, 40])
def test_replay_draws_every_step_it_may_and_no_other(num_steps):
    """Not the newest, nor truncated ones, nor the three oldest of a full ring. Those both at once are terminated."""
    drawn = set(filled(num_steps).sample(5_000)[2].tolist())
    steps = range(0 if num_steps == 8 else num_steps - 7, num_steps - 1)
    expected = {float(t) for t in steps if t not in (num_steps - 4, num_steps - 3)} | {-float(t) for t in steps}
    assert drawn == expected


@pytest.mark.parametrize("num_steps", [8, 40])
def test_a_saved_replay_goes_on_as_the_one_that_was_saved(num_steps, tmp_path):
    replay = filled(num_steps)
    torch.save(replay.state_dict(), "replay.pt")
    state = torch.load("replay.pt", weights_only=True)
    assert len(state["screens"]) == min(num_steps, 10)
    restored = dqn.Replay(20, 2, (4, 2, 2), "cpu")
    restored.load_state_dict(state)
    kept = replay.state_dict()
    for new_life in (False, True, False):
        samples = []
        for each in (replay, restored):
            each.start_new_games()
            flags = np.array([new_life, False])
            each.add(np.full((2, 4, 2, 2), 99, np.uint8), [1, 0], np.array([7.0, 8.0]), flags, ~flags, ~flags)
            torch.manual_seed(0)
            samples.append(each.sample(100))
        assert all(torch.equal(a, b) for a, b in zip(*samples))
    assert all(torch.equal(torch.as_tensor(kept[name]), torch.as_tensor(value)) for name, value in state.items())
    with pytest.raises(ValueError, match="a replay of 10 rows, not 12"):
        dqn.Replay(24, 2, (4, 2, 2), "cpu").load_state_dict(state)


def test_a_replay_of_truncated_steps_ends_the_run(time_limit, monkeypatch):
    no_evaluation(monkeypatch, dqn)
    with pytest.raises(SystemExit, match="dqn_atari.py: error: .*truncated"):
        run("dqn_atari", "--env-kwargs", '{"max_num_frames_per_episode": 4}')


def test_replay_of_a_million_steps_takes_memory_only_as_it_fills():
    before = psutil.Process().memory_info().rss
    replay = dqn.Replay(1_000_000, 16, (4, 84, 84), "cpu")
    assert replay.screens.nbytes == 7_056_000_000
    assert psutil.Process().memory_info().rss - before < 200e6


def test_a_replay_that_does_not_fit_is_refused(capsys):
    line = refusal("dqn_atari", "--buffer-size", "1_000_000_000", capsys=capsys)
    assert "--buffer-size 1000000000" in line
    assert "7056.0 GB" in line
    assert not Path("runs").exists()


def test_the_memory_that_a_replay_needs(monkeypatch, capsys):
    """0.7 GB, twice if it is saved, and half a GB for the rest; where the replay is."""

    def fits(free, *flags, on_gpu=1e15, device="cpu"):
        monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=free))
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (on_gpu, 1e15))
        monkeypatch.setattr(dqn, "Replay", lambda *args: args)
        args = dqn.parse_args(["--buffer-size", "100_000", *flags])
        try:
            return dqn.make_replay(args, (4, 84, 84), torch.device(device))
        except SystemExit as stop:
            assert stop.code == 2

    assert fits(1.3e9) == (100_000, 16, (4, 84, 84), torch.device("cpu"))
    assert not fits(1.1e9)
    assert not fits(1.3e9, "--save-replay")
    assert fits(2e9, "--save-replay")
    assert fits(0, on_gpu=1.3e9, device="cuda")[3].type == "cuda"
    assert not fits(1e15, on_gpu=1.1e9, device="cuda")
    assert fits(1.3e9, "--no-replay-on-device", on_gpu=0, device="cuda")[3].type == "cpu"
    assert not fits(1.1e9, "--no-replay-on-device", device="cuda")


def test_a_resumed_run_without_its_replay_fills_a_new_one_first(monkeypatch, trained):
    no_evaluation(monkeypatch, dqn)
    flags = "--no-save-replay --learning-starts 100 --total-timesteps 256 --train-frequency 4".split()
    folder = run("dqn_atari", *flags)
    assert set(trained("dqn_atari").checkpoint) - set(load(folder)) == {"replay"}
    assert trained("dqn_atari").checkpoint["replay"]["screens"].shape == (200, 2, 84, 84)
    sizes = []
    sample = dqn.Replay.sample
    monkeypatch.setattr(dqn.Replay, "sample", lambda self, n: sizes.append(self.size) or sample(self, n))
    resume("dqn_atari", folder, "--total-timesteps", 512, "--learning-rate", 1e-3)
    assert sizes == [51 + 2 * i for i in range((256 - 100) // 4)]  # at steps 360, 364, ... without the one under way
    assert load(folder)["optimizer"]["param_groups"][0]["lr"] == 1e-3


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
    reward = torch.tensor([1.0, 2.0, 3.0])
    state = torch.zeros(3, dtype=torch.int64)
    rest = reward, state, torch.tensor([False, False, True]), 0.5
    torch.testing.assert_close(dqn.td_target(agent, target_network, *rest), torch.tensor([16.0, 1.5, 3.0]))
    torch.testing.assert_close(ddqn_atari.td_target(agent, target_network, *rest), torch.tensor([11.0, -0.5, 3.0]))


def share_of_left(module, double, runs=1_000, episodes=100):
    """Share of episodes that go left in Sutton and Barto's Example 6.7, where it costs 0.1 on average.

    In A, state 0, left leads to B without a reward, and right ends it; each of B's ten actions ends it with a random
    reward. Double learning keeps two tables and updates one of them, drawn anew each time.
    """
    tables = torch.zeros(2, runs, 2, 10)
    tables[:, :, 0, 2:] = -torch.inf
    yes = torch.ones(runs, dtype=torch.bool)
    next_state = torch.ones(runs, dtype=torch.int64)
    count = 0

    def play(state, reward, terminated_if, learns):
        values = tables.sum(0)[:, state] if double else tables[0, :, state]
        best = (values + 1e-6 * torch.rand(runs, 10)).argmax(-1)
        action = torch.where(torch.rand(runs) < 0.1, torch.randint((2, 10)[state], (runs,)), best)
        coin = torch.rand(runs) < 0.5
        for mine, other, turn in ((0, 1, coin), (1, 0, ~coin)) if double else ((0, 0, yes),):
            networks = Table(tables[mine]), Table(tables[other])
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


def test_maximization_bias_of_sutton_and_barto():
    assert share_of_left(dqn, double=False) > 0.6
    assert share_of_left(ddqn_atari, double=True) < 0.45


def test_the_loss_is_hubers_and_of_the_action_taken():
    values = torch.tensor([[[1.0, 9.0]], [[9.0, 2.0]], [[3.0, 9.0]]], requires_grad=True)
    target_values = torch.tensor([[[0.0, 1.0]]] * 3, requires_grad=True)
    state = torch.zeros(3, dtype=torch.int64)
    action = torch.tensor([0, 1, 0])
    reward = torch.tensor([1.0, 2.0, 6.5])
    terminated = torch.tensor([False, True, False])
    networks = Table(values), Table(target_values)
    loss, metrics = dqn.dqn_loss(*networks, state, action, reward, state, terminated, 0.5)  # targets 1.5, 2 and 7
    assert loss.item() == pytest.approx((0.5 * 0.5**2 + 0 + (4 - 0.5)) / 3)
    assert metrics["loss/td"].item() == loss.item()
    assert metrics["train/q_value"].item() == pytest.approx(2)
    loss.backward()
    torch.testing.assert_close(values.grad[:, 0], torch.tensor([[-0.5, 0.0], [0.0, 0.0], [-1.0, 0.0]]) / 3)
    assert target_values.grad is None


# --- acting and learning ---


def test_exploration():
    args = dqn.parse_args(["--env-id", "PongNoFrameskip-v4", "--eval-epsilon", "0.5"])
    agent = dqn.Agent(dqn.make_envs(args, 1), args)
    agent.forward = lambda obs: torch.arange(6.0).expand(len(obs), 6)
    obs = torch.zeros(4_000, 1)
    np.random.seed(0)
    assert (agent.act(obs, True) == 5).all()
    for actions, epsilon in ((agent.act(obs, False), 0.5), (agent.epsilon_greedy(obs, 1), 1)):
        counts = np.bincount(actions, minlength=6) / 4_000
        np.testing.assert_allclose(counts, [epsilon / 6] * 5 + [1 - epsilon + epsilon / 6], atol=0.03)


def test_gradient_steps_copies_and_epsilons_fall_on_the_right_steps(monkeypatch):
    """Those on which they would fall with one game, as far as three games at once allow."""
    no_evaluation(monkeypatch, dqn)
    events = []
    loss, copy_weights, act = dqn.dqn_loss, torch.nn.Module.load_state_dict, dqn.Agent.epsilon_greedy
    monkeypatch.setattr(dqn, "dqn_loss", lambda *args: events.append("learn") or loss(*args))
    monkeypatch.setattr(torch.nn.Module, "load_state_dict", lambda *x: events.append("copy") or copy_weights(*x))
    monkeypatch.setattr(dqn.Agent, "epsilon_greedy", lambda self, obs, e: events.append(e) or act(self, obs, e))
    flags = "--num-envs 3 --total-timesteps 600 --train-frequency 4 --learning-starts 60 --target-network-frequency 100"
    folder = run("dqn_atari", *flags.split(), *"--start-e 0.9 --end-e 0.1 --exploration-fraction 0.5".split())
    expected = []
    for last in range(0, 600, 3):
        step = last + 3
        expected.append(pytest.approx(0.9 - 0.8 * min(last / 300, 1)))
        expected += ["learn"] * sum(last < i <= step for i in range(4, 601, 4) if last >= 60)
        expected += ["copy"] * sum(last < i <= step for i in range(100, 601, 100))
    assert expected.count("learn") == (600 - 60) // 4
    assert events[events.index(expected[0]) :] == expected
    epsilons = scalars(folder, "train/epsilon")
    assert [event.step for event in epsilons] == [102, 204, 306, 402, 504, 600]  # at the checkpoint of step 400, too
    np.testing.assert_allclose([event.value for event in epsilons], [0.636, 0.364] + [0.1] * 4, atol=1e-6)


@pytest.mark.parametrize("fraction", [0, 0.25, 1])
def test_the_learning_rate_of_each_gradient_step(monkeypatch, fraction):
    no_evaluation(monkeypatch, dqn)
    rates = []
    step = torch.optim.Adam.step
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self: rates.append(self.param_groups[0]["lr"]) or step(self))
    flags = "--num-envs 4 --total-timesteps 400 --train-frequency 4 --learning-starts 40 --learning-rate 0.002"
    folder = run("dqn_atari", *flags.split(), f"--anneal-last={fraction}")
    left = 1 - np.arange(40, 400, 4) / 400  # of the run, before each gradient step; never 0
    expected = 0.002 * np.minimum(left / fraction, 1) if fraction else [0.002] * 90
    np.testing.assert_allclose(rates, expected)
    assert scalars(folder, "train/learning_rate")[-1].value == pytest.approx(expected[-1])


def test_what_is_stored_is_what_happened_and_what_is_drawn_is_learned_from(monkeypatch):
    """train() beside the games it plays, the replay it fills and the two networks it has."""
    no_evaluation(monkeypatch, dqn)
    happened, stored, drawn, learned, networks = [], [], [], [], []
    make_envs, loss, backward = dqn.make_envs, dqn.dqn_loss, torch.Tensor.backward

    class Spy(VectorWrapper):
        def reset(self, **kwargs):
            happened.append(["new games"])
            self.obs, infos = self.env.reset(**kwargs)
            return self.obs, infos

        def send(self, action):
            self.action = action
            self.env.send(action)

        def recv(self):
            result = self.env.recv()
            happened.append(
                [x.copy() for x in (self.obs, self.action, *result[1:4], result[4]["final_info"]["_episode"])]
            )
            self.obs = result[0]
            return result

    class SpyReplay(dqn.Replay):
        def add(self, *step):
            stored.append([np.array(x) for x in step])
            super().add(*step)

        def start_new_games(self):
            stored.append(["new games"])
            super().start_new_games()

        def sample(self, batch_size):
            assert batch_size == 4
            drawn.append(super().sample(batch_size))
            return drawn[-1]

    def spy_loss(agent, target_network, *minibatch):
        learned.append(minibatch)
        networks.append((agent, target_network))
        return loss(agent, target_network, *minibatch)

    def spy_backward(tensor):
        assert all(p.grad is None for p in networks[-1][0].parameters())  # each update has a gradient of its own
        backward(tensor)

    monkeypatch.setattr(dqn, "make_envs", lambda *args, **kwargs: Spy(make_envs(*args, **kwargs)))
    monkeypatch.setattr(dqn, "Replay", SpyReplay)
    monkeypatch.setattr(dqn, "dqn_loss", spy_loss)
    monkeypatch.setattr(torch.Tensor, "backward", spy_backward)
    folder = run("dqn_atari", "--total-timesteps", 420, "--train-frequency", 8, "--gamma", 0.9)
    assert len(happened) == len(stored) == 210 + 2  # checkpoints at the start and at step 400
    for expected, actual in zip(happened, stored):
        assert len(expected) == len(actual)
        assert all(np.array_equal(a, b) for a, b in zip(expected, actual))
    assert len(drawn) == len(learned) == (420 - 32) // 8
    for expected, (*actual, gamma) in zip(drawn, learned):
        assert all(torch.equal(a, b) for a, b in zip(expected, actual))
        assert gamma == 0.9
    agents, targets = ({id(pair[i]) for pair in networks} for i in (0, 1))
    assert len(agents) == len(targets) == 1
    assert agents != targets
    for name, network in zip(("agent", "target_network"), networks[0]):
        assert all(torch.equal(load(folder)[name][k], v) for k, v in network.state_dict().items())


def test_the_target_network_is_the_agent_of_the_last_copy(monkeypatch):
    no_evaluation(monkeypatch, dqn)
    states = []
    log = dqn.Run.log

    def spy_log(run, metrics):
        states.append((run.step, copy.deepcopy(run.parts["agent"].state_dict())))
        log(run, metrics)

    monkeypatch.setattr(dqn.Run, "log", spy_log)
    flags = "--total-timesteps 150 --target-network-frequency 100 --log-interval 2 --train-frequency 4".split()
    checkpoint = load(run("dqn_atari", *flags))
    agent, target = checkpoint["agent"], checkpoint["target_network"]
    at_the_copy = dict(states)[100]
    assert all(torch.equal(at_the_copy[name], target[name]) for name in agent)
    assert not all(torch.equal(agent[name], target[name]) for name in agent)
    assert not all(torch.equal(states[0][1][name], target[name]) for name in agent)


def test_compiled_networks_give_the_weights_of_the_plain_ones(monkeypatch):
    """With a quick backend in place of the real one, which takes a minute; `graphs` are what it gets to compile."""
    no_evaluation(monkeypatch, dqn)
    compiler = torch.compile
    graphs = []

    def backend(graph, inputs):
        graphs.append(str(graph.graph))
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda function, **options: compiler(function, backend=backend))
    loss = dqn.dqn_loss
    compiled = []  # for each minibatch, whether the agent and the target network are compiled

    def spy(agent, target_network, *rest):
        compiled.append((agent._compiled_call_impl is not None, target_network._compiled_call_impl is not None))
        return loss(agent, target_network, *rest)

    monkeypatch.setattr(dqn, "dqn_loss", spy)
    flags = "--total-timesteps 128 --train-frequency 8 --target-network-frequency 64 --no-bfloat16".split()
    plain, fast = (load(run("dqn_atari", *flags, flag)) for flag in ("--no-compile", "--compile"))
    for network in ("agent", "target_network"):
        assert list(fast[network]) == list(plain[network])
        for name, weight in plain[network].items():
            torch.testing.assert_close(fast[network][name], weight)
    assert any("conv2d" in graph for graph in graphs)
    half = len(compiled) // 2
    assert compiled == half * [(False, False)] + half * [(True, True)]


@both
def test_the_network_at_the_start(module):
    """Orthogonal weights, with which the screens' differences reach the values: sqrt(2) inside, 0.01 for the output."""
    args = module.parse_args(["--env-id", "PongNoFrameskip-v4"])
    agent = module.Agent(module.make_envs(args, 1), args)
    layers = [layer for layer in agent.modules() if hasattr(layer, "weight")]
    for layer, gain in zip(layers, [*4 * [2**0.5], 0.01], strict=True):
        singular_values = torch.linalg.svdvals(layer.weight.flatten(1))
        torch.testing.assert_close(singular_values, torch.full_like(singular_values, gain), atol=1e-4, rtol=1e-4)
        assert (layer.bias == 0).all()


@pytest.mark.skipif("not torch.cpu.get_capabilities().get('avx512_bf16')", reason="no bfloat16 in hardware")
def test_bfloat16_gives_the_gradient_of_float32():
    args = dqn.parse_args([])
    envs = dqn.make_envs(args, 32)
    obs, _ = envs.reset(seed=1)
    envs.action_space.seed(1)
    for _ in range(20):
        obs, *_ = envs.step(envs.action_space.sample())
    agent = dqn.Agent(envs, args)
    minibatch = torch.as_tensor(obs), torch.arange(32) % 4, torch.randn(32), torch.as_tensor(obs)
    gradients = []
    for agent.bfloat16 in (False, True):
        loss, _ = dqn.dqn_loss(agent, agent, *minibatch, torch.ones(32, dtype=torch.bool), 0.99)
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(agent.parameters()))]))
    assert torch.cosine_similarity(*gradients, dim=0) > 0.99


# --- bad input ---

BAD_INPUT = {
    "--env-id CartPole-v1": "Atari game",
    "--eval-epsilon 1.5": "at most 1",
    "--start-e 2": "at most 1",
    "--exploration-fraction 2": "at most 1",
    "--learning-starts 100 --num-envs 16": "--learning-starts 100: at least 8 * --num-envs",
    "--buffer-size 80_015": "--buffer-size 80015: must be at least --learning-starts + --num-envs",
    "--total-timesteps 80_000": "--learning-starts 80000: at least 8 * --num-envs, less than --total-timesteps",
}


@both
@pytest.mark.parametrize("flags", BAD_INPUT)
def test_bad_input_is_refused_in_one_line(module, flags, capsys):
    assert BAD_INPUT[flags] in refusal(module.__name__, *flags.split(), capsys=capsys)
