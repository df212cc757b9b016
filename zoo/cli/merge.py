"""``zoo merge MODEL ADAPTER OUT``: an adapter computed into the weights of its model."""

from __future__ import annotations

from pathlib import Path

import click

from zoo.cli.app import App, ZooCommand, json_option, note, pass_app, print_json
from zoo.cli.torch_process import import_torch

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


@click.command(cls=ZooCommand)
@click.argument("model")
@click.argument("adapter", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--dtype", type=click.Choice(list(DTYPES)), help="Of the weights. [default: the model's own]")
@click.option("--dequantize", is_flag=True, help="Merge into the values that quantized weights stand for.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, mps.")
@click.option("--offline", is_flag=True, envvar="HF_HUB_OFFLINE", help="Never download. [env: HF_HUB_OFFLINE]")
@json_option
@pass_app
def command(
    app: App,
    model: str,
    adapter: Path,
    out: Path,
    dtype: str | None,
    dequantize: bool,
    device: str,
    offline: bool,
    as_json: bool,
) -> None:
    """Write MODEL with ADAPTER in its weights to OUT, a plain model directory.

    MODEL is a registry name, a directory, a run, a GGUF file or hf:org/name. ADAPTER is an adapter directory, a run or
    a file, with what it does not say behind it: lora.pt,alpha=16.
    Prints how far merging moves the logits: weights in bf16 round the update.
    """
    import_torch()
    import torch

    from zoo.adapting import find_adapter
    from zoo.api import checkpoints_directory, choose_device
    from zoo.convert.load import open_checkpoint
    from zoo.merging import merge_adapter
    from zoo.sources.base import FetchOptions
    from zoo.sources.resolve import resolve_model
    from zoo.store.locate import trained_directory

    find_adapter(adapter)  # before a download
    found = resolve_model(
        model, app.registry, checkpoints=checkpoints_directory(), options=FetchOptions(offline=offline), report=note
    )
    checkpoint = open_checkpoint(trained_directory(found.path, "model", note), app.registry)
    merged = merge_adapter(
        checkpoint,
        adapter,
        out,
        dtype=getattr(torch, DTYPES[dtype]) if dtype else None,
        dequantize=dequantize,
        device=choose_device(device),
        registry=app.registry,
    )
    for line in merged.notes:
        note(line)
    name = str(merged.dtype).removeprefix("torch.")
    if as_json:
        facts = {"path": str(out), "tensors": merged.exported.n_tensors, "bytes": merged.exported.n_bytes}
        facts |= {"dtype": name, "difference": merged.difference, "largest_logit": merged.largest}
        print_json(facts | {"same_tokens": merged.same, "tokens": merged.positions})
        return
    click.echo(f"{out}: {merged.exported.n_tensors} tensors, {merged.exported.n_bytes / 1e9:.2f} GB, {name}")
    click.echo(
        f"merged and unmerged differ by up to {merged.difference:.1e} (logits reach {merged.largest:.1f}); "
        f"the likeliest token is the same at {merged.same} of {merged.positions} positions"
    )
