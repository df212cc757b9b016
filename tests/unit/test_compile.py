"""Compiled decoding says the same as decoding, and says what it lacks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from tests import reference
from zoo.api import load
from zoo.errors import UnavailableError
from zoo.generate.sampling import SamplingOptions
from zoo.models.cache import KVCache
from zoo.models.static_cache import StaticKVCache
from zoo.registry import Registry

GREEDY = SamplingOptions(temperature=0.0)


@pytest.mark.parametrize("variant", ["gpt2", "gpt_neox", "llama-gqa", "llama-llama3"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_cache_of_fixed_length(variant: str, attention: str, tmp_path: Path, registry: Registry) -> None:
    """Guards the mask and the positions of the static cache, uncompiled: room beyond the text must stay hidden."""
    reference.save_tiny(tmp_path, *reference.VARIANTS[variant])
    model = load(tmp_path, precision="32-true", attention=attention, device="cpu", registry=registry).model
    ids = reference.tokens(2, 12)
    cache = KVCache(model.spec, capacity=20, batch=2, dtype=torch.float32, device="cpu")
    with torch.no_grad():
        expected = model(ids)
        found = [model(ids[:, :8], cache=cache)]
        for i in range(8, 12):
            position_T = torch.tensor([i])
            static = StaticKVCache(*cache.tensors, position_T)
            found.append(model(ids[:, i : i + 1], positions_BT=position_T[None], mask=static.mask, cache=static))
        assert_close(torch.cat(found, dim=1), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("options", [{}, {"quantize": "int8"}], ids=["float", "int8"])
def test_compiled_text(options: dict[str, Any], tmp_path: Path, registry: Registry) -> None:
    """Guards the compiled step against the plain one, token for token, with a prefix that is kept between replies."""
    reference.save_tiny_chat_model(tmp_path, num_hidden_layers=1)
    lm = load(tmp_path, precision="32-true", device="cpu", compile=True, registry=registry, **options)
    plain = load(tmp_path, precision="32-true", device="cpu", registry=registry, **options)
    session, slow = lm.session(), plain.session()
    ids_of = lm.tokenizer.encode
    for ids in (ids_of("Twice")[:1], ids_of("Once upon"), ids_of("Once upon a"), ids_of("Twice")):
        reply = session.reply(ids, max_new_tokens=20, sampling=GREEDY).read()
        assert reply.ids == slow.reply(ids, max_new_tokens=20, sampling=GREEDY).read().ids


def test_no_compiler(tmp_path: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the message, before the model is loaded."""
    reference.save_tiny_chat_model(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(UnavailableError, match=r"needs a C\+\+ compiler"):
        load(tmp_path, device="cpu", compile=True, registry=registry)


def test_flex_can_not_decode_compiled(tmp_path: Path, registry: Registry) -> None:
    """Guards an explicit backend that takes the queries to be at the end of the keys."""
    reference.save_tiny_chat_model(tmp_path)
    with pytest.raises(UnavailableError, match="queries to be the last"):
        load(tmp_path, attention="flex", device="cpu", compile=True, registry=registry)
