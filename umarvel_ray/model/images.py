"""Image file → uint8 patches in the order of the Qwen vision towers; normalised on the device."""

import math
import warnings
from functools import lru_cache

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from umarvel_ray.errors import DataError
from umarvel_ray.model.settings import ImageSettings

_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)
MAX_ASPECT_RATIO = 200
MAX_SOURCE_PIXELS = 200_000_000
"""A file that claims more is refused before it is decoded."""


def resized_size(height: int, width: int, settings: ImageSettings) -> tuple[int, int]:
    """Size in pixels to which an image is resized: multiples of the unit, the area within the bounds.

    Rounds half to even; over the cap it scales down and floors, under the minimum it scales up and ceils; a
    side is never less than one unit, and then the other is cut so that the cap holds.

    Raises:
        DataError: One side is more than 200 times the other.
    """
    unit = settings.unit
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise DataError(
            f"an image of {width}×{height} pixels is more than {MAX_ASPECT_RATIO} times as long as wide"
        )
    new_height, new_width = (round(side / unit) * unit for side in (height, width))
    if new_height * new_width > settings.max_pixels:
        shrink = math.sqrt(height * width / settings.max_pixels)
        longest = settings.max_pixels // unit**2 * unit  # beside a side of one unit
        new_height, new_width = (
            min(longest, max(unit, math.floor(side / shrink / unit) * unit)) for side in (height, width)
        )
    elif new_height * new_width < settings.min_pixels:
        grow = math.sqrt(settings.min_pixels / (height * width))
        new_height, new_width = (math.ceil(side * grow / unit) * unit for side in (height, width))
    return new_height, new_width


def open_image(path: str) -> Image.Image:
    """Decode a file to RGB.

    Raises:
        DataError: The file is missing, broken, truncated or too large.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                if image.width * image.height > MAX_SOURCE_PIXELS:
                    raise DataError(
                        f"{path}: {image.width}×{image.height} pixels are more than {MAX_SOURCE_PIXELS:,}. "
                        "Scale it down."
                    )
                return image.convert("RGB")
    except FileNotFoundError:
        raise DataError(f"{path}: no such image. Put the file there or correct the record.") from None
    except UnidentifiedImageError:
        raise DataError(f"{path}: not an image of a known kind. Replace the file.") from None
    except DataError:
        raise
    except (OSError, Image.DecompressionBombError, SyntaxError, ValueError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise DataError(f"{path}: not a whole image ({reason}). Replace the file.") from None


def load_patches(path: str, settings: ImageSettings) -> tuple[np.ndarray, tuple[int, int]]:
    """Read, resize (bicubic) and cut an image.

    Returns:
        uint8 patches (P, 3·patch²), the four patches of each image token together, and the grid
        (height, width) in patches.
    """
    image = open_image(path)
    try:
        height, width = resized_size(image.height, image.width, settings)
    except DataError as error:
        raise DataError(f"{path}: {error}. Crop it or leave the record out.") from None
    if (image.height, image.width) != (height, width):
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    patch, merge = settings.patch_size, settings.merge_size
    pixels = np.asarray(image).reshape(
        height // settings.unit, merge, patch, width // settings.unit, merge, patch, 3
    )
    patches = np.ascontiguousarray(pixels.transpose(0, 3, 1, 4, 6, 2, 5)).reshape(-1, 3 * patch * patch)
    return patches, (height // patch, width // patch)


@lru_cache(maxsize=8)
@torch.inference_mode(False)  # what is kept serves training too, whoever asks first
def _scale_and_shift(patch_pixels: int, device: torch.device) -> tuple[Tensor, Tensor]:
    std = torch.tensor(_STD, device=device).repeat_interleave(patch_pixels)
    mean = torch.tensor(_MEAN, device=device).repeat_interleave(patch_pixels)
    return 1 / (255 * std), mean / std


def normalise_patches(patches_P: Tensor, *, temporal: int) -> Tensor:
    """uint8 (P, 3·patch²) → float32 (P, 3·temporal·patch²), by CLIP's mean and deviation.

    A still image fills every frame.
    """
    patch_pixels = patches_P.shape[1] // 3
    scale, shift = _scale_and_shift(patch_pixels, patches_P.device)
    pixels = patches_P.float() * scale - shift
    return pixels.view(-1, 3, 1, patch_pixels).expand(-1, 3, temporal, patch_pixels).reshape(len(pixels), -1)
