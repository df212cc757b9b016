"""Reading a step: the files that a rank needs, each verified as it is read, and by one rank those that nobody needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from zoo.errors import InputError
from zoo.store.files import Damage, FileRecord, check_file, read_json, read_tensors
from zoo.store.manifest import Manifest, damages
from zoo.store.parts import MODEL, MODEL_TREE, RAW_MODEL, RNG, SHARED, ModelFiles
from zoo.store.retention import Best
from zoo.store.shards import file_name, optimizer_layout, part_of, read_shards
from zoo.store.state import flatten, is_stateful, unflatten, unwrap


@dataclass(frozen=True)
class Loading:
    """One load of one rank."""

    root: Path
    which: str | int
    rank: int
    world_size: int
    best: Best | None = None
    identity: Any = None
    files: ModelFiles | None = None
    partial: bool = False
    check_finite: bool = True
    other_world_size: bool = False


@dataclass(frozen=True)
class Stored:
    """A state as it was saved, in memory: state dicts in place of objects."""

    state: dict[str, Any]
    rng: Any
    """Of this rank's generators; None if they are not to be restored."""
    optimizers: dict[str, Any]


def read_step(directory: Path, manifest: Manifest, keys: Mapping[str, Any], loading: Loading) -> Stored:
    """What a step holds for a rank, under the given keys.

    Raises:
        Damage: files of the step are not what was saved; one argument for each, naming it.
        InputError: ``model/`` is in another format than the store's.
    """
    step = _StepFiles(directory, manifest, loading.rank)
    state: dict[str, Any] = {}
    optimizers: dict[str, Any] = {}
    if MODEL in keys:
        state[MODEL] = step.model(loading.files, _sharding_of_model(keys[MODEL]))
    if any(key in manifest.shared for key in keys if key != MODEL):
        shared, content = step.part(SHARED, _sharding(keys))
        state |= shared
        optimizers = content.get("optimizers", {})
    # Ranks beyond those that saved, or fewer: all go on from what rank 0 had.
    is_same = manifest.world_size == loading.world_size
    own, _ = step.part(f"state/rank-{loading.rank if is_same else 0:05d}")
    state |= own
    if loading.rank == 0:
        step.check_rest(range(loading.world_size) if is_same else range(1))
    step.raise_problems()
    rng = state.pop(RNG) if is_same and not loading.partial else None
    return Stored({key: state[key] for key in keys}, rng, optimizers)


Sharding = Callable[[str, Sequence[int]], DTensor | None]
"""A tensor that is sharded as that of this name and shape is to be; ``None``: it is whole."""


def _whole(name: str, shape: Sequence[int]) -> DTensor | None:
    return None


def _parted(tensors: Mapping[str, Tensor], like: Sharding) -> dict[str, Tensor]:
    """Whole tensors, cut to what this rank has of those that are sharded here."""
    shardings = {name: like(name, tensor.shape) for name, tensor in tensors.items()}
    return {name: t if (s := shardings[name]) is None else part_of(t, s) for name, t in tensors.items()}


def _sharding_of_model(target: Any) -> Sharding:
    sharded = flatten(unwrap(target)).sharded if is_stateful(unwrap(target)) else {}
    return lambda name, shape: sharded.get(name)


def _sharding(targets: Mapping[str, Any]) -> Sharding:
    """Of everything but the model. What an optimizer keeps for a parameter is sharded like it, if shaped like it."""
    sharded: dict[str, DTensor] = {}
    optimizers: dict[str, DTensor] = {}
    for key, target in targets.items():
        value = unwrap(target)
        if isinstance(value, torch.optim.Optimizer):
            optimizers |= optimizer_layout(value, key)
        elif is_stateful(value) and key != MODEL:
            sharded |= flatten({key: value}).sharded

    def like(name: str, shape: Sequence[int]) -> DTensor | None:
        parameter = optimizers.get(name.rpartition(".")[0] + ".")
        return parameter if parameter is not None and parameter.shape == torch.Size(shape) else sharded.get(name)

    return like


class _StepFiles:
    def __init__(self, directory: Path, manifest: Manifest, rank: int) -> None:
        self._directory, self._manifest, self._rank = directory, manifest, rank
        self._problems: list[str] = []
        self._read: set[str] = set()

    def part(self, name: str, like: Sharding = _whole) -> tuple[dict[str, Any], dict[str, Any]]:
        """A part's state, and all that its JSON file says; empty if a file is damaged.

        Args:
            like: how a tensor of this name and shape is sharded here.
        """
        content, tensors = self._json(f"{name}.json"), self._tensors(f"{name}.safetensors")
        if content is None or tensors is None:
            return {}, {}
        shards = self._shards(name, content, like)
        return ({}, {}) if shards is None else (unflatten(content["tree"], _parted(tensors, like) | shards), content)

    def model(self, files: ModelFiles | None, like: Sharding) -> Any:
        """The model's state dict; None if a file is damaged."""
        content = self._json(MODEL_TREE)
        if content is None:
            return None
        if content.get("sharded"):
            tensors, shards = self._tensors(RAW_MODEL), self._shards(MODEL, content, like)
            return None if tensors is None or shards is None else unflatten(content["tree"], tensors | shards)
        if content["raw"] != (files is None):
            raise InputError(
                f"{self._directory / 'model'} is {'not ' * (files is None)}plain model.safetensors.",
                fix="Open the store with the model_files that it was saved with.",
            )
        if files is None:
            tensors = self._tensors(RAW_MODEL)
        else:
            names = [name for name in self._manifest.files if name.startswith("model/")]
            tensors = files.read(self._directory / "model") if self._check(names) else None
        return None if tensors is None else unflatten(content["tree"], _parted(tensors, like))

    def _shards(self, name: str, content: Mapping[str, Any], like: Sharding) -> dict[str, Tensor] | None:
        """The tensors that were saved in parts; None if a file is damaged."""
        if not content.get("sharded"):
            return {}
        shapes = {key: (getattr(torch, dtype), shape) for key, (dtype, shape) in content["sharded"].items()}
        prefix = f"{name}/"
        files = {f: r for f, r in self._manifest.files.items() if f.startswith(prefix + "shard-")}
        try:
            found, read = read_shards(self._directory, files, shapes, like, mine=prefix + file_name(self._rank))
        except Damage as damage:
            self._problems.append(str(damage))
            return None
        self._read |= read
        return found

    def check_rest(self, ranks: range) -> None:
        """Verify what no rank reads."""
        others = {f"state/rank-{rank:05d}.{kind}" for rank in ranks for kind in ("json", "safetensors")}
        read = [name for name in (MODEL, SHARED) if any(path.startswith(f"{name}/shard-") for path in self._read)]
        others |= {f"{name}/{file_name(rank)}" for name in read for rank in ranks}
        self._check([name for name in self._manifest.files if name not in self._read | others])

    def raise_problems(self) -> None:
        """Raise if there were any."""
        if self._problems:
            raise Damage(*self._problems)

    def _check(self, names: list[str]) -> bool:
        self._read |= set(names)
        found = damages(self._directory, {name: self._manifest.files[name] for name in names}, check_file)
        self._problems += found
        return not found

    def _json(self, name: str) -> Any:
        return self._get(name, read_json)

    def _tensors(self, name: str) -> Any:
        return self._get(name, read_tensors) if name in self._manifest.files else {}

    def _get(self, name: str, read: Callable[[Path, FileRecord], Any]) -> Any:
        """What a file holds; None if it is damaged."""
        self._read.add(name)
        found: list[Any] = []
        record = {name: self._manifest.files[name]}
        problems = damages(self._directory, record, lambda path, record: found.append(read(path, record)))
        self._problems += problems
        return None if problems else found[0]
