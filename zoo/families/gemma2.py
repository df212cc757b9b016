"""Gemma 2 (arXiv 2408.00118): Gemma with soft-capped scores and logits, a window in every other layer, four norms."""

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
from zoo.families.layers import read_layer_types, write_layer_types
from zoo.families.rope import read_rope_spec, write_scaling
from zoo.spec import ModelSpec

HF_KEYS = KeyMap(
    """
    model.embed_tokens.weight                            embed.weight
    model.layers.{i}.input_layernorm.weight              blocks.{i}.attn_norm.weight
    model.layers.{i}.self_attn.q_proj.weight             blocks.{i}.attn.q.weight
    model.layers.{i}.self_attn.q_proj.bias               blocks.{i}.attn.q.bias
    model.layers.{i}.self_attn.k_proj.weight             blocks.{i}.attn.k.weight
    model.layers.{i}.self_attn.k_proj.bias               blocks.{i}.attn.k.bias
    model.layers.{i}.self_attn.v_proj.weight             blocks.{i}.attn.v.weight
    model.layers.{i}.self_attn.v_proj.bias               blocks.{i}.attn.v.bias
    model.layers.{i}.self_attn.o_proj.weight             blocks.{i}.attn.out.weight
    model.layers.{i}.self_attn.o_proj.bias               blocks.{i}.attn.out.bias
    model.layers.{i}.post_attention_layernorm.weight     blocks.{i}.attn_post_norm.weight
    model.layers.{i}.pre_feedforward_layernorm.weight    blocks.{i}.mlp_norm.weight
    model.layers.{i}.mlp.gate_proj.weight                blocks.{i}.mlp.gate.weight
    model.layers.{i}.mlp.up_proj.weight                  blocks.{i}.mlp.up.weight
    model.layers.{i}.mlp.down_proj.weight                blocks.{i}.mlp.down.weight
    model.layers.{i}.post_feedforward_layernorm.weight   blocks.{i}.mlp_post_norm.weight
    model.norm.weight                                    norm.weight
    lm_head.weight                                       head.weight
    """,
    prefix="model.",
    ignore=[r"rotary_emb\.inv_freq$"],
)

GGUF_KEYS = KeyMap(
    """
    token_embd.weight                   embed.weight
    blk.{i}.attn_norm.weight            blocks.{i}.attn_norm.weight
    blk.{i}.attn_q.weight               blocks.{i}.attn.q.weight
    blk.{i}.attn_k.weight               blocks.{i}.attn.k.weight
    blk.{i}.attn_v.weight               blocks.{i}.attn.v.weight
    blk.{i}.attn_output.weight          blocks.{i}.attn.out.weight
    blk.{i}.post_attention_norm.weight  blocks.{i}.attn_post_norm.weight
    blk.{i}.ffn_norm.weight             blocks.{i}.mlp_norm.weight
    blk.{i}.ffn_gate.weight             blocks.{i}.mlp.gate.weight
    blk.{i}.ffn_up.weight               blocks.{i}.mlp.up.weight
    blk.{i}.ffn_down.weight             blocks.{i}.mlp.down.weight
    blk.{i}.post_ffw_norm.weight        blocks.{i}.mlp_post_norm.weight
    output_norm.weight                  norm.weight
    """
)

# transformers reads hidden_activation, not hidden_act; the kind of its cache changes no number.
_OWN_HARMLESS = ("hidden_act", "cache_implementation")


def spec_from_config(config: Config) -> ModelSpec:
    """Spec of a Hugging Face Gemma 2 config (`Gemma2Config`). Raises `InputError` as `ConfigReader` does."""
    read = ConfigReader(config, "gemma2")
    read.only("use_bidirectional_attention", False)
    n_layers = read.get("num_hidden_layers", 26)
    d_model, d_head = read.get("hidden_size", 2304), read.get("head_dim", 256)
    window = read.nullable("sliding_window", 4096)
    read.only("sliding_window_size", window)
    bias, scalar = read.get("attention_bias", False), read.get("query_pre_attn_scalar", 256)
    spec = ModelSpec(
        n_layers=n_layers,
        d_model=d_model,
        n_heads=read.get("num_attention_heads", 8),
        n_kv_heads=read.get("num_key_value_heads", 4),
        d_head=d_head,
        d_ffn=read.get("intermediate_size", 9216),
        vocab_size=read.get("vocab_size", 256000),
        max_seq_len=read.get("max_position_embeddings", 8192),
        norm="rms",
        norm_eps=read.get("rms_norm_eps", 1e-6),
        norm_place="both",
        norm_offset=1.0,
        mlp="gated",
        activation=read.choose("hidden_activation", ACTIVATIONS, "gelu_pytorch_tanh"),
        rope=read_rope_spec(read, "gemma2", d_head),
        embed_scale=d_model**0.5,
        qkv_bias=bias,
        attn_out_bias=bias,
        tie_embeddings=read.get("tie_word_embeddings", True),
        attn_scale=None if scalar == d_head else scalar**-0.5,
        attn_softcap=read.nullable("attn_logit_softcapping", 50.0),
        head_softcap=read.nullable("final_logit_softcapping", 30.0),
        **read_layer_types(read, "gemma2", n_layers, window, slides=lambda layer: layer % 2 == 0),
        attn_dropout=read.get("attention_dropout", 0.0),
        init_std=read.get("initializer_range", 0.02),
    )
    read.finish(*_OWN_HARMLESS)
    return spec


def config_from_spec(spec: ModelSpec) -> dict[str, Any]:
    """The Hugging Face config of a spec of this family."""
    assert spec.rope is not None
    return {
        "model_type": "gemma2",
        "architectures": ["Gemma2ForCausalLM"],
        "num_hidden_layers": spec.n_layers,
        "hidden_size": spec.d_model,
        "num_attention_heads": spec.n_heads,
        "num_key_value_heads": spec.n_kv_heads,
        "head_dim": spec.d_head,
        "intermediate_size": spec.d_ffn,
        "vocab_size": spec.vocab_size,
        "max_position_embeddings": spec.max_seq_len,
        "sliding_window": spec.window,
        "layer_types": write_layer_types(spec),
        "query_pre_attn_scalar": _scalar(spec),
        "attn_logit_softcapping": spec.attn_softcap,
        "final_logit_softcapping": spec.head_softcap,
        "rms_norm_eps": spec.norm_eps,
        "hidden_activation": activation_name(spec.activation),
        "rope_theta": spec.rope.base,
        "rope_scaling": write_scaling(spec.rope.scaling),
        "attention_bias": spec.qkv_bias,
        "tie_word_embeddings": spec.tie_embeddings,
        "attention_dropout": spec.attn_dropout,
        "initializer_range": spec.init_std,
    }


def _scalar(spec: ModelSpec) -> float:
    """What the attention scale is the inverse square root of: a whole number if one is."""
    if spec.attn_scale is None:
        return spec.d_head
    whole = round(spec.attn_scale**-2)
    return whole if whole**-0.5 == spec.attn_scale else spec.attn_scale**-2


def config_from_gguf(metadata: Config) -> dict[str, Any]:
    """The Hugging Face config of a GGUF file's ``gemma2.*`` metadata, with llama.cpp's defaults."""
    d_head, sizes = read_head_size(metadata, "gemma2", free=True), read_sizes(metadata, "gemma2")
    is_27b = sizes["num_hidden_layers"] == 46  # by which llama.cpp knows the one size with another scale of scores
    return {
        **sizes,
        "head_dim": d_head,
        "query_pre_attn_scalar": sizes["hidden_size"] // sizes["num_attention_heads"] if is_27b else d_head,
        "attn_logit_softcapping": metadata.get("gemma2.attn_logit_softcapping", 50.0),
        "final_logit_softcapping": metadata.get("gemma2.final_logit_softcapping", 30.0),
        "sliding_window": metadata.get("gemma2.attention.sliding_window", 4096),
        "rms_norm_eps": metadata["gemma2.attention.layer_norm_rms_epsilon"],
        **read_rotary(metadata, "gemma2", d_head),
        "tie_word_embeddings": True,  # llama.cpp knows no other
    }


def gguf_from_spec(spec: ModelSpec) -> dict[str, Any]:
    """The ``gemma2.*`` metadata of a spec."""
    optional = {
        "gemma2.attention.sliding_window": spec.window,
        "gemma2.attn_logit_softcapping": spec.attn_softcap,
        "gemma2.final_logit_softcapping": spec.head_softcap,
    }
    return {
        **write_sizes(spec, "gemma2"),
        **write_head_size(spec, "gemma2"),
        "gemma2.attention.layer_norm_rms_epsilon": spec.norm_eps,
        **write_rotary(spec, "gemma2"),
        **{key: value for key, value in optional.items() if value is not None},
    }


GEMMA2 = Family(
    name="gemma2",
    model_type="gemma2",
    architecture="Gemma2ForCausalLM",
    read_config=spec_from_config,
    write_config=config_from_spec,
    keys=HF_KEYS,
    gguf=GGUFMap("gemma2", config_from_gguf, GGUF_KEYS, gguf_from_spec),
)
