"""A source that copies a directory, with one thing wrong. An address is a path."""

from __future__ import annotations

import hashlib
import shutil
import time
from pathlib import Path

from zoo.sources.base import Fetched, FetchOptions, SourceError, resumes


def good(address: str, destination: Path, options: FetchOptions) -> Fetched:
    """Copies what is there."""
    if not Path(address).is_dir():
        raise SourceError(f"there is no directory {address!r}.")
    shutil.copytree(address, destination, dirs_exist_ok=True)
    return Fetched(address)


def cuts(address: str, destination: Path, options: FetchOptions) -> Fetched:
    """The last byte is lost."""
    found = good(address, destination, options)
    for path in destination.iterdir():
        path.write_bytes(path.read_bytes()[:-1])
    return found


def promises(address: str, destination: Path, options: FetchOptions) -> Fetched:
    """Another digest than the file has."""
    good(address, destination, options)
    return Fetched(address, {"config.json": hashlib.sha256(b"another").hexdigest()})


def escapes(address: str, destination: Path, options: FetchOptions) -> Fetched:
    """Writes where the address says."""
    if not Path(address).is_dir():
        target = destination / Path(address).name if "%2f" not in address else destination.parent / "escaped"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(b"")
        return Fetched(address)
    return good(address, destination, options)


def empty(address: str, destination: Path, options: FetchOptions) -> Fetched:
    """Makes something of nothing."""
    if not Path(address).is_dir():
        destination.mkdir(parents=True, exist_ok=True)
        (destination / "config.json").write_text("{}")
        return Fetched(address)
    return good(address, destination, options)


@resumes
def doubles(address: str, destination: Path, options: FetchOptions) -> Fetched:
    """Adds to what is there, from the beginning."""
    destination.mkdir(parents=True, exist_ok=True)
    if not Path(address).is_dir():
        raise SourceError(f"there is no directory {address!r}.")
    for path in Path(address).iterdir():
        with (destination / path.name).open("ab") as file:
            file.write(path.read_bytes())
            file.flush()
            time.sleep(0.2)
    return Fetched(address)


@resumes
def trusts(address: str, destination: Path, options: FetchOptions) -> Fetched:
    """Takes a file that is there for whole."""
    destination.mkdir(parents=True, exist_ok=True)
    if not Path(address).is_dir():
        raise SourceError(f"there is no directory {address!r}.")
    for path in Path(address).iterdir():
        if not (destination / path.name).exists():
            with (destination / path.name).open("wb") as file:
                content = path.read_bytes()
                file.write(content[: len(content) // 2])
                file.flush()
                time.sleep(0.2)
                file.write(content[len(content) // 2 :])
    return Fetched(address)
