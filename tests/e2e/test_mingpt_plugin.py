"""A GPT of one's own as a plugin: installed with pip, listed, tested by its own tests, merged, generated with."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import reference
from tests.plugin_environment import Environment

PLUGIN = Path(__file__).parents[2] / "plugins" / "zoo-mingpt"

SAVE = """
import sys, zoo
sizes = {"vocab_size": 258, "max_seq_len": 64}
zoo.save(zoo.build("gpt-nano", seed=0, **sizes), sys.argv[1], like="gpt-nano", **sizes)
lm = zoo.load(sys.argv[1])
handle = lm.adapt("lora", targets=["qkv"])
for parameter in handle.trainable().values():
    parameter.data.add_(0.1)
handle.save(sys.argv[2])
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    return Environment(tmp_path_factory.mktemp("environment"))


def test_its_life(environment: Environment, byte_tokenizer: Path) -> None:
    """Guards the command line on a module that zoo did not write: no line of zoo knows it."""
    environment.zoo("show", "gpt-nano", exit_code=2)
    environment.install(PLUGIN)
    shown = environment.zoo_json("show", "gpt-nano")
    assert (shown["family"], shown["origin"]) == ("mingpt", "zoo-mingpt 0.1.0")
    environment.check_its_own_tests_pass(PLUGIN, "zoo_mingpt")
    environment.run("-c", SAVE, "model", "adapter")
    for file in byte_tokenizer.iterdir():
        (environment.directory / "model" / file.name).write_bytes(file.read_bytes())
    arguments = ("--prompt", "Once", "--temperature", "0", "--max-new-tokens", "12")
    environment.zoo("merge", "model", "adapter", "merged")
    adapted = environment.zoo_json("generate", "model", "--adapter", "adapter", *arguments)
    merged = environment.zoo_json("generate", "merged", *arguments)
    assert adapted["ids"] == merged["ids"]
    assert len(merged["ids"]) == 12
    assert (
        "--quantize can not"
        in environment.zoo("generate", "model", "--quantize", "int8", *arguments, exit_code=2).stderr
    )
    environment.uninstall("zoo-mingpt")
    assert "type 'mingpt'" in environment.zoo("generate", "model", *arguments, exit_code=2).stderr


@pytest.fixture
def byte_tokenizer(tmp_path: Path) -> Path:
    """A tokenizer that has one token per byte."""

    reference.save_byte_tokenizer(tmp_path)
    return tmp_path
