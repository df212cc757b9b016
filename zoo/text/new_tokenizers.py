"""Tokenizers that are made here and not read: of bytes, of characters, and trained byte-pair encodings."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from zoo.errors import InputError
from zoo.text.tokenizer import Tokenizer

END_OF_TEXT = "<|endoftext|>"
"""GPT-2's name for the token between documents."""
_CONFIG = {"eos_token": END_OF_TEXT, "clean_up_tokenization_spaces": False}


def byte_tokenizer() -> Tokenizer:
    """One token per byte of UTF-8, whose id is the byte; and `END_OF_TEXT`, 256."""
    backend = tokenizers.Tokenizer(models.BPE({letter: byte for byte, letter in enumerate(_byte_letters())}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([END_OF_TEXT])
    return Tokenizer(backend, dict(_CONFIG))


def character_tokenizer(ids: dict[str, int]) -> Tokenizer:
    """One token per character. Text with any other character can not be encoded."""
    backend = tokenizers.Tokenizer(models.WordLevel(ids, unk_token="<unknown>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    backend.decoder = decoders.Fuse()
    return Tokenizer(backend, {"clean_up_tokenization_spaces": False})


def characters_of(texts: Iterable[str]) -> Tokenizer:
    """The `character_tokenizer` of all characters that occur, in the order of their code points, as nanoGPT's.

    Raises:
        InputError: there are none.
    """
    found: set[str] = set()
    for text in texts:
        found.update(text)
    if not found:
        raise InputError("there is no text to take characters from.")
    return character_tokenizer({character: i for i, character in enumerate(sorted(found))})


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE that splits text as GPT-2's, with `END_OF_TEXT` among its ``vocab_size`` tokens.

    Raises:
        InputError: ``vocab_size`` has no room for the 256 bytes and the end of text.
    """
    if vocab_size < 257:
        raise InputError(f"a BPE needs at least 257 tokens, for 256 bytes and the end of text, not {vocab_size}.")
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return Tokenizer(backend, dict(_CONFIG))


def _byte_letters() -> list[str]:
    """The character that stands for each byte in byte-level vocabularies: itself where it can be seen."""
    visible = set(chain(range(33, 127), range(161, 173), range(174, 256)))
    hidden = (byte for byte in range(256) if byte not in visible)
    others = {byte: chr(256 + number) for number, byte in enumerate(hidden)}
    return [others.get(byte, chr(byte)) for byte in range(256)]
