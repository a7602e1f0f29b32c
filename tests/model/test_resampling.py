"""The compiled resize gives Pillow's pixels, to the bit, in the order of the patches."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from umarvel_ray.model import resampling

pytest.importorskip("numba")
CORNERS = [
    (256, 340, 252, 336),
    (480, 640, 420, 560),
    (340, 256, 336, 252),
    (300, 252, 280, 252),  # one side stays
    (252, 300, 252, 280),
    (128, 129, 28, 28),
    (130, 4000, 28, 2240),
    (200, 100, 112, 140),
    (228, 128, 28, 28),  # shorter by exactly twice what it is narrower by
]


def pillow(image: Image.Image, height: int, width: int, patch_size: int) -> np.ndarray:
    """Patches by way of Pillow's resize, pixel by pixel in the towers' order."""
    pixels = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))
    unit = 2 * patch_size
    shape = (height // unit, 2, patch_size, width // unit, 2, patch_size, 3)
    return pixels.reshape(shape).transpose(0, 3, 1, 4, 6, 2, 5).reshape(-1, 3 * patch_size**2)


def noise(rng: np.random.Generator, height: int, width: int) -> Image.Image:
    """Black and white beside all else: sums leave the bytes on both sides."""
    pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    pixels[rng.random((height, width)) < 0.4] = 255
    pixels[rng.random((height, width)) < 0.4] = 0
    return Image.fromarray(pixels)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows with each call of the kernel."""
    calls: list[int] = []
    kernel = resampling._kernel()
    assert kernel is not None, "this Pillow computes otherwise"

    def call(*arrays: np.ndarray) -> None:
        calls.append(1)
        kernel(*arrays)

    monkeypatch.setattr(resampling, "_kernel", lambda: call)
    return calls


def test_the_kernel_gives_pillows_pixels(counted):
    rng = np.random.default_rng(0)
    drawn = [(*rng.integers(60, 500, 2).tolist(), *(28 * rng.integers(1, 15, 2)).tolist()) for _ in range(60)]
    for old_height, old_width, height, width in CORNERS + drawn:
        image = noise(rng, old_height, old_width)
        found = resampling.resized_patches(image, height, width, patch_size=14, merge_size=2)
        assert np.array_equal(found, pillow(image, height, width, 14)), (old_height, old_width, height, width)
    assert len(counted) > 30


def test_patches_of_another_size(counted):
    image = noise(np.random.default_rng(1), 280, 400)
    found = resampling.resized_patches(image, 256, 384, patch_size=16, merge_size=2)
    assert counted and np.array_equal(found, pillow(image, 256, 384, 16))


def test_small_pictures_and_those_that_fit_are_left_to_pillow(counted):
    rng = np.random.default_rng(2)
    for old_height, old_width, height, width in [(100, 100, 56, 56), (252, 336, 252, 336)]:
        image = noise(rng, old_height, old_width)
        found = resampling.resized_patches(image, height, width, patch_size=14, merge_size=2)
        assert np.array_equal(found, pillow(image, height, width, 14))
    assert not counted


@pytest.mark.parametrize("fault", [ImportError("no such module"), RuntimeError("no locator available")])
def test_without_numba_pillow_resizes(monkeypatch, fault):
    def njit(**options):
        raise fault

    monkeypatch.delitem(sys.modules, "umarvel_ray.model.resampling_kernel", raising=False)
    monkeypatch.setitem(sys.modules, "numba", SimpleNamespace(njit=njit))
    assert resampling._kernel.__wrapped__() is None


def test_a_pillow_that_computes_otherwise_is_believed(monkeypatch):
    """One bit off in one pixel of its resize, and the kernel is not used."""
    resize = Image.Image.resize

    def off(self, size, *rest):
        pixels = np.array(resize(self, size, *rest))
        pixels[-1, -1, -1] ^= 1
        return Image.fromarray(pixels)

    assert resampling._kernel.__wrapped__() is not None
    monkeypatch.setattr(Image.Image, "resize", off)
    assert resampling._kernel.__wrapped__() is None
