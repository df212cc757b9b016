"""Files of prompts: JSON lines in, JSON lines out, in the same order; a line that fails does not end the job."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from zoo.errors import InputError, ZooError
from zoo.generate.batch import Outcome
from zoo.generate.reply import Reply, Request
from zoo.text.chat import Message

RESULT_KEYS = ("text", "finish_reason", "prompt_tokens", "new_tokens")
FAILURE_KEYS = ("error", "line")
_NUMBER, _INTEGER = ((int, float), "a number"), ((int,), "an integer")
OPTIONS: dict[str, tuple[tuple[type, ...], str]] = {
    "max_new_tokens": _INTEGER,
    "seed": _INTEGER,
    "temperature": _NUMBER,
    "top_k": _INTEGER,
    "top_p": _NUMBER,
    "min_p": _NUMBER,
    "repetition_penalty": _NUMBER,
}
"""Keys of a line that override the options of the job, besides ``stop`` and ``adapter``."""

Prompt = str | list[Message]
MakeRequest = Callable[[Prompt, dict[str, Any], int], Request]
"""From a line's prompt, its options and its number (from 1) to a request that was checked."""
Run = Callable[[Sequence[Request]], Iterator[Outcome]]


@dataclass
class Summary:
    """What a job did."""

    lines: int = 0
    failed: int = 0
    first_error: str = ""
    prompt_tokens: int = 0
    new_tokens: int = 0
    seconds: float = 0.0
    peak_memory: int = 0


class Job:
    """Answers the lines of a file, a window at a time, so that a file may be larger than memory.

    Args:
        write: takes one line of the output.
        window: lines that are read before the first of them is answered; sorted by length they make good batches.
    """

    def __init__(self, make_request: MakeRequest, run: Run, write: Callable[[str], None], *, window: int) -> None:
        self._make_request = make_request
        self._run = run
        self._write = write
        self._window = window
        self.summary = Summary()

    def work(self, source: Iterable[bytes]) -> Summary:
        """Answer all lines; blank ones are skipped."""
        started = time.perf_counter()
        numbered = ((number, raw) for number, raw in enumerate(source, 1) if raw.strip())
        while lines := list(islice(numbered, self._window)):
            self._answer(lines)
            self.summary.seconds = time.perf_counter() - started
        return self.summary

    def _answer(self, lines: list[tuple[int, bytes]]) -> None:
        ready: dict[int, dict[str, Any]] = {}
        given: list[dict[str, Any]] = []
        requests: dict[int, Request] = {}
        for place, (number, raw) in enumerate(lines):
            given.append({})
            try:
                given[place] = parse_line(raw)
                prompt, options = read_request(given[place])
                requests[place] = self._make_request(prompt, options, number)
            except ZooError as error:
                ready[place] = self._failure(given[place], number, error)
        places = list(requests)
        written = self._write_ready(ready, 0)
        for index, outcome in self._run(list(requests.values())):
            place = places[index]
            if isinstance(outcome, Reply):
                ready[place] = self._success(given[place], outcome)
            else:
                ready[place] = self._failure(given[place], lines[place][0], outcome)
            written = self._write_ready(ready, written)

    def _write_ready(self, ready: dict[int, dict[str, Any]], place: int) -> int:
        """Write what comes next in order and is there; returns the place that is waited for."""
        while place in ready:
            self._write(json.dumps(ready.pop(place), ensure_ascii=False))
            place += 1
        return place

    def _success(self, given: dict[str, Any], reply: Reply) -> dict[str, Any]:
        stats, summary = reply.stats, self.summary
        summary.lines += 1
        summary.prompt_tokens += stats.prompt_tokens
        summary.new_tokens += stats.new_tokens
        summary.peak_memory = max(summary.peak_memory, stats.peak_memory)
        kept = {key: value for key, value in given.items() if key not in FAILURE_KEYS}
        values = (reply.text, reply.finish_reason, stats.prompt_tokens, stats.new_tokens)
        return kept | dict(zip(RESULT_KEYS, values, strict=True))

    def _failure(self, given: dict[str, Any], number: int, error: ZooError) -> dict[str, Any]:
        self.summary.lines += 1
        self.summary.failed += 1
        self.summary.first_error = self.summary.first_error or f"line {number}: {error}"
        return given | {"error": str(error), "line": number}


def parse_line(raw: bytes) -> dict[str, Any]:
    """The object that a line holds.

    Raises:
        InputError: it is no JSON object in UTF-8.
    """
    try:
        data = json.loads(raw.decode("utf-8-sig"))
        json.dumps(data, ensure_ascii=False).encode()  # half a surrogate pair could not be written again
    except (ValueError, RecursionError) as error:
        raise InputError(f"the line is no JSON in UTF-8: {error}.") from None
    if not isinstance(data, dict):
        raise InputError("the line is no JSON object.", fix='Write {"prompt": "..."} or {"messages": [...]}.')
    return data


def read_request(given: dict[str, Any]) -> tuple[Prompt, dict[str, Any]]:
    """The prompt of a line, and the options that it gives.

    Raises:
        InputError: it has no prompt, or two; a value is of the wrong kind; or a key is one that the result needs.
    """
    if clash := [key for key in RESULT_KEYS if key in given]:
        raise InputError(f"the key {clash[0]!r} is one that the result uses.", fix="Rename it.")
    if ("prompt" in given) == ("messages" in given):
        raise InputError("the line needs either 'prompt' or 'messages'.")
    options = {name: value for name in OPTIONS if (value := given.get(name)) is not None}
    for name, value in options.items():
        types, described = OPTIONS[name]
        if isinstance(value, bool) or not isinstance(value, types):
            raise InputError(f"{name} must be {described}, not {json.dumps(value)}.")
    if (stop := given.get("stop")) is not None:
        options["stop"] = _strings("stop", stop)
    if "adapter" in given:
        options["adapter"] = [] if given["adapter"] is None else _strings("adapter", given["adapter"])
    return _messages(given["messages"]) if "messages" in given else _text(given["prompt"]), options


def _text(prompt: Any) -> str:
    if not isinstance(prompt, str):
        raise InputError(f"prompt must be a string, not {json.dumps(prompt)}.")
    if not prompt:
        raise InputError("the prompt is empty.", fix="Give some text to continue.")
    return prompt


def _messages(messages: Any) -> list[Message]:
    well_formed = isinstance(messages, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in messages
    )
    if not messages or not well_formed:
        raise InputError("messages must be a list of objects, each with a role and a content, both strings.")
    return list(messages)


def _strings(key: str, value: Any) -> list[str]:
    strings = [value] if isinstance(value, str) else value
    if not isinstance(strings, list) or not all(isinstance(s, str) for s in strings):
        raise InputError(f"{key} must be a string or a list of strings, not {json.dumps(value)}.")
    return strings
