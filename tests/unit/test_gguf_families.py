"""GGUF files of the families beside llama, gpt2 and gptneox: offsets of norms, scalings, what can not be said."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tokenizers
import torch
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import load_file, save_file

from tests import gguf_files, reference, trained_tokenizers
from zoo.convert.base import WriteOptions
from zoo.convert.export import export_model
from zoo.convert.gguf import GGUF
from zoo.convert.gguf_config import metadata_from_spec
from zoo.convert.load import open_checkpoint
from zoo.errors import InputError
from zoo.registry import Registry


@cache
def bpe() -> tokenizers.Tokenizer:
    return trained_tokenizers.byte_level()


def save(directory: Path, model_type: str, config: dict[str, Any]) -> Path:
    """A tiny reference model with a tokenizer."""
    config = config | {"vocab_size": trained_tokenizers.VOCAB_SIZE}
    reference.tiny_model(model_type, config).save_pretrained(directory / "source")
    trained_tokenizers.save(directory / "source", bpe())
    return directory / "source"


def write(source: Path, registry: Registry, dtype: torch.dtype | None = None) -> Path:
    """It as GGUF."""
    target = source.with_suffix(".gguf")
    export_model(open_checkpoint(source, registry), target, writer=GGUF(), dtype=dtype)
    return target


# --- norms with an offset ---------------------------------------------------------------------------------------


def test_norm_offset(tmp_path: Path, registry: Registry) -> None:
    """Guards Gemma's norms: written with the 1 that llama.cpp does not add, and read without it before rounding."""
    source = save(tmp_path, "gemma", gguf_files.GEMMA)
    weights = load_file(source / "model.safetensors")
    name, tiny = "model.layers.0.input_layernorm.weight", torch.full((64,), 0.1234567)
    save_file(weights | {name: tiny}, source / "model.safetensors", metadata={"format": "pt"})
    path = write(source, registry, torch.bfloat16)
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}["blk.0.attn_norm.weight"]
    assert stored.tensor_type == Kind.F32
    assert np.array_equal(stored.data, tiny.numpy() + np.float32(1))
    checkpoint, key = open_checkpoint(path, registry), "blocks.0.attn_norm.weight"
    assert torch.allclose(dict(checkpoint.parameters())[key], tiny, rtol=0, atol=2**-24)
    assert torch.equal(dict(checkpoint.parameters(torch.bfloat16))[key], tiny.bfloat16())
    export_model(checkpoint, tmp_path / "again.gguf", writer=GGUF())
    again = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "again.gguf").tensors}
    assert np.array_equal(again["blk.0.attn_norm.weight"].data, stored.data)


def test_norm_offset_is_verified(tmp_path: Path, registry: Registry) -> None:
    """Guards what ``--verify`` expects of them."""
    source = save(tmp_path, "gemma", gguf_files.GEMMA)
    weights = load_file(source / "model.safetensors")
    norms = {name: values.sin() for name, values in weights.items() if "norm" in name}  # 1 is not added exactly
    save_file(weights | norms, source / "model.safetensors", metadata={"format": "pt"})
    checkpoint = open_checkpoint(source, registry)
    writing = GGUF().write(checkpoint, WriteOptions())
    writing.to(tmp_path / "m.gguf")
    found = dict(open_checkpoint(tmp_path / "m.gguf", registry).parameters())
    for name, values in checkpoint.parameters():
        assert torch.equal(writing.rounded(name, values), found[name]), name


# --- rotary scaling --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "variant",
    ["mistral", "qwen2", "qwen3", "stablelm", "gemma", "gemma2", "phi", "falcon", "olmo", "olmo2", "smollm3"],
)
def test_linear_scaling_of_every_family(variant: str, tmp_path: Path, registry: Registry) -> None:
    model_type, config = gguf_files.CONFIGS[variant]
    source = save(tmp_path, model_type, config | {"rope_scaling": {"rope_type": "linear", "factor": 4.0}})
    before, after = (open_checkpoint(each, registry).spec.rope for each in (source, write(source, registry)))
    assert before is not None and before.scaling is not None
    assert before == after


def test_longrope(tmp_path: Path, registry: Registry) -> None:
    """Guards factors that are no short decimals: as float32 they are the same."""
    third = float(np.float32(1 / 3))
    rope = gguf_files.LONGROPE["rope_scaling"] | {"short_factor": [third, 1.1, 1 / 7, 2.0]}
    source = save(tmp_path, "phi3", gguf_files.PHI3 | gguf_files.LONGROPE | {"rope_scaling": rope})
    path = write(source, registry)
    tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}
    assert np.array_equal(tensors["rope_factors_short.weight"], np.array(rope["short_factor"], np.float32))
    assert np.array_equal(tensors["rope_factors_long.weight"], np.array(rope["long_factor"], np.float32))
    before, after = (open_checkpoint(each, registry).spec.rope for each in (source, path))
    assert before is not None and before.scaling is not None
    assert after is not None and after.scaling is not None
    assert np.float32(after.scaling.attn_factor) == np.float32(before.scaling.attn_factor)
    assert after.scaling.original_max_seq_len == before.scaling.original_max_seq_len == 20
    wanted, found = (np.array(each.short_factors, np.float32) for each in (before.scaling, after.scaling))
    assert np.array_equal(found, wanted)


# --- what can not be said --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model_type", "config", "says"),
    [
        ("mistral", gguf_files.LLAMA | {"sliding_window": 8}, "architecture 'llama' can not say window = 8"),
        ("qwen2", gguf_files.LLAMA | reference.SLIDING | {"max_window_layers": 1}, "window = 8"),
        ("qwen2", gguf_files.LLAMA | {"head_dim": 32}, "is 32; zoo's family needs the size of its heads, 16"),
        ("qwen2", gguf_files.LLAMA | {"rope_scaling": reference.LLAMA3_ROPE}, "rope.scaling.kind = 'llama3'"),
        ("qwen3", gguf_files.LLAMA | {"attention_bias": True}, "qkv_bias = True, attn_out_bias = True"),
        ("stablelm", gguf_files.LLAMA | {"tie_word_embeddings": True}, "tie_embeddings = True"),
        ("stablelm", gguf_files.LLAMA | {"hidden_act": "gelu"}, "activation = 'gelu'"),
        ("gemma", gguf_files.GEMMA | {"tie_word_embeddings": False}, "tie_embeddings = False"),
        ("gemma", gguf_files.GEMMA | {"hidden_act": "silu"}, "activation = 'silu'"),
        ("gemma2", gguf_files.GEMMA2 | {"query_pre_attn_scalar": 10}, "attn_scale = 0.316"),
        ("gemma2", gguf_files.GEMMA2 | {"attn_logit_softcapping": None}, "attn_softcap = None"),
        (
            "gemma2",
            gguf_files.GEMMA2 | {"layer_types": ["full_attention", "sliding_attention"]},
            "full_attention_layers",
        ),
        ("phi", gguf_files.CONFIGS["phi"][1] | {"tie_word_embeddings": True}, "tie_embeddings = True"),
        ("gpt_bigcode", gguf_files.GPT2 | {"scale_attn_weights": False}, "attn_scale = 1.0"),
        ("falcon", gguf_files.FALCON | {"parallel_attn": False}, "block = 'sequential'"),
        ("falcon", gguf_files.FALCON | {"bias": True}, "qkv_bias = True"),
        ("olmo", gguf_files.UNPADDED | {"attention_bias": True}, "qkv_bias = True"),
        ("olmo2", gguf_files.UNPADDED | {"tie_word_embeddings": True}, "tie_embeddings = True"),
        ("smollm3", gguf_files.PHI3 | {"no_rope_layer_interval": 2}, r"unrotated_layers = \(1,\)"),
    ],
)
def test_models_that_a_file_can_not_say(
    model_type: str, config: dict[str, Any], says: str, tmp_path: Path, registry: Registry
) -> None:
    """Guards against a file that loads and computes something else."""
    with pytest.raises(InputError, match=says):
        write(save(tmp_path, model_type, config), registry)


def test_a_family_without_a_map(tmp_path: Path, registry: Registry) -> None:
    checkpoint = open_checkpoint(save(tmp_path, "phi", gguf_files.CONFIGS["phi"][1]), registry)
    with pytest.raises(InputError, match="can not write models of the family 'phi'"):
        metadata_from_spec(checkpoint.spec, replace(checkpoint.family, gguf=None))
