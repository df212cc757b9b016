"""Which layers compute in FP8 and why not the others; what must survive: parameters, ties, optimizers, adapters."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import fp8_tiny as tiny
import pytest
import torch
from torch import nn
from zoo_transformer_engine.emulated import FP8_EMULATED, EmulatedLayers, EmulatedLinear
from zoo_transformer_engine.options import EmulatedOptions

import zoo
from zoo.errors import InputError
from zoo.train.activation_checkpointing import set_activation_checkpointing
from zoo.train.compiling import compile_blocks


def convert(model: nn.Module, **options: Any) -> EmulatedLayers:
    return replace(FP8_EMULATED, options=EmulatedOptions(**options)).convert(model)


def emulated(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, EmulatedLinear)]


class Scaled(nn.Linear):
    """What an adapter's own linear looks like."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


class Odd(nn.Module):
    """Linears of which some can not be in FP8."""

    def __init__(self) -> None:
        super().__init__()
        self.fine = nn.Linear(64, 32)
        self.inputs = nn.Linear(24, 32)
        self.outputs = nn.Linear(64, 8)
        self.both = nn.Linear(8, 8)
        self.scaled = Scaled(64, 64)
        self.blocks = nn.ModuleList(nn.Linear(16, 20) for _ in range(3))
        self.lm_head = nn.Linear(64, 64)


def test_every_layer_that_stays_says_why() -> None:
    """Guards the rule that the kernels have: TransformerEngine refuses 24 inputs and 8 outputs in the pass itself."""
    model = Odd()
    made = convert(model)
    assert emulated(model) == ["fine"] and list(made.chosen.linears) == ["fine"]
    assert made.chosen.skipped == {
        "inputs": "24 inputs is no multiple of 16",
        "outputs": "8 outputs is no multiple of 16",
        "both": "8 inputs and 8 outputs are no multiples of 16",
        "scaled": "it is a Scaled, which may do more than a linear",
        "blocks.0": "20 outputs is no multiple of 16",
        "blocks.1": "20 outputs is no multiple of 16",
        "blocks.2": "20 outputs is no multiple of 16",
        "lm_head": "named by skip",
    }
    assert made.describe().startswith("1 of 9 linears in FP8 with delayed scaling (max of 1024 steps, margin 0), E4M3")
    assert "blocks.* stays as it is (3x): 20 outputs is no multiple of 16" in made.describe()


def test_the_multiple_is_that_of_the_recipe() -> None:
    model = nn.Sequential(nn.Linear(48, 64), nn.Linear(64, 96))
    made = convert(model, scaling="mxfp8")
    assert made.chosen.skipped == {"0": "48 inputs is no multiple of 32"}


def test_shapes_that_no_gpu_takes() -> None:
    model = Odd()
    convert(model, strict_shapes=False, skip=())
    assert emulated(model) == [n for n, m in Odd().named_modules() if type(m) is nn.Linear]
    assert model.inputs(torch.randn(3, 24)).shape == (3, 32)


def test_nothing_to_convert() -> None:
    """Guards against a run that says FP8 and computes none."""
    with pytest.raises(InputError, match=r"no linear of the model can compute in FP8: 0 stays as it is: 8 inputs"):
        convert(nn.Sequential(nn.Linear(8, 16)))


def test_parameters_stay_the_objects_that_they_are() -> None:
    """Guards tied weights, biases, a module in two places, and who was told of a parameter before."""
    model = tiny.gpt(tie_embeddings=True)
    before = dict(model.named_parameters(remove_duplicate=False))
    convert(model, skip=())
    after = dict(model.named_parameters(remove_duplicate=False))
    assert list(after) == list(before) and all(after[name] is before[name] for name in before)
    assert model.get_parameter("head.weight") is model.get_parameter("embed.weight")
    assert isinstance(model.get_submodule("head"), EmulatedLinear)
    shared = nn.Linear(16, 16)
    twice = nn.Sequential(shared, nn.GELU(), shared)
    convert(twice)
    assert twice[0] is twice[2] and isinstance(twice[0], EmulatedLinear)
    without = nn.Sequential(nn.Linear(16, 16, bias=False))
    convert(without)
    assert without[0].bias is None


@pytest.mark.parametrize("optimizer_first", [True, False])
def test_every_parameter_is_trained(optimizer_first: bool) -> None:
    """Guards against an optimizer that holds parameters which the model no longer has."""
    model = tiny.gpt()
    if optimizer_first:
        optimizer = tiny.optimizer_of(model)
        convert(model)
    else:
        convert(model)
        optimizer = tiny.optimizer_of(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    tiny.train(model, optimizer, range(3))
    still = [name for name, p in model.named_parameters() if torch.equal(p, before[name])]
    assert still == [name for name in still if name.endswith("attn.k.bias")]  # which the loss can not depend on


@pytest.mark.parametrize("adapter", ["lora", "llama-adapter", "ia3", "full", "bitfit", "norm"])
def test_adapters_wrap_converted_layers(adapter: str) -> None:
    """Guards against adapters that vanish, base weights that train along, and layers that stay in bfloat16."""
    model = tiny.gpt()
    convert(model)
    base = emulated(model)
    options: dict[str, Any] = {"targets": ["all-linear"]} if adapter == "lora" else {}
    handle = zoo.adapt(model, adapter, **options)
    assert {name.removesuffix(".base") for name in emulated(model)} == set(base) and len(base) == 12
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    trained = {name: p.detach().clone() for name, p in handle.trainable().items()}
    losses = tiny.train(model, tiny.optimizer_of(model, lr=1e-2), range(20))
    assert all(torch.equal(dict(model.named_parameters())[n], value) for n, value in frozen.items())
    stuck = [name for name, p in handle.trainable().items() if torch.equal(p, trained[name])]
    assert all(name.endswith("attn.k.bias") for name in stuck)
    assert sum(losses[-5:]) < sum(losses[:5])
    if adapter == "lora":
        tokens = tiny.chain(2, seed=9)
        loss = tiny.loss_of(model.eval(), tokens)
        handle.merge()
        torch.testing.assert_close(tiny.loss_of(model, tokens), loss, rtol=1e-2, atol=0)


def test_evaluation_is_that_of_the_saved_model() -> None:
    """Guards the numbers of FP8 too: they are those of training steps alone, and nothing else moves the factors."""
    model, plain = tiny.gpt(), tiny.gpt()
    made = convert(model)
    tiny.train(model, tiny.optimizer_of(model), range(2))
    plain.load_state_dict(model.state_dict())
    state = {name: value.clone() for name, value in made.scaler.state_dict().items()}
    tokens = tiny.chain(4, seed=99)
    ours, theirs = tiny.loss_of(model.eval(), tokens), tiny.loss_of(plain.eval(), tokens)
    ours.backward()
    assert torch.equal(ours, theirs)
    assert all(torch.equal(value, state[name]) for name, value in made.scaler.state_dict().items())
    assert not torch.equal(tiny.loss_of(model.train(), tokens), theirs)


@pytest.mark.parametrize("mode", ["block", "selective"])
@pytest.mark.parametrize("scaling", ["delayed", "current"])
def test_activation_checkpointing_changes_nothing(mode: Any, scaling: str) -> None:
    """Guards against largest values that count twice, and factors that have moved when a block is computed again."""
    losses = []
    for again in ("none", mode):
        model = tiny.gpt()
        made = convert(model, scaling=scaling)
        set_activation_checkpointing(model, again)
        losses.append((tiny.train(model, tiny.optimizer_of(model), range(4)), made.scaler.state_dict()))
    assert losses[0][0] == losses[1][0]
    assert all(torch.equal(value, losses[1][1][name]) for name, value in losses[0][1].items())


def test_compiled_blocks_compute_the_same() -> None:
    """Guards against a compiler that runs what changes the factors when it should not."""
    losses = []
    for compiled in (False, True):
        model = tiny.gpt()
        convert(model)
        if compiled:
            compile_blocks(model, backend="eager")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            losses.append(tiny.train(model, tiny.optimizer_of(model), range(3)))
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
