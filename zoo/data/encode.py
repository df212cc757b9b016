"""Samples become token ids once, before training; what is cut or left out is counted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import islice
from typing import Any

import numpy as np

from zoo.errors import InputError
from zoo.text.prompts import PromptStyle, Rendered, assemble, n_straddling, place
from zoo.text.samples import Encoded, Sample
from zoo.text.tokenizer import Tokenizer

_BATCH = 512
"""Samples that the tokenizer encodes at a time, in parallel."""


@dataclass
class EncodingReport:
    """What became of the samples.

    Attributes:
        n_samples: those that were given.
        n_kept: those that are trained on.
        n_pieces: sequences that those are; a text that is longer than the context becomes several.
        n_tokens, n_supervised: of the sequences.
        n_truncated: samples whose end was cut off, in all ``n_cut`` tokens.
        n_masked: samples that were left out: nothing that is learnt is within the context.
        n_straddling: replies that begin inside a token, mostly after a prompt that ends in a space.
        n_without_bos: sequences without a BOS in front, where the tokenizer puts one before every text.
        n_double_bos: sequences with two.
        longest: tokens of the longest sample, uncut.
    """

    n_samples: int = 0
    n_kept: int = 0
    n_pieces: int = 0
    n_tokens: int = 0
    n_supervised: int = 0
    n_truncated: int = 0
    n_cut: int = 0
    n_masked: int = 0
    n_straddling: int = 0
    n_without_bos: int = 0
    n_double_bos: int = 0
    longest: int = 0

    def __add__(self, other: EncodingReport) -> EncodingReport:
        sums = {field.name: getattr(self, field.name) + getattr(other, field.name) for field in fields(self)}
        return EncodingReport(**{**sums, "longest": max(self.longest, other.longest)})

    def to_dict(self) -> dict[str, Any]:
        """For ``--json`` and logs."""
        return asdict(self)


@dataclass(frozen=True)
class EncodedData:
    """Sequences to train on, and what became of the samples that they were made of."""

    sequences: list[Encoded]
    report: EncodingReport


def encode_samples(
    samples: Sequence[Sample],
    style: PromptStyle,
    tokenizer: Tokenizer,
    *,
    max_seq_len: int | None = None,
    train_on_prompt: bool = False,
) -> EncodedData:
    """Encode samples, each once.

    What follows the last token that is learnt is left off: it would be computed for nothing. A sample that is longer
    than ``max_seq_len`` tokens loses its end; a text is cut into pieces that overlap by one token, so that each token
    but the first is learnt once.

    Raises:
        InputError: a sample can not be encoded (its file and line are in the message), every sample is too long, or
            nothing that is learnt is left of any.
    """
    if max_seq_len is not None and max_seq_len < 2:
        raise InputError(f"max_seq_len must be at least 2, not {max_seq_len}: a token is learnt from those before it.")
    report, sequences, n_longer = EncodingReport(), [], 0
    for sample, encoded in _encoded(samples, style, tokenizer, report, train_on_prompt):
        report.n_samples += 1
        report.longest = max(report.longest, len(encoded))
        pieces = list(_pieces(_trimmed(encoded), max_seq_len, split=sample.text is not None))
        n_lost = len(_trimmed(encoded)) - len(pieces[0]) if sample.text is None else 0
        n_longer += n_lost > 0
        report.n_truncated += n_lost > 0
        report.n_cut += n_lost
        kept = [piece for piece in pieces if piece.supervised.any()]
        report.n_masked += not kept
        report.n_kept += bool(kept)
        sequences += kept
    report.n_pieces = len(sequences)
    report.n_tokens = sum(map(len, sequences))
    report.n_supervised = sum(encoded.n_supervised for encoded in sequences)
    _audit(report, sequences, tokenizer)
    _check(report, n_longer, max_seq_len)
    return EncodedData(sequences, report)


def _encoded(
    samples: Iterable[Sample], style: PromptStyle, tokenizer: Tokenizer, report: EncodingReport, train_on_prompt: bool
) -> Iterator[tuple[Sample, Encoded]]:
    remaining = iter(samples)
    while batch := list(islice(remaining, _BATCH)):
        rendered = [_rendered(sample, style, tokenizer) for sample in batch]
        for sample, text, located in zip(batch, rendered, _located(batch, rendered, tokenizer), strict=True):
            placed = place(located)
            report.n_straddling += n_straddling(text, placed)
            yield sample, assemble(text, placed, tokenizer, train_on_prompt=train_on_prompt, origin=sample.origin)


def _rendered(sample: Sample, style: PromptStyle, tokenizer: Tokenizer) -> Rendered:
    try:
        return style.rendered(sample, tokenizer)
    except InputError as error:
        raise _at(sample, error) from None


def _located(batch: list[Sample], rendered: list[Rendered], tokenizer: Tokenizer) -> list[Any]:
    try:
        return tokenizer.locate([one.text for one in rendered])
    except InputError:
        for sample, one in zip(batch, rendered, strict=True):
            try:
                tokenizer.locate([one.text])
            except InputError as error:
                raise _at(sample, error) from None
        raise


def _at(sample: Sample, error: InputError) -> InputError:
    return InputError(f"{sample.origin or 'a sample'}: {error.message}", fix=error.fix)


def _trimmed(encoded: Encoded) -> Encoded:
    learnt = np.flatnonzero(encoded.supervised)
    end = int(learnt[-1]) + 1 if len(learnt) else len(encoded)
    return Encoded(encoded.ids[:end], encoded.supervised[:end], encoded.origin)


def _pieces(encoded: Encoded, limit: int | None, *, split: bool) -> Iterator[Encoded]:
    """Sequences of at most ``limit`` tokens; the first token of a piece is the last of the one before."""
    length = len(encoded)
    if limit is None or length <= limit:
        yield encoded
        return
    for start in range(0, length - 1 if split else 1, limit - 1):
        supervised = encoded.supervised[start : start + limit].copy()
        supervised[:1] = False
        yield Encoded(encoded.ids[start : start + limit], supervised, encoded.origin, start + limit < length)


def _audit(report: EncodingReport, sequences: list[Encoded], tokenizer: Tokenizer) -> None:
    bos = tokenizer.bos_id
    if bos is None:
        return
    for encoded in sequences:
        report.n_without_bos += bos in tokenizer.ends[0] and bool(encoded.ids[0] != bos)
        report.n_double_bos += bos != tokenizer.eos_id and bool((encoded.ids[:2] == bos).sum() == 2)


def _check(report: EncodingReport, n_longer: int, max_seq_len: int | None) -> None:
    if not report.n_samples:
        raise InputError("there are no samples.")
    if n_longer == report.n_samples and max_seq_len is not None:
        raise InputError(
            f"every sample is longer than {max_seq_len} tokens; the longest has {report.longest:,}.",
            fix=f"Raise --max-seq-len, as far as the context of the model goes; {report.longest} keeps all.",
        )
    if not report.n_kept:
        raise InputError(
            f"nothing is left to learn in any of the {report.n_samples:,} samples: all labels are masked.",
            fix="Check that the assistant says something, and that prompts leave room for it in --max-seq-len tokens.",
        )
