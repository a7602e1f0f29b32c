"""Image file → uint8 patches in the order of the Qwen vision towers; normalised on the device.

Each picture's pixels are those of Transformers' slow image processor, to the bit. P patches.
"""

import io
import math
import warnings
from functools import lru_cache
from typing import TypeAlias

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from umarvel_ray.errors import DataError
from umarvel_ray.model.resampling import resized_patches
from umarvel_ray.model.settings import ImageSettings
from umarvel_ray.storage import is_remote, picture_bytes

Grid: TypeAlias = tuple[int, int, int]
"""Frames (of a video, in pairs), height and width, in patches."""

MAX_ASPECT_RATIO = 200
MAX_SOURCE_PIXELS = 200_000_000
"""A file that claims more is refused before it is decoded."""


def resized_size(
    height: int, width: int, *, min_pixels: int, max_pixels: int, unit: int = 28
) -> tuple[int, int]:
    """Size in pixels to which an image is resized: multiples of `unit`, the area within the bounds.

    Rounds half to even; over the cap it scales down and floors, under the minimum it scales up and ceils; a
    side is never less than one unit, and then the other is cut so that the cap holds.

    Raises:
        DataError: One side is more than 200 times the other.
    """
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise DataError(
            f"an image of {width}×{height} pixels is more than {MAX_ASPECT_RATIO} times as long as wide"
        )
    new_height, new_width = (round(side / unit) * unit for side in (height, width))
    if new_height * new_width > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        longest = max_pixels // unit**2 * unit  # beside a side of one unit
        new_height, new_width = (
            min(longest, max(unit, math.floor(side / shrink / unit) * unit)) for side in (height, width)
        )
    elif new_height * new_width < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        new_height, new_width = (math.ceil(side * grow / unit) * unit for side in (height, width))
    return new_height, new_width


def open_image(path: str) -> Image.Image:
    """Decode a file to RGB, as it is stored: a camera's note on how to turn it is not followed, and what is
    transparent shows the colour beneath, as in the authors' code.

    Raises:
        DataError: The file is missing, broken, truncated or too large.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            # What a palette says of transparency makes Pillow warn, not fail.
            warnings.simplefilter("ignore", UserWarning)
            with Image.open(io.BytesIO(picture_bytes(path)) if is_remote(path) else path) as image:
                if image.width * image.height > MAX_SOURCE_PIXELS:
                    raise DataError(
                        f"{path}: {image.width}×{image.height} pixels are more than {MAX_SOURCE_PIXELS:,}. "
                        "Scale it down."
                    )
                return _to_rgb(image)
    except FileNotFoundError:
        raise DataError(f"{path}: no such image. Put the file there or correct the record.") from None
    except UnidentifiedImageError:
        raise DataError(f"{path}: not an image of a known kind. Replace the file.") from None
    except DataError:
        raise
    except (OSError, Image.DecompressionBombError, SyntaxError, ValueError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise DataError(f"{path}: not a whole image ({reason}). Replace the file.") from None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # Pillow would clip 16 bits at 255, which leaves white: keep the upper 8 instead.
        values = np.asarray(image)
        top = 65535 if image.mode.startswith("I;16") or values.max(initial=0) > 255 else 255
        eight_bits = (values.clip(0, top).astype(np.float64) * (255 / top)).astype(np.uint8)
        image = Image.fromarray(eight_bits)
    return image.convert("RGB")


def load_patches(
    path: str, settings: ImageSettings, *, patch_size: int = 14, merge_size: int = 2
) -> tuple[np.ndarray, Grid]:
    """Read, resize (bicubic) and cut an image.

    Returns:
        uint8 patches (P, 3·patch²), the four patches of each image token together, and the grid
        (1, height, width) in patches.
    """
    image = open_image(path)
    unit = patch_size * merge_size
    try:
        height, width = resized_size(
            image.height,
            image.width,
            min_pixels=settings.min_pixels,
            max_pixels=settings.max_pixels,
            unit=unit,
        )
    except DataError as error:
        raise DataError(f"{path}: {error}. Crop it or leave the record out.") from None
    patches = resized_patches(image, height, width, patch_size=patch_size, merge_size=merge_size)
    return patches, (1, height // patch_size, width // patch_size)


@lru_cache(maxsize=8)
@torch.inference_mode(False)  # what is kept serves training too, whoever asks first
def _mean_and_deviation(
    mean: tuple[float, ...], deviation: tuple[float, ...], device: torch.device
) -> tuple[Tensor, Tensor]:
    return torch.tensor(mean, device=device).view(3, 1), torch.tensor(deviation, device=device).view(3, 1)


def normalise_patches(
    patches_P: Tensor,
    *,
    mean: tuple[float, ...],
    deviation: tuple[float, ...],
    patch_size: int = 14,
    temporal: int = 2,
) -> Tensor:
    """uint8 (P, 3·patch²) of pictures, or (P, 3·temporal·patch²) of frames → float32 (P, 3·temporal·patch²).

    A still image fills every frame. In the order of operations of the slow image processor, so that values
    are equal to the bit.
    """
    mean_31, deviation_31 = _mean_and_deviation(mean, deviation, patches_P.device)
    area = patch_size * patch_size
    pixels = patches_P.float().view(len(patches_P), 3, -1).div_(255).sub_(mean_31).div_(deviation_31)
    if pixels.shape[2] == area:
        pixels = pixels.view(-1, 3, 1, area).expand(-1, 3, temporal, area)
    return pixels.reshape(len(pixels), -1)
