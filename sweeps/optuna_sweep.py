"""Tune a script with Optuna, from the sweep file that wandb takes, without an account.

    pip install "optuna>=5,<6"
    python sweeps/optuna_sweep.py sweeps/ppo.yaml
    python sweeps/optuna_sweep.py sweeps/ppo.yaml --trials 30 --env-id CartPole-v1 --total-timesteps 1e5

The sweep file comes first; flags that are not this program's (--help) go to the script. A trial is a run of the script
in a folder of its own under runs/. The first takes the script's defaults, or what you give for them: that is what the
others have to beat. What they take is chosen by Optuna's TPE, whatever `method` the file names. After five of them, a
trial whose best evaluation so far is below the median of the others at that point of the run is stopped.

The study is in a database: the same command in a second terminal works on it too, and started again goes on with it.
Other machines need a database server (`--storage postgresql://...`), as SQLite's file must not be shared by them.
One seed says little, and the best of many trials was lucky too: run what is found with a few seeds of its own.
"""

import importlib
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import optuna
import tyro
import yaml
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


@dataclass
class Options:
    """The flags of the search; all others go to the script."""

    sweep: tyro.conf.Positional[str]  # sweep file, as of wandb
    trials: int = 50  # trials to run now
    prune: bool = True  # stop trials that fall behind
    study: str | None = None  # name of the study in the database; by default script, environment and steps
    storage: str = "sqlite:///optuna.db"  # address of the database
    sampler_seed: int | None = None  # seed of the search, for a study of one process


def refuse(message: str):
    """End the program for bad input: one line on stderr, exit code 2."""
    print(f"optuna_sweep.py: error: {message}", file=sys.stderr)
    sys.exit(2)


def read(path: str) -> tuple:
    """The script as a module, the metric, its goal, the fixed flags and the distributions of the others."""
    try:
        sweep = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        script, metric, goal = Path(sweep["program"]).stem, sweep["metric"]["name"], sweep["metric"]["goal"]
        if goal not in ("maximize", "minimize"):
            refuse(f"{path}: goal {goal}: neither maximize nor minimize")
        if not Path(f"{script}.py").is_file():
            refuse(f"{path}: there is no {script}.py in this folder")
        module, fixed, searched = importlib.import_module(script), {}, {}
        for name, entry in sweep["parameters"].items():
            kind = entry.get("distribution", "int_uniform" if type(entry.get("min")) is int else "uniform")
            if not hasattr(module.Args, name):
                refuse(f"{path}: {name} is no flag of {script}.py")
            elif "value" in entry:
                fixed[name] = entry["value"]
            elif "values" in entry:
                searched[name] = CategoricalDistribution(entry["values"])
            elif kind == "int_uniform":
                searched[name] = IntDistribution(entry["min"], entry["max"])
            elif kind in ("uniform", "log_uniform_values"):
                searched[name] = FloatDistribution(entry["min"], entry["max"], log=kind != "uniform")
            else:
                refuse(f"{path}: {name}: distribution {kind} is none of uniform, int_uniform, log_uniform_values")
        return module, metric, goal, fixed, searched
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError, AttributeError) as error:
        refuse(f"{path}: no sweep file: {error!r}")


def start_of(args, searched: dict, given: set, path: str) -> dict:
    """The values that the first trial takes, as far as the sweep file allows them; those `given` have to be allowed."""
    start = {}
    for name, distribution in searched.items():
        value, choices = getattr(args, name), getattr(distribution, "choices", None)
        if value in choices if choices else value is not None and distribution.low <= value <= distribution.high:
            start[name] = value
        elif name in given:
            refuse(f"--{name.replace('_', '-')} {value}: not among the values of {path}")
    return start


def open_study(options: Options, name: str, goal: str, search: list) -> optuna.Study:
    """The study of this name in the database, made if it is not there. `search` is what is searched, and has to be
    the same for all that work on it."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    sampler = optuna.samplers.TPESampler(seed=options.sampler_seed, constant_liar=True)  # there may be other processes
    pruner = optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=1)
    settings = {"direction": goal, "sampler": sampler, "pruner": pruner, "load_if_exists": True}
    try:
        study = optuna.create_study(study_name=name, storage=options.storage, **settings)
    except Exception as error:  # every database raises its own
        refuse(f"--storage {options.storage}: {str(error).partition(chr(10))[0]}")
    if study.user_attrs.get("search", search) != search:
        refuse(f"--study {name}: is one of other flags or of another sweep file; take another name")
    study.set_user_attr("search", search)
    return study


def run_trial(trial, command: list[str], folder: Path, metric: str, args, prune: bool) -> float:
    """Run the script in `folder`, report the metric as it is logged, and return its last value.

    Raises optuna.TrialPruned where it is not worth going on, and RuntimeError where the script fails.
    """
    seen, progress, events = [], -1, None
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log)
    try:
        ended = False
        while not ended:
            time.sleep(0.5)
            ended = process.poll() is not None  # looked up first: what is read then is all there is
            if events is None and (found := list(folder.glob("runs/*/events.*"))):
                events = EventAccumulator(str(found[0].parent))
            if events and metric in events.Reload().Tags()["scalars"]:
                new = events.Scalars(metric)[len(seen) :]
                for event in new:  # counted in checkpoints, which come at slightly different steps in other trials
                    before, progress = progress, round(args.num_checkpoints * event.step / args.total_timesteps)
                    if progress > before:
                        trial.report(event.value, progress)
                seen += new
                if prune and new and progress < args.num_checkpoints and trial.should_prune():
                    raise optuna.TrialPruned(f"at {seen[-1].value:.2f} after {seen[-1].step} steps")
    finally:
        process.terminate()
        process.wait()
    if process.returncode:
        lines = (folder / "log").read_text(errors="replace").strip().splitlines()
        raise RuntimeError(f"exit code {process.returncode}, {lines[-1] if lines else 'no output'} ({folder})")
    if not seen:
        raise RuntimeError(f"{metric} is never logged ({folder})")
    return seen[-1].value


def main(options: Options, flags: list[str]):
    """Run the trials and print the best flags; `flags` are the script's."""
    module, metric, goal, fixed, searched = read(options.sweep)
    given = {word[2:].partition("=")[0].replace("-", "_").removeprefix("no_") for word in flags if word[:2] == "--"}
    fixed = {name: value for name, value in fixed.items() if name not in given | {"track"}}
    new_seeds = searched.pop("seed", None) and "seed" not in given
    words = [f"--{name}={value}" for name, value in fixed.items()] + flags
    args = module.parse_args(words)  # refuses what is wrong with them
    start = start_of(args, searched, given, options.sweep)
    if options.trials < 1:
        refuse(f"--trials {options.trials}: must be > 0")
    if args.resume:
        refuse("--resume: a trial is a run from the start")
    module.open_envs(args, 1).close()

    name = options.study or re.sub("[/:]", "-", f"{module.__name__}-{args.env_id}-{args.total_timesteps}")
    study = open_study(options, name, goal, [words, metric, goal, *map(repr, searched.items())])
    started = [TrialState.WAITING, TrialState.RUNNING, TrialState.COMPLETE]
    if not any(trial.user_attrs.get("first") for trial in study.get_trials(states=started)):
        study.enqueue_trial(start, user_attrs={"first": True})
    folder = Path("runs", name)
    folder.mkdir(parents=True, exist_ok=True)

    def flags_of(trial) -> list[str]:
        """The script's flags with the values of a trial, which win as they come last."""
        seed = {"seed": trial.number + 1} if new_seeds else {}
        return words + [f"--{name}={value}" for name, value in (trial.params | seed).items()]

    try:
        for _ in range(options.trials):
            trial, value, state = study.ask(searched), None, TrialState.FAIL
            try:
                place = Path(tempfile.mkdtemp(prefix=f"trial-{trial.number}-", dir=folder))
                command = [sys.executable, module.__file__, *flags_of(trial)]
                value = run_trial(trial, command, place, metric, args, options.prune)
                state, outcome = TrialState.COMPLETE, f"{value:.2f}"
            except optuna.TrialPruned as pruned:
                state, outcome = TrialState.PRUNED, f"stopped {pruned}"
            except RuntimeError as error:
                outcome = f"failed, {error}"
            finally:
                study.tell(trial, value, state)
            print(f"trial {trial.number}: {outcome}:", *(f"{k}={v}" for k, v in trial.params.items()), flush=True)
    finally:  # also when it is interrupted
        if study.get_trials(states=[TrialState.COMPLETE]):
            best, defaults = asdict(module.parse_args(flags_of(study.best_trial))), asdict(module.Args())
            changed = [f"--{name.replace('_', '-')}={best[name]}" for name in best if best[name] != defaults[name]]
            print(f"best: {study.best_value:.2f}, trial {study.best_trial.number} of {len(study.trials)}")
            print(f"python {module.__name__}.py {shlex.join(changed)}")
    if not study.get_trials(states=[TrialState.COMPLETE]):
        sys.exit("optuna_sweep.py: error: no trial came to its end")


if __name__ == "__main__":
    sys.path.insert(0, os.getcwd())  # where the scripts are
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        main(*tyro.cli(Options, description=__doc__.partition("\n")[0], return_unknown_args=True))
    except KeyboardInterrupt:
        sys.exit(130)
