"""Sentencepiece models: what is read of them, what lies beside them, GGUF's form of them, and what is refused."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2 as protobuf

from tests import sentencepiece_files
from tests.sentencepiece_files import KINDS, SPACE
from zoo.errors import FileFormatError, InputError
from zoo.text.gguf_tokenizer import tokenizer_from_gguf
from zoo.text.sentencepiece import read_sentencepiece
from zoo.text.tokenizer import Tokenizer

TEXTS = sentencepiece_files.texts(400, 3)


def parsed(kind: str) -> Any:
    """The model as protobuf's own reader sees it."""
    message = protobuf.ModelProto()
    message.ParseFromString(sentencepiece_files.trained(kind))
    return message


def saved(directory: Path, message: Any, **config: Any) -> Tokenizer:
    """A directory with that model and tokenizer config, opened."""
    (directory / "tokenizer.model").write_bytes(message.SerializeToString())
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer.from_directory(directory)


def metadata_of(kind: str, **changes: Any) -> dict[str, Any]:
    """What llama.cpp's converter writes about a sentencepiece model."""
    message = parsed(kind)
    trainer, normalizer = message.trainer_spec, message.normalizer_spec
    metadata = {
        "model": "llama" if trainer.model_type == 2 else "t5",
        "tokens": [p.piece.replace(SPACE, " ") if p.type == 4 else p.piece for p in message.pieces],
        "scores": [p.score for p in message.pieces],
        "token_type": [p.type for p in message.pieces],
        "eos_token_id": trainer.eos_id,
        "unknown_token_id": trainer.unk_id,
        "add_space_prefix": normalizer.add_dummy_prefix,
        "remove_extra_whitespaces": normalizer.remove_extra_whitespaces,
        "precompiled_charsmap": list(normalizer.precompiled_charsmap),
    }
    metadata |= {"bos_token_id": trainer.bos_id} if trainer.bos_id >= 0 else {}
    return {f"tokenizer.ggml.{key}": value for key, value in (metadata | changes).items() if value is not None}


@pytest.mark.parametrize("kind", KINDS)
def test_fields(kind: str, tmp_path: Path) -> None:
    """Guards the reader of the wire format, against protobuf's: numbers of fields, defaults, negative ids, floats."""
    model, message = read_sentencepiece(sentencepiece_files.write(tmp_path, kind)), parsed(kind)
    assert list(model.pieces) == [p.piece for p in message.pieces]
    assert list(model.scores) == [p.score for p in message.pieces]
    assert list(model.kinds) == [p.type for p in message.pieces]
    trainer, normalizer = message.trainer_spec, message.normalizer_spec
    assert model.algorithm == {1: "unigram", 2: "bpe"}[trainer.model_type]
    assert (model.unknown_id, model.byte_fallback) == (trainer.unk_id, trainer.byte_fallback)
    assert model.add_prefix_space == normalizer.add_dummy_prefix
    assert model.remove_extra_spaces == normalizer.remove_extra_whitespaces
    assert model.charsmap == normalizer.precompiled_charsmap
    roles = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unk", "pad_token": "pad"}
    ids = {role: getattr(trainer, f"{name}_id") for role, name in roles.items()}
    assert dict(model.special_ids) == ids
    assert model.special_tokens == {role: message.pieces[i].piece for role, i in ids.items() if i >= 0}


def test_defaults(tmp_path: Path) -> None:
    """Guards a model that leaves every field at its default: a Unigram with prefix, pieces normal."""
    message = protobuf.ModelProto()
    message.trainer_spec.SetInParent()
    message.normalizer_spec.SetInParent()
    for piece, kind in (("<unk>", 2), ("<s>", 3), ("</s>", 3), (SPACE + "a", 1)):
        message.pieces.add(piece=piece, **({"type": kind} if kind != 1 else {}))
    tokenizer = saved(tmp_path, message)
    assert tokenizer.encode("a a") == [3, 3]
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)


@pytest.mark.parametrize("legacy", [True, False])
def test_space_after_special_tokens(legacy: bool, tmp_path: Path) -> None:
    """Guards ``legacy``: whether text after a special token gets the prefix that the start of a text gets."""
    tokenizer = saved(tmp_path, parsed("llama"), legacy=legacy)
    truth = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    (tmp_path / "bare").mkdir()
    bare = saved(tmp_path / "bare", parsed("llama"), add_prefix_space=False)
    for first, second in itertools.pairwise(TEXTS[1:]):
        after = truth.encode(second) if legacy else bare.encode(second)
        assert tokenizer.encode(f"{first}</s>{second}") == [*truth.encode(first), 2, *after]


def test_tokens_beside_the_model(tmp_path: Path) -> None:
    """Guards chat models that add tokens after the vocabulary: their ids, and whether they show in decoded text."""
    size = len(parsed("llama").pieces)
    entries = {
        str(size + 1): {"content": "<|im_end|>", "special": True, "normalized": False},
        str(size): {"content": "<think>", "special": False, "normalized": False, "lstrip": False},
    }
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<old>": size + 2}))
    tokenizer = saved(
        tmp_path, parsed("llama"), added_tokens_decoder=entries, additional_special_tokens=["<x>"], pad_token="[PAD]"
    )
    ids = tokenizer.encode("<think><|im_end|><old>[PAD]<x>")
    assert ids == [*range(size, size + 5)]
    assert tokenizer.decode(ids) == "<think><old>"
    assert tokenizer.special_tokens["pad_token"] == "[PAD]"
    entries[str(size + 9)] = {"content": "<far>"}
    with pytest.raises(FileFormatError, match=rf"'<far>' can not have the id {size + 9}"):
        saved(tmp_path, parsed("llama"), added_tokens_decoder=entries)


def test_what_a_reader_sees(tmp_path: Path) -> None:
    """Guards decoded text: control pieces vanish, user-defined ones stay."""
    tokenizer = saved(tmp_path, parsed("gemma"))
    assert tokenizer.decode(tokenizer.encode("<bos>a<mask>   b<eos>")) == "a<mask>   b"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model_type": 3}, "of kind 'word'"),
        ({"model_type": 4}, "of kind 'char'"),
        ({"treat_whitespace_as_suffix": True}, "end of a word"),
        ({"escape_whitespaces": False}, "keeps spaces"),
    ],
)
def test_kinds_that_are_not_rebuilt(changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    message = parsed("llama")
    for key, value in changes.items():
        setattr(message.normalizer_spec if key == "escape_whitespaces" else message.trainer_spec, key, value)
    with pytest.raises(InputError, match=rf"tokenizer\.model.*{says}.*tokenizer\.json"):
        saved(tmp_path, message)


@pytest.mark.parametrize(
    "data",
    [b"", b"IQ== 0\nIg== 1\nIw== 2\n", b"\x0a\xff", b"\x0a\x05\x0a\x09ab", b"\x0a\x03\x0a\x01\xff", b"\x0a\x01\x0a"],
    ids=["empty", "tiktoken", "cut", "cut-inside", "no-text", "cut-tag"],
)
def test_damaged(data: bytes, tmp_path: Path) -> None:
    """Guards the message for what is no sentencepiece model, such as a tiktoken vocabulary of the same name."""
    (tmp_path / "tokenizer.model").write_bytes(data)
    with pytest.raises(FileFormatError, match=r"tokenizer\.model is not a sentencepiece model.*tiktoken"):
        Tokenizer.from_directory(tmp_path)


def test_cut_anywhere(tmp_path: Path) -> None:
    """Guards against taking a part of a file for the whole, even where protobuf would: between two fields."""
    data, path = sentencepiece_files.trained("t5"), tmp_path / "tokenizer.model"
    for size in [*range(0, 3000, 7), *range(3000, len(data), 9973)]:
        path.write_bytes(data[:size])
        with pytest.raises(FileFormatError, match="not a sentencepiece model"):
            read_sentencepiece(path)


def test_parts_that_contradict_each_other(tmp_path: Path) -> None:
    message = parsed("t5")
    message.trainer_spec.unk_id = 10**6
    with pytest.raises(FileFormatError, match=r"tokenizer\.model: its sentencepiece model is damaged"):
        saved(tmp_path, message)


@pytest.mark.parametrize("kind", ["llama", "gemma", "t5", "bpe-no-prefix"])
def test_gguf(kind: str, tmp_path: Path) -> None:
    """Guards the same model from a GGUF file: each id, and a prefix after each special token as llama.cpp has it."""
    ours = tokenizer_from_gguf(metadata_of(kind))
    model = saved(tmp_path, parsed(kind), legacy=True)
    for text in TEXTS:
        assert ours.encode(text, add_special_tokens=False) == model.encode(text, add_special_tokens=False), text
        between = f"{text}{ours.special_tokens['eos_token']}{text}"
        assert ours.encode(between, add_special_tokens=False) == model.encode(between, add_special_tokens=False)
    assert ours.special_tokens.items() <= model.special_tokens.items()
    assert ours.config["add_bos_token"] is (kind != "t5")


@pytest.mark.parametrize(
    ("changes", "before", "after"),
    [
        ({}, True, False),
        ({"add_bos_token": False}, False, False),
        ({"add_bos_token": True, "add_eos_token": True}, True, True),
    ],
)
def test_gguf_ends(changes: dict[str, bool], before: bool, after: bool) -> None:
    """Guards BOS, which llama.cpp adds to this kind unless the file says otherwise."""
    ours = tokenizer_from_gguf(metadata_of("llama", **changes))
    plain = ours.encode("hello", add_special_tokens=False)
    assert ours.encode("hello") == [1] * before + plain + [2] * after


@pytest.mark.parametrize("changes", [{"scores": None}, {"scores": [0.0]}, {"token_type": None}])
def test_gguf_without_its_parts(changes: dict[str, Any]) -> None:
    with pytest.raises(FileFormatError, match="lacks a score or a type"):
        tokenizer_from_gguf(metadata_of("llama", **changes))
