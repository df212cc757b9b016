"""Weight-only quantization: linears whose weights are small integers, and how one is made, stored and found again.

Shape letters: D_out, D_in of a linear's weight, G groups of a row, T tokens (all leading dimensions flattened).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.errors import UnavailableError
from zoo.plan.parameters import parameter_shapes
from zoo.registry import Registry
from zoo.spec import ModelSpec

Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]
"""Shape and dtype of each stored tensor of a weight."""

_CHUNK = 1 << 20
"""Values quantized at a time: bounds the float temporaries."""


@dataclass(frozen=True)
class StoredWeight:
    """A weight as a file holds it: the plain tensors of one type of layer, each with a row per output."""

    kind: type[QuantizedLinear]
    tensors: Mapping[str, Tensor]

    def dequantized(self) -> Tensor:
        """The float32 values that the integers stand for."""
        return self.kind.from_stored(self.tensors, torch.float32).dequantized()

    def in_dtype(self, dtype: torch.dtype) -> StoredWeight:
        """For inputs of ``dtype``, which decides about the dtype of scales, unless the layer has its own for them."""
        kept = {name: of for name, (_, of) in self.kind.layout((0, 0), dtype).items()}
        return StoredWeight(self.kind, {name: t.to(kept[name]) for name, t in self.tensors.items()})

    def mapped(self, rows: Callable[[Tensor], list[Tensor]]) -> list[StoredWeight]:
        """What becomes of it when a transform moves its rows."""
        parts = zip(*(rows(tensor) for tensor in self.tensors.values()), strict=True)
        return [StoredWeight(self.kind, dict(zip(self.tensors, part, strict=True))) for part in parts]


class QuantizedLinear(nn.Module, ABC):
    """A linear layer with integer weights; its bias, if any, stays a parameter."""

    bias: nn.Parameter | None
    kernel_tokens: int
    """Up to so many tokens the integer kernel is faster than unpacking the weight for a matrix product."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.in_features, self.out_features = d_in, d_out
        self.register_parameter("bias", None)

    @classmethod
    def from_float(cls, weight: Tensor, dtype: torch.dtype) -> Self:
        """Quantize a (D_out, D_in) weight for inputs of ``dtype``."""
        return cls.from_stored(cls.store(weight, dtype).tensors, dtype)

    @classmethod
    def store(cls, weight: Tensor, dtype: torch.dtype) -> StoredWeight:
        """As `from_float`, as it would be stored."""
        shape = tuple(weight.shape)
        layout = cls.layout(shape, dtype)
        tensors = {name: torch.empty(of, dtype=kept, device=weight.device) for name, (of, kept) in layout.items()}
        step = max(1, _CHUNK // shape[1])
        for rows in range(0, shape[0], step):
            chunk = slice(rows, rows + step)
            for name, part in cls.quantize(weight[chunk].float(), dtype).items():
                tensors[name][chunk] = part
        return StoredWeight(cls, tensors)

    @staticmethod
    @abstractmethod
    def layout(shape: tuple[int, ...], dtype: torch.dtype) -> Layout:
        """The plain tensors in which a weight (D_out, D_in) is stored, for inputs of ``dtype``; each has D_out rows."""

    @staticmethod
    @abstractmethod
    def quantize(weight: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """The stored tensors of a float32 weight, for inputs of ``dtype``. Row by row: no row depends on another."""

    @classmethod
    @abstractmethod
    def from_stored(cls, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Self:
        """The layer of stored tensors, for inputs of ``dtype``."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Dtype of the inputs."""

    @abstractmethod
    def dequantized(self) -> Tensor:
        """The weight that this layer multiplies with, (D_out, D_in) in the dtype of its inputs."""

    def rows(self, tokens_BT: Tensor) -> Tensor:
        """Rows of `dequantized`, (B, T, D_in): what an embedding looks up that is tied to this head."""
        return F.embedding(tokens_BT, self.dequantized())

    @abstractmethod
    def kernel(self, x_TD: Tensor) -> Tensor:
        """The product of x and the transposed weight, (T, D_out), by an integer kernel."""

    @property
    @abstractmethod
    def has_kernel(self) -> bool:
        """Whether there is an integer kernel for this device, dtype and shape."""

    def forward(self, x: Tensor) -> Tensor:
        """Maps (..., D_in) to (..., D_out)."""
        x_TD = x.reshape(-1, self.in_features)
        if self.has_kernel and x_TD.shape[0] <= self.kernel_tokens:
            y_TD = self.kernel(x_TD)
        else:
            y_TD = F.linear(x_TD, self.dequantized())
        y = y_TD.view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias


class QuantizedEmbedding(nn.Module):
    """The embedding of a model whose head is tied to it: looks rows up in the head's integers."""

    def __init__(self, head: QuantizedLinear, factor: float | None) -> None:
        super().__init__()
        self._head = [head]  # in a list, or its tensors would count twice
        self.factor = factor

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Returns (B, T, D_in) in the dtype of the head's inputs."""
        x_BTD = self._head[0].rows(tokens_BT)
        return x_BTD if self.factor is None else x_BTD * torch.tensor(self.factor, dtype=x_BTD.dtype)


class Quantizer(Protocol):
    """Which linears of a model are quantized, and how."""

    name: str

    def supports(self, device: str) -> list[str]:
        """Why it can not run on a device type, one sentence each; empty: it can."""

    def linear_type(self, role: str, d_in: int, d_out: int) -> type[QuantizedLinear] | None:
        """The layer that replaces a linear of this role (``attn.q``, ``head``); ``None`` leaves it alone."""


def quantized_weights(spec: ModelSpec, quantizer: Quantizer) -> dict[str, type[QuantizedLinear]]:
    """The type of layer for each of our weights that ``quantizer`` takes; a tied embedding is taken as the head."""
    kinds = {}
    for name, shape in parameter_shapes(spec).items():
        role = _role(name, spec)
        if role is not None and (kind := quantizer.linear_type(role, shape[1], shape[0])) is not None:
            kinds[name] = kind
    return kinds


def _role(name: str, spec: ModelSpec) -> str | None:
    """What a linear is for, by the name of its weight; ``None`` for any other parameter."""
    if name == "embed.weight":
        return "head" if spec.tie_embeddings else None
    module, _, leaf = name.rpartition(".")
    if leaf != "weight" or "norm" in module or module == "positions":
        return None
    return module.split(".", 2)[2] if module.startswith("blocks.") else module


def choose_quantizer(name: str, *, device: str, registry: Registry, fix: str = "Take int8, or none.") -> Quantizer:
    """The quantizer of that name.

    Raises:
        UnknownNameError: no quantizer has this name.
        UnavailableError: it can not run on the device.
    """
    quantizer: Quantizer = registry.load("quantizer", name)()
    if reasons := quantizer.supports(device):
        raise UnavailableError(f"quantizer {name!r} can not be used: {'; '.join(reasons)}.", fix=fix)
    return quantizer
