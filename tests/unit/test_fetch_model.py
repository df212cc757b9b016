"""`fetch_model` with sources that a plugin might bring, and how sources are written."""

from __future__ import annotations

import hashlib
import sys
import textwrap
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from zoo.errors import InputError, UnavailableError, ZooError
from zoo.registry import Component, ModelEntry, Origin, Registry
from zoo.sources.address import Source, is_source
from zoo.sources.base import FetchOptions, fetch_model
from zoo.sources.provenance import Provenance, read_provenance, write_provenance

OPTIONS = FetchOptions()
ORIGIN = Origin(distribution="zoo-shelf", version="1.0")
SHELF = """
import os, time
from pathlib import Path
from zoo.sources.base import Fetched, SourceError, resumes

calls = []
inodes = []

def fetch(address, destination, options):
    calls.append((address, sorted(p.name for p in destination.iterdir()) if destination.exists() else []))
    destination.mkdir(exist_ok=True)
    (destination / "config.json").write_text("{}")
    address = address.partition("#")[0]
    if address == "missing":
        raise SourceError("the shelf has no 'missing'.", fix="Look at another shelf.")
    if address == "unreachable":
        raise ConnectionResetError("the shelf fell down")
    if address == "interrupted":
        raise KeyboardInterrupt
    if address == "empty":
        (destination / "config.json").unlink()
        return None
    if address == "full":
        with open("/dev/full", "wb") as file:
            file.write(bytes(1 << 16))
    if address == "slow":
            time.sleep(0.2)
    (destination / "model.safetensors").write_bytes(b"weights")
    inodes.append((destination / "model.safetensors").stat().st_ino)
    return Fetched(address + "@7", {"model.safetensors": "0" * 64} if address == "forged" else {})

@resumes
def goes_on(address, destination, options):
    return fetch(address, destination, options)
"""


@pytest.fixture
def shelf(tmp_path: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch) -> Registry:
    """The built-ins and the sources ``shelf:``, ``goes-on:`` and ``needs:``, from a module of a plugin."""
    (tmp_path / "plugin").mkdir()
    (tmp_path / "plugin/shelf_source.py").write_text(textwrap.dedent(SHELF))
    monkeypatch.syspath_prepend(tmp_path / "plugin")
    monkeypatch.delitem(sys.modules, "shelf_source", raising=False)
    extended = Registry()
    for _, component in registry.components("source"):
        extended.add(component)
    for name, function, requires in (
        ("shelf", "fetch", ()),
        ("goes-on", "goes_on", ()),
        ("needs", "fetch", ("no-such-distribution>=1",)),
    ):
        target = f"shelf_source:{function}"
        component = Component(kind="source", name=name, target=target, help="", matches=(name,), origin=ORIGIN)
        extended.add(replace(component, requires=requires, fix="pip install no-such-distribution"))
    return extended


def calls() -> list[tuple[str, list[str]]]:
    import shelf_source  # type: ignore[import-not-found]  # the fixture wrote it

    found: list[tuple[str, list[str]]] = shelf_source.calls
    return found


@pytest.fixture
def models(tmp_path: Path) -> Path:
    return tmp_path / "models"


def test_a_model_is_fetched_and_recorded(shelf: Registry, models: Path) -> None:
    entry = ModelEntry(name="tiny", family="gpt2", sources=("shelf:tiny",), origin=ORIGIN)
    assert fetch_model(entry, models / "tiny", OPTIONS, shelf) == "shelf:tiny"
    assert [path.name for path in models.iterdir()] == ["tiny"]
    text = (models / "tiny/zoo.yaml").read_text()
    digest = hashlib.sha256(b"weights").hexdigest()
    lines = ["schema: 1", "model: tiny", "source: shelf:tiny@7", "sha256:", f"  model.safetensors: {digest}"]
    assert text.splitlines() == lines
    assert read_provenance(models / "tiny") == Provenance("shelf:tiny@7", "tiny", {"model.safetensors": digest})


def test_it_appears_at_once_by_a_rename(shelf: Registry, models: Path) -> None:
    fetch_model(["shelf:tiny"], models / "tiny", OPTIONS, shelf)
    written = sys.modules["shelf_source"].inodes
    assert written == [(models / "tiny/model.safetensors").stat().st_ino], "a copy can be cut short"


@pytest.mark.parametrize("address", ["missing", "unreachable", "empty"])
def test_a_source_that_fails_makes_room_for_the_next(shelf: Registry, models: Path, address: str) -> None:
    said: list[str] = []
    sources = [f"shelf:{address}#sha256=00", "shelf:tiny"]
    assert fetch_model(sources, models / "tiny", OPTIONS, shelf, said.append) == "shelf:tiny"
    assert len(said) == 1
    assert said[0].startswith(f"shelf:{address}: ")
    assert said[0].endswith(" Trying shelf:tiny.")
    assert calls()[1] == ("tiny", []), "it found what the failed one left"


def test_all_that_failed_are_listed(shelf: Registry, models: Path) -> None:
    with pytest.raises(ZooError) as caught:
        fetch_model(["shelf:missing", "needs:x", "shelf:unreachable"], models / "tiny", OPTIONS, shelf)
    lines = str(caught.value).splitlines()
    assert caught.value.exit_code == 1
    assert lines[0] == "none of the 3 sources of the model worked:"
    assert lines[1] == "  shelf:missing: the shelf has no 'missing'. Look at another shelf."
    assert "no-such-distribution>=1 (not installed)" in lines[2]
    assert lines[2].endswith("pip install no-such-distribution")
    assert "the shelf fell down" in lines[3]
    assert list(models.iterdir()) == []


def test_the_only_source_keeps_its_exit_code(shelf: Registry, models: Path) -> None:
    with pytest.raises(UnavailableError, match="no-such-distribution") as caught:
        fetch_model(["needs:x"], models / "tiny", OPTIONS, shelf)
    assert caught.value.exit_code == 3


def test_an_unknown_scheme_names_the_known(shelf: Registry, models: Path) -> None:
    with pytest.raises(
        InputError, match=r"'ftp:', which no source reads\. Known: goes-on:, hf:, http:, https:, needs:, pypi:, shelf:"
    ):
        fetch_model(["ftp:host/x", "shelf:tiny"], models / "tiny", OPTIONS, shelf)


def test_a_model_without_sources(shelf: Registry, models: Path) -> None:
    with pytest.raises(InputError, match="model 'own' has no source"):
        fetch_model(ModelEntry(name="own", family="gpt2", origin=ORIGIN), models / "own", OPTIONS, shelf)


def test_ctrl_c_propagates_and_leaves_nothing(shelf: Registry, models: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        fetch_model(["shelf:interrupted", "shelf:tiny"], models / "tiny", OPTIONS, shelf)
    assert list(models.iterdir()) == []


@pytest.mark.parametrize(("scheme", "found"), [("shelf", []), ("goes-on", [".source", "config.json"])])
def test_only_a_fetch_that_resumes_finds_what_is_left(
    shelf: Registry, models: Path, scheme: str, found: list[str]
) -> None:
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            fetch_model([f"{scheme}:interrupted"], models / "tiny", OPTIONS, shelf)
    assert calls()[1] == ("interrupted", found)
    fetch_model([f"{scheme}:tiny"], models / "tiny", OPTIONS, shelf)
    assert "config.json" not in calls()[2][1], "it found what another source left"
    assert sorted(path.name for path in (models / "tiny").iterdir()) == ["config.json", "model.safetensors", "zoo.yaml"]


def test_a_partial_directory_of_a_killed_process_is_removed(shelf: Registry, models: Path) -> None:
    (models / ".tiny.partial").mkdir(parents=True)
    (models / ".tiny.partial/stale.safetensors").touch()
    fetch_model(["shelf:tiny"], models / "tiny", OPTIONS, shelf)
    assert [path.name for path in models.iterdir()] == ["tiny"]
    assert not (models / "tiny/stale.safetensors").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full to write to")
def test_a_full_disk_stops_it_and_says_what_is_free(shelf: Registry, models: Path) -> None:
    with pytest.raises(ZooError, match=r"filled up while fetching shelf:full; it has [\d.]+ [kMGT]?B.* free"):
        fetch_model(["shelf:full", "shelf:tiny"], models / "tiny", OPTIONS, shelf)
    assert list(models.iterdir()) == []


def test_weights_that_are_not_the_promised_ones(shelf: Registry, models: Path) -> None:
    with pytest.raises(ZooError, match=f"{'0' * 64} was promised"):
        fetch_model(["goes-on:forged"], models / "tiny", OPTIONS, shelf)
    assert list(models.iterdir()) == []


def test_what_is_there_is_not_replaced(shelf: Registry, models: Path) -> None:
    (models / "own").mkdir(parents=True)
    fetch_model(["shelf:tiny"], models / "own", OPTIONS, shelf)
    assert fetch_model(["shelf:other", "shelf:tiny"], models / "own", OPTIONS, shelf) == "shelf:tiny"
    assert len(calls()) == 1
    with pytest.raises(InputError, match="is there already"):
        fetch_model(["shelf:other"], models / "own", OPTIONS, shelf)
    (models / "file").touch()
    with pytest.raises(InputError, match="is there already"):
        fetch_model(["shelf:tiny"], models / "file", OPTIONS, shelf)


def test_those_who_want_the_same_wait_for_one_download(shelf: Registry, models: Path) -> None:
    said: list[str] = []
    results: list[str] = []

    def run() -> None:
        results.append(fetch_model(["shelf:slow"], models / "tiny", OPTIONS, shelf, said.append))

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == ["shelf:slow"] * 3
    assert len(calls()) == 1
    assert any("waiting for it" in line for line in said)
    assert [path.name for path in models.iterdir()] == ["tiny"]


def test_a_place_that_can_not_be_written_to(shelf: Registry, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ZooError, match="can not write to"):
        fetch_model(["shelf:tiny"], tmp_path / "file/tiny", OPTIONS, shelf)


def test_a_record_keeps_what_others_wrote(tmp_path: Path) -> None:
    (tmp_path / "zoo.yaml").write_text("spec: {n_layers: 2}\nsource: hf:old/name\n")
    write_provenance(tmp_path, Provenance("hf:org/tiny@7", None, {"b.safetensors": "1", "a.gguf": "0"}))
    content = YAML(typ="safe").load(tmp_path / "zoo.yaml")
    assert content["spec"] == {"n_layers": 2}
    assert (content["source"], content["model"], list(content["sha256"])) == (
        "hf:org/tiny@7",
        None,
        ["a.gguf", "b.safetensors"],
    )


@pytest.mark.parametrize(
    ("text", "directory"),
    [
        ("hf:HuggingFaceTB/SmolLM2-135M", "smollm2-135m"),
        ("hf:gpt2", "gpt2"),
        ("hf:org/Pythia@step1000", "pythia@step1000"),
        ("hf:org/Pythia@refs/pr/1", "pythia@refs-pr-1"),
        ("pypi:tiny==1.0/data/Tiny.Q8_0.gguf#sha256=00", "tiny.q8_0"),
    ],
)
def test_a_source_names_its_directory(text: str, directory: str) -> None:
    assert str(Source.parse(text)) == text
    assert Source.parse(text).directory_name == directory


@pytest.mark.parametrize("text", ["hf:org/..", "hf:org/.hidden", "hf:org/a b"])
def test_a_source_that_can_not_name_a_directory(text: str) -> None:
    with pytest.raises(InputError, match="does not end in a name for a directory"):
        _ = Source.parse(text).directory_name


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("hf:org/Tiny", "hf:org/tiny@" + "a" * 40, True),
        ("hf:org/tiny@main", "hf:org/tiny@" + "a" * 40, True),
        ("hf:org/tiny@" + "b" * 40, "hf:org/tiny@" + "a" * 40, False),
        ("hf:org/tiny", "hf:other/tiny", False),
        ("hf:org/tiny", "shelf:org/tiny", False),
        ("pypi:a==1/x.gguf", "pypi:a==1/x.gguf#sha256=00", True),
        ("pypi:a==1/x.gguf#sha256=11", "pypi:a==1/x.gguf#sha256=00", False),
        ("pypi:a==2/x.gguf", "pypi:a==1/x.gguf", False),
    ],
)
def test_whether_two_sources_can_be_the_same(one: str, other: str, same: bool) -> None:
    assert Source.parse(one).may_be(Source.parse(other)) is same
    assert Source.parse(other).may_be(Source.parse(one)) is same


@pytest.mark.parametrize(
    ("text", "expected"), [("hf:x", True), ("C:\\models", False), ("./a:b", False), ("gpt2", False)]
)
def test_what_is_a_source(text: str, expected: bool) -> None:
    assert is_source(text) is expected


@pytest.mark.parametrize("text", ["hf:", "hf:x@", "hf:x#", "gpt2"])
def test_a_malformed_source(text: str) -> None:
    with pytest.raises(InputError):
        Source.parse(text)
