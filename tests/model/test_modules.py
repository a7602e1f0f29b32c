"""The faster ways through a backbone's modules give what its own give."""

import pytest
import torch
from fixtures_backbones import KINDS

from umarvel_ray.data.records import Candidate
from umarvel_ray.model import modules
from umarvel_ray.model.backbone import core_of
from umarvel_ray.model.encoder import Encoder
from umarvel_ray.model.modules import only_at, use_fast_modules, use_stock_modules
from umarvel_ray.model.settings import LoraSettings


@pytest.mark.parametrize("kind", KINDS)
def test_slices_and_rows_of_patches_move_no_embedding(backbones, mixed_records, monkeypatch, kind):
    """Rounding apart. Slices of seven rows: the last one is short, and none holds an item."""
    monkeypatch.setattr(modules, "_SLICE", 7)
    gated, calls = modules._gated, []
    monkeypatch.setattr(modules, "_gated", lambda mlp, rows: calls.append(mlp) or gated(mlp, rows))
    encoder = Encoder.load(backbones[kind])
    items = [encoder.builder.build(record) for record in mixed_records]
    fast = encoder.embed_items(items)
    assert len(set(calls)) >= encoder.model.config.text_config.num_hidden_layers
    use_stock_modules(encoder.model.model)
    torch.testing.assert_close(fast, encoder.embed_items(items), atol=1e-6, rtol=0)
    use_fast_modules(encoder.model.model)
    with torch.no_grad():
        torch.testing.assert_close(encoder(encoder.builder.pack(items)), fast, atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_pass_that_will_be_repeated_with_gradients_is_the_same_to_the_bit(
    backbones, mixed_records, monkeypatch, kind
):
    monkeypatch.setattr(modules, "_SLICE", 7)
    encoder = Encoder.load(backbones[kind]).train()
    packed = encoder.builder.pack([encoder.builder.build(record) for record in mixed_records])
    encoder.set_trainable("lora", LoraSettings(rank=2, alpha=4, dropout=0.0), learn_temperature=False)
    with torch.no_grad():
        first = encoder(packed)
    assert torch.equal(first, encoder(packed).detach())


def test_slices_pass_through_adapters(backbone, mixed_records, monkeypatch):
    monkeypatch.setattr(modules, "_SLICE", 7)
    encoder = Encoder.load(backbone)
    items = [encoder.builder.build(record) for record in mixed_records]
    before = encoder.embed_items(items)
    encoder.set_trainable("lora", LoraSettings(rank=2, alpha=4), learn_temperature=False)
    encoder.eval()
    with torch.no_grad():
        for name, weight in encoder.model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.5, generator=torch.Generator().manual_seed(len(name)))
    fast = encoder.embed_items(items)
    assert (fast - before).abs().max() > 1e-2
    use_stock_modules(core_of(encoder.model))
    torch.testing.assert_close(fast, encoder.embed_items(items), atol=1e-6, rtol=0)


def test_a_still_is_multiplied_once_and_a_video_frame_by_frame(backbone):
    encoder = Encoder.load(backbone)
    embed, area = encoder.model.model.visual.patch_embed, encoder.adapter.patch_size**2
    still = torch.randn(5, 3, 1, area)
    both = still.expand(-1, -1, encoder.adapter.temporal, -1).flatten(1)
    frames = torch.randn(5, both.shape[1])
    once, twice, video = embed(still.flatten(1)), embed(both), embed(frames)
    use_stock_modules(encoder.model.model)
    torch.testing.assert_close(once, embed(both), atol=1e-5, rtol=0)
    torch.testing.assert_close(twice, embed(both), atol=1e-5, rtol=0)
    torch.testing.assert_close(video, embed(frames), atol=1e-5, rtol=0)


def test_an_mlp_takes_the_tokens_asked_for_alone():
    torch.manual_seed(0)
    mlp, states_TD = torch.nn.Linear(6, 6), torch.randn(1, 10, 6)
    places_S = torch.tensor([7, 0, 4])
    expected = torch.zeros_like(states_TD)
    with torch.inference_mode():
        expected[:, places_S] = mlp(states_TD)[:, places_S]
        with only_at([mlp], places_S):
            torch.testing.assert_close(mlp(states_TD), expected, atol=1e-6, rtol=0)
        assert mlp(states_TD).ne(0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_long_items_do_not_see_where_a_slice_ends(backbones, pictures, kind):
    """Some 2,000 tokens: several slices, items across their edges, short ones among long ones."""
    encoder = Encoder.load(backbones[kind])
    words = [300, 20, 300, 130, 450, 1, 300, 60]
    records = [
        Candidate(did=str(number), txt="kite " * count, img_path=pictures["kite"] if number % 3 else None)
        for number, count in enumerate(words)
    ]
    items = [encoder.builder.build(record) for record in records]
    alone = torch.cat([encoder.embed_items([item]) for item in items])
    for order in (range(8), [4, 0, 2, 6, 3, 7, 1, 5]):
        with torch.inference_mode():
            together = encoder(encoder.builder.pack([items[index] for index in order]))
        torch.testing.assert_close(together, alone[list(order)], atol=1e-6, rtol=0)
