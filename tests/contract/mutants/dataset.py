"""Data sets with one thing wrong."""

from __future__ import annotations

from dataclasses import replace

from zoo.data.named import NamedDataset

GOOD = NamedDataset(
    source=f"https://example.org/rows.jsonl#sha256={'0' * 64}",
    license="MIT",
    columns={"prompt": "question", "completion": "answer"},
)
NO_LICENSE = replace(GOOD, license="")
NO_DIGEST = replace(GOOD, source="https://example.org/rows.jsonl")
NOBODY_READS_IT = replace(GOOD, source="gopher://example.org/rows.jsonl")
OTHER_COLUMN = replace(GOOD, columns={"prompt": "question", "completion": "reply"})
ONE_COLUMN_TWICE = replace(GOOD, columns={"prompt": "question", "completion": "question"})
