"""Whole models: logits, gradients, cached decoding and greedy text are those of torch's own attention."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import reference
import tier
import torch
import zoo_flash_attn
from test_decoding import record_calls
from tier import DEVICE, Backend
from tokenizers import Tokenizer as Tokens
from tokenizers import decoders, models, pre_tokenizers
from torch import Tensor

import zoo
from zoo.attention.base import AttentionBackend
from zoo.attention.eager import Eager
from zoo.attention.sdpa import SDPA
from zoo.models.attention import Attention
from zoo.models.gpt import GPT
from zoo.models.masks import CAUSAL, Mask
from zoo.plugins import PluginSelection, load_zoo
from zoo.registrar import Registrar
from zoo.registry import Component, ModelEntry, Origin, Registry
from zoo.text.tokenizer import Tokenizer

LETTERS = " abcdefghijklmnopqrstuvwxyz.,'\n"
TINY: dict[str, Any] = {"n_layers": 3, "d_model": 128, "d_ffn": 160, "vocab_size": len(LETTERS), "max_seq_len": 128}
GROUPED = TINY | {"n_heads": 4, "n_kv_heads": 2, "d_head": 32, "rope": {"n_dims": 32}}
MODELS: dict[str, dict[str, Any]] = {
    "gpt2": TINY | {"n_heads": 4, "n_kv_heads": 4, "d_head": 32},
    "pythia-14m": TINY | {"n_heads": 4, "n_kv_heads": 4, "d_head": 32, "rope": {"n_dims": 16}},
    "smollm2-135m": GROUPED,
    "smollm3-3b": GROUPED | {"unrotated_layers": [1]},
    "mistral-7b-v0.1": GROUPED | {"window": 7},
    "gemma-2-2b": GROUPED
    | {"window": 7, "full_attention_layers": [1], "attn_softcap": 5.0}
    | {"embed_scale": TINY["d_model"] ** 0.5, "tie_embeddings": False},
}
"""Positions from a table, partial rotation, shared heads, a layer without rotation, a window, soft caps."""

N_NEW = 24

every_model = pytest.mark.parametrize("name", MODELS)
every_half = pytest.mark.parametrize("dtype", reference.HALVES)


@pytest.fixture(scope="module")
def registry() -> Registry:
    """zoo's components and this plugin's; without a GPU, the backend that also serves the CPU."""
    items: list[Component | ModelEntry] = []
    zoo_flash_attn.zoo_register_attention(Registrar("attention", Origin(distribution="zoo-flash-attn"), items))
    (component,) = items
    assert isinstance(component, Component)
    registry = load_zoo(PluginSelection(only=frozenset())).registry
    if not tier.ON_GPU:
        component = replace(component, target="tier:Backend", needs=None)
    registry.add(component)
    return registry


def randomized(name: str, registry: Registry) -> GPT:
    """A tiny one in float32 with every parameter random, the same at every call."""
    torch.manual_seed(0)
    model: GPT = zoo.build(name, registry=registry, **MODELS[name])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(DEVICE).eval()


def attending(model: GPT, backend: AttentionBackend, dtype: torch.dtype) -> GPT:
    """A copy of the model in this dtype that attends with this backend."""
    twin = deepcopy(model).to(dtype)
    for module in twin.modules():
        if isinstance(module, Attention):
            module.attend = backend
    return twin


def plain_backend(model: GPT) -> AttentionBackend:
    return SDPA() if model.spec.attn_softcap is None else Eager()


def ids(batch: int = 2, length: int = 48) -> Tensor:
    return torch.randint(len(LETTERS), (batch, length), generator=torch.Generator().manual_seed(1)).to(DEVICE)


def compare(model: GPT, flash: AttentionBackend, dtype: torch.dtype, run: Callable[[GPT], Tensor]) -> None:
    """Assert that ``run`` is as near to float32 with this backend as with torch's own in the same dtype."""
    exact = run(attending(model, Eager(), torch.float32)).double()
    plain = run(attending(model, plain_backend(model), dtype))
    found = run(attending(model, flash, dtype))
    assert (plain.double() - exact).abs().max() < 0.05 * exact.abs().max(), "the yardstick itself is off"
    reference.check(found, plain, exact)


@every_model
@every_half
@torch.no_grad()
def test_logits(name: str, dtype: torch.dtype, flash: Backend, registry: Registry) -> None:
    """Guards scales, windows and caps as the model hands them over, also for documents of their own."""
    documents = torch.arange(48, device=DEVICE).expand(2, -1) // 20
    for mask in (CAUSAL, Mask(documents_BS=documents)):
        compare(randomized(name, registry), flash, dtype, lambda model, mask=mask: model(ids(), mask=mask))  # type: ignore[misc]


@every_model
def test_gradients(name: str, flash: Backend, registry: Registry) -> None:
    """Guards training: every parameter's gradient, relative to its largest."""
    model = randomized(name, registry)
    weights = torch.randn(2, 48, len(LETTERS), device=DEVICE)

    def gradients(backend: AttentionBackend, dtype: torch.dtype) -> dict[str, Tensor]:
        twin = attending(model, backend, dtype)
        (twin(ids()) * weights.to(dtype)).sum().backward()
        return {name: p.grad for name, p in twin.named_parameters() if p.grad is not None}

    exact = gradients(Eager(), torch.float32)
    if model.spec.rope is None:  # the same amount on all keys changes nothing
        exact = {key: gradient for key, gradient in exact.items() if not key.endswith("attn.k.bias")}
    plain = gradients(plain_backend(model), torch.bfloat16)
    found = gradients(flash, torch.bfloat16)
    assert found.keys() == dict(model.named_parameters()).keys()
    for key, gradient in exact.items():
        error, allowed = ((g[key].double() - gradient).norm() / gradient.norm() for g in (found, plain))
        assert error <= reference.OF_GRADIENTS * allowed + 1e-4, key


@every_model
@every_half
@torch.inference_mode()
def test_cached_decoding(name: str, dtype: torch.dtype, flash: Backend, registry: Registry) -> None:
    """Guards chunks after other chunks (causality is aligned to the last key), single steps, and padded rows."""

    def in_parts(model: GPT) -> Tensor:
        cache, parts = model.new_cache(64, batch=2), []
        for part in ids().split([9, 20, 5, 1, 1, 1, 1, 10], dim=1):
            parts.append(model(part, cache=cache))
        return torch.cat(parts, dim=1)

    def with_padding(model: GPT) -> Tensor:
        cache, parts = model.new_cache(64, batch=2), []
        padding_B = torch.tensor([0, 7], device=DEVICE)
        for part in ids().split([9, 20, 5, 1, 1, 12], dim=1):
            positions_BT = torch.arange(part.shape[1], device=DEVICE) + cache.length - padding_B[:, None]
            mask = Mask(padding_B=padding_B)
            parts.append(model(part, positions_BT=positions_BT.clamp(min=0), mask=mask, cache=cache))
        logits = torch.cat(parts, dim=1)
        return torch.cat((logits[0], logits[1, 7:]))  # those of padding are of no use

    model = randomized(name, registry)
    compare(model, flash, dtype, in_parts)
    compare(model, flash, dtype, with_padding)
    whole = attending(model, flash, dtype)
    torch.testing.assert_close(in_parts(whole), whole(ids()), atol=0.1, rtol=0.1)


@every_model
@torch.inference_mode()
def test_a_step_is_one_kernel(name: str, flash: Backend, registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards decoding: new keys are stored, and where they rotate rotated, by the kernel; a prompt takes the other."""
    model, calls = attending(randomized(name, registry), flash, torch.float16), record_calls(monkeypatch)
    cache = model.new_cache(64)
    model(ids(1, 20), cache=cache)
    assert [call for call, _, _ in calls] == ["dense"] * 3
    calls.clear()
    model(ids(1, 1), cache=cache)
    assert [call for call, _, _ in calls] == ["cached"] * 3
    for layer, (_, (_, keys, _), options) in enumerate(calls):
        assert options["k"].shape[1] == 1 and keys.shape[1] == 64 and options["cache_seqlens"].tolist() == [20]
        rotates = model.spec.rope is not None and layer not in model.spec.unrotated_layers
        assert (options["rotary_cos"] is not None) == rotates
        assert keys[:, 20].any() and not keys[:, 21:].any()
    calls.clear()
    model.train()(ids(1, 1), cache=cache)
    assert [call for call, _, _ in calls] == ["dense"] * 3, "the kernel that stores has no dropout"


@torch.no_grad()
def decisive_prompt(model: GPT, length: int) -> str:
    """Of many random prompts one whose greedy text never comes near a tie, which rounding could turn, and is varied."""
    start = torch.randint(len(LETTERS), (128, length), generator=torch.Generator().manual_seed(length)).to(DEVICE)
    seen, gaps = start, torch.full((128,), torch.inf, device=DEVICE)
    for _ in range(N_NEW):
        best, token = model(seen, last_only=True)[:, -1].topk(2)
        gaps = gaps.minimum(best[:, 0] - best[:, 1])
        seen = torch.cat((seen, token[:, :1]), dim=1)
    variety = torch.tensor([len(set(row)) for row in seen[:, length:].tolist()], device=DEVICE) * (gaps > 0.02)
    assert variety.max() >= 4
    return "".join(LETTERS[i] for i in start[variety.argmax()].tolist())


@every_model
def test_greedy_text(name: str, tmp_path: Path, flash: Backend, registry: Registry) -> None:
    """Guards the whole way from ``zoo.load`` to text: prompts together, with padding, and one by one, with a step."""
    tokens = Tokens(models.WordLevel({letter: i for i, letter in enumerate(LETTERS)}, unk_token=" "))
    tokens.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokens.decoder = decoders.Fuse()
    tokens.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text("{}")
    tokenizer = Tokenizer.from_directory(tmp_path)
    model, path = randomized(name, registry), tmp_path / "model"
    prompts = [decisive_prompt(model, 16), decisive_prompt(model, 3)]
    zoo.save(model.cpu(), path, like=name, tokenizer=tokenizer, registry=registry, **MODELS[name])
    plain = "eager" if model.spec.attn_softcap is not None else "sdpa"
    texts: list[list[str]] = []
    for attention in (plain, "flash"):
        lm = zoo.load(path, attention=attention, precision="16-true", device=DEVICE, registry=registry)
        assert lm.attention == attention
        options: dict[str, Any] = {"max_new_tokens": N_NEW, "temperature": 0.0}
        together = [reply.text for reply in lm.generate_batch(prompts, **options)]
        texts.append([*together, *(lm.generate(prompt, **options) for prompt in prompts)])
    assert texts[0] == texts[1] and texts[0][:2] == texts[0][2:]
    assert all(len(text) == N_NEW and len(set(text)) >= 4 for text in texts[0])
