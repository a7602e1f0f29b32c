"""Feed-forward layers in pieces, or at a few tokens alone, give what they give at once."""

import torch
from torch import nn

from umarvel_ray.model import feedforward
from umarvel_ray.model.feedforward import feed_forward_at_once, feed_forward_in_pieces, only_at


class Layer(nn.Module):
    """Two products with a bend between them; notes how many tokens come at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 20), nn.Linear(20, 6)
        self.seen: list[int] = []

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        self.seen.append(rows.shape[-2])
        return self.down(torch.relu(self.up(rows)))


def model() -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict({"mlp": Layer(), "other": Layer()})


def test_pieces_are_the_whole(monkeypatch):
    monkeypatch.setattr(feedforward, "_ROWS", 4)
    parts, rows_TD = model(), torch.randn(1, 10, 6)
    expected = parts["mlp"](rows_TD)
    feed_forward_in_pieces(nn.ModuleDict({"layer": parts}))
    with torch.inference_mode():
        for rows in (rows_TD, rows_TD[0]):  # the decoder's rows, and the tower's
            parts["mlp"].seen.clear()
            torch.testing.assert_close(parts["mlp"](rows), expected.view_as(rows), rtol=0, atol=1e-6)
            assert parts["mlp"].seen == [4, 4, 2]
        parts["other"].seen.clear()
        parts["other"](rows_TD)
        assert parts["other"].seen == [10]
    parts["mlp"].seen.clear()
    parts["mlp"](rows_TD).sum().backward()  # with gradients nothing is cut
    feed_forward_at_once(nn.ModuleDict({"layer": parts}))
    with torch.inference_mode():
        parts["mlp"](rows_TD)
    assert parts["mlp"].seen == [10, 10]


def test_only_some_tokens_are_fed_forward():
    layer, rows_TD = model()["mlp"], torch.randn(1, 10, 6)
    places_S = torch.tensor([7, 0, 4])
    with torch.inference_mode():
        expected = torch.zeros_like(rows_TD)
        expected[:, places_S] = layer(rows_TD)[:, places_S]
        layer.seen.clear()
        with only_at(layer, places_S):
            found = layer(rows_TD)
        assert layer.seen == [3]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
        layer(rows_TD)
    assert layer.seen == [3, 10]
