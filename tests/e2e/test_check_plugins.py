"""``zoo plugins check`` passes for every first-party plugin: as a user installs it, on this machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.plugin_environment import Environment

PLUGINS = sorted(
    path for path in (Path(__file__).parents[2] / "plugins").iterdir() if (path / "pyproject.toml").is_file()
)


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """With all of them beside each other."""
    made = Environment(tmp_path_factory.mktemp("environment"))
    made.run("-m", "pip", "install", "--no-deps", "--no-build-isolation", "--no-index", "--quiet", *PLUGINS)
    return made


@pytest.mark.parametrize("plugin", PLUGINS, ids=lambda path: path.name)
def test_it_meets_its_contracts(plugin: Path, environment: Environment) -> None:
    """Guards first-party plugins against the rules that others are held to. What can not run here has its reason."""
    report = environment.zoo_json("plugins", "check", plugin.name)
    outcomes = [check["outcome"] for check in report["checks"]]
    assert report["ok"] and outcomes.count("passed") >= 6
    assert all(check["reason"] for check in report["checks"] if check["outcome"] != "passed")
