"""The files that a `tokenizers.Tokenizer` is made from, and the tokens it puts at the ends of a text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, processors

from zoo.errors import FileFormatError
from zoo.text.json_files import read_json_object
from zoo.text.sentencepiece import build_backend, read_sentencepiece

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""The roles that a special token can have."""


def read_backend(path: Path) -> tokenizers.Tokenizer:
    """A ``tokenizer.json``.

    Raises:
        FileFormatError: it is damaged.
    """
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # noqa: BLE001 - tokenizers raises no other
        raise FileFormatError(f"{path} is not a valid tokenizer: {error}.") from None


def convert_sentencepiece(path: Path, config: Mapping[str, Any]) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    """A ``tokenizer.model`` with the tokens that the files beside it add, and the config that goes with it.

    Args:
        path: the sentencepiece model.
        config: the content of ``tokenizer_config.json``. ``add_prefix_space`` outranks the model, ``legacy`` puts a
            space before the text after each special token, ``add_bos_token`` and ``add_eos_token`` add them.

    Raises:
        FileFormatError: a file is damaged, or an added token has an id that it can not have.
        InputError: the model is of a kind that zoo does not rebuild.
    """
    model = read_sentencepiece(path)
    if config.get("add_prefix_space") is not None:
        model = replace(model, add_prefix_space=config["add_prefix_space"])
    # As transformers does: T5's ignores `legacy`, Llama's takes it for false unless it is given.
    legacy = model.algorithm == "unigram" or bool(config.get("legacy"))
    try:
        backend = build_backend(model, prefix_every_section=legacy)
    except FileFormatError as error:
        raise FileFormatError(f"{path}: {error.message}") from None
    # The class that the config names would build its own tokenizer from the vocabulary.
    config = {**model.special_tokens, **config, "tokenizer_class": "PreTrainedTokenizerFast"}
    for token_id, token in sorted(_added_tokens(path.parent, config).items()):
        backend.add_tokens([token])
        if backend.token_to_id(token.content) != token_id:
            raise FileFormatError(
                f"{path.parent}: the added token {token.content!r} can not have the id {token_id}; "
                f"it would get {backend.token_to_id(token.content)}."
            )
    in_roles = [content(config.get(role)) for role in SPECIAL_TOKENS]
    more = [content(token) for token in config.get("additional_special_tokens") or []]
    backend.add_special_tokens([token for token in (*in_roles, *more) if token is not None])
    bos, eos = (content(config.get(role)) if config.get(f"add_{role}") else None for role in ("bos_token", "eos_token"))
    if bos is not None or eos is not None:
        set_ends(backend, bos, eos)
    return backend, config


def set_ends(backend: tokenizers.Tokenizer, bos: str | None, eos: str | None) -> None:
    """Make ``backend`` put these tokens, and no others, before and after each text."""
    ends = [(token, backend.token_to_id(token)) for token in (bos, eos) if token is not None]
    before, after = [bos] if bos is not None else [], [eos] if eos is not None else []
    single = [f"{piece}:0" for piece in (*before, "$A", *after)]
    second = [f"{piece}:1" for piece in (*before, "$B", *after)]
    backend.post_processor = processors.TemplateProcessing(single=single, pair=single + second, special_tokens=ends)


def content(token: Any) -> str | None:
    """The text of a special token, which files hold as a string or as an object."""
    return token.get("content") if isinstance(token, dict) else token


def _added_tokens(directory: Path, config: Mapping[str, Any]) -> dict[int, AddedToken]:
    """Tokens beside the sentencepiece model by id, from tokenizer_config.json and the older added_tokens.json."""
    older = directory / "added_tokens.json"
    found = {i: AddedToken(token) for token, i in (read_json_object(older) if older.is_file() else {}).items()}
    for token_id, entry in config.get("added_tokens_decoder", {}).items():
        flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
        found[int(token_id)] = AddedToken(entry["content"], **{flag: entry[flag] for flag in flags if flag in entry})
    return found
