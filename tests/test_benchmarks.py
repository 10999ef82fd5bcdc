"""Tests of benchmarks/: the runs of the scores, the pictures, and that the pages have the numbers of the CSV files."""

import importlib
import json
import re
import shlex
import sys
from pathlib import Path
from subprocess import CalledProcessError
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.spaces import Discrete

from runs import ROOT, results

sys.path.insert(0, str(ROOT / "benchmarks"))
import overestimation  # noqa: E402
import plot  # noqa: E402
import push_to_hub  # noqa: E402
import scores  # noqa: E402
import tables  # noqa: E402

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FLAGS = "--env-id gymnasium:FrozenLake-v1 --total-timesteps 32_000 --num-checkpoints 4 --eval-episodes 50"
TASK = ("q_learning", FLAGS, "1")
KILLED_AT_16000 = """
import os, sys
import q_learning

class Run(q_learning.Run):
    def save_checkpoint(self, final=False):
        return super().save_checkpoint(final) if self.step < 16000 else os._exit(9)

q_learning.Run = Run
q_learning.train(q_learning.parse_args(sys.argv[1:]))
"""


def train(script: str, *flags) -> Path:
    """Train a script in this process; returns the run folder."""
    module = importlib.import_module(script)
    return module.train(module.parse_args([*flags]))


def test_killed_run_goes_on_and_ends_with_the_same_score(tmp_path, monkeypatch, capfd):
    """The environment is from a package: --resume imports it only if --env-id is given again."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(scores, "ROOT", tmp_path)
    whole = scores.collect(*TASK, train("q_learning", *FLAGS.split()), 0)
    Path("killed.py").write_text(KILLED_AT_16000)
    (scores.run_folder(*TASK) / "runs" / "stopped-at-once").mkdir(parents=True)
    with pytest.raises(CalledProcessError):
        scores.train(*TASK, [str(tmp_path / "killed.py")])
    monkeypatch.setattr(scores, "wall_time", lambda run: 1000)
    run, seconds = scores.train(*TASK, [str(ROOT / "q_learning.py")])
    killed = scores.collect(*TASK, run, seconds)
    assert killed[1] == whole[1]
    assert [row["step"] for row in killed[1]] == [0, 8000, 16000, 24000, 32000]
    assert (whole[0]["note"], killed[0]["note"]) == ("", "in 2 sittings")
    assert killed[0] | {"seconds": 0, "note": ""} == whole[0]
    assert "overrides" not in capfd.readouterr().err
    assert 1001 < seconds < 1100
    assert scores.train(*TASK, ["not started again"]) == (run, 1000)


class Pipes(gym.Env):
    """Reward 1 a step until an episode ends by chance; infos["score"] counts the steps."""

    observation_space = Discrete(1)
    action_space = Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.score = 0
        return 0, {"score": 0}

    def step(self, action):
        self.score += 1
        return 0, 1.0, bool(self.np_random.random() < 0.1), False, {"score": self.score}


def test_pipes_are_those_of_the_scored_episodes():
    gym.register("Pipes-v0", Pipes)
    run = train("q_learning", "--env-id", "Pipes-v0", "--total-timesteps", "500", "--eval-episodes", "20")
    returns, pipes = scores.evaluate("q_learning", run)
    assert len(set(returns)) > 5
    assert returns.tolist() == pipes.tolist()
    assert returns.mean() == pytest.approx(results(run)["mean_reward"])


def test_taxi_is_scored_on_the_seeds_of_the_course():
    run = train("q_learning", "--env-id", "Taxi-v4", "--total-timesteps", "500", "--eval-episodes", "1")
    row, curve = scores.collect("q_learning", "", "1", run, 0)
    assert row["episodes"] == len(push_to_hub.TAXI_SEEDS)
    assert row["std"] > 0
    assert row["note"] == "on the 100 seeds of the Deep RL Course"


def test_wall_time_leaves_out_the_time_between_stop_and_start(tmp_path, monkeypatch):
    for name, times in (("events.1", (10, 15, 13)), ("events.2", (100, 101))):
        (tmp_path / name).write_text(json.dumps(times))
    loader = SimpleNamespace(Load=None)

    def load(path):
        loader.Load = lambda: [SimpleNamespace(wall_time=time) for time in json.loads(Path(path).read_text())]
        return loader

    monkeypatch.setattr(scores, "EventFileLoader", load)
    assert scores.wall_time(tmp_path) == 6


def test_redo_deletes_and_trains_the_rows_that_were_named(tmp_path, monkeypatch):
    """If it is stopped, the same call without redo trains the rest."""
    task, other = ("q_learning", "--total-timesteps 200 --eval-episodes 10", [1, 2]), ("ppo", "--env-id Other-v0", [1])
    monkeypatch.setattr(scores, "ROOT", tmp_path)
    monkeypatch.setattr(scores, "TABLE", [task, other])
    for name in ("SCORES", "CURVES"):
        monkeypatch.setattr(scores, name, tmp_path / f"{name}.csv")
        rows = [{"script": script, "flags": flags, "seed": "1", "mean": "7"} for script, flags, _ in (task, other)]
        (tmp_path / f"{name}.csv").write_text("script,flags,seed,mean\n")
        for row in rows:
            scores.replace(tmp_path / f"{name}.csv", scores.key(row), [row])
    trained = []

    def train(script, flags, seed, program):
        trained.append((script, flags, seed))
        if len(trained) == 2:
            raise KeyboardInterrupt
        return Path(), 0

    monkeypatch.setattr(scores, "train", train)
    row = {"script": task[0], "flags": task[1], "mean": 0.5}
    monkeypatch.setattr(
        scores, "collect", lambda script, flags, seed, *run: (row | {"seed": seed}, [row | {"seed": seed}])
    )
    with pytest.raises(KeyboardInterrupt):
        scores.main(only="q_learning", redo=True)
    assert [(row["script"], row["mean"]) for row in scores.read(scores.SCORES)] == [("q_learning", "0.5"), ("ppo", "7")]
    scores.main(only="q_learning")
    assert [seed for *_, seed in trained] == ["1", "2", "2"]
    assert [row["mean"] for row in scores.read(scores.SCORES)] == ["0.5", "0.5", "7"]


def test_words_select_rows_by_the_beginnings_of_words():
    flags = "--env-id flappy_bird_gymnasium:FlappyBird-v0 --num-envs 2"
    assert all(
        scores.selected(only, "dqn_atari", flags) for only in ("", "dqn_atari", "FlappyBird dqn", "--num-envs 2")
    )
    assert not any(scores.selected(only, "ddqn_atari", flags) for only in ("dqn_atari", "dqn", "ddqn Pong"))


def test_scores_are_kept_in_the_order_of_the_table(tmp_path):
    path, (script, flags, _) = tmp_path / "scores.csv", scores.TABLE[0]
    for seed, mean in (("2", 2.0), ("1", 1.0), ("2", 3.0)):
        row = {"script": script, "flags": flags, "seed": seed, "mean": mean}
        scores.replace(path, (script, flags, seed), [row])
    assert [(row["seed"], row["mean"]) for row in scores.read(path)] == [("1", "1.0"), ("2", "3.0")]


@pytest.mark.parametrize("life", [2, 10**6])
def test_agent_gets_the_discounted_return_of_each_state(life):
    """The reward is 1 a step, and a life has `life` steps."""
    num_envs = overestimation.NUM_ENVS
    steps = 0

    def step(action):
        nonlocal steps
        steps += 1
        over = np.full(num_envs, steps % life == 0)
        return np.zeros((num_envs, 1)), np.ones(num_envs), over, np.zeros(num_envs, bool), {}

    envs = SimpleNamespace(reset=lambda seed: (np.zeros((num_envs, 1)), {}), step=step, close=lambda: None)

    class Agent(torch.nn.Linear):
        def forward(self, obs):
            return torch.tensor([[3.0, 7.0]]).expand(len(obs), 2)

        def epsilon_greedy(self, obs, epsilon):
            return self(obs).argmax(-1).numpy()

    args = SimpleNamespace(gamma=0.99, eval_epsilon=0.01)
    expected, got = overestimation.measure(lambda args, n: envs, Agent(1, 1), args, seed=1)
    assert expected == 7
    assert got == pytest.approx((1.99 + 1) / 2 if life == 2 else 100, rel=0.005)


def test_speeds_are_those_of_the_better_thread_count_of_the_same_round(tmp_path, monkeypatch):
    """The share is of the arithmetic's limit where it was measured. A row of an earlier version is no steady state."""
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    task, old = list(tables.TASKS)[:2]
    rates = [("ours", 1, 1, 300), ("sb3", 1, 1, 150), ("sb3", 2, 1, 100), ("ours", 1, 2, 300), ("sb3", 1, 2, 200)]
    rates += [(name, 1, number, rate) for name, rate in (("ceiling", 400), ("gemm", 600)) for number in (1, 2)]
    rows = [f'"{task}",{c},{n},{r},{s // 2},{s},abc' for c, n, r, s in rates] + [f'"{old}",ours,1,1,9,,']
    (tmp_path / "speed.csv").write_text(
        "\n".join(["task,contender,threads,round,steps_per_second,steady,commit", *rows])
    )
    speeds = {"ours": [300, 300], "sb3": [150, 200], "ceiling": [400, 400], "gemm": [600, 600]}
    assert tables.speeds() == {task: speeds}
    steady, overall = (tables.speed_table(x).replace(tables.NBSP, " ") for x in ("steady", "steps_per_second"))
    assert steady.endswith(f"\n| {task} | 300 | 175 | – | 1.75 [1.50–2.00] | – | 600 | 50 % |")
    assert overall.endswith(f"\n| {task} | 150 | 88 | – | 1.75 [1.50–2.00] | – |\n| {old} \\* | 9 | – | – | – | – |")


def test_pictures_are_drawn_for_light_and_dark_pages_and_shown(tmp_path, monkeypatch):
    (tmp_path / "docs").mkdir()
    monkeypatch.setattr(plot, "ROOT", tmp_path)
    plot.main([])
    drawn = {path.name: path.stat().st_size for path in (tmp_path / "docs").iterdir()}
    assert {f"{name}-{page}.svg" for name in plot.pictures() for page in ("light", "dark")} == drawn.keys()
    assert min(drawn.values()) > 10_000
    shown = {name for page in PAGES for name in re.findall(r"[\w-]+\.svg", page.read_text(encoding="utf-8"))}
    assert shown == drawn.keys() == {path.name for path in (ROOT / "docs").glob("*.svg")}


@pytest.mark.parametrize("value, label", [(15, "theirs"), (100, "theirs (above)")])
def test_a_reference_far_above_the_curves_stands_only_in_the_legend(monkeypatch, value, label):
    monkeypatch.setattr(plot, "panels", lambda script: {("", "Game-v1"): [np.array([[0, 0], [100, 10]])]})
    monkeypatch.setattr(plot, "reference", lambda *task: (value, "theirs"))
    (axis,) = plot.draw_curves("ppo").axes
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["1 seed", label]
    assert (axis.get_ylim()[1] > value) == (label == "theirs")


def test_every_task_has_a_row_of_references():
    """The row may say that there is no reference."""
    for script, flags, _ in (*scores.TABLE, *scores.GPU_TABLE):
        assert tables.reference(script, flags)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tables_have_the_numbers_that_were_measured(page):
    """If this fails: python benchmarks/tables.py."""
    text = page.read_text(encoding="utf-8")
    assert tables.filled(text) == text


def test_every_table_is_on_a_page():
    names = re.findall("<!-- table: (.+?) -->", "".join(page.read_text(encoding="utf-8") for page in PAGES))
    assert sorted(names) == sorted(tables.tables())


def test_table_is_filled_again_without_touching_its_surroundings(monkeypatch):
    monkeypatch.setattr(tables, "tables", lambda: {"a": "| 1 |", "b": "| 2 |"})
    page = "# x\n<!-- table: a -->\n\n| 0 |\n\n<!-- end -->\ntext\n<!-- table: b -->\n<!-- end -->\n"
    filled = "# x\n<!-- table: a -->\n\n| 1 |\n\n<!-- end -->\ntext\n<!-- table: b -->\n\n| 2 |\n\n<!-- end -->\n"
    assert tables.filled(page) == tables.filled(filled) == filled


def test_scores_table_has_every_seed_of_every_task(monkeypatch, tmp_path):
    monkeypatch.setattr(tables, "SCORES", tmp_path / "scores.csv")
    (tmp_path / "scores.csv").write_text(
        "script,env_id,seed,steps,mean,std,seconds,flags,note\n"
        "ppo,LunarLander-v3,1,700000,250.04,30.0,99,,\n"
        "ppo,LunarLander-v3,2,700000,-7.125,1.0,301,,stopped\n"
    )
    text = tables.scores_table("ppo").replace(tables.NBSP, " ")
    assert "| LunarLander-v3 | 700 k | 1: 250.0 ± 30.0<br>2: -7.12 ± 1.00 | 220.0<br>-8.12 | " in text
    assert "the course asks for mean - std 200; RL Zoo 242 ± 32, 1 M steps | 99 to 301 s |" in text
    assert text.endswith("\n\n- LunarLander-v3, seed 2: stopped.")


def test_printed_commands_are_those_that_were_measured():
    for name, text in tables.tables().items():
        if name.startswith("commands"):
            lines = text.removeprefix("```bash\n").removesuffix("\n```").replace("\\\n", "").splitlines()
            printed = [shlex.split(line)[1:] for line in lines]
            wanted = [[f"{row[0]}.py", *shlex.split(row[1])] for row in scores.TABLE]
            assert printed == [words for words in wanted if words[0] in {words[0] for words in printed}]


def test_readme_shows_what_the_first_command_printed():
    (row,) = (row for row in scores.read(scores.SCORES) if scores.key(row) == ("ppo", "", "1"))
    mean, std = float(row["mean"]), float(row["std"])
    line = f"LunarLander-v3: {mean:.2f} +/- {std:.2f} over 100 episodes, mean - std {mean - std:.2f}"
    assert line in PAGES[0].read_text(encoding="utf-8")
