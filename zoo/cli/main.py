"""Finds the command that was asked for, runs it, and turns errors into a sentence and an exit code."""

from __future__ import annotations

import os
import sys
import traceback
from importlib import import_module

import click

from zoo import __version__
from zoo.cli.app import App
from zoo.commands import COMMANDS
from zoo.errors import ZooError


class LazyGroup(click.Group):
    """A group whose commands are imported when they are called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The built-in commands, in the order in which a user meets them."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """A built-in command, or one that a plugin registers."""
        if cmd_name in COMMANDS:
            module, _, attribute = COMMANDS[cmd_name][0].partition(":")
            command: click.Command = getattr(import_module(module), attribute)
            return command
        return ctx.ensure_object(App).plugin_command(cmd_name)

    def invoke(self, ctx: click.Context) -> None:
        """Run the command. What a plugin's command returns is no exit code."""
        super().invoke(ctx)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The help lines, from the table alone."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, help_line) for name, (_, help_line) in COMMANDS.items()])
        formatter.write_paragraph()
        formatter.write_text("Plugins may add commands: python -m zoo list commands.")


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, "-V", "--version", prog_name="zoo", message="%(prog)s %(version)s")
def cli() -> None:
    """A model zoo for GPTs that people can extend.

    Begin with:  python -m zoo chat smollm2-135m-instruct
    """


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit: 0 ok, 1 the work failed, 2 the user's input, 3 a component is unavailable."""
    app = App()
    try:
        code = cli.main(arguments, prog_name="zoo", standalone_mode=False, obj=app)
    except ZooError as error:
        code = _report(app, str(error), error.exit_code)
    except click.exceptions.Abort:
        code = _report(app, "interrupted.", 130)
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except BrokenPipeError:
        # The reader (head, grep -q) has what it wanted; Python would complain while it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    sys.exit(code if isinstance(code, int) else 0)


def _report(app: App, message: str, code: int) -> int:
    if app.debug:
        traceback.print_exc()
    click.echo(f"zoo: {message}", err=True)
    return code
