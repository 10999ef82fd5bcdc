"""Steps per second of this project, of Stable-Baselines3 and SBX with the same hyperparameters, and of the limit.

The limit of the small networks is the environment stepped with random actions; from pixels it is the arithmetic of the
network at the rate of large matrix products. The contenders take turns, each in a process of its own, because the speed
of a machine drifts: compare only numbers of one call. Stable-Baselines3 runs with one thread and with two, and the
faster one of a round counts; from pixels it runs with all cores, as we do (one thread was always slower). SBX, which is
Stable-Baselines3 in JAX, takes the threads it wants. The whole run is timed (steps_per_second), and its second half
without our evaluations (steady).

    python benchmarks/speed.py                     # all tasks, 7 rounds: benchmarks/results/speed.csv
    python benchmarks/speed.py --only atari --rounds 3
    python benchmarks/speed.py --scaling           # over the number of environments: benchmarks/results/scaling.csv
    python benchmarks/speed.py --solve             # time until a task is solved: benchmarks/results/solve.csv
    python benchmarks/speed.py --gpu               # the pixel scripts on a GPU: benchmarks/results/gpu.csv
    python benchmarks/speed.py --memory            # peak memory with a full replay: benchmarks/results/memory.csv
"""

import csv
import importlib
import json
import os
import platform
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import harmonic_mean, median
from tempfile import TemporaryDirectory

import gymnasium as gym
import torch
import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"

# task: script, steps to measure, flags of the script, Stable-Baselines3's class and the same hyperparameters
TASKS = {
    "ppo LunarLander-v3, 16 envs": (
        "ppo",
        65_536,
        "--num-envs 16 --num-steps 1024 --num-minibatches 256 --update-epochs 4 --learning-rate 3e-4 --no-anneal-lr "
        "--gamma 0.999 --gae-lambda 0.98 --ent-coef 0.01 --max-grad-norm 0.5",
        "PPO",
        {"n_steps": 1024, "batch_size": 64, "n_epochs": 4, "gamma": 0.999, "gae_lambda": 0.98, "ent_coef": 0.01},
    ),
    "ppo CartPole-v1, 4 envs": (
        "ppo",
        40_960,
        "--env-id CartPole-v1 --num-envs 4 --num-steps 128 --num-minibatches 4 --update-epochs 4 "
        "--learning-rate 3e-4 --no-anneal-lr --gamma 0.99 --gae-lambda 0.95 --ent-coef 0 --max-grad-norm 0.5",
        "PPO",
        {"n_steps": 128, "batch_size": 128, "n_epochs": 4},
    ),
    "a2c_continuous Pendulum-v1, 8 envs": (
        "a2c_continuous",
        100_000,
        "--env-id Pendulum-v1 --num-envs 8 --num-steps 5 --learning-rate 7e-4 --no-anneal-lr --gae-lambda 1 "
        "--no-normalize-observations --no-normalize-rewards --no-normalize-advantages --optimizer rmsprop "
        "--action-std 1 --log-interval 100",
        "A2C",
        {},  # the defaults; they log every 100 updates, too
    ),
    "sac_continuous Pendulum-v1": (
        "sac_continuous",
        4_000,
        "--q-lr 3e-4 --alpha 1 --learning-starts 100",
        "SAC",
        {},  # the defaults
    ),
    "reinforce CartPole-v1, 8 envs": ("reinforce", 200_000, "", None, None),  # not in Stable-Baselines3
    "ppo_atari Breakout, 8 envs": (
        "ppo_atari",
        20_480,
        "--no-anneal-lr --max-eval-steps 100",
        "PPO",
        {"n_steps": 128, "batch_size": 256, "n_epochs": 4, "learning_rate": 2.5e-4, "clip_range": 0.1}
        | {"ent_coef": 0.01},
    ),
    "ppo_doom health gathering, 8 envs": (  # Stable-Baselines3 has no such environment
        "ppo_doom",
        20_480,
        "--no-anneal-lr --max-eval-steps 100",
        None,
        None,
    ),
    "dqn_atari Breakout, Stable-Baselines3 with 1 env": (
        "dqn_atari",
        8_000,
        "--learning-starts 500 --buffer-size 20_000 --max-eval-steps 100",
        "DQN",
        {"n_envs": 1, "learning_starts": 500, "buffer_size": 20_000, "learning_rate": 1e-4, "train_freq": 4}
        | {"target_update_interval": 1000, "exploration_final_eps": 0.01, "optimize_memory_usage": False},
    ),
    "dqn_atari Breakout, Stable-Baselines3 with 16 envs": (
        "dqn_atari",
        8_000,
        "--learning-starts 500 --buffer-size 20_000 --max-eval-steps 100",
        "DQN",
        {"n_envs": 16, "learning_starts": 500, "buffer_size": 20_000, "learning_rate": 1e-4, "train_freq": 1}
        | {"target_update_interval": 1000, "exploration_final_eps": 0.01, "gradient_steps": 4},
    ),
    "ddqn_atari Breakout": (  # not in Stable-Baselines3
        "ddqn_atari",
        8_000,
        "--learning-starts 500 --buffer-size 20_000 --max-eval-steps 100",
        None,
        None,
    ),
    "q_learning FrozenLake-v1": ("q_learning", 1_000_000, "", None, None),
    "q_learning Taxi-v4": ("q_learning", 1_000_000, "--env-id Taxi-v4", None, None),
}

# contenders with a quarter of the steps from pixels: SBX takes long, and counting the arithmetic needs a few steps only
SHORTER = ("sbx", "gemm")

# scripts whose network sees pixels: they run on all cores, and in bfloat16 where the processor has it
PIXELS = ("ppo_atari", "ppo_doom", "dqn_atari", "ddqn_atari")

# script: steps of a rollout, the same for every number of environments
SCALING = {"ppo": 16_384, "ppo_atari": 1024}
NUM_ENVS = (1, 2, 4, 8, 16, 32, 64, 128)

# script: flags of its runs on a GPU, long enough to reach full speed
GPU = {
    "ppo_atari": "--num-envs 128 --num-steps 128 --num-minibatches 16 --total-timesteps 655_360",
    "dqn_atari": "--num-envs 64 --buffer-size 200_000 --learning-starts 20_000 --total-timesteps 300_000",
    "ddqn_atari": "--num-envs 64 --buffer-size 200_000 --learning-starts 20_000 --total-timesteps 300_000",
}

# task: our flags, the return that solves it, Stable-Baselines3's steps between evaluations and in all, RL Zoo's recipe
SOLVE = {
    "LunarLander-v3": (
        "",
        200,
        32_768,
        2_000_000,
        {"n_envs": 16} | TASKS["ppo LunarLander-v3, 16 envs"][4],
    ),
    "CartPole-v1": (
        "--env-id CartPole-v1 --total-timesteps 100_000 --num-envs 8 --num-steps 128 --num-minibatches 4 "
        "--learning-rate 1e-3 --gamma 0.98 --ent-coef 0",
        500,
        5_120,
        100_000,
        {"n_envs": 8, "n_steps": 32, "batch_size": 256, "n_epochs": 20, "gamma": 0.98, "gae_lambda": 0.8}
        | {"learning_rate": lambda left: 1e-3 * left, "clip_range": lambda left: 0.2 * left},
    ),
}


def measure_ours(task: str, steps: int, more_flags: str = "") -> tuple:
    """Train with the script's own `train` and only two evaluation episodes; returns the steps and the steady speed."""
    script, _, flags, _, _ = TASKS[task]
    module = importlib.import_module(script)
    flags += f" --device cpu --total-timesteps {steps} --num-checkpoints 1 --eval-episodes 1 {more_flags}"
    speeds = logged_speeds(module.train(module.parse_args(flags.split())))
    return steps, harmonic_mean(speeds[len(speeds) // 2 :])


def measure_float32(task: str, steps: int) -> tuple:
    """`measure_ours` in the precision of Stable-Baselines3; on some processors the default is bfloat16."""
    return measure_ours(task, steps, "--no-bfloat16")


def measure_sbx(task: str, steps: int) -> tuple:
    """The same task and hyperparameters in SBX."""
    return measure_sb3(task, steps, "sbx")


def measure_sb3(task: str, steps: int, library: str = "stable_baselines3") -> tuple:
    """The same task and hyperparameters in Stable-Baselines3; returns the steps and the steady speed."""
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_atari_env, make_vec_env
    from stable_baselines3.common.vec_env import VecFrameStack

    class Clock(BaseCallback):
        """Notes when the second half begins."""

        half_time = None

        def _on_step(self):
            return True

        def _on_rollout_start(self):
            if self.half_time is None and self.num_timesteps >= steps / 2:
                self.half_time, self.half_steps = time.perf_counter(), self.num_timesteps

    script, _, flags, algorithm, hyperparameters = TASKS[task]
    hyperparameters = dict(hyperparameters)
    args = importlib.import_module(script).parse_args(flags.split())
    num_envs = hyperparameters.pop("n_envs", args.num_envs)
    if script in PIXELS:
        envs = VecFrameStack(make_atari_env(args.env_id, n_envs=num_envs), n_stack=4)
    else:
        envs = make_vec_env(args.env_id, n_envs=num_envs)
    policy = "CnnPolicy" if script in PIXELS else "MlpPolicy"
    if library == "sbx":
        hyperparameters.pop("optimize_memory_usage", None)
    model = getattr(importlib.import_module(library), algorithm)(policy, envs, device="cpu", **hyperparameters)
    clock = Clock()
    model.learn(steps, callback=clock)
    return steps, (model.num_timesteps - clock.half_steps) / (time.perf_counter() - clock.half_time)


def measure_gemm(task: str, steps: int) -> tuple:
    """The steps per second if all arithmetic of training ran at the rate of large matrix products."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    script, _, flags, _, _ = TASKS[task]
    bfloat16 = importlib.import_module(script).parse_args(flags.split()).bfloat16
    counts = []
    for length in (steps // 2, steps):  # the difference leaves out the start and the evaluations
        with FlopCounterMode(display=False) as counter:
            measure_ours(task, length)
        counts.append(counter.get_total_flops())
    a = torch.rand(2048, 2048, dtype=torch.bfloat16 if bfloat16 else torch.float32)
    seconds = []
    for _ in range(10):
        start = time.perf_counter()
        a @ a
        seconds.append(time.perf_counter() - start)
    return steps, 2 * 2048**3 / min(seconds) / ((counts[1] - counts[0]) / (steps - steps // 2))


def measure_ceiling(task: str, steps: int) -> tuple:
    """Step the training environments with random actions; returns the steps and the steady speed."""
    script, _, flags, _, _ = TASKS[task]
    module = importlib.import_module(script)
    args = module.parse_args(flags.split())
    if script != "q_learning":
        return steps, random_steps(module.make_envs(args, args.num_envs), steps // args.num_envs)
    env = gym.make(args.env_id)  # one environment, not a vector
    env.reset(seed=1)
    actions = [env.action_space.sample() for _ in range(100)]
    start = time.perf_counter()
    for i in range(steps):
        _, _, terminated, truncated, _ = env.step(actions[i % 100])
        if terminated or truncated:
            env.reset()
    return steps, steps / (time.perf_counter() - start)


def random_steps(envs, num_steps: int) -> float:
    """Step all environments `num_steps` times with random actions; returns the steps per second of all together."""
    envs.reset(seed=1)
    actions = [envs.action_space.sample() for _ in range(100)]
    start = time.perf_counter()
    for i in range(num_steps):
        envs.step(actions[i % 100])
    return num_steps * envs.num_envs / (time.perf_counter() - start)


def logged_speeds(folder: Path) -> list[float]:
    """The steps per second that a run logged, one number for each interval of the same length."""
    return [event.value for event in EventAccumulator(str(folder)).Reload().Scalars("time/sps")]


def scaling_child(script: str, contender: str, num_envs: int):
    """Print the steps per second of two rollouts, or of as many random steps, as JSON."""
    import torch

    module = importlib.import_module(script)
    batch_size = SCALING[script]
    flags = f"--num-envs {num_envs} --num-steps {batch_size // num_envs} --total-timesteps {3 * batch_size}"
    flags += " --device cpu --num-checkpoints 1 --eval-episodes 1 --max-eval-steps 100"
    args = module.parse_args(flags.split())
    if contender == "ours":
        result = harmonic_mean(logged_speeds(module.train(args))[1:])  # the first rollout warms up
    else:
        torch.set_num_threads(args.num_threads)
        result = random_steps(module.make_envs(args, num_envs), 2 * batch_size // num_envs)
    print("RESULT", json.dumps({"steps_per_second": round(result)}))


def scaling(rounds: int, only: str):
    """Measure the steps per second over the number of environments; writes results/scaling.csv after each."""
    rows = []
    scripts = [script for script in SCALING if only in script]
    for round_number in range(1, rounds + 1):
        for script in scripts:
            for num_envs in NUM_ENVS:
                for contender in ("ours", "ceiling"):
                    task = {"script": script, "num_envs": num_envs, "contender": contender, "round": round_number}
                    words = ("--script", script, "--contender", contender, "--num-envs", num_envs)
                    rows.append(task | run_child("--child", "--scaling", *words))
                    print(rows[-1], flush=True)
                    write(RESULTS / "scaling.csv", rows, keep=lambda row: row["script"] not in scripts)


def gpu_child(script: str, contender: str, device: str, flags: str):
    """Print the steps per second of the second half of a run, when all is loaded and compiled, as JSON."""
    import torch
    from torch._dynamo.utils import counters

    module = importlib.import_module(script)
    flags = f"{GPU[script]} --device {device} {flags}"
    if contender == "ceiling":
        args = module.parse_args(flags.split())
        result = random_steps(module.make_envs(args, args.num_envs), args.total_timesteps // args.num_envs // 10)
    else:
        flags += f" --num-checkpoints 1 --eval-episodes 1 --max-eval-steps 100 --{contender}"
        speeds = logged_speeds(module.train(module.parse_args(flags.split())))
        result = harmonic_mean(speeds[len(speeds) // 2 :])
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else device
    # Inputs copied into CUDA graphs: none without graphs, a few if each graph is captured once, else many.
    copied = counters["inductor"]["cudagraph_recorded_non_static_inputs"]
    print("RESULT", json.dumps({"steps_per_second": round(result), "cuda_graph_inputs": copied, "device": name}))


def gpu(rounds: int, only: str, device: str, flags: str):
    """Measure the pixel scripts on a GPU, with and without --compile; writes results/gpu.csv after each."""
    rows = []
    tasks = {script: f"--device {device} {GPU[script]} {flags}".strip() for script in GPU if only in script}
    for round_number in range(1, rounds + 1):
        for script, all_flags in tasks.items():
            for contender in ("compile", "no-compile", "ceiling"):
                words = ("--script", script, "--contender", contender, "--device", device, f"--flags={flags}")
                rows.append({"script": script, "flags": all_flags, "contender": contender, "round": round_number})
                rows[-1] |= run_child("--child", "--gpu", *words)
                print(rows[-1], flush=True)
                write(RESULTS / "gpu.csv", rows, keep=lambda row: tasks.get(row["script"]) != row["flags"])


def memory_child(buffer_size: int):
    """Fill a replay of dqn_atari.py, learn for a few more steps, and print the peak memory as JSON."""
    import dqn_atari

    flags = f"--buffer-size {buffer_size} --learning-starts {buffer_size - 1000} --total-timesteps {buffer_size + 2000}"
    flags += " --device cpu --num-envs 50 --num-checkpoints 1 --eval-episodes 10 --max-eval-steps 1000"
    dqn_atari.train(dqn_atari.parse_args(flags.split()))
    print("RESULT", json.dumps({"peak_memory_mib": peak_memory()}))


def memory():
    """Measure the peak memory over the size of the replay; writes results/memory.csv after each."""
    rows = []
    for buffer_size in (10_000, 100_000, 300_000, 1_000_000):
        result = run_child("--child", "--memory", "--buffer-size", buffer_size)
        rows.append({"task": "dqn_atari Breakout, replay written full", "buffer_size": buffer_size} | result)
        print(rows[-1], flush=True)
        write(RESULTS / "memory.csv", rows)


def peak_memory() -> int | None:
    """The largest memory of this process so far in MiB, if the system tells."""
    if sys.platform == "win32":
        return None
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (1024 if sys.platform == "linux" else 1024**2)


def child(task: str, contender: str, threads: int):
    """Measure one contender and print the result as JSON. Everything but the imports is timed."""
    import torch

    torch.set_num_threads(threads)
    torch.optim.Adam([torch.zeros(1, requires_grad=True)])  # the first optimizer imports modules for a second
    measures = {"ours": measure_ours, "ours, float32": measure_float32, "sb3": measure_sb3, "sbx": measure_sbx}
    measures |= {"ceiling": measure_ceiling, "gemm": measure_gemm}
    library = importlib.import_module({"sb3": "stable_baselines3", "sbx": "sbx"}.get(contender, "torch"))
    importlib.import_module(TASKS[task][0])
    steps = TASKS[task][1] // (4 if TASKS[task][0] in PIXELS and contender in SHORTER else 1)
    start = time.perf_counter()
    steps, steady = measures[contender](task, steps)
    seconds = time.perf_counter() - start
    result = {"steps_per_second": round(steps / seconds), "steady": round(steady), "peak_memory_mib": peak_memory()}
    print("RESULT", json.dumps(result | {"version": library.__version__}))


def run_child(*words, scripts: Path = ROOT, program: str = __file__) -> dict:
    """Run a program as a child in an empty folder, with the scripts of a folder; returns what it measured."""
    path = os.pathsep.join([str(scripts), os.environ.get("PYTHONPATH", "")])
    with TemporaryDirectory() as folder:
        command = [sys.executable, str(Path(program).resolve()), *map(str, words)]
        result = subprocess.run(
            command, cwd=folder, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True
        )
    if result.returncode:
        sys.exit(result.stderr)
    return json.loads(result.stdout.rpartition("RESULT ")[2])


def speed(rounds: int, only: str):
    """Measure all tasks and contenders in turns; writes results/speed.csv after each, prints medians and ratios."""
    sys.path.insert(0, str(ROOT))
    rows = []
    tasks = [task for task in TASKS if only in task]
    for round_number in range(1, rounds + 1):
        for task in tasks:
            pixels = TASKS[task][0] in PIXELS
            cores = os.cpu_count()
            rivals = [("sb3", threads) for threads in ((cores,) if pixels else (1, 2)) if TASKS[task][3]]
            rivals += [("sbx", cores)] if TASKS[task][3] in ("PPO", "DQN", "SAC") else []  # SBX has no A2C
            defaults = importlib.import_module(TASKS[task][0]).parse_args([])
            ours = [("ours", defaults.num_threads)]
            if pixels and defaults.bfloat16:
                ours.append(("ours, float32", cores))
            limits = [("ceiling", 1), ("gemm", cores)] if pixels else [("ceiling", 1)]
            for contender, threads in (*ours, *rivals, *limits):
                result = run_child("--child", "--task", task, "--contender", contender, "--threads", threads)
                rows.append({"task": task, "contender": contender, "threads": threads, "round": round_number} | result)
                print(rows[-1], flush=True)
                write(RESULTS / "speed.csv", rows, keep=lambda row: row["task"] not in tasks)
    for task in tasks:
        rates = {}
        for row in rows:
            if row["task"] == task:
                key = (row["contender"], row["threads"]) if row["contender"] == "sb3" else row["contender"]
                rates.setdefault(key, []).append(row["steady"])
        shares = [a / b for a, b in zip(rates["ours"], rates["ceiling"])]
        print(f"{task}: {summary(rates['ours'])} steps/s when steady, ceiling {summary(rates['ceiling'])}")
        print(f"    {median(shares):.0%} [{min(shares):.0%} to {max(shares):.0%}] of the ceiling in the same round")
        if not TASKS[task][3]:
            continue
        sb3 = [max(rivals) for rivals in zip(*(rates[key] for key in rates if "sb3" in key))]
        print(f"    Stable-Baselines3 {summary(sb3)}")
        for contender in ("ours", "ours, float32"):
            ratios = [a / b for a, b in zip(rates.get(contender, ()), sb3)]
            if ratios:
                print(f"    {median(ratios):.2f} [{min(ratios):.2f} to {max(ratios):.2f}] times it: {contender}")


def summary(rates: list) -> str:
    """Median and range."""
    return f"{median(rates):,.0f} [{min(rates):,} to {max(rates):,}]"


def solve_ours(env_id: str, seed: int, solved) -> None:
    """Train with ppo.py; `solved` gets the mean return of each evaluation."""
    import ppo

    evaluate = ppo.evaluate

    def reported_evaluate(*args, **kwargs):
        returns = evaluate(*args, **kwargs)
        solved(returns.mean())
        return returns

    ppo.evaluate = reported_evaluate
    ppo.train(ppo.parse_args([*SOLVE[env_id][0].split(), "--seed", str(seed)]))


def solve_sb3(env_id: str, seed: int, solved) -> None:
    """Train with Stable-Baselines3 and RL Zoo's recipe, evaluated as often and over as many episodes."""
    from stable_baselines3 import PPO
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.evaluation import evaluate_policy

    _, _, interval, steps, recipe = SOLVE[env_id]

    class Evaluate(BaseCallback):
        def _on_step(self):
            return True

        def _on_rollout_start(self):
            if self.num_timesteps % interval == 0:
                solved(evaluate_policy(self.model, evaluation_envs, n_eval_episodes=10)[0])

    evaluation_envs = make_vec_env(env_id, n_envs=10, seed=1000 + seed)
    envs = make_vec_env(env_id, n_envs=recipe.pop("n_envs"), seed=seed)
    PPO("MlpPolicy", envs, device="cpu", seed=seed, **recipe).learn(steps, callback=Evaluate())


def solve_child(env_id: str, contender: str, seed: int):
    """Train until the mean of two evaluations in a row solves the task; prints the seconds as JSON, or null."""
    import torch

    torch.set_num_threads(1)
    torch.optim.Adam([torch.zeros(1, requires_grad=True)])
    means = []
    start = time.perf_counter()

    def solved(mean):
        means.append(float(mean))
        print(f"{time.perf_counter() - start:.1f} s: {mean:.1f}", file=sys.stderr)
        if sum(means[-2:]) >= 2 * SOLVE[env_id][1]:
            raise StopIteration

    seconds = None
    try:
        {"ours": solve_ours, "sb3": solve_sb3}[contender](env_id, seed, solved)
    except StopIteration:
        seconds = round(time.perf_counter() - start, 1)
    print("RESULT", json.dumps({"evaluations": len(means), "seconds": seconds}))


def solve(seeds: int, only: str):
    """Measure the time until a task is solved, two runs at a time; writes results/solve.csv after each run.

    The seeds begin at 301, because our flags were chosen on smaller ones. Stable-Baselines3 gets the first two.
    """
    rows = []
    tasks = [env_id for env_id in SOLVE if only in env_id]
    contenders = {"sb3": range(301, 303), "ours": range(301, 301 + seeds)}
    runs = [(env_id, name, seed) for env_id in tasks for name, chosen in contenders.items() for seed in chosen]

    def measure(run):
        env_id, contender, seed = run
        words = ("--env-id", env_id, "--contender", contender, "--seed", seed)
        return {"task": env_id, "contender": contender, "seed": seed} | run_child("--child", "--solve", *words)

    with ThreadPoolExecutor(2) as pool:
        for row in pool.map(measure, runs):
            rows.append(row)
            print(row, flush=True)
            write(RESULTS / "solve.csv", rows, keep=lambda row: row["task"] not in tasks)


def write(path: Path, rows: list, keep=lambda row: False):
    """Write `rows` and this machine as CSV, after the old rows of the file for which `keep` is true."""
    machine = {"cpu": f"{os.cpu_count()} cores, {cpu_name()}", "python": platform.python_version(), "commit": commit()}
    kept = [row for row in csv.DictReader(path.open()) if keep(row)] if path.exists() else []
    unfinished = path.with_suffix(".tmp")
    with unfinished.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *machine], lineterminator="\n")
        writer.writeheader()
        writer.writerows([*kept, *(row | machine for row in rows)])
    unfinished.replace(path)


def commit() -> str:
    """The commit of this repository, empty without git."""
    status, text = subprocess.getstatusoutput(f'git -C "{ROOT}" rev-parse HEAD')
    return "" if status else text


def cpu_name() -> str:
    """The name of the processor, if the system tells, and whether the pixel scripts compute in bfloat16 on it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return name + (" with AVX-512 BF16" if torch.cpu.get_capabilities().get("avx512_bf16", False) else "")


@dataclass
class Options:
    rounds: int = 7  # how many times to measure each contender
    only: str = ""  # measure only the tasks whose names contain this; the CSV keeps the others
    scaling: bool = False  # measure over the number of environments instead
    solve: bool = False  # measure the time to solve a task instead
    seeds: int = 5  # our seeds of --solve
    gpu: bool = False  # measure the pixel scripts on a GPU instead
    device: str = "cuda"  # the device of --gpu
    flags: str = ""  # more flags for the scripts of --gpu
    memory: bool = False  # measure the memory of replays instead
    child: bool = False  # (internal) measure one contender
    task: str = "ppo LunarLander-v3, 16 envs"  # (internal) what to measure
    contender: str = "ours"  # (internal) ours, sb3, ceiling, ...
    threads: int = 1  # (internal) CPU threads of torch
    env_id: str = "CartPole-v1"  # (internal) task of one run of --solve
    seed: int = 1  # (internal) its seed
    script: str = "ppo"  # (internal) script of one run of --scaling
    num_envs: int = 1  # (internal) its number of environments
    buffer_size: int = 10_000  # (internal) size of one replay of --memory


if __name__ == "__main__":
    options = tyro.cli(Options, description=__doc__.partition("\n")[0])
    if options.child and options.solve:
        solve_child(options.env_id, options.contender, options.seed)
    elif options.child and options.scaling:
        scaling_child(options.script, options.contender, options.num_envs)
    elif options.child and options.gpu:
        gpu_child(options.script, options.contender, options.device, options.flags)
    elif options.child and options.memory:
        memory_child(options.buffer_size)
    elif options.child:
        child(options.task, options.contender, options.threads)
    elif options.scaling:
        scaling(options.rounds, options.only)
    elif options.gpu:
        gpu(options.rounds, options.only, options.device, options.flags)
    elif options.solve:
        solve(options.seeds, options.only)
    elif options.memory:
        memory()
    else:
        speed(options.rounds, options.only)
