"""What zoo's checkpoint store costs: a fence at every step, and a save beside a plain write, Fabric's and torch's.

    python benchmarks/checkpoint.py --gib 1 --directory DISK

Every save runs in a process of its own, one after the other, round after round; the median of the rounds counts. The disk is
asked to be quiet (``sync``) before each. Limits: under 1 ms a step, 0.7 times the rate of a plain write with fsync, and no
more extra memory than the largest tensor. Exit code 1: one of them was missed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
N_TENSORS = 16
PLAIN = "write + fsync"
LIMIT_STEP_US, LIMIT_RATE = 1000.0, 0.7
SLACK_MIB = 8
"""Of memory that Python and its libraries take at a first use, whatever the size."""


def make_state(n_bytes: int) -> dict[str, Any]:
    """Tensors of one size, with random bits: compressible or shared pages would flatter somebody."""
    import torch

    n_items = n_bytes // 4 // N_TENSORS
    return {f"layer.{i}": torch.empty(n_items).random_(-(2**20), 2**20) for i in range(N_TENSORS)}


def save_plain(state: dict[str, Any], directory: Path) -> Callable[[], object]:
    """The same bytes, in order, with nothing else."""

    def save() -> None:
        with (directory / "plain").open("wb", buffering=0) as file:
            for tensor in state.values():
                rest = memoryview(tensor.numpy()).cast("B")
                while rest:
                    rest = rest[file.write(rest) :]
            os.fsync(file.fileno())

    return save


def save_zoo(state: dict[str, Any], directory: Path) -> Callable[[], object]:
    """Hashed, fsynced, committed."""
    from zoo import CheckpointStore

    store = CheckpointStore(directory / "store")
    return lambda: store.save(1, {"model": state})


def save_fabric(state: dict[str, Any], directory: Path) -> Callable[[], object]:
    """One file; no fsync."""
    from lightning.fabric import Fabric

    fabric = Fabric(accelerator="cpu", devices=1)
    return lambda: fabric.save(directory / "fabric.ckpt", {"model": state})


def save_dcp(state: dict[str, Any], directory: Path) -> Callable[[], object]:
    """torch.distributed.checkpoint in one process; it fsyncs."""
    import torch.distributed.checkpoint as dcp

    return lambda: dcp.save({"model": state}, checkpoint_id=directory / "dcp", no_dist=True)


SAVERS = {PLAIN: save_plain, "zoo": save_zoo, "fabric.save": save_fabric, "torch DCP": save_dcp}


def measure_save(name: str, n_bytes: int, directory: Path) -> dict[str, float]:
    """Seconds and extra memory in MiB of one save."""
    save = SAVERS[name](make_state(n_bytes), directory)
    os.sync()
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak
    before, started = _memory_mib("VmRSS"), time.perf_counter()
    save()
    return {"seconds": time.perf_counter() - started, "extra": _memory_mib("VmHWM") - before}


def _memory_mib(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{key}:")).split()[1]) / 1024


def measure_steps(rank: int, port: int, n_steps: int, rounds: int) -> list[float]:
    """Microseconds that `CheckpointStore.step` adds to a step of two ranks that train with DDP, round by round."""
    import torch
    import torch.distributed as dist

    from zoo import CheckpointStore

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    model = torch.nn.parallel.DistributedDataParallel(
        torch.nn.Sequential(*(torch.nn.Linear(256, 256) for _ in range(4)))
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    x = torch.randn(64, 256)

    def train(step: Callable[[int], object]) -> float:
        started = time.perf_counter()
        for number in range(n_steps):
            step(number)
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return (time.perf_counter() - started) / n_steps * 1e6

    found = []
    with tempfile.TemporaryDirectory() as own:
        box = [own]
        dist.broadcast_object_list(box)  # the directory of rank 0
        with CheckpointStore(Path(box[0]) / "store", signals=True) as store:
            for _ in range(rounds + 1):
                without, with_fence = train(lambda number: None), train(store.step)
                found.append([without, with_fence])
        dist.barrier()
    dist.destroy_process_group()
    return found[1:]  # the first one warms up


def worker(arguments: list[str]) -> None:
    """One process of a measurement; prints JSON."""
    what, *rest = arguments
    if what == "save":
        result: Any = measure_save(rest[0], int(rest[1]), Path(rest[2]))
    else:
        result = measure_steps(*map(int, rest))
    print("RESULT " + json.dumps(result))


def start(*arguments: object) -> subprocess.Popen[str]:
    """A worker."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, __file__, "--worker", *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def result_of(process: subprocess.Popen[str]) -> Any:
    """What it printed."""
    out, _ = process.communicate()
    lines = [line for line in out.splitlines() if line.startswith("RESULT ")]
    if not lines:
        sys.exit(f"a worker failed with exit code {process.returncode}")
    return json.loads(lines[0].removeprefix("RESULT "))


def compare_steps(n_steps: int, rounds: int) -> bool:
    """Print the cost of the fence; returns whether it is within its limit."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    processes = [start("steps", rank, port, n_steps, rounds) for rank in range(2)]
    found, _ = (result_of(process) for process in processes)
    without, with_fence = (statistics.median(column) for column in zip(*found, strict=True))
    cost = statistics.median(b - a for a, b in found)
    print(f"a step of 2 DDP ranks: {without:.0f} us without, {with_fence:.0f} us with store.step: {cost:+.0f} us")
    return verdict("store.step costs under 1 ms", cost < LIMIT_STEP_US)


def compare_saves(gib: float, rounds: int, directory: Path) -> bool:
    """Print the rate and the memory of each way to save; returns whether zoo's are within their limits."""
    n_bytes = int(gib * 2**30)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in SAVERS}
    for _ in range(rounds):
        for name, results in found.items():
            with tempfile.TemporaryDirectory(dir=directory) as own:
                results.append(result_of(start("save", name, n_bytes, own)))
            os.sync()
    medians = {name: {key: statistics.median(r[key] for r in rs) for key in rs[0]} for name, rs in found.items()}
    largest = n_bytes / N_TENSORS / 2**20
    print(f"\na state of {n_bytes / 2**20:.0f} MiB in {N_TENSORS} tensors of {largest:.0f} MiB")
    print(f"{'':16}{'MiB/s':>8}{'of a plain write':>18}{'extra MiB':>11}")
    for name, median in medians.items():
        rate, ratio = n_bytes / 2**20 / median["seconds"], medians[PLAIN]["seconds"] / median["seconds"]
        print(f"{name:16}{rate:8.0f}{ratio:18.2f}{median['extra']:11.0f}")
    is_fast = medians[PLAIN]["seconds"] / medians["zoo"]["seconds"] >= LIMIT_RATE
    is_small = medians["zoo"]["extra"] <= largest + SLACK_MIB
    return verdict(f"a save has {LIMIT_RATE} of the rate of a plain write", is_fast) & verdict(
        f"a save takes no more extra memory than the largest tensor ({largest:.0f} MiB)", is_small
    )


def verdict(claim: str, is_true: bool) -> bool:
    """Print a claim and whether it holds."""
    print(f"{'holds ' if is_true else 'MISSED'}  {claim}")
    return is_true


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--gib", type=float, default=1.0, help="size of the state that is saved")
    parser.add_argument("--steps", type=int, default=500, help="steps of one round of the fence")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--directory", type=Path, default=Path(), help="on the disk that is to be measured")
    options = parser.parse_args()
    if options.worker:
        worker(options.worker)
        return
    from importlib.metadata import version

    versions = ", ".join(f"{name} {version(name).partition('+')[0]}" for name in ("torch", "lightning"))
    free = shutil.disk_usage(options.directory).free
    if free < 2 * options.gib * 2**30:
        sys.exit(f"{options.directory.absolute()} has {free / 2**30:.1f} GiB free; {2 * options.gib:g} are needed")
    print(
        f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores; Python {platform.python_version()}, {versions}"
    )
    verdicts = [
        compare_steps(options.steps, options.rounds),
        compare_saves(options.gib, options.rounds, options.directory),
    ]
    sys.exit(0 if all(verdicts) else 1)


if __name__ == "__main__":
    main()
