"""OLMo 2 (arXiv 2501.00656): Llama with norms after attention and feed-forward, and of q and k over all their heads."""

from __future__ import annotations

from typing import Any

from zoo.families.base import ACTIVATIONS, Config, ConfigReader, Family, GGUFMap, KeyMap, activation_name
from zoo.families.gguf_metadata import read_head_size, read_rotary, read_sizes, write_rotary, write_sizes
from zoo.families.rope import read_rope_spec, write_scaling
from zoo.spec import ModelSpec

HF_KEYS = KeyMap(
    """
    model.embed_tokens.weight                            embed.weight
    model.layers.{i}.self_attn.q_proj.weight             blocks.{i}.attn.q.weight
    model.layers.{i}.self_attn.q_proj.bias               blocks.{i}.attn.q.bias
    model.layers.{i}.self_attn.k_proj.weight             blocks.{i}.attn.k.weight
    model.layers.{i}.self_attn.k_proj.bias               blocks.{i}.attn.k.bias
    model.layers.{i}.self_attn.v_proj.weight             blocks.{i}.attn.v.weight
    model.layers.{i}.self_attn.v_proj.bias               blocks.{i}.attn.v.bias
    model.layers.{i}.self_attn.o_proj.weight             blocks.{i}.attn.out.weight
    model.layers.{i}.self_attn.o_proj.bias               blocks.{i}.attn.out.bias
    model.layers.{i}.self_attn.q_norm.weight             blocks.{i}.attn.q_norm.weight
    model.layers.{i}.self_attn.k_norm.weight             blocks.{i}.attn.k_norm.weight
    model.layers.{i}.post_attention_layernorm.weight     blocks.{i}.attn_post_norm.weight
    model.layers.{i}.mlp.gate_proj.weight                blocks.{i}.mlp.gate.weight
    model.layers.{i}.mlp.up_proj.weight                  blocks.{i}.mlp.up.weight
    model.layers.{i}.mlp.down_proj.weight                blocks.{i}.mlp.down.weight
    model.layers.{i}.post_feedforward_layernorm.weight   blocks.{i}.mlp_post_norm.weight
    model.norm.weight                                    norm.weight
    lm_head.weight                                       head.weight
    """,
    prefix="model.",
)

GGUF_KEYS = KeyMap(
    """
    token_embd.weight                   embed.weight
    blk.{i}.attn_q.weight               blocks.{i}.attn.q.weight
    blk.{i}.attn_k.weight               blocks.{i}.attn.k.weight
    blk.{i}.attn_v.weight               blocks.{i}.attn.v.weight
    blk.{i}.attn_output.weight          blocks.{i}.attn.out.weight
    blk.{i}.attn_q_norm.weight          blocks.{i}.attn.q_norm.weight
    blk.{i}.attn_k_norm.weight          blocks.{i}.attn.k_norm.weight
    blk.{i}.post_attention_norm.weight  blocks.{i}.attn_post_norm.weight
    blk.{i}.ffn_gate.weight             blocks.{i}.mlp.gate.weight
    blk.{i}.ffn_up.weight               blocks.{i}.mlp.up.weight
    blk.{i}.ffn_down.weight             blocks.{i}.mlp.down.weight
    blk.{i}.post_ffw_norm.weight        blocks.{i}.mlp_post_norm.weight
    output_norm.weight                  norm.weight
    output.weight                       head.weight
    """
)


def spec_from_config(config: Config) -> ModelSpec:
    """Spec of a Hugging Face OLMo 2 config (`Olmo2Config`). Raises `InputError` as `ConfigReader` does."""
    read = ConfigReader(config, "olmo2")
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
        norm="rms",
        norm_eps=read.get("rms_norm_eps", 1e-5),
        norm_place="after",
        mlp="gated",
        activation=read.choose("hidden_act", ACTIVATIONS, "silu"),
        rope=read_rope_spec(read, "olmo2", d_model // n_heads),
        qkv_bias=bias,
        attn_out_bias=bias,
        tie_embeddings=read.get("tie_word_embeddings", False),
        qk_norm="width",
        attn_dropout=read.get("attention_dropout", 0.0),
        init_std=read.get("initializer_range", 0.02),
    )
    read.finish()
    return spec


def config_from_spec(spec: ModelSpec) -> dict[str, Any]:
    """The Hugging Face config of a spec of this family."""
    assert spec.rope is not None
    return {
        "model_type": "olmo2",
        "architectures": ["Olmo2ForCausalLM"],
        "num_hidden_layers": spec.n_layers,
        "hidden_size": spec.d_model,
        "num_attention_heads": spec.n_heads,
        "num_key_value_heads": spec.n_kv_heads,
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
    """The Hugging Face config of a GGUF file's ``olmo2.*`` metadata; a window is OLMo 3's."""
    return {
        **read_sizes(metadata, "olmo2"),
        "rms_norm_eps": metadata["olmo2.attention.layer_norm_rms_epsilon"],
        **read_rotary(metadata, "olmo2", read_head_size(metadata, "olmo2")),
        "tie_word_embeddings": False,  # llama.cpp loads none without a head
    }


def gguf_from_spec(spec: ModelSpec) -> dict[str, Any]:
    """The ``olmo2.*`` metadata of a spec."""
    return {
        **write_sizes(spec, "olmo2"),
        "olmo2.attention.layer_norm_rms_epsilon": spec.norm_eps,
        **write_rotary(spec, "olmo2"),
    }


OLMO2 = Family(
    name="olmo2",
    model_type="olmo2",
    architecture="Olmo2ForCausalLM",
    read_config=spec_from_config,
    write_config=config_from_spec,
    keys=HF_KEYS,
    gguf=GGUFMap("olmo2", config_from_gguf, GGUF_KEYS, gguf_from_spec),
)
