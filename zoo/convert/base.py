"""What every file format is opened as, how it becomes our parameters, and how those become tensors of another."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from zoo.convert.safetensors import TensorSlot
from zoo.errors import FileFormatError, InputError, MissingTokenizerError, ZooError
from zoo.families.base import Family, KeyMap, Rule
from zoo.precision.quantization import QuantizedLinear, Quantizer, StoredWeight
from zoo.registry import Registry
from zoo.spec import ModelSpec
from zoo.text.prompts import FILE_NAME as PROMPT_STYLE
from zoo.text.prompts import PromptStyle
from zoo.text.tokenizer import Tokenizer

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    PROMPT_STYLE,
)
"""What a model directory says about how text becomes ids."""
_TRAINING = ("embed_dropout", "attn_dropout", "resid_dropout", "init_std")
"""Fields of a spec that no logit depends on."""


class TensorReader(Protocol):
    """Random access to the stored tensors of a checkpoint. Nothing is read before `get`."""

    def names(self) -> list[str]:
        """Stored names, in file order."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a stored tensor, from the header."""

    def dtype(self, name: str) -> torch.dtype:
        """Dtype in which `get` returns it by default: the stored one, float32 for a quantized tensor."""

    def get(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """The tensor, in ``dtype`` if given; memory-mapped where the file allows it and no conversion is asked for.

        Raises:
            FileFormatError: the file is truncated or damaged there.
        """


@dataclass
class Checkpoint:
    """An opened file or directory of weights."""

    path: Path
    family: Family
    spec: ModelSpec
    keys: KeyMap
    """How its tensor names map to our parameters."""
    tensors: TensorReader
    config: dict[str, Any]
    """Its Hugging Face config, as read or as derived; ``spec`` is what the family reads from it."""
    load_tokenizer: Callable[[], Tokenizer]
    """Raises `MissingTokenizerError` when there is none, saying where one was looked for."""
    generation: dict[str, Any] = field(default_factory=dict)
    """Content of generation_config.json: ``eos_token_id`` and sampling defaults."""
    quantized: bool = False
    """Whether the stored tensors were dequantized to be read."""
    quantizer: str | None = None
    """The quantizer whose layers the directory was written for."""
    integers: Callable[[str], StoredWeight | None] = lambda stored: None
    """A stored tensor as the integers it consists of, where a type of quantized layer holds just these."""
    companions: tuple[Path, ...] = ()
    """Files to carry along as they are: tokenizer, chat template, generation config, licence."""

    @property
    def directory(self) -> Path:
        """Where it lies, with its provenance."""
        return self.path if self.path.is_dir() else self.path.parent

    def with_tokenizer(self, tokenizer: Tokenizer) -> Checkpoint:
        """The same with another tokenizer, which is written in place of the files that came with the weights."""
        kept = tuple(path for path in self.companions if path.name not in TOKENIZER_FILES)
        return replace(self, load_tokenizer=lambda: tokenizer, companions=kept)

    def with_style(self, style: PromptStyle) -> Checkpoint:
        """The same with a style's chat template; files that say the same already are copied, as they say more."""
        try:
            tokenizer = self.load_tokenizer()
        except MissingTokenizerError:
            return self
        return self if tokenizer.chat_template == style.template else self.with_tokenizer(style.on(tokenizer))

    def located(self) -> dict[str, Rule]:
        """The rule of every stored tensor that holds weights.

        Raises:
            FileFormatError: a tensor is missing, unknown, or of another shape than the spec says.
        """
        located = self.keys.locate(self.spec, self.tensors.names(), str(self.path))
        for stored, rule in located.items():
            found = self.tensors.shape(stored)
            if found != rule.stored_shape:
                expected = list(rule.stored_shape)
                raise FileFormatError(
                    f"{self.path}: tensor {stored!r} has shape {list(found)}; the config needs {expected}."
                )
        return located

    def parameters(self, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
        """Our parameters by name, in ``dtype`` if given, one stored tensor at a time. Raises as `located`."""
        for stored, rule in self.located().items():
            yield from zip(rule.ours, rule.split(self.tensors.get(stored, dtype)), strict=True)


class Converter(Protocol):
    """One file format."""

    def reads(self, path: Path) -> bool:
        """Whether ``path`` looks like this format; only names and headers are looked at."""

    def open(self, path: Path, registry: Registry) -> Checkpoint:
        """Open ``path``.

        Raises:
            FileFormatError: it is damaged or incomplete.
            InputError: its model type is one that no registered family reads.
        """


@dataclass(frozen=True)
class WriteOptions:
    """What may be chosen about the files that are written."""

    dtype: torch.dtype | str | None = None
    """Of the weights: a torch dtype, or the name of a quantized type that the format has. ``None``: each tensor keeps
    its own (float32 if it was quantized)."""
    max_shard_bytes: int = 5_000_000_000
    """Weights are cut into files of about this size, where the format has several."""
    quantizer: Quantizer | None = None
    """Whose layers the weights are written for, in the format of such directories."""
    license: str | None = None
    """What the registry says about the weights' licence."""
    progress: Callable[[int], None] = lambda n_bytes: None
    """Called with the bytes of each tensor as it is written."""


def refuse_quantizer(options: WriteOptions, format_name: str) -> None:
    """For a format of which a quantizer's layers are no part.

    Raises:
        InputError: a quantizer is given.
    """
    if options.quantizer is not None:
        raise InputError(
            f"the format {format_name} holds no weights of the quantizer {options.quantizer.name!r}.",
            fix="Write a directory without --to, or leave --quantize out.",
        )


@dataclass(frozen=True)
class Writing:
    """A conversion that has been checked and can begin."""

    n_tensors: int
    n_bytes: int
    """Of the tensors."""
    to: Callable[[Path], None]
    """Writes to a path that does not exist, a file or a directory."""
    rounded: Callable[[str, Tensor], Tensor]
    """The values that a parameter of ours, given by name, has once it is written."""


@runtime_checkable
class Writer(Converter, Protocol):
    """A file format that can be written too.

    Its component's ``matches`` may hold a file suffix: a destination that ends so is written in this format.
    """

    def write(self, checkpoint: Checkpoint, options: WriteOptions) -> Writing:
        """Prepare ``checkpoint`` to be written. Nothing is written yet; headers are read.

        `zoo.convert.export` decides where, and makes it appear all at once.

        Raises:
            InputError: the format can not hold this architecture, or not in this dtype.
            FileFormatError: the checkpoint is damaged, or lacks what the format needs.
        """


def parameter_slots(
    checkpoint: Checkpoint, rules: Sequence[Rule], dtype: torch.dtype | None, progress: Callable[[int], None]
) -> list[TensorSlot]:
    """The tensors of another format, from the checkpoint's own: one stored tensor is held at a time.

    Args:
        rules: of the key map of the format to be written. A head that is tied is the embedding.
        dtype: by default that of the tensor which holds the first parameter of each.
        progress: called with the bytes of each tensor when it has been read.

    Raises:
        FileFormatError: as `Checkpoint.located`.
        InputError: the model is a module of its family's own, without the parameters that the format has.
    """
    parameters = ParameterReader(checkpoint)
    if missing := [name for rule in rules for name in rule.ours if not parameters.has(name)]:
        raise InputError(
            f"a model of the family {checkpoint.family.name!r} has no {missing[0]}, which this format is made of.",
            fix="Write it with --to hf.",
        )

    def slot(rule: Rule) -> TensorSlot:
        written = dtype or parameters.dtype(rule.ours[0])

        def read() -> Tensor:
            tensor = rule.merge([cast(name, parameters.get(name), written) for name in rule.ours])
            progress(tensor.nbytes)
            return tensor

        return TensorSlot(rule.stored, rule.stored_shape, written, read)

    return [slot(rule) for rule in rules]


def cast(name: str, values: Tensor, dtype: torch.dtype | None) -> Tensor:
    """``values`` in ``dtype``, if one is given.

    Raises:
        ZooError: a value is finite and too large for float16.
    """
    if dtype is None:
        return values
    found = values.to(dtype)
    if dtype == torch.float16 and values.dtype != dtype and found.isinf().any() and not values.isinf().any():
        largest = values.abs().max().item()
        raise ZooError(f"{name} holds {largest:g}; float16 ends at 65504.", fix="Write bf16 or fp32.")
    return found


def what_is_lost(spec: ModelSpec, again: ModelSpec, number: Callable[[float], float] = float) -> list[str]:
    """What ``spec`` says of the mathematics and ``again``, read back from another format, does not: "name = value".

    Args:
        spec: of the model to be written.
        again: what the other format says about it.
        number: what becomes of numbers there.
    """
    said, found = facts_of(spec, number), facts_of(again, number)
    return [f"{name} = {value!r}" for name, value in said.items() if name not in found or found[name] != value]


def facts_of(spec: ModelSpec, number: Callable[[float], float]) -> dict[str, Any]:
    """The fields of a spec but those of training alone; a rotary setting is named with its parents."""
    facts: dict[str, Any] = {}

    def add(prefix: str, values: dict[str, Any]) -> None:
        for name, value in values.items():
            if isinstance(value, dict):
                add(f"{prefix}{name}.", value)
            else:
                facts[prefix + name] = number(value) if isinstance(value, float) else value

    add("", {name: value for name, value in asdict(spec).items() if name not in _TRAINING})
    return facts


class ParameterReader:
    """Our parameters by name, read through the source's key map; the last stored tensor is kept split."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._located: dict[str, tuple[str, Rule]] = {}
        for stored, rule in checkpoint.located().items():
            for name in rule.ours:
                self._located[name] = (stored, rule)
        if checkpoint.spec.tie_embeddings:
            self._located["head.weight"] = self._located["embed.weight"]
        self._held: tuple[str, list[Tensor]] = ("", [])

    def has(self, name: str) -> bool:
        """Whether the model has a parameter of this name."""
        return name in self._located

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of the stored tensor that holds a parameter."""
        return self._checkpoint.tensors.dtype(self._located[name][0])

    def get(self, name: str) -> Tensor:
        """A parameter; a head that is tied is the embedding."""
        stored, rule = self._located[name]
        if self._held[0] != stored:
            self._held = ("", [])  # or two would be in memory at once
            self._held = (stored, rule.split(self._checkpoint.tensors.get(stored)))
        return self._held[1][rule.ours.index(name) if name in rule.ours else 0]

    def quantized(self, name: str, kind: type[QuantizedLinear], dtype: torch.dtype) -> StoredWeight:
        """A weight for a layer of ``kind`` with inputs of ``dtype``: the stored integers, if they fit, or new ones."""
        stored, rule = self._located[name]
        held = self._checkpoint.integers(stored) if rule.transform.moves_rows else None
        if held is None or held.kind is not kind:
            return kind.store(self.get(name), dtype)
        return held.mapped(rule.split_rows)[rule.ours.index(name)].in_dtype(dtype)
