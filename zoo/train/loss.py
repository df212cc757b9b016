"""The loss: cross-entropy summed over supervised tokens, without ever holding the logits of a batch.

Shape letters: B batch, T positions, S tokens that are computed, M supervised targets, C of them at a time, D width,
V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from zoo.adapters.weights import is_quantized
from zoo.data.batches import IGNORED, Batch
from zoo.errors import InputError, ZooError
from zoo.models.ends import SoftCap
from zoo.models.gpt import GPT
from zoo.models.masks import Mask
from zoo.train.condense import Condensed, condense

_LOGITS_AT_ONCE = {"cpu": 1 << 23, "other": 1 << 26}
"""By device type: enough for a product at full speed, and little beside what the layers keep."""
_WORTH_CONDENSING = 0.9
"""Part of a batch's positions up to which computing only what is needed pays for sorting it out."""


class SupervisedLoss(nn.Module):
    """A model and its loss as one module, for wrappers that only see what happens in ``forward`` (DDP, FSDP)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch | Condensed) -> Tensor:
        """The sum of `supervised_loss`."""
        return supervised_loss(self.model, batch)[0]


def supervised_loss(model: nn.Module, batch: Batch | Condensed, *, chunk_size: int | None = None) -> tuple[Tensor, int]:
    """Cross-entropy of the targets of a batch.

    Divide by the number of targets in the whole optimizer step, over all micro-batches and ranks: then neither
    accumulation nor ranks change what is learnt.

    Args:
        model: a `GPT`, or any module that maps tokens (B, T) to logits (B, T, V).
        batch: on the model's device. On a CPU, a `GPT` computes what `condense` leaves of it.
        chunk_size: targets whose logits exist at a time; by default as many as suit the device.

    Returns:
        The sum, a float32 scalar, and how many targets it is of.

    Raises:
        InputError: the rows hold several documents, and the model knows no mask that keeps them apart.
        ZooError: its logits have another shape.
    """
    if not isinstance(model, GPT):
        assert isinstance(batch, Batch), "a module with a forward of its own takes whole batches"
        return _loss_of_logits(model, batch)
    hidden_MD, targets_M = _supervised(model, batch)
    return head_loss(model, hidden_MD, targets_M, chunk_size), batch.n_supervised


def _loss_of_logits(model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
    name = type(model).__name__
    if batch.documents_BT is not None:
        raise InputError(
            f"{name} has an attention of its own, which would see through the borders of packed documents.",
            fix="Train it without packing.",
        )
    result = model(batch.tokens_BT)
    logits: Any = result[0] if isinstance(result, tuple) else getattr(result, "logits", result)
    expected = tuple(batch.tokens_BT.shape)
    found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    if not isinstance(logits, Tensor) or logits.dim() != 3 or logits.shape[:2] != expected:
        raise ZooError(
            f"{name} returns {found} for tokens of {expected}, and logits of every position are needed.",
            fix=f"Let its forward return logits {(*expected, 'V')}, alone, first of a tuple, or as .logits.",
        )
    supervised_BT = batch.targets_BT != IGNORED
    targets_M = batch.targets_BT[supervised_BT]
    return F.cross_entropy(logits[supervised_BT].float(), targets_M, reduction="sum"), batch.n_supervised


def _supervised(model: GPT, batch: Batch | Condensed) -> tuple[Tensor, Tensor]:
    """What the head gets (M, D) where there is a target, and the targets (M), some of them `IGNORED`."""
    if isinstance(batch, Batch):
        condensed = _condensed(model, batch)
        if condensed is None:
            hidden_BTD = model.hidden(batch.tokens_BT, positions_BT=batch.positions_BT, mask=batch.mask)
            supervised_BT = batch.targets_BT != IGNORED
            return hidden_BTD[supervised_BT], batch.targets_BT[supervised_BT]
        batch = condensed
    mask = Mask(rows=batch.rows)
    hidden_1SD = model.hidden(batch.tokens_1S, positions_BT=batch.positions_1S, mask=mask)
    return hidden_1SD[0].index_select(0, batch.supervised_M), batch.targets_M


def _condensed(model: GPT, batch: Batch) -> Condensed | None:
    """On a CPU, where its gain is known, if it is worth it; documents as rows spare it a dense mask in any case."""
    if batch.tokens_BT.device.type != "cpu":
        return None
    condensed = condense(batch, share=not _has_dropout(model))
    is_smaller = condensed.tokens_1S.numel() <= _WORTH_CONDENSING * batch.tokens_BT.numel()
    return condensed if is_smaller or batch.documents_BT is not None else None


def _has_dropout(model: nn.Module) -> bool:
    def active(module: nn.Module) -> bool:
        p = module.p if isinstance(module, nn.Dropout) else getattr(module, "dropout_p", 0.0)
        return module.training and p > 0

    return any(map(active, model.modules()))


def head_loss(model: GPT, hidden_MD: Tensor, targets_M: Tensor, chunk_size: int | None = None) -> Tensor:
    """The summed loss of what the head gets (M, D); see `supervised_loss`."""
    head = model.head
    if chunk_size is None:
        chunk_size = _even_chunks(hidden_MD, model.spec.vocab_size)
    weight_VD = _weight_alone(head)
    if weight_VD is None or not isinstance(model.cap, nn.Identity | SoftCap):
        return _checkpointed_loss(model, hidden_MD, targets_M, chunk_size)
    cap = model.cap.cap if isinstance(model.cap, SoftCap) else None
    bias_V: Any = head.bias
    loss: Tensor = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden_MD, weight_VD, bias_V, targets_M, cap, chunk_size, torch.is_grad_enabled()
    )
    return loss


def _even_chunks(hidden_MD: Tensor, vocab_size: int) -> int:
    """Targets of a chunk: a multiple of 16, all chunks of about the same size."""
    n_targets = max(1, hidden_MD.shape[0])
    at_once = _LOGITS_AT_ONCE.get(hidden_MD.device.type, _LOGITS_AT_ONCE["other"])
    n_chunks = -(-n_targets * vocab_size // at_once)
    return 16 * -(-n_targets // (16 * n_chunks))


def _weight_alone(head: nn.Module) -> Tensor | None:
    """The weight (V, D) of a head that multiplies with it and does nothing else."""
    hooks = (head._forward_hooks, head._forward_pre_hooks, head._backward_hooks, head._backward_pre_hooks)
    if any(hooks):
        return None
    if is_quantized(head):
        quantized: Any = head
        weight: Tensor = quantized.dequantized()
        return weight
    return head.get_parameter("weight") if type(head) is nn.Linear else None


def _checkpointed_loss(model: GPT, hidden_MD: Tensor, targets_M: Tensor, chunk_size: int) -> Tensor:
    """Through the modules, computed twice: adapters and hooks of the head see what they always see."""

    def chunk_loss(hidden_CD: Tensor, targets_C: Tensor) -> Tensor:
        return F.cross_entropy(model.logits(hidden_CD).float(), targets_C, reduction="sum")

    chunks = zip(hidden_MD.split(chunk_size), targets_M.split(chunk_size), strict=True)
    losses: list[Any] = [checkpoint(chunk_loss, *chunk, use_reentrant=False) for chunk in chunks]
    return torch.stack(losses).sum()


class _LinearCrossEntropy(torch.autograd.Function):
    """Projection and cross-entropy, chunk by chunk; gradients are computed with the loss, and logits never kept."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_MD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        targets_M: Tensor,
        cap: float | None,
        chunk_size: int,
        with_gradients: bool,
    ) -> Tensor:
        dtype = _compute_dtype(hidden_MD)
        hidden, weight = hidden_MD.to(dtype), weight_VD.to(dtype)
        bias = None if bias_V is None else bias_V.to(dtype)
        needs_hidden, needs_weight, needs_bias = (with_gradients and needed for needed in ctx.needs_input_grad[:3])
        d_hidden = torch.empty_like(hidden) if needs_hidden else None
        # Sums over chunks: in half precision each addition would round them.
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        d_bias = weight.new_zeros(weight.shape[0], dtype=torch.float32) if needs_bias else None
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, hidden.shape[0], chunk_size):
                chunk = slice(start, start + chunk_size)
                logits_CV = F.linear(hidden[chunk], weight, bias).float()
                chunk_loss, d_logits_CV = _cross_entropy(logits_CV, targets_M[chunk], cap)
                loss += chunk_loss
                if d_hidden is not None:
                    d_hidden[chunk] = d_logits_CV.to(dtype) @ weight
                if d_weight is not None:
                    d_weight += d_logits_CV.to(dtype).T @ hidden[chunk]
                if d_bias is not None:
                    d_bias += d_logits_CV.sum(dim=0)
        gradients = zip((hidden_MD, weight_VD, bias_V), (d_hidden, d_weight, d_bias), strict=True)
        ctx.save_for_backward(*(None if x is None or d is None else d.to(x.dtype) for x, d in gradients))
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *(None if d is None else d * grad.to(d.dtype) for d in ctx.saved_tensors), None, None, None, None


def _cross_entropy(logits_CV: Tensor, targets_C: Tensor, cap: float | None) -> tuple[Tensor, Tensor]:
    """The loss of logits that are yet to be capped, and its gradient; both float32."""
    capped_CV = logits_CV if cap is None else torch.tanh(logits_CV / cap) * cap
    log_p_CV = capped_CV.log_softmax(dim=-1)
    rows = torch.arange(targets_C.shape[0], device=targets_C.device)
    target = (rows, targets_C.clamp(min=0))
    is_ignored = targets_C == IGNORED
    loss = -log_p_CV[target].masked_fill(is_ignored, 0.0).sum()
    gradient_CV = log_p_CV.exp_()
    gradient_CV[target] -= 1.0
    gradient_CV[is_ignored] = 0.0
    return loss, gradient_CV if cap is None else gradient_CV * (1.0 - (capped_CV / cap).square())


def _compute_dtype(hidden_MD: Tensor) -> torch.dtype:
    device = hidden_MD.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_MD.dtype
