"""bitsandbytes' layers against its own functions, and nf4 against its definition."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor, nn

if find_spec("bitsandbytes") is None:
    pytest.skip("bitsandbytes is not installed", allow_module_level=True)

from zoo_bitsandbytes.layers import BLOCK, FP4Linear, LLMInt8Linear, NF4Linear
from zoo_bitsandbytes.quantizers import FP4, NF4, LLMInt8

from zoo.precision.quantization import QuantizedLinear

bitsandbytes: Any = import_module("bitsandbytes")
KINDS: list[type[QuantizedLinear]] = [NF4Linear, FP4Linear, LLMInt8Linear]
D_OUT, D_IN = 96, 128


def weight() -> Tensor:
    return torch.randn(D_OUT, D_IN, generator=torch.Generator().manual_seed(1)) * 0.02


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_four_bits_are_those_of_bitsandbytes(quant_type: str, dtype: torch.dtype) -> None:
    """Guards the layout of values and factors, the products, and the gradient of the inputs."""
    kind = {"nf4": NF4Linear, "fp4": FP4Linear}[quant_type]
    values, state = bitsandbytes.functional.quantize_4bit(weight(), blocksize=BLOCK, quant_type=quant_type)
    expected = bitsandbytes.functional.dequantize_4bit(values, state)
    layer = kind.from_float(weight(), dtype)
    assert torch.equal(layer.dequantized(), expected.to(dtype))
    x = torch.randn(5, 7, D_IN, dtype=dtype, requires_grad=True)
    y = layer(x)
    g = torch.randn_like(y)
    y.backward(g)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    assert x.grad is not None
    torch.testing.assert_close(y.float(), x.float() @ expected.T, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(x.grad.float(), g.float() @ expected, rtol=tolerance, atol=tolerance)


def test_nf4_as_it_is_defined() -> None:
    """Written out: the nearest of 16 quantiles of a normal distribution, times the largest of each 64 values."""
    low = torch.special.ndtri(torch.linspace(1 - 0.9677083, 0.5, 8)[:-1].double())
    high = torch.special.ndtri(torch.linspace(0.5, 0.9677083, 9).double())
    levels = torch.cat((low / low.abs().max(), high / high.max()))
    blocks = weight().double().view(-1, BLOCK)
    absmax = blocks.abs().amax(dim=1, keepdim=True)
    nearest = (blocks / absmax)[..., None].sub(levels).abs().argmin(dim=-1)
    expected = (levels[nearest] * absmax).view(D_OUT, D_IN)
    torch.testing.assert_close(NF4Linear.from_float(weight(), torch.float32).dequantized().double(), expected,
                               rtol=1e-4, atol=1e-6)  # fmt: skip


def test_int8() -> None:
    """Guards the factor of a row, products of 8-bit inputs in evaluation, and of unpacked weights in training."""
    layer = LLMInt8Linear.from_float(weight(), torch.float32)
    step = weight().abs().amax(dim=1, keepdim=True) / 127
    assert ((layer.dequantized() - weight()).abs() <= 0.6 * step).all()  # half a step, and float16's own rounding
    x = torch.randn(9, D_IN, requires_grad=True)
    expected = x @ layer.dequantized().T
    trained = layer.train()(x)
    torch.testing.assert_close(trained, expected, rtol=1e-3, atol=1e-3)
    trained.sum().backward()
    torch.testing.assert_close(x.grad, layer.dequantized().sum(0).expand(9, -1), rtol=1e-3, atol=1e-3)
    with torch.no_grad():
        evaluated = layer.eval()(x)
    assert 0 < (evaluated - expected).norm() <= 2e-2 * expected.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_a_bias_is_added(kind: type[QuantizedLinear]) -> None:
    layer = kind.from_float(weight(), torch.float32).train()
    x = torch.randn(4, D_IN)
    without = layer(x)
    layer.bias = nn.Parameter(torch.randn(D_OUT))
    torch.testing.assert_close(layer(x), without + layer.bias)


@pytest.mark.parametrize("kind", [NF4Linear, FP4Linear])
def test_no_unpacked_weight_is_kept(kind: type[QuantizedLinear]) -> None:
    """Guards the memory that QLoRA is for: an unpacked weight for each layer would be that of bfloat16."""
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.nbytes)
        return tensor

    layer = kind.from_float(weight(), torch.bfloat16)
    x = torch.randn(2, D_IN, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer(x)
    context: Any = y.grad_fn
    while context is not None and not hasattr(context, "tensors"):
        context = context.next_functions[0][0]
    kept += [tensor.nbytes for tensor in context.tensors if tensor is not None]
    assert sum(kept) <= D_OUT * D_IN  # a byte for each value would be twice of what is stored


@pytest.mark.parametrize("kind", KINDS)
def test_no_row_depends_on_another(kind: type[QuantizedLinear]) -> None:
    """Guards weights that are quantized in parts, as large ones are."""
    whole = kind.quantize(weight(), torch.float32)
    for name, (shape, dtype) in kind.layout((D_OUT, D_IN), torch.float32).items():
        assert (tuple(whole[name].shape), whole[name].dtype) == (shape, dtype)
        parts = [kind.quantize(part, torch.float32)[name] for part in weight().split(40)]
        assert torch.equal(torch.cat(parts), whole[name])


@pytest.mark.parametrize("kind", KINDS)
def test_factors_keep_their_precision(kind: type[QuantizedLinear]) -> None:
    """Guards directories: a factor that is rounded to the dtype of the inputs moves a whole block by 0.4%."""
    stored = kind.store(weight(), torch.bfloat16)
    assert stored.in_dtype(torch.bfloat16).tensors["absmax"].dtype == torch.float32
    assert torch.equal(stored.in_dtype(torch.bfloat16).dequantized(), stored.dequantized())


def test_what_is_quantized() -> None:
    """Guards the head, and rows that a block would reach beyond."""
    assert NF4().linear_type("attn.q", 128, 96) is NF4Linear and FP4().linear_type("mlp.up", 64, 8) is FP4Linear
    assert NF4().linear_type("attn.q", 96, 128) is None and NF4().linear_type("head", 128, 96) is None
    assert LLMInt8().linear_type("attn.q", 96, 128) is LLMInt8Linear and LLMInt8().linear_type("head", 96, 8) is None
    assert NF4().supports("cuda") == NF4().supports("cpu") == []
    assert NF4().supports("mps") == ["bitsandbytes runs on cpu, cuda, xpu, not on mps"]
