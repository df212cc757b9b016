"""Sentencepiece models, BPE and Unigram, rebuilt as a `tokenizers.Tokenizer`.

``tokenizer.model`` is one protobuf message (sentencepiece's sentencepiece_model.proto). Reading the few fields that
matter takes fewer lines than a dependency on ``sentencepiece`` and ``protobuf`` would.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from zoo.errors import FileFormatError, InputError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""What a piece is; GGUF's token types have the same numbers."""

SPACE = "\u2581"
"""Stands for a space in pieces."""

_KINDS = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}
_ROLES = (("unk_token", 40, 0), ("bos_token", 41, 1), ("eos_token", 42, 2), ("pad_token", 43, -1))
"""Special tokens with the field and the default of their id."""


@dataclass(frozen=True)
class SentencePieceModel:
    """What decides about ids in a sentencepiece model."""

    pieces: Sequence[str]
    """By id."""
    scores: Sequence[float]
    kinds: Sequence[int]
    algorithm: str
    """``bpe`` or ``unigram``."""
    unknown_id: int = 0
    byte_fallback: bool = False
    """A character that is no piece becomes its UTF-8 bytes."""
    add_prefix_space: bool = True
    remove_extra_spaces: bool = True
    """Spaces at the ends are dropped, runs of them become one."""
    charsmap: bytes = b""
    """Replacements of characters, as compiled by sentencepiece."""
    special_ids: tuple[tuple[str, int], ...] = ()
    """The roles (``bos_token``, ...) that the model itself gives to pieces."""

    @property
    def special_tokens(self) -> dict[str, str]:
        """Special tokens by role."""
        return {role: self.pieces[i] for role, i in self.special_ids if 0 <= i < len(self.pieces)}


def read_sentencepiece(path: Path) -> SentencePieceModel:
    """Read a ``tokenizer.model``.

    Raises:
        FileFormatError: it can not be read, or is no sentencepiece model.
        InputError: it is one of a kind that zoo does not rebuild.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise FileFormatError(f"can not read {path}: {error.strerror}.") from None
    try:
        message = _message(data)
        pieces = [_message(piece) for piece in message.get(1, [])]
        trainer, normalizer = (_message(b"".join(message[field])) for field in (2, 3))
        texts = [_last(piece, 1, b"").decode() for piece in pieces]
        scores = [struct.unpack("<f", _last(piece, 2, bytes(4)))[0] for piece in pieces]
        kinds = [_last(piece, 3, NORMAL) for piece in pieces]
    except (LookupError, struct.error, AttributeError, TypeError, ValueError):
        texts = []
    if not texts:
        raise FileFormatError(
            f"{path} is not a sentencepiece model.",
            fix="A tiktoken vocabulary may have the same name: take the model's tokenizer.json instead.",
        )
    _refuse(path, trainer, normalizer)
    return SentencePieceModel(
        pieces=texts,
        scores=scores,
        kinds=kinds,
        algorithm=_KINDS[_integer(trainer, 3, 1)],
        unknown_id=_integer(trainer, 40, 0),
        byte_fallback=bool(_integer(trainer, 35, 0)),
        add_prefix_space=bool(_integer(normalizer, 3, 1)),
        remove_extra_spaces=bool(_integer(normalizer, 4, 1)),
        charsmap=_last(normalizer, 2, b""),
        special_ids=tuple((role, _integer(trainer, field, default)) for role, field, default in _ROLES),
    )


def build_backend(model: SentencePieceModel, *, prefix_every_section: bool) -> tokenizers.Tokenizer:
    """The tokenizer that gives the ids that sentencepiece gives.

    Two things differ: a compiled charsmap is applied to whole grapheme clusters, so some combining marks come out
    differently, and of two overlapping pairs that make the same piece the left one is not always merged first.

    Args:
        prefix_every_section: whether text after a special token gets a space in front, as the start of a text does.

    Raises:
        FileFormatError: its parts contradict each other.
    """
    try:
        backend = tokenizers.Tokenizer(_bpe(model) if model.algorithm == "bpe" else _unigram(model))
        backend.normalizer = _normalizer(model)
        backend.pre_tokenizer = _pre_tokenizer(model, "always" if prefix_every_section else "first")
    except Exception as error:  # noqa: BLE001 - tokenizers raises no other
        raise FileFormatError(f"its sentencepiece model is damaged: {error}.") from None
    steps: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    steps += [decoders.Strip(" ", left=1, right=0)] if model.add_prefix_space else []
    backend.decoder = decoders.Sequence(steps)
    # Pieces with a space are looked for after spaces were replaced; all others in the text as it is.
    backend.add_tokens(
        [
            AddedToken(piece, special=kind != USER_DEFINED, normalized=kind == USER_DEFINED and _spaced(piece))
            for piece, kind in zip(model.pieces, model.kinds, strict=True)
            if kind in (UNKNOWN, CONTROL, USER_DEFINED)
        ]
    )
    return backend


def _spaced(piece: str) -> bool:
    return SPACE in piece or " " in piece


def _bpe(model: SentencePieceModel) -> models.BPE:
    """Merges are not in the file: every way to make a piece of two others is one, and the best piece comes first."""
    ids = {piece: i for i, (piece, kind) in enumerate(zip(model.pieces, model.kinds, strict=True)) if kind == NORMAL}
    merges = []
    for piece in sorted(ids, key=lambda piece: (-model.scores[ids[piece]], ids[piece])):
        halves = ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
        merges += [pair for pair in halves if pair[0] in ids and pair[1] in ids]
    return models.BPE(
        vocab={piece: i for i, piece in enumerate(model.pieces)},
        merges=merges,
        unk_token=model.pieces[model.unknown_id],
        fuse_unk=True,
        byte_fallback=model.byte_fallback,
    )


def _unigram(model: SentencePieceModel) -> models.Unigram:
    vocab = list(zip(model.pieces, model.scores, strict=True))
    return models.Unigram(vocab, unk_id=model.unknown_id, byte_fallback=model.byte_fallback)


def _normalizer(model: SentencePieceModel) -> normalizers.Normalizer:
    steps: list[Any] = [normalizers.Precompiled(model.charsmap)] if model.charsmap else []
    if model.remove_extra_spaces:
        # With a prefix the spaces at the start become that prefix; without one they vanish.
        ends = r" +\z" if model.add_prefix_space else r"\A +| +\z"
        steps += [normalizers.Replace(Regex(ends), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    steps.append(normalizers.Replace(" ", SPACE))
    return normalizers.Sequence(steps)


def _pre_tokenizer(model: SentencePieceModel, scheme: str) -> pre_tokenizers.PreTokenizer:
    # Cutting before each space is faster, and changes nothing when no piece reaches over one.
    split = not any(SPACE in piece[1:] for piece in model.pieces)
    if not model.add_prefix_space:
        return pre_tokenizers.Metaspace(SPACE, prepend_scheme="never", split=split)
    if model.remove_extra_spaces:
        return pre_tokenizers.Metaspace(SPACE, prepend_scheme=scheme, split=split)
    # Metaspace leaves out the prefix where the text begins with its mark already. Here nothing begins with a real
    # space any more, so the first one always adds a space, which the second one turns into the mark.
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(" ", prepend_scheme=scheme, split=False),
            pre_tokenizers.Metaspace(SPACE, prepend_scheme="never", split=split),
        ]
    )


def _refuse(path: Path, trainer: dict[int, list[Any]], normalizer: dict[int, list[Any]]) -> None:
    algorithm = _KINDS.get(_integer(trainer, 3, 1), "unknown")
    reasons = {
        f"is a sentencepiece model of kind {algorithm!r}": algorithm not in ("bpe", "unigram"),
        "marks spaces at the end of a word": bool(_integer(trainer, 24, 0)),
        "keeps spaces as they are": not _integer(normalizer, 5, 1),
    }
    for reason, applies in reasons.items():
        if applies:
            raise InputError(
                f"{path} {reason}, which zoo does not rebuild (only BPE and Unigram with U+2581 before a word).",
                fix="Take the model's tokenizer.json instead.",
            )


def _message(data: bytes) -> dict[int, list[Any]]:
    """The fields of a protobuf message: integers, and bytes for everything else."""
    fields: dict[int, list[Any]] = {}
    for number, value in _fields(data):
        fields.setdefault(number, []).append(value)
    return fields


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    position = 0
    while position < len(data):
        tag, position = _varint(data, position)
        wire = tag & 7
        if wire == 0:
            number, position = _varint(data, position)
            yield tag >> 3, number
            continue
        if wire == 2:
            size, position = _varint(data, position)
        else:
            size = {1: 8, 5: 4}.get(wire, len(data))  # groups are not in use; they run past the end
        if position + size > len(data):
            raise IndexError
        yield tag >> 3, data[position : position + size]
        position += size


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value - (1 << 64) * (value >> 63), position
        shift += 7


def _last(message: dict[int, list[Any]], field: int, default: Any) -> Any:
    """A field that is written twice counts by its last value, as protobuf says."""
    return message[field][-1] if field in message else default


def _integer(message: dict[int, list[Any]], field: int, default: int) -> int:
    return int(_last(message, field, default))
