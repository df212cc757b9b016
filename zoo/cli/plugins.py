"""``zoo plugins list|show|new|check``: installed plugins and what became of them, and how one is begun and checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from zoo.cli.app import App, ZooCommand, json_option, note, pass_app, print_json, print_table
from zoo.cli.torch_process import import_torch
from zoo.errors import UnavailableError, UnknownNameError
from zoo.plugins import Plugin, plugin_name
from zoo.registry import KINDS

if TYPE_CHECKING:
    from zoo.testing.check import Result


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


@command.command("new", cls=ZooCommand)
@click.argument("kind")
@click.argument("name")
@click.option("--out", type=click.Path(path_type=Path), metavar="DIR", help="Where to.  [default: zoo-NAME]")
@pass_app
def new_command(app: App, kind: str, name: str, out: Path | None) -> None:
    """Write a package that adds a component NAME of a KIND, with tests that pass."""
    from zoo.cli.plugin_files import write_plugin

    written = write_plugin(kind, name, out, app.registry)
    for path in written.values():
        click.echo(path)
    directory = written["pyproject.toml"].parent
    note(f"next: python -m pip install -e {directory}, then python -m zoo plugins check zoo-{name}")


@command.command("check", cls=ZooCommand)
@click.argument("distribution")
@click.option("--kind", "kinds", multiple=True, metavar="KIND", help="Only components of this kind; may be repeated.")
@json_option
@click.pass_context
def check_command(ctx: click.Context, distribution: str, kinds: tuple[str, ...], as_json: bool) -> None:
    """Run the contract of everything that a DISTRIBUTION registers (zoo: the built-ins).

    Exit code 1 if a check fails. What can not run here, such as checks for a GPU, is told, and is no failure.
    """
    import_torch()
    try:
        from zoo.testing.check import check
    except ModuleNotFoundError as error:
        raise UnavailableError(f"the checks need {error.name}.", fix="python -m pip install pytest") from None
    singular = {plural: kind for kind, plural in KINDS.items()}
    results = check(distribution, tuple(singular.get(kind, kind) for kind in kinds))
    failed = [result for result in results if result.outcome == "failed"]
    if as_json:
        print_json({"distribution": distribution, "ok": not failed, "checks": [asdict(r) for r in results]})
    else:
        _print_results(results)
    ctx.exit(1 if failed else 0)


OUTCOMES = ("passed", "failed", "expected", "not run")


def _print_results(results: Sequence[Result]) -> None:
    """A row for each component, then each check that did not pass, with its reason."""
    rows = [["kind", "component", *OUTCOMES]]
    for (kind, component), group in groupby(results, lambda r: (r.kind, r.component)):
        outcomes: list[str] = [result.outcome for result in group]
        rows.append([kind, component, *(str(outcomes.count(outcome) or "-") for outcome in OUTCOMES)])
    print_table(rows)
    others: dict[tuple[str, str, str, str], list[str]] = {}
    for r in results:
        if r.outcome != "passed":
            others.setdefault((r.outcome, r.kind, r.component, r.reason), []).append(r.check)
    for (outcome, kind, component, reason), checks in others.items():
        click.echo(f"\n{outcome}: {kind} {component}: {', '.join(checks)}\n  {reason}")


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
