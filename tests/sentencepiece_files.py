"""Tiny sentencepiece models, trained on generated text, and texts that tokenizers stumble over."""

from __future__ import annotations

import io
import random
from functools import cache
from pathlib import Path
from typing import Any

import sentencepiece

SPACE = "\u2581"

WORDS = (
    "hello world the quick brown fox it's don't tokenizer lower newest widest internationalization "
    "caf\u00e9 na\u00efve stra\u00dfe \u00c5ngstr\u00f6m \ufb01ne \u0440\u0443\u0441\u0441\u043a\u0438\u0439 "
    "\u043c\u0438\u0440 \u03b5\u03bb\u03bb\u03b7\u03bd\u03b9\u03ba\u03ac \u4f60\u597d\u4e16\u754c "
    "\u65e5\u672c\u8a9e\u306e\u30c6\u30ad\u30b9\u30c8 \ud55c\uad6d\uc5b4 \u0645\u0631\u062d\u0628\u0627 "
    "\u0939\u093f\u0928\u094d\u0926\u0940 \u05e9\u05dc\u05d5\u05dd \u0e44\u0e17\u0e22 ti\u1ebfng "
    "def return lambda x: self.attn(q,k,v) for(int=0;i<n;++i){} != <= -> 0x1F "
    "2024 1,000,000 3.14159 31415926535897932384626433832795 1e-5"
).split()
ODD = (
    "\U0001f600", "\U0001f44d\U0001f3fd", "\U0001f468\u200d\U0001f469\u200d\U0001f467", "\U0001f1fa\U0001f1f8",
    "\u2764\ufe0f", "e\u0301", "o\u0308\u0323", "\u0301", "\x00", "\x07", "\x1b[0m", "\x7f", "\u200b", "\ufeff",
    "\u00a0", "\u2028", "\u3000", "\u00bd", "\u2167", "\ufffd", "\U0001d54f", "\u2581", "'RE",
)  # fmt: skip
GAPS = ("", " ", " ", " ", " ", "  ", "   ", " " * 9, "\n", "\n\n", "\n    ", "\t", "\t\t", "\r\n", ", ", ". ")


def texts(count: int, seed: int = 0, special: tuple[str, ...] = ()) -> list[str]:
    """Words of many scripts, code, emoji, control characters, combining marks, long digits, gaps, special tokens."""
    chance = random.Random(seed)
    found = ["", " ", "  ", "\n", "a", " a", "a ", "  a  ", "\x00", "0" * 40, " " * 33, "\n" * 12, "aaa aaaa aaaaaaa"]
    while len(found) < count:
        parts: list[str] = []
        for _ in range(chance.randint(1, 14)):
            pool = chance.choices((WORDS, ODD, special or WORDS), (8, 2, 1))[0]
            parts += [chance.choice(pool), chance.choice(GAPS)]
        found.append("".join(parts[chance.randint(0, 1) :]))
    return found[:count]


LLAMA = {
    "model_type": "bpe",
    "byte_fallback": True,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "split_digits": True,
    "allow_whitespace_only_pieces": True,
}
GEMMA = LLAMA | {
    "add_dummy_prefix": False,
    "pad_id": 0,
    "eos_id": 1,
    "bos_id": 2,
    "unk_id": 3,
    "bos_piece": "<bos>",
    "eos_piece": "<eos>",
    "user_defined_symbols": ["<mask>", "<start_of_turn>", "<end_of_turn>", "\n\n", "\t\t", "\u2581\u2581\u2581"],
}
T5 = {"model_type": "unigram", "pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
KINDS: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "gemma": GEMMA,
    "t5": T5,
    "bpe-defaults": {"model_type": "bpe"},
    "unigram-bytes": LLAMA | {"model_type": "unigram"},
    "bpe-no-prefix": {"model_type": "bpe", "add_dummy_prefix": False},
}
"""Training options by the model that they resemble."""


@cache
def trained(kind: str) -> bytes:
    """A sentencepiece model trained on words in order of a fixed lottery."""
    chance = random.Random(1)
    lines = [chance.choice(("", "  ", "    ")) + " ".join(chance.choices(WORDS, k=9)) for _ in range(800)]
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=written,
        minloglevel=2,
        num_threads=1,
        vocab_size=700,
        hard_vocab_limit=False,
        character_coverage=0.999,
        **KINDS[kind],
    )
    return written.getvalue()


def write(directory: Path, kind: str) -> Path:
    """Train (once) and write ``tokenizer.model``."""
    path = directory / "tokenizer.model"
    path.write_bytes(trained(kind))
    return path
