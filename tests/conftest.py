"""Shared fixtures: the built-in registry, and tiny random models of the reference library."""

from __future__ import annotations

import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

from zoo.plugins import PluginSelection, load_zoo
from zoo.registry import Registry


@pytest.fixture(scope="session")
def registry() -> Registry:
    """The built-ins alone, whatever else is installed."""
    return load_zoo(PluginSelection(only=frozenset())).registry


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Which mutant was caught by which check of the contracts, and what that said."""
    mutation = sys.modules.get("tests.contract.mutation")
    if mutation is None or not mutation.TABLE:
        return
    n_mutants = len({row[:2] for row in mutation.TABLE})
    terminalreporter.section(f"{n_mutants} mutants, and the checks that caught them")
    widths = [max(len(row[i]) for row in mutation.TABLE) for i in range(3)]
    for row in mutation.TABLE:
        cells = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False))
        terminalreporter.write_line(f"{cells}  {row[3][:90]}")
