"""Windows, soft caps and tied weights in whole models: where other libraries went wrong with a cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from tests import reference
from zoo.attention.eager import Eager
from zoo.attention.sdpa import SDPA
from zoo.convert.load import load_model, open_checkpoint
from zoo.models.attention import Attend
from zoo.models.cache import KVCache
from zoo.models.gpt import GPT
from zoo.models.masks import Mask
from zoo.registry import Registry

IDS = reference.tokens(1, 30)


def model_of(variant: str, directory: Path, registry: Registry, attend: Attend | None = None, **changes: Any) -> GPT:
    family, config = reference.VARIANTS[variant]
    reference.save_tiny(directory, family, config | changes)
    return load_model(open_checkpoint(directory, registry), attend or Eager(), dtype=torch.float32)


def cache_for(model: GPT) -> KVCache:
    return KVCache(model.spec, capacity=IDS.shape[1], dtype=torch.float32, device="cpu")


@torch.no_grad()
def test_a_soft_capped_prefill_with_a_cache_is_causal(tmp_path: Path, registry: Registry) -> None:
    """Guards against a mask that is added to capped scores as 0 and 1, so that a prompt sees its own future."""
    model = model_of("gemma2", tmp_path, registry)
    changed = IDS.clone()
    changed[0, -1] = (changed[0, -1] + 1) % 97
    before, after = (model(ids, cache=cache_for(model)) for ids in (IDS, changed))
    assert torch.equal(before[:, :-1], after[:, :-1])
    assert not torch.allclose(before[:, -1], after[:, -1], atol=0.1)
    assert_close(before, model(IDS), atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("chunks", [[30], [20, 10], [29, 1]])
@pytest.mark.parametrize("attend", [Eager(), SDPA()])
def test_a_prompt_longer_than_the_window(chunks: list[int], attend: Attend, tmp_path: Path, registry: Registry) -> None:
    """Guards a cached prefill of more tokens than the window holds, at once, in chunks and before one more token."""
    model = model_of("mistral", tmp_path, registry, attend)
    assert model.spec.window == 8
    cache = cache_for(model)
    cached = torch.cat([model(chunk, cache=cache) for chunk in IDS.split(chunks, dim=1)], dim=1)
    assert_close(cached, model(IDS), atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(("variant", "blind"), [("mistral", True), ("mistral-no-window", False), ("gemma2", True)])
def test_what_one_layer_sees(variant: str, blind: bool, tmp_path: Path, registry: Registry) -> None:
    """Guards the width: with a window of 8, the first token reaches the eighth and not the ninth."""
    model = model_of(variant, tmp_path, registry, num_hidden_layers=1)
    changed = IDS.clone()
    changed[0, 0] = (changed[0, 0] + 1) % 97
    moved = (model(IDS) - model(changed)).abs().amax(-1)[0]
    assert bool((moved[:8] > 1e-4).all())
    assert bool((moved[8:] == 0).all()) == blind


@torch.no_grad()
@pytest.mark.parametrize(("variant", "dense"), [("mistral", True), ("mistral-wide-window", False)])
def test_a_window_wider_than_the_context_costs_nothing(
    variant: str, dense: bool, tmp_path: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards SDPA's fused path: a window that hides nothing must not build a mask of T x S."""
    model = model_of(variant, tmp_path, registry, SDPA())
    built, original = [], Mask.dense

    def counted(mask: Mask, n_queries: int, n_keys: int, device: torch.device) -> Tensor:
        built.append((n_queries, n_keys))
        return original(mask, n_queries, n_keys, device)

    monkeypatch.setattr(Mask, "dense", counted)
    model(IDS)
    assert bool(built) == dense


@pytest.mark.parametrize("variant", ["gemma", "gemma2", "falcon", "gpt_bigcode", "olmo-clipped", "mistral-wide-window"])
def test_tied_weights_are_one_tensor(variant: str, tmp_path: Path, registry: Registry) -> None:
    """Guards against two copies after loading: they would be trained apart, and one of them lost on export."""
    model = model_of(variant, tmp_path, registry)
    assert model.head.weight is model.embed.weight
    names = [name for name, _ in model.named_parameters()]
    assert "embed.weight" in names and "head.weight" not in names
    model(IDS).square().mean().backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    assert torch.equal(model.head.weight, model.embed.weight)
