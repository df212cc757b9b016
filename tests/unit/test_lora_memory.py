"""What LoRA keeps for the backward pass: the shared input once, and x A^T for each site."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from zoo.adapting import adapt


class Pair(nn.Module):
    """Two linears of one input, frozen but for their adapters."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.q = nn.Linear(64, 48, dtype=dtype)
        self.v = nn.Linear(64, 32, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """The sum of both results."""
        return self.q(x).sum() + self.v(x).sum()


def saved_bytes(model: nn.Module, x: Tensor) -> int:
    """Bytes of the storages that the graph holds on to, parameters left out."""
    kept: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(x)
        total = sum(kept.values())  # while the graph is alive, so that no address is used twice
    loss.backward()
    return total


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_activations(dtype: torch.dtype) -> None:
    model = Pair(dtype)
    adapt(model, "lora", r=4, targets=["q", "v"])
    x = torch.randn(8, 16, 64, dtype=dtype)
    assert saved_bytes(model, x) <= x.nbytes + 2 * (8 * 16 * 4 * 4)


def test_gradients_of_a_mixed_projection() -> None:
    """Guards the function written by hand for bfloat16 inputs, against autograd in float32."""
    models = [Pair(torch.bfloat16), Pair(torch.float32)]
    models[1].load_state_dict({name: t.float() for name, t in models[0].state_dict().items()})
    handles = [adapt(model, "lora", r=4, targets=["q", "v"]) for model in models]
    with torch.no_grad():
        for parameter in handles[0].trainable().values():
            parameter.normal_()
    handles[1].load_state_dict(handles[0].state_dict())
    x = torch.randn(8, 16, 64).bfloat16()
    inputs = [x.clone().requires_grad_(), x.float().requires_grad_()]
    for model, given in zip(models, inputs, strict=True):
        model(given).backward()
    for (name, ours), exact in zip(handles[0].trainable().items(), handles[1].trainable().values(), strict=True):
        assert ours.grad is not None and exact.grad is not None, name
        assert_close(ours.grad, exact.grad, atol=0.02, rtol=0.02)
    assert inputs[0].grad is not None and inputs[1].grad is not None
    assert_close(inputs[0].grad.float(), inputs[1].grad, atol=0.5, rtol=0.05)
