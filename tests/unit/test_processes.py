"""Who started this process, found from the environment; the same as Lightning finds."""

from __future__ import annotations

import pytest
from lightning.fabric.plugins.environments import LightningEnvironment, SLURMEnvironment, TorchElasticEnvironment

from zoo.errors import InputError
from zoo.runs.processes import check_processes, is_first, launcher, others_run

TASK = {"SLURM_NTASKS": "4", "SLURM_NTASKS_PER_NODE": "2", "SLURM_JOB_NAME": "mine", "SLURM_LOCALID": "0"}
ELASTIC = {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}


@pytest.mark.parametrize(
    ("environment", "who", "first", "run"),
    [
        ({}, None, True, False),
        ({"LOCAL_RANK": "0"}, None, True, True),
        ({"LOCAL_RANK": "1"}, None, False, True),
        ({"LOCAL_RANK": "0", "NODE_RANK": "1"}, None, False, True),
        ({"NODE_RANK": "1"}, None, False, False),
        (TASK | {"SLURM_PROCID": "0"}, "srun", True, True),
        (TASK | {"SLURM_PROCID": "2"}, "srun", False, True),
        (TASK | {"SLURM_PROCID": "0", "SLURM_JOB_NAME": "interactive"}, None, True, False),
        (TASK | {"SLURM_PROCID": "0", "SLURM_JOB_NAME": "bash", "LOCAL_RANK": "1"}, None, False, True),
        ({"SLURM_JOB_ID": "7", "SLURM_PROCID": "0"}, None, True, False),
        (ELASTIC | {"RANK": "0"}, "torchrun", True, True),
        (ELASTIC | {"RANK": "1"}, "torchrun", False, True),
        (TASK | ELASTIC | {"RANK": "1", "SLURM_PROCID": "0"}, "torchrun", False, True),
    ],
)
def test_who_starts_the_processes(
    environment: dict[str, str], who: str | None, first: bool, run: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against ranks that all check, write and talk, or none; and against another opinion than Lightning's."""
    for name in ("LOCAL_RANK", "NODE_RANK", "RANK", "SLURM_NTASKS", "SLURM_JOB_NAME", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert (launcher(), is_first(), others_run()) == (who, first, run)
    if TorchElasticEnvironment.detect():
        assert who == "torchrun"
    elif SLURMEnvironment.detect():
        assert who == "srun"
        assert is_first() == (SLURMEnvironment().global_rank() == 0)
    else:
        assert who is None
        assert others_run() == LightningEnvironment().creates_processes_externally


@pytest.mark.parametrize(
    ("environment", "devices", "nodes", "said"),
    [
        ({}, 2, 3, None),
        (TASK | {"SLURM_PROCID": "0"}, 2, 2, None),
        (TASK | {"SLURM_PROCID": "0"}, 1, 1, "srun starts 4 processes, and this run is to have 1"),
        (TASK, 2, 2, "srun did not start it"),
        (TASK | {"SLURM_JOB_NAME": "bash"}, 1, 1, None),
        (ELASTIC | {"RANK": "0"}, 2, 1, None),
        (ELASTIC | {"RANK": "0"}, 2, 2, "torchrun starts 2 processes, and this run is to have 4"),
    ],
)
def test_processes_that_do_not_fit(environment: dict[str, str], devices: int, nodes: int, said: str | None) -> None:
    """Guards against processes that are each a run of their own, and against a run that waits for ever for others."""
    if said is None:
        check_processes(devices, nodes, environment)
        return
    with pytest.raises(InputError, match=said):
        check_processes(devices, nodes, environment)
