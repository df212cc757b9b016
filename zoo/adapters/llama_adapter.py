"""LLaMA-Adapter: v1 (arXiv 2303.16199) and v2 (arXiv 2304.15010).

Shape letters: B batch, T query tokens, N query heads, K kv heads, G = N / K, H head size, P prompt, D model width.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from zoo.adapters.base import Adapter, AttentionPart, AttentionSite, Part
from zoo.adapters.plans import LLaMAAdapterOptions, LLaMAAdapterV2Options
from zoo.adapters.weights import device_of
from zoo.plan.sites import Addition, Place


class LLaMAAdapter(Adapter):
    """Learned prompts that the topmost layers attend to, apart from the tokens, through gates that start at zero."""

    options_type: ClassVar[type] = LLaMAAdapterOptions
    learning_rate: ClassVar[float] = 9e-3
    options: LLaMAAdapterOptions

    @property
    def place(self) -> Place:
        """As its options say."""
        return self.options.place

    def attention_part(self, addition: Addition, site: AttentionSite) -> AttentionPart:
        """Prompts from N(0, 1) as in the released code, gates of zero, in float32."""
        return Prompt(addition, site, bounded=self.options.gate == "tanh")


class Prompt(AttentionPart):
    """The prompt (P, D) of one layer, and its gates: one per head, or one."""

    def __init__(self, addition: Addition, site: AttentionSite, *, bounded: bool) -> None:
        super().__init__()
        self._site = [site]  # in a list: its modules are not this one's
        device = site.device
        self.prompt = nn.Parameter(torch.randn(addition.shapes["prompt"], device=device))
        self.gate = nn.Parameter(torch.zeros(addition.shapes["gate"], device=device))
        self.bounded = bounded

    def forward(self, q_BTNH: Tensor) -> Tensor:
        """Attention to the prompt alone with a softmax of its own, times the gate; scores and softmax in float32."""
        site = self._site[0]
        k_PKH, v_PKH = site.prompt_kv(self.prompt.to(q_BTNH.dtype))
        q_BTKGH = q_BTNH.unflatten(2, (site.n_kv_heads, -1))
        scores_BTKGP = torch.einsum("btkgh,pkh->btkgp", q_BTKGH.float() * site.scale, k_PKH.float())
        y_BTKGH = torch.einsum("btkgp,pkh->btkgh", scores_BTKGP.softmax(-1), v_PKH.float())
        gate_N1 = (self.gate.tanh() if self.bounded else self.gate)[:, None]
        return (y_BTKGH.flatten(2, 3) * gate_N1).to(q_BTNH.dtype)


class LLaMAAdapterV2(LLaMAAdapter):
    """v1, and a scale and a bias on linears, and trained norms."""

    options_type: ClassVar[type] = LLaMAAdapterV2Options
    learning_rate: ClassVar[float] = 4e-3
    options: LLaMAAdapterV2Options

    def part(self, addition: Addition, base: nn.Module) -> Part:
        """Scales of one and biases of zero, float32."""
        return (ScaledOutput if self.options.scale_on == "output" else ScaledInput)(addition, base)


class ScaledOutput(Part):
    """W x becomes s * (W x + b), as in the paper; where there is a bias c, s * (W x + c + b)."""

    def __init__(self, addition: Addition, base: nn.Module) -> None:
        super().__init__()
        self.v2_scale = nn.Parameter(torch.ones(addition.shapes["v2_scale"], device=device_of(base)))
        self.v2_bias = nn.Parameter(torch.zeros(addition.shapes["v2_bias"], device=device_of(base)))

    def after(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        return ((y + self.v2_bias) * self.v2_scale).to(y.dtype)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        both = self.v2_bias if bias is None else bias + self.v2_bias
        return weight * self.v2_scale[:, None], both * self.v2_scale


class ScaledInput(ScaledOutput):
    """W x becomes W (s * x) + b, as in the released code."""

    def before(self, x: Tensor) -> Tensor:
        return (x * self.v2_scale).to(x.dtype)

    def after(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        return (y + self.v2_bias).to(y.dtype)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight * self.v2_scale, self.v2_bias if bias is None else bias + self.v2_bias
