"""FlashAttention 3's real Python interface, which flash-attn's source distribution carries, on the stand-in."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import import_module
from types import ModuleType
from typing import Any

import pytest
import test_attention as attention_tests
import test_decoding as decoding_tests
import torch
from tier import Backend
from zoo_flash_attn import install

from zoo.models.masks import CAUSAL, Mask


@pytest.fixture
def calls(flash: Backend, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """FlashAttention 3 is installed, and this is a Hopper GPU; the names of its calls."""
    operators: Any = import_module("flash_attn_3_ops")
    package = ModuleType("flash_attn_3")
    package.__path__ = []
    monkeypatch.setitem(sys.modules, "flash_attn_3", package)
    monkeypatch.setitem(sys.modules, "flash_attn_3._C", operators)
    monkeypatch.setitem(sys.modules, "flash_attn_interface", import_module("hopper.flash_attn_interface"))
    monkeypatch.setattr(install, "is_hopper", lambda device: True)
    install.load_flash_attn_3.cache_clear()
    operators.CALLS.clear()
    yield operators.CALLS
    install.load_flash_attn_3.cache_clear()


@pytest.mark.parametrize("mask", list(attention_tests.masks(9)))
def test_results_and_gradients(calls: list[str], flash: Backend, mask: str) -> None:
    """Guards the names of its arguments, which differ from FlashAttention 2's in number and order."""
    attention_tests.test_results(flash, mask, "gqa", 64)
    attention_tests.test_gradients(flash, mask, "gqa", 64)
    assert calls


def test_decoding(calls: list[str], flash: Backend) -> None:
    """Guards its cache: padding, room, places and rotations."""
    decoding_tests.test_room_behind_the_queries(flash, torch.float16, (0, 6), 4, (7, 8, 9))
    for rope in decoding_tests.ROPES:
        decoding_tests.test_a_step_that_rotates_and_stores(flash, rope, 1, None)
    assert set(calls) == {"cached"}


def test_each_takes_what_the_other_can_not(calls: list[str], flash: Backend) -> None:
    """Guards dropout, odd heads and a fixed order of sums, which FlashAttention 3 does not have."""
    q, k, v = attention_tests.tensors(7, 7, (4, 2), 64, torch.float16)
    flash(q, k, v, mask=CAUSAL, scale=0.1)
    flash(q, k, v, mask=Mask(window=2), scale=0.1, softcap=1.0)
    assert calls == ["dense", "dense"]
    flash(q, k, v, mask=CAUSAL, scale=0.1, dropout_p=0.1)
    flash(*attention_tests.tensors(7, 7, (4, 2), 20, torch.float16), mask=CAUSAL, scale=0.1)
    large = attention_tests.tensors(7, 7, (4, 2), 256, torch.float16)
    torch.use_deterministic_algorithms(True)
    try:
        flash(*large, mask=CAUSAL, scale=0.1)
    finally:
        torch.use_deterministic_algorithms(False)
    assert calls == ["dense", "dense"]
    flash(*large, mask=CAUSAL, scale=0.1)
    assert len(calls) == 3


def test_it_is_for_hopper_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against its kernels on GPUs that they are not made for."""
    for capability in ((8, 0), (9, 0), (10, 0), (12, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert install.is_hopper.__wrapped__(torch.device("cuda")) == (capability == (9, 0))
    assert not install.is_hopper.__wrapped__(torch.device("cpu"))


def test_a_broken_installation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against FlashAttention 2 in its place without a word; where it is not installed, that is no news."""
    monkeypatch.setitem(sys.modules, "flash_attn_interface", None)
    assert install.load_flash_attn_3.__wrapped__() is None
    monkeypatch.setitem(sys.modules, "flash_attn_interface", ModuleType("flash_attn_interface"))
    with pytest.warns(RuntimeWarning, match="FlashAttention 3 can not be imported, so FlashAttention 2 is used"):
        assert install.load_flash_attn_3.__wrapped__() is None
