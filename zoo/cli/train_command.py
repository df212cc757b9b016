"""What ``finetune`` and ``pretrain`` share: a run, and what is seen of it."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

import click

from zoo.cli.app import App, note, print_json
from zoo.cli.torch_process import import_torch
from zoo.runs.processes import is_first

if TYPE_CHECKING:
    from rich.progress import Progress

    from zoo.runs.preflight import Preflight
    from zoo.runs.samples import Answer
    from zoo.train.metrics import Values
    from zoo.train.recipe import Recipe

LINE_SECONDS = 10.0
"""How often a line tells of the progress, where nobody watches a bar."""


def train(app: App, recipe: Recipe, *, resume: bool, dry_run: bool, explain: bool, as_json: bool) -> None:
    """Run a recipe, and say how it ended.

    Raises:
        StoppedError: a signal ended it, after saving.
    """
    import_torch()
    from zoo.runs.run import run

    display = make_display()
    with display:
        outcome = run(recipe, registry=app.registry, display=display, resume=resume, dry_run=dry_run, explain=explain)
    if not is_first():
        return
    if as_json:
        print_json(outcome.to_dict())
        return
    for line in outcome.lines():
        click.echo(line)


def make_display() -> Quiet:
    """What suits who watches: a bar on a terminal, lines elsewhere, nothing on other ranks."""
    if not is_first():
        return Quiet()
    return Bar() if sys.stderr.isatty() else Lines()


class Quiet:
    """Shows nothing."""

    def __enter__(self) -> Quiet:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def say(self, line: str) -> None:
        """One line."""

    def preflight(self, found: Preflight) -> None:
        """What the run will do."""

    def step(self, step: int, steps: int | None, values: Values) -> None:
        """Values of a step, or of the evaluation after it."""

    def answer(self, answer: Answer) -> None:
        """What the model wrote."""


class Lines(Quiet):
    """Lines on standard error."""

    def __init__(self) -> None:
        self._told = 0.0

    def say(self, line: str) -> None:
        """One line."""
        note(line)

    def preflight(self, found: Preflight) -> None:
        """Names and values, and the first sample: what is learnt of it is marked."""
        width = max(map(len, found.facts))
        for name, value in found.facts.items():
            click.echo(f"{name:>{width}}  {value}", err=True)
        if found.sample:
            click.echo(
                "\nthe first sample; what is learnt is " + click.style("marked", fg="green", bold=True), err=True
            )
            colour = sys.stderr.isatty()
            for text, is_learnt in found.sample:
                shown = click.style(text, fg="green", bold=True) if is_learnt else click.style(text, dim=True)
                click.echo(shown if colour else f"[[{text}]]" if is_learnt else text, nl=False, err=True)
            click.echo("\n", err=True)
        for warning in found.warnings:
            note(f"careful: {warning}")

    def step(self, step: int, steps: int | None, values: Values) -> None:
        """A line now and then, and for each evaluation."""
        is_last, now = step == steps, time.monotonic()
        if "val_loss" not in values and not is_last and now - self._told < LINE_SECONDS and step != 1:
            return
        self._told = now
        note(f"step {step}{f'/{steps}' if steps else ''}: {describe(values)}")

    def answer(self, answer: Answer) -> None:
        """The prompt's last line, and the answer."""
        note(f"  {_short(answer.prompt)} -> {_short(answer.text)}")


class Bar(Lines):
    """A bar with the loss, the speed and the time that is left."""

    def __init__(self) -> None:
        super().__init__()
        self._progress: Progress | None = None
        self._task: Any = None

    def __exit__(self, *error: object) -> None:
        if self._progress is not None:
            self._progress.stop()

    def say(self, line: str) -> None:
        """A line above the bar."""
        if self._progress is None:
            super().say(line)
        else:
            self._progress.console.print(line, markup=False, highlight=False)

    def step(self, step: int, steps: int | None, values: Values) -> None:
        """Move the bar; evaluations are told above it."""
        if "val_loss" in values:
            self.say(f"step {step}: {describe(values)}")
            return
        if self._progress is None:
            self._begin(steps)
        assert self._progress is not None
        self._progress.update(self._task, completed=step, values=describe(values))

    def answer(self, answer: Answer) -> None:
        """The prompt's last line, and the answer, above the bar."""
        self.say(f"  {_short(answer.prompt)} -> {_short(answer.text)}")

    def _begin(self, steps: int | None) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[values]}"), TimeRemainingColumn())
        self._progress = Progress(*columns, console=Console(stderr=True))
        self._task = self._progress.add_task("training", total=steps, values="")
        self._progress.start()


def describe(values: Values) -> str:
    """The numbers that a person follows."""
    parts = []
    for key, text in (
        ("loss", "loss {:.4f}"),
        ("val_loss", "validation loss {:.4f}"),
        ("tokens_per_second", "{:,.0f} tokens/s"),
    ):
        if key in values:
            parts.append(text.format(values[key]))
    if memory := values.get("peak_memory"):
        parts.append(f"{float(memory) / 2**30:.2f} GiB")
    return ", ".join(parts)


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 100 else line[:97] + "..."
