"""A model in memory as a checkpoint, so that every writer can write it as it is now."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zoo.adapters.attach import attached_to
from zoo.adapters.discover import parameters_of
from zoo.convert.base import Checkpoint, what_is_lost
from zoo.errors import InputError, MissingTokenizerError
from zoo.families.base import Family, Rule
from zoo.spec import ModelSpec
from zoo.text.tokenizer import Tokenizer

_BIASES = {
    "qkv_bias": ("attn.q", "attn.k", "attn.v"),
    "attn_out_bias": ("attn.out",),
    "mlp_bias": ("mlp.gate", "mlp.up", "mlp.down"),
    "head_bias": ("head",),
}
"""The fields of a spec that say which linears have a bias."""


def from_model(model: nn.Module, origin: Checkpoint) -> Checkpoint:
    """A model with what its origin says beside the weights: config, tokenizer, provenance.

    Merged adapters are part of the weights. A bias that merging has added makes all linears of its kind have one, zero
    where nothing was added.

    Raises:
        InputError: an adapter has parts that are not in the weights, or the family's files can not hold a parameter.
    """
    for name, handle in attached_to(model).items():
        if handle.active and handle.plan.additions:
            raise InputError(
                f"adapter {name!r} is no part of the weights.", fix="Merge it or detach it first, or save it alone."
            )
    parameters = parameters_of(model)
    family, spec = origin.family, origin.spec
    if family.build is None:
        spec = _with_biases(family, spec, parameters)
    rules = family.keys.rules(spec)
    _check_shapes(rules, parameters)
    known = {name for rule in rules for name in rule.ours} | ({"head.weight"} if spec.tie_embeddings else set())
    if unknown := [name for name in parameters if name not in known]:
        raise InputError(f"files of the family {family.name!r} have no place for {', '.join(unknown[:4])}.")
    before, now = family.write_config(origin.spec), family.write_config(spec)
    changed = {key: value for key, value in now.items() if value != before.get(key)}
    return replace(
        origin,
        spec=spec,
        keys=family.keys,
        tensors=ModelTensors(rules, parameters),
        config={**origin.config, **changed},
        quantized=False,
        quantizer=None,
        integers=lambda stored: None,
    )


def fresh_checkpoint(family: Family, spec: ModelSpec, directory: Path, tokenizer: Tokenizer | None) -> Checkpoint:
    """The origin of a model that came from no file and is to be written to ``directory``."""

    def load_tokenizer() -> Tokenizer:
        if tokenizer is None:
            raise MissingTokenizerError(f"the model that was saved to {directory} had no tokenizer.")
        return tokenizer

    return Checkpoint(
        path=directory,
        family=family,
        spec=spec,
        keys=family.keys,
        tensors=ModelTensors([], {}),
        config=family.write_config(spec),
        load_tokenizer=load_tokenizer,
    )


def _check_shapes(rules: Sequence[Rule], parameters: Mapping[str, Tensor]) -> None:
    for rule in rules:
        for name, shape in zip(rule.ours, rule.shapes, strict=True):
            found = tuple(parameters[name].shape) if name in parameters else None
            if found != shape and not (found is None and name.endswith(".bias")):
                raise InputError(
                    f"the model's {name} is {found}, and the spec that it is to be saved with has {shape}.",
                    fix="Give what it was built with.",
                )


def _with_biases(family: Family, spec: ModelSpec, parameters: Mapping[str, Tensor]) -> ModelSpec:
    """The spec with the fewest kinds of biased linears that the family's config can say; else with those there are."""
    biased = {name.removesuffix(".bias").split(".", 2)[-1] for name in parameters if name.endswith(".bias")}
    needed = {field for field, roles in _BIASES.items() if biased.intersection(roles)}
    for n_more in range(len(_BIASES)):
        for more in combinations(sorted(_BIASES.keys() - needed), n_more):
            candidate = _with(spec, {*needed, *more})
            if not what_is_lost(candidate, family.read_config(family.write_config(candidate))):
                return candidate
    return _with(spec, needed)


def _with(spec: ModelSpec, flags: Iterable[str]) -> ModelSpec:
    return ModelSpec.from_dict({**spec.to_dict(), **dict.fromkeys(flags, True)})


class ModelTensors:
    """Reads a family's stored tensors from the parameters of a model.

    Args:
        rules: of the family.
        parameters: by name; a bias that is missing is zero.
    """

    def __init__(self, rules: Sequence[Rule], parameters: Mapping[str, Tensor]) -> None:
        self._rules = {rule.stored: rule for rule in rules}
        self._parameters = parameters

    def names(self) -> list[str]:
        """As `zoo.convert.base.TensorReader.names`."""
        return list(self._rules)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a stored tensor."""
        return self._rules[name].stored_shape

    def dtype(self, name: str) -> torch.dtype:
        """That of the parameters."""
        ours = self._rules[name].ours
        return next((self._parameters[one].dtype for one in ours if one in self._parameters), self._any.dtype)

    def get(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """The stored tensor, on the CPU."""
        rule = self._rules[name]
        parts = [self._one(one, shape) for one, shape in zip(rule.ours, rule.shapes, strict=True)]
        return rule.merge(parts).to(dtype or self.dtype(name))

    def _one(self, name: str, shape: tuple[int, ...]) -> Tensor:
        if name not in self._parameters:
            assert name.endswith(".bias")
            return torch.zeros(shape, dtype=self._any.dtype)
        return self._parameters[name].detach().cpu()

    @property
    def _any(self) -> Any:
        return next(iter(self._parameters.values()))
