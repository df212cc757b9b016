"""The life of a third party's adapter: installed with pip, listed, shown, trained, saved, loaded, uninstalled."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.plugin_environment import Environment

PLUGIN = Path(__file__).parents[2] / "plugins" / "zoo-example-adapter"

TRAIN = """
import sys, torch, zoo
torch.set_num_threads(1)
tokens = torch.randint(64, (4, 16), generator=torch.Generator().manual_seed(0))
def build():
    return zoo.build("gpt2", n_layers=2, d_model=32, n_heads=4, vocab_size=64, max_seq_len=32, seed=0).eval()
model, other = build(), build()
handle = zoo.adapt(model, "vera", r=16)
before, start = handle.state_dict()["blocks.0.attn.q.vera_b"].clone(), model(tokens)
optimizer = torch.optim.AdamW(handle.trainable().values(), lr=0.05)
losses = []
for _ in range(5):
    loss = torch.nn.functional.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward(); optimizer.step(); optimizer.zero_grad()
    losses.append(loss.item())
assert losses[-1] < losses[0], losses
assert not torch.equal(handle.state_dict()["blocks.0.attn.q.vera_b"], before)
handle.save(sys.argv[1])
assert torch.equal(other(tokens), start)
zoo.load_adapter(other, sys.argv[1])
assert torch.equal(other(tokens), model(tokens)) and not torch.equal(other(tokens), start)
handle.merge()
print(torch.allclose(model(tokens), other(tokens), atol=1e-4), handle.plan.n_trainable)
"""

LOAD = """
import sys, zoo
from zoo.errors import InputError
model = zoo.build("gpt2", n_layers=2, d_model=32, n_heads=4, vocab_size=64, max_seq_len=32, seed=0)
try:
    zoo.load_adapter(model, sys.argv[1])
except InputError as error:
    print(error)
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    return Environment(tmp_path_factory.mktemp("environment"))


def test_the_life_of_an_adapter(environment: Environment, tmp_path: Path) -> None:
    """Guards the whole way of an adapter type from somebody's wheel to a file, and that it leaves without a trace."""
    _check_it_is_not_listed(environment)
    environment.install(PLUGIN)
    _check_it_is_listed(environment)
    _check_it_is_shown(environment)
    _check_it_trains(environment, tmp_path / "adapter")
    environment.check_its_own_tests_pass(PLUGIN, "zoo_example_adapter")
    environment.uninstall("zoo-example-adapter")
    _check_it_is_not_listed(environment)
    assert "no adapter is named 'vera'" in environment.run("-c", LOAD, tmp_path / "adapter").stdout


def _check_it_is_listed(environment: Environment) -> None:
    adapters = {adapter["name"]: adapter for adapter in environment.zoo_json("list", "adapters")}
    assert adapters["vera"]["origin"] == "zoo-example-adapter 0.1.0"
    assert adapters["vera"]["state"] == "unprobed"
    assert {"lora", "llama-adapter"} < adapters.keys()
    probed = {adapter["name"]: adapter["state"] for adapter in environment.zoo_json("list", "adapters", "--probe")}
    assert probed["vera"] == "ok"
    plugins = {plugin["name"]: plugin for plugin in environment.zoo_json("plugins", "list")}
    plugin = plugins["zoo-example-adapter"]
    assert (plugin["state"], plugin["warnings"], plugin["provides"]) == ("ok", [], {"adapter": 1})


def _check_it_is_shown(environment: Environment) -> None:
    """Without torch: the options have a module of their own."""
    shown = environment.zoo_json("show", "adapter", "vera")
    assert shown["options"] == {"r": 256, "targets": ["all-linear"], "seed": 0, "d_init": 0.1}
    assert shown["attaches to"] == ["linear"]
    code = "import sys, zoo_example_adapter.options; print('torch' in sys.modules)"
    assert environment.run("-c", code).stdout.strip() == "False"


def _check_it_trains(environment: Environment, directory: Path) -> None:
    n_trainable = 2 * (4 * 32 + 128 + 32 + 6 * 16)
    assert environment.run("-c", TRAIN, directory).stdout.split() == ["True", str(n_trainable)]
    config = json.loads((directory / "adapter_config.json").read_text(encoding="utf-8"))
    assert (config["peft_type"], config["zoo_adapter"], config["zoo_options"]["r"]) == ("ZOO", "vera", 16)


def _check_it_is_not_listed(environment: Environment) -> None:
    assert "vera" not in {adapter["name"] for adapter in environment.zoo_json("list", "adapters")}
    assert "zoo-example-adapter" not in environment.zoo("plugins", "list").stdout
    environment.zoo("show", "adapter", "vera", exit_code=2)
