"""Its options."""

from collections.abc import Sequence
from dataclasses import dataclass

from zoo.plan.sites import AdapterPlan, Addition, Site


@dataclass(frozen=True)
class Options:
    role: str = "attn.q"

    def plan(self, sites: Sequence[Site]) -> AdapterPlan:
        return AdapterPlan(tuple(Addition(s, {"shift": s.shape[:1]}) for s in sites if s.role == self.role))
