"""The trained agents in agents/: packages of earlier versions stay readable and play as well as before."""

import json

import pytest

import push_to_hub
from conftest import ROOT

AGENTS = sorted(path.parent for path in (ROOT / "agents").glob("*/config.json"))


@pytest.mark.parametrize("folder", AGENTS, ids=[folder.name for folder in AGENTS])
def test_agent_plays_as_well_as_its_results_say(folder):
    options = push_to_hub.Options(str(folder))
    module, args, agent = push_to_hub.rebuild(push_to_hub.read(options.checkpoint), options)
    results = json.loads((folder / "results.json").read_text())
    mean = module.evaluate(agent, args, 10).mean()
    assert abs(mean - results["mean_reward"]) <= 1.5 * results["std_reward"] + 1e-6
