"""``zoo list [KIND]``: what is registered."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from zoo.cli.app import App, ZooCommand, json_option, pass_app, print_json, print_table
from zoo.errors import UnknownNameError
from zoo.plan.parameters import count_parameters
from zoo.registry import KINDS, Component, ModelEntry, Registry, Status, component_status, probe

Judge = Callable[[Component], Status]


@click.command(cls=ZooCommand)
@click.argument("kind", required=False)
@click.option("--probe", "probing", is_flag=True, help="Import each component, to see whether it works.")
@json_option
@pass_app
def command(app: App, kind: str | None, probing: bool, as_json: bool) -> None:
    """What is registered: models, families, attention backends, ...

    Without KIND, every kind. States are judged by installed metadata; --probe imports.
    """
    registry, judge = app.registry, probe if probing else component_status
    kinds = [singular(kind)] if kind else list(KINDS)
    if as_json:
        rows = {KINDS[k]: _models(registry) if k == "model" else _components(registry, k, judge) for k in kinds}
        print_json(rows[KINDS[kinds[0]]] if kind else rows)
        return
    for k in kinds:
        if not kind:
            click.echo(f"{KINDS[k]}:")
        _print(registry, k, judge, indent="" if kind else "  ")


def singular(kind: str) -> str:
    """The kind that a user's word (``model`` or ``models``) means.

    Raises:
        UnknownNameError: there is no such kind.
    """
    for one, many in KINDS.items():
        if kind in (one, many):
            return one
    raise UnknownNameError("kind", kind, KINDS.values())


def _print(registry: Registry, kind: str, judge: Judge, indent: str) -> None:
    if kind == "model":
        models = [(ref, e) for ref, e in registry.models()]
        print_table(
            [indent + ref, f"{count_parameters(e.spec):,}", e.family, e.license, _where(e)] for ref, e in models
        )
        return
    rows = list(registry.components(kind))
    if not rows:
        click.echo(f"{indent}none")
    print_table([indent + ref, *_verdict(judge(c)), str(c.origin), c.help] for ref, c in rows)


def _verdict(status: Status) -> tuple[str, str]:
    return status.state, "; ".join([*status.reasons, *([f"fix: {status.fix}"] if status.fix else [])])


def _where(entry: ModelEntry) -> str:
    return entry.sources[0] if entry.sources else "no source"


def _models(registry: Registry) -> list[dict[str, Any]]:
    return [
        {
            "name": ref,
            "parameters": count_parameters(entry.spec),
            "family": entry.family,
            "license": entry.license,
            "sources": list(entry.sources),
            "origin": str(entry.origin),
        }
        for ref, entry in registry.models()
    ]


def _components(registry: Registry, kind: str, judge: Judge) -> list[dict[str, Any]]:
    rows = []
    for ref, component in registry.components(kind):
        status = judge(component)
        rows.append(
            {
                "name": ref,
                "state": status.state,
                "reasons": list(status.reasons),
                "fix": status.fix,
                "help": component.help,
                "target": component.target,
                "origin": str(component.origin),
            }
        )
    return rows
