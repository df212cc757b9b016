"""What every source has to do: bring the bytes that an address names, all of them, and nothing beside them."""

from __future__ import annotations

import hashlib
import multiprocessing
import time
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from zoo.errors import ZooError
from zoo.sources.base import Fetch, Fetched, FetchOptions, fetch_model
from zoo.sources.provenance import read_provenance
from zoo.testing.contract import Contract, not_run

FILES: Mapping[str, bytes] = {"config.json": b'{"model_type": "none"}', "model.safetensors": bytes(range(256)) * 4096}
"""What is fetched, unless a source has only one file to an address."""
OPTIONS = FetchOptions(progress=False)


class SourceContract(Contract, standard=True):
    """A source by its name. Most checks need `make_address`; a real server on this machine will do."""

    kind = "source"

    def make_address(self, files: Mapping[str, bytes], directory: Path) -> str | None:
        """Make files (name: content) available; returns the address, without its scheme. ``None``: it can not be done.

        A source whose addresses name one file takes the last of them.
        """
        return None

    def address(self, directory: Path) -> str:
        """The address of `FILES`."""
        found = self.make_address(FILES, directory)
        if found is None:
            not_run("nothing to fetch: override make_address")
        return found

    @property
    def fetch(self) -> Fetch:
        """What is registered."""
        found: Fetch = self.load()
        return found

    @property
    def scheme(self) -> str:
        """The first of its schemes."""
        return self.record.matches[0]

    def test_it_has_a_scheme(self) -> None:
        """What comes before the colon; without one it is never asked."""
        assert callable(self.load()), "the target is a function like zoo.sources.base.Fetch"
        assert self.record.matches, "matches= is empty: no address leads to it"
        for scheme in self.record.matches:
            found = self.registry().match("source", scheme)
            assert found is not None and found.target == self.record.target, f"{scheme}: is another source's"

    def test_it_brings_the_bytes(self, tmp_path: Path) -> None:
        """Every file as it is, in a directory that is new or empty; digests that it promises are right."""
        address = self.address(tmp_path / "there")
        for place in ("new", "empty"):
            destination = tmp_path / place
            if place == "empty":
                destination.mkdir()
            fetched = self.fetch(address, destination, OPTIONS)
            found = _files(destination)
            assert found, "it brings nothing"
            assert found.items() <= dict(FILES).items(), f"{sorted(found)} are not the files, or not their bytes"
            assert len(found) in (1, len(FILES))
            self._check_promises(fetched, destination)

    def _check_promises(self, fetched: Fetched | None, destination: Path) -> None:
        for name, promised in (fetched.sha256 if fetched else {}).items():
            digest = hashlib.sha256((destination / name).read_bytes()).hexdigest()
            assert digest == promised, f"the digest of {name} is {digest}, and {promised} is promised"

    def test_it_stays_in_its_directory(self, tmp_path: Path) -> None:
        """Nothing is written beside ``destination``, whatever names the address has in it."""
        address = self.address(tmp_path / "there")
        destination = tmp_path / "place" / "inside" / "destination"
        destination.parent.mkdir(parents=True)
        for tried in (address, f"{address}/../../escaped", f"../{address}", f"{address}%2f..%2f..%2fescaped"):
            before = _files(tmp_path)
            with suppress(ZooError, OSError):
                self.fetch(tried, destination, OPTIONS)
            inside = destination.relative_to(tmp_path).as_posix()
            outside = {name for name in _files(tmp_path) if not name.startswith(inside)}
            assert outside <= before.keys(), f"{tried!r} writes {sorted(outside - before.keys())}"

    def test_what_is_recorded(self, tmp_path: Path) -> None:
        """Fetched as zoo does it, the directory says where it came from, and the digest of every weight file."""
        address = self.address(tmp_path / "there")
        destination = tmp_path / "model"
        fetch_model([f"{self.scheme}:{address}"], destination, OPTIONS, self.registry())
        provenance = read_provenance(destination)
        assert provenance.source is not None and provenance.source.startswith(f"{self.scheme}:")
        for name, digest in provenance.sha256.items():
            assert hashlib.sha256((destination / name).read_bytes()).hexdigest() == digest, name
        assert [path.name for path in tmp_path.iterdir() if "partial" in path.name or "lock" in path.name] == []

    def test_what_is_not_there(self, tmp_path: Path) -> None:
        """An address with nothing behind it is told in a sentence, and leaves nothing that looks like a model."""
        address = self.address(tmp_path / "there")
        with pytest.raises(ZooError) as refused:
            fetch_model([f"{self.scheme}:{address}-that-is-not-there"], tmp_path / "model", OPTIONS, self.registry())
        assert str(refused.value) and not (tmp_path / "model").exists()

    def test_a_malformed_address(self, tmp_path: Path) -> None:
        """Refused as the user's fault, before anything is tried."""
        for address in ("", "@", "#", "a@#b"):
            with pytest.raises(ZooError):
                self.fetch(address, tmp_path / "destination", replace(OPTIONS, offline=True))

    def test_it_goes_on_after_a_kill(self, tmp_path: Path) -> None:
        """Killed while it fetches and run again, the files are right: nothing is taken for whole, or added twice."""
        address, fetch = self.address(tmp_path / "there"), self.fetch
        destination = tmp_path / "destination"
        try:
            context = multiprocessing.get_context("fork")
        except ValueError:
            not_run("processes can not be forked here")
        if not hasattr(fetch, "resumes"):
            not_run("it does not go on: zoo gives it an empty directory")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of forking a process with threads: it does no more
            child = context.Process(target=_fetch_quietly, args=(fetch, address, destination))
            child.start()
        while child.is_alive() and not any(_files(destination).values()):
            time.sleep(0.0005)
        child.kill()
        child.join()
        self.fetch(address, destination, OPTIONS)
        found = {name: content for name, content in _files(destination).items() if not name.startswith(".")}
        assert found.items() <= dict(FILES).items(), f"after an interruption {sorted(found)} are not what was there"


def _fetch_quietly(fetch: Fetch, address: str, destination: Path) -> None:
    fetch(address, destination, OPTIONS)


def _files(directory: Path) -> dict[str, bytes]:
    """Contents by path; what a download keeps its books in, which begins with a dot, is left out."""
    found = [path for path in directory.rglob("*") if path.is_file()]
    names = {path.relative_to(directory): path for path in found}
    return {name.as_posix(): path.read_bytes() for name, path in names.items() if not name.parts[0].startswith(".")}
