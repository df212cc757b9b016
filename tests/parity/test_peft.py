"""Adapters of zoo and of PEFT are the same: directories both ways, logits and gradients, all parameters randomised."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch.testing import assert_close

from tests import reference
from zoo.api import LanguageModel, load
from zoo.errors import FileFormatError, InputError
from zoo.registry import Registry
from zoo.testing.adapters import randomize

LORAS: dict[str, tuple[str, dict[str, Any]]] = {
    "default": ("llama-gqa", {"target_modules": ["q_proj", "v_proj"]}),
    "all-linear": ("llama-gqa", {"target_modules": "all-linear", "lora_alpha": 3}),
    "rslora": ("qwen2", {"target_modules": ["k_proj", "down_proj"], "use_rslora": True}),
    "dora": ("llama-biases", {"target_modules": ["q_proj", "o_proj", "up_proj"], "use_dora": True}),
    "patterns": (
        "llama",
        {
            "target_modules": ["q_proj", "v_proj", "gate_proj"],
            "rank_pattern": {"gate_proj": 5, r"layers.0.self_attn.q_proj": 2},
            "alpha_pattern": {"v_proj": 32},
        },
    ),
    "layers": ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [1]}),
    "biases": ("qwen2", {"target_modules": ["q_proj"], "bias": "lora_only"}),
    "all-biases": ("qwen2", {"target_modules": ["q_proj"], "bias": "all"}),
    "saved": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "embedding": ("llama", {"target_modules": ["q_proj", "embed_tokens"]}),
    "fused-conv1d": ("gpt2", {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
    "fused-interleaved": ("gpt_neox", {"target_modules": ["query_key_value"]}),
    "fused-gate-up": ("phi3", {"target_modules": ["qkv_proj", "gate_up_proj"]}),
}


def make(variant: str, config: dict[str, Any], directory: Path) -> Any:
    """A randomised PEFT model over a tiny base; both are saved."""
    base = reference.save_tiny(directory / "base", *reference.VARIANTS[variant])
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, task_type="CAUSAL_LM", **config))
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(str(directory / "adapter"))
    return model.eval()


def load_base(directory: Path, registry: Registry) -> LanguageModel:
    return load(directory / "base", precision="32-true", device="cpu", registry=registry)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning")
@pytest.mark.parametrize("case", LORAS)
def test_what_peft_made(case: str, tmp_path: Path, registry: Registry) -> None:
    """Guards reading: names, fused layouts, ranks, scalings, patterns; logits and the gradients of A and B."""
    variant, config = LORAS[case]
    theirs = make(variant, config, tmp_path)
    lm = load_base(tmp_path, registry)
    handle = lm.load_adapter(tmp_path / "adapter")
    ids = reference.tokens(2, 12)
    expected, found = theirs(ids).logits, lm.model(ids)
    assert_close(found, expected, atol=1e-4, rtol=1e-4)
    weights = torch.randn(expected.shape)
    (expected * weights).sum().backward()
    (found * weights).sum().backward()
    their_norm = sum(float(p.grad.norm() ** 2) for p in theirs.parameters() if p.requires_grad and p.grad is not None)
    our_norm = sum(float(p.grad.norm() ** 2) for p in handle.trainable().values() if p.grad is not None)
    assert our_norm == pytest.approx(their_norm, rel=1e-3)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning")
@pytest.mark.parametrize("case", LORAS)
def test_what_zoo_makes(case: str, tmp_path: Path, registry: Registry) -> None:
    """Guards writing: PEFT computes the same with it, and saves the same bytes again."""
    variant, config = LORAS[case]
    make(variant, config, tmp_path)
    lm = load_base(tmp_path, registry)
    handle = lm.load_adapter(tmp_path / "adapter")
    randomize(handle)
    handle.save(tmp_path / "ours")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", attn_implementation="eager")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "ours").eval()
    ids = reference.tokens(2, 12)
    with torch.no_grad():
        assert_close(theirs(ids).logits, lm.model(ids), atol=1e-5, rtol=1e-4)
    theirs.save_pretrained(str(tmp_path / "again"))
    if case != "embedding":  # PEFT adds the embedding's own weight
        assert digest(tmp_path / "again" / "adapter_model.safetensors") == digest(
            tmp_path / "ours" / "adapter_model.safetensors"
        )


def test_untied_updates_of_a_fused_projection(tmp_path: Path, registry: Registry) -> None:
    """Guards the block-diagonal form, with a part that has no update, and that it is told."""
    reference.save_tiny(tmp_path / "base", *reference.VARIANTS["gpt2"])
    lm = load_base(tmp_path, registry)
    handle = lm.adapt("lora", r=3)
    randomize(handle)
    notes = handle.save(tmp_path / "ours")
    assert notes and "rank 6" in notes[0]
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", attn_implementation="eager")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "ours").eval()
    ids = reference.tokens(2, 12)
    with torch.no_grad():
        assert_close(theirs(ids).logits, lm.model(ids), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("adapter", "options"),
    [
        ("llama-adapter", {"prompt_length": 3, "gate": "linear"}),
        ("llama-adapter-v2", {"prompt_length": 3, "scale_on": "input"}),
        ("norm", {}),
    ],
)
def test_methods_that_peft_lacks(adapter: str, options: dict[str, Any], tmp_path: Path, registry: Registry) -> None:
    reference.save_tiny(tmp_path / "base", *reference.VARIANTS["llama-gqa"])
    lm, other = load_base(tmp_path, registry), load_base(tmp_path, registry)
    handle = lm.adapt(adapter, **options)
    randomize(handle)
    handle.save(tmp_path / "ours")
    loaded = other.load_adapter(tmp_path / "ours")
    assert loaded.adapter.options == handle.adapter.options
    ids = reference.tokens(2, 12)
    with torch.no_grad():
        assert torch.equal(other.model(ids), lm.model(ids))


def change(directory: Path, **values: Any) -> None:
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_bad_directories(tmp_path: Path, registry: Registry) -> None:
    """Guards against adapters that are dropped, or half loaded."""
    make("llama", {"target_modules": ["q_proj"]}, tmp_path)
    reference.save_tiny(tmp_path / "other" / "base", *reference.VARIANTS["llama-own-head"])
    reference.save_tiny(tmp_path / "short" / "base", "llama", reference.LLAMA | {"num_hidden_layers": 1})
    lm, other = load_base(tmp_path, registry), load_base(tmp_path / "other", registry)
    with pytest.raises(FileFormatError, match=r"no adapter_config\.json"):
        lm.load_adapter(tmp_path)
    with pytest.raises(InputError, match=r"does not fit this model.*should be"):
        other.load_adapter(tmp_path / "adapter")
    assert not [name for name, _ in other.model.named_parameters() if "lora" in name]
    with pytest.raises(FileFormatError, match="has no such module"):
        load_base(tmp_path / "short", registry).load_adapter(tmp_path / "adapter")
    change(tmp_path / "adapter", use_qalora=True)
    with pytest.raises(FileFormatError, match="use_qalora"):
        lm.load_adapter(tmp_path / "adapter")
    change(tmp_path / "adapter", use_qalora=False, peft_type="VERA")
    with pytest.raises(FileFormatError, match="'VERA'"):
        lm.load_adapter(tmp_path / "adapter")
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    change(tmp_path / "adapter", peft_type="LORA")
    with pytest.raises(FileFormatError, match="damaged"):
        lm.load_adapter(tmp_path / "adapter")
