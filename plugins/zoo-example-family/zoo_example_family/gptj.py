"""GPT-J (Wang and Komatsuzaki 2021): attention and MLP side by side behind one norm, rotary on neighbouring pairs."""

from __future__ import annotations

from typing import Any

from zoo.families.base import ACTIVATIONS, Config, ConfigReader, Family, KeyMap
from zoo.spec import ModelSpec, RopeSpec

HF_KEYS = KeyMap(
    """
    transformer.wte.weight                    embed.weight
    transformer.h.{i}.ln_1.weight             blocks.{i}.attn_norm.weight
    transformer.h.{i}.ln_1.bias               blocks.{i}.attn_norm.bias
    transformer.h.{i}.attn.q_proj.weight      blocks.{i}.attn.q.weight
    transformer.h.{i}.attn.k_proj.weight      blocks.{i}.attn.k.weight
    transformer.h.{i}.attn.v_proj.weight      blocks.{i}.attn.v.weight
    transformer.h.{i}.attn.out_proj.weight    blocks.{i}.attn.out.weight
    transformer.h.{i}.mlp.fc_in.weight        blocks.{i}.mlp.up.weight
    transformer.h.{i}.mlp.fc_in.bias          blocks.{i}.mlp.up.bias
    transformer.h.{i}.mlp.fc_out.weight       blocks.{i}.mlp.down.weight
    transformer.h.{i}.mlp.fc_out.bias         blocks.{i}.mlp.down.bias
    transformer.ln_f.weight                   norm.weight
    transformer.ln_f.bias                     norm.bias
    lm_head.weight                            head.weight
    lm_head.bias                              head.bias
    """,
    prefix="transformer.",
    ignore=[r"h\.\d+\.attn\.(masked_)?bias$"],  # the causal mask, which old files hold once a layer
)

_OWN_HARMLESS = (
    "summary_type",
    "summary_use_proj",
    "summary_activation",
    "summary_proj_to_labels",
    "summary_first_dropout",
)


def spec_from_config(config: Config) -> ModelSpec:
    """Spec of a Hugging Face GPT-J config (`GPTJConfig`). Raises `InputError` as `ConfigReader` does."""
    read = ConfigReader(config, "gptj")
    read.only("rotary", True)
    read.only("scale_attn_weights", True)
    d_model, n_heads = read.get("n_embd", 4096), read.get("n_head", 16)
    spec = ModelSpec(
        n_layers=read.get("n_layer", 28),
        d_model=d_model,
        n_heads=n_heads,
        n_kv_heads=n_heads,
        d_head=d_model // n_heads,
        d_ffn=read.get("n_inner", 4 * d_model),
        vocab_size=read.get("vocab_size", 50400),
        max_seq_len=read.get("n_positions", 2048),
        norm="layer",
        norm_eps=read.get("layer_norm_epsilon", 1e-5),
        block="parallel_shared_norm",
        activation=read.choose("activation_function", ACTIVATIONS, "gelu_new"),
        rope=RopeSpec(n_dims=read.get("rotary_dim", 64), interleaved=True),
        norm_bias=True,
        mlp_bias=True,
        head_bias=True,
        tie_embeddings=read.get("tie_word_embeddings", False),
        embed_dropout=read.get("embd_pdrop", 0.0),
        attn_dropout=read.get("attn_pdrop", 0.0),
        resid_dropout=read.get("resid_pdrop", 0.0),
        init_std=read.get("initializer_range", 0.02),
    )
    read.finish(*_OWN_HARMLESS)
    return spec


def config_from_spec(spec: ModelSpec) -> dict[str, Any]:
    """The Hugging Face config of a spec of this family."""
    assert spec.rope is not None
    return {
        "model_type": "gptj",
        "architectures": ["GPTJForCausalLM"],
        "n_layer": spec.n_layers,
        "n_embd": spec.d_model,
        "n_head": spec.n_heads,
        "n_inner": spec.d_ffn,
        "vocab_size": spec.vocab_size,
        "n_positions": spec.max_seq_len,
        "layer_norm_epsilon": spec.norm_eps,
        "activation_function": {"gelu_tanh": "gelu_new"}.get(spec.activation, spec.activation),
        "rotary_dim": spec.rope.n_dims,
        "tie_word_embeddings": spec.tie_embeddings,
        "embd_pdrop": spec.embed_dropout,
        "attn_pdrop": spec.attn_dropout,
        "resid_pdrop": spec.resid_dropout,
        "initializer_range": spec.init_std,
    }


GPTJ = Family(
    name="gptj",
    model_type="gptj",
    architecture="GPTJForCausalLM",
    read_config=spec_from_config,
    write_config=config_from_spec,
    keys=HF_KEYS,
)
