"""Writes a checkpoint as a Hugging Face model directory, tensor by tensor, all or nothing."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zoo.convert.base import Checkpoint
from zoo.convert.hf import INDEX
from zoo.convert.safetensors import TensorSlot, write_safetensors
from zoo.errors import FileFormatError, InputError, ZooError
from zoo.families.base import Rule
from zoo.sources.provenance import Provenance, read_provenance, write_provenance

MAX_SHARD_BYTES = 5_000_000_000
_REPLACED_KEYS = ("dtype", "torch_dtype", "quantization_config")


@dataclass(frozen=True)
class Exported:
    """What was written."""

    path: Path
    n_tensors: int
    n_bytes: int


def export_model(
    checkpoint: Checkpoint,
    destination: Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Callable[[int], None] = lambda n_bytes: None,
) -> Exported:
    """Write config, weights, tokenizer and provenance to ``destination``, which appears only when complete.

    Args:
        dtype: of the written weights; by default each tensor keeps its own (float32 if it was quantized).
        progress: called with the bytes of each tensor as it is written.

    Raises:
        InputError: the destination exists and is not empty.
        FileFormatError: the source is damaged.
        ZooError: the disk is full.
    """
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise InputError(f"{destination} exists and is not empty.", fix="Choose another directory, or remove it.")
    slots = _slots(checkpoint, dtype, progress)
    needed = sum(slot.n_bytes for slot in slots)
    destination.parent.mkdir(parents=True, exist_ok=True)
    _check_space(destination, needed)
    partial = destination.with_name(f".{destination.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        digests = _write_weights(partial, slots, max_shard_bytes)
        _write_rest(partial, checkpoint, slots, digests)
        if destination.exists():
            destination.rmdir()
        partial.rename(destination)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        if error.errno == errno.ENOSPC:
            raise _disk_full(destination, needed) from None
        raise ZooError(f"can not write {destination}: {error.strerror or error}.") from None
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return Exported(destination, len(slots), needed)


class _Parameters:
    """Our parameters by name, read through the source's key map; the last stored tensor is kept split."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._located: dict[str, tuple[str, Rule]] = {}
        for stored, rule in checkpoint.located().items():
            for name in rule.ours:
                self._located[name] = (stored, rule)
        self._held: tuple[str, dict[str, Tensor]] = ("", {})

    def dtype(self, name: str) -> torch.dtype:
        return self._checkpoint.tensors.dtype(self._located[name][0])

    def get(self, name: str) -> Tensor:
        stored, rule = self._located[name]
        if self._held[0] != stored:
            parts = rule.split(self._checkpoint.tensors.get(stored))
            self._held = (stored, dict(zip(rule.ours, parts, strict=True)))
        return self._held[1][name]


def _slots(checkpoint: Checkpoint, dtype: torch.dtype | None, progress: Callable[[int], None]) -> list[TensorSlot]:
    parameters = _Parameters(checkpoint)

    def slot(rule: Rule) -> TensorSlot:
        written = dtype or parameters.dtype(rule.ours[0])

        def read() -> Tensor:
            tensor = rule.merge([parameters.get(name).to(written) for name in rule.ours])
            progress(tensor.nbytes)
            return tensor

        return TensorSlot(rule.stored, rule.stored_shape, written, read)

    return [slot(rule) for rule in checkpoint.family.keys.rules(checkpoint.spec)]


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
    _write_json(directory / INDEX, index)
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


def _write_rest(directory: Path, checkpoint: Checkpoint, slots: list[TensorSlot], digests: dict[str, str]) -> None:
    """Config, generation config, tokenizer and ``zoo.yaml``."""
    kept = {key: value for key, value in checkpoint.config.items() if key not in _REPLACED_KEYS}
    dtype = str(slots[0].dtype).removeprefix("torch.")
    # Both say the same; the source's own words are kept where it has any ("gelu_new", bos_token_id, notes).
    config = {**checkpoint.family.write_config(checkpoint.spec), **kept, "torch_dtype": dtype}
    _write_json(directory / "config.json", {key: value for key, value in config.items() if value is not None})
    for path in checkpoint.companions:
        shutil.copyfile(path, directory / path.name)
    if checkpoint.generation and not (directory / "generation_config.json").exists():
        _write_json(directory / "generation_config.json", checkpoint.generation)
    if not (directory / "tokenizer.json").exists():
        _save_tokenizer(directory, checkpoint)
    origin = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
    known = read_provenance(origin)
    write_provenance(
        directory,
        Provenance(known.source, known.model, digests),
        converted_from=checkpoint.path.name,
        family=checkpoint.family.name,
        spec=checkpoint.spec.to_dict(),
    )


def _save_tokenizer(directory: Path, checkpoint: Checkpoint) -> None:
    try:
        tokenizer = checkpoint.load_tokenizer()
    except FileFormatError:
        return  # weights without a tokenizer are a legitimate model; generation says so when it needs one
    tokenizer.save(directory)


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _check_space(destination: Path, needed: int) -> None:
    if shutil.disk_usage(destination.parent).free < needed:
        raise _disk_full(destination, needed)


def _disk_full(destination: Path, needed: int) -> ZooError:
    free = shutil.disk_usage(destination.parent).free
    return ZooError(
        f"{destination} needs {needed / 1e9:.2f} GB; {free / 1e9:.2f} GB are free there.",
        fix="Free some space, choose another disk, or write a smaller --dtype.",
    )
