"""What each process of a training sees when one of them goes wrong around a checkpoint: zoo's store and ``fabric.save``.

    python benchmarks/hang_table.py > benchmarks/results/hang_table.md

Real processes over gloo, on the CPU. zoo's ranks wait 3 s for each other; a process that is alive after 25 s has hung.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
WORKER = ROOT / "tests" / "e2e" / "hang_worker.py"
HUNG = 25.0
CASES = {
    "only_rank_0_saves": "only rank 0 saves; all go on to the next step",
    "only_rank_0_saves_before_a_barrier": "only rank 0 saves; then `fabric.barrier()` and the next step",
    "only_rank_0_saves_by_torch": "only rank 0 calls `torch.save(model.state_dict())`; then `fabric.barrier()`",
    "other_step_on_rank_1": "rank 1 saves step 4, the others step 3",
    "other_shapes_on_rank_1": "a second model in the state has another shape on rank 1",
    "other_names_on_rank_1": "a second model in the state has other names on rank 1",
    "one_batch_more_on_rank_1": "rank 1 has one batch more than the others, who save",
    "rank_0_can_not_write": "rank 0 gets an error while it writes",
    "rank_0_is_killed": "rank 0 is killed; the others save",
    "rank_1_is_killed": "rank 1 is killed; the others save",
    "rank_1_is_in_an_all_reduce": "rank 1 is in an all-reduce of its own; the others save",
}
BARE_ONLY = {"only_rank_0_saves_by_torch"}
COLUMNS = [
    ("zoo", "ddp", 2),
    ("zoo", "fsdp2", 2),
    ("zoo", "ddp", 3),
    ("zoo", "fsdp2", 3),
    ("fabric", "ddp", 2),
    ("fabric", "fsdp2", 2),
]
NAMES = {"ddp": "DDP", "fsdp2": "FSDP2", "zoo": "zoo", "fabric": "fabric.save"}


@dataclass(frozen=True)
class Cell:
    """One case with one way of saving: how each rank ended, and what is wrong with what was written."""

    ranks: list[dict[str, Any]]
    file: str

    def short(self, is_fault: bool) -> str:
        """For the table."""
        if all(rank["how"] == "went on" for rank in self.ranks):
            return f"**{self.file}**" if self.file else "**nobody is told**" if is_fault else "fine"
        groups: dict[str, list[int]] = {}
        for number, rank in enumerate(self.ranks):
            groups.setdefault(rank["how"], []).append(number)
        parts = []
        for how, numbers in groups.items():
            who = "" if len(groups) == 1 else f"{', '.join(map(str, numbers))} "
            seconds = max(self.ranks[number]["seconds"] for number in numbers)
            parts.append(
                f"{who}**hung**"
                if how == "hung"
                else f"{who}{how}" + (f" {seconds:.1f} s" if how in ("raised", "ended") else "")
            )
        return "; ".join(parts) + (f"; **{self.file}**" if self.file else "")


def run(cases: Sequence[str], columns: Sequence[tuple[str, str, int]], out: Path) -> dict[tuple[str, int], Cell]:
    """By case and column. zoo has no call that one rank alone may make, so it is not in the cases of `BARE_ONLY`."""
    jobs, where = [], []
    for case in cases:
        for number, (saver, strategy, world) in enumerate(columns):
            if saver == "fabric" or case not in BARE_ONLY:
                path = str(out / f"{saver}-{strategy}-{world}-{case}")
                limit = HUNG if saver == "fabric" else 60.0
                jobs.append(
                    {"saver": saver, "strategy": strategy, "world": world, "cases": [case], "out": path, "limit": limit}
                )
                where.append((case, number))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(WORKER), "jobs", str(out / "results.json")]
    work = json.dumps({"jobs": jobs, "at_once": 1})
    subprocess.run(command, input=work, text=True, env=environment, check=True)
    found = {}
    for at, job, ranks in zip(where, jobs, json.loads((out / "results.json").read_text()), strict=True):
        look = wrong_in_store if job["saver"] == "zoo" else wrong_in_file
        found[at] = Cell([rank[at[0]] for rank in ranks], look(Path(job["out"]) / at[0]))
    return found


def wrong_in_store(directory: Path) -> str:
    """Whether anything but the step before is in a store of zoo's, or that one is not whole."""
    from zoo import CheckpointStore

    with CheckpointStore(directory, read_only=True) as store:
        return "" if store.verify() == {"step-00000002": []} else "a damaged store"


def wrong_in_file(directory: Path) -> str:
    """What is wrong with what `fabric.save` or `torch.save` left of the step, if it left something."""
    import torch

    path = directory / "step-3"
    if path.is_dir():  # of torch.distributed.checkpoint, which writes its metadata last
        return "" if (path / ".metadata").exists() else "an incomplete directory is left"
    if not path.exists():
        return ""
    state = torch.load(path, weights_only=False)
    tensors = [t for t in state.values() if isinstance(t, torch.Tensor)]
    here, whole = (sum(t.numel() for t in ts) for ts in ([getattr(t, "_local_tensor", t) for t in tensors], tensors))
    return "" if here == whole else f"a file with {here} of {whole} weights"


def first_line(message: str) -> str:
    """The first line, without what differs between machines and runs."""
    line = next(iter(message.splitlines()), "")
    return re.sub(r"\[[\d.]+\]:\d+", "PEER", line.replace(f"{sys.prefix}/", "").replace(f"{ROOT}/", ""))


def main() -> None:
    """Run everything and print markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", choices=list(CASES), help="only these")
    cases = parser.parse_args().case or list(CASES)
    with tempfile.TemporaryDirectory() as out:
        found = run(cases, COLUMNS, Path(out))
    print_head()
    print_table(cases, found)
    print_messages(cases, found)


def print_head() -> None:
    """When, where and with what."""
    from importlib.metadata import version

    what = ", ".join(f"{name} {version(name).partition('+')[0]}" for name in ("torch", "lightning"))
    print("# hang_table.py\n")
    print(
        f"{datetime.now(UTC):%Y-%m-%d}, {platform.system()} {platform.machine()}, {os.cpu_count()} cores; Python {platform.python_version()}, {what}."
    )
    print(
        "\nSeconds count from the moment at which all ranks had done the same. *raised*: an exception in the training loop.\n"
        "*ended*: a thread of zoo's printed the reason and ended the process, which was stuck in a collective (exit code 70).\n"
        f"**hung**: alive after {HUNG:g} s. zoo's ranks wait 3 s for one that does not come (600 s by default), and 3 s more for one\n"
        "that can not raise. The step before is whole in each of zoo's stores, and nothing else is there.\n"
    )


def print_table(cases: Sequence[str], found: dict[tuple[str, int], Cell]) -> None:
    """One row for each case."""
    heads = [f"{NAMES[saver]}, {NAMES[strategy]}, {world}" for saver, strategy, world in COLUMNS]
    print(f"| | {' | '.join(heads)} |")
    print("|---" * (len(COLUMNS) + 1) + "|")
    for case in cases:
        cells = [found[case, n].short(case not in BARE_ONLY) if (case, n) in found else "" for n in range(len(COLUMNS))]
        print(f"| {CASES[case]} | {' | '.join(cells)} |")


def print_messages(cases: Sequence[str], found: dict[tuple[str, int], Cell]) -> None:
    """The first line of what each process said, where there were two of them."""
    print("\nThe first line that each process said, of two:\n\n```", end="")
    for case in cases:
        print(f"\n{CASES[case]}".replace("`", ""))
        who: dict[str, list[str]] = {}
        for number, (saver, strategy, world) in enumerate(COLUMNS):
            cell = found.get((case, number))
            for rank, ending in enumerate(cell.ranks if cell and world == 2 else []):
                said = f"{ending['error']}: {first_line(ending['message'])}" if ending["message"] else ending["how"]
                who.setdefault(said, []).append(f"{NAMES[saver]} {NAMES[strategy]} {rank}")
        for said, speakers in who.items():
            print(f"  [{', '.join(speakers)}] {said}")
    print("```")


if __name__ == "__main__":
    main()
