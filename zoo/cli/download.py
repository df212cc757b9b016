"""``zoo download [MODEL]``: fetch weights, or list what can be had."""

from __future__ import annotations

from typing import Any

import click

from zoo.cli.app import App, ZooCommand, json_option, note, pass_app, print_json, print_table
from zoo.plan.parameters import count_parameters


@click.command(cls=ZooCommand)
@click.argument("model", required=False)
@click.option("--revision", help="Branch, tag or commit on the hub.")
@click.option("--token", envvar="HF_TOKEN", help="Access token for gated models. [env: HF_TOKEN]")
@click.option("--offline", is_flag=True, envvar="HF_HUB_OFFLINE", help="Never download. [env: HF_HUB_OFFLINE]")
@json_option
@pass_app
def command(app: App, /, model: str | None, as_json: bool, **fetch: Any) -> None:
    """Fetch a model's weights; without a name, list what can be had.

    MODEL is a registry name or a source such as hf:org/name. The weights go to checkpoints/, or to the directory that
    ZOO_CHECKPOINTS names.
    """
    if model is None:
        _list(app, as_json)
        return
    from zoo.api import checkpoints_directory
    from zoo.sources.base import FetchOptions
    from zoo.sources.resolve import resolve_model

    options = FetchOptions(**fetch)
    found = resolve_model(model, app.registry, checkpoints=checkpoints_directory(), options=options, report=note)
    if as_json:
        print_json({"path": str(found.path), "name": found.name})
    else:
        click.echo(f"{found.path}")


def _list(app: App, as_json: bool) -> None:
    rows = [(ref, count_parameters(entry.spec), entry.sources) for ref, entry in app.registry.models()]
    if as_json:
        print_json([{"name": ref, "parameters": count, "sources": sources} for ref, count, sources in rows])
        return
    print_table([ref, f"{count:,}", *(sources[:1] or ["no source"])] for ref, count, sources in rows)
