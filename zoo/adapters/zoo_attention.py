"""How prompts enter the attention of a zoo decoder.

Shape letters: B batch, T query tokens, N query heads, K kv heads, H head size, P prompt, D model width.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from zoo.adapters.weights import device_of
from zoo.models.attention import Attend, Attention
from zoo.plan.sites import Place

_AFTER = "prompts_after"


class ZooAttentionSite:
    """An `zoo.adapters.base.AttentionSite` of one layer."""

    def __init__(self, attention: Attention) -> None:
        self._attention = attention
        self.n_heads = attention.q.out_features // attention.d_head
        self.n_kv_heads = attention.k.out_features // attention.d_head
        self.width = attention.q.in_features
        self.scale = attention.scale
        self.device = device_of(attention.k)
        heads_fill_width = attention.q.out_features == self.width
        self.places: tuple[Place, ...] = ("before_projection", *(("after_projection",) if heads_fill_width else ()))

    def prompt_kv(self, prompt_PD: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (P, K, H): as of the hidden states of tokens, but not rotated."""
        return self._attention.keys_values(prompt_PD)

    def install(self, prompts: nn.Module, place: Place = "before_projection") -> None:
        """Puts the prompts around the attention backend of this layer, or behind the layer."""
        if place == "before_projection":
            self._attention.attend = _Prompted(self._attention.attend, prompts)
        else:
            self._attention.add_module(_AFTER, prompts)
            self._attention.register_forward_hook(_add_after)


class _Prompted(nn.Module):
    def __init__(self, attend: Attend, prompts: nn.Module) -> None:
        super().__init__()
        self.attend, self.prompts = attend, prompts

    def forward(self, q_BTNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, **options: Any) -> Tensor:
        y_BTNH: Tensor = self.prompts(q_BTNH, self.attend(q_BTNH, k_BSKH, v_BSKH, **options))
        return y_BTNH


def _add_after(attention: Attention, args: tuple[Any, ...], y_BTD: Tensor) -> Tensor:
    """A forward hook. The layer keeps its queries to itself, so they are computed again, and nothing is left behind."""
    prompts: Any = attention.get_submodule(_AFTER)
    if not prompts.active:
        return y_BTD
    x_BTD, rotation, *_ = args
    q_BTNH = attention.queries(x_BTD, rotation)
    z_BTNH: Tensor = prompts(q_BTNH, y_BTD.unflatten(-1, q_BTNH.shape[2:]))
    return z_BTNH.flatten(2)
