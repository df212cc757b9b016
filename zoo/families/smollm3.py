"""SmolLM 3: Llama with layers whose q and k are not rotated, every fourth by default (arXiv 2501.18795)."""

from __future__ import annotations

from typing import Any

from zoo.errors import InputError
from zoo.families.base import ACTIVATIONS, Config, ConfigReader, Family, GGUFMap, activation_name
from zoo.families.gguf_metadata import (
    read_head_size,
    read_rotary,
    read_sizes,
    write_head_size,
    write_rotary,
    write_sizes,
)
from zoo.families.layers import read_windows, write_windows
from zoo.families.llama import GGUF_KEYS, HF_KEYS
from zoo.families.rope import read_rope_spec, write_rope_spec
from zoo.spec import ModelSpec


def spec_from_config(config: Config) -> ModelSpec:
    """Spec of a Hugging Face SmolLM3 config (`SmolLM3Config`). Raises `InputError` as `ConfigReader` does."""
    read = ConfigReader(config, "smollm3")
    n_layers, d_model, n_heads = (
        read.get("num_hidden_layers", 36),
        read.get("hidden_size", 2048),
        read.get("num_attention_heads", 16),
    )
    d_head = read.get("head_dim", d_model // n_heads)
    attention_bias = read.get("attention_bias", False)
    unrotated = _unrotated_layers(read, n_layers)
    window = read.get("sliding_window")
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
        rope=read_rope_spec(read, "smollm3", d_head, default_theta=2_000_000.0),
        unrotated_layers=unrotated,
        qkv_bias=attention_bias,
        attn_out_bias=attention_bias,
        mlp_bias=read.get("mlp_bias", False),
        tie_embeddings=read.get("tie_word_embeddings", True),
        attn_dropout=read.get("attention_dropout", 0.0),
        init_std=read.get("initializer_range", 0.02),
        **read_windows(
            read, "smollm3", n_layers, window if read.get("use_sliding_window", False) else None, unrotated.__contains__
        ),
    )
    read.finish("max_window_layers")  # which transformers does not read for this family
    return spec


def _unrotated_layers(read: ConfigReader, n_layers: int) -> tuple[int, ...]:
    """``no_rope_layers`` holds a 1 for each layer that is rotated, in spite of its name."""
    interval = read.get("no_rope_layer_interval", 4)
    rotated = read.get("no_rope_layers", [int((layer + 1) % interval != 0) for layer in range(n_layers)])
    if len(rotated) < n_layers or not set(rotated) <= {0, 1}:
        raise InputError(f"the smollm3 config has no_rope_layers = {rotated}; it must be a 0 or 1 for each layer.")
    return tuple(layer for layer in range(n_layers) if not rotated[layer])


def config_from_spec(spec: ModelSpec) -> dict[str, Any]:
    """The Hugging Face config of a spec of this family.

    Raises:
        InputError: it has windows elsewhere than in its unrotated layers.
    """
    slides = {layer for layer in range(spec.n_layers) if layer not in spec.full_attention_layers}
    if spec.window is not None and slides != set(spec.unrotated_layers):
        raise InputError(
            f"the layers with a window are {sorted(slides)}; in smollm3 they are the unrotated ones, "
            f"{list(spec.unrotated_layers)}."
        )
    return {
        "model_type": "smollm3",
        "architectures": ["SmolLM3ForCausalLM"],
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
        "no_rope_layers": [int(layer not in spec.unrotated_layers) for layer in range(spec.n_layers)],
        **write_windows(spec),
        "attention_bias": spec.qkv_bias,
        "mlp_bias": spec.mlp_bias,
        "tie_word_embeddings": spec.tie_embeddings,
        "attention_dropout": spec.attn_dropout,
        "initializer_range": spec.init_std,
    }


def config_from_gguf(metadata: Config) -> dict[str, Any]:
    """The Hugging Face config of a GGUF file's ``smollm3.*`` metadata. Every fourth layer is not rotated."""
    d_head = read_head_size(metadata, "smollm3", free=True)
    return {
        **read_sizes(metadata, "smollm3"),
        "head_dim": d_head,
        "rms_norm_eps": metadata["smollm3.attention.layer_norm_rms_epsilon"],
        **read_rotary(metadata, "smollm3", d_head),
        "no_rope_layer_interval": 4,  # no key says so: it is in llama.cpp's code
    }


def gguf_from_spec(spec: ModelSpec) -> dict[str, Any]:
    """The ``smollm3.*`` metadata of a spec."""
    return {
        **write_sizes(spec, "smollm3"),
        **write_head_size(spec, "smollm3"),
        "smollm3.attention.layer_norm_rms_epsilon": spec.norm_eps,
        **write_rotary(spec, "smollm3"),
    }


SMOLLM3 = Family(
    name="smollm3",
    model_type="smollm3",
    architecture="SmolLM3ForCausalLM",
    read_config=spec_from_config,
    write_config=config_from_spec,
    keys=HF_KEYS,
    gguf=GGUFMap("smollm3", config_from_gguf, GGUF_KEYS, gguf_from_spec),
)
