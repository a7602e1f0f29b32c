"""`umarvel bench preprocess`: an image file to what the vision tower takes, on one core.

Ours hands on bytes, which the device normalises; "normalised here" does that on the CPU as well. The peers
are Transformers' slow processor, and the authors' way: resize with Pillow, then the slow processor. Pictures
are JPEGs of quality 90 whose noise has several scales, as photographs have, in sizes that are common in
M-BEIR (256 × 340, 480 × 640) and in one that is not (1080 × 1440).
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from umarvel_ray.bench.harness import Answer, Benchmark, BenchmarkError, Case, Prepared
from umarvel_ray.model.adapters import Qwen2VL
from umarvel_ray.model.images import load_patches, normalise_patches, resized_size
from umarvel_ray.model.settings import ImageSettings

_BUDGET = ImageSettings()
_MEAN, _DEVIATION = Qwen2VL.normalisation


def _photographs(case: Case, folder: Path) -> list[str]:
    rng = np.random.default_rng(0)
    height, width = case["height"], case["width"]
    paths = []
    for number in range(case["images"]):
        pixels = rng.standard_normal((height, width, 3), dtype=np.float32) * 4 + 128
        for scale in (8, 32, 128):
            size = (max(2, height // scale), max(2, width // scale), 3)
            for channel, rough in enumerate(np.moveaxis(rng.standard_normal(size, dtype=np.float32), 2, 0)):
                smooth = Image.fromarray(rough).resize((width, height), Image.Resampling.BICUBIC)
                pixels[..., channel] += 30 * np.asarray(smooth)
        paths.append(str(folder / f"{number}.jpg"))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(paths[-1], quality=90)
    return paths


def _prepare(case: Case, one: Callable[[str], np.ndarray]) -> Prepared:
    folder = tempfile.TemporaryDirectory(prefix="umarvel-photographs-")
    paths = _photographs(case, Path(folder.name))

    def run() -> Answer:
        assert folder.name, "the photographs live as long as this function"
        return {"patches": np.concatenate([one(path) for path in paths])}

    return Prepared(run=run, work=len(paths))


def _ours(path: str) -> np.ndarray:
    return load_patches(path, _BUDGET)[0]


def _normalised(path: str) -> np.ndarray:
    patches = torch.from_numpy(load_patches(path, _BUDGET)[0])
    return normalise_patches(patches, mean=_MEAN, deviation=_DEVIATION).numpy()


def _slow(case: Case) -> Prepared:
    processor = _processor()
    return _prepare(case, lambda path: processor(Image.open(path), return_tensors="np")["pixel_values"])


def _authors(case: Case) -> Prepared:
    processor = _processor()

    def one(path: str) -> np.ndarray:
        image = Image.open(path).convert("RGB")
        height, width = resized_size(
            image.height, image.width, min_pixels=_BUDGET.min_pixels, max_pixels=_BUDGET.max_pixels
        )
        return processor(image.resize((width, height)), return_tensors="np")["pixel_values"]

    return _prepare(case, one)


def _processor() -> Any:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    size = {"shortest_edge": _BUDGET.min_pixels, "longest_edge": _BUDGET.max_pixels}
    return Qwen2VLImageProcessorPil(size=size)


def _compare(case: Case, ours: Answer, other: Answer) -> str:
    patches = torch.from_numpy(ours["patches"])
    expected = normalise_patches(patches, mean=_MEAN, deviation=_DEVIATION).numpy()
    if not np.array_equal(expected, other["patches"]):
        raise BenchmarkError("bench preprocess: pixel values differ; they must be equal to the bit.")
    return "equal to the bit"


def _size(height: int, width: int, images: int) -> dict[str, int]:
    return {"height": height, "width": width, "images": images}


BENCHMARK = Benchmark(
    about="Image files to patches on one core, against Transformers' slow processor",
    unit="images",
    methods={
        "bytes": lambda case: _prepare(case, _ours),
        "normalised here": lambda case: _prepare(case, _normalised),
        "slow processor": _slow,
        "authors": _authors,
    },
    cases={
        "256x340": _size(256, 340, 24),
        "480x640": _size(480, 640, 24),
        "1080x1440": _size(1080, 1440, 8),
        "few": _size(256, 340, 4),
    },
    quick=("few",),
    compare=_compare,
    threads=1,
)
