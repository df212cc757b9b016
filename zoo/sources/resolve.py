"""From a MODEL argument to a path, downloading what is not there yet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from zoo.errors import InputError, UnknownNameError
from zoo.registry import ModelEntry, Registry
from zoo.sources.address import Source, brief, is_source
from zoo.sources.base import FetchOptions, Report, fetch_model, find_source
from zoo.sources.provenance import read_provenance

_FILE_SUFFIXES = (".gguf", ".pt", ".pth")
"""Of files that hold a model: an argument that ends so is a path."""


@dataclass(frozen=True)
class ResolvedModel:
    """Where a model is."""

    path: Path
    name: str | None = None
    """What reaches it in the registry, if it was asked for by its name."""


def resolve_model(
    argument: str,
    registry: Registry,
    *,
    checkpoints: Path,
    options: FetchOptions | None = None,
    report: Report = lambda line: None,
    download: bool = True,
) -> ResolvedModel:
    """Where the model that ``argument`` means is.

    In this order: ``scheme:address`` and registry names, which are kept in ``checkpoints`` and downloaded to there;
    a path; a directory of this name in the working directory or in ``checkpoints``. Whatever looks like a path is one,
    unless it is a registry name such as ``dist/name``. A revision has its own directory, ``name@revision``.

    Raises:
        InputError: nothing is there (and ``download`` is off), other weights are, or the scheme is unknown.
        UnknownNameError: nothing has this name.
        ZooError: the download failed, as `fetch_model`.
    """
    options = options or FetchOptions()
    if is_source(argument):
        source = Source.parse(argument).at(options.revision)
        find_source(source, registry)
        place = _Place(str(source), None, None, (str(source),), checkpoints / source.directory_name)
        return place.bring(registry, replace(options, revision=None), report, download)
    try:
        entry = registry.model(argument)
    except UnknownNameError as error:
        if path := _path(argument, checkpoints):
            _refuse_revision(argument, options)
            return ResolvedModel(path)
        error.fix = f"{error.fix or ''} Or write hf:org/name, or the path of a model directory.".strip()
        raise
    name = _reference(entry, registry)
    directory = name.replace("/", "--") + (f"@{options.revision.replace('/', '-')}" if options.revision else "")
    place = _Place(argument, name, entry, entry.sources, checkpoints / directory)
    return place.bring(registry, options, report, download)


@dataclass(frozen=True)
class _Place:
    """Where something that can be downloaded is kept."""

    argument: str
    name: str | None
    entry: ModelEntry | None
    sources: tuple[str, ...]
    path: Path

    def bring(self, registry: Registry, options: FetchOptions, report: Report, download: bool) -> ResolvedModel:
        """The directory, downloaded if it is not there."""
        found = ResolvedModel(self.path, self.name)
        if self.path.is_dir() and any(self.path.iterdir()):
            self._check_sources()
            return found
        if not download:
            raise InputError(
                f"model {self.argument!r} is not in {self.path.parent}.",
                fix=f"Run: python -m zoo download {self.argument}.",
            )
        if self.sources:
            first = brief(self.sources[0])
            report(f"{self.argument} is not in {self.path.parent} yet; downloading {first} to {self.path}.")
        fetch_model(self.entry or self.sources, self.path, options, registry, report)
        return found

    def _check_sources(self) -> None:
        """Refuse a directory that was downloaded from elsewhere. One without a record was put there on purpose."""
        recorded = read_provenance(self.path).source
        if recorded is None or not self.sources or not is_source(recorded):
            return
        if not any(Source.parse(source).may_be(Source.parse(recorded)) for source in self.sources):
            raise InputError(
                f"{self.path} holds {recorded}, not {_either(self.sources)}.",
                fix=f"Write {self.path} to use it as it is; or move it, and the other is downloaded.",
            )


def _path(argument: str, checkpoints: Path) -> Path | None:
    """The file or directory that ``argument`` means, if it is not the name of anything.

    Raises:
        InputError: it is written as a path, and there is nothing.
    """
    path = Path(argument).expanduser()
    if _is_path(argument):
        if not path.exists():
            raise InputError(f"there is no model directory or file {argument!r}.", fix=_hub_hint(argument))
        return path
    candidates = (path, checkpoints / argument) if argument else ()
    return next((candidate for candidate in candidates if candidate.is_dir()), None)


def _is_path(argument: str) -> bool:
    return (
        "/" in argument
        or "\\" in argument
        or argument.startswith((".", "~"))
        or argument.endswith(_FILE_SUFFIXES)
        or Path(argument).is_absolute()
    )


def _hub_hint(argument: str) -> str | None:
    is_like_a_repository = (
        argument.count("/") == 1 and argument[0] not in "./~" and not argument.endswith((*_FILE_SUFFIXES, "/"))
    )
    return f"If it is on the Hugging Face Hub, write hf:{argument}." if is_like_a_repository else None


def _reference(entry: ModelEntry, registry: Registry) -> str:
    """The shortest reference that reaches the entry: its name, or ``dist/name`` where that means another model."""
    items = registry.items("model")
    return next(ref for ref, other in items if (other.name, other.origin) == (entry.name, entry.origin))


def _refuse_revision(argument: str, options: FetchOptions) -> None:
    if options.revision:
        raise InputError(
            f"{argument!r} is a path, and a path has no revision {options.revision!r}.", fix="Leave one out."
        )


def _either(sources: Sequence[str]) -> str:
    return " or ".join(sources)
