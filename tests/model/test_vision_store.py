"""A picture passes the tower once; embeddings do not notice; what is broken on disk is not believed."""

import shutil

import pytest
import torch
from fixtures_backbones import KINDS, noise

from umarvel_ray.data.records import Candidate
from umarvel_ray.errors import ConfigError, DataError
from umarvel_ray.model.encoder import Encoder
from umarvel_ray.model.settings import EncoderSettings, ImageSettings, LoraSettings


def embed(encoder: Encoder, records: list, max_tokens: int = 8192) -> torch.Tensor:
    return encoder.embed_items([encoder.builder.build(record) for record in records], max_tokens=max_tokens)


def looks(encoder: Encoder) -> list[int]:
    """Pictures of each call of the tower from here on."""
    seen: list[int] = []
    encoder.model.model.visual.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len(kwargs["grid_thw"])), with_kwargs=True
    )
    return seen


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_stored_features_change_nothing_and_spare_the_tower(backbones, mixed_records, tmp_path, kind, dtype):
    plain = embed(Encoder.load(backbones[kind], dtype=dtype), mixed_records)
    first = Encoder.load(backbones[kind], dtype=dtype)
    store = first.keep_vision_features(tmp_path)
    torch.testing.assert_close(embed(first, mixed_records), plain, atol=1e-6, rtol=0)
    assert (len(store), store.hits) == (4, 0)
    again = Encoder.load(backbones[kind], dtype=dtype)
    seen = looks(again)
    store = again.keep_vision_features(tmp_path)
    for budget in (60, 8192) if dtype == "float32" else (8192,):  # bfloat16 rounds as a batch falls
        torch.testing.assert_close(embed(again, mixed_records, budget), plain, atol=1e-6, rtol=0)
    assert seen == [] and store.misses == 0


def test_known_and_new_pictures_meet_in_one_batch(backbone, pictures, mixed_records, tmp_path):
    encoder = Encoder.load(backbone)
    plain = embed(encoder, mixed_records)
    encoder.keep_vision_features(tmp_path)
    embed(encoder, [Candidate(did="1", img_path=pictures["tower"])])
    seen = looks(encoder)
    torch.testing.assert_close(embed(encoder, mixed_records), plain, atol=1e-6, rtol=0)
    assert sum(seen) == 5  # the kite of three items that were built before it was seen, boat and hill


def test_content_decides_not_the_name(backbone, pictures, tmp_path):
    encoder = Encoder.load(backbone)
    store = encoder.keep_vision_features(tmp_path / "store")
    shutil.copyfile(pictures["kite"], tmp_path / "copy.png")
    embed(encoder, [Candidate(did="1", img_path=pictures["kite"])])
    embed(encoder, [Candidate(did="2", img_path=str(tmp_path / "copy.png"))])
    assert (len(store), store.hits) == (1, 1)
    noise(tmp_path / "copy.png", 64, 60, seed=9)
    embed(encoder, [Candidate(did="2", img_path=str(tmp_path / "copy.png"))])
    assert len(store) == 2


def test_another_tower_budget_or_precision_has_its_own_folder(backbone, tmp_path):
    folders = {Encoder.load(backbone).keep_vision_features(tmp_path).folder}
    small = EncoderSettings(images=ImageSettings(max_pixels=9 * 784))
    folders.add(Encoder.load(backbone, settings=small).keep_vision_features(tmp_path).folder)
    folders.add(Encoder.load(backbone, dtype="bfloat16").keep_vision_features(tmp_path).folder)
    other = Encoder.load(backbone)
    with torch.no_grad():
        other.model.model.visual.merger.mlp[0].bias[0] += 1
    folders.add(other.keep_vision_features(tmp_path).folder)
    assert len(folders) == 4
    assert Encoder.load(backbone).keep_vision_features(tmp_path).folder in folders


def test_what_is_broken_on_disk_is_computed_anew(backbone, pictures, tmp_path):
    records = [Candidate(did=name, img_path=pictures[name]) for name in ("kite", "boat", "tower")]
    encoder = Encoder.load(backbone)
    plain = embed(encoder, records)
    store = encoder.keep_vision_features(tmp_path)
    embed(encoder, records)
    (data,), (index,) = store.folder.glob("*.features"), store.folder.glob("*.index")
    content = bytearray(data.read_bytes())
    content[10] ^= 1
    data.write_bytes(content[:-1])  # the first is changed, the last is cut off
    index.write_bytes(index.read_bytes()[:-3])
    again = Encoder.load(backbone)
    store = again.keep_vision_features(tmp_path)
    torch.testing.assert_close(embed(again, records), plain, atol=1e-6, rtol=0)
    assert (store.hits, store.misses) == (1, 2)


def test_a_tower_that_trains_keeps_nothing(backbone, tmp_path):
    encoder = Encoder.load(backbone)
    encoder.set_trainable("full", LoraSettings(), learn_temperature=False)
    with pytest.raises(ConfigError, match="the vision tower trains"):
        encoder.keep_vision_features(tmp_path)
    encoder = Encoder.load(backbone)
    encoder.keep_vision_features(tmp_path)
    with pytest.raises(ConfigError, match="cannot train while its features are kept"):
        encoder.set_trainable("full", LoraSettings(), learn_temperature=False)


def test_a_missing_picture_is_named(backbone, tmp_path):
    encoder = Encoder.load(backbone)
    encoder.keep_vision_features(tmp_path)
    with pytest.raises(DataError, match=r"absent\.png: cannot be read"):
        embed(encoder, [Candidate(did="1", img_path=str(tmp_path / "absent.png"))])
