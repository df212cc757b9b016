"""Metadata that most architectures of GGUF files share, both ways. ``arch`` is an architecture, the prefix of its keys.

What a family finds among them beside the file's own keys: `TENSORS`, and the values of each of `ROPE_TENSORS`.
"""

from __future__ import annotations

from typing import Any

from zoo.errors import InputError
from zoo.families.base import Config
from zoo.spec import ModelSpec

TENSORS = "tensors"
"""Names of the file's tensors: llama.cpp takes some settings from what there is."""
ROPE_TENSORS = ("rope_freqs", "rope_factors_long", "rope_factors_short")
"""Tensors that hold settings and no weights, without ``.weight``; a file that has one has it as a list of floats."""


def read_sizes(metadata: Config, arch: str) -> dict[str, Any]:
    """The keys of a Hugging Face config for the sizes of a model."""
    n_heads = metadata[f"{arch}.attention.head_count"]
    return {
        "num_hidden_layers": metadata[f"{arch}.block_count"],
        "hidden_size": metadata[f"{arch}.embedding_length"],
        "num_attention_heads": n_heads,
        "num_key_value_heads": metadata.get(f"{arch}.attention.head_count_kv", n_heads),
        "intermediate_size": metadata[f"{arch}.feed_forward_length"],
        "max_position_embeddings": metadata[f"{arch}.context_length"],
    }


def write_sizes(spec: ModelSpec, arch: str) -> dict[str, Any]:
    """What `read_sizes` reads."""
    return {
        f"{arch}.block_count": spec.n_layers,
        f"{arch}.context_length": spec.max_seq_len,
        f"{arch}.embedding_length": spec.d_model,
        f"{arch}.feed_forward_length": spec.d_ffn,
        f"{arch}.attention.head_count": spec.n_heads,
        f"{arch}.attention.head_count_kv": spec.n_kv_heads,
    }


def read_head_size(metadata: Config, arch: str, *, free: bool = False) -> int:
    """Width of a head.

    Args:
        free: whether it may be another than the model's width by the number of heads.

    Raises:
        InputError: keys or values have another width.
    """
    even = metadata[f"{arch}.embedding_length"] // metadata[f"{arch}.attention.head_count"]
    d_head: int = metadata.get(f"{arch}.attention.key_length", even) if free else even
    _only(metadata, f"{arch}.attention.key_length", d_head)
    _only(metadata, f"{arch}.attention.value_length", d_head)
    return d_head


def write_head_size(spec: ModelSpec, arch: str) -> dict[str, Any]:
    """What `read_head_size` reads where it is free."""
    return {f"{arch}.attention.key_length": spec.d_head, f"{arch}.attention.value_length": spec.d_head}


def read_rotary(metadata: Config, arch: str, d_head: int, *, partial: bool = False) -> dict[str, Any]:
    """The rotary keys of a Hugging Face config.

    Args:
        partial: whether the family can turn a part of each head.

    Raises:
        InputError: only a part of each head is rotated, and the family can not.
    """
    config: dict[str, Any] = {
        "rope_theta": metadata.get(f"{arch}.rope.freq_base", 10_000.0),
        "rope_scaling": read_scaling(metadata, arch),
    }
    if partial:
        return config | {"partial_rotary_factor": metadata.get(f"{arch}.rope.dimension_count", d_head) / d_head}
    _only(metadata, f"{arch}.rope.dimension_count", d_head)
    return config


def read_scaling(metadata: Config, arch: str) -> dict[str, Any] | None:
    """The value of ``rope_scaling``. A factor without a type means linear, as in llama.cpp (``llama_model_loader``)."""
    kind = metadata.get(f"{arch}.rope.scaling.type", "linear")
    factor = metadata.get(f"{arch}.rope.scaling.factor", metadata.get(f"{arch}.rope.scale_linear")) or 1.0
    metadata.get(f"{arch}.rope.scaling.finetuned")  # says how the model was trained, not what it computes
    return None if kind == "none" or (kind == "linear" and factor == 1.0) else {"rope_type": kind, "factor": factor}


def write_rotary(spec: ModelSpec, arch: str) -> dict[str, Any]:
    """What `read_rotary` reads. A scaling that only a tensor can say is not among it."""
    assert spec.rope is not None
    found: dict[str, Any] = {
        f"{arch}.rope.dimension_count": spec.rope.n_dims,
        f"{arch}.rope.freq_base": spec.rope.base,
    }
    scaling = spec.rope.scaling
    if scaling is not None and scaling.kind == "linear":
        found |= {f"{arch}.rope.scaling.type": "linear", f"{arch}.rope.scaling.factor": scaling.factor}
    return found


def _only(metadata: Config, key: str, d_head: int) -> None:
    if metadata.get(key, d_head) != d_head:
        raise InputError(f"{key} is {metadata[key]}; zoo's family needs the size of its heads, {d_head}.")
