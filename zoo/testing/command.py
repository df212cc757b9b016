"""What every command has to do, tried on a real command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import click
import pytest

from zoo.testing.contract import Contract, not_run

_HEAVY = ("torch", "numpy", "transformers", "lightning")
_HELP = f"""
import sys
from zoo.cli.main import main
try:
    main(sys.argv[1:])
finally:
    heavy = [name for name in {_HEAVY!r} if name in sys.modules]
    print("imported:", *heavy, file=sys.stderr)
"""


class CommandContract(Contract, standard=True):
    """A command by its name.

    Attributes:
        arguments: with which it succeeds; files that they name are made by `prepare`.
    """

    kind = "command"
    arguments: ClassVar[tuple[str, ...] | None] = None

    def prepare(self, directory: Path) -> None:
        """Write what ``arguments`` need into the directory that the command is run in."""

    def run(self, *arguments: str, script: str | None = None, cwd: Path | None = None) -> tuple[int, str, str]:
        """Exit code, standard output and standard error of ``zoo NAME ARGUMENTS``."""
        how = ["-m", "zoo"] if script is None else ["-c", script]
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONSAFEPATH"} | self.environment()
        done = subprocess.run(
            [sys.executable, *how, self.component, *arguments],
            cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=300,
        )  # fmt: skip
        return done.returncode, done.stdout, done.stderr

    def environment(self) -> dict[str, str]:
        """Variables for the process."""
        return {}

    def make_command(self) -> click.Command:
        """What is registered."""
        command = self.load()
        assert isinstance(command, click.Command), f"the target is a click.Command, not {command!r}"
        return command

    def test_it_has_the_standard_options(self) -> None:
        """``--registry``, ``-p``, ``--no-plugins`` and ``--debug`` work everywhere; and it says in a line what it does.

        `zoo.cli.app.ZooCommand` has them: ``@click.command(cls=ZooCommand)``.
        """
        commands = [self.make_command()]
        while commands:
            command = commands.pop()
            if isinstance(command, click.Group):
                commands += command.commands.values()
                continue
            options = {option for parameter in command.params for option in parameter.opts}
            lacks = {"--registry", "-p", "--no-plugins", "--debug"} - options
            assert not lacks, f"{command.name} lacks {sorted(lacks)}: @click.command(cls=ZooCommand) has them"
            assert command.get_short_help_str(), f"{command.name} has no docstring, which is its help"

    def test_help_is_quick(self) -> None:
        """``--help`` is told without torch: what is slow is imported when it is needed."""
        self.make_command()
        code, out, err = self.run("--help", script=_HELP)
        assert code == 0 and out.startswith("Usage:"), out + err
        imported = err.strip().splitlines()[-1].split()[1:]
        assert not imported, f"--help imports {', '.join(imported)}"

    def test_a_wrong_option_is_the_users_fault(self) -> None:
        """Exit code 2, a sentence, no traceback, and nothing on standard output."""
        self.make_command()
        code, out, err = self.run("--an-option-that-no-command-has")
        assert (code, out) == (2, ""), f"exit code {code}, {out!r}"
        assert "--an-option-that-no-command-has" in err and "Traceback" not in err, err

    def test_it_works(self, tmp_path: Path) -> None:
        """With its arguments it succeeds; with ``--json``, where it has that, it prints JSON and nothing else."""
        command = self.make_command()
        if self.arguments is None:
            not_run("set arguments to what it succeeds with")
        self.prepare(tmp_path)
        code, out, err = self.run(*self.arguments, cwd=tmp_path)
        assert code == 0, f"exit code {code}: {err}"
        if any("--json" in parameter.opts for parameter in command.params) and "--json" not in self.arguments:
            code, out, err = self.run(*self.arguments, "--json", cwd=tmp_path)
            assert code == 0, err
            try:
                json.loads(out)
            except ValueError:
                pytest.fail(f"--json prints {out!r}")
