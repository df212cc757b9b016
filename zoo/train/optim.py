"""AdamW for what is trained, gradient norms, and what to say when a gradient is no number."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from zoo.errors import InputError

_FUSED_ON = ("cpu", "cuda", "mps", "xpu")
_HALF = (torch.bfloat16, torch.float16)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The trainable parameters, each once, in groups for `torch.optim`: decayed and not.

    Matrices decay, embeddings and the A and B of LoRA among them, as in GPT-2, nanoGPT and LitGPT. Vectors and scalars
    do not: biases and the weights of norms, factors and gates of adapters. Decay would pull those that start at one
    towards zero, away from the model as it was.

    Raises:
        InputError: nothing is to be trained.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trainable:
        raise InputError(
            f"{type(model).__name__} has no trainable parameter.", fix="Put an adapter on it, or thaw some of it."
        )
    matrices = [parameter for parameter in trainable if parameter.dim() >= 2]
    rest = [parameter for parameter in trainable if parameter.dim() < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def build_optimizer(
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float = 0.01,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
) -> torch.optim.Optimizer:
    """AdamW (arXiv 1711.05101) for the trainable parameters: `torch.optim.AdamW`, or `MasterAdamW` if some are half.

    Raises:
        InputError: nothing is to be trained.
    """
    groups = parameter_groups(model, weight_decay)
    parameters = [parameter for group in groups for parameter in group["params"]]
    fused = all(parameter.device.type in _FUSED_ON for parameter in parameters)
    kind = MasterAdamW if any(parameter.dtype in _HALF for parameter in parameters) else torch.optim.AdamW
    return kind(groups, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=fused)


class MasterAdamW(torch.optim.Optimizer):
    """AdamW whose whole state is float32, a copy of each half-precision parameter included.

    In bfloat16 a weight of 1 ignores every step smaller than 0.002: at usual rates it would never move. The copy takes
    all steps, and the parameter is the copy, rounded. 12 bytes per parameter, as many as with float32 weights.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        fused: bool,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "fused": fused})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Move each parameter that has a gradient, one by one: their float32 gradients do not exist together."""
        assert closure is None, "gradients are there already"
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, group)

    def _move(self, parameter: Tensor, group: Mapping[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["master"] = parameter.detach().float()  # of a float32 parameter, itself
            state["exp_avg"] = torch.zeros_like(state["master"])
            state["exp_avg_sq"] = torch.zeros_like(state["master"])
        assert parameter.grad is not None
        beta1, beta2 = group["betas"]
        adamw(
            [state["master"]],
            [parameter.grad.float()],
            [state["exp_avg"]],
            [state["exp_avg_sq"]],
            [],
            [state["step"]],
            fused=group["fused"],
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        parameter.copy_(state["master"])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As `torch.optim.Optimizer.load_state_dict`, which casts the state to the parameters' dtype, but without."""
        super().load_state_dict(state_dict)
        loaded = state_dict["state"]
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for number, parameter in zip(numbers, parameters, strict=True):
            for name, value in loaded.get(number, {}).items():
                self.state[parameter][name] = value.detach().to(parameter.device, torch.float32, copy=True)


def clip_gradients(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Scale the gradients so that their global norm is at most ``max_norm``; 0 leaves them as they are.

    Once per optimizer step, when all micro-batches are in. For one process: sharded ones have a part of the norm each,
    and use Fabric's.

    Returns:
        The norm before, float32, computed in float32.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return torch.zeros(())
    norms = [torch.linalg.vector_norm(gradient, dtype=torch.float32) for gradient in gradients]
    total = torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))
    if max_norm > 0:
        factor = (max_norm / (total + 1e-6)).clamp(max=1.0)
        for gradient in gradients:
            gradient.mul_(factor.to(gradient.device))
    return total


def first_not_finite(named_parameters: Iterable[tuple[str, Tensor]]) -> str | None:
    """Of the first gradient that is not finite, a name and how much of it; for when the norm of all is not finite."""
    for name, parameter in named_parameters:
        if parameter.grad is None:
            continue
        n_wrong = int((~torch.isfinite(parameter.grad)).sum())
        if n_wrong:
            return f"{name} ({n_wrong} of {parameter.numel()} values)"
    return None
