"""The fence between real processes: what goes wrong on one rank ends all of them, soon, and says where each was.

Without the fence most of these cases wait for half an hour, gloo's timeout.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.fence_worker import TIMEOUT

ROOT = Path(__file__).parents[2]
WORKER = Path(__file__).with_name("fence_worker.py")
SOON = TIMEOUT + 5
LOADED = 10.0
"""Seconds that a busy machine may add."""
LOST = 70

Record = dict[str, Any]
Cases = dict[str, dict[int, Record]]
"""What each rank saw, by case and rank."""

REMEDY = "Checkpoint calls are collective: call save() on every rank, outside `if rank == 0`."


@dataclass
class Ranks:
    """Processes of one job, each with its own log."""

    out: Path
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self, command: list[str], **environment: str) -> None:
        env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | environment
        with (self.out / f"log{len(self.processes)}").open("wb") as log:
            self.processes.append(subprocess.Popen(command, env=env, stdout=log, stderr=log))

    def wait(self, seconds: float) -> list[int]:
        """Exit codes; a process that does not end is an error."""
        until = time.monotonic() + seconds
        return [process.wait(max(0.1, until - time.monotonic())) for process in self.processes]

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()

    def log(self, rank: int) -> str:
        return (self.out / f"log{rank}").read_text(errors="replace")

    def records(self) -> Cases:
        found: Cases = {}
        for path in sorted(self.out.glob("rank*.jsonl")):
            for line in path.read_text().splitlines():
                record = json.loads(line)
                found.setdefault(record["case"], {})[int(path.stem.removeprefix("rank"))] = record
        return found


def free_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return str(server.getsockname()[1])


def start(launcher: str, world_size: int, out: Path, *cases: str) -> Ranks:
    """``env``: processes of our own; ``fabric``: the script starts the others; ``torchrun``: torch does."""
    ranks = Ranks(out)
    arguments = [str(WORKER), launcher, str(out), *cases]
    at = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    if launcher == "env":
        for rank in range(world_size):
            ranks.start([sys.executable, *arguments], RANK=str(rank), WORLD_SIZE=str(world_size), **at)
    elif launcher == "fabric":
        ranks.start([sys.executable, *arguments], **at)
    else:
        options = [f"--nproc-per-node={world_size}", f"--master-port={at['MASTER_PORT']}"]
        ranks.start([sys.executable, "-m", "torch.distributed.run", *options, *arguments])
    return ranks


SURVIVABLE = [
    "agreement",
    "save_on_rank_0_only",
    "rank_1_never_comes",
    "other_step",
    "other_shape",
    "other_names",
    "one_step_more_on_rank_1",
    "one_step_more_after_the_others_closed",
    "one_step_more_on_rank_0",
    "fails_on_rank_1",
    "error_on_rank_1",
    "error_on_rank_1_right_after_a_call",
    "sigterm_on_rank_1",
    "rank_1_holds_the_lock",
    "forked_process_leaves",
]
"""Cases after which the processes go on to the next."""
FEW = ["agreement", "save_on_rank_0_only", "error_on_rank_1", "sigterm_on_rank_1"]
"""Enough to see that the ranks meet under another launcher."""
WAITING = {"rank_1_is_late": 2, "stop_rank_0": 2, "others_in_a_collective": 3}
"""Cases that take long and do little, with their numbers of ranks: they run while other tests do."""


@pytest.fixture(scope="module")
def waiting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Ranks]]:
    jobs = {case: start("env", size, tmp_path_factory.mktemp(case), case) for case, size in WAITING.items()}
    yield jobs
    for job in jobs.values():
        job.kill()


def survive(launcher: str, world_size: int, cases: list[str], out: Path) -> Cases:
    """Several cases in one start of the processes."""
    ranks = start(launcher, world_size, out, *cases)
    try:
        codes = ranks.wait(120)
    finally:
        ranks.kill()
    assert set(codes) == {0}, ranks.log(0)
    records = ranks.records()
    assert list(records) == cases, ranks.log(0)
    assert all(sorted(record) == list(range(world_size)) for record in records.values())
    return records


@pytest.fixture(scope="module")
def survived(waiting: dict[str, Ranks], tmp_path_factory: pytest.TempPathFactory) -> Cases:
    return survive("env", 3, SURVIVABLE, tmp_path_factory.mktemp("env"))


@pytest.fixture(scope="module", params=[("env", 3), ("fabric", 2), ("torchrun", 2)], ids=lambda p: f"{p[0]}-{p[1]}")
def launched(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Cases:
    """A few cases under each launcher."""
    launcher, world_size = request.param
    if launcher == "env":
        cases: Cases = request.getfixturevalue("survived")
        return cases
    return survive(launcher, world_size, FEW, tmp_path_factory.mktemp(launcher))


def all_raise(records: dict[int, Record], *expected: str) -> None:
    """Every rank raises, soon, and each message holds all of this."""
    for rank, record in records.items():
        assert record["error"] == "FenceError", (rank, record)
        assert record["seconds"] < SOON + LOADED
        missing = [text for text in expected if text not in record["message"]]
        assert not missing, (rank, record["message"])


def without(rank: int, records: dict[int, Record]) -> dict[int, Record]:
    return {r: record for r, record in records.items() if r != rank}


def test_ranks_that_agree_get_all_payloads_and_leave_no_keys(launched: Cases) -> None:
    """Guards against payloads of the wrong rank or call, and a store that grows with every call."""
    records = launched["agreement"]
    for record in records.values():
        assert record["error"] is None, record
        assert record["result"]["ranks"] == sorted(records)
        assert record["result"]["sizes"] == [100_000] * len(records)
        assert record["result"]["keys"] <= 2 * len(records), "a post and a fingerprint each, of the last call"


def test_a_call_on_rank_0_only_raises_on_all(launched: Cases) -> None:
    """Guards against the hang of ``if rank == 0: save()``."""
    records = launched["save_on_rank_0_only"]
    rest = "rank 1 is" if len(records) == 2 else "ranks 1, 2 are"
    all_raise(records, "rank 0 is at 'save' (call 2, step 4)", f"{rest} at 'step' (call 2, step 5)", REMEDY)
    assert not any("did not come" in record["message"] for record in records.values()), "nobody waits for the timeout"


def test_a_rank_that_does_not_come_is_named_with_its_position(survived: Cases) -> None:
    """Guards against a timeout that says neither who is missing nor where it is."""
    records = survived["rank_1_never_comes"]
    all_raise(records, "rank 1 did not come within 3 s; the last call of all ranks was 'step' (call 1, step 4)", REMEDY)
    assert "fence_worker.py:" in records[0]["message"], "where its main thread is"
    assert "Here rank 1 is at 'save' (call 2, step 4)" in records[1]["message"], "who comes late says where it is"
    assert all(record["seconds"] >= TIMEOUT for record in records.values())


def test_a_fingerprint_that_differs_raises_on_all(survived: Cases) -> None:
    """Guards against a save whose ranks are at different steps, or hold different tensors: the difference is shown."""
    all_raise(survived["other_step"], "'save' (call 1)", "step: ranks 0, 2 have 4, rank 1 has 5")
    all_raise(survived["other_shape"], "tensors.layer7.weight: ranks 0, 2 have [64, 8], rank 1 has [65, 8]")
    all_raise(survived["other_names"], 'names.weight: ranks 0, 2 have "float32", rank 1 has nothing', "names.bias")


def test_one_step_more_raises_on_all(survived: Cases) -> None:
    """Guards against the hang at the end of uneven loaders."""
    records = survived["one_step_more_on_rank_1"]
    all_raise(records, "ranks 0, 2 are at 'end' (call 4), rank 1 is at 'step' (call 4, step 3)", "same number of steps")


def test_a_rank_that_has_ended_is_not_waited_for(survived: Cases) -> None:
    """Guards against waiting out the timeout for a rank that closed its fence, among them the host of the store."""
    for case, rank in (("one_step_more_after_the_others_closed", 1), ("one_step_more_on_rank_0", 0)):
        records = survived[case]
        all_raise({rank: records[rank]}, f"rank {rank} is at 'step' (call 4, step 3)", "has ended after 'step' (call 3")
        assert [record["error"] for record in without(rank, records).values()] == [None, None]


def test_the_error_of_one_rank_reaches_all(launched: Cases) -> None:
    """Guards against an error of which only one log knows."""
    records = launched["error_on_rank_1"]
    all_raise(without(1, records), "rank 1 ended with an error", "ValueError: a sample without tokens", "in error_on_")
    assert records[1]["error"] == "ValueError", "the rank itself keeps its error"


def test_a_call_that_all_have_made_counts(survived: Cases) -> None:
    """Guards against the error of a rank that was faster hiding what this call told to all, such as a full disk."""
    records = without(1, survived["error_on_rank_1_right_after_a_call"])
    assert [record["result"] for record in records.values()] == [[0, 1, 2]] * 2, records


def test_a_failure_is_told_to_all(survived: Cases) -> None:
    """Guards against `Fence.fail` raising on one rank alone."""
    all_raise(survived["fails_on_rank_1"], "the disk of rank 1 is full.", "Make room.")


def test_a_signal_on_one_rank_stops_all_at_the_same_step(launched: Cases) -> None:
    """Guards against ranks that decide to stop by a flag of their own."""
    records = launched["sigterm_on_rank_1"]
    stops = [None, "SIGTERM", None][: len(records)]
    assert [record["result"] for record in records.values()] == [{"step": 7, "stops": stops}] * len(records)


def ended(case: str, world_size: int, out: Path) -> tuple[Ranks, list[int]]:
    """A case that ends the processes, and their exit codes."""
    ranks = start("env", world_size, out, case)
    try:
        return ranks, ranks.wait(60)
    finally:
        ranks.kill()


def test_the_death_of_rank_0_is_named(tmp_path: Path) -> None:
    """Guards against "Connection closed by peer" where rank 0, which hosts the store, was killed."""
    ranks, codes = ended("kill_rank_0", 2, tmp_path)
    assert codes == [-signal.SIGKILL, LOST]
    records = ranks.records()["kill_rank_0"]
    all_raise(records, "rank 0 is gone, and with it the store", "is at 'step' (call ")


def test_the_death_of_rank_1_is_named(tmp_path: Path) -> None:
    """Guards against waiting for the timeout when a rank was killed, though a process that it forked lives on."""
    ranks, codes = ended("kill_rank_1", 3, tmp_path)
    assert codes == [LOST, -signal.SIGKILL, LOST]
    records = ranks.records()["kill_rank_1"]
    all_raise(records, "rank 1 is gone", "is at 'step' (call ")


def test_a_collective_that_breaks_says_why(tmp_path: Path) -> None:
    """Guards against gloo's own words reaching the user when the fence knows who died."""
    ranks, codes = ended("kill_rank_1_before_a_collective", 2, tmp_path)
    assert codes == [LOST, -signal.SIGKILL]
    all_raise(ranks.records()["kill_rank_1_before_a_collective"], "rank 1 is gone")


def test_an_error_that_nobody_catches_reaches_ranks_in_a_collective(tmp_path: Path) -> None:
    """Guards against a loop without ``with`` whose error only one log tells: it is published at exit."""
    ranks, codes = ended("error_while_others_are_in_a_collective", 3, tmp_path)
    assert codes == [LOST, 1, LOST]
    assert "Traceback" in ranks.log(1)
    for rank in (0, 2):
        assert "rank 1 ended with an error after 'step' (call 1, step 0)" in ranks.log(rank)
        assert "ValueError: a sample without tokens" in ranks.log(rank)
        assert "Connection closed by peer" not in ranks.log(rank)


def test_ranks_stuck_in_a_collective_are_ended(waiting: dict[str, Ranks]) -> None:
    """Guards against processes that wait in gloo when rank 0 has given up: a thread ends them, they can not raise."""
    ranks = waiting["others_in_a_collective"]
    assert ranks.wait(60) == [LOST] * 3
    all_raise(ranks.records()["others_in_a_collective"], "ranks 1, 2 did not come within 3 s", "all_reduce", REMEDY)
    for rank in (1, 2):
        log = ranks.log(rank)
        assert f"zoo: rank {rank}: rank 0 is at 'save' (call 2, step 4), where ranks 1, 2 did not come" in log
        assert REMEDY in log
        assert "in collective" in log, "the stack of the thread that is stuck"
        assert "Connection closed by peer" not in log


def test_a_rank_that_can_not_answer_is_not_taken_for_dead(survived: Cases) -> None:
    """Guards against heartbeats that a process must send by Python: one long call that holds its lock stops them."""
    records = survived["rank_1_holds_the_lock"]
    assert [record["error"] for record in records.values()] == [None] * 3
    assert "Rank 1 is connected and does not answer" in records[0]["result"]


def test_a_forked_process_is_not_the_rank(survived: Cases) -> None:
    """Guards against a child that ends the fence of its parent, or waits for a store thread which it does not have."""
    records = survived["forked_process_leaves"]
    assert [record["result"] for record in records.values()] == [[0, 0, 0]] * 3, records


def test_a_silent_store_does_not_hold_a_rank_for_ever(waiting: dict[str, Ranks]) -> None:
    """Guards against a read from the store of a stopped process, which has no timeout of its own."""
    ranks = waiting["stop_rank_0"]
    assert ranks.processes[1].wait(60) == LOST
    assert "rank 0, which hosts the store, does not answer" in ranks.log(1)


def test_a_rank_that_is_late_is_waited_for_and_its_stack_printed(waiting: dict[str, Ranks]) -> None:
    """Guards against killing a rank that compiles or reads slowly, and against waiting in silence."""
    late = waiting["rank_1_is_late"]
    assert late.wait(60) == [0, 0], late.log(0)
    assert "rank 0 is at 'step' (call 2, step 1) and has waited 10 s for rank 1, of 600 s at most" in late.log(0)
    assert "in rank_1_is_late" in late.log(0) and "time.sleep(12)" in late.log(0)
    assert "has waited" not in late.log(1)
    assert [record["error"] for record in late.records()["rank_1_is_late"].values()] == [None, None]
