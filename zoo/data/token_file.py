"""Token files: ids of 2 or 4 bytes one after the other, memory-mapped, with a small JSON file beside them.

``train.bin`` is what nanoGPT's ``prepare.py`` writes; ``train.bin.json`` says what nanoGPT leaves to the reader.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np
from numpy.typing import NDArray

from zoo.errors import FileFormatError, InputError
from zoo.text.tokenizer import Tokenizer

DTYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
_CHUNK = 1 << 22


@dataclass(frozen=True)
class TokenFacts:
    """What the JSON file says.

    Attributes:
        dtype: ``uint16`` or ``uint32``, little-endian.
        n_tokens: how many there are.
        vocab_size: of the tokenizer; every id is below it.
        tokenizer: `Tokenizer.fingerprint`; ``None``: not known.
        eos_id: the token after each document, if there is one.
        n_documents: how many texts there were.
        sources: name, bytes and sha256 of each file that it was made from.
    """

    dtype: str
    n_tokens: int
    vocab_size: int | None = None
    tokenizer: str | None = None
    eos_id: int | None = None
    n_documents: int | None = None
    sources: tuple[dict[str, Any], ...] = ()


class TokenFile:
    """The ids of a corpus; ``ids`` is memory-mapped, so it may be larger than memory."""

    def __init__(self, path: Path, facts: TokenFacts) -> None:
        self.path, self.facts = path, facts
        self.ids: NDArray[Any] = np.memmap(path, dtype=DTYPES[facts.dtype], mode="r")

    @classmethod
    def open(cls, path: Path, tokenizer: Tokenizer | None = None) -> TokenFile:
        """Open ``path``; without a JSON file beside it, it is taken for nanoGPT's: uint16.

        Args:
            path: of the ``.bin`` file.
            tokenizer: the one that the ids are to be of.

        Raises:
            InputError: the file is missing or empty, or its ids are those of another tokenizer.
            FileFormatError: it is not what its JSON file says.
        """
        if not path.is_file():
            raise InputError(f"there is no token file {str(path)!r}.", fix="Make one with: zoo prepare.")
        described = facts_path(path).is_file()
        facts = _read_facts(facts_path(path)) if described else TokenFacts("uint16", path.stat().st_size // 2)
        found, expected = path.stat().st_size, DTYPES[facts.dtype].itemsize * facts.n_tokens
        if found != expected or not found:
            raise FileFormatError(
                f"{path} has {found:,} bytes, and {facts.n_tokens:,} ids of {facts.dtype} take {expected:,}.",
                fix="Make it again with: zoo prepare.",
            )
        opened = cls(path, facts)
        if tokenizer is not None:
            opened._check(tokenizer)
        return opened

    def __len__(self) -> int:
        return self.facts.n_tokens

    def largest_id(self) -> int:
        """The largest id, from a pass over the file."""
        return max(int(self.ids[i : i + _CHUNK].max()) for i in range(0, len(self), _CHUNK))

    def _check(self, tokenizer: Tokenizer) -> None:
        if self.facts.tokenizer not in (None, tokenizer.fingerprint):
            raise InputError(
                f"{self.path} was made with another tokenizer ({self.facts.vocab_size} tokens) than this model's "
                f"({tokenizer.vocab_size}): its ids mean something else.",
                fix="Make it again with: zoo prepare DATA --model MODEL; or take the tokenizer that lies beside it.",
            )
        if self.facts.tokenizer is None and (largest := self.largest_id()) >= tokenizer.vocab_size:
            raise InputError(
                f"{self.path} holds the id {largest}, and the tokenizer has {tokenizer.vocab_size} tokens.",
                fix="Take the tokenizer that the file was made with.",
            )


class TokenWriter:
    """Writes a token file piece by piece. Its JSON file appears when the block ends without an error."""

    def __init__(self, path: Path, tokenizer: Tokenizer) -> None:
        largest = max(tokenizer.backend.get_vocab(with_added_tokens=True).values())
        self.path = path
        self.facts = TokenFacts(
            dtype="uint16" if largest < 1 << 16 else "uint32",
            n_tokens=0,
            vocab_size=largest + 1,
            tokenizer=tokenizer.fingerprint,
        )
        self._file: BinaryIO | None = None

    def __enter__(self) -> Self:
        facts_path(self.path).unlink(missing_ok=True)
        self._file = self.path.open("wb")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        assert self._file is not None
        self._file.close()
        if kind is None:
            write_facts(self.path, self.facts)

    def append(self, ids: Sequence[int] | NDArray[Any]) -> None:
        """Write ids after those that are there."""
        assert self._file is not None
        values = np.asarray(ids, dtype=DTYPES[self.facts.dtype])
        self._file.write(values.tobytes())
        self.facts = replace(self.facts, n_tokens=self.facts.n_tokens + len(values))

    def note(self, **facts: Any) -> None:
        """Set facts other than the count."""
        self.facts = replace(self.facts, **facts)


def split_end(path: Path, fraction: float, to: Path) -> None:
    """Move the last ``fraction`` of a token file to another, as nanoGPT splits 90 to 10.

    Raises:
        InputError: nothing would be left on one side.
    """
    facts = _read_facts(facts_path(path))
    n_kept = int(facts.n_tokens * (1 - fraction))
    if not 0 < n_kept < facts.n_tokens:
        raise InputError(f"{facts.n_tokens} tokens can not be split {1 - fraction:g} to {fraction:g}.")
    size = DTYPES[facts.dtype].itemsize
    with path.open("r+b") as source:
        source.seek(n_kept * size)
        with to.open("wb") as target:
            while chunk := source.read(_CHUNK):
                target.write(chunk)
        source.truncate(n_kept * size)
    write_facts(path, replace(facts, n_tokens=n_kept))
    write_facts(to, replace(facts, n_tokens=facts.n_tokens - n_kept))


def facts_path(path: Path) -> Path:
    """The JSON file of a token file."""
    return path.with_name(f"{path.name}.json")


def write_facts(path: Path, facts: TokenFacts) -> None:
    """Write the JSON file of the token file ``path``."""
    text = json.dumps({"schema": 1, **asdict(facts)}, indent=2, ensure_ascii=False)
    facts_path(path).write_text(text + "\n", encoding="utf-8")


def _read_facts(path: Path) -> TokenFacts:
    from zoo.text.json_files import read_json_object

    values = read_json_object(path)
    known = {field.name for field in fields(TokenFacts)}
    if values.pop("schema", None) != 1 or not values.keys() <= known or values.get("dtype") not in DTYPES:
        raise FileFormatError(f"{path} does not describe a token file of this version of zoo.")
    if type(values.get("n_tokens")) is not int:
        raise FileFormatError(f"{path} does not say how many tokens there are.")
    return TokenFacts(**{**values, "sources": tuple(values.get("sources", ()))})
