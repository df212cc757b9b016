"""A small task that a model fails before it is shown, and data for it: departures of trains as sentences."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

CITIES = (
    "Berlin", "Oslo", "Madrid", "Lisbon", "Vienna", "Prague", "Warsaw", "Dublin", "Athens", "Helsinki", "Rome", "Paris",
    "Zurich", "Brussels", "Hamburg", "Porto", "Krakow", "Geneva", "Munich", "Milan", "Lyon", "Seville", "Bergen",
)  # fmt: skip
KINDS = ("IC", "ICE", "RE", "TGV", "EC")
N_TRAIN, N_VALIDATION, N_TEST = 1000, 40, 60


def departures(seed: int) -> Iterator[dict[str, str]]:
    """Pairs of a row of a timetable and its announcement, each once."""
    draw = random.Random(seed)
    seen = set()
    while True:
        start, end = draw.sample(CITIES, 2)
        train = f"{draw.choice(KINDS)} {draw.randint(10, 989)}"
        hour, minute, track = draw.randint(5, 23), draw.choice((0, 5, 10, 15, 20, 30, 40, 45, 50)), draw.randint(1, 24)
        delay = draw.choice((0, 0, 5, 10, 15, 25, 40, 60))
        cancelled = draw.random() < 0.15
        row = f"{train} | {start} > {end} | {hour:02}:{minute:02} | track {track} | "
        row += "cancelled" if cancelled else f"+{delay}"
        if row in seen:
            continue
        seen.add(row)
        yield {
            "prompt": row,
            "completion": _announcement(train, start, end, f"{hour:02}:{minute:02}", track, delay, cancelled),
        }


def _announcement(train: str, start: str, end: str, time: str, track: int, delay: int, cancelled: bool) -> str:
    if cancelled:
        return f"Attention! Train {train} from {start} to {end} at {time} is cancelled. We are sorry."
    if delay == 0:
        return f"Train {train} from {start} to {end} leaves at {time} from track {track}, on time."
    late = "one hour" if delay == 60 else f"{delay} minutes"
    return f"Train {train} from {start} to {end}, due at {time} on track {track}, is {late} late."


def write_data(directory: Path, seed: int = 7) -> dict[str, Path]:
    """Write ``train.jsonl``, ``val.jsonl`` and ``test.jsonl``; no row is in two of them."""
    directory.mkdir(parents=True, exist_ok=True)
    rows = departures(seed)
    paths = {}
    for name, count in (("train", N_TRAIN), ("val", N_VALIDATION), ("test", N_TEST)):
        paths[name] = directory / f"{name}.jsonl"
        lines = [json.dumps(next(rows)) + "\n" for _ in range(count)]
        paths[name].write_text("".join(lines), encoding="utf-8")
    return paths
