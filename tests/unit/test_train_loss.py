"""The loss: what the formula over all logits says, in value and every gradient, and no logits of a batch."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from tests.tiny_gpt import SPECS, VOCAB, batch_of, formula, gradients, instructions, random_ids, tiny
from zoo.adapters.proof import randomize
from zoo.adapting import adapt
from zoo.data.batches import IGNORED, Batch
from zoo.errors import InputError, ZooError
from zoo.models.gpt import GPT
from zoo.precision.int8 import Int8Linear
from zoo.train.loss import SupervisedLoss, supervised_loss

DENSE = batch_of([(random_ids(1, seed=b), random_ids(12, seed=9 + b)) for b in range(4)])
"""Nothing to leave out: every position has a target."""


def assert_same(model: nn.Module, batch: Batch, **options: Any) -> None:
    """Loss and gradients of `supervised_loss` and of the formula, both in training mode."""
    expected = formula(model, batch)
    theirs = gradients(model, expected)
    loss, n_supervised = supervised_loss(model, batch, **options)
    ours = gradients(model, loss)
    assert loss.dtype == torch.float32 and n_supervised == int((batch.targets_BT != IGNORED).sum())
    assert_close(loss, expected, atol=1e-4, rtol=1e-5)
    assert ours.keys() == theirs.keys() and theirs
    for name, gradient in theirs.items():
        scale = gradient.abs().max().clamp(min=1.0)
        assert_close(ours[name] / scale, gradient / scale, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("chunk_size", [None, 1, 5])
@pytest.mark.parametrize("spec", SPECS)
def test_all_parameters(spec: str, chunk_size: int | None) -> None:
    """Guards softcap, bias and tied weights of the head, and gradients that only the last chunk has."""
    assert_same(tiny(spec), DENSE, chunk_size=chunk_size)


ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("lora", {"targets": ["attn.q", "attn.v"]}),
    "lora-head": ("lora", {"targets": ["attn.q", "head"]}),
    "lora-tied-head": ("lora", {"targets": ["head"]}),
    "norm": ("norm", {}),
    "llama-adapter": ("llama-adapter", {"layers": 1}),
    "ia3": ("ia3", {}),
}


@pytest.mark.parametrize("batch", [DENSE, instructions()], ids=["dense", "instructions"])
@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters(name: str, batch: Batch) -> None:
    """Guards a fast path that passes an adapter of the head by."""
    adapter, options = ADAPTERS[name]
    model = tiny("tied" if "tied" in name else "head-bias")
    handle = adapt(model, adapter, **options)
    randomize(handle)
    assert_same(model, batch, chunk_size=7)


def test_quantized_head() -> None:
    model = tiny("llama")
    model.head = Int8Linear.from_float(model.head.weight.detach(), torch.float32)  # type: ignore[assignment]
    adapt(model, "lora", targets=["attn.q"])
    assert_same(model, instructions(), chunk_size=7)


def test_hooks_of_the_head_are_called() -> None:
    """Guards a fast path around what somebody has put on the head."""
    model = tiny("llama")
    model.head.register_forward_hook(lambda module, args, result: result * 0.5)
    assert_same(model, DENSE)


def test_sums_over_chunks_are_float32() -> None:
    """Guards gradients of a half-precision head that are rounded once for every chunk."""
    model = tiny("head-bias", dtype=torch.bfloat16).requires_grad_(False)
    model.head.requires_grad_(True)
    batch = batch_of([(random_ids(1, seed=b), random_ids(60, seed=9 + b)) for b in range(5)])
    whole, chunked = (gradients(model, supervised_loss(model, batch, chunk_size=n)[0]) for n in (300, 1))
    for name, gradient in whole.items():
        assert (chunked[name].float() - gradient.float()).norm() <= 0.004 * gradient.float().norm(), name


def test_half_precision_is_no_worse_than_the_formula() -> None:
    """Against float32 on the same rounded weights."""
    rounded = tiny("tied", dtype=torch.bfloat16)
    exact = tiny("tied")
    exact.load_state_dict({name: tensor.float() for name, tensor in rounded.state_dict().items()})
    truth = gradients(exact, formula(exact, DENSE))
    errors = []
    for loss in (formula(rounded, DENSE), supervised_loss(rounded, DENSE, chunk_size=2)[0]):
        found = gradients(rounded, loss)
        errors.append(sum(float((found[n].float() - t).norm() / t.norm()) for n, t in truth.items()))
    assert errors[1] <= 1.05 * errors[0]


def test_autocast() -> None:
    model = tiny("head-bias")
    with torch.autocast("cpu", torch.bfloat16):
        expected, (loss, _) = formula(model, DENSE), supervised_loss(model, DENSE)
    truth, theirs, ours = (gradients(model, x) for x in (formula(model, DENSE), expected, loss))
    assert_close(loss, expected, atol=0.05, rtol=1e-3)
    for name, exact in truth.items():
        assert ours[name].dtype == torch.float32
        assert (ours[name] - exact).norm() <= 1.2 * (theirs[name] - exact).norm() + 1e-3 * exact.norm(), name


class LargestLogits(TorchDispatchMode):
    """Rows of the largest tensor whose last dimension is the vocabulary, views of the weight left out."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.rows, self._weight = 0, weight.untyped_storage().data_ptr()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            is_logits = isinstance(tensor, Tensor) and tensor.dim() >= 2 and tensor.shape[-1] == VOCAB
            if is_logits and tensor.untyped_storage().data_ptr() != self._weight:
                self.rows = max(self.rows, tensor.numel() // VOCAB)
        return result


@pytest.mark.parametrize("head", ["plain", "lora"])
def test_no_logits_of_a_batch(head: str) -> None:
    """Neither forward nor backward makes logits of more targets than a chunk has; nothing of a chunk is kept."""
    model = tiny("llama")
    adapt(model, "lora", targets=["attn.q", "head"] if head == "lora" else ["attn.q"])
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.shape and tensor.shape[-1] == VOCAB and not isinstance(tensor, nn.Parameter):
            kept.append(tensor.numel())
        return tensor

    with (
        LargestLogits(model.head.weight) as logits,
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        loss, n_supervised = supervised_loss(model, DENSE, chunk_size=12)
    assert n_supervised == 48 and kept == []
    with logits:
        loss.backward()
    assert logits.rows == 12
    with LargestLogits(model.head.weight) as logits:
        formula(model, DENSE)
    assert logits.rows == 48


@pytest.mark.parametrize("batch", [DENSE, instructions()], ids=["dense", "instructions"])
def test_evaluation(batch: Batch) -> None:
    """The same number without gradients, and none are computed."""
    model = tiny("capped").eval()
    expected = formula(model, batch)
    with torch.no_grad():
        loss, _ = supervised_loss(model, batch)
    assert not loss.requires_grad
    assert_close(loss, expected.detach(), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("targets", [["attn.q"], ["attn.q", "head"]], ids=["body", "head"])
def test_nothing_to_learn(targets: list[str]) -> None:
    """Guards a rank without samples: it takes part with gradients of zero, for every parameter."""
    model = tiny("llama")
    handle = adapt(model, "lora", targets=targets)
    randomize(handle)
    loss, n_supervised = supervised_loss(model, DENSE.silenced())
    found = gradients(model, loss)
    assert loss.item() == 0.0 and n_supervised == 0
    assert len(found) == len(handle.trainable()) and not any(bool(g.any()) for g in found.values())


@pytest.mark.parametrize("n_parts", [1, 2, 4])
def test_accumulation(n_parts: int) -> None:
    """Sums over micro-batches, divided by the targets of all, are the gradient of the whole; means of means are not."""
    model = tiny("llama")
    rows = [(random_ids(3, seed=b), random_ids(2 + 5 * b, seed=b)) for b in range(4)]
    whole = batch_of(rows)
    expected = gradients(model, formula(model, whole) / whole.n_supervised)
    losses = [supervised_loss(model, batch_of(rows[i::n_parts]))[0] for i in range(n_parts)]
    found = gradients(model, torch.stack(losses).sum() / whole.n_supervised)
    for name, gradient in expected.items():
        assert_close(found[name], gradient, atol=1e-5, rtol=1e-5)


class Own(nn.Module):
    """Somebody's GPT, more or less."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.embed, self.head = nn.Embedding(VOCAB, 8), nn.Linear(8, VOCAB)

    def forward(self, tokens: Tensor) -> Any:
        """Logits, in one of the ways that are found in the wild."""
        logits = self.head(self.embed(tokens))
        results = {"logits": SimpleNamespace(logits=logits), "tuple": (logits, None), "last": logits[:, -1:], "none": 3}
        return results.get(self.kind, logits)


@pytest.mark.parametrize("kind", ["tensor", "logits", "tuple"])
def test_other_modules(kind: str) -> None:
    model, batch = Own(kind), instructions()
    expected = F.cross_entropy(
        model.head(model.embed(batch.tokens_BT)).flatten(0, 1), batch.targets_BT.flatten(), reduction="sum"
    )
    theirs = gradients(model, expected)
    loss, n_supervised = supervised_loss(model, batch)
    assert n_supervised == batch.n_supervised
    assert_close(loss, expected)
    for name, gradient in gradients(model, loss).items():
        assert_close(gradient, theirs[name])


@pytest.mark.parametrize(("kind", "found"), [("last", r"\(5, 1, 97\)"), ("none", "int")])
def test_logits_of_another_shape(kind: str, found: str) -> None:
    """Guards against a loss over the last position alone, which nanoGPT's forward without targets would give."""
    with pytest.raises(ZooError, match=f"Own returns {found} for tokens of .* every position"):
        supervised_loss(Own(kind), instructions())


def test_packed_documents_need_a_mask() -> None:
    zeros = torch.zeros(1, 4, dtype=torch.long)
    with pytest.raises(InputError, match="Own has an attention of its own"):
        supervised_loss(Own("tensor"), Batch(zeros, zeros, zeros, zeros, 4, 4))


def test_module() -> None:
    """What wrappers see: every parameter that trains is used within ``forward``."""
    model = tiny("llama")
    assert_close(SupervisedLoss(model)(DENSE), supervised_loss(model, DENSE)[0])
    assert isinstance(SupervisedLoss(model).model, GPT)
