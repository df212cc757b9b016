"""Token files: what is in them, whatever the size of the pieces; and the windows that pretraining draws."""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import trained_tokenizers
from zoo.data import corpus
from zoo.data.batches import IGNORED, Batch
from zoo.data.corpus import write_corpus
from zoo.data.load import DataSource, resolve_data
from zoo.data.prepare import corpus_tokenizer, prepare_corpus
from zoo.data.pretraining import PretrainingData
from zoo.data.token_file import TokenFacts, TokenFile, TokenWriter, facts_path, write_facts
from zoo.errors import FileFormatError, InputError
from zoo.registry import Registry
from zoo.text.new_tokenizers import byte_tokenizer, characters_of, train_bpe
from zoo.text.tokenizer import Tokenizer

EOT = "<|endoftext|>"


def source_of(path: Path, registry: Registry) -> DataSource:
    return resolve_data(str(path), registry)


def written(path: Path) -> list[int]:
    return TokenFile.open(path).ids.tolist()


def a_text(seed: int = 0) -> str:
    """Words, empty lines, indentation and a long line, of a few thousand characters."""
    rng = random.Random(seed)
    lines = ["".join(rng.choices(trained_tokenizers.PARTS, k=rng.randint(0, 9))) for _ in range(250)]
    return "\n".join([*lines, "word " * 300, "", "end"])


MAKERS: dict[str, Callable[[], tokenizers.Tokenizer]] = {
    "lines": lambda: train_bpe(["word\n\n\n\nword\n\n\nword " * 50], 300).backend,
    "byte": lambda: byte_tokenizer().backend,
    "byte_level": trained_tokenizers.byte_level,
    "falcon": lambda: trained_tokenizers.byte_level(trained_tokenizers.falcon_splitting()),
    "sentencepiece": trained_tokenizers.sentencepiece_style,
    "gemma": trained_tokenizers.gemma_style,
}


@pytest.mark.parametrize("name", MAKERS)
def test_pieces_make_up_the_whole(
    name: str, tmp_path: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against ids that depend on where a file that is larger than memory was cut: BOS, spaces, merges."""
    trained_tokenizers.save(tmp_path, MAKERS[name]())
    tokenizer = Tokenizer.from_directory(tmp_path)
    monkeypatch.setattr(corpus, "_PIECE_CHARACTERS", 100)
    monkeypatch.setattr(corpus, "_BATCH", 3)
    (tmp_path / "data").mkdir()
    texts = [a_text(0), a_text(1)]
    for number, text in enumerate(texts):
        (tmp_path / "data" / f"{number}.txt").write_bytes(text.encode())
    report = write_corpus(source_of(tmp_path / "data", registry), tokenizer, tmp_path, val_fraction=0)
    end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    assert written(tmp_path / "train.bin") == [token for text in texts for token in [*tokenizer.encode(text), *end]]
    assert (report.n_documents, report.n_characters) == (2, sum(map(len, texts)))


def test_text_without_line_ends(tmp_path: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards a file of one endless line: it is cut somewhere, and no character is lost."""
    monkeypatch.setattr(corpus, "_PIECE_CHARACTERS", 50)
    monkeypatch.setattr(corpus, "_LONGEST_PIECE", 200)
    trained_tokenizers.save(tmp_path, trained_tokenizers.byte_level())
    tokenizer = Tokenizer.from_directory(tmp_path)
    text = "the weights of caf\u00e9 \u4f60\u597d " * 100
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    write_corpus(source_of(tmp_path / "a.txt", registry), tokenizer, tmp_path, val_fraction=0)
    assert tokenizer.decode(written(tmp_path / "train.bin")) == text


def test_documents_between_separators(tmp_path: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards TinyStories' form: each story is a document, however the file is cut; empty ones are left out."""
    (tmp_path / "a.txt").write_text(f"one\nmore\n{EOT}\n\ntwo\n{EOT}\n{EOT}\nthree\n")
    source = replace(source_of(tmp_path / "a.txt", registry), separator=EOT)
    expected = [*b"one\nmore", 256, *b"two", 256, *b"three", 256]
    for size in (1, 4, 7, 1000):
        monkeypatch.setattr(corpus, "_PIECE_CHARACTERS", size)
        report = write_corpus(source, byte_tokenizer(), tmp_path, val_fraction=0)
        assert written(tmp_path / "train.bin") == expected, size
        assert report.n_documents == 3


def test_rows_are_documents(tmp_path: Path, registry: Registry) -> None:
    """Guards JSON lines with a text, and the message about a row without one."""
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n{"text": "bc"}\n{"body": "d"}\n')
    source = source_of(path, registry)
    with pytest.raises(FileFormatError, match=r"a\.jsonl:3 has no column 'text' with a text; it has 'body'"):
        write_corpus(source, byte_tokenizer(), tmp_path)
    path.write_text('{"body": "a"}\n{"body": "bc"}\n')
    write_corpus(replace(source, columns={"text": "body"}), byte_tokenizer(), tmp_path, val_fraction=0)
    assert written(tmp_path / "train.bin") == [*b"a", 256, *b"bc", 256]


def test_the_split_is_nanogpts(tmp_path: Path, registry: Registry) -> None:
    """Guards 90 to 10: the first int(0.9 n) tokens, as nanoGPT cuts Shakespeare's characters, and its file format."""
    text = a_text()[:1003]
    (tmp_path / "input.txt").write_bytes(text.encode())
    source = source_of(tmp_path / "input.txt", registry)
    report = prepare_corpus(source, corpus_tokenizer("char", source), tmp_path / "out")
    stoi = {character: number for number, character in enumerate(sorted(set(text)))}
    cut = int(0.9 * len(text))
    for name, part in (("train", text[:cut]), ("val", text[cut:])):
        ids = np.fromfile(tmp_path / "out" / f"{name}.bin", dtype=np.uint16)
        assert ids.tolist() == [stoi[character] for character in part]
    assert (report.n_train, report.n_validation, report.eos) == (cut, len(text) - cut, False)
    tokenizer = Tokenizer.from_directory(tmp_path / "out")
    assert tokenizer.decode(written(tmp_path / "out" / "val.bin")) == text[cut:]
    assert TokenFile.open(tmp_path / "out" / "train.bin", tokenizer).facts.sources[0]["bytes"] == len(text.encode())


def test_a_validation_set_of_its_own(tmp_path: Path, registry: Registry) -> None:
    """Guards that it is used whole, and that a vocabulary of characters has those of both."""
    (tmp_path / "train.txt").write_text("abc")
    (tmp_path / "val.txt").write_text("xyz")
    source = source_of(tmp_path, registry)
    report = prepare_corpus(source, corpus_tokenizer("char", source), tmp_path / "out")
    assert (report.n_train, report.n_validation, report.vocab_size) == (3, 3, 6)


def test_a_large_vocabulary_takes_four_bytes(tmp_path: Path) -> None:
    """Guards ids above 65535, which would wrap around."""
    letters = characters_of(chr(i) for i in range(0x10000, 0x10000 + 66_000))
    with TokenWriter(tmp_path / "a.bin", letters) as writer:
        writer.append([65_999, 1])
    assert writer.facts.dtype == "uint32"
    assert written(tmp_path / "a.bin") == [65_999, 1]
    assert TokenFile.open(tmp_path / "a.bin", letters).largest_id() == 65_999


def test_an_interrupted_file_is_no_token_file(tmp_path: Path) -> None:
    """Guards against half a corpus that is taken for the whole."""
    with suppress(KeyboardInterrupt), TokenWriter(tmp_path / "a.bin", byte_tokenizer()) as writer:
        writer.append([1, 2, 3])
        raise KeyboardInterrupt
    assert not facts_path(tmp_path / "a.bin").exists()
    with TokenWriter(tmp_path / "b.bin", byte_tokenizer()) as writer:
        writer.append([1, 2, 3])
    (tmp_path / "b.bin").write_bytes(b"\1\0\2\0")
    with pytest.raises(FileFormatError, match="has 4 bytes, and 3 ids of uint16 take 6"):
        TokenFile.open(tmp_path / "b.bin")


def test_another_tokenizer(tmp_path: Path) -> None:
    """Guards against ids that are read with a vocabulary in which they mean something else."""
    with TokenWriter(tmp_path / "a.bin", characters_of(["abc"])) as writer:
        writer.append([0, 1, 2])
    assert len(TokenFile.open(tmp_path / "a.bin", characters_of(["abc"]))) == 3
    with pytest.raises(InputError, match="was made with another tokenizer"):
        TokenFile.open(tmp_path / "a.bin", characters_of(["abd"]))


def test_nanogpts_file_without_facts(tmp_path: Path) -> None:
    """Guards reading what nanoGPT's prepare.py wrote, and the check that is possible there."""
    np.array([0, 2, 1], dtype=np.uint16).tofile(tmp_path / "train.bin")
    found = TokenFile.open(tmp_path / "train.bin", characters_of(["abc"]))
    assert found.ids.tolist() == [0, 2, 1] and found.facts.tokenizer is None
    with pytest.raises(InputError, match="holds the id 2, and the tokenizer has 2 tokens"):
        TokenFile.open(tmp_path / "train.bin", characters_of(["ab"]))
    (tmp_path / "odd.bin").write_bytes(b"\1\0\2")
    (tmp_path / "empty.bin").write_bytes(b"")
    for name in ("odd", "empty"):
        with pytest.raises(FileFormatError, match=f"{name}.bin has"):
            TokenFile.open(tmp_path / f"{name}.bin")
    with pytest.raises(InputError, match="there is no token file"):
        TokenFile.open(tmp_path / "none.bin")
    facts_path(tmp_path / "train.bin").write_text(json.dumps({"schema": 2}))
    with pytest.raises(FileFormatError, match="does not describe a token file"):
        TokenFile.open(tmp_path / "train.bin")


@pytest.mark.parametrize(
    ("given", "size", "message"),
    [
        (None, None, "a corpus needs a tokenizer"),
        (None, 100, "at least 257 tokens"),
        ("nowhere", None, "no tokenizer 'no"),
    ],
)
def test_tokenizers_that_can_not_be_made(
    given: str | None, size: int | None, message: str, tmp_path: Path, registry: Registry
) -> None:
    (tmp_path / "a.txt").write_text("abc")
    with pytest.raises(InputError, match=message):
        corpus_tokenizer(given, source_of(tmp_path / "a.txt", registry), vocab_size=size)


def test_a_trained_bpe(tmp_path: Path) -> None:
    """Guards its size, that it merges, and that it can write every text."""
    tokenizer = train_bpe([a_text()], 300)
    assert tokenizer.vocab_size == 300
    text = "unseen: \u2603 and the weights"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode(text)) < len(text.encode())
    tokenizer.save(tmp_path)
    assert Tokenizer.from_directory(tmp_path).eos_id == tokenizer.eos_id == tokenizer.encode(EOT)[0]


def token_file(directory: Path, ids: list[int], eos: int | None = None) -> TokenFile:
    np.array(ids, dtype=np.uint16).tofile(directory / "t.bin")
    write_facts(directory / "t.bin", TokenFacts("uint16", len(ids), eos_id=eos))
    return TokenFile.open(directory / "t.bin")


def all_ranks(data: PretrainingData, number: int, world_size: int, micro_batch_size: int) -> list[list[Batch]]:
    options = {"world_size": world_size, "micro_batch_size": micro_batch_size}
    return [data.step(number, rank=rank, **options) for rank in range(world_size)]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(1, 4), st.integers(1, 4), st.integers(0, 3))
def test_windows_are_a_function_of_seed_and_step(
    batch_size: int, world_size: int, micro_batch_size: int, seed: int
) -> None:
    """Guards resuming and ranks: a step has the same windows for every split of the work."""
    with tempfile.TemporaryDirectory() as folder:
        tokens = token_file(Path(folder), list(range(50)))
        data = PretrainingData(tokens, batch_size=batch_size, block_size=8, seed=seed)
        for number in (0, 7):
            ranks = all_ranks(data, number, world_size, micro_batch_size)
            assert len({len(batches) for batches in ranks}) == 1
            batches = [batch for share in ranks for batch in share if batch.n_supervised]
            rows = [row for batch in batches for row in batch.tokens_BT.tolist()]
            again = PretrainingData(tokens, batch_size=batch_size, block_size=8, seed=seed)
            (whole,) = again.step(number, micro_batch_size=batch_size)
            assert sorted(rows) == sorted(whole.tokens_BT.tolist())
            assert all(row == list(range(row[0], row[0] + 8)) for row in rows)
            assert (whole.targets_BT == whole.tokens_BT + 1).all()
            assert sum(batch.n_supervised for batch in batches) == data.n_supervised(number) == 8 * batch_size


def test_windows_begin_everywhere(tmp_path: Path) -> None:
    """Guards the ends: the last token is a target, and the first a beginning."""
    data = PretrainingData(token_file(tmp_path, list(range(12))), batch_size=64, block_size=8)
    starts = {int(start) for number in range(4) for start in data.starts(number)}
    assert starts == {0, 1, 2, 3}
    assert data.starts(0).tolist() != data.starts(1).tolist()
    assert data.steps_per_epoch == 1


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 60), st.integers(1, 20), st.integers(1, 3), st.integers(1, 4))
def test_validation_has_every_target_once(length: int, block_size: int, world_size: int, micro_batch_size: int) -> None:
    """Guards the validation loss of a corpus: all of it, in windows that do not overlap."""
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as other:
        held_out = token_file(Path(folder), list(range(length)))
        train = token_file(Path(other), list(range(50)))
        data = PretrainingData(train, held_out, batch_size=2, block_size=block_size)
        ranks = [
            list(data.validation(rank=rank, world_size=world_size, micro_batch_size=micro_batch_size))
            for rank in range(world_size)
        ]
        assert len({len(batches) for batches in ranks}) == 1
        targets = [batch.targets_BT for batches in ranks for batch in batches]
        assert sorted(int(t) for found in targets for t in found.flatten() if t != IGNORED) == list(range(1, length))
        limited = list(data.validation(micro_batch_size=1, limit=1))
        assert sum(batch.n_supervised for batch in limited) == min(block_size, length - 1)


def test_documents_apart(tmp_path: Path) -> None:
    """Guards positions, document numbers and targets at the borders of documents in a window."""
    tokens = token_file(tmp_path, [1, 2, 9, 3, 4, 5, 9, 6], eos=9)
    data = PretrainingData(tokens, batch_size=1, block_size=7, isolate_documents=True)
    (batch,) = data.step(0)
    assert batch.tokens_BT.tolist() == [[1, 2, 9, 3, 4, 5, 9]]
    assert batch.targets_BT.tolist() == [[2, 9, IGNORED, 4, 5, 9, IGNORED]]
    assert batch.positions_BT is not None and batch.documents_BT is not None
    assert batch.positions_BT.tolist() == [[0, 1, 2, 0, 1, 2, 3]]
    assert batch.documents_BT.tolist() == [[0, 0, 0, 1, 1, 1, 1]]
    assert data.n_supervised(0) == batch.n_supervised == 5
    with pytest.raises(InputError, match="no EOS between documents"):
        PretrainingData(token_file(tmp_path, list(range(20))), batch_size=1, block_size=4, isolate_documents=True)


def test_a_corpus_that_is_too_short(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has 8 tokens, too few for one window of 8") as caught:
        PretrainingData(token_file(tmp_path, list(range(8))), batch_size=1, block_size=8)
    assert caught.value.fix is not None and "--max-seq-len 7" in caught.value.fix
    with pytest.raises(InputError, match="must be at least 1"):
        PretrainingData(token_file(tmp_path, list(range(8))), batch_size=0, block_size=2)
