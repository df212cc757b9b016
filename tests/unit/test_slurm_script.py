"""The script of a SLURM job, letter by letter."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from zoo.errors import InputError
from zoo.runs.slurm import SlurmJob

GOLDEN = Path(__file__).parents[1] / "data" / "slurm"
SMALL = SlurmJob(
    arguments=("pretrain", "gpt2", "--out", "runs/small"),
    run="runs/small",
    job_name="small",
    requeue=False,
    python="python",
)
LARGE = SlurmJob(
    arguments=("finetune", "hf:org/name", "--data", "my data.jsonl", "--out", "runs/it's", "--devices", "4"),
    run="runs/it's",
    job_name="large",
    nodes=2,
    tasks_per_node=4,
    gpus_per_node=4,
    cpus_per_task=8,
    time="1-12:00:00",
    partition="gpu",
    account="lab",
    output="logs/%x-%j.out",
    signal="TERM@60",
    sbatch=("exclusive", "comment=two words", "qos=long"),
    srun=("cpu-bind=cores", "container-image=/images/a b.sqsh"),
    setup=("module load cuda", "export HF_HOME=/scratch/$USER"),
    python="/opt/venv/bin/python",
)


@pytest.mark.parametrize("name", ["small", "large"])
def test_the_script(name: str) -> None:
    """Guards every line: a cluster is a place where nothing can be tried out. The files are what zoo should write."""
    script = {"small": SMALL, "large": LARGE}[name].script()
    assert script == (GOLDEN / f"{name}.sh").read_text()
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


@pytest.mark.parametrize("signal", ["USR2@60", "USR1", "USR1@", "USR1@0", "USR1@99999", "B:USR1@60", "usr1@60"])
def test_signals_on_which_no_run_saves(signal: str) -> None:
    """Guards against a run that SLURM ends without a checkpoint; ``B:`` would signal the shell alone."""
    with pytest.raises(InputError, match="not what a run saves on"):
        SlurmJob(arguments=(), run="r", job_name="j", signal=signal)


@pytest.mark.parametrize("option", ["time=3", "requeue", "output=x", "open-mode=truncate", "job-name=x"])
def test_options_that_are_there_already(option: str) -> None:
    """Guards against two directives, of which one counts."""
    with pytest.raises(InputError, match="has that option itself"):
        SlurmJob(arguments=(), run="r", job_name="j", sbatch=(option,))
