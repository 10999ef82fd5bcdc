"""The command line: how flags are written, which ones are refused, and what a refusal looks like."""

import ast
import importlib.util
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from runs import ROOT, SCRIPTS, every_script, files, flags_of, module_of, refusal, results, run, same_weights

PIXEL_SCRIPTS = [name for name in SCRIPTS if name.endswith(("_atari", "_doom", "_multigpu"))]


# --- spelling ---


@every_script
def test_switches_as_people_and_wandb_write_them(name):
    module = module_of(name)
    for field in fields(module.Args):
        if field.type is bool:
            underscored, dashed = field.name, field.name.replace("_", "-")
            for flag in (f"--{dashed}", f"--{underscored}", f"--{underscored}=True", f"--{dashed}=true"):
                assert getattr(module.parse_args([flag]), field.name) is True, flag
            for flag in (f"--no-{dashed}", f"--{underscored}=False", f"--{dashed}=false"):
                assert getattr(module.parse_args([flag]), field.name) is False, flag


def test_numbers_and_words():
    parse = module_of("ppo").parse_args
    assert parse(["--total-timesteps", "1_000_000"]).total_timesteps == 1_000_000
    assert parse(["--total_timesteps=2000000"]).total_timesteps == 2_000_000
    assert parse(["--learning_rate=1e-4", "--seed=0"]).learning_rate == 1e-4
    assert parse(["--env-kwargs", '{"a": "x=1"}']).env_kwargs == '{"a": "x=1"}'
    assert parse(["--wandb-project-name", "1e6"]).wandb_project_name == "1e6"
    assert parse(["--wandb-project-name", "track=True"]).track is False
    assert parse([]).target_kl is None
    assert parse(["--target-kl", "0.5"]).target_kl == 0.5


@every_script
def test_help_names_every_flag(name, capsys):
    with pytest.raises(SystemExit) as stop:
        module_of(name).parse_args(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for field in fields(module_of(name).Args):
        assert f"--{field.name.replace('_', '-')}" in text
    assert ast.get_docstring(ast.parse((ROOT / f"{name}.py").read_text(encoding="utf-8"))).split("\n")[0] in text


def test_help_is_quick(start):
    resource = pytest.importorskip("resource")  # not on Windows
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    out, err = start("ppo.py", "--help").communicate(timeout=60)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime - before.ru_utime < 6  # seconds of the processor, however busy it is
    assert "--total-timesteps" in out
    assert err == ""


def test_importing_a_script_has_no_side_effect_and_is_not_slow(tmp_path):
    code = f"""if True:
    import random, signal, sys
    sys.path.insert(0, {str(ROOT)!r})
    import numpy, torch
    def state():
        generators = random.getstate(), str(numpy.random.get_state()), torch.get_rng_state().tolist()
        handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
        return generators, handlers, torch.get_num_threads(), torch.get_default_dtype()
    before = state()
    for name in {SCRIPTS}:
        __import__(name)
        assert state() == before, name
    slow = {{"wandb", "moviepy", "matplotlib", "pandas", "huggingface_hub", "stable_baselines3"}}
    assert not slow & set(sys.modules), slow & set(sys.modules)
    """
    process = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (process.returncode, process.stdout, process.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


def commands_in(text):
    """Every `python` or `torchrun` command of a text, continued lines joined."""
    return re.findall(r"^ *((?:python|torchrun) .*)$", text.replace("\\\n", " "), re.MULTILINE)


@every_script
def test_commands_in_the_docstring_parse(name):
    commands = commands_in(ast.get_docstring(ast.parse((ROOT / f"{name}.py").read_text(encoding="utf-8")), clean=False))
    assert commands
    for command in commands:
        words = shlex.split(command, comments=True)
        module_of(name).parse_args(words[words.index(f"{name}.py") + 1 :])


@pytest.mark.parametrize("page", ["README.md", *(str(path.relative_to(ROOT)) for path in ROOT.glob("docs/*.md"))])
def test_commands_in_the_docs_parse(page):
    blocks = re.findall(r"```(?:bash|sh)\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)
    for command in commands_in("\n".join(blocks)):
        words = shlex.split(re.split(r"&&|\|", command)[0], comments=True)
        script = next((word for word in words if word.endswith(".py")), None)
        assert script is None or (ROOT / script).exists(), command
        if script and script.removesuffix(".py") in SCRIPTS and not {"--help", "--resume"} & {*words}:
            module_of(script.removesuffix(".py")).parse_args(words[words.index(script) + 1 :])


# --- refusals: one line, exit code 2, nothing written ---

BAD_FLAGS = {
    "--env-id Foo-v0": "doesn't exist",
    "--env-id no_such_package:Foo-v0": "No module named 'no_such_package'",
    "--env-kwargs {": "--env-kwargs '{': Expecting property name",
    "--env-kwargs [1]": "--env-kwargs '[1]'",
    '--env-kwargs {"foo":1}': "unexpected keyword argument 'foo'",
    "--learning-rate -1": "--learning-rate -1.0: must be 0 or more, and finite",
    "--learning-rate nan": "--learning-rate nan: must be 0 or more, and finite",
    "--learning-rate inf": "--learning-rate inf: must be 0 or more, and finite",
    "--gamma 1.1": "at most 1",
    "--seed -1": "--seed -1: must be 0 or more",
    "--num-checkpoints 0": "--num-checkpoints 0: must be 1 or more",
    "--eval-episodes 0": "--eval-episodes 0: must be 1 or more",
    "--total-timesteps 0": "--total-timesteps 0: must be 1 or more",
    "--max-eval-steps -5": "--max-eval-steps -5: must be 1 or more",
    "--device cuda:99": "--device cuda:99",
    "--device gpu": "--device gpu",
    "--device ''": "--device",
    "--resume ''": "no checkpoint in ''",
    "--resume .": "no checkpoint in '.' that fits",
    "--resume missing": "no checkpoint in 'missing' that fits",
}
TYRO_REFUSES = [
    "--total-timesteps 1e6", "--total-timesteps 1.5", "--seed one", "--no-such-flag 1", "--learning-rate", "--track=1",
    "--capture-video maybe", "ppo", "--gamma ''",
]  # fmt: skip
CHECKS = {
    "q_learning": {
        "--learning-rate 1.5": "at most 1",
        "--start-e 2": "at most 1",
        "--end-e 2": "at most 1",
        "--exploration-fraction 0": "above 0",
        "--exploration-fraction 1.5": "at most 1",
        "--device auto": "only cpu",
        "--env-id CartPole-v1": "do not fit a table",
        "--env-id toy_envs:Clock-v0": "do not fit a table",
    },
    "reinforce": {
        "--gamma 1.01": "--gamma 1.01: must be at most 1",
        "--num-envs 1 --baseline mean": "--num-envs 2 or more",
        "--hidden-size 0": "--hidden-size 0: must be 1 or more",
        "--env-id toy_envs:Target-v0": "not Discrete; see a2c_continuous.py",
    },
    "a2c_continuous": {
        "--num-envs 1 --num-steps 1 --no-normalize-advantages": "at least two steps",
        "--total-timesteps 10": "less than the 256 steps of one rollout",
        "--gae-lambda 1.5": "at most 1",
        "--action-std 0": "--action-std more than 0",
        "--env-id CartPole-v1": "not continuous (Box); see ppo.py",
    },
    "sac_continuous": {
        "--tau 1.5": "at most 1",
        "--gamma 1.5": "at most 1",
        "--alpha 0": "more than 0",
        "--updates-per-step 0": "more than 0",
        "--buffer-size 999": "--learning-starts: must be at most --buffer-size",
        "--total-timesteps 1000": "less than --total-timesteps",
        "--hidden-size 0": "--hidden-size 0: must be 1 or more",
        "--env-id CartPole-v1": "not continuous (Box) with finite bounds",
        """--env-id toy_envs:Spaces-v0 --env-kwargs '{"action":"unbounded"}'""": "with finite bounds",
    },
    "ppo": {
        "--num-minibatches 3": "must divide 8192 steps",
        "--num-minibatches 8192": "parts of 2 or more",
        "--total-timesteps 8191": "less than the 8192 steps of one rollout",
        "--gae-lambda 1.5": "at most 1",
        "--target-kl -1": "--target-kl -1.0: must be 0 or more",
        """--env-id toy_envs:Spaces-v0 --env-kwargs '{"action":"multibinary"}'""": "neither Discrete nor Box",
        """--env-id toy_envs:Spaces-v0 --env-kwargs '{"obs":"opaque"}'""": "cannot flatten observations",
        "--env-id LunarLander-v2": "use `LunarLander-v3` instead",
        "--env-id toy_envs:Constant-v0 --capture-video": "no render mode rgb_array",
        """--vectorization-mode async --env-kwargs '{"foo": 1}'""": "unexpected keyword argument 'foo'",
    },
    "ppo_selfplay": {
        "--num-minibatches 3": "must divide 8192 steps",
        "--total-timesteps 8191": "less than the 8192 steps of one rollout",
        "--latest-ratio 1.5": "at most 1",
        "--env-id CartPole-v1": "must be one of connect_four_v3, tictactoe_v3",
        """--env-kwargs '{"length": 7}'""": "no line of 7 stones on 6 rows and 7 columns",
        """--env-kwargs '{"rowz": 7}'""": "rowz",
        "--play nowhere": "no checkpoint in 'nowhere'",
    },
    "ppo_atari": {
        "--num-minibatches 3": "must divide 1024 steps",
        "--env-id CartPole-v1": "must be an Atari game",
        "--env-id Breakout-v4": "must be an Atari game",
        """--env-kwargs '{"game": "pong"}'""": "multiple values",
    },
    "ppo_doom": {"--num-minibatches 3": "must divide 1024 steps"},
    "ppo_atari_multigpu": {
        "--num-minibatches 3": "must divide 1024 steps",
        "--env-id CartPole-v1": "must be an Atari game",
    },
    "dqn_atari": {
        "--num-envs 2 --buffer-size 1_000_000_000_000": "GB are free",
        "--env-id CartPole-v1": "must be an Atari game",
        "--start-e 2": "at most 1",
    },
}


def assert_all_refused(name, bad_flags, capsys):
    Path("kept.txt").write_text("")
    for flags, message in bad_flags.items():
        line = refusal(name, *shlex.split(flags, posix="'" in flags), capsys=capsys)
        assert message in line, (flags, line)
    assert list(files(".")) == [Path("kept.txt")]


@pytest.mark.parametrize("name", ["ppo", "dqn_atari"])
def test_bad_flags_are_refused_in_one_line(name, capsys):
    assert_all_refused(name, BAD_FLAGS, capsys)


@pytest.mark.parametrize("name", CHECKS)
def test_values_that_do_not_fit_together_are_refused(name, capsys):
    assert_all_refused(name, CHECKS[name], capsys)


@pytest.mark.parametrize("flags", TYRO_REFUSES)
def test_flags_that_cannot_be_read_are_refused(flags, capsys):
    with pytest.raises(SystemExit) as stop:
        module_of("ppo").parse_args(shlex.split(flags))
    assert stop.value.code == 2
    assert capsys.readouterr().out == ""
    assert not Path("runs").exists()


def test_a_refusal_in_the_shell(start):
    process = start("q_learning.py", "--env-id", "Taxi-v0")
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout, stderr.count("\n")) == (2, "", 1), stderr
    assert stderr.startswith("q_learning.py: error: --env-id Taxi-v0")
    assert not Path("runs").exists()


def test_an_empty_resume_does_not_start_a_new_run(trained):
    """Not in a folder without a checkpoint, see above; in one that holds a checkpoint it means this folder."""
    shutil.copytree(trained("q_learning").folder, ".", dirs_exist_ok=True)
    module = module_of("q_learning")
    assert module.train(module.parse_args(["--resume", ""])) == Path()
    assert same_weights(".", trained("q_learning").folder)
    assert not Path("runs").exists()


def test_more_checkpoints_than_steps():
    folder = run("q_learning", "--num-checkpoints", "1_000_000_000_000")
    assert results(folder)["n_eval_episodes"] == 2


# --- your own environment ---


@pytest.mark.parametrize("error", [TypeError, ValueError, AttributeError, KeyError])
@pytest.mark.parametrize("where", ["__init__", "reset", "step"])
def test_a_bug_in_your_environment_shows_its_traceback(where, error):
    kwargs = f'{{"where": "{where}", "kind": "{error.__name__}"}}'
    with pytest.raises(error, match="a bug of mine") as raised:
        run("q_learning", "--env-id", "toy_envs:Buggy-v0", "--env-kwargs", kwargs)
    assert "toy_envs.py" in str(raised.getrepr(chain=True))


@pytest.mark.parametrize("name", ["q_learning", "ppo"])
def test_a_wrong_call_of_gymnasium_in_your_environment_shows_its_traceback(name):
    with pytest.raises(TypeError) as raised:
        run(name, "--env-id", "toy_envs:Buggy-v0", "--env-kwargs", '{"where": "__init__", "deep": true}')
    assert "toy_envs.py" in str(raised.getrepr(chain=True))


@pytest.mark.parametrize("kwargs", ['{"foo": 1}', "{}"])
def test_a_wrong_or_missing_keyword_of_your_environment_is_one_line(kwargs, capsys):
    line = refusal("q_learning", "--env-id", "toy_envs:Buggy-v0", "--env-kwargs", kwargs, capsys=capsys)
    assert "argument" in line


# --- where it runs ---


def test_a_cpu_run_does_not_depend_on_a_gpu(trained, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert same_weights(run("ppo", "--device", "cpu"), trained("ppo").folder)


@pytest.mark.parametrize("name", PIXEL_SCRIPTS)
@pytest.mark.parametrize("cpu", [False, True])
def test_bfloat16_is_on_where_the_processor_has_it(name, cpu, monkeypatch):
    """Whether there is a GPU does not matter: the same command computes the same on the CPU."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": cpu})
    for gpu in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpu=gpu: gpu)
        assert runpy.run_path(str(ROOT / f"{name}.py"), run_name=name)["Args"]().bfloat16 == cpu


def test_auto_is_the_cpu_where_there_is_no_accelerator():
    if torch.accelerator.is_available():
        pytest.skip("there is one")
    assert module_of("ppo_atari").pick_device("auto") == torch.device("cpu")


def test_the_path_of_the_script_is_never_read_by_a_shell(tmp_path):
    clone = tmp_path / "a$(touch X)b;touch X;`touch X`"
    clone.mkdir()
    shutil.copy(ROOT / "ppo.py", clone)
    spec = importlib.util.spec_from_file_location("ppo_of_the_clone", clone / "ppo.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["ppo_of_the_clone"] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    folder = module.train(module.parse_args([*flags_of("ppo"), "--capture-video"]))
    assert list(folder.glob("*.mp4"))
    assert not list(tmp_path.rglob("X"))
