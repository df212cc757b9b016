"""``zoo plugins list|show``: installed plugins and what became of them."""

from __future__ import annotations

from typing import Any

import click

from zoo.cli.app import App, ZooCommand, json_option, pass_app, print_json, print_table
from zoo.errors import UnknownNameError
from zoo.plugins import Plugin, plugin_name
from zoo.registry import KINDS


@click.group(invoke_without_command=True)
@click.pass_context
def command(ctx: click.Context) -> None:
    """Installed plugins and what became of them."""
    if ctx.invoked_subcommand is None:
        ctx.invoke(list_command)


@command.command("list", cls=ZooCommand)
@json_option
@pass_app
def list_command(app: App, as_json: bool = False) -> None:
    """Every installed plugin with its state."""
    plugins = app.zoo.plugins
    if as_json:
        print_json([_facts(plugin) for plugin in plugins])
        return
    if not plugins:
        click.echo("no plugins are installed")
        return
    print_table([p.name, p.version, p.state, p.reason or _provides(p), f"{1000 * p.seconds:.0f} ms"] for p in plugins)


@command.command("show", cls=ZooCommand)
@click.argument("name")
@json_option
@pass_app
def show_command(app: App, name: str, as_json: bool) -> None:
    """What one plugin provides, or why it failed."""
    plugins = {plugin.name: plugin for plugin in app.zoo.plugins}
    plugin = plugins.get(name) or plugins.get(plugin_name(name))
    if plugin is None:
        raise UnknownNameError("plugin", name, plugins, fix="See: python -m zoo plugins list.")
    if as_json:
        print_json({**_facts(plugin), "traceback": plugin.traceback})
        return
    print_table([f"{key}:", str(value)] for key, value in _facts(plugin).items() if value not in ("", [], {}))
    for item in plugin.items:
        click.echo(f"  {item.kind} {item.name}: {item.help}")
    for line in plugin.faults:
        click.echo(f"  {line}")
    if plugin.traceback:
        click.echo(plugin.traceback)


def _facts(plugin: Plugin) -> dict[str, Any]:
    return {
        "name": plugin.name,
        "version": plugin.version,
        "state": plugin.state,
        "reason": plugin.reason,
        "warnings": plugin.warnings,
        "faults": plugin.faults,
        "entry_point": plugin.entry_point,
        "provides": plugin.counts,
        "seconds": round(plugin.seconds, 4),
    }


def _provides(plugin: Plugin) -> str:
    parts = [f"{n} {kind if n == 1 else KINDS[kind]}" for kind, n in plugin.counts.items()]
    faults = [f"{len(plugin.faults)} of them can not be used"] if plugin.faults else []
    return "; ".join([", ".join(parts) or "nothing", *faults, *plugin.warnings])
