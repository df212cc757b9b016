"""Shared fixtures: the built-in registry, and tiny random models of the reference library."""

from __future__ import annotations

import os

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
