"""Each recipe against its formulas, written out a second time: forward and gradients, over several steps."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import fp8_reference
import pytest
import torch
from fp8_reference import E4M3, E5M2, DelayedTensor, fake, fake_blocks, products
from torch import Tensor, nn
from zoo_transformer_engine.emulated import FP8_EMULATED, EmulatedLayers
from zoo_transformer_engine.options import EmulatedOptions
from zoo_transformer_engine.quantize import factor, quantize

from zoo.errors import InputError, UnknownNameError

D_IN, D_OUT, STEPS = 32, 48, 5
DELAYED = [
    {},
    {"amax_history_len": 2},
    {"amax_history_len": 1, "margin": 1},
    {"amax_compute_algo": "most_recent", "margin": 2},
    {"fp8_format": "E4M3", "amax_history_len": 3},
]


def emulated(module: nn.Module, **options: Any) -> EmulatedLayers:
    return replace(FP8_EMULATED, options=EmulatedOptions(**options)).convert(module.train())


def step_data(step: int, n_tokens: int = 50) -> tuple[Tensor, Tensor]:
    """Inputs and gradients whose size changes from step to step, outliers beyond the old range among them."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(n_tokens, D_IN, generator=generator) * 10.0 ** ((step * 2) % 3 - 1)
    g = torch.randn(n_tokens, D_OUT, generator=generator) * 10.0 ** (-3 * (step % 2))
    return x, g


def computed(linear: nn.Sequential, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y without its bias, dx, dw, db of the layer."""
    layer = linear[0]
    assert isinstance(layer, nn.Linear)
    x = x.clone().requires_grad_()
    linear.zero_grad()
    y = linear(x)
    y.backward(g)
    assert x.grad is not None and layer.weight.grad is not None and layer.bias.grad is not None
    return y - layer.bias, x.grad, layer.weight.grad, layer.bias.grad


def assert_same(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    """To 1e-6 of the largest number."""
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.double() - theirs).abs().max() <= 1e-6 * theirs.abs().max()


def linear() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(D_IN, D_OUT))


@pytest.mark.parametrize("options", DELAYED)
def test_delayed_scaling(options: dict[str, Any]) -> None:
    """Guards the history, its length, the choice from it, the margin, and the formats: each changes some step."""
    module = linear()
    emulated(module, **options)
    recipe: dict[str, Any] = {
        "amax_history_len": 1024,
        "amax_compute_algo": "max",
        "margin": 0,
        "fp8_format": "HYBRID",
    } | options
    form_g = E5M2 if recipe["fp8_format"] == "HYBRID" else E4M3
    made = [
        DelayedTensor(form, recipe["amax_history_len"], recipe["amax_compute_algo"], recipe["margin"])
        for form in (E4M3, E4M3, form_g)
    ]
    for step in range(STEPS):
        x, g = step_data(step)
        w = module[0].get_parameter("weight").detach()
        x_q, w_q, g_q = (tensor.fake(value) for tensor, value in zip(made, (x, w, g), strict=True))
        assert_same(computed(module, x, g), products(x, w, g, (x_q, w_q, g_q, w_q, g_q, x_q)))
        for tensor in made:
            tensor.end_step()
        with torch.no_grad():
            module[0].get_parameter("weight").mul_(1.5)


@pytest.mark.parametrize("fp8_format", ["HYBRID", "E4M3"])
def test_current_scaling(fp8_format: str) -> None:
    module = linear()
    emulated(module, scaling="current", fp8_format=fp8_format)
    form_g = E5M2 if fp8_format == "HYBRID" else E4M3
    for step in range(STEPS):
        x, g = step_data(step)
        w = module[0].get_parameter("weight").detach()
        forms = (E4M3, E4M3, form_g)
        x_q, w_q, g_q = (fake(t, f[2] / t.abs().max().item(), f) for t, f in zip((x, w, g), forms, strict=True))
        assert_same(computed(module, x, g), products(x, w, g, (x_q, w_q, g_q, w_q, g_q, x_q)))


@pytest.mark.parametrize("fp8_format", ["E4M3", "HYBRID"])
@pytest.mark.parametrize("n_tokens", [64, 50])
def test_mxfp8(fp8_format: str, n_tokens: int) -> None:
    """Guards the direction of the blocks: each product has its own, and the last block may be short."""
    module = linear()
    emulated(module, scaling="mxfp8", fp8_format=fp8_format, strict_shapes=False)
    form_g = E5M2 if fp8_format == "HYBRID" else E4M3
    x, g = step_data(1, n_tokens)
    w = module[0].get_parameter("weight").detach()
    operands = (
        fake_blocks(x, 1, E4M3), fake_blocks(w, 1, E4M3),
        fake_blocks(g, 1, form_g), fake_blocks(w, 0, E4M3),
        fake_blocks(g, 0, form_g), fake_blocks(x, 0, E4M3),
    )  # fmt: skip
    assert_same(computed(module, x, g), products(x, w, g, operands))


def test_the_formats() -> None:
    """Guards the reference too: every number of both formats is itself, and halves go to even."""
    for dtype, form in ((torch.float8_e4m3fn, E4M3), (torch.float8_e5m2, E5M2)):
        numbers = torch.arange(256, dtype=torch.uint8).view(dtype).float()
        numbers = numbers[numbers.isfinite()]
        assert torch.equal(fp8_reference.rounded(numbers, form).float(), numbers)
        between = (numbers.sort().values[:-1] + numbers.sort().values[1:]) / 2
        ours = quantize(between, torch.ones(()), dtype).dequantized()
        assert torch.equal(fp8_reference.rounded(between, form).float(), ours)
        assert quantize(torch.tensor([1e9]), torch.ones(()), dtype).values.float().item() == form[2]


def test_factors_that_can_not_be_computed() -> None:
    """Guards against NaN from B of LoRA, which is zero at first, and from an infinite gradient."""
    amax = torch.tensor([0.0, float("inf"), float("nan"), 1e-40, 7.0])
    found = factor(amax, torch.float8_e4m3fn, torch.full((5,), 3.0))
    assert found.tolist() == [3.0, 3.0, 3.0, torch.finfo(torch.float32).max, 64.0]
    module = linear()
    emulated(module, scaling="current")
    assert module(torch.zeros(4, D_IN)).isfinite().all()


@pytest.mark.skipif(find_spec("torchao") is None, reason="torchao is not installed")
def test_as_torchao_emulates_it() -> None:
    """Current scaling in another's words. torchao rounds products to bfloat16, so the tolerance is bfloat16's."""
    torchao = import_module("torchao.float8")
    module, theirs = linear().bfloat16(), linear().bfloat16()
    emulated(module, scaling="current")
    theirs = torchao.convert_to_float8_training(theirs, config=torchao.Float8LinearConfig(emulate=True))
    x, g = (t.bfloat16() for t in step_data(0))
    for ours, other in zip(computed(module, x, g), computed(theirs, x, g), strict=True):
        assert (ours.float() - other.float()).norm() <= 1e-2 * other.float().norm()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"scaling": "delyed"}, "Did you mean 'delayed'?"),
        ({"fp8_format": "E5M2"}, "E5M2"),
        ({"amax_compute_algo": "mean"}, "mean"),
        ({"amax_history_len": 0}, "at least 1, not 0"),
        ({"amax_history_len": 2.5}, "at least 1, not 2.5"),
        ({"margin": 0.5}, "not 0.5"),
        ({"skip": "head"}, "list of names, not 'head'"),
        ({"scaling": "current", "margin": 1}, "margin is an option of delayed scaling"),
        ({"scaling": "mxfp8", "amax_history_len": 16}, "amax_history_len is an option of delayed scaling"),
    ],
)
def test_options_that_can_not_be(options: dict[str, Any], said: str) -> None:
    with pytest.raises((InputError, UnknownNameError)) as caught:
        EmulatedOptions(**options)
    assert said in str(caught.value)
