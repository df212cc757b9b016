"""What every quantizer has to do: weights that are near the ones they stand for, and layers that compute with them.

Shape letters: D_out, D_in of a linear's weight, T tokens.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.plan.parameters import parameter_shapes
from zoo.precision.quantization import QuantizedLinear, Quantizer, quantized_weights
from zoo.testing.contract import Contract, devices, require_gpu
from zoo.testing.models import shrunk

D_OUT, D_IN = 96, 128
DTYPES = (torch.float32, torch.bfloat16)


class QuantizerContract(Contract, standard=True):
    """A quantizer by its name.

    Attributes:
        max_error: of normally distributed weights, root mean square, as a part of the weights' own.
        role: of a linear that it takes.
    """

    kind = "quantizer"
    max_error: ClassVar[float] = 0.15
    role: ClassVar[str] = "attn.q"

    def make_quantizer(self) -> Quantizer:
        """A new quantizer."""
        made: Quantizer = self.load()()
        return made

    def layer_type(self) -> type[QuantizedLinear]:
        """The layer that it makes of a linear."""
        kind = self.make_quantizer().linear_type(self.role, D_IN, D_OUT)
        assert kind is not None, f"it leaves {self.role} alone: set role"
        return kind

    def weight(self, seed: int = 0) -> Tensor:
        """Normally distributed, with an outlier, a row of zeros and a row of tiny values; (D_out, D_in)."""
        weight = torch.randn(D_OUT, D_IN, generator=torch.Generator().manual_seed(seed))
        weight[3, 5], weight[7], weight[9] = 40.0, 0.0, weight[9] * 1e-6
        return weight

    def test_supports_gives_reasons(self) -> None:
        """A list of sentences for each device, and the name that it is registered by."""
        quantizer = self.make_quantizer()
        assert quantizer.name == self.record.name, f"its name is {quantizer.name!r}"
        for device in devices():
            answer = quantizer.supports(device)
            assert isinstance(answer, list) and all(isinstance(r, str) and r for r in answer), repr(answer)

    def test_which_weights_it_takes(self) -> None:
        """Linears alone, whatever the model; never a norm, a bias or a table of positions."""
        for _, entry in list(self.registry().models())[::7]:
            spec = shrunk(entry.spec)
            shapes = parameter_shapes(spec)
            for name, kind in quantized_weights(spec, self.make_quantizer()).items():
                assert issubclass(kind, QuantizedLinear) and len(shapes[name]) == 2, name

    def test_what_is_stored(self) -> None:
        """The tensors are those of the layout, each with a row per output, and smaller than the weight."""
        kind, weight = self.layer_type(), self.weight()
        for dtype in DTYPES:
            layout, stored = kind.layout((D_OUT, D_IN), dtype), kind.store(weight, dtype).tensors
            assert {n: (tuple(t.shape), t.dtype) for n, t in stored.items()} == layout
            assert all(t.shape[0] == D_OUT for t in stored.values()), "a stored tensor has a row for each output"
            n_bytes = sum(t.numel() * t.element_size() for t in stored.values())
            assert n_bytes < 2 * weight.numel(), f"{n_bytes} bytes for {weight.numel()} weights saves nothing"

    def test_the_error(self) -> None:
        """The weights that it multiplies with are near those that it was given, row by row, zeros and all."""
        weight = self.weight()
        for dtype in DTYPES:
            found = self.layer_type().from_float(weight, dtype).dequantized()
            assert found.dtype == dtype and found.isfinite().all()
            error = (found.float() - weight)[[i for i in range(D_OUT) if i != 3]]
            relative = float(error.norm() / weight.norm(dim=1)[[i for i in range(D_OUT) if i != 3]].norm())
            assert relative <= self.max_error, f"the error is {relative:.3f}; {self.max_error} is allowed"
            assert not found[7].any(), "a row of zeros is not zero"
            tiny = float((found[9].float() - weight[9]).norm() / weight[9].norm())
            assert tiny <= 2 * self.max_error, "a row of small values shares its scale with others"
            assert abs(float(found[3, 5]) - 40) <= 40 * self.max_error, "the outlier is cut off"

    def test_rows_do_not_depend_on_each_other(self) -> None:
        """Large weights are quantized in pieces, and key maps move rows."""
        kind, weight = self.layer_type(), self.weight()
        whole = kind.quantize(weight, torch.float32)
        for rows in (slice(0, 40), slice(40, D_OUT)):
            part = kind.quantize(weight[rows], torch.float32)
            assert all(torch.equal(part[name], whole[name][rows]) for name in whole), "a row depends on others"

    def test_products(self) -> None:
        """One token or many, the result is that of the weight it stands for."""
        weight = self.weight()
        for dtype in DTYPES:
            layer = self.layer_type().from_float(weight, dtype)
            most = max(1, min(layer.kernel_tokens, 24))
            for n_tokens in (1, 5, most, most + 40):
                x = torch.randn(2, n_tokens, D_IN, generator=torch.Generator().manual_seed(1)).to(dtype)
                with torch.no_grad():
                    found, exact = layer(x), F.linear(x.double(), layer.dequantized().double())
                assert found.dtype == dtype and found.shape == exact.shape
                allowed = (0.02 if dtype == torch.bfloat16 else 1e-5) * exact.abs().max()
                assert (found.double() - exact).abs().max() <= allowed, f"{n_tokens} tokens, {dtype}"

    def test_the_bias_stays(self) -> None:
        """It is added, and is a parameter still."""
        layer = self.layer_type().from_float(self.weight(), torch.float32)
        x = torch.randn(3, D_IN, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            without = layer(x)
            layer.bias = torch.nn.Parameter(torch.arange(D_OUT, dtype=torch.float32))
            torch.testing.assert_close(layer(x), without + layer.bias)

    def test_rows_are_looked_up(self) -> None:
        """What an embedding that is tied to the head looks up."""
        layer = self.layer_type().from_float(self.weight(), torch.float32)
        tokens = torch.tensor([[0, 7, 95], [3, 3, 1]])
        torch.testing.assert_close(layer.rows(tokens), layer.dequantized()[tokens])

    def test_it_is_stored_and_read(self) -> None:
        """Stored tensors give the same weight, and so does a state dict; in another dtype of inputs too."""
        kind, weight = self.layer_type(), self.weight()
        stored = kind.store(weight, torch.float32)
        layer, again = kind.from_float(weight, torch.float32), kind.from_stored(stored.tensors, torch.float32)
        assert torch.equal(layer.dequantized(), again.dequantized())
        other = kind.from_float(self.weight(seed=1), torch.float32)
        other.load_state_dict(layer.state_dict())
        assert torch.equal(other.dequantized(), layer.dequantized()), "the state dict does not hold all of the layer"
        half = kind.from_stored(stored.tensors, torch.bfloat16)
        assert half.dtype == half.dequantized().dtype == torch.bfloat16

    def test_gradients_pass_through(self) -> None:
        """An adapter below learns through it: the gradient of the input is that of the weight it stands for."""
        layer = self.layer_type().from_float(self.weight(), torch.float32).train()
        for n_tokens in (2, 64):
            x = torch.randn(n_tokens, D_IN, generator=torch.Generator().manual_seed(1)).requires_grad_()
            layer(x).pow(2).sum().backward()
            assert x.grad is not None, "no gradient reaches the input"
            w = layer.dequantized().detach()
            torch.testing.assert_close(x.grad, 2 * F.linear(x.detach(), w) @ w, rtol=1e-3, atol=1e-2)
        assert not [n for n, p in layer.named_parameters() if p.requires_grad and n != "bias"], "its weight is trained"

    def test_on_a_gpu(self) -> None:
        """The same products there."""
        quantizer = self.make_quantizer()
        require_gpu()
        assert not quantizer.supports("cuda"), quantizer.supports("cuda")
        layer = self.layer_type().from_float(self.weight().cuda(), torch.bfloat16)
        x = torch.randn(4, D_IN, device="cuda", dtype=torch.bfloat16)
        exact = F.linear(x.double(), layer.dequantized().double())
        assert (layer(x).double() - exact).abs().max() <= 0.02 * exact.abs().max()
