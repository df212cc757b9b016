"""``zoo plugins new KIND NAME`` for every kind: generated, installed with pip, listed, tested, checked, and gone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.plugin_environment import Environment
from zoo.registry import KINDS
from zoo.testing import CONTRACTS


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    return Environment(tmp_path_factory.mktemp("environment"))


@pytest.fixture(scope="module")
def plugins(environment: Environment) -> dict[str, Path]:
    """One of every kind, generated and installed beside each other."""
    made = {}
    for kind in CONTRACTS:
        directory = environment.directory / f"my-{kind}"
        printed = environment.zoo("plugins", "new", kind, f"my-{kind}", "--out", directory).stdout
        assert printed.splitlines()[0] == str(directory / "pyproject.toml")
        made[kind] = directory
    environment.run(
        "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--no-index", "--quiet", *made.values()
    )
    return made


def test_every_kind_has_a_template() -> None:
    """Guards against a kind that is added without one: a model needs none, it is data."""
    assert CONTRACTS.keys() | {"model"} == KINDS.keys()


def test_they_are_listed(environment: Environment, plugins: dict[str, Path]) -> None:
    """Guards against a template whose hook, target or metadata is wrong."""
    listed = {plugin["name"]: plugin for plugin in environment.zoo_json("plugins", "list")}
    everything = environment.zoo_json("list", "--probe")
    for kind in plugins:
        assert listed[f"zoo-my-{kind}"]["state"] == "ok"
        assert listed[f"zoo-my-{kind}"]["provides"][kind] == 1
        rows = {row["name"]: row["state"] for row in everything[KINDS[kind]]}
        assert rows[f"my-{kind}"] == "ok"


def test_their_tests_pass(environment: Environment, plugins: dict[str, Path]) -> None:
    """Guards against a start that is broken from the beginning; and the code is clean."""
    tests = [directory / "tests" for directory in plugins.values()]
    ran = environment.run("-m", "pytest", "-p", "no:cacheprovider", "-v", *tests)
    assert " failed" not in ran.stdout
    for kind in plugins:
        assert f"test_my_{kind}.py::TestMy{kind.capitalize()}::test_registration PASSED" in ran.stdout
    clean = ["-m", "ruff", "check", "--isolated", "--select", "E,F,W,I,ANN,UP,B", "--line-length", "120"]
    subprocess.run([sys.executable, *clean, *map(str, plugins.values())], check=True)


def test_they_are_checked(environment: Environment, plugins: dict[str, Path]) -> None:
    """Guards the command beside the tests: a passing plugin, one with a fault, and one that is not there."""
    report = environment.zoo_json("plugins", "check", "zoo-my-sampler")
    assert report["ok"] and {check["kind"] for check in report["checks"]} == {"plugin", "sampler"}
    assert {check["outcome"] for check in report["checks"]} == {"passed", "not run"}
    module = Path(environment.run("-c", "import zoo_my_sampler.my_sampler as m; print(m.__file__)").stdout.strip())
    module.write_text(module.read_text().replace("return logits_V.masked_fill", "return logits_V.masked_fill_"))
    refused = environment.zoo("plugins", "check", "zoo-my-sampler", exit_code=1)
    assert "failed: sampler my-sampler: test_inputs_are_not_changed" in refused.stdout
    assert "the logits are written to" in refused.stdout
    unknown = environment.zoo("plugins", "check", "zoo-my-samplr", exit_code=2)
    assert "Did you mean 'zoo-my-sampler'" in unknown.stderr


def test_the_built_ins_are_checked(environment: Environment) -> None:
    """Guards the same command for zoo's own; by kind, since all of them take minutes (tests/contract runs all)."""
    report = environment.zoo_json("plugins", "check", "zoo", "--kind", "samplers", "--kind", "dataset")
    assert report["ok"] and {check["kind"] for check in report["checks"]} == {"sampler", "dataset"}
    expected = [check for check in report["checks"] if check["outcome"] == "expected"]
    assert [check["component"] for check in expected] == ["tinystories"] and expected[0]["reason"]
    printed = environment.zoo("plugins", "check", "zoo", "--kind", "samplers").stdout.splitlines()
    assert printed[0].split() == ["kind", "component", "passed", "failed", "expected", "not", "run"]
    assert ["sampler", "top-k"] in [line.split()[:2] for line in printed]
    refused = environment.zoo("plugins", "check", "zoo", "--kind", "model", exit_code=2)
    assert "no kind is named 'model'" in refused.stderr


def test_a_plugin_can_say_more(environment: Environment, plugins: dict[str, Path]) -> None:
    """Guards expected failures on the command line: with a reason, and only while they fail."""
    package = plugins["logger"] / "zoo_my_logger"
    declared = """
from typing import ClassVar
from zoo.testing import LoggerContract

class Known(LoggerContract):
    component = "my-logger"
    expected_failures: ClassVar = CHECKS
"""
    init = package / "__init__.py"
    init.write_text(init.read_text().replace("ZOO_API = 1", 'ZOO_API = 1\nZOO_CONTRACTS = "zoo_my_logger.contracts"'))
    expected = {"test_a_run_is_logged": "it is known"}
    (package / "contracts.py").write_text(declared.replace("CHECKS", json.dumps(expected)))
    environment.install(plugins["logger"])
    strict = environment.zoo("plugins", "check", "zoo-my-logger", exit_code=1).stdout
    assert "failed: logger my-logger: test_a_run_is_logged" in strict and "it is known" in strict


def test_they_leave(environment: Environment, plugins: dict[str, Path]) -> None:
    """Guards against traces of what was uninstalled. The last test of this file."""
    names = [f"zoo-my-{kind}" for kind in plugins]
    environment.run("-m", "pip", "uninstall", "--yes", "--quiet", *names)
    assert not {plugin["name"] for plugin in environment.zoo_json("plugins", "list")} & set(names)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("kernel", "mine"), "no kind of plugin is named 'kernel'."),
        (("attention", "Mine!"), "'Mine!' is no name for a plugin."),
        (("attention", "sdpa"), "the attention 'sdpa' is zoo's own"),
        (("attention", "mine", "--out", "."), ". is there already."),
    ],
)
def test_what_is_refused(environment: Environment, arguments: tuple[str, ...], message: str) -> None:
    """Guards against half a plugin, a name that nobody could use, and files that are written over."""
    assert message in environment.zoo("plugins", "new", *arguments, exit_code=2).stderr
