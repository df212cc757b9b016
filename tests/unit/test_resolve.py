"""From a MODEL argument to a path."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from zoo.errors import InputError, UnknownNameError, ZooError
from zoo.registry import Component, ModelEntry, Origin, Registry
from zoo.sources.base import FetchOptions
from zoo.sources.provenance import read_provenance
from zoo.sources.resolve import ResolvedModel, resolve_model

SHELF = """
calls = []

def fetch(address, destination, options):
    from zoo.sources.base import Fetched
    calls.append((address, options.revision))
    destination.mkdir(exist_ok=True)
    (destination / "model.safetensors").write_bytes(address.encode())
    return Fetched(address.partition("@")[0] + "@" + "7" * 40)
"""
ZOO = Origin(distribution="zoo")
OTHER = Origin(distribution="litzoo", version="2.0")
Resolve = Callable[..., ResolvedModel]


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    """A few models and a source ``shelf:``; the working directory is empty."""
    (tmp_path / "plugin").mkdir()
    (tmp_path / "plugin/resolve_shelf.py").write_text(SHELF)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.syspath_prepend(tmp_path / "plugin")
    monkeypatch.delitem(sys.modules, "resolve_shelf", raising=False)
    registry = Registry()
    registry.add(
        Component(kind="source", name="shelf", target="resolve_shelf:fetch", help="", matches=("shelf",), origin=OTHER)
    )
    for name, origin, sources in (
        ("gpt2", ZOO, ("shelf:openai/gpt2",)),
        ("gpt2", OTHER, ("shelf:litzoo/gpt2",)),
        ("pythia-70m", ZOO, ("shelf:eleuther/pythia-70m",)),
        ("lit", OTHER, ("shelf:litzoo/lit",)),
        ("own", ZOO, ()),
    ):
        registry.add(ModelEntry(name=name, family="gpt2", sources=sources, origin=origin))
    return registry


@pytest.fixture
def checkpoints(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints"


@pytest.fixture
def resolve(shelf: Registry, checkpoints: Path) -> Resolve:
    def call(argument: str, options: FetchOptions | None = None, **more: Any) -> ResolvedModel:
        return resolve_model(argument, shelf, checkpoints=checkpoints, options=options, **more)

    return call


def fetched() -> list[tuple[str, str | None]]:
    module = sys.modules.get("resolve_shelf")
    return list(module.calls) if module else []


def test_a_source_is_downloaded_once(resolve: Resolve, checkpoints: Path) -> None:
    said: list[str] = []
    found = resolve("shelf:Org/Tiny-GPT", report=said.append)
    assert found == ResolvedModel(checkpoints / "tiny-gpt", None)
    assert (found.path / "model.safetensors").read_bytes() == b"Org/Tiny-GPT"
    assert len(said) == 1
    assert "downloading shelf:Org/Tiny-GPT" in said[0]
    assert str(found.path) in said[0]
    assert resolve("shelf:Org/Tiny-GPT", report=said.append) == found
    assert fetched() == [("Org/Tiny-GPT", None)]
    assert len(said) == 1


def test_a_directory_with_other_weights_is_not_taken_for_it(resolve: Resolve, checkpoints: Path) -> None:
    resolve("shelf:org/tiny")
    with pytest.raises(InputError, match=r"tiny holds shelf:org/tiny@7{40}, not shelf:other/tiny") as caught:
        resolve("shelf:other/tiny")
    assert caught.value.exit_code == 2
    resolve("shelf:someone/gpt2")
    with pytest.raises(InputError, match=r"gpt2 holds shelf:someone/gpt2@7{40}, not shelf:openai/gpt2"):
        resolve("gpt2")
    assert resolve(str(checkpoints / "gpt2")).path == checkpoints / "gpt2"


def test_each_revision_has_its_own_directory(resolve: Resolve, checkpoints: Path) -> None:
    step1 = resolve("shelf:eleuther/pythia-70m@step1")
    step2 = resolve("shelf:eleuther/pythia-70m", FetchOptions(revision="step2"))
    named = resolve("pythia-70m", FetchOptions(revision="step3"))
    assert [found.path.name for found in (step1, step2, named)] == [f"pythia-70m@step{n}" for n in (1, 2, 3)]
    assert (step2.path / "model.safetensors").read_bytes() == b"eleuther/pythia-70m@step2"
    assert fetched()[2] == ("eleuther/pythia-70m", "step3")
    assert resolve("pythia-70m").path == checkpoints / "pythia-70m"
    with pytest.raises(InputError, match="already names a revision"):
        resolve("shelf:eleuther/pythia-70m@step1", FetchOptions(revision="step2"))


def test_an_unknown_scheme(resolve: Resolve, checkpoints: Path) -> None:
    (checkpoints / "model").mkdir(parents=True)
    (checkpoints / "model/model.safetensors").touch()  # it is not taken for what was asked for
    with pytest.raises(InputError, match=r"'ftp:', which no source reads\. Known: shelf:"):
        resolve("ftp:host/model")


def test_a_registry_name_is_downloaded_once(resolve: Resolve, checkpoints: Path) -> None:
    said: list[str] = []
    found = resolve("gpt2", report=said.append)
    assert found == ResolvedModel(checkpoints / "gpt2", "gpt2")
    assert said == [
        f"gpt2 is not in {checkpoints} yet; downloading shelf:openai/gpt2 to {checkpoints / 'gpt2'}.",
    ]
    record = read_provenance(found.path)
    assert (record.model, record.source) == ("gpt2", f"shelf:openai/gpt2@{'7' * 40}")
    assert resolve("gpt2") == found
    assert resolve("shelf:openai/gpt2").path == found.path
    assert len(fetched()) == 1


def test_a_directory_without_a_record_is_taken_as_it_is(resolve: Resolve, checkpoints: Path) -> None:
    (checkpoints / "gpt2").mkdir(parents=True)
    (checkpoints / "gpt2/model.safetensors").touch()
    assert resolve("gpt2").path == checkpoints / "gpt2"
    assert fetched() == []


def test_a_plugins_model_of_the_same_name_has_its_own_directory(resolve: Resolve, checkpoints: Path) -> None:
    Path("litzoo/gpt2").mkdir(parents=True)  # the name wins
    assert resolve("litzoo/gpt2") == ResolvedModel(checkpoints / "litzoo--gpt2", "litzoo/gpt2")
    assert resolve("zoo/gpt2") == ResolvedModel(checkpoints / "gpt2", "gpt2")
    assert resolve("litzoo/lit").path == resolve("lit").path == checkpoints / "lit"
    assert [address for address, _ in fetched()] == ["litzoo/gpt2", "openai/gpt2", "litzoo/lit"]


def test_the_name_wins_over_a_directory_in_the_working_directory(resolve: Resolve, checkpoints: Path) -> None:
    Path("gpt2").mkdir()
    assert resolve("gpt2").path == checkpoints / "gpt2"
    assert resolve("./gpt2") == ResolvedModel(Path("./gpt2"), None)
    assert resolve("gpt2/") == ResolvedModel(Path("gpt2"), None)


def test_paths(resolve: Resolve, tmp_path: Path) -> None:
    Path("mine").mkdir()
    Path("tiny.gguf").touch()
    Path(".hidden").mkdir()
    for argument in ("mine", "./mine", "tiny.gguf", ".hidden", str(tmp_path / "work/mine"), "../work/mine"):
        assert resolve(argument) == ResolvedModel(Path(argument), None)
    assert fetched() == []


@pytest.mark.parametrize("argument", ["./gpt2", "/no/such/gpt2", "gpt2.gguf", "some/where/gpt2", ".gpt2"])
def test_a_path_that_is_not_there(resolve: Resolve, argument: str) -> None:
    with pytest.raises(InputError, match=rf"there is no model directory or file '{argument}'\."):
        resolve(argument)
    assert fetched() == []


def test_a_repository_without_its_scheme(resolve: Resolve) -> None:
    with pytest.raises(InputError, match="If it is on the Hugging Face Hub, write hf:org/name"):
        resolve("org/name")


def test_what_was_downloaded_can_be_named_by_its_directory(resolve: Resolve, checkpoints: Path) -> None:
    resolve("shelf:org/Tiny")
    assert resolve("tiny") == ResolvedModel(checkpoints / "tiny", None)


def test_a_name_that_nobody_knows(resolve: Resolve) -> None:
    with pytest.raises(UnknownNameError) as caught:
        resolve("pythia-70")
    text = str(caught.value)
    assert "no model is named 'pythia-70'. Did you mean 'pythia-70m'?" in text
    assert "zoo list models" in text
    assert "hf:org/name" in text
    with pytest.raises(UnknownNameError):
        resolve("")


def test_without_download_it_only_looks(resolve: Resolve, checkpoints: Path) -> None:
    for argument in ("gpt2", "shelf:org/tiny"):
        with pytest.raises(InputError, match=rf"is not in .*Run: python -m zoo download {argument}\."):
            resolve(argument, download=False)
    assert not checkpoints.exists()
    resolve("gpt2")
    assert resolve("gpt2", download=False).path == checkpoints / "gpt2"


def test_a_revision_of_a_path_is_refused(resolve: Resolve) -> None:
    Path("mine").mkdir()
    for argument in ("mine", "./mine"):
        with pytest.raises(InputError, match="a path has no revision 'main'"):
            resolve(argument, FetchOptions(revision="main"))


def test_a_model_without_sources_that_is_not_there(resolve: Resolve) -> None:
    with pytest.raises(ZooError, match="model 'own' has no source for its weights"):
        resolve("own")


def test_an_empty_directory_is_filled(resolve: Resolve, checkpoints: Path) -> None:
    (checkpoints / "gpt2").mkdir(parents=True)
    assert (resolve("gpt2").path / "model.safetensors").exists()


def test_resolving_imports_nothing_heavy() -> None:
    program = """
import sys
import zoo.sources.resolve
heavy = {"torch", "numpy", "huggingface_hub", "pydantic", "ruamel"} & set(sys.modules)
sys.exit(f"imported {heavy}" if heavy else 0)
"""
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=Path(__file__).parents[2], capture_output=True, check=False
    )
    assert result.returncode == 0, result.stderr.decode()
