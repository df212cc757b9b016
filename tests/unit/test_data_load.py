"""What a DATA argument means, and on which side of the split a sample is."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.plugin_lab import lab_on_path
from tests.web_server import Web, serve_files
from zoo.data import named
from zoo.data.load import DataSource, load_samples, resolve_data
from zoo.data.named import NamedDataset
from zoo.data.rows import Row
from zoo.errors import InputError, UnknownNameError, ZooError
from zoo.plugins import PluginSelection, load_zoo
from zoo.registry import Registry
from zoo.sources.base import FetchOptions
from zoo.text.samples import Sample

ALPACA = [{"instruction": f"i{n}", "input": "", "output": f"o{n}"} for n in range(40)]
OFFLINE = FetchOptions(offline=True)


def source_of(rows: list[dict[str, Any]], **more: Any) -> DataSource:
    return DataSource("test", lambda: (Row(values, f"f:{n}") for n, values in enumerate(rows, 1)), **more)


def prompts(samples: list[Sample]) -> list[str | None]:
    return [sample.prompt for sample in samples]


def pairs(*numbers: int) -> list[dict[str, Any]]:
    return [{"prompt": f"p{n}", "completion": "c"} for n in numbers]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=40), st.floats(0, 0.9), st.integers(0, 3), st.randoms())
def test_the_side_of_a_sample_is_its_own(numbers: list[int], fraction: float, seed: int, rng: Any) -> None:
    """Guards the split by hash: the order of rows does not matter, and copies never are on both sides."""
    loaded = load_samples(source_of(pairs(*numbers)), val_fraction=fraction, seed=seed)
    assert sorted([*prompts(loaded.train), *prompts(loaded.validation)], key=str) == sorted(f"p{n}" for n in numbers)
    assert not {*prompts(loaded.train)} & {*prompts(loaded.validation)}
    assert loaded.train, "something is left to train on"
    assert bool(loaded.validation) == (fraction > 0 and len(set(numbers)) > 1)
    assert loaded.n_duplicates == len(numbers) - len(set(numbers))
    shuffled = rng.sample(numbers, len(numbers))
    again = load_samples(source_of(pairs(*shuffled)), val_fraction=fraction, seed=seed)
    assert {*prompts(again.validation)} == {*prompts(loaded.validation)}


def test_new_rows_move_no_old_ones() -> None:
    """Guards a validation set that stays one when data is added."""
    few = load_samples(source_of(pairs(*range(1000))), val_fraction=0.1)
    more = load_samples(source_of(pairs(*range(2000))), val_fraction=0.1)
    assert {*prompts(few.validation)} <= {*prompts(more.validation)}
    assert 70 < len(few.validation) < 130
    other = load_samples(source_of(pairs(*range(1000))), val_fraction=0.1, seed=1)
    assert {*prompts(other.validation)} != {*prompts(few.validation)}


def test_conversations_without_a_reply() -> None:
    """Guards that they are left out and counted; if all are, that is an error."""
    silent = {"messages": [{"role": "user", "content": "Hi"}]}
    talk = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}
    loaded = load_samples(source_of([silent, talk]), val_fraction=0)
    assert (len(loaded.train), loaded.n_without_reply) == (1, 1)
    with pytest.raises(InputError, match="none of the 1 samples of 'test' has anything to learn"):
        load_samples(source_of([silent]))
    with pytest.raises(InputError, match="at least 0 and below 1, not 1"):
        load_samples(source_of([talk]), val_fraction=1)


def test_a_validation_set_of_its_own() -> None:
    """Guards against splitting what is split already."""
    loaded = load_samples(source_of(pairs(*range(50))).with_validation(source_of(pairs(99))), val_fraction=0.5)
    assert (len(loaded.train), prompts(loaded.validation), loaded.split) == (50, ["p99"], "its own")


@pytest.fixture
def web() -> Iterator[Web]:
    web, server = serve_files()
    yield web
    server.shutdown()
    server.server_close()


def test_a_named_data_set(web: Web, registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards ``zoo prepare alpaca``: downloaded once, with the columns and the validation set that it declares."""
    rows = [{"question": row["instruction"], "answer": row["output"]} for row in ALPACA]
    web.files["/train.json"] = json.dumps(rows[:39]).encode()
    web.files["/valid.json"] = json.dumps(rows[39:]).encode()
    declared = NamedDataset(
        source=f"{web.url}/train.json",
        validation=f"{web.url}/valid.json",
        columns={"prompt": "question", "completion": "answer"},
        license="MIT",
    )
    monkeypatch.setattr(named, "ALPACA", declared)
    said: list[str] = []
    source = resolve_data("alpaca", registry, directory=tmp_path, report=said.append)
    loaded = load_samples(source)
    assert (source.name, source.license, len(loaded.train), len(loaded.validation)) == ("alpaca", "MIT", 39, 1)
    assert loaded.train[0].origin.endswith("downloads/alpaca/train.json:1")
    assert len(said) == len(web.asked) == 2
    resolve_data("alpaca", registry, directory=tmp_path, options=OFFLINE)
    assert len(web.asked) == 2
    monkeypatch.setattr(named, "ALPACA", NamedDataset(source=f"{web.url}/other.json"))
    with pytest.raises(InputError, match="is there already"):
        resolve_data("alpaca", registry, directory=tmp_path)


def test_a_file_that_was_put_there(registry: Registry, tmp_path: Path) -> None:
    """Guards a machine without a network: who copies the file into the directory needs none."""
    place = tmp_path / "downloads" / "alpaca"
    place.mkdir(parents=True)
    (place / "mine.json").write_text(json.dumps(ALPACA))
    source = resolve_data("alpaca", registry, directory=tmp_path, options=OFFLINE)
    assert load_samples(source).format == "alpaca"


def test_offline(registry: Registry, tmp_path: Path) -> None:
    with pytest.raises(ZooError, match="--offline forbids to use the network"):
        resolve_data("alpaca", registry, directory=tmp_path, options=OFFLINE)


def test_built_in_data_sets(registry: Registry) -> None:
    """Guards against an entry that can not be read: a source of unknown scheme, a file without a digest."""
    entries = {ref: registry.load("dataset", ref) for ref, _ in registry.components("dataset")}
    assert {"alpaca", "alpaca-2k", "dolly", "lima", "tinystories", "tinyshakespeare"} <= entries.keys()
    for ref, entry in entries.items():
        scheme = entry.source.partition(":")[0]
        component = registry.find("dataset", ref)
        assert entry.license, ref
        assert scheme in ("hf", "https"), ref
        assert ("datasets>=4" in component.requires) == (scheme == "hf"), ref
        assert "githubusercontent" not in entry.source or "#" in entry.source, ref


def test_a_plugins_data_set(web: Web, tmp_path: Path) -> None:
    """Guards the hook: a distribution of its own names a data set, and it is read by that name."""
    web.files["/x.jsonl"] = b'{"text": "hello"}\n'
    (tmp_path / "site").mkdir()
    with lab_on_path(tmp_path / "site") as lab:
        lab.install(
            "jokes",
            """
            @hookimpl
            def zoo_register_datasets(register):
                register("jokes", "jokes.entry:JOKES", help="jokes")
            @hookimpl
            def zoo_register_prompts(register):
                register("shout", "jokes.entry:SHOUT", help="in capitals")
            """,
            files={
                "jokes/entry.py": "from zoo.data.named import NamedDataset\nfrom zoo.text.prompts import PromptStyle\n"
                f"JOKES = NamedDataset(source='{web.url}/x.jsonl', license='MIT')\n"
                "SHOUT = PromptStyle('shout', '{% for m in messages %}{{ m.content | upper }}{% endfor %}')\n"
            },
        )
        registry = load_zoo(PluginSelection(only=frozenset({"jokes"}))).registry
        loaded = load_samples(resolve_data("jokes", registry, directory=tmp_path / "data"))
        assert [sample.text for sample in loaded.train] == ["hello"]
        assert registry.load("prompt", "shout").name == "shout"


def test_paths(registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards what a directory means: train and val beside each other, or all its files."""
    monkeypatch.chdir(tmp_path)
    both, many = tmp_path / "both", tmp_path / "many"
    for path, content in {
        both / "train.jsonl": '{"text": "a"}',
        both / "val.jsonl": '{"text": "b"}',
        both / "notes.txt": "mine",
        many / "1.txt": "one",
        many / "deep" / "2.txt": "two",
        many / ".hidden.txt": "no",
    }.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    source = resolve_data("both", registry)
    assert [path.name for path in (*source.files, *source.validation_files)] == ["train.jsonl", "val.jsonl"]
    assert not source.is_corpus
    source = resolve_data("./many", registry)
    assert [path.name for path in source.files] == ["1.txt", "2.txt"] and source.is_corpus
    assert source.name == "many"
    (many / "3.csv").write_text("a\n1\n")
    with pytest.raises(InputError, match=r"files of several kinds: \.csv, \.txt"):
        resolve_data("many", registry)
    (tmp_path / "void").mkdir()
    with pytest.raises(InputError, match="holds no data"):
        resolve_data("void", registry)
    (tmp_path / "done").mkdir()
    (tmp_path / "done" / "train.bin").write_bytes(b"\0\0")
    with pytest.raises(InputError, match="holds token files already"):
        resolve_data("done", registry)
    with pytest.raises(InputError, match=r"there is no file or directory 'nowhere\.jsonl'"):
        resolve_data("nowhere.jsonl", registry)
    with pytest.raises(UnknownNameError, match="Did you mean 'alpaca'"):
        resolve_data("alpacca", registry)
