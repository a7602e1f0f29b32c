"""Figures that others published on M-BEIR, to stand beside measured ones, always marked as published.

Source: U-MARVEL, arXiv:2507.14902, Tables 7 (local pools), 13 (stages) and 14 (global pools): hit@5, hit@10
for the three fashion tasks, in percent. Its Tables 7 and 13 disagree by 0.4 on `mscoco_task0` for the final
model (84.4 and 84.8); both stand as printed.
"""

from dataclasses import dataclass
from typing import Literal

from umarvel_ray.data.mbeir import TASKS


@dataclass(frozen=True)
class PublishedResult:
    """One column of a published table.

    Attributes:
        system: Its name in the paper.
        pool: Which candidates were searched.
        reranked: Whether a reranker scored the first candidates again.
        table: Number of the table in the paper.
        values: Percent, in the order of `TASKS`, which is the paper's.
        mean: Percent, as printed.
    """

    system: str
    pool: Literal["local", "global"]
    reranked: bool
    table: int
    values: tuple[float, ...]
    mean: float

    def of_task(self, name: str) -> float:
        """Percent of one task, by its name."""
        return self.values[[task.name for task in TASKS].index(name)]


# fmt: off
PUBLISHED: tuple[PublishedResult, ...] = (
    PublishedResult("CLIP-L", "local", False, 7, (
        43.3, 61.1, 6.6, 36.2, 43.3, 45.1, 41.3, 79.0, 7.7, 26.1, 24.2, 20.5, 7.0, 13.2, 38.8, 26.4,
    ), 32.5),
    PublishedResult("SigLIP", "local", False, 7, (
        30.1, 75.7, 36.5, 39.8, 27.0, 43.5, 30.8, 88.2, 34.2, 28.9, 29.7, 25.1, 14.4, 22.7, 41.7, 27.4,
    ), 37.2),
    PublishedResult("UniIR-BLIP_FF", "local", False, 7, (
        23.4, 79.7, 26.1, 80.0, 50.9, 79.8, 22.8, 89.9, 28.9, 33.0, 41.0, 22.4, 29.2, 52.2, 55.8, 33.0,
    ), 46.8),
    PublishedResult("UniIR-CLIP_SF", "local", False, 7, (
        42.6, 81.1, 18.0, 84.7, 59.4, 78.7, 43.1, 92.3, 18.3, 32.0, 45.5, 27.9, 24.4, 44.6, 67.6, 48.9,
    ), 50.6),
    PublishedResult("LamRA-Ret", "local", False, 7, (
        41.6, 81.5, 28.7, 86.0, 62.6, 81.2, 39.6, 90.6, 30.4, 32.1, 54.1, 52.1, 33.2, 53.1, 76.2, 63.3,
    ), 56.6),
    PublishedResult("U-MARVEL", "local", False, 7, (
        47.3, 84.4, 33.6, 97.1, 78.8, 88.5, 47.3, 93.5, 35.1, 34.2, 62.5, 58.3, 36.4, 60.7, 79.4, 74.7,
    ), 63.2),
    PublishedResult("LamRA", "local", True, 7, (
        48.0, 85.2, 32.9, 96.7, 75.8, 87.7, 48.6, 92.3, 36.1, 33.5, 59.2, 64.1, 37.8, 63.3, 79.2, 78.3,
    ), 63.7),
    PublishedResult("U-MARVEL+", "local", True, 7, (
        49.4, 85.6, 34.2, 98.5, 81.4, 89.4, 50.5, 88.4, 37.7, 34.7, 63.7, 62.9, 38.2, 63.2, 80.8, 78.9,
    ), 64.8),
    PublishedResult("U-MARVEL, progressive transition", "local", False, 13, (
        46.4, 84.0, 34.4, 92.4, 65.6, 84.6, 45.7, 93.3, 35.4, 31.4, 56.5, 55.1, 35.4, 58.7, 78.0, 72.7,
    ), 60.6),
    PublishedResult("U-MARVEL, hard-negative mining", "local", False, 13, (
        47.5, 83.6, 35.6, 95.2, 72.9, 86.9, 47.9, 93.1, 35.6, 33.0, 58.9, 52.2, 34.8, 57.2, 80.8, 72.3,
    ), 61.7),
    PublishedResult("U-MARVEL, distillation", "local", False, 13, (
        47.3, 84.8, 33.6, 97.1, 78.8, 88.5, 47.3, 93.5, 35.1, 34.2, 62.5, 58.3, 36.4, 60.7, 79.4, 74.7,
    ), 63.2),
    PublishedResult("U-MARVEL, progressive transition", "global", False, 13, (
        46.3, 77.3, 34.3, 92.2, 65.4, 83.8, 45.4, 93.2, 35.3, 31.4, 51.3, 50.8, 35.3, 55.9, 71.9, 68.5,
    ), 58.7),
    PublishedResult("U-MARVEL, hard-negative mining", "global", False, 13, (
        47.5, 79.4, 35.4, 95.0, 72.9, 86.6, 47.8, 93.1, 35.6, 33.0, 52.2, 47.5, 34.7, 55.2, 73.8, 68.7,
    ), 59.9),
    PublishedResult("U-MARVEL, distillation", "global", False, 13, (
        47.2, 72.8, 33.3, 96.7, 78.7, 87.7, 47.2, 93.5, 34.9, 34.0, 58.3, 52.2, 36.0, 56.0, 73.1, 69.2,
    ), 60.7),
    PublishedResult("UniIR-BLIP_FF", "global", False, 14, (
        23.0, 75.6, 25.4, 79.5, 50.3, 79.7, 21.1, 88.8, 27.6, 33.0, 38.7, 19.7, 28.5, 51.4, 57.8, 27.7,
    ), 45.5),
    PublishedResult("UniIR-CLIP_SF", "global", False, 14, (
        42.6, 77.9, 17.8, 84.7, 59.4, 78.8, 42.8, 92.3, 17.9, 32.0, 39.2, 24.0, 24.3, 43.9, 60.2, 44.6,
    ), 48.9),
    PublishedResult("MM-Embed", "global", False, 14, (
        41.0, 71.3, 17.1, 95.9, 68.8, 85.0, 41.3, 90.1, 18.4, 32.4, 42.1, 42.3, 25.7, 50.0, 64.1, 57.7,
    ), 52.7),
    PublishedResult("LamRA-Ret", "global", False, 14, (
        41.3, 75.4, 28.7, 85.8, 62.5, 81.0, 39.3, 90.4, 30.4, 32.1, 48.4, 48.7, 33.1, 50.5, 70.0, 60.0,
    ), 54.9),
    PublishedResult("U-MARVEL", "global", False, 14, (
        47.2, 72.8, 33.3, 96.7, 78.7, 87.7, 47.2, 93.5, 34.9, 34.0, 58.3, 52.2, 36.0, 56.0, 73.1, 69.2,
    ), 60.7),
    PublishedResult("LamRA", "global", True, 14, (
        46.9, 78.0, 32.5, 96.5, 74.4, 87.1, 47.6, 92.4, 36.6, 34.2, 54.0, 58.7, 37.4, 59.7, 72.6, 74.0,
    ), 61.4),
    PublishedResult("U-MARVEL+", "global", True, 14, (
        48.8, 70.1, 33.8, 98.3, 80.8, 88.3, 49.8, 86.0, 36.8, 34.8, 58.7, 56.9, 37.4, 58.4, 74.9, 73.8,
    ), 61.8),
)
# fmt: on
