"""Tokenizers rebuilt from GGUF metadata give the ids of the tokenizers that the metadata were written from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tests import gguf_files
from zoo.convert.gguf import GGUF
from zoo.errors import FileFormatError, InputError
from zoo.registry import Registry
from zoo.text.gguf_tokenizer import tokenizer_from_gguf
from zoo.text.tokenizer import Tokenizer

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
CONTROLS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
USER_TOKENS = ["  ", "\n\n", "<think>"]

TEXTS = [
    "",
    "Hello world, it's 2024: we'll see 1,000,000 things, can't we?",
    "I'VE seen 'RE and 'Ll, a'lL",
    "  leading,   inner\t\ttabs and trailing   ",
    "line\r\n\r\n\nnext\n  indented\n",
    "def f(x: int) -> str:\n    return f'{x:04d}'  # 0x1F\n",
    "Caf\u00e9 cafe\u0301 \u00c5ngstro\u0308m \ufb01",
    "\u4f60\u597d\uff0c\u4e16\u754c\uff01 \u65e5\u672c\u8a9e\u306e\u30c6\u30ad\u30b9\u30c8 \ud55c\uad6d\uc5b4",
    "\u0420\u043e\u0441\u0441\u0438\u044f \u0645\u0631\u062d\u0628\u0627 \u0968\u0969 \u00bd \u2167 \u00b2",
    "\U0001f600\U0001f44d\U0001f3fd\U0001f1fa\U0001f1f8\u2764\ufe0f",
    "\x00\x01\x1f\x7f \u00a0\u200b\u2028\ufeff",
    "<|im_start|>user\nHi<|im_end|> <think>a</think><|endoftext|><|im_",
    "____---===...!!!''''\"\"",
    "http://a.b/c?d=1&e=%20",
]
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def original(pre: str) -> tokenizers.Tokenizer:
    """A trained byte-level BPE that splits text as the original tokenizer behind ``pre`` does."""
    backend = tokenizers.Tokenizer(models.BPE(ignore_merges=pre == "llama-bpe"))
    splitters: dict[str, Any] = {
        "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
        "smollm": pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        ),
        "llama-bpe": pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(LLAMA3), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        ),
    }
    backend.pre_tokenizer = splitters["gpt-2" if pre in ("olmo", "mpt") else pre]
    if pre in ("olmo", "mpt"):
        backend.normalizer = normalizers.NFC()
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in CONTROLS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS * 4, trainer)
    backend.add_tokens([AddedToken(token, normalized=False) for token in USER_TOKENS])
    return backend


def metadata_of(backend: tokenizers.Tokenizer, pre: str, **changes: Any) -> dict[str, Any]:
    """What llama.cpp's converter writes about a byte-level BPE tokenizer."""
    model = json.loads(backend.to_str())["model"]
    tokens = sorted(backend.get_vocab(), key=backend.get_vocab().__getitem__)
    kinds = [CONTROL if t in CONTROLS else USER_DEFINED if t in USER_TOKENS else NORMAL for t in tokens]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": [" ".join(merge) for merge in model["merges"]],
        "tokenizer.ggml.bos_token_id": tokens.index("<|im_start|>"),
        "tokenizer.ggml.eos_token_id": tokens.index("<|im_end|>"),
        "tokenizer.ggml.add_bos_token": False,
    }
    metadata |= {f"tokenizer.{key.replace('__', '.')}": value for key, value in changes.items()}
    return {key: value for key, value in metadata.items() if value is not None}


def rebuilt(pre: str = "gpt-2", **changes: Any) -> Tokenizer:
    return tokenizer_from_gguf(metadata_of(original(pre), pre, **changes))


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "olmo", "mpt", "llama-bpe"])
def test_same_ids(pre: str) -> None:
    """Guards the splitting, the merges and their order, the special and user-defined tokens, the normalizer."""
    theirs, ours = original(pre), rebuilt(pre)
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text).ids, text
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text).ids)
    assert ours.vocab_size == theirs.get_vocab_size()


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("gpt-2", "it's 2024\n\n x", ["it", "'s", "\u01202024", "\u010a\u010a", "\u0120x"]),
        ("smollm", "it's 2024\n\n x", ["it", "'s", "\u0120", "2", "0", "2", "4", "\u010a\u010a", "\u0120x"]),
        ("llama-bpe", "IT'S 2024\n\n x", ["IT", "'S", "\u0120", "202", "4", "\u010a\u010a", "\u0120x"]),
        ("qwen2", "IT'S 24\n\n x", ["IT", "'S", "\u0120", "2", "4", "\u010a\u010a", "\u0120x"]),
        ("stablelm2", "IT'S 24\n\n x", ["IT", "'S", "\u0120", "2", "4", "\u010a\u010a", "\u0120x"]),
        ("dbrx", "IT'S 2024\n\n x", ["IT", "'S", "\u0120", "202", "4", "\u010a\u010a", "\u0120x"]),
        ("falcon", "a's?! $20245 1", ["a", "'", "s", "?!", "\u0120", "$", "202", "45", "\u0120", "1"]),
        ("tekken", "aBC'S 24/\n/ x", ["a", "BC", "'S", "\u0120", "2", "4", "/\u010a/", "\u0120x"]),
        (
            "deepseek-coder",
            "a b12, \n\u4f60",
            ["a", "\u0120b", "1", "2", ",", "\u0120", "\u010a", "\u00e4\u00bd\u0142"],
        ),
    ],
)
def test_pieces(pre: str, text: str, pieces: list[str]) -> None:
    """Guards each pattern by what it cuts."""
    metadata = metadata_of(original("gpt-2"), pre)
    splitter = tokenizer_from_gguf(metadata).backend.pre_tokenizer
    assert [piece for piece, _ in splitter.pre_tokenize_str(text)] == pieces


@pytest.mark.parametrize(("pre", "whole"), [("llama-bpe", True), ("gpt-2", False)])
def test_a_token_that_no_merge_builds(pre: str, whole: bool) -> None:
    """Guards `ignore_merges`: Llama 3 has tokens that only a whole piece can become."""
    metadata = metadata_of(original("gpt-2"), pre)
    metadata["tokenizer.ggml.tokens"].append("zqxjk")
    metadata["tokenizer.ggml.token_type"].append(NORMAL)
    ours = tokenizer_from_gguf(metadata)
    assert (ours.encode("zqxjk") == [ours.backend.token_to_id("zqxjk")]) is whole


def test_special_and_user_defined_tokens() -> None:
    """Guards which tokens vanish from decoded text: control tokens, and not those that a user would miss."""
    ours = rebuilt()
    ids = ours.encode("<|im_start|>a<think>b<|im_end|>")
    assert [ours.backend.id_to_token(i) for i in ids] == ["<|im_start|>", "a", "<think>", "b", "<|im_end|>"]
    assert ours.decode(ids) == "a<think>b"
    assert ours.special_tokens == {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}


def test_tokens_with_a_role_are_special_without_types() -> None:
    """Guards old files, which have no token types: an end-of-text that is cut into pieces never ends a text."""
    ours = rebuilt(ggml__token_type=None, ggml__unknown_token_id=0, ggml__padding_token_id=0)
    assert ours.encode("a<|im_end|>")[-1] == ours.eos_id
    assert ours.decode(ours.encode("a<|im_end|>")) == "a"
    assert ours.special_tokens["unk_token"] == ours.special_tokens["pad_token"] == "<|endoftext|>"


@pytest.mark.parametrize(
    ("pre", "flags", "before", "after"),
    [
        ("gpt-2", {}, False, False),
        ("gpt-2", {"ggml__add_bos_token": True}, True, False),
        ("gpt-2", {"ggml__add_bos_token": True, "ggml__add_eos_token": True}, True, True),
        ("gpt-2", {"ggml__add_eos_token": True}, False, True),
        ("gpt-2", {"ggml__add_bos_token": None}, False, False),
        ("llama-bpe", {"ggml__add_bos_token": None}, True, False),
        ("llama-bpe", {"ggml__add_bos_token": False}, False, False),
    ],
)
def test_bos_and_eos(pre: str, flags: dict[str, bool | None], before: bool, after: bool) -> None:
    ours = rebuilt(pre, **flags)
    plain = ours.encode("Hello", add_special_tokens=False)
    assert ours.encode("Hello") == [ours.bos_id] * before + plain + [ours.eos_id] * after
    pair = ours.backend.encode("Hello", "Hello").ids
    assert pair == ours.encode("Hello") * 2
    assert (ours.config["add_bos_token"], ours.config["add_eos_token"]) == (before, after)


@pytest.mark.parametrize("add_bos", [False, True])
@pytest.mark.parametrize("pre", ["smollm", "llama-bpe", "olmo"])
def test_transformers_loads_what_is_saved(pre: str, add_bos: bool, tmp_path: Path) -> None:
    """Guards the two files that an exported model directory holds."""
    template = "{% for m in messages %}{{ bos_token }}{{ m['content'] }}{% endfor %}"
    ours = rebuilt(pre, ggml__add_bos_token=add_bos, chat_template=template)
    ours.save(tmp_path)
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    for text in TEXTS:
        assert theirs.encode(text) == ours.encode(text), text
        assert theirs.decode(theirs.encode(text)) == ours.decode(ours.encode(text), skip_special_tokens=False)
    assert (theirs.bos_token, theirs.eos_token) == ("<|im_start|>", "<|im_end|>")
    messages = [{"role": "user", "content": "Hi"}]
    assert theirs.apply_chat_template(messages, tokenize=False) == ours.render_chat(messages) == "<|im_start|>Hi"


def test_config() -> None:
    metadata = metadata_of(original("gpt-2"), "gpt-2", chat_template="A")
    metadata |= {"general.architecture": "gpt2", "gpt2.context_length": 1024}
    config = tokenizer_from_gguf(metadata).config
    assert config["model_max_length"] == 1024
    assert config["chat_template"] == "A"
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_several_chat_templates() -> None:
    ours = rebuilt(chat_template="A", chat_templates=["tool_use"], chat_template__tool_use="B")
    assert ours.config["chat_template"] == [
        {"name": "default", "template": "A"},
        {"name": "tool_use", "template": "B"},
    ]
    assert ours.chat_template == "A"


def test_empty_and_unused_tokens() -> None:
    """Guards padding of the vocabulary: ids stay what the file says."""
    metadata = metadata_of(original("gpt-2"), "gpt-2")
    count = len(metadata["tokenizer.ggml.tokens"])
    metadata["tokenizer.ggml.tokens"] += ["", "[PAD1]"]
    metadata["tokenizer.ggml.token_type"] += [UNUSED, UNUSED]
    ours = tokenizer_from_gguf(metadata)
    assert ours.vocab_size == count + 2
    assert ours.backend.token_to_id(f"[EMPTY_{count}]") == count
    assert count + 1 not in ours.encode("[PAD1]")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"ggml__model": "bert"}, "'bert'.*'gpt2', 'llama' and 't5'.*Hugging Face directory"),
        ({"ggml__pre": "a-new-one"}, "'a-new-one'.*gpt-2, .*smollm"),
        ({"ggml__pre": None}, r"tokenizer\.ggml\.pre"),
        ({"ggml__pre": "default"}, r"tokenizer\.ggml\.pre"),
        ({"ggml__add_space_prefix": True}, "space"),
    ],
)
def test_kinds_that_are_not_rebuilt(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        rebuilt(**changes)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"ggml__model": None}, r"tokenizer\.ggml\.model"),
        ({"ggml__tokens": None}, r"tokenizer\.ggml\.tokens"),
        ({"ggml__tokens": ["a", "b", "a"]}, "'a' twice"),
        ({"ggml__tokens": [1, 2]}, r"tokenizer\.ggml\.tokens"),
        ({"ggml__merges": None}, r"tokenizer\.ggml\.merges"),
        ({"ggml__merges": ["ab"]}, "'ab'"),
        ({"ggml__merges": ["no-such token"]}, "damaged"),
        ({"ggml__token_type": [1, 2]}, "2 token types"),
        ({"ggml__eos_token_id": 10**6}, "eos_token"),
        ({"ggml__add_bos_token": True, "ggml__bos_token_id": None}, "bos_token"),
    ],
)
def test_damaged(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(FileFormatError, match=says):
        rebuilt(**changes)


def test_from_a_file(tmp_path: Path, registry: Registry) -> None:
    """Guards the way through a file: texts, lists and flags come back as they were."""
    backend = original("smollm")
    checkpoint = GGUF().open(
        gguf_files.write_llama(tmp_path / "m.gguf", metadata=metadata_of(backend, "smollm")), registry
    )
    ours = checkpoint.load_tokenizer()
    assert [ours.encode(text) for text in TEXTS] == [backend.encode(text).ids for text in TEXTS]


@pytest.mark.parametrize("kinds", [[], ["tokenizer.ggml.model"]])
def test_a_file_without_one(kinds: Sequence[str], tmp_path: Path, registry: Registry) -> None:
    """Guards that the weights of such a file are still read, and that the error names it."""
    path = gguf_files.write_llama(tmp_path / "m.gguf", metadata=dict.fromkeys(kinds, "rwkv"))
    checkpoint = GGUF().open(path, registry)
    assert list(checkpoint.parameters())
    with pytest.raises(InputError, match=r"m\.gguf.*('rwkv'|has no tokenizer)"):
        checkpoint.load_tokenizer()
