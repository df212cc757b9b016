"""Logits and gradients equal the reference library's, for every family and variant, from the files it saves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from tests import reference
from zoo.attention.base import AttentionBackend, AttentionRequest
from zoo.attention.eager import Eager
from zoo.attention.sdpa import SDPA
from zoo.convert.base import Checkpoint
from zoo.convert.load import load_model, open_checkpoint
from zoo.registry import Registry

VARIANTS = pytest.mark.parametrize("variant", reference.VARIANTS)


def backends(checkpoint: Checkpoint) -> list[AttentionBackend]:
    """Eager first, and SDPA unless it says that it can not serve this model."""
    request = AttentionRequest.of(checkpoint.spec, device="cpu", dtype=torch.float32, training=True)
    return [backend for backend in (Eager(), SDPA()) if not backend.supports(request)]


@VARIANTS
def test_logits(variant: str, tmp_path: Path, registry: Registry) -> None:
    """Guards the key maps, the norms, the rotary variants, the attention scale and the residual wiring."""
    theirs = reference.save_tiny(tmp_path, *reference.VARIANTS[variant])
    checkpoint = open_checkpoint(tmp_path, registry, format_name="hf")
    ids = reference.tokens(2, 40)
    for backend in backends(checkpoint):
        ours = load_model(checkpoint, backend, dtype=torch.float32)
        with torch.no_grad():
            assert_close(ours(ids), theirs(ids).logits, atol=1e-4, rtol=1e-4)


@VARIANTS
def test_gradients(variant: str, tmp_path: Path, registry: Registry) -> None:
    """Guards against a forward that is right and a backward that is not (a detached path, a tied head)."""
    theirs = reference.save_tiny(tmp_path, *reference.VARIANTS[variant])
    checkpoint = open_checkpoint(tmp_path, registry, format_name="hf")
    ours = load_model(checkpoint, backends(checkpoint)[-1], dtype=torch.float32)
    ids = reference.tokens(2, 24)
    weights = torch.randn(2, 24, 97)
    (ours(ids) * weights).sum().backward()
    (theirs(ids).logits * weights).sum().backward()
    expected = {reference.stored_name(theirs, name): p.grad for name, p in theirs.named_parameters()}
    found = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    for rule in checkpoint.keys.rules(checkpoint.spec):
        gradient = expected.pop(rule.stored)
        merged = rule.merge([found.pop(name) for name in rule.ours])
        assert_close(merged / gradient.abs().max(), gradient / gradient.abs().max(), atol=1e-4, rtol=1e-4)
    assert not expected and not found
