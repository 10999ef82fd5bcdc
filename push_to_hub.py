"""Evaluates, films and packages the checkpoint of any script, and pushes the package to the Hugging Face Hub.

Without --repo-id nothing leaves this machine: it is also the way to score and to watch an agent.

    python push_to_hub.py --checkpoint runs/.../checkpoint.pt
    python push_to_hub.py --checkpoint runs/.../checkpoint.pt --repo-id me/ppo-LunarLander-v3
    python push_to_hub.py --checkpoint hf://me/ppo-LunarLander-v3

The package, a folder in hub/, holds what the Hub shows and what is needed to use the agent: README.md (the model
card), model.safetensors, config.json, results.json, replay.mp4, learning_curve.png, the script, logs/.

No code of a checkpoint or a package is run: weights are tensors, flags are JSON, and the script that rebuilds the
agent is the one beside this file.
"""

import ast
import csv
import importlib
import json
import os
import re
import shlex
import shutil
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from types import ModuleType

import imageio
import numpy as np
import torch
import tyro
from safetensors.torch import load_file, save_file
from tqdm import tqdm

# --- config ---


@dataclass
class Options:
    """The flags."""

    checkpoint: str  # checkpoint.pt, the folder of a run, the folder of a package, or hf://user/name
    repo_id: str | None = None  # user/name on the Hub to push to; nothing leaves this machine without it
    private: bool = False  # make a new repository private
    commit_message: str = "Add a trained agent"  # message of the push
    tags: tuple[str, ...] = ()  # more tags for the model card
    num_eval_episodes: int = 100  # episodes to evaluate
    seed: int = 1  # seed of the evaluation; Taxi takes the seeds of the Deep RL Course
    video_episodes: int = 3  # episodes to film, as far as they fit into --video-seconds
    video_seconds: float = 30  # length of the film at most
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    output: str = "hub"  # folder in which packages are made
    trust_env_package: bool = False  # import the package that a package:EnvId of somebody else's agent names


# What the Deep RL Course asks for: mean - std at least this.
THRESHOLDS = {
    "LunarLander-v3": 200.0,
    "CartPole-v1": 350.0,
    "Taxi-v4": 4.5,
    "SpaceInvadersNoFrameskip-v4": 200.0,
    "PandaReachDense-v3": -3.5,
}
# The seeds with which the course evaluates Taxi.
TAXI_SEEDS = [
    *(16, 54, 165, 177, 191, 191, 120, 80, 149, 178, 48, 38, 6, 125, 174, 73, 50, 172, 100, 148, 146, 6, 25, 40, 68),
    *(148, 49, 167, 9, 97, 164, 176, 61, 7, 54, 55, 161, 131, 184, 51, 170, 12, 120, 113, 95, 126, 51, 98, 36, 135),
    *(54, 82, 45, 95, 89, 59, 95, 124, 9, 113, 58, 85, 51, 134, 121, 169, 105, 21, 30, 11, 50, 65, 12, 43, 82, 145),
    *(152, 97, 106, 55, 31, 85, 38, 112, 102, 168, 123, 97, 21, 83, 158, 26, 80, 63, 5, 81, 32, 11, 28, 148),
]
# What a package is made of; a push deletes what is left of these from an earlier one, and nothing else.
PACKAGE_FILES = "*.py config.json learning_curve.png policy.png logs/* model.safetensors replay.mp4".split()
PACKAGE_FILES += ["results.json"]
SCRIPT = Path(__file__)


def refuse(message: str):
    """End the program for bad input: one line on stderr, exit code 2."""
    print(f"{SCRIPT.name}: error: {message}", file=sys.stderr)
    sys.exit(2)


# --- reading a checkpoint or a package ---


@dataclass
class Saved:
    """What a checkpoint and a package have in common."""

    folder: Path  # the run's folder, or the package's
    is_package: bool  # which may come from anybody
    script: str  # file name of the script that trained it
    config: dict  # its flags
    agent: dict  # state_dict of its Agent
    step: int  # environment steps it was trained for


def read(checkpoint: str) -> Saved:
    """Read a checkpoint.pt, the folder of a run or of a package, or fetch a package from the Hub."""
    if checkpoint.startswith("hf://"):
        from huggingface_hub import snapshot_download

        wanted = {"repo_id": checkpoint.removeprefix("hf://"), "allow_patterns": PACKAGE_FILES}
        folder = Path(talk_to_hub(lambda: snapshot_download(**wanted), f"fetch {checkpoint}"))
    else:
        folder = Path(checkpoint)
        if folder.is_file() and folder.name != "checkpoint.pt":
            refuse(f"--checkpoint {checkpoint}: neither a checkpoint.pt nor a folder")
        folder = folder.parent if folder.is_file() else folder
    is_package = (folder / "model.safetensors").is_file()
    if not is_package and not (folder / "checkpoint.pt").is_file():
        refuse(f"--checkpoint {checkpoint}: no checkpoint.pt and no model.safetensors there")
    try:
        if is_package:
            about = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            agent = load_file(folder / "model.safetensors")
        else:
            about = torch.load(folder / "checkpoint.pt", map_location="cpu", weights_only=True)
            agent = dict(about["agent"])
        return Saved(folder, is_package, str(about["script"]), dict(about["config"]), agent, int(about["step"]))
    except Exception:  # a damaged or foreign file can raise anything
        refuse(f"--checkpoint {checkpoint}: damaged, or not written by a script of this project")


def import_script(name: str) -> ModuleType:
    """The script called `name` beside this file, if it is one of this kind."""
    path = SCRIPT.resolve().parent / name
    if not re.fullmatch(r"\w+\.py", name) or not path.is_file():
        refuse(f"the checkpoint names the script {name!r}, which is not beside {SCRIPT.name}")
    names = {getattr(node, "name", None) for node in ast.parse(path.read_text(encoding="utf-8")).body}
    if not {"Args", "make_envs", "Agent", "train", "evaluate"} <= names:
        refuse(f"the checkpoint names {name!r}, which is no training script")
    sys.path.insert(0, str(path.parent))
    return importlib.import_module(path.stem)


def rebuild(saved: Saved, options: Options) -> tuple:
    """The script, its Args and its Agent with the saved weights, on the device."""
    module = import_script(saved.script)
    try:
        args = module.Args(**saved.config)
        package, is_foreign, _ = args.env_id.rpartition(":")
        torch.set_num_threads(args.num_threads)
    except Exception:  # flags that are missing, too many or of a wrong type
        refuse(f"--checkpoint {options.checkpoint}: its flags are not those of this version of {saved.script}")
    if is_foreign and saved.is_package and not options.trust_env_package:
        refuse(f"{args.env_id} would import the package {package}; if you trust it, add --trust-env-package")
    envs = module.open_envs(args, num_envs=1)
    device = module.pick_device(options.device, envs.single_observation_space)
    agent = module.Agent(envs, args).to(device)
    envs.close()
    try:
        agent.load_state_dict(saved.agent)
    except Exception:  # other names, shapes or types
        refuse(f"--checkpoint {options.checkpoint}: its weights do not fit {saved.script} on {args.env_id}")
    return module, args, agent


# --- evaluating and filming ---


def score(module: ModuleType, args, agent, options: Options) -> np.ndarray:
    """Returns (num_eval_episodes,) of the script's own evaluation, ten episodes at a time."""
    seeds = np.random.SeedSequence(options.seed).generate_state(options.num_eval_episodes) >> 1
    if args.env_id == "Taxi-v4":
        seeds = np.resize(TAXI_SEEDS, options.num_eval_episodes)
    returns = []
    with tqdm(total=len(seeds), desc="evaluate", unit="episode") as bar:
        for start in range(0, len(seeds), 10):
            batch = [int(seed) for seed in seeds[start : start + 10]]
            returns.append(module.evaluate(agent, args, len(batch), batch))
            bar.update(len(batch))
    return np.concatenate(returns)


def film(module: ModuleType, args, agent, options: Options, path: Path):
    """Film episodes into `path`, H.264 in yuv420p, at the environment's own speed, until --video-seconds."""
    try:
        envs = module.make_envs(args, 1, evaluation=True, render=True)
    except Exception as error:  # a user's environment may raise anything
        print(f"no video, {args.env_id} does not render: {error}", file=sys.stderr)
        return
    fps = envs.metadata.get("render_fps", 30)
    envs.close()
    room = max(2, round(options.video_seconds * fps))  # frames
    with imageio.get_writer(path, fps=fps, codec="libx264", pixelformat="yuv420p", macro_block_size=2) as video:

        def add(frame):
            """Write one frame and take it off the room that is left."""
            nonlocal room
            room -= 1
            video.append_data(frame)

        for seed in range(options.seed, options.seed + options.video_episodes):
            if room >= 2:
                shorter = replace(args, max_eval_steps=min(args.max_eval_steps, room - 1))
                module.evaluate(agent, shorter, 1, [seed], film=add)


# --- packaging ---


def command(script: str, given, default) -> str:
    """The command line that gives `script` the flags `given`; those at their `default` go unsaid."""
    words = ["python", script]
    for name, value in asdict(given).items():
        flag = name.replace("_", "-")
        if value == getattr(default, name):
            continue
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", *(value if isinstance(value, tuple) else [str(value)])]
    return shlex.join(words)


def draw_learning_curve(saved: Saved, path: Path):
    """Returns of the training episodes and their running mean, if the run or the package kept them."""
    source = next((p for p in (saved.folder / "episodes.csv", saved.folder / "logs/episodes.csv") if p.is_file()), None)
    rows = list(csv.DictReader(source.open())) if source else []
    if not rows:
        return
    from matplotlib.figure import Figure

    steps, returns = ([float(row[key]) for row in rows] for key in ("step", "return"))
    window = max(1, len(rows) // 50)
    mean = np.convolve(returns, np.ones(window) / window, mode="valid")
    axes = (figure := Figure(figsize=(8, 4), layout="constrained")).subplots()
    axes.plot(steps, returns, ".", color="#9bb7d4", markersize=2, label="training episodes")
    axes.plot(steps[window - 1 :], mean, color="#1f4e79", label=f"mean of {window}")
    axes.set(xlabel="environment steps", ylabel="return")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def model_card(module: ModuleType, args, saved: Saved, results: dict, options: Options, folder: Path) -> str:
    """The README.md of the package in `folder`; its first metric is what the Deep RL Course reads."""
    from huggingface_hub import EvalResult, ModelCardData

    name, env_name = module.__name__, args.env_id.rpartition(":")[2].rpartition("/")[2]
    if env_name == "FrozenLake-v1":  # as in the Deep RL Course
        kwargs = json.loads(args.env_kwargs)
        env_name += f"-{kwargs.get('map_name', '4x4')}" + "-no_slippery" * (not kwargs.get("is_slippery", True))
    course_tag = {"q_learning": "q-learning", "reinforce": "reinforce"}.get(name, "deep-rl-course")
    value = f"{results['mean_reward']:.2f} +/- {results['std_reward']:.2f}"
    kind = "reinforcement-learning"
    metric = {"metric_type": "mean_reward", "metric_name": "mean_reward", "metric_value": value}
    data = ModelCardData(
        library_name="solorl",
        pipeline_tag=kind,
        tags=list(dict.fromkeys([kind, "deep-reinforcement-learning", env_name, name, course_tag, *options.tags])),
        model_name=f"{name}-{env_name}",
        eval_results=[
            EvalResult(task_type=kind, task_name=kind, dataset_type=env_name, dataset_name=env_name, **metric)
        ],
    )
    how = "the most likely action" if args.eval_deterministic else "sampled actions"
    repo = options.repo_id or "user/name"
    table = "\n".join(f"| `{key}` | `{value}` |" for key, value in saved.config.items())
    movie = f"https://huggingface.co/{repo}/resolve/main/replay.mp4"
    pictures = f'<video src="{movie}" controls autoplay loop muted></video>\n\n' * (folder / "replay.mp4").exists()
    pictures += "![The greedy policy](policy.png)\n\n" * (folder / "policy.png").exists()
    pictures += "![Training returns](learning_curve.png)\n\n" * (folder / "learning_curve.png").exists()
    return f"""---
{data.to_yaml()}
---

# {name} on {args.env_id}

An agent trained with SoloRL's one-file [`{name}.py`]({name}.py) for {saved.step:,} environment steps. Over
{results["n_eval_episodes"]} episodes with {how} its return is **{value}**.

{pictures}## Train it again

```bash
{command(saved.script, replace(args, track=False, resume=None), module.Args())}
```

## Use it

In a clone of SoloRL, score and film it with `python push_to_hub.py --checkpoint hf://{repo}`, or:

```python
import json
import {name}
from huggingface_hub import snapshot_download
from safetensors.torch import load_file

folder = snapshot_download("{repo}")
args = {name}.Args(**json.load(open(folder + "/config.json"))["config"])
agent = {name}.Agent({name}.make_envs(args, 1), args)
agent.load_state_dict(load_file(folder + "/model.safetensors"))
print({name}.evaluate(agent, args, episodes=10, seed=1).mean())
```

## Flags

| flag | value |
|---|---|
{table}

Versions: {", ".join(f"{key} {value}" for key, value in package_versions(module).items())}.
"""


def package_versions(module: ModuleType) -> dict:
    """Versions of the packages that made the evaluation."""
    return {key: str(value).split()[0] for key, value in module.versions().items() if key != "commit"}


def make_package(module: ModuleType, args, agent, saved: Saved, options: Options) -> tuple[Path, dict]:
    """Evaluate, film and write all files; returns the folder, complete or not there, and the results."""
    is_fetched = options.checkpoint.startswith("hf://")
    name = options.checkpoint.removeprefix("hf://").replace("/", "-") if is_fetched else saved.folder.resolve().name
    target = Path(options.output, name)
    if (target / "checkpoint.pt").exists() or target.is_file():
        refuse(f"--output {options.output}: the package would overwrite {target}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        refuse(f"--output {options.output}: {error}")
    returns = score(module, args, agent, options)
    results = {
        "env_id": args.env_id,
        "mean_reward": float(returns.mean()),
        "std_reward": float(returns.std()),
        "is_deterministic": args.eval_deterministic,
        "n_eval_episodes": len(returns),
        "eval_datetime": datetime.now(timezone.utc).isoformat(),
    }
    with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
        folder = Path(temporary, "package")
        (folder / "logs").mkdir(parents=True)
        save_file({key: value.contiguous() for key, value in saved.agent.items()}, folder / "model.safetensors")
        about = {"script": saved.script, "step": saved.step, "config": saved.config}
        about["versions"] = package_versions(module)
        (folder / "config.json").write_text(json.dumps(about, indent=2), encoding="utf-8")
        (folder / "results.json").write_text(json.dumps(results, indent=2), encoding="utf-8")
        shutil.copy(Path(module.__file__), folder / saved.script)
        for source in (saved.folder, saved.folder / "logs"):
            for path in [*source.glob("events.out.tfevents.*"), *source.glob("episodes.csv")]:
                if is_fetched or not path.is_symlink():  # a link could point to anything of this user's
                    shutil.copy(path, folder / "logs" / path.name)
        picture = saved.folder / "policy.png"  # of q_learning.py
        if picture.is_file() and (is_fetched or not picture.is_symlink()):
            shutil.copy(picture, folder)
        film(module, args, agent, options, folder / "replay.mp4")
        draw_learning_curve(saved, folder / "learning_curve.png")
        card = model_card(module, args, saved, results, options, folder)
        (folder / "README.md").write_text(card, encoding="utf-8")
        shutil.rmtree(target, ignore_errors=True)
        folder.replace(target)
    return target, results


# --- the Hub ---


def talk_to_hub(request, what: str, remedy: str = ""):
    """The result of `request()`; three tries where the Hub or the network is at fault, then one clear line."""
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    reasons = {
        401: "the token is missing or wrong; log in with: hf auth login",
        403: "this token is not allowed to; it needs write permission, see huggingface.co/settings/tokens",
        404: "no such repository, or not for this token",
    }
    for wait in (1, 3, None):
        try:
            return request()
        except Exception as error:  # of httpx2, of the client, of an upload
            status = getattr(getattr(error, "response", None), "status_code", None)
            status = 404 if isinstance(error, RepositoryNotFoundError) and not remedy else status
            message = reasons.get(status) or f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            if wait is None or status in reasons or isinstance(error, HFValidationError):
                refuse(f"cannot {what}: {message}{remedy}")
            print(f"cannot {what}: {message}; trying again in {wait} s", file=sys.stderr)
            time.sleep(wait)


def push(folder: Path, env_id: str, options: Options) -> str:
    """Upload the package in one commit, which also deletes what an earlier one left; returns the address."""
    from huggingface_hub import HfApi, get_token

    again = replace(options, checkpoint=str(folder), trust_env_package=":" in env_id)
    remedy = f"; the package is in {folder}, to try again: {command(SCRIPT.name, again, Options(''))}"
    if get_token() is None:
        refuse(f"cannot push to {options.repo_id}: no token; log in with: hf auth login{remedy}")
    api, what = HfApi(), f"push to {options.repo_id}"
    create = {"repo_id": options.repo_id, "private": options.private, "exist_ok": True}
    talk_to_hub(lambda: api.create_repo(**create), what, remedy)
    upload = {"repo_id": options.repo_id, "folder_path": folder, "commit_message": options.commit_message}
    talk_to_hub(lambda: api.upload_folder(**upload, delete_patterns=PACKAGE_FILES), what, remedy)
    return f"{api.endpoint}/{options.repo_id}"


def main(options: Options):
    """Read, evaluate, film, package, report, push."""
    for name in ("num_eval_episodes", "video_episodes", "video_seconds"):
        if not 0 < getattr(options, name) < float("inf"):
            refuse(f"--{name.replace('_', '-')} {getattr(options, name)}: must be a positive number")
    if options.seed < 0:
        refuse(f"--seed {options.seed}: must not be negative")
    if options.repo_id and not re.fullmatch(r"[\w.-]+/[\w.-]+", options.repo_id):
        refuse(f"--repo-id {options.repo_id}: must be user/name")
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # pygame needs no display then
    saved = read(options.checkpoint)
    module, args, agent = rebuild(saved, options)
    folder, results = make_package(module, args, agent, saved, options)
    mean, std = results["mean_reward"], results["std_reward"]
    episodes = results["n_eval_episodes"]
    print(f"{args.env_id}: {mean:.2f} +/- {std:.2f} over {episodes} episodes, mean - std {mean - std:.2f}")
    if (threshold := THRESHOLDS.get(args.env_id.rpartition(":")[2])) is not None:
        print(f"Deep RL Course: {threshold} asked for, {'passed' if mean - std >= threshold else 'not reached'}")
    print(f"package: {folder}")
    if options.repo_id:
        print(f"pushed: {push(folder, args.env_id, options)}")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__.partition("\n")[0]))
