"""GPT BigCode (StarCoder, arXiv 2305.06161): GPT-2 with one kv head for all queries, and plain linears."""

from __future__ import annotations

from typing import Any

from zoo.families.base import ACTIVATIONS, Config, ConfigReader, Family, GGUFMap, KeyMap, activation_name
from zoo.families.gguf_metadata import read_sizes, write_sizes
from zoo.spec import ModelSpec

HF_KEYS = KeyMap(
    """
    transformer.wte.weight                   embed.weight
    transformer.wpe.weight                   positions.weight
    transformer.h.{i}.ln_1.weight            blocks.{i}.attn_norm.weight
    transformer.h.{i}.ln_1.bias              blocks.{i}.attn_norm.bias
    transformer.h.{i}.attn.c_attn.weight     blocks.{i}.attn.{q,k,v}.weight  head_interleaved
    transformer.h.{i}.attn.c_attn.bias       blocks.{i}.attn.{q,k,v}.bias    head_interleaved
    transformer.h.{i}.attn.c_proj.weight     blocks.{i}.attn.out.weight
    transformer.h.{i}.attn.c_proj.bias       blocks.{i}.attn.out.bias
    transformer.h.{i}.ln_2.weight            blocks.{i}.mlp_norm.weight
    transformer.h.{i}.ln_2.bias              blocks.{i}.mlp_norm.bias
    transformer.h.{i}.mlp.c_fc.weight        blocks.{i}.mlp.up.weight
    transformer.h.{i}.mlp.c_fc.bias          blocks.{i}.mlp.up.bias
    transformer.h.{i}.mlp.c_proj.weight      blocks.{i}.mlp.down.weight
    transformer.h.{i}.mlp.c_proj.bias        blocks.{i}.mlp.down.bias
    transformer.ln_f.weight                  norm.weight
    transformer.ln_f.bias                    norm.bias
    lm_head.weight                           head.weight
    """,
    prefix="transformer.",
    ignore=[r"^(transformer\.)?bias$", r"h\.\d+\.attn\.(masked_)?bias$"],
)

GGUF_KEYS = KeyMap(
    """
    token_embd.weight              embed.weight
    position_embd.weight           positions.weight
    blk.{i}.attn_norm.weight       blocks.{i}.attn_norm.weight
    blk.{i}.attn_norm.bias         blocks.{i}.attn_norm.bias
    blk.{i}.attn_qkv.weight        blocks.{i}.attn.{q,k,v}.weight  rows
    blk.{i}.attn_qkv.bias          blocks.{i}.attn.{q,k,v}.bias    rows
    blk.{i}.attn_output.weight     blocks.{i}.attn.out.weight
    blk.{i}.attn_output.bias       blocks.{i}.attn.out.bias
    blk.{i}.ffn_norm.weight        blocks.{i}.mlp_norm.weight
    blk.{i}.ffn_norm.bias          blocks.{i}.mlp_norm.bias
    blk.{i}.ffn_up.weight          blocks.{i}.mlp.up.weight
    blk.{i}.ffn_up.bias            blocks.{i}.mlp.up.bias
    blk.{i}.ffn_down.weight        blocks.{i}.mlp.down.weight
    blk.{i}.ffn_down.bias          blocks.{i}.mlp.down.bias
    output_norm.weight             norm.weight
    output_norm.bias               norm.bias
    output.weight                  head.weight
    """
)

_OWN_HARMLESS = (
    "summary_type",
    "summary_use_proj",
    "summary_activation",
    "summary_proj_to_labels",
    "summary_first_dropout",
    "attention_softmax_in_fp32",  # where the softmax is rounded, not what it computes
    "scale_attention_softmax_in_fp32",
    "inference_runner",  # how an old implementation allocated and ran
    "validate_runner_input",
    "pre_allocate_kv_cache",
    "pad_key_length",
    "max_batch_size",
    "max_sequence_length",
)


def spec_from_config(config: Config) -> ModelSpec:
    """Spec of a Hugging Face GPT BigCode config (`GPTBigCodeConfig`). Raises `InputError` as `ConfigReader` does."""
    read = ConfigReader(config, "gpt_bigcode")
    read.only("add_cross_attention", False)
    d_model, n_heads = read.get("n_embd", 768), read.get("n_head", 12)
    n_kv_heads = 1 if read.get("multi_query", True) else n_heads
    read.only("num_key_value_heads", n_kv_heads)
    spec = ModelSpec(
        n_layers=read.get("n_layer", 12),
        d_model=d_model,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        d_head=d_model // n_heads,
        d_ffn=read.get("n_inner", 4 * d_model),
        vocab_size=read.get("vocab_size", 50257),
        max_seq_len=read.get("n_positions", 1024),
        norm="layer",
        norm_eps=read.get("layer_norm_epsilon", 1e-5),
        activation=read.choose("activation_function", ACTIVATIONS, "gelu_pytorch_tanh"),
        norm_bias=True,
        qkv_bias=True,
        attn_out_bias=True,
        mlp_bias=True,
        tie_embeddings=read.get("tie_word_embeddings", True),
        attn_scale=None if read.get("scale_attn_weights", True) else 1.0,
        embed_dropout=read.get("embd_pdrop", 0.1),
        attn_dropout=read.get("attn_pdrop", 0.1),
        resid_dropout=read.get("resid_pdrop", 0.1),
        init_std=read.get("initializer_range", 0.02),
    )
    read.finish(*_OWN_HARMLESS)
    return spec


def config_from_spec(spec: ModelSpec) -> dict[str, Any]:
    """The Hugging Face config of a spec of this family."""
    return {
        "model_type": "gpt_bigcode",
        "architectures": ["GPTBigCodeForCausalLM"],
        "n_layer": spec.n_layers,
        "n_embd": spec.d_model,
        "n_head": spec.n_heads,
        "multi_query": spec.n_kv_heads == 1,
        "n_inner": spec.d_ffn,
        "vocab_size": spec.vocab_size,
        "n_positions": spec.max_seq_len,
        "layer_norm_epsilon": spec.norm_eps,
        "activation_function": activation_name(spec.activation),
        "tie_word_embeddings": spec.tie_embeddings,
        "scale_attn_weights": spec.attn_scale is None,
        "embd_pdrop": spec.embed_dropout,
        "attn_pdrop": spec.attn_dropout,
        "resid_pdrop": spec.resid_dropout,
        "initializer_range": spec.init_std,
    }


def config_from_gguf(metadata: Config) -> dict[str, Any]:
    """The Hugging Face config of a GGUF file's ``starcoder.*`` metadata."""
    sizes = read_sizes(metadata, "starcoder")
    return {
        "n_layer": sizes["num_hidden_layers"],
        "n_embd": sizes["hidden_size"],
        "n_head": sizes["num_attention_heads"],
        "num_key_value_heads": sizes["num_key_value_heads"],
        "multi_query": sizes["num_key_value_heads"] == 1,
        "n_inner": sizes["intermediate_size"],
        "n_positions": sizes["max_position_embeddings"],
        "layer_norm_epsilon": metadata["starcoder.attention.layer_norm_epsilon"],
    }


def gguf_from_spec(spec: ModelSpec) -> dict[str, Any]:
    """The ``starcoder.*`` metadata of a spec."""
    return {**write_sizes(spec, "starcoder"), "starcoder.attention.layer_norm_epsilon": spec.norm_eps}


GPT_BIGCODE = Family(
    name="gpt_bigcode",
    model_type="gpt_bigcode",
    architecture="GPTBigCodeForCausalLM",
    read_config=spec_from_config,
    write_config=config_from_spec,
    keys=HF_KEYS,
    gguf=GGUFMap("starcoder", config_from_gguf, GGUF_KEYS, gguf_from_spec),
)
