"""Prompt styles: their text, what of it is learnt, and that training, chat and export have the same bytes."""

from __future__ import annotations

from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from tokenizers import processors

from tests import reference, trained_tokenizers
from zoo.errors import FileFormatError, InputError, UnknownNameError
from zoo.registry import Registry
from zoo.text.new_tokenizers import byte_tokenizer, characters_of
from zoo.text.prompts import FILE_NAME, PromptStyle, choose_prompt_style, read_prompt_style
from zoo.text.samples import Encoded, Sample
from zoo.text.tokenizer import Tokenizer

TEMPLATES = Path(__file__).parent.parent / "data" / "chat_templates"
SYSTEM = {"role": "system", "content": "S"}
TURNS = (
    {"role": "user", "content": "Q1"},
    {"role": "assistant", "content": "A1"},
    {"role": "user", "content": "Q2"},
    {"role": "assistant", "content": "A2"},
)
CHAT = Sample(messages=TURNS)
PAIR = Sample(prompt="2+2=", completion="4")
ALPACA = Sample(
    messages=({"role": "user", "content": "Classify.\n\ndog"}, {"role": "assistant", "content": "pet"}), input="dog"
)
BELOW = "Below is an instruction that describes a task"
REQUEST = "Write a response that appropriately completes the request."


@pytest.fixture
def byte(tmp_path: Path) -> Tokenizer:
    """256 bytes, BOS and EOS, neither of which is added by itself."""
    reference.save_byte_tokenizer(tmp_path, chat_template=None)
    return Tokenizer.from_directory(tmp_path)


def with_bos(tokenizer: Tokenizer) -> Tokenizer:
    """The same, with BOS before every text."""
    changed = Tokenizer(type(tokenizer.backend).from_str(tokenizer.backend.to_str()), tokenizer.config)
    changed.backend.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair=None, special_tokens=[("<bos>", 256)]
    )
    return changed


def template_of(tokenizer: Tokenizer, name: str) -> Tokenizer:
    text = (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
    return Tokenizer(tokenizer.backend, {**tokenizer.config, "chat_template": text})


def learnt(encoded: Encoded, tokenizer: Tokenizer) -> str:
    return tokenizer.decode(encoded.ids[encoded.supervised].tolist(), skip_special_tokens=False)


def text_of(encoded: Encoded, tokenizer: Tokenizer) -> str:
    return tokenizer.decode(encoded.ids.tolist(), skip_special_tokens=False)


EXPECTED: dict[str, tuple[str, str]] = {
    "plain": ("Q1A1<eos>Q2A2<eos>", "A1<eos>A2<eos>"),
    "chatml": (
        "<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\nA1<|im_end|>\n"
        "<|im_start|>user\nQ2<|im_end|>\n<|im_start|>assistant\nA2<|im_end|>\n",
        "A1<|im_end|>A2<|im_end|>",
    ),
    "alpaca": (
        f"{BELOW}. {REQUEST}\n\n### Instruction:\nQ1\n\n### Response:\nA1<eos>\n\n"
        "### Instruction:\nQ2\n\n### Response:\nA2<eos>",
        "A1<eos>A2<eos>",
    ),
    "vicuna": (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions. USER: Q1 ASSISTANT: A1<eos>USER: Q2 ASSISTANT: A2<eos>",
        " A1<eos> A2<eos>",
    ),
    "llama2": ("<bos>[INST] Q1 [/INST] A1 <eos><bos>[INST] Q2 [/INST] A2 <eos>", " A1 <eos> A2 <eos>"),
    "zephyr": (
        "<|user|>\nQ1<eos>\n<|assistant|>\nA1<eos>\n<|user|>\nQ2<eos>\n<|assistant|>\nA2<eos>\n",
        "A1<eos>A2<eos>",
    ),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_text_and_mask_of_each_style(name: str, byte: Tokenizer, registry: Registry) -> None:
    """Guards the bytes of each style, and that what ends a reply is learnt while headers are not."""
    style = choose_prompt_style(name, byte, registry)
    encoded = style.encode(CHAT, byte)
    assert (text_of(encoded, byte), learnt(encoded, byte)) == EXPECTED[name]
    everything = style.encode(CHAT, byte, train_on_prompt=True)
    assert everything.supervised.sum() == len(everything) - 1 and not everything.supervised[0]


def test_every_style_is_tested(registry: Registry) -> None:
    assert {name for name, _ in registry.components("prompt")} == {*EXPECTED, "model"}


@pytest.mark.parametrize("name", EXPECTED)
@pytest.mark.parametrize("automatic_bos", [False, True])
def test_one_object_for_training_chat_and_export(
    name: str, automatic_bos: bool, byte: Tokenizer, registry: Registry, tmp_path: Path
) -> None:
    """Guards against a model that is asked in other bytes than it was trained in, by zoo or by transformers."""
    tokenizer = with_bos(byte) if automatic_bos else byte
    style = choose_prompt_style(name, tokenizer, registry)
    whole = style.encode(CHAT, tokenizer)
    chat = style.on(tokenizer)
    asked = chat.encode_chat(TURNS[:3])
    assert whole.ids[: len(asked)].tolist() == asked
    first_learnt = int(np.flatnonzero(whole.supervised[len(asked) :])[0])
    assert first_learnt == 0, "what is asked ends where the answer begins"
    assert whole.ids.tolist().count(256) == (2 if name == "llama2" else int(automatic_bos))
    chat.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    exported = theirs.apply_chat_template(list(TURNS), return_dict=True, return_assistant_tokens_mask=True)
    assert exported["input_ids"] == whole.ids.tolist()
    assert exported["assistant_masks"] == whole.supervised.astype(int).tolist()
    assert theirs.apply_chat_template(list(TURNS[:3]), add_generation_prompt=True)["input_ids"] == asked


@pytest.mark.parametrize(
    ("name", "stop"),
    [("chatml", ("<|im_end|>",)), ("alpaca", ("<eos>",)), ("llama2", ("<eos>",)), ("zephyr", ("<eos>",))],
)
def test_what_ends_a_reply(name: str, stop: tuple[str, ...], byte: Tokenizer, registry: Registry) -> None:
    """Guards against a chat that goes on after the end that the model was taught."""
    assert choose_prompt_style(name, byte, registry).stop == stop


@pytest.mark.parametrize(
    ("template", "stop"),
    [("gemma", "<end_of_turn>"), ("llama3", "<|eot_id|>"), ("chatml", "<|im_end|>"), ("phi3", "<|end|>")],
)
def test_what_ends_a_reply_in_the_models_template(
    template: str, stop: str, byte: Tokenizer, registry: Registry
) -> None:
    """Guards against stopping at EOS alone: instruction-tuned models end turns with another token."""
    byte.backend.add_special_tokens(["<end_of_turn>", "<|eot_id|>", "<|im_end|>", "<|end|>"])
    assert choose_prompt_style("model", template_of(byte, template), registry).stop == (stop,)


def test_alpaca_with_an_input(byte: Tokenizer, registry: Registry) -> None:
    """Guards Stanford's second template, and that other styles keep the input in the message."""
    alpaca = choose_prompt_style("alpaca", byte, registry).encode(ALPACA, byte)
    assert text_of(alpaca, byte) == (
        f"{BELOW}, paired with an input that provides further context. {REQUEST}\n\n"
        "### Instruction:\nClassify.\n\n### Input:\ndog\n\n### Response:\npet<eos>"
    )
    zephyr = choose_prompt_style("zephyr", byte, registry).encode(ALPACA, byte)
    assert text_of(zephyr, byte) == "<|user|>\nClassify.\n\ndog<eos>\n<|assistant|>\npet<eos>\n"


@pytest.mark.parametrize("name", ["alpaca", "vicuna", "llama2"])
def test_roles(name: str, byte: Tokenizer, registry: Registry) -> None:
    """Guards the place of a system message, and the refusal of roles that a style has no place for."""
    style = choose_prompt_style(name, byte, registry)
    starts = {"alpaca": "S\n\n### I", "vicuna": "S USER", "llama2": "<bos>[INST] <<SYS>>\nS\n<</SYS>>\n\nQ1 ["}
    assert style.render((SYSTEM, *TURNS), byte).startswith(starts[name])
    for wrong in ({"role": "tool", "content": "x"}, SYSTEM):
        with pytest.raises(InputError, match=f"{name} has no place for the role {wrong['role']}"):
            style.render((*TURNS, wrong), byte)


def test_the_models_template_is_the_default(byte: Tokenizer, registry: Registry) -> None:
    """Guards the choice without a name, and that it is never a guess."""
    chat = template_of(byte, "chatml")
    assert choose_prompt_style(None, chat, registry).name == "model"
    assert choose_prompt_style("auto", chat, registry, plain=True).name == "model"
    assert choose_prompt_style(None, byte, registry, plain=True).name == "plain"
    with pytest.raises(InputError) as caught:
        choose_prompt_style(None, byte, registry)
    assert "no chat template" in caught.value.message
    assert caught.value.fix is not None and "alpaca, chatml, llama2, plain, vicuna, zephyr" in caught.value.fix
    with pytest.raises(UnknownNameError, match="Did you mean 'alpaca'"):
        choose_prompt_style("alpacca", byte, registry)


def test_a_template_of_ones_own(byte: Tokenizer, registry: Registry, tmp_path: Path) -> None:
    path = tmp_path / "mine.jinja"
    path.write_text("{% for m in messages %}{{ m.content }}|{% endfor %}")
    style = choose_prompt_style(str(path), byte, registry)
    assert (style.name, learnt(style.encode(CHAT, byte), byte)) == ("mine", "A1|A2|")
    with pytest.raises(InputError, match=r"can not read the chat template .*none\.jinja"):
        choose_prompt_style(str(tmp_path / "none.jinja"), byte, registry)


UNMARKED = {
    "gemma": "A1<end_of_turn>A2<end_of_turn>",
    "llama3": "A1<|eot_id|>A2<|eot_id|>",
    "phi3": "A1<|end|>A2<|end|>",
}
UNMARKED |= {"mistral": " A1<eos> A2<eos>", "vicuna": " A1<eos> A2<eos>"}


@pytest.mark.parametrize("name", UNMARKED)
def test_templates_without_marks(name: str, byte: Tokenizer, registry: Registry) -> None:
    """Guards replies that are found by rendering prefixes: no header is learnt, no line end after the turn's end.

    phi3 ends a whole conversation, and only that, with EOS.
    """
    byte.backend.add_special_tokens(["<end_of_turn>", "<|eot_id|>", "<|end|>"])
    tokenizer = template_of(byte, name)
    style = choose_prompt_style(None, tokenizer, registry)
    encoded = style.encode(CHAT, tokenizer)
    assert encoded.ids.tolist() == tokenizer.encode_chat(TURNS, add_generation_prompt=False)
    assert learnt(encoded, tokenizer) == UNMARKED[name]


def test_a_template_that_rewrites_history(byte: Tokenizer, registry: Registry) -> None:
    """Guards against a mask that was found in a text which is not the one that is learnt."""
    rewriting = (
        "{% for m in messages %}{{ m.role }}:"
        "{{ m.content if loop.last or m.role == 'user' else m.content[:1] }}\n{% endfor %}"
    )
    tokenizer = Tokenizer(byte.backend, {**byte.config, "chat_template": rewriting})
    style = choose_prompt_style(None, tokenizer, registry)
    assert learnt(style.encode(Sample(messages=TURNS[:2]), tokenizer), tokenizer) == "assistant:A1\n"
    with pytest.raises(InputError, match="turn 2 of this conversation in another way"):
        style.encode(CHAT, tokenizer)


def test_a_conversation_that_the_assistant_begins(byte: Tokenizer, registry: Registry) -> None:
    """Guards against a header that is learnt because nothing can be rendered before it."""
    byte.backend.add_special_tokens(["<end_of_turn>"])
    tokenizer = template_of(byte, "gemma")
    encoded = choose_prompt_style(None, tokenizer, registry).encode(Sample(messages=(TURNS[1], TURNS[2])), tokenizer)
    assert learnt(encoded, tokenizer) == "A1<end_of_turn>"


def test_messages_of_no_weight(byte: Tokenizer, registry: Registry) -> None:
    """Guards OpenAI's weight: 0 is not learnt."""
    messages = ({**TURNS[0]}, {**TURNS[1], "weight": 0}, TURNS[2], {**TURNS[3], "weight": 1})
    style = choose_prompt_style("zephyr", byte, registry)
    assert learnt(style.encode(Sample(messages=messages), byte), byte) == "A2<eos>"


@pytest.mark.parametrize("make", [trained_tokenizers.byte_level, trained_tokenizers.sentencepiece_style])
def test_plain_prompts_have_the_tokens_of_generate(make: Any, registry: Registry, tmp_path: Path) -> None:
    """Guards against BOS, or a space before the text, in training alone; nothing is put between the two parts."""
    trained_tokenizers.save(tmp_path, make())
    tokenizer = Tokenizer.from_directory(tmp_path)
    style = choose_prompt_style("plain", tokenizer, registry)
    for prompt, completion in (("The answer:", " weights"), ("x\n", "y"), ("", "Hello world")):
        encoded = style.encode(Sample(prompt=prompt, completion=completion), tokenizer)
        asked = tokenizer.encode(prompt)
        assert encoded.ids[: len(asked)].tolist() == asked
        assert encoded.ids.tolist() == [*tokenizer.encode(prompt + completion), tokenizer.eos_id]
        if asked:  # the first token of all has nothing before it that it could be learnt from
            assert tokenizer.decode(encoded.ids[encoded.supervised].tolist()).strip() == completion.strip()
        assert encoded.supervised[-1] and encoded.ids[-1] == tokenizer.eos_id
    text = style.encode(Sample(text="Hello world"), tokenizer)
    assert text.ids.tolist() == [*tokenizer.encode("Hello world"), tokenizer.eos_id]
    assert text.supervised.sum() == len(text) - 1


def test_a_tokenizer_without_an_end(registry: Registry) -> None:
    """Guards against a model that is never taught to stop."""
    with pytest.raises(InputError, match="has none"):
        choose_prompt_style("plain", characters_of(["abc"]), registry)


def test_byte_tokenizer() -> None:
    """Guards that ids are bytes, and that the end of text is one token in a text too."""
    tokenizer = byte_tokenizer()
    text = "h\u00e9 \u4f60\n\x00 \U0001f600"
    assert tokenizer.encode(text) == list(text.encode())
    assert tokenizer.decode(list(text.encode())) == text
    assert (tokenizer.eos_id, tokenizer.vocab_size, tokenizer.encode("a<|endoftext|>")) == (256, 257, [97, 256])


def test_a_style_is_stored_whole(byte: Tokenizer, registry: Registry, tmp_path: Path) -> None:
    """Guards the record beside an adapter: the template itself, not a name whose meaning may change."""
    style = replace(choose_prompt_style("alpaca", with_bos(byte), registry), today="2026-02-03")
    style.save(tmp_path)
    assert read_prompt_style(tmp_path) == style
    assert style.template is not None and style.template in style.to_dict().values()
    assert read_prompt_style(tmp_path / "nowhere") is None
    for damaged in (
        '{"schema": 1, "name": "x"}',
        '{"name": "x", "template": ""}',
        '{"schema": 1, "template": 3, "name": ""}',
    ):
        (tmp_path / FILE_NAME).write_text(damaged)
        with pytest.raises(FileFormatError, match=FILE_NAME):
            read_prompt_style(tmp_path)


def test_the_day_that_templates_see(byte: Tokenizer) -> None:
    """Guards a resumed run: Llama 3's template writes the date, and ids must be those of the first day."""
    tokenizer = template_of(byte, "llama3")
    style = PromptStyle("model", tokenizer.chat_template, today="2026-02-03")
    assert "Today Date: 03 Feb 2026" in style.rendered(CHAT, tokenizer).text
    assert style.render(TURNS, tokenizer) == tokenizer.render_chat(TURNS).replace(
        date.today().strftime("%d %b %Y"), "03 Feb 2026"
    )


def test_pair_in_a_chat_model(byte: Tokenizer, registry: Registry) -> None:
    """Guards prompts and completions for a model with a template: a user's turn and its answer."""
    tokenizer = template_of(byte, "zephyr")
    encoded = choose_prompt_style(None, tokenizer, registry, plain=True).encode(PAIR, tokenizer)
    assert text_of(encoded, tokenizer).startswith("<|user|>\n2+2=<eos>\n")
