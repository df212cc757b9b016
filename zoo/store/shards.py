"""Sharded tensors in files: each rank writes its part, and any number of ranks, or one, read them back.

The layout is that of ``torch.distributed.checkpoint``'s Hugging Face storage (``HuggingFaceStorageReader`` reads it):
safetensors files whose metadata says at which offsets of the whole tensor each part lies. Torch's own writer needs
collectives while it writes, in which a rank that fails would leave the others; here no rank waits for another.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from zoo.errors import InputError
from zoo.store.files import Damage, FileRecord, read_tensors_and_metadata, write_tensors

INFO, VERSION = "DCP_SHARDING_INFO", "DCP_VERSION"
OFFSETS = "saved_offsets"


class Block(NamedTuple):
    """Where a part lies in the whole tensor."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]


def file_name(rank: int) -> str:
    """Of the file that a rank writes."""
    return f"shard-{rank + 1:05d}-model-00001-of-00001.safetensors"


def block_of(tensor: DTensor) -> Block:
    """The part that this rank has.

    Raises:
        InputError: it is no slice of the whole: a partial sum, or a strided shard.
    """
    if not all(type(placement) in (Shard, Replicate) for placement in tensor.placements):
        raise InputError(f"a tensor with the placements {tensor.placements} is no slice of a whole one.")
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return Block(tuple(offset), tuple(shape))


def local_part(tensor: Tensor) -> Tensor:
    """What this rank has of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def is_first_copy(tensor: DTensor) -> bool:
    """Whether this rank is the one to write its part: of those that have the same, the first."""
    coordinate: Any = tensor.device_mesh.get_coordinate()
    return all(
        place == 0
        for place, placement in zip(coordinate, tensor.placements, strict=True)
        if isinstance(placement, Replicate)
    )


def write_shards(path: Path, tensors: Mapping[str, DTensor]) -> FileRecord:
    """Write this rank's parts, down to the disk."""
    blocks = {name: block_of(tensor) for name, tensor in tensors.items()}
    mine = {n: t.to_local() for n, t in tensors.items() if is_first_copy(t) and 0 not in blocks[n].shape}
    info = {name: {OFFSETS: list(blocks[name].offset)} for name in mine}
    return write_tensors(path, mine, {VERSION: "1.0", INFO: json.dumps(info)})


class Wanted:
    """One tensor that is put together from parts.

    Args:
        shape, dtype: of the whole.
        like: a tensor whose part of the whole is wanted; ``None``: all of it.
    """

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, like: DTensor | None) -> None:
        self._like = like
        self.block = Block((0,) * len(shape), tuple(shape)) if like is None else block_of(like)
        self._shape, self._local = tuple(shape), torch.empty(self.block.shape, dtype=dtype)
        self._n_missing = self._local.numel()

    def take(self, part: Tensor, offset: Sequence[int]) -> None:
        """Copy what is wanted of a part."""
        starts = [max(a, b) for a, b in zip(offset, self.block.offset, strict=True)]
        mine, theirs = zip(self.block.offset, self.block.shape, strict=True), zip(offset, part.shape, strict=True)
        ends = [min(a + n, b + m) for (a, n), (b, m) in zip(mine, theirs, strict=True)]
        if any(end <= start for start, end in zip(starts, ends, strict=True)):
            return
        here = tuple(slice(s - o, e - o) for s, e, o in zip(starts, ends, self.block.offset, strict=True))
        there = tuple(slice(s - o, e - o) for s, e, o in zip(starts, ends, offset, strict=True))
        self._local[here] = part[there]
        self._n_missing -= part[there].numel()

    def tensor(self) -> Tensor:
        """What was put together: a whole tensor, or this rank's part of one that is sharded as ``like`` is.

        Raises:
            Damage: parts are missing.
        """
        if self._n_missing:
            raise Damage(f"{self._n_missing} values are in none of the files")
        if self._like is None:
            return self._local
        return sharded_as(self._like, self._local.to(self._like.to_local().device), self._shape)


def sharded_as(like: DTensor, local: Tensor, shape: Sequence[int]) -> DTensor:
    """A sharded tensor of which ``local`` is this rank's part."""
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        local, like.device_mesh, like.placements, run_check=False, shape=torch.Size(shape), stride=stride
    )


def part_of(whole: Tensor, like: DTensor) -> DTensor:
    """This rank's part of a tensor that every rank has whole."""
    block = block_of(like)
    part = whole[tuple(slice(o, o + n) for o, n in zip(block.offset, block.shape, strict=True))]
    return sharded_as(like, part.contiguous().to(like.to_local().device), whole.shape)


def read_shards(
    directory: Path,
    files: Mapping[str, FileRecord],
    shapes: Mapping[str, tuple[torch.dtype, Sequence[int]]],
    like: Callable[[str, Sequence[int]], DTensor | None],
    *,
    mine: str | None = None,
) -> tuple[dict[str, Tensor], set[str]]:
    """Put tensors together from the files of all ranks.

    Args:
        files: records by path in the directory.
        shapes: dtype and shape of each whole tensor.
        like: how the tensor of a name and shape is sharded here.
        mine: the file that this rank would have written. If it holds all that is wanted, no other is read.

    Returns:
        The tensors, and the files that were read.

    Raises:
        Damage: a file is not what was saved, or parts are missing.
    """
    wanted = {name: Wanted(shape, dtype, like(name, shape)) for name, (dtype, shape) in shapes.items()}
    read = set()
    for name in _own_first(files, mine):
        read.add(name)
        try:
            tensors, metadata = read_tensors_and_metadata(directory / name, files[name])
        except Damage as damage:
            raise Damage(f"{name}: {damage}") from None
        offsets = json.loads(metadata[INFO])
        for key, part in tensors.items():
            wanted[key].take(part, offsets[key][OFFSETS])
        if name == mine and not any(one._n_missing for one in wanted.values()):
            break
    return {name: one.tensor() for name, one in wanted.items()}, read


def optimizer_layout(value: Any, name: str) -> dict[str, DTensor]:
    """How the state of an optimizer's parameters is sharded: like them. By the beginnings of the names of the state."""
    parameters = [parameter for group in value.param_groups for parameter in group["params"]]
    return {f"{name}.state.{i}.": p.detach() for i, p in enumerate(parameters) if isinstance(p, DTensor)}  # type: ignore[misc]


def _own_first(files: Iterable[str], mine: str | None) -> list[str]:
    return sorted(files, key=lambda name: (name != mine, name))
