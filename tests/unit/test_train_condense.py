"""What is left of a batch is enough: losses and gradients are those of the whole batch, and nothing is there twice."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

from tests.tiny_gpt import SPECS, batch_of, formula, gradients, instructions, random_ids, tiny
from zoo.adapters.proof import randomize
from zoo.adapting import adapt
from zoo.data.batches import IGNORED, Batch
from zoo.models.masks import Mask
from zoo.train.condense import Condensed, condense
from zoo.train.loss import supervised_loss

Samples = list[tuple[list[int], list[int]]]


def beginnings(samples: Samples) -> set[tuple[int, ...]]:
    """Every beginning whose last token has to be computed, spelled out."""
    needed = set()
    for prompt, answer in samples:
        ids = (prompt + answer)[:-1]
        needed |= {tuple(ids[: n + 1]) for n in range(len(ids))}
    return needed


def spelled(condensed: Condensed) -> list[tuple[int, ...]]:
    """For each token of a condensed batch, as its rows have it, itself and what comes before it."""
    tokens = condensed.tokens_1S[0]
    found: list[tuple[int, ...]] = [()] * len(tokens)
    for group in condensed.rows.groups:
        for row in group.index_RL:
            for n, token in enumerate(row.tolist()):
                if int(condensed.positions_1S[0, token]) == n:  # else it is padding
                    found[token] = tuple(tokens[row[: n + 1]].tolist())
    return found


ids = st.lists(st.integers(1, 3), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(ids, ids), min_size=1, max_size=7))
def test_each_beginning_once(samples: Samples) -> None:
    """Guards rows that share a token with another past, and tokens that are computed twice or not at all."""
    batch = batch_of(samples)
    condensed = condense(batch)
    found = spelled(condensed)
    targets = {(*p, *a[: n + 1]) for p, a in samples for n in range(len(a))}
    pairs = zip(condensed.supervised_M.tolist(), condensed.targets_M.tolist(), strict=True)
    learnt = [(*found[token], target) for token, target in pairs if target != IGNORED]
    real = [beginning for beginning in found if beginning]
    assert len(real) == len(set(real)) and set(real) == beginnings(samples)
    assert set(learnt) == targets and len(learnt) == batch.n_supervised == condensed.n_supervised


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(ids, ids), min_size=1, max_size=7), st.booleans())
def test_places(samples: Samples, share: bool) -> None:
    """Attention that hands its queries back returns each token to itself."""
    condensed = condense(batch_of(samples), share=share)
    x_1SKH = torch.arange(condensed.tokens_1S.shape[1], dtype=torch.float32)[None, :, None, None]
    out_1SKH = condensed.rows.attend(lambda q, k, v: q, x_1SKH, x_1SKH, x_1SKH)
    n_real = sum(map(bool, spelled(condensed)))
    assert torch.equal(out_1SKH[0, :n_real], x_1SKH[0, :n_real])


def test_sizes() -> None:
    """Guards the sharing itself: two answers to one prompt, and a prompt with the same beginning."""
    prompt = random_ids(40, seed=1)
    batch = batch_of([(prompt, [5, 6, 7]), (prompt, [5, 8]), (prompt[:30] + [9] * 10, [5])])
    condensed = condense(batch)
    assert sum(map(bool, spelled(condensed))) == 40 + 2 + 10  # the prompt, (5, 6), and ten other tokens
    assert condensed.tokens_1S.shape[1] == 64
    alone = condense(batch, share=False)
    assert sum(map(bool, spelled(alone))) == 42 + 41 + 40
    known = [group.n_known for group in condensed.rows.groups]
    assert sorted(known) == [0, 30, 41]  # queries of common beginnings are asked for once


def test_tokens_after_the_last_target_are_left_out() -> None:
    batch = batch_of([(random_ids(3, seed=1), random_ids(30, seed=2))])
    targets_BT = batch.targets_BT.clone()
    targets_BT[:, 10:] = IGNORED
    condensed = condense(Batch(batch.tokens_BT, targets_BT, None, None, 32, 8))
    assert sum(map(bool, spelled(condensed))) == 10


def test_positions_that_differ_are_not_shared() -> None:
    batch = instructions(2)
    positions_BT = torch.arange(batch.tokens_BT.shape[1]).expand_as(batch.tokens_BT).clone()
    positions_BT[1] += 3
    moved = Batch(batch.tokens_BT, batch.targets_BT, positions_BT, None, batch.n_tokens, batch.n_supervised)
    n_alone = condense(batch, share=False).tokens_1S.shape[1]
    assert condense(moved).tokens_1S.shape[1] == n_alone > condense(batch).tokens_1S.shape[1]


ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "full": ("full", {}),
    "lora": ("lora", {"targets": ["all-linear"]}),
    "llama-adapter": ("llama-adapter", {"layers": 2}),
    "after-projection": ("llama-adapter", {"layers": 2, "place": "after_projection"}),
}


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("spec", SPECS)
def test_gradients(spec: str, adapter: str) -> None:
    """Guards everything in a layer that mixes tokens: windows, prompts, positions, both kinds of attention."""
    model = tiny(spec)
    name, options = ADAPTERS[adapter]
    randomize(adapt(model, name, **options))
    batch = instructions()
    n_left = condense(batch).tokens_1S.shape[1]
    assert n_left <= 0.6 * batch.tokens_BT.numel()
    assert_as_the_whole(model, batch, formula(model, batch), n_left)


@pytest.mark.parametrize("spec", SPECS)
def test_packed_documents(spec: str) -> None:
    """Documents of a row become rows of their own; guards those that see each other, and lost positions."""
    first, second = instructions(3), instructions(2, n_common=9, n_more=20)
    batch = packed([first, second])
    assert batch.documents_BT is not None and batch.positions_BT is not None
    model = tiny(spec)
    mask = Mask(documents_BS=batch.documents_BT)
    assert_as_the_whole(model, batch, formula(model, batch, mask=mask, positions_BT=batch.positions_BT))


def packed(parts: list[Batch]) -> Batch:
    """The samples of each batch in one row, without their padding, then padding."""
    rows: list[list[Tensor]] = []
    for part in parts:
        columns: list[list[Tensor]] = [[], [], [], []]
        for d, (tokens, targets) in enumerate(zip(part.tokens_BT, part.targets_BT, strict=True)):
            end = int((targets != IGNORED).nonzero()[-1]) + 1
            values = (tokens[:end], targets[:end], torch.arange(end), torch.full((end,), d))
            for column, value in zip(columns, values, strict=True):
                column.append(value)
        rows.append([torch.cat(column) for column in columns])
    width = max(len(row[0]) for row in rows) + 3
    fills = (0, IGNORED, 0, 99)
    stacked = [
        torch.stack([nn.functional.pad(row[i], (0, width - len(row[i])), value=fill) for row in rows])
        for i, fill in enumerate(fills)
    ]
    tokens, targets, positions, documents = stacked
    return Batch(tokens, targets, positions, documents, 0, int((targets != IGNORED).sum()))


def assert_as_the_whole(model: nn.Module, batch: Batch, expected: Tensor, n_left: int | None = None) -> None:
    theirs = gradients(model, expected)
    computed: list[int] = []
    hook = model.get_submodule("norm").register_forward_hook(lambda m, args, x: computed.append(x.shape[1]))
    loss, n_supervised = supervised_loss(model, batch)
    hook.remove()
    assert n_left is None or computed == [n_left]
    ours = gradients(model, loss)
    assert n_supervised == batch.n_supervised
    assert_close(loss, expected, atol=1e-4, rtol=1e-5)
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        scale = gradient.abs().max().clamp(min=1.0)
        assert_close(ours[name] / scale, gradient / scale, atol=2e-5, rtol=1e-5)


def test_half_precision() -> None:
    """The attention of training in bfloat16, of queries that are the last of their keys too, against float32."""
    rounded = tiny("llama", dtype=torch.bfloat16)
    exact = tiny("llama")
    exact.load_state_dict({name: tensor.float() for name, tensor in rounded.state_dict().items()})
    batch = instructions()
    truth = gradients(exact, formula(exact, batch))
    errors = []
    for loss in (formula(rounded, batch), supervised_loss(rounded, batch)[0]):
        found = gradients(rounded, loss)
        errors.append(sum(float((found[n].float() - t).norm() / t.norm()) for n, t in truth.items()))
    assert errors[1] <= 1.2 * errors[0]


@pytest.mark.parametrize("where", ["embed_dropout", "attn_dropout", "resid_dropout", "lora"])
def test_dropout_is_not_shared(where: str) -> None:
    """Guards noise that is the same in several rows; in evaluation there is none, and beginnings are shared."""
    batch = instructions()
    changes: dict[str, Any] = {} if where == "lora" else {where: 0.1}
    model = tiny("gpt2", **changes)
    options: dict[str, Any] = {"dropout": 0.1} if where == "lora" else {}
    adapt(model, "lora", targets=["attn.q"], **options)
    computed: list[int] = []
    model.norm.register_forward_hook(lambda m, args, x: computed.append(x.shape[1]))
    supervised_loss(model.train(), batch)
    supervised_loss(model.eval(), batch)
    assert computed == [condense(batch, share=share).tokens_1S.shape[1] for share in (False, True)]
    assert computed[0] > computed[1]


def test_what_has_nothing_to_leave_out_runs_as_it_is() -> None:
    """Guards pretraining against being sorted out for nothing: the same products, to the bit."""
    batch = batch_of([(random_ids(1, seed=b), random_ids(16, seed=9 + b)) for b in range(3)])
    model = tiny("llama")
    shapes: list[tuple[int, ...]] = []
    model.norm.register_forward_hook(lambda m, args, x: shapes.append(tuple(x.shape)))
    supervised_loss(model, batch)
    assert shapes == [(3, 16, 48)]
