"""Makes what a converter writes appear all at once: it is there, complete and on the disk, or it is not."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from zoo.convert.base import Checkpoint, WriteOptions, Writer, Writing
from zoo.convert.hf import HuggingFace
from zoo.errors import InputError, UnavailableError, ZooError
from zoo.precision.quantization import Quantizer
from zoo.registry import Registry

MAX_SHARD_BYTES = WriteOptions.max_shard_bytes


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
    writer: Writer | None = None,
    dtype: torch.dtype | str | None = None,
    quantizer: Quantizer | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Callable[[int], None] = lambda n_bytes: None,
) -> Exported:
    """Write ``checkpoint`` to ``destination``, which appears only when complete.

    Args:
        writer: the format; by default a Hugging Face directory.
        dtype: of the written weights; by default each tensor keeps its own (float32 if it was quantized).
        quantizer: whose layers the weights are written for, in a format of such directories.
        progress: called with the bytes of each tensor as it is written.

    Raises:
        InputError: the destination is taken, or the format can not hold the model.
        FileFormatError: the source is damaged.
        ZooError: the disk is full.
    """
    options = WriteOptions(dtype=dtype, quantizer=quantizer, max_shard_bytes=max_shard_bytes, progress=progress)
    return commit((writer or HuggingFace()).write(checkpoint, options), destination)


def commit(writing: Writing, destination: Path) -> Exported:
    """Write beside ``destination``, flush it to the disk, and rename. Raises as `export_model`."""
    if destination.is_file() or (destination.is_dir() and any(destination.iterdir())):
        what = "already" if destination.is_file() else "and is not empty"
        raise InputError(f"{destination} exists {what}.", fix="Choose another name, or remove it.")
    destination.parent.mkdir(parents=True, exist_ok=True)
    _check_space(destination, writing.n_bytes)
    partial = destination.with_name(f".{destination.name}.partial")
    _remove(partial)
    try:
        writing.to(partial)
        _flush(partial)
        if destination.exists():
            destination.rmdir()
        partial.rename(destination)
        _flush_directory(destination.parent)
    except OSError as error:
        _remove(partial)
        if error.errno == errno.ENOSPC:
            raise _disk_full(destination, writing.n_bytes) from None
        raise ZooError(f"can not write {destination}: {error.strerror or error}.") from None
    except BaseException:
        _remove(partial)
        raise
    return Exported(destination, writing.n_tensors, writing.n_bytes)


def choose_writer(format_name: str | None, destination: Path, registry: Registry) -> tuple[str, Writer]:
    """The format to write and its converter: the named one, or the one whose suffix ``destination`` has, or hf.

    Raises:
        UnknownNameError: no format has this name.
        InputError: it can be read but not written, or is a single file and the destination is not named like one.
    """
    by_suffix = registry.match("converter", destination.suffix)
    name = format_name or ("hf" if by_suffix is None else by_suffix.name)
    converter = registry.load("converter", name)()
    if not isinstance(converter, Writer):
        known = [other for other, _ in registry.components("converter") if _can_be_written(other, registry)]
        raise InputError(f"the format {name!r} can be read but not written.", fix=f"Write {', '.join(known)}.")
    suffixes = registry.find("converter", name).matches
    if suffixes and destination.suffix not in suffixes:
        raise InputError(f"a {name} model is one file; {destination} does not end in {' or '.join(suffixes)}.")
    return name, converter


def _can_be_written(name: str, registry: Registry) -> bool:
    try:
        return isinstance(registry.load("converter", name)(), Writer)
    except UnavailableError:
        return False


def _flush(path: Path) -> None:
    """Wait until all of ``path`` is on the disk: a rename may survive a power cut that its data do not."""
    for file in [path] if path.is_file() else sorted(path.rglob("*")):
        if file.is_file():
            with file.open("r+b") as opened:
                os.fsync(opened.fileno())
    if path.is_dir():
        _flush_directory(path)


def _flush_directory(path: Path) -> None:
    if os.name != "posix":
        return  # Windows can not open a directory
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _check_space(destination: Path, needed: int) -> None:
    if shutil.disk_usage(destination.parent).free < needed:
        raise _disk_full(destination, needed)


def _disk_full(destination: Path, needed: int) -> ZooError:
    free = shutil.disk_usage(destination.parent).free
    return ZooError(
        f"{destination} needs {needed / 1e9:.2f} GB; {free / 1e9:.2f} GB are free there.",
        fix="Free some space, choose another disk, or write a smaller --dtype.",
    )
