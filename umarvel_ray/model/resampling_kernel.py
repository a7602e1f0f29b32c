"""The loop of `resampling.py`, compiled on its first call and kept on disk; needs Numba.

Sums are of integers, so their order does not matter: vector instructions give Pillow's pixels.
"""

import numpy as np
from numba import njit

from umarvel_ray.model.resampling import FRACTION_BITS

_ROWS = 32
"""Lines that are resized along their length together: they are the lanes of the vectors."""
_LANES = 3 * _ROWS
_HALF = np.int32(1 << (FRACTION_BITS - 1))
_SHIFT = np.int32(FRACTION_BITS)
_LEAST, _MOST = np.int32(0), np.int32(255)


@njit(nogil=True, cache=True)
def resample(picture, first_row, row_weights, first_column, column_weights, bands):
    """Fill `bands` with the resized picture: first along the lines, then across, as Pillow does.

    Weights are taken two at a time, so that sums are stored half as often, and out of their arrays before the
    loop: for all the compiler knows, storing a sum changes them. Loops are written out rather than put into
    functions: it has to see that lanes are a constant number.

    Args:
        picture: uint8 (old height, old width, 3).
        first_row, row_weights, first_column, column_weights: As `resampling._weights` gives them.
        bands: uint8 (3, height, width), to be filled.
    """
    old_height, old_width, _ = picture.shape
    width, num_taps = column_weights.shape
    # Weights beyond the last pixel or line are zero; what they count has to be there all the same.
    block = np.zeros((old_width + num_taps, _LANES), np.uint8)
    lines = np.zeros((old_height + row_weights.shape[1], 3 * width), np.uint8)
    resized = np.empty((width, _LANES), np.uint8)
    sums = np.empty(_LANES, np.int32)
    for start in range(0, old_height, _ROWS):
        num = min(_ROWS, old_height - start)
        for row in range(num):
            old_line = picture[start + row]
            for x in range(old_width):
                block[x, row] = old_line[x, 0]
                block[x, _ROWS + row] = old_line[x, 1]
                block[x, 2 * _ROWS + row] = old_line[x, 2]
        for x in range(width):
            place, weights, pixels = first_column[x], column_weights[x], resized[x]
            for i in range(_LANES):
                sums[i] = _HALF
            for tap in range(0, num_taps, 2):
                first, second = block[place + tap], block[place + tap + 1]
                a, b = weights[tap], weights[tap + 1]
                for i in range(_LANES):
                    sums[i] += a * np.int32(first[i]) + b * np.int32(second[i])
            for i in range(_LANES):
                pixels[i] = min(max(sums[i] >> _SHIFT, _LEAST), _MOST)
        for row in range(num):
            line = lines[start + row]
            for channel in range(3):
                for x in range(width):
                    line[channel * width + x] = resized[x, channel * _ROWS + row]

    sums = np.empty(3 * width, np.int32)
    for y in range(len(first_row)):
        place, weights = first_row[y], row_weights[y]
        for i in range(3 * width):
            sums[i] = _HALF
        for tap in range(0, row_weights.shape[1], 2):
            first, second = lines[place + tap], lines[place + tap + 1]
            a, b = weights[tap], weights[tap + 1]
            for i in range(3 * width):
                sums[i] += a * np.int32(first[i]) + b * np.int32(second[i])
        for channel in range(3):
            pixels, part = bands[channel, y], sums[channel * width : (channel + 1) * width]
            for x in range(width):
                pixels[x] = min(max(part[x] >> _SHIFT, _LEAST), _MOST)
