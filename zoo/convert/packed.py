"""GPTQ and AWQ: linears packed into int32 words, shown by a `TensorReader` as the float weights that they stand for.

A linear ``X`` is stored as ``X.qweight``, ``X.qzeros`` and ``X.scales`` (for GPTQ perhaps ``X.g_idx``), and means
``(q - zero) * scale`` with a zero and a scale per group of inputs and output. Letters: I inputs, O outputs, G groups.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import gcd
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zoo.convert.base import TensorReader
from zoo.errors import FileFormatError, InputError
from zoo.families.base import ConfigReader, KeyMap
from zoo.families.transforms import Transposed
from zoo.spec import ModelSpec

_CHUNK = 1024
"""Inputs dequantized at a time: bounds the float temporaries."""
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""The output, of each eight, that is in the i-th nibble of an AWQ word (AutoAWQ, WQLinear_GEMM)."""

_HARMLESS = """
    sym desc_act act_group_aware static_groups true_sequential damp_percent damp_auto_increment mse meta lm_head
    model_name_or_path model_file_base_name tokenizer dataset block_name_to_quantize batch_size pad_token_id
    module_name_preceding_first_block modules_in_block_to_quantize model_seqlen max_input_length cache_block_outputs
    backend use_cuda_fp16 use_exllama disable_exllama exllama_config
    modules_to_not_convert do_fuse modules_to_fuse fuse_max_seq_len
""".split()
"""Keys that say how a model was quantized or which kernel to run, and nothing about what the file means."""


@dataclass(frozen=True)
class Scheme:
    """How the words of a file are packed."""

    bits: int
    group_size: int
    """Consecutive inputs that share a scale; -1: all of them."""
    along_inputs: bool
    """Whether a word of ``qweight`` packs neighbouring inputs (GPTQ) or outputs (AWQ)."""
    zero_offset: int
    """What was subtracted from the zeros, modulo 2 ** bits, when they were stored: 1 in GPTQ's first format."""


def read_scheme(config: Any, where: Path) -> Scheme:
    """The scheme that a ``quantization_config`` describes.

    Raises:
        FileFormatError: it is neither GPTQ nor AWQ.
        InputError: it is a variant that zoo does not read, or has a key that is not known.
    """
    if not isinstance(config, Mapping):
        raise FileFormatError(f"{where}: quantization_config must be an object, not {config!r}.")
    method = str(config.get("quant_method"))
    if method not in _READERS:
        raise FileFormatError(
            f"{where}: the weights are quantized by {method!r}; zoo reads {' and '.join(_READERS)}.",
            fix="Take the model that it was made from, or a GGUF file of it.",
        )
    read = ConfigReader(config, f"{method} quantization")
    try:
        scheme = _READERS[method](read)
        read.finish(*_HARMLESS)
    except InputError as error:
        raise InputError(f"{where}: {error.message}", fix=error.fix) from None
    return scheme


def _read_gptq(read: ConfigReader) -> Scheme:
    read.only("quant_method", "gptq")
    read.only("method", "gptq")
    read.only("bits", 4, 2, 3, 8)
    read.only("pack_dtype", "int32")
    read.only("is_marlin_format", False)
    read.only("dynamic", {})  # other bits for some of the linears
    # Where both keys are there, transformers believes checkpoint_format; where neither is, it is the first format.
    formats = {"gptq": 1, "gptq_v2": 0}
    offset = read.choose("format", formats, "gptq")
    if read.get("checkpoint_format") is not None:
        offset = read.choose("checkpoint_format", formats, "gptq")
    return Scheme(int(read.require("bits")), _group_size(read), along_inputs=True, zero_offset=offset)


def _read_awq(read: ConfigReader) -> Scheme:
    read.only("quant_method", "awq")
    read.only("bits", 4)
    read.only("zero_point", True)
    if read.get("backend") == "llm-awq":
        raise InputError("it is packed as llm-awq packs; zoo reads AutoAWQ's 'gemm'.")
    for key in ("version", "format", "checkpoint_format"):
        read.only(key, "gemm", "GEMM")
    return Scheme(4, _group_size(read), along_inputs=False, zero_offset=0)


def _group_size(read: ConfigReader) -> int:
    size = read.get("group_size", 128)
    if not isinstance(size, int) or isinstance(size, bool) or (size < 1 and size != -1):
        raise InputError(f"group_size must be a positive integer, or -1 for one group, not {size!r}.")
    return size


_READERS = {"gptq": _read_gptq, "awq": _read_awq}


class DequantizedTensors:
    """A `TensorReader` in which each packed linear is the float32 tensor ``X.weight``; the others are as stored.

    Args:
        stored: the tensors of the file.
        keys: how the family names them. Weights that it stores (in, out) are given as such.

    Raises:
        FileFormatError: parts of a packed linear are missing or do not fit together.
    """

    def __init__(self, stored: TensorReader, scheme: Scheme, keys: KeyMap, spec: ModelSpec, where: Path) -> None:
        self._stored, self._scheme, self._where = stored, scheme, where
        rules = {rule.stored: rule for rule in keys.rules(spec)}
        names = set(stored.names())
        self._sizes_IO: dict[str, tuple[int, int]] = {}
        self._conv1d: set[str] = set()
        self._with_g_idx: set[str] = set()
        hidden = set()
        for linear in (name.removesuffix(".qweight") for name in stored.names() if name.endswith(".qweight")):
            weight, bias = f"{linear}.weight", f"{linear}.bias"
            if weight in names:
                raise FileFormatError(f"{where} holds {linear!r} twice, packed and as {weight!r}.")
            self._sizes_IO[weight] = self._checked_sizes(linear, names)
            rule = rules.get(weight) or rules.get(keys.prefix + weight)
            if rule is not None and isinstance(rule.transform, Transposed):
                self._conv1d.add(weight)
            hidden |= {f"{linear}.{part}" for part in ("qweight", "qzeros", "scales", "g_idx")}
            # Early packers gave every linear a bias, of zeros where the model has none.
            if bias in names and not {bias, keys.prefix + bias} & rules.keys() and not stored.get(bias).any():
                hidden.add(bias)
        self._names = [name for name in stored.names() if name not in hidden] + list(self._sizes_IO)

    @property
    def quantized(self) -> bool:
        """Whether anything is packed."""
        return bool(self._sizes_IO)

    def names(self) -> list[str]:
        """Names as an unquantized file has them."""
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape, unpacked."""
        if name not in self._sizes_IO:
            return self._stored.shape(name)
        n_in, n_out = self._sizes_IO[name]
        return (n_in, n_out) if name in self._conv1d else (n_out, n_in)

    def dtype(self, name: str) -> torch.dtype:
        """Float32 for a packed tensor, the stored dtype of any other."""
        return torch.float32 if name in self._sizes_IO else self._stored.dtype(name)

    def get(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """The tensor, dequantized in float32 and rounded to ``dtype`` if given.

        Raises:
            FileFormatError: the file is damaged, or ``g_idx`` names groups that there are not.
        """
        if name not in self._sizes_IO:
            return self._stored.get(name, dtype)
        linear = name.removesuffix(".weight")
        q_IO, zeros_GO = self._unpacked(linear)
        scales_GO = self._stored.get(f"{linear}.scales", torch.float32)
        group_I = self._groups(linear, len(q_IO), len(scales_GO))
        weight = torch.empty(self.shape(name), dtype=dtype or torch.float32)
        weight_IO = weight if name in self._conv1d else weight.t()
        for start in range(0, len(q_IO), _CHUNK):
            group = group_I[start : start + _CHUNK]
            weight_IO[start : start + _CHUNK] = (q_IO[start : start + _CHUNK] - zeros_GO[group]) * scales_GO[group]
        return weight

    def _unpacked(self, linear: str) -> tuple[Tensor, Tensor]:
        """The stored integers (I, O), uint8, and the zeros (G, O), float32."""
        bits = self._scheme.bits
        words, zero_words = self._stored.get(f"{linear}.qweight"), self._stored.get(f"{linear}.qzeros")
        if self._scheme.along_inputs:
            q_IO, zeros_GO = unpack(words, bits), unpack(zero_words.t(), bits).t()
        else:
            q_IO, zeros_GO = (_awq_ordered(unpack(packed.t(), bits)).t() for packed in (words, zero_words))
        # A zero of 0 was stored as 2 ** bits - 1, so the sum wraps around.
        return q_IO, ((zeros_GO.int() + self._scheme.zero_offset) & ((1 << bits) - 1)).float()

    def _groups(self, linear: str, n_in: int, n_groups: int) -> Tensor:
        """Group of each input (I,), int64."""
        if linear not in self._with_g_idx:
            return torch.arange(n_in) // self._group_size(n_in)
        group_I = self._stored.get(f"{linear}.g_idx", torch.int64)
        if group_I.min() < 0 or group_I.max() >= n_groups:
            raise FileFormatError(f"{self._where}: {linear}.g_idx names groups outside 0..{n_groups - 1}.")
        return group_I

    def _group_size(self, n_in: int) -> int:
        return n_in if self._scheme.group_size == -1 else self._scheme.group_size

    def _checked_sizes(self, linear: str, names: set[str]) -> tuple[int, int]:
        """Inputs and outputs of a packed linear, its parts checked against each other."""
        for part in ("qzeros", "scales"):
            if f"{linear}.{part}" not in names:
                raise FileFormatError(f"{self._where} lacks {linear}.{part}, without which its qweight means nothing.")
        bits, packed = self._scheme.bits, self._stored.shape(f"{linear}.qweight")
        dtypes = {self._stored.dtype(f"{linear}.{part}") for part in ("qweight", "qzeros")}
        if len(packed) != 2 or 0 in packed or dtypes != {torch.int32}:
            raise FileFormatError(f"{self._where}: {linear} is not packed into a matrix of int32 words.")
        rows, columns = packed
        n_in, n_out = (rows * 32 // bits, columns) if self._scheme.along_inputs else (rows, columns * 32 // bits)
        n_groups = -(-n_in // self._group_size(n_in))
        wanted: dict[str, tuple[int, ...]] = {"qzeros": (n_groups, n_out * bits // 32), "scales": (n_groups, n_out)}
        if self._scheme.along_inputs and f"{linear}.g_idx" in names:
            wanted["g_idx"] = (n_in,)
            self._with_g_idx.add(linear)
        found = {part: self._stored.shape(f"{linear}.{part}") for part in wanted}
        if found != wanted or (rows * 32) % bits or (n_out * bits) % 32:
            raise FileFormatError(
                f"{self._where}: {linear} has a qweight of {list(packed)} and {_shapes(found)}; "
                f"with {bits} bits and groups of {self._scheme.group_size} that must be {_shapes(wanted)}."
            )
        return n_in, n_out


def _shapes(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{part} of {list(shape)}" for part, shape in shapes.items())


def unpack(words_WX: Tensor, bits: int) -> Tensor:
    """The integers in int32 words (W, X): uint8 (32 W / bits, X). Each column is one stream, lowest bits first.

    With 3 bits, values straddle words: 32 of them take 3 words (AutoGPTQ's packing writes the same stream).
    """
    n_values = 32 // gcd(bits, 32)
    cycles = words_WX.reshape(-1, n_values * bits // 32, words_WX.shape[1])
    values = torch.empty(len(cycles), n_values, words_WX.shape[1], dtype=torch.uint8)
    for i in range(n_values):
        word, shift = divmod(i * bits, 32)
        value = cycles[:, word] >> shift
        if shift + bits > 32:  # the shift of a negative word filled in ones, which the mask takes off
            value = (value & ((1 << (32 - shift)) - 1)) | (cycles[:, word + 1] << (32 - shift))
        values[:, i] = value & ((1 << bits) - 1)
    return values.flatten(0, 1)


def _awq_ordered(values_OX: Tensor) -> Tensor:
    """Outputs in their order: nibble ``i`` of each word is output ``_AWQ_ORDER[i]`` of its eight."""
    eights = values_OX.unflatten(0, (-1, len(_AWQ_ORDER)))
    return eights[:, torch.tensor(_AWQ_ORDER).argsort()].flatten(0, 1)
