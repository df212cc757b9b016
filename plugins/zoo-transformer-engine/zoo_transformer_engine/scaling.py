"""The recipes: from the operands of a linear's products to FP8, as TransformerEngine's recipes of these names do it.

Shape letters: H steps of history, L layers, K the three tensors of a layer; T tokens, D inputs, F outputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed
from torch.autograd import Variable

from zoo.errors import InputError
from zoo_transformer_engine.options import RecipeOptions
from zoo_transformer_engine.quantize import Quantized, factor, quantize, quantize_blocks

INPUT, WEIGHT, GRADIENT = range(3)
"""The tensors of a layer that become FP8."""


class Both(NamedTuple):
    """A matrix in FP8 for two products: one sums over its columns, the other over its rows."""

    columns: Quantized
    rows: Quantized


class Scaler:
    """Turns the tensors of L layers into FP8."""

    def __init__(self, options: RecipeOptions) -> None:
        self.options = options
        backward = torch.float8_e5m2 if options.format == "HYBRID" else torch.float8_e4m3fn
        self.dtypes = (torch.float8_e4m3fn, torch.float8_e4m3fn, backward)

    def quantized(self, x: Tensor, layer: int, kind: int) -> Both:
        """A float32 matrix as FP8.

        Args:
            layer: its number.
            kind: `INPUT`, `WEIGHT` or `GRADIENT`.
        """
        raise NotImplementedError

    def ended(self) -> None:
        """A backward pass runs, at whose end the step is over. Every layer says so."""

    def state_dict(self) -> dict[str, Any]:
        """What later steps depend on."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take it back."""


class CurrentScaler(Scaler):
    """A factor per tensor, from its own largest value."""

    def quantized(self, x: Tensor, layer: int, kind: int) -> Both:
        """As `Scaler.quantized`."""
        dtype = self.dtypes[kind]
        found = quantize(x, factor(x.abs().amax(), dtype), dtype)
        return Both(found, found)


class BlockScaler(Scaler):
    """MXFP8: for either product, from the tensor as it was and along what that product sums over."""

    def quantized(self, x: Tensor, layer: int, kind: int) -> Both:
        """As `Scaler.quantized`."""
        dtype = self.dtypes[kind]
        columns = quantize_blocks(x.t().contiguous(), dtype)._replace(transposed=True)
        return Both(columns, quantize_blocks(x, dtype))


class DelayedScaler(Scaler):
    """A factor per tensor, from its largest values in earlier steps.

    Row 0 of the history is the step that runs. Its factors hold from the forward pass to the end of the backward pass:
    what activation checkpointing computes again is the same, and leaves the same largest value once more.
    """

    def __init__(self, options: RecipeOptions, n_layers: int) -> None:
        super().__init__(options)
        self.scale_LK = torch.ones(n_layers, 3)
        self.amax_history_HLK = torch.zeros(options.amax_history_len, n_layers, 3)
        self._backward = -1
        """torch's number of the backward pass whose end is waited for."""

    def quantized(self, x: Tensor, layer: int, kind: int) -> Both:
        """As `Scaler.quantized`, with the factors of this step; the largest value is for later ones."""
        self._follow(x.device)
        slot = self.amax_history_HLK[0, layer, kind]
        slot.copy_(torch.maximum(slot, x.abs().amax()))
        found = quantize(x, self.scale_LK[layer, kind], self.dtypes[kind])
        return Both(found, found)

    def ended(self) -> None:
        """Have the factors computed anew when this backward pass is at its end: once, whoever of the layers asks."""
        backward = torch._C._current_graph_task_id()
        if backward != self._backward:
            self._backward = backward
            Variable._execution_engine.queue_callback(self.update)

    @torch.no_grad()
    def update(self) -> None:
        """The factors of the next step, from the history; of all ranks together, which so have the same."""
        options, history = self.options, self.amax_history_HLK
        if distributed.is_initialized() and distributed.get_world_size() > 1:
            distributed.all_reduce(history[0], op=distributed.ReduceOp.MAX)
        amax_LK = history.amax(dim=0) if options.amax_compute_algo == "max" else history[0]
        scales = [
            factor(amax_LK[:, kind], dtype, self.scale_LK[:, kind], options.margin)
            for kind, dtype in enumerate(self.dtypes)
        ]
        self.scale_LK = torch.stack(scales, dim=1)
        history = history.roll(-1, dims=0)
        history[0] = 0
        self.amax_history_HLK = history

    def state_dict(self) -> dict[str, Any]:
        """The factors of the next step, and the history."""
        return {"scale": self.scale_LK, "amax_history": self.amax_history_HLK}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take them back.

        Raises:
            InputError: they are missing, or have another shape.
        """
        for name, own in self.state_dict().items():
            if name not in state or state[name].shape != own.shape:
                found = tuple(state[name].shape) if name in state else "missing"
                raise InputError(f"{name} of FP8 is {found}, and should be {tuple(own.shape)}.")
        device = self.scale_LK.device
        self.scale_LK = state["scale"].to(device, copy=True)
        self.amax_history_HLK = state["amax_history"].to(device, copy=True)

    def _follow(self, device: torch.device) -> None:
        """To where the model is; it may move after it was converted."""
        if self.scale_LK.device != device:
            self.scale_LK, self.amax_history_HLK = self.scale_LK.to(device), self.amax_history_HLK.to(device)


def make_scaler(options: RecipeOptions, n_layers: int) -> Scaler:
    """The scaler of a recipe."""
    if options.scaling == "delayed":
        return DelayedScaler(options, n_layers)
    return CurrentScaler(options) if options.scaling == "current" else BlockScaler(options)
