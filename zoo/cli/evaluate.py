"""``zoo evaluate MODEL --data FILE``: perplexity, bits per byte, and answers that are exactly right."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

import click

from zoo.cli.app import App, ZooCommand, json_option, note, pass_app, print_json
from zoo.cli.model_options import load_from_options, loading_options
from zoo.cli.torch_process import import_torch
from zoo.errors import InputError

if TYPE_CHECKING:
    from zoo.runs.evaluation import Evaluation, ExactMatch

LINE_SECONDS = 10.0
"""How often a line tells of the progress, where nobody watches a bar."""
_COUNTS = ("max_samples", "max_new_tokens", "max_seq_len", "stride", "batch_size")


@click.command(cls=ZooCommand)
@click.argument("model")
@click.option("--data", required=True, metavar="FILE", help="A file, a directory, a data set's name or hf:org/name.")
@click.option("--prompt-style", metavar="NAME", help="See: zoo list prompts. [default: the adapter's, or the model's]")
@click.option("--max-samples", type=int, metavar="N", help="The first N examples only.")
@click.option("--exact-match", is_flag=True, help="Answer the prompts too, and compare.")
@click.option("--max-new-tokens", type=int, help="Of an answer. [default: 16 more than the data's has]")
@click.option("--max-seq-len", type=int, help="Tokens of an example or a window. [default: the model's context]")
@click.option("--stride", type=int, help="Tokens by which the windows of a text move on. [default: all of a window]")
@click.option("--batch-size", type=int, default=16, show_default=True, help="Rows computed at a time.")
@loading_options
@json_option
@pass_app
def command(app: App, /, model: str, data: str, **options: Any) -> None:
    """Say how good MODEL is on data.

    MODEL is a registry name, a directory, a run, a GGUF file or hf:org/name. Of examples, what the assistant says
    counts; a text (*.txt) or a token file counts as a whole. A validation set is taken where the data has one.
    """
    own = {name: options.pop(name) for name in (*_COUNTS, "prompt_style", "exact_match", "as_json")}
    _check(own, compiled=options["compile"])
    import_torch()
    from zoo.runs.evaluation import evaluate
    from zoo.runs.evaluation_data import read_evaluation_data

    as_json, max_samples = own.pop("as_json"), own.pop("max_samples")
    read = read_evaluation_data(data, app.registry, max_samples=max_samples, report=note)
    lm = load_from_options(app, model, **options)
    with Progress() as progress:
        found = evaluate(lm, read, app.registry, report=note, watch=progress, **own)
    if as_json:
        print_json(found.to_dict())
    else:
        _print(found)


def _check(own: dict[str, Any], *, compiled: bool) -> None:
    for name in _COUNTS:
        if own[name] is not None and own[name] < 1:
            raise InputError(f"--{name.replace('_', '-')} must be at least 1, not {own[name]}.")
    if own["max_new_tokens"] is not None and not own["exact_match"]:
        raise InputError("--max-new-tokens has no meaning without --exact-match.")
    if compiled:
        raise InputError("--compile serves one text at a time.", fix="Leave it out.")


def _print(found: Evaluation) -> None:
    facts = {"data": f"{found.data}: {found.format}"}
    if found.counts is not None:
        facts["data"] += f", {found.counts['n_kept']:,} examples, prompt style {found.style}"
    else:
        facts["windows"] = f"{found.window:,} tokens, of which each but the first predicts {found.stride:,}"
    if found.left_out:
        facts["left out"] = found.left_out
    facts["loss"] = f"{found.loss:.4f} nats per token, of {found.n_tokens:,}"
    facts["perplexity"] = f"{found.perplexity:.4f}"
    if found.bits_per_byte is not None:
        facts["bits per byte"] = f"{found.bits_per_byte:.4f}, of {found.n_bytes:,}"
    if found.exact is not None:
        facts["exact match"] = _describe(found.exact)
    width = max(map(len, facts))
    for name, value in facts.items():
        click.echo(f"{name:>{width}}  {value}")


def _describe(exact: ExactMatch) -> str:
    said = f"{exact.n_right:,} of {exact.n_asked:,}"
    if exact.share is not None:
        said += f" ({exact.share:.1%})"
    if exact.n_unfinished:
        said += f"; {exact.n_unfinished:,} answers did not end within --max-new-tokens"
    if exact.n_not_asked:
        said += f"; {exact.n_not_asked:,} prompts were not asked: with their answers they exceed the context"
    return said


class Progress:
    """A bar for each thing that is counted, where somebody watches; elsewhere a line now and then."""

    def __init__(self) -> None:
        self._bars: Any = None
        self._tasks: dict[str, Any] = {}
        self._told = time.monotonic()

    def __enter__(self) -> Progress:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import Progress as Bars

            self._bars = Bars(console=Console(stderr=True), transient=True)
            self._bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bars is not None:
            self._bars.stop()

    def __call__(self, what: str, done: int, of: int) -> None:
        """So much is done."""
        if self._bars is not None:
            if what not in self._tasks:
                self._tasks[what] = self._bars.add_task(what, total=of)
            self._bars.update(self._tasks[what], completed=done)
        elif time.monotonic() - self._told >= LINE_SECONDS:
            self._told = time.monotonic()
            note(f"{done} of {of} {what}")
