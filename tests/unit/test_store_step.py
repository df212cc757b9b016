"""`CheckpointStore.step`: where ranks meet before a step, hear of signals, and see to a save in the background."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.store_lab import ROOT, ThreadRanks, on_ranks
from zoo.errors import InputError
from zoo.store.commit import SaveError
from zoo.store.store import CheckpointStore

NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def handlers() -> list[Any]:
    return [signal.getsignal(number) for number in NUMBERS]


def test_signals_are_left_alone_unless_asked_for(tmp_path: Path) -> None:
    """Guards against a notebook whose Ctrl-C does nothing any more."""
    before = handlers()
    with CheckpointStore(tmp_path) as store:
        assert handlers() == before
        assert store.step(0) is False and store.stop_requested is False


@pytest.mark.parametrize("number", NUMBERS)
def test_a_signal_is_reported_by_the_next_step(tmp_path: Path, number: signal.Signals) -> None:
    """Guards against a process that dies unsaved, and a stop that is forgotten one step later."""
    before = handlers()
    with CheckpointStore(tmp_path, signals=True) as store:
        assert store.step(0) is False
        os.kill(os.getpid(), number)
        assert store.stop_requested is False, "before the ranks have met they can not know"
        assert store.step(1) is True and store.stop_requested is True
        assert store.step(2) is True
        store.save(2, {"count": 2})
    assert handlers() == before
    assert [path.name for path in tmp_path.glob("step-*")] == ["step-00000002"]


def test_handlers_come_back_when_the_store_can_not_be_opened(tmp_path: Path) -> None:
    """Guards against signals that are swallowed after an error."""
    before = handlers()
    (tmp_path / "file").touch()
    with pytest.raises(InputError):
        CheckpointStore(tmp_path, signals=True)
    assert handlers() == before


def test_a_second_signal_ends_the_process(tmp_path: Path) -> None:
    """Guards against a loop that can not be stopped, since it does not ask or saves for too long."""
    program = f"""
import sys, time
from zoo import CheckpointStore
with CheckpointStore({str(tmp_path)!r}, signals=True):
    print("ready", flush=True)
    time.sleep(60)
"""
    command, environment = [sys.executable, "-c", program], os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        process.stdout.readline()
        process.terminate()
        time.sleep(1.5)
        assert process.poll() is None
        process.terminate()
        assert process.wait(30) == -signal.SIGTERM


def test_a_signal_on_one_rank_stops_all_at_the_same_step(tmp_path: Path) -> None:
    """Guards against a flag of one rank's own: the others would wait for it in the next collective."""

    def work(ranks: ThreadRanks) -> list[bool]:
        with CheckpointStore(tmp_path, fence=ranks) as store:
            found = []
            for step in range(4):
                if (ranks.rank, step) == (1, 2):
                    store._signals = Received()  # type: ignore[assignment]  # a thread can not catch signals
                found.append(store.step(step))
            return found

    assert on_ranks(3, work) == [[False, False, True, True]] * 3


class Received:
    received = "SIGTERM"

    def restore(self) -> None: ...


class FullDisk:
    def write(self, directory: Path, tensors: Mapping[str, Tensor]) -> None:
        raise OSError(28, "No space left on device")

    def read(self, directory: Path) -> Mapping[str, Tensor]:
        raise NotImplementedError


def test_it_sees_to_a_save_in_the_background(tmp_path: Path) -> None:
    """Guards against a save that is never committed, or fails unheard, in a loop that only calls step."""

    def work(ranks: ThreadRanks) -> int:
        with CheckpointStore(tmp_path, fence=ranks, background=True) as store:
            store.save(0, {"rank": ranks.rank})
            step, until = 0, time.monotonic() + 60
            while store._work is not None and time.monotonic() < until:
                step += 1
                store.step(step)
            assert [found.step for found in store.list()] == [0]
            return step

    polls = on_ranks(2, work)
    assert polls[0] == polls[1] > 0
    with CheckpointStore(tmp_path / "alone", background=True, model_files=FullDisk()) as store:
        store.save(0, {"model": {"weight": torch.ones(1)}})
        assert store._work is not None
        store._work._thread.join()
        with pytest.raises(SaveError, match=r"step 0 was not saved.*No space left"):
            store.step(1)


@pytest.mark.parametrize("step", [-1, 1.0, "1", True])
def test_what_is_no_step_number_is_refused(tmp_path: Path, step: Any) -> None:
    """Guards against a step of numpy's or a tensor, which json can not write."""
    with CheckpointStore(tmp_path) as store, pytest.raises(InputError, match="is no step number"):
        store.step(step)
