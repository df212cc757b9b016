"""GPT-NeoX (arXiv 2204.06745): partial rotary, parallel or sequential residual, q, k and v interleaved by head."""

from __future__ import annotations

from typing import Any

from zoo.errors import InputError
from zoo.families.base import ACTIVATIONS, Config, ConfigReader, Family, GGUFMap, KeyMap, activation_name
from zoo.families.rope import read_rope, write_scaling
from zoo.spec import ModelSpec, RopeSpec

HF_KEYS = KeyMap(
    """
    gpt_neox.embed_in.weight                                embed.weight
    gpt_neox.layers.{i}.input_layernorm.weight              blocks.{i}.attn_norm.weight
    gpt_neox.layers.{i}.input_layernorm.bias                blocks.{i}.attn_norm.bias
    gpt_neox.layers.{i}.attention.query_key_value.weight    blocks.{i}.attn.{q,k,v}.weight  head_interleaved
    gpt_neox.layers.{i}.attention.query_key_value.bias      blocks.{i}.attn.{q,k,v}.bias    head_interleaved
    gpt_neox.layers.{i}.attention.dense.weight              blocks.{i}.attn.out.weight
    gpt_neox.layers.{i}.attention.dense.bias                blocks.{i}.attn.out.bias
    gpt_neox.layers.{i}.post_attention_layernorm.weight     blocks.{i}.mlp_norm.weight
    gpt_neox.layers.{i}.post_attention_layernorm.bias       blocks.{i}.mlp_norm.bias
    gpt_neox.layers.{i}.mlp.dense_h_to_4h.weight            blocks.{i}.mlp.up.weight
    gpt_neox.layers.{i}.mlp.dense_h_to_4h.bias              blocks.{i}.mlp.up.bias
    gpt_neox.layers.{i}.mlp.dense_4h_to_h.weight            blocks.{i}.mlp.down.weight
    gpt_neox.layers.{i}.mlp.dense_4h_to_h.bias              blocks.{i}.mlp.down.bias
    gpt_neox.final_layer_norm.weight                        norm.weight
    gpt_neox.final_layer_norm.bias                          norm.bias
    embed_out.weight                                        head.weight
    """,
    prefix="gpt_neox.",
    ignore=[r"attention\.(masked_)?bias$", r"rotary_emb\.inv_freq$"],
)

GGUF_KEYS = KeyMap(
    """
    token_embd.weight            embed.weight
    blk.{i}.attn_norm.weight     blocks.{i}.attn_norm.weight
    blk.{i}.attn_norm.bias       blocks.{i}.attn_norm.bias
    blk.{i}.attn_qkv.weight      blocks.{i}.attn.{q,k,v}.weight  rows
    blk.{i}.attn_qkv.bias        blocks.{i}.attn.{q,k,v}.bias    rows
    blk.{i}.attn_output.weight   blocks.{i}.attn.out.weight
    blk.{i}.attn_output.bias     blocks.{i}.attn.out.bias
    blk.{i}.ffn_norm.weight      blocks.{i}.mlp_norm.weight
    blk.{i}.ffn_norm.bias        blocks.{i}.mlp_norm.bias
    blk.{i}.ffn_up.weight        blocks.{i}.mlp.up.weight
    blk.{i}.ffn_up.bias          blocks.{i}.mlp.up.bias
    blk.{i}.ffn_down.weight      blocks.{i}.mlp.down.weight
    blk.{i}.ffn_down.bias        blocks.{i}.mlp.down.bias
    output_norm.weight           norm.weight
    output_norm.bias             norm.bias
    output.weight                head.weight
    """
)


# transformers reads none of these for this family: attention_dropout and hidden_dropout count.
_OWN_HARMLESS = (
    "classifier_dropout",
    "attention_probs_dropout_prob",
    "hidden_dropout_prob",
    "custom_pipelines",
)


def spec_from_config(config: Config) -> ModelSpec:
    """Spec of a Hugging Face GPT-NeoX config (`GPTNeoXConfig`). Raises `InputError` as `ConfigReader` does."""
    read = ConfigReader(config, "gpt_neox")
    rope, scaling = read_rope(read, "gpt_neox", theta_key="rotary_emb_base")
    rotary = rope.get("partial_rotary_factor", read.get("rotary_pct", 0.25))
    read.only("partial_rotary_factor", rotary)  # second spellings that transformers 4.45 wrote beside its own
    read.only("rope_theta", rope["rope_theta"])
    d_model, n_heads = read.require("hidden_size"), read.require("num_attention_heads")
    d_head = d_model // n_heads
    bias, hidden_dropout = read.get("attention_bias", True), read.get("hidden_dropout", 0.0)
    spec = ModelSpec(
        n_layers=read.require("num_hidden_layers"),
        d_model=d_model,
        n_heads=n_heads,
        n_kv_heads=n_heads,
        d_head=d_head,
        d_ffn=read.require("intermediate_size"),
        vocab_size=read.require("vocab_size"),
        max_seq_len=read.get("max_position_embeddings", 2048),
        norm="layer",
        norm_eps=read.get("layer_norm_eps", 1e-5),
        block="parallel" if read.get("use_parallel_residual", True) else "sequential",
        activation=read.choose("hidden_act", ACTIVATIONS, "gelu"),
        rope=RopeSpec(n_dims=int(d_head * rotary), base=float(rope["rope_theta"]), scaling=scaling),
        norm_bias=True,
        qkv_bias=bias,
        attn_out_bias=bias,
        mlp_bias=True,
        tie_embeddings=read.get("tie_word_embeddings", False),
        embed_dropout=hidden_dropout,
        attn_dropout=read.get("attention_dropout", 0.0),
        resid_dropout=hidden_dropout,
        init_std=read.get("initializer_range", 0.02),
    )
    read.finish(*_OWN_HARMLESS)
    return spec


def config_from_spec(spec: ModelSpec) -> dict[str, Any]:
    """The Hugging Face config of a spec of this family."""
    assert spec.rope is not None
    return {
        "model_type": "gpt_neox",
        "architectures": ["GPTNeoXForCausalLM"],
        "num_hidden_layers": spec.n_layers,
        "hidden_size": spec.d_model,
        "num_attention_heads": spec.n_heads,
        "intermediate_size": spec.d_ffn,
        "vocab_size": spec.vocab_size,
        "max_position_embeddings": spec.max_seq_len,
        "layer_norm_eps": spec.norm_eps,
        "use_parallel_residual": spec.block == "parallel",
        "hidden_act": activation_name(spec.activation),
        "rotary_emb_base": spec.rope.base,
        "rotary_pct": spec.rope.n_dims / spec.d_head,
        "rope_scaling": write_scaling(spec.rope.scaling),
        "attention_bias": spec.qkv_bias,
        "tie_word_embeddings": spec.tie_embeddings,
        "hidden_dropout": spec.resid_dropout,
        "attention_dropout": spec.attn_dropout,
        "initializer_range": spec.init_std,
    }


def config_from_gguf(metadata: Config) -> dict[str, Any]:
    """The Hugging Face config of a GGUF file's ``gptneox.*`` metadata."""
    d_model, n_heads = metadata["gptneox.embedding_length"], metadata["gptneox.attention.head_count"]
    if metadata.get("gptneox.rope.scaling.type", "none") != "none":
        raise InputError("this GGUF scales GPT-NeoX's rotary positions, which zoo does not read.")
    return {
        "num_hidden_layers": metadata["gptneox.block_count"],
        "hidden_size": d_model,
        "num_attention_heads": n_heads,
        "intermediate_size": metadata["gptneox.feed_forward_length"],
        "max_position_embeddings": metadata["gptneox.context_length"],
        "layer_norm_eps": metadata["gptneox.attention.layer_norm_epsilon"],
        "rotary_pct": metadata["gptneox.rope.dimension_count"] / (d_model // n_heads),
        "rotary_emb_base": metadata.get("gptneox.rope.freq_base", 10_000.0),
        "use_parallel_residual": metadata.get("gptneox.use_parallel_residual", True),
    }


def gguf_from_spec(spec: ModelSpec) -> dict[str, Any]:
    """The ``gptneox.*`` metadata of a spec.

    Raises:
        InputError: its embeddings are tied, which llama.cpp does not load for this architecture.
    """
    assert spec.rope is not None
    if spec.tie_embeddings:
        raise InputError("llama.cpp loads no GPT-NeoX model whose head is its embedding (tie_embeddings).")
    return {
        "gptneox.block_count": spec.n_layers,
        "gptneox.context_length": spec.max_seq_len,
        "gptneox.embedding_length": spec.d_model,
        "gptneox.feed_forward_length": spec.d_ffn,
        "gptneox.attention.head_count": spec.n_heads,
        "gptneox.attention.layer_norm_epsilon": spec.norm_eps,
        "gptneox.rope.dimension_count": spec.rope.n_dims,
        "gptneox.rope.freq_base": spec.rope.base,
        "gptneox.use_parallel_residual": spec.block == "parallel",
    }


GPT_NEOX = Family(
    name="gpt_neox",
    model_type="gpt_neox",
    architecture="GPTNeoXForCausalLM",
    read_config=spec_from_config,
    write_config=config_from_spec,
    keys=HF_KEYS,
    gguf=GGUFMap("gptneox", config_from_gguf, GGUF_KEYS, gguf_from_spec),
)
