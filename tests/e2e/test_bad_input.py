"""What a user can get wrong: an error that names the value and the remedy, exit code 2 (or 3), and no traceback."""

from __future__ import annotations

import json
import os
import pickle
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import reference
from tests.e2e.test_command_line import Zoo, chat_model, zoo  # noqa: F401 - fixtures


def edit_config(directory: Path, **changes: Any) -> None:
    """Change keys of config.json; ``None`` removes one."""
    path = directory / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["generate", "smollm2-135m-instruc", "--prompt", "x"], 2, "Did you mean 'smollm2-135m-instruct'"),
        (["generate", "./nowhere", "--prompt", "x"], 2, "nowhere"),
        (["generate", "tiny"], 2, "Missing option '--prompt'"),
        (["generate", "tiny", "--prompt", ""], 2, "the prompt is empty"),
        (["generate", "tiny", "--prompt", "x", "--temperature", "-1"], 2, "temperature must be 0 (greedy) or above"),
        (["generate", "tiny", "--prompt", "x", "--temperature", "warm"], 2, "'warm' is not a valid float"),
        (["generate", "tiny", "--prompt", "x", "--top-p", "0"], 2, "top_p must be above 0"),
        (["generate", "tiny", "--prompt", "x", "--top-k", "-3"], 2, "top_k must be 0 (off) or above, not -3"),
        (["generate", "tiny", "--prompt", "x", "--max-new-tokens", "0"], 2, "at least 1, not 0"),
        (["generate", "tiny", "--prompt", "x", "--num-samples", "0"], 2, "at least 1, not 0"),
        (["generate", "tiny", "--prompt", "x", "--stop", ""], 2, "stop string must not be empty"),
        (["generate", "tiny", "--prompt", "x" * 64], 2, "has 64 tokens; this model's context holds 64"),
        (["generate", "tiny", "--prompt", "x" * 60, "--max-new-tokens", "9"], 2, "at most 4 new tokens"),
        (["generate", "tiny", "--prompt", "x", "--attention", "sppa"], 2, "Did you mean 'sdpa'"),
        (["generate", "tiny", "--prompt", "x", "--precision", "bf16"], 2, "Did you mean 'bf16-true'"),
        (["generate", "tiny", "--prompt", "x", "--device", "gpu"], 2, "there is no device 'gpu'"),
        (["chat", "tiny", "--temperature", "-1"], 2, "temperature must be"),
        (["convert", "tiny", "tiny"], 2, "exists and is not empty"),
        (["convert", "tiny", "out", "--from", "ggfu"], 2, "Did you mean 'gguf'"),
        (["convert", "tiny", "out", "--dtype", "int8"], 2, "'int8' is not one of"),
        (["show", "gpt2-x"], 2, "Did you mean"),
        (["list", "modles"], 2, "Did you mean 'models'"),
        (["plugins", "show", "acme"], 2, "no plugin is named 'acme'"),
        (["genrate"], 2, "Did you mean 'generate'"),
        (["list", "-p", "acme"], 2, "write no:NAME"),
        (["list", "--registry", "none.yaml"], 2, "can not read the registry file none.yaml"),
    ],
    ids=lambda value: " ".join(value)[:50] if isinstance(value, list) else "",
)
def test_arguments(zoo: Zoo, chat_model: Path, arguments: list[str], code: int, said: str) -> None:  # noqa: F811
    """Guards each message."""
    result = zoo(*arguments)
    assert said in result.err
    assert result.code == code
    assert result.out == ""


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_is_not_there(zoo: Zoo, chat_model: Path) -> None:  # noqa: F811
    """Guards an explicit choice: no silent fall-back to the CPU."""
    result = zoo("generate", chat_model, "--prompt", "x", "--device", "cuda")
    assert result.code == 3
    assert "--device cpu" in result.err


def truncate(path: Path, to: int) -> None:
    """Cut a file."""
    with path.open("r+b") as file:
        file.truncate(to)


def break_directory(directory: Path, how: str) -> str:
    """Damage a model directory in one way; returns what the error must say."""
    weights = directory / "model.safetensors"
    tensors = load_file(weights)
    name = "model.layers.1.mlp.up_proj.weight"
    if how == "no weights":
        weights.unlink()
        return "has no weights"
    if how == "only pickles":
        weights.rename(directory / "pytorch_model.bin")
        return "pickles"
    if how == "truncated":
        truncate(weights, weights.stat().st_size // 2)
        return "is truncated or damaged"
    if how == "truncated header":
        truncate(weights, 100)
        return "is truncated or damaged"
    if how == "empty file":
        truncate(weights, 0)
        return "is truncated or damaged"
    if how == "garbage":
        weights.write_bytes(os.urandom(4096))
        return "is truncated or damaged"
    if how == "huge header":
        weights.write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
        return "is truncated or damaged"
    if how == "pickle named safetensors":
        weights.write_bytes(pickle.dumps(tensors["lm_head.weight"]))
        return "is truncated or damaged"
    if how == "wrong shape":
        save_file(tensors | {name: torch.zeros(7, 3)}, weights)
        return f"tensor '{name}' has shape [7, 3]; the config needs [80, 48]"
    if how == "missing tensor":
        save_file({k: v for k, v in tensors.items() if k != name}, weights)
        return f"lacks 1 tensors of the model: {name}"
    if how == "unknown tensor":
        save_file(tensors | {"model.layers.1.mlp.extra": torch.zeros(1)}, weights)
        return "holds 1 tensors that the model lacks: model.layers.1.mlp.extra"
    if how == "missing shard":
        shards = {key: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, key in enumerate(tensors)}
        save_file(
            {k: v for k, v in tensors.items() if "1-of" in shards[k]}, directory / "model-00001-of-00002.safetensors"
        )
        (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
        return "model-00002-of-00002.safetensors is missing"
    return break_config(directory, how)


def break_config(directory: Path, how: str) -> str:
    """Damage what lies beside the weights."""
    if how == "bad index":
        (directory / "model.safetensors.index.json").write_text("{}")
        return "has no 'weight_map'"
    if how == "config is no JSON":
        (directory / "config.json").write_text("{")
        return "config.json is not valid JSON"
    if how == "unknown model type":
        edit_config(directory, model_type="mamba")
        return "type 'mamba', which no registered family reads. Known types: gpt2, gpt_neox, llama"
    if how == "unknown key":
        edit_config(directory, attention_sinks=4)
        return "does not understand: attention_sinks = 4"
    if how == "unknown scaling":
        edit_config(directory, rope_scaling={"rope_type": "yarn", "factor": 4.0}, rope_parameters=None)
        return "by 'yarn'; zoo knows linear and llama3"
    if how == "unknown activation":
        edit_config(directory, hidden_act="xielu")
        return "hidden_act = 'xielu'"
    if how == "config lacks a key":
        edit_config(directory, hidden_size=None)
        return "lacks 'hidden_size'"
    assert how == "no tokenizer"
    (directory / "tokenizer.json").unlink()
    return "has no tokenizer.json"


@pytest.mark.parametrize(
    "how",
    [
        "no weights",
        "only pickles",
        "truncated",
        "truncated header",
        "empty file",
        "garbage",
        "huge header",
        "pickle named safetensors",
        "wrong shape",
        "missing tensor",
        "unknown tensor",
        "missing shard",
        "bad index",
        "config is no JSON",
        "unknown model type",
        "unknown key",
        "unknown scaling",
        "unknown activation",
        "config lacks a key",
        "no tokenizer",
    ],
)
def test_damaged_directory(zoo: Zoo, chat_model: Path, how: str) -> None:  # noqa: F811
    """Guards each message, for generating; converting refuses the same (but for a tokenizer, which it needs not)."""
    said = break_directory(chat_model, how)
    result = zoo("generate", chat_model, "--prompt", "x")
    assert said in result.err
    assert result.code == 2
    converted = zoo("convert", chat_model, "out")
    assert (converted.code == 0) == (how == "no tokenizer")
    assert Path("out").exists() == (how == "no tokenizer")


def test_a_pickle_is_never_run(zoo: Zoo, tmp_path: Path) -> None:  # noqa: F811
    """Guards against code in a download: it is refused by what it is, not opened."""

    class Attack:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "ran",))

    for name in ("model.safetensors", "weights.gguf", "pytorch_model.bin"):
        reference.save_tiny_chat_model(tmp_path / name)
        directory = tmp_path / name
        (directory / "model.safetensors").unlink()
        (directory / name).write_bytes(pickle.dumps(Attack()))
        assert zoo("generate", directory, "--prompt", "x").code == 2
        assert zoo("generate", directory / name, "--prompt", "x").code == 2
    assert not (tmp_path / "ran").exists()
