"""LLaMA-Adapter v1 (arXiv 2303.16199, section 3, and its code) and v2 (arXiv 2304.15010), written out in float64.

The base is transformers' model, whose attention and linears are replaced by the formulas; nothing of zoo takes part.

Shape letters: B batch, T tokens, N query heads, K kv heads, H head size, P prompt, D model width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from tests import reference
from zoo.adapters.attach import AttachedAdapter
from zoo.api import load
from zoo.registry import Registry

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "v1": ("llama-adapter", {"prompt_length": 5, "layers": 2}),
    "v1-one-linear-gate": ("llama-adapter", {"prompt_length": 4, "layers": 3, "gate": "linear", "gate_per": "layer"}),
    "v2": ("llama-adapter-v2", {"prompt_length": 5, "layers": 2}),
    "v2-on-inputs": ("llama-adapter-v2", {"prompt_length": 5, "layers": 2, "scale_on": "input"}),
}
LLAMA_LINEARS = {
    **{f"self_attn.{letter}_proj": [f"attn.{letter}"] for letter in "qkv"},
    **{"self_attn.o_proj": ["attn.out"]},
    **{f"mlp.{name}_proj": [f"mlp.{name}"] for name in ("gate", "up", "down")},
}
LLAMA_NORMS = {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}


@dataclass(frozen=True)
class Layout:
    """Where transformers has what: the layers, the linears with the parts that a fused one has here, the norms."""

    layers: str
    linears: dict[str, list[str]]
    norms: dict[str, str]
    last_norm: str


LAYOUTS = {
    "llama": Layout("model.layers", LLAMA_LINEARS, LLAMA_NORMS, "model.norm"),
    "gpt2": Layout(
        "transformer.h",
        {
            "attn.c_attn": ["attn.q", "attn.k", "attn.v"],
            "attn.c_proj": ["attn.out"],
            "mlp.c_fc": ["mlp.up"],
            "mlp.c_proj": ["mlp.down"],
        },
        {"attn_norm": "ln_1", "mlp_norm": "ln_2"},
        "transformer.ln_f",
    ),
}


def attention(q_BNTH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor, *, causal: bool) -> Tensor:
    """softmax(q k^T / sqrt(H)) v; each key and value serves N / K heads that follow each other."""
    group = q_BNTH.shape[1] // k_BKSH.shape[1]
    k_BNSH, v_BNSH = k_BKSH.repeat_interleave(group, dim=1), v_BKSH.repeat_interleave(group, dim=1)
    scores_BNTS = q_BNTH @ k_BNSH.mT / q_BNTH.shape[-1] ** 0.5
    if causal:
        n_tokens = q_BNTH.shape[2]
        scores_BNTS = scores_BNTS.masked_fill(torch.ones(n_tokens, n_tokens).triu(1).bool(), float("-inf"))
    return scores_BNTS.softmax(-1) @ v_BNSH


def own_keys_values(module: Any, prompt_PD: Tensor) -> list[Tensor]:
    """The prompt's, (1, K, P, H), by the projections of the layer, as they are by then, and without rotation."""
    if hasattr(module, "c_attn"):
        projected = list(module.c_attn(prompt_PD).split(prompt_PD.shape[1], dim=-1)[1:])
    else:
        projected = [module.k_proj(prompt_PD), module.v_proj(prompt_PD)]
    return [x.unflatten(-1, (-1, module.head_dim)).transpose(0, 1)[None] for x in projected]


class Formulas:
    """A reference model that is adapted by the tensors of a state dict, all of which take gradients."""

    def __init__(self, model_type: str, model: nn.Module, handle: AttachedAdapter) -> None:
        self.model, self.layout = model.double(), LAYOUTS[model_type]
        self.options = handle.adapter.options
        self.tensors = {name: t.double().clone().requires_grad_() for name, t in handle.state_dict().items()}
        self.norms = {name: p for name, p in self._norms().items() if name in self.tensors}
        for name, parameter in self.norms.items():
            parameter.data = self.tensors[name].data
        self.n_layers = len(list(model.get_submodule(self.layout.layers).children()))
        self.is_v2 = handle.adapter.name.endswith("v2")
        for i in range(self.n_layers if self.is_v2 else 0):
            for theirs, parts in self.layout.linears.items():
                linear = model.get_submodule(f"{self.layout.layers}.{i}.{theirs}")
                linear.register_forward_hook(self._linear([f"blocks.{i}.{part}" for part in parts]))

    def names(self) -> set[str]:
        """Prompts and gates in the topmost layers; of v2 all norms, a scale and a bias on each linear of a layer."""
        with_prompts = range(self.n_layers - self.options.layers, self.n_layers)
        names = {f"blocks.{i}.attn.{kind}" for i in with_prompts for kind in ("prompt", "gate")}
        if not self.is_v2:
            return names
        linears = [part for parts in self.layout.linears.values() for part in parts]
        sites = [f"blocks.{i}.{part}" for i in range(self.n_layers) for part in linears]
        return names | {f"{site}.v2_{kind}" for site in sites for kind in ("scale", "bias")} | self._norms().keys()

    def attend(self, module: Any, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        """To the tokens, and to the prompt of the layer with a softmax of its own, times the gate."""
        y_BNTH = attention(q, k, v, causal=True)
        site = f"blocks.{module.layer_idx}.attn"
        if f"{site}.prompt" in self.tensors:
            gate = self.tensors[f"{site}.gate"]
            gate_N11 = (gate.tanh() if self.options.gate == "tanh" else gate)[:, None, None]
            keys, values = own_keys_values(module, self.tensors[f"{site}.prompt"])
            y_BNTH = y_BNTH + gate_N11 * attention(q, keys, values, causal=False)
        return y_BNTH.transpose(1, 2), None

    def _linear(self, sites: list[str]) -> Callable[[nn.Module, tuple[Tensor], Tensor], Tensor]:
        def forward(module: nn.Module, args: tuple[Tensor], _: Tensor) -> Tensor:
            holder: Any = module
            weights = (holder.weight.T if hasattr(holder, "nf") else holder.weight).chunk(len(sites))
            biases = [0.0] * len(sites) if holder.bias is None else holder.bias.chunk(len(sites))
            return torch.cat([self._affine(*parts, args[0]) for parts in zip(sites, weights, biases, strict=True)], -1)

        return forward

    def _affine(self, site: str, weight: Tensor, bias: Tensor | float, x: Tensor) -> Tensor:
        """s (W x + b), the paper's; or W (s x) + b, its code's."""
        s, b = self.tensors[f"{site}.v2_scale"], self.tensors[f"{site}.v2_bias"]
        if self.options.scale_on == "output":
            return s * (x @ weight.T + bias + b)
        return (s * x) @ weight.T + bias + b

    def _norms(self) -> dict[str, nn.Parameter]:
        found = {f"norm.{leaf}": p for leaf, p in self.model.get_submodule(self.layout.last_norm).named_parameters()}
        for i, layer in self.model.get_submodule(self.layout.layers).named_children():
            for ours, theirs in self.layout.norms.items():
                norm = layer.get_submodule(theirs)
                found |= {f"blocks.{i}.{ours}.{leaf}": p for leaf, p in norm.named_parameters()}
        return found

    def gradient(self, name: str) -> Tensor:
        """That of a tensor of the state dict."""
        gradient = self.norms.get(name, self.tensors[name]).grad
        assert gradient is not None, name
        return gradient


def randomise(handle: AttachedAdapter) -> None:
    """Enough for a gate to be far from its tanh; zero gates, unit scales and zero biases would hide mistakes."""
    with torch.no_grad():
        for parameter in handle.trainable().values():
            parameter.add_(0.5 * torch.randn_like(parameter))


@pytest.mark.parametrize("variant", ["llama-gqa", "llama", "gpt2"])
@pytest.mark.parametrize("case", CASES)
def test_formulas(case: str, variant: str, tmp_path: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the softmax apart, the gates, the scale, unrotated prompt keys, groups of heads; where s and b apply."""
    model_type, config = reference.VARIANTS[variant]
    theirs = reference.save_tiny(tmp_path, model_type, config)
    lm = load(tmp_path, precision="32-true", device="cpu", registry=registry)
    ids = reference.tokens(2, 12)
    base = lm.model(ids)
    adapter, options = CASES[case]
    handle = lm.adapt(adapter, **options)
    randomise(handle)
    formulas = Formulas(model_type, theirs, handle)
    modeling = import_module(f"transformers.models.{model_type}.modeling_{model_type}")
    monkeypatch.setattr(modeling, "eager_attention_forward", formulas.attend)

    found, expected = lm.model(ids), formulas.model(ids).logits
    assert (found - base).abs().max() > 0.1, "it matters"
    assert_close(found.double(), expected, atol=1e-4, rtol=1e-4)

    weights = torch.randn(expected.shape)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    assert handle.trainable().keys() == formulas.names()
    for name, parameter in handle.trainable().items():
        assert parameter.grad is not None, name
        gradient = formulas.gradient(name)
        size = gradient.abs().max().clamp(min=1)  # a key's bias has no gradient where nothing is rotated
        assert_close(parameter.grad / size, gradient / size, atol=1e-4, rtol=1e-4, check_dtype=False, msg=name)


@pytest.mark.parametrize("variant", ["llama-gqa", "gpt2"])
def test_the_reference_is_the_model_without_an_adapter(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the comparison itself: without prompts, the attention written here is that of transformers."""
    model_type, config = reference.VARIANTS[variant]
    theirs, ids = reference.tiny_model(model_type, config).double(), reference.tokens(2, 12)
    expected = theirs(ids).logits
    modeling = import_module(f"transformers.models.{model_type}.modeling_{model_type}")

    def attend(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        return attention(q, k, v, causal=True).transpose(1, 2), None

    monkeypatch.setattr(modeling, "eager_attention_forward", attend)
    assert_close(theirs(ids).logits, expected, atol=1e-6, rtol=1e-6)
