"""How far a run is, and when it ends."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

from zoo.errors import InputError
from zoo.train.recipe import Recipe


@dataclass
class Progress:
    """What the loop remembers from step to step; a checkpoint holds it."""

    step: int = 0
    """Optimizer steps taken."""
    tokens: int = 0
    """Tokens that the model has seen, on all ranks, padding not counted."""
    seconds: float = 0.0
    """Time of training, evaluation and saving included."""
    best_loss: float = math.inf
    best_step: int = 0
    evaluations_since_best: int = 0

    def state_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it back."""
        for field in fields(self):
            setattr(self, field.name, state[field.name])

    def evaluated(self, loss: float) -> bool:
        """Note a validation loss; whether it is the best so far."""
        if loss < self.best_loss:
            self.best_loss, self.best_step, self.evaluations_since_best = loss, self.step, 0
            return True
        self.evaluations_since_best += 1
        return False


@dataclass(frozen=True)
class Limits:
    """When a run ends: whatever comes first. ``None`` never does."""

    steps: int | None
    """From ``max_steps``, ``epochs`` and ``max_tokens`` together, where these can be told in steps."""
    tokens: int | None = None
    seconds: float | None = None
    patience: int | None = None

    def reached(self, progress: Progress) -> str | None:
        """Why the run is over, or ``None``."""
        if self.steps is not None and progress.step >= self.steps:
            return f"all {self.steps} steps are done"
        if self.tokens is not None and progress.tokens >= self.tokens:
            return f"{progress.tokens:,} tokens are done"
        if self.seconds is not None and progress.seconds >= self.seconds:
            return f"{progress.seconds / 60:.1f} minutes are over"
        if self.patience is not None and progress.evaluations_since_best >= self.patience:
            return (
                f"the validation loss has not improved in {self.patience} evaluations, since step {progress.best_step}"
            )
        return None


DEFAULT_EPOCHS = 3.0
"""Of finetuning, where nothing says when it ends."""


def limits_of(recipe: Recipe, steps_per_epoch: int) -> Limits:
    """When the run of a recipe ends, on data of so many steps per epoch.

    Raises:
        InputError: the schedule needs to know the number of steps, and only the time is limited.
    """
    limited = recipe.max_steps or recipe.epochs or recipe.max_tokens or recipe.max_minutes
    epochs = recipe.epochs if limited else DEFAULT_EPOCHS
    counts = [recipe.max_steps, None if epochs is None else max(1, math.ceil(epochs * steps_per_epoch - 1e-9))]
    known = [count for count in counts if count is not None]
    if not known and recipe.max_tokens is None and recipe.schedule.use != "constant":
        raise InputError(
            f"the schedule {recipe.schedule.use!r} falls towards the last step, which max_minutes does not tell.",
            fix="Give max_steps or epochs as well, or --set schedule=constant.",
        )
    return Limits(
        steps=min(known) if known else None,
        tokens=recipe.max_tokens,
        seconds=None if recipe.max_minutes is None else recipe.max_minutes * 60,
        patience=recipe.patience,
    )
