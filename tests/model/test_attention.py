"""Packed attention is attention inside each item, however items of a row are grouped for it."""

from types import SimpleNamespace

import pytest
import torch

from umarvel_ray.model.attention import PackedLayout, packed_attention

ROWS = {
    "long ones, longest first": [300, 260, 200, 128],
    "long ones in any order": [130, 300, 129],
    "equal neighbours": [64, 64, 64, 64, 200, 200],
    "short ones": [9, 7, 30, 1, 28],
    "short ones between long ones": [9, 140, 7, 140, 140, 30, 1, 64, 64],
    "alone": [5],
}


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, causal: bool) -> torch.Tensor:
    """Of one item, in float64, spelt out: (H, L, D), fewer heads for keys → (L, H, D)."""
    group = len(query) // len(key)
    key, value = key.repeat_interleave(group, 0).double(), value.repeat_interleave(group, 0).double()
    score_HLL = query.double() @ key.transpose(1, 2) / query.shape[2] ** 0.5
    if causal:
        later = torch.ones(score_HLL.shape[1:], dtype=torch.bool).triu(1)
        score_HLL = score_HLL.masked_fill(later, float("-inf"))
    return (score_HLL.softmax(-1) @ value).transpose(0, 1)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("lengths", ROWS.values(), ids=ROWS)
def test_items_see_themselves_alone(lengths, heads, causal):
    torch.manual_seed(0)
    states = [torch.randn(1, num, sum(lengths), 8) for num in (heads[0], heads[1], heads[1])]
    # As a model hands them over: tokens outermost in memory.
    states = [part.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for part in states]
    layout = PackedLayout.of_lengths(lengths, causal=causal, device=torch.device("cpu"))
    found, _ = packed_attention(SimpleNamespace(), *states, None, layout=layout)
    parts = zip(*(part[0].split(lengths, dim=1) for part in states), strict=True)
    expected = torch.cat([attend(*part, causal=causal) for part in parts])
    # Sixteen units in the last place of float32: values are of size 1, sums have up to 300 terms.
    torch.testing.assert_close(found[0].double(), expected, atol=2e-6, rtol=0)
    direction = torch.randn_like(expected)
    for ours, theirs in zip(
        torch.autograd.grad(found[0].double(), states, direction),
        torch.autograd.grad(expected, states, direction),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_what_lies_in_order_is_not_copied():
    """Long items, or equal ones, longest first, as micro-batches have them."""
    layout = PackedLayout.of_lengths([300, 200, 200, 128], causal=False, device=torch.device("cpu"))
    assert [block.start for block in layout.blocks] == [0, 300, 700]
    assert layout.restore_T is None
