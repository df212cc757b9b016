"""How conversations become text follows the adapters that a request computes with: as in their training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers

from tests import reference
from zoo.api import LanguageModel, load
from zoo.convert.load import open_checkpoint
from zoo.errors import InputError
from zoo.generate.reply import Reply, ReplyWriter, Request
from zoo.generate.sampling import SamplingOptions
from zoo.merging import merge_adapter
from zoo.registry import Registry
from zoo.text.prompts import PromptStyle, choose_prompt_style, read_prompt_style

HELLO = [{"role": "user", "content": "Hi"}]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    reference.save_tiny_chat_model(tmp_path / "base", max_position_embeddings=200)
    return tmp_path / "base"


def opened(base: Path, registry: Registry, *adapters: Path) -> LanguageModel:
    named = {path.name: path for path in adapters}
    return load(base, precision="32-true", device="cpu", registry=registry, adapters=named)


def adapter(base: Path, registry: Registry, name: str, style: str | None, seed: int = 1) -> Path:
    """An adapter directory, as a run leaves it."""
    lm = opened(base, registry)
    handle = lm.adapt("lora")
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in handle.trainable().values():
            parameter.add_(0.3 * torch.randn_like(parameter))
    directory = base.parent / name
    handle.save(directory)
    if style is not None:
        choose_prompt_style(style, lm.tokenizer, registry).save(directory)
    return directory


def test_conversations_are_rendered_as_in_training(base: Path, registry: Registry) -> None:
    """Guards every way to a reply: with the model's own template an adapter sees prompts that it never learnt from."""
    lm = opened(base, registry, adapter(base, registry, "a", "chatml"))
    own = lm.tokenizer.encode_chat(HELLO)
    text = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert lm.tokenizer.decode(lm.request(HELLO).prompt_ids, skip_special_tokens=False) == text
    assert lm.request(HELLO, stop=["x"]).stop == ("x", "<|im_end|>")
    assert lm.request(HELLO, adapter=[]).prompt_ids == own
    assert lm.request(HELLO, adapter=[]).stop == ()
    assert lm.request("Hi").prompt_ids == lm.tokenizer.encode("Hi")
    expected = lm.generate(text, temperature=0.0, max_new_tokens=8)
    assert lm.chat(HELLO, temperature=0.0, max_new_tokens=8) == expected
    reply = lm.conversation().send("Hi", max_new_tokens=8, sampling=SamplingOptions(temperature=0.0))
    assert reply.read().text == expected
    assert "chatml" in lm.adapters[0].notes[0]
    with lm.adapters[0].disabled():
        assert lm.request(HELLO).prompt_ids == own


def test_the_stop_string_ends_a_chat(base: Path, registry: Registry) -> None:
    """Guards against answers that go on with the next turn, where no token ends them."""
    directory = adapter(base, registry, "a", "chatml")
    lm = opened(base, registry, directory)
    said = lm.chat(HELLO, temperature=0.0, max_new_tokens=30)
    end = said[5:7]
    style = read_prompt_style(directory)
    assert style is not None
    PromptStyle(style.name, style.template, stop=(end,)).save(directory)
    again = opened(base, registry, directory)
    expected = said[: said.find(end)]
    assert again.chat(HELLO, temperature=0.0, max_new_tokens=30) == expected
    sampling = SamplingOptions(temperature=0.0)
    assert again.conversation().send("Hi", max_new_tokens=30, sampling=sampling).read().text == expected


def test_two_styles(base: Path, registry: Registry) -> None:
    """Guards against one adapter's prompts for the other; and against an error where a request has chosen."""
    a, b = adapter(base, registry, "a", "chatml"), adapter(base, registry, "b", "vicuna", seed=2)
    same, foreign = adapter(base, registry, "same", "chatml", seed=3), adapter(base, registry, "foreign", None, seed=4)
    lm = opened(base, registry, a, b, same, foreign)
    assert "im_start" in lm.tokenizer.decode(lm.request(HELLO, adapter="a").prompt_ids)
    assert "im_start" in lm.tokenizer.decode(lm.request(HELLO, adapter=["a", "same", "foreign"]).prompt_ids)
    assert "USER: Hi" in lm.tokenizer.decode(lm.request(HELLO, adapter="b").prompt_ids)
    assert lm.request(HELLO, adapter="foreign").prompt_ids == lm.tokenizer.encode_chat(HELLO)
    assert lm.generate("Hi", max_new_tokens=2)
    for ask in (lambda: lm.request(HELLO), lambda: lm.chat(HELLO), lm.conversation):
        with pytest.raises(InputError, match="different prompt styles: a with chatml, b with vicuna"):
            ask()
    lm.use_style(choose_prompt_style("zephyr", lm.tokenizer, registry))
    assert "<|user|>\nHi" in lm.tokenizer.decode(lm.request(HELLO).prompt_ids)


def test_a_special_token_ends_a_reply(base: Path, registry: Registry) -> None:
    """Guards styles that end a turn with a token of the vocabulary, which never shows up in the text."""
    tokenizer = opened(base, registry).tokenizer
    for stop, ends in ((("<bos>",), True), ((), False)):
        reply = Reply(iter(()))
        request = Request(prompt_ids=[1], max_new_tokens=9, sampling=SamplingOptions(), stop=stop)
        writer = ReplyWriter(request, tokenizer, reply)
        written = writer.push(tokenizer.encode("a")[0]) + writer.push(256)
        assert (written, writer.over) == ("a", ends)
        assert reply.finish_reason == ("stop" if ends else "interrupted")


@pytest.mark.parametrize("how", ["merge", "save"])
def test_the_style_is_written_with_the_merged_model(how: str, base: Path, registry: Registry) -> None:
    """Guards exports: zoo and transformers render for the merged model what the adapter was trained with."""
    directory, out = adapter(base, registry, "a", "chatml"), base.parent / "out"
    if how == "merge":
        merge_adapter(open_checkpoint(base, registry), directory, out, registry=registry)
    else:
        lm = opened(base, registry, directory)
        lm.adapters[0].merge()
        lm.save(out)
    style = read_prompt_style(directory)
    assert style is not None and read_prompt_style(out) == style
    merged = opened(out, registry)
    assert merged.request(HELLO).stop == ("<|im_end|>",)
    expected = style.render(HELLO, merged.tokenizer)
    assert merged.tokenizer.render_chat(HELLO) == expected
    theirs = transformers.AutoTokenizer.from_pretrained(out)
    assert theirs.apply_chat_template(HELLO, tokenize=False, add_generation_prompt=True) == expected


def test_the_models_own_style_leaves_its_files_alone(base: Path, registry: Registry) -> None:
    """Guards against a tokenizer that is written anew, with less in it, where nothing has changed."""
    config = json.loads((base / "tokenizer_config.json").read_text()) | {"of_their_own": [1, 2]}
    (base / "tokenizer_config.json").write_text(json.dumps(config))
    out = base.parent / "out"
    merge_adapter(open_checkpoint(base, registry), adapter(base, registry, "a", None), out, registry=registry)
    own = base.parent / "own"
    merge_adapter(open_checkpoint(base, registry), adapter(base, registry, "b", "model"), own, registry=registry)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (own / name).read_bytes() == (base / name).read_bytes()
    assert read_prompt_style(out) is None
