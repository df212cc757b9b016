"""What a user can get wrong: an error that names the value and the remedy, exit code 2 (or 3), and no traceback."""

from __future__ import annotations

import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

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
        (["generate", "tiny"], 2, "give either --prompt TEXT or --batch FILE"),
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


NAME = "model.layers.1.mlp.up_proj.weight"
DAMAGED = "is truncated or damaged"


def truncate(to: float) -> Callable[[Path], object]:
    """Cut the weights to this many bytes, or to this share of them."""

    def cut(directory: Path) -> None:
        path = directory / "model.safetensors"
        os.truncate(path, int(to if to > 1 else to * path.stat().st_size))

    return cut


def replace(content: bytes) -> Callable[[Path], object]:
    """Put something else where the weights are."""
    return lambda directory: (directory / "model.safetensors").write_bytes(content)


def tensors(change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Callable[[Path], object]:
    """Write other tensors."""

    def rewrite(directory: Path) -> None:
        path = directory / "model.safetensors"
        save_file(change(load_file(path)), path)

    return rewrite


def config(**changes: Any) -> Callable[[Path], object]:
    """Change keys of config.json."""
    return lambda directory: edit_config(directory, **changes)


def write(name: str, text: str) -> Callable[[Path], object]:
    """Write a file."""
    return lambda directory: (directory / name).write_text(text)


def lose_a_shard(directory: Path) -> None:
    """Two shards in the index, one on the disk."""
    found = load_file(directory / "model.safetensors")
    shards = {key: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, key in enumerate(found)}
    save_file({k: v for k, v in found.items() if "1-of" in shards[k]}, directory / "model-00001-of-00002.safetensors")
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))


def index_of(shard: str) -> Callable[[Path], object]:
    """An index with one shard, beside a directory ``original``."""

    def rewrite(directory: Path) -> None:
        names = load_file(directory / "model.safetensors")
        (directory / "original").mkdir()
        (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(names, shard)}))

    return rewrite


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "has no weights"),
    "not what .bin says": (lambda d: (d / "model.safetensors").rename(d / "pytorch_model.bin"), f"bin {DAMAGED}"),
    "truncated": (truncate(0.5), DAMAGED),
    "truncated header": (truncate(100), DAMAGED),
    "empty file": (truncate(0), DAMAGED),
    "garbage": (replace(bytes(range(256)) * 16), DAMAGED),
    "huge header": (replace(struct.pack("<Q", 1 << 60) + b"{}"), DAMAGED),
    "a pickle": (replace(pickle.dumps({"weights": [0.0]})), DAMAGED),
    "wrong shape": (
        tensors(lambda t: t | {NAME: torch.zeros(7, 3)}),
        f"tensor '{NAME}' has shape [7, 3]; the config needs [80, 48]",
    ),
    "missing tensor": (
        tensors(lambda t: {k: v for k, v in t.items() if k != NAME}),
        f"lacks 1 tensors of the model: {NAME}",
    ),
    "unknown tensor": (
        tensors(lambda t: t | {"model.layers.1.extra": torch.zeros(1)}),
        "holds 1 tensors that the model lacks: model.layers.1.extra",
    ),
    "missing shard": (lose_a_shard, "model-00002-of-00002.safetensors is missing"),
    "shards elsewhere": (
        index_of("../tiny/model.safetensors"),
        "names '../tiny/model.safetensors'; a shard lies beside",
    ),
    "shards anywhere": (index_of("/model.safetensors"), "; a shard lies beside its index"),
    "shards on another drive": (index_of("D:model.safetensors"), "; a shard lies beside its index"),
    "a shard that is a directory": (index_of("original"), "names 'original', which is a directory"),
    "a shard without a name": (index_of(""), "names '', which is a directory"),
    "a shard that is nowhere": (index_of("original/x.safetensors"), "original/x.safetensors is missing"),
    "bad index": (write("model.safetensors.index.json", "{}"), "has no 'weight_map'"),
    "config is no JSON": (write("config.json", "{"), "config.json is not valid JSON"),
    "unknown model type": (
        config(model_type="mamba"),
        "type 'mamba', which no registered family reads. Known types: ",
    ),
    "unknown key": (config(attention_sinks=4), "does not understand: attention_sinks = 4"),
    "unknown scaling": (
        config(rope_scaling={"rope_type": "yarn", "factor": 4.0}, rope_parameters=None),
        "by 'yarn'; zoo knows linear, llama3 and longrope",
    ),
    "unknown activation": (config(hidden_act="xielu"), "hidden_act = 'xielu'"),
    "a list for an activation": (config(hidden_act=["silu"]), "hidden_act = ['silu']; zoo knows gelu"),
    "a list for a scaling": (config(rope_scaling=[8.0]), "rope_scaling = [8.0]; it must be an object"),
    "config lacks a key": (config(hidden_size=None), "lacks 'hidden_size'"),
    "no tokenizer": (lambda d: (d / "tokenizer.json").unlink(), "has no tokenizer.json"),
}


@pytest.mark.parametrize("how", DAMAGES)
def test_damaged_directory(zoo: Zoo, chat_model: Path, how: str) -> None:  # noqa: F811
    """Guards each message, for generating; converting refuses the same (but for a tokenizer, which it needs not)."""
    damage, said = DAMAGES[how]
    damage(chat_model)
    result = zoo("generate", chat_model, "--prompt", "x")
    assert said in result.err
    assert result.code == 2
    converted = zoo("convert", chat_model, "out")
    assert (converted.code == 0) == (how == "no tokenizer")
    assert Path("out").exists() == (how == "no tokenizer")


def test_a_pickle_is_never_run(zoo: Zoo, tmp_path: Path) -> None:  # noqa: F811
    """Guards against code in a download: it is refused by what it is, or read by what builds nothing but tensors."""

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
        torch.save({"model": Attack()}, directory / name)
        for command in (("generate", directory, "--prompt", "x"), ("convert", directory, tmp_path / "out")):
            result = zoo(*command)
            assert result.code == 2
            assert name in result.err
    assert "Nothing in it was run" in result.err
    assert not (tmp_path / "ran").exists()
    pickle.loads(pickle.dumps(Attack()))
    assert (tmp_path / "ran").exists(), "the attack is one"
