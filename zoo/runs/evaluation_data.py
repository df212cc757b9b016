"""What a model is evaluated on: examples, running text, or token files; and the windows that a text is read in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zoo.data.corpus import pieces_of
from zoo.data.load import DataSource, load_samples, resolve_data
from zoo.errors import InputError
from zoo.registry import Registry
from zoo.runs.data import Say
from zoo.text.samples import Encoded, Sample
from zoo.text.tokenizer import Tokenizer

_DECODED_AT_ONCE = 1 << 14
_OVERLAP = 8
"""Tokens before a piece that are decoded with it: what a token adds to a text may depend on its neighbours."""


@dataclass(frozen=True)
class EvaluationData:
    """What an argument means; one of ``samples``, ``texts`` and ``tokens`` is there.

    Attributes:
        name: the argument, and which part of it was taken.
        format: of the samples.
        n_without_reply: samples that were left out: the assistant says nothing in them.
        texts: documents.
        tokens: a token file.
    """

    name: str
    format: str
    samples: Sequence[Sample] = ()
    n_without_reply: int = 0
    texts: Sequence[str] = ()
    tokens: Path | None = None


def read_evaluation_data(
    argument: str, registry: Registry, *, max_samples: int | None = None, report: Say = lambda line: None
) -> EvaluationData:
    """Read what is to be evaluated on: the validation set where there is one, and otherwise all.

    Args:
        argument: as `zoo.data.load.resolve_data` takes it; or a token file, or a directory of token files.
        max_samples: only the first ones.
        report: told what is downloaded.

    Raises:
        InputError: nothing is there, no format fits, there is nothing to predict, or text is to be cut by samples.
        FileFormatError: a file is empty or damaged; the message has the line.
    """
    if (tokens := _token_file(Path(argument).expanduser())) is not None:
        _refuse_count(max_samples, argument)
        return EvaluationData(str(tokens), "tokens", tokens=tokens)
    source, name = resolve_data(argument, registry, report=report), argument
    if source.validation is not None:
        source = replace(source, train=source.validation, files=source.validation_files, validation=None)
        name = f"{argument}, its validation set"
    if source.is_corpus:
        _refuse_count(max_samples, argument)
        return EvaluationData(name, "running text", texts=_texts(source))
    loaded = load_samples(source, val_fraction=0.0)
    samples = loaded.train[:max_samples]
    if len(samples) < len(loaded.train):
        name = f"{name}, its first {len(samples):,} samples"
    return EvaluationData(name, loaded.format, samples=samples, n_without_reply=loaded.n_without_reply)


def _token_file(path: Path) -> Path | None:
    if path.suffix == ".bin":
        return path
    return next((path / name for name in ("val.bin", "train.bin") if (path / name).is_file()), None)


def _refuse_count(max_samples: int | None, argument: str) -> None:
    if max_samples is not None:
        raise InputError(f"{argument} is running text, which has no samples to count.", fix="Leave out --max-samples.")


def _texts(source: DataSource) -> list[str]:
    texts, begun = [], ""
    for piece in pieces_of(source):
        begun += piece.text
        if piece.ends:
            texts.append(begun)
            begun = ""
    if not any(text.strip() for text in texts):
        raise InputError(f"{source.name} holds no text.")
    return texts


def windows(ids: NDArray[Any], before: Sequence[int], *, size: int, stride: int) -> Iterator[Encoded]:
    """A text in windows, in which each of its tokens is predicted once; without ``before``, each but the first.

    A window begins ``stride`` tokens after the one before, and predicts what that one did not; tokens that they have in
    common are only seen.

    Args:
        ids: (T,); memory-mapped or not.
        before: tokens that begin every window, as the tokenizer's BOS.
        size: positions of a window; its last token is only a target.
        stride: at most ``size``, less what a second token of ``before`` takes.
    """
    room = size + 1 - len(before)
    assert 1 <= stride <= room - (not before)
    start, done = 0, 0 if before else 1
    while done < len(ids):
        end = min(start + room, len(ids))
        window = np.concatenate([np.asarray(before, np.int32), np.asarray(ids[start:end], np.int32)])
        supervised = np.zeros(len(window), dtype=bool)
        supervised[len(before) + done - start :] = True
        yield Encoded(window, supervised)
        start, done = start + stride, end


def n_windows(n_tokens: int, *, n_before: int, size: int, stride: int) -> int:
    """How many windows `windows` makes."""
    left = n_tokens - (size + 1 - n_before)
    return int(n_tokens > (not n_before)) + max(0, -(-left // stride))


def bytes_of_supervised(encoded: Encoded, tokenizer: Tokenizer) -> int:
    """UTF-8 bytes of the text that the supervised tokens of an example are. Special tokens have none."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], encoded.supervised, [False]]).astype(np.int8)))
    ids = encoded.ids.tolist()
    lengths = [len(tokenizer.decode(ids[:edge]).encode()) for edge in edges.tolist()]
    return sum(lengths[1::2]) - sum(lengths[::2])


def bytes_of_tokens(ids: NDArray[Any], tokenizer: Tokenizer) -> int:
    """UTF-8 bytes of the text that all tokens but the first are, decoded piece by piece."""
    shown, waiting, n_bytes = ids[:1].tolist(), [], 0
    for start in range(1, len(ids), _DECODED_AT_ONCE):
        waiting += ids[start : start + _DECODED_AT_ONCE].tolist()
        added = tokenizer.decode(shown + waiting)[len(tokenizer.decode(shown)) :]
        if added.endswith("\ufffd") and start + _DECODED_AT_ONCE < len(ids):
            continue  # the piece ends within a character
        n_bytes += len(added.encode())
        shown, waiting = waiting[-_OVERLAP:], []
    return n_bytes
