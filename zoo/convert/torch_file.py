"""Files that ``torch.save`` wrote, old and new: unpickled by torch's weights-only reader, which runs no code."""

from __future__ import annotations

import pickle
import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zoo.convert.safetensors import DTYPE_NAMES
from zoo.errors import FileFormatError

_ZIP = b"PK\x03\x04"
_GLOBAL = re.compile(r"GLOBAL (\S+)")
"""How torch names what a pickle asked for."""


def load_torch_file(path: Path) -> Any:
    """What ``path`` holds: tensors, numbers, strings and containers of them.

    Tensors stay memory-mapped, copy-on-write, unless the file predates torch 1.6 (no zip archive).

    Raises:
        FileFormatError: it is missing, truncated or damaged, or holds anything else; none of that is run or built.
    """
    try:
        with path.open("rb") as file:
            zipped = file.read(len(_ZIP)) == _ZIP
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's hints on pickle protocols and TypedStorage are not for users
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except FileNotFoundError:
        raise FileFormatError(f"{path} is missing.", fix="Download the model again.") from None
    except pickle.UnpicklingError as error:
        raise _refused(path, str(error)) from None
    except Exception as error:  # noqa: BLE001 - an unpickler raises whatever the bytes make it raise
        raise FileFormatError(f"{path} is truncated or damaged: {_first_line(error)}. Nothing in it was run.") from None


def _refused(path: Path, said: str) -> FileFormatError:
    asked = _GLOBAL.search(said)
    if asked is None:
        return FileFormatError(f"{path} is truncated or damaged, or no file of tensors. Nothing in it was run.")
    return FileFormatError(
        f"{path} is a pickle that holds more than tensors: it asks for {asked[1]}. Nothing in it was run.",
        fix="Take a safetensors version, or one that was saved as torch.save(model.state_dict(), FILE).",
    )


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200].rstrip(".")


def checked_tensors(state: Any, where: str) -> dict[str, Tensor]:
    """A state dict, checked to be one.

    Raises:
        FileFormatError: it is no dict of dense tensors by name; the first wrong entry is named.
    """
    if not isinstance(state, dict):
        raise FileFormatError(f"{where} holds a {type(state).__name__}, not tensors by name.")
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise FileFormatError(f"{where}: {name!r} is a {type(tensor).__name__}, not a tensor with a name.")
        if tensor.layout is not torch.strided or tensor.dtype not in DTYPE_NAMES or tensor.device.type != "cpu":
            raise FileFormatError(
                f"{where}: tensor {name!r} is {tensor.dtype}, {tensor.layout}, on {tensor.device}; "
                "zoo reads dense tensors of floats and integers."
            )
    return {name: tensor.detach() for name, tensor in state.items()}


class TorchTensors:
    """The tensors of a state dict (a `TensorReader`)."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors
        firsts: dict[int, str] = {}
        for name, tensor in tensors.items():
            firsts.setdefault(tensor.data_ptr(), name)
        self._shared = {name for name, tensor in tensors.items() if firsts[tensor.data_ptr()] != name}

    @classmethod
    def from_file(cls, path: Path) -> TorchTensors:
        """All tensors of one file.

        Raises:
            FileFormatError: it is missing or damaged, or holds anything but tensors.
        """
        return cls(checked_tensors(load_torch_file(path), str(path)))

    @classmethod
    def from_shards(cls, files: Mapping[str, Path]) -> TorchTensors:
        """The tensors of several files, given the file that each name is in.

        Raises:
            FileFormatError: a file is missing or damaged, or lacks a tensor.
        """
        found = {}
        for path in dict.fromkeys(files.values()):
            inside = checked_tensors(load_torch_file(path), str(path))
            for name in (name for name, file in files.items() if file == path):
                if name not in inside:
                    raise FileFormatError(f"{path} lacks the tensor {name!r} that the index promises.")
                found[name] = inside[name]
        return cls({name: found[name] for name in files})

    def names(self) -> list[str]:
        """Stored names."""
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        """Stored dtype."""
        return self._tensors[name].dtype

    def get(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """A copy-on-write view of the mapped file, or a copy: of a conversion, or of what two names share."""
        tensor = self._tensors[name]
        if name in self._shared:  # else training one parameter would change the other
            tensor = tensor.clone()
        return tensor if dtype is None else tensor.to(dtype)


def without_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors with ``prefix`` taken off the names that begin with it (as ``torch.compile`` adds one)."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def some(names: Iterable[str]) -> str:
    """A few of the names, for a message."""
    listed = sorted(names)
    return ", ".join(listed[:4]) + (f" and {len(listed) - 4} more" if len(listed) > 4 else "")
