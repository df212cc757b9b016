"""Small tokenizers trained on zoo's own documents: byte-level BPE and sentencepiece-style BPE, as model directories."""

from __future__ import annotations

import json
import random
from functools import cache
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

VOCAB_SIZE = 512
PARTS = (
    *("Hello", " world", "  ", "\n", "\n\n", "\t", " I'm", "WE'LL", " 123", "45678", "3.14", "a_b", "camelCase", "..."),
    *(
        " //x",
        "(y)=>{",
        "\u00e9",
        "caf\u00e9",
        " na\u00efve",
        "\u041f\u0440\u0438",
        "\u4f60\u597d",
        "\ud55c",
        "\U0001f600",
    ),
    *("\u2019s", " $5", "100%", "!", " z", "Q", "\u00a0", "\r\n", " --", "#", "\u00df", "<|end|>", "the ", "weights"),
)


def texts(count: int = 300) -> list[str]:
    """Strings full of hard cases, and the empty one."""
    rng = random.Random(0)
    return ["", *("".join(rng.choices(PARTS, k=rng.randint(1, 10))) for _ in range(count))]


@cache
def _corpus() -> list[str]:
    docs = Path(__file__).parents[1] / "docs"
    return [line for path in sorted(docs.glob("*.md")) for line in path.read_text(encoding="utf-8").splitlines(True)]


def byte_level(
    pre_tokenizer: Any = None, normalizer: Any = None, *, ignore_merges: bool = False
) -> tokenizers.Tokenizer:
    """Byte-level BPE of `VOCAB_SIZE` tokens, ``<|end|>`` (0) among them; text is split as by GPT-2 unless told."""
    backend = tokenizers.Tokenizer(models.BPE(ignore_merges=ignore_merges))
    backend.pre_tokenizer = pre_tokenizer or pre_tokenizers.ByteLevel(add_prefix_space=False)
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(_corpus(), trainer)
    return backend


def falcon_splitting() -> Any:
    """How Falcon's tokenizer splits text."""
    steps = [
        pre_tokenizers.Punctuation("contiguous"),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        pre_tokenizers.Digits(individual_digits=False),
        pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), "isolated"),
    ]
    return pre_tokenizers.Sequence(steps)


def sentencepiece_style() -> tokenizers.Tokenizer:
    """What Llama 2 has: bytes for unknown characters, spaces marked, a space before the text, ``<s>`` in front."""
    backend = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    octets = [f"<0x{i:02X}>" for i in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<unk>", "<s>", "</s>", *octets],
        show_progress=False,
        max_token_length=8,
    )
    backend.train_from_iterator((word for line in _corpus() for word in line.split()), trainer)
    content = json.loads(backend.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] not in octets]
    backend = tokenizers.Tokenizer.from_str(json.dumps(content))
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", pair=None, special_tokens=[("<s>", 1)])
    return backend


def gemma_style() -> tokenizers.Tokenizer:
    """As `sentencepiece_style`, without a space before the text: what Gemma has."""
    backend = sentencepiece_style()
    backend.normalizer = normalizers.Replace(" ", "\u2581")
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    return backend


def save(directory: Path, backend: tokenizers.Tokenizer, **config: Any) -> None:
    """``tokenizer.json`` and ``tokenizer_config.json``."""
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    known = special if backend.token_to_id("<s>") is not None else {"eos_token": "<|end|>"}
    backend.save(str(directory / "tokenizer.json"))
    written = {"tokenizer_class": "PreTrainedTokenizerFast", **known, **config}
    (directory / "tokenizer_config.json").write_text(json.dumps(written))
