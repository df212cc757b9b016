"""What every command shares: its standard options, the registry they lead to, and how results are printed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import click

from zoo.commands import COMMANDS
from zoo.errors import UnavailableError, UnknownNameError
from zoo.plugins import PluginSelection, Zoo, load_zoo
from zoo.registry import Registry


class App:
    """The state of one run of the command line."""

    def __init__(self) -> None:
        self.debug = False
        self._told: set[str] = set()
        self.registry_files: tuple[Path, ...] = ()
        self.disabled: tuple[str, ...] = ()
        self.no_plugins = False
        self._plugin_command: str | None = None

    @cached_property
    def zoo(self) -> Zoo:
        """Registry and plugins; problems with plugins are told once, on standard error."""
        selection = PluginSelection.from_environment(self.disabled, none=self.no_plugins)
        built = load_zoo(selection, registry_files=self.registry_files)
        for line in built.problems():
            if line not in self._told:
                note(line)
        self._told.update(built.problems())
        return built

    def set(self, option: str, value: Any) -> None:
        """Set an option; what was built without it is built anew."""
        if getattr(self, option) != value:
            setattr(self, option, value)
            self.__dict__.pop("zoo", None)

    @property
    def registry(self) -> Registry:
        """The registry."""
        return self.zoo.registry

    def plugin_command(self, name: str) -> click.Command:
        """The command that a plugin registers, to be run.

        Raises:
            UnknownNameError: none does, or that plugin is switched off.
            UnavailableError: it can not be imported, or is no command.
        """
        self._plugin_command = name
        try:
            command = self.registry.load("command", name)
        except UnknownNameError:
            known = [*COMMANDS, *(other for other, _ in self.registry.components("command"))]
            raise UnknownNameError("command", name, known, fix="See: python -m zoo --help.") from None
        if not isinstance(command, click.Command):
            raise UnavailableError(f"command {name!r} is no click.Command but a {type(command).__name__}.")
        return command

    def check_command(self) -> None:
        """Look the command up again: its own options may have switched its plugin off. Raises as `plugin_command`."""
        if self._plugin_command is not None:
            self.plugin_command(self._plugin_command)


pass_app = click.make_pass_decorator(App)


def note(line: str) -> None:
    """Tell the user something that is not the result."""
    click.echo(f"zoo: {line}", err=True)


def print_json(data: Any) -> None:
    """Print a result for programs."""
    click.echo(json.dumps(data, indent=2, ensure_ascii=False, default=str))


def print_table(rows: Iterable[Sequence[str]]) -> None:
    """Print aligned columns, one row a line, never cut off: made for grep."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _parse_disabled(ctx: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...]:
    for value in values:
        if not value.startswith("no:") or value == "no:":
            raise click.BadParameter(f"write no:NAME to switch a plugin off, not {value!r}.")
    names = tuple(value.removeprefix("no:") for value in values)
    ctx.ensure_object(App).set("disabled", names)
    return names


def _remember(attribute: str) -> Callable[[click.Context, click.Parameter, Any], Any]:
    def callback(ctx: click.Context, parameter: click.Parameter, value: Any) -> Any:
        if value:
            ctx.ensure_object(App).set(attribute, value)
        return value

    return callback


class ZooCommand(click.Command):
    """A command with the standard options: ``--registry``, ``-p``, ``--no-plugins``, ``--debug``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params += [
            click.Option(
                ["--registry"],
                type=click.Path(path_type=Path),
                multiple=True,
                metavar="FILE",
                expose_value=False,
                callback=_remember("registry_files"),
                help="Add the models of a registry file of your own.",
            ),
            click.Option(
                ["-p", "--plugin"],
                multiple=True,
                metavar="no:NAME",
                expose_value=False,
                callback=_parse_disabled,
                help="Switch a plugin off.",
            ),
            click.Option(
                ["--no-plugins"],
                is_flag=True,
                expose_value=False,
                callback=_remember("no_plugins"),
                help="Load no plugin.",
            ),
            click.Option(
                ["--debug"],
                is_flag=True,
                expose_value=False,
                callback=_remember("debug"),
                help="Show the traceback of an error.",
            ),
        ]

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command, unless its plugin is switched off."""
        ctx.ensure_object(App).check_command()
        return super().invoke(ctx)


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
