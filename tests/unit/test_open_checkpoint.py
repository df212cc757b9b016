"""Which converter opens a path, whatever else is installed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import reference
from zoo.convert.load import open_checkpoint
from zoo.errors import FileFormatError, UnavailableError
from zoo.plugins import PluginSelection, load_zoo
from zoo.registry import Component, Origin, Registry


@pytest.fixture
def crowded() -> Registry:
    """The built-ins, and what other people's converters can be: not importable, and short of a requirement."""
    registry = load_zoo(PluginSelection(only=frozenset())).registry
    for name, requires in (("absent", ()), ("needy", ("no-such-distribution-xyz>=2",))):
        registry.add(
            Component(
                kind="converter",
                name=name,
                target="json:NoSuchConverter",
                help=name,
                requires=requires,
                origin=Origin(distribution="somebody"),
            )
        )
    return registry


def test_a_converter_that_can_not_be_used_does_not_stop_the_others(crowded: Registry, tmp_path: Path) -> None:
    reference.save_tiny(tmp_path, "gpt2", reference.GPT2)
    assert open_checkpoint(tmp_path, crowded).family.name == "gpt2"


def test_it_is_named_where_nothing_else_reads_the_path_or_it_is_asked_for(crowded: Registry, tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match=r"holds no model.*points to 'json:NoSuchConverter'.*no-such-distr"):
        open_checkpoint(tmp_path, crowded)
    with pytest.raises(UnavailableError, match="no-such-distribution-xyz"):
        open_checkpoint(tmp_path, crowded, format_name="needy")
