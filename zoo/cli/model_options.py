"""Options of every command that loads a model."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from zoo.cli.app import App, note
from zoo.cli.torch_process import import_torch
from zoo.errors import InputError

if TYPE_CHECKING:
    from zoo.api import LanguageModel

F = TypeVar("F", bound=Callable[..., Any])

_LOADING = [
    click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, mps."),
    click.option("--precision", default="auto", show_default=True, help="See: zoo list precisions."),
    click.option("--attention", default="auto", show_default=True, help="See: zoo list attention."),
    click.option("--quantize", metavar="NAME", help="int8, int4; see: zoo list quantizers."),
    click.option("--compile", is_flag=True, help="Compile the decoding; the first token then takes about a minute."),
    click.option(
        "--adapter",
        multiple=True,
        metavar="[NAME=]DIR[,KEY=VALUE]",
        help="An adapter directory or file; several apply one after the other. Merged for --compile. What a file does "
        "not say follows it: lora.pt,alpha=16.",
    ),
    click.option("--revision", help="Branch, tag or commit on the hub."),
    click.option("--token", envvar="HF_TOKEN", help="Access token for gated models. [env: HF_TOKEN]"),
    click.option("--offline", is_flag=True, envvar="HF_HUB_OFFLINE", help="Never download. [env: HF_HUB_OFFLINE]"),
]

_SAMPLING = [
    click.option("--temperature", type=float, help="0 is greedy. [default: the model's own, else 0.8]"),
    click.option(
        "--top-k", type=int, help="Draw from the K likeliest tokens; 0 is off. [default: the model's, else 50]"
    ),
    click.option("--top-p", type=float, help="Draw from the likeliest tokens that make up probability P."),
    click.option("--min-p", type=float, help="Drop tokens less likely than P times the likeliest."),
    click.option("--repetition-penalty", type=float, help="Above 1: tokens already seen become less likely."),
    click.option(
        "--sampler",
        "samplers",
        multiple=True,
        metavar="NAME[,KEY=VALUE]",
        help="A further step before a token is drawn; see: zoo list samplers.",
    ),
    click.option("--seed", type=int, help="Makes sampling reproducible."),
    click.option("--stop", multiple=True, metavar="TEXT", help="End before this text; may be given more than once."),
    click.option("--stats", is_flag=True, help="Print speed and memory to standard error."),
]


def loading_options(function: F) -> F:
    """``--device --precision --attention --quantize --compile --adapter --revision --token --offline``."""
    return _decorated(function, _LOADING)


def sampling_options(function: F) -> F:
    """``--temperature`` and its kin, ``--sampler --seed --stop --stats``."""
    return _decorated(function, _SAMPLING)


def _decorated(function: F, options: list[Callable[[Any], Any]]) -> F:
    for option in reversed(options):
        function = option(function)
    return function


def load_from_options(
    app: App,
    model: str,
    *,
    device: str,
    precision: str,
    attention: str,
    quantize: str | None,
    compile: bool,  # noqa: A002 - the option's name
    adapter: tuple[str, ...],
    revision: str | None,
    token: str | None,
    offline: bool,
) -> LanguageModel:
    """Load the model that the options name, telling what ``auto`` chose."""
    adapters = _named(adapter)
    import_torch()
    from zoo.api import load
    from zoo.sources.base import FetchOptions

    lm = load(
        model,
        precision=precision,
        attention=attention,
        device=device,
        quantize=quantize,
        compile=compile,
        adapters=adapters,
        fetch=FetchOptions(revision=revision, token=token, offline=offline),
        registry=app.registry,
        report=note,
    )
    how = ", ".join(filter(None, (f"{lm.precision} on {lm.device}", lm.quantized, f"{lm.attention} attention")))
    note(f"{lm.checkpoint.path}: {how}")
    for directory, attached in zip(adapters.values(), lm.adapters, strict=True):
        state = "merged" if attached.merged else "active"
        note(f"{directory}: {attached.adapter.name}, {attached.plan.n_trainable:,} parameters, {state}")
        for line in attached.notes:
            note(line)
    for line in lm.notes:
        note(line)
    return lm


def make_samplers(app: App, given: tuple[str, ...]) -> tuple[Any, ...]:
    """The steps that ``--sampler NAME,KEY=VALUE`` name, in their order.

    Raises:
        UnknownNameError: no sampler has that name.
        InputError: it does not take these options, or not these values.
    """
    samplers = []
    for text in given:
        name, *settings = text.split(",")
        options = {key: _number(value) for key, _, value in (setting.partition("=") for setting in settings)}
        kind = app.registry.load("sampler", name)
        try:
            samplers.append(kind(**options))
        except TypeError as error:
            known = ", ".join(inspect.signature(kind).parameters)
            raise InputError(f"--sampler {text}: {error}.", fix=f"{name} takes {known or 'no options'}.") from None
    return tuple(samplers)


def _number(text: str) -> float | str:
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    return text


def _named(given: tuple[str, ...]) -> dict[str, Path]:
    """Adapter directories by name: that before the ``=``, else their number."""
    named: dict[str, Path] = {}
    for number, text in enumerate(given):
        name, separator, path = text.partition("=")
        if not separator or "," in name or Path(text).exists():
            name, path = f"adapter-{number}", text
        if not name or "." in name or "/" in name:
            raise InputError(f"{name!r} is no name for an adapter.", fix="Give --adapter NAME=DIR, without dots.")
        if name in named:
            raise InputError(f"two adapters are named {name!r}.", fix="Give each --adapter a name of its own.")
        named[name] = Path(path)
    return named


def print_stats(stats: Any) -> None:
    """Speed and memory of a reply, on standard error."""
    click.echo(
        f"prefill {stats.prompt_tokens - stats.reused_tokens} tokens at {stats.prefill_tokens_per_second:.1f} tokens/s"
        f" | first token after {stats.prefill_seconds:.2f} s"
        f" | decode {stats.new_tokens} tokens at {stats.decode_tokens_per_second:.1f} tokens/s"
        f" | peak memory {stats.peak_memory / 2**30:.2f} GiB",
        err=True,
    )
