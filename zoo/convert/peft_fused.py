"""LoRA of a module outside that holds several of our sites, as one update, which is what PEFT has for it.

Shape letters: D_out, D_in of a site or module, R rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from zoo.adapters.plans import LoRAOptions
from zoo.convert.adapter_names import OwnNames
from zoo.plan.sites import Site


def lower_rank(A: Tensor, B: Tensor, alpha: float, *, is_rslora: bool) -> tuple[Tensor, Tensor, float]:
    """The same update at the rank of the weight where a file has more: a product of larger ones is no more.

    Block-diagonal updates of fused projections can have that, and those with what PiSSA takes off.
    """
    if A.dim() > 2 or B.dim() > 2 or len(A) <= min(len(B), A.shape[1]):
        return A, B, alpha
    product = (B.double() @ A.double()).to(A.dtype)
    rank = min(product.shape)
    alpha *= (rank / len(A)) ** (0.5 if is_rslora else 1.0)
    one = torch.eye(rank, dtype=A.dtype, device=A.device)
    return (product, one, alpha) if len(B) == rank else (one, product, alpha)


@dataclass(frozen=True)
class Update:
    """What is added at a site, scaling * B A, with A (R, D_in) and B (D_out, R).

    Attributes:
        ranks: of its parts, which it holds block-diagonally; empty if its outputs are not divided.
        folded: whether B has taken in factors between the scalings of parts.
        starts: whether it holds what PiSSA takes off.
    """

    A: Tensor
    B: Tensor
    scaling: float
    ranks: tuple[int, ...] = ()
    folded: bool = False
    starts: bool = False

    @classmethod
    def of(cls, site: Site, state: Mapping[str, Tensor], options: LoRAOptions) -> Update:
        """That of a site, from an adapter's state."""
        A, B = state[f"{site.name}.lora_A"], state[f"{site.name}.lora_B"]
        if ranks := options.part_ranks(site):
            scalings = options.part_scalings(site)
            scaling = max(scalings, key=abs)
            blocks = [block * _ratio(own, scaling) for block, own in zip(B.split(ranks, dim=1), scalings, strict=True)]
            return cls(A, torch.block_diag(*blocks), scaling, ranks, folded=len({*scalings} - {0.0}) > 1)
        if (A0 := state.get(f"{site.name}.lora_A0")) is not None:
            stacked = torch.cat([A, A0]), torch.cat([B, -state[f"{site.name}.lora_B0"]], dim=1)
            return cls(*stacked, options.scaling(site), starts=True)
        return cls(A, B, options.scaling(site))


def _ratio(scaling: float, common: float) -> float:
    return 1.0 if scaling == common else scaling / common  # both are 0 with an alpha of 0


class Fused:
    """The updates of the sites that one module outside holds; ``None`` where a site has none."""

    def __init__(self, names: OwnNames, module: str, updates: Sequence[Update | None]) -> None:
        self._names, self._module, self._updates = names, module, updates
        self._given = [update for update in updates if update is not None]
        self.scaling = max((update.scaling for update in self._given), key=abs)
        self._As: list[Tensor] = []
        for update in self._given:
            if not any(torch.equal(update.A, A) for A in self._As):
                self._As.append(update.A)

    def matrices(self) -> tuple[Tensor, Tensor]:
        """A (R, D_in) and B (D_out, R) of the module."""
        if len(self._updates) == 1:
            return self._given[0].A, self._given[0].B
        rows = []
        for i, update in enumerate(self._updates):
            if update is None:
                rows.append(self._As[0].new_zeros(self._names.outputs(self._module)[i], self._rank))
                continue
            B = update.B * _ratio(update.scaling, self.scaling)
            columns = [B if torch.equal(update.A, A) else B.new_zeros(len(B), len(A)) for A in self._As]
            rows.append(torch.cat(columns, dim=1))
        return torch.cat(self._As), self._names.merge(self._module, rows)

    @property
    def _rank(self) -> int:
        return sum(map(len, self._As))

    def notes(self) -> list[str]:
        """What a reader should know."""
        said = []
        if len(self._As) > 1:
            said.append(f"{len(self._given)} updates written as one of rank {self._rank}")
        said += [f"parts of ranks {u.ranks} written as one update of rank {len(u.A)}" for u in self._given if u.ranks]
        if any(update.folded or update.scaling != self.scaling for update in self._given):
            said.append(f"their different scaling is in B, beside one of {self.scaling:g}")
        if any(update.starts for update in self._given):
            said.append("with what PiSSA takes off the weight, a plain LoRA of twice the rank")
        return [f"{self._module}: {'; '.join(said)}"] if said else []
