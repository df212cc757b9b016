"""Binds the OpenMP threads of torch to cores, in the one process of a command.

Two unbound threads are now and then put on one core, and a barrier then waits for the scheduler's next tick: a kernel
of 0.05 ms takes 8.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

_BINDING = {"OMP_PROC_BIND": "true", "OMP_PLACES": "cores"}
_CHOSEN_BY_USER = (*_BINDING, "OMP_NUM_THREADS", "GOMP_CPU_AFFINITY", "KMP_AFFINITY")
_RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "SLURM_PROCID", "PMI_RANK", "OMPI_COMM_WORLD_RANK")


def import_torch_bound() -> None:
    """Import torch; the threads that it computes with stay on their cores, one each.

    OpenMP reads the environment when its library is loaded, and binds the main thread too. Both are restored, so that
    processes and threads which are started later see all cores. Does nothing where `may_bind` says no.
    """
    if "torch" in sys.modules or not may_bind(os.environ):
        return
    cores = os.sched_getaffinity(0)
    os.environ.update(_BINDING)
    try:
        import torch  # noqa: F401
    finally:
        for name in _BINDING:
            del os.environ[name]
        os.sched_setaffinity(0, cores)


def may_bind(environment: Mapping[str, str], cgroup: Path = Path("/sys/fs/cgroup")) -> bool:
    """Whether this process may take the cores for itself.

    Not where it is one of several (they would all be bound to the same ones), where its group is allowed less time
    than the cores it sees have, or where the user has said how threads are to run.
    """
    if not hasattr(os, "sched_getaffinity") or any(name in environment for name in (*_CHOSEN_BY_USER, *_RANKS)):
        return False
    allowed = _allowed_cores(cgroup)
    return allowed is None or allowed >= len(os.sched_getaffinity(0))


def _allowed_cores(cgroup: Path) -> float | None:
    """Processor time by time that the control group grants, version 2 or 1; ``None``: no limit."""
    try:
        if (cgroup / "cpu.max").is_file():
            quota, period = (cgroup / "cpu.max").read_text().split()
        else:
            quota = (cgroup / "cpu" / "cpu.cfs_quota_us").read_text().strip()
            period = (cgroup / "cpu" / "cpu.cfs_period_us").read_text().strip()
    except (OSError, ValueError):
        return None
    return None if quota in ("max", "-1") else int(quota) / int(period)
