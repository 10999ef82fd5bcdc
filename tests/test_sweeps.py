"""The sweep files: what wandb's agent would start, and the search with Optuna on the same files."""

import copy
import importlib
import itertools
import json
import signal
import sys
import time
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from test_scripts import SCRIPTS, flags_of
from wandb_log import read_wandb

SWEEPS = ROOT / "sweeps"
SWEPT = set(SCRIPTS) - {"ppo_atari_multigpu"}  # which has the parameters of ppo_atari
every_script = pytest.mark.parametrize("name", sorted(SWEPT))
NAN = ["--env-id", "toy_envs:Constant-v0", "--env-kwargs", '{"bad_reward_at": 20}']


def read_sweep(name):
    return yaml.safe_load((SWEEPS / f"{name}.yaml").read_text(encoding="utf-8"))


def command_of_agent(sweep, which):
    """What wandb's agent starts, by its own functions, for the first (0) or last (-1) value of every parameter."""
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    args = {}
    for name, entry in sweep["parameters"].items():
        args[name] = {"value": ends_of(entry)[which]}
    parts = {"${env}": ["env"], "${interpreter}": ["python"], "${program}": [sweep["program"]]}
    parts["${args}"] = create_sweep_command_args({"args": args})["args"]
    command = create_sweep_command(copy.deepcopy(sweep.get("command")))
    return [word for part in command for word in parts.get(part, [part])]


def test_every_script_has_a_sweep_file():
    assert {path.stem for path in SWEEPS.glob("*.yaml")} == SWEPT


@every_script
def test_sweep_file_fits_the_script(name):
    sweep, defaults = read_sweep(name), importlib.import_module(name).Args
    assert set(sweep) == {"program", "project", "method", "metric", "parameters"}
    assert sweep["program"] == f"{name}.py"
    assert sweep["project"] == defaults.wandb_project_name
    assert sweep["method"] in ("random", "bayes", "grid")
    assert sweep["metric"] == {"name": "eval/return_mean", "goal": "maximize"}
    booleans = 0
    for parameter, entry in sweep["parameters"].items():
        default = getattr(defaults, parameter)  # with underscores, and a flag of the script
        types = (int, float) if type(default) is float else type(default)
        assert all(isinstance(value, types) for key in entry if key != "distribution" for value in listed(entry[key]))
        if "values" in entry:
            booleans += set(entry["values"]) == {True, False}
            assert default in entry["values"]
        elif "value" not in entry:
            assert entry["distribution"] in ("uniform", "int_uniform", "log_uniform_values")
            assert entry["min"] <= default <= entry["max"]
    assert booleans >= 1
    names, ends = zip(*((name, ends_of(entry)) for name, entry in sweep["parameters"].items()))
    for values in itertools.product(*ends):
        defaults(**dict(zip(names, values))).check()  # exits if they do not fit together


def listed(value):
    return value if isinstance(value, list) else [value]


def ends_of(entry):
    """All values, or the ends of the range."""
    return [entry["value"]] if "value" in entry else entry.get("values") or [entry["min"], entry["max"]]


@every_script
@pytest.mark.parametrize("which", [0, -1])
def test_the_agents_command_runs(name, which, start, monkeypatch):
    """With true and with false; and the last value of the metric is the score of the final evaluation."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    _, _, program, *flags = command_of_agent(read_sweep(name), which)
    assert program == f"{name}.py"
    switches = [flag for flag in flags if flag.endswith(("=True", "=False")) and "--track" not in flag]
    assert switches
    process = start(program, *flags, *(flag for flag in flags_of(name) if flag != "--save-replay"))
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert f"{name}.py:" not in errors  # no warning about a line of it
    (folder,) = Path("runs").iterdir()
    config, results = (json.loads((folder / file).read_text()) for file in ("config.json", "results.json"))
    for switch in switches:
        flag, _, value = switch[2:].partition("=")
        assert config[flag] is (value == "True")
    (tracked,) = Path("wandb").glob("offline-run-*")
    run = read_wandb(tracked)
    assert run["summary"]["eval/return_mean"] == pytest.approx(results["mean_reward"])
    assert "eval/return_mean" in run["history"][-1]
    assert run["exit_code"] == 0


def test_a_failed_run_is_a_failed_trial(start, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    process = start("ppo.py", "--track=True", *flags_of("ppo"), *NAN)
    process.communicate(timeout=100)
    assert process.returncode == 1
    (tracked,) = Path("wandb").glob("offline-run-*")
    assert read_wandb(tracked)["exit_code"] == 1


# --- optuna_sweep.py ---

SHORT = "--env-id CartPole-v1 --total-timesteps 8192 --num-checkpoints 4 --eval-episodes 20 --num-steps 128".split()
HANDICAP = "--learning-rate 0.0001 --update-epochs 4 --num-minibatches 4".split()


def search(start, *flags):
    """Run the search from the repository's sweep file; (exit code, lines of stdout, stderr)."""
    process = start("sweeps/optuna_sweep.py", str(SWEEPS / "ppo.yaml"), *flags)
    output, errors = process.communicate(timeout=500)
    return process.returncode, output.splitlines(), errors


def scores_of(lines):
    """The score of each trial that came to its end."""
    words = [line.split() for line in lines if line.startswith("trial")]
    return {int(word[1][:-1]): float(word[2][:-1]) for word in words if word[2][:-1].replace(".", "").isdigit()}


@pytest.fixture
def beside_the_scripts(in_empty_folder):
    """As in the repository's folder: the scripts are where the search is started."""
    pytest.importorskip("optuna")
    (in_empty_folder / "ppo.py").write_text((ROOT / "ppo.py").read_text(encoding="utf-8"), encoding="utf-8")


def load_study():
    import optuna

    (name,) = optuna.get_all_study_names("sqlite:///optuna.db")
    return optuna.load_study(study_name=name, storage="sqlite:///optuna.db")


def test_search_finds_better_settings(start, beside_the_scripts):
    """The first trial is what was given, which the others beat; a second search goes on with the study of the first."""
    code, lines, errors = search(start, "--trials", "4", "--sampler-seed", "0", *SHORT, *HANDICAP)
    assert code == 0, errors
    assert "learning_rate=0.0001 " in lines[0]
    assert "num_minibatches=4 update_epochs=4" in lines[0]
    first = scores_of(lines)[0]
    code, lines, errors = search(start, "--trials", "2", "--sampler-seed", "1", *SHORT, *HANDICAP)
    assert code == 0, errors
    assert [line.split()[1] for line in lines[:2]] == ["4:", "5:"]
    study = load_study()
    assert len(study.trials) == 6
    best = study.best_trial
    assert best.value > 1.5 * first
    assert lines[-2] == f"best: {best.value:.2f}, trial {best.number} of 6"
    for trial in study.trials:
        (folder,) = Path("runs", study.study_name).glob(f"trial-{trial.number}-*/runs/*")
        config = json.loads((folder / "config.json").read_text())
        assert trial.params == {name: config[name] for name in trial.params}
        assert config["seed"] == trial.number + 1
        if trial.state.name == "COMPLETE":
            results = json.loads((folder / "results.json").read_text())
            assert trial.value == pytest.approx(results["mean_reward"])
            assert len(trial.intermediate_values) >= 3
            assert trial.last_step == 4
            assert trial.intermediate_values[4] == trial.value
    args = importlib.import_module("ppo").parse_args(lines[-1].split()[2:])  # what is printed is that trial
    assert {name: getattr(args, name) for name in best.params} == best.params
    assert (args.seed, args.env_id, args.total_timesteps) == (best.number + 1, "CartPole-v1", 8192)

    code, lines, errors = search(start, "--trials", "1", *SHORT, *HANDICAP, "--seed", "77")  # is another problem
    assert code == 2
    assert "take another name" in errors
    assert len(load_study().trials) == 6


def test_a_seed_that_is_given_is_everyones(start, beside_the_scripts):
    code, lines, errors = search(start, "--trials", "2", *SHORT[:2], "--total-timesteps", "4096", "--seed", "77")
    assert code == 0, errors
    for config in Path("runs").glob("*/*/runs/*/config.json"):
        assert json.loads(config.read_text())["seed"] == 77
    assert not any("seed" in trial.params for trial in load_study().trials)


def test_an_interrupted_first_trial_comes_again(start, beside_the_scripts):
    """SIGTERM ends the search and the script that it had started; the next search begins with the first trial."""
    process = start("sweeps/optuna_sweep.py", str(SWEEPS / "ppo.yaml"))  # LunarLander, 90 s a trial
    deadline = time.monotonic() + 60
    while not list(Path("runs").glob("*/*/runs/*/checkpoint.pt")) and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 143
    (log,) = Path("runs").glob("*/*/log")
    assert "to continue from the last checkpoint" in log.read_text()  # what the script says when it is stopped
    assert [trial.state.name for trial in load_study().trials] == ["FAIL"]
    process = start("sweeps/optuna_sweep.py", str(SWEEPS / "ppo.yaml"))
    while len(load_study().trials) < 2 and time.monotonic() < deadline + 60:
        time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=60)
    defaults = importlib.import_module("ppo").Args
    trial = load_study().trials[1]
    assert trial.params == {name: getattr(defaults, name) for name in trial.params}


def test_search_stops_what_falls_behind(monkeypatch, tmp_path):
    """A run whose evaluations are worse than those of the trials before it is terminated."""
    optuna = pytest.importorskip("optuna")
    monkeypatch.syspath_prepend(str(SWEEPS))
    optuna_sweep = importlib.import_module("optuna_sweep")
    study = optuna_sweep.open_study(optuna_sweep.Options("", storage="sqlite:///x.db"), "x", "maximize", [])
    for _ in range(5):
        trial = study.ask()
        for step in range(4):
            trial.report(100, step)
        study.tell(trial, 100)
    script = tmp_path / "slow.py"
    script.write_text(
        "import time\nfrom torch.utils.tensorboard import SummaryWriter\nwriter = SummaryWriter('runs/1')\n"
        "for step, value in enumerate([3, 4]):\n    writer.add_scalar('eval/return_mean', value, step * 1000)\n"
        "writer.flush()\ntime.sleep(100)\n"
    )
    args, began = importlib.import_module("ppo").Args(total_timesteps=20_000), time.time()
    with pytest.raises(optuna.TrialPruned, match="at 4.00 after 1000 steps"):
        optuna_sweep.run_trial(study.ask(), [sys.executable, script], tmp_path, "eval/return_mean", args, True)
    assert time.time() - began < 90  # it was terminated


def test_a_trial_that_fails_is_reported_and_the_search_goes_on(start, beside_the_scripts):
    code, lines, errors = search(start, "--trials", "2", "--total-timesteps", "4096", *NAN)
    assert [line.split()[2] for line in lines] == ["failed,", "failed,"]
    assert "NaN or infinite at step" in lines[0]
    assert code == 1
    assert errors == "optuna_sweep.py: error: no trial came to its end\n"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--learning-rate", "1"], "--learning-rate 1.0: not among the values of"),
        (["--num-minibatches", "7"], "--num-minibatches 7: "),
        (["--env-id", "NoSuch-v0"], "--env-id NoSuch-v0"),
        (["--trials", "0"], "--trials 0: must be > 0"),
        (["--storage", "nosuch://x"], "--storage nosuch://x: "),
        (["--storage", "sqlite:///no/such.db"], "--storage sqlite:///no/such.db: "),
        (["--lerning-rate", "1"], "Perhaps you meant"),
    ],
)
def test_search_refuses(start, beside_the_scripts, flags, message):
    code, lines, errors = search(start, *flags)
    assert (code, lines) == (2, [])
    assert message in errors
    assert errors.count("\n") == 1 or "Perhaps" in message  # tyro's box
    assert not Path("runs").exists()
    assert not Path("optuna.db").exists()


BAD_FILES = {
    ("program: ppo.py", "program: no.py"): "there is no no.py in this folder",
    ("program: ppo.py", ""): "no sweep file: KeyError('program')",
    ("goal: maximize", "goal: max"): "goal max: neither maximize nor minimize",
    ("distribution: uniform", "distribution: beta"): "ent_coef: distribution beta is none of",
    ("  clip_coef:", "  clip-coef:"): "clip-coef is no flag of ppo.py",
}


def test_search_refuses_a_bad_file(beside_the_scripts, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(SWEEPS))
    optuna_sweep = importlib.import_module("optuna_sweep")
    text = (SWEEPS / "ppo.yaml").read_text(encoding="utf-8")
    for (old, new), message in BAD_FILES.items():
        assert old in text
        Path("bad.yaml").write_text(text.replace(old, new))
        with pytest.raises(SystemExit) as stop:
            optuna_sweep.read("bad.yaml")
        errors = capsys.readouterr().err
        assert stop.value.code == 2
        assert errors.startswith("optuna_sweep.py: error: bad.yaml: ")
        assert errors.count("\n") == 1
        assert message in errors
