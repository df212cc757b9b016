"""Llama (arXiv 2302.13971 and its successors): rotary positions, RMS norms, gated SiLU, grouped kv heads, no biases."""

from __future__ import annotations

from typing import Any

from zoo.families.base import ACTIVATIONS, Config, ConfigReader, Family, GGUFMap, KeyMap, activation_name
from zoo.families.rope import read_rope, write_scaling
from zoo.spec import ModelSpec, RopeSpec

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


def spec_from_config(config: Config) -> ModelSpec:
    """Spec of a Hugging Face Llama config (`LlamaConfig`). Raises `InputError` as `ConfigReader` does."""
    read = ConfigReader(config, "llama")
    rope, scaling = read_rope(read, "llama")
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
        max_seq_len=read.get("max_position_embeddings", 2048),
        norm="rms",
        norm_eps=read.get("rms_norm_eps", 1e-6),
        mlp="gated",
        activation=read.choose("hidden_act", ACTIVATIONS, "silu"),
        rope=RopeSpec(n_dims=d_head, base=float(rope["rope_theta"]), scaling=scaling),
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
    """The Hugging Face config of a GGUF file's ``llama.*`` metadata."""
    d_model, n_heads = metadata["llama.embedding_length"], metadata["llama.attention.head_count"]
    return {
        "num_hidden_layers": metadata["llama.block_count"],
        "hidden_size": d_model,
        "num_attention_heads": n_heads,
        "num_key_value_heads": metadata.get("llama.attention.head_count_kv", n_heads),
        "head_dim": metadata.get("llama.attention.key_length", d_model // n_heads),
        "intermediate_size": metadata["llama.feed_forward_length"],
        "max_position_embeddings": metadata["llama.context_length"],
        "rms_norm_eps": metadata["llama.attention.layer_norm_rms_epsilon"],
        "rope_theta": metadata.get("llama.rope.freq_base", 10_000.0),
        "rope_scaling": _scaling_from_gguf(metadata),
    }


def _scaling_from_gguf(metadata: Config) -> dict[str, Any] | None:
    kind = metadata.get("llama.rope.scaling.type", "none")
    if kind == "none":
        return None
    return {"rope_type": kind, "factor": metadata.get("llama.rope.scaling.factor")}


LLAMA = Family(
    name="llama",
    model_type="llama",
    architecture="LlamaForCausalLM",
    read_config=spec_from_config,
    write_config=config_from_spec,
    keys=HF_KEYS,
    gguf=GGUFMap("llama", config_from_gguf, GGUF_KEYS),
)
