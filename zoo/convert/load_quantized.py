"""Loads a checkpoint with quantized linears: each weight is quantized as it is read; no float model is ever there."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zoo.convert.base import Checkpoint
from zoo.models.attention import Attend
from zoo.models.gpt import GPT
from zoo.precision.int8 import Int8Embedding, Int8Linear
from zoo.precision.quantization import Quantizer


def load_quantized(
    checkpoint: Checkpoint,
    attend: Attend,
    quantizer: Quantizer,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> GPT:
    """The decoder with the checkpoint's weights, its linears as the quantizer wants them, in evaluation mode.

    Args:
        dtype: of everything that is not quantized, and of the activations.

    Raises:
        FileFormatError: as `zoo.convert.load.load_model`.
    """
    with torch.device("meta"):
        model = GPT(checkpoint.spec, attend)
    for name, tensor in checkpoint.parameters():
        module_name, _, leaf = name.rpartition(".")
        module = model.get_submodule(module_name)
        if name == "embed.weight" and checkpoint.spec.tie_embeddings:
            _tie(model, tensor, quantizer, dtype, device)
        elif leaf == "weight" and isinstance(module, nn.Linear):
            set_linear(model, module_name, tensor, quantizer, dtype, device)
        else:
            setattr(module, leaf, nn.Parameter(tensor.to(dtype=dtype, device=device), requires_grad=False))
    return model.eval()


def set_linear(
    model: GPT, name: str, weight: Tensor, quantizer: Quantizer, dtype: torch.dtype, device: torch.device | str
) -> None:
    """Put a weight into the linear called ``name``, which becomes a quantized one if the quantizer takes its role."""
    old = model.get_submodule(name)
    role = name.rpartition("blocks.")[2].partition(".")[2] or name
    kind = quantizer.linear_type(role, weight.shape[1], weight.shape[0])
    if kind is None:
        old.weight = nn.Parameter(weight.to(dtype=dtype, device=device), requires_grad=False)
        return
    quantized = kind.from_float(weight, dtype).to(device)
    assert isinstance(old, nn.Linear)
    quantized.bias = old.bias  # its values come, or have come, under their own name
    model.set_submodule(name, quantized)


def _tie(model: GPT, weight: Tensor, quantizer: Quantizer, dtype: torch.dtype, device: torch.device | str) -> None:
    """A tied embedding and head share the head's integers."""
    set_linear(model, "head", weight, quantizer, dtype, device)
    if isinstance(model.head, Int8Linear):
        model.set_submodule("embed", Int8Embedding(model.head, model.spec.embed_scale))
    else:
        model.embed.weight = model.head.weight
