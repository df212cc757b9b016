"""``zoo prepare`` as a user runs it: what it writes, what it says, and what it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import reference
from tests.dataset_hub import DatasetHub, serve_datasets
from tests.e2e.test_command_line import Zoo, chat_model, zoo  # noqa: F401 - fixtures
from tests.plugin_lab import run_python
from tests.web_server import serve_files
from zoo.data import named
from zoo.data.finetuning import FinetuningData
from zoo.data.named import NamedDataset
from zoo.data.token_file import TokenFile
from zoo.text.tokenizer import Tokenizer

ALPACA = [{"instruction": f"Say {n}.", "input": "loud" if n % 2 else "", "output": f"It is {n}!"} for n in range(20)]


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    return path


def test_a_named_data_set(zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """Guards ``zoo prepare alpaca``, the user's prepare_alpaca.py: download, check, split, write."""
    web, server = serve_files()
    web.files["/alpaca.json"] = json.dumps(ALPACA).encode()
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(named, "ALPACA", NamedDataset(source=f"{web.url}/alpaca.json", license="CC BY-NC 4.0"))
    result = zoo("prepare", "alpaca")
    server.shutdown()
    server.server_close()
    assert result.code == 0, result.err
    assert "20 samples of the format alpaca" in result.out
    assert "downloading" in result.err
    out = tmp_path / "data" / "alpaca"
    train, validation = read(out / "train.jsonl"), read(out / "val.jsonl")
    assert len(train) + len(validation) == 20 and validation
    assert set(train[0]["messages"][0]) == {"role", "content"}
    facts = json.loads((out / "prepared.json").read_text())
    assert (facts["license"], facts["train"], facts["format"]) == ("CC BY-NC 4.0", len(train), "alpaca")


def test_counts_and_first_sample(zoo: Zoo, tmp_path: Path) -> None:  # noqa: F811
    """Guards the figures, and that the first sample shows what of it is learnt."""
    write(tmp_path / "a.json", [*ALPACA, ALPACA[0], {**ALPACA[1], "output": "x" * 500, "id": 7}])
    result = zoo("prepare", "a.json", "--tokenizer", "byte", "--prompt-style", "alpaca", "--max-seq-len", "300")
    assert result.code == 0, result.err
    assert "22 samples of the format alpaca" in result.out
    assert "1 occur more than once" in result.out
    assert "truncated: 1 samples lose" in result.out
    assert "### Response:\n[[It is " in result.out and "<|endoftext|>]]" in result.out
    again = zoo(
        "prepare", "a.json", "--tokenizer", "byte", "--prompt-style", "alpaca", "--max-seq-len", "300", "--json"
    )
    found = json.loads(again.out)
    assert found["encoding"]["n_samples"] == 22 and found["encoding"]["n_truncated"] == 1
    assert found["duplicates"] == 1 and found["prompt_style"] == "alpaca" and found["problems"] == []
    assert [part["learnt"] for part in found["first_sample"]] == [False, True]


def test_what_is_written_is_what_was_read(zoo: Zoo, tmp_path: Path) -> None:  # noqa: F811
    """Guards the prepared files: they give the same text in the style that knows inputs, and are split as they are."""
    write(tmp_path / "a.json", ALPACA)
    options = ("--tokenizer", "byte", "--prompt-style", "alpaca", "--json")
    first = json.loads(zoo("prepare", "a.json", *options).out)
    second = json.loads(zoo("prepare", "data/a", *options, "--out", "again").out)
    assert (second["format"], second["split"]) == ("messages", "its own")
    assert (second["train"], second["validation"]) == (first["train"], first["validation"])
    assert {**second["encoding"]} == {**first["encoding"]}
    assert read(tmp_path / "again" / "val.jsonl") == read(tmp_path / "data" / "a" / "val.jsonl")


def test_the_models_own_template(zoo: Zoo, chat_model: Path, tmp_path: Path) -> None:  # noqa: F811
    """Guards --model: its tokenizer, its template, its context."""
    rows = [
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho" * n}]} for n in (1, 40)
    ]
    write(tmp_path / "chat.json", rows)
    found = json.loads(zoo("prepare", "chat.json", "--model", chat_model, "--json").out)
    assert (found["prompt_style"], found["max_seq_len"]) == ("model", 64)
    assert found["encoding"]["n_truncated"] == 1
    assert found["first_sample"][-1] == {"text": "Ho<eos>", "learnt": True}


def test_a_corpus_of_characters(zoo: Zoo, tmp_path: Path) -> None:  # noqa: F811
    """Guards nanoGPT's shakespeare_char: ids, split and vocabulary, and files that pretraining reads."""
    text = "First Citizen:\nBefore we proceed any further, hear me speak.\n\n" * 20
    (tmp_path / "input.txt").write_text(text)
    result = zoo("prepare", "input.txt", "--tokenizer", "char")
    assert result.code == 0, result.err
    out = tmp_path / "data" / "input"
    tokenizer = Tokenizer.from_directory(out)
    assert tokenizer.decode(TokenFile.open(out / "train.bin", tokenizer).ids.tolist()) == text[: int(0.9 * len(text))]
    assert np.fromfile(out / "val.bin", np.uint16).size == len(text) - int(0.9 * len(text))
    assert f"{len(set(text))} tokens in the vocabulary, stored as uint16; nothing between documents" in result.out
    assert "holds token files already" in zoo("prepare", out).err


def test_a_corpus_with_a_trained_tokenizer(zoo: Zoo, tmp_path: Path) -> None:  # noqa: F811
    """Guards --train-bpe, --text and --column on JSON lines."""
    lines = [json.dumps({"body": f"the zoo number {n} of the zoo"}) for n in range(100)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    options = ("--text", "--column", "text=body", "--train-bpe", "300", "--val-fraction", "0", "--json")
    found = json.loads(zoo("prepare", "a.jsonl", *options).out)
    assert (found["n_documents"], found["n_validation"], found["vocab_size"], found["eos"]) == (100, 0, 300, True)
    tokens = TokenFile.open(tmp_path / "data" / "a" / "train.bin", Tokenizer.from_directory(tmp_path / "data" / "a"))
    assert (tokens.ids == tokens.facts.eos_id).sum() == 100


REFUSED: list[tuple[list[str], int, str]] = [
    (["empty.jsonl"], 2, "empty.jsonl is empty"),
    (["bad.jsonl"], 2, "bad.jsonl:2 is not valid JSON"),
    (["odd.jsonl"], 2, "the columns 'question', 'answer', and no format has them"),
    (["nowhere.jsonl"], 2, "there is no file or directory"),
    (["alpacca"], 2, "Did you mean 'alpaca'"),
    (["a.json", "--tokenizer", "byte"], 2, "--prompt-style: alpaca, chatml"),
    (["a.json", "--tokenizer", "byte", "--prompt-style", "alpaka"], 2, "Did you mean 'alpaca'"),
    (["a.json", "--tokenizer", "byte", "--prompt-style", "alpaca", "--max-seq-len", "20"], 2, "every sample is longer"),
    (["a.json", "--prompt-style", "alpaca"], 2, "needs a tokenizer to count with"),
    (["a.json", "--tokenizer", "char"], 2, "a tokenizer is made from running text"),
    (["a.json", "--tokenizer", "nowhere", "--prompt-style", "plain"], 2, "there is no tokenizer 'nowhere'"),
    (["a.json", "--model", "tiny", "--tokenizer", "byte"], 2, "give one of --model"),
    (["a.json", "--val-fraction", "1"], 2, "val_fraction must be at least 0"),
    (["a.json", "--column", "prompt"], 2, "--column is NAME=YOURS"),
    (["a.json", "--column", "prompt=question"], 2, "has no column 'question'"),
    (["a.json", "--out", "full"], 2, "full exists and is not empty"),
    (["input.txt"], 2, "Give one of: --model, --tokenizer, --train-bpe"),
    (["input.txt", "--tokenizer", "byte", "--prompt-style", "alpaca"], 2, "has no meaning for running text"),
    (["input.txt", "--train-bpe", "10"], 2, "at least 257 tokens"),
    (["input.txt", "--tokenizer", "byte", "--seed", "1"], 2, "--seed has no meaning"),
    (["input.txt", "--tokenizer", "byte", "--column", "text=body"], 2, "--column has no meaning"),
    (["split", "--val-fraction", "0.5"], 2, "split has a validation set of its own"),
    (["alpaca", "--offline"], 1, "--offline forbids"),
]


@pytest.mark.parametrize(("arguments", "code", "said"), REFUSED)
def test_what_is_refused(
    arguments: list[str],
    code: int,
    said: str,
    zoo: Zoo,  # noqa: F811
    tmp_path: Path,
) -> None:
    """Guards each message and exit code, and that nothing is left behind."""
    write(tmp_path / "a.json", ALPACA)
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (tmp_path / "odd.jsonl").write_text('{"question": "a", "answer": "b"}\n')
    (tmp_path / "input.txt").write_text("some text")
    (tmp_path / "split").mkdir()
    for name in ("train", "val"):
        write(tmp_path / "split" / f"{name}.json", ALPACA)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    result = zoo("prepare", *arguments)
    assert (result.code, result.out) == (code, ""), result.err
    assert said in result.err
    assert not (tmp_path / "data" / "a").exists()
    assert not list(tmp_path.rglob("*.partial"))


def test_it_may_be_run_again(zoo: Zoo, tmp_path: Path) -> None:  # noqa: F811
    """Guards that what it wrote is replaced, and never the data that it reads."""
    write(tmp_path / "a.json", ALPACA)
    assert zoo("prepare", "a.json", "--val-fraction", "0.5").code == 0
    assert zoo("prepare", "a.json", "--val-fraction", "0").code == 0
    assert not (tmp_path / "data" / "a" / "val.jsonl").exists()
    assert "the data itself is in data/a" in zoo("prepare", "data/a/train.jsonl", "--out", "data/a").err
    assert (tmp_path / "data" / "a" / "train.jsonl").exists()


def test_prepared_samples_train(zoo: Zoo, tmp_path: Path) -> None:  # noqa: F811
    """Guards the way from a file to batches: EOS is among the targets, and each sample is there once."""
    from zoo.data.encode import encode_samples
    from zoo.data.load import load_samples, resolve_data
    from zoo.plugins import load_zoo
    from zoo.text.new_tokenizers import byte_tokenizer
    from zoo.text.prompts import choose_prompt_style

    write(tmp_path / "a.json", ALPACA)
    zoo("prepare", "a.json")
    registry, tokenizer = load_zoo().registry, byte_tokenizer()
    loaded = load_samples(resolve_data("data/a", registry))
    style = choose_prompt_style("alpaca", tokenizer, registry)
    train = encode_samples(loaded.train, style, tokenizer).sequences
    data = FinetuningData(train, batch_size=4)
    batches = [batch for step in range(data.steps_per_epoch) for batch in data.step(step)]
    targets = [target for batch in batches for target in batch.targets_BT.flatten().tolist()]
    assert targets.count(tokenizer.eos_id) == len(train)


@pytest.fixture
def hub() -> Iterator[DatasetHub]:
    hub, server = serve_datasets()
    rows = [{"question": f"q{n}", "answer": f"a{n}"} for n in range(10)]
    lines = "\n".join(map(json.dumps, rows)).encode()
    hub.datasets["org/tiny"] = {"README.md": b"---\nlicense: mit\n---\n", "data/train.jsonl": lines}
    hub.datasets["org/tiny"]["data/validation.jsonl"] = json.dumps(rows[0]).encode()
    hub.datasets["org/scripted"] = {"README.md": b"", "scripted.py": b"raise SystemExit('run')\n"}
    yield hub
    server.shutdown()
    server.server_close()


def test_a_data_set_of_the_hub(hub: DatasetHub, tmp_path: Path) -> None:
    """Guards ``hf:`` with the real library over HTTP: splits, renamed columns, a second run offline, a refusal."""
    quiet = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "ZOO_DATA": str(tmp_path / "data")}
    quiet |= {"ZOO_PLUGINS": "", "HF_HUB_OFFLINE": "0"}
    columns = ("--column", "prompt=question", "--column", "completion=answer", "--json")

    def prepare(*arguments: str) -> subprocess.CompletedProcess[str]:
        return run_python("-m", "zoo", "prepare", *arguments, **quiet)

    first = prepare("hf:org/tiny", *columns)
    assert first.returncode == 0, first.stderr
    found = json.loads(first.stdout)
    assert (found["format"], found["train"], found["validation"], found["split"]) == ("completion", 10, 1, "its own")
    assert read(tmp_path / "data" / "tiny" / "train.jsonl")[3] == {"prompt": "q3", "completion": "a3"}
    asked = len(hub.asked)
    again = prepare("hf:org/tiny", *columns, "--offline")
    assert again.returncode == 0, again.stderr
    assert len(hub.asked) == asked
    scripted = prepare("hf:org/scripted")
    assert (scripted.returncode, "hf:org/scripted@refs/convert/parquet" in scripted.stderr) == (2, True)
    missing = prepare("hf:org/none")
    assert (missing.returncode, "the Hub has no data set 'org/none'" in missing.stderr) == (1, True), missing.stderr


def test_without_the_extra(tmp_path: Path) -> None:
    """Guards exit code 3 and the command that installs what is missing."""
    (tmp_path / "datasets").mkdir()
    (tmp_path / "datasets" / "__init__.py").write_text("raise ImportError('not here')")
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("ZOO_", "PYTHON", "COV"))}
    done = subprocess.run(
        [sys.executable, "-m", "zoo", "prepare", "hf:org/tiny"],
        env={**inherited, "PYTHONPATH": str(tmp_path), "ZOO_PLUGINS": ""},
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 3
    assert "pip install 'gpt-zoo[datasets]'" in done.stderr


def test_a_check_imports_no_torch(tmp_path: Path) -> None:
    """Guards the start-up of a check of files: neither torch nor the library of data sets is needed."""
    write(tmp_path / "a.json", ALPACA)
    script = (
        "import sys\nfrom zoo.cli.main import main\ntry:\n    main(['prepare', 'a.json'])\nexcept SystemExit as e:\n"
    )
    script += "    assert e.code == 0\nprint(sorted({'torch', 'pyarrow', 'datasets'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_tokenizer_directory(zoo: Zoo, tmp_path: Path) -> None:  # noqa: F811
    """Guards --tokenizer DIR, with the template that lies in it."""
    (tmp_path / "t").mkdir()
    reference.save_byte_tokenizer(tmp_path / "t")
    write(tmp_path / "a.json", ALPACA)
    for given in ("t", "t/tokenizer.json"):
        found = json.loads(zoo("prepare", "a.json", "--tokenizer", given, "--json").out)
        assert found["prompt_style"] == "model"
