"""From a DATA argument to samples: names, files, directories and sources; and the split by hash."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from zoo.data.formats import parse_rows
from zoo.data.hub import VALIDATION, HubDataset
from zoo.data.named import NamedDataset
from zoo.data.rows import READERS, Row, read_rows
from zoo.errors import FileFormatError, InputError, UnknownNameError
from zoo.registry import Registry
from zoo.sources.address import Source, is_source
from zoo.sources.base import FetchOptions, Report, fetch_model
from zoo.sources.provenance import read_provenance
from zoo.text.samples import Sample

Rows = Callable[[], Iterator[Row]]


@dataclass(frozen=True)
class DataSource:
    """What a DATA argument means.

    Attributes:
        name: of the directory that is made of it.
        train, validation: read the rows anew at each call.
        files: those of ``train``, if it is files; ``validation_files`` likewise.
        columns: its columns by the names that the format has for them.
        is_corpus: whether it is running text rather than examples.
        separator: the line between the documents of a text file.
        license: of a data set that has a name.
    """

    name: str
    train: Rows
    validation: Rows | None = None
    files: tuple[Path, ...] = ()
    validation_files: tuple[Path, ...] = ()
    columns: Mapping[str, str] = field(default_factory=dict)
    is_corpus: bool = False
    separator: str | None = None
    license: str = ""

    def with_validation(self, other: DataSource) -> DataSource:
        """The same with another source's rows for its validation set."""
        return replace(self, validation=other.train, validation_files=other.files)


@dataclass(frozen=True)
class LoadedData:
    """Samples, split, and what was found on the way.

    Attributes:
        n_without_reply: samples that were left out: the assistant says nothing in them.
        n_duplicates: samples that occur before; they are kept, and all copies are on one side of the split.
        ignored: columns that nothing was made of.
        split: how the validation set was chosen.
    """

    train: list[Sample]
    validation: list[Sample]
    format: str
    ignored: tuple[str, ...]
    n_without_reply: int
    n_duplicates: int
    split: str


def datasets_directory() -> Path:
    """Where data sets are kept: ``ZOO_DATA``, or ``data`` in the working directory."""
    return Path(os.environ.get("ZOO_DATA", "data"))


def resolve_data(
    argument: str,
    registry: Registry,
    *,
    directory: Path | None = None,
    options: FetchOptions | None = None,
    report: Report = lambda line: None,
) -> DataSource:
    """What ``argument`` means: ``scheme:address``, a registered name, a file or a directory, in this order.

    What has to be downloaded is kept in ``directory``, by default that of `datasets_directory`. What looks like a path
    is one. Of a directory, ``train.*`` and ``val.*`` are taken if they are there, else every file.

    Raises:
        InputError: nothing is there, or nothing that is read.
        UnknownNameError: nothing has this name.
        ZooError: a download failed.
    """
    directory, options = directory or datasets_directory(), options or FetchOptions()
    if is_source(argument):
        return _fetched(argument, None, registry, directory, options, report)
    path = Path(argument).expanduser()
    if not (any(sign in argument for sign in "/\\") or argument.startswith(".") or path.suffix.lower() in READERS):
        try:
            named: NamedDataset = registry.load("dataset", argument)
        except UnknownNameError as error:
            if not path.exists():
                error.fix = f"{error.fix or ''} Or give a file, a directory, or hf:org/name.".strip()
                raise
        else:
            return _of_name(argument, named, registry, directory, options, report)
    if not path.exists():
        raise InputError(f"there is no file or directory {argument!r}.")
    return _of_directory(path) if path.is_dir() else _of_files(path.stem, [path])


def load_samples(
    source: DataSource, *, val_fraction: float = 0.05, seed: int = 0, columns: Mapping[str, str] | None = None
) -> LoadedData:
    """Read the samples. Without a validation set of its own, each sample's hash says on which side it is.

    Args:
        val_fraction: 0 to below 1. The side of a sample depends on its content and the seed alone, not on its place.
        columns: columns of the rows by the names that the format has for them, beside those of the source.

    Raises:
        InputError: no format fits, or no sample has anything to learn.
        FileFormatError: a file is empty or damaged; the message has the line.
    """
    check_fraction(val_fraction)
    parsed = parse_rows(source.train(), {**source.columns, **(columns or {})})
    samples, n_left_out = _teaching(parsed.samples)
    if not samples:
        raise InputError(
            f"none of the {n_left_out} samples of {source.name!r} has anything to learn: the assistant says nothing."
        )
    keys = [_hash(sample, seed) for sample in samples]
    n_duplicates = len(keys) - len(set(keys))
    if source.validation is not None:
        own, more = _teaching(parse_rows(source.validation(), {**source.columns, **(columns or {})}).samples)
        return LoadedData(samples, own, parsed.format.name, parsed.ignored, n_left_out + more, n_duplicates, "its own")
    held_out = _held_out(keys, val_fraction)
    train = [sample for sample, key in zip(samples, keys, strict=True) if key not in held_out]
    validation = [sample for sample, key in zip(samples, keys, strict=True) if key in held_out]
    how = f"{val_fraction:g} by hash" if validation else "none"
    return LoadedData(train, validation, parsed.format.name, parsed.ignored, n_left_out, n_duplicates, how)


def check_fraction(fraction: float) -> None:
    """Refuse a fraction that leaves nothing to train on.

    Raises:
        InputError: it is not from 0 to below 1.
    """
    if not 0 <= fraction < 1:
        raise InputError(f"val_fraction must be at least 0 and below 1, not {fraction:g}.")


def _teaching(samples: Iterable[Sample]) -> tuple[list[Sample], int]:
    everything = list(samples)
    kept = [sample for sample in everything if sample.teaches]
    return kept, len(everything) - len(kept)


def _hash(sample: Sample, seed: int) -> bytes:
    content = json.dumps([seed, sample.to_dict()], sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(content.encode("utf-8", "surrogatepass")).digest()


def _held_out(keys: list[bytes], fraction: float) -> set[bytes]:
    """The hashes below the fraction; of few samples at least one, and never all."""
    different = sorted(set(keys))
    if fraction == 0 or len(different) < 2:
        return set()
    chosen = [key for key in different if int.from_bytes(key[:8], "big") < fraction * 2**64]
    return set(chosen[: len(different) - 1] or different[:1])


def _of_files(name: str, files: list[Path], validation: list[Path] | None = None) -> DataSource:
    def rows(paths: list[Path]) -> Rows:
        return lambda: (row for path in paths for row in read_rows(path))

    for path in (*files, *(validation or ())):
        if path.suffix.lower() not in READERS:
            raise InputError(f"{path} is of no kind that zoo reads.", fix=f"It reads {', '.join(READERS)}.")
    return DataSource(
        name=name,
        train=rows(files),
        validation=rows(validation) if validation else None,
        files=tuple(files),
        validation_files=tuple(validation or ()),
        is_corpus=all(path.suffix.lower() == ".txt" for path in files),
    )


def _of_directory(directory: Path) -> DataSource:
    files = sorted(path for path in directory.rglob("*") if path.suffix.lower() in READERS and path.is_file())
    files = [path for path in files if not any(part.startswith(".") for part in path.relative_to(directory).parts)]
    train = [path for path in files if path.parent == directory and path.stem == "train"]
    if (directory / "train.bin").is_file() and not train:
        raise InputError(f"{directory} holds token files already.", fix="Give it to pretrain as it is.")
    if len(train) > 1:
        raise InputError(f"{directory} has several training sets: {', '.join(path.name for path in train)}.")
    name = directory.resolve().name
    if train:
        return _of_files(name, train, [p for p in files if p.parent == directory and p.stem in VALIDATION][:1])
    if not files:
        raise InputError(f"{directory} holds no data.", fix=f"zoo reads {', '.join(READERS)}.")
    kinds = sorted({path.suffix.lower() for path in files})
    if len(kinds) > 1:
        raise InputError(f"{directory} holds files of several kinds: {', '.join(kinds)}.", fix="Give one of them.")
    return _of_files(name, files)


def _of_name(
    name: str, named: NamedDataset, registry: Registry, directory: Path, options: FetchOptions, report: Report
) -> DataSource:
    found = _fetched(named.source, name, registry, directory, options, report)
    if named.validation is not None:
        beside = _fetched(named.validation, f"{name}-validation", registry, directory, options, report)
        found = found.with_validation(beside)
    return replace(
        found,
        name=name.replace("/", "--"),
        columns=named.columns,
        is_corpus=named.corpus,
        separator=named.separator,
        license=named.license,
    )


def _fetched(
    argument: str, name: str | None, registry: Registry, directory: Path, options: FetchOptions, report: Report
) -> DataSource:
    source = Source.parse(argument)
    if source.scheme == "hf":
        hub = HubDataset(source, options)
        repository = source.address.path.rpartition("/")[2]
        return DataSource(repository, hub.train, hub.validation if hub.has_validation else None)
    if name is None:
        name = Path(source.address.path).stem
    place = directory / "downloads" / name.replace("/", "--")
    there = place.is_dir() and any(place.iterdir())
    if not there:
        report(f"downloading {argument.partition('#')[0]} to {place}.")
    if not there or read_provenance(place).source is not None:  # without a record somebody put it there on purpose
        fetch_model([argument], place, options, registry, report, what="the data")
    files = sorted(path for path in place.iterdir() if path.suffix.lower() in READERS)
    if not files:
        raise FileFormatError(f"{place} holds nothing that zoo reads: {', '.join(READERS)}.", fix="Remove it.")
    return _of_files(name, files)
