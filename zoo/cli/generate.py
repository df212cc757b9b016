"""``zoo generate MODEL --prompt TEXT``: continue a prompt."""

from __future__ import annotations

import sys
from typing import Any

import click

from zoo.cli.app import App, ZooCommand, json_option, pass_app, print_json
from zoo.cli.model_options import load_from_options, loading_options, print_stats, sampling_options
from zoo.errors import InputError


@click.command(cls=ZooCommand)
@click.argument("model")
@click.option("--prompt", required=True, help="Text to continue; - reads it from standard input.")
@click.option("--max-new-tokens", type=int, help="[default: 128, or what the context has room for]")
@click.option("--num-samples", type=int, default=1, show_default=True, help="Independent continuations.")
@sampling_options
@loading_options
@json_option
@pass_app
def command(
    app: App,
    /,
    model: str,
    prompt: str,
    max_new_tokens: int | None,
    num_samples: int,
    stop: tuple[str, ...],
    stats: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Continue a prompt. MODEL is a registry name, a directory, a GGUF file or hf:org/name."""
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
    sampling = {name: options.pop(name) for name in names}
    if num_samples < 1:
        raise InputError(f"--num-samples must be at least 1, not {num_samples}.")
    _check_early(sampling, max_new_tokens, stop)
    text = sys.stdin.read() if prompt == "-" else prompt
    if not text:
        raise InputError("the prompt is empty.", fix="Give --prompt some text to continue.")
    lm = load_from_options(app, model, **options)
    results = []
    for sample in range(num_samples):
        reply = lm.generate(text, max_new_tokens=max_new_tokens, stop=stop, stream=True, sample=sample, **sampling)
        if as_json:
            results.append(_result(reply.read(), text, lm))
            continue
        click.echo(text, nl=False)
        for piece in reply:
            click.echo(piece, nl=False)
            sys.stdout.flush()
        click.echo("\n" if sample < num_samples - 1 else "")
        if stats:
            print_stats(reply.stats)
    if as_json:
        print_json(results[0] if num_samples == 1 else results)


def _check_early(sampling: dict[str, Any], max_new_tokens: int | None, stop: tuple[str, ...]) -> None:
    """Refuse values out of range before a model is fetched and loaded."""
    from zoo.generate.sampling import SamplingOptions
    from zoo.generate.stopping import StopStrings

    SamplingOptions(**{name: value for name, value in sampling.items() if value is not None})
    StopStrings(stop)
    if max_new_tokens is not None and max_new_tokens < 1:
        raise InputError(f"--max-new-tokens must be at least 1, not {max_new_tokens}.")


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
