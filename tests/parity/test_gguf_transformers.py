"""GGUF files give the parameters and logits of the reference models that they were written from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from torch.testing import assert_close
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tests import gguf_files, reference
from zoo.attention.eager import Eager
from zoo.convert.base import Checkpoint
from zoo.convert.gguf import GGUF
from zoo.convert.load import load_model
from zoo.registry import Registry

KINDS = pytest.mark.parametrize(
    "kind",
    [Kind.F32, Kind.F16, Kind.BF16, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0],
    ids=lambda kind: kind.name,
)
VARIANTS = pytest.mark.parametrize("variant", gguf_files.CONFIGS)


def expected(checkpoint: Checkpoint, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Our parameters from tensors with the names and layout of the reference library."""
    rules = checkpoint.family.keys.rules(checkpoint.spec)
    return {
        name: part for rule in rules for name, part in zip(rule.ours, rule.split(tensors[rule.stored]), strict=True)
    }


def state_of(model: Any) -> dict[str, torch.Tensor]:
    return {reference.stored_name(model, name): tensor.detach() for name, tensor in model.named_parameters()}


def assert_same_bits(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == torch.float32
        assert torch.equal(found[name].view(torch.int32), tensor.contiguous().view(torch.int32)), name


@VARIANTS
@KINDS
def test_parameters_and_logits(kind: Kind, variant: str, tmp_path: Path, registry: Registry) -> None:
    """Guards the key maps, the transforms (a permutation, a transposition, an order of q, k and v) and the configs."""
    theirs = reference.tiny_model(*gguf_files.CONFIGS[variant])
    checkpoint = GGUF().open(gguf_files.write_model(tmp_path / "m.gguf", theirs, kind), registry)
    assert_same_bits(dict(checkpoint.parameters(torch.float32)), expected(checkpoint, state_of(theirs)))
    ours = load_model(checkpoint, Eager(), dtype=torch.float32)
    ids = reference.tokens(2, 40)
    with torch.no_grad():
        assert_close(ours(ids), theirs(ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "variant", ["llama", "llama-tied", "gpt2", "qwen2", "qwen2-tied", "qwen3", "phi3", "stablelm", "falcon", "gemma2"]
)
@KINDS
def test_as_transformers_loads_it(kind: Kind, variant: str, tmp_path: Path, registry: Registry) -> None:
    """Guards against an error that our own writing of test files shares with our reading."""
    theirs = reference.tiny_model(*gguf_files.CONFIGS[variant])
    path = gguf_files.write_model(tmp_path / "m.gguf", theirs, kind)
    checkpoint = GGUF().open(path, registry)
    loaded = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=theirs)["tensors"]
    assert_same_bits(dict(checkpoint.parameters(torch.float32)), expected(checkpoint, loaded))


@pytest.mark.parametrize("kind", gguf_files.RANDOM_KINDS, ids=lambda kind: kind.name)
def test_types_that_only_dequantize(kind: Kind, tmp_path: Path, registry: Registry) -> None:
    """Guards the sizes of blocks, and that q and k are reordered after dequantizing and not before."""
    theirs = reference.tiny_model(
        "llama", gguf_files.LLAMA | {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1}
    )
    path = gguf_files.write_model(tmp_path / "plain.gguf", theirs)
    reader = gguf.GGUFReader(path)
    tensors = {t.name: (np.array(t.data), Kind.F32) for t in reader.tensors}
    for seed, (name, (values, _)) in enumerate(tensors.items()):
        if values.ndim == 2:
            tensors[name] = gguf_files.random_blocks(values.shape, kind, seed=seed)
    path = gguf_files.write(tmp_path / "m.gguf", "llama", gguf_files.metadata_of(theirs.config), tensors)
    loaded = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=theirs)["tensors"]
    checkpoint = GGUF().open(path, registry)
    assert checkpoint.quantized
    assert_same_bits(dict(checkpoint.parameters()), expected(checkpoint, loaded))


@pytest.mark.parametrize("factor", [8.0, 32.0, 5.0])
def test_llama3_scaling(factor: float, tmp_path: Path, registry: Registry) -> None:
    """Guards the recovery of Llama 3.1's rotary scaling, which the file holds only as a tensor of factors."""
    scaling = reference.LLAMA3_ROPE | {"factor": factor, "original_max_position_embeddings": 8192}
    theirs = reference.tiny_model("llama", gguf_files.LLAMA | {"rope_scaling": scaling, "rope_theta": 5e5})
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](theirs.config, "cpu")
    plain = 5e5 ** -(torch.arange(0, 16, 2) / 16)
    path = gguf_files.write_model(tmp_path / "m.gguf", theirs, tensors={"rope_freqs.weight": (plain / scaled).numpy()})
    checkpoint = GGUF().open(path, registry)
    ours = load_model(checkpoint, Eager(), dtype=torch.float32)
    ids = reference.tokens(2, 60)
    with torch.no_grad():
        assert_close(ours(ids), theirs(ids).logits, atol=1e-4, rtol=1e-4)
    assert checkpoint.spec.rope is not None
    assert checkpoint.spec.rope.scaling is not None
    assert checkpoint.spec.rope.scaling.factor == factor
