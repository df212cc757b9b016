"""What every plugin has to do beside what it adds: cost nothing, change nothing, and say what it needs."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cached_property
from importlib import import_module
from typing import Any

from zoo.hooks import API_VERSION
from zoo.plugins import Plugin, load_zoo, plugin_name
from zoo.registry import Component, component_status
from zoo.testing.contract import Contract

SLOW_SECONDS = 0.25
_OBSERVE = """
import json, os, sys, importlib, warnings
import torch
import sympy  # torch loads it when it first needs it, and it adds a filter of warnings
def state():
    return {
        "os.environ": dict(os.environ), "sys.path": list(sys.path), "sys.argv": list(sys.argv),
        "torch.get_default_dtype": str(torch.get_default_dtype()), "warnings.filters": len(warnings.filters),
        "torch.is_grad_enabled": torch.is_grad_enabled(), "torch.get_num_threads": torch.get_num_threads(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "random numbers": torch.random.get_rng_state().tolist(), "working directory": os.getcwd(),
        "float32 matmul precision": torch.get_float32_matmul_precision(),
    }
before = state()
for name in json.loads(sys.argv[1]):
    try:
        importlib.import_module(name)
    except Exception:
        pass
after = state()
print(json.dumps([key for key in before if before[key] != after[key]]))
"""
_OPTIONS = """
import json, sys, importlib
for name in json.loads(sys.argv[1]):
    importlib.import_module(name)
print(json.dumps([name for name in ("torch", "numpy", "transformers") if name in sys.modules]))
"""


class PluginContract(Contract, standard=True):
    """A plugin by the name of its distribution: ``component``."""

    kind = "plugin"

    @cached_property
    def plugin(self) -> Plugin:
        """What became of it."""
        found = [p for p in load_zoo().plugins if p.distribution == plugin_name(self.component)]
        assert found, f"no plugin of a distribution {self.component!r} is installed"
        return found[0]

    @property
    def components(self) -> list[Component]:
        """What it registers, but models."""
        return [item for item in self.plugin.items if isinstance(item, Component)]

    def test_registration(self) -> None:
        """It loads without a word, and registers something."""
        plugin = self.plugin
        assert plugin.state == "ok", f"{plugin.reason}\n{plugin.traceback}"
        assert not plugin.problems(), "\n".join(plugin.problems())
        assert plugin.items, f"{plugin.entry_point} registers nothing"

    def test_it_says_its_version_of_the_hooks(self) -> None:
        """``ZOO_API`` in its module: a later zoo with other hooks can then tell it apart."""
        declared = getattr(import_module(self.plugin.entry_point), "ZOO_API", None)
        assert declared == API_VERSION, f"write ZOO_API = {API_VERSION} in {self.plugin.entry_point}"

    def test_it_is_quick(self) -> None:
        """Every command waits for it, also those that use nothing of it."""
        assert self.plugin.seconds < SLOW_SECONDS, f"importing it takes {self.plugin.seconds:.2f} s"

    def test_a_remedy_is_given(self) -> None:
        """What requires or needs something says how to get it."""
        without = [c.name for c in self.components if (c.requires or c.needs is not None) and not c.fix]
        assert not without, f"{', '.join(without)} can be unavailable, and register() has no fix="
        assert all(component_status(c).state != "broken" for c in self.components)

    def test_options_import_no_torch(self) -> None:
        """``zoo show`` reads them, and imports nothing that is slow."""
        modules = sorted({c.options.partition(":")[0] for c in self.components if c.options})
        imported = _in_a_new_process(_OPTIONS, modules) if modules else []
        assert not imported, f"{', '.join(modules)} import {', '.join(imported)}"

    def test_importing_it_changes_nothing(self) -> None:
        """Neither the environment, nor torch's flags and random numbers: installed is not active."""
        modules = sorted({self.plugin.entry_point, *(c.target.partition(":")[0] for c in self.components)})
        changed = _in_a_new_process(_OBSERVE, modules)
        assert not changed, f"importing it changes {', '.join(changed)}"


def _in_a_new_process(script: str, modules: list[str]) -> Any:
    arguments = [sys.executable, "-c", script, json.dumps(modules)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1])
