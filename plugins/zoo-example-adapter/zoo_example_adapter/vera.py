"""VeRA (Kopiczko et al. 2023, arXiv 2310.11454): factors on random matrices, which linears of one shape share.

Shape letters: D_in, D_out of a linear, R rank.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.adapters.base import Adapter, Part
from zoo.adapters.weights import device_of
from zoo.plan.sites import AdapterPlan, Addition
from zoo_example_adapter.options import VeRAOptions


class VeRA(Adapter):
    """W becomes W + diag(b) B diag(d) A; only d (R) and b (D_out) are trained."""

    options_type: ClassVar[type] = VeRAOptions
    options: VeRAOptions

    def __init__(self, options: Any, name: str = "") -> None:
        super().__init__(options, name)
        self._drawn: dict[tuple[tuple[int, ...], torch.device], tuple[Tensor, Tensor]] = {}

    def part(self, addition: Addition, base: nn.Module) -> Part:
        """Factors in float32 on the device of the base: b is zero."""
        return VeRAPart(addition, *self._random(addition.site.shape, device_of(base)), d_init=self.options.d_init)

    def unmergeable(self, plan: AdapterPlan) -> list[str]:
        """A head that is also the embedding has to stay as it is."""
        names = [addition.site.name for addition in plan.additions if addition.site.tied]
        return [f"the weight of {name} is used by another module too, which merging would change" for name in names]

    def _random(self, shape: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
        """A (R, D_in) and B (D_out, R): the same for one seed and shape, whatever the device."""
        if (shape, device) not in self._drawn:
            generator = torch.Generator().manual_seed(self.options.seed)
            matrices = [
                torch.empty(size, device="cpu") for size in ((self.options.r, shape[1]), (shape[0], self.options.r))
            ]
            A, B = (nn.init.kaiming_uniform_(matrix, generator=generator).to(device) for matrix in matrices)
            self._drawn[shape, device] = A, B
        return self._drawn[shape, device]


class VeRAPart(Part):
    """d and b of one linear."""

    A: Tensor
    B: Tensor

    def __init__(self, addition: Addition, A: Tensor, B: Tensor, *, d_init: float) -> None:
        super().__init__()
        self.register_buffer("A", A, persistent=False)
        self.register_buffer("B", B, persistent=False)
        self.vera_d = nn.Parameter(torch.full(addition.shapes["vera_d"], d_init, device=A.device))
        self.vera_b = nn.Parameter(torch.zeros(addition.shapes["vera_b"], device=A.device))

    def after(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        """The result of the linear with the update's added, computed in the dtype of the factors."""
        inner = F.linear(x.to(self.A.dtype), self.A) * self.vera_d
        return y + (F.linear(inner, self.B) * self.vera_b).to(y.dtype)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The weight with the update added."""
        return weight + (self.vera_b[:, None] * self.B) @ (self.vera_d[:, None] * self.A), bias
