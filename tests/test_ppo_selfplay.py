"""PPO by self-play: the rules against PettingZoo's, seats and rewards, the pool of opponents, Elo, and learning."""

import ast
import csv
import difflib
import importlib

import numpy as np
import pytest
import torch

import ppo_selfplay as selfplay
from runs import ROOT, load, resume, run, scalars

CONNECT_FOUR = ["--env-id", "connect_four_v3"]
TICTACTOE = ["--env-id", "tictactoe_v3"]


def board_of(env_id="connect_four_v3", **changes):
    return selfplay.Board(**selfplay.GAMES[env_id] | changes)


def position(board, moves):
    """The position (1, 2, C) after `moves`, for the player whose turn it is."""
    stones = np.zeros((1, 2, board.size), np.float32)
    for action in moves:
        stones, _ = board.move(stones, np.array([action]))
    return stones


class Scripted:
    """A player that makes the moves of a list, in all games the same."""

    def __init__(self, *moves):
        self.moves = list(moves)

    def choose(self, stones, luck, rngs):
        return np.full(len(stones), self.moves.pop(0))


def games_with(board, opponent, num_envs=1, learner_begins=True, evaluation=False):
    """Games that have begun with the learner in the same seat everywhere."""
    envs = selfplay.TwoPlayerGames(board, num_envs, selfplay.Minimax(board, 0), evaluation)
    envs.reset(seed=0)
    envs.stones[:] = 0
    envs.opponent = opponent
    if not learner_begins:
        envs.answer(np.arange(num_envs))
    return envs


# --- rules ---


@pytest.mark.parametrize(("env_id", "num_games"), [("connect_four_v3", 2000), ("tictactoe_v3", 3000)])
def test_rules_are_pettingzoos(env_id, num_games):
    """In random games both have the same stones, the same legal moves, the same rewards, and the same end."""
    pytest.importorskip("pettingzoo", reason="PettingZoo is not installed")
    env = importlib.import_module(f"pettingzoo.classic.{env_id}").env()
    board, rng = board_of(env_id), np.random.default_rng(0)
    results = set()
    for _ in range(num_games):
        env.reset()
        stones, won = np.zeros((1, 2, board.size), np.float32), np.array([False])
        while True:
            observation, _, terminated, _, _ = env.last()
            if terminated:
                break
            np.testing.assert_array_equal(observation["observation"].reshape(-1, 2).T, stones[0])
            legal = board.legal(stones)[0]
            np.testing.assert_array_equal(observation["action_mask"], legal)
            assert not won[0]
            assert legal.any()
            action = rng.choice(np.flatnonzero(legal))
            mover = env.agent_selection
            env.step(action)
            stones, won = board.move(stones, np.array([action]))
        assert env.rewards[mover] == won[0]
        assert sum(env.rewards.values()) == 0
        assert won[0] or not board.legal(stones).any()
        results.add(bool(won[0]))
    assert results == {True, False}  # draws, too


def test_other_boards():
    board = board_of("tictactoe_v3", rows=4, columns=5, length=4)
    assert board.lines.shape == (20, 4 * 2 + 5 + 2 * 2)
    assert (board.lines.sum(0) == 4).all()
    stones = position(board, [0, 1, 6, 2, 12, 3])
    assert board.move(stones, np.array([18]))[1][0]  # a diagonal
    assert not board.move(stones, np.array([4]))[1][0]
    with pytest.raises(SystemExit):
        board_of("tictactoe_v3", length=4)


def plain_minimax(board, stones, depth):
    """The value of each action, one position at a time; None for illegal ones."""
    values = []
    for action in range(board.num_actions):
        if not board.legal(stones)[0, action]:
            values.append(None)
            continue
        after, won = board.move(stones, np.array([action]))
        if won[0]:
            values.append(1)
        elif depth == 1 or not board.legal(after).any():
            values.append(0)
        else:
            values.append(-max(value for value in plain_minimax(board, after, depth - 1) if value is not None))
    return values


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_minimax_is_the_plain_recursion(depth):
    board, rng = board_of("connect_four_v3", rows=4, columns=4, length=3), np.random.default_rng(depth)
    positions = []
    while len(positions) < 40:
        stones, won = np.zeros((1, 2, board.size), np.float32), np.array([False])
        for _ in range(rng.integers(3, 14)):
            if not won[0] and board.legal(stones).any():
                stones, won = board.move(stones, np.array([rng.choice(np.flatnonzero(board.legal(stones)[0]))]))
        if not won[0] and board.legal(stones).any():
            positions.append(stones)
    values = selfplay.minimax(board, np.concatenate(positions), depth)
    expected = [plain_minimax(board, stones, depth) for stones in positions]
    np.testing.assert_array_equal(values, [[-np.inf if v is None else v for v in row] for row in expected])
    assert {-1, 0, 1} <= set(values.ravel()) or depth == 1


def test_minimax_players_win_block_and_break_ties_at_random():
    board, rngs = board_of(), [np.random.default_rng(i) for i in range(200)]
    wins = np.repeat(position(board, [3, 0, 3, 0, 3, 0]), 200, axis=0)  # column 3 wins now
    blocks = np.repeat(position(board, [3, 0, 3, 0, 3]), 200, axis=0)  # column 3 must be blocked
    assert (selfplay.Minimax(board, 1).choose(wins, None, rngs) == 3).all()
    assert (selfplay.Minimax(board, 2).choose(blocks, None, rngs) == 3).all()
    assert len(set(selfplay.Minimax(board, 1).choose(blocks, None, rngs))) == 7
    assert len(set(selfplay.Minimax(board, 0).choose(wins, None, rngs))) == 7
    full = np.repeat(position(board, [0, 0, 0, 0, 0, 0]), 200, axis=0)
    assert set(selfplay.Minimax(board, 0).choose(full, None, rngs)) == {1, 2, 3, 4, 5, 6}


# --- seats and rewards ---


@pytest.mark.parametrize("evaluation", [False, True])
def test_rewards_of_a_win_and_a_loss(evaluation):
    board = board_of()
    envs = games_with(board, Scripted(0, 0, 0), evaluation=evaluation)
    rewards = [envs.step(np.array([3]))[1:3] for _ in range(4)]
    assert [(reward[0], ended[0]) for reward, ended in rewards] == [(0, False)] * 3 + [(1, True)]
    envs = games_with(board, Scripted(3, 3, 3, 3), learner_begins=False, evaluation=evaluation)
    rewards = [envs.step(np.array([0]))[1:3] for _ in range(3)]
    # Lost by the opponent's last move: the learner's own last move has the reward.
    assert [(reward[0], ended[0]) for reward, ended in rewards] == [(0, False)] * 2 + [(0 if evaluation else -1, True)]


@pytest.mark.parametrize("learner_begins", [False, True])
def test_the_reward_of_a_draw(learner_begins):
    board = board_of("tictactoe_v3")
    moves = [0, 1, 2, 4, 3, 5, 7, 6, 8]  # nobody has a line, and the board is full
    learner, opponent = (moves[::2], moves[1::2]) if learner_begins else (moves[1::2], moves[::2])
    for evaluation, expected in ((False, 0), (True, 0.5)):
        envs = games_with(board, Scripted(*opponent), learner_begins=learner_begins, evaluation=evaluation)
        envs.begin = lambda games: None  # the next game would need more moves
        rewards = [envs.step(np.array([action]))[1:3] for action in learner]
        assert [reward[0] for reward, _ in rewards] == [0] * (len(learner) - 1) + [expected]
        assert [ended[0] for _, ended in rewards] == [False] * (len(learner) - 1) + [True]


def test_observations_are_legal_moves_and_both_players_stones():
    board = board_of()
    envs = games_with(board, Scripted(0, 0, 0, 0, 0))
    for _ in range(3):
        obs, _, _, _, _ = envs.step(np.array([0]))
    mask, mine, theirs = np.split(obs[0], [7, 49])
    np.testing.assert_array_equal(mask, [0, 1, 1, 1, 1, 1, 1])  # column 0 is full
    np.testing.assert_array_equal(mine.reshape(6, 7)[:, 0], [0, 1, 0, 1, 0, 1])
    np.testing.assert_array_equal(theirs.reshape(6, 7)[:, 0], [1, 0, 1, 0, 1, 0])


def test_both_seats_are_as_likely_and_the_opponent_begins_in_the_second():
    envs = selfplay.make_envs(selfplay.parse_args(CONNECT_FOUR), 1000)
    envs.reset(seed=1)
    assert (envs.stones[:, 0] == 0).all()
    assert 440 < envs.stones[:, 1].sum() < 560
    assert envs.stones[:, 1].sum(1).max() == 1


def test_every_game_has_random_numbers_of_its_own():
    """Game i of an evaluation does not depend on how many games there are."""
    args = selfplay.parse_args(CONNECT_FOUR)
    played = []
    for seeds in ([5, 6, 7], [6]):
        envs = selfplay.make_envs(args, len(seeds), evaluation=True)
        envs.reset(seed=seeds)
        for action in (3, 2, 4, 1):
            envs.step(np.full(len(seeds), action))
        played.append(envs.stones)
    np.testing.assert_array_equal(played[0][1], played[1][0])
    assert (played[0][0] != played[0][1]).any()


def test_an_ended_game_starts_anew_at_once_in_training_and_one_step_later_in_evaluation():
    board = board_of()
    for evaluation in (False, True):
        envs = games_with(board, Scripted(0, 0, 0, *[5] * 9), evaluation=evaluation)
        for _ in range(4):
            _, _, ended, _, infos = envs.step(np.array([3]))
        assert ended[0]
        assert envs.stones[0, 0].sum() == (4 if evaluation else 0)
        if evaluation:
            _, reward, ended, _, _ = envs.step(np.array([3]))
            assert (reward[0], ended[0], envs.stones[0, 0].sum()) == (0, False, 0)
        else:
            assert infos["final_info"]["episode"] == {"r": 1, "l": 4}


def test_illegal_moves_are_refused_by_the_environment():
    board = board_of()
    envs = games_with(board, Scripted(0, 0, 0))
    for _ in range(3):
        envs.step(np.array([0]))
    with pytest.raises(AssertionError, match="illegal"):
        envs.step(np.array([0]))


# --- the mask ---


def make_agent(*flags):
    args = selfplay.parse_args(list(flags))
    selfplay.seed_everything(1)
    envs = selfplay.make_envs(args, 2)
    return selfplay.Agent(envs, args), args


@pytest.mark.parametrize("env_id", ["connect_four_v3", "tictactoe_v3"])
def test_the_mask_is_never_violated(env_id):
    """In 100,000 moves; the environment refuses an illegal one."""
    agent, args = make_agent("--env-id", env_id)
    with torch.no_grad():
        agent.actor.weight.mul_(300)  # so that it is sure of its moves, legal or not
    envs = selfplay.make_envs(args, 1000)
    obs, _ = envs.reset(seed=1)
    for step in range(50):
        obs, _, _, _, _ = envs.step(agent.act(torch.as_tensor(obs), deterministic=step % 2 == 0))


def test_probabilities_are_those_of_the_legal_moves_alone():
    agent, _ = make_agent(*CONNECT_FOUR)
    obs = torch.as_tensor(agent.board.observe(position(agent.board, [0, 0, 0, 0, 0, 0, 3])))
    policy = agent.policy(obs)
    logits = agent.actor(agent.network(obs[:, 7:].view(1, 2, 6, 7)))[0]
    expected = torch.distributions.Categorical(logits=logits[1:])
    assert policy.logprobs[0].exp()[0] == 0
    torch.testing.assert_close(policy.logprobs[0, 1:], expected.logits)
    torch.testing.assert_close(policy.entropy()[0], expected.entropy())
    policy.entropy().sum().backward()
    assert agent.actor.bias.grad[0] == 0
    assert agent.actor.bias.grad[1:].abs().min() > 0


# --- the pool ---


def test_opponents_are_drawn_from_the_pool(monkeypatch):
    agent, args = make_agent(*CONNECT_FOUR, "--pool-size", "4", "--latest-ratio", "0.5", "--snapshot-interval", "10")
    pool = selfplay.Pool(agent, args)
    for step in (0, 5, 10, 19, 20, 30, 47, 55):
        with torch.no_grad():
            agent.critic.bias.fill_(step)
        pool.add_snapshot(agent, step)
    assert list(pool.snapshots) == [10, 20, 30, 47]
    assert [snapshot.critic.bias.item() for snapshot in pool.snapshots.values()] == [10, 20, 30, 47]

    asked = []
    choose = selfplay.Agent.choose
    monkeypatch.setattr(
        selfplay.Agent,
        "choose",
        lambda self, stones, *rest, **more: (
            asked.append((self.critic.bias.item(), len(stones))) or choose(self, stones, *rest, **more)
        ),
    )
    luck = np.random.default_rng(0).random((1000, 2))
    action = pool.choose(np.repeat(position(agent.board, [3]), 1000, axis=0), luck, None)
    assert set(action) == set(range(7))  # they sample their actions
    counts = dict(asked)
    assert len(asked) == len(counts) == 4  # one batch for each snapshot
    assert sum(counts.values()) == 1000
    assert 580 < counts[47] < 670  # a half, and a quarter of the other half
    assert all(90 < counts[step] < 165 for step in (10, 20, 30))


def test_without_a_pool_the_newest_self_plays():
    agent, args = make_agent(*CONNECT_FOUR, "--latest-ratio", "1", "--snapshot-interval", "1")
    pool = selfplay.Pool(agent, args)
    for step in range(3):
        pool.add_snapshot(agent, step)
    pool.snapshots[0].choose = pool.snapshots[1].choose = None  # an error if they are asked
    pool.choose(np.repeat(position(agent.board, [3]), 100, axis=0), np.random.default_rng(0).random((100, 2)), None)


def test_the_pool_comes_back_from_a_checkpoint(trained):
    checkpoint = trained("ppo_selfplay").checkpoint
    assert len(checkpoint["pool"]["snapshots"]) > 2
    agent, args = make_agent(*CONNECT_FOUR)
    pool = selfplay.Pool(agent, args)
    pool.load_state_dict(checkpoint["pool"])
    again = pool.state_dict()
    assert again["ratings"] == checkpoint["pool"]["ratings"]
    assert list(again["snapshots"]) == list(checkpoint["pool"]["snapshots"])
    for step, weights in again["snapshots"].items():
        assert all(torch.equal(weights[name], checkpoint["pool"]["snapshots"][step][name]) for name in weights)
    weights = [snapshot["actor.weight"] for snapshot in again["snapshots"].values()]
    assert not torch.equal(weights[0], weights[-1])


def test_the_learner_meets_the_pool(monkeypatch):
    """In training it is the pool that answers, and never the random player; in evaluations never the pool."""
    callers = []
    choose = selfplay.Pool.choose
    monkeypatch.setattr(
        selfplay.Pool, "choose", lambda self, *rest: callers.append(len(self.snapshots)) or choose(self, *rest)
    )
    monkeypatch.setattr(selfplay, "rate", lambda *args: None)
    monkeypatch.setattr(selfplay, "evaluate", lambda *args, **kwargs: np.zeros(1))
    monkeypatch.setattr(selfplay.Minimax, "choose", None)
    run("ppo_selfplay")
    assert callers == sorted(callers)
    assert callers[-1] > 2


# --- Elo ---


@pytest.mark.parametrize(("points", "games"), [(0, 10), (3, 10), (5, 10), (9.5, 10), (1000, 1000)])
def test_elo_of_two_players_in_closed_form(points, games):
    ratings = selfplay.elo(np.array([[0, points], [games - points, 0]], dtype=float))
    assert ratings[0] - ratings[1] == pytest.approx(400 * np.log10((points + 0.5) / (games - points + 0.5)), abs=0.01)


def test_elo_finds_the_strengths_of_a_simulated_league():
    """Eight players, 0 to 1400, with 2,000 games between each two of them."""
    strength, rng = np.arange(0, 1600, 200.0), np.random.default_rng(0)
    points = np.zeros((8, 8))
    for i in range(8):
        for j in range(i):
            chance = 1 / (1 + 10 ** ((strength[j] - strength[i]) / 400))  # [Elo]
            points[i, j] = rng.binomial(2000, chance)
            points[j, i] = 2000 - points[i, j]
    ratings = selfplay.elo(points)
    np.testing.assert_allclose(ratings - ratings[0], strength, atol=35)
    # At the maximum of the likelihood every player's points are those expected, the virtual draws included.
    expected = 1 / (1 + 10 ** ((ratings - ratings[:, None]) / 400))
    np.testing.assert_allclose((expected * 2001).sum(1) - 2001 / 2, (points + 0.5).sum(1) - 0.5, atol=0.5)


def test_a_match_is_fair_and_repeats():
    board = board_of()
    random, strong = selfplay.Minimax(board, 0), selfplay.Minimax(board, 3)
    assert 35 < selfplay.play_match(board, random, random, 100) < 65
    points = selfplay.play_match(board, strong, random, 50)
    assert points > 45
    assert selfplay.play_match(board, strong, random, 50) == points
    assert selfplay.play_match(board, random, strong, 50) < 10


def test_the_rating_is_logged_and_written(trained):
    ours = trained("ppo_selfplay")
    rows = list(csv.DictReader((ours.folder / "elo.csv").open()))
    assert list(rows[0]) == ["step", *selfplay.OPPONENTS, "agent"]
    assert [int(row["step"]) for row in rows] == [checkpoint["step"] for checkpoint in ours.checkpoints]
    events = scalars(ours.folder, "eval/elo")
    assert [event.value for event in events] == pytest.approx([float(row["agent"]) for row in rows], abs=0.06)
    for row in rows:
        assert float(row["random"]) == 0
        assert float(row["minimax-1"]) < float(row["minimax-4"])
    assert (ours.folder / "elo.png").read_bytes().startswith(b"\x89PNG")


def test_a_resumed_run_has_the_same_ratings(trained):
    folder = trained("ppo_selfplay").copy(stopped=True)
    resume("ppo_selfplay", folder)
    assert (folder / "elo.csv").read_text() == (trained("ppo_selfplay").folder / "elo.csv").read_text()


# --- training ---


def test_train_is_ppos_but_for_the_marked_lines():
    texts = []
    for name in ("ppo", "ppo_selfplay"):
        text = (ROOT / f"{name}.py").read_text(encoding="utf-8")
        (node,) = (node for node in ast.parse(text).body if getattr(node, "name", "") == "train")
        texts.append(text.splitlines()[node.lineno - 1 : node.end_lineno])
    changes = [line for line in difflib.ndiff(*texts) if line[0] in "+-"]
    added = [line for line in changes if line[0] == "+"]
    assert all("# self-play" in line for line in added), added
    assert len(added) <= 15
    assert len(changes) - len(added) <= 2


class Perfect:
    """Plays tic-tac-toe without a mistake, and chooses among the best moves at random."""

    def __init__(self, board):
        self.board = board
        self.known = {}  # position: the value of each action

    def values(self, stones):
        """The value of each action in `stones` (1, 2, 9): 1, 0 or -1, and -9 if it is illegal."""
        key = stones.tobytes()
        if key not in self.known:
            values = np.full(9, -9)
            for action in np.flatnonzero(self.board.legal(stones)[0]):
                after, won = self.board.move(stones, np.array([action]))
                is_full = not self.board.legal(after).any()
                values[action] = 1 if won[0] else 0 if is_full else -self.values(after).max()
            self.known[key] = values
        return self.known[key]

    def choose(self, stones, luck, rngs):
        values = np.stack([self.values(np.ascontiguousarray(one[None])) for one in stones])
        return (values + 0.5 * np.stack([rng.random(9) for rng in rngs])).argmax(-1)


def test_it_does_not_lose_at_tictactoe():
    """After a short training, in both seats, against perfect play that chooses among its best moves at random."""
    flags = """--total-timesteps 300_000 --num-envs 128 --num-steps 16 --num-minibatches 4 --update-epochs 3
        --learning-rate 4e-3 --gamma 0.99 --gae-lambda 0.9 --snapshot-interval 10_000 --num-checkpoints 1
        --rated-games 1"""
    folder = run("ppo_selfplay", *TICTACTOE, *flags.split())
    args = selfplay.Args(**load(folder)["config"])
    envs = selfplay.make_envs(args, 200, evaluation=True)
    agent = selfplay.Agent(envs, args)
    agent.load_state_dict(load(folder)["agent"])
    envs = selfplay.TwoPlayerGames(agent.board, 200, Perfect(agent.board), evaluation=True)
    obs, _ = envs.reset(seed=0)
    points, running = np.zeros(200), np.ones(200, dtype=bool)
    while running.any():
        obs, reward, ended, _, _ = envs.step(agent.act(torch.as_tensor(obs), deterministic=True))
        points += reward * running
        running &= ~ended
    assert (points == 0.5).all()


def test_play_in_the_terminal(trained, monkeypatch, capsys):
    answers = iter(["hello", "9", "", *"0123456" * 20])
    asked = []
    monkeypatch.setattr("builtins.input", lambda text: asked.append(text) or next(answers))
    selfplay.train(selfplay.parse_args(["--play", str(trained("ppo_selfplay").folder)]))
    out = capsys.readouterr().out
    assert out.count("one of 0, 1, 2, 3, 4, 5, 6") == 3
    assert "the agent expects" in out
    assert out.splitlines()[-1] in ("you win", "a draw", "the agent wins")
    assert len(asked) >= 6


def test_evaluations_are_against_the_chosen_opponent(trained):
    checkpoint = load(trained("ppo_selfplay").folder)
    scores = {}
    for opponent in selfplay.OPPONENTS:
        args = selfplay.Args(**checkpoint["config"] | {"eval_opponent": opponent})
        agent = selfplay.Agent(selfplay.make_envs(args, 1), args)
        agent.load_state_dict(checkpoint["agent"])
        returns = selfplay.evaluate(agent, args, 50)
        assert set(returns) <= {0, 0.5, 1}
        scores[opponent] = returns.mean()
    assert scores["random"] > scores["minimax-1"] > scores["minimax-4"]
