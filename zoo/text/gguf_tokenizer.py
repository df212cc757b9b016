"""The tokenizer that a GGUF file carries in its metadata, rebuilt as a `tokenizers.Tokenizer`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from zoo.errors import FileFormatError, InputError, MissingTokenizerError
from zoo.text.sentencepiece import BYTE, CONTROL, UNKNOWN, USER_DEFINED, SentencePieceModel, build_backend
from zoo.text.tokenizer import Tokenizer
from zoo.text.tokenizer_files import set_ends

_ROLES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
_CONVERT_INSTEAD = "Convert it from its Hugging Face directory instead, which has the tokenizer itself."

_LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_PATTERN = _LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN_PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DEEPSEEK_CODER_PATTERNS = (
    r"[\r\n]",
    r"\s?\p{L}+",
    r"\s?\p{P}+",
    "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+",
    r"\p{N}",
)


@dataclass(frozen=True)
class _Splitting:
    """How text is cut before BPE. Without ``patterns``: GPT-2's own, which `ByteLevel` has built in."""

    patterns: tuple[str, ...] = ()
    digits: bool = False
    """Each digit is a piece of its own."""
    punctuation: bool = False
    """Runs of punctuation are pieces of their own, and so are runs of digits, cut after every third."""
    nfc: bool = False
    """Text is composed first. llama.cpp leaves this out; the models' own tokenizers do it."""
    ignore_merges: bool = False
    """A piece that is a token is not built from merges."""
    add_bos: bool = False
    """Whether BOS is added when the file does not say."""


_GPT2 = _Splitting()
_NEOX = _Splitting(nfc=True)
_DIGITS = _Splitting(digits=True)
_LLAMA3 = _Splitting(patterns=(_LLAMA3_PATTERN,), ignore_merges=True, add_bos=True)

_SENTENCEPIECE = {"llama": "bpe", "t5": "unigram"}
"""The algorithm by ``tokenizer.ggml.model``."""

_SPLITTINGS = {
    **dict.fromkeys(("gpt-2", "phi-2", "jais"), _GPT2),
    **dict.fromkeys(("mpt", "olmo"), _NEOX),
    **dict.fromkeys(("smollm", "starcoder", "refact", "codeshell"), _DIGITS),
    **dict.fromkeys(
        ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"), _LLAMA3
    ),
    "qwen2": _Splitting(patterns=(_QWEN2_PATTERN,), nfc=True),
    "stablelm2": _Splitting(patterns=(_QWEN2_PATTERN,)),
    "dbrx": _Splitting(patterns=(_LLAMA3_PATTERN,)),
    "falcon": _Splitting(punctuation=True),
    "tekken": _Splitting(patterns=(_TEKKEN_PATTERN,), ignore_merges=True, add_bos=True),
    "deepseek-coder": _Splitting(patterns=_DEEPSEEK_CODER_PATTERNS),
}
"""By ``tokenizer.ggml.pre``, the commonest name first (llama.cpp, ``llama_vocab::impl::load``).

The patterns are those of the models' tokenizer.json.
"""

_PROBE = (
    "Hello  World\n\n \n\t\tI'm We'LL you'RE 1 22 333 4444 55555 3.14,15 a1b2 \u0663\u0664 \u00b2\u00bd camelCaseHTTPServer\r\n"  # noqa: E501
    "caf\u00e9 cafe\u0301 A\u030a \u1e9b\u0323 \ufb01 \u212b na\u00efve \u041f\u0440\u0438\u0432\u0435\u0442\u043c\u0438\u0440 \u4f60\u597d\u4e16\u754c12 \ud55c\uad6d\uc5b4 \u304b\u306a \u0939\u093f\u0928\u094d\u0926\u0940 "  # noqa: E501
    "\U0001f600\U0001f1e9\U0001f1ea !!!??? ...\n//path/to\n (x)=>{y} #a_b __init__ \u2019s \u201cq\u201d $5 100% \u01c5 \u02b0x \u00a0\u3000 \u2028end   "  # noqa: E501
)


def tokenizer_from_gguf(metadata: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer of a GGUF file, with its special tokens and chat template.

    Raises:
        FileFormatError: the file has none, or its parts contradict each other.
        InputError: it is of a kind that zoo does not rebuild, or its text is split in a way that zoo does not know.
    """
    kind = metadata.get("tokenizer.ggml.model")
    if kind is None:
        raise MissingTokenizerError("it has no tokenizer: the metadata key 'tokenizer.ggml.model' is missing.")
    if kind == "gpt2":
        splitting = _splitting(metadata)
        add_bos, add_eos = splitting.add_bos, False
    elif kind in _SENTENCEPIECE:
        add_bos, add_eos = kind == "llama", kind == "t5"
    else:
        raise InputError(
            f"it has a tokenizer of kind {kind!r}, which zoo does not rebuild (only 'gpt2', 'llama' and 't5').",
            fix=_CONVERT_INSTEAD,
        )
    tokens = _tokens(metadata)
    roles = _roles(metadata, tokens)
    if kind == "gpt2":
        backend = _byte_level(metadata, tokens, splitting)
        backend.add_tokens(_added_tokens(metadata, tokens, set(roles.values())))
    else:
        # llama.cpp puts its space before the text after each special token, too.
        backend = build_backend(_sentencepiece(metadata, tokens, _SENTENCEPIECE[kind]), prefix_every_section=True)
        backend.add_special_tokens(list(roles.values()))
    add_bos = bool(metadata.get("tokenizer.ggml.add_bos_token", add_bos))
    add_eos = bool(metadata.get("tokenizer.ggml.add_eos_token", add_eos))
    if add_bos or add_eos:
        set_ends(backend, _end(roles, "bos_token", add_bos), _end(roles, "eos_token", add_eos))
    return Tokenizer(backend, {**_config(metadata), **roles, "add_bos_token": add_bos, "add_eos_token": add_eos})


def _splitting(metadata: Mapping[str, Any]) -> _Splitting:
    if metadata.get("tokenizer.ggml.add_space_prefix"):
        raise InputError(
            "its tokenizer puts a space before the text, which zoo does not do for BPE.", fix=_CONVERT_INSTEAD
        )
    name = metadata.get("tokenizer.ggml.pre")
    if name in (None, "default"):  # an old file; llama.cpp falls back to a splitting that is no model's own
        raise InputError("it does not say how its tokenizer splits text ('tokenizer.ggml.pre').", fix=_CONVERT_INSTEAD)
    if name not in _SPLITTINGS:
        known = ", ".join(sorted(_SPLITTINGS))
        raise InputError(
            f"its tokenizer splits text as {name!r}, which zoo does not know. Known: {known}.", fix=_CONVERT_INSTEAD
        )
    return _SPLITTINGS[name]


def _tokens(metadata: Mapping[str, Any]) -> list[str]:
    """Every token by its id; an empty one gets the name that llama.cpp gives it."""
    tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(_texts(metadata, "tokenizer.ggml.tokens"))]
    if len(set(tokens)) != len(tokens):
        raise FileFormatError(f"its tokenizer has the token {Counter(tokens).most_common(1)[0][0]!r} twice.")
    return tokens


def _texts(metadata: Mapping[str, Any], key: str) -> list[str]:
    texts = metadata.get(key)
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise FileFormatError(f"its tokenizer lacks {key!r}, a list of texts.")
    return texts


def _roles(metadata: Mapping[str, Any], tokens: Sequence[str]) -> dict[str, str]:
    """The special tokens by the names that tokenizer_config.json has for them."""
    roles = {}
    for role, name in _ROLES.items():
        token_id = metadata.get(f"tokenizer.ggml.{name}_token_id")
        if token_id is None:
            continue
        if not isinstance(token_id, int) or not 0 <= token_id < len(tokens):
            raise FileFormatError(f"its {role} has the id {token_id!r}, outside the {len(tokens)} tokens.")
        roles[role] = tokens[token_id]
    return roles


def _sentencepiece(metadata: Mapping[str, Any], tokens: Sequence[str], algorithm: str) -> SentencePieceModel:
    scores, kinds = metadata.get("tokenizer.ggml.scores"), _kinds(metadata, tokens)
    if not kinds or not isinstance(scores, list) or len(scores) != len(tokens):
        raise FileFormatError(f"its tokenizer lacks a score or a type for each of its {len(tokens)} tokens.")
    return SentencePieceModel(
        pieces=tokens,
        scores=scores,
        kinds=kinds,
        algorithm=algorithm,
        unknown_id=metadata.get("tokenizer.ggml.unknown_token_id", 0),
        byte_fallback=BYTE in kinds,
        add_prefix_space=bool(metadata.get("tokenizer.ggml.add_space_prefix", True)),
        remove_extra_spaces=bool(metadata.get("tokenizer.ggml.remove_extra_whitespaces", False)),
        charsmap=bytes(byte & 0xFF for byte in metadata.get("tokenizer.ggml.precompiled_charsmap", [])),
    )


def _kinds(metadata: Mapping[str, Any], tokens: Sequence[str]) -> list[int]:
    """What each token is; empty in old files."""
    kinds: list[int] = metadata.get("tokenizer.ggml.token_type", [])
    if kinds and len(kinds) != len(tokens):
        raise FileFormatError(f"its tokenizer has {len(tokens)} tokens but {len(kinds)} token types.")
    return kinds


def _byte_level(metadata: Mapping[str, Any], tokens: Sequence[str], splitting: _Splitting) -> tokenizers.Tokenizer:
    merges = []
    for merge in _texts(metadata, "tokenizer.ggml.merges"):
        left, space, right = merge[1:].partition(" ")  # the first character may be the space itself
        if not space:
            raise FileFormatError(f"its tokenizer has the merge {merge!r}, which is not two tokens.")
        merges.append((merge[:1] + left, right))
    vocab = {token: i for i, token in enumerate(tokens)}
    try:
        model = models.BPE(vocab=vocab, merges=merges, ignore_merges=splitting.ignore_merges)
    except Exception as error:  # noqa: BLE001 - tokenizers raises no other
        raise FileFormatError(f"its tokenizer is damaged: {error}.") from None
    backend = tokenizers.Tokenizer(model)
    _split_as(backend, splitting)
    backend.decoder = decoders.ByteLevel()
    return backend


def _split_as(backend: tokenizers.Tokenizer, splitting: _Splitting) -> None:
    if splitting.nfc:
        backend.normalizer = normalizers.NFC()
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if splitting.digits else []
    steps += [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in splitting.patterns]
    steps += [pre_tokenizers.Punctuation("contiguous")] if splitting.punctuation else []
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not splitting.patterns))
    if splitting.punctuation:
        steps += [pre_tokenizers.Digits(), pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), "isolated")]
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]


def splitting_name(backend: tokenizers.Tokenizer, *, ignore_merges: bool) -> str | None:
    """The ``tokenizer.ggml.pre`` of a byte-level BPE tokenizer, found by what it does to a text full of hard cases.

    ``None``: it splits text in none of the ways that zoo knows.
    """
    for name, splitting in _SPLITTINGS.items():
        known = tokenizers.Tokenizer(models.BPE())
        _split_as(known, splitting)
        if splitting.ignore_merges == ignore_merges and split_text(known, _PROBE) == split_text(backend, _PROBE):
            return name
    return None


def split_text(backend: tokenizers.Tokenizer, text: str) -> list[str]:
    """The pieces that the model of ``backend`` gets to see."""
    normalized = text if backend.normalizer is None else backend.normalizer.normalize_str(text)
    if backend.pre_tokenizer is None:
        return [normalized]
    return [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(normalized)]


def _added_tokens(metadata: Mapping[str, Any], tokens: Sequence[str], in_roles: set[str]) -> list[AddedToken]:
    """Tokens that are found in the text as they are; those with a role are special whatever their type says."""
    kinds = _kinds(metadata, tokens)
    special = {token for token, kind in zip(tokens, kinds, strict=False) if kind in (UNKNOWN, CONTROL)} | in_roles
    plain = {token for token, kind in zip(tokens, kinds, strict=False) if kind == USER_DEFINED}
    return [
        AddedToken(token, special=token in special, normalized=False)
        for token in tokens
        if token in special or token in plain
    ]


def _end(roles: Mapping[str, str], role: str, wanted: bool) -> str | None:
    if wanted and role not in roles:
        raise FileFormatError(f"its tokenizer adds a {role} but does not say which token that is.")
    return roles[role] if wanted else None


def _config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What tokenizer_config.json says beside the special tokens."""
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    context = metadata.get(f"{metadata.get('general.architecture')}.context_length")
    if context is not None:
        config["model_max_length"] = context
    template = metadata.get("tokenizer.chat_template")
    names = metadata.get("tokenizer.chat_templates", [])
    if names:
        named = {name: metadata.get(f"tokenizer.chat_template.{name}") for name in names}
        several = {"default": template, **named}
        config["chat_template"] = [{"name": n, "template": text} for n, text in several.items() if text is not None]
    elif template is not None:
        config["chat_template"] = template
    return config
