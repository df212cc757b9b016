"""Which steps a store keeps."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from zoo.errors import InputError
from zoo.store.layout import Step


@dataclass(frozen=True)
class Best:
    """What makes a step the best one."""

    metric: str
    sign: int
    """1 if the smallest value is best, -1 if the largest."""

    @classmethod
    def parse(cls, text: str) -> Best:
        """Read ``"val_loss"``, ``"val_loss:min"`` or ``"accuracy:max"``.

        Raises:
            InputError: it is none of these.
        """
        metric, _, mode = text.partition(":")
        if not metric or mode not in ("", "min", "max"):
            raise InputError(f"keep_best={text!r} is no metric.", fix='Examples: "val_loss", "accuracy:max".')
        return cls(metric, -1 if mode == "max" else 1)

    def ranked(self, steps: Sequence[Step]) -> list[Step]:
        """The steps that have this metric, best first; of equal ones the earliest."""
        measured = [step for step in steps if math.isfinite(step.metrics.get(self.metric, math.nan))]
        return sorted(measured, key=lambda step: self.sign * step.metrics[self.metric])


def expendable(
    steps: Sequence[Step], keep: int | None, best: Best | None = None, needed: Collection[int] = ()
) -> list[Step]:
    """What may be deleted of these steps, which come oldest save first.

    Args:
        keep: how many of the newest stay; None for all.
        best: the best by this stays.
        needed: step numbers that stay in any case, such as the one that was loaded.

    The newest step with finite parameters stays too: a run that has diverged goes on saving.
    """
    if keep is None:
        return []
    kept = {step.step for step in steps[-keep:]} | set(needed)
    kept |= {step.step for step in [s for s in steps if not s.manifest.not_finite][-1:]}
    if best is not None:
        kept |= {step.step for step in best.ranked(steps)[:1]}
    return [step for step in steps if step.step not in kept]
