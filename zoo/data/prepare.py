"""What ``zoo prepare`` makes: rows in one format, split; or token files with the tokenizer that they were made with."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from zoo.data.corpus import CorpusReport, pieces_of, write_corpus
from zoo.data.encode import EncodingReport, encode_samples
from zoo.data.load import DataSource, LoadedData
from zoo.errors import InputError
from zoo.text.new_tokenizers import byte_tokenizer, characters_of, train_bpe
from zoo.text.prompts import PromptStyle
from zoo.text.samples import Encoded, Sample
from zoo.text.tokenizer import Tokenizer

MANIFEST = "prepared.json"
"""Says what a directory was made from; one that has it may be made anew."""


@dataclass(frozen=True)
class PreparedSamples:
    """What became of samples: of both sides of the split together, and the first of them with its mask."""

    loaded: LoadedData
    encoding: EncodingReport | None
    first: Encoded | None


def prepare_samples(
    source: DataSource,
    loaded: LoadedData,
    out: Path,
    *,
    tokenizer: Tokenizer | None = None,
    style: PromptStyle | None = None,
    max_seq_len: int | None = None,
    train_on_prompt: bool = False,
    facts: Mapping[str, Any] | None = None,
) -> PreparedSamples:
    """Write ``train.jsonl`` and ``val.jsonl``: conversations as ``{"messages": [...]}``, other formats as they are.

    With a tokenizer and a prompt style, every sample is encoded first, so that nothing is written that can not be
    trained on.

    Raises:
        InputError: as `encode_samples`; ``out`` holds something else.
    """
    encoding = first = None
    if tokenizer is not None and style is not None:
        limits: dict[str, Any] = {"max_seq_len": max_seq_len, "train_on_prompt": train_on_prompt}
        encoded = encode_samples([*loaded.train, *loaded.validation], style, tokenizer, **limits)
        encoding = encoded.report
        first = next((one for one in encoded.sequences if one.origin == loaded.train[0].origin), encoded.sequences[0])
    with new_directory(out, source) as directory:
        _write_rows(directory / "train.jsonl", loaded.train)
        if loaded.validation:
            _write_rows(directory / "val.jsonl", loaded.validation)
        counts = {"train": len(loaded.train), "validation": len(loaded.validation), "format": loaded.format}
        _write_manifest(directory, {"kind": "samples", **counts, **(facts or {})})
    return PreparedSamples(loaded, encoding, first)


def prepare_corpus(
    source: DataSource,
    tokenizer: Tokenizer,
    out: Path,
    *,
    val_fraction: float = 0.1,
    facts: Mapping[str, Any] | None = None,
) -> CorpusReport:
    """Write ``train.bin`` and ``val.bin``, and the tokenizer beside them.

    Raises:
        InputError: as `write_corpus`; ``out`` holds something else.
    """
    with new_directory(out, source) as directory:
        report = write_corpus(source, tokenizer, directory, val_fraction=val_fraction)
        tokenizer.save(directory)
        _write_manifest(directory, {"kind": "tokens", **report.to_dict(), **(facts or {})})
    return report


def corpus_tokenizer(given: str | None, source: DataSource, *, vocab_size: int | None = None) -> Tokenizer:
    """The tokenizer that a corpus is to be encoded with.

    Args:
        given: ``byte``, ``char`` (of the characters that occur), or a directory with a tokenizer.
        vocab_size: train a byte-level BPE of so many tokens on the corpus instead.

    Raises:
        InputError: neither or both are given, or there is no text.
        MissingTokenizerError: the directory has no tokenizer.
    """
    if (given is None) == (vocab_size is None):
        raise InputError("a corpus needs a tokenizer.", fix="Give one of: --model, --tokenizer, --train-bpe.")
    if vocab_size is not None:
        return train_bpe(_texts(source), vocab_size)
    assert given is not None
    return characters_of(_texts(source)) if given == "char" else read_tokenizer(given)


def read_tokenizer(given: str) -> Tokenizer:
    """``byte``, or the tokenizer of a directory.

    Raises:
        InputError: there is no such directory.
        MissingTokenizerError: it has no tokenizer.
    """
    if given == "byte":
        return byte_tokenizer()
    path = Path(given).expanduser()
    directory = path.parent if path.name in ("tokenizer.json", "tokenizer.model") else path
    if not directory.is_dir():
        raise InputError(
            f"there is no tokenizer {given!r}.", fix="Give byte, char, or a directory with a tokenizer.json."
        )
    return Tokenizer.from_directory(directory)


@contextmanager
def new_directory(out: Path, source: DataSource) -> Iterator[Path]:
    """A directory to write to, which gets the name ``out`` when the block ends without an error.

    Raises:
        InputError: ``out`` holds something that was not made by this, or the data itself.
    """
    if out.exists() and not (out.is_dir() and ((out / MANIFEST).is_file() or not any(out.iterdir()))):
        raise InputError(f"{out} exists and is not empty.", fix="Give another directory with --out.")
    if any(out.resolve() in path.resolve().parents for path in (*source.files, *source.validation_files)):
        raise InputError(f"the data itself is in {out}.", fix="Give another directory with --out.")
    partial = out.parent / f".{out.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        if out.exists():
            shutil.rmtree(out)
        partial.rename(out)
    except OSError as error:
        raise InputError(f"can not write {error.filename or out}: {error.strerror}.") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _texts(source: DataSource) -> Iterator[str]:
    """All text, validation included: a vocabulary of characters must have them all."""
    own = replace(source, validation=None)
    yield from (piece.text for piece in pieces_of(own))
    if source.validation is not None:
        yield from (piece.text for piece in pieces_of(source, validation=True))


def _write_rows(path: Path, samples: list[Sample]) -> None:
    with path.open("w", encoding="utf-8", errors="surrogatepass") as file:
        for sample in samples:
            file.write(json.dumps(sample.to_dict(), ensure_ascii=False) + "\n")


def _write_manifest(directory: Path, facts: Mapping[str, Any]) -> None:
    text = json.dumps({"schema": 1, **facts}, indent=2, ensure_ascii=False, default=str)
    (directory / MANIFEST).write_text(text + "\n", encoding="utf-8")
