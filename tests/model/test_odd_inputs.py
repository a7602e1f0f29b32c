"""Strange pictures and texts embed, or are refused in one line; never a crash inside torch, never NaN."""

import re

import numpy as np
import pytest
from fixtures_backbones import KINDS, noise
from PIL import Image

from umarvel_ray.data.records import Candidate, Picture, Query, Video
from umarvel_ray.errors import DataError
from umarvel_ray.model.encoder import Encoder
from umarvel_ray.model.images import open_image


@pytest.fixture(scope="module")
def odd_pictures(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("odd")
    for name, width, height in (
        ("flat", 4000, 40),
        ("tall", 40, 4000),
        ("dot", 1, 1),
        ("strip", 200, 1),
        ("line", 201, 1),
    ):
        noise(folder / f"{name}.png", width, height)
    picture = Image.open(noise(folder / "plain.png", 64, 60))
    picture.convert("CMYK").save(folder / "cmyk.jpg")
    picture.quantize(16).save(folder / "palette.png")
    picture.quantize(16).save(folder / "clear_palette.png", transparency=0)
    picture.convert("RGBA").save(folder / "alpha.png")
    picture.convert("LA").save(folder / "grey_alpha.png")
    picture.convert("F").save(folder / "float.tiff")
    picture.convert("LAB").save(folder / "lab.tiff")
    deep = np.arange(64 * 60, dtype=np.uint16).reshape(60, 64) * 17
    Image.fromarray(deep).save(folder / "deep.png")
    turned = Image.Exif()
    turned[274] = 6
    picture.save(folder / "turned.jpg", exif=turned)
    return {file.stem: str(file) for file in folder.iterdir()}


@pytest.mark.parametrize("kind", KINDS)
def test_odd_pictures_embed(backbones, odd_pictures, kind):
    fine = [name for name in sorted(odd_pictures) if name != "line"]
    encoder = Encoder.load(backbones[kind])
    embedding_CD = encoder.embed_candidates(
        [Candidate(did=name, img_path=odd_pictures[name]) for name in fine]
    )
    assert np.isfinite(embedding_CD).all()
    np.testing.assert_allclose(np.linalg.norm(embedding_CD, axis=1), 1, atol=1e-5)


def test_too_long_a_strip_is_refused(backbone, odd_pictures):
    path = odd_pictures["line"]
    with pytest.raises(
        DataError, match=f"^{re.escape(path)}: .*201×1 pixels is more than 200 times"
    ) as caught:
        Encoder.load(backbone).embed_candidates([Candidate(did="1", img_path=path)])
    assert "\n" not in str(caught.value)


def test_sixteen_bits_keep_their_upper_eight(odd_pictures):
    values = np.asarray(open_image(odd_pictures["deep"]))[..., 0].ravel().astype(int)
    assert values[0] == 0 and values[-1] == (64 * 60 - 1) * 17 * 255 // 65535
    assert (np.diff(values) >= 0).all() and len(set(values.tolist())) == values[-1] + 1


def test_what_a_camera_notes_does_not_turn_a_picture(odd_pictures):
    assert open_image(odd_pictures["turned"]).size == (64, 60)


TEXTS = {
    "long": "word " * 12_000,
    "one_word": "a" * 60_000,
    "lines": "\n" * 60_000,
    "blank": " ",
    "quotes": '""',
    "right_to_left": "שלום עולם, هذا اختبار",
    "emoji": "👩‍👩‍👧‍👦🏳️‍🌈" * 50,
    "combining": "Z̸̢" * 3_000,
    "chinese": "漢字" * 30_000,
    "nul": "a\x00b",
}


@pytest.mark.parametrize("name", TEXTS)
def test_odd_texts_embed(backbone, pictures, name):
    encoder = Encoder.load(backbone)
    text = TEXTS[name]
    records = [
        Query(qid="1", txt=text, instruction="Find."),
        Query(qid="2", txt=text),
        Query(qid="3", txt="a kite", instruction=text),
        Query(qid="4", parts=(text, Picture(pictures["kite"]), text), instruction=text),
    ]
    embedding_QD = encoder.embed_queries(records)
    assert np.isfinite(embedding_QD).all()
    np.testing.assert_allclose(np.linalg.norm(embedding_QD, axis=1), 1, atol=1e-5)
    items = [encoder.builder.build(record) for record in records]
    assert max(item.num_tokens for item in items) < 480 + 60
    assert all(item.pooled.any() for item in items)


def test_what_is_cut_is_counted(backbone):
    builder = Encoder.load(backbone).builder
    text = "kite " * 600
    whole = len(builder._tokenizer("Kite " + "kite " * 598 + "kite.")["input_ids"])
    assert builder.build(Candidate(did="1", txt=text)).num_cut == whole - 480
    assert builder.build(Candidate(did="1", txt="a kite")).num_cut == 0


def test_half_a_character_is_refused(backbone):
    with pytest.raises(DataError, match="query 7: its text holds half of a surrogate pair"):
        Encoder.load(backbone).embed_queries([Query(qid="7", txt="bad \ud83d end")])


@pytest.mark.parametrize(
    "content",
    [{}, {"txt": ""}, {"txt": "", "instruction": "Find."}, {"parts": ("",)}, {"parts": (Picture(""),)}],
)
def test_what_holds_nothing_is_refused(content):
    with pytest.raises(DataError, match="query 1: has neither text nor image"):
        Query(qid="1", **content)


def test_parts_stand_alone():
    with pytest.raises(DataError, match="candidate 1: has `parts` beside txt or img_path"):
        Candidate(did="1", txt="a", parts=("b",))
    record = Query(qid="1", parts=(Video("a.mp4"), "b", Picture("c.png")))
    assert record.modality == "image,video,text"
