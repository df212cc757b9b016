"""Mistral (arXiv 2310.06825): Llama with heads of any size, and a window over the keys in every layer or in none."""

from __future__ import annotations

from typing import Any

from zoo.families import llama
from zoo.families.base import ACTIVATIONS, Config, ConfigReader, Family, GGUFMap, activation_name
from zoo.families.llama import GGUF_KEYS, HF_KEYS
from zoo.families.rope import read_rope_spec, write_scaling
from zoo.spec import ModelSpec


def spec_from_config(config: Config) -> ModelSpec:
    """Spec of a Hugging Face Mistral config (`MistralConfig`). Raises `InputError` as `ConfigReader` does."""
    read = ConfigReader(config, "mistral")
    n_layers = read.get("num_hidden_layers", 32)
    d_model, n_heads = read.get("hidden_size", 4096), read.get("num_attention_heads", 32)
    d_head = read.get("head_dim", d_model // n_heads)
    window = read.nullable("sliding_window", 4096)
    read.only("layer_types", ["full_attention" if window is None else "sliding_attention"] * n_layers)
    spec = ModelSpec(
        n_layers=n_layers,
        d_model=d_model,
        n_heads=n_heads,
        n_kv_heads=read.get("num_key_value_heads", 8),
        d_head=d_head,
        d_ffn=read.get("intermediate_size", 14336),
        vocab_size=read.get("vocab_size", 32000),
        max_seq_len=read.get("max_position_embeddings", 4096 * 32),
        norm="rms",
        norm_eps=read.get("rms_norm_eps", 1e-6),
        mlp="gated",
        activation=read.choose("hidden_act", ACTIVATIONS, "silu"),
        rope=read_rope_spec(read, "mistral", d_head),
        tie_embeddings=read.get("tie_word_embeddings", False),
        window=window,
        attn_dropout=read.get("attention_dropout", 0.0),
        init_std=read.get("initializer_range", 0.02),
    )
    read.finish()
    return spec


def config_from_spec(spec: ModelSpec) -> dict[str, Any]:
    """The Hugging Face config of a spec of this family."""
    assert spec.rope is not None
    return {
        "model_type": "mistral",
        "architectures": ["MistralForCausalLM"],
        "num_hidden_layers": spec.n_layers,
        "hidden_size": spec.d_model,
        "num_attention_heads": spec.n_heads,
        "num_key_value_heads": spec.n_kv_heads,
        "head_dim": spec.d_head,
        "intermediate_size": spec.d_ffn,
        "vocab_size": spec.vocab_size,
        "max_position_embeddings": spec.max_seq_len,
        "sliding_window": spec.window,
        "rms_norm_eps": spec.norm_eps,
        "hidden_act": activation_name(spec.activation),
        "rope_theta": spec.rope.base,
        "rope_scaling": write_scaling(spec.rope.scaling),
        "tie_word_embeddings": spec.tie_embeddings,
        "attention_dropout": spec.attn_dropout,
        "initializer_range": spec.init_std,
    }


def config_from_gguf(metadata: Config) -> dict[str, Any]:
    """The Hugging Face config of a GGUF file's ``llama.*`` metadata, which know no window."""
    return {**llama.config_from_gguf(metadata), "sliding_window": None}


MISTRAL = Family(
    name="mistral",
    model_type="mistral",
    architecture="MistralForCausalLM",
    read_config=spec_from_config,
    write_config=config_from_spec,
    keys=HF_KEYS,
    gguf=GGUFMap("llama", config_from_gguf, GGUF_KEYS, llama.gguf_from_spec, opens=False),
)
