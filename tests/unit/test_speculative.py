"""Speculative decoding loses nothing: greedy it is the model's own text, sampled it has the model's distribution."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice, product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import reference
from tests.unit.test_decode import Letters
from zoo.api import LanguageModel, build, load
from zoo.errors import InputError
from zoo.generate.cached import CachedTokens
from zoo.generate.decode import decode
from zoo.generate.reply import Stats
from zoo.generate.sampling import SamplingOptions, TokenSampler
from zoo.generate.speculative import Draft, Drafter, ModelDrafter, NgramDrafter, Speculation, speculate, verify
from zoo.models.gpt import GPT
from zoo.registry import Registry


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Threads only slow such small models down, the more so on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, registry: Registry) -> tuple[LanguageModel, LanguageModel]:
    """A model and a draft: the same tokenizer, other weights, and one layer of the three."""
    loaded = []
    for layers in (3, 1):
        directory = tmp_path_factory.mktemp("model")
        reference.save_tiny_chat_model(directory, num_hidden_layers=layers, max_position_embeddings=60 + layers)
        loaded.append(load(directory, precision="32-true", device="cpu", registry=registry))
        loaded[-1].checkpoint.generation["eos_token_id"] = []
    return loaded[0], loaded[1]


def drafters(models: tuple[LanguageModel, LanguageModel]) -> dict[str, Drafter]:
    """Each kind; ``itself`` drafts what the model will say, ``stubborn`` the same wrong token."""
    lm, draft = models

    class Stubborn:
        def propose(self, ids: Sequence[int], k: int, sampler: TokenSampler) -> Draft:
            probs_KV = torch.zeros(k, lm.spec.vocab_size)
            probs_KV[:, 3] = 1
            return Draft([3] * k, probs_KV)

    return {
        "ngram": lm.drafter(),
        "draft": lm.drafter(draft),
        "itself": lm.drafter(lm),
        "stubborn": Stubborn(),
    }


KINDS = ["ngram", "draft", "itself", "stubborn"]
OPTIONS: dict[str, Any] = {"max_new_tokens": 40, "extra": (Letters(),), "stream": True}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("draft_tokens", [1, 4, 100])
@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_greedy_is_the_model_s_own(
    models: tuple[LanguageModel, LanguageModel], kind: str, draft_tokens: int, penalty: float
) -> None:
    """Guards against a first token that is dropped, and acceptance by probability where the likeliest is asked for.

    The penalty makes each distribution depend on the tokens that were drafted before it.
    """
    lm = models[0]
    options = OPTIONS | {"temperature": 0.0, "repetition_penalty": penalty}
    plain = lm.generate("abcabcabcabc", **options).read()
    fast = lm.generate("abcabcabcabc", drafter=drafters(models)[kind], draft_tokens=draft_tokens, **options).read()
    assert fast.ids == plain.ids
    assert fast.text == plain.text
    assert fast.stats.new_tokens == 40
    assert (fast.stats.acceptance_rate == 1.0) == (kind == "itself")
    assert kind != "stubborn" or fast.stats.acceptance_rate == 0.0
    assert plain.stats.acceptance_rate is None


def test_fewer_forwards(models: tuple[LanguageModel, LanguageModel], monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the point of it all: k accepted tokens cost one forward of the model."""
    lm = models[0]
    twin, forwards = lm.drafter(lm), []
    run = CachedTokens.run

    def counted(cached: CachedTokens, ids: Sequence[int], *, last_only: bool = True) -> Tensor:
        if not last_only:
            forwards.append(len(ids))
        return run(cached, ids, last_only=last_only)

    monkeypatch.setattr(CachedTokens, "run", counted)
    lm.generate("abc", drafter=twin, draft_tokens=4, temperature=0.0, **OPTIONS).read()
    assert forwards == [5] * 7 + [4]  # 1 + 7 * 5 + 4 = 40


@pytest.mark.parametrize("kind", KINDS)
def test_seeds(models: tuple[LanguageModel, LanguageModel], kind: str) -> None:
    """Guards reproducibility: one stream for drafts, acceptance and replacements."""
    lm, drafter = models[0], drafters(models)[kind]
    options = OPTIONS | {"temperature": 1.5, "top_k": 0, "drafter": drafter}
    first, again, other = (lm.generate("abcabc", seed=seed, **options).read().ids for seed in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize("kind", KINDS)
def test_stops_inside_a_block(models: tuple[LanguageModel, LanguageModel], kind: str) -> None:
    """Guards stop tokens and strings among accepted tokens, and the session's cache after them."""
    lm, drafter = models[0], drafters(models)[kind]
    options = OPTIONS | {"temperature": 0.0, "draft_tokens": 6}
    plain = lm.generate("abcabc", **options).read()
    for position in (0, 3, 4):
        stop = plain.text[position : position + 2]
        cut = lm.generate("abcabc", stop=[stop], drafter=drafter, **options).read()
        assert cut.text == plain.text[: plain.text.index(stop)]
        assert cut.finish_reason == "stop"
        assert lm.generate("abcabc", **options).read().ids == plain.ids
    session = lm.session()
    session.stop_ids = frozenset({plain.ids[5]})
    reply = session.reply(
        lm.tokenizer.encode("abcabc"),
        max_new_tokens=40,
        sampling=SamplingOptions(temperature=0.0, extra=(Letters(),)),
        speculation=Speculation(drafter, 6),
    ).read()
    assert reply.ids == plain.ids[: plain.ids.index(plain.ids[5]) + 1]


def test_a_chat_goes_on_after_a_rejection(models: tuple[LanguageModel, LanguageModel]) -> None:
    """Guards the cache: rejected tokens must not stay in it when the next prompt begins with the reply."""
    lm = models[0]
    options = OPTIONS | {"temperature": 0.0, "max_new_tokens": 10}
    for drafter in drafters(models).values():
        said = lm.generate("abcabc", drafter=drafter, **options).read().text
        fresh = lm.session().reply(
            lm.tokenizer.encode(f"abcabc{said}xy"),
            max_new_tokens=10,
            sampling=SamplingOptions(temperature=0.0, extra=(Letters(),)),
        )
        assert lm.generate(f"abcabc{said}xy", drafter=drafter, **options).read().ids == fresh.read().ids


def tiny(vocab_size: int = 5, *, noise: float = 0.0) -> GPT:
    """A model with so few tokens that pairs can be counted, far from uniform; with noise, one that resembles it."""
    model = build(
        "gpt2",
        vocab_size=vocab_size,
        n_layers=1,
        d_model=8,
        n_heads=2,
        n_kv_heads=2,
        d_head=4,
        d_ffn=16,
        max_seq_len=16,
    ).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.7, generator=generator)
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=noise)
    return model


class Tokens:
    """A tokenizer as far as a drafter looks at one."""

    def __init__(self, tokens: str) -> None:
        self.backend = self
        self._tokens = tokens

    def get_vocab(self) -> dict[str, int]:
        return {token: i for i, token in enumerate(self._tokens)}


PROMPT = [0, 1, 2, 0, 1]
STEPS = {
    "plain": SamplingOptions(temperature=1.0, top_k=0, seed=1),
    "chain": SamplingOptions(temperature=0.8, top_k=3, repetition_penalty=1.5, seed=2),
}


def exact(model: GPT, options: SamplingOptions, n: int) -> dict[tuple[int, ...], float]:
    """The probability of every continuation of ``n`` tokens, by the model without cache, draft or draws."""
    sampler = TokenSampler(options)
    found: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(n):
        longer: dict[tuple[int, ...], float] = {}
        for tokens, probability in found.items():
            ids = [*PROMPT, *tokens]
            with torch.no_grad():
                probs_V = sampler.probabilities(model(torch.tensor([ids]))[0, -1], ids)
            longer |= {(*tokens, i): probability * float(p) for i, p in enumerate(probs_V)}
        found = longer
    return found


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("kind", ["ngram", "draft", "none"])
def test_the_distribution_is_the_model_s(kind: str, steps: str) -> None:
    """Guards the rule itself, over the second and third token: a chi-square test at one in a million, seeded.

    Draws for drafts that are not independent of those for acceptance, a residual without q, a refused token drawn
    anew from p: each shifts these counts.
    """
    model, options, n = tiny(), STEPS[steps], 2000
    twin = ModelDrafter(tiny(noise=-0.2), Tokens("abcde"), model, Tokens("abcde"))  # type: ignore[arg-type]
    kinds: dict[str, Drafter | None] = {"ngram": NgramDrafter(5), "draft": twin, "none": None}
    draft = kinds[kind]
    sampler, stats, cached = TokenSampler(options), Stats(), CachedTokens(model)
    counts: Counter[tuple[int, ...]] = Counter()
    for _ in range(n):
        fresh, seen = cached.start(PROMPT, 16), list(PROMPT)
        if draft is None:
            tokens = decode(cached, fresh, seen, sampler)
        else:
            tokens = speculate(cached, fresh, seen, sampler, Speculation(draft, 2), 4, stats)
        counts[tuple(islice(tokens, 3))[1:]] += 1
    expected: dict[Any, float] = dict.fromkeys(product(range(5), repeat=2), 0.0)
    for (_, second, third), probability in exact(model, options, 3).items():
        expected[second, third] += probability * n
    assert not [pair for pair in counts if expected[pair] == 0]
    assert chi_square(counts, expected) < 1
    if draft is not None:
        assert 0.1 < (stats.acceptance_rate or 0) < 0.9


def chi_square(counts: Counter[tuple[int, ...]], expected: dict[Any, float]) -> float:
    """The statistic over its quantile at one in a million (Wilson-Hilferty); rare pairs are counted together."""
    pairs = sorted(expected, key=lambda pair: expected[pair])
    cells, rare = [], [0.0, 0.0]
    for pair in pairs:
        if rare[1] < 5:
            rare = [rare[0] + counts[pair], rare[1] + expected[pair]]
        else:
            cells.append((counts[pair], expected[pair]))
    statistic = sum((found - wanted) ** 2 / wanted for found, wanted in [*cells, tuple(rare)])
    spread = 2 / (9 * len(cells))
    return float(statistic / (len(cells) * (1 - spread + 4.753 * spread**0.5) ** 3))


def test_verify_by_hand() -> None:
    """Guards min(1, p/q) and max(0, p - q) with numbers that can be followed: q says 0, p says 0 or 1 evenly."""
    logits_TV = torch.tensor([[0.0, 0.0, -torch.inf], [0.0, -torch.inf, -torch.inf]])
    sampler = TokenSampler(SamplingOptions(temperature=1.0, top_k=0, seed=3))
    point = Draft([0], torch.tensor([[1.0, 0.0, 0.0]]))
    results = Counter(tuple(verify(point, logits_TV, [2], sampler)) for _ in range(1000))
    assert set(results) == {(0, 0), (1,)}
    assert 400 < results[1,] < 600
    unlikely = Draft([0], torch.tensor([[0.25, 0.75, 0.0]]))  # p/q = 2: always kept
    assert {tuple(verify(unlikely, logits_TV, [2], sampler)) for _ in range(200)} == {(0, 0)}


@pytest.mark.parametrize(
    ("ids", "k", "expected"),
    [
        ([1, 2, 3, 9, 1, 2, 3], 4, [9, 1, 2, 3]),
        ([1, 2, 3, 9, 1, 2, 3], 2, [9, 1]),
        ([5, 2, 3, 7, 1, 2, 3, 8, 5, 2, 3], 1, [7]),
        ([2, 3, 7, 2, 3, 8, 4, 2, 3], 1, [8]),
        ([1, 1, 1], 3, [1]),
        ([1, 2, 3], 3, []),
        ([1], 3, []),
        ([1, 2, 1, 2], 0, []),
    ],
)
def test_lookup(ids: list[int], k: int, expected: list[int]) -> None:
    """Guards the choice: the longest match first, then the latest."""
    draft = NgramDrafter(10).propose(ids, k, TokenSampler(SamplingOptions()))
    assert draft.tokens == expected
    assert torch.equal(draft.probs_KV, torch.eye(10)[expected])


def test_another_vocabulary_is_refused(
    models: tuple[LanguageModel, LanguageModel], tmp_path: Path, registry: Registry
) -> None:
    """Guards against a draft whose ids mean something else: same size, two tokens swapped."""
    reference.save_tiny_chat_model(tmp_path)
    path = tmp_path / "tokenizer.json"
    files = json.loads(path.read_text())
    vocab = files["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    path.write_text(json.dumps(files))
    other = load(tmp_path, precision="32-true", device="cpu", registry=registry)
    with pytest.raises(InputError, match="another vocabulary: 4 entries differ"):
        models[0].drafter(other)


@pytest.mark.parametrize(("ours", "theirs"), list(product([5, 8], repeat=2)))
def test_padded_tables(ours: int, theirs: int) -> None:
    """Guards models of one tokenizer whose embeddings are padded to different sizes, and contexts that end."""
    model, tokens = tiny(ours), Tokens("abcde")
    drafter = ModelDrafter(tiny(theirs), tokens, model, tokens)  # type: ignore[arg-type]
    sampler = TokenSampler(SamplingOptions(temperature=1.0, top_k=0, seed=1))
    cached = CachedTokens(model)
    for _ in range(20):
        seen = list(PROMPT)
        tokens_of = speculate(cached, cached.start(PROMPT, 16), seen, sampler, Speculation(drafter, 3), 11, Stats())
        found = list(tokens_of)
        assert len(found) == 11
        assert max(found) < ours
    assert len(drafter.propose([0] * 14, 5, sampler).tokens) == 2
    assert drafter.propose([0] * 16, 5, sampler).tokens == []


def test_draft_tokens_out_of_range() -> None:
    """Guards the message."""
    with pytest.raises(InputError, match="draft_tokens must be at least 1, not 0"):
        Speculation(NgramDrafter(5), 0)
