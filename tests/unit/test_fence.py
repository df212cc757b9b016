"""The fence in one process: alone, between threads that stand for ranks, and how the ranks find each other."""

from __future__ import annotations

import json
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest

from zoo.store import fence as fence_module
from zoo.store import rendezvous
from zoo.store.fence import Fence, FenceError
from zoo.store.positions import Place, disagreement, names
from zoo.store.rendezvous import Group, group_of, meet


class Job:
    """Ranks that are threads: one broadcast, and a fence each."""

    def __init__(self, world_size: int, **options: float) -> None:
        self.world_size = world_size
        self.options = {"timeout": 5.0, "notice": 5.0, "grace": 60.0} | options
        self._mail: dict[int, queue.Queue[Any]] = {rank: queue.Queue() for rank in range(1, world_size)}

    def group(self, rank: int) -> Group:
        def broadcast(message: Any) -> Any:
            if rank:
                return self._mail[rank].get(timeout=10)
            for box in self._mail.values():
                box.put(message)
            return message

        return Group(rank, self.world_size, broadcast)

    def connect(self, rank: int) -> Fence:
        timeout, notice = self.options["timeout"], self.options["notice"]
        meeting = meet(self.group(rank), timeout=timeout, notice=notice)
        return Fence(rank, self.world_size, meeting, **self.options)

    def run(self, work: Callable[[Fence], Any]) -> list[Any]:
        """What each rank returns, or the error that it raises."""

        def rank(number: int) -> Any:
            with self.connect(number) as fence:
                return work(fence)

        with ThreadPoolExecutor(self.world_size) as pool:
            return [_outcome(future) for future in [pool.submit(rank, r) for r in range(self.world_size)]]


def _outcome(future: Future[Any]) -> Any:
    return future.exception(timeout=30) or future.result()


@contextmanager
def in_thread(work: Callable[[], Any]) -> Iterator[Future[Any]]:
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(work)


def test_alone_there_is_nothing_to_wait_for() -> None:
    """Guards against a store, a thread or a port where one process trains."""
    before = threading.active_count()
    with Fence.connect(None) as fence:
        assert (fence.rank, fence.world_size) == (0, 1)
        assert fence.gather("step", {"best": (1, 2.5)}, fingerprint={"step": 1}) == [{"best": [1, 2.5]}]
        assert threading.active_count() == before
        with pytest.raises(FenceError, match="no space") as caught:
            fence.fail("no space.")
        assert caught.value.exit_code == 70
    with pytest.raises(FenceError, match=r"'end' \(call 2\) of a fence that is closed"):
        fence.gather("end")


def test_a_fabric_is_three_names() -> None:
    """Guards against a fence that needs Lightning's class."""

    class OneRank:
        global_rank = 3
        world_size = 4

        def broadcast(self, message: Any, src: int) -> Any:
            return [message, src]

    group = group_of(OneRank())
    assert (group.rank, group.world_size, group.broadcast("at")) == (3, 4, ["at", 0])


def test_payloads_come_by_rank() -> None:
    """Guards against the order of arrival."""

    def work(fence: Fence) -> Any:
        time.sleep(0.05 * (3 - fence.rank))
        return [fence.gather("step", [fence.rank, i], fingerprint={"step": i}) for i in range(3)]

    assert Job(3).run(work) == [[[[rank, i] for rank in range(3)] for i in range(3)]] * 3


def test_a_payload_that_is_no_json_raises_before_anything_is_posted() -> None:
    """Guards against a rank that has counted a call which the others never see."""

    def work(fence: Fence) -> Any:
        if fence.rank:
            with pytest.raises(TypeError):
                fence.gather("step", {1, 2})
        return fence.gather("step", fence.rank)

    assert Job(2).run(work) == [[0, 1], [0, 1]]


def test_two_that_disagree_do_not_wait_for_a_third() -> None:
    """Guards against a timeout where the posts that are there already contradict each other."""

    def work(fence: Fence) -> Any:
        if fence.rank == 2:
            time.sleep(2.5)
        fence.gather("save" if fence.rank else "step")

    errors = Job(3, timeout=60).run(work)
    assert all(isinstance(error, FenceError) for error in errors)
    assert "rank 0 is at 'step' (call 1), rank 1 is at 'save' (call 1)" in str(errors[2])


def test_a_failure_is_final() -> None:
    """Guards against ranks that go on after one of them has failed."""

    def work(fence: Fence) -> Any:
        with pytest.raises(FenceError, match="the disk is full"):
            _ = fence.fail("the disk is full.") if fence.rank else fence.gather("step")
        with pytest.raises(FenceError, match="the disk is full"):
            fence.gather("step")

    assert Job(2).run(work) == [None, None]


def test_a_rank_that_comes_after_the_store_was_closed_hears_that_its_host_has_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Guards against "rank 0 is gone" where it ended in good order and waited a while for the others."""
    monkeypatch.setattr(fence_module, "_LINGER", 0.2)

    def work(fence: Fence) -> Any:
        fence.gather("step")
        if fence.rank:
            time.sleep(1.0)
            fence.gather("step")

    errors = Job(2).run(work)
    assert errors[0] is None
    assert "rank 1 is at 'step' (call 2), but rank 0 has ended after 'step' (call 1)" in str(errors[1])


def test_own_timeout_of_a_call() -> None:
    """Guards against a ``timeout=`` that is ignored, on a call that is known to take long or to be quick."""

    def work(fence: Fence) -> Any:
        if fence.rank:
            time.sleep(1.0)
        return fence.gather("written", timeout=0.3)

    errors = Job(2, timeout=60).run(work)
    assert "rank 1 did not come within 0.3 s" in str(errors[0])
    assert "call written() on every rank" in str(errors[0])
    assert "rank 1 did not come within 0.3 s" in str(errors[1]), "who comes late hears it"


def test_strangers_are_turned_away() -> None:
    """Guards against a port scanner, or a rank of another job, that takes the place of a rank."""
    job, address = Job(2), Future[Any]()

    def publish(message: Any) -> Any:
        address.set_result(message)

    with in_thread(lambda: meet(Group(0, 2, publish), timeout=10, notice=10)) as host:
        at = address.result(timeout=10)
        for hello in (b"GET / HTTP/1.1\r\n", b'{"nonce": "0", "rank": 1}\n', b'{"rank": 1}\n', b"[]\n"):
            with socket.create_connection(("127.0.0.1", at["line"])) as stranger:
                stranger.sendall(hello)
                stranger.shutdown(socket.SHUT_WR)
                assert stranger.recv(100) == b""
        assert not host.done()
        meeting = meet(Group(1, 2, lambda _: at), timeout=10, notice=10)
        met = host.result(timeout=10)
    fences = [Fence(rank, 2, m, **job.options) for rank, m in enumerate((met, meeting))]
    with in_thread(lambda: fences[1].gather("step", "b")) as other:
        assert fences[0].gather("step", "a") == ["a", "b"]
        assert other.result(timeout=10) == ["a", "b"]
    fences[1].close()
    fences[0].close()


def test_an_address_that_does_not_lead_to_rank_0_is_passed_over() -> None:
    """Guards against giving up where MASTER_ADDR is another machine, or another program has the port there."""
    with socket.create_server(("127.0.0.2", 0)) as impostor:
        port = impostor.getsockname()[1]
        at = {"hostname": "elsewhere", "hosts": ["127.0.0.3", "127.0.0.2"], "line": port, "store": 1, "nonce": "n"}

        def answer() -> None:
            visitor, _ = impostor.accept()
            with visitor:
                visitor.sendall(b"SSH-2.0\n")

        with in_thread(answer), pytest.raises(FenceError) as caught:
            meet(Group(1, 2, lambda _: at), timeout=10, notice=10)
    assert f"rank 1 can not reach rank 0 at port {port}: 127.0.0.3 (" in str(caught.value)
    assert "127.0.0.2 (another program listens there)" in str(caught.value)
    assert "MASTER_ADDR" in str(caught.value)


def test_a_rank_that_never_connects_is_named() -> None:
    """Guards against waiting for ever before the first call."""
    job = Job(3, timeout=1.0)
    with in_thread(lambda: job.connect(0)) as host, in_thread(lambda: job.connect(2)) as other:
        assert "rank 1 did not connect to the fence of rank 0 within 1 s" in str(host.exception(timeout=20))
        assert "not all ranks connected" in str(other.exception(timeout=20))


def test_rank_0_without_a_port_tells_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a broadcast that never comes because its sender has raised."""

    def refuse(world_size: int) -> socket.socket:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(rendezvous, "_listen", refuse)
    errors = Job(2).run(lambda fence: None)
    assert ["Too many open files" in str(error) for error in errors] == [True, True]


@pytest.mark.parametrize(
    ("fingerprints", "expected"),
    [
        ([{"step": 1}, {"step": 1}, {"step": 2}], "step: ranks 0, 1 have 1, rank 2 has 2"),
        ([{"a": {"b": [1]}}, {"a": {}}, {"a": {"b": [1]}}], "a.b: ranks 0, 2 have [1], rank 1 has nothing"),
        ([None, 3, 3], "the fingerprint: rank 0 has null, ranks 1, 2 have 3"),
        ([{str(i): i for i in range(9)}, {}, {}], "ranks 1, 2 have nothing; and 6 more differences"),
    ],
)
def test_differences_are_named(fingerprints: list[Any], expected: str) -> None:
    """Guards against a message that says only that something differs."""
    message, fix = disagreement({rank: Place("save", 4, value) for rank, value in enumerate(fingerprints)})
    assert expected in message
    assert "'save' (call 4)" in message
    assert "same step" in fix


def test_ranks_are_listed_in_short() -> None:
    """Guards against a thousand numbers in one message."""
    assert [names([3]), names({2, 0})] == ["rank 3", "ranks 0, 2"]
    assert names(range(100)) == "ranks 0, 1, 2, 3, 4, 5, 6, 7 and 92 more"


def test_places_show_what_is_short() -> None:
    """Guards against shapes of a whole model in one sentence."""
    assert str(Place("save", 7, {"step": 4, "shapes": {"w": [1]}})) == "'save' (call 7, step 4)"
    assert str(Place("end", 8)) == "'end' (call 8)"
    assert json.loads(json.dumps(Place("end", 8).fingerprint)) is None
