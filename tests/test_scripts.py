"""What holds for every script. A new script joins by existing; a pair of scripts by a line in PAIRS."""

import ast
import copy
import csv
import dataclasses
import importlib
import io
import json
import random
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tokenize
from itertools import combinations
from pathlib import Path

import gymnasium as gym
import imageio.v3 as imageio
import numpy as np
import pytest
import torch
from conftest import ROOT
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from wandb_log import read_wandb

# Bounds of physical and code lines (no blanks, comments, docstrings), a quick way to run each script (with 4 iterations
# or more), and the steps with which it takes a few seconds.
PIXELS = """--env-id BreakoutNoFrameskip-v4 --env-kwargs '{"max_num_frames_per_episode": 80}' --num-threads 1"""
DQN = "--total-timesteps 512 --num-envs 2 --buffer-size 200 --learning-starts 32 --batch-size 4 --train-frequency 16 "
DQN += "--target-network-frequency 64 --log-interval 100 --save-replay"
SCRIPTS = {
    "q_learning": (502, 353, "--total-timesteps 400 --num-steps 50", "2e5"),
    "reinforce": (579, 400, "--total-timesteps 400 --num-envs 2", "4e4"),
    "a2c_continuous": (
        *(630, 440, "--env-id LunarLanderContinuous-v3 --total-timesteps 1024 --num-envs 2 --log-interval 3"),
        "12800",
    ),
    "ppo": (
        *(666, 470, "--env-id CartPole-v1 --total-timesteps 256 --num-envs 2 --num-steps 16 --num-minibatches 2"),
        "12800",
    ),
    "ppo_atari": (
        *(659, 462, f"{PIXELS} --total-timesteps 512 --num-envs 2 --num-steps 16 --num-minibatches 2"),
        "4096",
    ),
    "ppo_atari_multigpu": (
        *(726, 512, f"{PIXELS} --total-timesteps 512 --num-envs 2 --num-steps 16 --num-minibatches 2"),
        "4096",
    ),
    "dqn_atari": (690, 486, f"{PIXELS} {DQN}", "4096"),
    "ddqn_atari": (694, 487, f"{PIXELS} {DQN}", "4096"),
}
SCRIPTS = {name: value for name, value in SCRIPTS.items() if (ROOT / f"{name}.py").exists()}
MEANT_TO_VARY = {"Args", "Agent", "make_envs", "train"}
PAIRS = {  # (script, script): the top-level names in which the two differ, and no others
    ("ppo", "ppo_atari"): {"Args", "Agent", "make_envs"},
    ("ppo_atari", "ppo_atari_multigpu"): {"Args", "train"},
    ("dqn_atari", "ddqn_atari"): {"td_target"},
}
SHARED_ARGS = "env_id env_kwargs seed total_timesteps device num_threads num_checkpoints eval_episodes"
SHARED_ARGS += " eval_deterministic max_eval_steps capture_video track wandb_project_name wandb_entity resume"
SECTIONS = ["config", "environment", "network", "algorithm", "training", "plumbing: the same text in every script"]

PROGRAMS = {**SCRIPTS, "push_to_hub": (426, 331)}

METRIC_GROUPS = ("episode/", "loss/", "train/", "time/", "eval/")

every_script = pytest.mark.parametrize("name", SCRIPTS)
every_program = pytest.mark.parametrize("name", PROGRAMS)


def source(name):
    return (ROOT / f"{name}.py").read_text(encoding="utf-8")


def definitions(name):
    """Source text of each top-level function, class and constant, with its decorators and comments."""
    text = source(name)
    lines, texts = text.splitlines(), {}
    for node in ast.parse(text).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            start = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            texts[node.name] = "\n".join(lines[start - 1 : node.end_lineno])
        elif isinstance(node, ast.Assign):
            texts[ast.unparse(node.targets[0])] = "\n".join(lines[node.lineno - 1 : node.end_lineno])
    return texts


def flags_of(name):
    return shlex.split(SCRIPTS[name][2]) + ["--eval-episodes", "10", "--num-checkpoints", "2"]


def run(name, *flags):
    module = importlib.import_module(name)
    return module.train(module.parse_args([*flags_of(name), *flags]))


# --- the text ---


@every_script
def test_every_script_is_listed(name):
    programs = {path.stem for path in ROOT.glob("*.py") if "class Agent(" in path.read_text(encoding="utf-8")}
    assert programs == set(SCRIPTS)


@every_script
def test_sections_come_in_order(name):
    assert re.findall(r"^# --- (.*) ---$", source(name), re.MULTILINE) == SECTIONS
    order = list(definitions(name))
    landmarks = ["Args", "make_envs", "Agent", "train", "refuse", "Run"]
    assert sorted(landmarks, key=order.index) == landmarks
    assert ast.get_docstring(ast.parse(source(name)))
    main = ast.parse(source(name)).body[-1]
    assert ast.unparse(main.test) == "__name__ == '__main__'"
    assert main.end_lineno - main.lineno < 5


def count_code_lines(text):
    docstrings = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node):
            docstrings.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    layout = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    tokens = [token for token in tokenize.generate_tokens(io.StringIO(text).readline) if token.type not in layout]
    return len({line for token in tokens for line in range(token.start[0], token.end[0] + 1)} - docstrings)


@every_program
def test_line_budget(name):
    max_lines, max_code = PROGRAMS[name][:2]
    text = source(name)
    assert text.count("\n") <= max_lines
    assert count_code_lines(text) <= max_code
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 80, node.name


def test_line_counter():
    text = '"""Doc."""\n\n# comment\nx = """a\nb"""\n\ndef f():\n    """Doc\n    doc."""\n    return 1\n'
    assert count_code_lines(text) == 4


@every_program
def test_public_definitions_have_docstrings(name):
    for node in ast.walk(ast.parse(source(name))):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            assert node.name == "forward" or ast.get_docstring(node), node.name


@every_script
def test_formulas_cite_papers_that_the_docstring_lists(name):
    docstring = ast.get_docstring(ast.parse(source(name)))
    body = source(name).replace(docstring, "")
    tags = set(re.findall(r"# \[(\w+)[,\]]", body))
    assert tags
    assert tags <= set(re.findall(r"^ +\[(\w+)\]", docstring, re.MULTILINE))


@every_script
def test_a_script_imports_no_file_of_this_repository(name):
    local = {path.stem for path in ROOT.glob("*.py")}
    for node in ast.walk(ast.parse(source(name))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        assert not {module.partition(".")[0] for module in names} & local


@pytest.mark.parametrize(("first", "second"), list(combinations(PROGRAMS, 2)))
def test_the_same_name_means_the_same_text(first, second):
    ours, theirs = definitions(first), definitions(second)
    varies = PAIRS.get((first, second), MEANT_TO_VARY)
    different = {name for name in ours.keys() & theirs.keys() if ours[name] != theirs[name]}
    assert different <= varies
    if (first, second) in PAIRS:
        assert different == varies


@every_program
def test_no_leftovers(name):
    assert not re.search(r"TODO|FIXME|XXX|TRY NOT TO MODIFY|\bb_|\bmb_|lastgaelam|thunk", source(name))


# --- the command line ---


@every_script
def test_shared_flags_come_first_and_every_flag_has_help(name):
    fields = dataclasses.fields(importlib.import_module(name).Args)
    assert [field.name for field in fields][: len(SHARED_ARGS.split())] == SHARED_ARGS.split()
    lines = definitions(name)["Args"].splitlines()
    for field in fields:
        (line,) = (line for line in lines if re.match(rf"    {field.name}: ", line))
        assert re.search(r"  # \S.{5,}", line), line


@pytest.mark.parametrize(("first", "second"), list(combinations(SCRIPTS, 2)))
def test_shared_flags_have_the_same_type_and_help(first, second):
    for flag in SHARED_ARGS.split():
        lines = [re.search(rf"    {flag}: (.*) = .*  # (.*)", source(script)).groups() for script in (first, second)]
        assert lines[0] == lines[1]


@every_script
def test_help_names_every_flag_and_imports_nothing_slow(name):
    code = f"import sys, {name}\ntry: {name}.parse_args(['--help'])\nexcept SystemExit: pass\n"
    code += "print(sorted({'wandb', 'imageio', 'moviepy', 'matplotlib', 'huggingface_hub'} & set(sys.modules)))"
    output = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert output.splitlines()[-1] == "[]"
    for field in dataclasses.fields(importlib.import_module(name).Args):
        assert f"--{field.name.replace('_', '-')}" in output


@every_script
def test_importing_has_no_side_effect(name, tmp_path):
    code = "import random, warnings, signal, numpy, torch\n"
    code += "state = lambda: (random.getstate(), str(numpy.random.get_state()), torch.get_rng_state().tolist(), "
    code += "torch.get_num_threads(), signal.getsignal(signal.SIGTERM), torch.get_default_dtype())\n"
    code += f"before = state()\nimport {name}\nassert state() == before\n"
    flags = [sys.executable, "-c", f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{code}"]
    result = subprocess.run(flags, cwd=tmp_path, capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


@every_script
def test_flags_as_people_and_wandb_write_them(name):
    module = importlib.import_module(name)
    for field in dataclasses.fields(module.Args):
        if field.type is bool:
            dashed, underscored = field.name.replace("_", "-"), field.name
            for value in ("True", "true", "1"):
                assert getattr(module.parse_args([f"--{underscored}={value}"]), field.name) is True
            for flag in (f"--{underscored}=False", f"--{dashed}=false", f"--{dashed}=0", f"--no-{dashed}"):
                assert getattr(module.parse_args([flag]), field.name) is False
    assert module.parse_args(["--total-timesteps", "1e6"]).total_timesteps == 1_000_000
    assert module.parse_args(["--total_timesteps=2.5e6"]).total_timesteps == 2_500_000
    assert module.parse_args(["--learning_rate=0.0001", "--seed=3"]).seed == 3
    assert module.parse_args(["--env-kwargs", '{"a": "x=1"}']).env_kwargs == '{"a": "x=1"}'


def readme_commands():
    """Every command of the README's shell blocks, continued lines joined, comments dropped."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```(?:bash|sh)\n(.*?)```", text, re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


def docstring_commands():
    text = "\n".join(ast.get_docstring(ast.parse(source(name)), clean=False) for name in SCRIPTS)
    return re.findall(r"^    (python .*)$", text.replace("\\\n", " "), re.MULTILINE)


def test_commands_in_the_readme_and_the_docstrings_parse():
    tested = set()
    for command in readme_commands() + docstring_commands():
        for part in re.split(r"&&|\|", command):
            words = shlex.split(part, comments=True)
            if words and words[0] == "torchrun":
                (script,) = (i for i, word in enumerate(words) if word.endswith(".py"))
                words = ["python", *words[script:]]
            if words and words[0] == "python" and words[1].removesuffix(".py") in SCRIPTS:
                name = words[1].removesuffix(".py")
                if "--help" not in words and "--resume" not in words:
                    importlib.import_module(name).parse_args(words[2:])
                tested.add(name)
            elif words and words[0] == "python" and words[1] != "-m":
                assert (ROOT / words[1]).exists(), part
    assert tested == set(SCRIPTS)


def test_the_readmes_own_environment_is_learned(in_empty_folder):
    """As the README says it: the file beside the script, and its command."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    file, code = re.search(r"This is `(\w+\.py)`.*?```python\n(.*?)```", text, re.DOTALL).groups()
    (in_empty_folder / file).write_text(code, encoding="utf-8")
    shutil.copy(ROOT / "ppo.py", in_empty_folder)
    assert len(code.splitlines()) <= 30
    (command,) = (line for line in readme_commands() if f"{Path(file).stem}:" in line)
    process = subprocess.run([sys.executable, *shlex.split(command)[1:]], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    (folder,) = Path("runs").iterdir()
    length = json.loads(json.loads((folder / "config.json").read_text())["env_kwargs"])["length"]
    assert mean_reward(folder) == -length  # every step towards the goal


def test_the_readmes_wrapped_environment_is_learned(in_empty_folder):
    pytest.importorskip("minigrid")
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    code = re.search(r"This is `grid.py`.*?```python\n(.*?)```", text, re.DOTALL)[1]
    (in_empty_folder / "grid.py").write_text(code, encoding="utf-8")
    shutil.copy(ROOT / "ppo.py", in_empty_folder)
    (command,) = (line for line in readme_commands() if "grid:" in line)
    subprocess.run([sys.executable, *shlex.split(command)[1:]], check=True, capture_output=True)
    (folder,) = Path("runs").iterdir()
    assert mean_reward(folder) > 0.9  # of at most 0.96, for the shortest way


# --- a run ---


def load(folder):
    return torch.load(Path(folder) / "checkpoint.pt", weights_only=True)


def tensors(value):
    """All tensors in a checkpoint, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    values = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else []
    return [tensor for v in values for tensor in tensors(v)]


def assert_same_run(folder, expected):
    """The same weights, optimizer, episodes and final score, to the last bit."""
    ours, theirs = load(folder), load(expected)
    assert ours["step"] == theirs["step"]
    assert len(tensors(ours)) == len(tensors(theirs)) > 0
    assert all(torch.equal(a, b) for a, b in zip(tensors(ours), tensors(theirs)))
    assert (folder / "episodes.csv").read_text() == (expected / "episodes.csv").read_text()
    assert mean_reward(folder) == mean_reward(expected)


def mean_reward(folder):
    return json.loads((folder / "results.json").read_text())["mean_reward"]


def read_events(folder):
    return EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()


def scalars(folder, name):
    return read_events(folder).Scalars(name)


class Float64Watch(TorchDispatchMode):
    """Keeps the names of the operations that take or give float64."""

    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_dispatch__(self, operation, types, inputs=(), options=None):
        result = operation(*inputs, **(options or {}))
        tensors = [x for x in tree_leaves((inputs, options, result)) if isinstance(x, torch.Tensor)]
        if any(tensor.dtype == torch.float64 for tensor in tensors):
            self.found.add(str(operation))
        return result


@every_script
def test_no_float64_which_apples_gpus_do_not_have(name):
    module = importlib.import_module(name)
    with Float64Watch() as watch:
        module.train(module.parse_args(flags_of(name)))
    assert not watch.found
    with Float64Watch() as watch:
        torch.ones(2, dtype=torch.float64)
    assert watch.found


@pytest.mark.parametrize("name", [name for name in SCRIPTS if "Breakout" in SCRIPTS[name][2]])
@pytest.mark.parametrize("gpu", [None, False, True])
@pytest.mark.parametrize("cpu", [False, True])
def test_bfloat16_is_on_where_the_hardware_has_it(name, gpu, cpu, monkeypatch):
    """The processor counts only where there is no GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu is not None)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or gpu)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": cpu})
    defaults = runpy.run_path(str(ROOT / f"{name}.py"), run_name=name)["Args"]()
    assert defaults.bfloat16 == (cpu if gpu is None else gpu)


@every_script
def test_run_folder_has_what_it_promises(name):
    folder = run(name)
    env_name = importlib.import_module(name).parse_args(flags_of(name)).env_id.replace("/", "-").replace(":", "-")
    assert folder.parent == Path("runs")
    assert folder.name.startswith(f"{env_name}__{name}__1__")
    assert (folder / f"{name}.py").read_text() == (ROOT / f"{name}.py").read_text()
    config = json.loads((folder / "config.json").read_text())
    assert {"env_id", "python", "torch", "gymnasium", "ale-py", "device", "commit"} <= set(config)
    results = json.loads((folder / "results.json").read_text())
    keys = ["env_id", "mean_reward", "std_reward", "is_deterministic", "n_eval_episodes", "eval_datetime"]
    assert list(results) == keys
    assert results["n_eval_episodes"] == 10
    assert not list(folder.glob("*.tmp"))
    assert list(folder.glob("events.out.tfevents.*"))


@every_script
def test_metrics_and_episodes_are_logged(name):
    folder = run(name, "--total-timesteps", "2000")
    events = read_events(folder)
    names = set(events.Tags()["scalars"])
    wanted = {"episode/return", "episode/length", "time/sps", "eval/return_mean", "eval/return_std"}
    assert wanted <= names
    allowed = "loss/policy loss/value loss/entropy loss/td train/approx_kl train/clip_fraction train/grad_norm "
    allowed += "train/explained_variance train/epsilon train/q_value train/learning_rate"
    assert names <= wanted | set(allowed.split())
    steps = [event.step for event in events.Scalars("eval/return_mean")]
    assert len(steps) == 3
    assert steps == sorted(set(steps))
    assert steps[0] == 0
    assert 900 <= steps[1] < steps[2] == load(folder)["step"]
    rows = list(csv.DictReader((folder / "episodes.csv").open()))
    assert len(rows) > 5
    assert sum(int(row["length"]) for row in rows) <= load(folder)["step"]
    logged = [event.value for event in events.Scalars("episode/length")]
    assert all(event.value > 20 for event in events.Scalars("time/sps"))  # steps, not seconds
    assert min(logged) >= min(int(row["length"]) for row in rows)
    assert max(logged) <= max(int(row["length"]) for row in rows)
    if len(logged) == len(rows):
        np.testing.assert_allclose(logged, [float(row["length"]) for row in rows])


@every_script
def test_loaded_agent_scores_what_training_printed(name, capsys):
    folder = run(name)
    checkpoint, module = load(folder), importlib.import_module(name)
    args = module.Args(**checkpoint["config"])
    agent = module.Agent(module.make_envs(args, 1), args)
    agent.load_state_dict(checkpoint["agent"])
    before = {key: tensor.clone() for key, tensor in agent.state_dict().items()}
    returns = module.evaluate(agent, args, 10, module.seed_everything(args.seed, checkpoint["step"], 1))
    assert returns.mean() == mean_reward(folder)
    assert f"{returns.mean():.2f} +/- {returns.std():.2f} over 10 episodes" in capsys.readouterr().out
    assert all(torch.equal(before[key], tensor) for key, tensor in agent.state_dict().items())


@every_script
def test_same_seed_same_run_other_seed_another(name):
    first = run(name)
    assert_same_run(run(name), first)
    other = tensors(load(run(name, "--seed", "2"))["agent"])
    assert not all(torch.equal(a, b) for a, b in zip(tensors(load(first)["agent"]), other))


@every_script
def test_the_seed_decides_the_first_weights(name, monkeypatch):
    module = importlib.import_module(name)
    saved, save = [], torch.save
    monkeypatch.setattr(torch, "save", lambda state, path: saved.append(copy.deepcopy(state)) or save(state, path))
    for seed in "112":
        run(name, "--seed", seed)
    first = [tensors(state["agent"]) for state in saved if state["step"] == 0]
    assert len(first) == 3
    assert all(torch.equal(a, b) for a, b in zip(*first[:2]))
    assert not all(torch.equal(a, b) for a, b in zip(*first[1:])) or module.__name__ == "q_learning"  # starts at zero


@every_script
def test_evaluation_does_not_change_training(name):
    expected = run(name)
    folder = run(name, "--eval-episodes", "30", "--capture-video")
    assert (folder / "episodes.csv").read_text() == (expected / "episodes.csv").read_text()
    assert all(torch.equal(a, b) for a, b in zip(*(tensors(load(f)["agent"]) for f in (folder, expected))))
    videos = sorted(int(path.stem.removeprefix("step-")) for path in folder.glob("*.mp4"))
    assert videos == [event.step for event in scalars(folder, "eval/return_mean")]
    frames = imageio.imread(folder / f"step-{videos[-1]}.mp4")
    assert len(frames) >= 2
    assert frames.std() > 5


@every_script
def test_every_cut_starts_other_episodes(name, monkeypatch):
    module = importlib.import_module(name)
    seeds = []
    seed_everything = module.seed_everything
    monkeypatch.setattr(
        module, "seed_everything", lambda *key: seeds.append((key, seed_everything(*key))) or seeds[-1][1]
    )
    run(name, "--num-checkpoints", "4")
    cuts = [seed for key, seed in seeds if len(key) == 3 and key[2] == 0]
    evaluations = [seed for key, seed in seeds if len(key) == 3 and key[2] == 1]
    assert len(set(cuts)) == len(cuts) == 4
    assert len(set(evaluations) - set(cuts)) == 5


# --- stopping and resuming ---


def wait_for_checkpoint(process):
    deadline = time.monotonic() + 60
    while not list(Path().glob("runs/*/checkpoint.pt")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return next(Path().glob("runs/*/checkpoint.pt")).parent


def long_flags(name):
    return ["--total-timesteps", SCRIPTS[name][3], "--num-checkpoints", "10"]


@every_script
def test_killed_and_resumed_is_the_uninterrupted_run(name, start):
    process = start(f"{name}.py", *flags_of(name), *long_flags(name))
    folder = wait_for_checkpoint(process)
    time.sleep(random.uniform(0, 1))
    process.kill()
    process.wait()
    assert not (folder / "results.json").exists()
    time.sleep(1)  # TensorBoard orders event files by the second
    module = importlib.import_module(name)
    module.train(module.parse_args(["--resume", str(folder)]))
    expected = run(name, *long_flags(name))
    assert_same_run(folder, expected)
    steps = [[event.step for event in scalars(f, "time/sps")] for f in (folder, expected)]
    assert steps[0] == steps[1]


@every_script
@pytest.mark.parametrize("stop_at", [0, 1, 2, 3])
def test_a_crash_between_any_two_files_loses_nothing(name, monkeypatch, stop_at):
    """The machine dies while the checkpoint is half written: the one before stays, and resuming repeats the rest."""
    save, calls = torch.save, []

    def die(state, path):
        calls.append(state["step"])
        if len(calls) == stop_at + 2:
            Path(path).write_bytes(b"half a file")
            raise OSError("disk full")
        save(state, path)

    monkeypatch.setattr(torch, "save", die)
    with pytest.raises(OSError, match="disk full"):
        run(name, "--num-checkpoints", "4")
    monkeypatch.setattr(torch, "save", save)
    folder = next(Path().glob("runs/*"))
    assert load(folder)["step"] == calls[stop_at]
    with open(folder / "episodes.csv", "ab") as file:
        file.write(b"99999,1.0,1\n888")  # rows after the checkpoint, the last one torn
    module = importlib.import_module(name)
    module.train(module.parse_args(["--resume", str(folder)]))
    assert_same_run(folder, run(name, "--num-checkpoints", "4"))


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@every_script
@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_says_how_to_resume(name, start, signum, code):
    process = start(f"{name}.py", *flags_of(name), "--total-timesteps", "1e8")
    folder = wait_for_checkpoint(process)
    time.sleep(0.5)
    process.send_signal(signum)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == code
    assert f"python {name}.py --resume {folder}" in stderr
    assert "Traceback" not in stderr


def test_ctrl_c_while_tensorboard_holds_its_lock(monkeypatch):
    """Its queue's lock is not released when Ctrl-C hits at the wrong moment: closing it would wait for ever."""
    module = importlib.import_module("ppo")

    def interrupted(self, *_):
        self.writer._get_file_writer().event_writer._async_writer._byte_queue.mutex.acquire()
        raise KeyboardInterrupt

    monkeypatch.setattr(module.Run, "record", interrupted)
    with pytest.raises(SystemExit) as stop:
        run("ppo")
    assert stop.value.code == 130


@every_script
def test_resume_a_finished_run_only_repeats_its_evaluation(name):
    folder = run(name)
    before = tensors(load(folder)), (folder / "episodes.csv").read_text(), mean_reward(folder)
    module = importlib.import_module(name)
    module.train(module.parse_args(["--resume", str(folder)]))
    assert all(torch.equal(a, b) for a, b in zip(tensors(load(folder)), before[0]))
    assert ((folder / "episodes.csv").read_text(), mean_reward(folder)) == before[1:]


@every_script
def test_resume_with_more_steps_goes_on(name):
    folder = run(name)
    end = load(folder)["step"]
    module = importlib.import_module(name)
    module.train(module.parse_args(["--resume", str(folder), "--total-timesteps", "4000", "--device", "cpu"]))
    checkpoint = load(folder)
    assert checkpoint["step"] > 3900
    assert checkpoint["config"]["total_timesteps"] == 4000
    steps = [int(row["step"]) for row in csv.DictReader((folder / "episodes.csv").open())]
    assert steps == sorted(steps)
    assert max(steps) > end


# --- bad input ---


class Evil:
    def __reduce__(self):
        return (open, ("evil.txt", "w"))


def bad_folders(name, parent):
    """Folders that --resume must refuse, and a good one."""
    folders = {kind: parent / kind for kind in ("empty", "truncated", "other", "evil", "list", "future")}
    for folder in folders.values():
        folder.mkdir()
    good = run(name) / "checkpoint.pt"
    checkpoint = load(good.parent)
    (folders["truncated"] / "checkpoint.pt").write_bytes(good.read_bytes()[:-1000])
    torch.save(checkpoint | {"script": "other.py"}, folders["other"] / "checkpoint.pt")
    torch.save(checkpoint | {"extra": Evil()}, folders["evil"] / "checkpoint.pt")
    torch.save([1, 2], folders["list"] / "checkpoint.pt")
    torch.save(checkpoint | {"config": {"new_flag": 1}}, folders["future"] / "checkpoint.pt")
    return folders | {"good": good.parent}


BAD_INPUT = {
    "--env-id Foo-v0": "doesn't exist",
    "--env-id no_such_package:Foo-v0": "pip install no_such_package",
    "--env-kwargs {": "--env-kwargs",
    "--env-kwargs [1]": "--env-kwargs",
    '--env-kwargs {"foo":1}': "unexpected keyword argument 'foo'",
    "--learning-rate -1": "--learning-rate -1.0: must be finite and > 0",
    "--learning-rate nan": "--learning-rate nan: must be finite and > 0",
    "--learning-rate inf": "--learning-rate inf: must be finite and > 0",
    "--gamma 1.1": "at most 1",
    "--seed -1": "--seed -1",
    "--num-checkpoints 0": "--num-checkpoints 0",
    "--eval-episodes 0": "--eval-episodes 0",
    "--total-timesteps 0": "--total-timesteps 0",
    "--device cuda:99": "--device cuda:99: not available",
    "--device gpu": "--device gpu: not available",
    "--resume empty": "holds no checkpoint.pt",
    "--resume missing": "holds no checkpoint.pt",
    "--resume truncated": "damaged",
    "--resume evil": "damaged",
    "--resume list": "damaged",
    "--resume future": "damaged",
    "--resume other": "a run of other.py",
    "--resume good --seed 7": "--seed 7: the run to resume has 1",
    "--resume good --total-timesteps 128": "--total-timesteps 128: the run to resume has",
    "--total-timesteps 1.2.3e5": None,
    "--no-such-flag 1": None,
    "--seed 1.5": None,
}


def assert_refused(name, bad_input, folder, capsys, folders=()):
    """One line on stderr and exit code 2 for each of `bad_input`, and nothing written in `folder`."""
    module = importlib.import_module(name)
    before = sorted(folder.rglob("*"))
    capsys.readouterr()
    for flags, message in bad_input.items():
        words = [str(folders[word]) if word in folders else word for word in flags.split()]
        with pytest.raises(SystemExit) as stop:
            module.train(module.parse_args(words))
        out, err = capsys.readouterr()
        assert stop.value.code == 2, flags
        assert out == "", flags
        if message:  # the others are refused by tyro, in a box
            assert err.startswith(f"{name}.py: error: "), err
            assert err.count("\n") == 1, err
            assert message in err
    assert sorted(folder.rglob("*")) == before


@every_script
def test_bad_input_is_refused_in_one_line(name, capsys, tmp_path):
    assert_refused(name, BAD_INPUT, tmp_path, capsys, bad_folders(name, tmp_path))


@every_script
def test_bad_input_from_the_shell(name, start):
    process = start(f"{name}.py", "--env-id", "LunarLander-v2")
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout, stderr.count("\n")) == (2, "", 1), stderr
    assert "use `LunarLander-v3` instead" in stderr
    assert not Path("runs").exists()


# --- the contract with push_to_hub.py ---


@every_script
def test_contract(name):
    """Config, environments, network, evaluation: all that is needed to use a checkpoint without its run."""
    module = importlib.import_module(name)
    folder = run(name)
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert {"script", "config", "agent", "step"} <= set(checkpoint)
    assert "optimizer" in checkpoint or name == "q_learning"  # a table needs none
    assert checkpoint["script"] == f"{name}.py"
    assert json.loads(json.dumps(checkpoint["config"])) == checkpoint["config"]
    args = module.Args(**checkpoint["config"])
    assert args == dataclasses.replace(module.parse_args([*flags_of(name)]), resume=None)

    training, evaluation = module.make_envs(args, 3), module.make_envs(args, 3, evaluation=True)
    assert training.num_envs == evaluation.num_envs == 3
    assert training.metadata["autoreset_mode"] == gym.vector.AutoresetMode.SAME_STEP
    assert evaluation.metadata["autoreset_mode"] == gym.vector.AutoresetMode.NEXT_STEP
    assert training.single_observation_space == evaluation.single_observation_space
    assert training.single_action_space == evaluation.single_action_space
    frames = module.make_envs(args, 1, evaluation=True, render=True)
    frames.reset(seed=1)
    assert frames.render()[0].dtype == np.uint8
    assert frames.render()[0].shape[2] == 3

    agent = module.Agent(evaluation, args)
    agent.load_state_dict(checkpoint["agent"])
    obs, _ = evaluation.reset(seed=1)
    for deterministic in (True, False):
        action = agent.act(torch.as_tensor(obs), deterministic)
        assert isinstance(action, np.ndarray)
        evaluation.step(action)
    returns = module.evaluate(agent, args, 4, seed=7)
    assert returns.shape == (4,)
    assert returns.dtype == np.float64
    np.testing.assert_array_equal(returns, module.evaluate(agent, args, 4, seed=7))
    filmed = []
    one = module.evaluate(agent, args, 1, seed=7, film=filmed.append)
    assert len(filmed) > 1
    if args.eval_deterministic:
        assert one[0] == pytest.approx(returns[0])  # a batch of one may be rounded differently
    results = json.loads((folder / "results.json").read_text())
    assert results["is_deterministic"] == args.eval_deterministic


@every_script
def test_tracking_works_offline_and_keeps_its_id(name, monkeypatch):
    pytest.importorskip("wandb").teardown()  # or it goes on in the folder of the test before
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    folder = run(name, "--track", "--capture-video")
    run_id = load(folder)["wandb_id"]
    (tracked,) = Path("wandb").glob(f"offline-run-*-{run_id}")
    logged = read_wandb(tracked)
    assert load(folder)["config"].items() <= logged["config"].items()
    assert logged["metrics"] == {"*": "global_step"}
    assert logged["code"] == [(f"{name}.py", (ROOT / f"{name}.py").stat().st_size)]
    assert logged["exit_code"] == 0
    curves, videos = {}, []
    for row in logged["history"]:
        videos += [(row["global_step"], row["eval/video/size"])] if "eval/video/size" in row else []
        for metric in row:
            if metric.startswith(METRIC_GROUPS) and not metric.startswith("eval/video"):
                curves.setdefault(metric, []).append((row["global_step"], pytest.approx(row[metric], nan_ok=True)))
    events = read_events(folder)
    assert set(curves) == set(events.Tags()["scalars"])
    for metric, curve in curves.items():
        assert [(event.step, event.value) for event in events.Scalars(metric)] == curve
    steps = [event.step for event in events.Scalars("eval/return_mean")]
    assert videos == [(step, (folder / f"step-{step}.mp4").stat().st_size) for step in steps]
    assert logged["summary"]["eval/return_mean"] == mean_reward(folder)

    module = importlib.import_module(name)
    module.train(module.parse_args(["--resume", str(folder)]))
    assert load(folder)["wandb_id"] == run_id


def test_tracking_without_an_account_is_refused(start, monkeypatch, in_empty_folder):
    """In one line, and before anything is written."""
    pytest.importorskip("wandb")
    for variable in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(variable, raising=False)
    for variable in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(variable, str(in_empty_folder))
    monkeypatch.setenv("NETRC", str(in_empty_folder / "none"))
    process = start("ppo.py", "--track", *flags_of("ppo"))
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 2
    assert errors.startswith("ppo.py: error: --track: ")
    assert "WANDB_MODE=offline" in errors
    assert errors.count("\n") == 1
    assert not Path("runs").exists()
