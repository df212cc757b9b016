"""Trainings in which one rank goes wrong around a checkpoint, saved by zoo's store or by ``fabric.save``.

``python hang_worker.py rank JOB`` is one rank, started by a launcher; ``python hang_worker.py jobs OUT`` reads jobs
from its input and forks the ranks of each, so that torch is imported once. All is JSON: see `Job` and `Ending`.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from lightning.fabric.strategies import ModelParallelStrategy
from torch import Tensor, nn

from zoo.store.fence import Fence, FenceError
from zoo.store.store import CheckpointStore
from zoo.train.launch import shard

TIMEOUT = 3.0
"""Seconds that a rank of zoo's waits for another."""
SAVED = 2
"""The step that all ranks have saved before something goes wrong."""
CASES: dict[str, Callable[[Run], None]] = {}


@dataclass
class Job:
    """Processes that go through some cases, the last of which may end them.

    Attributes:
        saver: ``zoo`` or ``fabric``.
        strategy: ``ddp`` or ``fsdp2``.
        out: a directory for ``rank<R>.jsonl``, logs, and one directory of checkpoints for each case.
        limit: seconds after which processes that are alive have hung.
    """

    saver: str
    strategy: str
    world: int
    cases: list[str]
    out: str
    limit: float = 60.0


@dataclass
class Ending:
    """What became of a rank in a case.

    Attributes:
        how: ``went on``; ``raised``; ``ended`` by a thread of zoo's; ``killed``; or ``hung``.
        seconds: since all ranks had done the same.
    """

    how: str
    seconds: float
    error: str = ""
    message: str = ""


@dataclass
class Run:
    """One rank in one case."""

    fabric: Any
    step_all: Callable[[int], object]
    save_step: Callable[[int], object]
    train: Callable[[], None]
    state: dict[str, Any]
    directory: Path
    done: int = 0
    rank: int = field(init=False)

    def __post_init__(self) -> None:
        self.rank = self.fabric.global_rank

    def steps(self, number: int) -> None:
        for _ in range(number):
            self.step_all(self.done)
            self.train()
            self.done += 1

    def save(self, step: int | None = None) -> None:
        self.save_step(self.done if step is None else step)


def case(function: Callable[[Run], None]) -> Callable[[Run], None]:
    CASES[function.__name__] = function
    return function


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@case
def only_rank_0_saves(run: Run) -> None:
    if run.rank == 0:
        run.save()
    run.steps(3)


@case
def only_rank_0_saves_before_a_barrier(run: Run) -> None:
    if run.rank == 0:
        run.save()
    run.fabric.barrier()
    run.steps(3)


@case
def only_rank_0_saves_by_torch(run: Run) -> None:
    if run.rank == 0:
        torch.save(run.state["model"].state_dict(), run.directory / f"step-{run.done}")
    run.fabric.barrier()
    run.steps(3)


@case
def other_step_on_rank_1(run: Run) -> None:
    run.save(run.done + (run.rank == 1))
    run.steps(3)


@case
def other_shapes_on_rank_1(run: Run) -> None:
    run.state["average"] = nn.Linear(3, 2 + (run.rank == 1))
    run.save()
    run.steps(3)


@case
def other_names_on_rank_1(run: Run) -> None:
    run.state["average"] = nn.ModuleDict({"old" if run.rank == 1 else "new": nn.Linear(3, 2)})
    run.save()
    run.steps(3)


@case
def one_batch_more_on_rank_1(run: Run) -> None:
    run.steps(3 + (run.rank == 1))
    run.save()


@case
def rank_0_can_not_write(run: Run) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if run.rank == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        run.save()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    run.steps(3)


@case
def rank_0_is_killed(run: Run) -> None:
    if run.rank == 0:
        die()
    run.save()


@case
def rank_1_is_killed(run: Run) -> None:
    if run.rank == 1:
        die()
    run.save()


@case
def rank_1_is_in_an_all_reduce(run: Run) -> None:
    if run.rank == 1:
        dist.all_reduce(torch.ones(1))
    run.save()


VICTIMS = {"rank_0_is_killed": 0, "rank_1_is_killed": 1}


class Model(nn.Module):
    """Large enough for two ranks to have a part of each tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x).tanh()
        return x.square().mean()


def start(job: Job) -> tuple[Any, dict[str, Any], Callable[[], None]]:
    """A Fabric, the state of a model that it has set up, and a step of its training."""
    strategy: Any = "ddp"
    if job.strategy == "fsdp2":
        strategy = ModelParallelStrategy(shard, data_parallel_size=job.world, tensor_parallel_size=1)
    fabric = Fabric(accelerator="cpu", devices=job.world, strategy=strategy)
    fabric.launch()
    torch.manual_seed(0)
    model: Any = fabric.setup_module(Model())
    optimizer: Any = fabric.setup_optimizers(torch.optim.AdamW(model.parameters(), lr=0.01))

    def train() -> None:
        fabric.backward(model(torch.randn(4, 6)))
        optimizer.step()
        optimizer.zero_grad()

    return fabric, {"model": model, "optimizer": optimizer}, train


@contextmanager
def saver(job: Job, fabric: Any, directory: Path, state: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    """What a rank calls before a step, and to save one."""
    if job.saver == "zoo":
        fence = Fence.connect(fabric, timeout=TIMEOUT)
        with fence, CheckpointStore(directory, fence=fence, keep=None) as store:
            yield store.step, lambda step: store.save(step, state)
    else:
        yield lambda step: None, lambda step: fabric.save(directory / f"step-{step}", state)


def run_case(name: str, job: Job, fabric: Any, state: dict[str, Any], train: Callable[[], None]) -> int:
    """Go through a case, and write how it ended; returns the exit code that a process would have."""
    path = Path(job.out) / f"rank{fabric.global_rank}.jsonl"
    started, code, ending = time.monotonic(), 0, Ending("went on", 0.0)
    try:
        directory, state = Path(job.out) / name, dict(state)
        with saver(job, fabric, directory, state) as (step, save):
            run = Run(fabric, step, save, train, state, directory)
            run.steps(SAVED)
            run.save()
            run.steps(1)
            started = time.monotonic()
            with path.open("a") as file:
                file.write(json.dumps({"case": name, "started": started}) + "\n")
            CASES[name](run)
    except BaseException as error:  # noqa: BLE001 - it is what the test is about; torch's CheckpointException is one
        ending = Ending("raised", 0.0, type(error).__name__, str(error))
        code = FenceError.exit_code if isinstance(error, FenceError) else 1
    ending.seconds = time.monotonic() - started
    with path.open("a") as file:
        file.write(json.dumps({"case": name, "ending": asdict(ending)}) + "\n")
    return code


def be_rank(job: Job) -> int:
    """One process: the exit code of its last case."""
    fabric, state, train = start(job)
    return [run_case(name, job, fabric, state, train) for name in job.cases][-1]


def leave(code: int) -> None:
    """End where peers may be dead, with whom a process group can not be ended in order."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def fork(job: Job, rank: int, port: int) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        log = os.open(Path(job.out) / f"log{rank}", os.O_WRONLY | os.O_CREAT)
        for stream in (1, 2):
            os.dup2(log, stream)
        os.environ.update(LOCAL_RANK=str(rank), NODE_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        code = be_rank(job)
    except BaseException:  # noqa: BLE001 - it must not go on as the parent
        import traceback

        traceback.print_exc()
    leave(code)
    return 0


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


class Forked:
    """A job that runs."""

    def __init__(self, job: Job) -> None:
        Path(job.out).mkdir(parents=True)
        port = free_port()
        self._job, self._until = job, time.monotonic() + job.limit
        self._alive = {fork(job, rank, port): rank for rank in range(job.world)}
        self._ended: dict[int, tuple[int, float]] = {}

    def poll(self) -> bool:
        """Whether it is over. Processes that have hung are killed."""
        for child, rank in list(self._alive.items()):
            found, status = os.waitpid(child, os.WNOHANG)
            if found:
                self._ended[rank] = (os.waitstatus_to_exitcode(status), time.monotonic())
                del self._alive[child]
        if self._alive and time.monotonic() > self._until:
            for number in (signal.SIGSTOP, signal.SIGKILL):  # none is to see that another has died
                for child in self._alive:
                    os.kill(child, number)
            for child in self._alive:
                os.waitpid(child, 0)
            self._alive.clear()
        return not self._alive

    def endings(self) -> list[dict[str, Any]]:
        """By rank, the ending of each case."""
        return [
            {name: asdict(ending) for name, ending in endings_of(self._job, rank, self._ended.get(rank)).items()}
            for rank in range(self._job.world)
        ]


def endings_of(job: Job, rank: int, exit_: tuple[int, float] | None) -> dict[str, Ending]:
    """How a rank ended each case, from what it wrote, its exit code and the time of it; ``None`` if it hung."""
    found: dict[str, Ending] = {}
    for line in (Path(job.out) / f"rank{rank}.jsonl").read_text().splitlines():
        record = json.loads(line)
        if "ending" in record:
            found[record["case"]] = Ending(**record["ending"])
            continue
        seconds = (time.monotonic() if exit_ is None else exit_[1]) - record["started"]
        log = (Path(job.out) / f"log{rank}").read_text(errors="replace")
        said = log.partition(f"zoo: rank {rank}: ")[2].partition("\nThe main thread of")[0]
        how = "hung" if exit_ is None else "killed" if exit_[0] == -signal.SIGKILL else "ended"
        found[record["case"]] = Ending(how, seconds, "" if exit_ is None else f"exit code {exit_[0]}", said)
    return found


def run_jobs(jobs: list[Job], at_once: int) -> list[list[dict[str, Any]]]:
    """The endings of each job, by rank and case."""
    waiting, running = list(enumerate(jobs)), dict[int, Forked]()
    found: dict[int, list[dict[str, Any]]] = {}
    while waiting or running:
        while waiting and len(running) < at_once:
            number, job = waiting.pop(0)
            running[number] = Forked(job)
        for number in [number for number, forked in running.items() if forked.poll()]:
            found[number] = running.pop(number).endings()
        time.sleep(0.02)
    return [found[number] for number in range(len(jobs))]


if __name__ == "__main__":
    if sys.argv[1] == "rank":
        leave(be_rank(Job(**json.loads(sys.argv[2]))))
    work = json.load(sys.stdin)
    results = run_jobs([Job(**job) for job in work["jobs"]], work["at_once"])
    Path(sys.argv[2]).write_text(json.dumps(results))
