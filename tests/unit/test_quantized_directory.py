"""Directories of quantized weights: what is written is what is loaded; Q4_0 and Q4_1 pass through unrounded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from tests import reference
from zoo.api import load
from zoo.convert.base import WriteOptions
from zoo.convert.export import commit, export_model
from zoo.convert.gguf_file import GGUFTensors
from zoo.convert.load import open_checkpoint
from zoo.convert.quantized import QuantizedDirectory
from zoo.convert.verify import verify
from zoo.errors import FileFormatError, InputError, UnavailableError, UnknownNameError
from zoo.precision.quantization import choose_quantizer
from zoo.registry import Registry

VARIANTS = ["gpt2", "gpt_neox", "llama-gqa", "llama-tied", "llama-biases", "phi3"]


WIDE = {"hidden_size": 96, "intermediate_size": 160}
"""Divides into groups of 32."""


def save(path: Path, variant: str) -> None:
    model_type, config = reference.VARIANTS[variant]
    wide = {"n_embd": 96} if model_type == "gpt2" else WIDE
    reference.save_tiny(path, model_type, config | wide)


def write(source: Path, target: Path, quantizer: str, registry: Registry, **options: Any) -> None:
    chosen = choose_quantizer(quantizer, device="cpu", registry=registry)
    export_model(open_checkpoint(source, registry), target, writer=QuantizedDirectory(), quantizer=chosen, **options)


@pytest.mark.parametrize("quantizer", ["int8", "int4"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_loaded_as_quantized_on_the_fly(variant: str, quantizer: str, tmp_path: Path, registry: Registry) -> None:
    """Guards the whole way over the disk: logits are those of quantizing while loading, bit for bit."""
    save(tmp_path / "a", variant)
    write(tmp_path / "a", tmp_path / "b", quantizer, registry, dtype=torch.bfloat16)
    direct = load(tmp_path / "a", precision="bf16-true", quantize=quantizer, device="cpu", registry=registry)
    stored = load(tmp_path / "b", device="cpu", registry=registry)
    assert (stored.quantized, stored.precision) == (quantizer, "bf16-true")
    ids = reference.tokens(2, 10)
    with torch.no_grad():
        assert torch.equal(stored.model(ids), direct.model(ids))


def test_dequantized_again(tmp_path: Path, registry: Registry) -> None:
    """Guards the way back: as a Hugging Face directory the integers become the floats that they stand for."""
    save(tmp_path / "a", "llama-gqa")
    write(tmp_path / "a", tmp_path / "b", "int4", registry, dtype=torch.float32)
    export_model(open_checkpoint(tmp_path / "b", registry), tmp_path / "c")
    stored = load(tmp_path / "b", precision="32-true", device="cpu", registry=registry).model
    plain = load(tmp_path / "c", precision="32-true", device="cpu", registry=registry).model
    ids = reference.tokens(1, 10)
    with torch.no_grad():
        assert_close(stored(ids), plain(ids), atol=1e-4, rtol=1e-4)


def test_verified_with_its_divergence(tmp_path: Path, registry: Registry) -> None:
    """Guards the figure: int4 is farther from the model than int8, and neither is at zero."""
    save(tmp_path / "a", "llama-gqa")
    found: dict[str, float] = {}
    for name in ("int8", "int4"):
        source = open_checkpoint(tmp_path / "a", registry)
        chosen = choose_quantizer(name, device="cpu", registry=registry)
        writing = QuantizedDirectory().write(source, WriteOptions(quantizer=chosen))
        commit(writing, tmp_path / name)
        found[name] = verify(source, tmp_path / name, writing, "quantized", registry).divergence or 0.0
    assert 0 < found["int8"] < found["int4"]


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1"])
def test_gguf_nibbles_are_taken_as_they_are(kind: str, tmp_path: Path) -> None:
    """Guards the layout of the blocks against gguf's own dequantization, exactly."""
    quantization = gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    raw = gguf.quants.quantize(np.random.default_rng(0).normal(size=(48, 96)).astype(np.float32), quantization)
    writer.add_tensor("w", raw, raw_dtype=quantization)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    weight = GGUFTensors(tmp_path / "a.gguf").integers("w")
    assert weight is not None
    expected = torch.from_numpy(gguf.quants.dequantize(raw, quantization))
    assert_close(weight.dequantized(), expected, atol=1e-6, rtol=1e-6)


def damage(directory: Path, how: str) -> None:
    weights = directory / "quantized.safetensors"
    tensors = load_file(weights)
    name = "blocks.0.attn.q.weight.scale"
    if how == "missing":
        del tensors[name]
    elif how == "shape":
        tensors[name] = tensors[name][:-1].contiguous()
    save_file(tensors, weights)
    if how in ("quantizer", "silent"):
        config = json.loads((directory / "config.json").read_text())
        config["quantization_config"]["quantizer"] = "int3"
        if how == "silent":
            del config["quantization_config"]
        (directory / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("how", "error", "says"),
    [
        ("missing", FileFormatError, "lacks the tensor 'blocks.0.attn.q.weight.scale'"),
        ("shape", FileFormatError, r"'blocks.0.attn.q.weight.scale' is \[\d+\] of torch.bfloat16"),
        ("quantizer", UnknownNameError, "no quantizer is named 'int3'"),
        ("silent", FileFormatError, "does not say for which quantizer"),
    ],
)
def test_damaged(how: str, error: type[InputError], says: str, tmp_path: Path, registry: Registry) -> None:
    """Guards against weights that are taken for others."""
    save(tmp_path / "a", "llama-gqa")
    write(tmp_path / "a", tmp_path / "b", "int8", registry)
    damage(tmp_path / "b", how)
    with pytest.raises(error, match=says):
        open_checkpoint(tmp_path / "b", registry)


def test_a_device_that_can_not_run_it(tmp_path: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the message: what can be done with the directory there."""
    save(tmp_path / "a", "llama-gqa")
    write(tmp_path / "a", tmp_path / "b", "int4", registry)
    monkeypatch.setattr("zoo.api.choose_device", lambda name: torch.device("cuda"))
    with pytest.raises(UnavailableError, match=r"int4 runs on the cpu, not on cuda.*zoo convert .*--to hf"):
        load(tmp_path / "b", registry=registry)


@pytest.mark.parametrize("target", ["hf", "litgpt", "gguf"])
def test_other_formats_hold_none(target: str, tmp_path: Path, registry: Registry) -> None:
    """Guards a quantizer that would be ignored."""
    save(tmp_path / "a", "llama-gqa")
    chosen = choose_quantizer("int8", device="cpu", registry=registry)
    writer = registry.load("converter", target)()
    with pytest.raises(InputError, match=f"{target} holds no weights of the quantizer 'int8'"):
        export_model(open_checkpoint(tmp_path / "a", registry), tmp_path / "b", writer=writer, quantizer=chosen)
