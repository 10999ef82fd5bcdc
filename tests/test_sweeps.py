"""The sweep files: the commands that wandb's agent makes of them, and the search with Optuna."""

import importlib
import itertools
import json
import signal
import sys
import time
from pathlib import Path

import pytest
import yaml

from runs import ROOT, SCRIPTS, flags_of, results, scalars
from wandb_log import read_wandb

SWEEPS = ROOT / "sweeps"
SWEPT = sorted(set(SCRIPTS) - {"ppo_atari_multigpu"})  # it has the flags of ppo_atari
every_script = pytest.mark.parametrize("name", SWEPT)
NAN = ["--env-id", "toy_envs:Constant-v0", "--env-kwargs", '{"bad_reward_at": 20}']


def read_sweep(name):
    return yaml.safe_load((SWEEPS / f"{name}.yaml").read_text(encoding="utf-8"))


def ends_of(entry):
    """All values of a parameter, or the ends of its range."""
    return [entry["value"]] if "value" in entry else entry.get("values") or [entry["min"], entry["max"]]


def flags_of_agent(sweep, which):
    """The flags with which wandb's agent starts a script: the first (0) or the last (-1) value of each parameter."""
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    args = {name: {"value": ends_of(entry)[which]} for name, entry in sweep["parameters"].items()}
    assert create_sweep_command(sweep.get("command")) == ["${env}", "${interpreter}", "${program}", "${args}"]
    return create_sweep_command_args({"args": args})["args"]


def test_every_script_has_a_sweep_file():
    assert {path.stem for path in SWEEPS.glob("*.yaml")} == {*SWEPT, "ppo_doom"}


@every_script
def test_sweep_file_fits_the_script(name):
    sweep = read_sweep(name)
    defaults = importlib.import_module(name).Args
    assert set(sweep) == {"program", "project", "method", "metric", "parameters"}
    assert sweep["program"] == f"{name}.py"
    assert sweep["project"] == defaults.wandb_project_name
    assert sweep["method"] in ("random", "bayes", "grid")
    assert sweep["metric"] == {"name": "eval/return_mean", "goal": "maximize"}
    for parameter, entry in sweep["parameters"].items():
        default = getattr(defaults, parameter)
        types = (int, float) if type(default) is float else type(default)
        assert all(isinstance(value, types) for value in ends_of(entry)), parameter
        if "values" in entry:
            assert default in entry["values"]
        elif "value" not in entry:
            assert entry["distribution"] in ("uniform", "int_uniform", "log_uniform_values")
            assert entry["min"] <= default <= entry["max"]


@every_script
def test_all_values_of_a_sweep_fit_together(name):
    sweep = read_sweep(name)
    args = importlib.import_module(name).Args
    for values in itertools.product(*map(ends_of, sweep["parameters"].values())):
        args(**dict(zip(sweep["parameters"], values))).check()  # ends the program if they do not


@every_script
@pytest.mark.parametrize("which", [0, -1])
def test_script_reads_the_agents_flags(name, which):
    """Booleans and integers arrive as they are in the sweep file; each file has a boolean with both values."""
    sweep = read_sweep(name)
    args = importlib.import_module(name).parse_args(flags_of_agent(sweep, which))
    wanted = {parameter: ends_of(entry)[which] for parameter, entry in sweep["parameters"].items()}
    assert {parameter: getattr(args, parameter) for parameter in wanted} == wanted
    assert any(set(ends_of(entry)) == {True, False} for entry in sweep["parameters"].values())


@every_script
def test_script_trains_with_the_last_values(name):
    flags = [flag for flag in flags_of_agent(read_sweep(name), -1) if not flag.startswith("--track")]
    short = [flag for flag in flags_of(name) if flag != "--save-replay"]
    if name.endswith(("_atari", "_doom")):
        short += ["--total-timesteps", "256"]
    module = importlib.import_module(name)
    folder = module.train(module.parse_args([*flags, *short]))
    assert scalars(folder, "eval/return_mean")[-1].value == pytest.approx(results(folder)["mean_reward"])


def test_agents_command_sends_the_metric_to_wandb(start, monkeypatch):
    """The last value of the metric is the score of the final evaluation."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    process = start("ppo.py", *flags_of_agent(read_sweep("ppo"), 0), *flags_of("ppo"))
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 0, errors
    (folder,) = Path("runs").iterdir()
    (tracked,) = Path("wandb").glob("offline-run-*")
    run = read_wandb(tracked)
    assert run["exit_code"] == 0
    assert run["summary"]["eval/return_mean"] == pytest.approx(results(folder)["mean_reward"])
    assert "eval/return_mean" in run["history"][-1]


def test_failed_run_is_a_failed_trial(start, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    process = start("ppo.py", "--track=True", *flags_of("ppo"), *NAN)
    process.communicate(timeout=100)
    assert process.returncode == 1
    (tracked,) = Path("wandb").glob("offline-run-*")
    assert read_wandb(tracked)["exit_code"] == 1


# --- optuna_sweep.py ---

SHORT = "--env-id CartPole-v1 --total-timesteps 8192 --num-checkpoints 4 --eval-episodes 20".split()
WEAK = "--learning-rate 0.0001 --update-epochs 4 --num-minibatches 4 --num-steps 128".split()


@pytest.fixture
def beside_the_scripts(in_empty_folder):
    """A folder with ppo.py, as the search expects it."""
    pytest.importorskip("optuna")
    (in_empty_folder / "ppo.py").write_text((ROOT / "ppo.py").read_text(encoding="utf-8"), encoding="utf-8")


@pytest.fixture
def optuna_sweep(beside_the_scripts, monkeypatch):
    """optuna_sweep.py as a module."""
    monkeypatch.syspath_prepend(str(SWEEPS))
    return importlib.import_module("optuna_sweep")


@pytest.fixture
def search(start, beside_the_scripts):
    """Run the search with ppo.yaml: search(*flags) returns the exit code, the lines of stdout, and stderr."""

    def run_search(*flags):
        process = start("sweeps/optuna_sweep.py", str(SWEEPS / "ppo.yaml"), *flags)
        output, errors = process.communicate(timeout=500)
        return process.returncode, output.splitlines(), errors

    return run_search


def load_study():
    import optuna

    (name,) = optuna.get_all_study_names("sqlite:///optuna.db")
    return optuna.load_study(study_name=name, storage="sqlite:///optuna.db")


def test_search_finds_better_flags_and_goes_on(search):
    """The first trial has the flags that were given. A second search continues the study of the first."""
    code, lines, errors = search("--trials", "3", "--sampler-seed", "0", *SHORT, *WEAK)
    assert code == 0, errors
    assert "learning_rate=0.0001 " in lines[0]
    assert "num_minibatches=4 update_epochs=4" in lines[0]
    code, lines, errors = search("--trials", "1", "--sampler-seed", "1", *SHORT, *WEAK)
    assert code == 0, errors
    assert lines[0].startswith("trial 3: ")
    study = load_study()
    best = study.best_trial
    assert len(study.trials) == 4
    assert study.trials[3].params != study.trials[0].params
    assert best.value > 1.5 * study.trials[0].value
    assert lines[-2] == f"best: {best.value:.2f}, trial {best.number} of 4"
    for trial in study.trials:
        (folder,) = Path("runs", study.study_name).glob(f"trial-{trial.number}-*/runs/*")
        config = json.loads((folder / "config.json").read_text())
        assert trial.params == {name: config[name] for name in trial.params}
        assert config["seed"] == trial.number + 1
        if trial.state.name == "COMPLETE":
            assert trial.value == pytest.approx(results(folder)["mean_reward"])
            assert len(trial.intermediate_values) >= 2
            assert trial.intermediate_values[4] == trial.value  # the last of --num-checkpoints 4
    args = importlib.import_module("ppo").parse_args(lines[-1].split()[2:])  # the command that is printed
    assert {name: getattr(args, name) for name in best.params} == best.params
    assert (args.seed, args.env_id, args.total_timesteps) == (best.number + 1, "CartPole-v1", 8192)

    code, lines, errors = search("--trials", "1", *SHORT, *WEAK, "--seed", "77")
    assert code == 2
    assert "choose another name" in errors
    assert len(load_study().trials) == 4


def test_seed_that_is_given_is_the_seed_of_all_trials(search):
    code, _, errors = search("--trials", "2", *SHORT, "--total-timesteps", "8192", "--seed", "77")
    assert code == 0, errors
    for config in Path("runs").glob("*/*/runs/*/config.json"):
        assert json.loads(config.read_text())["seed"] == 77
    assert not any("seed" in trial.params for trial in load_study().trials)


def test_stopped_first_trial_runs_again(start, beside_the_scripts):
    """SIGTERM ends the search and its script. The next search begins with the first trial."""
    process = start("sweeps/optuna_sweep.py", str(SWEEPS / "ppo.yaml"))
    deadline = time.monotonic() + 120
    while not list(Path("runs").glob("*/*/runs/*/checkpoint.pt")) and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 143
    (log,) = Path("runs").glob("*/*/log")
    assert "python ppo.py --resume" in log.read_text()
    assert not list(Path("runs").glob("*/*/runs/*/results.json"))
    assert [trial.state.name for trial in load_study().trials] == ["FAIL"]
    process = start("sweeps/optuna_sweep.py", str(SWEEPS / "ppo.yaml"))
    while len(load_study().trials) < 2 and time.monotonic() < deadline + 60:
        time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=60)
    defaults = importlib.import_module("ppo").Args
    trial = load_study().trials[1]
    assert trial.params == {name: getattr(defaults, name) for name in trial.params}


def test_trial_that_falls_behind_is_terminated(optuna_sweep, tmp_path):
    import optuna

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
    args = importlib.import_module("ppo").Args(total_timesteps=20_000)
    start_time = time.monotonic()
    with pytest.raises(optuna.TrialPruned, match="at 4.00 after 1000 steps"):
        optuna_sweep.run_trial(study.ask(), [sys.executable, script], tmp_path, "eval/return_mean", args, True)
    assert time.monotonic() - start_time < 90


def test_failed_trial_is_reported_and_the_search_goes_on(search):
    code, lines, errors = search("--trials", "2", "--total-timesteps", "8192", *NAN)
    assert [line.split()[2] for line in lines] == ["failed,", "failed,"]
    assert "is NaN or infinite" in lines[0]
    assert code == 1
    assert errors == "optuna_sweep.py: error: no trial was completed\n"


WRONG_FLAGS = {
    "--learning-rate 1": "--learning-rate 1.0: not among the values of",
    "--num-minibatches 7": "--num-minibatches 7: ",
    "--env-id NoSuch-v0": "--env-id NoSuch-v0",
    "--trials 0": "--trials 0: must be 1 or more",
    "--storage nosuch://x": "--storage nosuch://x: ",
    "--storage sqlite:///no/such.db": "--storage sqlite:///no/such.db: ",
}


def test_search_refuses_wrong_flags(optuna_sweep, capsys):
    for flags, message in WRONG_FLAGS.items():
        name, value = flags.split()
        options = optuna_sweep.Options(str(SWEEPS / "ppo.yaml"), storage="nosuch://y")  # so that no search starts
        if name in ("--trials", "--storage"):
            setattr(options, name[2:], int(value) if value.isdigit() else value)
        with pytest.raises(SystemExit) as stop:
            optuna_sweep.main(options, [] if name in ("--trials", "--storage") else [name, value])
        output, errors = capsys.readouterr()
        assert (stop.value.code, output) == (2, ""), flags
        assert message in errors
        assert errors.count("\n") == 1
    assert not Path("runs").exists()
    assert not Path("optuna.db").exists()


def test_search_refuses_unknown_flags(search):
    code, lines, errors = search("--lerning-rate", "1")
    assert (code, lines) == (2, [])
    assert "Perhaps you meant" in errors


BAD_FILES = {
    ("program: ppo.py", "program: no.py"): "there is no no.py in this folder",
    ("program: ppo.py", ""): "not a sweep file: KeyError('program')",
    ("goal: maximize", "goal: max"): "goal max: neither maximize nor minimize",
    ("distribution: uniform", "distribution: beta"): "ent_coef: distribution beta is none of",
    ("  clip_coef:", "  clip-coef:"): "clip-coef is no flag of ppo.py",
}


def test_search_refuses_a_bad_file(optuna_sweep, capsys):
    text = (SWEEPS / "ppo.yaml").read_text(encoding="utf-8")
    for (old, new), message in BAD_FILES.items():
        assert old in text
        Path("bad.yaml").write_text(text.replace(old, new))
        with pytest.raises(SystemExit) as stop:
            optuna_sweep.read_sweep("bad.yaml")
        errors = capsys.readouterr().err
        assert stop.value.code == 2
        assert errors.startswith("optuna_sweep.py: error: bad.yaml: ")
        assert errors.count("\n") == 1
        assert message in errors
