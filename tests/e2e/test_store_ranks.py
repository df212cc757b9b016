"""Two processes that train together with DDP and share one store."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from tests.store_lab import Training, run_lab
from zoo.store.store import CheckpointStore


def test_two_processes_save_fail_and_load_together(tmp_path: Path) -> None:
    """Guards against a rank that waits for ever, a failure that only one rank hears of, and another's own state.

    One process then loads what two have saved: no name says that the model was wrapped.
    """
    directory = tmp_path / "store"
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda rank: run_lab("rank", directory, str(rank)), range(2)))
    for rank, result in enumerate(results):
        assert len(result["errors"]) == 1
        message = result["errors"][0]
        assert message.startswith("step 2 was not saved, earlier steps are as they were. rank 1: OSError: [Errno 27]")
        assert result["loaded"] == 3 and result["equal"]
        assert result["position"] == 4 + rank, "each has read on where it was itself"
    assert results[0]["polls"] == results[1]["polls"]
    training = Training(seed=8)
    state = training.state()
    with CheckpointStore(directory) as store:
        assert [step.step for step in store.list()] == [3] and store.verify() == {"step-00000003": []}
        store.load(state, other_world_size=True)
    training.take(state)
    assert training.data["position"] == 1 and len(training.losses) == 1
    assert not torch.equal(training.model.inner.weight, Training(seed=8).model.inner.weight)
