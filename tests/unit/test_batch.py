"""A batch: each row's tokens are those of its own run, whatever its neighbours are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import reference
from tests.unit.test_decode import Letters
from zoo.api import LanguageModel, load
from zoo.attention.base import AttentionRequest
from zoo.errors import InputError, UnavailableError, ZooError
from zoo.generate import batch
from zoo.generate.reply import Reply, Request
from zoo.generate.sampling import SamplingOptions
from zoo.models.cache import KVCache
from zoo.models.gpt import GPT
from zoo.registry import Registry

PROMPTS = ["Once upon a time there was", "Hi", "x", "Once upon", "abcabcabcabcabc abcabc", "Hi"]
LENGTHS = [12, 30, 1, 7, 30, 12]
SAMPLING = SamplingOptions(temperature=1.3, top_k=0, repetition_penalty=1.2, seed=11, extra=(Letters(),))
GREEDY = replace(SAMPLING, temperature=0.0)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Threads only slow such small models down, the more so on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=["gpt2-by-layer", "llama-gqa", "phi3-longrope"])
def lm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, registry: Registry) -> LanguageModel:
    """A tiny model with learned positions, and one with rotary ones; nothing ends their texts."""
    directory = tmp_path_factory.mktemp("model")
    family, config = reference.VARIANTS[request.param]
    reference.save_tiny(directory, family, config | {"vocab_size": 258, "eos_token_id": None, "bos_token_id": None})
    reference.save_byte_tokenizer(directory)
    loaded = load(directory, precision="32-true", device="cpu", registry=registry)
    loaded.checkpoint.generation["eos_token_id"] = []
    return loaded


def requests_for(lm: LanguageModel, sampling: SamplingOptions, **options: Any) -> list[Request]:
    """Rows that differ in everything a row may differ in."""
    return [
        Request(
            prompt_ids=lm.tokenizer.encode(prompt),
            max_new_tokens=n,
            sampling=sampling,
            sample=i,
            stop_ids=lm.stop_ids,
            **options,
        )
        for i, (prompt, n) in enumerate(zip(PROMPTS, LENGTHS, strict=True))
    ]


def alone(lm: LanguageModel, request: Request) -> Reply:
    """The slow twin: the same request in a session of its own."""
    session = lm.session()
    session.stop_ids = request.stop_ids
    reply = session.reply(
        request.prompt_ids,
        max_new_tokens=request.max_new_tokens,
        sampling=request.sampling,
        stop=request.stop,
        sample=request.sample,
    )
    return reply.read()


def together(lm: LanguageModel, requests: Sequence[Request], batch_size: int) -> list[Reply]:
    """The replies in order."""
    replies = dict(lm.run(requests, batch_size=batch_size))
    found = [replies[i] for i in range(len(requests))]
    assert all(isinstance(reply, Reply) for reply in found)
    return found  # type: ignore[return-value]


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLING], ids=["greedy", "sampling"])
@pytest.mark.parametrize("batch_size", [1, 3, 6])
def test_rows_equal_single_runs(lm: LanguageModel, sampling: SamplingOptions, batch_size: int) -> None:
    """Guards padding, positions, streams, rows that leave and prompts that occur twice."""
    requests = requests_for(lm, sampling)
    expected = [alone(lm, request) for request in requests]
    assert len({tuple(reply.ids) for reply in expected}) >= 5
    found = together(lm, requests, batch_size)
    assert [reply.ids for reply in found] == [reply.ids for reply in expected]
    assert [reply.text for reply in found] == [reply.text for reply in expected]
    assert [reply.stats.new_tokens for reply in found] == LENGTHS
    assert [reply.stats.prompt_tokens for reply in found] == [len(r.prompt_ids) for r in requests]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_windows_and_prompts_in_pieces(
    lm: LanguageModel, registry: Registry, monkeypatch: pytest.MonkeyPatch, attention: str
) -> None:
    """Guards sliding windows beside padding, and prefill in pieces: one that is padding alone must give no NaN."""
    monkeypatch.setattr(batch, "PREFILL_TOKENS", 18)
    model = GPT(replace(lm.spec, window=5), registry.load("attention", attention)()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    windowed = replace(lm, model=model)
    requests = requests_for(windowed, SAMPLING)
    assert [r.ids for r in together(windowed, requests, 6)] == [alone(windowed, r).ids for r in requests]


def test_stop_tokens_and_strings_are_each_row_s_own(lm: LanguageModel) -> None:
    """Guards rows that end early: by token, by string, by length, each leaving the others as they are."""
    base = [replace(r, max_new_tokens=25) for r in requests_for(lm, GREEDY)]
    whole = [alone(lm, request) for request in base]
    requests = [
        replace(base[0], stop_ids=frozenset({whole[0].ids[9]})),
        replace(base[1], stop=(whole[1].text[8:10],)),
        base[2],
        replace(base[3], stop_ids=frozenset({whole[3].ids[0]})),
    ]
    expected = [alone(lm, request) for request in requests]
    found = together(lm, requests, 4)
    assert [(r.ids, r.text, r.finish_reason) for r in found] == [(r.ids, r.text, r.finish_reason) for r in expected]
    assert [r.finish_reason for r in found] == ["stop", "stop", "length", "stop"]


def test_generate_batch(lm: LanguageModel) -> None:
    """Guards the Python API: row i is sample i of `generate`, and the size of the batches changes nothing."""
    options: dict[str, Any] = {"max_new_tokens": 9, "temperature": 1.5, "seed": 3, "extra": (Letters(),)}
    expected = [lm.generate(prompt, sample=i, **options) for i, prompt in enumerate(PROMPTS)]
    for size in (2, 16):
        assert [reply.text for reply in lm.generate_batch(PROMPTS, batch_size=size, **options)] == expected
    assert lm.generate_batch([]) == []


def test_a_prompt_in_common_runs_once(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the reuse of one prefill by many samples, and that their streams are those of single runs."""
    widths = []
    forward = type(lm.model).forward

    def counted(model: Any, tokens_BT: Tensor, **options: Any) -> Tensor:
        widths.append(tuple(tokens_BT.shape))
        return forward(model, tokens_BT, **options)

    options: dict[str, Any] = {"max_new_tokens": 5, "temperature": 1.5, "seed": 3, "extra": (Letters(),)}
    expected = [lm.generate("Once upon", sample=i, **options) for i in range(4)]
    monkeypatch.setattr(type(lm.model), "forward", counted)
    assert [r.text for r in lm.generate_batch(["Once upon"] * 4, **options)] == expected
    assert widths == [(1, len(lm.tokenizer.encode("Once upon"))), *[(4, 1)] * 4]
    assert len(set(expected)) == 4


class Overflow:
    """A step that breaks where a text contains an x."""

    def __call__(self, logits_V: Tensor, seen: Sequence[int]) -> Tensor:
        return logits_V * (torch.nan if 87 in seen else 1.0)


def test_a_row_that_fails_leaves_the_others(lm: LanguageModel) -> None:
    """Guards a job against one prompt whose logits overflow."""
    requests = requests_for(lm, replace(GREEDY, extra=(Letters(), Overflow())))
    broken = [i for i, r in enumerate(requests) if 87 in r.prompt_ids]
    found = dict(lm.run(requests, batch_size=6))
    failed = [i for i in range(len(requests)) if isinstance(found[i], ZooError)]
    assert set(broken) <= set(failed) < set(range(len(requests)))
    with pytest.raises(ZooError, match="not finite"):
        lm.generate_batch([PROMPTS[i] for i in broken], temperature=0.0, extra=(Overflow(),))


def test_refusals(lm: LanguageModel) -> None:
    """Guards early errors: a prompt that does not fit, a size of 0, a backend that would show the padding."""
    with pytest.raises(InputError, match="this model's context holds 64"):
        lm.generate_batch(["ok", "x" * 64])
    with pytest.raises(InputError, match="batch_size must be at least 1, not 0"):
        lm.generate_batch(["ok"], batch_size=0)

    class Narrow:
        """A plugin's backend that knows causal masks alone."""

        def supports(self, request: AttentionRequest) -> list[str]:
            return [f"no {name}" for name in request.mask_features - {"causal"}]

        def __call__(self, *tensors: Tensor, **options: Any) -> Tensor:
            raise AssertionError("not asked")

    with pytest.raises(UnavailableError, match="can not serve a batch: no padding"):
        replace(lm, backend=Narrow()).generate_batch(["ok"])


def test_select_rows_of_a_cache(lm: LanguageModel) -> None:
    """Guards rows that leave and rows that are doubled: keys, values, length and capacity."""
    cache = KVCache(lm.spec, capacity=6, batch=3, dtype=torch.float32, device="cpu")
    k, v, more = (torch.randn(3, 4, lm.spec.n_kv_heads, lm.spec.d_head) for _ in range(3))
    for layer in range(lm.spec.n_layers):
        cache.append(layer, k + layer, v - layer)
    cache.advance(4)
    cache.select([2, 0, 2, 2])
    one = more[[0, 1, 2, 0], :1]
    for layer in range(lm.spec.n_layers):
        keys, values = cache.append(layer, one, one)
        assert torch.equal(keys, torch.cat([(k + layer)[[2, 0, 2, 2]], one], 1))
        assert torch.equal(values, torch.cat([(v - layer)[[2, 0, 2, 2]], one], 1))
    assert (cache.length, cache.capacity) == (4, 6)
