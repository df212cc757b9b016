"""Gemma (arXiv 2403.08295): Llama with wide heads, gated tanh GELU, scaled and tied embeddings, norms stored less 1."""

from __future__ import annotations

from typing import Any

from zoo.errors import InputError
from zoo.families.base import ACTIVATIONS, Config, ConfigReader, Family, GGUFMap, KeyMap, activation_name
from zoo.families.gguf_metadata import (
    read_head_size,
    read_rotary,
    read_sizes,
    write_head_size,
    write_rotary,
    write_sizes,
)
from zoo.families.llama import HF_KEYS
from zoo.families.rope import read_rope_spec, write_scaling
from zoo.spec import Activation, ModelSpec

GGUF_KEYS = KeyMap(
    """
    token_embd.weight            embed.weight
    blk.{i}.attn_norm.weight     blocks.{i}.attn_norm.weight
    blk.{i}.attn_q.weight        blocks.{i}.attn.q.weight
    blk.{i}.attn_k.weight        blocks.{i}.attn.k.weight
    blk.{i}.attn_v.weight        blocks.{i}.attn.v.weight
    blk.{i}.attn_output.weight   blocks.{i}.attn.out.weight
    blk.{i}.ffn_norm.weight      blocks.{i}.mlp_norm.weight
    blk.{i}.ffn_gate.weight      blocks.{i}.mlp.gate.weight
    blk.{i}.ffn_up.weight        blocks.{i}.mlp.up.weight
    blk.{i}.ffn_down.weight      blocks.{i}.mlp.down.weight
    output_norm.weight           norm.weight
    """
)


def spec_from_config(config: Config) -> ModelSpec:
    """Spec of a Hugging Face Gemma config (`GemmaConfig`).

    Raises:
        InputError: as `ConfigReader` does, or its two keys for the activation differ.
    """
    read = ConfigReader(config, "gemma")
    read.only("use_bidirectional_attention", False)
    d_model, d_head = read.get("hidden_size", 3072), read.get("head_dim", 256)
    bias = read.get("attention_bias", False)
    spec = ModelSpec(
        n_layers=read.get("num_hidden_layers", 28),
        d_model=d_model,
        n_heads=read.get("num_attention_heads", 16),
        n_kv_heads=read.get("num_key_value_heads", 16),
        d_head=d_head,
        d_ffn=read.get("intermediate_size", 24576),
        vocab_size=read.get("vocab_size", 256000),
        max_seq_len=read.get("max_position_embeddings", 8192),
        norm="rms",
        norm_eps=read.get("rms_norm_eps", 1e-6),
        norm_offset=1.0,
        mlp="gated",
        activation=_activation(read),
        rope=read_rope_spec(read, "gemma", d_head),
        embed_scale=d_model**0.5,
        qkv_bias=bias,
        attn_out_bias=bias,
        tie_embeddings=read.get("tie_word_embeddings", True),
        attn_dropout=read.get("attention_dropout", 0.0),
        init_std=read.get("initializer_range", 0.02),
    )
    read.finish()
    return spec


def _activation(read: ConfigReader) -> Activation:
    """The first release says "gelu" and means the approximation by tanh; later ones say so in ``hidden_activation``."""
    choices: dict[str, Activation] = {**ACTIVATIONS, "gelu": "gelu_tanh"}
    activation = read.choose("hidden_act", choices, "gelu_pytorch_tanh")
    second = read.get("hidden_activation")
    if second is not None and ACTIVATIONS.get(second) != activation:
        first = read.get("hidden_act")
        raise InputError(
            f"the gemma config has hidden_act = {first!r} and hidden_activation = {second!r}: which is it?"
        )
    return activation


def config_from_spec(spec: ModelSpec) -> dict[str, Any]:
    """The Hugging Face config of a spec of this family."""
    assert spec.rope is not None
    return {
        "model_type": "gemma",
        "architectures": ["GemmaForCausalLM"],
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
        "tie_word_embeddings": spec.tie_embeddings,
        "attention_dropout": spec.attn_dropout,
        "initializer_range": spec.init_std,
    }


def config_from_gguf(metadata: Config) -> dict[str, Any]:
    """The Hugging Face config of a GGUF file's ``gemma.*`` metadata."""
    d_head = read_head_size(metadata, "gemma", free=True)
    return {
        **read_sizes(metadata, "gemma"),
        "head_dim": d_head,
        "rms_norm_eps": metadata["gemma.attention.layer_norm_rms_epsilon"],
        **read_rotary(metadata, "gemma", d_head),
        "tie_word_embeddings": True,  # llama.cpp knows no other
    }


def gguf_from_spec(spec: ModelSpec) -> dict[str, Any]:
    """The ``gemma.*`` metadata of a spec."""
    return {
        **write_sizes(spec, "gemma"),
        **write_head_size(spec, "gemma"),
        "gemma.attention.layer_norm_rms_epsilon": spec.norm_eps,
        **write_rotary(spec, "gemma"),
    }


GEMMA = Family(
    name="gemma",
    model_type="gemma",
    architecture="GemmaForCausalLM",
    read_config=spec_from_config,
    write_config=config_from_spec,
    keys=HF_KEYS,
    gguf=GGUFMap("gemma", config_from_gguf, GGUF_KEYS, gguf_from_spec),
)
