"""The metadata that hold a tokenizer in a GGUF file: byte-level BPE ('gpt2') and sentencepiece-style BPE ('llama')."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import tokenizers

from zoo.errors import InputError
from zoo.text.gguf_tokenizer import split_text, splitting_name
from zoo.text.sentencepiece import BYTE, CONTROL, NORMAL, SPACE, UNKNOWN, UNUSED, USER_DEFINED
from zoo.text.tokenizer import Tokenizer

_ROLES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
_SPACED_PROBES = (
    "a b",
    "  a",
    "a  b ",
    "\t\n a",
    "caf\u00e9 cafe\u0301 \ufb01",
    "1 22 Don't! \u2126 \u00a0\u3000 \U0001f600",
    " ",
)
"""Texts in which a normalizer that does more than mark spaces gives itself away."""
_WHOLE = "llama.cpp's tokenizers can not do that."


def metadata_from_tokenizer(tokenizer: Tokenizer, vocab_size: int) -> dict[str, Any]:
    """The ``tokenizer.*`` metadata with which llama.cpp gives the ids that ``tokenizer`` gives.

    Args:
        tokenizer: of a model.
        vocab_size: rows of its embedding; ids without a token become unused ones.

    Raises:
        InputError: the tokenizer is of a kind, or does something, that llama.cpp has not.
    """
    backend = tokenizer.backend
    data = json.loads(backend.to_str())
    model = data["model"]
    if model["type"] != "BPE":
        raise InputError(f"its tokenizer is of the kind {model['type']}; zoo writes GGUF files with BPE only.")
    _refuse_flags(backend)
    tokens = _tokens(backend, vocab_size)
    merges = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"]]
    found = (
        _sentencepiece(backend, tokens, merges)
        if model.get("byte_fallback")
        else _byte_level(backend, merges, ignore_merges=bool(model.get("ignore_merges")))
    )
    found = {f"tokenizer.ggml.{key}": value for key, value in found.items()}
    found["tokenizer.ggml.tokens"] = tokens
    found["tokenizer.ggml.token_type"] = _types(backend, tokens, model)
    for role, name in _ROLES.items():
        token = tokenizer.special_tokens.get(role)
        if token is not None and backend.token_to_id(token) is not None:
            found[f"tokenizer.ggml.{name}_token_id"] = backend.token_to_id(token)
    return found | _ends(tokenizer) | _templates(tokenizer.config.get("chat_template"))


def _tokens(backend: tokenizers.Tokenizer, vocab_size: int) -> list[str]:
    by_id = {i: token for token, i in backend.get_vocab(with_added_tokens=True).items()}
    beyond = [i for i in by_id if i >= vocab_size]
    if beyond:
        raise InputError(
            f"its tokenizer has {by_id[min(beyond)]!r} with the id {min(beyond)}; the model has {vocab_size} rows."
        )
    return [by_id.get(i, f"[PAD{i}]") for i in range(vocab_size)]


def _types(backend: tokenizers.Tokenizer, tokens: list[str], model: Mapping[str, Any]) -> list[int]:
    added = {i: token.special for i, token in backend.get_added_tokens_decoder().items()}
    known = set(backend.get_vocab(with_added_tokens=True).values())

    def kind(i: int, token: str) -> int:
        if i not in known:
            return UNUSED
        if model.get("byte_fallback") and _BYTE_TOKEN.fullmatch(token):
            return BYTE
        if token == model.get("unk_token"):
            return UNKNOWN
        return NORMAL if i not in added else CONTROL if added[i] else USER_DEFINED

    return [kind(i, token) for i, token in enumerate(tokens)]


def _byte_level(backend: tokenizers.Tokenizer, merges: list[list[str]], *, ignore_merges: bool) -> dict[str, Any]:
    name = splitting_name(backend, ignore_merges=ignore_merges)
    if name is None:
        raise InputError(f"its tokenizer splits text in a way that has no name in llama.cpp: {backend.pre_tokenizer}.")
    return {"model": "gpt2", "pre": name, "merges": [" ".join(merge) for merge in merges]}


def _sentencepiece(backend: tokenizers.Tokenizer, tokens: list[str], merges: list[list[str]]) -> dict[str, Any]:
    """Scores from the order of merges: llama.cpp joins the pair with the best score first, as BPE does by rank."""
    split = ["".join(split_text(backend, probe)) for probe in _SPACED_PROBES]
    marked = [probe.replace(" ", SPACE) for probe in _SPACED_PROBES]
    if split not in (marked, [SPACE + text for text in marked]):
        raise InputError(f"its tokenizer changes text before it splits it: {backend.normalizer}. {_WHOLE}")
    ranks: dict[str, int] = {}
    for merge in merges:
        ranks.setdefault("".join(merge), len(ranks))
    scores = [float(-ranks[token]) if token in ranks else -1e9 for token in tokens]
    return {"model": "llama", "pre": "default", "scores": scores, "add_space_prefix": split != marked}


def _ends(tokenizer: Tokenizer) -> dict[str, bool]:
    """Whether BOS and EOS are put around a text, seen from what the tokenizer does."""
    with_ends, plain = tokenizer.encode("a"), tokenizer.encode("a", add_special_tokens=False)
    at = next((i for i in range(len(with_ends)) if with_ends[i : i + len(plain)] == plain), 0)
    before, after = with_ends[:at], with_ends[at + len(plain) :]
    if before not in ([], [tokenizer.bos_id]) or after not in ([], [tokenizer.eos_id]):
        raise InputError(f"its tokenizer puts the ids {before} before a text and {after} after it. {_WHOLE}")
    return {"tokenizer.ggml.add_bos_token": bool(before), "tokenizer.ggml.add_eos_token": bool(after)}


def _templates(template: Any) -> dict[str, Any]:
    if template is None:
        return {}
    if isinstance(template, str):
        return {"tokenizer.chat_template": template}
    named = {entry["name"]: entry["template"] for entry in template}
    found = {f"tokenizer.chat_template.{name}": text for name, text in named.items() if name != "default"}
    if found:
        found["tokenizer.chat_templates"] = [name for name in named if name != "default"]
    return found | ({"tokenizer.chat_template": named["default"]} if "default" in named else {})


def _refuse_flags(backend: tokenizers.Tokenizer) -> None:
    for token in backend.get_added_tokens_decoder().values():
        flags = [flag for flag in ("lstrip", "rstrip", "single_word") if getattr(token, flag)]
        if flags:
            raise InputError(f"its token {token.content!r} has {' and '.join(flags)} set. {_WHOLE}")
