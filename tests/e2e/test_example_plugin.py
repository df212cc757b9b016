"""The life of a third party's plugin: installed with pip, listed, used, tested by its own tests, uninstalled."""

from __future__ import annotations

from pathlib import Path

import pytest
import tokenizers
import torch
import transformers

from tests import reference
from tests.plugin_environment import Environment

PLUGIN = Path(__file__).parents[2] / "plugins" / "zoo-example-family"
PROMPT = "Once upon a time"
N_PARAMETERS = 6_050_882_784


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    return Environment(tmp_path_factory.mktemp("environment"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny GPT-J that `transformers` wrote, with a tokenizer that has one token per byte."""
    directory = tmp_path_factory.mktemp("tiny-gptj")
    config = {"n_embd": 48, "n_head": 6, "n_layer": 3, "vocab_size": 258, "n_positions": 128, "rotary_dim": 4}
    reference.save_tiny(directory, "gptj", config | {"bos_token_id": 256, "eos_token_id": 257})
    reference.save_byte_tokenizer(directory)
    return directory


def test_the_life_of_a_plugin(environment: Environment, tiny: Path) -> None:
    """Guards the whole way of a family from somebody's wheel to generated text, and that it leaves without a trace."""
    _check_it_is_not_listed(environment)
    environment.install(PLUGIN)
    _check_it_is_listed(environment)
    _check_it_is_shown(environment)
    _check_it_can_be_switched_off(environment, tiny)
    _check_it_generates(environment, tiny)
    environment.check_its_own_tests_pass(PLUGIN, "zoo_example_family")
    environment.uninstall("zoo-example-family")
    _check_it_is_not_listed(environment)
    _check_nothing_reads_its_files(environment, tiny)


def _check_it_is_listed(environment: Environment) -> None:
    rows = [line.split() for line in environment.zoo("list", "models").stdout.splitlines()]
    expected = ["gpt-j-6b", f"{N_PARAMETERS:,}", "gptj", "apache-2.0"]
    assert expected in [row[:4] for row in rows]
    families = {family["name"]: family for family in environment.zoo_json("list", "families")}
    assert families["gptj"]["origin"] == "zoo-example-family 0.1.0"
    assert families["gptj"]["state"] == "unprobed"
    assert {"gpt2", "gpt_neox", "llama"} < families.keys()
    probed = {family["name"]: family["state"] for family in environment.zoo_json("list", "families", "--probe")}
    assert probed["gptj"] == "ok"


def _check_it_is_shown(environment: Environment) -> None:
    plugins = {plugin["name"]: plugin for plugin in environment.zoo_json("plugins", "list")}
    plugin = plugins["zoo-example-family"]
    assert (plugin["state"], plugin["version"], plugin["warnings"]) == ("ok", "0.1.0", [])
    assert plugin["provides"] == {"family": 1, "model": 2}
    row = next(line for line in environment.zoo("plugins", "list").stdout.splitlines() if "zoo-example-family" in line)
    assert row.split()[:3] == ["zoo-example-family", "0.1.0", "ok"]
    assert f"{N_PARAMETERS:,}" in environment.zoo("show", "gpt-j-6b").stdout
    shown = environment.zoo_json("show", "gpt-j-6b")
    assert (shown["parameters"], shown["origin"]) == (N_PARAMETERS, "zoo-example-family 0.1.0")


def _check_it_can_be_switched_off(environment: Environment, tiny: Path) -> None:
    refused = environment.zoo("generate", tiny, "--prompt", PROMPT, "-p", "no:zoo-example-family", exit_code=2)
    assert "'gptj'" in refused.stderr
    environment.zoo("show", "gpt-j-6b", "--no-plugins", exit_code=2)


def _check_it_generates(environment: Environment, tiny: Path) -> None:
    found = environment.zoo_json("generate", tiny, "--prompt", PROMPT, "--temperature", "0", "--max-new-tokens", "40")
    tokenizer = tokenizers.Tokenizer.from_file(str(tiny / "tokenizer.json"))
    ids = torch.tensor([tokenizer.encode(PROMPT).ids])
    assert ids.shape == (1, len(PROMPT))
    model = transformers.GPTJForCausalLM.from_pretrained(tiny).eval()
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False)
    assert found["ids"] == expected[0, len(PROMPT) :].tolist()
    assert len(found["ids"]) == 40
    assert found["text"] == tokenizer.decode(found["ids"])


def _check_it_is_not_listed(environment: Environment) -> None:
    assert "gptj" not in {family["name"] for family in environment.zoo_json("list", "families")}
    assert "gpt-j" not in environment.zoo("list", "models").stdout
    assert "zoo-example-family" not in environment.zoo("plugins", "list").stdout
    environment.zoo("show", "gpt-j-6b", exit_code=2)


def _check_nothing_reads_its_files(environment: Environment, tiny: Path) -> None:
    refused = environment.zoo("generate", tiny, "--prompt", PROMPT, exit_code=2)
    assert "model of type 'gptj'" in refused.stderr
    assert "A plugin can add one: see docs/adding-a-model.md" in refused.stderr
    assert "Traceback" not in refused.stderr
