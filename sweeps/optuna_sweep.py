"""Search for better flags of a script with Optuna. It reads wandb's sweep files and needs no account.

    pip install "optuna>=5,<6"
    python sweeps/optuna_sweep.py sweeps/ppo.yaml
    python sweeps/optuna_sweep.py sweeps/ppo.yaml --trials 30 --env-id CartPole-v1 --total-timesteps 100_000

The sweep file comes first. Flags that this program does not have go to the script. A trial is one run of the script, in
a folder of its own under runs/. The first trial takes the script's defaults and the flags that you give; its score is
the one to beat. Optuna's TPE sampler chooses the values of the other trials, whatever `method` the file names. Once
five trials are complete, a trial is stopped if its best evaluation is below the median of the others at that step.

The study is stored in a database. The same command continues it, and in a second terminal it runs trials at the same
time. Several machines need a database server (`--storage postgresql://...`), because they cannot share an SQLite file.

One seed says little, and the best of many trials was also lucky: run the best flags again with other seeds.
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
    """Flags of the search; all others go to the script."""

    sweep: tyro.conf.Positional[str]  # sweep file in wandb's format
    trials: int = 50  # number of trials to run now
    prune: bool = True  # stop trials that fall behind
    study: str | None = None  # name of the study in the database; by default script, environment and steps
    storage: str = "sqlite:///optuna.db"  # address of the database
    sampler_seed: int | None = None  # seed of the search, to repeat a study of one process


def fail(message):
    """End the program because of bad input: one line on stderr, exit code 2."""
    print(f"optuna_sweep.py: error: {str(message).splitlines()[0]}", file=sys.stderr)
    sys.exit(2)


def read_sweep(path: str) -> tuple:
    """The script as a module, the metric, its goal, the fixed flags, and the distributions of the searched flags."""
    fixed = {}
    searched = {}
    try:
        sweep = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        script = Path(sweep["program"]).stem
        metric = sweep["metric"]["name"]
        goal = sweep["metric"]["goal"]
        if goal not in ("maximize", "minimize"):
            fail(f"{path}: goal {goal}: neither maximize nor minimize")
        if not Path(f"{script}.py").is_file():
            fail(f"{path}: there is no {script}.py in this folder")
        module = importlib.import_module(script)
        for name, entry in sweep["parameters"].items():
            kind = entry.get("distribution", "int_uniform" if type(entry.get("min")) is int else "uniform")
            if not hasattr(module.Args, name):
                fail(f"{path}: {name} is no flag of {script}.py")
            elif "value" in entry:
                fixed[name] = entry["value"]
            elif "values" in entry:
                searched[name] = CategoricalDistribution(entry["values"])
            elif kind == "int_uniform":
                searched[name] = IntDistribution(entry["min"], entry["max"])
            elif kind in ("uniform", "log_uniform_values"):
                searched[name] = FloatDistribution(entry["min"], entry["max"], log=kind == "log_uniform_values")
            else:
                fail(f"{path}: {name}: distribution {kind} is none of uniform, int_uniform, log_uniform_values")
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError, AttributeError) as error:
        fail(f"{path}: not a sweep file: {error!r}")
    return module, metric, goal, fixed, searched


def first_values(args, searched: dict, given: set, path: str) -> dict:
    """The values of the first trial: those of `args`. Optuna chooses where the sweep file does not have such a value,
    unless the flag was given: that ends the program."""
    values = {}
    for name, distribution in searched.items():
        value = getattr(args, name)
        if isinstance(distribution, CategoricalDistribution):
            allowed = value in distribution.choices
        else:
            allowed = value is not None and distribution.low <= value <= distribution.high
        if allowed:
            values[name] = value
        elif name in given:
            fail(f"--{name.replace('_', '-')} {value}: not among the values of {path}")
    return values


def open_study(options: Options, name: str, goal: str, search: list) -> optuna.Study:
    """The study called `name`, new or from the database. `search` says what is searched; it must not have changed."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    settings = {
        "sampler": optuna.samplers.TPESampler(seed=options.sampler_seed, constant_liar=True),  # for parallel trials
        "pruner": optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=1),
    }
    try:
        study = optuna.create_study(
            study_name=name, storage=options.storage, direction=goal, load_if_exists=True, **settings
        )
    except Exception as error:  # each database raises its own
        fail(f"--storage {options.storage}: {error}")
    if study.user_attrs.get("search", search) != search:
        fail(f"--study {name}: it has other flags or another sweep file; choose another name")
    study.set_user_attr("search", search)
    return study


def run_trial(trial, command: list[str], folder: Path, metric: str, args, prune: bool) -> float:
    """Run the script in `folder`, report each value of the metric to Optuna, and return the last one.

    Raises optuna.TrialPruned if the trial falls behind, and RuntimeError if the script fails.
    """
    events = None
    seen = []
    checkpoint = -1
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log)
    try:
        running = True
        while running:
            time.sleep(0.5)
            running = process.poll() is None  # asked before reading, so that the last pass reads everything
            if events is None and (found := list(folder.glob("runs/*/events.*"))):
                events = EventAccumulator(str(found[0].parent))
            if events is None or metric not in events.Reload().Tags()["scalars"]:
                continue
            new = events.Scalars(metric)[len(seen) :]
            seen += new
            for event in new:  # at a checkpoint, whose number is the same in all trials; its step may differ a little
                last, checkpoint = checkpoint, args.num_checkpoints * event.step // args.total_timesteps
                if checkpoint > last:
                    trial.report(event.value, checkpoint)
            if prune and new and checkpoint < args.num_checkpoints and trial.should_prune():
                raise optuna.TrialPruned(f"at {seen[-1].value:.2f} after {seen[-1].step} steps")
    finally:
        process.terminate()  # SIGTERM; nothing happens if the script has ended
        process.wait()
    if process.returncode:
        lines = (folder / "log").read_text(errors="replace").splitlines()
        errors = [line for line in lines if "error" in line.lower()] or ["no error message"]
        raise RuntimeError(f"exit code {process.returncode}, {errors[-1].strip()} ({folder})")
    if not seen:
        raise RuntimeError(f"{metric} was never logged ({folder})")
    return seen[-1].value


def print_best(study: optuna.Study, module, words: list[str]):
    """Print the best trial, and the command that runs the script with its flags."""
    best = asdict(module.parse_args(words))
    defaults = asdict(module.Args())
    changed = [f"--{name.replace('_', '-')}={best[name]}" for name in best if best[name] != defaults[name]]
    print(f"best: {study.best_value:.2f}, trial {study.best_trial.number} of {len(study.trials)}")
    print(f"python {module.__name__}.py {shlex.join(changed)}")


def main(options: Options, flags: list[str]):
    """Run the trials and print the best one; `flags` are the script's."""
    module, metric, goal, fixed, searched = read_sweep(options.sweep)
    given = {word[2:].partition("=")[0].replace("-", "_").removeprefix("no_") for word in flags if word[:2] == "--"}
    words = [f"--{name}={value}" for name, value in fixed.items() if name not in given | {"track"}] + flags
    new_seeds = searched.pop("seed", None) is not None and "seed" not in given
    args = module.parse_args(words)  # ends the program if they are wrong
    first = first_values(args, searched, given, options.sweep)
    if options.trials < 1:
        fail(f"--trials {options.trials}: must be 1 or more")
    if args.resume:
        fail("--resume: a trial is a new run")
    module.open_envs(args, 1).close()

    name = options.study or re.sub("[/:]", "-", f"{module.__name__}-{args.env_id}-{args.total_timesteps}")
    study = open_study(options, name, goal, [words, metric, goal, *map(repr, searched.items())])
    alive = [TrialState.WAITING, TrialState.RUNNING, TrialState.COMPLETE]
    if not any(trial.user_attrs.get("first") for trial in study.get_trials(states=alive)):
        study.enqueue_trial(first, user_attrs={"first": True})
    folder = Path("runs", name)
    folder.mkdir(parents=True, exist_ok=True)

    def words_of(trial) -> list[str]:
        """The script's flags in a trial. The trial's values come last, so they win."""
        seed = {"seed": trial.number + 1} if new_seeds else {}
        return words + [f"--{name}={value}" for name, value in (trial.params | seed).items()]

    try:
        for _ in range(options.trials):
            trial = study.ask(searched)
            trial_folder = Path(tempfile.mkdtemp(prefix=f"trial-{trial.number}-", dir=folder))
            command = [sys.executable, module.__file__, *words_of(trial)]
            value = None
            state = TrialState.FAIL
            try:
                value = run_trial(trial, command, trial_folder, metric, args, options.prune)
                state = TrialState.COMPLETE
                outcome = f"{value:.2f}"
            except optuna.TrialPruned as pruned:
                state = TrialState.PRUNED
                outcome = f"stopped {pruned}"
            except RuntimeError as error:
                outcome = f"failed, {error}"
            finally:  # Ctrl-C and SIGTERM come here, too
                study.tell(trial, value, state)
            print(f"trial {trial.number}: {outcome}:", *(f"{k}={v}" for k, v in trial.params.items()), flush=True)
    finally:
        complete = study.get_trials(states=[TrialState.COMPLETE])
        if complete:
            print_best(study, module, words_of(study.best_trial))
    if not complete:
        sys.exit("optuna_sweep.py: error: no trial was completed")


if __name__ == "__main__":
    sys.path.insert(0, os.getcwd())  # where the scripts are
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        main(*tyro.cli(Options, description=__doc__.partition("\n")[0], return_unknown_args=True))
    except KeyboardInterrupt:
        sys.exit(130)
