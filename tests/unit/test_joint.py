"""Linears of one input as one product: the same results, the same parameters, and only where it is right."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.testing import assert_close

from zoo.models.joint import apply_linears, join


def linears(*, bias: bool = False, dtype: torch.dtype = torch.float32) -> list[nn.Linear]:
    return [nn.Linear(12, d_out, bias=bias, dtype=dtype) for d_out in (6, 2, 4)]


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Outputs of every product that is made here."""
    seen: list[int] = []
    real = functional.linear

    def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        seen.append(weight.shape[0])
        return real(x, weight, bias)

    monkeypatch.setattr(functional, "linear", linear)
    return seen


@pytest.mark.parametrize("bias", [False, True])
def test_joined(bias: bool, products: list[int]) -> None:
    three, x = linears(bias=bias), torch.randn(2, 5, 12)
    before = [linear.weight.detach().clone() for linear in three]
    with torch.no_grad():
        expected = [linear(x) for linear in three]
        join(*three)
        products.clear()
        found = apply_linears(x, *three)
    assert products == [12]
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other, atol=1e-6, rtol=1e-6)
    assert all(torch.equal(linear.weight, weight) for linear, weight in zip(three, before, strict=True))


def test_apart(products: list[int]) -> None:
    """Guards gradients, weights that were replaced (merged adapters), other types of layers, mixed biases."""
    x = torch.randn(5, 12)
    three = linears()
    join(*three)
    apply_linears(x, *three)
    assert products == [6, 2, 4]  # a gradient is wanted
    with torch.no_grad():
        three[1].weight.data = three[1].weight.data.clone()
        products.clear()
        apply_linears(x, *three)
        assert products == [6, 2, 4]
        for others in ([*linears()[:2], nn.Identity()], [linears()[0], linears(bias=True)[1]]):
            join(*others)
            products.clear()
            apply_linears(x, *others)
            assert 12 not in products and len(products) == sum(isinstance(other, nn.Linear) for other in others)


def test_a_step_of_training_is_seen() -> None:
    """Guards against a copy: what an optimizer changes is what is multiplied."""
    three = linears()
    join(*three)
    with torch.no_grad():
        three[2].weight += 1
        assert torch.equal(apply_linears(torch.ones(1, 12), *three)[2], three[2](torch.ones(1, 12)))
