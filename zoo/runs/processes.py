"""Who starts the processes of a run: zoo itself, torchrun, or SLURM's srun. As Lightning will find it, but sooner."""

from __future__ import annotations

import os
from collections.abc import Mapping

from zoo.errors import InputError

INTERACTIVE = ("bash", "interactive")
"""Names of SLURM jobs in which a person works, so that commands are to start their processes themselves."""


def launcher(environment: Mapping[str, str] = os.environ) -> str | None:
    """``torchrun`` or ``srun``, if it started this process and the others; ``None``: zoo will start them."""
    if "TORCHELASTIC_RUN_ID" in environment:  # first, since it may run inside of SLURM
        return "torchrun"
    in_job = "SLURM_NTASKS" in environment and environment.get("SLURM_JOB_NAME") not in INTERACTIVE
    return "srun" if in_job else None


def others_run(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether the other processes have been started already, or this is one that zoo started."""
    return launcher(environment) is not None or "LOCAL_RANK" in environment


def is_first(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this is rank 0; others say nothing."""
    rank = {"torchrun": "RANK", "srun": "SLURM_PROCID", None: "LOCAL_RANK"}[launcher(environment)]
    return int(environment.get(rank, 0)) == 0 and int(environment.get("NODE_RANK", 0)) == 0


def check_processes(devices: int, num_nodes: int, environment: Mapping[str, str] = os.environ) -> None:
    """Check that as many processes were started as the run is to have: too many would each be a run of their own.

    Raises:
        InputError: there are others.
    """
    who, world = launcher(environment), devices * num_nodes
    if who is None:
        return
    if who == "srun" and "SLURM_PROCID" not in environment:
        raise InputError(
            "this is inside of a SLURM job, and srun did not start it.",
            fix="Put srun in front of the command, as the script of zoo slurm does; or unset SLURM_NTASKS.",
        )
    started = int(environment["WORLD_SIZE" if who == "torchrun" else "SLURM_NTASKS"])
    if started != world:
        raise InputError(
            f"{who} starts {started} processes, and this run is to have {world}: --devices {devices} on each of "
            f"--num-nodes {num_nodes}.",
            fix="Give these options the numbers of processes on each machine, and of machines.",
        )
