"""Phi 1, 1.5 and 2 (arXiv 2306.11644): one norm before attention and MLP side by side, partial rotary, biases."""

from __future__ import annotations

from typing import Any

from zoo.families.base import ACTIVATIONS, Config, ConfigReader, Family, GGUFMap, KeyMap
from zoo.families.gguf_metadata import read_head_size, read_rotary, read_sizes, write_rotary, write_sizes
from zoo.families.rope import read_rope_spec, write_rope_spec
from zoo.spec import ModelSpec

HF_KEYS = KeyMap(
    """
    model.embed_tokens.weight                  embed.weight
    model.layers.{i}.input_layernorm.weight    blocks.{i}.attn_norm.weight
    model.layers.{i}.input_layernorm.bias      blocks.{i}.attn_norm.bias
    model.layers.{i}.self_attn.q_proj.weight   blocks.{i}.attn.q.weight
    model.layers.{i}.self_attn.q_proj.bias     blocks.{i}.attn.q.bias
    model.layers.{i}.self_attn.k_proj.weight   blocks.{i}.attn.k.weight
    model.layers.{i}.self_attn.k_proj.bias     blocks.{i}.attn.k.bias
    model.layers.{i}.self_attn.v_proj.weight   blocks.{i}.attn.v.weight
    model.layers.{i}.self_attn.v_proj.bias     blocks.{i}.attn.v.bias
    model.layers.{i}.self_attn.dense.weight    blocks.{i}.attn.out.weight
    model.layers.{i}.self_attn.dense.bias      blocks.{i}.attn.out.bias
    model.layers.{i}.mlp.fc1.weight            blocks.{i}.mlp.up.weight
    model.layers.{i}.mlp.fc1.bias              blocks.{i}.mlp.up.bias
    model.layers.{i}.mlp.fc2.weight            blocks.{i}.mlp.down.weight
    model.layers.{i}.mlp.fc2.bias              blocks.{i}.mlp.down.bias
    model.final_layernorm.weight               norm.weight
    model.final_layernorm.bias                 norm.bias
    lm_head.weight                             head.weight
    lm_head.bias                               head.bias
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
    blk.{i}.attn_output.bias     blocks.{i}.attn.out.bias
    blk.{i}.ffn_up.weight        blocks.{i}.mlp.up.weight
    blk.{i}.ffn_up.bias          blocks.{i}.mlp.up.bias
    blk.{i}.ffn_down.weight      blocks.{i}.mlp.down.weight
    blk.{i}.ffn_down.bias        blocks.{i}.mlp.down.bias
    output_norm.weight           norm.weight
    output_norm.bias             norm.bias
    output.weight                head.weight
    output.bias                  head.bias
    """
)


def spec_from_config(config: Config) -> ModelSpec:
    """Spec of a Hugging Face Phi config (`PhiConfig`). Raises `InputError` as `ConfigReader` does."""
    read = ConfigReader(config, "phi")
    read.only("qk_layernorm", False)
    d_model, n_heads = read.get("hidden_size", 2048), read.get("num_attention_heads", 32)
    d_head = read.get("head_dim", d_model // n_heads)
    spec = ModelSpec(
        n_layers=read.get("num_hidden_layers", 24),
        d_model=d_model,
        n_heads=n_heads,
        n_kv_heads=read.get("num_key_value_heads", n_heads),
        d_head=d_head,
        d_ffn=read.get("intermediate_size", 8192),
        vocab_size=read.get("vocab_size", 51200),
        max_seq_len=read.get("max_position_embeddings", 2048),
        norm="layer",
        norm_eps=read.get("layer_norm_eps", 1e-5),
        block="parallel_shared_norm",
        activation=read.choose("hidden_act", ACTIVATIONS, "gelu_new"),
        rope=read_rope_spec(read, "phi", d_head, rotated=0.5),
        norm_bias=True,
        qkv_bias=True,
        attn_out_bias=True,
        mlp_bias=True,
        head_bias=True,
        tie_embeddings=read.get("tie_word_embeddings", False),
        embed_dropout=read.get("embd_pdrop", 0.0),
        attn_dropout=read.get("attention_dropout", 0.0),
        resid_dropout=read.get("resid_pdrop", 0.0),
        init_std=read.get("initializer_range", 0.02),
    )
    read.finish()
    return spec


def config_from_spec(spec: ModelSpec) -> dict[str, Any]:
    """The Hugging Face config of a spec of this family."""
    return {
        "model_type": "phi",
        "architectures": ["PhiForCausalLM"],
        "num_hidden_layers": spec.n_layers,
        "hidden_size": spec.d_model,
        "num_attention_heads": spec.n_heads,
        "num_key_value_heads": spec.n_kv_heads,
        "head_dim": spec.d_head,
        "intermediate_size": spec.d_ffn,
        "vocab_size": spec.vocab_size,
        "max_position_embeddings": spec.max_seq_len,
        "layer_norm_eps": spec.norm_eps,
        "hidden_act": {"gelu_tanh": "gelu_new"}.get(spec.activation, spec.activation),
        **write_rope_spec(spec, partial=True),
        "qk_layernorm": False,
        "tie_word_embeddings": spec.tie_embeddings,
        "embd_pdrop": spec.embed_dropout,
        "attention_dropout": spec.attn_dropout,
        "resid_pdrop": spec.resid_dropout,
        "initializer_range": spec.init_std,
    }


def config_from_gguf(metadata: Config) -> dict[str, Any]:
    """The Hugging Face config of a GGUF file's ``phi2.*`` metadata."""
    return {
        **read_sizes(metadata, "phi2"),
        "layer_norm_eps": metadata["phi2.attention.layer_norm_epsilon"],
        **read_rotary(metadata, "phi2", read_head_size(metadata, "phi2"), partial=True),
        "tie_word_embeddings": False,  # llama.cpp loads none without a head
    }


def gguf_from_spec(spec: ModelSpec) -> dict[str, Any]:
    """The ``phi2.*`` metadata of a spec."""
    return {
        **write_sizes(spec, "phi2"),
        "phi2.attention.layer_norm_epsilon": spec.norm_eps,
        **write_rotary(spec, "phi2"),
    }


PHI = Family(
    name="phi",
    model_type="phi",
    architecture="PhiForCausalLM",
    read_config=spec_from_config,
    write_config=config_from_spec,
    keys=HF_KEYS,
    gguf=GGUFMap("phi2", config_from_gguf, GGUF_KEYS, gguf_from_spec),
)
