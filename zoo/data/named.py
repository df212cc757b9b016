"""Data sets that have a name: where each is, and what has to be known to read it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class NamedDataset:
    """What a component of the kind ``dataset`` points to.

    Attributes:
        source: ``https://...`` with the digest of the file, or ``hf:org/name[@revision][#config]``.
        validation: where its own validation split is, if it has one that is a file by itself.
        license: of the data.
        rows: how many examples it has, for a person.
        columns: its columns by the names that the format has for them.
        corpus: whether it is text for pretraining, to become a token file.
        separator: the line that lies between the documents of a text file.
        about: where it is described.
    """

    source: str
    validation: str | None = None
    license: str = ""
    rows: int | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    corpus: bool = False
    separator: str | None = None
    about: str = ""


_ALPACA_LORA = "https://raw.githubusercontent.com/tloen/alpaca-lora/8bb8579e403dc78e37fe81ffbb253c413007323f"
_CHAR_RNN = "https://raw.githubusercontent.com/karpathy/char-rnn/6f9487a6fe5b420b7ca9afb0d7c078e37c1d1b4e"
_TINY_STORIES = "https://huggingface.co/datasets/roneneldan/TinyStories/resolve/main"

ALPACA = NamedDataset(
    source=f"{_ALPACA_LORA}/alpaca_data_cleaned_archive.json#git-blob=862cc5fac6f7bad3f16948117f5985c20349f481",
    license="CC BY-NC 4.0",
    rows=51_759,
    about="https://github.com/tloen/alpaca-lora",
)
ALPACA_STANFORD = NamedDataset(
    source=f"{_ALPACA_LORA}/alpaca_data.json#git-blob=3779ddbc040543ab1834ef216c983d6fcc06cc9a",
    license="CC BY-NC 4.0",
    rows=52_002,
    about="https://github.com/tatsu-lab/stanford_alpaca",
)
ALPACA_GPT4 = NamedDataset(
    source=f"{_ALPACA_LORA}/alpaca_data_gpt4.json#git-blob=25508714b7879a1e5a6764ba7f979a980f549f1a",
    license="CC BY-NC 4.0",
    rows=52_002,
    about="https://github.com/Instruction-Tuning-with-GPT-4/GPT-4-LLM",
)
ALPACA_2K = NamedDataset(source="hf:mhenrichsen/alpaca_2k_test", license="CC BY-NC 4.0", rows=2_000)
DOLLY = NamedDataset(source="hf:databricks/databricks-dolly-15k", license="CC BY-SA 3.0", rows=15_011)
LIMA = NamedDataset(source="hf:GAIR/lima", license="CC BY-NC-SA 4.0, gated", rows=1_030)
DEITA = NamedDataset(
    source="hf:HuggingFaceH4/deita-10k-v0-sft#:train_sft",
    validation="hf:HuggingFaceH4/deita-10k-v0-sft#:test_sft",
    license="MIT",
    rows=9_500,
)
LONGFORM = NamedDataset(
    source="hf:akoksal/LongForm", license="MIT", rows=23_652, columns={"prompt": "input", "completion": "output"}
)
TINY_SHAKESPEARE = NamedDataset(
    source=f"{_CHAR_RNN}/data/tinyshakespeare/input.txt"
    "#sha256=86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    license="public domain",
    corpus=True,
    about="https://github.com/karpathy/char-rnn",
)
TINY_STORIES = NamedDataset(
    source=f"{_TINY_STORIES}/TinyStoriesV2-GPT4-train.txt",
    validation=f"{_TINY_STORIES}/TinyStoriesV2-GPT4-valid.txt",
    license="CDLA-Sharing-1.0",
    corpus=True,
    separator="<|endoftext|>",
    about="https://arxiv.org/abs/2305.07759",
)
OPENWEBTEXT = NamedDataset(source="hf:Skylion007/openwebtext", license="CC0 1.0", rows=8_013_769, corpus=True)
