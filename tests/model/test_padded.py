"""The slow way gives the same embeddings, and leaves the model packed."""

import pytest
import torch
from fixtures_backbones import KINDS

from umarvel_ray.model.encoder import Encoder
from umarvel_ray.model.padded import embed_padded
from umarvel_ray.model.settings import EncoderSettings


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("settings", [{}, {"attention": "causal", "pooling": "last", "positions": "mrope"}])
def test_padded_and_packed_agree(backbones, mixed_records, kind, settings):
    encoder = Encoder.load(backbones[kind], settings=EncoderSettings(**settings))
    items = [encoder.builder.build(record) for record in mixed_records]
    packed = encoder.embed_items(items)
    for batch_size in (1, 3, 16):
        padded = embed_padded(encoder, items, batch_size=batch_size)
        torch.testing.assert_close(padded, packed, atol=2e-5, rtol=0)
    assert torch.equal(encoder.embed_items(items), packed)
