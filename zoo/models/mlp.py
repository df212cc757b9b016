"""Feed-forward layers. Shape letters: B batch, T tokens, D model width, F ffn width."""

from __future__ import annotations

from torch import Tensor, nn

from zoo.models.joint import apply_linears, join
from zoo.spec import Activation, ModelSpec


def build_activation(name: Activation) -> nn.Module:
    """The activation function of a spec."""
    return {
        "gelu": nn.GELU(),
        "gelu_tanh": nn.GELU(approximate="tanh"),
        "silu": nn.SiLU(),
        "relu": nn.ReLU(),
    }[name]


class PlainMLP(nn.Module):
    """down(activation(up(x)))."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.up = nn.Linear(spec.d_model, spec.d_ffn, bias=spec.mlp_bias)
        self.down = nn.Linear(spec.d_ffn, spec.d_model, bias=spec.mlp_bias)
        self.activation = build_activation(spec.activation)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Returns (B, T, D)."""
        return self.down(self.activation(self.up(x_BTD)))


class GatedMLP(nn.Module):
    """down(activation(gate(x)) * up(x)) (GLU variants, arXiv 2002.05202)."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.gate = nn.Linear(spec.d_model, spec.d_ffn, bias=spec.mlp_bias)
        self.up = nn.Linear(spec.d_model, spec.d_ffn, bias=spec.mlp_bias)
        self.down = nn.Linear(spec.d_ffn, spec.d_model, bias=spec.mlp_bias)
        self.activation = build_activation(spec.activation)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Returns (B, T, D)."""
        gate_BTF, up_BTF = apply_linears(x_BTD, self.gate, self.up)
        return self.down(self.activation(gate_BTF) * up_BTF)

    def join(self) -> None:
        """Lay the weights of gate and up side by side: see `zoo.models.joint`."""
        join(self.gate, self.up)


def build_mlp(spec: ModelSpec) -> PlainMLP | GatedMLP:
    """The feed-forward layer of a spec."""
    return GatedMLP(spec) if spec.mlp == "gated" else PlainMLP(spec)
