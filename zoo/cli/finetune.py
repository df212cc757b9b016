"""``zoo finetune MODEL --data FILE``: a model learns from examples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from zoo.cli.app import App, ZooCommand, json_option, pass_app
from zoo.cli.recipe_options import GROUPS, make_recipe, recipe_options
from zoo.cli.train_command import train


@click.command(cls=ZooCommand)
@click.argument("model", required=False)
@recipe_options(*GROUPS)
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
    """Train an adapter on MODEL, or the whole model with --adapter full.

    MODEL is a registry name, a directory, a GGUF file or hf:org/name. --data holds instructions, prompts with
    completions, conversations or text; the format is found by itself. Everything is checked and shown before the first
    step; --dry-run stops there.
    """
    recipe = make_recipe("finetune", {"model": model, **flags}, settings, recipe_file, resume=resume)
    train(app, recipe, resume=resume, dry_run=dry_run, explain=explain, as_json=as_json)
