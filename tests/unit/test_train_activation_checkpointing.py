"""Activation checkpointing changes what is kept, and nothing else."""

from __future__ import annotations

from copy import deepcopy
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from tests.tiny_gpt import formula, gradients, instructions, tiny
from zoo.adapters.proof import randomize
from zoo.adapting import adapt
from zoo.errors import InputError
from zoo.train.activation_checkpointing import Mode, set_activation_checkpointing
from zoo.train.compiling import compile_blocks
from zoo.train.loss import supervised_loss

MODES: tuple[Mode, ...] = get_args(Mode)


def kept_bytes(model: nn.Module, batch: Any) -> int:
    """Bytes that the forward pass holds on to, parameters left out."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = model.hidden(batch.tokens_BT)  # type: ignore[operator]
        total = sum(kept.values())
    del hidden
    return total


ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "full": ("full", {}),
    "lora": ("lora", {"targets": ["all-linear"], "dropout": 0.2}),
    "v2": ("llama-adapter-v2", {"layers": 2, "place": "after_projection"}),
}


@pytest.mark.parametrize("spec", ["llama", "gpt2", "parallel"])
@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("mode", MODES)
def test_gradients(mode: Mode, adapter: str, spec: str) -> None:
    """To the bit, with dropout: guards random numbers that differ the second time, adapters and hooks that are lost."""
    model = tiny(spec, resid_dropout=0.1, attn_dropout=0.1)
    name, options = ADAPTERS[adapter]
    randomize(adapt(model, name, **options))
    found = []
    for chosen in ("none", mode):
        set_activation_checkpointing(model, chosen)
        torch.manual_seed(5)
        found.append(gradients(model, supervised_loss(model, instructions())[0]))
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])


def test_memory() -> None:
    """What is kept, as parts of what is kept without; all of it is back when it is switched off."""
    model, batch = tiny("llama", n_layers=6), instructions()
    adapt(model, "lora", targets=["attn.q", "attn.v"])
    plain = kept_bytes(model, batch)
    parts = {}
    for mode in MODES:
        assert set_activation_checkpointing(model, mode) == (0 if mode == "none" else 6)
        parts[mode] = kept_bytes(model, batch) / plain
    assert parts["none"] == 1.0
    assert parts["selective"] < 0.7
    assert parts["block"] < 0.15
    set_activation_checkpointing(model, "none")
    assert kept_bytes(model, batch) == plain


def test_names_stay() -> None:
    """Guards wrappers that change the state dict, and copies that compute with the original's weights."""
    model = tiny("llama")
    names = list(model.state_dict())
    set_activation_checkpointing(model, "block")
    assert list(model.state_dict()) == names
    copied = deepcopy(model)
    with torch.no_grad():
        copied.get_parameter("blocks.0.mlp.up.weight").zero_()
    assert not torch.equal(formula(copied, instructions()), formula(model, instructions()))
    gradients(copied, formula(copied, instructions()))


def test_inference_runs_once() -> None:
    model = tiny("llama").eval()
    set_activation_checkpointing(model, "block")
    calls: list[int] = []
    model.get_submodule("blocks.0.attn.q").register_forward_hook(lambda *args: calls.append(1))
    with torch.no_grad():
        cache = model.new_cache(12)
        model(torch.ones(1, 5, dtype=torch.long), cache=cache)
        model(torch.ones(1, 1, dtype=torch.long), cache=cache)
    assert cache.length == 6 and len(calls) == 2
    formula(model, instructions()).backward()
    assert len(calls) == 4


class OwnBlock(nn.Module):
    """A block of somebody's GPT."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        layer = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8), nn.Dropout(0.1))
        # minGPT's mlp is a dict, which has no forward.
        self.add_module("other" if kind == "other" else "mlp", nn.ModuleDict({"a": layer}) if kind == "dict" else layer)
        self.path = {"mlp": "mlp", "dict": "mlp.a", "other": "other"}[kind]

    def forward(self, x: Tensor) -> Tensor:
        """Adds to the stream."""
        return x + self.get_submodule(self.path)(x)


class Own(nn.Module):
    """Somebody's GPT; its shortest list of modules is not that of its blocks."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(5))
        self.layers = nn.ModuleList(OwnBlock(kind) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        """All blocks, then all norms."""
        for module in (*self.layers, *self.norms):
            x = module(x)
        return x


@pytest.mark.parametrize("mode", ["block", "selective"])
def test_other_modules(mode: Mode) -> None:
    model = Own("mlp")
    x = torch.randn(2, 3, 8, requires_grad=True)
    found = []
    runs: list[tuple[Mode, int]] = [("none", 0), (mode, 3)]
    for chosen, n_again in runs:
        assert set_activation_checkpointing(model, chosen) == n_again
        torch.manual_seed(1)
        found.append(gradients(model, model(x).square().sum()))
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])


@pytest.mark.parametrize("kind", ["dict", "other"])
def test_refused(kind: str) -> None:
    with pytest.raises(InputError, match=r"OwnBlock has no feed-forward layer named mlp, .*checkpointing: block"):
        set_activation_checkpointing(Own(kind), "selective")
    with pytest.raises(InputError, match=r"Linear holds no torch.nn.ModuleList"):
        set_activation_checkpointing(nn.Linear(2, 2), "block")


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo looks at it
@pytest.mark.parametrize("mode", ["none", "block"])
def test_compiled(mode: Mode) -> None:
    """Compiled blocks compute the same, for batches of any length, without compiling anew for each.

    Guards checkpointing that takes the place of compilation, without a word.
    """
    counters = torch._dynamo.utils.counters
    torch._dynamo.reset()
    counters.clear()
    model, twin = tiny("llama", n_layers=2), tiny("llama", n_layers=2)
    for each in (model, twin):
        torch.manual_seed(0)
        randomize(adapt(each, "lora", targets=["attn.q", "attn.v"]))
        set_activation_checkpointing(each, mode)
    names = list(model.state_dict())
    compile_blocks(model, backend="eager")
    assert list(model.state_dict()) == names
    graphs = []
    for n_rows in (2, 3, 6):
        batch = instructions(n_rows)
        found, expected = (gradients(each, supervised_loss(each, batch)[0]) for each in (model, twin))
        assert found.keys() == expected.keys()
        for key, gradient in expected.items():
            assert_close(found[key], gradient, atol=1e-3, rtol=1e-4)
        graphs.append(int(counters["stats"]["unique_graphs"]))
    assert 0 < graphs[-1] == graphs[1]
    if mode == "block":
        kept = kept_bytes(model, instructions())
        set_activation_checkpointing(model, "none")
        assert kept < 0.5 * kept_bytes(model, instructions())
        assert all("forward" in block.__dict__ for block in model.blocks)  # still the compiled one
