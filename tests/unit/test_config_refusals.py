"""What the families refuse to read, what null means to them, and configs from before `transformers` had the model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.testing import assert_close

from tests import reference
from zoo.attention.eager import Eager
from zoo.convert.export import export_model
from zoo.convert.load import load_model, open_checkpoint
from zoo.errors import InputError
from zoo.families.base import Family
from zoo.registry import Registry
from zoo.spec import ModelSpec

REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "mistral-layer-types": ("mistral", {"layer_types": ["full_attention"] * 3}, "layer_types = .* implements only"),
    "mistral-unknown": ("mistral", {"attention_sinks": 4}, "does not understand: attention_sinks = 4"),
    "gemma-bidirectional": ("gemma", {"use_bidirectional_attention": True}, "use_bidirectional_attention = True"),
    "gemma-activations": ("gemma", {"hidden_act": "silu", "hidden_activation": "gelu_pytorch_tanh"}, "which is it"),
    "gemma-exact-gelu": ("gemma", {"hidden_act": "gelu", "hidden_activation": "gelu"}, "which is it"),
    "gemma2-bidirectional": ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention = True"),
    "gemma2-types-too-few": ("gemma2", {"layer_types": ["full_attention"]}, "for each of its 3 layers"),
    "gemma2-types-unknown": ("gemma2", {"layer_types": ["chunked_attention"] * 3}, "chunked_attention"),
    "gemma2-no-window": ("gemma2", {"sliding_window": None}, "its size is null"),
    "gemma2-two-windows": ("gemma2", {"sliding_window_size": 4}, "sliding_window_size = 4"),
    "olmo-norm-eps": ("olmo", {"layer_norm_eps": 1e-3}, "does not understand: layer_norm_eps"),
    "olmo2-clip": ("olmo2", {"clip_qkv": 8.0}, "does not understand: clip_qkv"),
    "falcon-alibi": ("falcon", {"alibi": True}, "alibi = True; zoo implements only False"),
    "falcon-residual": ("falcon", {"apply_residual_connection_post_layernorm": True}, "post_layernorm = True"),
    "falcon-two-names": ("falcon", {"n_head": 12}, "n_head = 12; zoo implements only 6"),
    "falcon-groups": ("falcon", {"multi_query": False, "num_kv_heads": 2}, "num_kv_heads = 2 for 6 heads"),
    "falcon-new-sequential": ("falcon-40b", {"parallel_attn": False}, "parallel_attn = False"),
    "falcon-old-two-norms": ("falcon", {"num_ln_in_parallel_attn": 2}, "num_ln_in_parallel_attn = 2"),
    "falcon-three-norms": ("falcon-40b", {"num_ln_in_parallel_attn": 3}, "num_ln_in_parallel_attn = 3"),
    "gpt_bigcode-cross": ("gpt_bigcode", {"add_cross_attention": True}, "add_cross_attention = True"),
    "gpt_bigcode-heads": ("gpt_bigcode", {"num_key_value_heads": 6}, "num_key_value_heads = 6"),
}


def family_of(variant: str, registry: Registry) -> Family:
    family: Family = registry.load("family", reference.VARIANTS[variant][0])
    return family


def read(variant: str, registry: Registry, **changes: Any) -> ModelSpec:
    return family_of(variant, registry).read_config(reference.VARIANTS[variant][1] | changes)


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, registry: Registry) -> None:
    """Guards against a key that changes the mathematics and is dropped in silence."""
    variant, changes, message = REFUSED[case]
    read(variant, registry)
    with pytest.raises(InputError, match=message):
        read(variant, registry, **changes)


def test_gemma_says_gelu_and_means_tanh(registry: Registry) -> None:
    """Guards the first release's configs, whose "gelu" is the approximation."""
    assert read("gemma", registry, hidden_act="gelu").activation == "gelu_tanh"
    assert read("gemma", registry, hidden_act="gelu", hidden_activation="gelu_pytorch_tanh").activation == "gelu_tanh"


def test_null_is_not_missing(registry: Registry) -> None:
    """Guards windows and caps that `transformers` has by default: null takes them away, and only null does."""
    mistral, gemma2 = family_of("mistral", registry), family_of("gemma2", registry)
    bare = {"num_hidden_layers": 3}
    assert mistral.read_config(bare).window == 4096
    assert mistral.read_config(bare | {"sliding_window": None}).window is None
    spec = gemma2.read_config(bare)
    assert (spec.attn_softcap, spec.head_softcap, spec.full_attention_layers) == (50.0, 30.0, (1,))
    spec = gemma2.read_config(bare | {"attn_logit_softcapping": None, "final_logit_softcapping": None})
    assert (spec.attn_softcap, spec.head_softcap) == (None, None)
    for family in (mistral, gemma2):
        assert family.read_config(family.write_config(spec)).attn_softcap is None


def test_an_exported_null_stays_null(tmp_path: Path, registry: Registry) -> None:
    """Guards Mistral 0.2 and later: without its null, `transformers` gives the exported model a window of 4096."""
    source, target = tmp_path / "a", tmp_path / "b"
    reference.save_tiny(source, *reference.VARIANTS["mistral-no-window"])
    export_model(open_checkpoint(source, registry), target)
    assert transformers.AutoConfig.from_pretrained(target).sliding_window is None


def test_layer_types_decide(registry: Registry) -> None:
    """Guards Gemma 2 files of `transformers` 5, which list the layers instead of counting on every other one."""
    kinds = ["full_attention", "sliding_attention", "sliding_attention"]
    assert read("gemma2", registry, layer_types=kinds).full_attention_layers == (0,)
    spec = read("gemma2", registry, layer_types=["full_attention"] * 3, sliding_window=None)
    assert (spec.window, spec.full_attention_layers) == (None, ())


@pytest.mark.parametrize("variant", ["falcon", "falcon-40b"])
def test_falcon_as_its_own_code_wrote_it(variant: str, tmp_path: Path, registry: Registry) -> None:
    """Guards RefinedWeb and RefinedWebModel: other names of the keys, and the 40B's layers by the name alone."""
    source, target = tmp_path / "a", tmp_path / "b"
    theirs = reference.save_tiny(source, *reference.VARIANTS[variant])
    old = {"model_type": "RefinedWebModel", "architectures": ["RWForCausalLM"], "alibi": False, "bias": False}
    old |= {"vocab_size": 97, "hidden_size": 48, "n_head": 6, "n_layer": 3, "multi_query": True, "parallel_attn": True}
    old |= {"auto_map": {"AutoModelForCausalLM": "modelling_RW.RWForCausalLM"}, "hidden_dropout": 0.0}
    old |= {"apply_residual_connection_post_layernorm": False, "layer_norm_epsilon": 1e-5}
    if variant == "falcon-40b":
        old |= {"model_type": "RefinedWeb", "n_head_kv": 2}
    (source / "config.json").write_text(json.dumps(old))
    export_model(open_checkpoint(source, registry), target)
    ours = load_model(open_checkpoint(source, registry), Eager(), dtype=torch.float32)
    again = transformers.AutoModelForCausalLM.from_pretrained(target, attn_implementation="eager")
    ids = reference.tokens(1, 20)
    with torch.no_grad():
        assert_close(ours(ids), theirs(ids).logits, atol=1e-4, rtol=1e-4)
        assert torch.equal(again(ids).logits, theirs(ids).logits)


def test_falcon_has_no_words_for_groups_in_a_sequence(registry: Registry) -> None:
    """Guards against an export that says less than the model is."""
    family = family_of("falcon", registry)
    spec = replace(read("falcon-40b", registry), block="sequential")
    with pytest.raises(InputError, match=r"1 kv head or 6, not n_kv_heads = 2"):
        family.write_config(spec)
