"""Rendered conversations, their ids and the masks of replies equal those of transformers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import jinja2
import pytest
import transformers
from tokenizers import AddedToken

from tests import reference
from zoo.errors import InputError
from zoo.text.chat import Message
from zoo.text.tokenizer import Tokenizer

OWN = Path(__file__).parent.parent / "data" / "chat_templates"
REAL = os.environ.get("ZOO_CHAT_TEMPLATES")
TEMPLATES = sorted(OWN.glob("*.jinja")) + (sorted(Path(REAL).glob("*.jinja")) if REAL else [])
MARKED = [path for path in TEMPLATES if "endgeneration" in path.read_text(encoding="utf-8")]

TURNS: list[Message] = [
    {"role": "user", "content": "Hi <b>1 & 2</b> 'quoted' \"twice\"\n"},
    {"role": "assistant", "content": "  <think>\nHm.\n</think>\n\nYes \u2014 \U0001f600 {{ not }} "},
    {"role": "user", "content": "  and\n\nthen? \u4f60\u597d"},
    {"role": "assistant", "content": "Then e\u0301 \U0001f44d\U0001f3fd\nno more."},
    {"role": "user", "content": "Bye <|im_end|>"},
]
SYSTEM: Message = {"role": "system", "content": " Be brief. "}
CHATS: dict[str, list[Message]] = {
    "one": TURNS[:1],
    "turns": TURNS,
    "answered": TURNS[:4],
    "system": [SYSTEM, *TURNS[:3]],
    "system-answered": [SYSTEM, *TURNS[:2]],
    "two-users": [TURNS[0], TURNS[2]],
    "unknown-role": [TURNS[0], {"role": "critic", "content": "Tut."}],
    "a-key-without-value": [{**TURNS[0], "name": None, "tool_calls": None}],
    "no-content": [{"role": "user"}],
}

MARKS = "<|im_start|> <|im_end|> <|end|> <|eot_id|> <|assistant|> <end_of_turn> [INST] [/INST]".split()


def load(directory: Path, template: str) -> tuple[Tokenizer, Any]:
    """The byte tokenizer with a template, in zoo and in transformers."""
    reference.save_byte_tokenizer(directory, chat_template=template)
    return Tokenizer.from_directory(directory), transformers.AutoTokenizer.from_pretrained(directory)


@pytest.mark.parametrize("prompt", [True, False], ids=["prompt", "whole"])
@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_text_and_ids(path: Path, prompt: bool, tmp_path: Path) -> None:
    """Guards the Jinja environment (trimming, filters, globals, blocks), the special tokens, and what is refused."""
    ours, theirs = load(tmp_path, path.read_text(encoding="utf-8"))
    rendered = 0
    for name, chat in CHATS.items():
        expected, refusal = None, ""
        try:
            expected = theirs.apply_chat_template(chat, add_generation_prompt=prompt, tokenize=False)
        except (jinja2.TemplateError, TypeError) as error:
            refusal = str(error)
        if expected is None:
            with pytest.raises(InputError) as refused:
                ours.render_chat(chat, add_generation_prompt=prompt)
            assert refusal in str(refused.value)
            continue
        rendered += 1
        assert ours.render_chat(chat, add_generation_prompt=prompt) == expected, name
        ids = theirs.apply_chat_template(chat, add_generation_prompt=prompt)["input_ids"]
        assert ours.encode_chat(chat, add_generation_prompt=prompt) == ids, name
    assert rendered >= 3


def test_an_empty_conversation(tmp_path: Path) -> None:
    """Guards the refusal: a template may render nothing, or the date, from no messages."""
    ours, theirs = load(tmp_path, "{{ bos_token }}")
    with pytest.raises(ValueError, match="empty conversation"):
        theirs.apply_chat_template([], tokenize=False)
    with pytest.raises(InputError, match="at least one message"):
        ours.render_chat([])


@pytest.mark.parametrize("path", MARKED, ids=lambda path: path.stem)
@pytest.mark.parametrize("chat", ["turns", "answered", "system", "one"])
def test_mask_of_replies(path: Path, chat: str, tmp_path: Path) -> None:
    """Guards where replies begin and end, by tokens: a shift of one trains on the header, or never on the end."""
    ours, theirs = load(tmp_path, path.read_text(encoding="utf-8"))
    for tokenizer in (ours.backend, theirs._tokenizer):
        tokenizer.add_tokens([AddedToken(mark, special=True, normalized=False) for mark in MARKS])
    try:
        expected = theirs.apply_chat_template(CHATS[chat], return_dict=True, return_assistant_tokens_mask=True)
    except jinja2.TemplateError:
        pytest.skip("the template refuses this conversation")
    ids, mask = ours.encode_chat_with_mask(CHATS[chat])
    assert ids == expected["input_ids"] == ours.encode_chat(CHATS[chat], add_generation_prompt=False)
    assert mask == expected["assistant_masks"]
    assert any(mask) is (chat != "one")
