"""Every family, with every attention backend that supports it, in every precision, equals eager in float32.

The measure is the root mean square error of the logits over their standard deviation.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests import reference
from zoo.attention.base import AttentionBackend, AttentionRequest
from zoo.convert.base import Checkpoint
from zoo.convert.load import load_model, open_checkpoint
from zoo.precision.base import Precision
from zoo.registry import Registry

PRECISIONS = ("32-true", "bf16-true", "16-true")
FLEX_CASES = [("gemma2", "32-true"), ("falcon-40b", "bf16-true")]
IDS = reference.tokens(2, 40)


def backend_named(name: str, registry: Registry) -> AttentionBackend:
    backend: AttentionBackend = registry.load("attention", name)()
    return backend


def dtype_of(precision: str, registry: Registry) -> torch.dtype:
    loaded: Precision = registry.load("precision", precision)
    return loaded.param_dtype


@torch.no_grad()
def logits(checkpoint: Checkpoint, backend: AttentionBackend, dtype: torch.dtype) -> Tensor:
    found = load_model(checkpoint, backend, dtype=dtype)(IDS)
    assert found.dtype == dtype
    return found.float()


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).pow(2).mean().sqrt() / expected.std())


def rounding(dtype: torch.dtype) -> float:
    """What three layers of random weights make of one rounding: measured at 9 eps in the worst family."""
    return 16 * torch.finfo(dtype).eps


@pytest.mark.parametrize("variant", reference.VARIANTS)
def test_eager_and_sdpa(variant: str, tmp_path: Path, registry: Registry) -> None:
    """Guards half precision against a step that rounds far more than its dtype does, in one backend or in both."""
    reference.save_tiny(tmp_path, *reference.VARIANTS[variant])
    checkpoint = open_checkpoint(tmp_path, registry, format_name="hf")
    eager, sdpa = backend_named("eager", registry), backend_named("sdpa", registry)
    expected = logits(checkpoint, eager, torch.float32)
    for precision in PRECISIONS:
        dtype = dtype_of(precision, registry)
        by_eager = error(logits(checkpoint, eager, dtype), expected)
        assert by_eager < rounding(dtype), precision
        if sdpa.supports(AttentionRequest.of(checkpoint.spec, device="cpu", dtype=dtype)):
            assert checkpoint.spec.attn_softcap is not None
            continue
        by_sdpa = error(logits(checkpoint, sdpa, dtype), expected)
        assert by_sdpa < (rounding(dtype) if dtype == torch.float32 else 1.25 * by_eager), precision


@pytest.mark.parametrize(("variant", "precision"), FLEX_CASES)
def test_flex(variant: str, precision: str, tmp_path: Path, registry: Registry) -> None:
    """Guards windows by layer, grouped heads and soft caps in the compiled kernel; each case takes seconds."""
    reference.save_tiny(tmp_path, *reference.VARIANTS[variant])
    checkpoint = open_checkpoint(tmp_path, registry, format_name="hf")
    flex, dtype = backend_named("flex", registry), dtype_of(precision, registry)
    assert not flex.supports(AttentionRequest.of(checkpoint.spec, device="cpu", dtype=dtype))
    expected = logits(checkpoint, backend_named("eager", registry), torch.float32)
    assert error(logits(checkpoint, flex, dtype), expected) < rounding(dtype)
