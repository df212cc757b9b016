"""minGPT's ``model.pt``: a bare state dict with GPT-2's names; the number of heads is in the config.json beside it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from zoo.convert.base import Checkpoint
from zoo.convert.characters import companions, find_tokenizer
from zoo.convert.nanogpt import KEYS, gpt2_config
from zoo.convert.torch_file import TorchTensors, checked_tensors, load_torch_file, some
from zoo.errors import FileFormatError
from zoo.families.base import Family
from zoo.registry import Registry
from zoo.text.json_files import read_json_object

_TYPES = {
    "openai-gpt": (12, 12, 768),
    "gpt2": (12, 12, 768),
    "gpt2-medium": (24, 16, 1024),
    "gpt2-large": (36, 20, 1280),
    "gpt2-xl": (48, 25, 1600),
    "gopher-44m": (8, 16, 512),
    "gpt-mini": (6, 6, 192),
    "gpt-micro": (4, 4, 128),
    "gpt-nano": (3, 3, 48),
}
"""minGPT's ``model_type``: n_layer, n_head, n_embd. Its scripts save the config before they fill these in."""
_DROPOUTS = ("embd_pdrop", "attn_pdrop", "resid_pdrop")
_SIZES = {"n_layer": "n_layer", "n_head": "n_head", "n_embd": "n_embd", "n_positions": "block_size"}
_SIZES |= {"vocab_size": "vocab_size"}
_REMEDY = (
    'Write {"n_head": N} into it, or copy the config.json that minGPT wrote. '
    "(The number of heads can not be seen from the weights.)"
)


def looks_like_mingpt(directory: Path) -> bool:
    """A model.pt, and none of the weights of a Hugging Face directory, which has a config.json too."""
    weights = (*directory.glob("*.safetensors"), *directory.glob("pytorch_model*.bin*"))
    return (directory / "model.pt").is_file() and not weights


class MinGPT:
    """Opens ``model.pt``, or the work directory that minGPT wrote it to."""

    def reads(self, path: Path) -> bool:
        """A file named ``model*.pt``, or a directory with a model.pt and no other weights."""
        if path.is_dir():
            return looks_like_mingpt(path)
        return path.name.startswith("model") and path.suffix == ".pt"

    def open(self, path: Path, registry: Registry) -> Checkpoint:
        """Open the file.

        Raises:
            FileFormatError: it is damaged, holds code or another model, or its config.json is missing or wrong.
        """
        path = path / "model.pt" if path.is_dir() else path
        content = load_torch_file(path)
        if isinstance(content, dict) and "model_args" in content:
            raise FileFormatError(f"{path} is a checkpoint of nanoGPT.", fix="Read it with --from nanogpt.")
        tensors = checked_tensors(content, str(path))
        config = _config(tensors, path)
        family: Family = registry.load("family", "gpt2")
        spec = family.read_config(config)
        return Checkpoint(
            path=path,
            family=family,
            spec=spec,
            keys=KEYS,
            tensors=TorchTensors(tensors),
            config=config,
            load_tokenizer=find_tokenizer([path.parent], spec.vocab_size),
            companions=companions(path.parent),
        )


def _config(tensors: Mapping[str, Tensor], path: Path) -> dict[str, Any]:
    """The Hugging Face config of GPT-2 that computes the same: sizes from the shapes, the rest from config.json."""
    beside = path.with_name("config.json")
    if not beside.is_file():
        raise FileFormatError(f"{path} needs a config.json beside it, and there is none.", fix=_REMEDY)
    given = _given(beside)
    seen = _sizes(tensors, path)
    for key, size in seen.items():
        stated = given.get(_SIZES[key])
        if stated is not None and stated != size:
            raise FileFormatError(f"{beside} says {_SIZES[key]} = {stated!r}; the weights have {size}.")
    n_head = given.get("n_head")
    if type(n_head) is not int or n_head < 1:
        raise FileFormatError(f"{beside} needs 'n_head', a positive integer, not {n_head!r}.", fix=_REMEDY)
    dropouts = {key.removesuffix("_pdrop"): given.get(key, 0.1) for key in _DROPOUTS}
    return gpt2_config({**seen, "n_head": n_head}, tensors, beside, "gelu_new", dropouts)


def _given(path: Path) -> dict[str, Any]:
    """What config.json says of the model: minGPT's whole config with its part 'model', or that part alone."""
    whole = read_json_object(path)
    model = whole.get("model", whole)
    if not isinstance(model, dict):
        raise FileFormatError(f"{path}: 'model' must be an object, not {model!r}.")
    unknown = model.keys() - {*_SIZES.values(), *_DROPOUTS, "model_type"}
    if unknown:
        raise FileFormatError(f"{path} has keys of the model that minGPT does not have: {some(unknown)}.")
    model_type = model.get("model_type")
    stated = {key: value for key, value in model.items() if value is not None}
    if model_type is None or model_type == "gpt":  # "gpt" stands for sizes that are given
        return stated
    if model_type not in _TYPES:
        raise FileFormatError(f"{path} has model_type {model_type!r}; minGPT knows {', '.join(_TYPES)}.")
    return dict(zip(("n_layer", "n_head", "n_embd"), _TYPES[model_type], strict=True)) | stated


def _sizes(tensors: Mapping[str, Tensor], path: Path) -> dict[str, int]:
    """Every size but the number of heads, from the shapes of the embeddings and the names of the layers."""
    layers = {match[1] for name in tensors if (match := re.match(r"transformer\.h\.(\d+)\.", name))}
    shapes = [tensors[name].shape for name in ("transformer.wte.weight", "transformer.wpe.weight") if name in tensors]
    if not layers or len(shapes) != 2 or any(len(shape) != 2 for shape in shapes):
        raise FileFormatError(
            f"{path} is no state dict of minGPT: it needs transformer.wte.weight, transformer.wpe.weight and "
            f"transformer.h.0...; it has {some(tensors)}."
        )
    (vocab_size, n_embd), (block_size, _) = shapes
    return {"n_layer": len(layers), "n_embd": n_embd, "n_positions": block_size, "vocab_size": vocab_size}
