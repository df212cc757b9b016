"""The command line binds torch's threads, and nothing else that it starts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from zoo.cli.threads import may_bind

if not hasattr(os, "sched_getaffinity"):
    pytest.skip("threads can be bound on Linux only", allow_module_level=True)

PROBE = """
import json, os, subprocess, sys, threading
from pathlib import Path
before = dict(os.environ)
from zoo.cli.threads import import_torch_bound
import_torch_bound()
import torch
torch.set_num_threads(2)
torch.ones(1 << 22).sum()
def cores(pid):
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return [line.split()[1] for task in tasks for line in (task / "status").read_text().splitlines()
            if line.startswith("Cpus_allowed_list")]
seen = []
thread = threading.Thread(target=lambda: seen.append(len(os.sched_getaffinity(0))))
thread.start(); thread.join()
child = subprocess.run([sys.executable, "-c", "import os; print(len(os.sched_getaffinity(0)))"], capture_output=True)
bound = sum(c.isdigit() for c in cores(os.getpid()))
print(json.dumps({"bound": bound, "main": len(os.sched_getaffinity(0)), "thread": seen[0], "child": int(child.stdout),
                  "environment": dict(os.environ) == before}))
"""


def probe(**environment: str) -> dict[str, object]:
    """What a fresh process finds after it has imported torch so."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "KMP_", "GOMP_"))}
    command = [sys.executable, "-c", PROBE]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**clean, **environment})
    assert done.returncode == 0, done.stderr
    found: dict[str, object] = json.loads(done.stdout)
    return found


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core")
def test_only_the_workers_are_bound() -> None:
    """Guards against stalls, and against loader workers and children that are left with one core."""
    n_cores = len(os.sched_getaffinity(0))
    assert probe() == {"bound": 1, "main": n_cores, "thread": n_cores, "child": n_cores, "environment": True}


@pytest.mark.parametrize("name", ["OMP_NUM_THREADS", "RANK", "LOCAL_RANK", "SLURM_PROCID"])
def test_left_alone(name: str) -> None:
    """Guards ranks, which would all be bound to the same cores, and what the user has set."""
    assert probe(**{name: "1"})["bound"] == 0


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, True),
        ({"cpu.max": "max 100000\n"}, True),
        ({"cpu.max": "50000 100000\n"}, False),
        ({"cpu.max": "102400000 100000\n"}, True),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, True),
        ({"cpu/cpu.cfs_quota_us": "50000\n", "cpu/cpu.cfs_period_us": "100000\n"}, False),
    ],
)
def test_quota(files: dict[str, str], expected: bool, tmp_path: Path) -> None:
    """Guards containers: with less time than cores, bound threads wait for each other's share."""
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    assert may_bind({}, tmp_path) is expected
