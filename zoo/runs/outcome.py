"""How a run ends, and who watches it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from zoo.errors import ZooError
from zoo.runs.preflight import Preflight, minutes
from zoo.runs.samples import Answer
from zoo.train.metrics import Values


class Display(Protocol):
    """Whoever watches. Only rank 0 has one that shows anything."""

    def say(self, line: str) -> None:
        """One line."""

    def preflight(self, found: Preflight) -> None:
        """What the run will do."""

    def step(self, step: int, steps: int | None, values: Values) -> None:
        """Values of a step, or of the evaluation after it."""

    def answer(self, answer: Answer) -> None:
        """What the model wrote."""


class StoppedError(ZooError):
    """A signal ended the run after its last step was saved."""

    exit_code = 75


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        trained: the adapter or model directory; ``None`` after a dry run.
        n_trained: parameters that were trained.
        best_step: the step with the lowest validation loss.
    """

    directory: Path
    ending: str
    model: str = ""
    trained: Path | None = None
    n_trained: int = 0
    step: int = 0
    val_loss: float | None = None
    best_loss: float | None = None
    best_step: int | None = None
    seconds: float = 0.0
    report: Path | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {key: str(value) if isinstance(value, Path) else value for key, value in asdict(self).items()}

    def lines(self) -> list[str]:
        """What to tell a person."""
        if self.trained is None:
            return [self.ending]
        said = [f"{self.ending}, in {minutes(self.seconds)}"]
        if self.val_loss is not None:
            said.append(
                f"validation loss {self.val_loss:.4f}; the lowest was {self.best_loss:.4f} at step {self.best_step}"
            )
        how = f"{self.model} --adapter " if self.trained.name == "adapter" else ""
        said.append(f"try it: zoo chat {how}{self.trained}")
        return [*said, f"report: {self.report}"]

    @classmethod
    def of(cls, directory: Path, values: Mapping[str, Any]) -> Outcome:
        """What `to_dict` returned."""
        paths = {key: Path(values[key]) if values[key] else None for key in ("trained", "report")}
        return cls(**{**values, **paths, "directory": directory})
