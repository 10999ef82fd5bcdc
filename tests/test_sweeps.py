"""The sweep files: what wandb's agent would start, and the search with Optuna on the same files."""

import copy
import importlib
import json
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from test_scripts import SCRIPTS, every_script, flags_of
from wandb_log import read_wandb

SWEEPS = ROOT / "sweeps"
NAN = ["--env-id", "toy_envs:Constant-v0", "--env-kwargs", '{"bad_reward_at": 20}']


def read_sweep(name):
    return yaml.safe_load((SWEEPS / f"{name}.yaml").read_text(encoding="utf-8"))


def command_of_agent(sweep, which):
    """What wandb's agent starts, by its own functions, for the first (0) or last (-1) value of every parameter."""
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    args = {}
    for name, entry in sweep["parameters"].items():
        values = [entry["value"]] if "value" in entry else entry.get("values") or [entry["min"], entry["max"]]
        args[name] = {"value": values[which]}
    parts = {"${env}": ["env"], "${interpreter}": ["python"], "${program}": [sweep["program"]]}
    parts["${args}"] = create_sweep_command_args({"args": args})["args"]
    command = create_sweep_command(copy.deepcopy(sweep.get("command")))
    return [word for part in command for word in parts.get(part, [part])]


def test_every_script_has_a_sweep_file():
    assert {path.stem for path in SWEEPS.glob("*.yaml")} == set(SCRIPTS)


@every_script
def test_sweep_file_fits_the_script(name):
    sweep, defaults = read_sweep(name), importlib.import_module(name).Args
    assert set(sweep) == {"program", "project", "method", "metric", "early_terminate", "parameters"}
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
        elif "value" not in entry:
            assert entry["distribution"] in ("uniform", "int_uniform", "log_uniform_values")
            assert entry["min"] <= default <= entry["max"]
    assert booleans >= 1


def listed(value):
    return value if isinstance(value, list) else [value]


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
    assert "Warning" not in errors
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
    pytest.importorskip("optuna")
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
    (in_empty_folder / "ppo.py").write_text((ROOT / "ppo.py").read_text(encoding="utf-8"), encoding="utf-8")


def test_search_finds_better_settings(start, beside_the_scripts):
    """The first trial is what was given, which the others beat; a second search goes on with the study of the first."""
    import optuna

    code, lines, errors = search(start, "--trials", "4", "--sampler-seed", "0", *SHORT, *HANDICAP)
    assert code == 0, errors
    assert "learning_rate=0.0001 " in lines[0]
    assert "num_minibatches=4 update_epochs=4" in lines[0]
    first = scores_of(lines)[0]
    code, lines, errors = search(start, "--trials", "2", "--sampler-seed", "1", *SHORT, *HANDICAP)
    assert code == 0, errors
    assert [line.split()[1] for line in lines[:2]] == ["4:", "5:"]
    (study,) = optuna.get_all_study_names("sqlite:///optuna.db")
    study = optuna.load_study(study_name=study, storage="sqlite:///optuna.db")
    assert len(study.trials) == 6
    best = study.best_trial
    assert best.value > 2 * first
    assert lines[-2] == f"best: {best.value:.2f}, trial {best.number} of 6"
    for trial in study.get_trials(states=[optuna.trial.TrialState.COMPLETE]):
        (folder,) = Path("runs", study.study_name).glob(f"trial-{trial.number}-*/runs/*")
        config, results = (json.loads((folder / file).read_text()) for file in ("config.json", "results.json"))
        assert trial.value == pytest.approx(results["mean_reward"])
        assert trial.params == {name: config[name] for name in trial.params}
        assert config["seed"] == trial.number + 1
        assert len(trial.intermediate_values) >= 3
        assert trial.intermediate_values[trial.last_step] == trial.value
    module = importlib.import_module("ppo")
    args = module.parse_args(lines[-1].split()[2:])  # what is printed is that trial
    assert {name: getattr(args, name) for name in best.params} == best.params
    assert (args.seed, args.env_id, args.total_timesteps) == (best.number + 1, "CartPole-v1", 8192)


def test_search_stops_what_falls_behind(monkeypatch, tmp_path):
    """A run whose evaluations are worse than those of the trials before it is terminated."""
    optuna = pytest.importorskip("optuna")
    monkeypatch.syspath_prepend(str(SWEEPS))
    optuna_sweep = importlib.import_module("optuna_sweep")
    study = optuna.create_study(direction="maximize", pruner=optuna.pruners.MedianPruner(5, 1))
    for _ in range(5):
        trial = study.ask()
        for step in range(4):
            trial.report(100, step)
        study.tell(trial, 100)
    script = tmp_path / "slow.py"
    script.write_text(
        "import time\nfrom torch.utils.tensorboard import SummaryWriter\nwriter = SummaryWriter('runs/1')\n"
        "for step, value in enumerate([3, 4]):\n    writer.add_scalar('eval/return_mean', value, step)\n"
        "writer.flush()\ntime.sleep(300)\n"
    )
    with pytest.raises(optuna.TrialPruned, match="after 2 evaluations, at 4.00"):
        optuna_sweep.run_trial(study.ask(), [sys.executable, str(script)], tmp_path, "eval/return_mean")


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
        (["--env-id", "CartPole-v1", "--storage", "nosuch://x"], "--storage nosuch://x: "),
        (["--lerning-rate", "1"], "Perhaps you meant"),
    ],
)
def test_search_refuses(start, beside_the_scripts, flags, message):
    code, lines, errors = search(start, *flags)
    assert (code, lines) == (2, [])
    assert message in errors
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("program: ppo.py", "program: no.py", "there is no no.py in this folder"),
        ("program: ppo.py", "", "no sweep file: KeyError('program')"),
        ("distribution: uniform", "distribution: beta", "ent_coef: distribution beta is none of"),
    ],
)
def test_search_refuses_a_bad_file(start, beside_the_scripts, old, new, message):
    pytest.importorskip("optuna")
    text = (SWEEPS / "ppo.yaml").read_text(encoding="utf-8")
    assert old in text
    Path("bad.yaml").write_text(text.replace(old, new))
    process = start("sweeps/optuna_sweep.py", "bad.yaml")
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 2
    assert errors.startswith("optuna_sweep.py: error: bad.yaml: ")
    assert errors.count("\n") == 1
    assert message in errors
