"""Tiny GGUF files, written from reference models as llama.cpp's converter writes them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind

from tests import reference

LLAMA = reference.LLAMA | {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
}
NEOX = reference.NEOX | {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 256, "num_hidden_layers": 2}
GPT2 = reference.GPT2 | {"n_embd": 64, "n_head": 4, "n_layer": 2}
UNPADDED = LLAMA | reference.UNPADDED
PHI3 = LLAMA | {"pad_token_id": 0}
LONGROPE: dict[str, Any] = reference.LONGROPE | {"partial_rotary_factor": 0.5}
STABLELM_12B = {"qk_layernorm": True, "use_parallel_residual": True}
GEMMA = UNPADDED | {"head_dim": 32, "num_key_value_heads": 1}
FALCON = reference.FALCON | {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}
GEMMA2 = reference.GEMMA2 | UNPADDED | {"head_dim": 32, "query_pre_attn_scalar": 32}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", LLAMA | {"rms_norm_eps": 1e-5}),
    "llama-tied": ("llama", LLAMA | {"tie_word_embeddings": True, "head_dim": 32, "rope_theta": 5e5}),
    "gpt2": ("gpt2", GPT2),
    "gpt2-untied": ("gpt2", GPT2 | {"tie_word_embeddings": False}),
    "gpt_neox": ("gpt_neox", NEOX),
    "gpt_neox-sequential": ("gpt_neox", NEOX | {"use_parallel_residual": False, "rotary_pct": 1.0}),
    "qwen2": ("qwen2", LLAMA | {"rope_theta": 1e6}),
    "qwen2-tied": ("qwen2", LLAMA | {"tie_word_embeddings": True, "rms_norm_eps": 1e-5}),
    "qwen3": ("qwen3", LLAMA | {"head_dim": 32, "tie_word_embeddings": True}),
    "phi3": ("phi3", PHI3),
    "phi3-window": ("phi3", PHI3 | {"sliding_window": 8, "rope_theta": 1000.0, "tie_word_embeddings": True}),
    "phi3-longrope": ("phi3", PHI3 | LONGROPE),
    "stablelm": ("stablelm", LLAMA),
    "stablelm-1_6b": ("stablelm", LLAMA | {"use_qkv_bias": True, "num_key_value_heads": 4, "layer_norm_eps": 1e-3}),
    "stablelm-12b": ("stablelm", LLAMA | STABLELM_12B | {"partial_rotary_factor": 0.5}),
    "gemma": ("gemma", GEMMA),
    "gemma2": ("gemma2", GEMMA2),
    "mistral": ("mistral", LLAMA | {"sliding_window": None, "head_dim": 32, "rope_theta": 1e6}),
    "phi": ("phi", LLAMA | {"partial_rotary_factor": 0.5, "num_key_value_heads": 4}),
    "gpt_bigcode": ("gpt_bigcode", GPT2),
    "falcon": ("falcon", FALCON),
    "falcon-40b": (
        "falcon",
        FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2, "tie_word_embeddings": False},
    ),
    "olmo": ("olmo", UNPADDED | {"tie_word_embeddings": True}),
    "olmo-clipped": ("olmo", UNPADDED | {"clip_qkv": 0.5}),
    "olmo2": ("olmo2", UNPADDED),
    "smollm3": ("smollm3", PHI3 | {"num_hidden_layers": 4, "no_rope_layer_interval": 4}),
}
"""Name -> (model_type, config): widths are multiples of 32, the size of a simple quantized block."""

_ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "gpt2": gguf.MODEL_ARCH.GPT2,
    "gpt_neox": gguf.MODEL_ARCH.GPTNEOX,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "phi3": gguf.MODEL_ARCH.PHI3,
    "stablelm": gguf.MODEL_ARCH.STABLELM,
    "gemma": gguf.MODEL_ARCH.GEMMA,
    "gemma2": gguf.MODEL_ARCH.GEMMA2,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "phi": gguf.MODEL_ARCH.PHI2,
    "gpt_bigcode": gguf.MODEL_ARCH.STARCODER,
    "falcon": gguf.MODEL_ARCH.FALCON,
    "olmo": gguf.MODEL_ARCH.OLMO,
    "olmo2": gguf.MODEL_ARCH.OLMO2,
    "smollm3": gguf.MODEL_ARCH.SMOLLM3,
}
_PAIRED = ("llama", "mistral", "olmo", "smollm3")
"""Model types whose rotary pairs are neighbours in llama.cpp."""
_SCALES = {  # byte offsets of the float16 scales within a block
    Kind.Q2_K: (80, 82),
    Kind.Q3_K: (108,),
    Kind.Q4_K: (0, 2),
    Kind.Q5_K: (0, 2),
    Kind.Q6_K: (208,),
    Kind.IQ4_NL: (0,),
    Kind.IQ4_XS: (0,),
}
RANDOM_KINDS = tuple(_SCALES)
"""Types that gguf-py dequantizes but does not quantize."""

Stored = tuple[np.ndarray, Kind]


def write(path: Path, architecture: str, metadata: Mapping[str, Any], tensors: Mapping[str, Stored]) -> Path:
    """A GGUF file. A tensor of a quantized type is given as its bytes, shape (..., bytes per row)."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=None if data.dtype != np.uint8 else kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def encode(values: np.ndarray, kind: Kind) -> Stored:
    """float32 values as a tensor of a type; vectors stay float32, as llama.cpp leaves them."""
    if values.ndim == 1 or kind == Kind.F32:
        return values.astype(np.float32), Kind.F32
    return gguf.quants.quantize(np.ascontiguousarray(values, np.float32), kind), kind


def random_blocks(shape: tuple[int, int], kind: Kind, *, seed: int = 0) -> Stored:
    """Bytes of a matrix of one of `RANDOM_KINDS`: everything random, the scales small and finite."""
    rng = np.random.default_rng(seed)
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    blocks = rng.integers(0, 256, (shape[0] * shape[1] // block, block_bytes), dtype=np.uint8)
    for at in _SCALES[kind]:
        scales = rng.normal(0, 0.02, (len(blocks), 1)).astype(np.float16)
        blocks[:, at : at + 2] = scales.view(np.uint8)
    return blocks.reshape(shape[0], -1), kind


def write_model(
    path: Path,
    model: Any,
    kind: Kind = Kind.F32,
    *,
    metadata: Mapping[str, Any] | None = None,
    tensors: Mapping[str, np.ndarray] | None = None,
) -> Path:
    """A reference model as a GGUF file; the model's parameters become what the file says, so that both are equal.

    ``metadata`` and float32 ``tensors`` are added; metadata that are None are left out.
    """
    model_type = model.config.model_type
    names = gguf.get_tensor_name_map(_ARCHITECTURES[model_type], model.config.num_hidden_layers)
    tied = model.config.tie_word_embeddings
    written = {
        name: encode(values, Kind.F32) for name, values in (tensors_of(model.config) | dict(tensors or {})).items()
    }
    stacked: dict[str, list[np.ndarray]] = {}
    for name, parameter in model.named_parameters():
        whole = re.sub(r"\.norms\.\d+", "", reference.stored_name(model, name))
        stored = names.get_name(whole, try_suffixes=(".weight", ".bias"))
        if ".norms." in name:  # of q and k, one for each head
            stacked.setdefault(stored, []).append(parameter.detach().numpy())
        elif not (tied and stored == "output.weight"):
            written[stored] = _store(name, parameter, kind, model.config)
    written |= {stored: (np.stack(rows), Kind.F32) for stored, rows in stacked.items()}
    architecture = gguf.MODEL_ARCH_NAMES[_ARCHITECTURES[model_type]]
    about = {
        key: value for key, value in (metadata_of(model.config) | dict(metadata or {})).items() if value is not None
    }
    return write(path, architecture, about, written)


def _store(name: str, parameter: torch.Tensor, kind: Kind, config: Any) -> Stored:
    """A parameter as it is stored; it becomes what is stored."""
    place = as_llama_cpp(name, torch.arange(parameter.numel()).view(parameter.shape), config)
    offset = np.float32(1.0 if config.model_type.startswith("gemma") and name.endswith("norm.weight") else 0.0)
    values, kept_as = encode(parameter.detach().flatten()[place].numpy() + offset, kind)
    with torch.no_grad():
        read = gguf.quants.dequantize(values, kept_as) - offset
        parameter.view(-1)[place] = torch.from_numpy(read).view(place.shape)
    return values, kept_as


def round_norms(model: Any) -> Any:
    """The weights of norms to a multiple of 2 ** -16: 1 can be added and taken away again."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.copy_((parameter * 2**16).round() / 2**16)
    return model


def write_llama(path: Path, **changes: Any) -> Path:
    """`write_model` of a tiny llama of one layer."""
    return write_model(path, reference.tiny_model("llama", LLAMA | {"num_hidden_layers": 1}), **changes)


def as_llama_cpp(name: str, tensor: torch.Tensor, config: Any) -> torch.Tensor:
    """A tensor of a reference model in llama.cpp's layout (its conversion/llama.py, gpt2.py, gpt_neox.py)."""
    if config.model_type in _PAIRED and ("q_proj" in name or "k_proj" in name):
        heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
        halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
        return halves.swapaxes(1, 2).reshape(tensor.shape)
    if config.model_type == "gpt2" and name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
        return tensor.t().contiguous()
    if config.model_type == "gpt_neox" and "query_key_value" in name:
        by_head = tensor.reshape(config.num_attention_heads, 3, -1, *tensor.shape[1:])
        return torch.cat([by_head[:, i].reshape(-1, *tensor.shape[1:]) for i in range(3)])
    if config.model_type == "falcon" and "query_key_value" in name:
        by_group = tensor.reshape(_falcon_kv_heads(config), -1, config.head_dim, *tensor.shape[1:])
        parts = by_group[:, :-2], by_group[:, -2], by_group[:, -1]
        return torch.cat([part.reshape(-1, *tensor.shape[1:]) for part in parts])
    return tensor


def _falcon_kv_heads(config: Any) -> int:
    return int(config.num_kv_heads) if config.new_decoder_architecture or not config.multi_query else 1


def metadata_of(config: Any) -> dict[str, Any]:
    """What llama.cpp's converter writes about a model."""
    arch = gguf.MODEL_ARCH_NAMES[_ARCHITECTURES[config.model_type]]
    if "n_positions" in config.to_dict():
        found = {
            "block_count": config.n_layer,
            "context_length": config.n_positions,
            "embedding_length": config.n_embd,
            "feed_forward_length": 4 * config.n_embd,
            "attention.head_count": config.n_head,
            "attention.layer_norm_epsilon": config.layer_norm_epsilon,
            **({"attention.head_count_kv": 1} if arch == "starcoder" else {}),
        }
        return {f"{arch}.{key}": value for key, value in found.items()}
    d_head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    found = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": getattr(config, "intermediate_size", 4 * config.hidden_size),
        "attention.head_count": config.num_attention_heads,
        **_METADATA[config.model_type](config, d_head),
    }
    return {f"{arch}.{key}": value for key, value in found.items()}


def _grouped(config: Any) -> dict[str, Any]:
    return {
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
    }


def _head_size(d_head: int) -> dict[str, Any]:
    return {"attention.key_length": d_head, "attention.value_length": d_head}


def _llama(config: Any, d_head: int) -> dict[str, Any]:
    return _grouped(config) | _head_size(d_head) | {"rope.dimension_count": d_head, "vocab_size": config.vocab_size}


def _qwen3(config: Any, d_head: int) -> dict[str, Any]:
    return _grouped(config) | _head_size(d_head)


def _neox(config: Any, d_head: int) -> dict[str, Any]:
    return {
        "attention.layer_norm_epsilon": config.layer_norm_eps,
        "rope.dimension_count": int(d_head * config.rope_parameters["partial_rotary_factor"]),
        "use_parallel_residual": config.use_parallel_residual,
    }


def _stablelm(config: Any, d_head: int) -> dict[str, Any]:
    return _neox(config, d_head) | {"attention.head_count_kv": config.num_key_value_heads}


def _phi3(config: Any, d_head: int) -> dict[str, Any]:
    rope = config.rope_parameters
    found = _grouped(config) | {
        "rope.dimension_count": int(d_head * rope.get("partial_rotary_factor", 1.0)),
        "rope.scaling.original_context_length": config.max_position_embeddings,
        "attention.sliding_window": config.sliding_window or 0,
    }
    if "long_factor" not in rope:
        return found
    original = config.original_max_position_embeddings
    scale = config.max_position_embeddings / original
    found["rope.scaling.original_context_length"] = original
    return found | {"rope.scaling.attn_factor": math.sqrt(1 + math.log(scale) / math.log(original))}


def _gemma(config: Any, d_head: int) -> dict[str, Any]:
    return {key: value for key, value in _qwen3(config, d_head).items() if key != "rope.freq_base"}


def _gemma2(config: Any, d_head: int) -> dict[str, Any]:
    return _gemma(config, d_head) | {
        "attn_logit_softcapping": float(config.attn_logit_softcapping),
        "final_logit_softcapping": float(config.final_logit_softcapping),
        "attention.sliding_window": config.sliding_window,
    }


def _phi(config: Any, d_head: int) -> dict[str, Any]:
    return {
        "attention.head_count_kv": config.num_attention_heads,
        "attention.layer_norm_epsilon": config.layer_norm_eps,
        "rope.dimension_count": int(d_head * config.rope_parameters["partial_rotary_factor"]),
    }


def _falcon(config: Any, d_head: int) -> dict[str, Any]:
    return {
        "attention.head_count_kv": _falcon_kv_heads(config),
        "attention.layer_norm_epsilon": config.layer_norm_epsilon,
        "tensor_data_layout": "jploski",
    }


def _olmo(config: Any, d_head: int) -> dict[str, Any]:
    found = {
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_epsilon": 1e-5,
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
    }
    return found | ({} if config.clip_qkv is None else {"attention.clamp_kqv": config.clip_qkv})


_METADATA: dict[str, Callable[[Any, int], dict[str, Any]]] = {
    "llama": _llama,
    "gpt_neox": _neox,
    "qwen2": lambda config, d_head: _grouped(config),
    "qwen3": _qwen3,
    "phi3": _phi3,
    "stablelm": _stablelm,
    "gemma": _gemma,
    "gemma2": _gemma2,
    "mistral": _llama,
    "phi": _phi,
    "falcon": _falcon,
    "olmo": _olmo,
    "olmo2": lambda config, d_head: _grouped(config),
    "smollm3": _llama,
}
"""What is particular to an architecture (llama.cpp, the classes in its conversion/)."""


def tensors_of(config: Any) -> dict[str, np.ndarray]:
    """The tensors of settings that llama.cpp's converter writes."""
    rope = getattr(config, "rope_parameters", None) or {}
    if "long_factor" not in rope:
        return {}
    return {f"rope_factors_{kind}.weight": np.array(rope[f"{kind}_factor"], np.float32) for kind in ("long", "short")}
