"""``zoo quickstart``: see a model learn, in five minutes on two cores."""

from __future__ import annotations

import math
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import click

from zoo.cli.app import App, ZooCommand, json_option, note, pass_app, print_json, print_table
from zoo.cli.torch_process import import_torch
from zoo.errors import InputError

if TYPE_CHECKING:
    from zoo.runs.quickstart import Quickstart

N_SHOWN = 3


@click.command(cls=ZooCommand)
@click.option("--out", default="runs/quickstart", show_default=True, help="Where the data and the run go.")
@click.option("--model", default="smollm2-135m-instruct", show_default=True, help="Which model learns.")
@click.option("--steps", default=150, show_default=True, type=click.IntRange(min=1), help="Optimizer steps.")
@json_option
@pass_app
def command(app: App, out: str, model: str, steps: int, as_json: bool) -> None:
    """Finetune a small model on a task that it fails, and see what it learnt.

    The data, 1,000 rows of a timetable with their announcements, is made here. The rows of the test are not among them.
    """
    directory = Path(out)
    if directory.exists() and any(directory.iterdir()):
        raise InputError(f"{directory} is not empty.", fix="Give another --out, or remove it.")
    import_torch()
    from zoo.api import checkpoints_directory
    from zoo.cli.train_command import make_display
    from zoo.runs.quickstart import quickstart
    from zoo.sources.base import FetchOptions
    from zoo.sources.resolve import resolve_model

    resolve_model(
        model, app.registry, checkpoints=checkpoints_directory(), options=FetchOptions(offline=False), report=note
    )
    with make_display() as display:
        found = quickstart(directory, model=model, registry=app.registry, display=display, steps=steps)
    if as_json:
        print_json(_facts(found))
    else:
        _show(found, model)


def _facts(found: Quickstart) -> dict[str, object]:
    return {
        "exact_match": {"before": found.before.exact, "after": found.after.exact},
        "val_loss": {"before": found.losses[0], "after": found.losses[1]},
        "seconds": found.outcome.seconds,
        "report": str(found.outcome.report),
        "adapter": str(found.outcome.trained),
    }


def _show(found: Quickstart, model: str) -> None:
    before, after = found.losses
    click.echo()
    print_table(
        [
            ["", "before", "after"],
            ["exact answers", f"{found.before.exact:.0%}", f"{found.after.exact:.0%}"],
            ["perplexity of the answers", f"{math.exp(before):.2f}", f"{math.exp(after):.2f}"],
        ]
    )
    for number in range(N_SHOWN):
        click.echo()
        for name, text in (
            ("row", found.prompts[number]),
            ("before", found.before.texts[number]),
            ("after", found.after.texts[number]),
        ):
            click.echo(
                textwrap.fill(" ".join(text.split()), 100, initial_indent=f"{name:>7}  ", subsequent_indent=" " * 9)
            )
    click.echo()
    click.echo(f"report:  {found.outcome.report}")
    click.echo("next:")
    click.echo(f"  zoo chat {model} --adapter {found.outcome.trained}")
    click.echo(f"  zoo finetune {model} --data YOURS.jsonl --dry-run")
    click.echo(f"  zoo merge {model} {found.outcome.trained} runs/merged")
