"""``zoo pretrain MODEL --data FILE --tokenizer NAME``: a model learns from text, from random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from zoo.cli.app import App, ZooCommand, json_option, pass_app
from zoo.cli.recipe_options import (
    BATCHES,
    DATA,
    LENGTH,
    METHOD,
    OPTIMIZER,
    OUT,
    PLACE,
    WATCHING,
    make_recipe,
    recipe_options,
)
from zoo.cli.train_command import train

_METHOD = {key: option for key, option in METHOD.items() if key not in ("adapter", "quantize")}
TOKENIZER = {
    "tokenizer": click.option("--tokenizer", metavar="NAME", help="byte, char, or a directory. [default: the data's]")
}


@click.command(cls=ZooCommand)
@click.argument("model", required=False)
@recipe_options(OUT, DATA, TOKENIZER, _METHOD, BATCHES, LENGTH, OPTIMIZER, WATCHING, PLACE)
@json_option
@pass_app
def command(
    app: App,
    /,
    model: str | None,
    settings: tuple[str, ...],
    recipe_file: Path | None,
    resume: bool,
    dry_run: bool,
    explain: bool,
    as_json: bool,
    **flags: Any,
) -> None:
    """Train MODEL, a registry name, from random weights; --set spec.n_layers=4 changes its architecture.

    --data is text, or a directory with the token files that zoo prepare writes.
    """
    flags |= {"model": model, "adapter": "full"}
    recipe = make_recipe("pretrain", flags, settings, recipe_file, resume=resume)
    train(app, recipe, resume=resume, dry_run=dry_run, explain=explain, as_json=as_json)
