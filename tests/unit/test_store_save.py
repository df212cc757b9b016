"""Saving: what is kept, what is replaced, and what is left when it fails."""

from __future__ import annotations

import resource
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.store_lab import TinyModel, Training, digest
from zoo.errors import InputError
from zoo.store.commit import SaveError
from zoo.store.layout import listing
from zoo.store.store import CheckpointStore


def steps_of(directory: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in directory.glob("step-*"))


def leftovers(directory: Path) -> list[str]:
    return [path.name for path in directory.iterdir() if not path.name.startswith("step-") and path.name != ".lock"]


def test_retention_keeps_the_newest_the_best_and_the_one_loaded(tmp_path: Path) -> None:
    """Guards against a best step that is deleted, and a step that a run stands on."""
    losses = {1: 5.0, 2: 1.0, 3: 4.0, 4: float("nan"), 5: 3.0, 6: 2.0}
    with CheckpointStore(tmp_path, keep=2, keep_best="loss") as store:
        for step, loss in losses.items():
            store.save(step, {"step": step}, metrics={"loss": loss})
        assert steps_of(tmp_path) == [2, 5, 6]
        state = {"step": 0}
        assert (store.load(state, "best").step, state["step"]) == (2, 2)
    with CheckpointStore(tmp_path, keep=1, keep_best="loss:max") as store:
        store.load(state, 2)
        store.save(7, {"step": 7}, metrics={"loss": 2.5})
        assert steps_of(tmp_path) == [2, 5, 7], "loaded, best, newest"
    assert leftovers(tmp_path) == []


def test_keep_none_keeps_all(tmp_path: Path) -> None:
    """Guards against retention that nobody asked for."""
    with CheckpointStore(tmp_path, keep=None) as store:
        for step in range(6):
            store.save(step, {"step": step})
    assert steps_of(tmp_path) == list(range(6))


def test_a_run_that_diverged_does_not_delete_its_last_good_step(tmp_path: Path) -> None:
    """Guards against a run that saves NaN until nothing else is left."""
    model = TinyModel()
    with CheckpointStore(tmp_path, keep=2) as store:
        for step in range(3):
            store.save(step, {"model": model})
        with torch.no_grad():
            model.inner.weight[0, 0] = torch.nan
        for step in range(3, 7):
            saved = store.save(step, {"model": model})
            assert saved is not None and saved.manifest.not_finite == ["inner.weight"]
    assert steps_of(tmp_path) == [2, 5, 6]


def test_the_newest_is_the_one_saved_last(tmp_path: Path) -> None:
    """Guards against a run that goes back, goes on, and then loads the branch that it left."""
    with CheckpointStore(tmp_path, keep=2) as store:
        for step in (10, 20, 30):
            store.save(step, {"branch": 1})
        store.load({"branch": 0}, 20)
        store.save(25, {"branch": 2})
        latest = store.latest()
        assert latest is not None and latest.step == 25
        assert [step.step for step in store.list()] == [20, 30, 25]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    """Guards against an old step that stays, and against files of both."""
    with CheckpointStore(tmp_path) as store:
        store.save(1, {"a": torch.zeros(10), "value": 1})
        store.save(1, {"value": 2})
        state = {"value": 0}
        store.load(state)
        assert state["value"] == 2
        assert store.verify() == {"step-00000001": []}
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("moment", ["between the renames", "after both"])
def test_a_kill_while_a_step_is_replaced(tmp_path: Path, moment: str) -> None:
    """Guards against a window in which the step is under neither name, for readers and for the next writer."""
    with CheckpointStore(tmp_path) as store:
        store.save(0, {"value": 0})
        store.save(1, {"value": 1})
        old = shutil.copytree(tmp_path / "step-00000001", tmp_path.parent / f"{tmp_path.name}-old")
        store.save(1, {"value": 2})
    if moment == "between the renames":
        (tmp_path / "step-00000001").rename(tmp_path / ".tmp-00000001-abcd1234")
    shutil.move(old, tmp_path / ".replaced-00000001-abcd1234")
    expected = 1 if moment == "between the renames" else 2
    for read_only in (True, False):
        state = {"value": 0}
        with CheckpointStore(tmp_path, read_only=read_only) as store:
            store.load(state)
        assert state["value"] == expected
    assert leftovers(tmp_path) == [] and steps_of(tmp_path) == [0, 1]


def test_what_an_interrupted_save_left_is_swept_by_the_next_writer(tmp_path: Path) -> None:
    """Guards against a disk that fills with half-written steps, and a reader that deletes what is being written."""
    with CheckpointStore(tmp_path) as store:
        store.save(1, {"value": 1})
    for name in (".tmp-00000002-aa", ".trash-step-00000000-bb"):
        shutil.copytree(tmp_path / "step-00000001", tmp_path / name)
    with CheckpointStore(tmp_path, read_only=True):
        assert len(leftovers(tmp_path)) == 2
    with CheckpointStore(tmp_path):
        assert leftovers(tmp_path) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of one megabyte."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount a small disk")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_a_full_disk_leaves_the_earlier_step(small_disk: Path) -> None:
    """Guards against a save that fails half-way, blocks the disk, and takes the older step with it."""
    with CheckpointStore(small_disk / "store") as store:
        store.save(1, {"model": {"w": torch.zeros(100_000)}})
        for step in (2, 2):
            with pytest.raises(SaveError) as caught:
                store.save(step, {"model": {"w": torch.zeros(200_000)}})
            message = str(caught.value)
            assert message.startswith(
                "step 2 was not saved, earlier steps are as they were. OSError: [Errno 28] No space"
            )
            assert message.endswith("Free some space on that disk, or save somewhere else.")
        assert steps_of(small_disk / "store") == [1] and leftovers(small_disk / "store") == []
        assert store.verify() == {"step-00000001": []}
        store.save(3, {"model": {"w": torch.zeros(100_000)}})


def test_a_read_only_disk_can_be_loaded_from_and_not_saved_to(small_disk: Path) -> None:
    """Guards against a traceback, and a reader that insists on a lock."""
    with CheckpointStore(small_disk / "store") as store:
        store.save(1, {"value": 1})
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(InputError, match=r"can not be written: Read-only file system.*read_only=True"):
        CheckpointStore(small_disk / "store")
    with pytest.raises(InputError, match=r"can not be made: Read-only file system"):
        CheckpointStore(small_disk / "other")
    state = {"value": 0}
    with CheckpointStore(small_disk / "store", read_only=True) as store:
        store.load(state)
        with pytest.raises(SaveError, match="read_only=True"):
            store.save(2, state)
    assert state["value"] == 1


def test_a_file_that_may_not_grow_leaves_the_earlier_step(tmp_path: Path) -> None:
    """Guards against a save that is believed to be whole after a write failed."""
    training = Training()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with CheckpointStore(tmp_path) as store:
        store.save(1, training.state())
        before = digest(training.state())
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        try:
            with pytest.raises(SaveError, match=r"step 2 was not saved.*File too large.*ulimit -f"):
                store.save(2, training.state())
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert steps_of(tmp_path) == [1] and leftovers(tmp_path) == []
        other = Training(seed=3)
        state = other.state()
        store.load(state)
        other.take(state)
        assert digest(other.state()) == before


@pytest.mark.parametrize(
    ("step", "state", "metrics", "message"),
    [
        (-1, {"a": 1}, None, "step=-1 is no step number"),
        (1.0, {"a": 1}, None, "step=1.0 is no step number"),
        (1, {"a": object()}, None, "state['a'] is a object"),
        (1, {"optimizer": {"a": {1}}}, None, "state['optimizer']['a'] is a set"),
        (1, {"model": {"a": {1}}}, None, "state['model']['a'] is a set"),
        (1, [1], None, "the state must be a mapping"),
        (1, {1: 1}, None, "the state must be a mapping"),
        (1, {"a": 1}, {"loss": "low"}, "are not numbers by name"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(
    tmp_path: Path, step: Any, state: Any, metrics: Any, message: str
) -> None:
    """Guards against half a step for a bad argument."""
    with CheckpointStore(tmp_path) as store:
        with pytest.raises(SaveError) as caught:
            store.save(step, state, metrics=metrics)
        assert message in str(caught.value)
    assert steps_of(tmp_path) == [] and leftovers(tmp_path) == []


def test_steps_of_another_model_are_not_deleted_by_this_run(tmp_path: Path) -> None:
    """Guards against a second run in the same directory, whose retention deletes the first."""
    with CheckpointStore(tmp_path, keep=1) as store:
        store.save(100, {"model": TinyModel(width=4)})
    with CheckpointStore(tmp_path, keep=1) as store, pytest.raises(SaveError, match="a model with other parameters"):
        store.save(1, {"model": TinyModel(width=8)})
    assert steps_of(tmp_path) == [100]


class Directory:
    """A format of ``model/`` of two files, with names of its own."""

    def write(self, directory: Path, tensors: Mapping[str, Tensor]) -> None:
        from safetensors.torch import save_file

        (directory / "config.json").write_text("{}")
        (directory / "parts").mkdir()
        for i, (name, tensor) in enumerate(tensors.items()):
            save_file({f"model.{name}": tensor.contiguous()}, directory / "parts" / f"{i}.safetensors")

    def read(self, directory: Path) -> Mapping[str, Tensor]:
        from safetensors.torch import load_file

        files = [load_file(path) for path in sorted((directory / "parts").iterdir())]
        return {name.removeprefix("model."): tensor.clone() for file in files for name, tensor in file.items()}


def test_the_model_in_a_format_of_its_own(tmp_path: Path) -> None:
    """Guards against ties, buffers or hashes that only the plain format keeps."""
    training = Training()
    training.step()
    with CheckpointStore(tmp_path, model_files=Directory()) as store:
        store.save(1, training.state())
        other = Training(seed=2)
        state = other.state()
        store.load(state)
        other.take(state)
        assert digest(other.state()) == digest(training.state())
        damaged = tmp_path / "step-00000001/model/parts/1.safetensors"
        damaged.write_bytes(damaged.read_bytes()[:-1] + b"\x7f")
        assert store.verify()["step-00000001"] == ["model/parts/1.safetensors: content changed since it was saved"]
    with CheckpointStore(tmp_path) as store, pytest.raises(InputError, match=r"not plain model\.safetensors"):
        store.load(state)


def test_the_listing_tells_what_was_measured(tmp_path: Path) -> None:
    """Guards against metrics that come back as other numbers."""
    with CheckpointStore(tmp_path, identity={"spec": "abc"}) as store:
        store.save(5, {"model": nn.Linear(2, 2)}, metrics={"loss": torch.tensor(0.1), "inf": float("inf"), "n": 3})
        step = store.list()[0]
    assert step.metrics == {"loss": torch.tensor(0.1).item(), "inf": float("inf"), "n": 3.0}
    assert step == listing(tmp_path).steps[0]
    assert step.manifest.identity == {"spec": "abc"} and step.manifest.versions["torch"] == torch.__version__
    assert [path.name for path in (step.path / "model").iterdir()] == ["model.safetensors"]
