"""What a run measures: ``metrics.jsonl``, always, and the loggers that the recipe names."""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from zoo.errors import FileFormatError

Values = Mapping[str, float | int | str]

MEASURED = ("seconds", "tokens_per_second", "peak_memory")
"""Keys that differ from run to run; all others are the same when a run is repeated or resumed."""


class Logger(Protocol):
    """Where metrics go besides the file. Made with the run's directory and the recipe, and options of its own."""

    def log(self, step: int, values: Values) -> None:
        """Values of an optimizer step, or of the evaluation after it."""

    def finish(self) -> None:
        """The run has ended."""


class MetricsFile:
    """One JSON object a line, in order of ``step``.

    Args:
        after: the step that the run resumes from; later lines, of steps that are now done again, are cut off.
    """

    def __init__(self, path: Path, *, after: int = 0) -> None:
        kept = [line for line in read_metrics(path) if line["step"] <= after] if path.exists() and after else []
        replacement = path.with_suffix(".tmp")
        replacement.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        replacement.replace(path)
        self._file = path.open("a", encoding="utf-8", buffering=1)

    def log(self, step: int, values: Values) -> None:
        """Add a line; it is in the file when this returns."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")

    def finish(self) -> None:
        """Close the file."""
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; a last line that a crash cut short is left out.

    Raises:
        FileFormatError: another line is no JSON object with a step.
    """
    lines = path.read_text(encoding="utf-8").splitlines()
    return [values for number, line in enumerate(lines, 1) if (values := _parse(path, number, line, len(lines)))]


def _parse(path: Path, number: int, line: str, last: int) -> dict[str, Any] | None:
    try:
        values = json.loads(line)
        values["step"] + 0
    except (ValueError, TypeError, KeyError):
        if number == last:
            return None
        raise FileFormatError(f"{path}:{number} is no JSON object with a step.") from None
    return dict(values)


class Loggers:
    """The metrics file and other loggers. One that fails is left out from then on, and said so: the run goes on."""

    def __init__(self, file: MetricsFile, others: Mapping[str, Logger], say: Callable[[str], None]) -> None:
        self._file = file
        self._others = dict(others)
        self._say = say

    def log(self, step: int, values: Values) -> None:
        """Hand values to all."""
        self._file.log(step, values)
        for name, logger in self._working():
            self._guard(name, lambda logger=logger: logger.log(step, values))  # type: ignore[misc]

    def finish(self) -> None:
        """The run has ended."""
        self._file.finish()
        for name, logger in self._working():
            self._guard(name, logger.finish)

    def _working(self) -> Iterator[tuple[str, Logger]]:
        return iter(list(self._others.items()))

    def _guard(self, name: str, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:  # noqa: BLE001 - a logger is foreign code, and the run is worth more
            del self._others[name]
            where = traceback.extract_tb(error.__traceback__)[-1]
            self._say(f"the logger {name!r} failed and is left out: {error!r} ({where.filename}:{where.lineno}).")


def series(lines: Sequence[Mapping[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Steps and values of one key, where it is there."""
    found = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
    return [step for step, _ in found], [value for _, value in found]
