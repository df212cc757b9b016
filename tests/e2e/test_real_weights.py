"""The demo model, SmolLM2-135M-Instruct, against the reference library. Skipped where it is not downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from zoo.api import LanguageModel, checkpoints_directory, load
from zoo.registry import Registry

DIRECTORY = checkpoints_directory().resolve() / "smollm2-135m-instruct"
PROMPTS = ["Once upon a time", "def fibonacci(n):\n", "Die Hauptstadt von Frankreich ist"]
CHAT = [
    {"role": "user", "content": "What is the capital of France?"},
    {"role": "assistant", "content": "Paris."},
    {"role": "user", "content": "And of Italy? \U0001f600"},
]

pytestmark = pytest.mark.skipif(not DIRECTORY.is_dir(), reason="python -m zoo download smollm2-135m-instruct")


@pytest.fixture(scope="module")
def lm(registry: Registry) -> LanguageModel:
    """As zoo reads it, in float32."""
    return load(DIRECTORY, precision="32-true", device="cpu", registry=registry)


@pytest.fixture(scope="module")
def reference(lm: LanguageModel) -> Any:
    """As transformers reads and dequantizes the same file."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        DIRECTORY, gguf_file=lm.checkpoint.path.name, dtype=torch.float32
    ).eval()


def test_weights(lm: LanguageModel, reference: Any) -> None:
    """Guards the dequantization and llama.cpp's order of rows, bit for bit."""
    expected = reference.state_dict()
    ours = lm.model.state_dict()
    for rule in lm.family.keys.rules(lm.spec):
        assert torch.equal(rule.merge([ours[name] for name in rule.ours]), expected[rule.stored]), rule.stored


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_text(lm: LanguageModel, reference: Any, prompt: str) -> None:
    """Guards everything from the file to the text: 64 tokens, one after the other."""
    ids = lm.tokenizer.encode(prompt)
    reply = lm.generate(prompt, max_new_tokens=64, temperature=0.0, stream=True).read()
    theirs = reference.generate(torch.tensor([ids]), max_new_tokens=64, do_sample=False, pad_token_id=2)
    assert reply.ids == theirs[0, len(ids) :].tolist()
    assert reply.text == lm.tokenizer.decode(reply.ids)


def test_chat(lm: LanguageModel, tmp_path: Path) -> None:
    """Guards the template and its tokens, through the files that transformers reads."""
    lm.tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert lm.tokenizer.render_chat(CHAT) == theirs.apply_chat_template(
        CHAT, add_generation_prompt=True, tokenize=False
    )
    assert lm.tokenizer.encode_chat(CHAT) == theirs.apply_chat_template(CHAT, add_generation_prompt=True)["input_ids"]
    assert "Paris" in lm.chat(CHAT[:1], temperature=0.0, max_new_tokens=20)
