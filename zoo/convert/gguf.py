"""llama.cpp's GGUF files as checkpoints: family by architecture, config from metadata, tensors dequantized."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from zoo.convert.base import Checkpoint, WriteOptions, Writing
from zoo.convert.gguf_config import as_float32, config_from_metadata, generation_from_metadata, norm_offsets
from zoo.convert.gguf_file import GGUFTensors, begins_as_gguf
from zoo.convert.gguf_writer import write_gguf
from zoo.errors import FileFormatError, InputError, MissingTokenizerError, UnavailableError
from zoo.families.base import Family
from zoo.families.gguf_metadata import ROPE_TENSORS
from zoo.registry import BUILT_IN, Registry
from zoo.text.gguf_tokenizer import tokenizer_from_gguf
from zoo.text.tokenizer import Tokenizer


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
            config = _config(tensors, family)
            spec = family.read_config(config)
            if spec.n_layers > len(tensors.names()):
                raise FileFormatError(f"it says that it has {spec.n_layers} layers, but holds fewer tensors.")
            tensors.offsets = norm_offsets(spec, family)
            generation = generation_from_metadata(metadata)

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
            integers=tensors.integers,
        )

    def write(self, checkpoint: Checkpoint, options: WriteOptions) -> Writing:
        """Prepare a file that llama.cpp loads. Raises as `Writer.write`."""
        return write_gguf(checkpoint, options)


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
        if family.gguf is not None and family.gguf.opens:
            if family.gguf.architecture == architecture:
                return family
            known.append(family.gguf.architecture)
    if architecture is None:
        raise FileFormatError(f"{path} lacks the metadata key 'general.architecture'.")
    unloaded = f" (Families that did not load: {', '.join(broken)}.)" if broken else ""
    raise InputError(f"{path} has the architecture {architecture!r}; zoo reads {', '.join(sorted(known))}.{unloaded}")


def _config(tensors: GGUFTensors, family: Family) -> dict[str, Any]:
    values, names = dict(tensors.metadata), tensors.names()
    for name in ROPE_TENSORS:
        if f"{name}.weight" in names:
            values[name] = as_float32(tensors.get(f"{name}.weight", torch.float32).flatten().tolist())
    return config_from_metadata(values, names, tensors.shape("token_embd.weight")[0], family)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Errors raised within name the file; what values of a wrong type or size cause is a `FileFormatError`."""
    try:
        yield
    except InputError as error:
        kind = next(k for k in (MissingTokenizerError, FileFormatError, InputError) if isinstance(error, k))
        named = error.message if error.message.startswith(str(path)) else f"{path}: {error.message}"
        raise kind(named, fix=error.fix) from None
    except KeyError as error:
        raise FileFormatError(f"{path} lacks the metadata key {error.args[0]!r}.") from None
    except (ArithmeticError, TypeError, ValueError) as error:
        raise FileFormatError(f"{path} has metadata that make no sense: {error}.") from error
