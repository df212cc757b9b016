"""The model that is compiled for single tokens says what the model says of which it is made."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from tests import reference
from zoo.api import load
from zoo.generate.one_token import one_token_model
from zoo.models.cache import KVCache
from zoo.models.gpt import GPT
from zoo.models.static_cache import StaticKVCache
from zoo.registry import Registry


def step_by_step(model: GPT, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Logits (B, T, V), a token at a time, with room for eight more in the cache."""
    cache = KVCache(model.spec, capacity=ids.shape[1] + 8, batch=ids.shape[0], dtype=dtype, device="cpu")
    logits = []
    for i in range(ids.shape[1]):
        position_T = torch.tensor([i])
        static = StaticKVCache(*cache.tensors, position_T)
        logits.append(model(ids[:, i : i + 1], positions_BT=position_T[None], mask=static.mask, cache=static))
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("variant", sorted(reference.VARIANTS))
def test_every_variant(variant: str, tmp_path: Path, registry: Registry) -> None:
    """Guards windows, soft caps, scales, biases, norms and embeddings of all families, in float32."""
    reference.save_tiny(tmp_path, *reference.VARIANTS[variant])
    model = load(tmp_path, precision="32-true", device="cpu", registry=registry).model
    ids = reference.tokens(2, 14)
    with torch.no_grad():
        assert_close(step_by_step(one_token_model(model), ids, torch.float32), model(ids), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
@pytest.mark.parametrize("variant", ["llama-tied", "gpt2", "llama-biases"])
def test_low_precision(variant: str, quantize: str | None, tmp_path: Path, registry: Registry) -> None:
    """Guards the weights that are shared: the result is that of bfloat16 weights, and no farther off than bfloat16."""
    reference.save_tiny(tmp_path, *reference.VARIANTS[variant])
    model = load(tmp_path, precision="bf16-true", device="cpu", quantize=quantize, registry=registry).model
    exact = load(tmp_path, precision="32-true", device="cpu", quantize=quantize, registry=registry).model
    ids = reference.tokens(1, 14)
    with torch.no_grad():
        found = step_by_step(one_token_model(model), ids, torch.bfloat16)
        expected = exact(ids)
        error = (model(ids).float() - expected).abs().max()
    assert found.dtype == torch.float32
    assert (found - expected).abs().max() <= 1.5 * error


def test_weights_are_shared(tmp_path: Path, registry: Registry) -> None:
    """Guards memory: the twin holds no second copy of a matrix."""
    reference.save_tiny(tmp_path, *reference.VARIANTS["llama-tied"])
    model = load(tmp_path, precision="bf16-true", device="cpu", registry=registry).model
    twin = one_token_model(model)
    ours = {t.data_ptr() for t in (*model.parameters(), *model.buffers())}
    added = [t for t in (*twin.parameters(), *twin.buffers()) if t.data_ptr() not in ours]
    assert all(t.ndim == 1 for t in added)
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
