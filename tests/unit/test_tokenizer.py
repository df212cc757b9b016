"""Text in and out: streaming, special tokens, chat templates, and the files that hold them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
import transformers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import processors

from tests import reference
from zoo.errors import FileFormatError, InputError
from zoo.text.chat import Message, render_chat
from zoo.text.tokenizer import Tokenizer

CHATS: list[list[Message]] = [
    [{"role": "user", "content": "Hi"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What's <b>1 & 2</b>?\n'quoted'"}],
    [
        {"role": "user", "content": "One"},
        {"role": "assistant", "content": "Two \u2014 \U0001f600"},
        {"role": "user", "content": "  spaces  "},
    ],
]
TEMPLATES = {
    "smollm2": (
        "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
        "{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "blocks": (
        "{%- set offset = 1 if messages[0].role == 'system' else 0 %}\n"
        "{% for m in messages[offset:] %}\n"
        "    {% if m.role == 'tool' %}{% continue %}{% endif %}\n"
        "    {{- bos_token if loop.first }}[{{ m.role | upper }}] {{ m.content | trim | tojson }}\n"
        "{% endfor %}\n"
        "{%- if add_generation_prompt %}[ASSISTANT]{% endif %}"
    ),
    "no-tools": "{% if tools %}tools!{% endif %}{{ messages | length }}{{ eos_token }}",
}


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    """The byte tokenizer."""
    reference.save_byte_tokenizer(tmp_path)
    return Tokenizer.from_directory(tmp_path)


@given(text=st.text(max_size=40))
def test_streaming_equals_decoding(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    """Guards UTF-8 at piece borders: each byte is a token here, and no piece shows half a character."""
    directory = tmp_path_factory.getbasetemp() / "bytes"
    if not directory.exists():
        directory.mkdir()
        reference.save_byte_tokenizer(directory)
    tokenizer = Tokenizer.from_directory(directory)
    stream = tokenizer.stream()
    pieces = [stream.push(i) for i in tokenizer.encode(text, add_special_tokens=False)]
    assert all("\ufffd" not in piece or "\ufffd" in text for piece in pieces)
    assert "".join(pieces) + stream.finish() == text


def test_streaming_shows_bytes_that_never_become_a_character(tokenizer: Tokenizer) -> None:
    """Guards the end of a text that stops within a character."""
    half = tokenizer.encode("ok\u20ac")[:-1]
    stream = tokenizer.stream()
    assert "".join(stream.push(i) for i in half) == "ok"
    assert stream.finish() == "\ufffd"


def test_streaming_survives_bytes_that_are_no_text() -> None:
    """Guards against a newline that the decoder takes back, byte fallback's way with bytes that are no UTF-8."""
    vocabulary = {"<unk>": 0, "<0x0A>": 1, "<0xE4>": 2, "ion": 3, "<0xC3>": 4, "<0xA9>": 5}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    backend.decoder = tokenizers.decoders.Sequence([tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()])
    stream = Tokenizer(backend, {}).stream()
    pieces = [stream.push(i) for i in (1, 2, 2, 2, 3, 4, 5)]
    assert "".join(pieces) + stream.finish() == "\n\ufffd\ufffd\ufffdion\u00e9"


def test_special_tokens(tokenizer: Tokenizer) -> None:
    """Guards ids of special tokens, written in the text and looked up by role."""
    assert (tokenizer.bos_id, tokenizer.eos_id) == (256, 257)
    assert tokenizer.encode("a<eos>")[-1] == 257
    assert tokenizer.decode([257, *tokenizer.encode("a")]) == "a"
    assert tokenizer.special_tokens == {"bos_token": "<bos>", "eos_token": "<eos>"}


@pytest.mark.parametrize("messages", CHATS, ids=["one", "system", "turns"])
@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("prompt", [True, False])
def test_chat_equals_transformers(tmp_path: Path, template: str, messages: list[Message], prompt: bool) -> None:
    """Guards the Jinja environment: block trimming, tojson without HTML escapes, loop controls, special tokens."""
    reference.save_byte_tokenizer(tmp_path, chat_template=TEMPLATES[template])
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours = Tokenizer.from_directory(tmp_path)
    expected = theirs.apply_chat_template(messages, add_generation_prompt=prompt, tokenize=False)
    assert ours.render_chat(messages, add_generation_prompt=prompt) == expected
    ids = theirs.apply_chat_template(messages, add_generation_prompt=prompt)["input_ids"]
    assert ours.encode_chat(messages, add_generation_prompt=prompt) == ids


def test_templates_that_refuse() -> None:
    """Guards the message: a template's own words, or Jinja's."""
    for template, said in (("{{ raise_exception('only user turns') }}", "only user turns"), ("{% if %}", "Expected")):
        with pytest.raises(InputError, match=said):
            render_chat(template, CHATS[0], special_tokens={}, add_generation_prompt=True)


def test_templates_can_not_reach_python() -> None:
    """Guards the sandbox: a template comes with a download."""
    attack = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(InputError, match="refuses"):
        render_chat(attack, CHATS[0], special_tokens={}, add_generation_prompt=True)


HALF = (
    "{% for m in messages %}{{ m.role }}: {% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}|{% endfor %}"
)


@pytest.mark.parametrize("reply", ["ab", "a\U0001f600", " \n", "a ", ""])
@pytest.mark.parametrize("trim", [True, False])
def test_mask_to_the_last_byte(tmp_path: Path, reply: str, trim: bool) -> None:
    """Guards replies that end in a character of several tokens or in white space: all of it is what is learnt.

    transformers takes the first byte only, or, where the post-processor trims offsets, all that follows.
    """
    reference.save_byte_tokenizer(tmp_path, chat_template=HALF)
    ours = Tokenizer.from_directory(tmp_path)
    if trim:
        ours.backend.post_processor = processors.ByteLevel(trim_offsets=True)
    ids, mask = ours.encode_chat_with_mask([*CHATS[0], {"role": "assistant", "content": reply}, *CHATS[0]])
    assert ours.decode([i for i, says in zip(ids, mask, strict=True) if says]) == reply
    assert ids == ours.encode(f"user: Hi|assistant: {reply}|user: Hi|")


def test_a_template_that_marks_no_replies(tmp_path: Path) -> None:
    """Guards against a mask of zeros, with which nothing would be learnt."""
    reference.save_byte_tokenizer(tmp_path)
    with pytest.raises(InputError, match=r"does not mark.*\{% generation %\}"):
        Tokenizer.from_directory(tmp_path).encode_chat_with_mask(CHATS[0])


def test_a_model_without_a_template(tmp_path: Path) -> None:
    """Guards the remedy: chat on a base model."""
    reference.save_byte_tokenizer(tmp_path, chat_template=None)
    with pytest.raises(InputError, match=r"no chat template.*--chat-template"):
        Tokenizer.from_directory(tmp_path).render_chat(CHATS[0])


def test_where_a_template_may_lie(tmp_path: Path) -> None:
    """Guards chat_template.jinja (newer models) and a list of named templates (older ones)."""
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    reference.save_byte_tokenizer(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "chat_template": named}))
    assert Tokenizer.from_directory(tmp_path).chat_template == "plain"
    (tmp_path / "chat_template.jinja").write_text("from the file")
    assert Tokenizer.from_directory(tmp_path).chat_template == "from the file"


def test_saved_tokenizer_loads_in_transformers(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Guards the export."""
    saved = tmp_path / "saved"
    saved.mkdir()
    tokenizer.save(saved)
    theirs = transformers.AutoTokenizer.from_pretrained(saved)
    text = "H\u00e9llo <eos> \U0001f600"
    assert theirs(text)["input_ids"] == tokenizer.encode(text)
    assert theirs.eos_token_id == 257
    assert theirs.apply_chat_template(CHATS[0], tokenize=False) == tokenizer.render_chat(
        CHATS[0], add_generation_prompt=False
    )


def test_no_tokenizer(tmp_path: Path) -> None:
    """Guards the message: which file is missing, or damaged."""
    with pytest.raises(FileFormatError, match=r"has no tokenizer\.json"):
        Tokenizer.from_directory(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(FileFormatError, match="not a valid tokenizer"):
        Tokenizer.from_directory(tmp_path)
