"""How long zoo takes to start, against what any command line with click takes.

Runs each command in turn, several times over, so that whatever else the machine does falls on all of them, and prints
the medians and their ratio to ``import click``. The target: ``--help`` within 3 times of it.

    python benchmarks/startup.py [--repetitions 20]
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from statistics import median

import click

BASELINE = "import click"
COMMANDS: dict[str, list[str]] = {
    BASELINE: ["-c", "import click"],
    "zoo --help": ["-m", "zoo", "--help"],
    "zoo list models": ["-m", "zoo", "list", "models"],
}
TARGETS = {"zoo --help": 3.0}
"""Greatest ratio to the baseline."""


def seconds(arguments: list[str]) -> float:
    """Wall time of one run of this Python. Built-ins only: what plugins cost is ``zoo plugins list``'s to say."""
    started = time.perf_counter()
    environment = {**os.environ, "ZOO_PLUGINS": ""}
    subprocess.run([sys.executable, *arguments], env=environment, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - started


def measure(repetitions: int) -> dict[str, list[float]]:
    """Times by command, after one run of each that is not counted: it fills the caches."""
    for arguments in COMMANDS.values():
        seconds(arguments)
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(repetitions):
        for name, arguments in COMMANDS.items():
            times[name].append(seconds(arguments))
    return times


@click.command()
@click.option("--repetitions", type=click.IntRange(min=3), default=20, show_default=True)
def main(repetitions: int) -> None:
    """Time the start of the command line."""
    times = measure(repetitions)
    baseline = median(times[BASELINE])
    click.echo(f"{'command':<18}{'median':>10}{'fastest':>10}{'ratio':>8}{'target':>10}")
    missed = []
    for name, measured in times.items():
        ratio = median(measured) / baseline
        target = TARGETS.get(name)
        told = "" if target is None else f"<= {target:g}"
        click.echo(f"{name:<18}{median(measured):>8.3f} s{min(measured):>8.3f} s{ratio:>8.2f}{told:>10}")
        if target is not None and ratio > target:
            missed.append(name)
    click.echo(f"{repetitions} interleaved runs of each, Python {sys.version.split()[0]}")
    if missed:
        raise click.ClickException(f"slower than its target: {', '.join(missed)}")


if __name__ == "__main__":
    main()
