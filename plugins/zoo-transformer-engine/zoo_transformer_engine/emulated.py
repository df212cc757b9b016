"""FP8 without a GPU: products of the numbers that FP8 would hold, in float32, which is what the hardware adds up in.

Shape letters: T tokens, D_in, D_out of a linear.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from zoo.errors import InputError
from zoo.precision.base import Precision
from zoo_transformer_engine.layers import Chosen, choose_linears, replace_modules
from zoo_transformer_engine.options import EmulatedOptions
from zoo_transformer_engine.quantize import Quantized
from zoo_transformer_engine.scaling import GRADIENT, INPUT, WEIGHT, Scaler, make_scaler


@dataclass(frozen=True, kw_only=True)
class FP8Emulated(Precision):
    """bfloat16 weights, and products of FP8 in training; evaluation computes in bfloat16, as the saved model will."""

    options: EmulatedOptions = field(default_factory=EmulatedOptions)

    def supports(self, device: str) -> list[str]:
        """Where torch has FP8 dtypes."""
        return ["torch has no FP8 numbers on mps"] if device == "mps" else super().supports(device)

    def convert(self, model: nn.Module) -> EmulatedLayers:
        """Every linear that is not skipped; the parameters stay the objects that they are."""
        chosen = choose_linears(model, self.options, any_shape=not self.options.strict_shapes)
        scaler = make_scaler(self.options, len(chosen.linears))
        numbers = {name: number for number, name in enumerate(chosen.linears)}

        def emulated(name: str, linear: nn.Module) -> nn.Module:
            assert isinstance(linear, nn.Linear)
            return EmulatedLinear(linear, scaler, numbers[name])

        replace_modules(model, emulated, list(numbers))
        return EmulatedLayers(chosen, self.options, scaler)


@dataclass(frozen=True)
class EmulatedLayers:
    """The emulated linears of a model."""

    chosen: Chosen
    options: EmulatedOptions
    scaler: Scaler

    def describe(self) -> str:
        """As `zoo.precision.base.Converted.describe`."""
        return self.chosen.describe(self.options)

    def state_dict(self) -> dict[str, Any]:
        """The factors and histories, and the layers whose they are."""
        return {"layers": list(self.chosen.linears), **self.scaler.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        """Take them back.

        Raises:
            InputError: they are of other layers, or of another recipe.
        """
        if state.get("layers") != list(self.chosen.linears):
            raise InputError("the factors of FP8 that were saved are those of other layers.")
        self.scaler.load_state_dict(state)


class EmulatedLinear(nn.Linear):
    """A linear whose three products, of the forward and of the backward pass, are those of FP8 tensors in training.

    Args:
        linear: whose parameters it takes.
        layer: its number, for the scaler.
    """

    def __init__(self, linear: nn.Linear, scaler: Scaler, layer: int) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight = linear.weight
        self.register_parameter("bias", linear.bias)
        self.scaler, self.layer = scaler, layer
        self.train(linear.training)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - as torch calls it
        """Maps (..., D_in) to (..., D_out)."""
        if not self.training:
            return super().forward(input)
        device = input.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else input.dtype
        with torch.autocast(device, enabled=False):
            y: Tensor = _FP8Linear.apply(  # type: ignore[no-untyped-call]
                input, self.weight, self.bias, self.scaler, self.layer, dtype
            )
        return y


class _FP8Linear(torch.autograd.Function):
    """Keeps one byte for each input and weight. The bias is added, and its gradient summed, in float32."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, scaler: Scaler, layer: int, dtype: torch.dtype
    ) -> Tensor:
        x_TD = x.reshape(-1, x.shape[-1])
        x_both = scaler.quantized(x_TD.float(), layer, INPUT)
        weight_both = scaler.quantized(weight.float(), layer, WEIGHT)
        y_TF = F.linear(
            x_both.columns.dequantized(),
            weight_both.columns.dequantized(),
            None if bias is None else bias.float(),
        )
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        _keep(ctx, [weight_both.rows if needs_x else None, x_both.rows if needs_weight else None])
        ctx.scaler, ctx.layer, ctx.shape = scaler, layer, x.shape
        ctx.dtypes = (x.dtype, weight.dtype, None if bias is None else bias.dtype)
        return y_TF.to(dtype).view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        ctx.scaler.ended()
        weight, x = _kept(ctx)
        grad_TF = grad.reshape(-1, grad.shape[-1]).float()
        both = ctx.scaler.quantized(grad_TF, ctx.layer, GRADIENT)
        dtypes = ctx.dtypes
        d_x = d_weight = d_bias = None
        if weight is not None:
            d_x = (both.columns.dequantized() @ weight.dequantized()).to(dtypes[0]).view(ctx.shape)
        if x is not None:
            d_weight = (both.rows.dequantized().t() @ x.dequantized()).to(dtypes[1])
        if ctx.needs_input_grad[2]:
            d_bias = grad_TF.sum(dim=0).to(dtypes[2])
        return d_x, d_weight, d_bias, None, None, None


def _keep(ctx: Any, found: list[Quantized | None]) -> None:
    """For the backward pass, where activation checkpointing can see it."""
    ctx.save_for_backward(*(tensor for q in found for tensor in ((None, None) if q is None else q[:2])))
    ctx.about = [None if q is None else q[2:] for q in found]


def _kept(ctx: Any) -> list[Quantized | None]:
    tensors = ctx.saved_tensors
    return [
        None if about is None else Quantized(tensors[2 * i], tensors[2 * i + 1], *about)
        for i, about in enumerate(ctx.about)
    ]


FP8_EMULATED = FP8Emulated(name="fp8-emulated", param_dtype=torch.bfloat16, inference="bf16-true")
