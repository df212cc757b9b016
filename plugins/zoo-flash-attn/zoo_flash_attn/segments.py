"""Documents and padding as FlashAttention takes them: sequences of any length, one after the other, without a mask.

Shape letters: B batch, T query tokens, S key tokens, G segments: the runs of one document in one row.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from zoo.models.masks import Mask


@dataclass(frozen=True, eq=False)
class Segments:
    """Which queries and keys of a batch belong together.

    Attributes:
        queries_G1: int32, where the queries of each segment begin among all B * T, and the end.
        keys_G1: the same for the keys that are left.
        max_queries: of any segment.
        max_keys: of any segment.
        kept: int64, the keys among all B * S that are no padding; ``None`` if all are.
    """

    queries_G1: Tensor
    keys_G1: Tensor
    max_queries: int
    max_keys: int
    kept: Tensor | None


@lru_cache(maxsize=8)  # every layer of a forward pass asks for the same one
def segments_of(mask: Mask, batch: int, n_queries: int, n_keys: int) -> Segments:
    """The segments of a mask with documents, padding or both. Waits for the GPU once.

    In each, the queries are the last of the keys, as FlashAttention aligns them, padding or not: it hides the first.

    Raises:
        ValueError: a document is in several places of a row, which no segment can say.
    """
    tensor = mask.documents_BS if mask.documents_BS is not None else mask.padding_B
    assert tensor is not None
    with torch.inference_mode(False):  # or a later training step could not use what was made while generating
        row_G, start_G, end_G = _runs(mask, batch, n_keys)
        padding_B = torch.zeros(batch, dtype=torch.long) if mask.padding_B is None else mask.padding_B.cpu()
        key_counts = (end_G - start_G.maximum(padding_B[row_G])).clamp(min=0)
        query_counts = (end_G - start_G.clamp(min=n_keys - n_queries)).clamp(min=0)
        kept = (torch.arange(n_keys) >= padding_B[:, None]).flatten().nonzero()[:, 0]
        return Segments(
            queries_G1=_borders(query_counts, tensor.device),
            keys_G1=_borders(key_counts, tensor.device),
            max_queries=int(query_counts.max()),
            max_keys=int(key_counts.max()),
            kept=None if len(kept) == batch * n_keys else kept.to(tensor.device),
        )


def _runs(mask: Mask, batch: int, n_keys: int) -> tuple[Tensor, Tensor, Tensor]:
    """Row, first key and end of each run of one document."""
    if mask.documents_BS is None:
        return torch.arange(batch), torch.zeros(batch, dtype=torch.long), torch.full((batch,), n_keys)
    documents_BS = mask.documents_BS.cpu()
    begins_BS = torch.ones(batch, n_keys, dtype=torch.bool)
    begins_BS[:, 1:] = documents_BS[:, 1:] != documents_BS[:, :-1]
    row_G, start_G = begins_BS.nonzero(as_tuple=True)
    names_G2 = torch.stack((row_G, documents_BS[row_G, start_G].long()), dim=1)
    if len(names_G2.unique(dim=0)) < len(names_G2):
        raise ValueError("FlashAttention takes documents that are one run of tokens each; one is in several places")
    follows_G = torch.cat((row_G[1:] == row_G[:-1], torch.zeros(1, dtype=torch.bool)))
    return row_G, start_G, torch.where(follows_G, start_G.roll(-1), n_keys)


def _borders(counts_G: Tensor, device: torch.device) -> Tensor:
    borders = torch.zeros(len(counts_G) + 1, dtype=torch.int32)
    borders[1:] = counts_G.cumsum(0)
    return borders.to(device)
