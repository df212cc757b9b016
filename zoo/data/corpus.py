"""Running text to token files, piece by piece: a corpus may be larger than memory."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from zoo.data.load import DataSource, Rows, check_fraction
from zoo.data.rows import not_utf8, open_text
from zoo.data.token_file import TokenWriter, split_end
from zoo.errors import FileFormatError, InputError
from zoo.sources.provenance import sha256_of
from zoo.text.tokenizer import Tokenizer

_PIECE_CHARACTERS = 1 << 16
_LONGEST_PIECE = 1 << 22
"""Where no line ends for so long, text is cut anywhere."""
_BATCH = 64
"""Pieces that the tokenizer encodes at a time, in parallel."""
_CUT = re.compile(r"\n(?=\S)")
"""Before a line that begins with a word: tokenizers do not join it with the line end before."""


class Piece(NamedTuple):
    """A part of a document: its text, the characters before and after it there, and whether it is the last."""

    text: str
    before: str
    after: str
    ends: bool


@dataclass(frozen=True)
class CorpusReport:
    """What was written."""

    n_train: int
    n_validation: int
    n_documents: int
    n_characters: int
    dtype: str
    vocab_size: int
    eos: bool

    def to_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return asdict(self)


def write_corpus(source: DataSource, tokenizer: Tokenizer, out: Path, *, val_fraction: float = 0.1) -> CorpusReport:
    """Write ``train.bin`` and ``val.bin`` into a directory.

    Each text file, or row with a column ``text``, is a document: the tokens that the tokenizer puts before a text, its
    tokens, and EOS if the tokenizer has one. The validation set is the source's own, or else the last tokens.

    Raises:
        InputError: there is no text, or the tokenizer has no token for a character.
        FileFormatError: a file is damaged; the message has the line.
    """
    check_fraction(val_fraction)
    with TokenWriter(out / "train.bin", tokenizer) as writer:
        n_documents, n_characters = _write(pieces_of(source), tokenizer, writer)
        writer.note(sources=tuple(_describe(path) for path in source.files))
    if not writer.facts.n_tokens:
        raise InputError(f"{source.name} holds no text.")
    n_validation = 0
    if source.validation is not None:
        with TokenWriter(out / "val.bin", tokenizer) as beside:
            more = _write(pieces_of(source, validation=True), tokenizer, beside)
            beside.note(sources=tuple(_describe(path) for path in source.validation_files))
        n_validation, n_characters = beside.facts.n_tokens, n_characters + more[1]
    elif val_fraction:
        split_end(out / "train.bin", val_fraction, out / "val.bin")
        n_validation = writer.facts.n_tokens - int(writer.facts.n_tokens * (1 - val_fraction))
    own = source.validation is not None
    return CorpusReport(
        n_train=writer.facts.n_tokens - (0 if own else n_validation),
        n_validation=n_validation,
        n_documents=n_documents,
        n_characters=n_characters,
        dtype=writer.facts.dtype,
        vocab_size=tokenizer.vocab_size,
        eos=tokenizer.eos_id is not None,
    )


def pieces_of(source: DataSource, *, validation: bool = False) -> Iterator[Piece]:
    """The documents of a corpus in pieces of bounded size."""
    files = source.validation_files if validation else source.files
    if files and all(path.suffix.lower() == ".txt" for path in files):
        for path in files:
            yield from _pieces_of_file(path, source.separator)
        return
    rows: Rows | None = source.validation if validation else source.train
    assert rows is not None
    column = source.columns.get("text", "text")
    for row in rows():
        text = row.values.get(column)
        if not isinstance(text, str):
            raise FileFormatError(
                f"{row.origin} has no column {column!r} with a text; it has {', '.join(map(repr, row.values))}.",
                fix="Name the column with --column text=NAME.",
            )
        yield Piece(text, "", "", ends=True)


def _write(pieces: Iterable[Piece], tokenizer: Tokenizer, writer: TokenWriter) -> tuple[int, int]:
    """Encode and write; returns the numbers of documents and characters."""
    before, after = tokenizer.ends
    if not after and tokenizer.eos_id is not None:
        after = [tokenizer.eos_id]
    n_documents = n_characters = 0
    begins, remaining = True, iter(pieces)
    while batch := list(islice(remaining, _BATCH)):
        for piece, ids in zip(batch, _encode(batch, tokenizer), strict=True):
            n_characters += len(piece.text)
            writer.append([*(before if begins else ()), *ids, *(after if piece.ends else ())])
            n_documents += piece.ends
            begins = piece.ends
    writer.note(n_documents=n_documents, eos_id=tokenizer.eos_id)
    return n_documents, n_characters


def _encode(batch: list[Piece], tokenizer: Tokenizer) -> Iterator[list[int]]:
    """Each piece's ids, as they are within its document: tokenizers look at the start and the end of a text."""
    texts = [piece.before + piece.text + piece.after for piece in batch]
    for piece, found in zip(batch, tokenizer.locate(texts), strict=True):
        ids: list[int] = found.ids
        if piece.before or piece.after:
            first, last = len(piece.before), len(piece.before) + len(piece.text)
            offsets = np.asarray(found.offsets).reshape(-1, 2)
            inside = (offsets[:, 0] >= first) & (offsets[:, 1] <= last)
            before = (offsets[:, 1] <= first) & (first > 0)
            inside &= ~before
            if (before | inside | (offsets[:, 0] >= last)).all():
                ids = np.asarray(ids)[inside].tolist()
            else:  # a token across the cut
                ids = tokenizer.encode(piece.text, add_special_tokens=False)
        yield ids


def _pieces_of_file(path: Path, separator: str | None) -> Iterator[Piece]:
    held, before = None, ""
    for text, ends in _documents(path, separator):
        if held is not None:
            yield Piece(held, before, text[:1], ends and not text)
            before = "" if ends else held[-1:]
        held = text or None
    assert held is None, "the last thing said is that a document ends"


def _documents(path: Path, separator: str | None) -> Iterator[tuple[str, bool]]:
    """The parts of a file's documents, each with whether its document ends with it.

    With a separator, documents lose the white space at their ends, and empty ones are left out.
    """
    begun, held = False, ""
    for block in _blocks(path):
        parts = block.split(separator) if separator else [block]
        for number, part in enumerate(parts):
            if number and begun:
                yield "", True
                begun, held = False, ""
            text = held + part if begun or not separator else part.lstrip()
            if separator:
                text, held = text.rstrip(), text[len(text.rstrip()) :]
            if text:
                yield text, False
                begun = True
    if begun:
        yield "", True


def _blocks(path: Path) -> Iterator[str]:
    """A file in blocks that end where a line does."""
    buffer = ""
    with open_text(path) as file:
        while True:
            try:
                read = file.read(_PIECE_CHARACTERS)
            except UnicodeDecodeError as error:
                not_utf8(path, error)
            if not read:
                break
            buffer += read
            cut = max((match.end() for match in _CUT.finditer(buffer)), default=0)
            cut = cut or (len(buffer) if len(buffer) > _LONGEST_PIECE else 0)
            if cut:
                yield buffer[:cut]
                buffer = buffer[cut:]
    if buffer:
        yield buffer


def _describe(path: Path) -> dict[str, Any]:
    return {"file": path.name, "bytes": path.stat().st_size, "sha256": sha256_of(path)}
