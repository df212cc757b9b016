"""Falcon (arXiv 2311.16867): rotary, few kv heads in one fused qkv, attention and feed-forward side by side."""

from __future__ import annotations

from typing import Any

from zoo.errors import InputError
from zoo.families.base import ACTIVATIONS, Config, ConfigReader, Family, GGUFMap, KeyMap, activation_name
from zoo.families.gguf_metadata import (
    TENSORS,
    read_head_size,
    read_rotary,
    read_sizes,
    write_rotary,
    write_sizes,
)
from zoo.families.rope import read_rope_spec, write_scaling
from zoo.spec import BlockKind, ModelSpec

_INPUT_NORM = """
    transformer.h.{i}.input_layernorm.weight                  blocks.{i}.attn_norm.weight
    transformer.h.{i}.input_layernorm.bias                    blocks.{i}.attn_norm.bias
"""
HF_KEYS = KeyMap(
    """
    transformer.word_embeddings.weight                        embed.weight
    transformer.h.{i}.self_attention.query_key_value.weight   blocks.{i}.attn.{q,k,v}.weight  head_interleaved
    transformer.h.{i}.self_attention.query_key_value.bias     blocks.{i}.attn.{q,k,v}.bias    head_interleaved
    transformer.h.{i}.self_attention.dense.weight             blocks.{i}.attn.out.weight
    transformer.h.{i}.self_attention.dense.bias               blocks.{i}.attn.out.bias
    transformer.h.{i}.mlp.dense_h_to_4h.weight                blocks.{i}.mlp.up.weight
    transformer.h.{i}.mlp.dense_h_to_4h.bias                  blocks.{i}.mlp.up.bias
    transformer.h.{i}.mlp.dense_4h_to_h.weight                blocks.{i}.mlp.down.weight
    transformer.h.{i}.mlp.dense_4h_to_h.bias                  blocks.{i}.mlp.down.bias
    transformer.ln_f.weight                                   norm.weight
    transformer.ln_f.bias                                     norm.bias
    lm_head.weight                                            head.weight
    """,
    by_block={
        "parallel": """
    transformer.h.{i}.ln_attn.weight                          blocks.{i}.attn_norm.weight
    transformer.h.{i}.ln_attn.bias                            blocks.{i}.attn_norm.bias
    transformer.h.{i}.ln_mlp.weight                           blocks.{i}.mlp_norm.weight
    transformer.h.{i}.ln_mlp.bias                             blocks.{i}.mlp_norm.bias
    """,
        "parallel_shared_norm": _INPUT_NORM,
        "sequential": f"""{_INPUT_NORM}
    transformer.h.{{i}}.post_attention_layernorm.weight       blocks.{{i}}.mlp_norm.weight
    transformer.h.{{i}}.post_attention_layernorm.bias         blocks.{{i}}.mlp_norm.bias
    """,
    },
    prefix="transformer.",
    ignore=[r"rotary(_emb)?\.inv_freq$"],
)

GGUF_KEYS = KeyMap(
    """
    token_embd.weight            embed.weight
    blk.{i}.attn_qkv.weight      blocks.{i}.attn.{q,k,v}.weight  rows
    blk.{i}.attn_output.weight   blocks.{i}.attn.out.weight
    blk.{i}.ffn_up.weight        blocks.{i}.mlp.up.weight
    blk.{i}.ffn_down.weight      blocks.{i}.mlp.down.weight
    output_norm.weight           norm.weight
    output_norm.bias             norm.bias
    output.weight                head.weight
    """,
    by_block={
        "parallel": """
    blk.{i}.attn_norm.weight     blocks.{i}.mlp_norm.weight
    blk.{i}.attn_norm.bias       blocks.{i}.mlp_norm.bias
    blk.{i}.attn_norm_2.weight   blocks.{i}.attn_norm.weight
    blk.{i}.attn_norm_2.bias     blocks.{i}.attn_norm.bias
    """,
        "parallel_shared_norm": """
    blk.{i}.attn_norm.weight     blocks.{i}.attn_norm.weight
    blk.{i}.attn_norm.bias       blocks.{i}.attn_norm.bias
    """,
    },
)


def spec_from_config(config: Config) -> ModelSpec:
    """Spec of a Hugging Face Falcon config (`FalconConfig`), or of the older ``RefinedWeb`` and ``RefinedWebModel``.

    Raises:
        InputError: as `ConfigReader` does, or the kv heads and norms are of no layout that `transformers` has.
    """
    read = ConfigReader(config, "falcon")
    read.only("alibi", False)
    read.only("apply_residual_connection_post_layernorm", False)
    d_model = read.get("hidden_size", read.get("n_embed", 4544))
    n_heads = read.get("num_attention_heads", read.get("n_head", 71))
    n_layers = read.get("num_hidden_layers", read.get("n_layer", 32))
    for old, value in (("n_embed", d_model), ("n_head", n_heads), ("n_layer", n_layers)):
        read.only(old, value)
    # The remote code of old said by its name alone that the layers are Falcon-40B's.
    new = read.get("new_decoder_architecture", read.get("model_type") == "RefinedWeb")
    bias = read.get("bias", False)
    spec = ModelSpec(
        n_layers=n_layers,
        d_model=d_model,
        n_heads=n_heads,
        n_kv_heads=_kv_heads(read, n_heads, new=new),
        d_head=d_model // n_heads,
        d_ffn=read.get("ffn_hidden_size", 4 * d_model),
        vocab_size=read.get("vocab_size", 65024),
        max_seq_len=read.get("max_position_embeddings", 2048),
        norm="layer",
        norm_eps=read.get("layer_norm_epsilon", 1e-5),
        block=_block(read, new=new),
        activation=read.choose("activation", ACTIVATIONS, "gelu"),
        rope=read_rope_spec(read, "falcon", d_model // n_heads),
        norm_bias=True,
        qkv_bias=bias,
        attn_out_bias=bias,
        mlp_bias=bias,
        tie_embeddings=read.get("tie_word_embeddings", True),
        attn_dropout=read.get("attention_dropout", 0.0),
        resid_dropout=read.get("hidden_dropout", 0.0),
        init_std=read.get("initializer_range", 0.02),
    )
    read.finish()
    return spec


def _kv_heads(read: ConfigReader, n_heads: int, *, new: bool) -> int:
    """Of the older layers ``multi_query`` alone decides; the newer ones have as many as they say."""
    multi_query = read.get("multi_query", True)
    given: int = read.get("num_kv_heads", read.get("n_head_kv", n_heads))
    read.only("n_head_kv", given)
    if not new and not multi_query and given != n_heads:
        raise InputError(
            f"the falcon config has num_kv_heads = {given} for {n_heads} heads; "
            "without new_decoder_architecture or multi_query they must be equal."
        )
    return given if new or not multi_query else 1


def _block(read: ConfigReader, *, new: bool) -> BlockKind:
    parallel = read.get("parallel_attn", True)
    n_norms = read.get("num_ln_in_parallel_attn", 2 if new else 1)
    if (new and not parallel) or (not new and parallel and n_norms != 1) or n_norms not in (1, 2):
        raise InputError(
            f"the falcon config has parallel_attn = {parallel} and num_ln_in_parallel_attn = {n_norms} where "
            f"new_decoder_architecture = {new}, which transformers does not compute either."
        )
    if not parallel:
        return "sequential"
    return "parallel" if n_norms == 2 else "parallel_shared_norm"


def config_from_spec(spec: ModelSpec) -> dict[str, Any]:
    """The Hugging Face config of a spec of this family.

    Raises:
        InputError: a sequential block has groups of kv heads, for which the config has no words.
    """
    assert spec.rope is not None
    new = spec.block == "parallel" or spec.n_kv_heads not in (1, spec.n_heads)
    if new and spec.block == "sequential":
        raise InputError(f"a sequential Falcon has 1 kv head or {spec.n_heads}, not n_kv_heads = {spec.n_kv_heads}.")
    return {
        "model_type": "falcon",
        "architectures": ["FalconForCausalLM"],
        "num_hidden_layers": spec.n_layers,
        "hidden_size": spec.d_model,
        "num_attention_heads": spec.n_heads,
        "num_kv_heads": spec.n_kv_heads if new else spec.n_heads,
        "multi_query": spec.n_kv_heads == 1,
        "new_decoder_architecture": new,
        "parallel_attn": spec.block != "sequential",
        "num_ln_in_parallel_attn": 2 if spec.block == "parallel" else 1,
        "ffn_hidden_size": spec.d_ffn,
        "vocab_size": spec.vocab_size,
        "max_position_embeddings": spec.max_seq_len,
        "layer_norm_epsilon": spec.norm_eps,
        "activation": activation_name(spec.activation),
        "rope_theta": spec.rope.base,
        "rope_scaling": write_scaling(spec.rope.scaling),
        "alibi": False,
        "bias": spec.qkv_bias,
        "tie_word_embeddings": spec.tie_embeddings,
        "attention_dropout": spec.attn_dropout,
        "hidden_dropout": spec.resid_dropout,
        "initializer_range": spec.init_std,
    }


def config_from_gguf(metadata: Config) -> dict[str, Any]:
    """The Hugging Face config of a GGUF file's ``falcon.*`` metadata; the number of norms, its tensors say."""
    sizes = read_sizes(metadata, "falcon")
    n_heads, n_kv_heads = sizes["num_attention_heads"], sizes["num_key_value_heads"]
    two_norms = "blk.0.attn_norm_2.weight" in metadata[TENSORS]
    new = two_norms or n_kv_heads not in (1, n_heads)
    return {
        "num_hidden_layers": sizes["num_hidden_layers"],
        "hidden_size": sizes["hidden_size"],
        "num_attention_heads": n_heads,
        "num_kv_heads": n_kv_heads if new else n_heads,
        "multi_query": n_kv_heads == 1,
        "new_decoder_architecture": new,
        "num_ln_in_parallel_attn": 2 if two_norms else 1,
        "ffn_hidden_size": sizes["intermediate_size"],
        "max_position_embeddings": sizes["max_position_embeddings"],
        "layer_norm_epsilon": metadata["falcon.attention.layer_norm_epsilon"],
        **read_rotary(metadata, "falcon", read_head_size(metadata, "falcon")),
    }


def gguf_from_spec(spec: ModelSpec) -> dict[str, Any]:
    """The ``falcon.*`` metadata of a spec."""
    return {
        **write_sizes(spec, "falcon"),
        "falcon.attention.layer_norm_epsilon": spec.norm_eps,
        **write_rotary(spec, "falcon"),
        "falcon.tensor_data_layout": "jploski",  # what llama.cpp calls its order of q, k and v
    }


FALCON = Family(
    name="falcon",
    model_type="falcon",
    architecture="FalconForCausalLM",
    read_config=spec_from_config,
    write_config=config_from_spec,
    keys=HF_KEYS,
    gguf=GGUFMap("falcon", config_from_gguf, GGUF_KEYS, gguf_from_spec),
)
