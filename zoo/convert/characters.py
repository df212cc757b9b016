"""The tokenizer that lies beside a nanoGPT or minGPT file: GPT-2's, or one token per character from ``meta.pkl``."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from zoo.errors import FileFormatError, MissingTokenizerError
from zoo.text.json_files import read_json_object
from zoo.text.new_tokenizers import character_tokenizer
from zoo.text.tokenizer import Tokenizer

_COMPANIONS = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "LICENSE", "LICENSE.txt")


def find_tokenizer(directories: Sequence[Path], vocab_size: int) -> Callable[[], Tokenizer]:
    """What loads the tokenizer in the first directory that has one: a tokenizer.json, meta.pkl or meta.json.

    A vocabulary of characters is read at once, so that a bad one is an error even where no tokenizer is needed.

    Raises:
        FileFormatError: the vocabulary is damaged, or not of ``vocab_size`` characters.
    """
    for directory in directories:
        if (directory / "tokenizer.json").is_file():
            return lambda: Tokenizer.from_directory(directory)
        for path in (directory / "meta.pkl", directory / "meta.json"):
            if path.is_file():
                tokenizer = character_tokenizer(read_vocabulary(path, vocab_size))
                return lambda: tokenizer

    def nothing() -> Tokenizer:
        places = " or ".join(str(directory) for directory in directories)
        raise MissingTokenizerError(
            f"there is no meta.pkl, meta.json or tokenizer.json in {places}.",
            fix="Copy the meta.pkl of the data there; for a model trained on GPT-2's tokens, GPT-2's tokenizer.json.",
        )

    return nothing


def companions(directory: Path) -> tuple[Path, ...]:
    """The files beside the weights that are copied along."""
    return tuple(directory / name for name in _COMPANIONS if (directory / name).is_file())


class _PlainUnpickler(pickle.Unpickler):
    """Builds dicts, lists, strings and numbers; whatever would take a class or a function is refused."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        raise pickle.UnpicklingError(f"it asks for {module_name}.{global_name}")


def read_vocabulary(path: Path, vocab_size: int) -> dict[str, int]:
    """Ids by character, from what nanoGPT's ``prepare.py`` writes (stoi, itos, vocab_size), or its JSON twin.

    Raises:
        FileFormatError: it is damaged, holds code or anything else, or its ids are not 0 to ``vocab_size`` - 1.
    """
    meta = read_json_object(path) if path.suffix == ".json" else _read_plain_pickle(path)
    unknown = meta.keys() - {"stoi", "itos", "vocab_size"}
    if unknown:
        raise FileFormatError(f"{path} has keys that zoo does not understand: {', '.join(sorted(map(str, unknown)))}.")
    stoi = meta.get("stoi")
    if not isinstance(stoi, dict) or not all(isinstance(c, str) and len(c) == 1 for c in stoi):
        raise FileFormatError(f"{path} must hold 'stoi', which maps single characters to ids.")
    if not all(type(i) is int for i in stoi.values()) or sorted(stoi.values()) != list(range(vocab_size)):
        raise FileFormatError(
            f"{path} maps {len(stoi)} characters to ids; the model has {vocab_size} tokens, and each id from 0 to "
            f"{vocab_size - 1} must be there once.",
            fix="Take the meta.pkl of the data that the model was trained on.",
        )
    itos = {int(i): c for i, c in meta["itos"].items()} if isinstance(meta.get("itos"), dict) else None
    if itos is not None and itos != {i: c for c, i in stoi.items()}:
        raise FileFormatError(f"{path} contradicts itself: 'itos' is not 'stoi' the other way round.")
    return stoi


def _read_plain_pickle(path: Path) -> dict[Any, Any]:
    try:
        with path.open("rb") as file:
            content = _PlainUnpickler(file).load()
    except Exception as error:  # noqa: BLE001 - an unpickler raises whatever the bytes make it raise
        raise FileFormatError(f"{path} is no pickle of plain data: {error}. Nothing in it was run.") from None
    if not isinstance(content, dict):
        raise FileFormatError(f"{path} must hold a dict, not a {type(content).__name__}.")
    return content
