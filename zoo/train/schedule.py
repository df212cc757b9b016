"""Learning rates by step. A schedule is a pure function of the step: there is no state to save."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, Literal, Protocol

from zoo.errors import InputError, UnknownNameError


class Shape(Protocol):
    """How the rate falls after the warm-up."""

    def __call__(self, progress: float) -> float:
        """From 1 at progress 0 to 0 at progress 1."""


@dataclass(frozen=True)
class Cosine:
    """Half a cosine (arXiv 1608.03983)."""

    def __call__(self, progress: float) -> float:
        """See `Shape`."""
        return 0.5 * (1.0 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class Linear:
    """A straight line."""

    def __call__(self, progress: float) -> float:
        """See `Shape`."""
        return 1.0 - progress


@dataclass(frozen=True)
class Constant:
    """The same to the end."""

    def __call__(self, progress: float) -> float:
        """See `Shape`."""
        return 1.0


@dataclass(frozen=True)
class WSD:
    """Warm-up, stable, decay (arXiv 2404.06395): constant, then down in the last part of the run.

    Attributes:
        decay_ratio: that part of the steps after the warm-up.
        decay: ``sqrt`` is one minus the square root of the progress, the best of those compared in arXiv 2405.18392.
    """

    decay_ratio: float = 0.2
    decay: Literal["sqrt", "linear", "cosine"] = "sqrt"

    def __post_init__(self) -> None:
        if not 0 < self.decay_ratio <= 1:
            raise InputError(f"schedule wsd: decay_ratio must be above 0 and at most 1, not {self.decay_ratio!r}.")
        if self.decay not in ("sqrt", "linear", "cosine"):
            raise InputError(f"schedule wsd: decay must be sqrt, linear or cosine, not {self.decay!r}.")

    def __call__(self, progress: float) -> float:
        """See `Shape`."""
        decayed = (progress - (1.0 - self.decay_ratio)) / self.decay_ratio
        if decayed <= 0:
            return 1.0
        if self.decay == "sqrt":
            return 1.0 - math.sqrt(decayed)
        return Linear()(decayed) if self.decay == "linear" else Cosine()(decayed)


SHAPES: dict[str, type[Any]] = {"cosine": Cosine, "linear": Linear, "constant": Constant, "wsd": WSD}


@dataclass(frozen=True)
class Schedule:
    """The learning rate of each step, counted from 0.

    The warm-up ends at step ``warmup_steps``, the first with the whole rate; no step is wasted on a rate of zero, the
    first and the last included (unless ``total_steps`` is over).

    Attributes:
        lr: the highest rate.
        min_lr: the rate at the end of the decay.
    """

    shape: Shape
    lr: float
    total_steps: int
    warmup_steps: int = 0
    min_lr: float = 0.0

    def __call__(self, step: int) -> float:
        """The learning rate of a step; after the last one, the lowest."""
        if step < self.warmup_steps:
            return self.lr * (step + 1) / (self.warmup_steps + 1)
        progress = min(1.0, (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps))
        return self.min_lr + (self.lr - self.min_lr) * self.shape(progress)


def build_schedule(
    name: str,
    options: dict[str, Any] | None = None,
    *,
    lr: float,
    total_steps: int,
    warmup_steps: int = 0,
    min_lr_ratio: float = 0.0,
) -> Schedule:
    """The schedule of that name.

    Raises:
        UnknownNameError: the name or an option is unknown.
        InputError: an option is out of range, or the warm-up takes the whole run.
    """
    options = options or {}
    if name not in SHAPES:
        raise UnknownNameError("schedule", name, SHAPES)
    shape = SHAPES[name]
    for option in options:
        if option not in (known := [field.name for field in fields(shape)]):
            raise UnknownNameError(f"option of schedule {name}", option, known)
    if total_steps < 1:
        raise InputError(f"a run of {total_steps} steps has no schedule.", fix="Give at least one step.")
    if not 0 <= warmup_steps < total_steps:
        raise InputError(
            f"warmup_steps must be at least 0 and below the {total_steps} steps of the run, not {warmup_steps}.",
            fix="Warm up for fewer steps, or train for more.",
        )
    return Schedule(shape(**options), lr, total_steps, warmup_steps, lr * min_lr_ratio)
