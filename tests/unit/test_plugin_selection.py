"""Which plugins and registry files take part: ``-p no:NAME``, ``--no-plugins``, ``ZOO_PLUGINS``, ``--registry``."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from tests.plugin_lab import PluginLab, lab_on_path, plugin_of
from zoo.cli.app import App, ZooCommand, pass_app
from zoo.cli.main import cli, main
from zoo.errors import InputError
from zoo.plugins import PluginSelection, Zoo, load_zoo

MODELS = "schema: 1\nmodels: {mine: {extends: gpt2, spec: {n_layers: 2}}}\n"
LOGGER = "@hookimpl\ndef zoo_register_loggers(register):\n    register('NAME-logger', 'NAME.kernel:Kernel', help='')\n"


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[PluginLab]:
    with lab_on_path(tmp_path) as lab:
        for name in ("acme", "beta", "gamma"):
            lab.install(name, LOGGER.replace("NAME", name))
        yield lab


def states(built: Zoo) -> dict[str, str]:
    return {p.name: f"{p.state} {p.reason}".strip() for p in built.plugins if p.name in ("acme", "beta", "gamma")}


def loggers(built: Zoo) -> set[str]:
    return {ref for ref, _ in built.registry.components("logger")}


def failing(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What a command line that ends with 2 says."""
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    return said.err


def test_without_a_choice_all_load(lab: PluginLab) -> None:
    """Guards against a default that hides plugins."""
    built = load_zoo()
    assert states(built) == {"acme": "ok", "beta": "ok", "gamma": "ok"}
    assert loggers(built) >= {"acme-logger", "beta-logger", "gamma-logger"}


@pytest.mark.parametrize(
    ("variable", "disabled", "expected"),
    [
        (None, ["beta"], {"acme": "ok", "beta": "disabled by -p no:beta", "gamma": "ok"}),
        (None, ["Acme", "gamma"], {"acme": "disabled by -p no:acme", "beta": "ok", "gamma": "disabled by -p no:gamma"}),
        ("acme, Beta", [], {"acme": "ok", "beta": "ok", "gamma": "disabled by ZOO_PLUGINS"}),
        ("acme,beta", ["beta"], {"acme": "ok", "beta": "disabled by -p no:beta", "gamma": "disabled by ZOO_PLUGINS"}),
        ("", [], dict.fromkeys(("acme", "beta", "gamma"), "disabled by ZOO_PLUGINS")),
    ],
)
def test_choices(
    variable: str | None, disabled: list[str], expected: dict[str, str], lab: PluginLab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against a plugin that loads although it is switched off, and a list that does not say by whom."""
    if variable is not None:
        monkeypatch.setenv("ZOO_PLUGINS", variable)
    built = load_zoo(PluginSelection.from_environment(disabled))
    assert states(built) == expected
    assert loggers(built) & {"acme-logger", "beta-logger", "gamma-logger"} == {
        f"{name}-logger" for name, state in expected.items() if state == "ok"
    }
    assert built.problems() == []


def test_no_plugins_wins_over_the_variable(lab: PluginLab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against ``--no-plugins`` that still loads what the environment lists."""
    monkeypatch.setenv("ZOO_PLUGINS", "acme")
    built = load_zoo(PluginSelection.from_environment(none=True))
    assert set(states(built).values()) == {"disabled by --no-plugins"}
    assert built.problems() == []


def test_a_disabled_plugin_is_not_imported(lab: PluginLab) -> None:
    """Guards against switching off a broken plugin and still waiting for it, or hearing of it."""
    lab.install("rude", "raise RuntimeError('rude')")
    assert plugin_of(load_zoo(), "rude").state == "broken"
    built = load_zoo(PluginSelection.from_environment(["rude"]))
    assert (plugin_of(built, "rude").state, built.problems()) == ("disabled", [])


def test_a_distribution_with_two_plugins(lab: PluginLab) -> None:
    """Guards against plugins of one distribution that replace each other, or can not be switched off together."""
    lab.install(
        "pair",
        LOGGER.replace("NAME", "pair"),
        files={"pair/other.py": f"from zoo.hooks import hookimpl\n{LOGGER.replace('NAME', 'other')}"},
        entry_points="[zoo.plugins]\na = pair.plugin\nb = pair.other\n",
    )
    assert loggers(load_zoo()) >= {"pair-logger", "other-logger"}
    one = load_zoo(PluginSelection.from_environment(["pair:a"]))
    assert (plugin_of(one, "pair:a").state, plugin_of(one, "pair:b").state) == ("disabled", "ok")
    both = load_zoo(PluginSelection.from_environment(["pair"]))
    assert {plugin_of(both, name).reason for name in ("pair:a", "pair:b")} == {"by -p no:pair"}
    assert both.problems() == []


def test_a_name_that_is_no_plugin_is_told(lab: PluginLab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a typo in ``-p no:NAME`` or ``ZOO_PLUGINS`` that does nothing, in silence."""
    lines = load_zoo(PluginSelection.from_environment(["acmee"])).problems()
    assert lines == ["-p no:acmee: no plugin 'acmee' is installed. Did you mean 'acme'?"]
    monkeypatch.setenv("ZOO_PLUGINS", "acme,quite-other")
    assert load_zoo().problems() == ["ZOO_PLUGINS: no plugin 'quite-other' is installed."]


def test_on_a_real_command_line(lab: PluginLab) -> None:
    """Guards against options that the commands do not pass on."""
    for options, expected in (
        (["-p", "no:acme", "-p", "no:gamma"], {"beta-logger"}),
        (["--no-plugins"], set()),
    ):
        result = lab.zoo("list", "loggers", "--json", *options)
        assert (result.returncode, result.stderr) == (0, "")
        names = {row["name"] for row in json.loads(result.stdout)}
        assert names & {"acme-logger", "beta-logger", "gamma-logger"} == expected
    shown = lab.zoo("plugins", "list", "--json", ZOO_PLUGINS="gamma")
    assert {p["name"]: p["state"] for p in json.loads(shown.stdout)}.items() >= {
        ("acme", "disabled"),
        ("beta", "disabled"),
        ("gamma", "ok"),
    }


def test_a_malformed_choice_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """Guards against ``-p NAME``, which other tools read as 'load', being taken for nothing."""
    assert "write no:NAME to switch a plugin off, not 'acme'" in failing(["list", "-p", "acme"], capsys)


def test_registry_files_add_models(tmp_path: Path, lab: PluginLab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against models of one's own that are not listed, or listed as somebody else's."""
    (tmp_path / "own.yaml").write_text(MODELS)
    (tmp_path / "other.yaml").write_text(MODELS.replace("mine", "theirs"))
    monkeypatch.setenv("ZOO_REGISTRY", str(tmp_path / "other.yaml"))
    built = load_zoo(registry_files=[tmp_path / "own.yaml"])
    assert {"mine", "theirs", "gpt2"} <= {ref for ref, _ in built.registry.models()}
    assert built.registry.model("mine").spec.n_layers == 2
    assert str(built.registry.model("own/mine").origin) == "own"
    assert built.problems() == []


def test_registry_files_on_a_real_command_line(tmp_path: Path, lab: PluginLab) -> None:
    """Guards against ``--registry`` and ``ZOO_REGISTRY`` that shut each other out, and a file that is given by both."""
    (tmp_path / "own.yaml").write_text(MODELS)
    (tmp_path / "other.yaml").write_text(MODELS.replace("mine", "theirs"))
    both = os.pathsep.join(str(tmp_path / name) for name in ("own.yaml", "other.yaml"))
    result = lab.zoo("list", "models", "--json", "--registry", str(tmp_path / "own.yaml"), ZOO_REGISTRY=both)
    assert (result.returncode, result.stderr) == (0, "")
    rows = {row["name"]: row for row in json.loads(result.stdout)}
    assert (rows["mine"]["origin"], rows["theirs"]["origin"], rows["gpt2"]["origin"]) == ("own", "other", "zoo")


def test_an_own_model_with_a_built_in_name(tmp_path: Path) -> None:
    """Guards against an entry that builds upon the built-in of its own name being taken for a circle."""
    (tmp_path / "own.yaml").write_text("schema: 1\nmodels: {gpt2: {extends: gpt2, spec: {n_layers: 3}}}")
    registry = load_zoo(PluginSelection(frozenset()), registry_files=[tmp_path / "own.yaml"]).registry
    assert registry.model("gpt2").spec.n_layers == 12
    assert registry.model("own/gpt2").spec.n_layers == 3
    assert {"gpt2", "own/gpt2"} <= {ref for ref, _ in registry.models()}


MALFORMED = {
    "not there": (None, "can not read the registry file PATH: No such file or directory."),
    "not YAML": ("models: [", "PATH is not valid YAML: "),
    "another schema": ("schema: 2\nmodels: {}", "PATH is no registry file. It starts with 'schema: 1' and has"),
    "unknown key": ("schema: 1\nmodels: {m: {extend: gpt2}}", "no key of model 'm' in PATH is named 'extend'. Did you"),
    "no mapping": ("schema: 1\nmodels: {m: gpt2}", "model 'm' in PATH must be a mapping, not 'gpt2'."),
    "no base": ("schema: 1\nmodels: {m: {}}", "PATH: model 'm' names neither a family nor a model that it extends."),
    "no text": ("schema: 1\nmodels: {m: {family: [gpt2]}}", "PATH: model 'm': family is a string, not ['gpt2']."),
    "odd bytes": ("schema: 1\x00", "PATH is not valid YAML: "),
}


@pytest.mark.parametrize("fault", MALFORMED)
def test_a_malformed_registry_file_is_an_error(
    fault: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against a file that the user names and that is skipped, and against a traceback."""
    text, message = MALFORMED[fault]
    path = tmp_path / "own.yaml"
    if text is not None:
        path.write_text(text)
    monkeypatch.setenv("ZOO_PLUGINS", "")
    told = failing(["list", "attention", "--registry", str(path)], capsys)
    assert told.startswith(f"zoo: {message.replace('PATH', str(path))}")
    assert told.count("\n") == 1
    monkeypatch.setenv("ZOO_REGISTRY", str(path))
    assert failing(["list", "attention"], capsys) == told


def test_a_model_that_can_not_be_used_is_told_and_left_out(tmp_path: Path) -> None:
    """Guards against one entry of a file (its plugin is not installed here, say) that stops every command."""
    path = tmp_path / "own.yaml"
    path.write_text("schema: 1\nmodels:\n  mine: {extends: gpt2}\n  lost: {extends: acme-base}\n")
    built = load_zoo(PluginSelection(frozenset()), registry_files=[path])
    (line,) = built.problems()
    assert line.startswith(
        f"{path} registers a model that can not be used: model 'lost' (own) extends 'acme-base': no model is named"
    )
    listed = {ref for ref, _ in built.registry.models()}
    assert "mine" in listed
    assert "lost" not in listed
    with pytest.raises(InputError, match="no model is named 'acme-base'"):
        built.registry.model("lost")


def test_clashes_of_registry_files(tmp_path: Path) -> None:
    """Guards against two files, or a file and the built-ins, that can not be told apart."""
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "own.yaml").write_text(MODELS)
    nothing = PluginSelection(frozenset())
    twice = [tmp_path / "a/own.yaml", tmp_path / "b/own.yaml"]
    with pytest.raises(InputError) as error:
        load_zoo(nothing, registry_files=twice)
    expected = f"{twice[1]}: model 'mine' is registered twice by own. Rename the file or the model."
    assert str(error.value) == expected
    (tmp_path / "zoo.yaml").write_text(MODELS)
    with pytest.raises(InputError, match=r"a registry file can not be called zoo\.yaml: 'zoo/' means the built-ins"):
        load_zoo(nothing, registry_files=[tmp_path / "zoo.yaml"])


def test_options_after_a_plugins_command_count(lab: PluginLab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against ``--registry`` and ``-p`` being ignored by a plugin's command, and a warning told twice.

    The registry is built to find the command, before the command's own options are read.
    """
    (tmp_path / "own.yaml").write_text(MODELS)
    hook = "@hookimpl\ndef zoo_register_commands(register):\n    register('look', 'look.kernel:Kernel', help='')\n"
    lab.install("look", hook)
    lab.install("rude", "raise RuntimeError('rude')")

    @click.command(cls=ZooCommand)
    @pass_app
    def look(app: App) -> None:
        click.echo(f"{app.registry.model('mine').name} {sorted(loggers(app.zoo))} {states(app.zoo)['acme']}")

    (lab.root / "look/kernel.py").write_text("import click\nKernel = click.Command('unused')\n")
    monkeypatch.setattr(import_module("look.kernel"), "Kernel", look)
    result = CliRunner().invoke(cli, ["look", "--registry", str(tmp_path / "own.yaml"), "-p", "no:acme"])
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("mine ['beta-logger', 'gamma-logger'")
    assert "disabled by -p no:acme" in result.stdout
    assert result.stderr.count("plugin rude") == 1


@pytest.mark.parametrize("options", [["-p", "no:look"], ["--no-plugins"]])
def test_a_plugin_that_is_switched_off_has_no_command(lab: PluginLab, options: list[str]) -> None:
    """Guards against a plugin whose command runs although the command line switches the plugin off."""
    hook = "@hookimpl\ndef zoo_register_commands(register):\n    register('look', 'look.kernel:look', help='')\n"
    command = "import click\nfrom zoo.cli.app import ZooCommand\n"
    command += "@click.command(cls=ZooCommand)\ndef look():\n    click.echo('ran')\n"
    lab.install("look", hook, files={"look/kernel.py": command})
    ran = lab.zoo("look")
    assert (ran.returncode, ran.stdout) == (0, "ran\n")
    refused = lab.zoo("look", *options)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.startswith("zoo: no command is named 'look'. ")
