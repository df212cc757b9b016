"""The tokenizer of a model: ids from text and back, with the special tokens and the chat template it came with."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers.decoders import DecodeStream

from zoo.errors import FileFormatError, InputError
from zoo.text.chat import Message, render_chat
from zoo.text.json_files import read_json_object

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


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
        """Read ``tokenizer.json`` and what lies beside it in a model directory.

        Raises:
            FileFormatError: there is no ``tokenizer.json``, or a file is not valid JSON.
        """
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise FileFormatError(f"{directory} has no tokenizer.json.", fix=_no_tokenizer_remedy(directory))
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # noqa: BLE001 - tokenizers raises no other
            raise FileFormatError(f"{path} is not a valid tokenizer: {error}.") from None
        config = {**_special_tokens_map(directory), **_read_if_there(directory / "tokenizer_config.json")}
        template = directory / "chat_template.jinja"
        if template.is_file():
            config["chat_template"] = template.read_text(encoding="utf-8")
        return cls(backend, config)

    @property
    def special_tokens(self) -> dict[str, str]:
        """The special tokens by role (``bos_token``, ...)."""
        found = {role: _content(self.config.get(role)) for role in SPECIAL_TOKENS}
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
        """Ids of ``text``; special tokens written in it become their ids."""
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

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
        if self.chat_template is None:
            raise InputError(
                "this model has no chat template: it was not trained to chat.",
                fix="Use 'generate', an instruction-tuned model, or give a Jinja template with --chat-template FILE.",
            )
        return render_chat(
            self.chat_template,
            messages,
            special_tokens=self.special_tokens,
            add_generation_prompt=add_generation_prompt,
        )

    def encode_chat(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> list[int]:
        """Ids of a rendered conversation; the template writes its own special tokens, so none are added."""
        rendered = self.render_chat(messages, add_generation_prompt=add_generation_prompt)
        return self.encode(rendered, add_special_tokens=False)

    def save(self, directory: Path) -> None:
        """Write the files that ``transformers`` reads: ``tokenizer.json``, ``tokenizer_config.json``."""
        self.backend.save(str(directory / "tokenizer.json"))
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **self.config}
        text = json.dumps(config, indent=2, ensure_ascii=False)
        (directory / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")

    def _id_of(self, role: str) -> int | None:
        token = self.special_tokens.get(role)
        return None if token is None else self.backend.token_to_id(token)


class TextStream:
    """Turns ids into text piece by piece; a character whose bytes span tokens comes out whole, with its last one."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = DecodeStream(skip_special_tokens=True)
        self._ids: list[int] = []
        self._text = ""

    def push(self, token_id: int) -> str:
        """The text that ``token_id`` completes; may be empty."""
        self._ids.append(token_id)
        piece = self._decoder.step(self._tokenizer.backend, token_id) or ""
        self._text += piece
        return piece

    def finish(self) -> str:
        """What is left: the replacement characters of bytes that never became a character."""
        whole = self._tokenizer.decode(self._ids)
        return whole[len(self._text) :] if whole.startswith(self._text) else ""


def _content(token: Any) -> str | None:
    return token.get("content") if isinstance(token, dict) else token


def _special_tokens_map(directory: Path) -> dict[str, Any]:
    found = _read_if_there(directory / "special_tokens_map.json")
    return {role: _content(found[role]) for role in SPECIAL_TOKENS if role in found}


def _read_if_there(path: Path) -> dict[str, Any]:
    return read_json_object(path) if path.is_file() else {}


def _no_tokenizer_remedy(directory: Path) -> str:
    if (directory / "tokenizer.model").is_file():
        return "It has a sentencepiece tokenizer.model, which transformers' AutoTokenizer can save as tokenizer.json."
    return "Copy the tokenizer.json of the model it came from into it."
