"""The E2E data set, ``meaning||text`` lines, as alpaca records: those to train on, and meanings that are held out.

    python benchmarks/e2e_records.py e2e_nlg_valid.txt DIRECTORY

Several people have described each meaning, so the records are divided by meaning: ``train.json``; ``val.json``, with one
record of each that is held out; and ``references.json``, which maps those to all of their descriptions.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

INSTRUCTION = "Describe the restaurant in one sentence."
N_HELD_OUT = 200


def main() -> None:
    """Write the three files."""
    source, directory = Path(sys.argv[1]), Path(sys.argv[2])
    directory.mkdir(parents=True, exist_ok=True)
    said: dict[str, list[str]] = {}
    for line in source.read_text(encoding="utf-8").splitlines():
        meaning, _, text = line.partition("||")
        said.setdefault(meaning.strip(), []).append(" ".join(text.split()))
    meanings = sorted(said)
    random.Random(0).shuffle(meanings)
    held_out, others = meanings[:N_HELD_OUT], meanings[N_HELD_OUT:]
    parts = {
        "train.json": [(meaning, text) for meaning in others for text in said[meaning]],
        "val.json": [(meaning, said[meaning][0]) for meaning in held_out],
    }
    for name, pairs in parts.items():
        records = [{"instruction": INSTRUCTION, "input": meaning, "output": text} for meaning, text in pairs]
        random.Random(1).shuffle(records)
        (directory / name).write_text(json.dumps(records, indent=1), encoding="utf-8")
        print(f"{directory / name}: {len(records)} records")
    references = {meaning: said[meaning] for meaning in held_out}
    (directory / "references.json").write_text(json.dumps(references, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
