"""Steps per second of Sample Factory 2.1 and of ppo.py on the lander: benchmarks/results/sample_factory.csv.

Sample Factory needs gymnasium below 1.0, so it has a virtual environment of its own, and LunarLander-v2 instead of v3
(the same physics and the same observations). It is asynchronous: two processes play, a third one learns, and together
they take both cores. It runs with minibatches of 1,024; with the 64 of ppo.py its learner is below 400 steps/s.

    python3 -m venv sf && sf/bin/pip install sample-factory==2.1.1 "gymnasium<1" box2d==2.3.10 pygame-ce
    python benchmarks/against_sample_factory.py --python sf/bin/python --rounds 3
"""

import argparse
import re
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

STEPS = 16_384 * 12
TASK = "ppo LunarLander-v3, 16 envs"
FLAGS = (
    "--algo=APPO --env=LunarLander-v2 --experiment=lander --device=cpu --num_workers=2 --num_envs_per_worker=8 "
    "--use_rnn=False --recurrence=1 --with_vtrace=False --encoder_mlp_layers 64 64 --nonlinearity=tanh "
    "--actor_critic_share_weights=False --normalize_input=False --normalize_returns=False --rollout=1024 "
    "--num_epochs=4 --gamma=0.999 --gae_lambda=0.98 --exploration_loss_coeff=0.01 --ppo_clip_ratio=0.2 "
    f"--max_grad_norm=0.5 --learning_rate=3e-4 --train_for_env_steps={STEPS} --decorrelate_envs_on_one_worker=False "
    "--worker_num_splits=1"
)


def make_lander(name, cfg=None, env_config=None, render_mode=None):
    """The environment; Sample Factory's processes import this function."""
    import gymnasium as gym

    return gym.make(name)


def child(batch_size: int):
    """Train with Sample Factory; runs in its virtual environment."""
    from sample_factory.cfg.arguments import parse_full_cfg, parse_sf_args
    from sample_factory.envs.env_utils import register_env
    from sample_factory.train import run_rl

    register_env("LunarLander-v2", make_lander)
    argv = [*FLAGS.split(), f"--batch_size={batch_size}", f"--num_batches_per_epoch={16_384 // batch_size}"]
    parser, _ = parse_sf_args(argv=argv)
    run_rl(parse_full_cfg(parser, argv))


def measure(python: str, batch_size: int) -> int:
    """The steps per second of the second half of a run, from the lines that Sample Factory logs."""
    with TemporaryDirectory() as folder:
        command = [python, str(Path(__file__).resolve()), "--child", str(batch_size)]
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    lines = re.findall(r"\[(\d+-\d+-\d+ \d+:\d+:\d+,\d+)\].*Total num frames: (\d+)", result.stdout + result.stderr)
    if len(lines) < 4:
        sys.exit(result.stderr[-3000:])
    points = [(datetime.strptime(when, "%Y-%m-%d %H:%M:%S,%f").timestamp(), int(frames)) for when, frames in lines]
    start = next(point for point in points if point[1] >= STEPS / 2)
    end = points[-1]
    return round((end[1] - start[1]) / (end[0] - start[0]))


def main(python: str, rounds: int):
    """Measure in turns; writes the CSV after each."""
    from speed import RESULTS, run_child, write

    rows = []
    for round_number in range(1, rounds + 1):
        for contender in ("ppo.py, minibatches of 64", "Sample Factory, minibatches of 1024"):
            if contender.startswith("ppo.py"):
                rate = run_child("--child", "--task", TASK, "--contender", "ours", "--threads", 1)["steady"]
            else:
                rate = measure(python, int(contender.split()[-1]))
            rows.append({"contender": contender, "round": round_number, "steady": rate})
            print(rows[-1], flush=True)
            write(RESULTS / "sample_factory.csv", rows)
    for contender in dict.fromkeys(row["contender"] for row in rows):
        print(contender, median(row["steady"] for row in rows if row["contender"] == contender))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--python", help="the python of Sample Factory's virtual environment")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child", type=int)
    options = parser.parse_args()
    if options.child:
        child(options.child)
    else:
        main(options.python, options.rounds)
