"""Writes the measurements in results/ into the tables of README.md and docs/.

Each table stands between two comments, <!-- table: NAME --> and <!-- end -->, where NAME is one of `tables()`.

    python benchmarks/tables.py
"""

import re
from statistics import median

from scores import RESULTS, ROOT, SCORES, TABLE, push_to_hub, read
from speed import SOLVE, TASKS

# script, a part of its flags, the score to compare with, how to name it; the first row that fits is used
REFERENCES = [
    ("q_learning", "is_slippery", 1, "optimum 1"),
    ("q_learning", "FrozenLake8x8", 0.913, "optimum 0.913"),
    ("q_learning", "Taxi", 7.56, "optimum 7.56 ± 2.71"),
    ("q_learning", "CliffWalking", -13, "optimum -13"),
    ("q_learning", "", 0.744, "optimum 0.744"),
    ("reinforce", "Flappy", None, "–"),
    ("reinforce", "", 500, "best cards on the Hub, 500 ± 0"),
    ("a2c_continuous", "LunarLander", 84, "RL Zoo 84 ± 146, 5 M steps"),
    ("a2c_continuous", "Panda", -0.24, "best card on the Hub, -0.24 ± 0.14"),
    ("a2c_continuous", "Pendulum", -163, "RL Zoo -163 ± 103, 1 M steps"),
    ("a2c_continuous", "HalfCheetah", 3041, "RL Zoo 3041, v3, 1 M steps"),
    ("a2c_continuous", "Hopper", 733, "RL Zoo 733, v3, 1 M steps"),
    ("a2c_continuous", "Walker2d", 582, "RL Zoo 582, v3, 1 M steps"),
    ("a2c_continuous", "", 300, "RL Zoo 300 ± 23, 5 M steps"),
    ("sac_continuous", "LunarLander", 260, "RL Zoo 260 ± 65, 500 k steps"),
    ("sac_continuous", "", -157, "RL Zoo -157 ± 89, 20 k steps"),
    ("ppo", "CartPole", 500, "RL Zoo 500 ± 0, 100 k steps"),
    ("ppo", "Acrobot", -73.5, "RL Zoo -73.5 ± 18.2, 1 M steps"),
    ("ppo", "Continuous", 271, "RL Zoo 271 ± 32, 1 M steps"),
    ("ppo", "Pendulum", -172, "RL Zoo -172 ± 104, 100 k steps"),
    ("ppo", "", 242, "RL Zoo 242 ± 32, 1 M steps"),
    ("ppo_atari", "Pong", 21.0, "RL Zoo 21.0, 10 M steps"),
    ("ppo_atari", "SpaceInvaders", 1162, "CleanRL 1162, 10 M steps"),
    ("ppo_atari", "BeamRider", 3397, "RL Zoo 3397, 10 M steps"),
    ("ppo_atari", "Qbert", 16431, "CleanRL 16431, 10 M steps"),
    ("ppo_atari", "Seaquest", 1784, "RL Zoo 1784, 10 M steps"),
    ("ppo_atari", "", 415, "CleanRL 415, RL Zoo 398"),
    ("dqn_atari", "Pong", 20.6, "RL Zoo 20.6, 10 M steps"),
    ("dqn_atari", "Breakout", 367, "CleanRL 367, 10 M steps"),
    ("dqn_atari", "SpaceInvaders", 1442, "CleanRL 1442, 10 M steps"),
    ("dqn_atari", "BeamRider", 6673, "CleanRL 6673, 10 M steps"),
    ("dqn_atari", "Qbert", 9497, "RL Zoo 9497, 10 M steps"),
    ("dqn_atari", "Seaquest", 2000, "RL Zoo 2000, 10 M steps"),
    ("ddqn_atari", "Pong", 21.0, "paper 21.0, 50 M steps"),
    ("ddqn_atari", "SpaceInvaders", 3155, "paper 3155, 50 M steps"),
    ("ddqn_atari", "", None, "–"),
    ("ppo_doom", "Basic", None, "–"),
    ("ppo_doom", "", 18.7, "cards on the Hub, 6.9 ± 2.8 to 18.7 ± 4.7"),
]
# script, what it is, a part of the flags of the task that README.md shows
OVERVIEW = [
    ("q_learning", "Q-learning", "--eval-episodes 10_000"),
    ("reinforce", "REINFORCE", ""),
    ("a2c_continuous", "A2C (continuous)", ""),
    ("ppo", "PPO", ""),
    ("ppo_selfplay", "PPO by self-play", None),
    ("ppo_atari", "PPO from pixels", "Pong"),
    ("ppo_atari_multigpu", "PPO, several GPUs", None),
    ("ppo_doom", "PPO on Doom", ""),
    ("dqn_atari", "DQN from pixels", "Pong"),
    ("ddqn_atari", "Double DQN", "Pong"),
    ("sac_continuous", "SAC (continuous)", ""),
]
# contender in speed.csv: its name; in this order
PEERS = {
    "ours": "this project",
    "ours, float32": "this project in float32",
    "sb3": "Stable-Baselines3",
    "sbx": "SBX (JAX)",
}
NBSP = "\N{NO-BREAK SPACE}"


def reference(script: str, flags: str) -> tuple:
    """The score that a task is compared with, and its name."""
    return next(row[2:] for row in REFERENCES if row[0] == script and row[1] in flags)


def task_name(env_id: str, flags: str = "") -> str:
    """The environment's name without its package, the suffix of Atari games and the prefix of the course's Doom."""
    name = env_id.rpartition(":")[2].removesuffix("NoFrameskip-v4").removeprefix("doom_").replace("_", " ")
    return f"{name}, not slippery" if "is_slippery" in flags else name


def number(value: float, digits: int | None = None) -> str:
    """A score with as many digits as make sense at its size."""
    if digits is None:
        digits = next((d for limit, d in ((1, 3), (10, 2), (1000, 1)) if abs(value) < limit), 0)
    return f"{value:.{digits}f}"


def mean_std(row: dict) -> str:
    """Mean and standard deviation of a row of scores.csv; of Flappy Bird the pipes."""
    mean, std = float(row["mean"]), float(row["std"])
    if row["note"].endswith("pipes"):
        return row["note"].removesuffix(" pipes").replace("+/-", "±")
    digits = len(number(mean).partition(".")[2])
    return f"{number(mean)} ± {number(std, digits)}"


def duration(rows: list) -> str:
    """The shortest and the longest wall time."""
    seconds = [int(row["seconds"]) for row in rows if row["seconds"]]
    if not seconds:
        return "–"
    unit, size = ("min", 60) if min(seconds) >= 100 else ("s", 1)
    low, high = (f"{limit(seconds) / size:.0f}" for limit in (min, max))
    unit = f"{NBSP}{unit}"
    return f"{low}{unit}" if low == high else f"{low}{NBSP}to{NBSP}{high}{unit}"


def steps(row: dict) -> str:
    """The environment steps of a run."""
    count = int(row["steps"])
    return f"{count / 1e6:g}{NBSP}M" if count >= 1e6 else f"{count / 1e3:g}{NBSP}k"


def measured(script: str) -> list:
    """The tasks of a script that have scores: flags, and the rows of scores.csv."""
    rows = [row for row in read(SCORES) if row["script"] == script]
    tasks = dict.fromkeys(row["flags"] for row in rows)
    return [(flags, [row for row in rows if row["flags"] == flags]) for flags in tasks]


def markdown(head: str, rows: list) -> str:
    """A table with a head and rows of cells."""
    lines = [head, re.sub(r"[^|]+", "---", head)]
    return "\n".join([*lines, *(f"| {' | '.join(cells)} |" for cells in rows)])


def overview() -> str:
    """The table of README.md: each script with one of its tasks, the mean of each seed, and the time."""
    rows = []
    for script, what, part in OVERVIEW:
        cells = ["–", "not measured", "–"]
        if script == "ppo_selfplay":
            runs = [row for row in read(RESULTS / "selfplay.csv") if row["variant"] == "pool"]
            wins = ", ".join(f"{100 * float(row['minimax-4']):g}" for row in runs)
            rows.append([f"[{script}.py]({script}.py)", what, "Connect Four, 6 M", f"{wins} % †", duration(runs)])
            continue
        runs = next((runs for flags, runs in measured(script) if part is not None and part in flags), None)
        if runs:
            means = [float(row["mean"]) for row in runs]
            old = " \\*" if any("earlier version" in row["note"] for row in runs) else ""
            texts = [number(mean, 0 if abs(mean) >= 100 else None) for mean in means]
            scores = ", ".join(texts)
            if len(texts) > 6:
                scores = f"{texts[means.index(min(means))]} to {texts[means.index(max(means))]}, {len(texts)} seeds"
            task = re.sub(r"-v\d+$", "", task_name(runs[0]["env_id"]))
            cells = [f"{task}, {steps(runs[0])}", scores + old, duration(runs)]
        rows.append([f"[{script}.py]({script}.py)", what, *cells])
    return markdown("| file | algorithm | task, steps | score of each seed | time |", rows)


def scores_table(*scripts: str) -> str:
    """The table of all tasks of some scripts, with a line for each seed, and the notes."""
    rows, notes = [], []
    for script in scripts:
        for flags, runs in measured(script):
            task = task_name(runs[0]["env_id"], flags)
            task += ", pipes passed" if runs[0]["note"].endswith("pipes") else ""
            scores = [f"{row['seed']}: {mean_std(row)}".replace(" ", NBSP) for row in runs]
            differences, compared = ["–"], reference(script, flags)[1]
            if (bound := push_to_hub.THRESHOLDS.get(runs[0]["env_id"])) is not None:
                differences = [number(float(row["mean"]) - float(row["std"])) for row in runs]
                compared = f"the course asks for mean - std {bound:g}; {compared}".removesuffix("; –")
            cells = [task, steps(runs[0]), "<br>".join(scores), "<br>".join(differences), compared, duration(runs)]
            rows.append([f"{script}.py", *cells] if len(scripts) > 1 else cells)
            for row in runs:
                if row["note"] and not row["note"].endswith("pipes"):
                    notes.append((script if len(scripts) > 1 else "", task, row["seed"], row["note"]))
    head = "| task | steps | seed: mean ± std | mean - std | to compare | time |"
    table = markdown("| script " * (len(scripts) > 1) + head, rows)
    return table + "".join(f"\n{line}" for line in ["", *grouped(notes)] if notes)


def grouped(notes: list) -> list:
    """A line for each note: the tasks and seeds that it is about."""
    seeds = {}
    for script, task, seed, note in notes:
        seeds.setdefault((script, task, note), []).append(seed)
    about = {}
    for (script, task, note), found in seeds.items():
        name = f"{script}.py, {task}" if script else task
        about.setdefault(note, []).append(f"{name}, seed{'s' * (len(found) > 1)} {', '.join(found)}")
    return [f"- {'; '.join(tasks)}: {note}." for note, tasks in about.items()]


def commands(*scripts: str) -> str:
    """The command of each task, in lines of at most 96 characters."""
    lines = []
    for script, flags, _ in TABLE:
        if script in scripts:
            line = f"python {script}.py"
            for word in re.findall(r"--\S+(?: '[^']*'| [^-'\s]\S*| -\d\S*)?", flags):
                if len(line) + len(word) > 93:
                    lines.append(line + " \\")
                    line = "   "
                line += f" {word}"
            lines.append(line)
    return "\n".join(["```bash", *lines, "```"])


def speeds(column: str = "steady") -> dict:
    """For each task in speed.csv and each contender, one number for each round: of the faster thread count.

    The tasks are in the order of speed.py.
    """
    found = {}
    for row in read(RESULTS / "speed.csv"):
        if row[column]:  # earlier versions measured no steady state
            best = found.setdefault(row["task"], {}).setdefault(row["contender"], {})
            best[row["round"]] = max(best.get(row["round"], 0), int(row[column]))
    tasks = (task for task in TASKS if task in found)
    return {task: {name: list(best.values()) for name, best in found[task].items()} for task in tasks}


def ratio(rates: dict, name: str, rival: str) -> str:
    """Median and range of the ratios of the rounds."""
    if name not in rates or rival not in rates:
        return "–"
    ratios = [a / b for a, b in zip(rates[name], rates[rival])]
    return f"{median(ratios):.2f} [{min(ratios):.2f}–{max(ratios):.2f}]".replace(" ", NBSP)


def speed_table(column: str = "steady") -> str:
    """Steps per second, medians of the rounds, in the order of speed.py; the share of the limit in steady state."""
    rows = []
    dated = {row["task"] for row in read(RESULTS / "speed.csv") if row["commit"]}
    for task, rates in speeds(column).items():
        for ours in ("ours", "ours, float32"):
            if ours in rates:
                name = task if ours == "ours" else f"{task}, float32"
                cells = [name if task in dated else f"{name} \\*"]
                cells += [f"{median(rates[x]):,.0f}" if x in rates else "–" for x in (ours, "sb3", "sbx")]
                cells += [ratio(rates, ours, "sb3"), ratio(rates, ours, "sbx")]
                if column == "steady":
                    limit = rates["gemm" if "gemm" in rates else "ceiling"]
                    share = median(a / b for a, b in zip(rates[ours], limit))
                    cells += [f"{median(limit):,.0f}", f"{share:.0%}".replace("%", f"{NBSP}%") if share > 0.01 else "–"]
                rows.append(cells)
    head = "| task | this project | Stable-Baselines3 | SBX | ratio to Stable-Baselines3 | ratio to SBX |"
    return markdown(head + " limit | share |" * (column == "steady"), rows)


def memory_table() -> str:
    """Peak memory of this project and of Stable-Baselines3."""
    found = speeds("peak_memory_mib")
    rows = [
        [task, *(f"{median(found[task][name]):,.0f}" if name in found[task] else "–" for name in ("ours", "sb3"))]
        for task in found
    ]
    return markdown("| task | this project, MiB | Stable-Baselines3, MiB |", rows)


def replay_table() -> str:
    """Peak memory over the size of the replay."""
    rows = [
        [f"{int(row['buffer_size']):,}", f"{int(row['peak_memory_mib']) * 1024**2 / 1e9:.1f} GB"]
        for row in read(RESULTS / "memory.csv")
    ]
    return markdown("| steps in the replay | peak memory of dqn_atari.py |", rows)


def solve_table() -> str:
    """Seconds until a task is solved."""
    rows = []
    for task, (_, bound, *_) in SOLVE.items():
        runs = [row for row in read(RESULTS / "solve.csv") if row["task"] == task]
        cells = [
            ", ".join(f"{float(row['seconds']):.0f} s" for row in runs if row["contender"] == name)
            for name in ("ours", "sb3")
        ]
        rows.append([f"ppo {task}", f"{bound}", *cells])
    return markdown("| task | bound | this project | Stable-Baselines3 |", rows)


def selfplay_table() -> str:
    """The score of each agent of ppo_selfplay.py against each opponent."""
    opponents = ("random", "minimax-1", "minimax-2", "minimax-3", "minimax-4")
    rows = [
        [row["variant"], row["seed"], *(f"{100 * float(row[name]):g}" for name in opponents), duration([row])]
        for row in read(RESULTS / "selfplay.csv")
    ]
    return markdown(f"| opponents in training | seed | {' | '.join(opponents)} | time |", rows)


def compare_table() -> str:
    """Steps per second of two versions in turns."""
    found = {}
    for row in read(RESULTS / "compare.csv"):
        rates = found.setdefault((row["what"], row["task"]), {"before": [], "after": []})
        for version in rates:
            rates[version].append(int(row[version]))
    rows = [
        [what, task, *(f"{median(rates[version]):,.0f}" for version in rates), ratio(rates, "after", "before")]
        for (what, task), rates in found.items()
    ]
    return markdown("| what | task | before | after | ratio |", rows)


def split_table() -> str:
    """Where the time of PPO's training goes: medians of the rounds."""
    parts = ("environments", "acting", "update_and_rest")
    found = {}
    for row in read(RESULTS / "split.csv"):
        whole = sum(float(row[part]) for part in parts)
        shares = [float(row[part]) / whole for part in parts]
        found.setdefault(row["task"], []).append((int(row["steps_per_second"]), *shares))
    rows = []
    for task, rounds in found.items():
        rate, *shares = map(median, zip(*rounds))
        rows.append([task, f"{rate:,.0f}", *(f"{share:.0%}".replace("%", f"{NBSP}%") for share in shares)])
    return markdown("| task | steps per second | environments | acting | update and the rest |", rows)


def sample_factory_table() -> str:
    """Steps per second of Sample Factory and of ppo.py."""
    rates = {}
    for row in read(RESULTS / "sample_factory.csv"):
        rates.setdefault(row["contender"], []).append(int(row["steady"]))
    rows = [[name, f"{median(found):,.0f} [{min(found):,}–{max(found):,}]"] for name, found in rates.items()]
    return markdown("| contender | steps per second |", rows)


def tables() -> dict:
    """The text of each table by its name."""
    atari = ("ppo_atari", "dqn_atari", "ddqn_atari")
    found = {"overview": overview(), "scores atari": scores_table(*atari), "commands atari": commands(*atari)}
    for script in ("q_learning", "reinforce", "a2c_continuous", "sac_continuous", "ppo", "ppo_doom"):
        found |= {f"scores {script}": scores_table(script), f"commands {script}": commands(script)}
    found |= {"speed": speed_table(), "speed overall": speed_table("steps_per_second"), "memory": memory_table()}
    found |= {"replay": replay_table(), "solve": solve_table(), "compare": compare_table()}
    found |= {"sample factory": sample_factory_table(), "selfplay": selfplay_table(), "split": split_table()}
    minus = re.compile(rf"(?<=[ {NBSP}(:>])-(?=[\d ])")  # not that of a flag or of a row of dashes
    return {name: text if name.startswith("commands") else minus.sub("−", text) for name, text in found.items()}


def filled(text: str) -> str:
    """A page with its tables as they should be."""
    found = tables()
    pattern = r"(<!-- table: (.+?) -->\n).*?(<!-- end -->)"
    return re.sub(pattern, lambda match: f"{match[1]}\n{found[match[2]]}\n\n{match[3]}", text, flags=re.DOTALL)


def main():
    """Fill the tables of all pages."""
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
