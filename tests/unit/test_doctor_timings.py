"""``zoo doctor --timings`` names the plugin that slows every command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.plugin_lab import lab_on_path, run_inside
from zoo.plugins import load_zoo


def test_a_slow_plugin_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a slow start that nobody can explain; a quick plugin is not blamed."""
    monkeypatch.setattr("zoo.cli.doctor._unusable", lambda registry, optional: [])
    with lab_on_path(tmp_path) as lab:
        lab.install_healthy()
        lab.install("sluggish", "import time; time.sleep(0.2)\n@hookimpl\ndef zoo_register_loggers(register): pass\n")
        facts = json.loads(run_inside(load_zoo(), "doctor", "--timings", "--json").stdout)
    assert facts["timings"].keys() == {"healthy", "sluggish"}
    assert int(facts["timings"]["sluggish"].split()[0]) >= 200
    (line,) = [line for line in facts["problems"] if "slower" in line]
    assert line.startswith("plugin sluggish makes every command 2")
    assert "import inside of functions what sluggish.plugin imports, or -p no:sluggish" in line
