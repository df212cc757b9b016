"""The options of VeRA, and what it would do to a model: arithmetic over sites, without torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from zoo.errors import InputError
from zoo.plan.sites import ALL_LINEAR, AdapterPlan, Addition, Kind, Site, choose_sites


@dataclass(frozen=True)
class VeRAOptions:
    """Options of VeRA (arXiv 2310.11454).

    Attributes:
        r: rank of the random matrices.
        targets: linears, by role, name or glob.
        seed: what the random matrices are drawn from; they are not stored.
        d_init: what the inner factors start with.
    """

    kinds: ClassVar[tuple[Kind, ...]] = ("linear",)
    r: int = 256
    targets: tuple[str, ...] = (ALL_LINEAR,)
    seed: int = 0
    d_init: float = 0.1

    def plan(self, sites: Sequence[Site]) -> AdapterPlan:
        """Two vectors at each target.

        Raises:
            InputError: the rank is not positive, or a target names no linear.
        """
        if self.r < 1:
            raise InputError(f"a rank of {self.r} is out of range: it is at least 1.")
        chosen = choose_sites(sites, self.targets, self.kinds)
        return AdapterPlan(tuple(Addition(s, {"vera_d": (self.r,), "vera_b": s.shape[:1]}) for s in chosen))
