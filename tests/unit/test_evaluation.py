"""Perplexity, bits per byte and exact answers, against numbers that `transformers` and plain loops give."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch

from tests import reference
from zoo.api import load
from zoo.data.batches import collate
from zoo.data.encode import encode_samples
from zoo.data.finetuning import FinetuningData
from zoo.data.load import load_samples, resolve_data
from zoo.data.prepare import prepare_corpus
from zoo.data.pretraining import PretrainingData
from zoo.data.token_file import TokenFile
from zoo.errors import FileFormatError, InputError, ZooError
from zoo.generate.reply import Request
from zoo.generate.sampling import SamplingOptions
from zoo.language_model import LanguageModel
from zoo.registry import Registry
from zoo.runs.evaluation import Evaluation, evaluate
from zoo.runs.evaluation_data import bytes_of_supervised, bytes_of_tokens, n_windows, read_evaluation_data, windows
from zoo.text.prompts import choose_prompt_style
from zoo.text.samples import Encoded
from zoo.train.loss import supervised_loss

TEXT = "Grüße aus dem Zoo: 3 Löwen, 2 Bären, ein Käfer. " * 4
ANSWERS = {"red?": " röd", "green?": " grön", "blue?": " blå"}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("evaluation") / "model"
    reference.save_tiny_chat_model(directory)
    return directory


@pytest.fixture(scope="module")
def theirs(directory: Path) -> Any:
    return reference.tiny_model("llama", reference.LLAMA | {"vocab_size": 258})


@pytest.fixture
def lm(directory: Path, registry: Registry) -> LanguageModel:
    return load(directory, precision="32-true", device="cpu", registry=registry)


@pytest.fixture
def run(lm: LanguageModel, tmp_path: Path, registry: Registry) -> Callable[..., Evaluation]:
    """Evaluates rows, a text, or what a path names."""

    def run(data: Any, *, on: LanguageModel = lm, max_samples: int | None = None, **options: Any) -> Evaluation:
        path = tmp_path / ("text.txt" if isinstance(data, str) else "rows.jsonl")
        if isinstance(data, Path):
            path = data
        elif isinstance(data, str):
            path.write_text(data, encoding="utf-8")
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in data), encoding="utf-8")
        read = read_evaluation_data(str(path), registry, max_samples=max_samples)
        return evaluate(on, read, registry, **options)

    return run


def nats_of(theirs: Any, ids: Sequence[int], start: int) -> float:
    """What the tokens from ``start`` cost, each after all that are before it."""
    with torch.no_grad():
        log_p = theirs(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return -sum(float(log_p[i - 1, ids[i]]) for i in range(start, len(ids)))


def test_examples_are_as_the_reference_computes_them(run: Callable[..., Evaluation], theirs: Any) -> None:
    """Guards the mask, the shift by one, the sum over examples of different lengths, and the bytes of umlauts."""
    rows = [{"prompt": prompt, "completion": answer} for prompt, answer in ANSWERS.items()]
    found = run(rows, prompt_style="plain", batch_size=2)
    expected = 0.0
    for prompt, answer in ANSWERS.items():
        given, learnt = prompt.encode(), answer.encode()
        expected += nats_of(theirs, [*_bytes(given + learnt), 257], len(given))
    n_bytes = sum(len(answer.encode()) for answer in ANSWERS.values())
    assert found.n_bytes == n_bytes
    assert found.n_tokens == n_bytes + len(rows)
    assert found.nats == pytest.approx(expected, rel=1e-5)
    assert found.loss == pytest.approx(expected / found.n_tokens, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(expected / found.n_tokens), rel=1e-4)
    assert found.bits_per_byte == pytest.approx(expected / math.log(2) / n_bytes, rel=1e-5)


def _bytes(text: bytes) -> list[int]:
    """Ids in the tiny model's vocabulary: its tokens are the characters of GPT-2's alphabet of bytes, sorted."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in kept]
    characters = {byte: chr(byte) for byte in kept} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    return [alphabet.index(characters[byte]) for byte in text]


@pytest.mark.parametrize(("size", "stride"), [(64, None), (16, None), (16, 16), (16, 5), (9, 1)])
def test_a_text_is_as_the_reference_computes_it(
    size: int, stride: int | None, run: Callable[..., Evaluation], theirs: Any
) -> None:
    """Guards the windows: what each token sees, that none is left out or counted twice, and the last, short one."""
    ids = _bytes(TEXT.encode())
    expected, done = 0.0, 1
    for start in range(0, len(ids), stride or size):
        end = min(start + size + 1, len(ids))
        expected += nats_of(theirs, ids[start:end], done - start) if end > done else 0.0
        done = end
    found = run(TEXT, max_seq_len=size, stride=stride, batch_size=3)
    assert found.n_tokens == found.n_bytes == len(ids) - 1
    assert found.nats == pytest.approx(expected, rel=1e-5)


def test_every_window_begins_as_the_tokenizer_begins_a_text(
    directory: Path, tmp_path: Path, registry: Registry, run: Callable[..., Evaluation], theirs: Any
) -> None:
    """Guards models that are lost without BOS: each window has it, and the first token of the text is predicted too."""
    copy = tmp_path / "with-bos"
    copy.mkdir()
    for path in directory.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    backend = tokenizers.Tokenizer.from_file(str(copy / "tokenizer.json"))
    backend.post_processor = tokenizers.processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", 256)])
    backend.save(str(copy / "tokenizer.json"))
    lm = load(copy, precision="32-true", device="cpu", registry=registry)
    ids = _bytes(TEXT.encode())
    found = run(TEXT, on=lm, max_seq_len=20)
    expected = sum(nats_of(theirs, [256, *ids[i : i + 20]], 1) for i in range(0, len(ids), 20))
    assert found.n_tokens == found.n_bytes == len(ids)
    assert found.nats == pytest.approx(expected, rel=1e-5)


def test_token_files_are_read_as_pretraining_validates(
    lm: LanguageModel, tmp_path: Path, registry: Registry, run: Callable[..., Evaluation]
) -> None:
    """Guards that the number is the validation loss that a run has shown, and the choice of ``val.bin``."""
    (tmp_path / "corpus.txt").write_text(TEXT * 6, encoding="utf-8")
    prepare_corpus(resolve_data(str(tmp_path / "corpus.txt"), registry), lm.tokenizer, tmp_path / "tokens")
    tokens = TokenFile.open(tmp_path / "tokens" / "val.bin")
    data = PretrainingData(tokens, tokens, batch_size=1, block_size=32)
    with torch.no_grad():
        sums = [supervised_loss(lm.model, batch) for batch in data.validation(micro_batch_size=4)]
    nats, n = sum(float(loss) for loss, _ in sums), sum(count for _, count in sums)
    for path in (tmp_path / "tokens", tmp_path / "tokens" / "val.bin"):
        found = run(path, max_seq_len=32)
        assert found.n_tokens == n == len(tokens) - 1
        assert found.nats == pytest.approx(nats, rel=1e-5)
    said = lm.tokenizer.decode(tokens.ids[1:].tolist())
    assert found.n_bytes == len(said.encode()) < found.n_tokens  # the text ends with EOS, which has no bytes


@pytest.mark.parametrize("n_before", [0, 1, 2])
@pytest.mark.parametrize("size", [4, 7])
def test_windows_predict_each_token_once(size: int, n_before: int) -> None:
    """Guards every combination of length, stride and beginning against tokens that are lost or counted twice."""
    before = [-1] * n_before
    for n in range(30):
        for stride in range(1, size + 2 - max(1, n_before)):
            made = list(windows(np.arange(n), before, size=size, stride=stride))
            assert len(made) == n_windows(n, n_before=n_before, size=size, stride=stride)
            assert all(len(one) <= size + 1 and not one.supervised[0] for one in made)
            predicted = [token for one in made for token in one.ids[one.supervised].tolist()]
            assert predicted == list(range(0 if before else 1, n))
            for one in made:
                seen = one.ids[n_before:]
                assert one.ids[:n_before].tolist() == before
                assert (np.diff(seen) == 1).all()


def test_bytes_of_what_is_supervised(lm: LanguageModel) -> None:
    """Guards several turns, and special tokens, which are no text."""
    ids = lm.tokenizer.encode("aé<eos>bbü<eos>c")
    supervised = np.zeros(len(ids), bool)
    supervised[1:4] = True  # é and EOS
    supervised[6:9] = True  # ü and EOS
    assert bytes_of_supervised(Encoded(np.array(ids, np.int32), supervised), lm.tokenizer) == 2 + 2
    supervised[5] = True  # b
    assert bytes_of_supervised(Encoded(np.array(ids, np.int32), supervised), lm.tokenizer) == 2 + 3


def test_bytes_of_a_long_file(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards characters that lie across two pieces, each of which would be counted as a replacement character."""
    text = "aéü€🦁" * 30
    ids = np.array(lm.tokenizer.encode(text), np.uint16)
    for size in (1, 3, 7, 64):
        monkeypatch.setattr("zoo.runs.evaluation_data._DECODED_AT_ONCE", size)
        assert bytes_of_tokens(ids, lm.tokenizer) == len(text.encode()) - 1


def test_what_is_longer_than_the_context_is_counted(run: Callable[..., Evaluation], theirs: Any) -> None:
    """Guards against data that is cut or left out without a word, and against its text counting all the same."""
    rows = [
        {"prompt": "p" * 10, "completion": "a"},
        {"prompt": "p" * 10, "completion": "b" * 40},
        {"prompt": "p" * 40, "completion": "c"},
        {"messages": None, "prompt": "p", "completion": "d" * 5},
    ]
    found = run(rows, prompt_style="plain", max_seq_len=32)
    assert found.counts is not None
    counts = {key: found.counts[key] for key in ("n_samples", "n_kept", "n_truncated", "n_cut", "n_masked")}
    assert counts == {"n_samples": 4, "n_kept": 3, "n_truncated": 2, "n_cut": 51 - 32 + 42 - 32, "n_masked": 1}
    assert found.n_bytes == 1 + 22 + 5
    assert found.left_out == "2 cut at 32 tokens, 1 of which nothing learnt is within that"
    assert found.nats == pytest.approx(
        nats_of(theirs, [*_bytes(b"p" * 10 + b"a"), 257], 10)
        + nats_of(theirs, _bytes(b"p" * 10 + b"b" * 22), 10)
        + nats_of(theirs, [*_bytes(b"p" + b"d" * 5), 257], 1),
        rel=1e-5,
    )


@pytest.fixture(scope="module")
def taught(directory: Path, registry: Registry, tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    """A model that knows ANSWERS by heart, and ends them, in the prompt style plain."""
    torch.manual_seed(0)
    lm = load(directory, precision="32-true", device="cpu", registry=registry)
    path = tmp_path_factory.mktemp("taught") / "rows.jsonl"
    rows = [{"prompt": prompt, "completion": answer} for prompt, answer in ANSWERS.items()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    style = choose_prompt_style("plain", lm.tokenizer, registry)
    loaded = load_samples(resolve_data(str(path), registry), val_fraction=0.0)
    data = FinetuningData(encode_samples(loaded.train, style, lm.tokenizer).sequences, batch_size=len(rows))
    parameters = lm.adapt("full").trainable().values()
    optimizer = torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.0)
    for _ in range(120):
        loss, n = supervised_loss(lm.model, collate(data.rows, packed=False))
        (loss / n).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert float(loss.detach()) / n < 0.05
    return lm


def test_exact_answers(taught: LanguageModel, run: Callable[..., Evaluation]) -> None:
    """Guards the comparison: white space at the ends does not count, anything else does; and the batches' order."""
    rows = [{"prompt": prompt, "completion": answer} for prompt, answer in ANSWERS.items()]
    assert _exact(run, taught, rows) == (3, 3, 0, 0)
    assert _exact(run, taught, [{**row, "completion": f"\n{row['completion']}  "} for row in rows]) == (3, 3, 0, 0)
    wrong = [rows[0], {**rows[1], "completion": " gröN"}, {**rows[2], "completion": " bl å"}]
    assert _exact(run, taught, wrong, batch_size=2) == (1, 3, 0, 0)
    shuffled = [{"prompt": rows[i]["prompt"], "completion": rows[j]["completion"]} for i, j in ((0, 1), (1, 0), (2, 2))]
    assert _exact(run, taught, shuffled) == (1, 3, 0, 0)
    talk = [{"messages": _talk("red?", " röd", "green?", " grön")}, {"messages": _talk("red?", " röd")}]
    assert _exact(run, taught, talk)[1] == 2
    assert _exact(run, taught, [*rows, {"messages": None, "prompt": "", "completion": "x"}]) == (3, 3, 0, 1)


def _exact(run: Callable[..., Evaluation], lm: LanguageModel, rows: Any, **options: Any) -> tuple[int, ...]:
    exact = run(rows, on=lm, prompt_style="plain", exact_match=True, **options).exact
    assert exact is not None
    return (exact.n_right, exact.n_asked, exact.n_unfinished, exact.n_not_asked)


def _talk(*said: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]


@pytest.mark.parametrize("style", ["plain", "alpaca", "chatml", "model"])
def test_prompts_are_those_of_training(
    style: str, tmp_path: Path, registry: Registry, run: Callable[..., Evaluation], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against questions that are put in other tokens than the ones that the answers were learnt after."""
    reference.save_tiny_chat_model(tmp_path / "model", max_position_embeddings=400)
    lm = load(tmp_path / "model", precision="32-true", device="cpu", registry=registry)
    rows = [{"instruction": "Add.", "input": "1 2", "output": "3"}, {"instruction": "Hi", "output": "Hello"}]
    asked: list[Request] = []

    def note(requests: Sequence[Request], **options: Any) -> Any:
        asked.extend(requests)
        return iter(())

    monkeypatch.setattr(lm, "run", note)
    run(rows, on=lm, prompt_style=style, exact_match=True)
    chosen = choose_prompt_style(style, lm.tokenizer, registry)
    loaded = load_samples(resolve_data(str(tmp_path / "rows.jsonl"), registry), val_fraction=0.0)
    trained = encode_samples(loaded.train, chosen, lm.tokenizer).sequences
    prompts = [one.ids[: int(one.supervised.argmax())].tolist() for one in trained]
    assert [request.prompt_ids for request in asked] == prompts
    ends = {"plain": "<eos>", "alpaca": "<eos>", "chatml": "<|im_end|>", "model": "<eos>"}
    assert all(request.stop == (ends[style],) and request.stop_ids == {257} for request in asked)
    assert all(request.sampling == SamplingOptions(temperature=0.0) for request in asked)


def test_an_answer_that_is_cut_off_is_not_right(taught: LanguageModel, run: Callable[..., Evaluation]) -> None:
    """Guards against the beginning of a longer answer that passes for a short one."""
    rows = [{"prompt": "red?", "completion": " r"}]
    assert _exact(run, taught, rows, max_new_tokens=2) == (0, 1, 1, 0)
    assert _exact(run, taught, rows) == (0, 1, 0, 0)
    long = [{"prompt": "q" * 62, "completion": "rö"}]
    assert _exact(run, taught, [*rows, *long]) == (0, 1, 0, 1)


def test_a_weight_of_0_is_not_asked(taught: LanguageModel, run: Callable[..., Evaluation]) -> None:
    """Guards against the comparison with an answer that training leaves out."""
    said = _talk("red?", " röd", "green?", " wrong")
    rows = [{"messages": [*said[:3], {**said[3], "weight": 0}]}]
    assert _exact(run, taught, rows) == (1, 1, 0, 0)


def test_the_validation_set_is_taken(run: Callable[..., Evaluation], tmp_path: Path, theirs: Any) -> None:
    """Guards against an evaluation on what was trained on, where the data has a part that was not."""
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 3)
    talks = [_talk("cc", "d"), _talk("nobody answers")]
    (folder / "val.jsonl").write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    found = run(folder, prompt_style="plain")
    assert found.nats == pytest.approx(nats_of(theirs, [*_bytes(b"ccd"), 257], 2), rel=1e-5)
    assert "its validation set" in found.data
    assert found.left_out == "1 without anything to learn"
    rows = [{"prompt": "a", "completion": "b"}] * 2 + [{"prompt": "cc", "completion": "dd"}]
    first = run(rows, max_samples=2, prompt_style="plain")
    assert (first.n_tokens, first.n_bytes) == (4, 2)
    assert "its first 2 samples" in first.data


@pytest.mark.parametrize(
    ("name", "content", "error", "said"),
    [
        ("empty.jsonl", "", FileFormatError, "empty.jsonl is empty"),
        ("empty.txt", "", InputError, "holds no text"),
        ("odd.jsonl", '{"question": "a", "reply": "b"}\n', InputError, "no format has them"),
        ("odd.xml", "<a/>", InputError, "of no kind that zoo reads"),
        ("bad.jsonl", '{"prompt": "a",\n', FileFormatError, "bad.jsonl:1"),
        ("mute.jsonl", '{"messages": [{"role": "user", "content": "a"}]}\n', InputError, "has anything to learn"),
        ("missing.bin", None, InputError, "there is no token file"),
    ],
)
def test_bad_data(
    name: str, content: str | None, error: type[ZooError], said: str, run: Callable[..., Evaluation], tmp_path: Path
) -> None:
    """Guards messages that name the file and what is wrong with it."""
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(error, match=said):
        run(tmp_path / name)


@pytest.mark.parametrize(
    ("data", "options", "said"),
    [
        (TEXT, {"max_samples": 3}, "no samples to count"),
        (TEXT, {"exact_match": True}, "--exact-match is for examples"),
        (TEXT, {"prompt_style": "plain"}, "--prompt-style is for examples"),
        (TEXT, {"max_seq_len": 16, "stride": 17}, "stride must be from 1 to 16"),
        (TEXT, {"max_seq_len": 65}, "beyond the model's context of 64"),
        (TEXT, {"max_seq_len": 1}, "at least 2"),
        (TEXT, {"batch_size": 0}, "at least 1"),
        ("a", {}, "nothing to predict"),
        ([{"prompt": "a", "completion": "b"}], {"stride": 3}, "--stride is for running text"),
        ([{"text": "a b"}], {"exact_match": True}, "no prompt with an answer"),
        ([{"prompt": "a" * 90, "completion": "b"}], {"prompt_style": "plain"}, "every sample is longer than 64"),
        ([{"prompt": "a", "completion": "b"}], {"prompt_style": "plainn"}, "Did you mean 'plain'"),
    ],
)
def test_bad_options(data: Any, options: dict[str, Any], said: str, run: Callable[..., Evaluation]) -> None:
    """Guards options that would be ignored, and numbers that can not be."""
    with pytest.raises(InputError, match=said):
        run(data, **options)


def test_logits_that_are_no_numbers(lm: LanguageModel, run: Callable[..., Evaluation]) -> None:
    """Guards against a perplexity of ``nan`` that is printed as a result."""
    with torch.no_grad():
        next(iter(lm.model.parameters())).fill_(float("nan"))
    with pytest.raises(ZooError, match="no finite numbers"):
        run(TEXT)
