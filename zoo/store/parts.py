"""Who writes what: the one place that divides a training state over the files and the ranks of a step.

``model/``             the model, by rank 0: ``model.safetensors``, or whatever `ModelFiles` makes of it
``state/model.json``   its structure, by rank 0
``state/shared.*``     what all ranks have alike, by rank 0: optimizers, other modules
``state/rank-00000.*`` what each rank has of its own, by itself: random generators, position in the data, all the rest
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from zoo.errors import InputError
from zoo.store.files import FileRecord, record_of, sync_directory, write_json, write_tensors
from zoo.store.shards import file_name, local_part, sharded_as, write_shards
from zoo.store.state import Flat, flatten, place, unwrap

MODEL = "model"
"""The key of the state that goes to ``model/``: a module, or tensors by name."""
RNG = "__rng__"
RAW_MODEL = "model/model.safetensors"
MODEL_TREE = "state/model.json"
SHARED = "state/shared"
_ALIKE = (MODEL, "optimizer")


class ModelFiles(Protocol):
    """What ``model/`` holds, in place of ``model.safetensors``: a model directory, an adapter directory."""

    def write(self, directory: Path, tensors: Mapping[str, Tensor]) -> None:
        """Write these tensors, and whatever else belongs to the format, into an empty directory.

        Args:
            tensors: those of the model's state dict, each storage once. They are a snapshot when the store saves in
                the background; the model itself may have moved on.
        """
        ...

    def read(self, directory: Path) -> Mapping[str, Tensor]:
        """The tensors that were written, to the bit and by the same names, in memory of their own."""
        ...


@dataclass(frozen=True)
class Parts:
    """A state, divided. Nothing is copied."""

    model: Flat | None
    shared: Flat
    own: Flat
    shared_keys: list[str]
    own_keys: list[str]
    parameters: list[str]
    """Names of the model's tensors that are trained: the parameters of a module."""
    optimizers: dict[str, Any]
    """Of each optimizer, by its place: dtypes and shapes of its parameters, in order."""

    def layout(self) -> dict[str, str]:
        """A digest of each part that must be alike on all ranks, by what it is."""
        shared = {name: _shape(tensor) for name, tensor in (self.shared.tensors | self.shared.sharded).items()}
        keys = [key for key in self.shared_keys if key != MODEL]
        found = {key: _digest({n: s for n, s in shared.items() if n.startswith(f"{key}.")}) for key in keys}
        if self.model is not None:
            found[MODEL] = fingerprint(self.model)
        return {**found, "the keys": _digest([self.shared_keys, self.own_keys])}

    def for_rank(self, rank: int) -> Parts:
        """What a rank writes of it."""
        if rank == 0:
            return self
        model = None if self.model is None else Flat({}, {}, {}, self.model.sharded)
        return Parts(model, Flat({}, {}, {}, self.shared.sharded), self.own, [], self.own_keys, [], {})

    def snapshot(self) -> Parts:
        """A copy in host memory, for a save that goes on while the training does."""
        model = None if self.model is None else _copied(self.model)
        keys = self.shared_keys, self.own_keys, self.parameters, self.optimizers
        return Parts(model, _copied(self.shared), _copied(self.own), *keys)


def divide(state: Mapping[str, Any], rng: Mapping[str, Any]) -> Parts:
    """Divide a state.

    Raises:
        InputError: it holds something that no checkpoint can.
    """
    if not isinstance(state, Mapping) or not all(type(key) is str for key in state):
        raise InputError("the state must be a mapping from names to what is saved under them.")
    shared = {key: value for key, value in state.items() if key != MODEL and _is_alike(key, value)}
    own = {key: value for key, value in state.items() if key != MODEL and key not in shared}
    model = unwrap(state.get(MODEL))
    has_model = MODEL in state
    return Parts(
        flatten(model, (MODEL,)) if has_model else None,
        flatten(shared),
        flatten({**own, RNG: rng}),
        [*([MODEL] if has_model else []), *shared],
        list(own),
        [name for name, _ in model.named_parameters()] if isinstance(model, nn.Module) else [],
        optimizer_parameters(state),
    )


def write_parts(directory: Path, parts: Parts, rank: int, files: ModelFiles | None) -> dict[str, FileRecord]:
    """Write what a rank writes into the directory of a step, down to the disk.

    Returns:
        The record of each file, by its path in the step.

    Raises:
        OSError: it can not be written.
    """
    for name in ("state", *(["model"] if parts.model is not None else [])):
        (directory / name).mkdir(parents=True, exist_ok=True)
    jobs: list[Callable[[], dict[str, FileRecord]]] = [partial(_write, directory, f"state/rank-{rank:05d}", parts.own)]
    if rank == 0:
        jobs.append(partial(_write, directory, SHARED, parts.shared, optimizers=parts.optimizers))
        if parts.model is not None:
            jobs.append(partial(_write_model, directory, parts.model, files))
    for name, flat in ((MODEL, parts.model), (SHARED, parts.shared)):
        if flat is not None and flat.sharded:
            jobs.append(partial(_write_shards, directory, f"{name}/{file_name(rank)}", flat))
    # A disk is faster than one digest: files are written and hashed side by side.
    with ThreadPoolExecutor(len(jobs), thread_name_prefix="write") as threads:
        done = [threads.submit(job) for job in jobs]
    sync_directory(directory / "state")
    return {name: record for job in done for name, record in job.result().items()}


def _write_shards(directory: Path, path: str, flat: Flat) -> dict[str, FileRecord]:
    (directory / path).parent.mkdir(exist_ok=True)
    record = write_shards(directory / path, flat.sharded)
    sync_directory((directory / path).parent)
    return {path: record}


def _write(directory: Path, name: str, flat: Flat, **more: Any) -> dict[str, FileRecord]:
    records = {
        f"{name}.json": write_json(directory / f"{name}.json", {"tree": flat.tree, "sharded": _shapes(flat), **more})
    }
    if flat.tensors:
        records[f"{name}.safetensors"] = write_tensors(directory / f"{name}.safetensors", flat.tensors)
    return records


def _write_model(directory: Path, model: Flat, files: ModelFiles | None) -> dict[str, FileRecord]:
    """A model of which each rank has a part is in no format of ``files``: they write it whole."""
    inside = directory / "model"
    is_raw = files is None or bool(model.sharded)
    content = {"raw": is_raw, "tree": model.tree, "sharded": _shapes(model)}
    records = {MODEL_TREE: write_json(directory / MODEL_TREE, content)}
    if is_raw and (model.tensors or not model.sharded):
        records[RAW_MODEL] = write_tensors(directory / RAW_MODEL, model.tensors)
    elif files is not None and not is_raw:
        files.write(inside, model.tensors)
        paths = sorted(path for path in inside.rglob("*") if path.is_file())
        records |= {path.relative_to(directory).as_posix(): record_of(path) for path in paths}
    for path in (inside, *(path for path in inside.rglob("*") if path.is_dir())):
        sync_directory(path)
    return records


def not_finite(parts: Parts) -> list[str]:
    """Names of parameters that hold an infinity or a NaN; without a module, of all tensors of the model."""
    if parts.model is None:
        return []
    tensors = parts.model.tensors | parts.model.sharded
    names = set(parts.parameters) or set(tensors)
    return [name for name, tensor in tensors.items() if name in names and not is_finite(tensor)]


def is_finite(tensor: Tensor) -> bool:
    """Whether it holds no infinity and no NaN, as far as it is here. One sum tells, unless finite values overflow."""
    tensor = local_part(tensor)
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    values = tensor.float() if tensor.dtype.itemsize == 1 else tensor
    wide = None if values.dtype.itemsize > 2 else torch.float32
    return bool(torch.isfinite(values.sum(dtype=wide))) or bool(torch.isfinite(values).all())


def fingerprint(model: Flat) -> str:
    """A sha256 of the model's tensor names, shapes, dtypes and ties."""
    return _digest(
        [sorted((name, *_shape(t)) for name, t in (model.tensors | model.sharded).items()), sorted(model.ties.items())]
    )


def optimizer_parameters(value: Any, path: tuple[Any, ...] = ()) -> dict[str, Any]:
    """Dtypes and shapes of the parameters of every optimizer in a state, by its place.

    The state of an optimizer knows its parameters by number only; another model with as many would pass.
    """
    value = unwrap(value)
    if isinstance(value, torch.optim.Optimizer):
        return {place(path): [_shape(p) for group in value.param_groups for p in group["params"]]}
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    return {name: found for key, item in items for name, found in optimizer_parameters(item, (*path, key)).items()}


def _is_alike(key: str, value: Any) -> bool:
    """Whether all ranks have the same of it. What is not known to be alike each rank keeps: small, and never wrong."""
    value = unwrap(value)
    if key in _ALIKE or isinstance(value, nn.Module | torch.optim.Optimizer):
        return True
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return any(_is_alike("", item) for item in inside)


def _copied(flat: Flat) -> Flat:
    tensors = {name: tensor.to("cpu", copy=True) for name, tensor in flat.tensors.items()}
    sharded = {name: sharded_as(t, t.to_local().to("cpu", copy=True), t.shape) for name, t in flat.sharded.items()}
    return Flat(tensors, flat.tree, flat.ties, sharded)


def _shapes(flat: Flat) -> dict[str, list[Any]]:
    """Dtype and shape of each sharded tensor as a whole."""
    return {name: _shape(tensor) for name, tensor in flat.sharded.items()}


def _shape(tensor: Tensor) -> list[Any]:
    return [str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
