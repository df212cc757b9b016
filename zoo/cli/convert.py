"""``zoo convert SRC DST``: write a model in another format."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from zoo.cli.app import App, ZooCommand, json_option, note, pass_app, print_json

if TYPE_CHECKING:
    from zoo.convert.base import Checkpoint

DTYPES = {"fp32": "float32", "float32": "float32", "f32": "float32"}
DTYPES |= {"bf16": "bfloat16", "bfloat16": "bfloat16"}
DTYPES |= {"fp16": "float16", "float16": "float16", "f16": "float16"}
DTYPES |= {"q8_0": "q8_0"}


@click.command(cls=ZooCommand)
@click.argument("source", metavar="SRC")
@click.argument("destination", metavar="DST", type=click.Path(path_type=Path))
@click.option("--from", "format_name", metavar="FORMAT", help="Read SRC as this format. See: zoo list converters.")
@click.option(
    "--to",
    "target",
    metavar="FORMAT",
    help="Write this format. [default: gguf if DST ends in .gguf, quantized with --quantize, else hf]",
)
@click.option(
    "--dtype",
    type=click.Choice(list(DTYPES)),
    help="Dtype to write; q8_0 in GGUF only. [default: each tensor keeps its own]",
)
@click.option("--quantize", metavar="NAME", help="Write int8 or int4 weights; see: zoo list quantizers.")
@click.option(
    "--verify",
    "check",
    is_flag=True,
    help="Compare DST with SRC: every parameter, and logits by another tool.",
)
@click.option("--offline", is_flag=True, envvar="HF_HUB_OFFLINE", help="Never download. [env: HF_HUB_OFFLINE]")
@json_option
@pass_app
def command(
    app: App,
    source: str,
    destination: Path,
    format_name: str | None,
    target: str | None,
    dtype: str | None,
    quantize: str | None,
    check: bool,
    offline: bool,
    as_json: bool,
) -> None:
    """Write a model in another format, tensor by tensor.

    SRC is a registry name, a directory, a file of weights or hf:org/name. DST appears when it is complete.
    """
    from zoo.api import checkpoints_directory
    from zoo.convert.base import WriteOptions
    from zoo.convert.export import choose_writer, commit
    from zoo.convert.load import open_checkpoint
    from zoo.sources.base import FetchOptions
    from zoo.sources.resolve import resolve_model

    quantizer = app.registry.load("quantizer", quantize)() if quantize else None
    if quantizer is not None and app.registry.match("converter", destination.suffix) is None:
        target = target or "quantized"
    name, writer = choose_writer(target, destination, app.registry)
    found = resolve_model(
        source, app.registry, checkpoints=checkpoints_directory(), options=FetchOptions(offline=offline), report=note
    )
    checkpoint = open_checkpoint(found.path, app.registry, format_name=format_name)
    with click.progressbar(length=1, label="converting", file=sys.stderr, hidden=not sys.stderr.isatty()) as bar:
        options = WriteOptions(
            _dtype(dtype), quantizer=quantizer, license=_license(app, checkpoint), progress=bar.update
        )
        writing = writer.write(checkpoint, options)
        bar.length = writing.n_bytes
        exported = commit(writing, destination)
    result: dict[str, Any] = {"path": str(destination), "format": name}
    result |= {"tensors": exported.n_tensors, "bytes": exported.n_bytes}
    if not as_json:
        click.echo(f"{destination}: {name}, {exported.n_tensors} tensors, {exported.n_bytes / 1e9:.2f} GB")
    if check:
        from zoo.convert.verify import verify

        verified = verify(checkpoint, destination, writing, name, app.registry, report=note)
        result["verified"] = vars(verified)
        if not as_json:
            click.echo(f"verified: {verified}")
    if as_json:
        print_json(result)


def _dtype(name: str | None) -> Any:
    import torch

    return getattr(torch, DTYPES[name], DTYPES[name]) if name else None


def _license(app: App, checkpoint: Checkpoint) -> str | None:
    """What the registry says of the model that the files say they are."""
    from zoo.errors import UnknownNameError
    from zoo.sources.provenance import read_provenance

    model = read_provenance(checkpoint.directory).model
    try:
        return app.registry.model(model).license if model else None
    except UnknownNameError:
        return None
