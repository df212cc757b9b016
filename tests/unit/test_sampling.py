"""Each sampling step does what its paper says, and nothing that was dropped is ever drawn."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.testing import assert_close

from zoo.errors import InputError, ZooError
from zoo.generate.sampling import (
    MinP,
    RepetitionPenalty,
    Sampler,
    SamplingOptions,
    Temperature,
    TokenSampler,
    TopK,
    TopP,
)

LOGITS = torch.tensor([2.0, -1.0, 0.5, 2.5, -3.0, 0.0])
SEEN = [3, 1, 3]

theirs = transformers.generation.logits_process


@pytest.mark.parametrize(
    ("ours", "reference"),
    [
        (RepetitionPenalty(1.7), theirs.RepetitionPenaltyLogitsProcessor(1.7)),
        (Temperature(0.3), theirs.TemperatureLogitsWarper(0.3)),
        (TopK(2), theirs.TopKLogitsWarper(2)),
        (TopK(50), theirs.TopKLogitsWarper(50)),
        (TopP(0.5), theirs.TopPLogitsWarper(0.5)),
        (TopP(0.9), theirs.TopPLogitsWarper(0.9)),
        (TopP(1e-9), theirs.TopPLogitsWarper(1e-9)),
        (MinP(0.3), theirs.MinPLogitsWarper(0.3)),
    ],
    ids=lambda value: "theirs" if isinstance(value, theirs.LogitsProcessor) else str(value),  # no addresses
)
def test_equals_transformers(ours: Sampler, reference: object) -> None:
    """Guards every formula against the reference library's."""
    expected: Tensor = reference(torch.tensor([SEEN]), LOGITS[None].clone())[0]  # type: ignore[operator]
    assert_close(ours(LOGITS.clone(), SEEN), expected)


def test_chain_equals_transformers_order() -> None:
    """Guards the order: a penalty after top-k keeps other tokens than one before it."""
    options = SamplingOptions(temperature=0.6, top_k=4, top_p=0.8, min_p=0.05, repetition_penalty=1.4)
    ours = LOGITS.clone()
    for step in options.chain():
        ours = step(ours, SEEN)
    expected = LOGITS[None].clone()
    for warper in (
        theirs.RepetitionPenaltyLogitsProcessor(1.4),
        theirs.TemperatureLogitsWarper(0.6),
        theirs.TopKLogitsWarper(4),
        theirs.TopPLogitsWarper(0.8),
        theirs.MinPLogitsWarper(0.05),
    ):
        expected = warper(torch.tensor([SEEN]), expected)
    assert_close(ours, expected[0])


def draws(options: SamplingOptions, n: int, stream: int = 0) -> list[int]:
    """``n`` tokens from the same logits."""
    sampler = TokenSampler(options, stream=stream)
    return [sampler(LOGITS, []) for _ in range(n)]


def test_distribution() -> None:
    """Guards the draw itself: a chi-square test at one in a million (seeded, so it passes or fails for good)."""
    n = 4000
    counts = Counter(draws(SamplingOptions(temperature=1.0, top_k=0, seed=1), n))
    expected = LOGITS.softmax(0) * n
    chi_square = sum((counts[i] - float(e)) ** 2 / float(e) for i, e in enumerate(expected))
    assert chi_square < 35.9  # 5 degrees of freedom


def test_dropped_tokens_are_never_drawn() -> None:
    """Guards top-k: only the two likeliest come."""
    assert set(draws(SamplingOptions(temperature=5.0, top_k=2, seed=1), 500)) == {0, 3}


def test_weights_of_zero_are_never_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the ends of the line: the smallest and the largest random number there are."""
    sampler = TokenSampler(SamplingOptions())
    for number in (0.0, 1 - 2**-53):
        monkeypatch.setattr(sampler, "uniform", lambda number=number: number)
        assert sampler.draw(torch.tensor([0.0, 0.0, 0.3, 0.0])) == 2


def test_seeds() -> None:
    """Guards reproducibility: one seed one stream, its samples differ, greedy ignores it."""
    options = SamplingOptions(temperature=1.5, seed=7)
    assert draws(options, 50) == draws(options, 50)
    assert draws(options, 50) != draws(options, 50, stream=1)
    assert draws(options, 50) != draws(SamplingOptions(temperature=1.5, seed=8), 50)
    assert draws(SamplingOptions(temperature=1.5), 50) != draws(SamplingOptions(temperature=1.5), 50)
    assert set(draws(SamplingOptions(temperature=0.0, seed=3), 5)) == {3}


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": -0.2},
        {"min_p": 2.0},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": -1.0},
    ],
    ids=str,
)
def test_out_of_range(bad: dict[str, Any]) -> None:
    """Guards against values that would be ignored or fail deep inside; the message names the option and its range."""
    (name,) = bad
    for temperature in (0.0, 1.0):  # greedy decoding must not swallow them
        with pytest.raises(InputError, match=f"{name} must be"):
            SamplingOptions(**({"temperature": temperature} | bad))


def test_logits_that_are_not_numbers() -> None:
    """Guards against a model that broke: an error, not a silent token 0."""
    with pytest.raises(ZooError, match="not finite"):
        TokenSampler(SamplingOptions(temperature=0.0))(torch.full((5,), math.nan), [])
