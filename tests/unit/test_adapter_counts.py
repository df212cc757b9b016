"""What adapters train of a Llama with 7 billion parameters, counted on the module, which is on the meta device."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from zoo.adapters.attach import AttachedAdapter
from zoo.adapting import adapt
from zoo.attention.sdpa import SDPA
from zoo.models.gpt import GPT
from zoo.plan.parameters import count_parameters
from zoo.plan.sites import sites_of_spec
from zoo.registry import Registry

LAYERS, WIDTH, FFN, HEADS = 32, 4096, 11008, 32
PROMPTS = 30 * (10 * WIDTH + HEADS)
NORMS = (2 * LAYERS + 1) * WIDTH
OUTPUTS = LAYERS * (5 * WIDTH + 2 * FFN)  # q, k, v, out, down; gate, up
INPUTS = LAYERS * (6 * WIDTH + FFN)

COUNTS: dict[str, tuple[str, dict[str, Any], int]] = {
    "llama-adapter": ("llama-adapter", {"layers": 30, "prompt_length": 10}, 1_229_760),
    "llama-adapter-one-gate": ("llama-adapter", {"layers": 30, "gate_per": "layer"}, 30 * (10 * WIDTH + 1)),
    "v2": ("llama-adapter-v2", {"layers": 30}, PROMPTS + NORMS + 2 * OUTPUTS),
    "v2-norms-of-layers": (
        "llama-adapter-v2",
        {"layers": 30, "norms": ("attn_norm", "mlp_norm")},
        PROMPTS + NORMS - WIDTH + 2 * OUTPUTS,
    ),
    "v2-on-inputs": ("llama-adapter-v2", {"layers": 30, "scale_on": "input"}, PROMPTS + NORMS + INPUTS + OUTPUTS),
    "v2-without-prompts": ("llama-adapter-v2", {"prompts": False, "norms": False}, 2 * OUTPUTS),
    "lora": ("lora", {"r": 8, "targets": ["attn.q", "attn.v"]}, 4_194_304),
    "lora-all": ("lora", {"r": 8, "targets": ["all-linear"]}, 8 * (INPUTS + OUTPUTS)),
    "dora": ("lora", {"r": 8, "targets": ["all-linear"], "dora": True}, 8 * (INPUTS + OUTPUTS) + OUTPUTS),
    "ia3": ("ia3", {}, LAYERS * (2 * WIDTH + FFN)),
    "norm": ("norm", {}, NORMS),
    "full": ("full", {}, 6_738_415_616),
}


def attached(adapter: str, options: dict[str, Any], registry: Registry) -> AttachedAdapter:
    with torch.device("meta"):
        model = GPT(registry.model("llama-7b").spec, SDPA())
    return adapt(model, adapter, registry=registry, **options)


@pytest.mark.parametrize("case", COUNTS)
def test_llama_7b(case: str, registry: Registry) -> None:
    """Guards against a parameter too many or too few, planned or made; 1.2M and 4.2M are the papers' numbers."""
    adapter, options, expected = COUNTS[case]
    spec = registry.model("llama-7b").spec
    assert (spec.n_layers, spec.d_model, spec.d_ffn, spec.n_heads) == (LAYERS, WIDTH, FFN, HEADS)
    handle = attached(adapter, options, registry)
    trained = [p for p in handle.root.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == expected
    assert handle.plan.n_trainable == expected
    assert handle.adapter.options.plan(sites_of_spec(spec)).n_trainable == expected
    frozen = sum(p.numel() for p in handle.root.parameters() if not p.requires_grad)
    unfrozen = sum(handle.trainable()[name].numel() for name in handle.plan.unfrozen or {})
    assert frozen + unfrozen == count_parameters(spec)


@pytest.mark.parametrize("case", COUNTS)
def test_nothing_leaves_the_meta_device(case: str, registry: Registry) -> None:
    """Guards counting of models that do not fit: what is added is where the weights are."""
    handle = attached(*COUNTS[case][:2], registry)
    assert {p.device.type for p in handle.trainable().values()} == {"meta"}
