"""Sums, made when they are asked for."""

import json
from pathlib import Path

from zoo.data.named import NamedDataset
from zoo.sources.base import Fetched, FetchOptions

OUTSIDER = NamedDataset(
    source="outsider-rows:sums", license="CC0", rows=30, columns={"prompt": "sum", "completion": "total"}
)


def fetch(address: str, destination: Path, options: FetchOptions) -> Fetched:
    rows = [{"sum": f"{n} + {n} =", "total": f" {2 * n}"} for n in range(30)]
    destination.mkdir(exist_ok=True)
    (destination / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Fetched(address)
