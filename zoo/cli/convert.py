"""``zoo convert SRC DST``: write a model as a Hugging Face directory."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from zoo.cli.app import App, ZooCommand, json_option, note, pass_app, print_json

DTYPES = {"fp32": "float32", "float32": "float32", "bf16": "bfloat16", "bfloat16": "bfloat16"}
DTYPES |= {"fp16": "float16", "float16": "float16"}


@click.command(cls=ZooCommand)
@click.argument("source", metavar="SRC")
@click.argument("destination", metavar="DST", type=click.Path(path_type=Path))
@click.option("--from", "format_name", metavar="FORMAT", help="Read SRC as this format. See: zoo list converters.")
@click.option("--to", "to_format", metavar="FORMAT", help="Write this format. [default: gguf for DST.gguf, else hf]")
@click.option("--dtype", type=click.Choice(list(DTYPES)), help="Dtype to write. [default: each tensor keeps its own]")
@click.option("--offline", is_flag=True, envvar="HF_HUB_OFFLINE", help="Never download. [env: HF_HUB_OFFLINE]")
@json_option
@pass_app
def command(
    app: App,
    source: str,
    destination: Path,
    format_name: str | None,
    to_format: str | None,
    dtype: str | None,
    offline: bool,
    as_json: bool,
) -> None:
    """Write a model as a Hugging Face directory, tensor by tensor.

    SRC is a registry name, a directory, a GGUF file or hf:org/name. DST appears when it is complete.
    """
    import torch

    from zoo.api import checkpoints_directory
    from zoo.convert.export import choose_writer, export_model
    from zoo.convert.load import open_checkpoint
    from zoo.sources.base import FetchOptions
    from zoo.sources.resolve import resolve_model

    found = resolve_model(
        source, app.registry, checkpoints=checkpoints_directory(), options=FetchOptions(offline=offline), report=note
    )
    checkpoint = open_checkpoint(found.path, app.registry, format_name=format_name)
    _, writer = choose_writer(to_format, destination, app.registry)
    written = getattr(torch, DTYPES[dtype]) if dtype else None
    with click.progressbar(
        length=len(checkpoint.family.keys.rules(checkpoint.spec)),
        label="converting",
        file=sys.stderr,
        hidden=not sys.stderr.isatty(),
    ) as bar:
        exported = export_model(
            checkpoint, destination, writer=writer, dtype=written, progress=lambda n_bytes: bar.update(1)
        )
    if as_json:
        print_json({"path": str(destination), "tensors": exported.n_tensors, "bytes": exported.n_bytes})
    else:
        click.echo(f"{destination}: {exported.n_tensors} tensors, {exported.n_bytes / 1e9:.2f} GB")
