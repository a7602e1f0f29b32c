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


@dataclass(frozen=True)
class PublishedSet:
    """One row of the zero-shot tables.

    Attributes:
        part: Our name of it: a part of a set, or a set whose parts are averaged.
        metric: As we name it.
        table: Number of the table in the paper.
        values: Percent by system, in the table's order; None where nothing is printed.
    """

    part: str
    metric: str
    table: int
    values: dict[str, float | None]


_TABLE_8 = (
    "CLIP-L", "UniIR-CLIP_SF", "E5-V", "MagicLens-L", "VLM2Vec", "UniME", "LamRA-Ret", "U-MARVEL", "LamRA",
    "U-MARVEL+",
)  # fmt: skip
_TABLE_9 = (
    "InternVideo", "ViCLIP", "UMT-L", "InternVideo2-6B", "VLM2Vec", "LamRA", "LLaVE-7B", "U-MARVEL",
    "U-MARVEL+",
)  # fmt: skip


def _row(part: str, metric: str, table: int, *values: float | None) -> PublishedSet:
    systems = _TABLE_8 if table == 8 else _TABLE_9
    return PublishedSet(part, metric, table, dict(zip(systems, values, strict=True)))


# fmt: off
PUBLISHED_SETS: tuple[PublishedSet, ...] = (
    _row("sharegpt4v: text → image", "hit@1", 8, 84.0, 85.8, 86.7, 85.5, 90.7, 97.2, 93.3, 96.4, 97.9, 97.8),
    _row("urban1k: text → image", "hit@1", 8, 52.8, 75.0, 84.0, 59.3, 90.8, 95.9, 95.1, 96.7, 98.8, 97.7),
    _row("flickr30k: text → image", "hit@1", 8, 67.3, 78.7, 79.5, 72.5, 76.0, 81.9, 82.8, 85.4, 88.1, 88.5),
    _row("sharegpt4v: image → text", "hit@1", 8, 81.8, 84.1, 84.0, 60.9, 85.8, 93.9, 88.1, 97.2, 96.5, 98.9),
    _row("urban1k: image → text", "hit@1", 8, 68.7, 78.4, 82.4, 24.2, 84.7, 95.2, 94.3, 93.5, 98.0, 98.2),
    _row("flickr30k: image → text", "hit@1", 8, 87.2, 94.2, 88.2, 84.6, 90.6, 93.4, 92.7, 93.3, 97.6, 95.1),
    _row("circo", "map@5", 8, 4.0, 12.5, 24.8, 29.6, None, None, 33.2, 36.2, 42.8, 46.0),
    _row("genecis", "hit@1", 8, 13.3, 16.8, 18.5, 16.3, None, None, 18.9, 19.1, 24.8, 22.6),
    _row("visdial", "hit@1", 8, 23.7, 26.8, 54.6, 28.0, None, None, 62.8, 70.3, 70.9, 77.6),
    _row("mt_fashioniq", "hit@5", 8, 17.7, 39.4, 19.2, 22.6, None, None, 60.9, 65.7, 63.9, 66.3),
    _row("ccneg", "hit@1", 8, 66.7, 79.9, 83.2, 62.7, None, None, 79.6, 84.5, 85.9, 86.1),
    _row("sugarcrepe", "hit@1", 8, 73.0, 80.3, 84.7, 75.9, 79.5, 85.0, 85.8, 87.9, 93.5, 93.4),
    _row("msrvtt", "hit@1", 9, 40.0, 42.4, 42.6, 55.9, 43.5, 44.7, 46.8, 47.2, 47.5),
    _row("msrvtt", "hit@5", 9, 65.3, None, 64.4, 78.3, 69.3, 68.6, 71.1, 72.0, 69.7),
    _row("msrvtt", "hit@10", 9, 74.1, None, 73.1, 85.1, 78.9, 78.6, 80.0, 80.2, 78.5),
    _row("msvd", "hit@1", 9, 43.4, 49.1, 49.9, 59.3, 49.5, 52.4, 52.9, 54.6, 53.1),
    _row("msvd", "hit@5", 9, 69.9, None, 77.7, 84.4, 77.5, 79.8, 80.1, 80.9, 79.9),
    _row("msvd", "hit@10", 9, 79.1, None, 85.3, 89.6, 85.7, 87.0, 87.0, 87.7, 87.1),
)
# fmt: on
"""Tables 8 (images and text) and 9 (videos). CIRCO's are of its test server, by the 800 queries of Table
11."""
