"""Loads a checkpoint with quantized linears, one weight at a time: no float model is ever there."""

from __future__ import annotations

import torch
from torch import nn

from zoo.convert.base import Checkpoint, ParameterReader
from zoo.models.attention import Attend
from zoo.models.gpt import GPT
from zoo.plan.parameters import parameter_shapes
from zoo.precision.quantization import QuantizedEmbedding, QuantizedLinear, Quantizer, quantized_weights


def load_quantized(
    checkpoint: Checkpoint,
    attend: Attend,
    quantizer: Quantizer,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> GPT:
    """The decoder with the checkpoint's weights, its linears as the quantizer wants them, in evaluation mode.

    Weights that are stored as the integers of such a linear are taken as they are; others are quantized.

    Args:
        dtype: of everything that is not quantized, and of the activations.

    Raises:
        FileFormatError: as `zoo.convert.load.load_model`.
    """
    with torch.device("meta"):
        model = GPT(checkpoint.spec, attend)
    kinds, reader = quantized_weights(checkpoint.spec, quantizer), ParameterReader(checkpoint)
    for name in parameter_shapes(checkpoint.spec):
        module_name, _, leaf = name.rpartition(".")
        if (kind := kinds.get(name)) is not None:
            layer = kind.from_stored(reader.quantized(name, kind, dtype).tensors, dtype).to(device)
            _put(model, module_name, layer)
        else:
            tensor = reader.get(name).to(dtype=dtype, device=device)
            setattr(model.get_submodule(module_name), leaf, nn.Parameter(tensor, requires_grad=False))
    if "embed.weight" not in kinds:
        model.tie()
    return model.eval()


def _put(model: GPT, name: str, layer: QuantizedLinear) -> None:
    """A layer in the place of the linear of that name; an embedding that is tied shares the head's integers."""
    place = "head" if name == "embed" else name
    old = model.get_submodule(place)
    assert isinstance(old, nn.Linear)
    layer.bias = old.bias  # its values come, or have come, under their own name
    model.set_submodule(place, layer)
    if name == "embed":
        model.set_submodule("embed", QuantizedEmbedding(layer, model.spec.embed_scale))
