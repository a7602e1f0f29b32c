"""Packed hidden states → unit-norm embeddings. T tokens, N items, D width."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def mean_pool(hidden_TD: Tensor, pooled_T: Tensor, lengths: Sequence[int]) -> Tensor:
    """Mean of each item's pooled tokens, then unit norm: (N, D) float32, accumulated in float32.

    Args:
        hidden_TD: Hidden states of items laid end to end.
        pooled_T: bool, at least one true in each item.
        lengths: Tokens of each item, N of them.
    """
    item_T = torch.repeat_interleave(
        torch.arange(len(lengths), device=hidden_TD.device), torch.tensor(lengths, device=hidden_TD.device)
    )
    weight_T = pooled_T.float()
    sum_ND = hidden_TD.new_zeros(len(lengths), hidden_TD.shape[1], dtype=torch.float32)
    sum_ND = sum_ND.index_add(0, item_T, hidden_TD.float() * weight_T[:, None])
    count_N = torch.zeros(len(lengths), device=hidden_TD.device).index_add(0, item_T, weight_T)
    return F.normalize(sum_ND / count_N[:, None], dim=1)
