"""``zoo generate MODEL --prompt TEXT`` continues a prompt; ``--batch FILE`` does so for every line of a file."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from zoo.cli.app import App, ZooCommand, json_option, note, pass_app, print_json
from zoo.cli.model_options import load_from_options, loading_options, make_samplers, print_stats, sampling_options
from zoo.cli.torch_process import import_torch
from zoo.errors import InputError, ZooError

WINDOW_BATCHES = 16
"""So many batches are read ahead of a file, to sort their lines by length."""
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
_ONLY_PROMPT = {"num_samples": "--num-samples", "as_json": "--json", "speculate": "--speculate", "draft": "--draft"}


@click.command(cls=ZooCommand)
@click.argument("model")
@click.option("--prompt", help="Text to continue; - reads it from standard input.")
@click.option("--batch", "source", metavar="FILE", help="Continue every line of this JSON lines file (- is stdin).")
@click.option("--out", metavar="FILE", help="Where --batch writes its JSON lines. [default: standard output]")
@click.option("--batch-size", type=int, help="Prompts, or samples, that run together. [default: 16]")
@click.option("--max-new-tokens", type=int, help="[default: 128, or what the context has room for]")
@click.option("--num-samples", type=int, help="Independent continuations. [default: 1]")
@click.option("--speculate", type=click.Choice(["ngram"]), help="Draft tokens from earlier text with the same words.")
@click.option("--draft", metavar="MODEL", help="Draft tokens with a smaller model of the same vocabulary.")
@click.option("--draft-tokens", type=int, help="Tokens drafted at a time. [default: 5]")
@sampling_options
@loading_options
@json_option
@pass_app
def command(app: App, /, model: str, **options: Any) -> None:
    """Continue a prompt. MODEL is a registry name, a directory, a GGUF file or hf:org/name."""
    own = ("prompt", "source", "out", "batch_size", "max_new_tokens", "num_samples", "speculate", "draft")
    given = {name: options.pop(name) for name in (*own, "draft_tokens", "stop", "stats", "as_json")}
    sampling = {name: value for name in _SAMPLING if (value := options.pop(name)) is not None}
    if samplers := options.pop("samplers"):
        import_torch()
        sampling["extra"] = make_samplers(app, samplers)
    _check_together(given, compiled=options["compile"])
    _check_early(sampling, given)
    if given["source"] is not None:
        _run_file(given, sampling, lambda: load_from_options(app, model, **options))
        return
    text = sys.stdin.read() if given["prompt"] == "-" else given["prompt"]
    if not text:
        raise InputError("the prompt is empty.", fix="Give --prompt some text to continue.")
    lm = load_from_options(app, model, **options)
    options |= {"revision": None, "compile": False}  # the revision is the model's; drafting is not compiled
    draft = load_from_options(app, given["draft"], **{**options, "adapter": ()}) if given["draft"] is not None else None
    replies = _replies(lm, draft, text, given, sampling)
    if given["as_json"]:
        results = [_result(reply.read(), text, lm) for reply in replies]
        print_json(results[0] if given["num_samples"] in (None, 1) else results)
    else:
        _show(replies, text, stats=given["stats"])


def _check_together(given: dict[str, Any], *, compiled: bool) -> None:
    """Refuse options of which one would be ignored."""
    batch = given["source"] is not None
    if batch == (given["prompt"] is not None):
        raise InputError("give either --prompt TEXT or --batch FILE" + (", not both." if batch else "."))
    for name, flag in _ONLY_PROMPT.items():
        if batch and given[name]:
            raise InputError(f"{flag} has no meaning with --batch.", fix="Leave it out, or take --prompt.")
    if compiled and (batch or given["num_samples"] not in (None, 1)):
        raise InputError("--compile serves one text at a time.", fix="Leave it out with --batch and --num-samples.")
    if not batch and given["out"] is not None:
        raise InputError("--out has no meaning without --batch.", fix="Redirect standard output.")
    speculating = given["draft"] is not None or given["speculate"] is not None
    if given["draft"] is not None and given["speculate"] is not None:
        raise InputError("give either --speculate or --draft, not both.")
    if given["draft_tokens"] is not None and not speculating:
        raise InputError("--draft-tokens has no meaning without --speculate or --draft.")
    if given["batch_size"] is not None and not batch and (speculating or given["num_samples"] in (None, 1)):
        raise InputError("--batch-size has no meaning here: one text runs at a time.")


def _check_early(sampling: dict[str, Any], given: dict[str, Any]) -> None:
    """Refuse values out of range before a model is fetched and loaded."""
    import_torch()
    from zoo.generate.sampling import SamplingOptions
    from zoo.generate.stopping import StopStrings

    SamplingOptions(**sampling)
    StopStrings(given["stop"])
    for name in ("max_new_tokens", "num_samples", "batch_size", "draft_tokens"):
        if given[name] is not None and given[name] < 1:
            raise InputError(f"--{name.replace('_', '-')} must be at least 1, not {given[name]}.")


def _replies(lm: Any, draft: Any, text: str, given: dict[str, Any], sampling: dict[str, Any]) -> Iterable[Any]:
    """Samples as a batch, or one after the other where tokens are drafted."""
    n_samples = given["num_samples"] or 1
    options = {"max_new_tokens": given["max_new_tokens"], "stop": given["stop"], **sampling}
    if draft is not None or given["speculate"] is not None:
        options["drafter"] = lm.drafter(draft)
        if given["draft_tokens"] is not None:
            options["draft_tokens"] = given["draft_tokens"]
    elif n_samples > 1:
        if given["batch_size"] is not None:
            options["batch_size"] = given["batch_size"]
        return iter(lm.generate_batch([text] * n_samples, **options))
    return (lm.generate(text, stream=True, sample=sample, **options) for sample in range(n_samples))


def _show(replies: Iterable[Any], text: str, *, stats: bool) -> None:
    for number, reply in enumerate(replies):
        click.echo(("\n" if number else "") + text, nl=False)
        click.echo(reply.text, nl=False)
        for piece in reply:
            click.echo(piece, nl=False)
            sys.stdout.flush()
        click.echo()
        if stats:
            print_stats(reply.stats)
            if reply.stats.acceptance_rate is not None:
                note(
                    f"{reply.stats.accepted_tokens} of {reply.stats.drafted_tokens} drafted tokens accepted"
                    f" ({reply.stats.acceptance_rate:.0%})"
                )


def _result(reply: Any, prompt: str, lm: Any) -> dict[str, Any]:
    return {
        "prompt": prompt,
        "text": reply.text,
        "ids": reply.ids,
        "finish_reason": reply.finish_reason,
        "precision": lm.precision,
        "attention": lm.attention,
        "stats": reply.stats.to_dict(),
    }


def _run_file(given: dict[str, Any], sampling: dict[str, Any], load: Callable[[], Any]) -> None:
    """Answer a file of prompts. Files are opened before the model is loaded."""
    from zoo.generate.jobs import Job

    with _reading(given["source"]) as lines, _writing(given["out"]) as write:
        lm = load()
        size = given["batch_size"] or 16
        defaults = {"max_new_tokens": given["max_new_tokens"], "stop": given["stop"], **sampling}

        def make_request(prompt: Any, options: dict[str, Any], number: int) -> Any:
            # A seed of the line's own begins a stream of its own; lines that share one get a stream each.
            sample = 0 if "seed" in options else number - 1
            request = lm.request(prompt, sample=sample, **{**defaults, **options})
            request.check(lm.spec)
            return request

        job = Job(make_request, lambda requests: lm.run(requests, batch_size=size), write, window=size * WINDOW_BATCHES)
        done = job.work(lines)
    rate = done.new_tokens / max(done.seconds, 1e-9)
    note(f"{done.lines} lines, {done.new_tokens} new tokens in {done.seconds:.1f} s ({rate:.1f} tokens/s)")
    if given["stats"]:
        note(f"{done.prompt_tokens} prompt tokens | peak memory {done.peak_memory / 2**30:.2f} GiB")
    if done.failed:
        raise ZooError(f"{done.failed} of {done.lines} lines failed. The first is {done.first_error}")


@contextmanager
def _reading(path: str) -> Iterator[Iterable[bytes]]:
    try:
        with click.open_file(path, "rb") as file:
            yield file
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        if error.filename != path:
            raise
        raise InputError(f"can not read {path}: {error.strerror}.") from None


@contextmanager
def _writing(path: str | None) -> Iterator[Callable[[str], None]]:
    """A function that writes a line at once, so that an interrupted job has written what it finished."""
    if path is None or path == "-":
        yield click.echo
        return
    target = Path(path)
    if target.exists() and target.stat().st_size:
        raise InputError(f"{path} exists and is not empty.", fix="Choose another file, or remove it.")
    try:
        file = target.open("w", encoding="utf-8", buffering=1)
    except OSError as error:
        raise InputError(f"can not write {path}: {error.strerror}.") from None
    with file:

        def write(line: str) -> None:
            try:
                file.write(line + "\n")
            except OSError as error:
                raise ZooError(f"can not write {path}: {error.strerror}.") from None

        yield write
