"""``zoo generate`` for files of prompts, several samples and drafted tokens, as a user runs it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch

from tests import reference
from tests.e2e.test_command_line import Zoo, zoo  # noqa: F401 - fixture
from tests.hub_server import serve
from zoo.cli import generate as command
from zoo.generate import jobs


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads only slow such small models down, the more so on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A tiny model that chats, with room for a conversation."""
    reference.save_tiny_chat_model(tmp_path / "tiny", max_position_embeddings=128)
    return tmp_path / "tiny"


def lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


GOOD: list[dict[str, Any]] = [
    {"prompt": "Once upon a time", "id": 7, "nested": {"kept": [1, None]}},
    {"prompt": "Hi", "max_new_tokens": 3, "stop": "never"},
    {"prompt": "Grüße", "seed": 5, "temperature": 1.5, "max_new_tokens": 6},
    {"messages": [{"role": "user", "content": "Hi"}], "max_new_tokens": 4},
    {"prompt": "x", "temperature": 0, "max_new_tokens": None, "error": "an earlier try", "line": 3},
]
OPTIONS = ("--max-new-tokens", "5", "--temperature", "1.2", "--seed", "9")


def test_a_file(zoo: Zoo, tiny: Path, tmp_path: Path) -> None:  # noqa: F811
    """Guards the format: order kept whatever the lengths, extra keys carried over, a line's options before the job's.

    Line i is what --prompt gives for its options, with stream i - 1 of the job's seed or the first of its own.
    """
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n\n".join(json.dumps(line) for line in GOOD) + "\n")
    result = zoo("generate", tiny, "--batch", source, "--out", out, "--batch-size", "2", *OPTIONS, "--stats")
    assert (result.code, result.out) == (0, "")
    assert "5 lines, 23 new tokens in" in result.err
    assert "peak memory" in result.err
    found = lines(out)
    assert [line["new_tokens"] for line in found] == [5, 3, 6, 4, 5]
    assert [line["finish_reason"] for line in found] == ["length"] * 5
    for given, line in zip(GOOD, found, strict=True):
        kept = {key: value for key, value in given.items() if key not in ("error", "line")}
        assert {key: line[key] for key in line if key not in jobs.RESULT_KEYS} == kept
    arguments = ("--max-new-tokens", "6", "--temperature", "1.5", "--seed", "5", "--json")
    third = json.loads(zoo("generate", tiny, "--prompt", "Grüße", *arguments).out)
    assert (third["text"], third["stats"]["prompt_tokens"]) == (found[2]["text"], found[2]["prompt_tokens"])
    first = json.loads(zoo("generate", tiny, "--prompt", GOOD[0]["prompt"], *OPTIONS, "--json").out)
    assert first["text"] == found[0]["text"]
    chat = zoo("chat", tiny, "--prompt", "Hi", "--max-new-tokens", "4", "--temperature", "0").out
    source.write_text(json.dumps(GOOD[3] | {"temperature": 0}))
    assert json.loads(zoo("generate", tiny, "--batch", source).out)["text"].strip() == chat.strip()


BAD = {
    b'{"prompt": ': "no JSON",
    b"\xff\xfe": "no JSON in UTF-8",
    b'{"prompt": "\\ud800"}': "no JSON in UTF-8",
    b"[" * 100_000: "no JSON",
    b'["prompt"]': "no JSON object",
    b"{}": "either 'prompt' or 'messages'",
    b'{"prompt": "x", "messages": []}': "either 'prompt' or 'messages'",
    b'{"prompt": 7}': "prompt must be a string, not 7",
    b'{"prompt": ""}': "the prompt is empty",
    b'{"messages": []}': "messages must be a list",
    b'{"messages": [{"role": "user"}]}': "messages must be a list",
    b'{"messages": "Hi"}': "messages must be a list",
    b'{"prompt": "x", "max_new_tokens": 2.5}': "max_new_tokens must be an integer, not 2.5",
    b'{"prompt": "x", "max_new_tokens": true}': "max_new_tokens must be an integer, not true",
    b'{"prompt": "x", "max_new_tokens": 0}': "max_new_tokens must be at least 1, not 0",
    b'{"prompt": "x", "max_new_tokens": 500}': "exceed the context of 128",
    b'{"prompt": "x", "temperature": "hot"}': "temperature must be a number",
    b'{"prompt": "x", "temperature": -1}': "temperature must be 0 (greedy) or above, not -1",
    b'{"prompt": "x", "top_p": 7}': "top_p must be above 0",
    b'{"prompt": "x", "seed": 99999999999999999999}': "seed must be within 0..2**63-1",
    b'{"prompt": "x", "stop": 3}': "stop must be a string or a list of strings",
    b'{"prompt": "x", "stop": ["a", ""]}': "a stop string must not be empty",
    b'{"prompt": "x", "text": "mine"}': "the key 'text' is one that the result uses",
}


def test_bad_lines(zoo: Zoo, tiny: Path, tmp_path: Path) -> None:  # noqa: F811
    """Guards the job against single lines: each says what is wrong with it, and where; the others are answered."""
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    good = [b'{"prompt": "ok", "max_new_tokens": 2, "id": %d}' % i for i in range(len(BAD) + 1)]
    source.write_bytes(b"\n".join([good[0], *(line for pair in zip(BAD, good[1:], strict=True) for line in pair)]))
    result = zoo("generate", tiny, "--batch", source, "--out", out, "--batch-size", "8")
    assert result.code == 1
    assert f"{len(BAD)} of {2 * len(BAD) + 1} lines failed. The first is line 2: the line is no JSON" in result.err
    found = lines(out)
    assert [(line["id"], line["new_tokens"]) for line in found[::2]] == [(i, 2) for i in range(len(BAD) + 1)]
    for number, (said, line) in enumerate(zip(BAD.values(), found[1::2], strict=True), 1):
        assert said in line["error"]
        assert line["line"] == 2 * number
    assert found[9] | {"line": 0} == {"error": found[9]["error"], "line": 0}
    assert found[15]["prompt"] == 7


def test_windows(zoo: Zoo, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """Guards memory and order: no more than a window is read ahead of what was written."""
    monkeypatch.setattr(command, "WINDOW_BATCHES", 2)
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps({"prompt": "x" * (1 + i % 5), "i": i}) + "\n" for i in range(23)))
    ahead, parse = [], jobs.parse_line

    def watched(raw: bytes) -> dict[str, Any]:
        given = parse(raw)
        ahead.append(given["i"] - len(lines(out)))
        return given

    monkeypatch.setattr(jobs, "parse_line", watched)
    assert zoo("generate", tiny, "--batch", source, "--out", out, "--batch-size", "3", *OPTIONS).code == 0
    assert [line["i"] for line in lines(out)] == list(range(23))
    assert max(ahead) == 5
    texts = [line["text"] for line in lines(out)]
    out.unlink()
    assert zoo("generate", tiny, "--batch", source, "--out", out, "--batch-size", "16", *OPTIONS).code == 0
    assert [line["text"] for line in lines(out)] == texts


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--batch", "in.jsonl", "--prompt", "x"], "not both"),
        (["--batch", "in.jsonl", "--json"], "--json has no meaning with --batch"),
        (["--batch", "in.jsonl", "--num-samples", "2"], "--num-samples has no meaning with --batch"),
        (["--batch", "in.jsonl", "--speculate", "ngram"], "--speculate has no meaning with --batch"),
        (["--batch", "in.jsonl", "--draft", "tiny"], "--draft has no meaning with --batch"),
        (["--batch", "in.jsonl", "--compile"], "--compile serves one text at a time"),
        (["--prompt", "x", "--num-samples", "2", "--compile"], "--compile serves one text at a time"),
        (["--batch", "in.jsonl", "--batch-size", "0"], "--batch-size must be at least 1, not 0"),
        (["--batch", "none.jsonl"], "can not read none.jsonl: No such file"),
        (["--batch", "."], "can not read .: Is a directory"),
        (["--batch", "in.jsonl", "--out", "in.jsonl"], "in.jsonl exists and is not empty"),
        (["--batch", "in.jsonl", "--out", "none/out.jsonl"], "can not write none/out.jsonl: No such file"),
        (["--prompt", "x", "--out", "out.jsonl"], "--out has no meaning without --batch"),
        (["--prompt", "x", "--batch-size", "4"], "--batch-size has no meaning here"),
        (["--prompt", "x", "--draft-tokens", "4"], "--draft-tokens has no meaning without"),
        (["--prompt", "x", "--draft-tokens", "0", "--speculate", "ngram"], "--draft-tokens must be at least 1"),
        (["--prompt", "x", "--draft", "tiny", "--speculate", "ngram"], "either --speculate or --draft"),
        (["--prompt", "x", "--seed", "-1"], "seed must be within"),
    ],
)
def test_refusals(zoo: Zoo, tmp_path: Path, arguments: list[str], said: str) -> None:  # noqa: F811
    """Guards against options that would be ignored, and files that would be lost; before any model is looked for."""
    (tmp_path / "in.jsonl").write_text('{"prompt": "x"}\n')
    result = zoo("generate", "nothing-by-this-name", *arguments)
    assert result.code == 2
    assert said in result.err
    assert (tmp_path / "in.jsonl").read_text() == '{"prompt": "x"}\n'


def test_samples_equal_single_runs(zoo: Zoo, tiny: Path) -> None:  # noqa: F811
    """Guards --num-samples, whatever runs together, in plain text and JSON."""
    arguments = ("generate", tiny, "--prompt", "Once", "--json", "--num-samples", "5", *OPTIONS)
    texts = [result["text"] for result in json.loads(zoo(*arguments).out)]
    for more in (("--batch-size", "2"), ("--batch-size", "1")):
        assert [result["text"] for result in json.loads(zoo(*arguments, *more).out)] == texts
    plain = zoo("generate", tiny, "--prompt", "Once", "--num-samples", "5", *OPTIONS).out
    assert plain == "\n".join(f"Once{text}\n" for text in texts)
    assert len(set(texts)) == 5


def test_speculation(zoo: Zoo, tiny: Path, tmp_path: Path) -> None:  # noqa: F811
    """Guards --speculate, --draft and --draft-tokens: the greedy text stays, and --stats tells the acceptance."""
    reference.save_tiny_chat_model(tmp_path / "draft", num_hidden_layers=1)
    arguments = ("generate", tiny, "--prompt", "ababab", "--max-new-tokens", "20", "--temperature", "0")
    plain = zoo(*arguments)
    for how in (("--speculate", "ngram"), ("--draft", tmp_path / "draft"), ("--draft", tiny, "--draft-tokens", "3")):
        fast = zoo(*arguments, *how, "--stats")
        assert fast.out == plain.out
    assert "14 of 14 drafted tokens accepted (100%)" in fast.err  # 20 = 1 + 4 * (3 + 1) + (2 + 1)
    stats = json.loads(zoo(*arguments, "--draft", tiny, "--json").out)["stats"]
    assert stats["acceptance_rate"] == 1.0
    assert stats["drafted_tokens"] == stats["accepted_tokens"] > 0


def test_the_revision_is_the_models_own(
    zoo: Zoo,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Guards --revision with --draft: the draft, which has no such revision, is taken as it is now."""
    hub, servers = serve()
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    huggingface_hub.close_session()
    for name in ("model", "draft"):
        reference.save_tiny_chat_model(tmp_path / name, max_position_embeddings=128)
        hub.add(f"org/{name}", {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()})
    hub.repos["org/model"].refs["v1"] = hub.repos["org/model"].refs.pop("main")
    try:
        arguments = ("generate", "hf:org/model", "--draft", "hf:org/draft", "--prompt", "Once", "--max-new-tokens", "4")
        result = zoo(*arguments, "--revision", "v1", "--temperature", "0", "--stats")
    finally:
        huggingface_hub.close_session()
        for server in servers:
            server.shutdown()
            server.server_close()
    assert result.code == 0, result.err
    asked = {seen.path for seen in hub.seen if seen.path.startswith("/api/models/")}
    assert asked == {"/api/models/org/model/revision/v1", "/api/models/org/draft"}
