"""A model for one token at a time on a CPU, of the same weights: what inductor compiles to loops at memory speed.

A product with one row is a sum, which inductor vectorizes and fuses with what is around it; torch's matrix kernels,
made for many rows, read the weights at half the rate. Activations are float32, so that a weight is the only thing that
has to be converted in the inner loop; they are more exact than those of the model itself.

Shape letters: B batch, T tokens (1), S key/value tokens, N query heads, K kv heads, G = N / K, H head size.
"""

from __future__ import annotations

from copy import deepcopy
from itertools import chain

import torch
from torch import Tensor, nn

from zoo.models.attention import Attention
from zoo.models.gpt import GPT
from zoo.models.masks import Mask
from zoo.precision.int4 import GROUP, Int4Linear
from zoo.precision.int8 import Int8Linear
from zoo.precision.quantization import QuantizedLinear


def one_token_model(model: GPT) -> GPT:
    """A copy of ``model`` that shares its large weights; norms and biases are copied to float32."""
    for module in model.modules():
        if isinstance(module, Int4Linear):
            module.keep_nibbles()
    shared = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    twin = deepcopy(model, shared)
    for name, module in list(twin.named_modules()):
        if isinstance(module, nn.Linear | QuantizedLinear):
            twin.set_submodule(name, _one_row(module))
        elif isinstance(module, Attention):
            module.attend = OneQuery()
    twin.set_submodule("embed", InFloat32(twin.embed))
    for parent in twin.modules():
        if not isinstance(parent, OneRowLinear | nn.Embedding | QuantizedLinear):
            for name, parameter in parent.named_parameters(recurse=False):
                setattr(parent, name, nn.Parameter(parameter.float(), requires_grad=False))
    return twin


class OneRowLinear(nn.Module):
    """weight (D_out, D_in) times each row of x, as sums; one scale per output, if any."""

    weight: Tensor
    scale: Tensor | None

    def __init__(self, weight: Tensor, scale: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (..., D_in) to (..., D_out), float32."""
        sums = (_stored(x).unsqueeze(-2) * self.weight.float()).sum(-1)
        return sums if self.scale is None else sums * self.scale.float()


class OneRowInt4Linear(nn.Module):
    """As `OneRowLinear`, from the nibbles of a layer that keeps them; scale and offset (D_out, G) in float32."""

    nibbles: Tensor
    scale: Tensor
    offset: Tensor
    halves: Tensor

    def __init__(self, linear: Int4Linear) -> None:
        super().__init__()
        assert linear.nibbles is not None
        scale, zero = linear.scale_and_zero.float().permute(2, 1, 0).contiguous()
        self.register_buffer("nibbles", linear.nibbles.unflatten(1, (-1, GROUP // 2)))
        self.register_buffer("scale", scale)
        self.register_buffer("offset", zero - 8 * scale)
        # The high nibbles stay in place, sixteen times too large: bytes have no vectorized shift.
        self.register_buffer("halves", torch.tensor([[1.0], [1 / 16]]))

    def forward(self, x: Tensor) -> Tensor:
        """Maps (..., D_in) to (..., D_out), float32."""
        x_G2 = x.unflatten(-1, (-1, 2, GROUP // 2))
        x_low, x_high = _stored(x_G2 * self.halves).unsqueeze(-4).unbind(-2)
        low, high = (self.nibbles & 0x0F).float(), (self.nibbles & 0xF0).float()
        products = ((low * x_low + high * x_high) * self.scale[..., None]).sum((-2, -1))
        offsets = (self.offset * x_G2.sum((-2, -1)).unsqueeze(-2)).sum(-1)
        return products + offsets


class Biased(nn.Module):
    """A linear and its bias."""

    bias: Tensor

    def __init__(self, linear: nn.Module, bias: Tensor) -> None:
        super().__init__()
        self.linear = linear
        self.register_buffer("bias", bias.float())

    def forward(self, x: Tensor) -> Tensor:
        """Maps (..., D_in) to (..., D_out), float32."""
        product: Tensor = self.linear(x)
        return product + self.bias


class InFloat32(nn.Module):
    """A module with its result in float32."""

    def __init__(self, module: nn.Module, takes: torch.dtype | None = None) -> None:
        super().__init__()
        self.module, self.takes = module, takes

    def forward(self, x: Tensor) -> Tensor:
        """The input in ``takes``, if given."""
        result: Tensor = self.module(x if self.takes is None else x.to(self.takes))
        return result.float()


class OneQuery:
    """Attention of one query per row, as sums: torch's CPU kernel packs the keys for a matrix product."""

    def __call__(
        self,
        q_BTNH: Tensor,
        k_BSKH: Tensor,
        v_BSKH: Tensor,
        *,
        mask: Mask,
        scale: float,
        softcap: float | None = None,
        dropout_p: float = 0.0,
    ) -> Tensor:
        """See `zoo.models.attention.Attend`; float32."""
        n_keys, n_kv_heads = k_BSKH.shape[1:3]
        q_BKGH = (q_BTNH * scale).squeeze(1).unflatten(1, (n_kv_heads, -1))
        scores_BSKG = (q_BKGH[:, None] * k_BSKH[:, :, :, None].float()).sum(-1)
        if softcap is not None:
            scores_BSKG = softcap * torch.tanh(scores_BSKG / softcap)
        hidden_S11 = ~mask.dense(1, n_keys, q_BTNH.device).view(-1, n_keys, 1, 1)
        scores_BSKG = scores_BSKG.masked_fill(hidden_S11, float("-inf"))
        weights_BSKG = (scores_BSKG - scores_BSKG.amax(1, keepdim=True)).exp()
        sums_BKGH = (weights_BSKG[..., None] * v_BSKH[:, :, :, None].float()).sum(1)
        y_BKGH = sums_BKGH / weights_BSKG.sum(1)[..., None]  # last: one pass over the scores less
        return y_BKGH.flatten(1, 2)[:, None]


def _stored(x: Tensor) -> Tensor:
    """The same, computed once: inductor would repeat what leads to it (the norm) for every row of a weight."""
    return x.as_strided(x.shape, x.stride())


def _one_row(linear: nn.Linear | QuantizedLinear) -> nn.Module:
    """What replaces a linear: layers with a kernel of their own for few rows keep it."""
    row: nn.Module
    if isinstance(linear, Int4Linear):
        row = OneRowInt4Linear(linear)
    elif isinstance(linear, Int8Linear):
        row = OneRowLinear(linear.weight, linear.scale)
    elif isinstance(linear, QuantizedLinear):
        return InFloat32(linear, linear.dtype)
    else:
        row = OneRowLinear(linear.weight.detach(), None)
    return row if linear.bias is None else Biased(row, linear.bias.detach())
