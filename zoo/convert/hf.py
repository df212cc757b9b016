"""Hugging Face model directories, used in place: config.json, weights, tokenizer, generation config."""

from __future__ import annotations

from pathlib import Path, PureWindowsPath
from typing import Any

from zoo.convert.base import TOKENIZER_FILES, Checkpoint, TensorReader, WriteOptions, Writing
from zoo.convert.hf_writer import INDEX, write_hf
from zoo.convert.litgpt_config import looks_like_litgpt
from zoo.convert.mingpt import looks_like_mingpt
from zoo.convert.packed import DequantizedTensors, read_scheme
from zoo.convert.safetensors import SafetensorsReader
from zoo.convert.torch_file import TorchTensors
from zoo.errors import FileFormatError, InputError
from zoo.families.base import Family
from zoo.registry import Registry
from zoo.text.json_files import read_json_object
from zoo.text.tokenizer import Tokenizer

TORCH_INDEX = "pytorch_model.bin.index.json"
QUANTIZED_WEIGHTS = "quantized.safetensors"
"""The weights of a directory that is `zoo.convert.quantized`'s."""
COMPANIONS = (*TOKENIZER_FILES, "generation_config.json", "LICENSE", "LICENSE.txt")
"""Files that a model carries besides its weights and config."""


class HuggingFace:
    """The converter of model directories in the Hugging Face layout."""

    def reads(self, path: Path) -> bool:
        """A directory with a config.json, unless it lies beside weights of minGPT, LitGPT or our integers."""
        others = (path / QUANTIZED_WEIGHTS).is_file(), looks_like_mingpt(path), looks_like_litgpt(path)
        return (path / "config.json").is_file() and not any(others)

    def open(self, path: Path, registry: Registry) -> Checkpoint:
        """Open the directory. Nothing but headers is read; weights that GPTQ or AWQ packed are unpacked when asked for.

        Raises:
            FileFormatError: weights are missing, a file is damaged, or they are quantized in another way.
            InputError: no registered family reads its model type, or the config has a key that none understands.
        """
        config = read_json_object(path / "config.json")
        quantization = _quantization(config, path)
        about = describe(path, config, registry)
        tensors = _open_weights(path)
        if quantization is not None:
            keys, spec = about["family"].keys, about["spec"]
            tensors = DequantizedTensors(tensors, read_scheme(quantization, path), keys, spec, path)
        return Checkpoint(
            **about,
            keys=about["family"].keys,
            tensors=tensors,
            quantized=isinstance(tensors, DequantizedTensors) and tensors.quantized,
        )

    def write(self, checkpoint: Checkpoint, options: WriteOptions) -> Writing:
        """Prepare a directory that ``transformers`` loads. Raises as `Writer.write`."""
        return write_hf(checkpoint, options)


def describe(path: Path, config: dict[str, Any], registry: Registry) -> dict[str, Any]:
    """What a `Checkpoint` of a directory says besides its weights.

    Raises:
        InputError: no registered family reads the model type, or the config has a key that none understands.
        FileFormatError: a file is damaged.
    """
    family = family_of(config, path, registry)
    try:
        spec = family.read_config({key: value for key, value in config.items() if key != "quantization_config"})
    except InputError as error:
        raise InputError(f"{path / 'config.json'}: {error.message}", fix=error.fix) from None
    generation = path / "generation_config.json"
    return {
        "path": path,
        "family": family,
        "spec": spec,
        "config": config,
        "load_tokenizer": lambda: Tokenizer.from_directory(path),
        "generation": read_json_object(generation) if generation.is_file() else {},
        "companions": tuple(path / name for name in COMPANIONS if (path / name).is_file()),
    }


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


def _quantization(config: dict[str, Any], directory: Path) -> Any:
    """What says how the weights are quantized, if they are: in config.json, or where AutoGPTQ wrote it at first."""
    older = directory / "quantize_config.json"
    if config.get("quantization_config") is None and older.is_file():
        return {"quant_method": "gptq", **read_json_object(older)}
    return config.get("quantization_config")


def _open_weights(directory: Path) -> TensorReader:
    """Safetensors if there are any, else what ``torch.save`` wrote."""
    if (directory / INDEX).is_file():
        return SafetensorsReader(_indexed(directory / INDEX))
    single = directory / "model.safetensors"
    files = [single] if single.is_file() else sorted(directory.glob("*.safetensors"))
    if len(files) > 1:
        raise FileFormatError(
            f"{directory} has {len(files)} safetensors files but no {INDEX}.", fix="Download it again."
        )
    if files:
        return SafetensorsReader.from_files(files)
    if (directory / TORCH_INDEX).is_file():
        return TorchTensors.from_shards(_indexed(directory / TORCH_INDEX))
    if (directory / "pytorch_model.bin").is_file():
        return TorchTensors.from_file(directory / "pytorch_model.bin")
    raise FileFormatError(
        f"{directory} has no weights.", fix="Expected *.safetensors, or pytorch_model.bin, beside config.json."
    )


def _indexed(index: Path) -> dict[str, Path]:
    """The file that each tensor is in. A file of weights is not to make us read others of the machine."""
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FileFormatError(f"{index} has no 'weight_map'.")
    if not all(isinstance(file, str) for file in weight_map.values()):
        raise FileFormatError(f"{index}: 'weight_map' must map each tensor to the name of a file.")
    for file in dict.fromkeys(weight_map.values()):
        name = PureWindowsPath(file)  # it knows both kinds of slash, and drives
        if name.anchor or ".." in name.parts:
            raise FileFormatError(f"{index} names {file!r}; a shard lies beside its index.", fix="Download it again.")
        if (index.parent / file).is_dir():
            raise FileFormatError(f"{index} names {file!r}, which is a directory, not a file of tensors.")
    return {name: index.parent / file for name, file in weight_map.items()}
