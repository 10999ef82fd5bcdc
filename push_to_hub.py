"""Evaluate, film and package a checkpoint of any script, and push the package to the Hugging Face Hub.

Without --repo-id nothing leaves this machine, so this is also the way to score and to watch an agent.

    python push_to_hub.py --checkpoint RUN_FOLDER
    python push_to_hub.py --checkpoint RUN_FOLDER --repo-id me/ppo-LunarLander-v3
    python push_to_hub.py --checkpoint hf://me/ppo-LunarLander-v3

The package is a folder in hub/ with what the Hub shows and what is needed to use the agent: README.md (the model card),
model.safetensors, config.json, results.json, replay.mp4, learning_curve.png, the script and logs/.

No code from a checkpoint or a package is run: weights are tensors, flags are JSON, and the script that rebuilds the
agent is the one beside this file. An environment package:EnvId is code; it needs --trust-env-package.
"""

import importlib
import json
import math
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
from types import ModuleType, SimpleNamespace

import gymnasium as gym
import imageio
import numpy as np
import torch
import tyro
from safetensors.torch import load_file, save_file

# --- config ---


@dataclass
class Options:
    """Command-line flags."""

    checkpoint: str  # run folder or its checkpoint.pt, folder of a package, or hf://user/name
    repo_id: str | None = None  # user/name of the repository on the Hub; without it nothing leaves this machine
    private: bool = False  # make a new repository private
    commit_message: str = "Add a trained agent"  # message of the push
    tags: tuple[str, ...] = ()  # more tags for the model card
    num_eval_episodes: int | None = None  # episodes to evaluate; by default as many as the run evaluated
    seed: int | None = None  # seed of the evaluation; by default the run's, so that the score is the run's, too
    video_seconds: float = 30  # maximum length of the film, which shows the first episode of the evaluation
    device: str | None = None  # cpu, cuda, cuda:1, mps or auto; by default the run's
    output: str = "hub"  # folder for packages
    trust_env_package: bool = False  # import the package of a package:EnvId environment


# What the Deep RL Course asks for: mean - std at least this, on the unchanged environment.
THRESHOLDS = {
    "LunarLander-v3": 200.0,
    "CartPole-v1": 350.0,
    "Taxi-v4": 4.5,
    "SpaceInvadersNoFrameskip-v4": 200.0,
    "panda_gym:PandaReachDense-v3": -3.5,
    "doom_health_gathering_supreme": 5.0,
}
# The seeds with which the course evaluates Taxi.
TAXI_SEEDS = [
    *(16, 54, 165, 177, 191, 191, 120, 80, 149, 178, 48, 38, 6, 125, 174, 73, 50, 172, 100, 148, 146, 6, 25, 40, 68),
    *(148, 49, 167, 9, 97, 164, 176, 61, 7, 54, 55, 161, 131, 184, 51, 170, 12, 120, 113, 95, 126, 51, 98, 36, 135),
    *(54, 82, 45, 95, 89, 59, 95, 124, 9, 113, 58, 85, 51, 134, 121, 169, 105, 21, 30, 11, 50, 65, 12, 43, 82, 145),
    *(152, 97, 106, 55, 31, 85, 38, 112, 102, 168, 123, 97, 21, 83, 158, 26, 80, 63, 5, 81, 32, 11, 28, 148),
]
# The files of a package. Only these are replaced in an earlier package, here or on the Hub.
PACKAGE_FILES = "README.md *.py config.json learning_curve.png logs/* model.safetensors replay.mp4 results.json".split()
SCRIPT = Path(__file__)


def fail(message):
    """End the program because of bad input: one line on stderr, exit code 2."""
    print(f"{SCRIPT.name}: error: {str(message).splitlines()[0]}", file=sys.stderr)
    sys.exit(2)


# --- reading a checkpoint or a package ---


def read(checkpoint: str) -> SimpleNamespace:
    """Read a run or a package (hf://user/name is downloaded first): its `folder`, the file name of the `script` that
    trained it, the flags `config`, the weights `agent` (a state_dict), and the `step` that it was trained for."""
    folder = Path(checkpoint)
    if checkpoint.startswith("hf://"):
        from huggingface_hub import snapshot_download

        wanted = {"repo_id": checkpoint.removeprefix("hf://"), "allow_patterns": PACKAGE_FILES}
        folder = Path(talk_to_hub(lambda: snapshot_download(**wanted), f"fetch {checkpoint}"))
    elif folder.name == "checkpoint.pt":
        folder = folder.parent
    try:
        if (folder / "model.safetensors").is_file():
            about = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            agent = load_file(folder / "model.safetensors")
        else:
            about = torch.load(folder / "checkpoint.pt", map_location="cpu", weights_only=True)
            agent = dict(about["agent"])
        about = {"script": str(about["script"]), "config": dict(about["config"]), "step": int(about["step"])}
        return SimpleNamespace(folder=folder, agent=agent, **about)
    except Exception as error:  # a damaged or foreign file can raise anything
        fail(f"--checkpoint {checkpoint}: neither a run nor a package of this project: {type(error).__name__}: {error}")


def to_words(config, default) -> list[str]:
    """The flags `config` as words of a command line; those at their `default` are left out."""
    words = []
    for name, value in asdict(config).items():
        flag = name.replace("_", "-")
        if value == getattr(default, name):
            continue
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, tuple):
            words += [f"--{flag}", *value]
        else:
            words.append(f"--{flag}={value}")
    return words


def rebuild(saved: SimpleNamespace, options: Options) -> tuple[ModuleType, object, torch.nn.Module]:
    """The script beside this file that trained the agent, its Args, and its Agent with the saved weights."""
    here = SCRIPT.resolve().parent
    if saved.script not in {path.name for path in here.glob("*.py") if "\nclass Agent(" in path.read_text("utf-8")}:
        fail(f"--checkpoint {options.checkpoint}: {saved.script!r} is not a training script beside {SCRIPT.name}")
    sys.path.insert(0, str(here))
    module = importlib.import_module(saved.script.removesuffix(".py"))
    try:
        args = module.Args(**saved.config | {"resume": None, "track": False, "capture_video": False})
        words = to_words(args, module.Args())
    except Exception as error:  # flags of another version, or of a wrong type
        fail(f"--checkpoint {options.checkpoint}: not the flags of this version of {saved.script}: {error}")
    if module.parse_args(words) != args or args.eval_episodes > 10_000:  # parse_args checks them like typed ones
        fail(f"--checkpoint {options.checkpoint}: its flags are not valid flags of {saved.script}")
    if ":" in args.env_id and not options.trust_env_package:
        package = args.env_id.partition(":")[0]
        fail(f"{args.env_id} would import the package {package}; if you trust it, add --trust-env-package")
    torch.set_num_threads(args.num_threads)
    device = module.pick_device(options.device or args.device)
    envs = module.open_envs(args, num_envs=1)
    try:
        agent = module.Agent(envs, args).to(device)
        agent.load_state_dict(saved.agent)
    except Exception as error:  # other names, shapes or types
        fail(f"--checkpoint {options.checkpoint}: its weights do not fit {saved.script} on {args.env_id}: {error}")
    envs.close()
    module.check_finite(saved.agent)
    return module, args, agent


# --- evaluating and filming ---


def is_course_task(module: ModuleType, args) -> bool:
    """Whether the Deep RL Course scores this environment: no keyword changed, no episode stopped early."""
    if args.env_id not in THRESHOLDS or json.loads(args.env_kwargs) != {}:
        return False
    limit = gym.spec(args.env_id.rpartition(":")[2]).max_episode_steps or math.inf
    return args.max_eval_steps >= min(limit, module.Args.max_eval_steps)


def report(env_id: str, returns: np.ndarray):
    """Print a score in the words of the training scripts."""
    mean, std = returns.mean(), returns.std()
    print(f"{env_id}: {mean:.2f} +/- {std:.2f} over {len(returns)} episodes, mean - std {mean - std:.2f}")


def score(module: ModuleType, args, agent, options: Options) -> tuple[np.ndarray, np.ndarray]:
    """The returns of the script's own evaluation, and the returns that count for the course: in Taxi, on its seeds."""
    returns = module.evaluate(agent, args, options.num_eval_episodes or args.eval_episodes)
    report(args.env_id, returns)
    course_returns = returns
    if is_course_task(module, args):
        if args.env_id == "Taxi-v4":
            course_returns = module.evaluate(agent, args, len(TAXI_SEEDS), TAXI_SEEDS)
            report("Taxi-v4 on the seeds of the Deep RL Course", course_returns)
        is_passed = course_returns.mean() - course_returns.std() >= THRESHOLDS[args.env_id]
        print(f"Deep RL Course: {THRESHOLDS[args.env_id]} asked for, {'passed' if is_passed else 'not reached'}")
    return returns, course_returns


def film(module: ModuleType, args, agent, options: Options, path: Path):
    """Film the first episode of the evaluation into `path` (H.264, yuv420p) at the environment's own speed."""
    envs = module.make_envs(args, 1, evaluation=True)
    envs.close()
    if "rgb_array" not in envs.metadata.get("render_modes", []):
        print(f"no video: {args.env_id} has no render mode rgb_array", file=sys.stderr)
        return
    fps = envs.metadata.get("render_fps", 30)
    short = replace(args, max_eval_steps=min(args.max_eval_steps, max(1, round(options.video_seconds * fps))))
    with imageio.get_writer(path, fps=fps, codec="libx264", pixelformat="yuv420p", macro_block_size=2) as video:
        module.evaluate(agent, short, 1, film=video.append_data)


# --- packaging ---


def draw_learning_curve(saved: SimpleNamespace, path: Path):
    """Draw the returns of the training episodes and their running mean, if there is a readable episodes.csv."""
    sources = [file for file in (saved.folder / "episodes.csv", saved.folder / "logs/episodes.csv") if file.is_file()]
    text = sources[0].read_text(encoding="utf-8", errors="replace") if sources else ""
    rows = re.findall(r"^(\d+),(-?\d+(?:\.\d+)?(?:e[+-]?\d+)?),\d+$", text, re.MULTILINE)  # skips torn rows
    if not rows:
        return
    from matplotlib.figure import Figure

    steps, returns = np.array(rows, dtype=float).T
    window = max(1, len(rows) // 50)
    mean = np.convolve(returns, np.ones(window) / window, mode="valid")
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, returns, ".", color="#9bb7d4", markersize=2, label="training episodes")
    axes.plot(steps[window - 1 :], mean, color="#1f4e79", label=f"mean of {window}")
    axes.set(xlabel="environment steps", ylabel="return")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def plain(value) -> str:
    """`value` as text that cannot end a line or a code block of the model card."""
    return "".join(c if c.isprintable() and c != "`" else "?" for c in str(value))


def card_data(name: str, args, value: str, options: Options) -> str:
    """The YAML at the top of a model card; its first metric is what the Deep RL Course reads."""
    from huggingface_hub import EvalResult, ModelCardData

    env = plain(args.env_id.rpartition(":")[2].rpartition("/")[2])
    if env == "FrozenLake-v1":  # as in the course
        kwargs = json.loads(args.env_kwargs)
        slippery = "" if kwargs.get("is_slippery", True) else "-no_slippery"
        env += f"-{plain(kwargs.get('map_name', '4x4'))}{slippery}"
    course_tag = {"q_learning": "q-learning", "reinforce": "reinforce"}.get(name, "deep-rl-course")
    rl = "reinforcement-learning"
    return ModelCardData(
        library_name="solorl",
        pipeline_tag=rl,
        tags=list(dict.fromkeys([rl, "deep-reinforcement-learning", env, name, course_tag, *options.tags])),
        model_name=f"{name}-{env}",
        eval_results=[EvalResult(rl, env, env, "mean_reward", value, task_name=rl, metric_name="mean_reward")],
    ).to_yaml()


def model_card(module: ModuleType, args, saved: SimpleNamespace, course_returns, options: Options, folder: Path) -> str:
    """The README.md of the package in `folder`."""
    name = module.__name__
    value = f"{course_returns.mean():.2f} +/- {course_returns.std():.2f}"
    repo = options.repo_id or "user/name"
    video = f'<video src="https://huggingface.co/{repo}/resolve/main/replay.mp4" controls loop muted></video>\n\n'
    pictures = video if (folder / "replay.mp4").exists() else ""
    for title, picture in (("Training returns", "learning_curve.png"), ("Elo", "logs/elo.png")):
        pictures += f"![{title}]({picture})\n\n" if (folder / picture).exists() else ""
    command = plain(shlex.join(["python", f"{name}.py", *to_words(args, module.Args())]))
    cells = [(key, plain(flag).replace("|", "\\|")) for key, flag in asdict(args).items()]
    table = "\n".join(f"| `{key}` | `{flag}` |" for key, flag in cells)
    return f"""---
{card_data(name, args, value, options)}
---

# {name} on {plain(args.env_id)}

An agent trained with SoloRL's one-file [`{name}.py`]({name}.py) for {saved.step:,} environment steps. Its
return over {len(course_returns)} episodes is **{value}**, with deterministic actions: {args.eval_deterministic}.

{pictures}## Train it again

```bash
{command}
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
print({name}.evaluate(agent, args, episodes=10).mean())
```

## Flags

| flag | value |
|---|---|
{table}
"""


def find_target(saved: SimpleNamespace, options: Options) -> Path:
    """The folder of the package; one that holds anything but an earlier package is refused."""
    is_fetched = options.checkpoint.startswith("hf://")
    name = options.checkpoint.removeprefix("hf://").replace("/", "-") if is_fetched else saved.folder.resolve().name
    target = Path(options.output, name)
    try:
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            about = json.loads((target / "config.json").read_text(encoding="utf-8"))
            assert (target / "model.safetensors").is_file() and {"script", "step", "config"} <= set(about)
        target.parent.mkdir(parents=True, exist_ok=True)
    except Exception as error:  # whatever is there is not ours
        fail(f"--output {options.output}: {target} exists and is not a package ({type(error).__name__}); move it away")
    return target


def make_package(module: ModuleType, args, agent, saved: SimpleNamespace, options: Options) -> Path:
    """Evaluate, film and write all files; returns the folder. An earlier package is replaced only at the end."""
    target = find_target(saved, options)
    returns, course_returns = score(module, args, agent, options)
    results = {"env_id": args.env_id, "mean_reward": float(returns.mean()), "std_reward": float(returns.std())}
    results |= {"is_deterministic": args.eval_deterministic, "n_eval_episodes": len(returns)}
    results["eval_datetime"] = datetime.now(timezone.utc).isoformat()
    about = {"script": saved.script, "step": saved.step, "config": saved.config}
    with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
        folder = Path(temporary)
        (folder / "logs").mkdir()
        save_file({key: tensor.contiguous() for key, tensor in saved.agent.items()}, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(about, indent=2), encoding="utf-8")
        (folder / "results.json").write_text(json.dumps(results, indent=2), encoding="utf-8")
        shutil.copy(Path(module.__file__), folder / saved.script)
        for source in (saved.folder, saved.folder / "logs"):
            for path in [*source.glob("events.out.tfevents.*"), *source.glob("episodes.csv"), *source.glob("elo.*")]:
                if options.checkpoint.startswith("hf://") or not path.is_symlink():  # a link could point anywhere
                    shutil.copy(path, folder / "logs")
        film(module, args, agent, options, folder / "replay.mp4")
        draw_learning_curve(saved, folder / "learning_curve.png")
        card = model_card(module, args, saved, course_returns, options, folder)
        (folder / "README.md").write_text(card, encoding="utf-8")
        for pattern in PACKAGE_FILES:
            for path in target.glob(pattern):
                path.unlink()
        shutil.copytree(folder, target, dirs_exist_ok=True)
    return target


# --- the Hub ---


def talk_to_hub(request, what: str, remedy: str = ""):
    """The result of `request()`; three tries if the Hub or the network is at fault, then one clear line."""
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    reasons = {
        401: "the token is missing or wrong; log in with: hf auth login",
        403: "this token is not allowed to; it needs write permission, see huggingface.co/settings/tokens",
        404: "no such repository, or not for this token",
    }
    for wait in (1, 3, None):
        try:
            return request()
        except Exception as error:  # of the network, the client or an upload
            status = getattr(getattr(error, "response", None), "status_code", None)
            if isinstance(error, RepositoryNotFoundError) and not remedy:
                status = 404
            message = reasons.get(status) or f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            if wait is None or status in reasons or isinstance(error, HFValidationError):
                fail(f"cannot {what}: {message}{remedy}")
            print(f"cannot {what}: {message}; trying again in {wait} s", file=sys.stderr)
            time.sleep(wait)


def push(folder: Path, env_id: str, options: Options) -> str:
    """Upload the package in one commit, which also deletes old package files; returns the address."""
    from huggingface_hub import HfApi, get_token

    again = replace(options, checkpoint=str(folder), trust_env_package=":" in env_id)
    words = ["python", SCRIPT.name, *to_words(again, Options(checkpoint=""))]
    remedy = f"; the package is in {folder}, to try again: {shlex.join(words)}"
    if get_token() is None:
        fail(f"cannot push to {options.repo_id}: no token; log in with: hf auth login{remedy}")
    api, what = HfApi(), f"push to {options.repo_id}"
    create = {"repo_id": options.repo_id, "private": options.private, "exist_ok": True}
    talk_to_hub(lambda: api.create_repo(**create), what, remedy)
    upload = {"repo_id": options.repo_id, "folder_path": folder, "commit_message": options.commit_message}
    talk_to_hub(lambda: api.upload_folder(**upload, delete_patterns=PACKAGE_FILES), what, remedy)
    return f"{api.endpoint}/{options.repo_id}"


def main(options: Options):
    """Read, evaluate, film, package and push."""
    for name, value in asdict(options).items():
        smallest = 1 if type(value) is int and name != "seed" else 0
        if type(value) in (int, float) and not smallest <= value < math.inf:
            fail(f"--{name.replace('_', '-')} {value}: must be {smallest} or more, and finite")
    if options.repo_id and not re.fullmatch(r"[\w.-]+/[\w.-]+", options.repo_id):
        fail(f"--repo-id {options.repo_id}: must be user/name")
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # so that pygame works without a display
    saved = read(options.checkpoint)
    module, args, agent = rebuild(saved, options)
    if options.seed is not None:
        args = replace(args, seed=options.seed)
    folder = make_package(module, args, agent, saved, options)
    print(f"package: {folder}")
    if options.repo_id:
        print(f"pushed: {push(folder, args.env_id, options)}")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__.partition("\n")[0]))
