"""Formats that are written besides Hugging Face's: what comes back is what went in, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import tokenizers
import torch

from tests import reference
from zoo.convert.export import choose_writer, export_model
from zoo.convert.load import open_checkpoint
from zoo.errors import InputError
from zoo.registry import Registry


def save_source(directory: Path, variant: str) -> None:
    """A tiny model whose tokenizer splits text as GPT-2's does, which llama.cpp has a name for."""
    family, config = reference.VARIANTS[variant]
    reference.save_tiny(directory, family, config | {"vocab_size": 259, "eos_token_id": 258, "bos_token_id": 257})
    reference.save_byte_tokenizer(directory)
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate([*letters, "ll"])}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [("l", "l")]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<bos>", "<eos>"])
    backend.save(str(directory / "tokenizer.json"))


@pytest.mark.parametrize(
    ("variant", "name"),
    [
        ("llama-gqa", "gguf"),
        ("llama-tied", "gguf"),
        ("gpt2", "gguf"),
        ("gpt_neox", "gguf"),
        ("llama-gqa", "litgpt"),
        ("gpt_neox", "litgpt"),
    ],
)
def test_round_trip(variant: str, name: str, tmp_path: Path, registry: Registry) -> None:
    """Guards the key maps' way out, the config and the tokenizer."""
    save_source(tmp_path / "a", variant)
    source = open_checkpoint(tmp_path / "a", registry)
    target = tmp_path / ("b.gguf" if name == "gguf" else "b")
    _, writer = choose_writer(name, target, registry)
    export_model(source, target, writer=writer)
    again = open_checkpoint(target, registry)
    before, after = dict(source.parameters()), dict(again.parameters())
    assert before.keys() == after.keys()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    text = "Hello 123 caf\u00e9<eos>\n"
    assert again.load_tokenizer().encode(text) == source.load_tokenizer().encode(text)


def test_what_a_format_can_not_hold(tmp_path: Path, registry: Registry) -> None:
    """Guards against a file that some program would read wrong."""
    save_source(tmp_path / "a", "gpt2")
    _, writer = choose_writer("litgpt", tmp_path / "b", registry)
    with pytest.raises(InputError, match="LitGPT has no learned positions"):
        export_model(open_checkpoint(tmp_path / "a", registry), tmp_path / "b", writer=writer)
    with pytest.raises(InputError, match=r"does not end in \.gguf"):
        choose_writer("gguf", tmp_path / "b", registry)
    with pytest.raises(InputError, match="can be read but not written"):
        choose_writer("nanogpt", tmp_path / "b", registry)
