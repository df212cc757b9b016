"""Rows of files and the samples that they become: what is read, and what the errors say."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from zoo.data.formats import FORMATS, parse_rows
from zoo.data.rows import Row, read_rows
from zoo.errors import FileFormatError, InputError, UnavailableError
from zoo.text.samples import Sample

ROW = {"prompt": "Hi \u4f60\u597d", "completion": 'Hello,\n"you"'}


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def values(path: Path) -> list[Any]:
    return [dict(row.values) for row in read_rows(path)]


def origins(path: Path) -> list[str]:
    return [row.origin.removeprefix(f"{path.parent}/") for row in read_rows(path)]


CSV = 'prompt,completion\n"Hi \u4f60\u597d","Hello,\n""you"""\n\n"Hi \u4f60\u597d","Hello,\n""you"""\n'
TWICE: dict[str, tuple[str, list[str]]] = {
    "a.json": (json.dumps([ROW, ROW], indent=1), ["a.json:2", "a.json:6"]),
    "one-line.json": (json.dumps([ROW, ROW], ensure_ascii=False), ["one-line.json:1", "one-line.json:1"]),
    "lines.json": (f"{json.dumps(ROW)}\n\n{json.dumps(ROW)}\n", ["lines.json:1", "lines.json:3"]),
    "a.jsonl": (f"{json.dumps(ROW)}\n\n{json.dumps(ROW)}", ["a.jsonl:1", "a.jsonl:3"]),
    "mark.jsonl": (f"\ufeff{json.dumps(ROW)}\r\n{json.dumps(ROW)}\r\n", ["mark.jsonl:1", "mark.jsonl:2"]),
    "a.csv": (CSV, ["a.csv:2", "a.csv:5"]),
    "a.tsv": (CSV.replace(",", "\t").replace("Hello\t", "Hello,"), ["a.tsv:2", "a.tsv:5"]),
}


@pytest.mark.parametrize("name", TWICE)
def test_rows_and_their_lines(name: str, tmp_path: Path) -> None:
    """Guards what each kind of file gives, and the line that an error about a row would name."""
    content, lines = TWICE[name]
    path = write(tmp_path / name, content)
    assert values(path) == [ROW, ROW]
    assert origins(path) == lines


def test_text_and_parquet(tmp_path: Path) -> None:
    """Guards the two kinds that are read otherwise; the text keeps its ends of lines."""
    import pyarrow  # type: ignore[import-untyped]
    from pyarrow import parquet

    assert values(write(tmp_path / "a.txt", "one\r\ntwo\n")) == [{"text": "one\r\ntwo\n"}]
    table = pyarrow.table({"messages": [[{"role": "user", "content": "Hi"}], [{"role": "assistant", "content": "Ho"}]]})
    parquet.write_table(table, tmp_path / "a.parquet")
    assert values(tmp_path / "a.parquet")[1] == {"messages": [{"role": "assistant", "content": "Ho"}]}
    assert origins(tmp_path / "a.parquet") == ["a.parquet:1", "a.parquet:2"]


def test_parquet_without_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the error that names the extra."""
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UnavailableError, match=r"pip install 'gpt-zoo\[datasets\]'"):
        values(write(tmp_path / "a.parquet", b"PAR1"))


DAMAGED: dict[str, tuple[str | bytes, str]] = {
    "empty.jsonl": ("", "empty.jsonl is empty"),
    "blank.json": (" \n ", "blank.json is empty"),
    "header.csv": ("prompt,completion\n", "header.csv is empty"),
    "white.txt": ("\n \n", "white.txt is empty"),
    "cut.jsonl": ('{"a": 1}\n{"a": \n', "cut.jsonl:2 is not valid JSON: expecting value"),
    "list.jsonl": ("[1]\n", "list.jsonl:1 holds a list, not an object"),
    "cut.json": ('[\n{"a": 1},\n{"a": 2}\n', "cut.json:4 is not valid JSON: a comma or the end"),
    "comma.json": ('[\n{"a": 1}\n{"a": 2}]', "comma.json:3 is not valid JSON: a comma"),
    "inside.json": ('[\n{"a": 1},\n{"a" 2}]', "inside.json:3 is not valid JSON: expecting ':'"),
    "numbers.json": ("[\n1]", "numbers.json:2 holds a int"),
    "fields.csv": ("a,b\n1,2\n1,2,3\n", "fields.csv:3 has 3 fields, and the first line names 2 columns"),
    "quote.csv": ('a,b\n1,"2\n', "quote.csv:2 is not valid CSV"),
    "twice.csv": ("a,a\n1,2\n", "twice.csv:1: two columns have the same name"),
    "latin.jsonl": (b'{"a": 1}\n' * 5000 + b'{"a": "\xe9"}\n', "latin.jsonl:5001 is not UTF-8: byte 0xe9"),
    "no.parquet": (b"PAR1 and no more", "no.parquet is no valid Parquet file"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_files(name: str, tmp_path: Path) -> None:
    """Guards the file and the line in every message about a damaged file."""
    content, message = DAMAGED[name]
    with pytest.raises(FileFormatError) as caught:
        values(write(tmp_path / name, content))
    assert message in caught.value.message


def test_files_that_are_not_read(tmp_path: Path) -> None:
    """Guards the other two refusals: not there, of no kind that is read."""
    with pytest.raises(InputError, match="No such file"):
        values(tmp_path / "nowhere.jsonl")
    with pytest.raises(InputError, match=r"of no kind that zoo reads.*\.jsonl"):
        values(write(tmp_path / "a.xlsx", "x"))


def rows(*given: dict[str, Any]) -> Iterator[Row]:
    return (Row(values, f"f:{number}") for number, values in enumerate(given, 1))


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


SYSTEM = {"role": "system", "content": "S"}
EXAMPLES: list[tuple[str, dict[str, Any], Sample]] = [
    ("text", {"text": "T", "id": 1}, Sample(text="T")),
    ("completion", {"prompt": "P ", "completion": " C", "text": "x"}, Sample(prompt="P ", completion=" C")),
    (
        "completion",
        {"prompt": [user("P")], "completion": [assistant("C")]},
        Sample(messages=(user("P"), assistant("C"))),
    ),
    ("alpaca", {"instruction": "I", "input": "", "output": "O"}, Sample(messages=(user("I"), assistant("O")))),
    ("alpaca", {"instruction": "I", "output": "O", "text": "x"}, Sample(messages=(user("I"), assistant("O")))),
    (
        "alpaca",
        {"instruction": "I", "input": "N", "output": "O", "system": "S", "history": [["a", "b"]]},
        Sample(messages=(SYSTEM, user("a"), assistant("b"), user("I\n\nN"), assistant("O")), input="N"),
    ),
    (
        "dolly",
        {"instruction": "I", "context": "N", "response": "O", "category": "qa"},
        Sample(messages=(user("I\n\nN"), assistant("O")), input="N"),
    ),
    (
        "sharegpt",
        {"conversations": [{"from": "human", "value": "h"}, {"from": "gpt", "value": "g"}], "system": "S"},
        Sample(messages=(SYSTEM, user("h"), assistant("g"))),
    ),
    ("sharegpt", {"conversations": ["h", "g", "h"]}, Sample(messages=(user("h"), assistant("g"), user("h")))),
    ("sharegpt", {"conversations": [user("h"), assistant("g")]}, Sample(messages=(user("h"), assistant("g")))),
    (
        "messages",
        {"messages": [SYSTEM, user("h"), assistant("g")], "prompt": "h"},
        Sample(messages=(SYSTEM, user("h"), assistant("g"))),
    ),
    (
        "messages",
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "h"}], "name": None}, assistant("g")]},
        Sample(messages=(user("h"), assistant("g"))),
    ),
]


@pytest.mark.parametrize(("name", "row", "expected"), EXAMPLES)
def test_formats(name: str, row: dict[str, Any], expected: Sample) -> None:
    """Guards detection and conversion of each format; a column 'text' beside others is not the format text."""
    parsed = parse_rows(rows(row, row))
    first, second = parsed.samples
    assert parsed.format.name == name
    assert (first.messages, first.prompt, first.completion, first.text, first.input) == (
        expected.messages,
        expected.prompt,
        expected.completion,
        expected.text,
        expected.input,
    )
    assert (first.origin, second.origin) == ("f:1", "f:2")
    # What is written is read back as the same sample, the input of an Alpaca row included.
    (again,) = parse_rows(rows(first.to_dict())).samples
    assert again == first


def test_every_format_has_an_example() -> None:
    assert {name for name, _, _ in EXAMPLES} == {known.name for known in FORMATS}


def test_columns_that_are_not_used() -> None:
    """Guards the list of them: data that is left out is said."""
    assert parse_rows(rows({"instruction": "I", "input": "", "output": "O", "id": 1, "text": "t"})).ignored == (
        "id",
        "text",
    )


def test_columns_of_other_names() -> None:
    """Guards --column, also where the new name exists already with another meaning (LongForm's input)."""
    parsed = parse_rows(
        rows({"input": "P", "output": "C", "prompt": "no"}), {"prompt": "input", "completion": "output"}
    )
    (sample,) = parsed.samples
    assert (parsed.format.name, sample.prompt, sample.completion) == ("completion", "P", "C")
    with pytest.raises(InputError, match="f:1 has no column 'question'; it has 'input'"):
        parse_rows(rows({"input": "P"}), {"prompt": "question"})


def test_unknown_columns() -> None:
    """Guards the message: what was found, which formats there are, how to rename."""
    with pytest.raises(InputError) as caught:
        parse_rows(rows({"question": "q", "answer": "a"}))
    assert "'question', 'answer'" in caught.value.message
    assert caught.value.fix is not None
    for known in FORMATS:
        assert str(known) in caught.value.fix
    assert "--column" in caught.value.fix
    with pytest.raises(InputError, match="Preferences"):
        parse_rows(rows({"prompt": "q", "chosen": "a", "rejected": "b"}))
    with pytest.raises(InputError, match="no rows"):
        parse_rows(rows())


WRONG: list[tuple[list[dict[str, Any]], str]] = [
    ([{"prompt": "p", "completion": "c"}, {"prompt": "p"}], "f:2 has no 'completion'"),
    ([{"prompt": "p", "completion": "c"}, {"prompt": "p", "completion": None}], "f:2 has no 'completion'"),
    ([{"text": "t"}, {"text": 1}], "f:2: 'text' is a int, not a string"),
    ([{"instruction": "i", "output": "o", "history": ["x"]}], "f:1: 'history' must be a list of pairs"),
    ([{"conversations": []}], "f:1: 'conversations' must be a list of messages"),
    ([{"conversations": [{"from": "narrator", "value": "x"}]}], "f:1: turn 1 is from 'narrator'"),
    ([{"conversations": [{"from": "gpt"}]}], "f:1: turn 1 of the conversation is no object"),
    ([{"messages": "hi"}], "f:1: 'messages' must be a list"),
    ([{"messages": [{"content": "x"}]}], "f:1: message 1 is no object with 'role'"),
    ([{"messages": [{"role": "critic", "content": "x"}]}], "f:1: message 1 has the role 'critic'"),
    ([{"messages": [{"role": "user", "content": 3}]}], "f:1: the content of message 1 is a int"),
    ([{"messages": [{"role": "user", "content": [{"type": "image"}]}]}], "f:1: message 1 has a part that is no text"),
]


@pytest.mark.parametrize(("given", "message"), WRONG)
def test_rows_that_are_not_like_the_first(given: list[dict[str, Any]], message: str) -> None:
    """Guards the line in messages about rows that are valid JSON and no valid sample."""
    with pytest.raises(FileFormatError) as caught:
        list(parse_rows(rows(*given)).samples)
    assert message in caught.value.message
