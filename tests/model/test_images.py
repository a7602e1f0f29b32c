"""Pictures become the same patches as with Transformers' own image processor."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

from umarvel_ray.errors import DataError
from umarvel_ray.model.images import load_patches, normalise_patches, open_image, resized_size
from umarvel_ray.model.settings import ImageSettings

SMALL = ImageSettings(max_pixels=224 * 224)
CLIP = {
    "mean": (0.48145466, 0.4578275, 0.40821073),
    "deviation": (0.26862954, 0.26130258, 0.27577711),
}


def resized(height: int, width: int, settings: ImageSettings) -> tuple[int, int]:
    return resized_size(height, width, min_pixels=settings.min_pixels, max_pixels=settings.max_pixels)


@pytest.mark.parametrize("settings", [ImageSettings(), SMALL], ids=["default", "224"])
def test_sizes_are_those_of_smart_resize(settings):
    """Equal wherever its answer keeps to the cap; every size of ours keeps to it."""
    rng = np.random.default_rng(0)
    sides = np.exp(rng.uniform(math.log(1), math.log(5000), (4000, 2))).astype(int) + 1
    edges = [(1, 1), (14, 14), (42, 42), (10, 2000), (13, 2600), (2600, 13), (70, 98), (3000, 15), (28, 28)]
    compared = 0
    for height, width in [*edges, *sides.tolist()]:
        if max(height, width) > 200 * min(height, width):
            continue
        ours = resized(height, width, settings)
        stock = smart_resize(height, width, min_pixels=settings.min_pixels, max_pixels=settings.max_pixels)
        assert min(ours) >= 28 and ours[0] % 28 == ours[1] % 28 == 0
        assert settings.min_pixels <= ours[0] * ours[1] <= settings.max_pixels
        if stock[0] * stock[1] <= settings.max_pixels:
            assert ours == stock, (height, width)
            compared += 1
    assert compared > 3000


def test_a_narrow_picture_keeps_to_the_cap():
    """Stock sizes pass it there; older ones had a side of zero."""
    stock = smart_resize(40, 4000, min_pixels=SMALL.min_pixels, max_pixels=SMALL.max_pixels)
    assert stock == (28, 2240)
    assert resized(40, 4000, SMALL) == (28, 64 * 28)
    assert resized(4000, 40, SMALL) == (64 * 28, 28)
    assert 65 * 28 * 28 > 224 * 224


@pytest.mark.parametrize("size", [(64, 60), (40, 112), (300, 31), (800, 600), (5, 9)])
def test_patches_are_pixel_values(tmp_path, size):
    """Order and values, to the bit."""
    rng = np.random.default_rng(1)
    path = tmp_path / "picture.png"
    Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(path)
    settings = ImageSettings(max_pixels=100 * 28 * 28)
    processor = Qwen2VLImageProcessorPil(min_pixels=settings.min_pixels, max_pixels=settings.max_pixels)
    expected = processor([Image.open(path)], return_tensors="pt")
    patches, grid = load_patches(str(path), settings)
    assert list(grid) == expected["image_grid_thw"][0].tolist()
    pixels = normalise_patches(torch.from_numpy(patches), **CLIP)
    assert torch.equal(pixels, expected["pixel_values"])


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "LA", "1"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    path = tmp_path / "picture.tiff" if mode == "CMYK" else tmp_path / "picture.png"
    Image.new("RGB", (30, 30), (200, 10, 10)).convert(mode).save(path)
    image = open_image(str(path))
    assert (image.mode, image.size) == ("RGB", (30, 30))


def test_a_broken_picture_is_named(tmp_path):
    whole = tmp_path / "whole.jpg"
    rng = np.random.default_rng(2)
    Image.fromarray(rng.integers(0, 256, (200, 200, 3), dtype=np.uint8)).save(whole)
    content = whole.read_bytes()
    faults = {
        "cut.jpg": content[: len(content) // 2],
        "empty.jpg": b"",
        "words.jpg": b"not a picture at all",
        "head.png": b"\x89PNG\r\n\x1a\n" + b"\0" * 40,
    }
    for name, data in faults.items():
        (tmp_path / name).write_bytes(data)
    Image.new("RGB", (2010, 10)).save(tmp_path / "line.png")
    for name in [*faults, "line.png", "absent.png"]:
        path = str(tmp_path / name)
        with pytest.raises(DataError) as caught:
            load_patches(path, ImageSettings())
        message = str(caught.value)
        assert message.startswith(f"{path}: ") and "\n" not in message and message.endswith(".")
        assert message.count(path) == 1


def test_a_picture_that_claims_too_many_pixels_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "large.png"
    Image.new("RGB", (200, 100)).save(path)
    monkeypatch.setattr("umarvel_ray.model.images.MAX_SOURCE_PIXELS", 19_999)
    with pytest.raises(DataError, match=r"large.png: 200×100 pixels are more than 19,999"):
        open_image(str(path))
