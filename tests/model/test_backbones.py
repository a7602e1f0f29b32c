"""All three backbones embed as stock modules do on a padded batch, whatever the settings and the batch."""

import pytest
import torch
from fixtures_backbones import KINDS, StockEncoder

from umarvel_ray.model.attention import PackedLayout
from umarvel_ray.model.encoder import Encoder
from umarvel_ray.model.settings import EncoderSettings

AGREES = {"atol": 2e-5, "rtol": 0.0}
"""float32, in another order of operations, on vectors of norm 1."""


def embed(encoder: Encoder, records: list, max_tokens: int = 8192) -> torch.Tensor:
    return encoder.embed_items([encoder.builder.build(record) for record in records], max_tokens=max_tokens)


@pytest.fixture(scope="module")
def stock(backbones) -> dict[str, StockEncoder]:
    return {kind: StockEncoder(folder) for kind, folder in backbones.items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"attention": "causal"},
        {"pooling": "last", "attention": "causal", "instruction": "pooled"},
        {"pooling": "last", "instruction": "none"},
        {"instruction": "pooled"},
        {"positions": "mrope"},
        {"positions": "mrope", "attention": "causal", "pooling": "last"},
    ],
    ids=lambda settings: "-".join(settings.values()) or "default",
)
def test_packed_is_what_stock_modules_give_on_a_padded_batch(backbones, stock, mixed_records, kind, settings):
    encoder = Encoder.load(backbones[kind], settings=EncoderSettings(**settings))
    expected_ND = stock[kind].embed(mixed_records, **settings)
    torch.testing.assert_close(embed(encoder, mixed_records), expected_ND, **AGREES)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
def test_nothing_else_in_the_batch_moves_an_embedding(backbones, mixed_records, kind, attention):
    """Neither mates, order nor budget; a picture alone, where the authors' code turns causal, among them."""
    encoder = Encoder.load(backbones[kind], settings=EncoderSettings(attention=attention))
    alone = torch.cat([embed(encoder, [record]) for record in mixed_records])
    order = [6, 3, 0, 5, 7, 1, 4, 2]
    same = {"atol": 1e-6, "rtol": 0.0}
    for budget in (1, 90, 200, 8192):
        torch.testing.assert_close(embed(encoder, mixed_records, budget), alone, **same)
        turned = embed(encoder, [mixed_records[index] for index in order], budget)
        torch.testing.assert_close(turned, alone[order], **same)
    for mates in ([6, 6, 6], [1, 7], [0, 5]):  # equal lengths, equal pictures, texts alone
        torch.testing.assert_close(embed(encoder, [mixed_records[i] for i in mates]), alone[mates], **same)


@pytest.mark.parametrize("kind", KINDS)
def test_a_lone_unpadded_record_is_not_causal(backbones, mixed_records, kind):
    picture = [mixed_records[6]]
    both, causal = (
        embed(Encoder.load(backbones[kind], settings=EncoderSettings(attention=name)), picture)
        for name in ("bidirectional", "causal")
    )
    assert (both - causal).abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_keeps_the_angle(backbones, stock, mixed_records, kind):
    """bfloat16 has 8 bits: cosines to the float32 reference stay above 0.999 on these three layers."""
    encoder = Encoder.load(backbones[kind], dtype="bfloat16")
    embedding_ND = embed(encoder, mixed_records)
    assert embedding_ND.dtype == torch.float32
    assert (embedding_ND * stock[kind].embed(mixed_records)).sum(1).min() > 0.999


def test_each_backbone_has_its_own_template_and_patches(backbones, mixed_records):
    prompts, widths = {}, {}
    for kind, folder in backbones.items():
        encoder = Encoder.load(folder)
        item = encoder.builder.build(mixed_records[6])
        prompts[kind] = encoder._tokenizer.decode(item.ids)
        widths[kind] = item.visuals[0].patches.shape[1]
    assert widths == {"qwen2_vl": 588, "qwen2_5_vl": 588, "qwen3_vl": 768}
    assert [prompts[kind].startswith("<|im_start|>system") for kind in KINDS] == [True, True, False]


def test_no_layer_of_a_vision_tower_asks_the_device_for_lengths(backbones, mixed_records, monkeypatch):
    """Lengths, windows and places are known before the first layer."""

    def refuse(*_, **__):
        raise AssertionError("a layer wanted to know lengths")

    for folder in backbones.values():
        encoder = Encoder.load(folder)
        visuals = encoder.builder.pack([encoder.builder.build(mixed_records[3])]).visuals
        core = encoder.model.model
        with monkeypatch.context() as patch, torch.no_grad():
            core.visual.blocks[0].register_forward_pre_hook(
                lambda *_, patch=patch: patch.setattr(PackedLayout, "of_lengths", refuse)
            )
            features = encoder.adapter.tower(core, visuals.patches_P, visuals.grids)
        assert features.merged_VD.isfinite().all()


def test_pictures_change_the_states_behind_the_first_layers_of_qwen3(backbones, mixed_records, monkeypatch):
    """Without DeepStack the embedding of a picture would be another, that of a text the same."""
    encoder = Encoder.load(backbones["qwen3_vl"])
    whole = embed(encoder, mixed_records)
    monkeypatch.setattr(encoder.adapter, "decoder_inputs", lambda *_: {})
    shallow = embed(encoder, mixed_records)
    differs = (whole - shallow).abs().amax(1) > 1e-3
    assert differs.tolist() == [False, True, True, True, True, False, True, True]
