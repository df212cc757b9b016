"""PiSSA is PEFT's, without a change of the weights; it and DoRA are written so that PEFT computes the same with them.

Shape letters: R rank.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.testing import assert_close

import zoo
from tests import reference
from zoo.errors import FileFormatError, InputError
from zoo.registry import Registry
from zoo.testing.adapters import digests, randomize

R = 4
CASES: dict[str, tuple[str, list[str], dict[str, Any]]] = {
    "linear": ("llama-gqa", ["q_proj", "v_proj", "down_proj"], {}),
    "rslora": ("qwen2", ["k_proj", "up_proj"], {"use_rslora": True}),
    "conv1d": ("gpt2", ["c_attn", "c_fc"], {"fan_in_fan_out": True}),
    "patterns": ("llama", ["q_proj", "up_proj"], {"rank_pattern": {"up_proj": 7}, "alpha_pattern": {"q_proj": 9}}),
}
SETTINGS = {"use_rslora": "rslora", "rank_pattern": "rank_pattern", "alpha_pattern": "alpha_pattern"}
"""What PEFT's options are called here."""


def tiny(variant: str) -> Any:
    """The same at every call; frozen weights make both sides train the same."""
    return reference.tiny_model(*reference.VARIANTS[variant])


def logits(model: nn.Module) -> Tensor:
    found: Any = model(reference.tokens(2, 9))
    result: Tensor = getattr(found, "logits", found)
    return result


def loss_of(model: nn.Module) -> Tensor:
    found = logits(model)
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(2))
    return (found.log_softmax(-1) * weights).mean()


@pytest.mark.parametrize("case", CASES)
def test_trains_as_peft_does(case: str) -> None:
    """Guards the triples, their scaling, and what is taken off: values, logits and gradients, at several steps."""
    variant, targets, options = CASES[case]
    base, ours = tiny(variant), tiny(variant)
    start = logits(base).detach()
    settings = {"r": R, "lora_alpha": 6, "target_modules": targets, "init_lora_weights": "pissa", **options}
    theirs = peft.get_peft_model(base, peft.LoraConfig(**settings)).eval()
    ours_options = {SETTINGS[key]: value for key, value in options.items() if key in SETTINGS}
    handle = zoo.adapt(ours, "lora", r=R, alpha=6, targets=targets, init="pissa", **ours_options)
    assert_close(logits(ours), start, atol=1e-5, rtol=0)
    parameters = {
        name.removeprefix("base_model.model.").replace(".default.weight", ""): parameter
        for name, parameter in theirs.named_parameters()
        if parameter.requires_grad
    }
    own = handle.trainable()
    assert parameters.keys() == own.keys()
    for name, parameter in own.items():
        assert_close(parameter.abs(), parameters[name].abs(), atol=1e-4, rtol=1e-3)  # signs are free
        with torch.no_grad():
            parameter.copy_(parameters[name])
    before = digests({n: p for n, p in ours.named_parameters() if not p.requires_grad})
    for _ in range(4):
        expected, found = loss_of(theirs), loss_of(ours)
        assert_close(logits(ours), logits(theirs), atol=1e-4, rtol=1e-4)
        expected.backward()
        found.backward()
        for name, parameter in own.items():
            grad = parameters[name].grad
            assert grad is not None and parameter.grad is not None and grad.abs().max() > 1e-6
            assert_close(parameter.grad, grad, atol=1e-3 * float(grad.abs().max()), rtol=1e-3)
        with torch.no_grad():
            for parameter in (*own.values(), *parameters.values()):
                assert parameter.grad is not None
                parameter.sub_(0.05 * parameter.grad.sign())
                parameter.grad = None
        with torch.no_grad():  # a sign of a gradient near zero is not the subject
            for name, parameter in own.items():
                parameter.copy_(parameters[name])
    assert (logits(ours) - start).abs().max() > 0.05
    assert digests({n: p for n, p in ours.named_parameters() if not p.requires_grad}) == before


def test_dropout_leaves_out_what_is_taken_off() -> None:
    """Guards W x - B0 A0 x without dropout, which is the weight in PEFT: at p near 1 that alone is left."""
    model, plain = nn.Sequential(nn.Linear(12, 10)), nn.Sequential(nn.Linear(12, 10))
    plain.load_state_dict(model.state_dict())
    zoo.adapt(model, "lora", r=3, alpha=6, targets=["=0"], init="pissa", dropout=1 - 1e-7)
    layer: Any = plain[0]
    with torch.no_grad():
        U, S, Vh = torch.linalg.svd(layer.weight)
        layer.weight.sub_((U[:, :3] * S[:3]) @ Vh[:3])
        x = torch.randn(5, 12)
        assert_close(model.train()(x), plain(x), atol=1e-5, rtol=1e-5)


METHODS: dict[str, dict[str, Any]] = {
    "pissa": {"init": "pissa"},
    "pissa-rslora": {"init": "pissa", "rslora": True, "alpha": 3},
    "pissa-large": {"init": "pissa", "r": 14},
    "pissa-ranks": {"init": "pissa", "rank_pattern": {"attn.v": 3}},
    "dora": {"dora": True},
    "dora-ranks": {"dora": True, "rank_pattern": {"attn.v": 3}},
}


@pytest.mark.parametrize("targets", [["attn.q", "attn.v"], ["all-linear"]], ids=["qv", "all"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("variant", ["gpt2", "gpt_neox", "phi3", "llama"])
def test_directories(variant: str, method: str, targets: list[str], tmp_path: Path, registry: Registry) -> None:
    """Guards fused projections with and without all of their parts, both scalings, and ranks above the weight's."""
    reference.save_tiny(tmp_path / "base", *reference.VARIANTS[variant])
    lm, other = (zoo.load(tmp_path / "base", precision="32-true", device="cpu", registry=registry) for _ in "ab")
    handle = lm.adapt("lora", **{"r": R, "targets": targets, **METHODS[method]})
    randomize(handle)
    notes = handle.save(tmp_path / "ours")
    assert any("twice the rank" in note for note in notes) == ("pissa" in method)
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", attn_implementation="eager")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "ours").eval()
    with torch.no_grad():
        expected = logits(lm.model)
        assert_close(logits(theirs), expected, atol=1e-5, rtol=1e-4)
        loaded = other.load_adapter(tmp_path / "ours")
        assert_close(logits(other.model), expected, atol=1e-5, rtol=1e-4)
        loaded.save(tmp_path / "again")
        base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", attn_implementation="eager")
        theirs = peft.PeftModel.from_pretrained(base, tmp_path / "again").eval()
        assert_close(logits(theirs), expected, atol=1e-5, rtol=1e-4)
    options: Any = loaded.adapter.options
    assert options.init == "default" and options.dora == handle.adapter.options.dora


@pytest.mark.filterwarnings("ignore:PiSSA changes the base weights:UserWarning")
def test_what_peft_has_not_converted_is_refused(tmp_path: Path) -> None:
    """Guards against an update on the weights as they are, when it was trained on what was left of them."""
    theirs = peft.get_peft_model(
        tiny("llama"), peft.LoraConfig(r=R, init_lora_weights="pissa", target_modules=["q_proj"])
    )
    theirs.peft_config["default"].init_lora_weights = True
    theirs.save_pretrained(str(tmp_path / "initial"))
    theirs.peft_config["default"].init_lora_weights = "pissa"
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.add_(0.1 * torch.randn_like(parameter) if "lora_" in name else 0.0)
        expected = logits(theirs.eval())
    theirs.save_pretrained(str(tmp_path / "raw"))
    theirs.save_pretrained(
        str(tmp_path / "converted"), path_initial_model_for_weight_conversion=str(tmp_path / "initial")
    )
    model = tiny("llama")
    with pytest.raises(FileFormatError, match=r"init_lora_weights='pissa'.*path_initial_model_for"):
        zoo.load_adapter(model, tmp_path / "raw")
    zoo.load_adapter(model, tmp_path / "converted")
    with torch.no_grad():
        assert_close(logits(model), expected, atol=1e-4, rtol=1e-4)


def turned(svd: Any) -> Any:
    """As another machine may find it: other signs, and vectors of close values in another mixture."""

    def other(weight: Tensor, **options: Any) -> tuple[Tensor, ...]:
        U, S, Vh = svd(weight, **options)
        return -U.roll(1, 1), S.roll(1), -Vh.roll(1, 0)

    return other


def test_a_state_holds_on_another_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards what was taken off: it is in the state, and not found anew; to the bit."""
    model, other = tiny("llama"), tiny("llama")
    options: dict[str, Any] = {"r": R, "targets": ["q_proj"], "init": "pissa"}
    handle = zoo.adapt(model, "lora", **options)
    randomize(handle)
    monkeypatch.setattr(torch.linalg, "svd", turned(torch.linalg.svd))
    second = zoo.adapt(other, "lora", **options)
    state = handle.state_dict()
    second.load_state_dict(state)
    assert torch.equal(logits(other), logits(model))
    key = "model.layers.0.self_attn.q_proj.lora_A0"
    assert key in state and key not in handle.trainable()
    with pytest.raises(InputError, match=f"{key} is missing"):
        second.load_state_dict({name: tensor for name, tensor in state.items() if name != key})


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_weights_that_are_quantized(quantize: str, tmp_path: Path, registry: Registry) -> None:
    """Guards the triples of integers: of the weight that they stand for."""
    reference.save_tiny(tmp_path, *reference.VARIANTS["llama"])
    lm = zoo.load(tmp_path, precision="32-true", device="cpu", quantize=quantize, registry=registry)
    with torch.no_grad():
        before = logits(lm.model)
        handle = lm.adapt("lora", r=R, init="pissa", alpha=5)
        assert_close(logits(lm.model), before, atol=1e-5, rtol=0)
    site: Any = lm.model.get_submodule("blocks.0.attn.q")
    A, B = handle.trainable()["blocks.0.attn.q.lora_A"], handle.trainable()["blocks.0.attn.q.lora_B"]
    S = torch.linalg.svdvals(site.base.dequantized().float())
    assert_close(torch.linalg.svdvals(5 / R * B @ A)[:R], S[:R], atol=1e-4, rtol=1e-4)
