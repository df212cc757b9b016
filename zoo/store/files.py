"""Files of a step: written once, fsynced and hashed while they are written; read whole and hashed while they are read.

The digest is of the bytes that were meant to be in the file, so that it catches whatever a disk made of them. A thread
of its own computes it: one after the other, writing and hashing would take almost twice as long.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""What a safetensors file holds, as the format spells it."""
_BY_NAME = {name: dtype for dtype, name in DTYPES.items()}

METADATA = "__metadata__"
"""The key of a safetensors header that is no tensor."""
_PIECE_BYTES = 16 * 2**20
_PIECES_AHEAD = 16


@dataclass(frozen=True)
class FileRecord:
    """What a manifest says about one file."""

    n_bytes: int
    sha256: str


class Damage(Exception):  # noqa: N818 - a finding about a file
    """A file is not what was saved. The message says how, without the file's name."""


class Sha256:
    """A sha256 that is computed in a thread while the caller reads or writes the next piece.

    Args:
        ahead: how many pieces may wait for it; None if they take no memory of their own.
    """

    def __init__(self, ahead: int | None = None) -> None:
        self._digest = hashlib.sha256()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="sha256")
        self._waiting: deque[Future[None]] = deque()
        self._ahead = ahead

    def __enter__(self) -> Sha256:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._thread.shutdown()

    def update(self, piece: Any) -> None:
        """Take one more piece, which must not change any more. Waits when it is too far behind."""
        self._waiting.append(self._thread.submit(self._digest.update, piece))
        while self._ahead is not None and len(self._waiting) > self._ahead:
            self._waiting.popleft().result()

    def hexdigest(self) -> str:
        """The digest of all pieces."""
        while self._waiting:
            self._waiting.popleft().result()
        return self._digest.hexdigest()


def write_pieces(path: Path, pieces: Iterable[Any], ahead: int | None = None) -> FileRecord:
    """Write a new file of these buffers, down to the disk. ``ahead`` is that of `Sha256`.

    Raises:
        OSError: the disk is full, a permission is missing, or the file is there already.
    """
    with Sha256(ahead) as digest, path.open("xb") as file:
        for piece in pieces:
            digest.update(piece)
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
        return FileRecord(os.fstat(file.fileno()).st_size, digest.hexdigest())


def write_json(path: Path, tree: Any) -> FileRecord:
    """Write a JSON file. Raises as `write_pieces`."""
    return write_pieces(path, [json.dumps(tree, allow_nan=False, separators=(",", ":")).encode()])


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> FileRecord:
    """Write a safetensors file: 8 bytes of header length, little-endian, a JSON header, the tensors back to back.

    Of other devices' tensors a quarter of a gibibyte at a time is in host memory. Raises as `write_pieces`.
    """
    # The widest come first, so that every tensor starts at a multiple of its item size.
    ordered = sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize)
    header: dict[str, Any] = {METADATA: {"format": "pt", **(metadata or {})}}
    end = 0
    for name, tensor in ordered:
        start, end = end, end + tensor.numel() * tensor.dtype.itemsize
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)

    def pieces() -> Iterator[Any]:
        yield len(encoded).to_bytes(8, "little") + encoded
        for _, tensor in ordered:
            yield from _pieces(tensor)

    is_copied = any(tensor.device.type != "cpu" or not tensor.is_contiguous() for tensor in tensors.values())
    return write_pieces(path, pieces(), _PIECES_AHEAD if is_copied else None)


def _pieces(tensor: Tensor) -> Iterator[Any]:
    flat = tensor.contiguous().reshape(-1)
    n_items = _PIECE_BYTES // tensor.dtype.itemsize
    for start in range(0, flat.numel(), n_items):
        yield as_bytes(flat[start : start + n_items].cpu())


def as_bytes(tensor: Tensor) -> Any:
    """The memory of a contiguous CPU tensor, as a writable buffer."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def read_json(path: Path, record: FileRecord) -> Any:
    """The content of a JSON file.

    Raises:
        Damage: it is not what was saved.
    """
    with _opened(path, record) as file:
        content = file.read()
    if hashlib.sha256(content).hexdigest() != record.sha256:
        raise _changed()
    return json.loads(content)


def read_tensors(path: Path, record: FileRecord) -> dict[str, Tensor]:
    """The tensors of a file, each in memory of its own: they stay as they are when the file is written again.

    Raises:
        Damage: it is not what was saved. The bytes that were hashed are the bytes that are returned.
    """
    return read_tensors_and_metadata(path, record)[0]


def read_tensors_and_metadata(path: Path, record: FileRecord) -> tuple[dict[str, Tensor], dict[str, str]]:
    """As `read_tensors`, with the texts that the file's header has beside them."""
    with _opened(path, record) as file, Sha256() as digest:
        header, metadata = _read_header(file, record.n_bytes, digest)
        tensors = {name: torch.empty(shape, dtype=dtype) for name, (dtype, shape) in header.items()}
        for tensor in tensors.values():
            _fill(file, tensor, digest)
        if digest.hexdigest() != record.sha256:
            raise _changed()
    return tensors, metadata


def check_file(path: Path, record: FileRecord) -> None:
    """Read a file and compare it with what was saved.

    Raises:
        Damage: it is something else.
    """
    with _opened(path, record) as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != record.sha256:
            raise _changed()


def check_size(path: Path, record: FileRecord) -> None:
    """Compare a file's size with the one that was saved.

    Raises:
        Damage: it differs, or there is no such file.
    """
    _opened(path, record).close()


def record_of(path: Path) -> FileRecord:
    """The record of a file that somebody else wrote, which is brought to the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return FileRecord(file.tell(), digest)


def sync_directory(directory: Path) -> None:
    """Bring the names in a directory to the disk; a file's own fsync does not."""
    if os.name == "posix":
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _opened(path: Path, record: FileRecord) -> BufferedReader:
    try:
        file = path.open("rb")
    except FileNotFoundError:
        raise Damage("missing") from None
    except OSError as error:
        raise Damage(f"can not be read: {error.strerror}") from None
    n_bytes = os.fstat(file.fileno()).st_size
    if n_bytes == record.n_bytes:
        return file
    file.close()
    if n_bytes < record.n_bytes:
        raise Damage(f"truncated, {n_bytes} bytes of {record.n_bytes}")
    raise Damage(f"longer than it was saved, {n_bytes} bytes instead of {record.n_bytes}")


def _changed() -> Damage:
    return Damage("content changed since it was saved")


def _read_header(
    file: BufferedReader, n_bytes: int, digest: Sha256
) -> tuple[dict[str, tuple[torch.dtype, list[int]]], dict[str, str]]:
    """Dtype and shape by name, in the order of the file. What a damaged header says must not decide on an allocation.

    The tensors must fill the file exactly, as `write_tensors` lays them out.
    """
    try:
        length = file.read(8)
        encoded = file.read(min(int.from_bytes(length, "little"), n_bytes))
        digest.update(length + encoded)
        content = json.loads(encoded)
        metadata = dict(content.pop(METADATA, {}))
        header = {name: (_BY_NAME[entry["dtype"]], [int(n) for n in entry["shape"]]) for name, entry in content.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise _changed() from None
    sizes = [math.prod(shape) * dtype.itemsize for dtype, shape in header.values()]
    if any(n < 0 for _, shape in header.values() for n in shape) or 8 + len(encoded) + sum(sizes) != n_bytes:
        raise _changed()
    return header, metadata


def _fill(file: BufferedReader, tensor: Tensor, digest: Sha256) -> None:
    if not tensor.numel():
        return
    memory = as_bytes(tensor)
    for start in range(0, len(memory), _PIECE_BYTES):
        piece = memory[start : start + _PIECE_BYTES]
        if file.readinto(piece) != len(piece):
            raise Damage("truncated while it was read")
        digest.update(piece)
