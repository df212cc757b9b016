"""Logits and gradients equal the reference library's, for every family and variant, from the files it saves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from tests import reference
from zoo.attention.base import AttentionBackend, AttentionRequest
from zoo.attention.eager import Eager
from zoo.attention.sdpa import SDPA
from zoo.convert.base import Checkpoint
from zoo.convert.load import load_model, open_checkpoint
from zoo.errors import InputError
from zoo.registry import Registry

ROTARY = (*"llama mistral gemma gemma2 olmo olmo2 falcon qwen2 qwen3 smollm3 phi phi3 stablelm gpt_neox".split(),)
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


@pytest.mark.parametrize("scaling", [{"rope_type": "default"}, {"rope_type": "linear", "factor": 2.0}], ids=str)
@pytest.mark.parametrize("family", ROTARY)
def test_a_part_of_each_head(family: str, scaling: dict[str, Any], tmp_path: Path, registry: Registry) -> None:
    """Guards where transformers 5 writes the part that turns, and the families that do not know of parts.

    Those ignore it, or fail where the positions are scaled as well; zoo refuses what they can not compute.
    """
    model_type, config = reference.VARIANTS[family]
    if family == "phi3" and "factor" in scaling:
        pytest.skip("transformers gives phi3 no linear scaling")
    plain = {key: value for key, value in config.items() if key not in ("partial_rotary_factor", "rotary_pct")}
    parameters = scaling | {"rope_theta": 5000.0, "partial_rotary_factor": 0.75 if "head_dim" not in config else 0.5}
    theirs = reference.save_tiny(tmp_path, model_type, plain | {"rope_parameters": parameters})
    ids = reference.tokens(2, 40)
    try:
        with torch.no_grad():
            expected = theirs(ids).logits
    except RuntimeError:
        with pytest.raises(InputError, match="turns all of each head"):
            open_checkpoint(tmp_path, registry)
        return
    checkpoint = open_checkpoint(tmp_path, registry)
    with torch.no_grad():
        assert_close(load_model(checkpoint, Eager(), dtype=torch.float32)(ids), expected, atol=1e-4, rtol=1e-4)
