"""A run as a SLURM job that goes on by itself: the script, and its submission."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from zoo.errors import InputError, UnavailableError, ZooError
from zoo.runs.processes import INTERACTIVE

SIGNALS = ("USR1", "TERM", "INT")
"""Those on which a run saves and ends with exit code 75."""
_OWN = (
    *("job-name", "nodes", "ntasks-per-node", "gpus-per-node", "cpus-per-task", "time", "partition", "account"),
    *("output", "open-mode", "signal", "requeue", "no-requeue"),
)
"""Options of sbatch that the script has already."""
_KEY = re.compile(r"[a-z][a-z-]*")

_SCRIPT = """\
#!/bin/bash
# Written by zoo slurm. Relative paths are those of the directory from which it is submitted.
{directives}

trap : TERM  # who preempts the job sends it to this shell too, which has to wait for the processes to save
{setup}
run={run}
command=({command})
if [ -e "$run/recipe.yaml" ]; then
    command+=(--resume)
fi

# The first process to end must not have the others killed: they may be writing what was trained.
srun --kill-on-bad-exit=0 --wait=0{srun} "${{command[@]}}"
code=$?
{requeue}exit "$code"
"""
_REQUEUE = """
# 75: a signal came, and the run is saved. A job that somebody cancelled stays so.
if [ "$code" -eq 75 ] && [[ "$(scontrol show job "$SLURM_JOB_ID")" != *JobState=CANCELLED* ]]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
"""


@dataclass(frozen=True, kw_only=True)
class SlurmJob:
    """A job.

    Attributes:
        arguments: zoo's, complete but for ``--resume``.
        run: the run's directory.
        tasks_per_node: processes on each node.
        time, partition, account: as sbatch takes them.
        signal: what SLURM sends to the processes, and how many seconds before the time is over.
        requeue: whether the job goes on after that, in the same run.
        sbatch, srun: further options, ``KEY=VALUE`` or ``KEY``.
        setup: lines of shell before the command: modules, variables.
        python: the interpreter.

    Raises:
        InputError: SLURM, or zoo, would make something else of a value than it says.
    """

    arguments: Sequence[str]
    run: str
    job_name: str
    nodes: int = 1
    tasks_per_node: int = 1
    gpus_per_node: int | None = None
    cpus_per_task: int | None = None
    time: str | None = None
    partition: str | None = None
    account: str | None = None
    output: str = "slurm-%x-%j.out"
    signal: str = "USR1@120"
    requeue: bool = True
    sbatch: Sequence[str] = ()
    srun: Sequence[str] = ()
    setup: Sequence[str] = ()
    python: str = sys.executable

    def __post_init__(self) -> None:
        name, _, seconds = self.signal.partition("@")
        if name not in SIGNALS or not seconds.isdecimal() or not 0 < int(seconds) <= 65535:
            raise InputError(
                f"--signal {self.signal} is not what a run saves on.",
                fix=f"Write NAME@SECONDS, with {', '.join(SIGNALS)} and up to 65535 seconds, such as USR1@120.",
            )
        if self.job_name in INTERACTIVE:
            raise InputError(
                f"the job name {self.job_name!r} stands for one in which a person works: each process would be a run.",
                fix="Give another --job-name.",
            )
        for option in self.sbatch:
            if option.partition("=")[0] in _OWN:
                raise InputError(f"--sbatch {option}: the script has that option itself.", fix="See: zoo slurm --help.")

    @property
    def directives(self) -> Iterator[str]:
        """The options of sbatch."""
        yield _option("job-name", self.job_name)
        yield _option("nodes", self.nodes)
        yield _option("ntasks-per-node", self.tasks_per_node)
        for name in ("gpus-per-node", "cpus-per-task", "time", "partition", "account"):
            if (value := getattr(self, name.replace("-", "_"))) is not None:
                yield _option(name, value)
        yield _option("output", self.output)
        yield _option("open-mode", "append")  # what was said before the job was requeued stays
        yield _option("signal", self.signal)
        yield "--requeue" if self.requeue else "--no-requeue"
        yield from map(_given, self.sbatch)

    def script(self) -> str:
        """What sbatch takes."""
        options = "".join(f" {shlex.quote(_given(option, quoted=False))}" for option in self.srun)
        return _SCRIPT.format(
            directives="\n".join(f"#SBATCH {option}" for option in self.directives),
            setup="".join(f"\n{_line(line)}" for line in self.setup) + "\n" * bool(self.setup),
            run=shlex.quote(self.run),
            command=shlex.join([self.python, "-m", "zoo", *self.arguments]),
            srun=options,
            requeue=_REQUEUE if self.requeue else "",
        )


def _given(option: str, *, quoted: bool = True) -> str:
    """``KEY=VALUE`` or ``KEY`` as an option of a program."""
    name, separator, value = option.partition("=")
    if not _KEY.fullmatch(name):
        raise InputError(f"{option!r} is no option.", fix="Write KEY=VALUE or KEY, without dashes: qos=long.")
    if not separator:
        return f"--{name}"
    return _option(name, value) if quoted else f"--{name}={_line(value)}"


def _option(name: str, value: object) -> str:
    """A directive: sbatch takes it apart as a shell does, at spaces and quotes."""
    text = _line(str(value))
    if not text or '"' in text or "\\" in text:
        raise InputError(f"--{name}: {text!r} can not be said in a line of sbatch.", fix="Leave quotes out.")
    return f'--{name}="{text}"' if re.search(r"[\s'#]", text) else f"--{name}={text}"


def _line(text: str) -> str:
    if "\n" in text or "\r" in text:
        raise InputError(f"{text!r} has several lines, and one is allowed.", fix="Give the option once for each line.")
    return text


def submit(script: str) -> str:
    """Hand a script to sbatch; what it says.

    Raises:
        UnavailableError: it is not here.
        ZooError: it refuses.
    """
    program = shutil.which("sbatch")
    if program is None:
        raise UnavailableError(
            "sbatch is not on the PATH, so no job can be submitted from here.",
            fix="Leave out --submit, and hand what is printed to sbatch where SLURM is.",
        )
    done = subprocess.run([program], input=script, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ZooError(f"sbatch refuses the job: {done.stderr.strip() or f'exit code {done.returncode}'}")
    return done.stdout.strip()
