"""What every prompt style has to do: teach the replies and nothing else, and ask as it has taught."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import tokenizers

from zoo.errors import InputError
from zoo.testing.contract import Contract, not_run
from zoo.text.new_tokenizers import byte_tokenizer
from zoo.text.prompt_styles import CHATML
from zoo.text.prompts import PromptStyle, choose_prompt_style, read_prompt_style
from zoo.text.samples import Message, Sample
from zoo.text.tokenizer import Tokenizer

BOS = "<|bos|>"
QUESTION, ANSWER = "How many legs has a cat?", "Four, mostly."
ONE: tuple[Message, ...] = ({"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER})
TWO: tuple[Message, ...] = (
    *ONE,
    {"role": "user", "content": "And a spider?"},
    {"role": "assistant", "content": "Eight."},
)
AWKWARD = "{{ braces }} {% raw %} <b>\n\n\ttab, \N{SNOWMAN} and ### Response:"


def tokenizer_of(bos: str) -> Tokenizer:
    """Of bytes, with an EOS. ``bos``: "none", "known" (a token that nobody puts anywhere), "automatic"."""
    made = byte_tokenizer()
    start = "{{- bos_token }}" if bos == "automatic" else ""
    config: dict[str, Any] = {**made.config, "chat_template": f"{start}{CHATML.template}"}
    backend: Any = made.backend
    if bos != "none":
        config["bos_token"] = BOS
        backend.add_special_tokens([BOS])
    if bos == "automatic":
        special = [(BOS, backend.token_to_id(BOS))]
        processor: Any = tokenizers.processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=special)
        backend.post_processor = processor
    return Tokenizer(backend, config)


class PromptContract(Contract, standard=True):
    """A prompt style by its name, with tokenizers that have a BOS, put one before every text, or have none.

    Attributes:
        conversations: whether it takes more than one question and answer.
    """

    kind = "prompt"
    conversations: ClassVar[bool] = True

    def styles(self) -> list[tuple[PromptStyle, Tokenizer]]:
        """The style, complete for each tokenizer."""
        self.load()
        found = [tokenizer_of(bos) for bos in ("none", "known", "automatic")]
        return [(choose_prompt_style(self.component, tokenizer, self.registry()), tokenizer) for tokenizer in found]

    def learnt(self, style: PromptStyle, tokenizer: Tokenizer, messages: tuple[Message, ...]) -> str:
        """The text of the tokens that are learnt."""
        encoded = style.encode(Sample(messages=messages), tokenizer)
        return tokenizer.decode(encoded.ids[encoded.supervised].tolist(), skip_special_tokens=False)

    def test_it_is_a_style(self) -> None:
        """A `PromptStyle` of the name that it is registered by, which is what files say of it."""
        style = self.load()
        assert isinstance(style, PromptStyle), f"the target is a zoo.text.prompts.PromptStyle, not {style!r}"
        assert style.name == self.record.name, (
            f"its name is {style.name!r}, and it is registered as {self.record.name!r}"
        )

    def test_what_is_learnt_is_the_reply(self) -> None:
        """All of it from its first character, one end, and nothing of the question."""
        for style, tokenizer in self.styles():
            found = self.learnt(style, tokenizer, ONE)
            assert found.lstrip(" ").startswith(ANSWER), f"learnt is {found!r}; are the generation marks in place?"
            assert QUESTION not in found and found.count(ANSWER) == 1, f"learnt is {found!r}"

    def test_a_reply_ends(self) -> None:
        """What ends it is learnt, once, and it is what stops a generation."""
        for style, tokenizer in self.styles():
            end = self.learnt(style, tokenizer, ONE).partition(ANSWER)[2].strip()
            ends = {*style.stop, *tokenizer.marks}
            assert end, "nothing ends a reply: the model would never stop"
            assert end in ends, f"a reply is ended by {end!r}; what stops a generation is {sorted(ends)}"

    def test_one_bos(self) -> None:
        """A tokenizer that puts BOS before every text gets one, and no tokenizer gets two."""
        for style, tokenizer in self.styles():
            ids = style.encode(Sample(messages=ONE), tokenizer).ids.tolist()
            chat = style.on(tokenizer).encode_chat(ONE[:1])
            for found in (ids, chat):
                assert found[:2] != [tokenizer.bos_id] * 2, "the text begins with two BOS tokens"
                if tokenizer.ends[0]:
                    assert found[0] == tokenizer.bos_id, "the text begins without the tokenizer's BOS"

    def test_it_asks_as_it_has_taught(self) -> None:
        """The prompt of a chat is, token for token, what comes before the reply in training."""
        for style, tokenizer in self.styles():
            prompt = style.on(tokenizer).encode_chat(ONE[:1])
            encoded = style.encode(Sample(messages=ONE), tokenizer)
            told = tokenizer.decode(encoded.ids.tolist(), skip_special_tokens=False)
            asked = tokenizer.decode(prompt, skip_special_tokens=False)
            assert encoded.ids[: len(prompt)].tolist() == prompt, f"chat sends {asked!r}; training has {told!r}"
            assert not encoded.supervised[: len(prompt)].any(), "a part of the prompt is learnt"

    def test_the_question_is_told_as_it_is(self) -> None:
        """Nothing is escaped, cut or taken for a template."""
        for style, tokenizer in self.styles():
            text = style.render(({"role": "user", "content": AWKWARD},), tokenizer)
            assert AWKWARD in text, f"{AWKWARD!r} became {text!r}"

    def test_a_conversation(self) -> None:
        """Every reply is learnt, and what was said stays as it was when the conversation goes on."""
        for style, tokenizer in self.styles():
            if not self.conversations:
                with pytest.raises(InputError):
                    style.encode(Sample(messages=TWO), tokenizer)
                continue
            found = self.learnt(style, tokenizer, TWO)
            first, second = found.find(ANSWER), found.find("Eight.")
            assert 0 <= first < second, f"learnt is {found!r}"
            assert QUESTION not in found and "spider" not in found, f"learnt is {found!r}"
            before = style.encode(Sample(messages=ONE), tokenizer).ids.tolist()
            whole = style.encode(Sample(messages=TWO), tokenizer).ids.tolist()
            same = len(before) if not before or before[-1] == whole[len(before) - 1] else len(before) - 1
            assert whole[:same] == before[:same], "the first answer is told otherwise once another follows"

    def test_training_on_the_prompt(self) -> None:
        """With ``train_on_prompt`` everything is learnt but the first token, before which there is nothing."""
        for style, tokenizer in self.styles():
            learnt = style.encode(Sample(messages=ONE), tokenizer, train_on_prompt=True).supervised
            assert learnt[1:].all() and not learnt[0]

    def test_it_is_stored(self, tmp_path: Path) -> None:
        """An adapter takes the style along as a file."""
        for style, _ in self.styles():
            style.save(tmp_path)
            assert read_prompt_style(tmp_path) == style

    def test_it_needs_no_clock(self) -> None:
        """The same ids tomorrow, once the day is given."""
        for style, tokenizer in self.styles():
            day = replace(style, today="2024-02-29")
            if day.render(ONE, tokenizer) == replace(style, today="2023-07-01").render(ONE, tokenizer):
                continue
            if style.render(ONE, tokenizer) == day.render(ONE, tokenizer):
                not_run("today is the day of the check")
