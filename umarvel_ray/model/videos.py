"""Video file → evenly spread frames → uint8 patches; needs the extra `video`."""

import math
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image

from umarvel_ray.errors import DataError
from umarvel_ray.model.images import Grid, resized_size
from umarvel_ray.model.resampling import resized_patches
from umarvel_ray.model.settings import VideoSettings


def frame_numbers(num_frames: int, frames_per_second: float, settings: VideoSettings) -> list[int]:
    """Which frames are read: an even number of them, spread evenly from the first to the last.

    A clip of fewer frames than that gives some of them twice.
    """
    num = num_frames / frames_per_second * settings.frames_per_second
    num = min(max(num, settings.min_frames), settings.max_frames, max(num_frames, 2))
    num = max(2, math.floor(num / 2) * 2)
    return np.linspace(0, num_frames - 1, num).round().astype(int).tolist()


def load_video(
    path: str, settings: VideoSettings, *, patch_size: int = 14, merge_size: int = 2
) -> tuple[np.ndarray, Grid, list[float]]:
    """Decode, sample, resize (bicubic) and cut a video.

    Returns:
        uint8 patches (P, 3·2·patch²), two frames in each; the grid (pairs of frames, height, width) in
        patches; and the time of each pair in seconds from the start, halfway between its frames.

    Raises:
        DataError: The file is missing or broken, or holds no frame.
    """
    frames, times = _read_frames(path, settings)
    height, width = frames[0].height, frames[0].width
    budget = settings.total_pixels / len(frames) * 2
    max_pixels = max(min(settings.max_pixels, int(budget)), int(settings.min_pixels * 1.05))
    unit = patch_size * merge_size
    try:
        height, width = resized_size(
            height, width, min_pixels=settings.min_pixels, max_pixels=max_pixels, unit=unit
        )
    except DataError as error:
        raise DataError(f"{path}: {error}. Crop it or leave the record out.") from None
    cut = [
        resized_patches(frame, height, width, patch_size=patch_size, merge_size=merge_size)
        for frame in frames
    ]
    area = patch_size * patch_size
    pairs = [
        np.stack([first.reshape(-1, 3, area), second.reshape(-1, 3, area)], axis=2).reshape(len(first), -1)
        for first, second in zip(cut[::2], cut[1::2], strict=True)
    ]
    grid = (len(pairs), height // patch_size, width // patch_size)
    middles = [(first + second) / 2 for first, second in zip(times[::2], times[1::2], strict=True)]
    return np.concatenate(pairs), grid, middles


def _read_frames(path: str, settings: VideoSettings) -> tuple[list[Image.Image], list[float]]:
    try:
        import av
        from av.error import FFmpegError
    except ImportError:
        raise DataError(f"{path}: reading videos needs PyAV. pip install 'umarvel-ray[video]'.") from None
    if not Path(path).exists():
        raise DataError(f"{path}: no such video. Put the file there or correct the record.")
    try:
        with av.open(path) as container:
            if not container.streams.video:
                raise DataError(f"{path}: holds no video. Replace the file.")
            stream = container.streams.video[0]
            rate = float(stream.average_rate or stream.guessed_rate or Fraction(25))
            # Counted by decoding: what a container claims of its length is often wrong.
            num = sum(1 for _ in container.decode(stream))
        if not num:
            raise DataError(f"{path}: holds no frame. Replace the file.")
        numbers = frame_numbers(num, rate, settings)
        wanted = set(numbers)
        with av.open(path) as container:
            kept = {
                number: frame.to_image()
                for number, frame in enumerate(container.decode(container.streams.video[0]))
                if number in wanted
            }
    except FFmpegError as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{path}: not a whole video ({reason}). Replace the file.") from None
    return [kept[number] for number in numbers], [number / rate for number in numbers]
