"""Qwen 1.5, 2 and 2.5 (arXiv 2407.10671): Llama with biases on q, k and v; later layers may have a window."""

from __future__ import annotations

from typing import Any

from zoo.families.base import ACTIVATIONS, Config, ConfigReader, Family, GGUFMap, KeyMap, activation_name
from zoo.families.gguf_metadata import read_head_size, read_rotary, read_sizes, write_rotary, write_sizes
from zoo.families.layers import read_windows, write_first_windows
from zoo.families.llama import HF_KEYS
from zoo.families.rope import read_rope_spec, write_rope_spec
from zoo.spec import ModelSpec

GGUF_KEYS = KeyMap(
    """
    token_embd.weight            embed.weight
    blk.{i}.attn_norm.weight     blocks.{i}.attn_norm.weight
    blk.{i}.attn_q.weight        blocks.{i}.attn.q.weight
    blk.{i}.attn_q.bias          blocks.{i}.attn.q.bias
    blk.{i}.attn_k.weight        blocks.{i}.attn.k.weight
    blk.{i}.attn_k.bias          blocks.{i}.attn.k.bias
    blk.{i}.attn_v.weight        blocks.{i}.attn.v.weight
    blk.{i}.attn_v.bias          blocks.{i}.attn.v.bias
    blk.{i}.attn_output.weight   blocks.{i}.attn.out.weight
    blk.{i}.ffn_norm.weight      blocks.{i}.mlp_norm.weight
    blk.{i}.ffn_gate.weight      blocks.{i}.mlp.gate.weight
    blk.{i}.ffn_up.weight        blocks.{i}.mlp.up.weight
    blk.{i}.ffn_down.weight      blocks.{i}.mlp.down.weight
    output_norm.weight           norm.weight
    output.weight                head.weight
    """
)


def spec_from_config(config: Config) -> ModelSpec:
    """Spec of a Hugging Face Qwen2 config (`Qwen2Config`). Raises `InputError` as `ConfigReader` does."""
    read = ConfigReader(config, "qwen2")
    read.only("use_mrope", False)
    n_layers, d_model, n_heads = (
        read.require("num_hidden_layers"),
        read.require("hidden_size"),
        read.get("num_attention_heads", 32),
    )
    d_head = read.get("head_dim", d_model // n_heads)
    window, n_full = read.nullable("sliding_window", 4096), read.get("max_window_layers", 28)
    spec = ModelSpec(
        n_layers=n_layers,
        d_model=d_model,
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
        rope=read_rope_spec(read, "qwen2", d_head),
        qkv_bias=True,
        tie_embeddings=read.get("tie_word_embeddings", False),
        attn_dropout=read.get("attention_dropout", 0.0),
        init_std=read.get("initializer_range", 0.02),
        **read_windows(
            read, "qwen2", n_layers, window if read.get("use_sliding_window", False) else None, lambda i: i >= n_full
        ),
    )
    read.finish()
    return spec


def config_from_spec(spec: ModelSpec) -> dict[str, Any]:
    """The Hugging Face config of a spec of this family. Raises `InputError` as `write_first_windows` does."""
    return {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
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
        **write_first_windows(spec, "qwen2"),
        "tie_word_embeddings": spec.tie_embeddings,
        "attention_dropout": spec.attn_dropout,
        "initializer_range": spec.init_std,
    }


def config_from_gguf(metadata: Config) -> dict[str, Any]:
    """The Hugging Face config of a GGUF file's ``qwen2.*`` metadata. llama.cpp has no windows for it."""
    return {
        **read_sizes(metadata, "qwen2"),
        "rms_norm_eps": metadata["qwen2.attention.layer_norm_rms_epsilon"],
        **read_rotary(metadata, "qwen2", read_head_size(metadata, "qwen2")),
    }


def gguf_from_spec(spec: ModelSpec) -> dict[str, Any]:
    """The ``qwen2.*`` metadata of a spec."""
    return {
        **write_sizes(spec, "qwen2"),
        "qwen2.attention.layer_norm_rms_epsilon": spec.norm_eps,
        **write_rotary(spec, "qwen2"),
    }


QWEN2 = Family(
    name="qwen2",
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    read_config=spec_from_config,
    write_config=config_from_spec,
    keys=HF_KEYS,
    gguf=GGUFMap("qwen2", config_from_gguf, GGUF_KEYS, gguf_from_spec),
)
