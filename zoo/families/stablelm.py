"""StableLM from 3B-4E1T on (arXiv 2402.17834): partial rotary, layer norms, gated SiLU; 12B side by side."""

from __future__ import annotations

from typing import Any

from zoo.families.base import ACTIVATIONS, Config, ConfigReader, Family, GGUFMap, KeyMap, activation_name
from zoo.families.gguf_metadata import (
    TENSORS,
    read_head_size,
    read_rotary,
    read_sizes,
    write_rotary,
    write_sizes,
)
from zoo.families.rope import read_rope_spec, write_rope_spec
from zoo.spec import ModelSpec

HF_KEYS = KeyMap(
    """
    model.embed_tokens.weight                                  embed.weight
    model.layers.{i}.input_layernorm.weight                    blocks.{i}.attn_norm.weight
    model.layers.{i}.input_layernorm.bias                      blocks.{i}.attn_norm.bias
    model.layers.{i}.self_attn.q_proj.weight                   blocks.{i}.attn.q.weight
    model.layers.{i}.self_attn.q_proj.bias                     blocks.{i}.attn.q.bias
    model.layers.{i}.self_attn.k_proj.weight                   blocks.{i}.attn.k.weight
    model.layers.{i}.self_attn.k_proj.bias                     blocks.{i}.attn.k.bias
    model.layers.{i}.self_attn.v_proj.weight                   blocks.{i}.attn.v.weight
    model.layers.{i}.self_attn.v_proj.bias                     blocks.{i}.attn.v.bias
    model.layers.{i}.self_attn.o_proj.weight                   blocks.{i}.attn.out.weight
    model.layers.{i}.self_attn.q_layernorm.norms.{n}.weight    blocks.{i}.attn.q_norm.{n}.weight
    model.layers.{i}.self_attn.k_layernorm.norms.{n}.weight    blocks.{i}.attn.k_norm.{n}.weight
    model.layers.{i}.post_attention_layernorm.weight           blocks.{i}.mlp_norm.weight
    model.layers.{i}.post_attention_layernorm.bias             blocks.{i}.mlp_norm.bias
    model.layers.{i}.mlp.gate_proj.weight                      blocks.{i}.mlp.gate.weight
    model.layers.{i}.mlp.up_proj.weight                        blocks.{i}.mlp.up.weight
    model.layers.{i}.mlp.down_proj.weight                      blocks.{i}.mlp.down.weight
    model.norm.weight                                          norm.weight
    model.norm.bias                                            norm.bias
    lm_head.weight                                             head.weight
    """,
    prefix="model.",
    ignore=[r"rotary_emb\.inv_freq$"],
)

GGUF_KEYS = KeyMap(
    """
    token_embd.weight            embed.weight
    blk.{i}.attn_norm.weight     blocks.{i}.attn_norm.weight
    blk.{i}.attn_norm.bias       blocks.{i}.attn_norm.bias
    blk.{i}.attn_q.weight        blocks.{i}.attn.q.weight
    blk.{i}.attn_q.bias          blocks.{i}.attn.q.bias
    blk.{i}.attn_k.weight        blocks.{i}.attn.k.weight
    blk.{i}.attn_k.bias          blocks.{i}.attn.k.bias
    blk.{i}.attn_v.weight        blocks.{i}.attn.v.weight
    blk.{i}.attn_v.bias          blocks.{i}.attn.v.bias
    blk.{i}.attn_output.weight   blocks.{i}.attn.out.weight
    blk.{i}.attn_q_norm.weight   blocks.{i}.attn.q_norm.{n}.weight  stacked
    blk.{i}.attn_k_norm.weight   blocks.{i}.attn.k_norm.{n}.weight  stacked
    blk.{i}.ffn_norm.weight      blocks.{i}.mlp_norm.weight
    blk.{i}.ffn_norm.bias        blocks.{i}.mlp_norm.bias
    blk.{i}.ffn_gate.weight      blocks.{i}.mlp.gate.weight
    blk.{i}.ffn_up.weight        blocks.{i}.mlp.up.weight
    blk.{i}.ffn_down.weight      blocks.{i}.mlp.down.weight
    output_norm.weight           norm.weight
    output_norm.bias             norm.bias
    output.weight                head.weight
    """
)


def spec_from_config(config: Config) -> ModelSpec:
    """Spec of a Hugging Face StableLM config (`StableLmConfig`). Raises `InputError` as `ConfigReader` does."""
    read = ConfigReader(config, "stablelm")
    d_model, n_heads = read.get("hidden_size", 2560), read.get("num_attention_heads", 32)
    d_head = d_model // n_heads
    rope = read_rope_spec(read, "stablelm", d_head, rotated=0.25)
    norm_eps = read.get("layer_norm_eps", 1e-5)
    # What the models' own code read before transformers knew them; some configs still have these beside the new.
    read.only("norm_eps", norm_eps)
    read.only("rope_pct", rope.n_dims / d_head)
    read.only("rotary_emb_base", rope.base)
    read.only("rotary_scaling_factor", 1.0)
    read.only("use_norm_bias", False)  # of q and k
    read.only("hidden_dropout", 0.0)  # it drops what the MLP writes, and not what attention does
    spec = ModelSpec(
        n_layers=read.get("num_hidden_layers", 32),
        d_model=d_model,
        n_heads=n_heads,
        n_kv_heads=read.get("num_key_value_heads", 32),
        d_head=d_head,
        d_ffn=read.get("intermediate_size", 6912),
        vocab_size=read.get("vocab_size", 50304),
        max_seq_len=read.get("max_position_embeddings", 4096),
        norm="layer",
        norm_eps=norm_eps,
        block="parallel_shared_norm" if read.get("use_parallel_residual", False) else "sequential",
        mlp="gated",
        activation=read.choose("hidden_act", ACTIVATIONS, "silu"),
        rope=rope,
        norm_bias=True,
        qkv_bias=read.get("use_qkv_bias", False),
        qk_norm="heads" if read.get("qk_layernorm", False) else "none",
        tie_embeddings=read.get("tie_word_embeddings", False),
        attn_dropout=read.get("attention_dropout", 0.0),
        init_std=read.get("initializer_range", 0.02),
    )
    read.finish()
    return spec


def config_from_spec(spec: ModelSpec) -> dict[str, Any]:
    """The Hugging Face config of a spec of this family."""
    return {
        "model_type": "stablelm",
        "architectures": ["StableLmForCausalLM"],
        "num_hidden_layers": spec.n_layers,
        "hidden_size": spec.d_model,
        "num_attention_heads": spec.n_heads,
        "num_key_value_heads": spec.n_kv_heads,
        "intermediate_size": spec.d_ffn,
        "vocab_size": spec.vocab_size,
        "max_position_embeddings": spec.max_seq_len,
        "layer_norm_eps": spec.norm_eps,
        "use_parallel_residual": spec.block == "parallel_shared_norm",
        "hidden_act": activation_name(spec.activation),
        **write_rope_spec(spec, partial=True),
        "use_qkv_bias": spec.qkv_bias,
        "qk_layernorm": spec.qk_norm == "heads",
        "tie_word_embeddings": spec.tie_embeddings,
        "attention_dropout": spec.attn_dropout,
        "initializer_range": spec.init_std,
    }


def config_from_gguf(metadata: Config) -> dict[str, Any]:
    """The Hugging Face config of a GGUF file's ``stablelm.*`` metadata; what a block has, its tensors say.

    ``use_parallel_residual`` does not count: llama.cpp passes it over, and its converter writes True where the config
    says nothing.
    """
    metadata.get("stablelm.use_parallel_residual")
    tensors = metadata[TENSORS]
    return {
        **read_sizes(metadata, "stablelm"),
        "layer_norm_eps": metadata["stablelm.attention.layer_norm_epsilon"],
        **read_rotary(metadata, "stablelm", read_head_size(metadata, "stablelm"), partial=True),
        "use_parallel_residual": "blk.0.ffn_norm.weight" not in tensors,
        "use_qkv_bias": "blk.0.attn_q.bias" in tensors,
        "qk_layernorm": "blk.0.attn_q_norm.weight" in tensors,
        "tie_word_embeddings": False,  # llama.cpp loads none without a head
    }


def gguf_from_spec(spec: ModelSpec) -> dict[str, Any]:
    """The ``stablelm.*`` metadata of a spec."""
    return {
        **write_sizes(spec, "stablelm"),
        "stablelm.attention.layer_norm_epsilon": spec.norm_eps,
        **write_rotary(spec, "stablelm"),
        "stablelm.use_parallel_residual": spec.block == "parallel_shared_norm",
    }


STABLELM = Family(
    name="stablelm",
    model_type="stablelm",
    architecture="StableLmForCausalLM",
    read_config=spec_from_config,
    write_config=config_from_spec,
    keys=HF_KEYS,
    gguf=GGUFMap("stablelm", config_from_gguf, GGUF_KEYS, gguf_from_spec),
)
