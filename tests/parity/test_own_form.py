"""A LoRA that PEFT's layout has only as another one: zoo reads what it saved to the bit, and PEFT its own form of it.

Shape letters: D model width, R rank.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.testing import assert_close

import zoo
from tests import reference
from tests.parity.test_loralib_parts import D, logits, make, parts_of
from tests.parity.test_peft import change, digest, load_base
from zoo.adapters.attach import AttachedAdapter
from zoo.convert.own_form import OWN_FORM
from zoo.errors import FileFormatError
from zoo.registry import Registry
from zoo.testing.adapters import digests, randomize

WEIGHTS = "adapter_model.safetensors"
PARTS = {"c_attn": (8, 0, 8)}
CASES: dict[str, dict[str, Any]] = {
    "qv": {"parts": PARTS},
    "ranks": {"parts": {"c_attn": (0, 3, 7)}, "alpha": 5},
    "above-the-weight": {"parts": {"c_attn": (30, 20, 0)}, "rslora": True},
    "one-layer": {"parts": {"0.*c_attn": (4, 0, 4)}, "r": 6, "dropout": 0.25},
    "modules": {"parts": PARTS, "modules_to_save": ["wpe", "lm_head"]},
}


def files(directory: Path) -> dict[str, str]:
    return {path.name: digest(path) for path in directory.iterdir()}


def by_peft(kind: str, directory: Path) -> Any:
    """What is saved, on the same model, loaded by PEFT."""
    return peft.PeftModel.from_pretrained(make(kind), directory).eval()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_parts_are_parts_again(kind: str, case: str, tmp_path: Path) -> None:
    """Guards options and every bit, also where B takes in a factor for PEFT, which no division takes back."""
    options = CASES[case]
    if case == "modules":
        options = options | {"modules_to_save": ["lm_head"] if kind == "linear" else ["wpe"]}
    model, again = make(kind), make(kind)
    handle = parts_of(model, **options)
    notes = handle.save(tmp_path / "ours")
    assert notes[-1].startswith(OWN_FORM)
    loaded = zoo.load_adapter(again, tmp_path / "ours")
    assert digests(loaded.state_dict()) == digests(handle.state_dict())
    assert loaded.plan == handle.plan
    for name in ("r", "alpha", "rslora", "dropout", "parts", "share", "rank_pattern"):
        assert getattr(loaded.adapter.options, name) == getattr(handle.adapter.options, name)
    with torch.no_grad():
        assert torch.equal(logits(again.eval()), logits(model.eval()))
        theirs = by_peft(kind, tmp_path / "ours")
        assert_close(logits(theirs), logits(model), atol=1e-5, rtol=1e-4)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    assert digest(tmp_path / "theirs" / WEIGHTS) == digest(tmp_path / "ours" / WEIGHTS)
    loaded.save(tmp_path / "again")
    assert files(tmp_path / "again") == files(tmp_path / "ours")


@pytest.mark.parametrize("variant", ["gpt2", "gpt_neox", "phi3"])
def test_projections_are_apart_again(variant: str, tmp_path: Path, registry: Registry) -> None:
    """Guards q and v of a decoder of zoo's: read as PEFT's one LoRA, k would train too, with all of their A."""
    reference.save_tiny(tmp_path / "base", *reference.VARIANTS[variant])
    lm, other = load_base(tmp_path, registry), load_base(tmp_path, registry)
    handle = lm.adapt("lora", r=3, rank_pattern={"attn.v": 2}, alpha_pattern={"attn.q": 7.0})
    randomize(handle)
    handle.save(tmp_path / "ours")
    loaded = other.load_adapter(tmp_path / "ours")
    assert loaded.plan == handle.plan
    assert digests(loaded.state_dict()) == digests(handle.state_dict())
    with torch.no_grad():
        assert torch.equal(logits(other.model), logits(lm.model))
    stored = load_file(tmp_path / "ours" / OWN_FORM)
    assert not stored.keys() & load_file(tmp_path / "ours" / WEIGHTS).keys()


def test_a_plain_lora_has_no_third_file(tmp_path: Path) -> None:
    """Guards a file that was left by another adapter in the same directory."""
    parts_of(make("conv1d"), parts=PARTS).save(tmp_path)
    assert (tmp_path / OWN_FORM).exists()
    assert parts_of(make("conv1d")).save(tmp_path) == []
    assert not (tmp_path / OWN_FORM).exists()


def trained_by_peft(directory: Path) -> None:
    theirs = peft.PeftModel.from_pretrained(make("conv1d"), directory, is_trainable=True)
    logits(theirs).square().mean().backward()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.grad is not None:
                parameter.sub_(parameter.grad.sign(), alpha=0.1)
    theirs.save_pretrained(str(directory))


def scaled_by_hand(directory: Path) -> None:
    change(directory, lora_alpha=3)


@pytest.mark.parametrize("edit", [trained_by_peft, scaled_by_hand])
def test_what_was_changed_since_counts(edit: Any, tmp_path: Path) -> None:
    """Guards against the old adapter where PEFT has trained on, or a scaling was set, in the same directory."""
    handle = parts_of(make("conv1d"), parts=PARTS)
    handle.save(tmp_path)
    edit(tmp_path)
    assert (tmp_path / OWN_FORM).exists()
    model = make("conv1d")
    loaded = zoo.load_adapter(model, tmp_path)
    assert loaded.trainable()["transformer.h.0.attn.c_attn.lora_B"].shape == (3 * D, 16)
    with torch.no_grad():
        assert_close(logits(model), logits(by_peft("conv1d", tmp_path)), atol=1e-5, rtol=1e-4)
        assert (logits(model) - logits(handle.root)).abs().max() > 1e-3


def test_another_model_reads_the_form_of_peft(tmp_path: Path, registry: Registry) -> None:
    """Guards both ways between a module of transformers and zoo's decoder, whose sites have other names."""
    reference.save_tiny(tmp_path / "base", *reference.VARIANTS["gpt2"])
    theirs = make("conv1d")
    parts_of(theirs, parts=PARTS).save(tmp_path / "ours")
    lm, model = load_base(tmp_path, registry), make("conv1d")
    loaded = lm.load_adapter(tmp_path / "ours")
    loaded.save(tmp_path / "back")
    zoo.load_adapter(model, tmp_path / "back")
    with torch.no_grad():
        assert_close(logits(lm.model), logits(theirs), atol=1e-5, rtol=1e-4)
        assert_close(logits(model), logits(theirs), atol=1e-5, rtol=1e-4)
    assert digest(tmp_path / "back" / WEIGHTS) == digest(tmp_path / "ours" / WEIGHTS)
    loaded.detach()
    handle = lm.adapt("lora", r=2)
    randomize(handle)
    handle.save(tmp_path / "apart")
    model = make("conv1d")
    zoo.load_adapter(model, tmp_path / "apart")
    with torch.no_grad():
        assert_close(logits(model), logits(lm.model), atol=1e-5, rtol=1e-4)


def test_a_deeper_model(tmp_path: Path) -> None:
    """Guards targets: the sites that were adapted, not all that have their names."""
    handle = parts_of(make("conv1d"), parts=PARTS)
    handle.save(tmp_path)
    deeper = reference.tiny_model("gpt2", reference.GPT2 | {"n_layer": 4})
    loaded = zoo.load_adapter(deeper, tmp_path, any_base=True)
    assert digests(loaded.state_dict()) == digests(handle.state_dict())


def damaged(directory: Path) -> None:
    path = directory / OWN_FORM
    path.write_bytes(path.read_bytes()[:-100])


def of_another_program(directory: Path) -> None:
    path = directory / OWN_FORM
    path.write_bytes((directory / WEIGHTS).read_bytes())


@pytest.mark.parametrize("edit", [damaged, of_another_program])
def test_a_damaged_file_is_named(edit: Any, tmp_path: Path) -> None:
    parts_of(make("conv1d"), parts=PARTS).save(tmp_path)
    edit(tmp_path)
    model: nn.Module = make("conv1d")
    with pytest.raises(FileFormatError, match=rf"{OWN_FORM} is damaged.*Delete it"):
        zoo.load_adapter(model, tmp_path)
    (tmp_path / OWN_FORM).unlink()
    handle: AttachedAdapter = zoo.load_adapter(model, tmp_path)
    assert handle.plan.n_trainable == 3 * 16 * 4 * D
