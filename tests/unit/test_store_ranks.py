"""Several ranks, as threads: each has its own part of a step, and none goes on alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.store_lab import ThreadRanks, digest, on_ranks
from zoo.errors import InputError, ZooError
from zoo.store import commit, parts
from zoo.store.commit import SaveError
from zoo.store.parts import Parts
from zoo.store.rng import capture_rng
from zoo.store.store import CheckpointStore


def model() -> nn.Module:
    torch.manual_seed(3)
    return nn.Linear(3, 2)


def state_of(rank: int, **more: Any) -> dict[str, Any]:
    module = model()
    data = {"position": 10 * rank, "order": torch.full((2,), rank)}
    return {"model": module, "optimizer": torch.optim.SGD(module.parameters(), momentum=0.9), "data": data, **more}


def save_with(world_size: int, directory: Path, **options: Any) -> list[Any]:
    def work(ranks: ThreadRanks) -> Any:
        with CheckpointStore(directory, fence=ranks, **options) as store:
            return store.save(1, state_of(ranks.rank))

    return on_ranks(world_size, work)


def messages(results: list[Any], kind: type[Exception] = ZooError) -> list[str]:
    assert all(isinstance(result, kind) for result in results), results
    return [str(result) for result in results]


def test_each_rank_gets_back_what_was_its_own(tmp_path: Path) -> None:
    """Guards against a position in the data that becomes rank 0's everywhere."""
    first, second = save_with(2, tmp_path)
    assert first == second and first.manifest.world_size == 2
    files = sorted(path.relative_to(first.path).as_posix() for path in first.path.rglob("*") if path.is_file())
    assert files == [
        "MANIFEST.json",
        "model/model.safetensors",
        "state/model.json",
        "state/rank-00000.json",
        "state/rank-00000.safetensors",
        "state/rank-00001.json",
        "state/rank-00001.safetensors",
        "state/shared.json",
    ]

    def load(ranks: ThreadRanks) -> Any:
        with CheckpointStore(tmp_path, fence=ranks, read_only=True) as store:
            state = state_of(7)
            loaded = store.load(state)
            return loaded.step, state["data"]["position"], state["data"]["order"].tolist()

    assert on_ranks(2, load) == [(1, 0, [0, 0]), (1, 10, [1, 1])]


def test_other_numbers_of_ranks(tmp_path: Path) -> None:
    """Guards against ranks that silently get another's position, and a step that one process can never use."""
    save_with(2, tmp_path)
    with CheckpointStore(tmp_path) as store:
        with pytest.raises(InputError, match="was saved by 2 ranks; 1 load it"):
            store.load(state_of(5))
        state = state_of(5)
        generator = torch.get_rng_state()
        loaded = store.load(state, other_world_size=True)
        assert state["data"]["position"] == 0 and torch.equal(torch.get_rng_state(), generator)
        assert loaded.notes == ["saved by 2 ranks: the random generators were not loaded."]
        path = tmp_path / "step-00000001/state/rank-00001.json"
        path.write_bytes(path.read_bytes()[:-1] + b"]")
        with pytest.raises(ZooError, match=r"state/rank-00001\.json: content changed"):
            store.load(state, other_world_size=True)


def test_damage_that_one_rank_sees_is_every_ranks(tmp_path: Path) -> None:
    """Guards against ranks that load different steps."""

    def work(ranks: ThreadRanks) -> Any:
        with CheckpointStore(tmp_path, fence=ranks) as store:
            for step in (1, 2):
                store.save(step, state_of(step))
            if ranks.rank == 0:
                path = tmp_path / "step-00000002/state/rank-00001.safetensors"
                path.write_bytes(path.read_bytes()[:-1] + b"\xee")
            ranks.gather("damaged")
            state = state_of(9)
            loaded = store.load(state)
            return loaded.step, loaded.skipped, state["data"]["position"]

    reason = "step-00000002: state/rank-00001.safetensors: content changed since it was saved"
    assert on_ranks(2, work) == [(1, [reason], 10)] * 2


def test_one_ranks_failure_to_write_is_every_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a step that lacks a rank's part, and ranks that wait for the one that failed."""
    write = parts.write_parts

    def failing(directory: Path, own: Parts, rank: int, files: Any) -> Any:
        if rank == 1:
            raise OSError(28, "No space left on device", str(directory))
        return write(directory, own, rank, files)

    save_with(2, tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path.name != ".lock"}
    monkeypatch.setattr(commit, "write_parts", failing)
    for message in messages(save_with(2, tmp_path), SaveError):
        assert message.startswith(
            "step 1 was not saved, earlier steps are as they were. rank 1: OSError: [Errno 28] No space left on device"
        )
        assert message.endswith("Free some space on that disk, or save somewhere else.")
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path.name != ".lock"}
    assert after == before


def test_a_state_that_one_rank_can_not_save_is_every_ranks_error(tmp_path: Path) -> None:
    """Guards against a rank that raises on its own and leaves the others waiting."""

    def work(ranks: ThreadRanks) -> Any:
        with CheckpointStore(tmp_path, fence=ranks) as store:
            return store.save(1, state_of(0, extra={1} if ranks.rank else 1))

    for message in messages(on_ranks(2, work), SaveError):
        assert "rank 1: state['extra'] is a set" in message


@pytest.mark.parametrize(
    ("difference", "named"),
    [
        (lambda state: state.update(model=nn.Linear(4, 4)), "model"),
        (lambda state: state.update(more=1), "the keys"),
        (lambda state: state.update(optimizer={"a": torch.zeros(3)}), "optimizer"),
    ],
)
def test_ranks_with_different_states_are_told(tmp_path: Path, difference: Any, named: str) -> None:
    """Guards against a file of rank 0's that does not stand for all."""

    def work(ranks: ThreadRanks) -> Any:
        state = state_of(0, optimizer={"a": torch.zeros(2)})
        if ranks.rank == 1:
            difference(state)
        with CheckpointStore(tmp_path, fence=ranks) as store:
            return store.save(1, state)

    for message in messages(on_ranks(2, work), SaveError):
        assert message.startswith(f"step 1 was not saved: {named} of rank 1 differ from rank 0's")


def test_what_one_rank_refuses_to_load_no_rank_loads(tmp_path: Path) -> None:
    """Guards against a model that is new on one rank and old on another: before the change, and in its middle."""
    save_with(2, tmp_path)

    class Stubborn:
        """Takes back its own state, and with ``refusals`` above 1 not even that."""

        refusals = 1

        def state_dict(self) -> Any:
            return 0

        def load_state_dict(self, state: Any) -> None:
            self.refusals -= 1
            if self.refusals >= 0:
                raise RuntimeError("no")

    def refuse(ranks: ThreadRanks) -> Any:
        state = state_of(5)
        with torch.no_grad():
            state["model"].weight.zero_()
        if ranks.rank == 1:
            state["model"] = nn.Linear(5, 5) if early else state["model"]
            state["data"] = state["data"] if early else Stubborn()
        ranks.gather("made")  # the generators are those of the process, and rank 1 does not come to change them
        before = digest(capture_rng())
        try:
            with CheckpointStore(tmp_path, fence=ranks, read_only=True) as store:
                store.load(state)
        except ZooError as error:
            assert ranks.rank or digest(capture_rng()) == before
            position = None if ranks.rank else state["data"]["position"]
            return str(error), bool(state["model"].weight.any()), position
        return None

    early = True
    first, second = on_ranks(2, refuse)
    assert "rank 1: the step's 'model' is not of this Linear" in first[0] == second[0]
    assert first[1:] == (False, 50)
    early = False
    first, second = on_ranks(2, refuse)
    assert first[0] == "nothing was loaded from step-00000001, all is as it was: rank 1: RuntimeError: no" == second[0]
    assert first[1:] == (False, 50) and second[1] is False
    Stubborn.refusals = 2
    first, second = on_ranks(2, refuse)
    assert first[0].startswith(
        "nothing was loaded from step-00000001: rank 1: RuntimeError: no; "
        "state['data'] did not take its own state back: RuntimeError: no"
    )
    assert first[1:] == (False, 50) and second[1] is False


def test_a_directory_that_differs_between_ranks_is_refused(tmp_path: Path) -> None:
    """Guards against a step of which every machine has a part."""

    def work(ranks: ThreadRanks) -> Any:
        return CheckpointStore(tmp_path / f"store-{ranks.rank}", fence=ranks)

    for message in messages(on_ranks(2, work), InputError):
        assert message.startswith(f"the store is {tmp_path}/store-0 on rank 0 and {tmp_path}/store-1 on rank 1.")


def test_a_directory_that_is_not_shared_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against the same path on disks of two machines: rank 0 never sees what rank 1 wrote."""
    write = parts.write_parts

    def elsewhere(directory: Path, own: Parts, rank: int, files: Any) -> Any:
        return write(tmp_path / "other machine" / directory.name if rank else directory, own, rank, files)

    monkeypatch.setattr(commit, "write_parts", elsewhere)
    monkeypatch.setattr(commit, "_VISIBLE_WITHIN_S", 0.2)
    for message in messages(save_with(2, tmp_path / "store"), SaveError):
        assert "what other ranks wrote is not there for rank 0: state/rank-00001.json: missing" in message
        assert "file system that all machines share" in message
    assert not list((tmp_path / "store").glob("*step*"))


def test_an_error_of_rank_0_alone_is_every_ranks(tmp_path: Path) -> None:
    """Guards against ranks that wait for a rank 0 that found the directory to be something else."""
    (tmp_path / "photos").mkdir()
    for message in messages(save_with(2, tmp_path)):
        assert "is no checkpoint store: it holds photos" in message


def test_what_rank_0_finds_all_ranks_find(tmp_path: Path) -> None:
    """Guards against ranks that decide by what each sees whether there is something to resume."""
    save_with(2, tmp_path)

    def work(ranks: ThreadRanks) -> Any:
        with CheckpointStore(tmp_path, fence=ranks, read_only=True) as store:
            if ranks.rank == 1:
                store.directory = tmp_path / "late"  # as a network file system that lags behind
            latest = store.latest()
            return latest and latest.step, store.verify()

    assert on_ranks(2, work) == [(1, {"step-00000001": []})] * 2
