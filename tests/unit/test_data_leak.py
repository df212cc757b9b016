"""Packed documents do not see each other: logits, loss and gradients are those of the documents by themselves."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from zoo.api import build
from zoo.attention.eager import Eager
from zoo.attention.sdpa import SDPA
from zoo.data.batches import IGNORED, Batch, collate
from zoo.models.attention import Attend, Attention
from zoo.models.gpt import GPT
from zoo.text.samples import Encoded

LENGTHS = (7, 2, 12, 5)
SIZES = {"n_layers": 2, "d_model": 32, "n_heads": 4, "vocab_size": 61, "max_seq_len": 64}


def documents() -> list[Encoded]:
    generator = np.random.default_rng(0)
    found = []
    for length in LENGTHS:
        supervised = generator.random(length) < 0.7
        supervised[0], supervised[-1] = False, True
        found.append(Encoded(generator.integers(0, 61, length).astype(np.int32), supervised))
    return found


def model(name: str, attend: Attend) -> GPT:
    """With learned positions (gpt2) or rotary ones, in evaluation mode, every parameter random."""
    more = {"n_kv_heads": 2, "d_ffn": 48} if name == "smollm2-135m" else {}
    options: dict[str, Any] = {**SIZES, **more}
    built = build(name, seed=0, **options)
    assert isinstance(built, GPT)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    for module in built.modules():
        if isinstance(module, Attention):
            module.attend = attend
    return built.eval()


def outcome(gpt: GPT, batches: list[Batch]) -> tuple[list[Tensor], Tensor, dict[str, Tensor]]:
    """The logits of the documents, the loss per supervised token and its gradients."""
    gpt.zero_grad()
    logits: list[Tensor] = []
    total, count = torch.zeros(()), 0
    for batch in batches:
        logits_BTV = gpt(batch.tokens_BT, positions_BT=batch.positions_BT, mask=batch.mask)
        total = total + F.cross_entropy(
            logits_BTV.flatten(0, 1), batch.targets_BT.flatten(), ignore_index=IGNORED, reduction="sum"
        )
        count += batch.n_supervised
        logits.append(logits_BTV.detach())
    loss = total / count
    loss.backward()
    return logits, loss.detach(), {n: p.grad.clone() for n, p in gpt.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ["gpt2", "smollm2-135m"])
@pytest.mark.parametrize("attend", [Eager(), SDPA()], ids=["eager", "sdpa"])
def test_packed_equals_unpacked(name: str, attend: Attend) -> None:
    """Guards against a leak through attention, positions that go on, and targets across a border."""
    gpt = model(name, attend)
    rows = documents()
    packed, loss, gradients = outcome(gpt, [collate([[rows[0], rows[1], rows[2]], [rows[3]]], packed=True)])
    alone, expected, expected_gradients = outcome(gpt, [collate([[row]], packed=False) for row in rows])
    start = 0
    for row, logits in zip(rows[:3], alone[:3], strict=True):
        end = start + len(row) - 1
        assert_close(packed[0][0, start:end], logits[0], atol=1e-5, rtol=1e-5)
        start = end
    assert_close(packed[0][1, : LENGTHS[3] - 1], alone[3][0], atol=1e-5, rtol=1e-5)
    assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    assert gradients.keys() == expected_gradients.keys()
    for parameter, gradient in gradients.items():
        assert_close(gradient, expected_gradients[parameter], atol=1e-5, rtol=1e-4, msg=parameter)
    # The same row without its mask is another function: the test can fail.
    batch = collate([[rows[0], rows[1], rows[2]]], packed=True)
    leaky = gpt(batch.tokens_BT, positions_BT=batch.positions_BT)
    assert (leaky[0, start - 1] - packed[0][0, start - 1]).abs().max() > 1e-2


def test_padding_changes_nothing() -> None:
    """Guards right padding without a mask: a document in a wider batch has the loss and gradients it has alone."""
    gpt, rows = model("gpt2", SDPA()), documents()
    _, loss, gradients = outcome(gpt, [collate([[row] for row in rows], packed=False)])
    _, expected, expected_gradients = outcome(gpt, [collate([[row]], packed=False) for row in rows])
    assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    for parameter, gradient in gradients.items():
        assert_close(gradient, expected_gradients[parameter], atol=1e-5, rtol=1e-4, msg=parameter)
