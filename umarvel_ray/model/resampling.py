"""Picture → uint8 patches at another size: Pillow's bicubic filter to the bit, and the cut into patches.

With Numba (extra `compiled`) the filter runs in vector instructions; without it, and for pictures too small
to matter, Pillow resizes.
"""

import math
import operator
from collections.abc import Callable, Sequence
from functools import lru_cache, reduce
from typing import Any

import numpy as np
from PIL import Image

FRACTION_BITS = 22
"""Of Pillow's weights, which are integers: 32 bits less 8 of a pixel and 2 of headroom."""
_LEAST_PIXELS = 128 * 128
"""Below, a picture takes less time than a call of the kernel is worth, and a process of such pictures alone
never loads it."""
_TRIALS = ((60, 90, 28, 56), (40, 50, 84, 112), (50, 90, 56, 84), (68, 48, 28, 28))
"""Old and new heights and widths on which the kernel has to agree with Pillow before it is used."""


def resized_patches(
    image: Image.Image, height: int, width: int, *, patch_size: int, merge_size: int
) -> np.ndarray:
    """Resize an RGB image (bicubic) and cut it.

    Args:
        image: Of any size.
        height, width: In pixels, multiples of patch_size · merge_size.

    Returns:
        uint8 patches (P, 3·patch²), those of one image token together.
    """
    suits_kernel = image.height * image.width >= _LEAST_PIXELS and _goes_along_first(image, height, width)
    if (image.height, image.width) == (height, width):
        bands = _bands(image)
    elif suits_kernel and (resample := _kernel()) is not None:
        bands = _resampled(resample, image, height, width)
    else:
        bands = _bands(image.resize((width, height), Image.Resampling.BICUBIC))
    unit = patch_size * merge_size
    height, width = height // unit, width // unit
    run = np.dtype((np.void, patch_size))  # a patch's part of a line of one band, copied as a whole
    patches = np.empty((height, width, merge_size, merge_size, 3, patch_size), dtype=run)
    for channel, band in enumerate(bands):
        lines = band.view(run).reshape(height, merge_size, patch_size, width, merge_size)
        patches[..., channel, :] = lines.transpose(0, 3, 1, 4, 2)
    return patches.view(np.uint8).reshape(-1, 3 * patch_size * patch_size)


def _goes_along_first(image: Image.Image, height: int, width: int) -> bool:
    """Whether Pillow 13 resizes lines before it resizes columns: it rounds in between, so the order tells in
    the last bit. Only pictures that are much taller than wide begin with their columns."""
    shorter = image.height - height
    return shorter <= 0 or shorter <= 2 * (image.width - width)


def _bands(image: Image.Image) -> Sequence[np.ndarray]:
    """Its red, green and blue, uint8 (height, width) each."""
    return [np.asarray(band) for band in image.split()]


def _resampled(resample: Callable[..., Any], image: Image.Image, height: int, width: int) -> np.ndarray:
    bands = np.empty((3, height, width), dtype=np.uint8)
    resample(np.asarray(image), *_weights(image.height, height), *_weights(image.width, width), bands)
    return bands


@lru_cache(maxsize=1)
def _kernel() -> Callable[..., Any] | None:
    try:
        from umarvel_ray.model.resampling_kernel import resample
    except (ImportError, RuntimeError):
        return None  # no Numba; or no folder where it may keep what it compiles
    # Where a version of Pillow computes otherwise, its own pixels are the ones that count.
    rng = np.random.default_rng(0)
    for old_height, old_width, height, width in _TRIALS:
        image = Image.fromarray(rng.integers(0, 256, (old_height, old_width, 3), dtype=np.uint8))
        expected = _bands(image.resize((width, height), Image.Resampling.BICUBIC))
        if not np.array_equal(_resampled(resample, image, height, width), expected):
            return None
    return resample


@lru_cache(maxsize=1024)
def _weights(old: int, new: int) -> tuple[np.ndarray, np.ndarray]:
    """How `old` pixels of a line become `new` ones, in the arithmetic of Pillow's `precompute_coeffs`.

    Returns:
        uint32 (new,): the first old pixel that counts for each new one; int32 (new, taps): what each of them
        and of its successors counts in 2⁻²²; an even number of taps, the last ones zero.
    """
    step = old / new
    stretch = max(step, 1.0)
    reach = 2.0 * stretch
    first = np.zeros(new, dtype=np.uint32)
    rows = []
    for place in range(new):
        centre = (place + 0.5) * step
        start, stop = max(0, int(centre - reach + 0.5)), min(old, int(centre + reach + 0.5))
        row = [_bicubic((old_place - centre + 0.5) * (1 / stretch)) for old_place in range(start, stop)]
        share = 1 / reduce(operator.add, row)  # not `sum`, which is more exact in newer Pythons than in C
        first[place] = start
        rows.append([_rounded(weight * share * 2**FRACTION_BITS) for weight in row])
    most = max(map(len, rows))
    taps = np.zeros((new, most + most % 2), dtype=np.int32)
    for place, row in enumerate(rows):
        taps[place, : len(row)] = row
    return first, taps


def _rounded(value: float) -> int:
    """To the nearest integer, halves away from zero."""
    return math.floor(value + 0.5) if value >= 0 else math.ceil(value - 0.5)


def _bicubic(x: float) -> float:
    """Keys' cubic convolution, a = −1/2; factored as Pillow does, for the same rounding."""
    x = abs(x)
    if x < 1:
        return (1.5 * x - 2.5) * x * x + 1
    return (((x - 5) * x + 8) * x - 4) * -0.5 if x < 2 else 0.0
