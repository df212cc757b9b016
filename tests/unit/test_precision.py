"""Precisions with options, and those that change layers: how they are chosen, and what a run does with them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch

from zoo.errors import InputError, UnavailableError, UnknownNameError
from zoo.precision.base import Precision, choose_precision, load_precision
from zoo.precision.builtin import BF16_MIXED
from zoo.registry import Component, Origin, Registry
from zoo.runs.run import _precision
from zoo.train.launch import make_fabric
from zoo.train.recipe import Recipe

ENTERED: list[tuple[str, bool]] = []


@dataclass(frozen=True)
class Options:
    margin: int = 0
    skip: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Recorded(Precision):
    """Says when its context is entered, and whether autocast is on then."""

    options: Options = field(default_factory=Options)

    def context(self) -> AbstractContextManager[None]:
        return self._entered()

    @contextmanager
    def _entered(self) -> Iterator[None]:
        ENTERED.append((self.name, torch.is_autocast_enabled("cpu")))
        yield


RECORDED = Recorded(name="recorded", param_dtype=torch.bfloat16, inference="bf16-true", recomputes=False)


@pytest.fixture
def registry() -> Registry:
    registry = Registry()
    here = Origin(distribution="test")
    for name, target in {"recorded": f"{__name__}:RECORDED", "bf16-mixed": "zoo.precision.builtin:BF16_MIXED"}.items():
        registry.add(Component(kind="precision", name=name, target=target, help="", origin=here))
    return registry


def recipe(**values: Any) -> Recipe:
    return Recipe.model_validate({"model": "gpt2", "data": "d", "out": "o", "device": "cpu"} | values)


def test_options_arrive(registry: Registry) -> None:
    made = load_precision("recorded", {"margin": 2, "skip": ["head"]}, registry)
    assert made.options == Options(margin=2, skip=("head",))
    assert load_precision("recorded", {}, registry).options == Options()
    with pytest.raises(UnknownNameError, match=r"no option of precision 'recorded' is named 'margn'.*'margin'"):
        load_precision("recorded", {"margn": 2}, registry)
    with pytest.raises(InputError, match="precision 'bf16-mixed' has no option 'margin': it has none"):
        load_precision("bf16-mixed", {"margin": 2}, registry)


def test_what_is_for_training_says_what_to_take_instead(registry: Registry) -> None:
    asked: dict[str, Any] = {"stored": torch.bfloat16, "quantized": False, "device": "cpu", "registry": registry}
    for name, instead in {"recorded": "bf16-true", "bf16-mixed": "bf16-true"}.items():
        with pytest.raises(UnavailableError) as caught:
            choose_precision(name, **asked)
        assert caught.value.fix == f"Take {instead}, or 32-true."
        assert choose_precision(name, training=True, **asked).name == name


def test_layers_that_can_not_be_computed_twice(registry: Registry) -> None:
    """Guards activation checkpointing, which would run them outside of their context."""
    assert _precision(recipe(precision={"use": "recorded", "margin": 1}), registry).options.margin == 1
    with pytest.raises(InputError, match="'recorded' and activation_checkpointing 'block' do not go together"):
        _precision(recipe(precision="recorded", activation_checkpointing="block"), registry)


@pytest.mark.parametrize(("precision", "with_autocast"), [(RECORDED, False), (None, True)])
def test_a_step_runs_in_its_context(precision: Precision | None, with_autocast: bool) -> None:
    """Guards both kinds: with one dtype, and with autocast, which has to be on by then."""
    chosen = precision or replace(RECORDED, param_dtype=torch.float32, autocast_dtype=BF16_MIXED.autocast_dtype)
    ENTERED.clear()
    with make_fabric(recipe(), torch.device("cpu"), chosen).autocast():
        pass
    assert [("recorded", with_autocast)] == ENTERED
