"""Loggers for other tools' dashboards, through Lightning's own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zoo.train.metrics import Values


@dataclass(frozen=True)
class TensorBoardOptions:
    """Where the event files go."""

    name: str = "tensorboard"
    """A directory inside the run's."""


@dataclass(frozen=True)
class WandbOptions:
    """What Weights & Biases calls the run."""

    project: str = "zoo"
    name: str | None = None
    offline: bool = False


class TensorBoard:
    """``tensorboard --logdir RUN`` shows the curves."""

    def __init__(self, run: Path, recipe: dict[str, Any], options: TensorBoardOptions) -> None:
        from lightning.fabric.loggers import TensorBoardLogger

        self._logger = TensorBoardLogger(run, name=options.name, version="")

    def log(self, step: int, values: Values) -> None:
        """Add the numbers of a step."""
        numbers = {key: value for key, value in values.items() if not isinstance(value, str)}
        self._logger.log_metrics(numbers, step)

    def finish(self) -> None:
        """Write what is left."""
        self._logger.finalize("success")


class Wandb:
    """Weights & Biases."""

    def __init__(self, run: Path, recipe: dict[str, Any], options: WandbOptions) -> None:
        import wandb

        mode = "offline" if options.offline else "online"
        name = options.name or run.name
        self._run = wandb.init(project=options.project, name=name, dir=str(run), config=recipe, mode=mode)

    def log(self, step: int, values: Values) -> None:
        """Add the values of a step."""
        self._run.log(dict(values), step=step)

    def finish(self) -> None:
        """Upload what is left."""
        self._run.finish()
