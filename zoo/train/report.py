"""``report.html``: a run on one page that needs nothing else, with its curves, samples and recipe."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2

from zoo.train.metrics import read_metrics, series

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TRAIN, VALIDATION = "#4c78a8", "#e45756"


@dataclass(frozen=True)
class Curve:
    """One picture: a key of the metrics over the steps."""

    title: str
    unit: str
    keys: tuple[tuple[str, str, str], ...]
    """Key, name in the legend, colour."""
    scale: float = 1.0
    noisy: bool = True
    """Whether a long one is drawn with its moving average."""
    axis: str = "linear"
    """``linear``, ``log``, or ``from zero``."""


CURVES = (
    Curve("Loss", "nats per token", (("loss", "training", TRAIN), ("val_loss", "validation", VALIDATION))),
    Curve("Learning rate", "", (("lr", "learning rate", TRAIN),), noisy=False),
    Curve("Gradient norm", "", (("grad_norm", "gradient norm", TRAIN),), axis="log"),
    Curve("Throughput", "tokens per second", (("tokens_per_second", "throughput", TRAIN),), axis="from zero"),
    Curve("Peak memory", "GiB", (("peak_memory", "peak memory", TRAIN),), 2**-30, noisy=False, axis="from zero"),
)


def write_report(run: Path, *, title: str, facts: Mapping[str, str]) -> Path:
    """Write ``report.html`` from the files of a run directory.

    Args:
        facts: what stands on top: names and values.
    """
    lines = read_metrics(run / "metrics.jsonl")
    samples = _samples(run / "samples.jsonl")
    recipe = run / "recipe.yaml"
    page = _template().render(
        title=title,
        facts=facts,
        pictures=[picture for curve in CURVES if (picture := _picture(curve, lines))],
        samples=samples,
        recipe=recipe.read_text(encoding="utf-8") if recipe.exists() else "",
    )
    path = run / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _samples(path: Path) -> list[dict[str, Any]]:
    """Each prompt with its first and its last answer."""
    if not path.exists():
        return []
    by_prompt: dict[str, list[dict[str, Any]]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        sample = json.loads(line)
        by_prompt.setdefault(sample["prompt"], []).append(sample)
    return [{**taken[-1], "before": taken[0]["text"], "first": taken[0]["step"]} for taken in by_prompt.values()]


def _picture(curve: Curve, lines: Sequence[Mapping[str, Any]]) -> str | None:
    """An SVG element, or nothing where nothing was measured."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    drawn = [
        (steps, values, name, colour) for key, name, colour in curve.keys for steps, values in [series(lines, key)]
    ]
    if not any(steps for steps, *_ in drawn):
        return None
    with rc_context({"svg.hashsalt": curve.title, "font.size": 9}):
        figure = Figure(figsize=(5.6, 3.0), layout="constrained")
        axes = figure.add_subplot()
        for steps, values, name, colour in drawn:
            if steps:
                _draw(axes, steps, [value * curve.scale for value in values], name, colour, noisy=curve.noisy)
        axes.set_title(curve.title + (f" ({curve.unit})" if curve.unit else ""), loc="left")
        axes.set_xlabel("step")
        if curve.axis == "log":
            axes.set_yscale("log")
        elif curve.axis == "from zero":
            axes.set_ylim(bottom=0)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if len(drawn) > 1:
            axes.legend(frameon=False)
        text = io.StringIO()
        FigureCanvasSVG(figure).print_svg(text, metadata={"Date": None})  # type: ignore[no-untyped-call]
    svg = text.getvalue()
    return svg[svg.index("<svg") :]


def _draw(axes: Axes, steps: list[int], values: list[float], name: str, colour: str, *, noisy: bool) -> None:
    """A line; a long and noisy one pale, with its moving average on top."""
    if len(values) < 50 or not noisy:
        axes.plot(steps, values, color=colour, label=name, marker="o" if len(values) < 20 else None, markersize=3)
        return
    axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
    axes.plot(steps, _smoothed(values, max(1, len(values) // 25)), color=colour, label=name)


def _smoothed(values: Sequence[float], width: int) -> list[float]:
    """The mean of the last ``width`` values."""
    return [sum(part := values[max(0, i - width + 1) : i + 1]) / len(part) for i in range(len(values))]


def _template() -> jinja2.Template:
    source = Path(__file__).with_name("report.html.jinja").read_text(encoding="utf-8")
    return jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(source)
