"""Tests of benchmarks/: the runs behind the scores, and that the README says what the CSV files say."""

import json
import sys
from pathlib import Path
from statistics import median
from subprocess import CalledProcessError
from types import SimpleNamespace

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import overestimation  # noqa: E402
import plot  # noqa: E402
import scores  # noqa: E402
import speed  # noqa: E402

README = (ROOT / "README.md").read_text().replace("−", "-")
TASK = ("q_learning", "--total-timesteps 40000 --num-checkpoints 4 --eval-episodes 50", "1")
PROGRAM = [str(ROOT / "q_learning.py")]
KILLED_AT_20000 = """
import os, sys
import q_learning

class Run(q_learning.Run):
    def cut(self, envs):
        return super().cut(envs) if self.step < 20000 else os._exit(9)

q_learning.Run = Run
q_learning.train(q_learning.parse_args(sys.argv[1:]))
"""


def test_killed_score_goes_on_where_it_was_and_comes_out_the_same(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(scores, "ROOT", tmp_path / "whole")
    whole = scores.collect(*TASK, *scores.train(*TASK, PROGRAM))
    monkeypatch.setattr(scores, "ROOT", tmp_path / "killed")
    Path("killed.py").write_text(KILLED_AT_20000)
    (scores.run_folder(*TASK) / "runs" / "stopped-at-once").mkdir(parents=True)
    with pytest.raises(CalledProcessError):
        scores.train(*TASK, [str(tmp_path / "killed.py")])
    monkeypatch.setattr(scores, "wall_time", lambda run: 1000)
    run, seconds = scores.train(*TASK, PROGRAM)
    killed = scores.collect(*TASK, run, seconds)
    assert killed[1] == whole[1] and len(killed[1]) == 5
    assert (whole[0]["note"], killed[0]["note"]) == ("", "in 2 sittings")
    assert killed[0] | {"seconds": 0, "note": ""} == whole[0] | {"seconds": 0}
    assert len(list(run.glob("events.*"))) == 2
    assert 1001 < seconds < 1060
    assert scores.train(*TASK, ["not started again"]) == (run, 1000)


def test_wall_time_leaves_out_the_time_between_two_sittings(tmp_path, monkeypatch):
    for name, times in (("events.1", (10, 15, 13)), ("events.2", (100, 101))):
        (tmp_path / name).write_text(json.dumps(times))
    loader = SimpleNamespace(Load=None)

    def load(path):
        loader.Load = lambda: [SimpleNamespace(wall_time=time) for time in json.loads(Path(path).read_text())]
        return loader

    monkeypatch.setattr(scores, "EventFileLoader", load)
    assert scores.wall_time(tmp_path) == 6


def test_redo_forgets_and_then_trains_what_was_named(tmp_path, monkeypatch):
    """Stopped in between and continued without, it is none the worse."""
    task, other = ("q_learning", "--total-timesteps 200 --eval-episodes 10", 2), ("ppo", "--env-id Other-v0", 1)
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
        return ()

    monkeypatch.setattr(scores, "train", train)
    row = {"script": task[0], "flags": task[1], "mean": 0.5}
    monkeypatch.setattr(scores, "collect", lambda script, flags, seed: (row | {"seed": seed}, [row | {"seed": seed}]))
    with pytest.raises(KeyboardInterrupt):
        scores.main(only="q_learning", redo=True)
    assert [(row["script"], row["mean"]) for row in scores.read(scores.SCORES)] == [("q_learning", "0.5"), ("ppo", "7")]
    scores.main(only="q_learning")
    assert [seed for *_, seed in trained] == ["1", "2", "2"]
    assert [row["mean"] for row in scores.read(scores.SCORES)] == ["0.5", "0.5", "7"]


def test_words_select_rows_by_how_they_begin():
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
def test_what_an_agent_gets_is_the_discounted_return_of_each_state(life):
    """One point a step, and a life of `life` steps."""
    clock = SimpleNamespace(t=0)

    def step(action):
        clock.t += 1
        n = overestimation.NUM_ENVS
        return np.zeros((n, 1)), np.ones(n), np.full(n, clock.t % life == 0), np.zeros(n, bool), {}

    envs = SimpleNamespace(
        reset=lambda seed: (np.zeros((overestimation.NUM_ENVS, 1)), {}), step=step, close=lambda: None
    )

    class Agent(torch.nn.Linear):
        def forward(self, obs):
            return torch.tensor([[3.0, 7.0]]).expand(len(obs), 2)

        def best_action(self, obs):
            return self(obs).argmax(-1)

        def explore(self, action, epsilon):
            return action.numpy()

    args = SimpleNamespace(gamma=0.99, eval_epsilon=0.01)
    expected, got = overestimation.measure(lambda args, n: envs, Agent(1, 1), args, seed=1)
    assert expected == 7
    assert got == pytest.approx((1.99 + 1) / 2 if life == 2 else 100, rel=0.005)


def test_ratio_is_against_the_better_thread_count_of_the_same_round(tmp_path, monkeypatch):
    monkeypatch.setattr(plot, "HERE", tmp_path)
    rates = [("ours", 1, 1, 300), ("sb3", 1, 1, 150), ("sb3", 2, 1, 100), ("ours", 1, 2, 300), ("sb3", 1, 2, 200)]
    rows = ["task,contender,threads,round,steps_per_second", *(f"t,{c},{n},{r},{s}" for c, n, r, s in rates)]
    (tmp_path / "speed.csv").write_text("\n".join(rows))
    assert plot.ratios() == {"t": [2.0, 1.5]}


def test_all_pictures_are_drawn(tmp_path, monkeypatch):
    (tmp_path / "docs").mkdir()
    monkeypatch.setattr(plot, "ROOT", tmp_path)
    plot.main()
    rates = [("ppo", 1), ("ppo", 128), ("ppo_atari", 1), ("ppo_atari", 128)]
    rates = [
        {"script": x, "num_envs": n, "contender": c, "steps_per_second": 9}
        for x, n in rates
        for c in ("ours", "ceiling")
    ]
    plot.draw_scaling(rates, scores.read(speed.HERE / "memory.csv"))
    drawn = {path.name: path.stat().st_size for path in (tmp_path / "docs").iterdir()}
    assert drawn.keys() == {"curves.png", "speed.png", "scaling.png"} and min(drawn.values()) > 10_000


def test_every_task_has_its_line_in_the_picture():
    """A reference, or none on purpose."""
    for script, flags, _ in (*scores.TABLE, *scores.GPU_TABLE):
        assert any(row[0] == script and row[1] in flags for row in plot.REFERENCES), (script, flags)


@pytest.mark.parametrize(
    "row", scores.read(scores.SCORES), ids=lambda row: f"{row['script']} {row['env_id']} {row['seed']}"
)
def test_readme_has_every_score(row):
    mean, std = float(row["mean"]), float(row["std"])
    shown = {f"{mean:.{d}f} ± {std:.{d}f}" for d in (0, 1, 2)} | {f"{mean:.3f}"}
    if row["note"].endswith("pipes"):
        mean, _, std, _ = row["note"].split()
        shown = {f"{float(mean):.1f} ± {float(std):.1f}"}
    section = README.partition(f"### {row['script']}.py")[2] or README.partition("### ppo_atari.py")[2]
    section = section.partition("\n## ")[0].partition("\n### ")[0]
    assert any(text in section for text in shown), shown


@pytest.mark.parametrize("task", {row["task"]: None for row in scores.read(speed.HERE / "speed.csv")})
def test_readme_has_every_speed(task):
    rates, memory, rival, ratio = {}, {}, "–", "–"
    for row in scores.read(speed.HERE / "speed.csv"):
        if row["task"] == task:
            best = rates.setdefault(row["contender"], {})
            best[row["round"]] = max(best.get(row["round"], 0), int(row["steps_per_second"]))
            memory.setdefault(row["contender"], []).append(int(row["peak_memory_mib"]))
    ours, ceiling = (list(rates[contender].values()) for contender in ("ours", "ceiling"))
    share, peak = median(a / b for a, b in zip(ours, ceiling)), f"{median(memory['ours']):.0f}"
    if "sb3" in rates:
        found, rival = plot.ratios()[task], speed.summary(list(rates["sb3"].values()))
        ratio = f"{median(found):.2f} [{min(found):.2f} to {max(found):.2f}]"
        peak += f" and {median(memory['sb3']):.0f}"
    row = f"| {speed.summary(ours)} | {rival} | {ratio} | {median(ceiling):,.0f} | {share:.0%} | {peak} |"
    assert row.replace("%", " %") in README, row


def test_readme_has_the_speeds_in_float32():
    rates = {}
    for row in scores.read(speed.HERE / "speed.csv"):
        rates.setdefault((row["task"], row["contender"]), []).append(int(row["steps_per_second"]))
    for task, contender in rates:
        if contender == "ours, float32":
            ratios = [a / b for a, b in zip(rates[task, contender], rates[task, "sb3"])]
            assert f"{median(ratios):.2f} [{min(ratios):.2f} to {max(ratios):.2f}]" in README, task


def test_readme_has_every_time_to_solve():
    section = README.partition("Time until the mean of two")[2].partition("```")[0]
    rows = scores.read(speed.HERE / "solve.csv")
    assert len(rows) >= 10
    for row in rows:
        assert f" {float(row['seconds']):.0f} s" in section, row
