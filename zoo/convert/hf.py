"""Hugging Face model directories, used in place: config.json, safetensors, tokenizer, generation config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from zoo.convert.base import Checkpoint
from zoo.convert.safetensors import SafetensorsReader
from zoo.errors import FileFormatError, InputError
from zoo.families.base import Family
from zoo.registry import Registry
from zoo.text.json_files import read_json_object
from zoo.text.tokenizer import Tokenizer

INDEX = "model.safetensors.index.json"
COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "generation_config.json",
    "LICENSE",
    "LICENSE.txt",
)
"""Files that a model carries besides its weights and config."""


class HuggingFace:
    """Opens a model directory in the Hugging Face layout."""

    def reads(self, path: Path) -> bool:
        """A directory with a config.json."""
        return (path / "config.json").is_file()

    def open(self, path: Path, registry: Registry) -> Checkpoint:
        """Open the directory. Nothing but headers is read.

        Raises:
            FileFormatError: weights are missing, or a file is damaged.
            InputError: no registered family reads its model type, or the config has a key that none understands.
        """
        config = read_json_object(path / "config.json")
        family = family_of(config, path, registry)
        try:
            spec = family.read_config(config)
        except InputError as error:
            raise InputError(f"{path / 'config.json'}: {error.message}", fix=error.fix) from None
        generation = path / "generation_config.json"
        return Checkpoint(
            path=path,
            family=family,
            spec=spec,
            keys=family.keys,
            tensors=_open_weights(path),
            config=config,
            load_tokenizer=lambda: Tokenizer.from_directory(path),
            generation=read_json_object(generation) if generation.is_file() else {},
            companions=tuple(path / name for name in COMPANIONS if (path / name).is_file()),
        )


def family_of(config: dict[str, Any], path: Path, registry: Registry) -> Family:
    """The registered family that reads a config's ``model_type``.

    Raises:
        InputError: there is none; the message names those there are.
    """
    model_type = config.get("model_type")
    component = registry.match("family", str(model_type))
    if component is None:
        known = sorted({name for _, c in registry.components("family") for name in c.matches})
        raise InputError(
            f"{path} is a model of type {model_type!r}, which no registered family reads.",
            fix=f"Known types: {', '.join(known)}. A plugin can add one: see docs/adding-a-model.md.",
        )
    family: Family = registry.load("family", f"{component.origin.distribution}/{component.name}")
    return family


def _open_weights(directory: Path) -> SafetensorsReader:
    index = directory / INDEX
    if index.is_file():
        weight_map = read_json_object(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise FileFormatError(f"{index} has no 'weight_map'.")
        return SafetensorsReader({name: directory / file for name, file in weight_map.items()})
    single = directory / "model.safetensors"
    files = [single] if single.is_file() else sorted(directory.glob("*.safetensors"))
    if not files:
        raise FileFormatError(f"{directory} has no weights.", fix=_no_weights_remedy(directory))
    if len(files) > 1:
        raise FileFormatError(
            f"{directory} has {len(files)} safetensors files but no {INDEX}.", fix="Download it again."
        )
    return SafetensorsReader.from_files(files)


def _no_weights_remedy(directory: Path) -> str:
    if any(directory.glob("*.bin")):
        return "Its *.bin files are pickles, which zoo does not read; take a safetensors version of the model."
    return "Expected *.safetensors files beside config.json."
