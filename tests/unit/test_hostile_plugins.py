"""One bad plugin costs one line. The table of bad ones is in `tests.hostile_plugins`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.hostile_plugins import BROKEN, FLAWED, MODELS, NOISY, Flawed, Hostile
from tests.plugin_lab import HEALTHY, PluginLab, lab_on_path, plugin_of, run_inside
from zoo.errors import InputError
from zoo.plugins import Zoo, load_zoo
from zoo.registry import BUILT_IN, KINDS

BUILT_INS = {"sdpa", "flex", "eager"}


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[PluginLab]:
    with lab_on_path(tmp_path) as lab:
        lab.install_healthy()
        yield lab


def by_name(row: Hostile) -> str:
    return row.name


def assert_unharmed(built: Zoo) -> None:
    """The built-ins and the healthy plugin are all there and can be used."""
    listed = {ref for ref, _ in built.registry.components("attention")}
    assert listed >= {*BUILT_INS, "healthy-attention"}
    assert plugin_of(built, "healthy").problems() == []
    assert built.registry.load("attention", "healthy-attention").__name__ == "Kernel"
    assert built.registry.model("gpt2").spec.n_layers == 12


def assert_line(row: Hostile, built: Zoo, root: Path) -> None:
    (line,) = plugin_of(built, row.plugin_name).problems()
    assert "\n" not in line
    assert row.line(root).fullmatch(line), line
    assert built.problems() == [line]


@pytest.mark.parametrize("row", BROKEN, ids=by_name)
def test_a_broken_plugin_is_skipped_whole_with_one_line_that_says_why(row: Hostile, lab: PluginLab) -> None:
    """Guards against one plugin that takes the tool down, is half registered, or vanishes without a word."""
    row.install(lab)
    built = load_zoo()
    plugin = plugin_of(built, row.plugin_name)
    assert (plugin.state, plugin.items) == ("broken", [])
    assert row.expected(lab.root).fullmatch(plugin.reason), plugin.reason
    assert_line(row, built, lab.root)
    assert_unharmed(built)
    assert built.registry.broken_plugins == [row.plugin_name]
    of_row = [item for kind in KINDS for _, item in built.registry.items(kind) if item.origin.distribution == row.name]
    assert of_row == plugin_of(built, "pair:a").items if row.name == "pair" else not of_row


@pytest.mark.parametrize("row", BROKEN, ids=by_name)
def test_plugins_show_has_reason_and_traceback(row: Hostile, lab: PluginLab) -> None:
    """Guards against an author who is told that something is wrong, and not where."""
    row.install(lab)
    built = load_zoo()
    shown = run_inside(built, "plugins", "show", row.plugin_name)
    assert shown.exit_code == 0
    reason = plugin_of(built, row.plugin_name).reason
    assert "broken" in shown.output
    assert reason in shown.output
    assert "zoo.errors." in shown.output or "Traceback" in shown.output
    listed = run_inside(built, "plugins", "list")
    (line,) = [line for line in listed.output.splitlines() if line.split()[0] == row.plugin_name]
    assert "  broken  " in line
    assert reason in line


@pytest.mark.parametrize("row", FLAWED, ids=by_name)
def test_a_flawed_plugin_loads_with_one_line(row: Flawed, lab: PluginLab) -> None:
    """Guards against a fault that nobody is told about, and against one that costs the whole plugin."""
    row.install(lab)
    built = load_zoo()
    assert plugin_of(built, row.plugin_name).state == "ok"
    assert_line(row, built, lab.root)
    assert_unharmed(built)


@pytest.mark.parametrize("row", MODELS, ids=by_name)
def test_an_unusable_model_is_left_out_of_listings_and_explained_when_named(row: Flawed, lab: PluginLab) -> None:
    """Guards against an invalid entry that breaks ``list models`` and ``download`` for everybody."""
    row.install(lab)
    built = load_zoo()
    plugin = plugin_of(built, row.name)
    named = [item.name for item in plugin.items if not item.name.startswith("_")]
    assert len(plugin.faults) == len(named)
    for command in (["list", "models"], ["download"]):
        result = run_inside(built, *command)
        assert result.exit_code == 0, result.output
        listed = {line.split()[0] for line in result.stdout.splitlines()}
        assert "gpt2" in listed
        assert not listed & set(named)
    shown = run_inside(built, "plugins", "show", row.name)
    assert all(fault in shown.output for fault in plugin.faults)
    assert f"{len(named)} of them can not be used" in run_inside(built, "plugins", "list").output
    if row.name != "family-unknown":  # its architecture is known all the same
        with pytest.raises(InputError, match=named[0]):
            _ = built.registry.model(named[0]).spec


def test_the_good_models_of_a_plugin_survive_a_bad_one(lab: PluginLab) -> None:
    """Guards against a model that disappears because another of the same plugin builds upon something uninstalled."""
    models = "schema: 1\nmodels: {good: {extends: gpt2, spec: {n_layers: 2}}, bad: {extends: of-another-plugin}}"
    source = "@hookimpl\ndef zoo_register_models(register):\n    register.file('mixed')\n"
    lab.install("mixed", source, files={"mixed/registry.yaml": models})
    listed = dict(load_zoo().registry.models())
    assert listed["good"].spec.n_layers == 2
    assert "bad" not in listed


def test_all_at_once_on_a_real_command_line(lab: PluginLab) -> None:
    """Guards against faults that hide one another, and against anything but the result on standard output.

    ``torch`` is a stand-in here: a plugin that imports it is told from one that does not.
    """
    rows = [*BROKEN, *FLAWED, IMPORTS_TORCH]
    for row in rows:
        row.install(lab)
    result = lab.zoo("list", "attention", "--json")
    assert result.returncode == 0, result.stderr
    listed = {row["name"]: row for row in json.loads(result.stdout)}
    assert set(listed) >= {*BUILT_INS, "healthy-attention"}
    assert {listed[name]["origin"] for name in BUILT_INS} == {BUILT_IN}
    lines = result.stderr.splitlines()
    for row, line in zip(sorted(rows, key=lambda row: row.plugin_name), lines, strict=True):
        assert line.startswith("zoo: ")
        assert row.line(lab.root).fullmatch(line.removeprefix("zoo: ")), line

    states = {p["name"]: p["state"] for p in json.loads(lab.zoo("plugins", "list", "--json").stdout)}
    assert states.items() >= {row.plugin_name: "broken" for row in BROKEN}.items()
    assert states.items() >= {row.plugin_name: "ok" for row in [*FLAWED, IMPORTS_TORCH]}.items()
    shown = lab.zoo("plugins", "show", "half-way")
    assert shown.returncode == 0
    assert 'plugin.py", line 7, in zoo_register_models' in shown.stdout


IMPORTS_TORCH = Flawed(
    name="zz-torch",  # the last: torch is imported once
    plugin="import torch\n@hookimpl\ndef zoo_register_loggers(register):\n    pass\n",
    reason="imports torch when it registers, which slows every command.",
    files={"torch.py": ""},
)


def test_the_table_is_of_plugins_that_differ() -> None:
    """Guards against a row that replaces another in the test above."""
    names = [row.name for row in [*BROKEN, *FLAWED, IMPORTS_TORCH]]
    assert len(set(names)) == len(names)
    assert NOISY


def test_a_built_in_can_not_be_shadowed(lab: PluginLab) -> None:
    """Guards against a plugin that changes what existing recipes mean by taking the name of a built-in."""
    source = (
        "@hookimpl\ndef zoo_register_attention(register):\n    register('sdpa', 'acme.kernel:Kernel', help='mine')\n"
    )
    lab.install("acme", source)
    built = load_zoo()
    assert built.problems() == []
    assert built.registry.find("attention", "sdpa").origin.distribution == BUILT_IN
    assert built.registry.find("attention", "zoo/sdpa").origin.distribution == BUILT_IN
    assert built.registry.load("attention", "acme/sdpa").__module__ == "acme.kernel"
    assert "acme/sdpa" in run_inside(built, "list", "attention").output
    assert "mine" in run_inside(built, "show", "attention", "acme/sdpa").output


def test_two_plugins_with_one_name_stay_reachable(lab: PluginLab) -> None:
    """Guards against a clash that is decided by installation order, or that makes both unusable."""
    for name in ("acme", "beta"):
        call = f"register('fast', '{name}.kernel:Kernel', help='')"
        lab.install(name, f"@hookimpl\ndef zoo_register_attention(register):\n    {call}\n", version="2.1")
    built = load_zoo()
    assert built.problems() == []
    with pytest.raises(InputError) as error:
        built.registry.find("attention", "fast")
    assert str(error.value) == ("attention 'fast' is provided by acme 2.1 and beta 2.1. Write acme/fast or beta/fast.")
    assert built.registry.load("attention", "beta/fast").__module__ == "beta.kernel"
    assert {"acme/fast", "beta/fast"} <= {ref for ref, _ in built.registry.components("attention")}


def test_a_slow_plugin_is_only_timed(lab: PluginLab) -> None:
    """Guards against a slow import that is taken for a failure; its time is recorded, so that it can be found."""
    lab.install("slow", "import time\ntime.sleep(0.2)\n@hookimpl\ndef zoo_register_loggers(register):\n    pass\n")
    built = load_zoo()
    assert built.problems() == []
    assert plugin_of(built, "slow").seconds >= 0.2


@pytest.mark.parametrize(
    ("newer", "found"),
    [
        ("[zoo.plugins]\nhealthy = healthy.plugin\n", ["1.0"]),
        ("[zoo.plugins]\nhealthy-old = healthy.plugin\n", ["1.0"]),
        ("[console_scripts]\nhealthy = healthy:main\n", []),
    ],
)
def test_an_older_copy_further_down_the_path_does_not_count(
    newer: str, found: list[str], lab: PluginLab, tmp_path: Path
) -> None:
    """Guards against listing what a distribution registered before its upgrade, when both are on the path."""
    old = PluginLab(tmp_path / "old")
    old.install("healthy", entry_points="[zoo.plugins]\nhealthy-old = healthy.plugin\n", version="0.1")
    lab.install("healthy", HEALTHY, entry_points=newer)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.path", [*sys.path, str(old.root)])
        plugins = load_zoo().plugins
    assert [plugin.version for plugin in plugins if plugin.distribution == "healthy"] == found


def test_plugins_list_says_what_each_provides(lab: PluginLab) -> None:
    """Guards against a list in which a working plugin can not be told from an empty one."""
    output = run_inside(load_zoo(), "plugins").output
    (line,) = [line for line in output.splitlines() if line.startswith("healthy ")]
    assert "ok" in line.split()
    assert "1 attention" in line
    assert run_inside(SimpleNamespace(plugins=[]), "plugins").output == "no plugins are installed\n"  # type: ignore[arg-type]
