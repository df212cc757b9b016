"""nanoGPT's ``ckpt.pt``: a GPT-2 whose linears are stored as `torch.nn.Linear` has them, with or without biases."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zoo.convert.base import Checkpoint, TensorReader
from zoo.convert.characters import companions, find_tokenizer
from zoo.convert.torch_file import TorchTensors, checked_tensors, load_torch_file, some, without_prefix
from zoo.errors import FileFormatError
from zoo.families.base import Family, KeyMap
from zoo.registry import Registry

KEYS = KeyMap(
    """
    transformer.wte.weight                   embed.weight
    transformer.wpe.weight                   positions.weight
    transformer.h.{i}.ln_1.weight            blocks.{i}.attn_norm.weight
    transformer.h.{i}.ln_1.bias              blocks.{i}.attn_norm.bias
    transformer.h.{i}.attn.c_attn.weight     blocks.{i}.attn.{q,k,v}.weight  rows
    transformer.h.{i}.attn.c_attn.bias       blocks.{i}.attn.{q,k,v}.bias    rows
    transformer.h.{i}.attn.c_proj.weight     blocks.{i}.attn.out.weight
    transformer.h.{i}.attn.c_proj.bias       blocks.{i}.attn.out.bias
    transformer.h.{i}.ln_2.weight            blocks.{i}.mlp_norm.weight
    transformer.h.{i}.ln_2.bias              blocks.{i}.mlp_norm.bias
    transformer.h.{i}.mlp.c_fc.weight        blocks.{i}.mlp.up.weight
    transformer.h.{i}.mlp.c_fc.bias          blocks.{i}.mlp.up.bias
    transformer.h.{i}.mlp.c_proj.weight      blocks.{i}.mlp.down.weight
    transformer.h.{i}.mlp.c_proj.bias        blocks.{i}.mlp.down.bias
    transformer.ln_f.weight                  norm.weight
    transformer.ln_f.bias                    norm.bias
    lm_head.weight                           head.weight
    """,
    ignore=[r"h\.\d+\.attn\.bias$"],
)
"""GPT-2's names with nothing transposed; minGPT's too. ``attn.bias`` is the causal mask."""

_PARTS = {"model", "model_args", "optimizer", "iter_num", "best_val_loss", "config"}
"""What train.py saves. Only the first two, and the name of the data set in the last, are of use here."""
_SIZES = {"n_layer": "n_layer", "n_head": "n_head", "n_embd": "n_embd", "n_positions": "block_size"}
_SIZES |= {"vocab_size": "vocab_size"}
"""Keys of GPT-2's config and of model_args."""


class NanoGPT:
    """Opens ``ckpt.pt``, or the directory that train.py wrote it to."""

    def reads(self, path: Path) -> bool:
        """A file named ``ckpt*.pt``, or a directory with a ckpt.pt and no config.json."""
        if path.is_dir():
            return (path / "ckpt.pt").is_file() and not (path / "config.json").exists()
        return path.name.startswith("ckpt") and path.suffix == ".pt"

    def open(self, path: Path, registry: Registry) -> Checkpoint:
        """Open the file; the optimizer in it stays on the disk.

        Raises:
            FileFormatError: it is damaged, holds code, or is no checkpoint of nanoGPT.
        """
        path = path / "ckpt.pt" if path.is_dir() else path
        content = load_torch_file(path)
        args, tensors = _parts(content, path)
        config = _config(args, tensors, path)
        family: Family = registry.load("family", "gpt2")
        spec = family.read_config(config)
        reader: TensorReader = TorchTensors(tensors)
        if args.get("bias") is False:
            biases = {rule.stored: rule.stored_shape for rule in KEYS.rules(spec) if rule.stored.endswith(".bias")}
            reader = _ZeroBiases(reader, biases, path)
        return Checkpoint(
            path=path,
            family=family,
            spec=spec,
            keys=KEYS,
            tensors=reader,
            config=config,
            load_tokenizer=find_tokenizer(_directories(path, content.get("config")), spec.vocab_size),
            companions=companions(path.parent),
        )


def _parts(content: Any, path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The model_args and the weights."""
    if not isinstance(content, dict) or not {"model", "model_args"} <= content.keys():
        raise FileFormatError(
            f"{path} is no checkpoint of nanoGPT: it must be a dict with 'model' and 'model_args'.",
            fix="A bare state dict with GPT-2's names is minGPT's format: --from mingpt.",
        )
    unknown = content.keys() - _PARTS
    if unknown:
        raise FileFormatError(f"{path} has parts that nanoGPT does not save: {some(map(str, unknown))}.")
    args = content["model_args"]
    if not isinstance(args, dict):
        raise FileFormatError(f"{path}: model_args is a {type(args).__name__}, not a dict.")
    tensors = checked_tensors(content["model"], f"{path}, 'model'")
    return args, without_prefix(tensors, "_orig_mod.")


def _config(args: Mapping[str, Any], tensors: Mapping[str, Tensor], path: Path) -> dict[str, Any]:
    """The Hugging Face config of GPT-2 that computes the same."""
    unknown = args.keys() - {*_SIZES.values(), "bias", "dropout"}
    if unknown:
        raise FileFormatError(
            f"{path}: model_args has keys that nanoGPT does not have: {some(map(str, unknown))}.",
            fix="A model that differs from nanoGPT's can be a family of its own: see docs/adding-a-model.md.",
        )
    dropout = args.get("dropout", 0.0)
    # Files without the key are older than it (January 2023), and have biases and the tanh form of GELU.
    activation = "gelu" if "bias" in args else "gelu_new"
    sizes = {theirs: _size(args, ours, path) for theirs, ours in _SIZES.items()}
    return gpt2_config(sizes, tensors, path, activation, dict.fromkeys(("embd", "attn", "resid"), dropout))


def _size(args: Mapping[str, Any], key: str, path: Path) -> int:
    value = args.get(key)
    if type(value) is not int or value < 1:
        raise FileFormatError(f"{path}: model_args needs {key!r}, a positive integer, not {value!r}.")
    return value


def gpt2_config(
    sizes: Mapping[str, int],
    tensors: Mapping[str, Tensor],
    path: Path,
    activation: str,
    dropouts: Mapping[str, Any],
) -> dict[str, Any]:
    """A GPT-2 config of these sizes; whether the head is tied is seen from the weights.

    Raises:
        FileFormatError: the width is not a multiple of the number of heads, or a dropout is none.
    """
    if sizes["n_embd"] % sizes["n_head"]:
        raise FileFormatError(f"{path}: n_embd ({sizes['n_embd']}) is not a multiple of n_head ({sizes['n_head']}).")
    for name, value in dropouts.items():
        if type(value) not in (int, float) or not 0 <= value < 1:
            raise FileFormatError(f"{path}: the {name} dropout must be within [0, 1), not {value!r}.")
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        **sizes,
        "activation_function": activation,
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": _are_equal(tensors.get("transformer.wte.weight"), tensors.get("lm_head.weight")),
        **{f"{name}_pdrop": float(value) for name, value in dropouts.items()},
    }


def _are_equal(embedding: Tensor | None, head: Tensor | None) -> bool:
    if embedding is None or head is None:
        return False
    return embedding.data_ptr() == head.data_ptr() or torch.equal(embedding, head)


class _ZeroBiases:
    """The tensors of a model without biases, and biases of zeros: GPT-2 has them, and zeros change nothing."""

    def __init__(self, stored: TensorReader, biases: dict[str, tuple[int, ...]], path: Path) -> None:
        there = biases.keys() & set(stored.names())
        if there:
            raise FileFormatError(f"{path}: model_args has bias = False, but there are biases: {some(there)}.")
        self._stored, self._biases = stored, biases

    def names(self) -> list[str]:
        return [*self._stored.names(), *self._biases]

    def shape(self, name: str) -> tuple[int, ...]:
        return self._biases[name] if name in self._biases else self._stored.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self._stored.dtype(self._stored.names()[0] if name in self._biases else name)

    def get(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        if name in self._biases:
            return torch.zeros(self._biases[name], dtype=dtype or self.dtype(name))
        return self._stored.get(name, dtype)


def _directories(path: Path, config: Any) -> list[Path]:
    """Where the tokenizer may be: beside the file, or where nanoGPT keeps the data that it was trained on."""
    dataset = config.get("dataset") if isinstance(config, dict) else None
    if isinstance(dataset, str) and dataset == Path(dataset).name:
        return [path.parent, path.parent.parent / "data" / dataset]
    return [path.parent]
