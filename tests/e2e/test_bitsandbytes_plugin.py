"""The bitsandbytes plugin: listed with reasons, and QLoRA on bitsandbytes' CPU kernels from the command line."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests import reference
from tests.plugin_environment import Environment

PLUGIN = Path(__file__).parents[2] / "plugins" / "zoo-bitsandbytes"
PACKAGE = "bitsandbytes==0.50.2"
QUANTIZERS = ("nf4", "fp4", "llm-int8")
UNREACHABLE = ("No matching distribution found", "Connection", "NewConnectionError", "Timeout", "name resolution")
"""What pip says where there is no index."""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    environment = Environment(tmp_path_factory.mktemp("environment"))
    environment.install(PLUGIN)
    return environment


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("bitsandbytes") / "model"
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    reference.save_tiny_chat_model(directory, hidden_size=64, intermediate_size=128, **heads)
    return directory


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    rows = [{"prompt": f"{n}: red", "completion": " red!" * (1 + n % 3)} for n in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def with_package(environment: Environment) -> Environment:
    """bitsandbytes is installed: here or, for the moment, from an index."""
    if find_spec("bitsandbytes") is None:
        try:
            environment.run("-m", "pip", "install", "--quiet", "--no-deps", "--retries", "1", PACKAGE)
        except AssertionError as error:
            if any(sign in str(error) for sign in UNREACHABLE):
                pytest.skip(f"no package index can be reached, which has {PACKAGE}")
            raise
    return environment


@pytest.mark.skipif(find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed here")
def test_they_are_listed_and_refused(environment: Environment, model: Path) -> None:
    """Guards against a bare ImportError, and another quantizer in its place. Runs before the package is there."""
    rows = {row["name"]: row for row in environment.zoo_json("list", "quantizers")}
    for name in QUANTIZERS:
        assert (rows[name]["state"], rows[name]["origin"]) == ("unavailable", "zoo-bitsandbytes 0.1.0")
        assert rows[name]["reasons"] == ["needs bitsandbytes>=0.46 (not installed)"]
        refused = environment.zoo("generate", model, "--prompt", "Hi", "--quantize", name, exit_code=3)
        assert f"quantizer '{name}' is unavailable: needs bitsandbytes>=0.46" in refused.stderr
        assert 'python -m pip install "bitsandbytes>=0.46"' in refused.stderr


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_qlora(quantizer: str, with_package: Environment, model: Path, data: Path, tmp_path: Path) -> None:
    """Guards a frozen base of bitsandbytes' layers below an adapter that learns; samples are written on the way."""
    run = tmp_path / "run"
    done = with_package.zoo(
        "finetune", model, "--data", data, "--out", run, "--quantize", quantizer, "--adapter", "lora",
        "--max-steps", "20", "--batch-size", "4", "--lr", "0.01", "--device", "cpu", "--precision", "bf16-true",
    )  # fmt: skip
    assert quantizer in done.stderr
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 20 and sum(losses[-5:]) < sum(losses[:5]) - 0.5


def test_a_directory(with_package: Environment, model: Path, tmp_path: Path) -> None:
    """Guards weights that are read as they were written."""
    with_package.zoo("convert", model, tmp_path / "nf4", "--quantize", "nf4")
    common = ("--prompt", "1: red", "--max-new-tokens", "4", "--temperature", "0", "--precision", "bf16-true")
    found = with_package.zoo("generate", tmp_path / "nf4", *common, "--device", "cpu", "--stats")
    expected = with_package.zoo("generate", model, *common, "--device", "cpu", "--quantize", "nf4")
    assert found.stdout == expected.stdout and "nf4" in found.stderr


def test_its_own_tests(with_package: Environment) -> None:
    """Guards the layers on the real package."""
    with_package.check_its_own_tests_pass(PLUGIN, "zoo_bitsandbytes")
