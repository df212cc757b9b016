"""What a config may say of windows and rotary positions: all of it is understood, or refused by name."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests import reference
from zoo.errors import InputError
from zoo.families.base import Family
from zoo.registry import Registry
from zoo.spec import ModelSpec, RopeScaling, RopeSpec


def family(registry: Registry, name: str) -> Family:
    loaded: Family = registry.load("family", name)
    return loaded


def read(registry: Registry, name: str, config: dict[str, Any]) -> ModelSpec:
    return family(registry, name).read_config(config)


LONGROPE = reference.PHI3 | reference.LONGROPE
FACTORS: dict[str, Any] = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "an unknown key": ("qwen2", reference.QWEN2 | {"dual_chunk_attention": True}, "does not understand: dual_chunk"),
    "layer_types that other keys contradict": (
        "qwen3",
        reference.QWEN3 | reference.SLIDING | {"max_window_layers": 1, "layer_types": ["full_attention"] * 3},
        r"by its other keys, the layers with a window are \[1, 2\]",
    ),
    "layer_types without a window": (
        "smollm3",
        reference.SMOLLM3 | {"layer_types": ["sliding_attention"] * 3},
        r"the layers with a window are \[\]",
    ),
    "too few no_rope_layers": ("smollm3", reference.SMOLLM3 | {"no_rope_layers": [1, 0]}, "a 0 or 1 for each layer"),
    "no_rope_layers by number": ("smollm3", reference.SMOLLM3 | {"no_rope_layers": [0, 1, 2]}, "a 0 or 1 for each"),
    "yarn": (
        "qwen2",
        reference.QWEN2 | {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
        "by 'yarn'; zoo knows linear, llama3 and longrope",
    ),
    "longrope without factors": (
        "phi3",
        LONGROPE | {"rope_scaling": {"type": "longrope", "long_factor": [1.0] * 4}},
        "longrope without short_factor",
    ),
    "longrope with too few factors": (
        "phi3",
        LONGROPE | {"rope_scaling": FACTORS | {"type": "longrope", "short_factor": [1.0] * 3}},
        "longrope needs 4 short_factors, one for each rotated pair, not 3",
    ),
    "two original lengths": (
        "phi3",
        LONGROPE | {"rope_scaling": FACTORS | {"type": "longrope", "original_max_position_embeddings": 32}},
        "original_max_position_embeddings = 20, and 32 for rotary positions",
    ),
    "two rotary bases": (
        "qwen2",
        reference.QWEN2 | {"rope_theta": 1e6, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
        r"rope_theta = 1000000\.0; zoo implements only 10000\.0",
    ),
    "two rotary parts": (
        "stablelm",
        reference.STABLELM | {"rope_parameters": {"partial_rotary_factor": 0.25}, "partial_rotary_factor": 0.5},
        r"partial_rotary_factor = 0\.5; zoo implements only 0\.25",
    ),
    "a scaled part of each head in a family that turns all": (
        "qwen2",
        reference.QWEN2 | {"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "partial_rotary_factor": 0.5},
        r"scales rotary positions and has partial_rotary_factor = 0\.5; a qwen2 turns all",
    ),
    "an old rotary part": ("stablelm", reference.STABLELM | {"rope_pct": 0.5}, r"rope_pct = 0\.5"),
    "biases of q and k norms": ("stablelm", reference.STABLELM | {"use_norm_bias": True}, "use_norm_bias = True"),
    "dropout of one branch": ("stablelm", reference.STABLELM | {"hidden_dropout": 0.1}, r"hidden_dropout = 0\.1"),
    "norms of q and k": ("phi", reference.PHI | {"qk_layernorm": True}, "qk_layernorm = True"),
    "biases": ("phi3", reference.PHI3 | {"attention_bias": True}, "attention_bias = True"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, registry: Registry) -> None:
    """Guards against a model that loads and computes something else."""
    name, config, message = REFUSED[case]
    with pytest.raises(InputError, match=message):
        read(registry, name, config)


@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
def test_a_window_that_no_layer_has_is_none(name: str, registry: Registry) -> None:
    """Guards Qwen's habit: a window and a layer where it would begin in a config that says not to use it."""
    config = reference.QWEN3 | {"sliding_window": 32, "max_window_layers": 1, "use_sliding_window": False}
    assert read(registry, name, config).window is None
    used = config | {"use_sliding_window": True}
    assert read(registry, name, used).full_attention_layers == (0,)
    assert read(registry, name, used | {"max_window_layers": 3}).window is None
    assert read(registry, name, used | {"sliding_window": None}).window is None


def test_windows_that_a_config_can_not_say_are_not_written(registry: Registry) -> None:
    """Guards the export: `transformers` would give the window to other layers."""
    spec = replace(read(registry, "qwen2", reference.QWEN2), window=8, full_attention_layers=(1,))
    with pytest.raises(InputError, match="only have the first layers without a window"):
        family(registry, "qwen2").write_config(spec)
    spec = replace(read(registry, "smollm3", reference.SMOLLM3), window=8, full_attention_layers=(1,))
    with pytest.raises(InputError, match=r"with a window are \[0, 2\]; in smollm3 they are the unrotated ones, \[1\]"):
        family(registry, "smollm3").write_config(spec)


def test_longrope_by_its_first_name(registry: Registry) -> None:
    """Guards the first Phi 3 files, and the scale of q and k, which a file need not state."""
    scaling = RopeScaling(
        kind="longrope",
        original_max_seq_len=16,
        short_factors=(1.0,) * 4,
        long_factors=(2.0,) * 4,
        attn_factor=1.5**0.5,
    )
    config = reference.PHI3 | {"original_max_position_embeddings": 16, "rope_scaling": FACTORS | {"type": "su"}}
    assert read(registry, "phi3", config).rope == RopeSpec(n_dims=8, scaling=scaling)
    stated = read(registry, "phi3", config | {"rope_scaling": FACTORS | {"type": "su", "attention_factor": 1.25}})
    assert stated.rope == RopeSpec(n_dims=8, scaling=replace(scaling, attn_factor=1.25))
