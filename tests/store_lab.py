"""Trainings that save, in processes that are killed. ``python -m tests.store_lab SCENARIO DIRECTORY ARGS`` prints JSON.

The scenarios run in a process of their own, with one thread: it forks, so that torch is imported once.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.errors import ZooError
from zoo.store.store import CheckpointStore

ROOT = Path(__file__).parents[1]
VOCABULARY = 11


def run_lab(*arguments: str | Path) -> Any:
    """What a scenario prints."""
    command = [sys.executable, "-m", "tests.store_lab", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


class TinyModel(nn.Module):
    """Tied weights, dropout, a buffer with an infinity that is saved and one that is not."""

    mask: Tensor
    scale: Tensor

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.drop = nn.Dropout(0.2)
        self.inner = nn.Linear(width, width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("mask", torch.tensor([0.0, float("-inf")]))
        self.register_buffer("scale", torch.ones(1), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden: Tensor = self.inner(self.drop(self.embedding(tokens)))
        return self.head(self.drop(hidden.tanh() * self.scale))


class Training:
    """A model that learns from data that all generators of random numbers have a part in."""

    def __init__(self, seed: int = 0, width: int = 8) -> None:
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        self.model = TinyModel(width)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.scheduler = torch.optim.lr_scheduler.MultiStepLR(self.optimizer, [4, 12])
        self.scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=3)
        self.data: dict[str, Any] = {"position": 0, "order": np.random.permutation(VOCABULARY)}
        self.losses: list[float] = []

    def state(self) -> dict[str, Any]:
        """What is saved."""
        return {
            "model": self.model,
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "scaler": self.scaler,
            "data": self.data,
            "losses": self.losses,
        }

    def take(self, state: dict[str, Any]) -> None:
        """Plain values come back in the state."""
        self.data, self.losses = state["data"], state["losses"]

    def step(self) -> None:
        """One optimizer step."""
        first = self.data["order"][self.data["position"] % VOCABULARY] + random.randrange(3) + np.random.randint(3)
        self.data["position"] += 1
        tokens = (torch.arange(6) + int(first)).remainder(VOCABULARY)
        loss = F.cross_entropy(self.model(tokens[:-1]), tokens[1:])
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.scheduler.step()
        self.losses.append(loss.item())


def digest(state: dict[str, Any]) -> str:
    """All bits of a state."""
    from zoo.store.state import flatten

    flat = flatten(state)
    found = hashlib.sha256(json.dumps(flat.tree, sort_keys=True).encode())
    for name, tensor in sorted(flat.tensors.items()):
        found.update(name.encode() + str(tensor.dtype).encode())
        found.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


class ThreadRanks:
    """Ranks that are threads of this process, and meet at a barrier."""

    def __init__(self, rank: int, world_size: int, shared: dict[str, Any]) -> None:
        self.rank, self.world_size, self._shared = rank, world_size, shared

    @classmethod
    def make(cls, world_size: int) -> list[ThreadRanks]:
        """All of them."""
        shared = {"barrier": threading.Barrier(world_size, timeout=20), "posts": [None] * world_size}
        return [cls(rank, world_size, shared) for rank in range(world_size)]

    def gather(self, kind: str, payload: Any = None, *, fingerprint: Any = None, timeout: float | None = None) -> Any:
        """As `zoo.store.fence.Fence.gather`."""
        del timeout
        self._shared["posts"][self.rank] = json.dumps([kind, fingerprint, payload])
        self._shared["barrier"].wait()
        posts = [json.loads(post) for post in self._shared["posts"]]
        self._shared["barrier"].wait()
        assert len({json.dumps(post[:2]) for post in posts}) == 1, posts
        return [post[2] for post in posts]


def on_ranks(world_size: int, work: Callable[[ThreadRanks], Any]) -> list[Any]:
    """What the work returns or raises, by rank."""
    results: list[Any] = [None] * world_size

    def run(ranks: ThreadRanks) -> None:
        try:
            results[ranks.rank] = work(ranks)
        except Exception as error:  # noqa: BLE001 - the test looks at it
            results[ranks.rank] = error

    threads = [threading.Thread(target=run, args=(ranks,)) for ranks in ThreadRanks.make(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@contextmanager
def forked(work: Callable[[Callable[[str], object]], None]) -> Iterator[tuple[int, Any]]:
    """A child that runs ``work(say)``, and what it says, line by line. It is killed at the end."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        try:
            work(lambda line: os.write(writing, f"{line}\n".encode()))
        finally:
            os._exit(1)
    os.close(writing)
    with os.fdopen(reading) as lines:
        try:
            yield child, lines
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def resumed(directory: Path) -> dict[str, Any]:
    """Twenty steps, and then ten or a few more, ``kill -9``, and the rest in another process with other seeds."""
    straight = Training()
    for _ in range(20):
        straight.step()

    def first(say: Callable[[str], object]) -> None:
        training, store = Training(), CheckpointStore(directory)
        for step in range(1, 20):
            training.step()
            store.save(step, training.state())
            say(f"{step}")

    with forked(first) as (_, lines):
        for line in lines:
            if line == "10\n":
                break
    training = Training(seed=99)
    with CheckpointStore(directory) as store:
        state = training.state()
        loaded = store.load(state)
        training.take(state)
    for _ in range(loaded.step, 20):
        training.step()
    runs = {
        name: {"losses": run.losses, "digest": digest(run.state())}
        for name, run in {"straight": straight, "resumed": training}.items()
    }
    return {"loaded": loaded.step, **runs}


def kill_loop(directory: Path, kills: int, seed: int, background: bool) -> dict[str, Any]:
    """Children that save without a pause, twice each step, and are killed. What is loaded then must be the newest."""
    chance = random.Random(seed)
    wrong, leftovers, newest = [], 0, 3
    began = time.monotonic()
    with CheckpointStore(directory, keep=2) as store:
        for count in range(1, newest + 1):
            store.save(count // 2, counted(count))
    pace = (time.monotonic() - began) / newest

    def save_on(start: int, say: Callable[[str], object]) -> None:
        with CheckpointStore(directory, keep=2, background=background) as store:
            for count in range(start, start + 100_000):
                store.save(count // 2, counted(count))
                say(f"{count - 1 if background else count}")  # a save in the background has waited for the one before

    for _ in range(kills):
        with forked(partial(save_on, newest + 1)) as (child, lines):
            time.sleep(chance.uniform(0.0, (6 if background else 3) * pace))
            os.kill(child, signal.SIGKILL)
            said = [int(line) for line in lines if line.endswith("\n")]
        leftovers += any(path.name.startswith((".tmp-", ".trash-", ".replaced-")) for path in directory.glob(".*"))
        last = max(said, default=newest)
        with CheckpointStore(directory, read_only=True) as store:
            state = counted(0)
            loaded = store.load(state)
        found = {int(tensor[0]) for tensor in state["model"].values()} | {state["count"]}
        newest = state["count"]
        if loaded.skipped or len(found) != 1 or newest < last or loaded.step != newest // 2:
            wrong.append({"last": last, "found": sorted(found), "step": loaded.step, "skipped": loaded.skipped})
    return {"wrong": wrong, "interrupted": leftovers, "newest": newest}


def counted(count: int) -> dict[str, Any]:
    """A state that is full of one number."""
    tensors = {f"layer.{i}": torch.full((50_000,), float(count)) for i in range(4)}
    return {"model": tensors, "count": count}


def rank(directory: Path, rank: int) -> dict[str, Any]:
    """One of two processes that train with DDP; rank 1 may write no large files for a while."""
    import torch.distributed as dist

    rendezvous = (directory.parent / "rendezvous").as_uri()
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2)
    training = Training()
    bare = training.model
    training.model = cast(TinyModel, nn.parallel.DistributedDataParallel(bare))
    training.data["position"] = rank
    errors = []
    with CheckpointStore(directory, keep=1) as store:
        training.step()
        store.save(1, training.state())
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        if rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
        try:
            store.save(2, training.state())
        except ZooError as error:
            errors.append(str(error))
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    with CheckpointStore(directory, keep=1, background=True) as store:
        store.save(3, training.state())
        polls = 0
        while store.poll() is None:
            polls += 1
        for _ in range(3):
            training.step()
        expected = digest({**training.state(), "model": bare})
        state = training.state()
        loaded = store.load(state)
        training.take(state)
        for _ in range(3):
            training.step()
    result = {"errors": errors, "loaded": loaded.step, "polls": polls, "position": training.data["position"]}
    dist.destroy_process_group()
    return {**result, "equal": expected == digest({**training.state(), "model": bare})}


if __name__ == "__main__":
    torch.set_num_threads(1)
    scenarios: dict[str, Callable[[Path], Any]] = {
        "resumed": resumed,
        "rank": lambda directory: rank(directory, int(sys.argv[3])),
        "kill": lambda directory: kill_loop(directory, int(sys.argv[3]), int(sys.argv[4]), sys.argv[5] == "background"),
    }
    sys.stdout.write(json.dumps(scenarios[sys.argv[1]](Path(sys.argv[2]))))
