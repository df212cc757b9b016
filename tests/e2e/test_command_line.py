"""The commands as a user types them: what they print, where, and with which exit code."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from tests import reference
from zoo.cli.main import main


class Result(NamedTuple):
    """What a command did."""

    code: int
    out: str
    err: str


class Zoo:
    """Runs commands in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self._capsys, self._monkeypatch = capsys, monkeypatch

    def __call__(self, *arguments: str | Path, stdin: str = "") -> Result:
        """Run one command line."""
        self._monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        self._capsys.readouterr()
        with pytest.raises(SystemExit) as exited:
            main([str(a) for a in arguments])
        captured = self._capsys.readouterr()
        assert isinstance(exited.value.code, int)
        assert "Traceback" not in captured.err
        return Result(exited.value.code, captured.out, captured.err)


@pytest.fixture
def zoo(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Zoo:
    """The command line, in an empty working directory, without plugins."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ZOO_PLUGINS", "")
    return Zoo(capsys, monkeypatch)


@pytest.fixture
def chat_model(tmp_path: Path) -> Path:
    """A tiny model that chats."""
    directory = tmp_path / "tiny"
    reference.save_tiny_chat_model(directory)
    return directory


def test_generate(zoo: Zoo, chat_model: Path) -> None:
    """Guards the main path: text on stdout and nothing else, everything else on stderr, the same text from --json."""
    arguments = ("generate", chat_model, "--prompt", "Once", "--max-new-tokens", "8", "--temperature", "0")
    plain = zoo(*arguments, "--stats")
    assert plain.code == 0
    assert plain.out.startswith("Once")
    assert "32-true on cpu, sdpa attention" in plain.err
    assert "tokens/s" in plain.err
    result = json.loads(zoo(*arguments, "--json").out)
    assert f"Once{result['text']}\n" == plain.out
    assert len(result["ids"]) == 8
    assert result["stats"]["new_tokens"] == 8
    assert result["finish_reason"] == "length"


def test_generate_samples_and_standard_input(zoo: Zoo, chat_model: Path) -> None:
    """Guards --num-samples, --seed and --prompt -."""
    arguments = ("generate", chat_model, "--prompt", "-", "--max-new-tokens", "8", "--json", "--seed", "4")
    first, second = json.loads(zoo(*arguments, "--num-samples", "2", stdin="Once").out)
    assert first["prompt"] == "Once"
    assert first["ids"] != second["ids"]
    assert json.loads(zoo(*arguments, stdin="Once").out)["ids"] == first["ids"]


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "16-true"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_choices(zoo: Zoo, chat_model: Path, precision: str, attention: str) -> None:
    """Guards that what was asked for is what runs."""
    arguments = ("--precision", precision, "--attention", attention, "--max-new-tokens", "2")
    result = json.loads(zoo("generate", chat_model, "--prompt", "Once", "--json", *arguments).out)
    assert (result["precision"], result["attention"]) == (precision, attention)


def test_chat(zoo: Zoo, tmp_path: Path) -> None:
    """Guards a conversation over a pipe: answers, /system, /reset, /save, unknown commands, the end of the input."""
    chat_model = tmp_path / "long"
    reference.save_tiny_chat_model(chat_model, max_position_embeddings=512)
    lines = ["/system Be brief.", "Hi", "And you?", "/save chat.json", "/reset", "/what", "", "Bye", "/save b.json"]
    options = ("--max-new-tokens", "4", "--temperature", "0")
    result = zoo("chat", chat_model, *options, stdin="\n".join(lines))
    assert result.code == 0
    assert "/reset forgets" in result.err
    saved = json.loads((tmp_path / "chat.json").read_text())
    assert [m["role"] for m in saved] == ["system", "user", "assistant", "user", "assistant"]
    assert [m["content"] for m in saved if m["role"] == "user"] == ["Hi", "And you?"]
    assert [m["content"] for m in json.loads((tmp_path / "b.json").read_text())][:2] == ["Be brief.", "Bye"]
    once = zoo("chat", chat_model, *options, "--system", "Be brief.", "--prompt", "Hi")
    assert once.out.strip() == saved[2]["content"].strip()


def test_chat_without_a_template(zoo: Zoo, chat_model: Path, tmp_path: Path) -> None:
    """Guards the remedy, and that it works."""
    reference.save_byte_tokenizer(chat_model, chat_template=None)
    refused = zoo("chat", chat_model, "--prompt", "Hi")
    assert refused.code == 2
    assert "--chat-template" in refused.err
    (tmp_path / "t.jinja").write_text("{{ messages[-1]['content'] }}")
    options = ("--chat-template", "t.jinja", "--max-new-tokens", "2")
    assert zoo("chat", chat_model, "--prompt", "Hi", *options).code == 0
    assert zoo("chat", chat_model, "--chat-template", "none.jinja").code == 2


def test_convert(zoo: Zoo, chat_model: Path, tmp_path: Path) -> None:
    """Guards convert, and that what it writes is used in place."""
    result = zoo("convert", chat_model, tmp_path / "out", "--dtype", "bf16", "--json")
    assert json.loads(result.out)["tensors"] == 30
    generated = zoo("generate", tmp_path / "out", "--prompt", "Once", "--max-new-tokens", "2")
    assert "bf16-true" in generated.err or not torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def test_download_lists(zoo: Zoo) -> None:
    """Guards ``zoo download | grep stablelm``: one line a model, name first, never cut off."""
    lines = zoo("download").out.splitlines()
    assert [line.split()[0] for line in lines if "stablelm-base-alpha-3b" in line] == ["stablelm-base-alpha-3b"]
    assert any(line.split() == ["gpt2-xl", "1,557,611,200", "hf:openai-community/gpt2-xl"] for line in lines)


def test_doctor(zoo: Zoo) -> None:
    """Guards the report of a healthy machine."""
    facts = json.loads(zoo("doctor", "--json").out)
    assert facts["versions"]["torch"].startswith("2.")
    assert facts["torch"]["threads"] >= 1
    assert facts["problems"] == []
