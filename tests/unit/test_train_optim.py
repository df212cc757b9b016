"""The optimizer: what decays, what a half-precision model gets, and gradient norms."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from tests.tiny_gpt import formula, instructions, tiny
from zoo.adapting import adapt
from zoo.errors import InputError
from zoo.train.optim import MasterAdamW, build_optimizer, clip_gradients, first_not_finite, parameter_groups


def names_of(model: nn.Module, parameters: list[Tensor]) -> set[str]:
    wanted = {id(parameter) for parameter in parameters}
    return {name for name, parameter in model.named_parameters() if id(parameter) in wanted}


def test_decay_groups() -> None:
    """Guards decay of biases and norms, of frozen weights, and a tied weight that is stepped twice."""
    model = tiny("gpt2")
    decayed, rest = parameter_groups(model, 0.1)
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
    found = names_of(model, decayed["params"])
    assert {"embed.weight", "positions.weight", "blocks.0.attn.q.weight", "blocks.1.mlp.down.weight"} <= found
    assert not [name for name in found if name.endswith("bias") or "norm" in name]
    assert len(decayed["params"]) + len(rest["params"]) == len(list(model.parameters()))
    assert model.head.weight is model.embed.weight


@pytest.mark.parametrize(
    ("adapter", "decayed"),
    [("lora", {"lora_A", "lora_B"}), ("ia3", set()), ("bitfit", set()), ("llama-adapter", {"prompt"})],
)
def test_decay_of_adapters(adapter: str, decayed: set[str]) -> None:
    """Guards decay that pulls factors and gates towards zero."""
    model = tiny("gpt2")
    options: dict[str, Any] = {"layers": 1} if adapter == "llama-adapter" else {}
    adapt(model, adapter, **options)
    groups = parameter_groups(model, 0.1)
    with_decay = [group["params"] for group in groups if group["weight_decay"]]
    found = {name.rpartition(".")[2] for params in with_decay for name in names_of(model, params)}
    assert found == decayed
    assert all(parameter.requires_grad for group in groups for parameter in group["params"])


def test_nothing_to_train() -> None:
    with pytest.raises(InputError, match="GPT has no trainable parameter"):
        build_optimizer(tiny("llama").requires_grad_(False), lr=1.0)


def test_adapters_train_in_float32_on_a_half_precision_model() -> None:
    model = tiny("llama", dtype=torch.bfloat16)
    adapt(model, "lora", targets=["attn.q"])
    optimizer = build_optimizer(model, lr=1e-3)
    assert type(optimizer) is torch.optim.AdamW and optimizer.defaults["fused"]
    assert {p.dtype for group in optimizer.param_groups for p in group["params"]} == {torch.float32}


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, gradients: list[float]) -> None:
    for value in gradients:
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, value) + torch.arange(parameter.numel()).view_as(parameter)
        optimizer.step()


GRADIENTS = [1.0, -2.0, 0.5, 3.0, -0.25, 1.5] * 5


def test_half_precision_weights_move() -> None:
    """Guards steps that vanish in bfloat16: the weights are those of float32 training, rounded."""
    models = [nn.Linear(5, 4, dtype=torch.bfloat16)]
    nn.init.ones_(models[0].weight)
    models.append(deepcopy(models[0]).float())
    for model in models:
        optimizer = build_optimizer(model, lr=1e-4, weight_decay=0.1)
        steps(model, optimizer, GRADIENTS)
    assert type(optimizer) is torch.optim.AdamW
    assert not torch.equal(models[0].weight, torch.ones_like(models[0].weight))
    for half, full in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(half, full.bfloat16())
    vanished = deepcopy(models[0])
    nn.init.ones_(vanished.weight)
    steps(vanished, torch.optim.AdamW(vanished.parameters(), lr=1e-4), GRADIENTS)
    assert torch.equal(vanished.weight, torch.ones_like(vanished.weight))  # what this is for


def test_half_precision_resumes_to_the_bit() -> None:
    """Guards the state against the cast to the parameters' dtype that loading a state makes otherwise."""
    whole = nn.Linear(5, 4, dtype=torch.bfloat16)
    halves = deepcopy(whole)
    optimizer = build_optimizer(whole, lr=1e-3)
    steps(whole, optimizer, GRADIENTS)
    first = build_optimizer(halves, lr=1e-3)
    steps(halves, first, GRADIENTS[:10])
    resumed = deepcopy(halves)
    second = build_optimizer(resumed, lr=1e-3)
    second.load_state_dict(deepcopy(first.state_dict()))
    steps(resumed, second, GRADIENTS[10:])
    for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)
        states = optimizer.state[one], second.state[other]
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
        assert {key: value.dtype for key, value in states[1].items()} == dict.fromkeys(states[0], torch.float32)


def test_float32_parameters_beside_half_ones() -> None:
    """Guards a float32 parameter that is not its own master, such as an adapter's beside thawed norms."""
    model = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2, dtype=torch.bfloat16)])
    alone = deepcopy(model[0])
    optimizer = build_optimizer(model, lr=1e-3)
    assert isinstance(optimizer, MasterAdamW)
    steps(model, optimizer, GRADIENTS)
    steps(alone, build_optimizer(alone, lr=1e-3), GRADIENTS)
    for found, expected in zip(model[0].parameters(), alone.parameters(), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("max_norm", [0.5, 1e6, 0.0])
def test_clipping(max_norm: float) -> None:
    """As torch's, in float32; 0 is off. Over all micro-batches of a step: gradients are clipped when all are in."""
    models = [tiny("llama"), tiny("llama")]
    for model in models:
        for _ in range(2):
            formula(model, instructions()).backward()
    theirs = torch.nn.utils.clip_grad_norm_(models[0].parameters(), max_norm or float("inf"))
    ours = clip_gradients(models[1].parameters(), max_norm)
    assert_close(ours, theirs)
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert_close(one.grad, other.grad)


def test_clipping_of_half_precision() -> None:
    """Guards norms that are rounded to bfloat16 on the way: of 4,097 ones it is 64.0078, not 64."""
    parameter = nn.Parameter(torch.zeros(4097, dtype=torch.bfloat16))
    parameter.grad = torch.ones_like(parameter)
    assert clip_gradients([parameter], 0).item() == pytest.approx(4097**0.5, rel=1e-6)
    assert clip_gradients([], 1.0).item() == 0.0


def test_first_not_finite() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    assert first_not_finite(model.named_parameters()) is None
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    assert first_not_finite(model.named_parameters()) is None
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    gradients["0.bias"][1] = float("inf")
    gradients["1.bias"][:] = float("nan")
    assert first_not_finite(model.named_parameters()) == "0.bias (1 of 3 values)"
