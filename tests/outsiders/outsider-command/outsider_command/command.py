"""Counts models."""

import click

from zoo.cli.app import App, ZooCommand, json_option, pass_app, print_json


@click.command(cls=ZooCommand)
@json_option
@pass_app
def command(app: App, as_json: bool) -> None:
    """How many models there are."""
    count = len(list(app.registry.models()))
    print_json({"models": count}) if as_json else click.echo(f"{count} models")
