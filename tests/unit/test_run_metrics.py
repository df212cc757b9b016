"""metrics.jsonl, loggers and the report that is made of them."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from zoo.errors import FileFormatError
from zoo.train.metrics import Loggers, MetricsFile, Values, read_metrics
from zoo.train.report import write_report


class Recorder:
    """A logger that fails at one step."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.steps: list[int] = []
        self.finished = False
        self._fails_at = fails_at

    def log(self, step: int, values: Values) -> None:
        if step == self._fails_at:
            raise ConnectionError("no route")
        self.steps.append(step)

    def finish(self) -> None:
        self.finished = True


def test_resuming_cuts_what_is_done_again(tmp_path: Path) -> None:
    """Guards against steps that are there twice, and against a last line that a crash cut short."""
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    for step in range(1, 8):
        file.log(step, {"loss": 1 / step})
    file.finish()
    with path.open("a") as torn:
        torn.write('{"step": 8, "lo')
    assert [line["step"] for line in read_metrics(path)] == list(range(1, 8))
    resumed = MetricsFile(path, after=5)
    resumed.log(6, {"loss": 0.5})
    resumed.finish()
    lines = read_metrics(path)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert (lines[2]["loss"], lines[5]["loss"]) == (1 / 3, 0.5)


def test_a_damaged_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"stp": 2}\n{"step": 3}\n')
    with pytest.raises(FileFormatError, match=r"metrics\.jsonl:2 "):
        read_metrics(path)


def test_a_logger_that_fails_does_not_end_the_run(tmp_path: Path) -> None:
    """Guards a run of days against a dashboard that is down."""
    said: list[str] = []
    good, bad = Recorder(), Recorder(fails_at=2)
    loggers = Loggers(MetricsFile(tmp_path / "metrics.jsonl"), {"bad": bad, "good": good}, said.append)
    for step in (1, 2, 3):
        loggers.log(step, {"loss": 0.0})
    loggers.finish()
    assert (good.steps, bad.steps) == ([1, 2, 3], [1])
    assert (good.finished, bad.finished) == (True, False)
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 3
    assert len(said) == 1
    assert "'bad'" in said[0]
    assert "no route" in said[0]


class Page(HTMLParser):
    """What a page refers to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]


def test_report(tmp_path: Path) -> None:
    """Guards a page that needs nothing else, draws what was measured, and shows markup as text."""
    with (tmp_path / "metrics.jsonl").open("w") as file:
        for step in range(1, 61):
            file.write(json.dumps({"step": step, "loss": 2 - step / 60, "lr": 1e-4, "peak_memory": 2**30}) + "\n")
    samples = [{"step": s, "prompt": "<i>?", "expected": "yes", "text": f"<b>{s}</b>"} for s in (0, 30, 60)]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    (tmp_path / "recipe.yaml").write_text("model: gpt2\n")
    text = write_report(tmp_path, title="a run", facts={"model": "<gpt2>"}).read_text()
    page = Page(text)
    assert page.tags.count("svg") == 3
    assert not [link for link in page.links if not link.startswith("#")]
    assert "script" not in page.tags
    assert not {"i", "gpt2"} & set(page.tags)
    assert re.findall(r"&lt;b&gt;(\d+)&lt;/b&gt;", text) == ["0", "60"]
    assert "model: gpt2" in text
