"""Quantized linears multiply with the weight that they say they hold, and models made of them stay close."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from tests import reference
from zoo.attention.sdpa import SDPA
from zoo.convert.load import load_model, open_checkpoint
from zoo.convert.load_quantized import load_quantized
from zoo.errors import UnavailableError
from zoo.precision.int4 import GROUP, Int4, Int4Linear
from zoo.precision.int8 import Int8, Int8Linear
from zoo.precision.quantization import QuantizedEmbedding, QuantizedLinear, choose_quantizer
from zoo.registry import Registry

TYPES: list[type[QuantizedLinear]] = [Int8Linear, Int4Linear]
every_type = pytest.mark.parametrize("kind", TYPES)


@every_type
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("n_tokens", [1, 3, 16, 17, 70])
def test_the_product(kind: type[QuantizedLinear], dtype: torch.dtype, n_tokens: int) -> None:
    """Guards both paths, kernel and unpacked, against the product with the dequantized weight in float64."""
    layer = kind.from_float(torch.randn(48, 96), dtype)
    layer.bias = nn.Parameter(torch.randn(48, dtype=dtype))
    x = torch.randn(2, n_tokens, 96).to(dtype)
    with torch.no_grad():
        found = layer(x)
        expected = x.double() @ layer.dequantized().double().t() + layer.bias.double()
    assert found.dtype == dtype
    assert found.shape == (2, n_tokens, 48)
    assert (found.double() - expected).abs().max() <= 4 * torch.finfo(dtype).eps * expected.abs().max()


@every_type
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rounding_error(kind: type[QuantizedLinear], dtype: torch.dtype) -> None:
    """Guards the formula: no weight is off by more than half a step (and the rounding of the scale)."""
    weight = torch.randn(32, 64)
    layer = kind.from_float(weight, dtype)
    if kind is Int8Linear:
        step = weight.abs().amax(1, keepdim=True) / 127
        slack = 0.5 + 127 * torch.finfo(dtype).eps / 2
    else:
        groups = weight.unflatten(1, (-1, GROUP))
        step = ((groups.amax(-1) - groups.amin(-1)) / 15).repeat_interleave(GROUP, 1)
        slack = 0.5 + 40 * torch.finfo(dtype).eps
    assert ((layer.dequantized().float() - weight).abs() <= step * slack * 1.01).all()


def test_rows_of_zeros_and_constants() -> None:
    """Guards against a scale of zero: no NaN."""
    weight = torch.zeros(32, 64)
    weight[1] = 3.0
    for kind in TYPES:
        found = kind.from_float(weight, torch.float32).dequantized()
        assert_close(found, weight, atol=1e-5, rtol=1e-2)


@pytest.mark.parametrize("d_out", [16, 64, 528])
def test_int4_integers_survive_the_kernels_layout(d_out: int) -> None:
    """Guards the packing, which goes block by block: what is read back through the kernel is what went in."""
    nibbles = torch.randint(256, (d_out, 48), dtype=torch.uint8)
    layer = Int4Linear(nibbles, torch.rand(d_out, 3), torch.randn(d_out, 3), torch.bfloat16)
    assert layer.packed is not None and layer.packed.nbytes == nibbles.nbytes
    integers = layer.integers()
    assert torch.equal(integers[:, :16], nibbles[:, :16] & 15) and torch.equal(integers[:, 80:], nibbles[:, 32:] >> 4)
    layer.keep_nibbles()
    assert layer.nibbles is not None and torch.equal(layer.nibbles, nibbles)


@pytest.mark.parametrize("n_tokens", [1, 100])
def test_int4_that_keeps_its_nibbles(n_tokens: int) -> None:
    """Guards the choice of the kernel, and what is unpacked instead of it."""
    layer = Int4Linear.from_float(torch.randn(64, 96), torch.bfloat16)
    x = torch.randn(n_tokens, 96).bfloat16()
    expected = layer(x)
    layer.keep_nibbles()
    assert_close(layer(x), expected, atol=0.15, rtol=0.02)  # roundings of bfloat16


@pytest.mark.parametrize("variant", ["gpt2", "gpt_neox", "llama-gqa", "llama-tied", "llama-biases"])
@pytest.mark.parametrize("quantizer", [Int8(), Int4()], ids=lambda q: q.name)
def test_a_model(variant: str, quantizer: Int8 | Int4, tmp_path: Path, registry: Registry) -> None:
    """Guards the loading: the logits equal those of the float model with the dequantized weights in its place."""
    reference.save_tiny(tmp_path, *reference.VARIANTS[variant])
    checkpoint = open_checkpoint(tmp_path, registry)
    quantized = load_quantized(checkpoint, SDPA(), quantizer, dtype=torch.float32)
    plain = load_model(checkpoint, SDPA(), dtype=torch.float32)
    replaced = {name: module for name, module in quantized.named_modules() if isinstance(module, QuantizedLinear)}
    linears = [name for name, module in plain.named_modules() if isinstance(module, nn.Linear)]
    assert sorted(replaced) == sorted(linears)
    with torch.no_grad():
        for name, module in replaced.items():
            plain.get_parameter(f"{name}.weight").copy_(module.dequantized())
        ids = reference.tokens(2, 20)
        assert_close(quantized(ids), plain(ids), atol=1e-4, rtol=1e-4)


def test_a_tied_model_holds_its_embedding_once(tmp_path: Path, registry: Registry) -> None:
    """Guards memory: head and embedding share their integers."""
    reference.save_tiny(tmp_path, *reference.VARIANTS["llama-tied"])
    model = load_quantized(open_checkpoint(tmp_path, registry), SDPA(), Int8(), dtype=torch.bfloat16)
    assert isinstance(model.embed, QuantizedEmbedding)
    sizes = [t.nbytes for t in (*model.parameters(), *model.buffers())]
    assert sum(sizes) < 1.4 * sum(p.numel() for p in load_model_parameters(tmp_path, registry))


def load_model_parameters(directory: Path, registry: Registry) -> list[torch.Tensor]:
    """The float model's parameters, tied ones once."""
    return list(load_model(open_checkpoint(directory, registry), SDPA(), dtype=torch.bfloat16).parameters())


def test_choices(registry: Registry) -> None:
    """Guards an explicit choice that this device can not serve."""
    assert choose_quantizer("int8", device="cuda", registry=registry).name == "int8"
    with pytest.raises(UnavailableError, match="int4 runs on the cpu, not on cuda"):
        choose_quantizer("int4", device="cuda", registry=registry)
