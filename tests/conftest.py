"""Shared fixtures: the built-in registry, and tiny random models of the reference library."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # each of the processes has a core

from zoo.plugins import PluginSelection, load_zoo
from zoo.registry import Registry


@pytest.fixture(scope="session")
def registry() -> Registry:
    """The built-ins alone, whatever else is installed."""
    return load_zoo(PluginSelection(only=frozenset())).registry


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _caught(request: pytest.FixtureRequest) -> Iterator[None]:
    """Pass on what the contracts caught, also from another process."""
    yield
    mutation = sys.modules.get("tests.contract.mutation")
    while mutation is not None and mutation.TABLE:
        request.node.user_properties.append(("caught", mutation.TABLE.pop(0)))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Which mutant was caught by which check of the contracts, and what that said."""
    reports = [
        report for found in terminalreporter.stats.values() for report in found if hasattr(report, "user_properties")
    ]
    table = [
        row
        for report in reports
        for name, row in report.user_properties
        if name == "caught" and report.when == "teardown"
    ]
    if not table:
        return
    n_mutants = len({tuple(row[:2]) for row in table})
    terminalreporter.section(f"{n_mutants} mutants, and the checks that caught them")
    widths = [max(len(row[i]) for row in table) for i in range(3)]
    for row in table:
        cells = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False))
        terminalreporter.write_line(f"{cells}  {row[3][:90]}")
