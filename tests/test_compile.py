"""--compile: what torch.compile makes of the network gives what the network gives."""

import importlib

import pytest
import torch
from test_scripts import flags_of, load, run, scalars
from torch.utils._pytree import tree_flatten, tree_unflatten

import ppo

PLAIN_AND_COMPILED = pytest.mark.parametrize("name", ["ppo", "ppo_atari", "dqn_atari", "ddqn_atari"])


def gradients(agent, loss_function, minibatch):
    """All gradients of one update in a row, and what is logged."""
    loss, metrics = loss_function(*minibatch)
    agent.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in agent.parameters()]), metrics


@PLAIN_AND_COMPILED
def test_compiled_update_is_the_plain_one_within_float_error(name):
    module = importlib.import_module(name)
    plain, fast = (
        module.parse_args([*flags_of(name), flag, *(["--no-bfloat16"] if name != "ppo" else [])])
        for flag in ("--no-compile", "--compile")
    )
    envs = module.make_envs(plain, 2)
    torch.manual_seed(1)
    agent, size, device = module.Agent(envs, plain), 16, torch.device("cpu")
    if name == "ppo":
        obs = torch.randn(size, *envs.single_observation_space.shape)
    else:
        obs = torch.randint(256, (size, *envs.single_observation_space.shape), dtype=torch.uint8)
    action, noise = torch.arange(size) % 2, torch.randn(4, size)
    if name.startswith("ppo"):
        minibatch = agent, obs, action, noise[0] - 2, noise[1], noise[2], 0.2, 0.5, 0.01
        act, loss = module.sample_action, module.ppo_loss
    else:
        minibatch = agent, module.Agent(envs, plain), obs, action, noise[0], obs.flip(0), noise[1] > 0, 0.99
        act, loss = agent.best_action, module.dqn_loss
    assert module.compiled(loss, plain, device) is loss
    loss_function = module.compiled(loss, fast, device)
    expected, metrics = gradients(agent, loss, minibatch)
    actual, fast_metrics = gradients(agent, loss_function, minibatch)
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-5)
    for key, value in metrics.items():
        torch.testing.assert_close(fast_metrics[key], value, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        if name.startswith("ppo"):
            action, logprob, value = module.compiled(act, fast, device)(agent, obs)
            policy, plain_value = agent(obs)
            torch.testing.assert_close(logprob, policy.log_prob(action), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(value, plain_value, rtol=1e-4, atol=1e-5)
        else:
            assert torch.equal(module.compiled(act, fast, device)(obs), act(obs))


def test_compiled_policy_samples_by_its_probabilities():
    args = ppo.parse_args([*flags_of("ppo"), "--compile"])
    agent = ppo.Agent(ppo.make_envs(args, 1), args)
    obs = torch.randn(1, 4).expand(20_000, 4)
    with torch.no_grad():
        action, logprob, _ = ppo.compiled(ppo.sample_action, args, torch.device("cpu"))(agent, obs)
    frequency = action.float().mean().item()
    assert frequency == pytest.approx(agent(obs[:1])[0].logprobs[0, 1].exp().item(), abs=0.02)
    assert 0 < frequency < 1


def test_compiled_run_goes_through_and_is_resumed():
    folder = run("ppo", "--compile")
    steps = load(folder)["step"]
    ppo.train(ppo.parse_args(["--resume", str(folder), "--total-timesteps", str(2 * steps)]))
    assert load(folder)["config"]["compile"]
    assert load(folder)["step"] == 2 * steps


def like_a_cuda_graph(function, **options):
    """What torch.compile makes of `function` on a GPU, in one respect: it always writes into the same memory."""
    memory = []

    def call(*inputs):
        results, form = tree_flatten(function(*inputs))
        memory.extend(torch.empty_like(result) for result in results[len(memory) :])
        kept = [result if result.requires_grad else old.copy_(result) for old, result in zip(memory, results)]
        return tree_unflatten(kept, form)

    return call


@PLAIN_AND_COMPILED
def test_what_is_kept_is_not_overwritten(name, monkeypatch):
    monkeypatch.setattr(torch, "compile", like_a_cuda_graph)
    plain, fast = run(name), run(name, "--compile")
    expected, actual = load(plain)["agent"], load(fast)["agent"]
    assert all(torch.equal(expected[key], actual[key]) for key in expected)
    for metric in ("loss/value", "train/approx_kl") if name.startswith("ppo") else ("loss/td", "train/q_value"):
        expected, actual = ([event.value for event in scalars(folder, metric)] for folder in (plain, fast))
        assert expected == actual and len(set(expected)) > 2


@PLAIN_AND_COMPILED
def test_no_compiler_is_one_line(name, monkeypatch, capsys, tmp_path):
    def no_compiler(function, **options):
        def call(*inputs):
            raise RuntimeError("no compiler found\nand much more")

        return call

    monkeypatch.setattr(torch, "compile", no_compiler)
    with pytest.raises(SystemExit) as error:
        run(name, "--compile")
    assert error.value.code == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message == f"{name}.py: error: --compile: no working compiler for cpu: no compiler found"
    assert not list(tmp_path.iterdir())
