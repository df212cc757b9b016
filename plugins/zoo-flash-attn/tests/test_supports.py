"""What the backend says that it can not do."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from zoo_flash_attn.flash import Flash

from zoo.attention.base import AttentionRequest

CUDA: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16, "n_heads": 8, "n_kv_heads": 2, "d_head": 64}


def reasons(**changes: Any) -> list[str]:
    """What it says of a request; nothing of FlashAttention is loaded for the answer."""
    return Flash.supports(Flash.__new__(Flash), AttentionRequest(**(CUDA | changes)))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"dtype": torch.float16, "d_head": 256, "n_kv_heads": 8},
        {"training": True, "dropout": True, "d_head": 192},
        {"training": True, "softcap": True},
        {"d_head": 20},
        {"mask_features": frozenset({"causal", "window", "documents", "padding"})},
        {"mask_features": frozenset({"full", "window", "documents", "padding"})},
        {"mask_features": frozenset({"causal", "queries", "padding"})},
    ],
)
def test_what_it_can_do(changes: dict[str, Any]) -> None:
    """Guards against refusing what works: the other tests run all of it."""
    assert reasons(**changes) == []


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"device": "cpu"}, "FlashAttention runs on cuda, not on cpu"),
        ({"device": "mps"}, "FlashAttention runs on cuda, not on mps"),
        (
            {"dtype": torch.float32},
            "FlashAttention computes in float16 and bfloat16, not float32: take --precision bf16-true",
        ),
        ({"d_head": 264}, "FlashAttention's heads have at most 256 dimensions, not 264"),
        ({"softcap": True, "dropout": True}, "FlashAttention has no dropout for soft-capped scores"),
        ({"mask_features": frozenset({"causal", "prefix"})}, "FlashAttention has no prefix that every query sees"),
        (
            {"mask_features": frozenset({"full", "queries"})},
            "FlashAttention hides the room behind the queries only where attention is causal",
        ),
        (
            {"mask_features": frozenset({"causal", "queries", "documents"})},
            "FlashAttention has no documents in a cache of fixed length",
        ),
    ],
)
def test_what_it_can_not_do(changes: dict[str, Any], reason: str) -> None:
    """Guards against a choice that fails in the middle of the work, or gives another result."""
    assert reasons(**changes) == [reason]


@pytest.mark.parametrize(("memory", "is_refused"), [(99, True), (163, False), (227, False)])
def test_large_heads_with_dropout(memory: int, is_refused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards gradients that consumer GPUs leave uninitialised without an error."""
    properties = SimpleNamespace(shared_memory_per_block_optin=memory * 1024)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    large = {"training": True, "dropout": True, "d_head": 256}
    assert bool(reasons(**large)) == is_refused
    assert reasons(**large | {"dropout": False}) == reasons(**large | {"d_head": 192}) == []


def test_all_reasons_at_once() -> None:
    """Guards against finding out one by one."""
    assert len(reasons(device="cpu", dtype=torch.float32, d_head=512)) == 3
