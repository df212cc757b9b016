"""Every attention backend computes the formula, for every mask, head layout and query/key length, and leaks nothing."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from zoo.attention.base import AttentionBackend, AttentionRequest, choose_attention
from zoo.errors import UnavailableError
from zoo.models.masks import CAUSAL, Mask
from zoo.registry import Registry

BACKENDS = ("eager", "sdpa", "flex")
HEADS = {"mha": (4, 4), "gqa": (4, 2), "mqa": (4, 1)}
LENGTHS = [(7, 7), (1, 9), (4, 9)]
B, H = 2, 16


def masks(n_keys: int) -> dict[str, Mask]:
    """One of each kind, and combinations."""
    documents = torch.arange(n_keys).div(max(n_keys // 3, 1), rounding_mode="floor").expand(B, n_keys).clone()
    documents[1] = documents[1].flip(0)
    padding = torch.tensor([0, max(n_keys - 4, 3)])
    return {
        "causal": CAUSAL,
        "full": Mask(causal=False),
        "window": Mask(window=3),
        "prefix": Mask(prefix=4),
        "documents": Mask(documents_BS=documents),
        "window-documents": Mask(window=2, documents_BS=documents),
        "full-documents": Mask(causal=False, documents_BS=documents),
        "padding": Mask(padding_B=padding),
        "full-padding": Mask(causal=False, padding_B=padding),
        "padding-window-prefix-documents": Mask(padding_B=padding, window=3, prefix=2, documents_BS=documents),
    }


def tensors(n_queries: int, n_keys: int, heads: tuple[int, int], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """q_BTNH, k_BSKH, v_BSKH."""
    n, k = heads
    shapes = [(B, n_queries, n, H), (B, n_keys, k, H), (B, n_keys, k, H)]
    return [torch.randn(shape).to(dtype) for shape in shapes]


def by_the_formula(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float, softcap: float | None = None) -> Tensor:
    """softmax(q k^T scale) v in float64, one query and one head at a time, visibility decided key by key."""
    q, k, v = q.double(), k.double(), v.double()
    out = torch.zeros_like(q)
    n_queries, n_keys, group = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    for b in range(q.shape[0]):
        for t in range(n_queries):
            here = n_keys - n_queries + t
            seen = [s for s in range(n_keys) if visible(mask, b, here, s)]
            for n in range(q.shape[2]):
                if seen:
                    scores = torch.stack([q[b, t, n] @ k[b, s, n // group] * scale for s in seen])
                    scores = scores if softcap is None else softcap * (scores / softcap).tanh()
                    out[b, t, n] = scores.softmax(0) @ v[b, seen, n // group]
    return out


def visible(mask: Mask, b: int, query: int, key: int) -> bool:
    """The definition of a mask, in words of its own."""
    allowed = not mask.causal or key <= query
    if mask.window is not None and query - key >= mask.window:
        allowed = False
    if key < mask.prefix:
        allowed = True
    if mask.documents_BS is not None and mask.documents_BS[b, query] != mask.documents_BS[b, key]:
        allowed = False
    if mask.padding_B is not None and key < mask.padding_B[b]:
        allowed = False
    return allowed


def test_features() -> None:
    """Guards the question to a backend: what it does not know of it would leave out."""
    features = {name: mask.features for name, mask in masks(9).items()}
    assert features["padding"] == {"causal", "padding"}
    assert features["padding-window-prefix-documents"] == {"causal", "padding", "window", "prefix", "documents"}
    assert features["full"] == {"full"}


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, registry: Registry) -> AttentionBackend:
    """Each built-in backend."""
    loaded: AttentionBackend = registry.load("attention", request.param)()
    return loaded


def forward_cases() -> Iterator[tuple[str, str, tuple[int, int], str]]:
    """Everything with everything; for flex, which compiles each case anew, a selection that has each once."""
    for mask in masks(9):
        for heads in HEADS:
            for lengths in LENGTHS:
                yield from ((name, heads, lengths, mask) for name in ("eager", "sdpa"))
        yield "flex", "gqa", (7, 9), mask
    yield from (("flex", heads, (1, 9), "causal") for heads in HEADS)


@pytest.mark.parametrize(("name", "heads", "lengths", "mask"), list(forward_cases()))
def test_forward(registry: Registry, name: str, heads: str, lengths: tuple[int, int], mask: str) -> None:
    """Guards the alignment of queries to keys (torch's is_causal is top-left), grouped heads, every mask."""
    backend = registry.load("attention", name)()
    q, k, v = tensors(*lengths, HEADS[heads])
    chosen = masks(lengths[1])[mask]
    expected = by_the_formula(q, k, v, chosen, scale=0.3)
    with torch.no_grad():
        found = backend(q, k, v, mask=chosen, scale=0.3, dropout_p=0.0)
    assert found.shape == q.shape
    assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "mask"), [*(("sdpa", mask) for mask in masks(9)), ("flex", "causal"), ("flex", "window-documents")]
)
def test_longer_than_a_block(registry: Registry, name: str, mask: str) -> None:
    """Guards the tiling, the kernels' and ours: 300 tokens are more than one block, and some blocks are hidden."""
    n_keys = 340 if name == "sdpa" else 300
    q, k, v = tensors(300, n_keys, HEADS["gqa"])
    chosen = masks(n_keys)[mask]
    eager, fast = registry.load("attention", "eager")(), registry.load("attention", name)()
    with torch.no_grad():
        expected = eager(q, k, v, mask=chosen, scale=0.25, dropout_p=0.0)
        assert_close(fast(q, k, v, mask=chosen, scale=0.25, dropout_p=0.0), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["eager", "sdpa"])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("mask", list(masks(9)))
def test_backward(registry: Registry, name: str, heads: str, mask: str) -> None:
    """Guards gradients of q, k and v against those of the formula."""
    chosen = masks(7)[mask]
    q, k, v = inputs = [t.requires_grad_() for t in tensors(7, 7, HEADS[heads])]
    weights = torch.randn(B, 7, 4, H)
    by_the_formula(q, k, v, chosen, scale=0.3).mul(weights).sum().backward()
    expected = [t.grad.clone() for t in inputs if t.grad is not None]
    for t in inputs:
        t.grad = None
    backend = registry.load("attention", name)()
    backend(*inputs, mask=chosen, scale=0.3, dropout_p=0.0).mul(weights).sum().backward()
    for t, gradient in zip(inputs, expected, strict=True):
        assert_close(t.grad, gradient, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(backend: AttentionBackend, dtype: torch.dtype) -> None:
    """Guards the result dtype, and the error: at most twice the one of rounding the formula's result."""
    q, k, v = tensors(9, 9, HEADS["gqa"], dtype)
    exact = by_the_formula(q, k, v, CAUSAL, scale=0.25)
    with torch.no_grad():
        found = backend(q, k, v, mask=CAUSAL, scale=0.25, dropout_p=0.0)
    assert found.dtype == dtype
    allowed = 2 * (exact.to(dtype).double() - exact).abs().max() + torch.finfo(dtype).eps
    assert (found.double() - exact).abs().max() <= allowed


def test_no_leak(backend: AttentionBackend) -> None:
    """Guards causality itself: changing the future must not change the past by one bit."""
    q, k, v = tensors(9, 9, HEADS["mha"])
    with torch.no_grad():
        before = backend(q, k, v, mask=CAUSAL, scale=0.25, dropout_p=0.0)
        for t in (q, k, v):
            t[:, 5:] = torch.randn_like(t[:, 5:])
        after = backend(q, k, v, mask=CAUSAL, scale=0.25, dropout_p=0.0)
    assert torch.equal(before[:, :5], after[:, :5])
    assert not torch.equal(before[:, 5:], after[:, 5:])


@pytest.mark.parametrize("name", ["eager", "flex"])
def test_softcap(registry: Registry, name: str) -> None:
    """Guards soft-capped scores with a mask and more keys than queries (a boolean mask added to scores leaked)."""
    q, k, v = tensors(7, 9, HEADS["gqa"])
    chosen = masks(9)["window"]
    expected = by_the_formula(q, k, v, chosen, scale=0.3, softcap=0.5)
    with torch.no_grad():
        found = registry.load("attention", name)()(q, k, v, mask=chosen, scale=0.3, softcap=0.5, dropout_p=0.0)
    assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)


def test_a_backend_that_can_not_softcap_says_so(registry: Registry) -> None:
    """Guards against soft-capping that is silently left out."""
    sdpa = registry.load("attention", "sdpa")()
    assert sdpa.supports(request_for(softcap=True))
    with pytest.raises(ValueError, match="soft-cap"):
        sdpa(*tensors(3, 3, HEADS["mha"]), mask=CAUSAL, scale=1.0, softcap=30.0)
    chosen = choose_attention("auto", request_for(softcap=True), registry)
    assert chosen.name == "eager"
    assert chosen.rejected == {"sdpa": ["torch's SDPA can not soft-cap scores"]}


def test_inputs_are_not_changed(backend: AttentionBackend) -> None:
    """Guards the cache, whose views a backend is handed."""
    inputs = tensors(3, 9, HEADS["gqa"])
    copies = [t.clone() for t in inputs]
    with torch.no_grad():
        backend(*inputs, mask=Mask(window=2), scale=0.25, dropout_p=0.0)
    assert all(torch.equal(t, copy) for t, copy in zip(inputs, copies, strict=True))


@pytest.mark.parametrize("name", ["eager", "sdpa"])
def test_dropout_keeps_the_mean(registry: Registry, name: str) -> None:
    """Guards against dropout that is ignored or not rescaled."""
    q, k, v = (t.expand(400, -1, -1, -1).contiguous() for t in (t[:1] for t in tensors(8, 8, HEADS["mha"])))
    backend = registry.load("attention", name)()
    exact = backend(q[:1], k[:1], v[:1], mask=Mask(causal=False), scale=0.25, dropout_p=0.0)
    dropped = backend(q, k, v, mask=Mask(causal=False), scale=0.25, dropout_p=0.5)
    assert (dropped - exact).abs().max() > 0.1
    assert (dropped.mean(0) - exact[0]).abs().max() < 6 * dropped.std(0).max() / math.sqrt(400)


def request_for(**changes: object) -> AttentionRequest:
    """A plain request, with changes."""
    values: dict[str, object] = {"device": "cpu", "dtype": torch.float32, "n_heads": 4, "n_kv_heads": 4, "d_head": 16}
    return AttentionRequest(**(values | changes))  # type: ignore[arg-type]


def test_an_explicit_choice_never_falls_back(registry: Registry) -> None:
    """Guards against training with something other than what was asked for."""
    with pytest.raises(UnavailableError, match="no backward on CPU"):
        choose_attention("flex", request_for(training=True), registry)
    assert choose_attention("auto", request_for(training=True), registry).name == "sdpa"


def test_flex_refuses_dropout(registry: Registry) -> None:
    """Guards against dropout that is silently not applied."""
    flex = registry.load("attention", "flex")()
    assert flex.supports(request_for(dropout=True))
    with pytest.raises(ValueError, match="dropout"):
        flex(*tensors(3, 3, HEADS["mha"]), mask=CAUSAL, scale=1.0, dropout_p=0.1)
