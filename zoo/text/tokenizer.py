"""The tokenizer of a model: ids from text and back, with the special tokens and the chat template it came with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from zoo.errors import InputError, MissingTokenizerError
from zoo.text.chat import Message, render_chat, render_chat_with_replies
from zoo.text.json_files import read_json_object
from zoo.text.tokenizer_files import SPECIAL_TOKENS, content, convert_sentencepiece, read_backend


class Tokenizer:
    """A `tokenizers.Tokenizer` with the content of its ``tokenizer_config.json``.

    Args:
        backend: maps text to ids. Its post-processor decides about BOS and EOS.
        config: special tokens as strings, ``chat_template``, ``model_max_length`` and whatever else the file has.
    """

    def __init__(self, backend: tokenizers.Tokenizer, config: dict[str, Any]) -> None:
        self.backend = backend
        self.config = config

    @classmethod
    def from_directory(cls, directory: Path) -> Tokenizer:
        """Read ``tokenizer.json``, or else ``tokenizer.model``, and what lies beside it in a model directory.

        A ``tokenizer.json`` decides alone about BOS and EOS; ``add_bos_token`` and ``add_eos_token`` in
        ``tokenizer_config.json`` count without one, as in ``transformers``.

        Raises:
            MissingTokenizerError: there is neither.
            FileFormatError: a file is damaged.
            InputError: a sentencepiece model is of a kind that zoo does not rebuild.
        """
        config = {**_special_tokens_map(directory), **_read_if_there(directory / "tokenizer_config.json")}
        if (directory / "tokenizer.json").is_file():
            backend = read_backend(directory / "tokenizer.json")
        elif (directory / "tokenizer.model").is_file():
            backend, config = convert_sentencepiece(directory / "tokenizer.model", config)
        else:
            raise MissingTokenizerError(
                f"{directory} has no tokenizer.json.", fix="Copy the tokenizer.json of the model it came from into it."
            )
        template = directory / "chat_template.jinja"
        if template.is_file():
            config["chat_template"] = template.read_text(encoding="utf-8")
        return cls(backend, config)

    @property
    def special_tokens(self) -> dict[str, str]:
        """The special tokens by role (``bos_token``, ...)."""
        found = {role: content(self.config.get(role)) for role in SPECIAL_TOKENS}
        return {role: token for role, token in found.items() if token is not None}

    @property
    def eos_id(self) -> int | None:
        """Id of the end-of-text token, if there is one."""
        return self._id_of("eos_token")

    @property
    def bos_id(self) -> int | None:
        """Id of the begin-of-text token, if there is one."""
        return self._id_of("bos_token")

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included."""
        return self.backend.get_vocab_size()

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Ids of ``text``; special tokens written in it become their ids.

        Raises:
            InputError: a vocabulary of characters lacks one of them, and has no token for the unknown.
        """
        try:
            return self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        except Exception as error:  # noqa: BLE001 - tokenizers raises no other
            for mark in self.marks:
                text = text.replace(mark, "")
            unknown = "".join(sorted(c for c in set(text) if self.backend.token_to_id(c) is None))
            raise InputError(f"the tokenizer has no tokens for {unknown!r} in the text: {error}.") from None

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of ``ids``."""
        return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def stream(self) -> TextStream:
        """A decoder that takes one id at a time."""
        return TextStream(self)

    @property
    def chat_template(self) -> str | None:
        """The model's own template (the one named ``default`` where it has several)."""
        template = self.config.get("chat_template")
        if isinstance(template, list):
            named = {entry["name"]: entry["template"] for entry in template}
            return named.get("default")
        return template

    def render_chat(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """A conversation as the text that the model was trained on.

        Raises:
            InputError: the tokenizer has no chat template, or the template refuses the messages.
        """
        return render_chat(
            self._template(),
            messages,
            special_tokens=self.special_tokens,
            add_generation_prompt=add_generation_prompt,
        )

    def encode_chat(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> list[int]:
        """Ids of a rendered conversation; the template writes its own special tokens, so none are added."""
        rendered = self.render_chat(messages, add_generation_prompt=add_generation_prompt)
        return self.encode(rendered, add_special_tokens=False)

    def locate(self, texts: Sequence[str]) -> list[tokenizers.Encoding]:
        """Each text's ``ids``, and ``offsets``: from which to which character each lies. No special tokens are added.

        Raises:
            InputError: as `encode`.
        """
        try:
            return self._located.encode_batch(list(texts), add_special_tokens=False)
        except Exception:
            for text in texts:
                self.encode(text, add_special_tokens=False)
            raise

    @cached_property
    def ends(self) -> tuple[list[int], list[int]]:
        """The ids that `encode` puts before and after a text."""
        if self.backend.num_special_tokens_to_add(is_pair=False) == 0:
            return [], []
        encoded = self.backend.encode("0", add_special_tokens=True)
        own = [i for i, added in enumerate(encoded.special_tokens_mask) if not added]
        return encoded.ids[: own[0]], encoded.ids[own[-1] + 1 :]

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the vocabulary: token files and models with the same one speak of the same ids."""
        vocabulary = self.backend.get_vocab(with_added_tokens=True)
        return hashlib.sha256(json.dumps(sorted(vocabulary.items())).encode()).hexdigest()

    @cached_property
    def marks(self) -> tuple[str, ...]:
        """The special tokens of the vocabulary, with or without a role: ``<|im_end|>``, ..."""
        return tuple(token.content for token in self.backend.get_added_tokens_decoder().values() if token.special)

    def encode_chat_with_mask(self, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
        """Ids of a conversation, and for each 1 where the assistant speaks, else 0.

        Raises:
            InputError: as `render_chat`, or the template does not mark what the assistant says.
        """
        text, replies = render_chat_with_replies(self._template(), messages, special_tokens=self.special_tokens)
        encoded = self.locate([text])[0]
        spoken = (any(first < end and last > start for start, end in replies) for first, last in encoded.offsets)
        return encoded.ids, [int(says) for says in spoken]

    def save(self, directory: Path) -> None:
        """Write the files that ``transformers`` reads: ``tokenizer.json``, ``tokenizer_config.json``."""
        self.backend.save(str(directory / "tokenizer.json"))
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **self.config}
        text = json.dumps(config, indent=2, ensure_ascii=False)
        (directory / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")

    def _template(self) -> str:
        if self.chat_template is None:
            raise InputError(
                "this model has no chat template: it was not trained to chat.",
                fix="Use 'generate', an instruction-tuned model, or give a Jinja template with --chat-template FILE.",
            )
        return self.chat_template

    @cached_property
    def _located(self) -> tokenizers.Tokenizer:
        """The backend without its post-processor, which may cut white space from where a token says that it lies."""
        backend = tokenizers.Tokenizer.from_str(self.backend.to_str())
        backend.post_processor = None
        return backend

    def _id_of(self, role: str) -> int | None:
        token = self.special_tokens.get(role)
        return None if token is None else self.backend.token_to_id(token)


class TextStream:
    """Turns ids into text piece by piece; a character whose bytes span tokens comes out whole, with its last one.

    A piece is what the last few ids add to the text of those before them: a decoder may join neighbours (byte
    fallback, word starts), and may even change its mind about bytes that turn out to be no character.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._shown: list[int] = []
        self._waiting: list[int] = []

    def push(self, token_id: int) -> str:
        """The text that ``token_id`` completes; may be empty."""
        self._waiting.append(token_id)
        piece = self._added()
        if not piece or piece.endswith("\ufffd"):
            return ""
        self._shown, self._waiting = self._waiting, []
        return piece

    def finish(self) -> str:
        """What is left: the replacement characters of bytes that never became a character."""
        return self._added()

    def _added(self) -> str:
        before = self._tokenizer.decode(self._shown)
        return self._tokenizer.decode(self._shown + self._waiting)[len(before) :]


def _special_tokens_map(directory: Path) -> dict[str, Any]:
    found = _read_if_there(directory / "special_tokens_map.json")
    return {role: content(found[role]) for role in SPECIAL_TOKENS if role in found}


def _read_if_there(path: Path) -> dict[str, Any]:
    return read_json_object(path) if path.is_file() else {}
