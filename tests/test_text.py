"""The text of the scripts: their order, their length, and what must be the same in all of them."""

import ast
import dataclasses
import io
import re
import tokenize
from itertools import combinations

import pytest

from runs import FLAGS, ROOT, SCRIPTS, every_script, module_of

# Lines, and lines of code (no blank lines, comments or docstrings).
AIMS = {
    "q_learning": (410, 290),
    "reinforce": (500, 345),
    "a2c_continuous": (560, 400),
    "sac_continuous": (580, 410),
    "ppo": (595, 420),
    "ppo_selfplay": (830, 590),
    "ppo_atari": (560, 395),
    "ppo_doom": (570, 400),
    "ppo_atari_multigpu": (640, 440),
    "dqn_atari": (600, 420),
    "ddqn_atari": (604, 424),
    "push_to_hub": (400, 300),
}
PROGRAMS = list(AIMS)
MAX_PLUMBING = 170  # lines of code
SECTIONS = ["config", "environment", "network", "algorithm", "training", "plumbing: the same text in every script"]
MEANT_TO_VARY = {"Args", "Agent", "make_envs", "train", "td_target"}
PAIRS = {  # (script, script): names of both whose text differs, names of the first alone, names of the second alone
    ("ppo", "ppo_atari"): (
        {"Args", "Agent", "make_envs"},
        {"RunningNorm", "make_layer", "make_mlp", "Categorical", "Gaussian"},
        {"AtariGames", "init_layer"},
    ),
    ("ppo", "ppo_selfplay"): (
        {"Args", "Agent", "make_envs", "train"},
        {"RunningNorm", "make_layer", "make_mlp", "Gaussian"},
        {"Board", "minimax", "Minimax", "TwoPlayerGames", "OPPONENTS", "GAMES", "init_layer"}
        | {"Pool", "play_match", "elo", "rate", "Human", "play_in_terminal"},
    ),
    ("ppo_atari", "ppo_doom"): ({"Args", "make_envs"}, {"AtariGames"}, {"COURSE", "DoomScreen"}),
    ("ppo_atari", "ppo_atari_multigpu"): (
        {"Args", "train"},
        set(),
        {"RANK", "LOCAL_RANK", "WORLD_SIZE", "NUM_CORES", "average", "join_processes", "Worker"},
    ),
    ("dqn_atari", "ddqn_atari"): ({"td_target"}, set(), set()),
}
SHARED_FLAGS = """env_id env_kwargs seed total_timesteps device num_threads num_checkpoints eval_episodes
eval_deterministic max_eval_steps capture_video track wandb_project_name wandb_entity resume""".split()

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


def section(name, title):
    """The text from a section's headline to the next one."""
    parts = re.split(r"^# --- (.*) ---$", source(name), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2]))[title]


def count_code_lines(text):
    docstrings = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node):
            docstrings.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    layout = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    tokens = [token for token in tokenize.generate_tokens(io.StringIO(text).readline) if token.type not in layout]
    return len({line for token in tokens for line in range(token.start[0], token.end[0] + 1)} - docstrings)


# --- order and length ---


def test_every_script_is_listed():
    assert {path.stem for path in ROOT.glob("*.py") if "\nclass Agent(" in path.read_text(encoding="utf-8")} == {*FLAGS}


@every_script
def test_sections_come_in_order(name):
    assert re.findall(r"^# --- (.*) ---$", source(name), re.MULTILINE) == SECTIONS
    order = list(definitions(name))
    landmarks = ["Args", "make_envs", "Agent", "train", "SCRIPT", "fail", "parse_args", "evaluate", "Run"]
    assert sorted(landmarks, key=order.index) == landmarks
    tree = ast.parse(source(name))
    assert ast.get_docstring(tree)
    assert ast.unparse(tree.body[-1].test) == "__name__ == '__main__'"
    for title, landmark in zip(SECTIONS, ["Args", "make_envs", "Agent", "loss", "train", "Run"]):
        wanted = rf"^(class|def) {landmark}\b" if landmark != "loss" else r"^def (\w+_loss|td_error)\b"
        assert re.search(wanted, section(name, title), re.MULTILINE), (title, landmark)


@every_program
def test_line_budget(name):
    max_lines, max_code = (1.05 * aim for aim in AIMS[name])
    assert source(name).count("\n") <= max_lines
    assert count_code_lines(source(name)) <= max_code


@every_program
def test_functions_are_short(name):
    for node in ast.walk(ast.parse(source(name))):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno + 1 <= (100 if node.name == "train" else 50), node.name


def test_line_counter():
    text = '"""Doc."""\n\n# comment\nx = """a\nb"""\n\ndef f():\n    """Doc\n    doc."""\n    return 1\n'
    assert count_code_lines(text) == 4


# --- sameness ---


def test_the_plumbing_is_small_and_the_same_everywhere():
    texts = {section(name, SECTIONS[-1]) for name in SCRIPTS}
    assert len(texts) == 1
    assert count_code_lines(texts.pop()) <= MAX_PLUMBING


@pytest.mark.parametrize(("first", "second"), list(combinations(PROGRAMS, 2)))
def test_the_same_name_means_the_same_text(first, second):
    ours, theirs = definitions(first), definitions(second)
    assert {name for name in ours.keys() & theirs.keys() if ours[name] != theirs[name]} <= MEANT_TO_VARY


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_a_diff_is_a_lesson(first, second):
    ours, theirs = definitions(first), definitions(second)
    different = {name for name in ours.keys() & theirs.keys() if ours[name] != theirs[name]}
    assert (different, ours.keys() - theirs.keys(), theirs.keys() - ours.keys()) == PAIRS[first, second]


def test_double_dqn_is_dqn_with_another_target():
    texts = []
    for name in ("dqn_atari", "ddqn_atari"):
        _, _, text = source(name)[3:].partition('"""')  # without the docstring
        texts.append(text.replace(definitions(name)["td_target"], ""))
    assert texts[0] == texts[1]


@every_script
def test_shared_flags_come_first_and_every_flag_has_help(name):
    fields = dataclasses.fields(module_of(name).Args)
    assert [field.name for field in fields][: len(SHARED_FLAGS)] == SHARED_FLAGS
    lines = definitions(name)["Args"].splitlines()
    for field in fields:
        (line,) = (line for line in lines if re.match(rf"    {field.name}: ", line))
        assert re.search(r"  # \S.{5,}", line), line


@pytest.mark.parametrize("flag", SHARED_FLAGS)
def test_shared_flags_have_the_same_type_and_help(flag):
    found = {re.search(rf"    {flag}: (.*) = .*  # (.*)", source(script)).groups() for script in SCRIPTS}
    assert len(found) == (3 if flag == "device" else 1)  # which device is the fastest depends on the network


# --- what a reader needs, and nothing left over ---


@every_program
def test_definitions_have_docstrings(name):
    for node in ast.walk(ast.parse(source(name))):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            assert node.name == "forward" or ast.get_docstring(node), node.name


@every_script
def test_formulas_cite_papers_that_the_docstring_lists(name):
    docstring = ast.get_docstring(ast.parse(source(name)))
    listed = set(re.findall(r"^ +\[(\w+)\]", docstring, re.MULTILINE))
    cited = set(re.findall(r"[#a-z] \[([A-Z0-9]\w*)[,\]]", source(name).replace(docstring, "")))
    assert re.search(r"  # \[[A-Z]", section(name, "algorithm"))
    assert cited <= listed


@every_script
def test_a_script_imports_no_file_of_this_repository(name):
    local = {path.stem for path in ROOT.glob("*.py")}
    for node in ast.walk(ast.parse(source(name))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        assert not {module.partition(".")[0] for module in names} & local


@every_program
def test_no_leftovers(name):
    words = r"TODO|FIXME|XXX|TRY NOT TO MODIFY|\bb_|\bmb_|\brb\b|lastgaelam|thunk|entropy_loss|breakpoint"
    assert not re.search(words, source(name))
