"""Batches as a function of seed and step: every sample once an epoch, the same samples for every split of the work."""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Iterable

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from zoo.data.batches import IGNORED, Batch, collate, pack, row_length
from zoo.data.finetuning import FinetuningData
from zoo.errors import InputError
from zoo.text.samples import Encoded

EOS = 9999


def sequence(number: int, length: int) -> Encoded:
    """A sequence whose ids are all ``number``, but for EOS at the end; its first half is a prompt."""
    ids = np.full(length, number, np.int32)
    ids[-1] = EOS
    supervised = np.arange(length) >= max(1, length // 2)
    return Encoded(ids, supervised)


def sequences(lengths: Iterable[int]) -> list[Encoded]:
    return [sequence(number, length) for number, length in enumerate(lengths, 1)]


def of_length(count: int, seed: int = 0) -> list[Encoded]:
    return sequences(np.random.default_rng(seed).integers(2, 40, count).tolist())


def samples_in(batches: Iterable[Batch]) -> Counter[int]:
    """How often each sample is learnt, by the count of its EOS targets before which its number stands."""
    found: Counter[int] = Counter()
    for batch in batches:
        rows, places = (batch.targets_BT == EOS).nonzero(as_tuple=True)
        found.update(batch.tokens_BT[rows, places].tolist())
    return found


def whole_step(data: FinetuningData, number: int, world_size: int, micro_batch_size: int) -> list[list[Batch]]:
    """The micro-batches of every rank."""
    return [
        data.step(number, rank=rank, world_size=world_size, micro_batch_size=micro_batch_size)
        for rank in range(world_size)
    ]


SPLITS = st.tuples(
    st.integers(1, 30),  # samples
    st.integers(1, 12),  # batch size
    st.integers(1, 4),  # ranks
    st.integers(1, 5),  # micro-batch size
    st.booleans(),  # packing
    st.integers(0, 5),  # seed
)


@settings(max_examples=60, deadline=None)
@given(SPLITS)
@example((7, 5, 4, 1, False, 0))  # the last step has fewer samples than ranks
def test_the_step_fixes_its_samples(drawn: tuple[int, int, int, int, bool, int]) -> None:
    """Guards against ranks or accumulation that change what is learnt: 4x1 must be 1x4, two ranks one process."""
    n_samples, batch_size, world_size, micro_batch_size, packing, seed = drawn
    data = FinetuningData(of_length(n_samples), batch_size=batch_size, seed=seed, packing=packing, max_seq_len=40)
    for number in range(2 * data.steps_per_epoch):
        alone = samples_in(data.step(number, micro_batch_size=batch_size))
        ranks = whole_step(data, number, world_size, micro_batch_size)
        assert len({len(batches) for batches in ranks}) == 1, "as many micro-batches on each rank"
        everything = [batch for batches in ranks for batch in batches]
        assert samples_in(everything) == alone
        assert sum(batch.n_supervised for batch in everything) == data.n_supervised(number)
        assert all(len(batch.tokens_BT) <= micro_batch_size for batch in everything)
        if batch_size % (world_size * micro_batch_size) == 0 and len(data.rows_of(number)) == batch_size:
            assert all(len(batches) == batch_size // (world_size * micro_batch_size) for batches in ranks)


@settings(max_examples=40, deadline=None)
@given(SPLITS)
def test_every_sample_once_an_epoch(drawn: tuple[int, int, int, int, bool, int]) -> None:
    """Guards against samples that are dropped in silence, those of a last, smaller step above all."""
    n_samples, batch_size, _, micro_batch_size, packing, seed = drawn
    data = FinetuningData(of_length(n_samples), batch_size=batch_size, seed=seed, packing=packing, max_seq_len=40)
    for epoch in range(2):
        found: Counter[int] = Counter()
        for index in range(data.steps_per_epoch):
            found += samples_in(data.step(epoch * data.steps_per_epoch + index, micro_batch_size=micro_batch_size))
        assert found == Counter(range(1, n_samples + 1))
    sizes = [len(data.rows_of(number)) for number in range(data.steps_per_epoch)]
    assert set(sizes[:-1]) <= {batch_size} and sizes[-1] == (len(data.rows) - 1) % batch_size + 1


@settings(max_examples=30, deadline=None)
@given(SPLITS)
def test_validation_has_every_sample_once(drawn: tuple[int, int, int, int, bool, int]) -> None:
    """Guards the validation loss: the same samples for every number of ranks, sorted by length."""
    n_samples, _, world_size, micro_batch_size, packing, _ = drawn
    held_out = of_length(n_samples, seed=1)
    data = FinetuningData(of_length(3), held_out, batch_size=2, packing=packing, max_seq_len=40)
    ranks = [
        data.validation(rank=rank, world_size=world_size, micro_batch_size=micro_batch_size)
        for rank in range(world_size)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    assert samples_in(batch for batches in ranks for batch in batches) == Counter(range(1, n_samples + 1))
    for batches in ranks:
        widths = [batch.tokens_BT.shape[1] for batch in batches if batch.n_supervised]
        assert widths == sorted(widths, reverse=True)
    assert FinetuningData(of_length(3), batch_size=2).validation() == []


def order(data: FinetuningData, numbers: Iterable[int]) -> list[list[int]]:
    return [data.rows_of(number) for number in numbers]


def test_the_order_is_a_function_of_seed_and_step() -> None:
    """Guards resuming: a run that goes on at step 37 sees what it would have seen, without what came before."""
    data = [FinetuningData(of_length(50), batch_size=4, seed=3) for _ in range(2)]
    per_epoch = data[0].steps_per_epoch
    assert per_epoch == 13
    forwards = order(data[0], range(40))
    assert order(data[1], [37]) == [forwards[37]]
    assert order(data[1], range(39, -1, -1)) == forwards[::-1]
    assert forwards[:per_epoch] != forwards[per_epoch : 2 * per_epoch], "each epoch has its own order"
    assert order(FinetuningData(of_length(50), batch_size=4, seed=4), range(3)) != forwards[:3]
    assert order(pickle.loads(pickle.dumps(data[0])), [5]) == [forwards[5]]


def test_little_is_padding() -> None:
    """Guards bucketing by length: in random order, more than a third of these positions is padding."""
    lengths = np.random.default_rng(0).lognormal(4, 1, 2000).astype(int).clip(2, 1000).tolist()
    data = FinetuningData(sequences(lengths), batch_size=8, seed=0)
    batches = [batch for number in range(data.steps_per_epoch) for batch in data.step(number, micro_batch_size=4)]
    positions = sum(batch.tokens_BT.numel() for batch in batches)
    assert sum(batch.n_tokens for batch in batches) == sum(lengths) - len(lengths)
    assert sum(batch.n_tokens for batch in batches) > 0.9 * positions
    means = [
        np.mean([row_length(data.rows[i]) for i in data.rows_of(number)]) for number in range(data.steps_per_epoch)
    ]
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.2, "long ones come at any time"


def test_what_is_in_a_batch() -> None:
    """Guards the shift by one, padding that is never learnt, and EOS that is, even if it is what pads."""
    batch = collate(
        [[Encoded(np.array([5, 6, 7], np.int32), np.array([False, True, True]))], [sequence(8, 2)]], packed=False
    )
    assert batch.tokens_BT.tolist() == [[5, 6], [8, 0]]
    assert batch.targets_BT.tolist() == [[6, 7], [EOS, IGNORED]]
    assert (batch.n_tokens, batch.n_supervised) == (3, 3)
    assert batch.positions_BT is None and batch.documents_BT is None
    assert batch.mask.features == {"causal"}
    silent = batch.silenced()
    assert silent.n_supervised == 0 and (silent.targets_BT == IGNORED).all()
    assert batch.to("meta").tokens_BT.device.type == "meta"


def test_what_is_in_a_packed_batch() -> None:
    """Guards positions that begin anew, documents apart, and no target across their border."""
    first = Encoded(np.array([5, 6, 7], np.int32), np.array([False, True, True]))
    second = Encoded(np.array([1, 2, 3, 4], np.int32), np.array([False, False, True, True]))
    batch = collate([[first, second], [second]], packed=True)
    assert batch.tokens_BT.tolist() == [[5, 6, 1, 2, 3], [1, 2, 3, 0, 0]]
    assert batch.targets_BT.tolist() == [[6, 7, IGNORED, 3, 4], [IGNORED, 3, 4, IGNORED, IGNORED]]
    assert batch.positions_BT is not None and batch.documents_BT is not None
    assert batch.positions_BT.tolist() == [[0, 1, 0, 1, 2], [0, 1, 2, 0, 0]]
    assert batch.documents_BT.tolist() == [[0, 0, 1, 1, 1], [0, 0, 0, 1, 1]]
    assert batch.mask.features == {"causal", "documents"}
    assert batch.to("meta").documents_BT is not None


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(1, 33), max_size=40), st.integers(33, 70))
def test_packing(lengths: list[int], capacity: int) -> None:
    """Guards best fit: all items once, none too many in a row, and no two rows that would fit into one."""
    rows = pack(np.array(lengths, np.int64), capacity)
    assert sorted(item for row in rows for item in row) == list(range(len(lengths)))
    filled = sorted(sum(lengths[item] for item in row) for row in rows)
    assert all(n <= capacity for n in filled)
    assert len(filled) < 2 or filled[0] + filled[1] > capacity
    assert rows == pack(np.array(lengths, np.int64), capacity)


def test_packing_takes_the_row_that_is_filled_best() -> None:
    """Guards best fit against first fit: 4 goes to the row with 4 left, not to the first with enough."""
    assert pack(np.array([5, 6, 4, 1], np.int64), 10) == [[1, 2], [0, 3]]


def test_packed_rows_are_few() -> None:
    lengths = np.random.default_rng(0).integers(2, 100, 3000)
    data = FinetuningData(sequences(lengths.tolist()), batch_size=8, packing=True, max_seq_len=256)
    assert len(data.rows) < 1.01 * (lengths - 1).sum() / 256 + 1
    assert max(map(row_length, data.rows)) <= 256


def test_what_is_refused() -> None:
    """Guards the errors that come before any work."""
    nothing = Encoded(np.array([1, 2], np.int32), np.array([False, False]))
    with pytest.raises(InputError, match="nothing to train on"):
        FinetuningData([nothing], batch_size=1)
    with pytest.raises(InputError, match="batch_size must be at least 1, not 0"):
        FinetuningData(of_length(1), batch_size=0)
    with pytest.raises(InputError, match="seed must be at least 0"):
        FinetuningData(of_length(1), batch_size=1, seed=-1)
    with pytest.raises(InputError, match="a sample takes 9 positions, and a row has 8"):
        FinetuningData([sequence(1, 10)], batch_size=1, packing=True, max_seq_len=8)


def test_batches_are_int64() -> None:
    """Guards the dtypes that embedding and loss need."""
    (batch,) = FinetuningData(of_length(3), batch_size=3, packing=True).step(0, micro_batch_size=3)
    tensors = (batch.tokens_BT, batch.targets_BT, batch.positions_BT, batch.documents_BT)
    assert all(tensor is not None and tensor.dtype == torch.int64 for tensor in tensors)
