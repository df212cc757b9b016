"""From a row to a sample: the format is detected by the columns of the first row, and then holds for all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

from zoo.data.rows import Row
from zoo.errors import FileFormatError, InputError
from zoo.text.samples import INPUT_SEPARATOR, Message, Sample

ROLES = ("system", "user", "assistant", "tool")
_SHAREGPT = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "tool": "tool",
    "observation": "tool",
}
"""Who speaks in ShareGPT's files, by our names."""


@dataclass(frozen=True)
class Format:
    """One format: the columns that it needs, those that it may have, and how a row of it becomes a sample."""

    name: str
    needs: tuple[str, ...]
    optional: tuple[str, ...]
    convert: Callable[[Mapping[str, Any]], Sample]

    def __str__(self) -> str:
        return f"{self.name} ({', '.join(self.needs)})"


@dataclass(frozen=True)
class Parsed:
    """Samples of one format, and the columns that nothing was made of."""

    format: Format
    ignored: tuple[str, ...]
    samples: Iterator[Sample]


def parse_rows(rows: Iterable[Row], columns: Mapping[str, str] | None = None) -> Parsed:
    """Samples of rows; their format is that of the first.

    Args:
        rows: of one or several files.
        columns: names of columns in the rows by the name that the format has for them: ``{"prompt": "question"}``.

    Raises:
        InputError: there are no rows, no format has such columns (the message has those that were found), or a column
            that is to be renamed is not there.
        FileFormatError: (as samples are taken) a row is not like the first; the message has its file and line.
    """
    rows = iter(rows)
    first = next(rows, None)
    if first is None:
        raise InputError("the data has no rows.")
    renamed = _renamed(first, columns or {})
    found = detect(renamed.values, first.origin)
    ignored = tuple(name for name in renamed.values if name not in (*found.needs, *found.optional))
    return Parsed(found, ignored, _samples(found, chain([first], rows), columns or {}))


def detect(values: Mapping[str, Any], origin: str) -> Format:
    """The format of a row with these columns.

    Raises:
        InputError: there is none.
    """
    for candidate in FORMATS:
        if all(name in values for name in candidate.needs):
            return candidate
    hint = ""
    if {"chosen", "rejected"} <= values.keys():
        hint = " Preferences (chosen, rejected) are not read: keep the column of the answers to learn as 'completion'."
    raise InputError(
        f"{origin} has the columns {', '.join(map(repr, values)) or '(none)'}, and no format has them.{hint}",
        fix=f"Formats: {'; '.join(map(str, FORMATS))}. Rename columns with --column NAME=YOURS.",
    )


def _renamed(row: Row, columns: Mapping[str, str]) -> Row:
    theirs = set(columns.values())
    if missing := theirs - row.values.keys():
        names = " and no ".join(map(repr, sorted(missing)))
        raise InputError(f"{row.origin} has no column {names}; it has {', '.join(map(repr, row.values))}.")
    kept = {name: value for name, value in row.values.items() if name not in theirs and name not in columns}
    return Row({**kept, **{name: row.values[theirs] for name, theirs in columns.items()}}, row.origin)


def _samples(found: Format, rows: Iterable[Row], columns: Mapping[str, str]) -> Iterator[Sample]:
    for row in rows:
        values = _renamed(row, columns).values
        missing = [name for name in found.needs if values.get(name) is None]
        if missing:
            raise FileFormatError(
                f"{row.origin} has no {' and no '.join(map(repr, missing))}; the format {found} of the first row has."
            )
        try:
            yield replace(found.convert(values), origin=row.origin)
        except InputError as error:
            raise FileFormatError(f"{row.origin}: {error.message}", fix=error.fix) from None


def _openai(values: Mapping[str, Any]) -> Sample:
    listed = _list_of(values["messages"], "messages")
    messages = tuple(_message(message, number) for number, message in enumerate(listed, 1))
    asked = [str(message.get("content")) for message in messages if message["role"] == "user"]
    given = values.get("input")
    is_ours = isinstance(given, str) and asked and asked[-1].endswith(INPUT_SEPARATOR + given)
    return Sample(messages=messages, input=given if is_ours else None)


def _message(message: Any, number: int) -> Message:
    if not isinstance(message, Mapping) or "role" not in message:
        raise InputError(f"message {number} is no object with 'role' and 'content'.")
    if message["role"] not in ROLES:
        raise InputError(f"message {number} has the role {message['role']!r}.", fix=f"Roles: {', '.join(ROLES)}.")
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(_text_part(part, number) for part in content)
    kept = {key: value for key, value in message.items() if value is not None}  # Parquet fills in every key
    if content is None and kept.get("tool_calls"):
        return kept
    if not isinstance(content, str):
        raise InputError(f"the content of message {number} is a {type(content).__name__}, not a string.")
    return {**kept, "content": content}


def _text_part(part: Any, number: int) -> str:
    if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
        raise InputError(f"message {number} has a part that is no text.", fix="zoo trains on text alone.")
    return str(part["text"])


def _sharegpt(values: Mapping[str, Any]) -> Sample:
    turns = _list_of(values["conversations"], "conversations")
    if all(isinstance(turn, str) for turn in turns):  # as in LIMA: who speaks alternates
        roles = ("user", "assistant")
        return Sample(messages=tuple({"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)))
    messages = []
    if isinstance(values.get("system"), str) and values["system"]:
        messages.append({"role": "system", "content": values["system"]})
    for number, turn in enumerate(turns, 1):
        if isinstance(turn, Mapping) and "role" in turn:
            messages.append(dict(_message(turn, number)))
            continue
        if not isinstance(turn, Mapping) or not {"from", "value"} <= turn.keys():
            raise InputError(f"turn {number} of the conversation is no object with 'from' and 'value'.")
        if turn["from"] not in _SHAREGPT:
            raise InputError(f"turn {number} is from {turn['from']!r}.", fix=f"Known: {', '.join(_SHAREGPT)}.")
        said = _string(turn["value"], f"the value of turn {number}")
        messages.append({"role": _SHAREGPT[turn["from"]], "content": said})
    return Sample(messages=tuple(messages))


def _alpaca(values: Mapping[str, Any]) -> Sample:
    instruction, output = (_string(values[name], repr(name)) for name in ("instruction", "output"))
    given = _string(values.get("input") or "", "'input'")
    messages: list[Message] = []
    if system := _string(values.get("system") or "", "'system'"):
        messages.append({"role": "system", "content": system})
    for pair in values.get("history") or ():
        if not isinstance(pair, Sequence) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise InputError("'history' must be a list of pairs: what was asked, what was answered.")
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    asked = instruction + (INPUT_SEPARATOR + given if given else "")
    messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": output}]
    return Sample(messages=tuple(messages), input=given or None)


def _dolly(values: Mapping[str, Any]) -> Sample:
    return _alpaca({"instruction": values["instruction"], "input": values.get("context"), "output": values["response"]})


def _completion(values: Mapping[str, Any]) -> Sample:
    prompt, completion = values["prompt"], values["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):  # TRL's conversational form
        return _openai({"messages": [*prompt, *completion]})
    return Sample(prompt=_string(prompt, "'prompt'"), completion=_string(completion, "'completion'"))


def _text(values: Mapping[str, Any]) -> Sample:
    return Sample(text=_string(values["text"], "'text'"))


def _list_of(value: Any, name: str) -> Sequence[Any]:
    if not isinstance(value, list) or not value:
        raise InputError(f"{name!r} must be a list of messages, not {value!r:.60}.")
    return value


def _string(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise InputError(f"{what} is a {type(value).__name__}, not a string.")
    return value


FORMATS = (
    Format("messages", ("messages",), ("input",), _openai),
    Format("sharegpt", ("conversations",), ("system",), _sharegpt),
    Format("alpaca", ("instruction", "output"), ("input", "system", "history"), _alpaca),
    Format("dolly", ("instruction", "response"), ("context",), _dolly),
    Format("completion", ("prompt", "completion"), (), _completion),
    Format("text", ("text",), (), _text),
)
"""In the order in which they are tried: many files have a column 'text' beside others."""
