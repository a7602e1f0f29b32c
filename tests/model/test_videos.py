"""A video is read as evenly spread frames, and stands in the prompt as each backbone wants it."""

import numpy as np
import pytest
import torch
from fixtures_backbones import KINDS

from umarvel_ray.data.records import Candidate, Query, Video
from umarvel_ray.errors import DataError
from umarvel_ray.model.encoder import Encoder
from umarvel_ray.model.padded import embed_padded
from umarvel_ray.model.settings import EncoderSettings, VideoSettings
from umarvel_ray.model.videos import frame_numbers, load_video

SMALL = VideoSettings(min_frames=4, max_frames=8, min_pixels=4 * 784, max_pixels=9 * 784)


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> str:
    """Thirty frames at ten a second, each of one grey that grows by eight."""
    av = pytest.importorskip("av")
    path = str(tmp_path_factory.mktemp("video") / "clip.mp4")
    with av.open(path, "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for number in range(30):
            grey = np.full((64, 64, 3), 8 * number, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize(
    ("num", "rate", "expected"),
    [
        (30, 10.0, [0, 6, 12, 17, 23, 29]),  # three seconds, two frames in each
        (300, 10.0, [round(299 * n / 7) for n in range(8)]),  # at most eight
        (3, 10.0, [0, 2]),  # as many as there are, in pairs
        (1, 10.0, [0, 0]),
    ],
)
def test_frames_are_spread_evenly(num, rate, expected):
    assert frame_numbers(num, rate, SMALL) == expected


def test_frames_become_pairs_of_patches(clip):
    patches, grid, times = load_video(clip, SMALL)
    pairs, height, width = grid
    assert pairs == 3 and patches.shape == (pairs * height * width, 3 * 2 * 14 * 14)
    greys = patches.reshape(pairs, -1, 3, 2, 196).mean(axis=(1, 2, 4)).ravel()
    np.testing.assert_allclose(greys, [8 * n for n in (0, 6, 12, 17, 23, 29)], atol=6)  # a lossy codec
    np.testing.assert_allclose(times, [0.3, 1.45, 2.6])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("positions", ["sequential", "mrope"])
def test_videos_embed_beside_pictures_and_words(backbones, clip, pictures, kind, positions):
    settings = EncoderSettings(videos=SMALL, positions=positions)
    encoder = Encoder.load(backbones[kind], settings=settings)
    records = [
        Query(qid="1", parts=("what flies", Video(clip), "and when"), instruction="Find it."),
        Candidate(did="2", parts=(Video(clip),)),
        Candidate(did="3", img_path=pictures["kite"]),
        Candidate(did="4", txt="A kite."),
    ]
    items = [encoder.builder.build(record) for record in records]
    packed = encoder.embed_items(items)
    alone = torch.cat([encoder.embed_items([item]) for item in items])
    torch.testing.assert_close(packed, alone, atol=1e-6, rtol=0)
    torch.testing.assert_close(embed_padded(encoder, items), packed, atol=2e-5, rtol=0)
    text = encoder._tokenizer.decode(items[1].ids)
    assert text.count("<|vision_start|>") == (3 if kind == "qwen3_vl" else 1)
    assert ("<0.3 seconds><|vision_start|>" in text) == (kind == "qwen3_vl")


@pytest.mark.parametrize("kind", KINDS)
def test_positions_of_videos_are_those_of_transformers(backbones, clip, kind):
    encoder = Encoder.load(backbones[kind], settings=EncoderSettings(videos=SMALL, positions="mrope"))
    item = encoder.builder.build(Query(qid="1", parts=("what flies", Video(clip), "and when")))
    grids = item.visuals[0].grids
    video = torch.tensor([(len(grids), *grids[0][1:])]) if kind == "qwen3_vl" else torch.tensor(grids)
    ids = torch.from_numpy(item.ids).long()[None]
    kinds = (ids == encoder.adapter.video_token).int() * 2
    options = {"second_per_grid_ts": torch.tensor([1.15])} if kind == "qwen2_5_vl" else {}
    expected, _ = encoder.model.model.get_rope_index(ids, kinds, video_grid_thw=video, **options)
    assert torch.equal(torch.from_numpy(encoder.builder.positions(item)), expected[:, 0])


def test_what_is_no_video_is_named(backbone, tmp_path):
    pytest.importorskip("av")
    (tmp_path / "words.mp4").write_bytes(b"not a video at all")
    encoder = Encoder.load(backbone)
    for name, reason in (("words.mp4", "not a whole video"), ("absent.mp4", "no such video")):
        path = str(tmp_path / name)
        with pytest.raises(DataError, match=f"{name}: {reason}"):
            encoder.builder.build(Candidate(did="1", parts=(Video(path),)))
