"""Directories that are no store, stores that others write, and steps of other runs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.store_lab import ROOT
from zoo.errors import InputError, ZooError
from zoo.store.lock import StoreLockedError
from zoo.store.store import CheckpointStore

HOLD = """
import os, sys, time
from zoo.store.store import CheckpointStore
store = CheckpointStore(sys.argv[1])
store.save(1, {"value": 1})
if sys.argv[2:] and os.fork() == 0:  # as a worker of a data loader, which outlives a trainer that is killed
    time.sleep(60)
print(os.getpid(), flush=True)
time.sleep(60)
"""


@contextmanager
def holder(directory: Path, *arguments: str) -> Iterator[int]:
    """Another process that has the store open, in a group of its own."""
    command = [sys.executable, "-c", HOLD, str(directory), *arguments]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None
    try:
        yield int(process.stdout.readline())
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()


def test_one_process_writes_and_others_may_read(tmp_path: Path) -> None:
    """Guards against two runs in one directory, and a lock that outlives its holder."""
    with holder(tmp_path, "with a child") as pid:
        with pytest.raises(StoreLockedError) as caught:
            CheckpointStore(tmp_path)
        assert f"{tmp_path} is being written by process {pid} on " in str(caught.value)
        assert "read_only=True" in str(caught.value)
        state = {"value": 0}
        with CheckpointStore(tmp_path, read_only=True) as store:
            store.load(state)
        assert state["value"] == 1
        os.kill(pid, signal.SIGKILL)
        until = time.monotonic() + 20
        while Path(f"/proc/{pid}").exists() and Path(f"/proc/{pid}/stat").read_text().split()[2] not in "ZX":
            assert time.monotonic() < until
            time.sleep(0.01)
        with CheckpointStore(tmp_path) as store:  # its child is alive
            store.save(2, {"value": 2})


def test_a_store_may_be_opened_twice_in_one_process(tmp_path: Path) -> None:
    """Guards against a notebook that has to be restarted, and a lock that the first close gives away."""
    first, second = CheckpointStore(tmp_path), CheckpointStore(tmp_path)
    first.close()
    second.save(1, {"value": 1})
    with pytest.raises(ZooError, match="closed"):
        first.save(2, {"value": 2})
    child = os.fork()
    if child == 0:  # another process: it inherits the object, and not the right
        try:
            CheckpointStore(tmp_path)
        except StoreLockedError:
            os._exit(7)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    second.close()
    second.close()


def test_directories_that_are_no_store(tmp_path: Path) -> None:
    """Guards against retention at work in a directory of something else."""
    (tmp_path / "file").touch()
    foreign = tmp_path / "foreign"
    (foreign / "photos").mkdir(parents=True)
    run = tmp_path / "run"
    with CheckpointStore(run / "checkpoints") as store:
        store.save(1, {"value": 1})
    (run / "recipe.yaml").touch()
    for directory, message in {
        tmp_path / "file": "is a file, not a checkpoint store",
        tmp_path / "file" / "below": "can not be made: Not a directory",
        foreign: "is no checkpoint store: it holds photos, and no step-*. Name the directory of a store",
        run: f"The store in it is {run / 'checkpoints'}",
        run / "checkpoints/step-00000001": f"is one step of a checkpoint store. Name the store: {run / 'checkpoints'}",
    }.items():
        with pytest.raises(InputError) as caught:
            CheckpointStore(directory)
        assert message in str(caught.value), directory
    with pytest.raises(InputError, match="no such directory"):
        CheckpointStore(tmp_path / "nothing", read_only=True)
    assert not (tmp_path / "nothing").exists() and sorted(os.listdir(foreign)) == ["photos"]  # noqa: PTH208
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / ".gitkeep").touch()
    CheckpointStore(empty).close()
    (run / "checkpoints/README").touch()
    CheckpointStore(run / "checkpoints").close()


def test_another_run_is_refused(tmp_path: Path) -> None:
    """Guards against a run that goes on from the steps of another one with the same shapes."""
    with CheckpointStore(tmp_path, identity={"spec": "aaa", "data": 1}) as store:
        store.save(1, {"value": 1})
    with pytest.raises(InputError, match=r"step-00000001 is of another run: spec is 'aaa' there and 'bbb' here"):
        CheckpointStore(tmp_path, identity={"spec": "bbb", "data": 1})
    with CheckpointStore(tmp_path, identity={"data": 1, "spec": "aaa"}) as store:
        store.load({"value": 0})
    with CheckpointStore(tmp_path) as store:  # who does not say what it is may save
        store.save(2, {"value": 2})
    with CheckpointStore(tmp_path, identity={"spec": "bbb", "data": 1}) as store:
        store.load({"value": 0})
        with pytest.raises(InputError, match=r"step-00000001 is of another run: spec is 'aaa' there and 'bbb' here"):
            store.load({"value": 0}, 1)


def test_bad_options_are_refused(tmp_path: Path) -> None:
    """Guards against a store that keeps nothing, or ranks by a word."""
    cases: list[tuple[dict[str, Any], str]] = [
        ({"keep": 0}, "keep=0 is no number of steps"),
        ({"keep": 1.5}, "keep=1.5 is no number of steps"),
        ({"keep_best": "loss:lowest"}, "keep_best='loss:lowest' is no metric"),
        ({"identity": {1, 2}}, "identity={1, 2} is not JSON"),
    ]
    for options, message in cases:
        with pytest.raises(ZooError) as caught:
            CheckpointStore(tmp_path / "store", **options)
        assert message in str(caught.value)
    assert not (tmp_path / "store").exists()
