"""How a backend is asked and chosen. What it computes is the contract's: see test_builtin."""

from __future__ import annotations

import pytest
import torch

from zoo.attention.base import AttentionRequest, choose_attention
from zoo.errors import UnavailableError
from zoo.models.masks import CAUSAL
from zoo.registry import Registry
from zoo.testing.attention import HEADS, masks, tensors


def test_features() -> None:
    """Guards the question to a backend: what it does not know of it would leave out."""
    features = {name: mask.features for name, mask in masks(9).items()}
    assert features["padding"] == {"causal", "padding"}
    assert features["padding-window-prefix-documents"] == {"causal", "padding", "window", "prefix", "documents"}
    assert features["full"] == {"full"}


def request_for(**changes: object) -> AttentionRequest:
    """A plain request, with changes."""
    values: dict[str, object] = {"device": "cpu", "dtype": torch.float32, "n_heads": 4, "n_kv_heads": 4, "d_head": 16}
    return AttentionRequest(**(values | changes))  # type: ignore[arg-type]


def test_an_explicit_choice_never_falls_back(registry: Registry) -> None:
    """Guards against training with something other than what was asked for."""
    with pytest.raises(UnavailableError, match="no backward on CPU"):
        choose_attention("flex", request_for(training=True), registry)
    assert choose_attention("auto", request_for(training=True), registry).name == "sdpa"


def test_a_backend_that_can_not_softcap_says_so(registry: Registry) -> None:
    """Guards against soft-capping that is silently left out."""
    sdpa = registry.load("attention", "sdpa")()
    assert sdpa.supports(request_for(softcap=True))
    with pytest.raises(ValueError, match="soft-cap"):
        sdpa(*tensors((3, 3), HEADS["mha"]), mask=CAUSAL, scale=1.0, softcap=30.0)
    chosen = choose_attention("auto", request_for(softcap=True), registry)
    assert chosen.name == "eager"
    assert chosen.rejected == {"sdpa": ["torch's SDPA can not soft-cap scores"]}


def test_flex_refuses_dropout(registry: Registry) -> None:
    """Guards against dropout that is silently not applied."""
    flex = registry.load("attention", "flex")()
    assert flex.supports(request_for(dropout=True))
    with pytest.raises(ValueError, match="dropout"):
        flex(*tensors((3, 3), HEADS["mha"]), mask=CAUSAL, scale=1.0, dropout_p=0.1)
