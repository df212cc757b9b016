"""Nested training state as named tensors and a JSON tree, and back: to the bit, with no pickle."""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from zoo.errors import InputError
from zoo.store.files import DTYPES

Json = Any

_ALLOWED = (
    "A checkpoint holds dicts, lists and tuples of tensors, numpy arrays, numbers, strings, booleans and None, and "
    "objects with state_dict() and load_state_dict()."
)
_MAPPINGS: dict[str, type] = {"OrderedDict": OrderedDict, "Counter": Counter}
"""Kinds of dict that are restored as what they were: schedulers count with a Counter."""
_FLOATS = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


@runtime_checkable
class Stateful(Protocol):
    """An object that gives its state and takes it: modules, optimizers, schedulers, gradient scalers, adapters."""

    def state_dict(self) -> Any:
        """The state, as nested containers."""
        ...

    def load_state_dict(self, state_dict: Any, /) -> Any:
        """Take it back."""
        ...


class Flat(NamedTuple):
    """A state, taken apart."""

    tensors: dict[str, Tensor]
    """Detached views of the caller's memory by name, each storage once; of a module, the names of its state dict."""
    tree: Json
    """The rest, with ``{"$tensor": name}`` where tensors go. What JSON lacks is an object with one ``$`` key."""
    ties: dict[str, str]
    """Of each tensor that shares all its memory with one before it: its name, and the name it is stored by."""
    sharded: dict[str, DTensor] = {}  # noqa: RUF012 - never changed
    """Tensors of which each rank has a part; named like the others, and no ties."""

    def all(self) -> dict[str, Tensor]:
        """Every tensor by its name, tied ones by each of theirs."""
        tied = {name: self.tensors[stored] for name, stored in self.ties.items()}
        return {**self.tensors, **tied, **self.sharded}


def flatten(state: Any, at: tuple[Any, ...] = ()) -> Flat:
    """Take a nested state apart. Nothing is copied, but for arrays that are not contiguous.

    Args:
        state: any nesting of dicts (keys: strings, numbers, booleans, None, tuples of these), lists and tuples of
            tensors, numpy arrays and scalars, numbers, strings, booleans, None and `Stateful` objects.
        at: where in the whole state this is, for messages.

    Raises:
        InputError: something else is in it; the message gives its place and type.
    """
    flattener = _Flattener(at)
    tree = flattener.encode(state, ())
    return Flat(flattener.tensors, tree, flattener.ties, flattener.sharded)


def unflatten(tree: Json, tensors: Mapping[str, Tensor]) -> Any:
    """The state that `flatten` took apart. Tied tensors are one object again; objects come as their state dicts.

    Raises:
        KeyError: a tensor is missing.
    """
    return _Unflattener(tensors).decode(tree)


def unwrap(value: Any) -> Any:
    """What a module or optimizer is without the wrappers of DDP, ``torch.compile`` and Fabric.

    Wrappers change the names of parameters; a state saved by two ranks must fit a single process.
    """
    if isinstance(value, torch.optim.Optimizer):
        inner = getattr(value, "_optimizer", None) if hasattr(value, "_strategy") else None
        return unwrap(inner) if isinstance(inner, torch.optim.Optimizer) else value
    if isinstance(value, nn.Module):
        inner = value.module if isinstance(value, nn.parallel.DistributedDataParallel) else None
        for name in ("_original_module", "_orig_mod"):
            inner = getattr(value, name, None) if inner is None else inner
        return unwrap(inner) if isinstance(inner, nn.Module) else value
    return value


def is_stateful(value: Any) -> bool:
    """Whether it gives and takes its state by itself."""
    return isinstance(value, Stateful) and not isinstance(value, type)


class _Flattener:
    def __init__(self, at: tuple[Any, ...]) -> None:
        self._at = at
        self.tensors: dict[str, Tensor] = {}
        self.ties: dict[str, str] = {}
        self.sharded: dict[str, DTensor] = {}
        self._stored: dict[tuple[Any, ...], str] = {}
        self._inside: list[int] = []

    def encode(self, value: Any, path: tuple[Any, ...]) -> Json:
        if value is None or type(value) in (bool, int, str):
            return value
        if type(value) is float:
            return value if math.isfinite(value) else {"$float": str(value)}
        if isinstance(value, DTensor):
            name = self._free_name(".".join(str(key) for key in path))
            self.sharded[name] = value.detach()  # type: ignore[assignment]
            return {"$tensor": name}
        if isinstance(value, Tensor):
            return {"$tensor": self._store(plain(value, self._at + path), path)}
        if isinstance(value, np.ndarray | np.generic):
            return self._encode_numpy(value, path)
        return self._encode_container(value, path)

    def _encode_container(self, value: Any, path: tuple[Any, ...]) -> Json:
        if id(value) in self._inside:
            raise InputError(f"{self._place(path)} contains itself.", fix=_ALLOWED)
        self._inside.append(id(value))
        try:
            if is_stateful(value):
                return self.encode(unwrap(value).state_dict(), path)
            if type(value) is list:
                return [self.encode(item, (*path, i)) for i, item in enumerate(value)]
            if type(value) in (tuple, torch.Size):
                return {"$tuple": [self.encode(item, (*path, i)) for i, item in enumerate(value)]}
            if type(value) is dict or type(value) in _MAPPINGS.values():
                return self._encode_mapping(value, path)
        finally:
            self._inside.pop()
        raise InputError(
            f"{self._place(path)} is a {type(value).__qualname__}, which no checkpoint can hold.", fix=_ALLOWED
        )

    def _encode_mapping(self, value: Mapping[Any, Any], path: tuple[Any, ...]) -> Json:
        items = [(key, self.encode(item, (*path, key))) for key, item in value.items()]
        if type(value) is dict and all(type(key) is str and not key.startswith("$") for key, _ in items):
            return dict(items)
        pairs = [[self._encode_key(key, path), item] for key, item in items]
        return {"$dict": pairs} if type(value) is dict else {f"${type(value).__name__}": pairs}

    def _encode_key(self, key: Any, path: tuple[Any, ...]) -> Json:
        if key is None or type(key) in (bool, int, float, str):
            return self.encode(key, path)
        if type(key) is tuple:
            return {"$tuple": [self._encode_key(item, path) for item in key]}
        raise InputError(
            f"{self._place(path)} has a key of type {type(key).__qualname__}, which no checkpoint can hold.",
            fix="Keys are strings, numbers, booleans, None, and tuples of these.",
        )

    def _encode_numpy(self, value: Any, path: tuple[Any, ...]) -> Json:
        tag = "$array" if isinstance(value, np.ndarray) else "$scalar"
        array = np.asarray(value)
        try:
            if type(value) is not np.ndarray and tag == "$array":
                raise TypeError
            array = array if array.flags.c_contiguous and array.flags.writeable else np.array(array, order="C")
            tensor = torch.from_numpy(array)
        except (TypeError, ValueError):
            kind = f"{type(value).__qualname__} of dtype {array.dtype}"
            raise InputError(
                f"{self._place(path)} is a numpy {kind}, which no checkpoint can hold.", fix=_ALLOWED
            ) from None
        return {tag: self._store(plain(tensor, self._at + path), path)}

    def _store(self, tensor: Tensor, path: tuple[Any, ...]) -> str:
        name = self._free_name(".".join(str(key) for key in path))
        identity = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        # What is kept here stays alive, so that an address can not come back as another tensor's.
        if tensor.numel() and identity in self._stored:
            self.ties[name] = self._stored[identity]
            return self._stored[identity]
        self.tensors[name] = tensor
        self._stored[identity] = name
        return name

    def _free_name(self, name: str) -> str:
        wanted, n = name, 1
        # safetensors keeps __metadata__ for itself; "a.b" may come from {"a.b": ...} and from {"a": {"b": ...}}.
        while name in self.tensors or name in self.ties or name in self.sharded or name in ("", "__metadata__"):
            n += 1
            name = f"{wanted}#{n}"
        return name

    def _place(self, path: tuple[Any, ...]) -> str:
        return place(self._at + path)


class _Unflattener:
    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors
        self._arrays: dict[str, Any] = {}

    def decode(self, tree: Json) -> Any:
        if isinstance(tree, list):
            return [self.decode(item) for item in tree]
        if not isinstance(tree, dict):
            return tree
        tag = next(iter(tree), "")
        if not tag.startswith("$"):
            return {key: self.decode(item) for key, item in tree.items()}
        return self._decode_tagged(tag, tree[tag])

    def _decode_tagged(self, tag: str, content: Any) -> Any:
        if tag == "$tensor":
            return self._tensors[content]
        if tag == "$array":
            return self._arrays.setdefault(content, self._tensors[content].numpy())
        if tag == "$scalar":
            return self._tensors[content].numpy()[()]
        if tag == "$float":
            return _FLOATS[content]
        if tag == "$tuple":
            return tuple(self.decode(item) for item in content)
        pairs = {self.decode(key): self.decode(item) for key, item in content}
        return pairs if tag == "$dict" else _MAPPINGS[tag[1:]](pairs)


def plain(tensor: Tensor, path: tuple[Any, ...]) -> Tensor:
    """The tensor without its graph.

    Raises:
        InputError: its values can not be stored as they are.
    """
    detached = tensor.detach().resolve_conj().resolve_neg()
    if type(detached) is not Tensor:
        problem = f"is a {type(tensor).__qualname__}"
    elif detached.is_meta:
        problem = "is on the meta device and has no values"
    elif detached.layout is not torch.strided or detached.is_quantized:
        problem = f"is a tensor of layout {detached.layout}, quantized: {detached.is_quantized}"
    elif detached.dtype not in DTYPES:
        problem = f"is a tensor of dtype {detached.dtype}"
    else:
        return detached
    allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
    raise InputError(f"{place(path)} {problem}, which no checkpoint can hold.", fix=f"Allowed: dense {allowed}.")


def place(path: tuple[Any, ...]) -> str:
    """Where something is, as one would write it in Python."""
    return "state" + "".join(f"[{key!r}]" for key in path)
