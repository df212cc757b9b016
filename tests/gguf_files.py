"""Tiny GGUF files, written from reference models as llama.cpp's converter writes them."""

from __future__ import annotations

from collections.abc import Mapping
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
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", LLAMA | {"rms_norm_eps": 1e-5}),
    "llama-tied": ("llama", LLAMA | {"tie_word_embeddings": True, "head_dim": 32, "rope_theta": 5e5}),
    "gpt2": ("gpt2", GPT2),
    "gpt2-untied": ("gpt2", GPT2 | {"tie_word_embeddings": False}),
    "gpt_neox": ("gpt_neox", NEOX),
    "gpt_neox-sequential": ("gpt_neox", NEOX | {"use_parallel_residual": False, "rotary_pct": 1.0}),
}
"""Name -> (model_type, config): widths are multiples of 32, the size of a simple quantized block."""

_ARCHITECTURES = {"llama": gguf.MODEL_ARCH.LLAMA, "gpt2": gguf.MODEL_ARCH.GPT2, "gpt_neox": gguf.MODEL_ARCH.GPTNEOX}
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
    written = {name: encode(values, Kind.F32) for name, values in (tensors or {}).items()}
    for name, parameter in model.named_parameters():
        stored = names.get_name(reference.stored_name(model, name), try_suffixes=(".weight", ".bias"))
        if tied and stored == "output.weight":
            continue
        place = as_llama_cpp(name, torch.arange(parameter.numel()).view(parameter.shape), model.config)
        values, kept_as = encode(parameter.detach().flatten()[place].numpy(), kind)
        written[stored] = values, kept_as
        with torch.no_grad():
            parameter.view(-1)[place] = torch.from_numpy(gguf.quants.dequantize(values, kept_as)).view(place.shape)
    architecture = gguf.MODEL_ARCH_NAMES[_ARCHITECTURES[model_type]]
    about = {
        key: value for key, value in (metadata_of(model.config) | dict(metadata or {})).items() if value is not None
    }
    return write(path, architecture, about, written)


def write_llama(path: Path, **changes: Any) -> Path:
    """`write_model` of a tiny llama of one layer."""
    return write_model(path, reference.tiny_model("llama", LLAMA | {"num_hidden_layers": 1}), **changes)


def as_llama_cpp(name: str, tensor: torch.Tensor, config: Any) -> torch.Tensor:
    """A tensor of a reference model in llama.cpp's layout (its conversion/llama.py, gpt2.py, gpt_neox.py)."""
    if config.model_type == "llama" and ("q_proj" in name or "k_proj" in name):
        heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
        halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
        return halves.swapaxes(1, 2).reshape(tensor.shape)
    if config.model_type == "gpt2" and name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
        return tensor.t().contiguous()
    if config.model_type == "gpt_neox" and "query_key_value" in name:
        by_head = tensor.reshape(config.num_attention_heads, 3, -1, *tensor.shape[1:])
        return torch.cat([by_head[:, i].reshape(-1, *tensor.shape[1:]) for i in range(3)])
    return tensor


def metadata_of(config: Any) -> dict[str, Any]:
    """What llama.cpp's converter writes about a model."""
    if config.model_type == "gpt2":
        found = {
            "block_count": config.n_layer,
            "context_length": config.n_positions,
            "embedding_length": config.n_embd,
            "feed_forward_length": 4 * config.n_embd,
            "attention.head_count": config.n_head,
            "attention.layer_norm_epsilon": config.layer_norm_epsilon,
        }
        return {f"gpt2.{key}": value for key, value in found.items()}
    d_head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    found = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "rope.dimension_count": d_head,
    }
    if config.model_type == "llama":
        found |= {
            "attention.head_count_kv": config.num_key_value_heads,
            "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
            "attention.key_length": d_head,
            "attention.value_length": d_head,
            "rope.freq_base": float(config.rope_parameters["rope_theta"]),
            "vocab_size": config.vocab_size,
        }
        return {f"llama.{key}": value for key, value in found.items()}
    found |= {
        "attention.layer_norm_epsilon": config.layer_norm_eps,
        "rope.dimension_count": int(d_head * config.rope_parameters["partial_rotary_factor"]),
        "use_parallel_residual": config.use_parallel_residual,
    }
    return {f"gptneox.{key}": value for key, value in found.items()}
