"""The loop of docs/checkpoints.md: stopped by a signal, killed, and started again, it ends with the bits of one run."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
FOREVER = 10**7
LIMIT = 120.0
SAVE_EVERY = 100
INTERRUPTIONS = 10 if os.environ.get("ZOO_STRESS") == "1" else 1


def script(directory: Path) -> Path:
    guide = (ROOT / "docs" / "checkpoints.md").read_text(encoding="utf-8")
    found = re.search(r'^```python title="train.py"\n(.*?)^```$', guide, re.MULTILINE | re.DOTALL)
    assert found
    directory.mkdir()
    path = directory / "train.py"
    path.write_text(found[1], encoding="utf-8")
    return path


@contextmanager
def started(path: Path, world: int, until: int, launcher: tuple[str, ...] = ()) -> Iterator[subprocess.Popen[str]]:
    """The job; its pipes close when all of its processes have ended."""
    command = [sys.executable, *launcher, path.name, str(world), str(until)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=path.parent, env=environment, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            yield process
        finally:
            for pid in (process.pid, *children(process.pid)):
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue


def children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def finish(path: Path, world: int, until: int) -> str:
    with started(path, world, until) as process:
        out, errors = process.communicate(timeout=LIMIT)
    assert process.returncode == 0, errors
    return out


def steps(path: Path) -> list[int]:
    return sorted(int(step.name[5:]) for step in path.parent.glob("checkpoints/step-*"))


def wait_for_step(path: Path, step: int, process: subprocess.Popen[str]) -> None:
    until = time.monotonic() + LIMIT
    while max(steps(path), default=0) < step:
        assert process.poll() is None and time.monotonic() < until, process.communicate()
        time.sleep(0.005)


def files(path: Path, step: int) -> dict[str, Any]:
    """Size and sha256 of all files of a step: weights, moments, random generators, the count."""
    manifest = json.loads((path.parent / f"checkpoints/step-{step:08d}/MANIFEST.json").read_text())
    found: dict[str, Any] = manifest["files"]
    return found


def stop(path: Path, world: int, after: int) -> int:
    """Start, ask one rank to stop, and return the step that was saved then."""
    with started(path, world, FOREVER) as process:
        wait_for_step(path, after + SAVE_EVERY, process)
        os.kill(children(process.pid)[0] if world == 2 else process.pid, signal.SIGTERM)
        out, errors = process.communicate(timeout=LIMIT)
    stopped = steps(path)[-1]
    assert (process.returncode, out) == (0, f"stopped by a signal after {stopped}\n"), errors
    assert stopped >= after + SAVE_EVERY
    return stopped


def kill(path: Path, world: int, after: int) -> int:
    """Start, kill rank 0, and return the newest step."""
    with started(path, world, FOREVER) as process:
        wait_for_step(path, after + SAVE_EVERY, process)
        process.kill()
        _, errors = process.communicate(timeout=LIMIT)
    assert process.returncode == -signal.SIGKILL
    assert world == 1 or "rank 0 is gone" in errors
    return steps(path)[-1]


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("world", [1, 2])
def test_stopped_killed_and_started_again_it_ends_with_the_bits_of_one_run(world: int, tmp_path: Path) -> None:
    """Guards against a signal that one rank alone acts on, and against any state that a resumed run has not."""
    path = script(tmp_path / "interrupted")
    newest = 0
    for _ in range(INTERRUPTIONS):
        stopped = stop(path, world, newest)
        newest = kill(path, world, stopped)
        assert newest > stopped and newest % SAVE_EVERY == 0
    end = newest + 50
    assert finish(path, world, end) == f"finished {end}\n"
    straight = script(tmp_path / "straight")
    finish(straight, world, end)
    assert files(path, end) == files(straight, end)
    assert {name for name in files(path, end) if name.endswith("safetensors")} == {
        "model/model.safetensors",
        "state/shared.safetensors",
        *(f"state/rank-{rank:05d}.safetensors" for rank in range(world)),
    }


def test_torchrun_may_pass_on_what_the_cluster_has_sent_already(tmp_path: Path) -> None:
    """Guards against a second signal within milliseconds, which would end the ranks before they have saved."""
    path = script(tmp_path / "job")
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone")
    with started(path, 2, FOREVER, launcher) as process:
        wait_for_step(path, SAVE_EVERY, process)
        for pid in (*children(process.pid), process.pid):
            os.kill(pid, signal.SIGTERM)
        out, errors = process.communicate(timeout=LIMIT)
    assert f"stopped by a signal after {steps(path)[-1]}\n" in out, errors
