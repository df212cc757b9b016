"""``hf:org/name[@revision][#config[:split]]``: data sets of the Hugging Face Hub, through the extra ``datasets``."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from zoo.data.rows import NEEDS_DATASETS, Row
from zoo.errors import InputError, UnavailableError, ZooError
from zoo.sources.address import Address, Source
from zoo.sources.base import FetchOptions, SourceError

VALIDATION = ("validation", "valid", "val", "dev")
"""What a validation split is called."""


class HubDataset:
    """One split, and the validation split beside it if there is one; rows stay on the disk, memory-mapped.

    Args:
        source: with the scheme ``hf``. Without a split, ``train`` or the only one.
        options: revision, token and offline mode.

    Raises:
        UnavailableError: the extra is not installed.
        InputError: there is no such config or split.
        SourceError: the Hub can not be reached, or has no such data set.
    """

    def __init__(self, source: Source, options: FetchOptions) -> None:
        source = source.at(options.revision)
        self.name = str(source)
        config, _, wanted = (source.address.fragment or "").partition(":")
        splits = _load(source.address, config or None, options)
        self.split = wanted or ("train" if "train" in splits or len(splits) > 1 else next(iter(splits)))
        if self.split not in splits:
            raise InputError(
                f"{self.name} has no split {self.split!r}.",
                fix=f"It has {', '.join(splits)}: write hf:{source.address.path}#{config}:SPLIT.",
            )
        self._train = splits[self.split]
        beside = next((name for name in VALIDATION if name in splits and name != self.split), None)
        self._validation = splits[beside] if beside and not wanted else None
        self.has_validation = self._validation is not None

    def train(self) -> Iterator[Row]:
        """Its rows."""
        return _rows(self._train, f"{self.name}:{self.split}")

    def validation(self) -> Iterator[Row]:
        """Those of the validation split."""
        assert self._validation is not None
        return _rows(self._validation, f"{self.name}:validation")


def _rows(split: Iterable[dict[str, Any]], name: str) -> Iterator[Row]:
    return (Row(values, f"{name}:{number}") for number, values in enumerate(split, 1))


def _load(address: Address, config: str | None, options: FetchOptions) -> Any:
    try:
        import datasets
        from huggingface_hub import constants
    except ImportError:
        raise UnavailableError(
            f"hf:{address} is a data set of the Hub, which the extra 'datasets' reads.", fix=NEEDS_DATASETS
        ) from None
    if not options.progress:
        datasets.disable_progress_bars()
    try:
        with _set(constants, datasets.config, offline=options.offline):
            return datasets.load_dataset(address.path, config, revision=address.revision, token=options.token)
    except Exception as error:  # several libraries raise through this one
        raise _explained(error, address, options) from error


@contextmanager
def _set(*modules: Any, offline: bool) -> Iterator[None]:
    """Both libraries read whether they may use the network when they are imported, into a constant of this name."""
    before = [module.HF_HUB_OFFLINE for module in modules]
    try:
        for module in modules:
            module.HF_HUB_OFFLINE = module.HF_HUB_OFFLINE or offline
        yield
    finally:
        for module, value in zip(modules, before, strict=True):
            module.HF_HUB_OFFLINE = value


def _explained(error: Exception, address: Address, options: FetchOptions) -> ZooError:
    names = {kind.__name__ for kind in type(error).__mro__}
    message = " ".join(str(error).split())
    if "BuilderConfig" in message or "Config name is missing" in message:
        return InputError(f"hf:{address}: {message}", fix=f"Write hf:{address.path}#CONFIG.")
    if "scripts are no longer supported" in message:
        return InputError(
            f"hf:{address} is read by a program of its own, and none is run: {message}.",
            fix=f"The Hub may have it as files: write hf:{address.path}@refs/convert/parquet.",
        )
    if "DatasetNotFoundError" in names or "RepositoryNotFoundError" in names:
        return SourceError(
            f"the Hub has no data set {address.path!r}, or a private or gated one: {message}",
            fix="Check the name; for a gated one accept its licence there and set HF_TOKEN.",
        )
    if options.offline or os.environ.get("HF_HUB_OFFLINE"):
        return SourceError(
            f"hf:{address} is not on this machine, and --offline forbids to use the network: {message}",
            fix="Allow it once, or give the path of a file that is there.",
        )
    return SourceError(
        f"hf:{address} can not be had ({type(error).__name__}: {message}).",
        fix="Check the network; or download the files elsewhere and give their path.",
    )
