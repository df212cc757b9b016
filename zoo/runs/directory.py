"""A run's directory: what is in it, and whether a run may begin or go on there."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zoo.errors import InputError
from zoo.train.recipe import Recipe
from zoo.train.recipe_file import read_recipe, recipe_values, write_recipe

MAY_CHANGE = (
    "device",
    "devices",
    "num_nodes",
    "strategy",
    "micro_batch_size",
    "log_every",
    "loggers",
    "plugins",
    "keep",
)
"""Keys that change where and how a run is computed, and not what comes out but for rounding."""


@dataclass(frozen=True)
class RunDirectory:
    """Where everything of a run lies."""

    path: Path

    @property
    def recipe(self) -> Path:
        """Repeats the run."""
        return self.path / "recipe.yaml"

    @property
    def metrics(self) -> Path:
        """One JSON object a line."""
        return self.path / "metrics.jsonl"

    @property
    def samples(self) -> Path:
        """What the model wrote at each evaluation."""
        return self.path / "samples.jsonl"

    @property
    def log(self) -> Path:
        """What was said."""
        return self.path / "log.txt"

    @property
    def checkpoints(self) -> Path:
        """The store."""
        return self.path / "checkpoints"

    @property
    def result(self) -> Path:
        """What became of the run; there when it has ended."""
        return self.path / "result.json"

    def trained(self, recipe: Recipe) -> Path:
        """The directory of the adapter, or of the model where all of it was trained."""
        return self.path / ("model" if trains_all(recipe) else "adapter")

    def finished(self) -> dict[str, Any] | None:
        """The result of a run that has ended."""
        return dict(json.loads(self.result.read_text(encoding="utf-8"))) if self.result.is_file() else None

    def tokens(self, *, dry_run: bool) -> Path:
        """Where token files are made; a dry run leaves nothing in the directory."""
        return Path(tempfile.mkdtemp(prefix="zoo-")) if dry_run else self.path / "tokens"

    def check_new(self) -> None:
        """Check that a run may begin here.

        Raises:
            InputError: there is something in it.
        """
        if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            is_run = self.recipe.is_file()
            raise InputError(
                f"{self.path} {'holds a run' if is_run else 'is not empty'}.",
                fix="Go on with it by --resume, or give another --out." if is_run else "Give another --out.",
            )

    def begin(self, recipe: Recipe) -> None:
        """Make the directory. Raises as `check_new`."""
        self.check_new()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            write_recipe(recipe, self.recipe)
        except OSError as error:
            raise InputError(f"can not write {self.path}: {error.strerror}.") from None

    def check_same(self, recipe: Recipe) -> None:
        """Check that the run here is that of the recipe.

        Raises:
            InputError: there is none, or the recipe has changed; the message says in what.
        """
        before = self.read()
        if changes := _changes(before, recipe):
            raise InputError(
                f"the run in {self.path} was begun with another recipe: {'; '.join(changes)}.",
                fix="Leave these as they were, or begin a new run with another --out.",
            )

    def go_on(self, recipe: Recipe) -> None:
        """Note what has changed of the recipe. Raises as `check_same`."""
        self.check_same(recipe)
        write_recipe(recipe, self.recipe)

    def read(self) -> Recipe:
        """The recipe of the run that is here.

        Raises:
            InputError: there is none.
        """
        if not self.recipe.is_file():
            raise InputError(f"there is no run to go on with in {self.path}.", fix="Leave out --resume to begin one.")
        return read_recipe(self.recipe).finish()

    def end(self, result: Mapping[str, Any]) -> None:
        """Note that the run has ended."""
        self.result.write_text(json.dumps(dict(result), indent=2) + "\n", encoding="utf-8")


def trains_all(recipe: Recipe) -> bool:
    """Whether the whole model is trained, so that the result is a model and no adapter."""
    return recipe.adapter.use == "full"


def _changes(before: Recipe, now: Recipe) -> list[str]:
    old, new = recipe_values(before), recipe_values(now)
    return [
        f"{key} was {old[key]!r} and is {new[key]!r}" for key in old if old[key] != new[key] and key not in MAY_CHANGE
    ]
