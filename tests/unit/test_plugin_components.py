"""No kind is a closed set: an outsider of every kind is registered, listed, shown, and a command of its own runs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.plugin_lab import PluginLab, lab_on_path, plugin_of, run_inside
from zoo import hooks
from zoo.cli.main import main
from zoo.commands import COMMANDS
from zoo.plugins import load_zoo
from zoo.registry import KINDS

COMMAND = """
import click

@click.command()
@click.argument("name", default="you")
def command(name: str) -> int:
    \"\"\"Greet.\"\"\"
    click.echo(f"hello, {name}")
    return 7
"""


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[PluginLab]:
    with lab_on_path(tmp_path) as lab:
        yield lab


def install_commands(lab: PluginLab, distribution: str, *names: str) -> None:
    calls = "".join(f"    register({name!r}, '{distribution}.kernel:command', help='greets')\n" for name in names)
    source = f"@hookimpl\ndef zoo_register_commands(register):\n{calls}"
    lab.install(distribution, source, files={f"{distribution}/kernel.py": COMMAND})


def install_everything(lab: PluginLab) -> None:
    """One component of every kind, through the hook that its kind's plural names."""
    hook = "@hookimpl\ndef zoo_register_{plural}(register):\n    register({arguments})\n"
    arguments = dict.fromkeys(KINDS, "'outsider', 'acme.kernel:command', help='from outside'")
    arguments |= {"model": "'outsider', extends='gpt2', help='from outside'"}
    source = "".join(hook.format(plural=KINDS[kind], arguments=arguments[kind]) for kind in KINDS)
    lab.install("acme", source, files={"acme/kernel.py": COMMAND})


def test_an_outsider_of_every_kind(lab: PluginLab) -> None:
    """Guards against a kind that only zoo can add to, and a kind without a hook."""
    install_everything(lab)
    built = load_zoo()
    assert built.problems() == []
    assert plugin_of(built, "acme").counts == dict.fromkeys(KINDS, 1)
    for kind, plural in KINDS.items():
        for word in {kind, plural}:
            rows = {row["name"]: row for row in json.loads(run_inside(built, "list", word, "--json").stdout)}
            assert rows["outsider"]["origin"] == "acme 1.0", kind
            plain = run_inside(built, "list", word).stdout.splitlines()
            assert any(line.startswith("outsider ") for line in plain), kind
        shown = run_inside(built, "show", kind, "outsider", "--json")
        assert json.loads(shown.stdout)["origin"] == "acme 1.0"
        if kind != "model":
            assert built.registry.load(kind, "outsider").name == "command"
    everything = json.loads(run_inside(built, "list", "--json").stdout)
    assert set(everything) == set(KINDS.values())


def test_help_of_several_lines_stays_one_row(lab: PluginLab) -> None:
    """Guards against a listing that grep can not be used on."""
    lab.install(
        "acme",
        "@hookimpl\ndef zoo_register_loggers(register):\n"
        "    register('long', 'acme.kernel:Kernel', help='first\\n  second', fix='do\\nthis')\n"
        "@hookimpl\ndef zoo_register_models(register):\n"
        "    register('lines', extends='gpt2', help='first\\n  second')\n",
    )
    built = load_zoo()
    assert built.registry.find("logger", "long").help == built.registry.model("lines").help == "first second"
    (line,) = [line for line in run_inside(built, "list", "loggers").output.splitlines() if line.startswith("long ")]
    assert line.endswith("acme 1.0  first second")


def test_plugins_show_takes_the_name_as_pip_does(lab: PluginLab) -> None:
    """Guards against 'no such plugin' for another spelling of a distribution's name, and a typo without a hint."""
    lab.install("acme-kernels", "@hookimpl\ndef zoo_register_loggers(register):\n    pass\n")
    built = load_zoo()
    assert "acme-kernels" in run_inside(built, "plugins", "show", "Acme_Kernels").output
    unknown = run_inside(built, "plugins", "show", "acme-kernel").exception
    assert "Did you mean 'acme-kernels'?" in str(unknown)


def test_every_register_hook_is_of_a_kind() -> None:
    """Guards against a hook that is declared and never called."""
    declared = {name for name in dir(hooks) if name.startswith("zoo_register_")}
    assert declared == {f"zoo_register_{plural}" for plural in KINDS.values()}


def test_a_name_of_many_kinds_must_be_told_apart(lab: PluginLab) -> None:
    """Guards against ``show NAME`` that picks a kind by chance."""
    hook = "@hookimpl\ndef zoo_register_{plural}(register):\n    register('both', 'acme.kernel:Kernel', help='')\n"
    lab.install("acme", "".join(hook.format(plural=plural) for plural in ("adapters", "loggers")))
    result = run_inside(load_zoo(), "show", "both")
    assert str(result.exception) == (
        "'both' is a name of the kinds adapter and logger. Write 'zoo show adapter both' or 'zoo show logger both'."
    )


def test_a_plugins_command_on_a_real_command_line(lab: PluginLab) -> None:
    """Guards against commands that are listed and do not run, and a return value that is taken for an exit code."""
    install_commands(lab, "acme", "acme-hello")
    result = lab.zoo("acme-hello", "World")
    assert (result.returncode, result.stdout, result.stderr) == (0, "hello, World\n", "")
    assert "Greet." in lab.zoo("acme-hello", "--help").stdout
    misspelt = lab.zoo("acme-helo")
    assert (misspelt.returncode, misspelt.stdout) == (2, "")
    assert misspelt.stderr == (
        "zoo: no command is named 'acme-helo'. Did you mean 'acme-hello'? See: python -m zoo --help.\n"
    )


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[object, str, str]:
    with pytest.raises(SystemExit) as exit_:
        main(list(arguments))
    said = capsys.readouterr()
    return exit_.value.code, said.out, said.err


def test_a_command_can_not_take_the_place_of_zoos(lab: PluginLab, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards against a plugin that becomes ``zoo list``."""
    assert "list" in COMMANDS
    install_commands(lab, "acme", "list")
    code, out, _ = run(capsys, "list", "attention")
    assert code == 0
    assert "sdpa" in out
    assert run(capsys, "acme/list", "me") == (0, "hello, me\n", "")


def test_one_command_of_two_plugins(lab: PluginLab, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards against running whichever was installed first, and against 'no such command'."""
    install_commands(lab, "acme", "greet")
    install_commands(lab, "beta", "greet")
    assert run(capsys, "greet") == (
        2,
        "",
        "zoo: command 'greet' is provided by acme 1.0 and beta 1.0. Write acme/greet or beta/greet.\n",
    )
    assert run(capsys, "beta/greet", "b") == (0, "hello, b\n", "")


def test_a_command_that_is_none(lab: PluginLab, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards against a traceback out of click for a target that is a plain function."""
    hook = "@hookimpl\ndef zoo_register_commands(register):\n    register('odd', 'acme.kernel:Kernel', help='')\n"
    lab.install("acme", hook)
    assert run(capsys, "odd") == (3, "", "zoo: command 'odd' is no click.Command but a type.\n")
