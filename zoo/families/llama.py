"""Llama (arXiv 2302.13971 and its successors): rotary positions, RMS norms, gated SiLU, grouped kv heads, no biases."""

from __future__ import annotations

from collections.abc import Sequence
from math import pi
from typing import Any

from zoo.errors import FileFormatError, InputError
from zoo.families.base import ACTIVATIONS, Config, ConfigReader, Family, GGUFMap, KeyMap, activation_name
from zoo.families.gguf_metadata import (
    read_head_size,
    read_rotary,
    read_sizes,
    write_head_size,
    write_rotary,
    write_sizes,
)
from zoo.families.rope import read_rope_spec, write_scaling
from zoo.spec import ModelSpec

HF_KEYS = KeyMap(
    """
    model.embed_tokens.weight                          embed.weight
    model.layers.{i}.input_layernorm.weight            blocks.{i}.attn_norm.weight
    model.layers.{i}.self_attn.q_proj.weight           blocks.{i}.attn.q.weight
    model.layers.{i}.self_attn.q_proj.bias             blocks.{i}.attn.q.bias
    model.layers.{i}.self_attn.k_proj.weight           blocks.{i}.attn.k.weight
    model.layers.{i}.self_attn.k_proj.bias             blocks.{i}.attn.k.bias
    model.layers.{i}.self_attn.v_proj.weight           blocks.{i}.attn.v.weight
    model.layers.{i}.self_attn.v_proj.bias             blocks.{i}.attn.v.bias
    model.layers.{i}.self_attn.o_proj.weight           blocks.{i}.attn.out.weight
    model.layers.{i}.self_attn.o_proj.bias             blocks.{i}.attn.out.bias
    model.layers.{i}.post_attention_layernorm.weight   blocks.{i}.mlp_norm.weight
    model.layers.{i}.mlp.gate_proj.weight              blocks.{i}.mlp.gate.weight
    model.layers.{i}.mlp.gate_proj.bias                blocks.{i}.mlp.gate.bias
    model.layers.{i}.mlp.up_proj.weight                blocks.{i}.mlp.up.weight
    model.layers.{i}.mlp.up_proj.bias                  blocks.{i}.mlp.up.bias
    model.layers.{i}.mlp.down_proj.weight              blocks.{i}.mlp.down.weight
    model.layers.{i}.mlp.down_proj.bias                blocks.{i}.mlp.down.bias
    model.norm.weight                                  norm.weight
    lm_head.weight                                     head.weight
    """,
    prefix="model.",
    ignore=[r"rotary_emb\.inv_freq$"],
)

GGUF_KEYS = KeyMap(
    """
    token_embd.weight            embed.weight
    blk.{i}.attn_norm.weight     blocks.{i}.attn_norm.weight
    blk.{i}.attn_q.weight        blocks.{i}.attn.q.weight    rope_paired
    blk.{i}.attn_k.weight        blocks.{i}.attn.k.weight    rope_paired
    blk.{i}.attn_v.weight        blocks.{i}.attn.v.weight
    blk.{i}.attn_output.weight   blocks.{i}.attn.out.weight
    blk.{i}.ffn_norm.weight      blocks.{i}.mlp_norm.weight
    blk.{i}.ffn_gate.weight      blocks.{i}.mlp.gate.weight
    blk.{i}.ffn_up.weight        blocks.{i}.mlp.up.weight
    blk.{i}.ffn_down.weight      blocks.{i}.mlp.down.weight
    output_norm.weight           norm.weight
    output.weight                head.weight
    """,
    ignore=[r"^rope_freqs\.weight$"],
)

_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def spec_from_config(config: Config) -> ModelSpec:
    """Spec of a Hugging Face Llama config (`LlamaConfig`). Raises `InputError` as `ConfigReader` does."""
    read = ConfigReader(config, "llama")
    read.only("rope_interleaved", False)
    d_model, n_heads = read.require("hidden_size"), read.require("num_attention_heads")
    d_head = read.get("head_dim", d_model // n_heads)
    attention_bias, mlp_bias = read.get("attention_bias", False), read.get("mlp_bias", False)
    spec = ModelSpec(
        n_layers=read.require("num_hidden_layers"),
        d_model=d_model,
        n_heads=n_heads,
        n_kv_heads=read.get("num_key_value_heads", n_heads),
        d_head=d_head,
        d_ffn=read.require("intermediate_size"),
        vocab_size=read.require("vocab_size"),
        max_seq_len=read.get("max_sequence_length", read.get("max_position_embeddings", 2048)),
        norm="rms",
        norm_eps=read.get("rms_norm_eps", 1e-6),
        mlp="gated",
        activation=read.choose("hidden_act", ACTIVATIONS, "silu"),
        rope=read_rope_spec(read, "llama", d_head),
        qkv_bias=attention_bias,
        attn_out_bias=attention_bias,
        mlp_bias=mlp_bias,
        tie_embeddings=read.get("tie_word_embeddings", False),
        attn_dropout=read.get("attention_dropout", 0.0),
        init_std=read.get("initializer_range", 0.02),
    )
    read.finish("is_llama_config")
    return spec


def config_from_spec(spec: ModelSpec) -> dict[str, Any]:
    """The Hugging Face config of a spec of this family."""
    assert spec.rope is not None
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": spec.n_layers,
        "hidden_size": spec.d_model,
        "num_attention_heads": spec.n_heads,
        "num_key_value_heads": spec.n_kv_heads,
        "head_dim": spec.d_head,
        "intermediate_size": spec.d_ffn,
        "vocab_size": spec.vocab_size,
        "max_position_embeddings": spec.max_seq_len,
        "rms_norm_eps": spec.norm_eps,
        "hidden_act": activation_name(spec.activation),
        "rope_theta": spec.rope.base,
        "rope_scaling": write_scaling(spec.rope.scaling),
        "attention_bias": spec.qkv_bias,
        "mlp_bias": spec.mlp_bias,
        "tie_word_embeddings": spec.tie_embeddings,
        "attention_dropout": spec.attn_dropout,
        "initializer_range": spec.init_std,
    }


def config_from_gguf(metadata: Config) -> dict[str, Any]:
    """The Hugging Face config of a GGUF file's ``llama.*`` metadata, and ``rope_freqs`` if it has that tensor.

    Raises:
        InputError: only a part of each head is rotated, or values are not as wide as keys.
        FileFormatError: the factors in ``rope_freqs`` are of a scaling that zoo does not know.
    """
    d_head = read_head_size(metadata, "llama", free=True)
    rotary = read_rotary(metadata, "llama", d_head)
    return {
        **read_sizes(metadata, "llama"),
        "head_dim": d_head,
        "rms_norm_eps": metadata["llama.attention.layer_norm_rms_epsilon"],
        **rotary,
        "rope_scaling": _with_factors(metadata, rotary["rope_scaling"], d_head, rotary["rope_theta"]),
    }


def _with_factors(
    metadata: Config, by_metadata: dict[str, Any] | None, d_head: int, theta: float
) -> dict[str, Any] | None:
    """The value of ``rope_scaling``, which a file says by its metadata or by ``rope_freqs``."""
    factors = metadata.get("rope_freqs")
    if factors is None:
        return by_metadata
    if by_metadata is not None:
        kind = by_metadata["rope_type"]
        raise InputError(f"rotary positions are scaled twice: by {kind!r} and by the tensor rope_freqs.weight.")
    return _llama3_from_factors(factors, d_head, theta)


def _llama3_from_factors(factors: Sequence[float], d_head: int, theta: float) -> dict[str, Any] | None:
    """The llama3 scaling that divides rotary frequency ``i`` by ``factors[i]``; None if it changes nothing.

    llama.cpp's converter stores these factors for Llama 3.1 and later, always with the constants below
    (``LlamaModel.generate_extra_tensors``), and not the ``factor`` that they come from.
    """
    if len(factors) == d_head // 2:
        if all(factor == 1.0 for factor in factors):
            return None
        for factor in (max(factors), 8.0, 32.0):
            scaling = {"rope_type": "llama3", "factor": factor, **_LLAMA3}
            expected = _llama3_factors(factor, d_head, theta)
            if all(abs(found - wanted) <= 1e-4 * wanted for found, wanted in zip(factors, expected, strict=True)):
                return scaling
    raise FileFormatError("the scaling of rotary positions in its tensor rope_freqs.weight is not one that zoo knows.")


def _llama3_factors(factor: float, d_head: int, theta: float) -> list[float]:
    low, high, length = (
        _LLAMA3["low_freq_factor"],
        _LLAMA3["high_freq_factor"],
        _LLAMA3["original_max_position_embeddings"],
    )
    found = []
    for i in range(0, d_head, 2):
        turns = length / (2 * pi * theta ** (i / d_head))  # of this pair within the original context
        kept = min(max((turns - low) / (high - low), 0.0), 1.0)
        found.append(1 / (kept + (1 - kept) / factor))
    return found


def gguf_from_spec(spec: ModelSpec) -> dict[str, Any]:
    """The ``llama.*`` metadata of a spec, and ``rope_freqs`` if llama3 scales its positions."""
    assert spec.rope is not None
    found = {
        **write_sizes(spec, "llama"),
        **write_head_size(spec, "llama"),
        "llama.attention.layer_norm_rms_epsilon": spec.norm_eps,
        **write_rotary(spec, "llama"),
    }
    scaling = spec.rope.scaling
    if scaling is not None and scaling.kind == "llama3":
        found["rope_freqs"] = _llama3_factors(scaling.factor, spec.d_head, spec.rope.base)
    return found


LLAMA = Family(
    name="llama",
    model_type="llama",
    architecture="LlamaForCausalLM",
    read_config=spec_from_config,
    write_config=config_from_spec,
    keys=HF_KEYS,
    gguf=GGUFMap("llama", config_from_gguf, GGUF_KEYS, gguf_from_spec),
)
