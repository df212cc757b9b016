"""Adapters on modules that a family fuses or transposes: PEFT and zoo hold the same bits, and train the same.

Shape letters: D model width, R rank.
"""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.testing import assert_close

import zoo
from tests import reference
from tests.parity.test_peft import digest, load_base, make
from zoo.adapters.attach import AttachedAdapter
from zoo.adapters.proof import without_gradient
from zoo.convert.own_form import OWN_FORM
from zoo.errors import FileFormatError, InputError
from zoo.registry import Registry
from zoo.testing.adapters import digests, randomize

WEIGHTS = "adapter_model.safetensors"
WHOLE: dict[str, tuple[str, list[str], list[str]]] = {
    "gpt2": ("gpt2", ["attn.c_proj"], ["c_attn", "c_fc", "ln_1", "wpe"]),
    "gpt2-one": ("gpt2", ["c_attn"], ["mlp.c_proj"]),
    "gpt_neox": ("gpt_neox", ["dense_4h_to_h"], ["query_key_value", "dense_h_to_4h", "lm_head"]),
    "falcon": ("falcon", ["dense"], ["query_key_value"]),
    "falcon-heads": ("falcon-heads", ["dense"], ["query_key_value"]),
    "falcon-40b": ("falcon-40b-biases", ["dense"], ["query_key_value", "dense_4h_to_h"]),
    "phi3": ("phi3", ["o_proj"], ["qkv_proj", "gate_up_proj"]),
    "gpt_bigcode": ("gpt_bigcode", ["attn.c_proj"], ["c_attn"]),
    "gpt_bigcode-heads": ("gpt_bigcode-heads", ["c_fc"], ["c_attn"]),
    "llama": ("llama-gqa", ["o_proj"], ["k_proj", "norm"]),
}
"""Model, modules with LoRA, modules that are trained in full."""
FUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
    "gpt2-dora": ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True, "use_dora": True, "lora_alpha": 2}),
    "gpt_neox": ("gpt_neox", {"target_modules": ["query_key_value"], "use_rslora": True}),
    "falcon": ("falcon", {"target_modules": ["query_key_value"], "rank_pattern": {"query_key_value": 12}}),
    "falcon-40b": ("falcon-40b", {"target_modules": ["query_key_value", "dense"]}),
    "phi3": ("phi3", {"target_modules": ["qkv_proj", "gate_up_proj"]}),
    "gpt_bigcode": ("gpt_bigcode", {"target_modules": ["c_attn"], "bias": "lora_only"}),
}
"""LoRA on fused projections; that of Falcon has more rows of A than its k and v have outputs."""


def tiny(variant: str) -> Any:
    return reference.tiny_model(*reference.VARIANTS[variant])


def options_of(case: str) -> tuple[str, dict[str, Any]]:
    variant, targets, saved = WHOLE[case]
    transposed = {"fan_in_fan_out": True} if variant.startswith("gpt2") else {}
    return variant, {"target_modules": targets, "modules_to_save": saved, **transposed}


def logits(model: nn.Module, *, seed: int = 1) -> Tensor:
    found: Any = model(reference.tokens(2, 12, seed=seed))
    result: Tensor = getattr(found, "logits", found)
    return result


def as_peft(directory: Path) -> Any:
    """What is saved in ``ours``, loaded by PEFT on the model in ``base``."""
    base = transformers.AutoModelForCausalLM.from_pretrained(directory / "base", attn_implementation="eager")
    return peft.PeftModel.from_pretrained(base, directory / "ours").eval()


def assert_peft_agrees(directory: Path, model: nn.Module) -> None:
    """PEFT computes the same with what was saved, and saves the same bytes."""
    theirs = as_peft(directory)
    with torch.no_grad():
        assert_close(logits(theirs), logits(model), atol=1e-5, rtol=1e-4)
    theirs.save_pretrained(str(directory / "again"))
    assert digest(directory / "again" / WEIGHTS) == digest(directory / "ours" / WEIGHTS)


@pytest.mark.parametrize("case", WHOLE)
def test_modules_that_peft_saved(case: str, tmp_path: Path, registry: Registry) -> None:
    """Guards the way of every row and column: to the bit what the whole model has, and to the byte what PEFT wrote."""
    variant, options = options_of(case)
    theirs = make(variant, options, tmp_path)
    lm = load_base(tmp_path, registry)
    handle = lm.load_adapter(tmp_path / "adapter")
    with torch.no_grad():
        assert_close(logits(lm.model), logits(theirs), atol=1e-4, rtol=1e-4)
    assert handle.save(tmp_path / "ours") == []
    assert digest(tmp_path / "ours" / WEIGHTS) == digest(tmp_path / "adapter" / WEIGHTS)
    changed, stored = tiny(variant), load_file(tmp_path / "adapter" / WEIGHTS)
    with torch.no_grad():
        for name, parameter in changed.named_parameters():
            if (new := stored.get(f"base_model.model.{name}")) is not None:
                parameter.copy_(new)
    changed.save_pretrained(tmp_path / "changed" / "base")
    expected = load_base(tmp_path / "changed", registry).model.state_dict()
    found = {name: tensor for name, tensor in handle.state_dict().items() if ".lora_" not in name}
    assert len(found) >= len([name for name in stored if ".lora_" not in name]) > 0
    assert digests(found) == digests({name: expected[name] for name in found})
    with handle.disabled(), torch.no_grad():
        assert_close(logits(lm.model), logits(tiny(variant)), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("case", WHOLE)
def test_modules_of_a_model_that_is_used_as_it_is(case: str, tmp_path: Path) -> None:
    """Guards Conv1D, whose weight has its inputs first: as it is in memory, it is in the file."""
    variant, options = options_of(case)
    theirs = make(variant, options, tmp_path)
    model = tiny(variant)
    handle = zoo.load_adapter(model, tmp_path / "adapter")
    with torch.no_grad():
        assert_close(logits(model), logits(theirs), atol=1e-5, rtol=1e-4)
    assert handle.plan.shapes == {name: tuple(p.shape) for name, p in handle.trainable().items()}
    handle.save(tmp_path / "ours")
    assert digest(tmp_path / "ours" / WEIGHTS) == digest(tmp_path / "adapter" / WEIGHTS)


@pytest.mark.parametrize("variant", ["gpt2", "gpt_neox", "falcon", "falcon-40b", "phi3", "gpt_bigcode", "llama"])
def test_modules_that_zoo_saves(variant: str, tmp_path: Path, registry: Registry) -> None:
    """Guards modules of which a part is trained: PEFT gets the rest as it was, and zoo does not train it then."""
    reference.save_tiny(tmp_path / "base", *reference.VARIANTS[variant])
    lm, other, third = (load_base(tmp_path, registry) for _ in "abc")
    handle = lm.adapt("lora", r=3, targets=["attn.out"], modules_to_save=["attn.q", "attn.k", "mlp.up", "norm"])
    randomize(handle)
    notes = handle.save(tmp_path / "ours")
    assert any("attn.v.weight in it are as they were" in note for note in notes) == (variant != "llama")
    assert_peft_agrees(tmp_path, lm.model)
    loaded = other.load_adapter(tmp_path / "ours")
    assert digests(loaded.state_dict()) == digests(handle.state_dict())
    if variant != "llama":
        (tmp_path / "ours" / OWN_FORM).unlink()
        whole = third.load_adapter(tmp_path / "ours").state_dict()
        assert digests(handle.state_dict()).items() < digests(whole).items()
        assert torch.equal(whole["blocks.0.attn.v.weight"], third.model.get_parameter("blocks.0.attn.v.weight"))


def test_biases_of_a_fused_projection(tmp_path: Path, registry: Registry) -> None:
    """Guards the bias of k where q and v train theirs."""
    reference.save_tiny(tmp_path / "base", *reference.VARIANTS["gpt2"])
    lm, other = load_base(tmp_path, registry), load_base(tmp_path, registry)
    handle = lm.adapt("lora", r=3, bias="lora_only")
    randomize(handle)
    notes = handle.save(tmp_path / "ours")
    assert any("c_attn.bias: written whole, though blocks.0.attn.k.bias" in note for note in notes)
    assert_peft_agrees(tmp_path, lm.model)
    loaded = other.load_adapter(tmp_path / "ours")
    assert digests(loaded.state_dict()) == digests(handle.state_dict())


def test_what_peft_can_not_have_in_one_module(tmp_path: Path, registry: Registry) -> None:
    """Guards work: PEFT would drop the LoRA of a module that is trained in full too; zoo keeps both, in its layout."""
    reference.save_tiny(tmp_path / "base", *reference.VARIANTS["gpt2"])
    lm, other = load_base(tmp_path, registry), load_base(tmp_path, registry)
    handle = lm.adapt("lora", targets=["attn.q"], modules_to_save=["attn.k"])
    randomize(handle)
    (note,) = handle.save(tmp_path / "ours")
    assert "PEFT does not read" in note and "c_attn in full or with LoRA" in note
    assert digests(other.load_adapter(tmp_path / "ours").state_dict()) == digests(handle.state_dict())


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning")
def test_a_module_that_files_call_otherwise(tmp_path: Path, registry: Registry) -> None:
    """Guards GPT-NeoX's head, which older transformers called embed_out: both are read, and what PEFT finds written."""
    theirs = make("gpt_neox", {"target_modules": ["lm_head", "dense"]}, tmp_path)
    tensors = load_file(tmp_path / "adapter" / WEIGHTS)
    old = {name.replace("lm_head", "embed_out"): tensor for name, tensor in tensors.items()}
    assert old.keys() != tensors.keys()
    for content in (tensors, old):
        lm = load_base(tmp_path, registry)
        save_file(content, tmp_path / "adapter" / WEIGHTS, metadata={"format": "pt"})
        handle = lm.load_adapter(tmp_path / "adapter")
        handle.save(tmp_path / "ours")
        with torch.no_grad():
            assert_close(logits(lm.model), logits(theirs), atol=1e-4, rtol=1e-4)
            assert_close(logits(as_peft(tmp_path)), logits(lm.model), atol=1e-5, rtol=1e-4)


def test_shapes_that_do_not_fit(tmp_path: Path, registry: Registry) -> None:
    """Guards a message on the file: a transposed weight of another size could be split all the same."""
    make("gpt2", {"target_modules": ["attn.c_proj"], "modules_to_save": ["c_attn"], "fan_in_fan_out": True}, tmp_path)
    reference.save_tiny(tmp_path / "wide" / "base", "gpt2", reference.GPT2 | {"n_embd": 96})
    tensors = load_file(tmp_path / "adapter" / WEIGHTS)
    save_file({k: t for k, t in tensors.items() if not k.endswith(".bias")}, tmp_path / "adapter" / WEIGHTS)
    with pytest.raises(FileFormatError, match=r"c_attn.weight of the shape \(48, 144\), which is \(96, 288\)"):
        load_base(tmp_path / "wide", registry).load_adapter(tmp_path / "adapter")


def loss_of(model: nn.Module, step: int) -> Tensor:
    found = logits(model, seed=step)
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(step))
    return (found.log_softmax(-1) * weights).mean()


@pytest.mark.parametrize("case", FUSED)
def test_training_goes_on_as_in_peft(case: str, tmp_path: Path, registry: Registry) -> None:
    """Guards the one A of a fused projection: what trains apart is another method, and has more parameters."""
    variant, config = FUSED[case]
    theirs = make(variant, config, tmp_path)
    lm = load_base(tmp_path, registry)
    handle = lm.load_adapter(tmp_path / "adapter")
    assert handle.save(tmp_path / "ours") == []
    assert digest(tmp_path / "ours" / WEIGHTS) == digest(tmp_path / "adapter" / WEIGHTS)
    their_parameters = [p for p in theirs.parameters() if p.requires_grad]
    our_parameters = list(handle.trainable().values())
    n_theirs = sum(p.numel() for p in their_parameters)
    assert sum(p.numel() for p in our_parameters) == handle.plan.n_trainable == n_theirs
    before = logits(lm.model).detach()
    optimizers = [torch.optim.AdamW(ps, lr=5e-3, weight_decay=0.1) for ps in (their_parameters, our_parameters)]
    for step in range(5):
        for model, optimizer in zip((theirs, lm.model), optimizers, strict=True):
            loss_of(model, step).backward()
            optimizer.step()
            optimizer.zero_grad()
    with torch.no_grad():
        assert (logits(lm.model) - before).abs().max() > 0.1
        assert_close(logits(lm.model), logits(theirs), atol=1e-4, rtol=1e-4)
    assert handle.save(tmp_path / "ours") == []
    theirs.save_pretrained(str(tmp_path / "trained"))
    found, expected = load_file(tmp_path / "ours" / WEIGHTS), load_file(tmp_path / "trained" / WEIGHTS)
    assert {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in expected.items()}
    for key in (key for key in found if ".lora_" in key):  # the bias of a key has no gradient but rounding errors
        assert_close(found[key], expected[key], atol=1e-4, rtol=1e-3)


@pytest.fixture
def tied(tmp_path: Path, registry: Registry) -> AttachedAdapter:
    """A LoRA of fused projections, as PEFT wrote it."""
    make(*FUSED["gpt2"], tmp_path)
    return load_base(tmp_path, registry).load_adapter(tmp_path / "adapter")


def As(root: nn.Module, layer: int = 0) -> list[Tensor]:
    """A of q, k and v."""
    adapted: list[Any] = [root.get_submodule(f"blocks.{layer}.attn.{which}") for which in "qkv"]
    return [module.parts["default"].lora_A for module in adapted]


def test_one_parameter_and_its_names(tied: AttachedAdapter) -> None:
    """Guards optimizers and states: A is there once, also for torch; states without it or with two are refused."""
    q, k, v = As(tied.root)
    assert q is k is v
    names = [name for name in tied.trainable() if name.startswith("blocks.0.attn.")]
    assert sorted(names) == [f"blocks.0.attn.{name}" for name in ("k.lora_B", "q.lora_A", "q.lora_B", "v.lora_B")]
    ids = [id(p) for p in tied.root.parameters() if p.requires_grad]
    assert len(ids) == len(set(ids)) == len(tied.trainable()) == len(tied.plan.shapes)
    assert tied.plan.shapes == {name: tuple(p.shape) for name, p in tied.trainable().items()}
    state = tied.state_dict()
    assert state.keys() == tied.trainable().keys()
    with pytest.raises(InputError, match=r"attn\.q\.lora_A is missing"):
        tied.load_state_dict({name: t for name, t in state.items() if name != "blocks.0.attn.q.lora_A"})
    with pytest.raises(InputError, match=r"attn\.k\.lora_A is unknown"):
        tied.load_state_dict(state | {"blocks.0.attn.k.lora_A": state["blocks.0.attn.q.lora_A"]})
    tied.load_state_dict({name: t + 1 for name, t in state.items()})
    assert As(tied.root)[2] is q and torch.equal(q, state["blocks.0.attn.q.lora_A"])


def test_copies_and_moves(tied: AttachedAdapter) -> None:
    """Guards the tie in a copy, which has a tie of its own, in another dtype, and in torch's own state."""
    copied = deepcopy(tied.root)
    q, k, v = As(copied)
    assert q is k is v and q is not As(tied.root)[0]
    (handle,) = zoo.adapters.attach.attached_to(copied).values()
    assert next(p for name, p in handle.trainable().items() if name == "blocks.0.attn.q.lora_A") is q
    copied.to(torch.float64)
    q, k, v = As(copied)
    assert q is k is v and q.dtype == torch.float64
    state = {name: tensor * 2 for name, tensor in tied.root.state_dict().items()}
    copied.load_state_dict(state)
    assert As(copied)[0] is As(copied)[2] and torch.equal(As(copied)[0], 2 * As(tied.root)[0].double())


def test_merging_and_disabling(tied: AttachedAdapter) -> None:
    """Guards each site's own update, once: the A of the group is no part of one site alone."""
    model = tied.root
    with torch.no_grad():
        before, weights = logits(model), digests(dict(model.named_parameters()))
        with tied.disabled():
            plain = logits(model)
        tied.merge()
        assert_close(logits(model), before, atol=1e-5, rtol=1e-4)
        tied.unmerge()
        assert torch.equal(logits(model), before) and digests(dict(model.named_parameters())) == weights
        tied.detach()
        assert torch.equal(logits(model), plain) and not torch.equal(plain, before)


def test_the_gradient_proof(tied: AttachedAdapter) -> None:
    """Guards noise, which a parameter that is counted twice would get twice, and that it is taken back."""
    before = digests(tied.state_dict())
    assert without_gradient(tied, lambda: loss_of(tied.root, 1)) == []
    assert digests(tied.state_dict()) == before
    names = list(tied.trainable())
    B = [name for name in names if name.startswith("blocks.0.attn.") and name.endswith("lora_B")]
    with torch.no_grad():
        for name in B:
            tied.trainable()[name].zero_()
    loss_of(tied.root, 1).backward()
    gradient = tied.trainable()["blocks.0.attn.q.lora_A"].grad
    assert gradient is not None and not gradient.any()  # all three are what it acts through


def test_share_by_roles(tmp_path: Path, registry: Registry) -> None:
    """Guards a group in every layer, and its one rank in the file; v is apart here, and has columns of its own."""
    reference.save_tiny(tmp_path / "base", *reference.VARIANTS["gpt2"])
    lm, other = load_base(tmp_path, registry), load_base(tmp_path, registry)
    handle = lm.adapt("lora", r=4, targets=["attn.q", "attn.k", "attn.v"], share=[["attn.k", "attn.q"]])
    randomize(handle)
    q, k, v = As(lm.model, 2)
    assert q is k and q is not v and As(lm.model, 1)[0] is not q
    assert "blocks.2.attn.k.lora_A" in handle.trainable() and "blocks.2.attn.q.lora_A" not in handle.trainable()
    notes = handle.save(tmp_path / "ours")
    assert "3 updates written as one of rank 8" in notes[0]
    assert_peft_agrees(tmp_path, lm.model)
    loaded = other.load_adapter(tmp_path / "ours")
    assert digests(loaded.state_dict()) == digests(handle.state_dict())
    assert As(other.model)[0] is As(other.model)[1]


QKV = ["attn.q", "attn.k", "attn.v"]
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"share": ["attn.q", "attn.v"]}, "share is a list of groups, not 'attn.q'"),
    ({"share": [["attn.q", "mlp.up"]]}, "no site is named 'mlp.up'"),
    ({"share": [["attn.q"]]}, "share no A"),
    ({"share": [["attn.q", "attn.k"], ["attn.k", "attn.v"]]}, "each is in one"),
    ({"share": [QKV], "rank_pattern": {"attn.v": 3}}, "differ in their inputs or ranks"),
    ({"share": [["attn.q", "mlp.down"]], "targets": ["attn.q", "mlp.down"]}, "differ in their inputs or ranks"),
    ({"share": [QKV], "init": "pissa"}, "both pissa and a shared A"),
    ({"share": [QKV], "parts": {"attn.q": (2, 2)}, "r": 4}, "both parts and a shared A"),
    ({"share": [QKV], "r": 49}, "Take r=48 or less"),
]


@pytest.mark.parametrize(("options", "message"), WRONG, ids=[message for _, message in WRONG])
def test_groups_that_can_not_be(options: dict[str, Any], message: str, tmp_path: Path, registry: Registry) -> None:
    reference.save_tiny(tmp_path / "base", *reference.VARIANTS["gpt2"])
    lm = load_base(tmp_path, registry)
    with pytest.raises(InputError, match=message):
        lm.adapt("lora", **{"targets": QKV} | options)
    assert not [name for name, _ in lm.model.named_parameters() if "lora" in name]
