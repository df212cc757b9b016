"""What shows and records the values of a run."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

from zoo.errors import InputError, UnknownNameError
from zoo.registry import Registry, import_target
from zoo.runs.outcome import Display
from zoo.train.metrics import Logger, Loggers, Values
from zoo.train.recipe import Recipe, Use
from zoo.train.recipe_file import recipe_values


class Watched:
    """Loggers, and whoever watches."""

    def __init__(self, loggers: Loggers, display: Display, steps: int | None) -> None:
        self._loggers, self._display, self._steps = loggers, display, steps

    def log(self, step: int, values: Values) -> None:
        """Hand values to all."""
        self._loggers.log(step, values)
        self._display.step(step, self._steps, values)

    def finish(self) -> None:
        """The run has ended."""
        self._loggers.finish()


def make_logger(use: Use, run: Path, recipe: Recipe, registry: Registry) -> Logger:
    """The logger that a recipe names.

    Raises:
        UnknownNameError: it, or an option of it, is unknown.
        UnavailableError: it can not be used here.
        InputError: it takes no options.
    """
    component = registry.find("logger", use.use)
    make = registry.load("logger", use.use)
    arguments = [run, recipe_values(recipe)]
    if component.options is None:
        if use.options:
            raise InputError(f"the logger {use.use!r} takes no options.")
    else:
        kind = import_target(replace(component, target=component.options))
        known = [field.name for field in fields(kind)]
        for option in use.options:
            if option not in known:
                raise UnknownNameError(f"option of logger {use.use!r}", option, known)
        arguments.append(kind(**use.options))
    logger: Logger = make(*arguments)
    return logger
