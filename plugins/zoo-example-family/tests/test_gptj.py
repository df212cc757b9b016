"""GPT-J in zoo against `transformers`: logits, gradients, files, configs, decoding and the registry."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: nothing here may ask the hub

import pytest
import torch
import zoo_example_family
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import GPTJConfig, GPTJForCausalLM
from zoo_example_family.gptj import GPTJ

import zoo
from zoo.convert.export import export_model
from zoo.convert.load import open_checkpoint
from zoo.errors import FileFormatError, InputError
from zoo.models.cache import KVCache
from zoo.models.gpt import GPT
from zoo.plan.parameters import count_parameters, parameter_shapes
from zoo.plugins import PluginSelection, load_zoo
from zoo.registrar import ModelRegistrar, Registrar
from zoo.registry import Component, ModelEntry, Origin, Registry

TINY = {"n_embd": 48, "n_head": 6, "n_layer": 3, "vocab_size": 97, "n_positions": 64, "rotary_dim": 4}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": TINY,
    "whole-head": TINY | {"rotary_dim": 8},
    "inner": TINY | {"n_inner": 100, "activation_function": "relu", "layer_norm_epsilon": 1e-3},
    "tied": TINY | {"tie_word_embeddings": True},
    "dropouts": TINY | {"embd_pdrop": 0.1, "attn_pdrop": 0.2, "resid_pdrop": 0.3, "initializer_range": 0.05},
}
"""Every mechanism that the family knows, at least once."""

PUBLISHED: dict[str, Any] = {
    "activation_function": "gelu_new",
    "architectures": ["GPTJForCausalLM"],
    "attn_pdrop": 0.0,
    "bos_token_id": 50256,
    "embd_pdrop": 0.0,
    "eos_token_id": 50256,
    "gradient_checkpointing": False,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "model_type": "gptj",
    "n_embd": 4096,
    "n_head": 16,
    "n_inner": None,
    "n_layer": 28,
    "n_positions": 2048,
    "resid_pdrop": 0.0,
    "rotary": True,
    "rotary_dim": 64,
    "scale_attn_weights": True,
    "summary_activation": None,
    "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True,
    "summary_type": "cls_index",
    "summary_use_proj": True,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50, "temperature": 1.0}},
    "tie_word_embeddings": False,
    "tokenizer_class": "GPT2Tokenizer",
    "transformers_version": "4.18.0.dev0",
    "use_cache": True,
    "vocab_size": 50400,
}
"""config.json of EleutherAI/gpt-j-6b."""

every_variant = pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
every_model = pytest.mark.parametrize("name", ["gpt-j-6b", "gpt-jt-6b-v1"])


@pytest.fixture(scope="module")
def registry() -> Registry:
    """What zoo itself registers and what this plugin does, whether it is installed or only on the path."""
    items: list[Component | ModelEntry] = []
    origin = Origin(distribution="zoo-example-family")
    zoo_example_family.zoo_register_families(Registrar("family", origin, items))
    zoo_example_family.zoo_register_models(ModelRegistrar(origin, items))
    registry = load_zoo(PluginSelection(only=frozenset())).registry
    for item in items:
        registry.add(item)
    return registry


def save_reference(directory: Path, config: dict[str, Any]) -> Any:
    """A tiny GPT-J, as `transformers` saves it. Zero biases and unit norms would hide errors: everything is random."""
    torch.manual_seed(0)
    model = GPTJForCausalLM(GPTJConfig(**config)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            center = 1.0 if ".ln_" in name and name.endswith("weight") else 0.0
            parameter.copy_(center + 0.2 * torch.randn_like(parameter))
    model.save_pretrained(directory)
    return model


def load_ours(directory: Path, registry: Registry, attention: str = "sdpa") -> GPT:
    return zoo.load(directory, registry=registry, attention=attention, precision="32-true", device="cpu").model


def token_ids(batch: int, length: int) -> torch.Tensor:
    return torch.randint(TINY["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(1))


@every_variant
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_logits(config: dict[str, Any], attention: str, tmp_path: Path, registry: Registry) -> None:
    theirs, ours = save_reference(tmp_path, config), load_ours(tmp_path, registry, attention)
    ids = token_ids(2, 40)
    with torch.no_grad():
        assert_close(ours(ids), theirs(ids).logits, atol=1e-4, rtol=1e-4)


@every_variant
def test_gradients(config: dict[str, Any], tmp_path: Path, registry: Registry) -> None:
    theirs, ours = save_reference(tmp_path, config), load_ours(tmp_path, registry)
    ids = token_ids(2, 24)
    weights = torch.randn(2, 24, TINY["vocab_size"])
    (ours(ids) * weights).sum().backward()
    (theirs(ids).logits * weights).sum().backward()
    expected = {name: p.grad for name, p in theirs.named_parameters()}
    found = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    for rule in GPTJ.keys.rules(ours.spec):
        gradient = expected.pop(rule.stored)
        merged = rule.merge([found.pop(name) for name in rule.ours])
        assert_close(merged / gradient.abs().max(), gradient / gradient.abs().max(), atol=1e-4, rtol=1e-4)
    assert not expected and not found


@every_variant
def test_weights_come_back_bit_for_bit(config: dict[str, Any], tmp_path: Path, registry: Registry) -> None:
    theirs = save_reference(tmp_path / "hf", config)
    export_model(open_checkpoint(tmp_path / "hf", registry), tmp_path / "zoo")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("hf", "zoo"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    again = GPTJForCausalLM.from_pretrained(tmp_path / "zoo")
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in theirs.state_dict().items())


@every_variant
def test_the_config_comes_back_equal(config: dict[str, Any]) -> None:
    saved = GPTJConfig(**config)
    spec = GPTJ.read_config(saved.to_dict())
    written = GPTJ.write_config(spec)
    assert GPTJ.read_config(written) == spec
    expected = {"architectures": ["GPTJForCausalLM"], "n_inner": saved.n_inner or 4 * saved.n_embd}
    assert GPTJConfig(**written).to_dict() == saved.to_dict() | expected


@pytest.mark.parametrize(("key", "value"), [("rotary", False), ("scale_attn_weights", False), ("parallel", True)])
def test_a_key_that_may_change_the_mathematics_is_refused(key: str, value: object) -> None:
    with pytest.raises(InputError, match=f"{key} = {value}"):
        GPTJ.read_config(TINY | {key: value})


def test_cached_decoding_gives_the_tokens_of_uncached(tmp_path: Path, registry: Registry) -> None:
    theirs, ours = save_reference(tmp_path, TINY), load_ours(tmp_path, registry)
    uncached = ids = token_ids(1, 8)
    cache = KVCache(ours.spec, capacity=40, dtype=torch.float32, device="cpu")
    cached = [ids]
    with torch.no_grad():
        for _ in range(32):
            uncached = torch.cat((uncached, ours(uncached)[:, -1:].argmax(-1)), dim=1)
            cached.append(ours(cached[-1], cache=cache, last_only=True).argmax(-1))
        reference = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=32, do_sample=False)
    assert torch.cat(cached, dim=1).tolist() == uncached.tolist() == reference.tolist()


def test_the_masks_that_old_files_hold_are_ignored_and_nothing_else_is(tmp_path: Path, registry: Registry) -> None:
    save_reference(tmp_path, TINY)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors["transformer.h.0.attn.bias"] = torch.ones(64, 64, dtype=torch.bool).tril()[None, None]
    tensors["transformer.h.0.attn.masked_bias"] = torch.tensor(-1e9)
    save_file(tensors, file)
    load_ours(tmp_path, registry)
    save_file({**tensors, "transformer.h.0.attn.q_proj.bias": torch.zeros(48)}, file)
    with pytest.raises(FileFormatError, match=r"transformer\.h\.0\.attn\.q_proj\.bias"):
        load_ours(tmp_path, registry)


@every_variant
def test_a_new_model_has_the_parameters_of_its_spec(config: dict[str, Any], registry: Registry) -> None:
    spec = GPTJ.read_config(config)
    built = zoo.build(spec, registry=registry)
    assert {name: tuple(p.shape) for name, p in built.named_parameters()} == parameter_shapes(spec)


@every_model
def test_an_entry_is_the_same_model_in_transformers(name: str, registry: Registry) -> None:
    spec = registry.model(name).spec
    with torch.device("meta"):
        theirs = GPTJForCausalLM(GPTJConfig(**GPTJ.write_config(spec)))
    shapes = {key: tuple(tensor.shape) for key, tensor in theirs.state_dict().items()}
    assert shapes == {rule.stored: rule.stored_shape for rule in GPTJ.keys.rules(spec)}
    assert count_parameters(spec) == sum(p.numel() for p in theirs.parameters()) == 6_050_882_784


@every_model
def test_an_entry_is_what_was_published(name: str, registry: Registry) -> None:
    assert registry.model(name).spec == GPTJ.read_config(PUBLISHED)


def test_registering_imports_nothing_heavy() -> None:
    path = str(Path(zoo_example_family.__file__).parents[1])
    code = "import sys, zoo_example_family; sys.exit(str({'torch', 'numpy', 'transformers'} & set(sys.modules)))"
    ran = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.stderr == "set()\n"
