"""``zoo doctor``: this machine, and what can not be used on it."""

from __future__ import annotations

import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Any

import click
from packaging.requirements import Requirement

from zoo import __version__
from zoo.cli.app import App, ZooCommand, json_option, pass_app, print_json, print_table
from zoo.plugins import Plugin
from zoo.registry import BUILT_IN, KINDS, Registry, probe

SLOW_SECONDS = 0.05
"""What a plugin may take to load: all of zoo's own registration takes about as long."""


@click.command(cls=ZooCommand)
@click.option("--timings", is_flag=True, help="How long each plugin takes to load, which every command waits for.")
@json_option
@pass_app
def command(app: App, timings: bool, as_json: bool) -> None:
    """This machine: versions, devices, threads, memory, what can not be used and why.

    Every component is imported to find out.
    """
    loaded = app.zoo.plugins if timings else []  # before anything else is imported
    slow = [plugin for plugin in loaded if plugin.seconds > SLOW_SECONDS]
    facts: dict[str, Any] = {
        "versions": _versions(),
        "machine": _machine(),
        "torch": _torch(),
        "problems": [*app.zoo.problems(), *map(_slow, slow), *_unusable(app.registry, optional=False)],
        "not here": _unusable(app.registry, optional=True),
    }
    if timings:
        facts["timings"] = {plugin.name: f"{1000 * plugin.seconds:.0f} ms" for plugin in loaded}
    if as_json:
        print_json(facts)
        return
    for title in ("versions", "machine", "torch", *(["timings"] if facts.get("timings") else [])):
        click.echo(f"{title}:")
        print_table([f"  {key}", str(value)] for key, value in facts[title].items())
    click.echo("problems:" if facts["problems"] else "problems: none")
    for line in facts["problems"]:
        click.echo(f"  {line}")
    if facts["not here"]:
        click.echo("not here, which is no fault:")
    for line in facts["not here"]:
        click.echo(f"  {line}")


def _slow(plugin: Plugin) -> str:
    cost = f"plugin {plugin.name} makes every command {1000 * plugin.seconds:.0f} ms slower"
    return f"{cost}; fix: import inside of functions what {plugin.entry_point} imports, or -p no:{plugin.name}"


def _versions() -> dict[str, str]:
    found = {"zoo": __version__, "python": platform.python_version()}
    for package in _dependencies():
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def _dependencies() -> list[str]:
    """What zoo itself depends on; nothing when it runs from a source tree that is not installed."""
    try:
        declared = requires("gpt-zoo") or []
    except PackageNotFoundError:
        declared = []
    return [Requirement(text).name for text in declared if "extra ==" not in text]


def _machine() -> dict[str, Any]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    facts: dict[str, Any] = {"system": f"{platform.system()} {platform.machine()}", "cores": cores}
    if hasattr(os, "sysconf"):
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        facts["memory"] = f"{total / 2**30:.1f} GiB"
    facts["free disk here"] = f"{shutil.disk_usage('.').free / 2**30:.1f} GiB"
    facts["checkpoints"] = os.environ.get("ZOO_CHECKPOINTS", "checkpoints")
    return facts


def _torch() -> dict[str, Any]:
    try:
        import torch
    except Exception as error:  # noqa: BLE001 - a broken torch is what a doctor is for
        return {"state": f"can not be imported: {type(error).__name__}: {error}"}
    from zoo.precision.base import cpu_has_bfloat16

    facts: dict[str, Any] = {
        "threads": torch.get_num_threads(),
        "cpu instructions": torch.backends.cpu.get_cpu_capability(),
        "cpu bfloat16": "in hardware" if cpu_has_bfloat16() else "emulated, slow",
        "cuda": "available" if torch.cuda.is_available() else _why_no_cuda(torch.version.cuda),
        "mps": "available" if torch.backends.mps.is_available() else "no",
    }
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(i)
        facts[f"cuda:{i}"] = (
            f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, sm_{properties.major}{properties.minor}"
        )
    return facts


def _why_no_cuda(built_with: str | None) -> str:
    return "no: this torch is built without it" if built_with is None else "no: no NVIDIA GPU was found"


def _unusable(registry: Registry, *, optional: bool) -> list[str]:
    """What can not be used, and why: zoo's own components for hardware and packages that are optional, or the rest."""
    lines = []
    for kind in KINDS:
        for ref, component in registry.components(kind):
            is_optional = component.origin.distribution == BUILT_IN and bool(component.needs or component.requires)
            if is_optional != optional:
                continue
            status = probe(component)
            if status.state != "ok":
                fix = f"; fix: {status.fix}" if status.fix else ""
                lines.append(f"{kind} {ref} is {status.state}: {'; '.join(status.reasons)}{fix}")
    return lines
