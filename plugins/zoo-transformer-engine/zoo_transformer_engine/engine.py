"""TransformerEngine's layers inside of torch's: what a model, an adapter or an optimizer sees is still a linear.

Shape letters: T tokens, D_in, D_out of a linear.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.errors import InputError
from zoo.precision.base import Precision
from zoo_transformer_engine.install import load_engine
from zoo_transformer_engine.layers import Chosen, choose_linears, grouped, replace_modules
from zoo_transformer_engine.options import EngineOptions

_HEAD = "head"
"""Of zoo's decoder. Its loss is computed in parts, each a second time for the gradients."""


@dataclass(frozen=True, kw_only=True)
class TransformerEngine(Precision):
    """FP8 in training; evaluation computes in the dtype of the weights, as the saved model will."""

    options: EngineOptions = field(default_factory=EngineOptions)

    def supports(self, device: str) -> list[str]:
        """GPUs that have what the recipe needs."""
        if device != "cuda":
            return [f"TransformerEngine runs on cuda, not on {device}; --precision fp8-emulated runs anywhere"]
        reason = load_engine().why_not(self.options)
        return [f"this GPU has no {self.options.scaling} FP8 ({reason})"] if reason else []

    def convert(self, model: nn.Module) -> EngineLayers:
        """Every linear that is not skipped, and layer norms; the parameters stay the objects that they are."""
        engine, options = load_engine(), self.options
        chosen = choose_linears(model, replace(options, skip=(_HEAD, *options.skip)))
        norms = _choose_norms(model, options)

        def make(name: str, old: nn.Module) -> nn.Module:
            if isinstance(old, nn.Linear):
                return EngineLinear(old, engine.pytorch, options.multiple)
            assert isinstance(old, nn.LayerNorm)
            return EngineLayerNorm(old, engine.pytorch)

        replace_modules(model, make, [*chosen.linears, *norms.taken])
        layers = {name: model.get_submodule(name) for name in chosen.linears}
        return EngineLayers(chosen, norms, options, layers)

    def context(self) -> AbstractContextManager[None]:
        """TransformerEngine's autocast, with the recipe."""
        return load_engine().autocast(_recipe(self.options))


@cache
def _recipe(options: EngineOptions) -> Any:
    return load_engine().make_recipe(options)


@dataclass(frozen=True)
class Norms:
    """The layer norms of a model: the names of those that TransformerEngine takes, and of the others with a reason."""

    taken: tuple[str, ...]
    skipped: Mapping[str, str]


def _choose_norms(model: nn.Module, options: EngineOptions) -> Norms:
    taken, skipped = [], {}
    for name, module in model.named_modules():
        if not options.layer_norm or type(module) is not nn.LayerNorm:
            continue
        if len(module.normalized_shape) > 1 or module.weight is None or module.bias is None:
            skipped[name] = "TransformerEngine's has one dimension, a weight and a bias"
        else:
            taken.append(name)
    return Norms(tuple(taken), skipped)


@dataclass(frozen=True)
class EngineLayers:
    """The layers of a model that TransformerEngine computes."""

    chosen: Chosen
    norms: Norms
    options: EngineOptions
    layers: Mapping[str, nn.Module]

    def describe(self) -> str:
        """As `zoo.precision.base.Converted.describe`."""
        norms = [f"{len(self.norms.taken)} layer norms are TransformerEngine's"] if self.norms.taken else []
        return "; ".join([self.chosen.describe(self.options), *norms, *grouped(self.norms.skipped)])

    def state_dict(self) -> dict[str, Any]:
        """What TransformerEngine keeps for each layer as ``_extra_state``, as tensors and numbers: no pickle."""
        return {"layers": {name: _unpacked(_core(layer).get_extra_state()) for name, layer in self.layers.items()}}

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        """Take it back.

        Raises:
            InputError: it is of other layers.
        """
        stored = state.get("layers")
        if not isinstance(stored, Mapping) or list(stored) != list(self.layers):
            raise InputError("the factors of FP8 that were saved are those of other layers.")
        for name, layer in self.layers.items():
            if stored[name] is not None:
                _core(layer).set_extra_state(_packed(stored[name], _recipe(self.options)))


def _unpacked(extra: Tensor) -> dict[str, Any] | None:
    """TransformerEngine pickles into a tensor of bytes. These it has made just now, so that unpickling is safe."""
    if extra.numel() == 0:
        return None
    found: dict[str, Any] = pickle.loads(extra.cpu().numpy().tobytes())
    return {key: value for key, value in found.items() if key != "recipe"}


def _packed(state: Mapping[str, Any], recipe: Any) -> Tensor:
    return torch.frombuffer(bytearray(pickle.dumps({"recipe": recipe, **state})), dtype=torch.uint8)


def _core(layer: nn.Module) -> Any:
    return layer.__dict__["core"]


class EngineLinear(nn.Linear):
    """A linear that has TransformerEngine's compute in training, with its own parameters.

    Tokens are filled up with zeros to the multiple that the kernels take: these change no factor and no gradient.

    Args:
        linear: whose parameters it takes.
        pytorch: TransformerEngine's module.
        multiple: of tokens.
    """

    def __init__(self, linear: nn.Linear, pytorch: Any, multiple: int) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight = linear.weight
        self.register_parameter("bias", linear.bias)
        core = pytorch.Linear(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            params_dtype=linear.weight.dtype,
            device=linear.weight.device,
        )
        self.__dict__["core"] = core  # no submodule: its parameters would be named twice
        self.multiple = multiple
        self.train(linear.training)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - as torch calls it
        """Maps (..., D_in) to (..., D_out)."""
        if not self.training:
            return super().forward(input)
        x_TD = input.reshape(-1, self.in_features)
        n_tokens = x_TD.shape[0]
        y_TF: Tensor = _with_parameters(self)(F.pad(x_TD, (0, 0, 0, -n_tokens % self.multiple)))
        return y_TF[:n_tokens].view(*input.shape[:-1], self.out_features)


class EngineLayerNorm(nn.LayerNorm):
    """A layer norm that has TransformerEngine's compute in training, with its own parameters."""

    def __init__(self, norm: nn.LayerNorm, pytorch: Any) -> None:
        super().__init__(norm.normalized_shape, norm.eps, device="meta")
        self.weight, self.bias = norm.weight, norm.bias
        self.__dict__["core"] = pytorch.LayerNorm(
            norm.normalized_shape[0], eps=norm.eps, params_dtype=norm.weight.dtype, device=norm.weight.device
        )
        self.train(norm.training)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - as torch calls it
        """Normalizes the last dimension."""
        return _with_parameters(self)(input) if self.training else super().forward(input)


def _with_parameters(layer: nn.Module) -> Any:
    """TransformerEngine's layer with the parameters that this one has now: sharding puts others in their place."""
    core = _core(layer)
    core._parameters.update({name: p for name, p in layer._parameters.items() if p is not None})
    core.training = True
    return core
