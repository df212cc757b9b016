"""Saving while the training goes on: a copy of the state, one save at a time, errors that come to light."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.store_lab import ThreadRanks, Training, digest, on_ranks
from zoo.store.commit import SaveError
from zoo.store.store import CheckpointStore


class SlowDisk:
    """A format that is written when it is told to be, or not at all."""

    def __init__(self) -> None:
        self.began, self.go_on = threading.Semaphore(0), threading.Semaphore(0)
        self.error: Exception | None = None
        self.alive: list[int] = []

    def write(self, directory: Path, tensors: Mapping[str, Tensor]) -> None:
        from safetensors.torch import save_file

        self.began.release()
        assert self.go_on.acquire(timeout=30)
        if self.error:
            raise self.error
        self.alive.append(len(list(directory.parent.parent.glob("step-*"))))
        save_file(dict(tensors), directory / "weights.safetensors")

    def read(self, directory: Path) -> Mapping[str, Tensor]:
        from safetensors.torch import load_file

        return {name: tensor.clone() for name, tensor in load_file(directory / "weights.safetensors").items()}


@pytest.fixture
def disk() -> Iterator[SlowDisk]:
    disk = SlowDisk()
    yield disk
    disk.go_on.release(100)


def test_a_save_in_the_background_is_of_the_state_at_the_call(tmp_path: Path, disk: SlowDisk) -> None:
    """Guards against a save that blocks the training, or mixes the weights of two steps."""
    training = Training()
    training.step()
    before = digest(training.state())
    with CheckpointStore(tmp_path, background=True, model_files=disk) as store:
        assert store.save(1, training.state()) is None
        assert disk.began.acquire(timeout=30)
        for _ in range(3):
            training.step()  # while the writer waits
        assert store.poll() is None and store._work is not None
        disk.go_on.release()
        other = Training(seed=3)
        state = other.state()
        assert store.load(state).step == 1  # waits for it
        other.take(state)
        assert store.poll() is None
    assert digest(other.state()) == before != digest(training.state())


def test_one_save_at_a_time(tmp_path: Path, disk: SlowDisk) -> None:
    """Guards against two copies of the state in memory: the second call waits until the first is committed."""
    disk.go_on.release(3)
    with CheckpointStore(tmp_path, keep=None, background=True, model_files=disk) as store:
        for step in range(3):
            store.save(step, {"model": {"w": torch.full((10,), float(step))}})
    assert disk.alive == [0, 1, 2], "steps that were there when each began to write"
    with CheckpointStore(tmp_path, read_only=True) as store:
        assert [step.step for step in store.list()] == [0, 1, 2]


@pytest.mark.parametrize("call", ["poll", "save", "load", "close"])
def test_an_error_in_the_background_is_raised_by_the_next_call(tmp_path: Path, disk: SlowDisk, call: str) -> None:
    """Guards against a run that believes it has saved for days."""
    disk.go_on.release(100)
    with CheckpointStore(tmp_path, background=True, model_files=disk) as store:
        state = {"model": {"w": torch.ones(3)}}
        store.save(1, state)
        assert store._work is not None
        store._work.wait()
        disk.error = OSError(28, "No space left on device")
        store.save(2, state)
        assert store._work is not None
        store._work._thread.join()
        calls = {
            "poll": store.poll,
            "save": lambda: store.save(3, state),
            "load": lambda: store.load(state),
            "close": store.close,
        }
        with pytest.raises(SaveError, match=r"step 2 was not saved.*No space left.*Free some space"):
            calls[call]()
        assert [path.name for path in tmp_path.glob("*step*")] == ["step-00000001"] and not list(tmp_path.glob(".t*"))
        disk.error = None
        if call != "close":  # it is raised once, and the store goes on
            store.save(4, state)
            store.load(state, 4)


def test_what_can_not_be_saved_is_an_error_at_once(tmp_path: Path) -> None:
    """Guards against bad input that comes to light a step later."""
    with CheckpointStore(tmp_path, background=True) as store, pytest.raises(SaveError, match="is a set"):
        store.save(1, {"value": {1}})


def test_only_what_a_rank_writes_is_copied(tmp_path: Path) -> None:
    """Guards against a copy of the whole model on every rank."""
    with CheckpointStore(tmp_path, background=True) as store:
        store.save(1, {"model": nn.Linear(2, 2)})
    sizes = {}

    def work(ranks: ThreadRanks) -> None:
        with CheckpointStore(tmp_path / "ranks", fence=ranks, background=True) as store:
            store.save(1, {"model": nn.Linear(100, 100), "mine": torch.zeros(5)})
            assert store._work is not None
            procedure: Any = store._work._procedure
            sizes[ranks.rank] = list(procedure.gi_frame.f_locals["parts"].model.tensors)
            while store.poll() is None:
                pass
            assert store.list()[0].step == 1

    assert on_ranks(2, work) == [None, None]
    assert sizes == {0: ["weight", "bias"], 1: []}


def test_ranks_commit_when_all_have_written(tmp_path: Path) -> None:
    """Guards against a step that is committed while a rank writes, and exchanges in another order per rank."""
    disk = SlowDisk()
    seen: list[bool] = []

    def work(ranks: ThreadRanks) -> list[int]:
        with CheckpointStore(tmp_path, fence=ranks, background=True, model_files=disk) as store:
            polls = []
            for step in (1, 2):
                store.save(step, {"model": {"w": torch.ones(3)}, "rank": ranks.rank})
                if ranks.rank == 0:
                    assert disk.began.acquire(timeout=30)
                for _ in range(5):
                    assert store.poll() is None
                ranks.gather("training", ranks.rank)
                seen.append((tmp_path / f"step-0000000{step}").exists())
                ranks.gather("training", ranks.rank)
                disk.go_on.release()
                n = 0
                while store.poll() is None:
                    n += 1
                polls.append(n)
            state: dict[str, Any] = {"model": {"w": torch.zeros(3)}, "rank": None}
            assert store.load(state).step == 2 and state["rank"] == ranks.rank
            return polls

    first, second = on_ranks(2, work)
    assert first == second and len(first) == 2
    assert seen == [False] * 4


def test_an_error_of_one_rank_in_the_background_is_every_ranks(tmp_path: Path) -> None:
    """Guards against a rank that goes on while the others have raised."""
    disk = SlowDisk()
    disk.error = OSError(28, "No space left on device")
    disk.go_on.release(100)

    def work(ranks: ThreadRanks) -> int:
        with CheckpointStore(tmp_path, fence=ranks, background=True, model_files=disk) as store:
            store.save(1, {"model": {"w": torch.ones(3)}})
            while store.poll() is None:
                pass
            return 1

    for result in on_ranks(2, work):
        assert isinstance(result, SaveError) and "rank 0: OSError: [Errno 28] No space left" in str(result)
    assert not list(tmp_path.glob("*step*")) and not list(tmp_path.glob(".tmp*"))
