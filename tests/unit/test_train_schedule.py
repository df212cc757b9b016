"""Learning rates: the curves of `transformers`, and no step without effect."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR

from zoo.errors import InputError, UnknownNameError
from zoo.train.schedule import SHAPES, build_schedule

TOTAL, WARMUP, LR = 40, 6, 3e-4


def rates(make: Callable[[Optimizer], LambdaLR]) -> list[float]:
    """What a scheduler sets for each step, and one more."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=LR)
    scheduler = make(optimizer)
    found = []
    for _ in range(TOTAL + 1):
        found.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        scheduler.step()
    return found


N_DECAY = 17
WSD: dict[str, Any] = {"decay_ratio": N_DECAY / (TOTAL - WARMUP)}


def their_wsd(optimizer: Optimizer, n_warmup: int, decay: str) -> LambdaLR:
    return transformers.get_wsd_schedule(optimizer, n_warmup, N_DECAY, num_training_steps=TOTAL, decay_type=decay)


THEIRS: dict[str, tuple[dict[str, Any], float, Callable[[Optimizer, int], LambdaLR]]] = {
    "cosine": ({}, 0.0, lambda o, w: transformers.get_cosine_schedule_with_warmup(o, w, TOTAL)),
    "cosine-min": (
        {},
        0.1,
        lambda o, w: transformers.get_cosine_with_min_lr_schedule_with_warmup(o, w, TOTAL, min_lr_rate=0.1),
    ),
    "linear": ({}, 0.0, lambda o, w: transformers.get_linear_schedule_with_warmup(o, w, TOTAL)),
    "constant": ({}, 0.0, transformers.get_constant_schedule_with_warmup),
    "wsd-linear": (WSD | {"decay": "linear"}, 0.0, lambda o, w: their_wsd(o, w, "linear")),
    "wsd-cosine": (WSD | {"decay": "cosine"}, 0.0, lambda o, w: their_wsd(o, w, "cosine")),
    "wsd-sqrt": (WSD, 0.0, lambda o, w: their_wsd(o, w, "1-sqrt")),
}


@pytest.mark.parametrize("name", THEIRS)
def test_parity(name: str) -> None:
    """After the warm-up the same; during it, theirs one step later, since its first step is one with a rate of zero."""
    options, min_ratio, make = THEIRS[name]
    schedule = build_schedule(
        name.partition("-")[0], options, lr=LR, total_steps=TOTAL, warmup_steps=WARMUP, min_lr_ratio=min_ratio
    )
    theirs, theirs_later = rates(lambda o: make(o, WARMUP)), rates(lambda o: make(o, WARMUP + 1))
    assert [schedule(s) for s in range(WARMUP)] == pytest.approx(theirs_later[1 : WARMUP + 1])
    assert [schedule(s) for s in range(WARMUP, TOTAL + 1)] == pytest.approx(theirs[WARMUP:], abs=1e-12)


def test_cosine_of_torch() -> None:
    schedule = build_schedule("cosine", lr=LR, total_steps=TOTAL, min_lr_ratio=0.2)
    theirs = rates(lambda o: CosineAnnealingLR(o, TOTAL, eta_min=0.2 * LR))  # type: ignore[arg-type,return-value]
    assert [schedule(step) for step in range(TOTAL + 1)] == pytest.approx(theirs)


@given(
    st.sampled_from(sorted(SHAPES)),
    st.integers(1, 300).flatmap(lambda total: st.tuples(st.just(total), st.integers(0, total - 1))),
    st.sampled_from([0.0, 0.1, 1.0]),
)
def test_properties(name: str, steps: tuple[int, int], min_lr_ratio: float) -> None:
    """Guards steps with a rate of zero, a peak that is missed, and rates that rise again, for runs of any length."""
    total, warmup = steps
    schedule = build_schedule(name, lr=LR, total_steps=total, warmup_steps=warmup, min_lr_ratio=min_lr_ratio)
    found = [schedule(step) for step in range(total)]
    assert all(0 < rate <= LR * (1 + 1e-12) for rate in found)
    assert found[warmup] == pytest.approx(LR) and found[: warmup + 1] == sorted(found[: warmup + 1])
    assert found[warmup:] == sorted(found[warmup:], reverse=True)
    assert min(found[warmup:]) >= LR * min_lr_ratio * (1 - 1e-12)
    lowest = LR if name == "constant" else LR * min_lr_ratio
    assert schedule(total) == schedule(total + 100) == pytest.approx(lowest, abs=1e-12)
    assert found == [schedule(step) for step in range(total)]  # nothing is kept from call to call


def test_numbers() -> None:
    """The curve in numbers, so that a change of it is a change here."""
    cosine = build_schedule("cosine", lr=1.0, total_steps=10, warmup_steps=2)
    assert [cosine(s) for s in (0, 1, 2, 6)] == pytest.approx([1 / 3, 2 / 3, 1.0, 0.5])
    wsd = build_schedule("wsd", lr=1.0, total_steps=100)
    assert [wsd(s) for s in (0, 80, 85)] == pytest.approx([1.0, 1.0, 0.5])
    assert math.isclose(wsd(100), 0.0, abs_tol=1e-12)


@pytest.mark.parametrize(
    ("name", "options", "changes", "error", "message"),
    [
        ("cosin", {}, {}, UnknownNameError, "Did you mean 'cosine'"),
        ("wsd", {"decay_rato": 0.1}, {}, UnknownNameError, "option of schedule wsd .*'decay_rato'.*'decay_ratio'"),
        ("wsd", {"decay_ratio": 0.0}, {}, InputError, "above 0 and at most 1, not 0.0"),
        ("wsd", {"decay": "exp"}, {}, InputError, "sqrt, linear or cosine, not 'exp'"),
        ("cosine", {}, {"warmup_steps": 10}, InputError, "below the 10 steps of the run, not 10"),
        ("cosine", {}, {"warmup_steps": -1}, InputError, "not -1"),
        ("cosine", {}, {"total_steps": 0}, InputError, "a run of 0 steps"),
    ],
)
def test_refused(
    name: str, options: dict[str, Any], changes: dict[str, int], error: type[Exception], message: str
) -> None:
    arguments: dict[str, Any] = {"total_steps": 10} | changes
    with pytest.raises(error, match=message):
        build_schedule(name, options, lr=1.0, **arguments)
