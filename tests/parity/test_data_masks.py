"""What is trained on is what transformers makes of the same template: ids, and the mask of what the assistant says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2
import pytest
import transformers
from tokenizers import AddedToken

from tests import reference, trained_tokenizers
from tests.parity.test_chat_templates import CHATS, MARKED, MARKS, TEMPLATES
from zoo.data.encode import encode_samples
from zoo.registry import Registry
from zoo.text.prompts import choose_prompt_style
from zoo.text.samples import Sample
from zoo.text.tokenizer import Tokenizer

TOKENIZERS = {
    "byte_level": trained_tokenizers.byte_level,
    "sentencepiece": trained_tokenizers.sentencepiece_style,
    "gemma": trained_tokenizers.gemma_style,
}


def load(directory: Path, kind: str, template: str) -> tuple[Tokenizer, Any]:
    """A tokenizer with a template and the marks of all templates as special tokens, in zoo and in transformers."""
    backend = TOKENIZERS[kind]()
    backend.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in MARKS])
    bos = {"bos_token": "<|end|>"} if kind == "byte_level" else {}
    trained_tokenizers.save(directory, backend, chat_template=template, **bos)
    return Tokenizer.from_directory(directory), transformers.AutoTokenizer.from_pretrained(directory)


def whole_characters(mask: list[int], tokenizer: Tokenizer, text: str) -> list[int]:
    """The mask of transformers, which ends with the first token of the last character, to the end of that character."""
    offsets = tokenizer.locate([text])[0].offsets
    found = list(mask)
    for i in range(1, len(found)):
        found[i] = max(found[i], found[i - 1] * (offsets[i] == offsets[i - 1]))
    return found


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("path", MARKED, ids=lambda path: path.stem)
def test_ids_and_mask(path: Path, kind: str, registry: Registry, tmp_path: Path) -> None:
    """Guards the mask by tokens: a shift of one learns the header, or never the end; one BOS, not two."""
    ours, theirs = load(tmp_path, kind, path.read_text(encoding="utf-8"))
    style = choose_prompt_style(None, ours, registry)
    compared = 0
    for name, chat in CHATS.items():
        try:
            expected = theirs.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
        except (jinja2.TemplateError, TypeError):
            continue
        encoded = style.encode(Sample(messages=tuple(chat)), ours)
        assert encoded.ids.tolist() == expected["input_ids"], name
        mask = encoded.supervised.astype(int).tolist()
        text = theirs.apply_chat_template(chat, tokenize=False)
        assert mask == whole_characters(expected["assistant_masks"], ours, text), name
        compared += any(mask)
    assert compared >= 2


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("path", [path for path in TEMPLATES if path not in MARKED], ids=lambda path: path.stem)
def test_ids_without_marks(path: Path, kind: str, registry: Registry, tmp_path: Path) -> None:
    """Guards ids where zoo finds the replies itself, and that what it learns decodes to what was said."""
    ours, theirs = load(tmp_path, kind, path.read_text(encoding="utf-8"))
    style = choose_prompt_style(None, ours, registry)
    chat = [{"role": "user", "content": "The weights?"}, {"role": "assistant", "content": "weights of the model"}]
    expected = theirs.apply_chat_template(chat)["input_ids"]
    data = encode_samples([Sample(messages=tuple(chat))], style, ours)
    encoded = style.encode(Sample(messages=tuple(chat)), ours)
    assert encoded.ids.tolist() == expected
    (trained,) = data.sequences
    assert trained.ids.tolist() == expected[: len(trained)], "what follows the reply is left off"
    said = ours.decode(trained.ids[trained.supervised].tolist()).strip()
    assert said.endswith("weights of the model") or path.stem == "json"
    assert data.report.n_double_bos == 0


def test_the_whole_of_the_byte_tokenizers_alphabet(tmp_path: Path) -> None:
    """Guards offsets in characters, not bytes: a mask that is found by bytes is off after the first accent."""
    template = "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
    template += "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    reference.save_byte_tokenizer(tmp_path, chat_template=template)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours = Tokenizer.from_directory(tmp_path)
    chat = [
        {"role": "user", "content": "\u4f60\u597d \U0001f600"},
        {"role": "assistant", "content": "caf\u00e9 \u4f60"},
    ]
    expected = theirs.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
    ids, mask = ours.encode_chat_with_mask(chat)
    assert ids == expected["input_ids"]
    assert mask == whole_characters(expected["assistant_masks"], ours, "".join(turn["content"] for turn in chat))
    assert sum(mask) == len("caf\u00e9 \u4f60".encode())
