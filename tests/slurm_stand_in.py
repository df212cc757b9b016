"""Stand-ins for SLURM's programs: ``python -m tests.slurm_stand_in sbatch|srun|scontrol ARGUMENTS``.

They start real processes, with the variables and signals of the real ones as far as zoo has to do with them. A job runs
while sbatch waits. What was called is in ``calls.jsonl`` of the directory ``STAND_IN``.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

STATE = Path(os.environ.get("STAND_IN", "."))
LONGEST = 240.0


def install(directory: Path) -> dict[str, str]:
    """Programs in ``directory/bin``; the environment in which they are found."""
    programs = directory / "bin"
    programs.mkdir(parents=True)
    for name in ("sbatch", "srun", "scontrol"):
        program = programs / name
        program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m tests.slurm_stand_in {name} "$@"\n')
        program.chmod(0o755)
    root = str(Path(__file__).parents[1])
    return {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "STAND_IN": str(directory), "PYTHONPATH": root}


def calls(directory: Path, program: str) -> list[list[str]]:
    """The arguments of each call."""
    lines = (directory / "calls.jsonl").read_text().splitlines()
    return [arguments for name, *arguments in map(json.loads, lines) if name == program]


def sbatch(arguments: Sequence[str]) -> int:
    """Run the script from standard input until it is not requeued any more."""
    script = STATE / "job.sh"
    script.write_text(sys.stdin.read())
    given: dict[str, str] = {}
    for line in script.read_text().splitlines():
        if line.startswith("#SBATCH "):
            name, _, value = shlex.split(line.removeprefix("#SBATCH "))[0].removeprefix("--").partition("=")
            given[name] = value
    job, tasks = os.environ.get("STAND_IN_JOB", "4711"), int(given["nodes"]) * int(given["ntasks-per-node"])
    variables = {
        "SLURM_JOB_ID": job,
        "SLURM_JOB_NAME": given["job-name"],
        "SLURM_NNODES": given["nodes"],
        "SLURM_NTASKS": str(tasks),
        "SLURM_NTASKS_PER_NODE": given["ntasks-per-node"],
        "SLURM_NODELIST": "127.0.0.1",
        "SLURM_PROCID": "0",
        "STAND_IN_SIGNAL": given.get("signal", "").partition("@")[0],
        "STAND_IN_REQUEUE": str("requeue" in given),
    }
    output = given["output"].replace("%x", given["job-name"]).replace("%j", job)
    for count in range(9):
        counted = variables | ({"SLURM_RESTART_COUNT": str(count)} if count else {})
        with Path(output).open("a" if given.get("open-mode") == "append" else "w") as file:
            done = subprocess.run(
                ["bash", script], env={**os.environ, **counted}, stdout=file, stderr=file, check=False, timeout=LONGEST
            )
        _note("ended", [str(done.returncode)])
        if not (STATE / "requeued").exists():
            break
        (STATE / "requeued").unlink()
    sys.stdout.write(f"Submitted batch job {job}\n")
    return 0


def srun(arguments: Sequence[str]) -> int:
    """Start the tasks. In the first allocation they get the job's signal once STAND_IN_UNTIL is in a file."""
    options = [argument for argument in arguments if argument.startswith("--")]
    command = arguments[next(i for i, argument in enumerate(arguments) if not argument.startswith("--")) :]
    assert {"--kill-on-bad-exit=0", "--wait=0"} <= set(options)
    if (code := os.environ.get("STAND_IN_EXIT")) is not None:  # nothing is run
        return int(code)
    tasks = [
        subprocess.Popen(command, env={**os.environ, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)} | NODE)
        for rank in range(int(os.environ["SLURM_NTASKS"]))
    ]
    if "STAND_IN_UNTIL" in os.environ and "SLURM_RESTART_COUNT" not in os.environ:
        path, _, text = os.environ["STAND_IN_UNTIL"].partition("|")
        until = time.monotonic() + LONGEST
        while time.monotonic() < until and all(task.poll() is None for task in tasks):
            if Path(path).exists() and re.search(text, Path(path).read_text()):
                for task in tasks if os.environ["STAND_IN_SIGNAL"] else ():
                    task.send_signal(signal.Signals[f"SIG{os.environ['STAND_IN_SIGNAL']}"])
                break
            time.sleep(0.01)
    codes = [task.wait(LONGEST) for task in tasks]
    _note("tasks", [str(code) for code in codes])
    return max(code if code >= 0 else 128 - code for code in codes)


NODE = {"SLURM_NODEID": "0", "SLURM_STEP_ID": "0"}


def scontrol(arguments: Sequence[str]) -> int:
    """Show a job, or note that it is to be requeued."""
    if arguments[0] == "show":
        state = os.environ.get("STAND_IN_STATE", "RUNNING")
        sys.stdout.write(f"JobId={arguments[2]} JobName=x\n   JobState={state} Reason=None\n")
        return 0
    assert arguments == ["requeue", os.environ["SLURM_JOB_ID"]]
    if os.environ["STAND_IN_REQUEUE"] != "True":
        sys.stderr.write("Requested operation is presently disabled for job\n")
        return 1
    (STATE / "requeued").touch()
    return 0


def _note(name: str, arguments: Sequence[str]) -> None:
    with (STATE / "calls.jsonl").open("a") as file:
        file.write(json.dumps([name, *arguments]) + "\n")


if __name__ == "__main__":
    _note(sys.argv[1], sys.argv[2:])
    sys.exit({"sbatch": sbatch, "srun": srun, "scontrol": scontrol}[sys.argv[1]](sys.argv[2:]))
