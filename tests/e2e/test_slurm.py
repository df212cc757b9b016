"""``zoo slurm``: jobs that stand-ins for SLURM's programs run, with real processes and signals; and torchrun."""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests import reference, slurm_stand_in
from zoo.train.metrics import MEASURED
from zoo.train.recipe import Recipe, Use
from zoo.train.recipe_file import write_recipe

CLEAN = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "STAND_IN"))}
FAST = {**CLEAN, "OMP_NUM_THREADS": "1"}
TRAINING = ("--max-steps", 12, "--batch-size", 4, "--eval-every", 4, "--precision", "32-true", "--device", "cpu",
            "--max-seq-len", 64, "--lr", 0.01, "--set", "adapter.dropout=0.1")  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("slurm") / "model"
    reference.save_tiny_chat_model(directory)
    return directory


@pytest.fixture(scope="module")
def data(model: Path) -> Path:
    draw, path = random.Random(0), model.parent / "train.jsonl"
    rows = [{"prompt": f"{n}: " + "ab" * draw.randint(1, 9), "completion": f" {n % 7}!"} for n in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def zoo(
    *arguments: object, code: int = 0, cwd: Path | None = None, environment: Mapping[str, str] = {}
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "zoo", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env={**FAST, **environment}, check=False, cwd=cwd)
    assert done.returncode == code, done.stderr[-3000:]
    return done


def metrics(run: Path) -> list[dict[str, Any]]:
    """What is the same whenever a run is repeated."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in line.items() if key not in MEASURED} for line in lines]


def job_number() -> str:
    """Of a job whose processes meet at a port that is free: Lightning derives it from the last four digits."""
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port: int = probe.getsockname()[1]
        if 15000 <= port < 25000:
            return f"77{port - 15000:04d}"
        with socket.socket() as probe:
            number = random.randrange(15000, 25000)
            if probe.connect_ex(("127.0.0.1", number)):
                return f"77{number - 15000:04d}"


def test_a_job_goes_on_until_it_is_done(model: Path, data: Path, tmp_path: Path) -> None:
    """Guards the whole way: SLURM's signal, the save, exit code 75, the queue, and the same run to the bit after it.

    The other run has the processes that torchrun starts.
    """
    out, other = tmp_path / "run", tmp_path / "straight"
    training = ("finetune", model, "--data", data, *TRAINING)
    stand_in = slurm_stand_in.install(tmp_path / "slurm")
    stand_in |= {"STAND_IN_UNTIL": f'{out / "metrics.jsonl"}|"step": 6,', "STAND_IN_JOB": job_number()}
    done = zoo("slurm", "--ntasks-per-node", 2, "--output", tmp_path / "said-%j.txt", "--submit",
               "--", *training, "--out", out, cwd=tmp_path, environment=stand_in)  # fmt: skip
    assert f"Submitted batch job {stand_in['STAND_IN_JOB']}" in done.stdout
    assert slurm_stand_in.calls(tmp_path / "slurm", "tasks") == [["75", "75"], ["0", "0"]]
    assert slurm_stand_in.calls(tmp_path / "slurm", "ended") == [["75"], ["0"]]
    first, second = slurm_stand_in.calls(tmp_path / "slurm", "srun")
    assert "--resume" not in first
    assert second == [*first, "--resume"]
    said = (tmp_path / f"said-{stand_in['STAND_IN_JOB']}.txt").read_text()
    assert "SIGUSR1 came" in said
    assert said.count("gradients  every one of the") == 2  # of rank 0, in each allocation
    assert "going on from step" in said
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", 2, "--standalone", "-m", "zoo"]
    command = [*launch, *training, "--out", other, "--devices", 2]
    straight = subprocess.run(list(map(str, command)), env=FAST, capture_output=True, text=True, check=False)
    assert straight.returncode == 0, straight.stderr[-3000:]
    assert straight.stderr.count("gradients  every one of the") == 1
    assert [line["step"] for line in metrics(out) if "loss" in line] == list(range(1, 13))
    assert metrics(out) == metrics(other)
    trained = "adapter/adapter_model.safetensors"
    assert (out / trained).read_bytes() == (other / trained).read_bytes()


@pytest.fixture(scope="module")
def script(model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A job for a run in the working directory."""
    folder = tmp_path_factory.mktemp("script")
    command = ("finetune", model, "--data", data, *TRAINING, "--out", "my run")
    return zoo("slurm", "--setup", "export FROM_SETUP='a b'", "--", *command, cwd=folder).stdout


def submit(script: str, folder: Path, **more: str) -> subprocess.CompletedProcess[str]:
    """Run a script in which srun starts nothing."""
    environment = {**FAST, **slurm_stand_in.install(folder / "slurm"), "STAND_IN_EXIT": "0", **more}
    return subprocess.run(
        ["sbatch"], input=script, env=environment, cwd=folder, capture_output=True, text=True, check=True
    )


@pytest.mark.parametrize(
    ("code", "state", "requeued"),
    [("0", "RUNNING", 0), ("1", "RUNNING", 0), ("70", "RUNNING", 0), ("75", "CANCELLED by 7", 0), ("75", "RUNNING", 8)],
)
def test_when_a_job_is_requeued(code: str, state: str, requeued: int, script: str, tmp_path: Path) -> None:
    """Guards a job that failed, or that somebody cancelled, against running for ever; and its exit code."""
    submit(script, tmp_path, STAND_IN_EXIT=code, STAND_IN_STATE=state)
    ended = slurm_stand_in.calls(tmp_path / "slurm", "ended")
    assert set(map(tuple, ended)) == {(code,)}
    assert len(ended) == (9 if requeued else 1)
    asked = [call for call in slurm_stand_in.calls(tmp_path / "slurm", "scontrol") if call[0] == "requeue"]
    assert len(asked) == (9 if requeued else 0)


def test_a_run_that_is_there_is_gone_on_with(script: str, model: Path, data: Path, tmp_path: Path) -> None:
    """Guards names with spaces, the command's order, and --resume where there is a run, and only there."""
    submit(script, tmp_path)
    (tmp_path / "my run").mkdir()
    (tmp_path / "my run" / "recipe.yaml").write_text("")
    again = tmp_path / "slurm"
    again.rename(tmp_path / "first")
    submit(script, tmp_path)
    (fresh,), (resumed,) = (slurm_stand_in.calls(tmp_path / name, "srun") for name in ("first", "slurm"))
    command = ["finetune", model, "--data", data, *TRAINING, "--out", "my run", "--devices", 1, "--num-nodes", 1]
    assert fresh == ["--kill-on-bad-exit=0", "--wait=0", sys.executable, "-m", "zoo", *map(str, command)]
    assert resumed == [*fresh, "--resume"]


def test_lines_of_setup_are_run(script: str, tmp_path: Path) -> None:
    """Guards the environment that modules and variables make for the processes."""
    probe = script.replace("\ncode=$?", '\nprintf "%s" "$FROM_SETUP" > seen\ncode=0')
    submit(probe, tmp_path)
    assert (tmp_path / "seen").read_text() == "a b"


def test_processes_that_do_not_fit(model: Path, data: Path, tmp_path: Path) -> None:
    """Guards against processes that each do a whole run, in one directory."""
    environment = {"SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "1"}
    base = ("finetune", model, "--data", data, *TRAINING, "--out", tmp_path / "run")
    done = zoo(*base, code=2, environment=environment)
    assert "srun starts 2 processes" in done.stderr
    assert not (tmp_path / "run").exists()


def test_pretraining(tmp_path: Path) -> None:
    """Guards the other command, and the run's directory where the command names none."""
    command = ("pretrain", "gpt2", "--data", "x", "--tokenizer", "char", "--max-steps", 5)
    printed = zoo("slurm", "--nodes", 2, "--gpus-per-node", 2, "--", *command, cwd=tmp_path).stdout
    assert f"{' '.join(map(str, command))} --out runs/pretrain-gpt2 --devices 2 --num-nodes 2)" in printed
    assert "\nrun=runs/pretrain-gpt2\n" in printed
    assert "--job-name=pretrain-gpt2\n" in printed


@pytest.mark.parametrize(
    ("options", "command", "code", "said"),
    [
        ((), (), 2, "a job runs finetune or pretrain"),
        ((), ("generate", "gpt2"), 2, "not 'generate'"),
        ((), ("finetune", "gpt2", "--data", "x", "--devices", 2), 2, "given by --ntasks-per-node"),
        ((), ("finetune", "gpt2", "--data", "x", "--num-nodes", 2), 2, "given by --nodes"),
        ((), ("finetune", "gpt2", "--data", "x", "--resume"), 2, "given by the script itself"),
        ((), ("finetune", "gpt2", "--data", "x", "--set", "devices=3", "--batch-size", 3), 2, "--set devices"),
        ((), ("finetune", "gpt2", "--data", "x", "--lrr", 1), 2, "No such option"),
        ((), ("finetune", "gpt2"), 2, "data is missing: give --data"),
        (("--nodes", 3), ("finetune", "gpt2", "--data", "x"), 2, "does not divide into 3 processes"),
        (("--nodes", 0), ("finetune", "gpt2", "--data", "x"), 2, "x>=1"),
        (("--signal", "USR2@60"), ("finetune", "gpt2", "--data", "x"), 2, "--signal USR2@60"),
        (("--signal", "USR1"), ("finetune", "gpt2", "--data", "x"), 2, "USR1@120"),
        (("--job-name", "bash"), ("finetune", "gpt2", "--data", "x"), 2, "each process would be a run"),
        (("--sbatch", "nodes=4"), ("finetune", "gpt2", "--data", "x"), 2, "has that option itself"),
        (("--sbatch", "--qos=x"), ("finetune", "gpt2", "--data", "x"), 2, "without dashes"),
        (("--setup", "a\nb"), ("finetune", "gpt2", "--data", "x"), 2, "several lines"),
        (("--partition", 'a"b'), ("finetune", "gpt2", "--data", "x"), 2, "can not be said"),
        (("--output", "r/slurm.txt"), ("finetune", "gpt2", "--data", "x", "--out", "r"), 2, "which the run makes"),
        ((), ("finetune", "gpt2", "--data", "x", "--out", "."), 2, "is not empty"),
        (("--submit",), ("finetune", "gpt2", "--data", "x"), 3, "sbatch is not on the PATH"),
    ],
)
def test_bad_input(
    options: tuple[object, ...], command: tuple[object, ...], code: int, said: str, tmp_path: Path
) -> None:
    """Guards against a job that waits for hours in a queue to fail at once."""
    (tmp_path / "file").touch()
    done = zoo("slurm", *options, "--", *command, code=code, cwd=tmp_path, environment={"PATH": "/usr/bin:/bin"})
    assert said in done.stderr
    assert not done.stdout
    assert "Traceback" not in done.stderr


def test_sbatch_refuses(tmp_path: Path) -> None:
    """Guards the message of sbatch, which says what is wrong with a partition or an account."""
    (tmp_path / "sbatch").write_text("#!/bin/sh\necho 'invalid partition' >&2\nexit 1\n")
    (tmp_path / "sbatch").chmod(0o755)
    path = {"PATH": f"{tmp_path}:{CLEAN['PATH']}"}
    done = zoo("slurm", "--submit", "--", "finetune", "gpt2", "--data", "x", code=1, cwd=tmp_path, environment=path)
    assert "sbatch refuses the job: invalid partition" in done.stderr


def test_another_recipe_in_the_same_run(model: Path, data: Path, tmp_path: Path) -> None:
    """Guards against a job that would find out in the queue that its run was begun with other options."""
    (tmp_path / "run").mkdir()
    write_recipe(Recipe(model="gpt2", data="x", out="run", lr=0.5), tmp_path / "run" / "recipe.yaml")
    base = ("slurm", "--", "finetune", "gpt2", "--data", "x", "--out", "run")
    assert "lr was 0.5 and is None" in zoo(*base, code=2, cwd=tmp_path).stderr
    assert "--resume" in zoo(*base, "--lr", 0.5, cwd=tmp_path).stdout
    (tmp_path / "pre").mkdir()
    whole = Recipe(task="pretrain", model="gpt2", data="x", out="pre", max_steps=5, adapter=Use(use="full"))
    write_recipe(whole, tmp_path / "pre" / "recipe.yaml")
    zoo("slurm", "--", "pretrain", "gpt2", "--data", "x", "--out", "pre", "--max-steps", 5, cwd=tmp_path)
