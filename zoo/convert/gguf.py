"""llama.cpp's GGUF files as checkpoints: family by architecture, config from metadata, tensors dequantized."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from zoo.convert.base import Checkpoint
from zoo.convert.gguf_file import GGUFTensors, begins_as_gguf
from zoo.errors import FileFormatError, InputError, UnavailableError
from zoo.families.base import Family
from zoo.registry import BUILT_IN, Registry
from zoo.text.gguf_tokenizer import tokenizer_from_gguf
from zoo.text.tokenizer import Tokenizer

_NEUTRAL: dict[str, Any] = {"expert_count": 0, "expert_used_count": 0, "attention.causal": True}
"""Keys of an architecture that change nothing at these values, and that no family needs to know."""
_LABELS = {"tensor_data_layout"}
"""Keys of an architecture that never change what the model computes."""
_ROPE_FREQS = "rope_freqs"
"""Where a family finds the factors of the tensor ``rope_freqs.weight``, as a list of floats."""

_SPECIAL_IDS = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "pad_token_id": "padding_token_id"}
_SAMPLING = {
    "temperature": "temp",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "penalty_repeat",
}


class GGUF:
    """The converter of a ``.gguf`` file, or of a directory that holds one and no ``config.json``."""

    def reads(self, path: Path) -> bool:
        """Whether ``path`` is a file that begins as GGUF does, or a directory with exactly one."""
        if path.is_dir() and (path / "config.json").exists():
            return False
        try:
            _locate(path)
        except FileFormatError:
            return False
        return True

    def open(self, path: Path, registry: Registry) -> Checkpoint:
        """Open a GGUF file; tensors are read when asked for.

        Raises:
            FileFormatError: it is damaged, truncated, or holds something that is not understood.
            InputError: no registered family reads its architecture, or it has settings that the family does not know.
        """
        path = _locate(path)
        tensors = GGUFTensors(path)
        metadata = tensors.metadata
        with _naming(path):
            _refuse_fragments(metadata)
        family = _family(path, metadata.get("general.architecture"), registry)
        assert family.gguf is not None
        with _naming(path):
            config = _config(metadata, tensors, family)
            spec = family.read_config(config)
            if spec.n_layers > len(tensors.names()):
                raise FileFormatError(f"it says that it has {spec.n_layers} layers, but holds fewer tensors.")
            generation = _generation(metadata)

        def load_tokenizer() -> Tokenizer:
            with _naming(path):
                return tokenizer_from_gguf(metadata)

        return Checkpoint(
            path=path,
            family=family,
            spec=spec,
            keys=family.gguf.keys,
            tensors=tensors,
            config=config,
            load_tokenizer=load_tokenizer,
            generation=generation,
            quantized=tensors.quantized,
        )


def _locate(path: Path) -> Path:
    """The GGUF file that ``path`` means."""
    if not path.is_dir():
        if not path.exists():
            raise FileFormatError(f"{path} does not exist.")
        if not begins_as_gguf(path):
            raise FileFormatError(f"{path} is not a GGUF file: it does not begin with 'GGUF'.")
        return path
    found = [file for file in sorted(path.glob("*.gguf")) if begins_as_gguf(file)]
    if len(found) != 1:
        names = ", ".join(file.name for file in found) or "none"
        raise FileFormatError(f"{path} must hold exactly one GGUF file; it holds {names}.", fix="Name the file itself.")
    return found[0]


def _refuse_fragments(metadata: Mapping[str, Any]) -> None:
    if metadata.get("split.count", 0) > 1:
        raise InputError(
            f"it is one of {metadata['split.count']} pieces of a model.",
            fix="Put them together first: llama-gguf-split --merge FIRST_PIECE OUTPUT.",
        )
    if metadata.get("general.type", "model") != "model":
        raise InputError(f"it holds no model but a thing of type {metadata['general.type']!r}.")


def _family(path: Path, architecture: Any, registry: Registry) -> Family:
    """The family that reads ``architecture``; zoo's own first, and those that do not load are passed over."""
    known, broken = [], []
    components = list(registry.components("family"))
    components.sort(key=lambda item: item[1].origin.distribution != BUILT_IN)
    for ref, _ in components:
        try:
            family: Family = registry.load("family", ref)
        except UnavailableError:
            broken.append(ref)
            continue
        if family.gguf is not None:
            if family.gguf.architecture == architecture:
                return family
            known.append(family.gguf.architecture)
    if architecture is None:
        raise FileFormatError(f"{path} lacks the metadata key 'general.architecture'.")
    unloaded = f" (Families that did not load: {', '.join(broken)}.)" if broken else ""
    raise InputError(f"{path} has the architecture {architecture!r}; zoo reads {', '.join(sorted(known))}.{unloaded}")


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


def _config(metadata: Mapping[str, Any], tensors: GGUFTensors, family: Family) -> dict[str, Any]:
    """The Hugging Face config of a file.

    Raises:
        KeyError: metadata that the family needs are missing.
        InputError: there are metadata of the architecture that neither the family nor zoo understands.
    """
    assert family.gguf is not None
    names = tensors.names()
    values = dict(metadata)
    if "rope_freqs.weight" in names:
        values[_ROPE_FREQS] = tensors.get("rope_freqs.weight", torch.float32).flatten().tolist()
    view = _Metadata(values)
    prefix = f"{family.gguf.architecture}."
    config: dict[str, Any] = {
        "model_type": family.model_type,
        "architectures": [family.architecture],
        "vocab_size": view.get(f"{prefix}vocab_size") or tensors.shape("token_embd.weight")[0],
        "tie_word_embeddings": "output.weight" not in names,
        **_special_ids(metadata),
        **family.gguf.read_config(view),
    }
    left = [key for key in values if key.startswith(prefix) or key == _ROPE_FREQS]
    left = [key for key in left if key not in view.asked and not _harmless(key.removeprefix(prefix), values[key])]
    if left:
        shown = ", ".join(f"{key} = {values[key]!r:.60}" for key in left)
        raise InputError(f"it has settings that zoo does not understand: {shown}.")
    return config


def _harmless(key: str, value: Any) -> bool:
    return key in _LABELS or (key in _NEUTRAL and bool(_NEUTRAL[key] == value))


def _special_ids(metadata: Mapping[str, Any]) -> dict[str, int]:
    found = {ours: metadata.get(f"tokenizer.ggml.{theirs}") for ours, theirs in _SPECIAL_IDS.items()}
    return {key: value for key, value in found.items() if value is not None}


def _generation(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What generation_config.json would hold. Every token that ends a text or a turn is an ``eos_token_id``."""
    found: dict[str, Any] = dict(_special_ids(metadata))
    ends = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    unique = list(dict.fromkeys(end for end in ends if end is not None))
    if unique:
        found["eos_token_id"] = unique[0] if len(unique) == 1 else unique
    sampling = {ours: metadata.get(f"general.sampling.{theirs}") for ours, theirs in _SAMPLING.items()}
    return found | {key: value for key, value in sampling.items() if value is not None}


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Errors raised within name the file; what values of a wrong type or size cause is a `FileFormatError`."""
    try:
        yield
    except InputError as error:
        kind = FileFormatError if isinstance(error, FileFormatError) else InputError
        named = error.message if error.message.startswith(str(path)) else f"{path}: {error.message}"
        raise kind(named, fix=error.fix) from None
    except KeyError as error:
        raise FileFormatError(f"{path} lacks the metadata key {error.args[0]!r}.") from None
    except (ArithmeticError, TypeError, ValueError) as error:
        raise FileFormatError(f"{path} has metadata that make no sense: {error}.") from error
