"""Layers, and where they compute in FP8. Devices called cuda are the CPU."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.nn import functional as F

from transformer_engine.common.recipe import DelayedScaling, Recipe

CALLS: list[str] = []
"""What was computed, in order."""


class State:
    """Of the region that runs."""

    recipe: Recipe | None = None
    modules: dict[int, TransformerEngineBaseModule] = {}  # noqa: RUF012


@contextmanager
def _region(
    enabled: bool = True,
    calibrating: bool = False,
    recipe: Recipe | None = None,
    amax_reduction_group: Any = None,
    _graph: bool = False,
) -> Iterator[None]:
    before, State.recipe = State.recipe, (recipe or DelayedScaling()) if enabled else None
    try:
        yield
    finally:
        State.recipe = before
        if enabled and before is None and torch.is_grad_enabled():
            for module in State.modules.values():
                module.update("fwd")


autocast = _region


def fp8_autocast(
    enabled: bool = True,
    calibrating: bool = False,
    fp8_recipe: Recipe | None = None,
    fp8_group: Any = None,
    _graph: bool = False,
) -> Any:
    warnings.warn("fp8_autocast is deprecated", DeprecationWarning, stacklevel=2)
    return _region(enabled, calibrating, fp8_recipe, fp8_group, _graph)


def is_fp8_available(return_reason: bool = False) -> Any:
    return (True, "") if return_reason else True


def is_mxfp8_available(return_reason: bool = False) -> Any:
    why = "Device compute capability 10.0 or higher required for MXFP8 execution."
    return (False, why) if return_reason else False


def assert_dim_for_fp8_exec(*tensors: Tensor) -> None:
    for tensor in tensors:
        assert prod(tensor.shape[:-1]) % 8 == 0 and tensor.shape[-1] % 16 == 0, (
            "FP8 execution requires the product of all dimensions except the last to be divisible by 8 and the last "
            f"dimension to be divisible by 16, but got tensor with dims={list(tensor.shape)}"
        )


class TransformerEngineBaseModule(nn.Module):
    """Factors and histories, which appear with the first pass in FP8."""

    def __init__(self) -> None:
        super().__init__()
        self.fp8_meta: dict[str, Any] = {"fp8_checkpoint": False}

    def init_fp8_meta_tensors(self, recipe: Recipe) -> None:
        self.fp8_meta["recipe"] = recipe
        length = recipe.amax_history_len if isinstance(recipe, DelayedScaling) else 1
        for direction, n_tensors in (("fwd", 3), ("bwd", 2)):
            if f"scale_{direction}" not in self.fp8_meta:
                self.fp8_meta[f"scale_{direction}"] = torch.ones(n_tensors)
                self.fp8_meta[f"amax_history_{direction}"] = torch.zeros(length, n_tensors)

    def begin(self) -> None:
        assert State.recipe is not None
        self.init_fp8_meta_tensors(State.recipe)
        self.fp8_meta |= {"fp8_checkpoint": True, "num_gemms": 1, "fp8_max_fwd": State.recipe.fp8_format.value[0]}
        State.modules[id(self)] = self

    def cast(self, x: Tensor, direction: str, number: int) -> Tensor:
        """A tensor as FP8 holds it."""
        recipe = self.fp8_meta["recipe"]
        limit = recipe.fp8_format.value[direction == "bwd"]
        dtype = torch.float8_e4m3fn if limit == 448 else torch.float8_e5m2
        amax = x.detach().abs().amax().float()
        self.fp8_meta[f"amax_history_{direction}"][0, number] = amax
        scale = self.fp8_meta[f"scale_{direction}"][number] if recipe.delayed() else limit / amax
        return ((x.float() * scale).clamp(-limit, limit).to(dtype).float() / scale).to(x.dtype)

    def update(self, direction: str) -> None:
        recipe, history = self.fp8_meta["recipe"], self.fp8_meta[f"amax_history_{direction}"]
        amax = history.amax(0) if getattr(recipe, "amax_compute_algo", "max") == "max" else history[0]
        limit = recipe.fp8_format.value[direction == "bwd"]
        scale = self.fp8_meta[f"scale_{direction}"]
        new = limit / amax / 2 ** getattr(recipe, "margin", 0)
        self.fp8_meta[f"scale_{direction}"] = torch.where(amax > 0, new, scale)
        rolled = history.roll(-1, 0)
        rolled[0] = 0
        self.fp8_meta[f"amax_history_{direction}"] = rolled

    def get_extra_state(self) -> Tensor:
        if not self.fp8_meta["fp8_checkpoint"]:
            return torch.empty(0, dtype=torch.uint8)
        state: dict[str, Any] = {"recipe": self.fp8_meta["recipe"]}
        if self.fp8_meta["recipe"].delayed():
            for direction in ("fwd", "bwd"):
                for key in ("scale", "amax_history"):
                    state[f"{key}_{direction}"] = self.fp8_meta[f"{key}_{direction}"].clone()
        kinds = (bool, int, float, str, tuple, list)
        state["extra_fp8_variables"] = {k: v for k, v in self.fp8_meta.items() if isinstance(v, kinds)}
        return torch.frombuffer(bytearray(pickle.dumps(state)), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        if state.numel() == 0:
            return
        loaded = pickle.loads(state.numpy().tobytes())
        self.fp8_meta.update(loaded["extra_fp8_variables"])
        self.init_fp8_meta_tensors(loaded["recipe"])
        if loaded["recipe"].delayed():
            for direction in ("fwd", "bwd"):
                for key in ("scale", "amax_history"):
                    self.fp8_meta[f"{key}_{direction}"].copy_(loaded[f"{key}_{direction}"])


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, module: Linear) -> Tensor:
        assert_dim_for_fp8_exec(x, weight)
        x_q, w_q = module.cast(x, "fwd", 0), module.cast(weight.to(x.dtype), "fwd", 1)
        ctx.save_for_backward(x_q, w_q)
        ctx.module, ctx.shapes = module, (x.shape, weight.dtype)
        y = F.linear(x_q, w_q)
        return y + bias.to(y.dtype) if bias.numel() else y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        module = ctx.module
        x, w = ctx.saved_tensors
        assert grad.shape[-1] % 16 == 0, "cuBLAS takes FP8 matrices whose rows are a multiple of 16 bytes"
        g = module.cast(grad, "bwd", 0)
        Variable._execution_engine.queue_callback(lambda: module.update("bwd"))
        flat_g, flat_x = g.flatten(0, -2), x.flatten(0, -2)
        d_w = (flat_g.t() @ flat_x).to(ctx.shapes[1]) if ctx.needs_input_grad[1] else None
        d_b = grad.flatten(0, -2).sum(0) if ctx.needs_input_grad[2] else None
        return (g @ w).view(ctx.shapes[0]), d_w, d_b, None


class Linear(TransformerEngineBaseModule):
    def __init__(
        self,
        in_features: int,
        out_features: int,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group: Any = None,
        tp_size: int = 1,
        get_rng_state_tracker: Any = None,
        init_method: Any = None,
        bias: bool = True,
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        parameters_split: Any = None,
        device: torch.device | str = "cuda",
        ub_overlap_ag: bool = False,
        name: str | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.use_bias = in_features, out_features, bias
        dtype = params_dtype or torch.get_default_dtype()
        self.weight = nn.Parameter(torch.randn(out_features, in_features, dtype=dtype) * 0.023)
        if bias:
            self.bias: Tensor = nn.Parameter(torch.zeros(out_features, dtype=dtype))
        else:
            self.bias = torch.Tensor()

    def forward(
        self, inp: Tensor, is_first_microbatch: bool | None = None, fp8_output: bool = False, fp8_grad: bool = False
    ) -> Tensor:
        CALLS.append("fp8" if State.recipe else "plain")
        if State.recipe is None:
            return F.linear(inp, self.weight.to(inp.dtype), self.bias.to(inp.dtype) if self.use_bias else None)
        self.begin()
        y: Tensor = _Linear.apply(inp, self.weight, self.bias, self)  # type: ignore[no-untyped-call]
        return y


class LayerNorm(nn.Module):
    def __init__(
        self,
        normalized_shape: Any = None,
        eps: float = 1e-5,
        sequence_parallel: bool | None = None,
        params_dtype: torch.dtype | None = None,
        zero_centered_gamma: bool = False,
        hidden_size: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        size: Any = normalized_shape if normalized_shape is not None else hidden_size
        self.shape, self.eps = (size,) if isinstance(size, int) else tuple(size), eps
        dtype = params_dtype or torch.get_default_dtype()
        self.weight = nn.Parameter(torch.ones(self.shape, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(self.shape, dtype=dtype))

    def forward(self, inp: Tensor) -> Tensor:
        CALLS.append("norm")
        return F.layer_norm(inp, self.shape, self.weight, self.bias, self.eps)
