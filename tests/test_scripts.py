"""What holds for every script. A new script joins by existing; a pair of scripts by a line in PAIRS."""

import ast
import dataclasses
import importlib
import io
import json
import re
import shlex
import subprocess
import sys
import tokenize
from itertools import combinations
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import ROOT

# Bounds of physical and code lines (no blanks, comments, docstrings), and a quick way to run each script.
SCRIPTS = {
    "ppo": (605, 427, "--env-id CartPole-v1 --total-timesteps 128 --num-envs 2 --num-steps 32 --num-minibatches 2"),
}
SCRIPTS = {name: value for name, value in SCRIPTS.items() if (ROOT / f"{name}.py").exists()}
MEANT_TO_VARY = {"Args", "Agent", "make_envs", "train"}
PAIRS = {}  # (script, script): the top-level names in which the two differ, and no others
SHARED_ARGS = "env_id env_kwargs seed total_timesteps device num_threads num_checkpoints eval_episodes"
SHARED_ARGS += " eval_deterministic max_eval_steps capture_video track wandb_project_name wandb_entity resume"
SECTIONS = ["config", "environment", "network", "algorithm", "training", "plumbing: the same text in every script"]

PROGRAMS = {**SCRIPTS, "push_to_hub": (421, 327, "")}

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
    max_lines, max_code, _ = PROGRAMS[name]
    text = source(name)
    assert text.count("\n") <= max_lines
    text = '"""Doc."""\n\n# comment\nx = """a\nb"""\n\ndef f():\n    """Doc\n    doc."""\n    return 1\n'
    assert count_code_lines(text) == 4
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 80, node.name


def test_line_counter():
    assert (
        count_code_lines('"""Doc."""\n\n# comment\nx = """a\nb"""\n\ndef f():\n    """Doc\n    doc."""\n    return 1\n')
        == 4
    )


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
            if words and words[0] == "python" and words[1].removesuffix(".py") in SCRIPTS:
                name = words[1].removesuffix(".py")
                if "--help" not in words and "--resume" not in words:
                    importlib.import_module(name).parse_args(words[2:])
                tested.add(name)
            elif words and words[0] == "python" and words[1] != "-m":
                assert (ROOT / words[1]).exists(), part
    assert tested == set(SCRIPTS)


# --- the contract with push_to_hub.py ---


@every_script
def test_contract(name):
    """Config, environments, network, evaluation: all that is needed to use a checkpoint without its run."""
    module = importlib.import_module(name)
    folder = run(name)
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert {"script", "config", "agent", "optimizer", "step"} <= set(checkpoint)
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
        assert one[0] == returns[0]
    results = json.loads((folder / "results.json").read_text())
    assert results["is_deterministic"] == args.eval_deterministic


@every_script
def test_tracking_works_offline_and_keeps_its_id(name, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    folder = run(name, "--track", "--capture-video")
    run_id = torch.load(folder / "checkpoint.pt", weights_only=True)["wandb_id"]
    assert list(Path("wandb").glob(f"offline-run-*-{run_id}/*.wandb"))
    module = importlib.import_module(name)
    module.train(module.parse_args(["--resume", str(folder)]))
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["wandb_id"] == run_id
