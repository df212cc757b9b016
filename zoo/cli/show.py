"""``zoo show [KIND] NAME``: everything about one model or component."""

from __future__ import annotations

from dataclasses import MISSING, Field, fields, replace
from typing import Any

import click

from zoo.cli.app import App, ZooCommand, json_option, pass_app, print_json, print_table
from zoo.cli.list import singular
from zoo.errors import InputError, UnavailableError, UnknownNameError
from zoo.plan.parameters import count_parameters
from zoo.registry import KINDS, Component, ModelEntry, Registry, component_status, import_target


@click.command(cls=ZooCommand)
@click.argument("words", metavar="[KIND] NAME", nargs=-1, required=True)
@json_option
@pass_app
def command(app: App, words: tuple[str, ...], as_json: bool) -> None:
    """Everything about one model or component: zoo show gpt2, zoo show attention flex."""
    if len(words) > 2:
        raise click.UsageError("give a name, or a kind and a name.")
    kind = singular(words[0]) if len(words) == 2 else _kind_of(app.registry, words[0])
    item = app.registry.model(words[-1]) if kind == "model" else app.registry.find(kind, words[-1])
    facts = _model_facts(item) if isinstance(item, ModelEntry) else _component_facts(item)
    if as_json:
        print_json(facts)
        return
    print_table([f"{key}:", _plain(value)] for key, value in _flat(facts))


def _kind_of(registry: Registry, name: str) -> str:
    bare = name.rpartition("/")[2]
    kinds = [kind for kind in KINDS if any(bare == item.name for _, item in registry.items(kind))]
    if not kinds:
        everything = [ref for kind in KINDS for ref, _ in registry.items(kind) if not ref.startswith("_")]
        raise UnknownNameError("model or component", name, everything, fix="See: python -m zoo list.")
    if "model" in kinds:  # the family of the same name is one word away
        return "model"
    if len(kinds) > 1:
        choices = " or ".join(f"'zoo show {kind} {name}'" for kind in kinds)
        raise InputError(f"{name!r} is a name of the kinds {' and '.join(kinds)}.", fix=f"Write {choices}.")
    return kinds[0]


def _model_facts(entry: ModelEntry) -> dict[str, Any]:
    count = count_parameters(entry.spec)
    return {
        "model": entry.name,
        "parameters": count,
        "size": {"32-true": f"{4 * count / 1e9:.2f} GB", "bf16-true": f"{2 * count / 1e9:.2f} GB"},
        "family": entry.family,
        "license": entry.license,
        "sources": list(entry.sources),
        "origin": str(entry.origin),
        "spec": entry.spec.to_dict(),
    }


def _component_facts(component: Component) -> dict[str, Any]:
    status = component_status(component)
    return {
        component.kind: component.name,
        "help": component.help,
        "state": status.state,
        "reasons": list(status.reasons),
        "fix": status.fix,
        "target": component.target,
        "requires": list(component.requires),
        "needs": str(component.needs) if component.needs else None,
        "answers to": list(component.matches),
        "origin": str(component.origin),
        "attaches to": _kinds(component),
        "options": _options(component),
    }


def _options(component: Component) -> Any:
    """The fields of its options dataclass with their defaults, or why they can not be read."""
    if component.options is None:
        return {}
    try:
        options = import_target(replace(component, target=component.options))
        return {f.name: _default(f) for f in fields(options)}
    except (UnavailableError, TypeError) as error:
        return f"can not be read: {error}"


def _kinds(component: Component) -> list[str]:
    """Of an adapter: the kinds of sites that it takes, as its options say them."""
    if component.options is None:
        return []
    try:
        return list(getattr(import_target(replace(component, target=component.options)), "kinds", ()))
    except UnavailableError:
        return []


def _default(option: Field[Any]) -> Any:
    if option.default_factory is not MISSING:
        return option.default_factory()
    return "(required)" if option.default is MISSING else option.default


def _flat(facts: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for key, value in facts.items():
        if isinstance(value, dict) and value:
            rows += _flat(value, f"{prefix}{key}.")
        elif prefix or value not in (None, [], "", {}):
            rows.append((prefix + key, value))
    return rows


def _plain(value: Any) -> str:
    if value is None or value in ((), [], {}):
        return "none"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
