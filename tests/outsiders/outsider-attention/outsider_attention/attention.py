"""The formula, one head at a time."""

from typing import Any

import torch
from torch import Tensor

from zoo.attention.base import AttentionRequest
from zoo.models.masks import Mask


class Outsider:
    def supports(self, request: AttentionRequest) -> list[str]:
        return ["it is no good at training"] if request.training else []

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, mask: Mask, scale: float, **options: Any) -> Tensor:
        seen = mask.dense(q.shape[1], k.shape[1], q.device)[:, 0]
        heads = []
        for n in range(q.shape[2]):
            kv = n * k.shape[2] // q.shape[2]
            scores = (q[:, :, n].float() @ k[:, :, kv].float().mT * scale).masked_fill(~seen, float("-inf"))
            heads.append(scores.softmax(-1).nan_to_num() @ v[:, :, kv].float())
        return torch.stack(heads, dim=2).to(q.dtype)
