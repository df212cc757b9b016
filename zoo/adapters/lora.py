"""LoRA (arXiv 2106.09685), with rank-stabilized scaling (2312.03732), DoRA (2402.09353) and PiSSA (2404.02948).

Shape letters: D_in, D_out of a site, R rank, L equal parts of its outputs, V vocabulary, D model width.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.adapters.base import Adapter, Part
from zoo.adapters.plans import LoRAOptions
from zoo.adapters.weights import device_of, weight_of
from zoo.plan.sites import AdapterPlan, Addition


class LoRA(Adapter):
    """W becomes W + scaling * B A, with A (R, D_in) and B (D_out, R); W is frozen."""

    options_type: ClassVar[type] = LoRAOptions
    options: LoRAOptions

    def part(self, addition: Addition, base: nn.Module) -> Part:
        """Makes A and B in float32 on the device of the base."""
        linear = PiSSALinear if self.options.init == "pissa" else LoRALinear
        kinds: dict[str, Callable[[Addition, nn.Module, LoRAOptions], LoRAPart]]
        kinds = {"linear": linear, "embedding": LoRAEmbedding, "conv": LoRAConv}
        kind = LoRAOfParts if self.options.part_ranks(addition.site) else kinds[addition.site.kind]
        part = kind(addition, base, self.options)
        part.reset(base, self.options)
        return part

    def unmergeable(self, plan: AdapterPlan) -> list[str]:
        """One side of tied weights can not take an update that the other lacks."""
        tied = [addition.site.name for addition in plan.additions if addition.site.tied]
        return [f"{name} shares its weight with another module, which an update would change too" for name in tied]


class LoRAPart(Part):
    """A and B of one site."""

    lora_A: nn.Parameter
    lora_B: nn.Parameter

    def __init__(self, addition: Addition, base: nn.Module, options: LoRAOptions) -> None:
        super().__init__()
        for name, shape in addition.shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, device=device_of(base))))
        self.scaling = options.scaling(addition.site)
        self.dropout: nn.Module = nn.Dropout(options.dropout) if options.dropout else nn.Identity()

    def reset(self, base: nn.Module, options: LoRAOptions) -> None:
        """As before training: B A is zero. An A that is another site's is not here yet."""
        nn.init.zeros_(self.lora_B)
        if "lora_A" in self._parameters:
            _start(self.lora_A, options)

    @abstractmethod
    def update(self) -> Tensor:
        """Scaling * B A, in the shape of the weight, float32."""

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight.float() + self.update(), bias


def _start(A: Tensor, options: LoRAOptions) -> None:
    if options.init == "gaussian":
        nn.init.normal_(A, std=1 / A.shape[0])
    else:
        nn.init.kaiming_uniform_(A.view(A.shape[0], -1), a=math.sqrt(5))


class LoRALinear(LoRAPart):
    """LoRA of a linear."""

    lora_magnitude: nn.Parameter

    def reset(self, base: nn.Module, options: LoRAOptions) -> None:
        super().reset(base, options)
        if options.dora:
            self.lora_magnitude.data = weight_of(base).norm(dim=1)

    def update(self) -> Tensor:
        return self.scaling * self.lora_B.float() @ self.lora_A.float()

    def after(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        if "lora_magnitude" not in self._parameters:
            delta = through(through(self.dropout(x), self.lora_A) * self.scaling, self.lora_B)
            return y + delta.to(y.dtype)
        delta = F.linear(project(self.dropout(x), self.lora_A) * self.scaling, self.lora_B)
        bias = getattr(base, "bias", None)
        product = y if bias is None else y - bias
        norm = (weight_of(base) + self.update()).norm(dim=1).detach()
        return ((product + delta) * (self.lora_magnitude / norm)).to(y.dtype) + (0 if bias is None else bias)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        merged, bias = super().merged(weight, bias)
        if "lora_magnitude" in self._parameters:
            merged = merged * (self.lora_magnitude / merged.norm(dim=1))[:, None]
        return merged, bias


class PiSSALinear(LoRALinear):
    """LoRA that starts as the R principal singular triples of the weight, A0 (R, D_in) and B0 (D_out, R).

    PiSSA takes them off the weight and trains them: W - scaling * B0 A0 + scaling * B A. Here the weight stays as it
    is, and the same function is computed as W + scaling * (B A - B0 A0). A0 and B0 are not trained.

    They are in the state all the same: computed anew from the same weight they are others. The signs of singular
    vectors are free, vectors of close singular values turn by far more than rounding, and B0 A0 with them; and the
    weight itself may have another precision by then. With them, a state holds on any copy of the weights.
    """

    lora_A0: Tensor
    lora_B0: Tensor

    def __init__(self, addition: Addition, base: nn.Module, options: LoRAOptions) -> None:
        super().__init__(addition, base, options)
        self.register_buffer("lora_A0", torch.empty_like(self.lora_A, requires_grad=False))
        self.register_buffer("lora_B0", torch.empty_like(self.lora_B, requires_grad=False))

    def reset(self, base: nn.Module, options: LoRAOptions) -> None:
        U, S, Vh = torch.linalg.svd(weight_of(base), full_matrices=False)
        rank = self.lora_A.shape[0]
        roots = (S[:rank] / self.scaling).sqrt()
        with torch.no_grad():
            for A in (self.lora_A, self.lora_A0):
                A.copy_(roots[:, None] * Vh[:rank])
            for B in (self.lora_B, self.lora_B0):
                B.copy_(U[:, :rank] * roots)

    def update(self) -> Tensor:
        return super().update() - self.scaling * self.lora_B0.float() @ self.lora_A0.float()

    def after(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        trained = F.linear(project(self.dropout(x), self.lora_A) * self.scaling, self.lora_B)
        start = F.linear(project(x, self.lora_A0) * self.scaling, self.lora_B0)  # of the weight: without dropout
        return y + (trained - start).to(y.dtype)


class LoRAOfParts(LoRAPart):
    """LoRA of L equal parts of a linear's outputs, some of which may have none.

    Part i has R_i rows of A (R_1 + ... + R_L, D_in), as many columns of B (D_out / L, R_1 + ... + R_L), and a scaling
    for that rank.
    """

    def __init__(self, addition: Addition, base: nn.Module, options: LoRAOptions) -> None:
        super().__init__(addition, base, options)
        self.ranks, self.scalings = options.part_ranks(addition.site), options.part_scalings(addition.site)

    def reset(self, base: nn.Module, options: LoRAOptions) -> None:
        nn.init.zeros_(self.lora_B)
        for A in self.lora_A.detach().split([rank for rank in self.ranks if rank]):
            _start(A, options)

    def update(self) -> Tensor:
        As, Bs = self.lora_A.float().split(self.ranks), self.lora_B.float().split(self.ranks, dim=1)
        return torch.cat([scaling * B @ A for A, B, scaling in zip(As, Bs, self.scalings, strict=True)])

    def after(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        projected = through(self.dropout(x), self.lora_A).split(self.ranks, dim=-1)
        parts = list(y.chunk(len(self.ranks), dim=-1))
        for i, B in enumerate(self.lora_B.split(self.ranks, dim=1)):
            if self.ranks[i]:
                parts[i] = parts[i] + through(projected[i] * self.scalings[i], B).to(y.dtype)
        return torch.cat(parts, dim=-1)


class LoRAEmbedding(LoRAPart):
    """LoRA of an embedding (V, D), with A (R, V) and B (D, R); A is zero before training, as in PEFT."""

    def reset(self, base: nn.Module, options: LoRAOptions) -> None:
        nn.init.zeros_(self.lora_A)
        nn.init.normal_(self.lora_B)

    def update(self) -> Tensor:
        return self.scaling * (self.lora_B.float() @ self.lora_A.float()).T

    def after(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        embedding: Any = base
        rows = F.embedding(x, self.lora_A.T, padding_idx=embedding.padding_idx) @ self.lora_B.T
        return y + (rows * self.scaling).to(y.dtype)


class LoRAConv(LoRAPart):
    """LoRA of a convolution, of any groups: the update is computed and applied as one."""

    def update(self) -> Tensor:
        A, B = self.lora_A.float(), self.lora_B.float()
        return self.scaling * (B.flatten(1) @ A.flatten(1)).unflatten(1, A.shape[1:])

    def after(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        conv: Any = base
        delta = conv._conv_forward(self.dropout(x).to(self.lora_A.dtype), self.update(), None)
        return y + delta.to(y.dtype)


def through(x: Tensor, weight: Tensor) -> Tensor:
    """The product of x and a transposed float32 A or B, in the dtype of x: no copies of x in another one.

    In bfloat16 its error is small against that of rounding the site's result. A CPU takes two fifths of the time.
    """
    return F.linear(x, weight.to(x.dtype))


def project(x: Tensor, A: Tensor) -> Tensor:
    """X A^T in A's dtype, for what is scaled or subtracted yet. Keeps x for the backward pass, and no copy of it."""
    if x.dtype == A.dtype:
        return F.linear(x, A)
    projected: Tensor = _MixedProjection.apply(x, A)  # type: ignore[no-untyped-call]
    return projected


class _MixedProjection(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, A: Tensor) -> Tensor:
        ctx.save_for_backward(x, A)
        return F.linear(x.to(A.dtype), A)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, A = ctx.saved_tensors
        grad_x = (grad @ A).to(x.dtype) if ctx.needs_input_grad[0] else None
        grad_A = grad.flatten(0, -2).T @ x.flatten(0, -2).to(A.dtype) if ctx.needs_input_grad[1] else None
        return grad_x, grad_A
