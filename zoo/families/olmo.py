"""OLMo (arXiv 2402.00838): Llama with layer norms that have no weights, and perhaps q, k and v clipped."""

from __future__ import annotations

from typing import Any

from zoo.errors import InputError
from zoo.families.base import ACTIVATIONS, Config, ConfigReader, Family, GGUFMap, activation_name
from zoo.families.gguf_metadata import read_head_size, read_rotary, read_sizes, write_rotary, write_sizes
from zoo.families.llama import GGUF_KEYS, HF_KEYS
from zoo.families.rope import read_rope_spec, write_scaling
from zoo.spec import ModelSpec


def spec_from_config(config: Config) -> ModelSpec:
    """Spec of a Hugging Face OLMo config (`OlmoConfig`). Raises `InputError` as `ConfigReader` does."""
    read = ConfigReader(config, "olmo")
    d_model, n_heads = read.get("hidden_size", 4096), read.get("num_attention_heads", 32)
    bias = read.get("attention_bias", False)
    spec = ModelSpec(
        n_layers=read.get("num_hidden_layers", 32),
        d_model=d_model,
        n_heads=n_heads,
        n_kv_heads=read.get("num_key_value_heads", n_heads),
        d_head=d_model // n_heads,
        d_ffn=read.get("intermediate_size", 11008),
        vocab_size=read.get("vocab_size", 50304),
        max_seq_len=read.get("max_position_embeddings", 2048),
        norm="layer",
        norm_eps=1e-5,  # no key of the config: the reference has it in the code
        norm_affine=False,
        mlp="gated",
        activation=read.choose("hidden_act", ACTIVATIONS, "silu"),
        rope=read_rope_spec(read, "olmo", d_model // n_heads),
        qkv_bias=bias,
        attn_out_bias=bias,
        tie_embeddings=read.get("tie_word_embeddings", False),
        qkv_clip=read.get("clip_qkv"),
        attn_dropout=read.get("attention_dropout", 0.0),
        init_std=read.get("initializer_range", 0.02),
    )
    read.finish()
    return spec


def config_from_spec(spec: ModelSpec) -> dict[str, Any]:
    """The Hugging Face config of a spec of this family."""
    assert spec.rope is not None
    return {
        "model_type": "olmo",
        "architectures": ["OlmoForCausalLM"],
        "num_hidden_layers": spec.n_layers,
        "hidden_size": spec.d_model,
        "num_attention_heads": spec.n_heads,
        "num_key_value_heads": spec.n_kv_heads,
        "intermediate_size": spec.d_ffn,
        "vocab_size": spec.vocab_size,
        "max_position_embeddings": spec.max_seq_len,
        "hidden_act": activation_name(spec.activation),
        "rope_theta": spec.rope.base,
        "rope_scaling": write_scaling(spec.rope.scaling),
        "attention_bias": spec.qkv_bias,
        "tie_word_embeddings": spec.tie_embeddings,
        "clip_qkv": spec.qkv_clip,
        "attention_dropout": spec.attn_dropout,
        "initializer_range": spec.init_std,
    }


def config_from_gguf(metadata: Config) -> dict[str, Any]:
    """The Hugging Face config of a GGUF file's ``olmo.*`` metadata.

    Raises:
        InputError: its norms have another epsilon than OLMo's.
    """
    epsilon = metadata["olmo.attention.layer_norm_epsilon"]
    if epsilon != 1e-5:
        raise InputError(f"olmo.attention.layer_norm_epsilon is {epsilon}; zoo's olmo family has 1e-05.")
    return {
        **read_sizes(metadata, "olmo"),
        **read_rotary(metadata, "olmo", read_head_size(metadata, "olmo")),
        "clip_qkv": metadata.get("olmo.attention.clamp_kqv") or None,
    }


def gguf_from_spec(spec: ModelSpec) -> dict[str, Any]:
    """The ``olmo.*`` metadata of a spec."""
    found = {
        **write_sizes(spec, "olmo"),
        "olmo.attention.layer_norm_epsilon": spec.norm_eps,
        **write_rotary(spec, "olmo"),
    }
    return found if spec.qkv_clip is None else {**found, "olmo.attention.clamp_kqv": float(spec.qkv_clip)}


OLMO = Family(
    name="olmo",
    model_type="olmo",
    architecture="OlmoForCausalLM",
    read_config=spec_from_config,
    write_config=config_from_spec,
    keys=HF_KEYS,
    gguf=GGUFMap("olmo", config_from_gguf, GGUF_KEYS, gguf_from_spec),
)
