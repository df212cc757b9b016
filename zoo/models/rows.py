"""A batch as the tokens that have to be computed: without its padding, and with each common beginning once.

In a causal model, what a token becomes depends on the tokens before it alone. So all layers but attention run on one
sequence of S tokens, and attention on the rows that they form: a token which belongs to several rows sees the same
keys in each of them.

Shape letters: S tokens, R rows, L tokens of the longest of them, T of those as queries, N query heads, K kv heads,
H head size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class RowGroup:
    """Rows of similar length.

    Attributes:
        index_RL: int64, which token stands where; behind the end of a row, any.
        n_known: so many tokens at the beginning of each row are asked for in another one, and only keys here.
    """

    index_RL: Tensor
    n_known: int = 0


@dataclass(frozen=True, eq=False)
class Rows:
    """Which of S tokens each row consists of.

    Attributes:
        groups: at least one.
        places_S: where each token is found among those that are asked for, of all groups, row after row.
    """

    groups: tuple[RowGroup, ...]
    places_S: Tensor

    def attend(self, attend: Callable[[Tensor, Tensor, Tensor], Tensor], *qkv_1SKH: Tensor) -> Tensor:
        """What ``attend`` makes of q, k and v of the rows of each group, (1, S, K, H) again."""
        q_1SNH, *kv_1SKH = qkv_1SKH
        results = []
        for group in self.groups:
            q_RTNH = spread(q_1SNH, group.index_RL[:, group.n_known :])
            k_RLKH, v_RLKH = (spread(x, group.index_RL) for x in kv_1SKH)
            results.append(attend(q_RTNH, k_RLKH, v_RLKH).flatten(0, 1))
        return torch.cat(results).index_select(0, self.places_S)[None]


def spread(x_1SKH: Tensor, index_RL: Tensor) -> Tensor:
    """Tokens where they stand in rows, (R, L, K, H). The gradient of each is the sum over its places."""
    return x_1SKH[0].index_select(0, index_RL.flatten()).unflatten(0, index_RL.shape)
