"""Loggers with one thing wrong."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch


class Good:
    """Lines of JSON."""

    def __init__(self, run: Path, recipe: dict[str, Any]) -> None:
        self.path = run / "mutant.jsonl"
        self.path.write_text("")

    def log(self, step: int, values: Any) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **{k: str(v) for k, v in values.items()}}) + "\n")

    def finish(self) -> None:
        pass


class Kills(Good):
    """Ends the process when it can not write."""

    def log(self, step: int, values: Any) -> None:
        try:
            super().log(step, values)
        except OSError:
            sys.exit("the disk is full")


class TakesNumbersOnly(Good):
    def log(self, step: int, values: Any) -> None:
        super().log(step, {name: int(1000 * value) / 1000 for name, value in values.items()})


class Prints(Good):
    def log(self, step: int, values: Any) -> None:
        print(step, values)  # noqa: T201 - that is what is wrong with it


class Changes(Good):
    def log(self, step: int, values: Any) -> None:
        values["step"] = step
        super().log(step, values)


class Draws(Good):
    def log(self, step: int, values: Any) -> None:
        if torch.rand(()) < 2:
            super().log(step, values)


class Elsewhere(Good):
    def __init__(self, run: Path, recipe: dict[str, Any]) -> None:
        super().__init__(run, recipe)
        self.path = run.parent / "mutant.jsonl"


class Drops(Good):
    """Every second value."""

    def log(self, step: int, values: Any) -> None:
        if step % 2:
            super().log(step, values)


class LosesTheLast(Good):
    """Writes at the end, and not what came last."""

    def __init__(self, run: Path, recipe: dict[str, Any]) -> None:
        super().__init__(run, recipe)
        self.held: list[tuple[int, dict[str, Any]]] = []

    def log(self, step: int, values: Any) -> None:
        self.held.append((step, dict(values)))

    def finish(self) -> None:
        for step, values in self.held[:-1]:
            super().log(step, values)
