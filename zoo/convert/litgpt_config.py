"""LitGPT's ``model_config.yaml`` and specs, read in both directions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from zoo.convert.base import what_is_lost
from zoo.errors import InputError
from zoo.families.base import ConfigReader
from zoo.spec import Activation, ModelSpec, RopeScaling, RopeSpec

WEIGHTS, CONFIG = "lit_model.pth", "model_config.yaml"

_UNUSED = {
    "post_attention_norm": False,
    "post_mlp_norm": False,
    "attention_scores_scalar": None,
    "sliding_window_size": None,
    "attention_logit_softcapping": None,
    "rope_interleave": False,
    "n_expert": 0,
    "n_shared_expert": None,
    "n_expert_groups": None,
    "first_k_dense_replace": None,
    "scale_embeddings": False,
    "final_logit_softcapping": None,
    "norm_1": True,
    "norm_2": True,
    "latent_attention": None,
    "rope_local_base_freq": None,
}
"""Mechanisms of LitGPT at the values where they are absent; zoo reads no others."""
_IDLE = (
    "sliding_window_indices",
    "moe_intermediate_size",
    "n_topk_groups",
    "n_topk_scores_per_group",
    "n_expert_per_token",
    "routed_scaling_factor",
    "norm_topk_prob",
    "rope_indices",
    "name",
    "hf_config",
)
"""Keys that change nothing as long as those above have their values."""
_ACTIVATIONS: dict[str, Activation] = {"none": "gelu", "tanh": "gelu_tanh"}
_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_seq_len")
_FIX = "If it does not change what the model computes, remove it from model_config.yaml."


def looks_like_litgpt(path: Path) -> bool:
    """Whether LitGPT's files are there and no others with weights: beside those of the hub it leaves a copy of them."""
    others = [*path.glob("*.safetensors"), *path.glob("pytorch_model*.bin")]
    return (path / WEIGHTS).is_file() and (path / CONFIG).is_file() and not others


def spec_from_config(config: Mapping[str, Any], *, tie_embeddings: bool) -> ModelSpec:
    """The spec of a config; keys that are missing have LitGPT's defaults (``litgpt.Config``).

    Args:
        config: content of model_config.yaml.
        tie_embeddings: whether head and embedding are one tensor, which LitGPT's configs do not say.

    Raises:
        InputError: a key is not understood, or has a value that zoo does not implement.
    """
    read = ConfigReader(config, "litgpt")
    for key, value in _UNUSED.items():
        read.only(key, value)
    _refuse_names(str(config.get("name") or (config.get("hf_config") or {}).get("name") or ""))
    mlp = read.choose("mlp_class_name", {"GptNeoxMLP": "plain", "LLaMAMLP": "gated"}, "GptNeoxMLP")
    norm = read.choose("norm_class_name", {"LayerNorm": "layer", "RMSNorm": "rms"}, "LayerNorm")
    gelu = read.choose("gelu_approximate", _ACTIVATIONS, "none")
    d_model, n_heads = read.get("n_embd", 4096), read.get("n_head", 32)
    d_head = read.get("head_size", d_model // n_heads)
    bias = read.get("bias", True)
    attn_bias = read.get("attn_bias", False)
    read.only("norm_qk_type", "default")
    values = {
        "n_layers": read.get("n_layer", 16),
        "d_model": d_model,
        "n_heads": n_heads,
        "n_kv_heads": read.get("n_query_groups", n_heads),
        "d_head": d_head,
        "d_ffn": read.get("intermediate_size") or _default_ffn(mlp, d_model),
        "vocab_size": _vocab_size(read),
        "max_seq_len": read.get("block_size", 4096),
        "norm": norm,
        "norm_eps": read.get("norm_eps", 1e-5),
        "norm_bias": norm == "layer",
        "block": _block(read),
        "mlp": mlp,
        "activation": gelu if mlp == "plain" else "silu",
        "rope": asdict(_rope(read, d_head)),
        "qkv_bias": bias or attn_bias,
        "attn_out_bias": bias,
        "mlp_bias": bias,
        "head_bias": read.get("lm_head_bias", False),
        "qk_norm": "head" if read.get("norm_qk", False) else "none",
        "tie_embeddings": tie_embeddings,
    }
    try:
        read.finish(*_IDLE)
    except InputError as error:
        raise InputError(error.message, fix=_FIX) from None
    return ModelSpec.from_dict(values)


def config_from_spec(spec: ModelSpec, org: str, name: str) -> dict[str, Any]:
    """The config of a spec. Its padded vocabulary is the spec's, whose rows beyond the tokenizer stay where they are.

    Raises:
        InputError: LitGPT has not one of its mechanisms.
    """
    if spec.rope is None:
        raise InputError("LitGPT has no learned positions; this model needs them.")
    _refuse_names(name)
    found = {
        "name": name,
        "hf_config": {"org": org, "name": name},
        "block_size": spec.max_seq_len,
        "n_layer": spec.n_layers,
        "n_embd": spec.d_model,
        "n_head": spec.n_heads,
        "n_query_groups": spec.n_kv_heads,
        "head_size": spec.d_head,
        "intermediate_size": spec.d_ffn,
        "vocab_size": spec.vocab_size,
        "padded_vocab_size": spec.vocab_size,
        "norm_class_name": {"layer": "LayerNorm", "rms": "RMSNorm"}[spec.norm],
        "norm_eps": spec.norm_eps,
        "norm_qk": spec.qk_norm != "none",
        "parallel_residual": spec.block != "sequential",
        "shared_attention_norm": spec.block == "parallel_shared_norm",
        "mlp_class_name": {"plain": "GptNeoxMLP", "gated": "LLaMAMLP"}[spec.mlp],
        "gelu_approximate": "tanh" if spec.activation == "gelu_tanh" else "none",
        "bias": spec.mlp_bias,
        "attn_bias": spec.qkv_bias,
        "lm_head_bias": spec.head_bias,
        "rope_base": int(spec.rope.base) if spec.rope.base.is_integer() else spec.rope.base,
        "rotary_percentage": spec.rope.n_dims / spec.d_head,
        "rope_adjustments": _adjustments(spec.rope.scaling),
    }
    lost = what_is_lost(spec, spec_from_config(found, tie_embeddings=spec.tie_embeddings))
    if lost:
        raise InputError(f"LitGPT can not compute a model with {', '.join(lost)}.")
    return found


def _refuse_names(name: str) -> None:
    """LitGPT computes norms differently when the model's name says so (``litgpt.Config.norm_class``)."""
    for word in ("Gemma", "OLMo"):
        if word in name:
            raise InputError(
                f"the model's name is {name!r}; for LitGPT {word!r} in a name means other norms than zoo computes.",
                fix="Rename the directory, if that is no such model.",
            )


def _default_ffn(mlp: str, d_model: int) -> int:
    if mlp == "gated":
        raise InputError("the litgpt config lacks 'intermediate_size', which LLaMAMLP needs.")
    return 4 * d_model


def _block(read: ConfigReader) -> str:
    parallel, shared = read.get("parallel_residual", True), read.get("shared_attention_norm", False)
    if shared and not parallel:
        raise InputError("the litgpt config shares a norm (shared_attention_norm) without parallel_residual.")
    return "parallel_shared_norm" if shared else "parallel" if parallel else "sequential"


def _vocab_size(read: ConfigReader) -> int:
    """Rows of the embedding: the vocabulary padded to a multiple, unless they are given."""
    vocab_size, multiple = read.get("vocab_size", 50254), read.get("padding_multiple", 512)
    padded: int = read.get("padded_vocab_size", -(-vocab_size // multiple) * multiple)
    return padded


def _rope(read: ConfigReader, d_head: int) -> RopeSpec:
    rotary = int(read.get("rotary_percentage", 0.25) * d_head)
    ratio, adjustments = read.get("rope_condense_ratio", 1), read.get("rope_adjustments", {})
    if adjustments and ratio != 1:
        raise InputError("the litgpt config scales rotary positions twice: rope_condense_ratio and rope_adjustments.")
    scaling = RopeScaling(kind="linear", factor=float(ratio)) if ratio != 1 else None
    if set(adjustments) == set(_LLAMA3):
        scaling = RopeScaling(kind="llama3", **adjustments)
    elif set(adjustments) == {"factor"}:
        scaling = RopeScaling(kind="linear", factor=float(adjustments["factor"]))
    elif adjustments:
        raise InputError(f"the litgpt config has rope_adjustments with {', '.join(adjustments)}, which zoo has not.")
    return RopeSpec(n_dims=rotary, base=float(read.get("rope_base", 10_000)), scaling=scaling)


def _adjustments(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    return {key: getattr(scaling, key) for key in (_LLAMA3 if scaling.kind == "llama3" else ("factor",))}
