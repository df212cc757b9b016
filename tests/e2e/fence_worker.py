"""One rank of the fence's tests: ``python fence_worker.py LAUNCHER OUT CASE ...``, run by `test_fence_processes`.

Cases that leave the processes alive run one after the other, each with a fence of its own. A rank appends what happened
to ``OUT/rank<R>.jsonl``.
"""

from __future__ import annotations

import ctypes
import io
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from zoo.store.fence import Fence, FenceError
from zoo.store.signals import StopSignals

TIMEOUT = 3.0
CASES: dict[str, Callable[[Fence], Any]] = {}


def case(function: Callable[[Fence], Any]) -> Callable[[Fence], Any]:
    CASES[function.__name__] = function
    return function


def step(fence: Fence, number: int, payload: Any = None) -> list[Any]:
    return fence.gather("step", payload, fingerprint={"step": number})


def collective() -> None:
    dist.all_reduce(torch.ones(1))


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@case
def agreement(fence: Fence) -> Any:
    """Payloads by rank, of any size; and the keys left in the store after many calls with long fingerprints."""
    names = {f"layer{i}": [i, i + 1] for i in range(200)}
    for number in range(30):
        gathered = fence.gather("save", [fence.rank, "x" * 100_000], fingerprint={"step": number, "shapes": names})
    collective()
    keys = fence._store.num_keys()
    collective()
    return {"ranks": [rank for rank, _ in gathered], "sizes": [len(text) for _, text in gathered], "keys": keys}


@case
def save_on_rank_0_only(fence: Fence) -> Any:
    step(fence, 4)
    if fence.rank == 0:
        fence.gather("save", fingerprint={"step": 4})
    step(fence, 5)


@case
def rank_1_never_comes(fence: Fence) -> Any:
    """It is busy elsewhere, and hears of the failure when it comes."""
    step(fence, 4)
    if fence.rank == 1:
        time.sleep(TIMEOUT + 1)
    fence.gather("save", fingerprint={"step": 4})


@case
def other_step(fence: Fence) -> Any:
    fence.gather("save", fingerprint={"step": 4 + (fence.rank == 1)})


@case
def other_shape(fence: Fence) -> Any:
    """A fingerprint so long that its hash travels."""
    tensors = {f"layer{i}.weight": [64, 8] for i in range(100)}
    if fence.rank == 1:
        tensors["layer7.weight"] = [65, 8]
    fence.gather("save", fingerprint={"step": 4, "tensors": tensors})


@case
def other_names(fence: Fence) -> Any:
    fence.gather("load", fingerprint={"names": {"bias" if fence.rank == 1 else "weight": "float32"}})


@case
def one_step_more_on_rank_1(fence: Fence) -> Any:
    """With the call that ends a run, which all make."""
    for number in range(3 + (fence.rank == 1)):
        step(fence, number)
    fence.gather("end")


@case
def one_step_more_after_the_others_closed(fence: Fence) -> Any:
    for number in range(3 + (fence.rank == 1)):
        step(fence, number)


@case
def one_step_more_on_rank_0(fence: Fence) -> Any:
    for number in range(3 + (fence.rank == 0)):
        step(fence, number)


@case
def fails_on_rank_1(fence: Fence) -> Any:
    step(fence, 0)
    if fence.rank == 1:
        fence.fail("the disk of rank 1 is full.", fix="Make room.")
    step(fence, 1)


@case
def error_on_rank_1(fence: Fence) -> Any:
    step(fence, 0)
    if fence.rank == 1:
        raise ValueError("a sample without tokens")
    step(fence, 1)


@case
def error_on_rank_1_right_after_a_call(fence: Fence) -> Any:
    """The others have waited for it, and look at the store less often by then."""
    if fence.rank == 1:
        time.sleep(0.6)
    said = step(fence, 0, fence.rank)
    if fence.rank == 1:
        raise ValueError("a sample without tokens")
    return said


@case
def sigterm_on_rank_1(fence: Fence) -> Any:
    with StopSignals() as signals:
        for number in range(100):
            if fence.rank == 1 and number == 7:
                os.kill(os.getpid(), signal.SIGTERM)
            stops = step(fence, number, signals.received)
            if any(stops):
                return {"step": number, "stops": stops}
    return None


@case
def rank_1_is_late(fence: Fence) -> Any:
    """Under the defaults."""
    step(fence, 0)
    if fence.rank == 1:
        time.sleep(12)
    step(fence, 1)
    fence.gather("end")


@case
def kill_rank_0(fence: Fence) -> Any:
    step(fence, 0)
    if fence.rank == 0:
        die()
    step(fence, 1)


@case
def rank_1_holds_the_lock(fence: Fence) -> Any:
    """Returns what this rank printed."""
    printed, sys.stderr = sys.stderr, io.StringIO()
    try:
        step(fence, 0)
        if fence.rank == 1:
            ctypes.PyDLL(None).usleep(4_000_000)
        step(fence, 1)
        return sys.stderr.getvalue()
    finally:
        sys.stderr = printed


@case
def forked_process_leaves(fence: Fence) -> Any:
    """Returns how it ended, by rank."""
    step(fence, 0)
    child = os.fork()
    if child == 0:
        fence.close()
        os._exit(0)
    return step(fence, 1, os.waitpid(child, 0)[1])


@case
def kill_rank_1(fence: Fence) -> Any:
    """A process that it has forked, such as a worker of a data loader, lives longer."""
    step(fence, 0)
    if fence.rank == 1:
        if os.fork() == 0:
            time.sleep(TIMEOUT + 5)
            os._exit(0)
        die()
    step(fence, 1)


@case
def kill_rank_1_before_a_collective(fence: Fence) -> Any:
    step(fence, 0)
    if fence.rank == 1:
        die()
    collective()


@case
def stop_rank_0(fence: Fence) -> Any:
    """Its store is silent, and its connections stay open."""
    step(fence, 0)
    if fence.rank == 0:
        os.kill(os.getpid(), signal.SIGSTOP)
    step(fence, 1)


@case
def others_in_a_collective(fence: Fence) -> Any:
    step(fence, 4)
    if fence.rank == 0:
        fence.gather("save", fingerprint={"step": 4})
    collective()


@case
def error_while_others_are_in_a_collective(fence: Fence) -> Any:
    step(fence, 0)
    if fence.rank == 1:
        raise ValueError("a sample without tokens")
    collective()


UNGUARDED = {error_while_others_are_in_a_collective}
"""Cases of a loop that does not use ``with`` and catches nothing: what happens then at the exit of the interpreter."""


OPTIONS: dict[str, dict[str, float]] = {"rank_1_is_late": {}, "rank_1_holds_the_lock": {"notice": 1.0}}
"""Of a fence that is not to have the timeout of the tests."""


def launch(launcher: str) -> Any | None:
    """The Fabric, or ``None`` with a default process group."""
    if launcher == "fabric":
        from lightning.fabric import Fabric

        fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp")
        fabric.launch()
        return fabric
    dist.init_process_group("gloo", timeout=timedelta(minutes=30))
    return None


def run(name: str, fabric: Any | None, out: Path) -> int:
    """One case; returns the exit code it would have."""
    fence = Fence.connect(fabric, **OPTIONS.get(name, {"timeout": TIMEOUT}))
    if CASES[name] in UNGUARDED:
        CASES[name](fence)
    started, result, error = time.monotonic(), None, None
    try:
        with fence:
            result = CASES[name](fence)
    except Exception as caught:  # noqa: BLE001
        error = caught
    record = {
        "case": name,
        "result": result,
        "error": type(error).__name__ if error else None,
        "message": str(error),
        "seconds": time.monotonic() - started,
    }
    with (out / f"rank{fence.rank}.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")
    return error.exit_code if isinstance(error, FenceError) else int(error is not None)


if __name__ == "__main__":
    chosen, directory, *names = sys.argv[1:]
    shared = launch(chosen)
    codes = [run(name, shared, Path(directory)) for name in names]
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(codes[0] if len(codes) == 1 else 0)  # a process group whose peers are dead can not be ended in order
