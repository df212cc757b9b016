"""Phi 3, 3.5 and 4 (arXiv 2404.14219): Llama with qkv and gate_up in one matrix each, windows, LongRoPE."""

from __future__ import annotations

from typing import Any

from zoo.families.base import ACTIVATIONS, Config, ConfigReader, Family, GGUFMap, KeyMap, activation_name
from zoo.families.gguf_metadata import read_head_size, read_rotary, read_sizes, write_rotary, write_sizes
from zoo.families.rope import read_rope_spec, write_rope_spec
from zoo.spec import ModelSpec

HF_KEYS = KeyMap(
    """
    model.embed_tokens.weight                          embed.weight
    model.layers.{i}.input_layernorm.weight            blocks.{i}.attn_norm.weight
    model.layers.{i}.self_attn.qkv_proj.weight         blocks.{i}.attn.{q,k,v}.weight   rows
    model.layers.{i}.self_attn.o_proj.weight           blocks.{i}.attn.out.weight
    model.layers.{i}.post_attention_layernorm.weight   blocks.{i}.mlp_norm.weight
    model.layers.{i}.mlp.gate_up_proj.weight           blocks.{i}.mlp.{gate,up}.weight  rows
    model.layers.{i}.mlp.down_proj.weight              blocks.{i}.mlp.down.weight
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
    blk.{i}.attn_qkv.weight      blocks.{i}.attn.{q,k,v}.weight   rows
    blk.{i}.attn_output.weight   blocks.{i}.attn.out.weight
    blk.{i}.ffn_norm.weight      blocks.{i}.mlp_norm.weight
    blk.{i}.ffn_up.weight        blocks.{i}.mlp.{gate,up}.weight  rows
    blk.{i}.ffn_down.weight      blocks.{i}.mlp.down.weight
    output_norm.weight           norm.weight
    output.weight                head.weight
    """,
    ignore=[r"^rope_factors_(long|short)\.weight$"],
)


def spec_from_config(config: Config) -> ModelSpec:
    """Spec of a Hugging Face Phi3 config (`Phi3Config`). Raises `InputError` as `ConfigReader` does."""
    read = ConfigReader(config, "phi3")
    for key in ("attention_bias", "mlp_bias", "lm_head_bias"):
        read.only(key, False)
    for key in ("full_attn_mod", "interpolate_factor"):
        read.only(key, 1)
    d_model, n_heads = read.get("hidden_size", 3072), read.get("num_attention_heads", 32)
    d_head = read.get("head_dim", d_model // n_heads)
    spec = ModelSpec(
        n_layers=read.get("num_hidden_layers", 32),
        d_model=d_model,
        n_heads=n_heads,
        n_kv_heads=read.get("num_key_value_heads", n_heads),
        d_head=d_head,
        d_ffn=read.get("intermediate_size", 8192),
        vocab_size=read.get("vocab_size", 32064),
        max_seq_len=read.get("max_position_embeddings", 4096),
        norm="rms",
        norm_eps=read.get("rms_norm_eps", 1e-5),
        mlp="gated",
        activation=read.choose("hidden_act", ACTIVATIONS, "silu"),
        rope=read_rope_spec(read, "phi3", d_head, rotated=1.0, default_original=4096),
        tie_embeddings=read.get("tie_word_embeddings", False),
        window=read.get("sliding_window"),
        embed_dropout=read.get("embd_pdrop", 0.0),
        attn_dropout=read.get("attention_dropout", 0.0),
        resid_dropout=read.get("resid_pdrop", 0.0),
        init_std=read.get("initializer_range", 0.02),
    )
    read.finish("original_max_position_embeddings")  # without LongRoPE nothing depends on it
    return spec


def config_from_spec(spec: ModelSpec) -> dict[str, Any]:
    """The Hugging Face config of a spec of this family."""
    return {
        "model_type": "phi3",
        "architectures": ["Phi3ForCausalLM"],
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
        **write_rope_spec(spec, partial=True),
        "sliding_window": spec.window,
        "tie_word_embeddings": spec.tie_embeddings,
        "embd_pdrop": spec.embed_dropout,
        "attention_dropout": spec.attn_dropout,
        "resid_pdrop": spec.resid_dropout,
        "initializer_range": spec.init_std,
    }


def config_from_gguf(metadata: Config) -> dict[str, Any]:
    """The Hugging Face config of a GGUF file's ``phi3.*`` metadata, and LongRoPE's factors if it has them.

    A window is read, although llama.cpp (0.3.36 of its Python package) does without it: the models have it.
    """
    config = {
        **read_sizes(metadata, "phi3"),
        "rms_norm_eps": metadata["phi3.attention.layer_norm_rms_epsilon"],
        **read_rotary(metadata, "phi3", read_head_size(metadata, "phi3"), partial=True),
        "sliding_window": metadata.get("phi3.attention.sliding_window") or None,
    }
    original = metadata.get("phi3.rope.scaling.original_context_length", config["max_position_embeddings"])
    long_factors = metadata.get("rope_factors_long")
    if long_factors is None:
        return config
    config["original_max_position_embeddings"] = original
    config["rope_scaling"] = {
        "rope_type": "longrope",
        "long_factor": long_factors,
        "short_factor": metadata["rope_factors_short"],
        "attention_factor": metadata.get("phi3.rope.scaling.attn_factor", 1.0),
    }
    return config


def gguf_from_spec(spec: ModelSpec) -> dict[str, Any]:
    """The ``phi3.*`` metadata of a spec, and the factors of LongRoPE."""
    assert spec.rope is not None
    found = {
        **write_sizes(spec, "phi3"),
        "phi3.attention.layer_norm_rms_epsilon": spec.norm_eps,
        **write_rotary(spec, "phi3"),
        "phi3.rope.scaling.original_context_length": spec.max_seq_len,
        "phi3.attention.sliding_window": spec.window or 0,
    }
    scaling = spec.rope.scaling
    if scaling is not None and scaling.kind == "longrope":
        found["phi3.rope.scaling.original_context_length"] = scaling.original_max_seq_len
        found["phi3.rope.scaling.attn_factor"] = scaling.attn_factor
        found["rope_factors_long"] = list(scaling.long_factors)
        found["rope_factors_short"] = list(scaling.short_factors)
    return found


PHI3 = Family(
    name="phi3",
    model_type="phi3",
    architecture="Phi3ForCausalLM",
    read_config=spec_from_config,
    write_config=config_from_spec,
    keys=HF_KEYS,
    gguf=GGUFMap("phi3", config_from_gguf, GGUF_KEYS, gguf_from_spec),
)
