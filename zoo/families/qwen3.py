"""Qwen 3 (arXiv 2505.09388): Llama with q and k normalized over each head; later layers may have a window."""

from __future__ import annotations

from typing import Any

from zoo.families.base import ACTIVATIONS, Config, ConfigReader, Family, GGUFMap, KeyMap, activation_name
from zoo.families.gguf_metadata import (
    read_head_size,
    read_rotary,
    read_sizes,
    write_head_size,
    write_rotary,
    write_sizes,
)
from zoo.families.layers import read_windows, write_first_windows
from zoo.families.rope import read_rope_spec, write_rope_spec
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
    model.layers.{i}.self_attn.q_norm.weight           blocks.{i}.attn.q_norm.weight
    model.layers.{i}.self_attn.k_norm.weight           blocks.{i}.attn.k_norm.weight
    model.layers.{i}.post_attention_layernorm.weight   blocks.{i}.mlp_norm.weight
    model.layers.{i}.mlp.gate_proj.weight              blocks.{i}.mlp.gate.weight
    model.layers.{i}.mlp.up_proj.weight                blocks.{i}.mlp.up.weight
    model.layers.{i}.mlp.down_proj.weight              blocks.{i}.mlp.down.weight
    model.norm.weight                                  norm.weight
    lm_head.weight                                     head.weight
    """,
    prefix="model.",
)

GGUF_KEYS = KeyMap(
    """
    token_embd.weight            embed.weight
    blk.{i}.attn_norm.weight     blocks.{i}.attn_norm.weight
    blk.{i}.attn_q.weight        blocks.{i}.attn.q.weight
    blk.{i}.attn_k.weight        blocks.{i}.attn.k.weight
    blk.{i}.attn_v.weight        blocks.{i}.attn.v.weight
    blk.{i}.attn_output.weight   blocks.{i}.attn.out.weight
    blk.{i}.attn_q_norm.weight   blocks.{i}.attn.q_norm.weight
    blk.{i}.attn_k_norm.weight   blocks.{i}.attn.k_norm.weight
    blk.{i}.ffn_norm.weight      blocks.{i}.mlp_norm.weight
    blk.{i}.ffn_gate.weight      blocks.{i}.mlp.gate.weight
    blk.{i}.ffn_up.weight        blocks.{i}.mlp.up.weight
    blk.{i}.ffn_down.weight      blocks.{i}.mlp.down.weight
    output_norm.weight           norm.weight
    output.weight                head.weight
    """
)


def spec_from_config(config: Config) -> ModelSpec:
    """Spec of a Hugging Face Qwen3 config (`Qwen3Config`). Raises `InputError` as `ConfigReader` does."""
    read = ConfigReader(config, "qwen3")
    n_layers, n_heads = read.require("num_hidden_layers"), read.get("num_attention_heads", 32)
    d_head, attention_bias = read.get("head_dim", 128), read.get("attention_bias", False)
    window, n_full = read.nullable("sliding_window", 4096), read.get("max_window_layers", 28)
    spec = ModelSpec(
        n_layers=n_layers,
        d_model=read.require("hidden_size"),
        n_heads=n_heads,
        n_kv_heads=read.get("num_key_value_heads", n_heads),
        d_head=d_head,
        d_ffn=read.require("intermediate_size"),
        vocab_size=read.require("vocab_size"),
        max_seq_len=read.get("max_position_embeddings", 32768),
        norm="rms",
        norm_eps=read.get("rms_norm_eps", 1e-6),
        mlp="gated",
        activation=read.choose("hidden_act", ACTIVATIONS, "silu"),
        rope=read_rope_spec(read, "qwen3", d_head),
        qkv_bias=attention_bias,
        attn_out_bias=attention_bias,
        qk_norm="head",
        tie_embeddings=read.get("tie_word_embeddings", False),
        attn_dropout=read.get("attention_dropout", 0.0),
        init_std=read.get("initializer_range", 0.02),
        **read_windows(
            read, "qwen3", n_layers, window if read.get("use_sliding_window", False) else None, lambda i: i >= n_full
        ),
    )
    read.finish()
    return spec


def config_from_spec(spec: ModelSpec) -> dict[str, Any]:
    """The Hugging Face config of a spec of this family. Raises `InputError` as `write_first_windows` does."""
    return {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
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
        **write_rope_spec(spec),
        **write_first_windows(spec, "qwen3"),
        "attention_bias": spec.qkv_bias,
        "tie_word_embeddings": spec.tie_embeddings,
        "attention_dropout": spec.attn_dropout,
        "initializer_range": spec.init_std,
    }


def config_from_gguf(metadata: Config) -> dict[str, Any]:
    """The Hugging Face config of a GGUF file's ``qwen3.*`` metadata. llama.cpp has no windows for it."""
    d_head = read_head_size(metadata, "qwen3", free=True)
    return {
        **read_sizes(metadata, "qwen3"),
        "head_dim": d_head,
        "rms_norm_eps": metadata["qwen3.attention.layer_norm_rms_epsilon"],
        **read_rotary(metadata, "qwen3", d_head),
    }


def gguf_from_spec(spec: ModelSpec) -> dict[str, Any]:
    """The ``qwen3.*`` metadata of a spec."""
    return {
        **write_sizes(spec, "qwen3"),
        **write_head_size(spec, "qwen3"),
        "qwen3.attention.layer_norm_rms_epsilon": spec.norm_eps,
        **write_rotary(spec, "qwen3"),
    }


QWEN3 = Family(
    name="qwen3",
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    read_config=spec_from_config,
    write_config=config_from_spec,
    keys=HF_KEYS,
    gguf=GGUFMap("qwen3", config_from_gguf, GGUF_KEYS, gguf_from_spec),
)
