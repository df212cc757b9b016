"""What training does in its own way on a CPU, against the formula: attention, RMS norm, LoRA in bfloat16."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from tests.tiny_gpt import formula, gradients, instructions, tiny
from zoo.adapters import lora
from zoo.adapting import adapt
from zoo.attention import products, sdpa
from zoo.attention.eager import Eager
from zoo.attention.products import attend_causally
from zoo.attention.sdpa import SDPA
from zoo.models.masks import CAUSAL, Mask
from zoo.models.norm import RMSNorm
from zoo.models.rows import spread

SCALE = 0.3


def errors(outputs: Sequence[Tensor], exact: Sequence[Tensor]) -> list[float]:
    """Relative, of each tensor as a whole."""
    return [float((a.double() - b).norm() / b.norm()) for a, b in zip(outputs, exact, strict=True)]


def with_gradients(attend: Callable[..., Tensor], qkv: Sequence[Tensor], dy: Tensor) -> list[Tensor]:
    """The result, and the gradients of q, k and v."""
    leaves = [x.clone().requires_grad_() for x in qkv]
    y = attend(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))]


HEADS = {"mha": (4, 4), "gqa": (6, 2), "mqa": (4, 1)}
LENGTHS = [(1, 1), (7, 7), (64, 64), (65, 65), (150, 150), (3, 70), (70, 133), (1, 9)]


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("heads", HEADS)
def test_attention(heads: str, lengths: tuple[int, int]) -> None:
    """Result and gradients, no farther from float64 than torch's kernel; queries are the last of the keys."""
    (n, k), (t, s) = HEADS[heads], lengths
    qkv = [torch.randn(2, rows, count, 16).bfloat16() for rows, count in ((t, n), (s, k), (s, k))]
    dy = torch.randn(2, t, n, 16).bfloat16()

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend_causally(q, k, v, SCALE)

    def torch_kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = CAUSAL.dense(t, s, q.device)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=SCALE, enable_gqa=True).transpose(1, 2)

    exact = with_gradients(torch_kernel, [x.double() for x in qkv], dy)
    found, theirs = with_gradients(ours, qkv, dy), with_gradients(torch_kernel, qkv, dy)
    assert [x.dtype for x in found] == [torch.bfloat16] * 4 and found[0].shape == dy.shape
    if s == 1:  # one key has all the weight: scores have no gradient
        assert not found[1].any() and not found[2].any()
        exact, found, theirs = ([x[0], x[3]] for x in (exact, found, theirs))
    for ours_error, their_error in zip(errors(found, exact), errors(theirs, exact), strict=True):
        assert ours_error <= max(1.1 * their_error, 0.004)


def test_attention_leaks_nothing() -> None:
    """A key after the query changes nothing, not even by rounding; nor does its gradient come back."""
    q, k, v = (torch.randn(1, 100, heads, 16).bfloat16() for heads in (4, 2, 2))
    before = attend_causally(q, k, v, SCALE)
    future = torch.zeros_like(k)
    future[:, 70:] = 50.0
    assert torch.equal(before[:, :70], attend_causally(q, k + future, v - future, SCALE)[:, :70])
    leaves = [x.requires_grad_() for x in (q, k, v)]
    attend_causally(q, k, v, SCALE)[:, :70].float().sum().backward()
    assert not any(bool(x.grad[:, 70:].any()) for x in leaves if x.grad is not None)


@pytest.mark.parametrize(
    ("dtype", "mask", "dropout_p", "expected"),
    [
        (torch.bfloat16, CAUSAL, 0.0, True),
        (torch.float32, CAUSAL, 0.0, False),
        (torch.bfloat16, Mask(window=3), 0.0, False),
        (torch.bfloat16, Mask(window=300), 0.0, True),
        (torch.bfloat16, Mask(causal=False), 0.0, False),
        (torch.bfloat16, CAUSAL, 0.1, False),
    ],
)
def test_attention_where_it_is_right(
    dtype: torch.dtype, mask: Mask, dropout_p: float, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards other masks, dropout and inference, which it does not know."""
    calls: list[float] = []
    real = products.attend_causally

    def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        calls.append(scale)
        return real(q, k, v, scale)

    monkeypatch.setattr(sdpa, "attend_causally", attend)
    qkv = [torch.randn(1, 100, heads, 16, dtype=dtype, requires_grad=True) for heads in (4, 2, 2)]
    y = SDPA()(*qkv, mask=mask, scale=SCALE, dropout_p=dropout_p)
    assert bool(calls) is expected
    if not dropout_p:
        assert_close(y, Eager()(*qkv, mask=mask, scale=SCALE), atol=0.03, rtol=0.03)
    calls.clear()
    with torch.no_grad():
        SDPA()(*qkv, mask=mask, scale=SCALE, dropout_p=dropout_p)
    assert not calls


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norm(dtype: torch.dtype) -> None:
    """The gradient written by hand: as near to float64 as autograd's, and of the weight too; the result is the same."""
    norm = RMSNorm(48, eps=1e-5).to(dtype)
    nn.init.normal_(norm.weight)
    x, dy = torch.randn(2, 9, 48).to(dtype) * 3, torch.randn(2, 9, 48).to(dtype)

    def plain(x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, (48,), eps=1e-5) * weight

    def ours(x: Tensor, weight: Tensor) -> Tensor:
        norm.weight = weight  # type: ignore[assignment]
        return norm(x)

    inputs = [x, norm.weight.detach()]
    del norm.weight
    exact = with_gradients(plain, [t.double() for t in inputs], dy)
    found, theirs = with_gradients(ours, inputs, dy), with_gradients(plain, inputs, dy)
    assert torch.equal(found[0], theirs[0])
    for our_error, their_error in zip(errors(found, exact), errors(theirs, exact), strict=True):
        assert our_error <= 1.05 * their_error


def test_norm_keeps_no_copy_in_float32() -> None:
    norm = RMSNorm(48, eps=1e-5).bfloat16().requires_grad_(False)
    x = torch.randn(2, 9, 48).bfloat16().requires_grad_()
    kept: list[torch.dtype] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.dtype)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        norm(x)
    assert set(kept) == {torch.bfloat16}


def test_sums_over_rows_are_float32() -> None:
    """Guards against sums in bfloat16, where 256 + 1 is 256."""
    x = torch.zeros(1, 2, 3, 16, dtype=torch.bfloat16, requires_grad=True)
    y = spread(x, torch.zeros(300, 1, dtype=torch.long))
    (grad,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert grad[0, 0].unique().tolist() == [300.0] and not grad[0, 1].any()


def test_lora_in_the_dtype_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """No float32 copy of an activation is kept, and gradients are as near to a float32 model's as with such copies."""
    models = [tiny("llama", dtype=torch.bfloat16), tiny("llama")]
    models[1].load_state_dict({name: tensor.float() for name, tensor in models[0].state_dict().items()})
    handles = [adapt(model, "lora", r=4, targets=["attn.q", "attn.v", "mlp.up"]) for model in models]
    with torch.no_grad():
        for parameter in handles[0].trainable().values():
            parameter.normal_(std=0.1)
    handles[1].load_state_dict(handles[0].state_dict())
    batch = instructions()
    kept: set[tuple[int, torch.dtype]] = set()

    def pack(tensor: Tensor) -> Tensor:
        kept.add((tensor.numel() // batch.tokens_BT.numel(), tensor.dtype))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        models[0].hidden(batch.tokens_BT)
    assert not [width for width, dtype in kept if dtype == torch.float32 and width >= 48]
    truth = list(gradients(models[1], formula(models[1], batch)).values())
    found = list(gradients(models[0], formula(models[0], batch)).values())
    monkeypatch.setattr(lora, "through", lambda x, weight: F.linear(x.float(), weight.float()))
    theirs = list(gradients(models[0], formula(models[0], batch)).values())
    assert {x.dtype for x in found} == {torch.float32}
    assert sum(errors(found, [x.double() for x in truth])) <= 1.1 * sum(errors(theirs, [x.double() for x in truth]))
