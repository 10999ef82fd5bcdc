"""What push_to_hub.py, benchmarks/ and tests/ rely on in every script: Args, make_envs, Agent.act and evaluate."""

import dataclasses
import json

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode

from runs import SCRIPTS, every_script, flags_of, module_of, results, run, scalars, tensors

VECTOR_SCRIPTS = [name for name in SCRIPTS if not name.endswith(("_atari", "_doom", "_multigpu"))]


def rebuilt(name, trained):
    """The module, flags and agent of a finished run, from its checkpoint alone."""
    module, checkpoint = module_of(name), trained(name).checkpoint
    args = module.Args(**checkpoint["config"])
    agent = module.Agent(module.make_envs(args, 1, evaluation=True), args)
    agent.load_state_dict(checkpoint["agent"])
    return module, args, agent


@every_script
def test_the_flags_come_back_from_the_checkpoint(name, trained):
    module, config = module_of(name), trained(name).checkpoint["config"]
    assert json.loads(json.dumps(config)) == config
    assert module.Args(**config) == module.parse_args(flags_of(name))
    assert isinstance(json.loads(config["env_kwargs"]), dict)


@every_script
def test_training_resets_at_once_and_evaluation_one_step_later(name):
    module = module_of(name)
    args = module.parse_args(flags_of(name))
    training, evaluation = module.make_envs(args, 3), module.make_envs(args, 3, evaluation=True)
    assert training.num_envs == evaluation.num_envs == 3
    assert training.metadata["autoreset_mode"] == AutoresetMode.SAME_STEP
    assert evaluation.metadata["autoreset_mode"] == AutoresetMode.NEXT_STEP
    assert training.single_observation_space == evaluation.single_observation_space
    assert training.single_action_space == evaluation.single_action_space
    camera = module.make_envs(args, 2, evaluation=True, render=True)
    camera.reset(seed=[1, 2])
    frames = camera.render()
    assert len(frames) == 2
    assert frames[0].dtype == np.uint8
    assert frames[0].shape[2] == 3
    for envs in (training, evaluation, camera):
        envs.close()


@every_script
def test_observations_are_copies_of_the_networks_type(name):
    module = module_of(name)
    args = module.parse_args(flags_of(name))
    wanted = np.uint8 if "atari" in name or "doom" in name else np.float32
    for evaluation in (False, True):
        envs = module.make_envs(args, 2, evaluation)
        first, _ = envs.reset(seed=[1, 2])
        kept = np.array(first)
        second = envs.step(envs.action_space.sample())[0]
        np.testing.assert_array_equal(first, kept)
        if name != "q_learning":
            assert first.dtype == second.dtype == wanted
        envs.close()


@every_script
def test_act_gives_actions_for_the_environment(name, trained):
    module, args, agent = rebuilt(name, trained)
    module.seed_everything(0)
    envs = module.make_envs(args, 3, evaluation=True)
    obs = torch.as_tensor(envs.reset(seed=[1, 2, 3])[0])
    for deterministic in (True, False):
        action = agent.act(obs, deterministic)
        assert isinstance(action, np.ndarray)
        assert envs.action_space.contains(action.astype(envs.action_space.dtype))
        envs.step(action)
    np.testing.assert_array_equal(agent.act(obs, True), agent.act(obs, True))
    if hasattr(agent, "eval_epsilon"):
        agent.eval_epsilon = 0.5  # or a random action is rare
    samples = np.stack([agent.act(obs, False) for _ in range(50)])
    assert len(np.unique(samples)) > 1
    envs.close()


@every_script
def test_one_number(name, trained):
    """The reloaded agent scores what the training has printed, digit for digit, and again."""
    module, args, agent = rebuilt(name, trained)
    found = results(trained(name).folder)
    before = [tensor.clone() for tensor in tensors(agent.state_dict())]
    for _ in range(2):
        torch.manual_seed(np.random.randint(1000))
        returns = module.evaluate(agent, args, found["n_eval_episodes"])
        assert (returns.dtype, returns.shape) == (np.float64, (2,))
        assert (float(returns.mean()), float(returns.std())) == (found["mean_reward"], found["std_reward"])
    assert all(torch.equal(a, b) for a, b in zip(before, tensors(agent.state_dict())))


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("name", ["reinforce", "ppo"])
def test_seeds_of_an_evaluation(name, deterministic, trained):
    module, args, agent = rebuilt(name, trained)
    args = dataclasses.replace(args, eval_deterministic=deterministic)
    default = module.evaluate(agent, args, 4)
    seeds = np.random.SeedSequence(args.seed, spawn_key=(0, 1)).generate_state(4) >> 1
    np.testing.assert_array_equal(module.evaluate(agent, args, 4, seeds=seeds), default)
    assert (module.evaluate(agent, args, 4, seeds=[5, 6, 7, 8]) != default).any()
    assert (module.evaluate(agent, dataclasses.replace(args, seed=2), 4) != default).any()
    if deterministic:
        one = [module.evaluate(agent, args, 1, seeds=[seed])[0] for seed in seeds]
        np.testing.assert_array_equal(one, default)
    else:
        assert (module.evaluate(agent, dataclasses.replace(args, eval_deterministic=True), 4) != default).any()


class Scripted:
    """Stands in for an agent: does what `choose` says."""

    def __init__(self, choose):
        self.choose, self.seen = choose, []

    def parameters(self):
        return iter([torch.zeros(1)])

    def act(self, obs, deterministic):
        self.seen.append(obs.numpy().copy())
        return self.choose(self.seen[-1])


def test_an_evaluation_is_one_whole_episode_in_each_environment():
    """Clock gives a reward of 1 for each of 3 to 6 steps, and starts anew where it is over."""
    module = module_of("a2c_continuous")
    args = module.Args(env_id="toy_envs:Clock-v0")
    lengths = []
    for seed in range(20):
        env = gym.make("toy_envs:Clock-v0")
        env.reset(seed=seed)
        lengths.append(env.unwrapped.limit)
    agent = Scripted(lambda obs: np.zeros((len(obs), 1), np.float32))
    np.testing.assert_array_equal(module.evaluate(agent, args, 20, seeds=range(20)), lengths)
    assert len(agent.seen) == max(lengths)  # it ends with the longest
    assert set(lengths) == {3, 4, 5, 6}
    returns = module.evaluate(agent, dataclasses.replace(args, max_eval_steps=4), 20, seeds=range(20))
    np.testing.assert_array_equal(returns, np.minimum(lengths, 4))


def test_a_film_shows_the_first_episode_to_its_end(trained):
    module, args, agent = rebuilt("ppo", trained)
    frames = []
    (episode_return,) = module.evaluate(agent, args, 1, film=frames.append)
    assert episode_return == module.evaluate(agent, args, 1)[0]
    assert len(frames) == episode_return + 1  # CartPole: a reward of 1 a step, and the last observation
    assert all(frame.dtype == np.uint8 and frame.shape == frames[0].shape for frame in frames)
    assert any((frame != frames[0]).any() for frame in frames)


@pytest.mark.parametrize("name", ["reinforce", "a2c_continuous", "sac_continuous", "ppo"])
def test_a_nan_stops_an_evaluation(name):
    module = module_of(name)
    kwargs = {"bad_observation_at": 3, "box": name.endswith("_continuous")}
    args = module.Args(env_id="toy_envs:Constant-v0", env_kwargs=json.dumps(kwargs))
    agent = module.Agent(module.make_envs(args, 1), args)
    with pytest.raises(SystemExit, match="observation is NaN"):
        module.evaluate(agent, args, 2)


def test_evaluations_are_bounded(capsys):
    """Between two checkpoints there are at least 400 steps of training for each episode of the evaluation."""
    for episodes, interval in ((10, 400), (50, 2000)):
        folder = run("q_learning", "--total-timesteps", 4500, "--num-checkpoints", 1000, "--eval-episodes", episodes)
        steps = [event.step for event in scalars(folder, "eval/return_mean")]
        assert steps == [*range(0, 4500, interval), 4500]


def test_checkpoints_come_evenly():
    folder = run("q_learning", "--total-timesteps", 5000, "--num-checkpoints", 5, "--eval-episodes", 2)
    assert [event.step for event in scalars(folder, "eval/return_mean")] == [0, 1000, 2000, 3000, 4000, 5000]
