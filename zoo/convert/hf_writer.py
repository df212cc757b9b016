"""Writes model directories in the Hugging Face layout, and the files that other directories share with them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zoo.convert.base import Checkpoint, WriteOptions, Writing, cast, parameter_slots, refuse_quantizer, what_is_lost
from zoo.convert.safetensors import TensorSlot, write_safetensors
from zoo.errors import InputError, MissingTokenizerError
from zoo.sources.provenance import Provenance, read_provenance, write_provenance
from zoo.text.tokenizer import Tokenizer

INDEX = "model.safetensors.index.json"
_REPLACED_KEYS = ("dtype", "torch_dtype", "quantization_config", "model_type", "architectures", "auto_map")


def write_hf(checkpoint: Checkpoint, options: WriteOptions) -> Writing:
    """Prepare a Hugging Face directory: config, weights, tokenizer and ``zoo.yaml``. Raises as `Writer.write`."""
    dtype = plain_dtype(options, "hf")
    slots = parameter_slots(checkpoint, checkpoint.family.keys.rules(checkpoint.spec), dtype, options.progress)
    config = hf_config(checkpoint, slots[0].dtype)
    tokenizer = tokenizer_to_save(checkpoint)

    def to(directory: Path) -> None:
        directory.mkdir()
        digests = _write_weights(directory, slots, options.max_shard_bytes)
        # Nulls too: where transformers has a number by default, a key that is missing is not the same.
        write_json(directory / "config.json", config)
        write_companions(directory, checkpoint, tokenizer, digests)

    return Writing(len(slots), sum(slot.n_bytes for slot in slots), to, rounding(dtype))


def hf_config(checkpoint: Checkpoint, dtype: torch.dtype) -> dict[str, Any]:
    """The content of config.json.

    Raises:
        InputError: who reads it would get another model.
    """
    family, spec = checkpoint.family, checkpoint.spec
    kept = {key: value for key, value in checkpoint.config.items() if key not in _REPLACED_KEYS}
    # Both say the same; the source's own words are kept where it has any ("gelu_new", bos_token_id, notes).
    config = {**family.write_config(spec), **kept, "torch_dtype": str(dtype).removeprefix("torch.")}
    try:
        again = family.read_config(json.loads(json.dumps(config)))  # as JSON says it: a tuple is a list there
    except InputError as error:
        raise InputError(f"a config.json can not hold this model: {error.message}", fix=error.fix) from None
    if lost := what_is_lost(spec, again):
        raise InputError(f"a config.json of the family {family.name!r} can not say {', '.join(lost)}.")
    return config


def plain_dtype(options: WriteOptions, format_name: str) -> torch.dtype | None:
    """The chosen dtype, for a format that has no quantized types.

    Raises:
        InputError: it is one.
    """
    refuse_quantizer(options, format_name)
    if isinstance(options.dtype, str):
        raise InputError(f"the format {format_name} holds no {options.dtype} weights.", fix="Take fp32, bf16 or fp16.")
    return options.dtype


def rounding(dtype: torch.dtype | None) -> Callable[[str, Tensor], Tensor]:
    """`Writing.rounded` for weights that are all written in ``dtype``."""

    def rounded(name: str, values: Tensor) -> Tensor:
        return cast(name, values, dtype)

    return rounded


def tokenizer_to_save(checkpoint: Checkpoint) -> Tokenizer | None:
    """The tokenizer, unless its tokenizer.json is copied, or there is none: such weights are a legitimate model.

    Raises:
        InputError: there is one, and it can not be loaded.
    """
    if any(path.name == "tokenizer.json" for path in checkpoint.companions):
        return None
    try:
        return checkpoint.load_tokenizer()
    except MissingTokenizerError:
        return None


def write_companions(
    directory: Path, checkpoint: Checkpoint, tokenizer: Tokenizer | None, digests: dict[str, str]
) -> None:
    """Generation config, tokenizer, and ``zoo.yaml`` with the sha256 of each weight file."""
    for path in checkpoint.companions:
        shutil.copyfile(path, directory / path.name)
    if checkpoint.generation and not (directory / "generation_config.json").exists():
        write_json(directory / "generation_config.json", checkpoint.generation)
    if tokenizer is not None:
        tokenizer.save(directory)
    known = read_provenance(checkpoint.directory)
    write_provenance(
        directory,
        Provenance(known.source, known.model, digests),
        **({"converted_from": checkpoint.path.name} if checkpoint.path.exists() else {}),
        family=checkpoint.family.name,
        spec=checkpoint.spec.to_dict(),
    )


def _write_weights(directory: Path, slots: list[TensorSlot], max_shard_bytes: int) -> dict[str, str]:
    shards = _shards(slots, max_shard_bytes)
    if len(shards) == 1:
        return {"model.safetensors": write_safetensors(directory / "model.safetensors", slots)}
    digests, weight_map = {}, {}
    for i, shard in enumerate(shards, start=1):
        name = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        digests[name] = write_safetensors(directory / name, shard)
        weight_map.update({slot.name: name for slot in shard})
    index = {"metadata": {"total_size": sum(slot.n_bytes for slot in slots)}, "weight_map": weight_map}
    write_json(directory / INDEX, index)
    return digests


def _shards(slots: list[TensorSlot], max_shard_bytes: int) -> list[list[TensorSlot]]:
    shards: list[list[TensorSlot]] = [[]]
    size = 0
    for slot in slots:
        if shards[-1] and size + slot.n_bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(slot)
        size += slot.n_bytes
    return shards


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Indented, as people write config.json."""
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
