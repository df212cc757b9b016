"""Cached decoding equals decoding without a cache, token for token, whatever the session did before."""

from __future__ import annotations

import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from torch import Tensor
from torch.testing import assert_close

from tests import reference
from zoo.api import LanguageModel, load
from zoo.errors import InputError, ZooError
from zoo.generate.sampling import SamplingOptions
from zoo.generate.speculative import Speculation
from zoo.models.cache import KVCache
from zoo.models.rope import rotation_border
from zoo.registry import Registry


class Letters:
    """Only tokens that are ASCII letters: the tiny models' own choice is bytes that never make a character."""

    def __call__(self, logits_V: Tensor, seen: Sequence[int]) -> Tensor:
        kept = torch.full_like(logits_V, -torch.inf)
        kept[LETTERS] = logits_V[LETTERS]
        return kept


LETTERS = [sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()).index(c) for c in string.ascii_letters]
GREEDY = SamplingOptions(temperature=0.0, extra=(Letters(),))
VARIANTS = ["gpt2-by-layer", "gpt_neox", "llama-gqa", "llama-llama3", "qwen2-sliding", "smollm3", "phi3-longrope"]


@pytest.fixture(params=VARIANTS)
def lm(request: pytest.FixtureRequest, tmp_path: Path, registry: Registry) -> LanguageModel:
    """A tiny model of each family with a byte tokenizer; nothing ends its texts."""
    return tiny(request.param, tmp_path, registry)


def tiny(variant: str, tmp_path: Path, registry: Registry) -> LanguageModel:
    family, config = reference.VARIANTS[variant]
    reference.save_tiny(tmp_path, family, config | {"vocab_size": 258, "eos_token_id": None, "bos_token_id": None})
    reference.save_byte_tokenizer(tmp_path)
    loaded = load(tmp_path, precision="32-true", device="cpu", registry=registry)
    loaded.checkpoint.generation["eos_token_id"] = []
    return loaded


def uncached(lm: LanguageModel, prompt: list[int], n_tokens: int) -> list[int]:
    """The slow twin: the whole text through the model for every token."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(n_tokens):
            ids.append(int(Letters()(lm.model(torch.tensor([ids]))[0, -1], []).argmax()))
    return ids[len(prompt) :]


def test_greedy(lm: LanguageModel) -> None:
    """Guards positions, the cache's bookkeeping and the last-position logits."""
    prompt = lm.tokenizer.encode("Once upon")
    reply = lm.session().reply(prompt, max_new_tokens=30, sampling=GREEDY).read()
    assert reply.ids == uncached(lm, prompt, 30)
    assert reply.finish_reason == "length"
    assert reply.stats.new_tokens == 30
    assert reply.stats.prompt_tokens == len(prompt)


def test_a_session_reuses_what_prompts_share(lm: LanguageModel) -> None:
    """Guards prefix reuse: a longer, a shorter, a diverging and a repeated prompt all equal a fresh start."""
    session = lm.session()
    base = lm.tokenizer.encode("Once upon a")
    first = session.reply(base, max_new_tokens=8, sampling=GREEDY).read()
    for prompt in (base + first.ids[:5] + [3, 4], base[:6], [*base[:4], 77, 78], base, base):
        reply = session.reply(prompt, max_new_tokens=6, sampling=GREEDY).read()
        assert reply.ids == uncached(lm, prompt, 6)
    assert reply.stats.reused_tokens == len(base) - 1


def test_chunked_prefill(lm: LanguageModel) -> None:
    """Guards the alignment of several new tokens to a cache that is not empty."""
    ids = reference.tokens(1, 20, 258)
    cache = KVCache(lm.spec, capacity=20, dtype=torch.float32, device="cpu")
    with torch.no_grad():
        parts = [lm.model(chunk, cache=cache) for chunk in ids.split([7, 1, 9, 3], dim=1)]
        assert_close(torch.cat(parts, dim=1), lm.model(ids), atol=1e-4, rtol=1e-4)
    assert cache.length == 20


def test_where_longrope_changes_its_angles(tmp_path: Path, registry: Registry) -> None:
    """Guards its border, which each of these crosses: into a filled cache, back, by a chunk, by what was drafted."""
    lm = tiny("phi3-longrope", tmp_path, registry)
    border = rotation_border(lm.spec)
    assert border == 20
    session = lm.session()
    for length in (19, 20, 21, 30, 20, 12):
        prompt = reference.tokens(1, length, 258)[0].tolist()
        assert session.reply(prompt, max_new_tokens=3, sampling=GREEDY).read().ids == uncached(lm, prompt, 3)
    cache = KVCache(lm.spec, capacity=40, dtype=torch.float32, device="cpu")
    with torch.no_grad():
        lm.model(reference.tokens(1, 20, 258), cache=cache)
        with pytest.raises(ZooError, match="1 tokens can not follow the 20 in the cache"):
            lm.model(reference.tokens(1, 1, 258), cache=cache)
    prompt = lm.tokenizer.encode("Once upon")
    for draft_tokens in (1, 4, 30):
        speculation = Speculation(lm.drafter(lm), draft_tokens)
        reply = session.reply(prompt, max_new_tokens=25, sampling=GREEDY, speculation=speculation).read()
        assert reply.ids == uncached(lm, prompt, 25)
        assert reply.stats.accepted_tokens


def test_an_interrupted_reply_leaves_the_session_usable(lm: LanguageModel) -> None:
    """Guards Ctrl-C in a chat: what ran stays consistent."""
    session = lm.session()
    prompt = lm.tokenizer.encode("Once upon")
    pieces = iter(session.reply(prompt, max_new_tokens=20, sampling=GREEDY))
    for _ in range(3):
        next(pieces)
    again = session.reply(prompt, max_new_tokens=12, sampling=GREEDY).read()
    assert again.ids == uncached(lm, prompt, 12)


def test_stop_tokens_end_a_text(lm: LanguageModel) -> None:
    """Guards EOS sets: generation ends with any of them, and the text does not show it."""
    prompt = lm.tokenizer.encode("Once upon")
    ids = uncached(lm, prompt, 12)
    position = ids.index(ids[6])
    lm.checkpoint.generation["eos_token_id"] = [ids[6], 1000]
    reply = lm.session().reply(prompt, max_new_tokens=12, sampling=GREEDY).read()
    assert reply.ids == ids[: position + 1]
    assert reply.finish_reason == "stop"
    assert reply.text == lm.tokenizer.decode(ids[:position])


def test_stop_strings_span_tokens(lm: LanguageModel) -> None:
    """Guards the cut: the text ends before the stop string although each token is one byte."""
    options: dict[str, Any] = {"max_new_tokens": 40, "temperature": 0.0, "extra": (Letters(),)}
    whole = lm.generate("Once upon", **options)
    assert len(whole) == 40
    stop = whole[20:23]
    assert lm.generate("Once upon", stop=[stop], **options) == whole[: whole.index(stop)]


def test_samples_differ_and_are_reproducible(lm: LanguageModel) -> None:
    """Guards the random stream of each sample."""
    texts = [lm.generate("Once", max_new_tokens=12, temperature=1.5, seed=5, sample=i) for i in (0, 1, 0)]
    assert texts[0] == texts[2] != texts[1]


def test_requests_that_do_not_fit(lm: LanguageModel) -> None:
    """Guards the context: refused before any work, with the number that would fit."""
    session = lm.session()
    with pytest.raises(InputError, match="the prompt is empty"):
        session.reply([], max_new_tokens=1, sampling=GREEDY)
    with pytest.raises(InputError, match="the prompt has 64 tokens; this model's context holds 64"):
        session.reply([1] * 64, max_new_tokens=1, sampling=GREEDY)
    with pytest.raises(InputError, match="at most 4 new tokens"):
        session.reply([1] * 60, max_new_tokens=5, sampling=GREEDY)
    with pytest.raises(InputError, match="at least 1"):
        session.reply([1], max_new_tokens=0, sampling=GREEDY)
    with pytest.raises(InputError, match="token 258, but the model has only 258"):
        session.reply([258], max_new_tokens=1, sampling=GREEDY)
    assert len(session.reply([1] * 60, max_new_tokens=4, sampling=GREEDY).read().ids) == 4
