"""Every mask that the backend takes, against the formula: results and gradients, heads, lengths, both dtypes."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import pytest
import reference
import torch
from tier import DEVICE
from torch import Tensor

from zoo.attention.base import AttentionBackend
from zoo.attention.eager import Eager
from zoo.models.masks import CAUSAL, Mask

HEADS = {"mha": (4, 4), "gqa": (4, 2), "mqa": (4, 1)}
SIZES = (8, 20, 64, 256)
"""Of heads: the least, one that the package pads, a usual one, the largest."""
LENGTHS = ((7, 7), (1, 13), (4, 13), (40, 70))
"""Queries and keys: a prompt, a step of decoding, a chunk after others, more than one of the kernels' blocks."""
B = 2


def masks(n_keys: int) -> dict[str, Mask]:
    """One of each kind that the backend takes, and combinations."""
    documents = (torch.arange(n_keys) * 3 // n_keys).expand(B, n_keys).clone()
    documents[1] = documents[1].flip(0)
    documents[1, : n_keys // 2] = 7
    padding = torch.tensor([0, n_keys - 4], device=DEVICE)  # some queries see nothing
    documents = documents.to(DEVICE)
    return {
        "causal": CAUSAL,
        "full": Mask(causal=False),
        "window": Mask(window=3),
        "window-beyond": Mask(window=1000),
        "full-window": Mask(causal=False, window=3),
        "documents": Mask(documents_BS=documents),
        "window-documents": Mask(window=2, documents_BS=documents),
        "full-documents": Mask(causal=False, documents_BS=documents),
        "padding": Mask(padding_B=padding),
        "full-padding": Mask(causal=False, padding_B=padding),
        "window-padding": Mask(window=3, padding_B=padding),
        "padding-documents": Mask(padding_B=padding, documents_BS=documents),
        "all": Mask(causal=False, window=5, padding_B=padding, documents_BS=documents),
    }


@cache
def case(name: str, n_queries: int, n_keys: int) -> tuple[Mask, Tensor]:
    """A mask, and who sees whom (B, T, S)."""
    mask = masks(n_keys)[name]
    return mask, reference.visibility(mask, B, n_queries, n_keys)


def tensors(n_queries: int, n_keys: int, heads: tuple[int, int], d_head: int, dtype: torch.dtype) -> list[Tensor]:
    """q_BTNH, k_BSKH, v_BSKH."""
    shapes = [(B, n_queries, heads[0], d_head)] + [(B, n_keys, heads[1], d_head)] * 2
    return [torch.randn(shape, device=DEVICE).to(dtype) for shape in shapes]


def with_gradients(function: Any, inputs: list[Tensor], weights: Tensor, **options: Any) -> list[Tensor]:
    """The result of attention, and the gradients of q, k and v."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = function(*leaves, **options)
    (out * weights.to(out.dtype)).sum().backward()
    gradients = [leaf.grad for leaf in leaves]
    assert all(gradient is not None for gradient in gradients)
    return [out.detach(), *(gradient for gradient in gradients if gradient is not None)]


def check_all(found: list[Tensor], plain: list[Tensor], exact: list[Tensor]) -> None:
    """The result, and the gradients."""
    reference.check(found[0], plain[0], exact[0])
    for trio in zip(found[1:], plain[1:], exact[1:], strict=True):
        reference.check(*trio, times=reference.OF_GRADIENTS)


@pytest.mark.parametrize("mask", list(masks(9)))
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("d_head", SIZES)
def test_results(flash: AttentionBackend, mask: str, heads: str, d_head: int) -> None:
    """Guards the translation of masks into windows and segments, and the alignment of queries to the last keys."""
    for n_queries, n_keys in LENGTHS:
        chosen, seen = case(mask, n_queries, n_keys)
        for dtype in reference.HALVES:
            inputs = tensors(n_queries, n_keys, HEADS[heads], d_head, dtype)
            exact = reference.attention(*(x.double() for x in inputs), seen_BTS=seen, scale=0.2)
            plain = reference.attention(*inputs, seen_BTS=seen, scale=0.2)
            with torch.no_grad():
                found = flash(*inputs, mask=chosen, scale=0.2)
            reference.check(found, plain, exact)
            learned = flash(*(x.requires_grad_() for x in inputs), mask=chosen, scale=0.2)
            reference.check(learned.detach(), plain, exact)
            assert not found[~seen.any(-1)].any(), "a query that sees nothing is zero"


@pytest.mark.parametrize("mask", list(masks(9)))
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("d_head", SIZES)
def test_gradients(flash: AttentionBackend, mask: str, heads: str, d_head: int) -> None:
    """Guards the way back: of padded heads, shared heads, keys that were left out, queries that see nothing."""
    for n_queries, n_keys in ((7, 7), (40, 70)):
        chosen, seen = case(mask, n_queries, n_keys)
        for dtype in reference.HALVES:
            inputs = tensors(n_queries, n_keys, HEADS[heads], d_head, dtype)
            weights = torch.randn_like(inputs[0])
            options: dict[str, Any] = {"seen_BTS": seen, "scale": 0.2}
            exact = with_gradients(reference.attention, [x.double() for x in inputs], weights, **options)
            plain = with_gradients(reference.attention, inputs, weights, **options)
            found = with_gradients(flash, inputs, weights, mask=chosen, scale=0.2)
            check_all(found, plain, exact)


@pytest.mark.parametrize("mask", ["causal", "window", "documents", "padding"])
def test_soft_caps(flash: AttentionBackend, mask: str) -> None:
    """Guards capped scores and their gradients, and that no cap is none."""
    chosen, seen = case(mask, 12, 12)
    inputs = tensors(12, 12, HEADS["gqa"], 32, torch.float16)
    weights = torch.randn_like(inputs[0])
    options: dict[str, Any] = {"scale": 0.5, "softcap": 0.7}
    exact = with_gradients(reference.attention, [x.double() for x in inputs], weights, seen_BTS=seen, **options)
    plain = with_gradients(reference.attention, inputs, weights, seen_BTS=seen, **options)
    found = with_gradients(flash, inputs, weights, mask=chosen, **options)
    check_all(found, plain, exact)
    with torch.no_grad():
        reference.check(flash(*inputs, mask=chosen, **options), plain[0], exact[0])


@pytest.mark.parametrize("mask", list(masks(9)))
def test_it_is_as_near_as_eager(flash: AttentionBackend, mask: str) -> None:
    """Guards zoo's own contract: the backend that is the formula gives the same, within half precision."""
    chosen = masks(33)[mask]
    inputs = tensors(21, 33, HEADS["gqa"], 64, torch.bfloat16)
    expected = Eager()(*inputs, mask=chosen, scale=0.125)
    found = flash(*inputs, mask=chosen, scale=0.125)
    torch.testing.assert_close(found, expected, atol=0.02, rtol=0.02)


def test_keys_are_read_where_they_are(flash: AttentionBackend) -> None:
    """Guards against views of a cache, or of one product for q, k and v, that a kernel reads as if they were whole."""
    packed = torch.randn(B, 9, 3 * 4 * 16, device=DEVICE, dtype=torch.float16)
    q, k, v = (x.unflatten(-1, (4, 16)) for x in packed.split(64, dim=-1))
    room = torch.randn(B, 30, 4, 16, device=DEVICE, dtype=torch.float16)
    for name in masks(9):
        chosen, seen = case(name, 9, 9)
        room[:, :9] = k
        exact = reference.attention(q.double(), k.double(), v.double(), seen_BTS=seen, scale=0.25)
        plain = reference.attention(q, k, v, seen_BTS=seen, scale=0.25)
        with torch.no_grad():
            reference.check(flash(q, room[:, :9], v, mask=chosen, scale=0.25), plain, exact)


def test_the_future_does_not_leak(flash: AttentionBackend) -> None:
    """Guards causality to the bit, and with it documents and padding."""
    q, k, v = tensors(9, 9, HEADS["gqa"], 16, torch.float16)
    for name in ("causal", "window", "documents", "padding"):
        chosen = masks(9)[name]
        before = flash(q, k, v, mask=chosen, scale=0.25)
        changed = [torch.cat((x[:, :5], torch.randn_like(x[:, 5:])), dim=1) for x in (q, k, v)]
        after = flash(*changed, mask=chosen, scale=0.25)
        assert torch.equal(before[:, :5], after[:, :5])
        assert not torch.equal(before[:, 5:], after[:, 5:])


@pytest.mark.parametrize("mask", ["causal", "documents", "padding"])
def test_dropout(flash: AttentionBackend, mask: str) -> None:
    """Guards against dropout that is left out, not rescaled, or another one on the way back."""
    chosen = masks(8)[mask]
    inputs = tensors(8, 8, HEADS["gqa"], 16, torch.float16)
    exact = flash(*inputs, mask=chosen, scale=0.25)
    dropped = torch.stack([flash(*inputs, mask=chosen, scale=0.25, dropout_p=0.5) for _ in range(200)]).float()
    assert (dropped - exact).abs().max() > 0.1
    assert (dropped.mean(0) - exact).abs().max() < 6 * dropped.std(0).max() / math.sqrt(200)
    v = inputs[2].requires_grad_()
    torch.manual_seed(1)
    out = flash(*inputs, mask=chosen, scale=0.25, dropout_p=0.5)
    out.sum().backward()
    assert v.grad is not None
    # The result is linear in v, so what the gradient says of v is the sum itself, if the same weights are dropped.
    torch.testing.assert_close((v.grad.float() * v.float()).sum(), out.float().sum(), atol=0.05, rtol=0.01)


def test_autocast(flash: AttentionBackend) -> None:
    """Guards mixed precision: rotary angles in float32 leave q and k in float32, and v is bfloat16."""
    q, k, v = tensors(9, 9, HEADS["gqa"], 16, torch.float32)
    expected = flash(*(x.bfloat16() for x in (q, k, v)), mask=CAUSAL, scale=0.25)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert torch.equal(flash(q, k, v.bfloat16(), mask=CAUSAL, scale=0.25), expected)
    with pytest.raises(RuntimeError, match="fp16 and bf16"):
        flash(q, k, v, mask=CAUSAL, scale=0.25)


def test_what_was_made_while_generating_serves_training(flash: AttentionBackend) -> None:
    """Guards the segments, which are kept: tensors of inference mode would break a later backward pass."""
    for name in ("documents", "padding"):
        chosen = masks(9)[name]
        inputs = tensors(9, 9, HEADS["mha"], 16, torch.float16)
        with torch.inference_mode():
            flash(*inputs, mask=chosen, scale=0.25)
            flash(*inputs, mask=chosen, scale=0.25, dropout_p=0.1)
        with_gradients(flash, inputs, torch.ones_like(inputs[0]), mask=chosen, scale=0.25)


def test_masks_that_are_refused(flash: AttentionBackend) -> None:
    """Guards against a mask of which a part is left out in silence."""
    inputs = tensors(4, 9, HEADS["mha"], 16, torch.float16)
    torn = torch.tensor([[0, 0, 1, 1, 0, 0, 0, 0, 0]] * B, device=DEVICE)
    places = torch.arange(4, device=DEVICE)
    for refused, message in (
        (Mask(prefix=2), "no prefix"),
        (Mask(documents_BS=torn), "one is in several places"),
        (Mask(causal=False, queries_T=places), "only where attention is causal"),
        (Mask(documents_BS=torn, queries_T=places), "no documents in a cache of fixed length"),
        (Mask(queries_T=places.flip(0)), "consecutive places"),
    ):
        with pytest.raises(ValueError, match=message):
            flash(*inputs, mask=refused, scale=0.25)
