"""The stand-in computes attention: against the reference that flash-attn ships for its own tests."""

from __future__ import annotations

import math
import sys
from importlib import import_module
from typing import Any

import pytest
import tier
import torch

SHAPES = ((5, 5), (1, 9), (4, 9), (33, 50))
WINDOWS = ((-1, -1), (3, 0), (3, -1), (0, 4))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("softcap", [0.0, 1.5])
def test_it_computes_what_the_kernels_do(flash: object, causal: bool, window: tuple[int, int], softcap: float) -> None:
    """Guards these tests themselves: results and gradients of the real package on the stand-in are attention."""
    package, testing = import_module("flash_attn"), import_module("flash_attn.utils.testing")
    for n_queries, n_keys in SHAPES:
        leaves = [
            torch.randn(2, n, heads, 16, device=tier.DEVICE).half().requires_grad_()
            for n, heads in ((n_queries, 4), (n_keys, 2), (n_keys, 2))
        ]
        weights = torch.randn_like(leaves[0])
        sides = (None, None) if window == (-1, -1) else tuple(n_keys if side < 0 else side for side in window)
        options: dict[str, Any] = {"causal": causal, "softcap": softcap}
        out = package.flash_attn_func(*leaves, window_size=window, **options)
        expected, _ = testing.attention_ref(*leaves, window_size=sides, **options)
        gradients = [torch.autograd.grad((result * weights).sum(), leaves) for result in (out, expected)]
        torch.testing.assert_close(out, expected, atol=4e-3, rtol=4e-3)
        for x, y in zip(*gradients, strict=True):
            torch.testing.assert_close(x, y, atol=4e-3, rtol=4e-3)


def test_it_refuses_what_the_kernels_refuse(flash: object) -> None:
    """Guards against a backend that works here and fails on a GPU."""
    package = import_module("flash_attn")
    q = torch.randn(2, 4, 4, 16, device=tier.DEVICE).half()
    odd = torch.randn(2, 4, 3, 16, device=tier.DEVICE).half()
    wide = torch.randn(2, 4, 4, 264, device=tier.DEVICE).half()
    for inputs, options in (
        ((q.float(), q.float(), q.float()), {}),
        ((q, q.bfloat16(), q), {}),
        ((wide, wide, wide), {}),
        ((q, odd, odd), {}),
        ((q, q, q), {"softcap": 1.0, "dropout_p": 0.1}),
    ):
        with pytest.raises(RuntimeError):
            package.flash_attn_func(*inputs, **options)
    with pytest.raises(RuntimeError, match="int32"):
        package.flash_attn_with_kvcache(q, q, q, cache_seqlens=torch.tensor([1, 2], device=tier.DEVICE))
    borders = torch.tensor([0, 4, 8], device=tier.DEVICE)
    with pytest.raises(RuntimeError, match="int32"):
        package.flash_attn_varlen_func(*(x.flatten(0, 1) for x in (q, q, q)), borders, borders, 4, 4)


def test_the_package_is_the_real_one(flash: object) -> None:
    """Guards the claim: only the compiled extension is replaced, and only without a GPU."""
    package, extension = import_module("flash_attn"), sys.modules["flash_attn_2_cuda"]
    assert package.__version__ == tier.VERSION
    assert "site-packages" in str(package.__file__)
    assert (str(tier.STAND_IN) in str(extension.__file__)) == (not tier.ON_GPU)
    assert math.isfinite(float(package.flash_attn_func(*[torch.ones(1, 1, 1, 8).half().to(tier.DEVICE)] * 3).sum()))
