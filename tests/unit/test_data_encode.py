"""Samples as token ids: what is cut, left out, counted and refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tokenizers import processors

from tests import reference, trained_tokenizers
from zoo.data.audit import bos_eos_audit, masked_text
from zoo.data.encode import EncodedData, EncodingReport, encode_samples
from zoo.errors import InputError
from zoo.registry import Registry
from zoo.text.new_tokenizers import byte_tokenizer, characters_of
from zoo.text.prompts import PromptStyle, choose_prompt_style
from zoo.text.samples import Encoded, Sample
from zoo.text.tokenizer import Tokenizer

EOS = 256


@pytest.fixture
def tokenizer() -> Tokenizer:
    return byte_tokenizer()


@pytest.fixture
def plain(tokenizer: Tokenizer, registry: Registry) -> PromptStyle:
    return choose_prompt_style("plain", tokenizer, registry)


def pair(prompt: str, completion: str, origin: str = "f:1") -> Sample:
    return Sample(prompt=prompt, completion=completion, origin=origin)


def ids(data: EncodedData) -> list[list[int]]:
    return [encoded.ids.tolist() for encoded in data.sequences]


def test_truncation_is_counted(tokenizer: Tokenizer, plain: PromptStyle) -> None:
    """Guards the counts: how many samples lose how many tokens, and which have nothing left to learn."""
    samples = [pair("abc", "de"), pair("abc", "defgh"), pair("abcdefgh", "i", "f:3")]
    data = encode_samples(samples, plain, tokenizer, max_seq_len=6)
    assert ids(data) == [[*b"abcde", EOS], [*b"abcdef"]]
    assert [encoded.truncated for encoded in data.sequences] == [False, True]
    assert data.report == EncodingReport(
        n_samples=3, n_kept=2, n_pieces=2, n_tokens=12, n_supervised=6, n_truncated=2, n_cut=7, n_masked=1, longest=10
    )


def test_what_follows_the_last_learnt_token_is_left_off(tokenizer: Tokenizer, registry: Registry) -> None:
    """Guards against computing what nothing is learnt from: a line end, a last question."""
    style = choose_prompt_style("zephyr", tokenizer, registry)
    turns = ({"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}, {"role": "user", "content": "R"})
    (encoded,) = encode_samples([Sample(messages=turns)], style, tokenizer).sequences
    assert tokenizer.decode(encoded.ids.tolist(), skip_special_tokens=False).endswith("<|assistant|>\nA<|endoftext|>")
    assert encoded.supervised.tolist() == [False] * (len(encoded) - 2) + [True, True]


def test_a_long_text_is_cut_into_pieces(tokenizer: Tokenizer, plain: PromptStyle) -> None:
    """Guards running text: no token is lost, and each but the first is learnt exactly once."""
    text = "abcdefghijklm"
    data = encode_samples([Sample(text=text)], plain, tokenizer, max_seq_len=5)
    assert [tokenizer.decode(piece) for piece in ids(data)] == ["abcde", "efghi", "ijklm", "m"]
    learnt = [token for encoded in data.sequences for token in encoded.ids[encoded.supervised].tolist()]
    assert learnt == [*text.encode()[1:], EOS]
    assert (data.report.n_kept, data.report.n_pieces, data.report.n_truncated) == (1, 4, 0)
    assert data.sequences[-1].ids[-1] == EOS


def test_an_end_that_pads_too_is_learnt(registry: Registry) -> None:
    """Guards pad = EOS: models that never stop were trained with every EOS masked, the true ones included."""
    tokenizer = byte_tokenizer()
    tokenizer.config["pad_token"] = tokenizer.config["eos_token"]
    style = choose_prompt_style("plain", tokenizer, registry)
    (encoded,) = encode_samples([pair("a", "b")], style, tokenizer).sequences
    assert encoded.ids[-1] == EOS and encoded.supervised[-1]
    assert bos_eos_audit(encoded, tokenizer).ends_with_eos


def test_when_every_sample_is_too_long(tokenizer: Tokenizer, plain: PromptStyle) -> None:
    with pytest.raises(InputError, match="every sample is longer than 4 tokens; the longest has 9") as caught:
        encode_samples([pair("abc", "defgh"), pair("abcd", "e")], plain, tokenizer, max_seq_len=4)
    assert caught.value.fix is not None and "9 keeps all" in caught.value.fix


def test_when_nothing_is_learnt(tokenizer: Tokenizer, plain: PromptStyle) -> None:
    """Guards against a training that ends with a loss of 0 and has done nothing."""
    with pytest.raises(InputError, match="all labels are masked"):
        encode_samples([Sample(messages=({"role": "user", "content": "Q"},))], plain, tokenizer)
    with pytest.raises(InputError, match="all labels are masked"):
        encode_samples([pair("", ""), pair("abcd", "ef")], plain, tokenizer, max_seq_len=4)
    with pytest.raises(InputError, match="there are no samples"):
        encode_samples([], plain, tokenizer)
    with pytest.raises(InputError, match="at least 2, not 1"):
        encode_samples([pair("a", "b")], plain, tokenizer, max_seq_len=1)


def test_an_error_names_the_line(registry: Registry, tokenizer: Tokenizer) -> None:
    """Guards the origin in errors of templates and of vocabularies without a character."""
    style = choose_prompt_style("alpaca", tokenizer, registry)
    odd = Sample(messages=({"role": "tool", "content": "x"}, {"role": "assistant", "content": "y"}), origin="f.jsonl:7")
    with pytest.raises(InputError, match=r"f\.jsonl:7: the chat template refuses"):
        encode_samples([odd], style, tokenizer)
    few = characters_of(["abc"])
    few.backend.add_special_tokens(["<eos>"])
    few.config["eos_token"] = "<eos>"
    style = choose_prompt_style("plain", few, registry)
    with pytest.raises(InputError, match=r"g:2: the tokenizer has no tokens for 'z'"):
        encode_samples([pair("a", "b", "g:1"), pair("a", "z", "g:2")], style, few)


def test_replies_that_begin_inside_a_token(tmp_path: Path, registry: Registry) -> None:
    """Guards the hint about prompts that end in a space: the token of the space and the word is another one."""
    trained_tokenizers.save(tmp_path, trained_tokenizers.byte_level())
    tokenizer = Tokenizer.from_directory(tmp_path)
    style = choose_prompt_style("plain", tokenizer, registry)
    report = encode_samples([pair("see ", "the model"), pair("see", " the model")], style, tokenizer).report
    assert report.n_straddling == 1


def test_audit(tmp_path: Path, registry: Registry) -> None:
    """Guards the facts about BOS and EOS, and what is said about each fault."""
    reference.save_byte_tokenizer(
        tmp_path, chat_template="{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    tokenizer = Tokenizer.from_directory(tmp_path)
    style = choose_prompt_style(None, tokenizer, registry)
    endless = style.encode(pair("a", "b"), tokenizer)
    audit = bos_eos_audit(endless, tokenizer)
    assert (audit.starts_with_bos, audit.double_bos, audit.ends_with_eos, audit.last_learnt) == (
        True,
        False,
        False,
        "b",
    )
    assert (audit.n_tokens, audit.n_supervised) == (3, 1)
    assert "does not learn to stop" in "".join(audit.problems(tokenizer))
    cut = Encoded(endless.ids, endless.supervised, truncated=True)
    assert bos_eos_audit(cut, tokenizer).problems(tokenizer) == []
    both = Encoded(np.array([256, 256, 97, 257], np.int32), np.array([False, False, True, True]))
    assert bos_eos_audit(both, tokenizer).problems(tokenizer) == [
        "the text begins with two BOS tokens: the template writes one and the tokenizer adds another."
    ]
    tokenizer.backend.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair=None, special_tokens=[("<bos>", 256)]
    )
    tokenizer.__dict__.pop("ends", None)
    none = Encoded(np.array([97, 257], np.int32), np.array([False, True]))
    assert "begins without it" in "".join(bos_eos_audit(none, tokenizer).problems(tokenizer))


def test_double_bos_is_counted(tmp_path: Path, registry: Registry) -> None:
    """Guards the count over all samples, and that a text gets the tokenizer's own BOS once."""
    reference.save_byte_tokenizer(
        tmp_path,
        chat_template="{{ bos_token ~ bos_token }}{% for m in messages %}{{ m.content ~ eos_token }}{% endfor %}",
    )
    tokenizer = Tokenizer.from_directory(tmp_path)
    style = choose_prompt_style(None, tokenizer, registry)
    assert encode_samples([pair("a", "b"), pair("a", "c")], style, tokenizer).report.n_double_bos == 2


def test_masked_text(tokenizer: Tokenizer, plain: PromptStyle) -> None:
    """Guards what the user is shown: the runs make up the text, characters whole."""
    encoded = plain.encode(pair("caf\u00e9 ", "\u4f60\u597d"), tokenizer)
    assert list(masked_text(encoded, tokenizer)) == [("caf\u00e9 ", False), ("\u4f60\u597d<|endoftext|>", True)]
    text = plain.encode(Sample(text="\u4f60"), tokenizer)  # its first byte is not learnt, the others are
    assert list(masked_text(text, tokenizer)) == [("\u4f60<|endoftext|>", True)]
