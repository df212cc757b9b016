"""What used to hang, or to save something wrong in silence, ends every rank with a message: why, and what to do.

Real processes over gloo, with DDP and with FSDP2. `benchmarks/hang_table.py` shows the same cases with ``fabric.save``.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.hang_worker import SAVED, TIMEOUT, VICTIMS, Ending, Job, endings_of, free_port
from zoo.store.store import CheckpointStore

ROOT = Path(__file__).parents[2]
WORKER = Path(__file__).with_name("hang_worker.py")
SOON = TIMEOUT + 5
LOADED = 10.0
"""Seconds that a busy machine may add."""
GROUPS = [("ddp", 2), ("ddp", 3), ("fsdp2", 2), ("fsdp2", 3)]
COLLECTIVE = "Checkpoint calls are collective: call save() on every rank, outside `if rank == 0`."
DIED = "It was killed (by a signal, or for want of memory) or its machine is lost: see the end of its own log."
UNLIKE = [
    "SaveError: step 3 was not saved: average of rank 1 differ from rank 0's in their keys, shapes or dtypes",
    "All ranks train the same model with the same optimizer.",
]

MESSAGES = {
    "only_rank_0_saves": ["rank 0 is at 'save' (call 8, step 3), {rest_are} at 'step' (call 8, step 3)", COLLECTIVE],
    "other_step_on_rank_1": ["step: {others} 3, rank 1 has 4", "decide when to save from data that every rank has"],
    "other_shapes_on_rank_1": UNLIKE,
    "other_names_on_rank_1": UNLIKE,
    "one_batch_more_on_rank_1": ["rank 1 is at 'step' (call 11, step 6)", COLLECTIVE, "the same number of steps"],
    "rank_0_can_not_write": ["SaveError: step 3 was not saved, earlier steps are as they were. rank 0: OSE", "ulimit"],
    "only_rank_0_saves_before_a_barrier": ["{rest} did not come within 3 s", "Rank 1 is in barrier", COLLECTIVE],
    "rank_0_is_killed": ["rank 0 is gone", DIED],
    "rank_1_is_killed": ["rank 1 is gone", DIED],
    "rank_1_is_in_an_all_reduce": ["rank 1 did not come within 3 s", "Rank 1 is in all_reduce", COLLECTIVE],
}
"""What every surviving rank says."""
STUCK = {"only_rank_0_saves_before_a_barrier": {1, 2}, "rank_1_is_in_an_all_reduce": {1}}
"""Ranks in a collective, which a thread has to end: elsewhere their peers' exit may not reach them."""
TOGETHER = list(MESSAGES)[:7]
"""Cases that one start of the processes goes through; the last one ends them."""

Endings = dict[tuple[str, int, str], list[dict[str, Any]]]


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hangs")


@pytest.fixture(scope="module")
def endings(out: Path) -> Endings:
    """By strategy, number of ranks and case: how each rank ended."""
    jobs = [
        Job("zoo", strategy, world, cases, str(out / f"{strategy}-{world}-{cases[-1]}"), limit=120.0)
        for strategy, world in GROUPS
        for cases in (TOGETHER, *([case] for case in MESSAGES if case not in TOGETHER))
    ]
    work = json.dumps({"jobs": [asdict(job) for job in jobs], "at_once": 3})
    command = [sys.executable, str(WORKER), "jobs", str(out / "results.json")]
    subprocess.run(command, input=work, text=True, env=environment(), check=True)
    found: Endings = {}
    for job, ranks in zip(jobs, json.loads((out / "results.json").read_text()), strict=True):
        for case in job.cases:
            found[job.strategy, job.world, case] = [rank[case] for rank in ranks]
    return found


def check(case: str, ranks: list[Ending]) -> None:
    """Every rank but the one that was killed has ended soon, and says why."""
    two = len(ranks) == 2
    names = {
        "rest": "rank 1" if two else "ranks 1, 2",
        "rest_are": "rank 1 is" if two else "ranks 1, 2 are",
        "others": "rank 0 has" if two else "ranks 0, 2 have",
    }
    expected = [text.format(**names) for text in MESSAGES[case]]
    for rank, ending in enumerate(ranks):
        if VICTIMS.get(case) == rank:
            assert ending.how == "killed"
            continue
        assert ending.how == ("ended" if rank in STUCK.get(case, ()) else "raised"), (rank, ending)
        assert ending.seconds < SOON + LOADED
        missing = [text for text in expected if text not in f"{ending.error}: {ending.message}"]
        assert not missing, (rank, ending)


@pytest.mark.parametrize(("strategy", "world"), GROUPS)
@pytest.mark.parametrize("case", MESSAGES)
def test_every_rank_ends_and_says_why(endings: Endings, strategy: str, world: int, case: str) -> None:
    """Guards against ranks that wait for each other in different collectives, or end with gloo's words."""
    check(case, [Ending(**ending) for ending in endings[strategy, world, case]])


@pytest.mark.usefixtures("endings")
@pytest.mark.parametrize(("strategy", "world"), GROUPS)
def test_the_step_before_is_whole(out: Path, strategy: str, world: int) -> None:
    """Guards against a save that went wrong and left something, or took an earlier step with it."""
    stores = [path.parent for path in out.glob(f"{strategy}-{world}-*/*/step-*")]
    assert len(stores) == len(MESSAGES)
    for path in stores:
        with CheckpointStore(path, read_only=True) as store:
            assert store.verify() == {f"step-{SAVED:08d}": []}
        assert not list(path.glob(".tmp-*"))


def launch(launcher: list[str], job: Job, **variables: str) -> int:
    """Two processes, whose log is one; the exit code of the launcher."""
    Path(job.out).mkdir()
    command = [sys.executable, *launcher, str(WORKER), "rank", json.dumps(asdict(job))]
    env = environment() | variables
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=120)
    for rank in range(2):
        (Path(job.out) / f"log{rank}").write_text(done.stderr)
    return done.returncode


def test_under_the_launcher_of_fabric(tmp_path: Path) -> None:
    """Guards against a rank that outlives the process which started it. (When rank 1 dies, Fabric kills rank 0.)"""
    cases = ["only_rank_0_saves", "rank_0_can_not_write", "rank_0_is_killed"]
    job = Job("zoo", "ddp", 2, cases, str(tmp_path / "job"))
    assert launch([], job, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port())) == -signal.SIGKILL
    killed, survivor = endings_of(job, 0, (-signal.SIGKILL, 0.0)), endings_of(job, 1, None)
    for case in cases:
        check(case, [killed[case], survivor[case]])


def test_under_torchrun(tmp_path: Path) -> None:
    """Guards against an agent that terminates rank 1, since rank 0 has failed, before a thread has said why."""
    cases = ["only_rank_0_saves", "rank_0_can_not_write", "only_rank_0_saves_before_a_barrier"]
    job = Job("zoo", "fsdp2", 2, cases, str(tmp_path / "job"))
    assert launch(["-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}"], job) == 1
    raised, ended = endings_of(job, 0, None), endings_of(job, 1, (70, 0.0))
    for case in cases:
        check(case, [raised[case], ended[case]])
