"""A GGUF file's metadata and the configs that they stand for, read in both directions."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from zoo.convert.base import what_is_lost
from zoo.errors import InputError
from zoo.families.base import Family
from zoo.families.gguf_metadata import ROPE_TENSORS, TENSORS
from zoo.spec import ModelSpec

_HEAD = "output.weight"
_NEUTRAL: dict[str, Any] = {"expert_count": 0, "expert_used_count": 0, "attention.causal": True}
"""Keys of an architecture that change nothing at these values, and that no family needs to know."""
_LABELS = {"tensor_data_layout"}
"""Keys of an architecture that never change what the model computes."""

_SPECIAL_IDS = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "pad_token_id": "padding_token_id"}
_TOKENS = "tokenizer.ggml.tokens"
_ENDS = ("eos", "eot", "eom")
"""Tokens that end a text, a turn and a message."""
_SAMPLING = {
    "temperature": "temp",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "penalty_repeat",
}


class _Metadata(Mapping[str, Any]):
    """Metadata as a family reads them; remembers the keys that were asked for."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = values
        self.asked: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


def config_from_metadata(
    values: Mapping[str, Any], names: Collection[str], vocab_size: int, family: Family
) -> dict[str, Any]:
    """The Hugging Face config of a file.

    Args:
        values: its metadata, with what it has of `ROPE_TENSORS`.
        names: of its tensors.
        vocab_size: rows of its embedding.
        family: the one that reads its architecture.

    Raises:
        KeyError: metadata that the family needs are missing.
        InputError: there are metadata of the architecture that neither the family nor zoo understands.
    """
    assert family.gguf is not None
    view = _Metadata({**values, TENSORS: frozenset(names)})
    prefix = f"{family.gguf.architecture}."
    config: dict[str, Any] = {
        "model_type": family.model_type,
        "architectures": [family.architecture],
        "vocab_size": view.get(f"{prefix}vocab_size") or vocab_size,
        "tie_word_embeddings": _HEAD not in names,
        **_special_ids(values),
        **family.gguf.read_config(view),
    }
    left = [key for key in values if key.startswith(prefix) or key in ROPE_TENSORS]
    left = [key for key in left if key not in view.asked and not _harmless(key.removeprefix(prefix), values[key])]
    if left:
        shown = ", ".join(f"{key} = {values[key]!r:.60}" for key in left)
        raise InputError(f"it has settings that zoo does not understand: {shown}.")
    return config


def metadata_from_spec(spec: ModelSpec, family: Family) -> dict[str, Any]:
    """The metadata of an architecture, with what it needs of `ROPE_TENSORS`.

    Raises:
        InputError: zoo writes no GGUF for this family, or reading back what it writes gives another model.
    """
    gguf = family.gguf
    if gguf is None or gguf.write_metadata is None:
        raise InputError(f"zoo can not write models of the family {family.name!r} as GGUF.")
    metadata = {f"{gguf.architecture}.vocab_size": spec.vocab_size, **gguf.write_metadata(spec)}
    values = {key: as_float32(value) for key, value in metadata.items()}
    try:
        again = family.read_config(config_from_metadata(values, gguf.keys.stored_names(spec), spec.vocab_size, family))
    except InputError as error:
        raise InputError(f"a GGUF file can not hold this model: {error.message}") from None
    lost = what_is_lost(_with_float32_factors(spec), again, as_float32)
    if lost:
        raise InputError(f"a GGUF file of the architecture {gguf.architecture!r} can not say {', '.join(lost)}.")
    return metadata


def norm_offsets(spec: ModelSpec, family: Family) -> dict[str, float]:
    """What is added to the weights of norms in a file, by name: llama.cpp knows no ``norm_offset``."""
    assert family.gguf is not None
    names = family.gguf.keys.stored_names(spec) if spec.norm_offset else []
    return {name: spec.norm_offset for name in names if name.endswith("norm.weight")}


def generation_from_metadata(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What generation_config.json would hold. Every token that ends a text or a turn is an ``eos_token_id``."""
    found: dict[str, Any] = dict(_special_ids(metadata))
    ends = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in _ENDS]
    unique = list(dict.fromkeys(end for end in ends if end is not None))
    if unique:
        found["eos_token_id"] = unique[0] if len(unique) == 1 else unique
    sampling = {ours: metadata.get(f"general.sampling.{theirs}") for ours, theirs in _SAMPLING.items()}
    return found | {key: value for key, value in sampling.items() if value is not None}


def metadata_from_generation(
    generation: Mapping[str, Any], config: Mapping[str, Any], known: Mapping[str, Any], added: Collection[int]
) -> dict[str, Any]:
    """Tokens that end a reply, and the sampling defaults; what generation_config.json lacks is in config.json.

    Both files often hold defaults that nobody has changed. An id outside the vocabulary is left out; what the tokenizer
    calls BOS, EOS and padding stays, unless a token of its own is named: llama.cpp finds these tokens in any text.

    Args:
        generation: content of generation_config.json.
        config: content of config.json.
        known: the metadata that the tokenizer gives.
        added: ids of the tokens that the tokenizer finds in a text before it splits it.

    Raises:
        InputError: more tokens end a text than a GGUF file has room for.
    """
    both = {**config, **generation}
    found: dict[str, Any] = {}
    for ours, theirs in _SPECIAL_IDS.items():
        key = f"tokenizer.ggml.{theirs}"
        if ours != "eos_token_id" and key not in known and both.get(ours) in added:
            found[key] = both[ours]
    ends = both.get("eos_token_id")
    ends = [end for end in (ends if isinstance(ends, list) else [ends]) if end in range(len(known[_TOKENS]))]
    first = next(
        (end for end in ends if end in added), known.get("tokenizer.ggml.eos_token_id", next(iter(ends), None))
    )
    every = [end for end in (first, *(end for end in ends if end != first)) if end is not None]
    if len(every) > len(_ENDS):
        raise InputError(f"{len(every)} tokens end a text ({every}); a GGUF file names at most three.")
    found |= {f"tokenizer.ggml.{name}_token_id": end for name, end in zip(_ENDS, every, strict=False)}
    sampling = {f"general.sampling.{theirs}": generation.get(ours) for ours, theirs in _SAMPLING.items()}
    return found | {key: value for key, value in sampling.items() if value is not None}


def _harmless(key: str, value: Any) -> bool:
    return key in _LABELS or (key in _NEUTRAL and bool(_NEUTRAL[key] == value))


def _special_ids(metadata: Mapping[str, Any]) -> dict[str, int]:
    found = {ours: metadata.get(f"tokenizer.ggml.{theirs}") for ours, theirs in _SPECIAL_IDS.items()}
    return {key: value for key, value in found.items() if value is not None}


def _with_float32_factors(spec: ModelSpec) -> ModelSpec:
    """``spec`` with the factors of its rotary scaling as they come back from a file."""
    if spec.rope is None or spec.rope.scaling is None:
        return spec
    scaling = spec.rope.scaling
    short, long = (tuple(as_float32(list(factors))) for factors in (scaling.short_factors, scaling.long_factors))
    return replace(spec, rope=replace(spec.rope, scaling=replace(scaling, short_factors=short, long_factors=long)))


def as_float32(value: Any) -> Any:
    """A float, or each of a list, as it comes back from a file: the shortest decimal of the float32 next to it."""
    if isinstance(value, list):
        return [as_float32(each) for each in value]
    return float(str(np.float32(value))) if isinstance(value, float) else value
