"""What is embedded, searched, mined and re-scored. Importing this loads no torch."""

from pathlib import Path
from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from umarvel_ray.config import Config, PathSetting
from umarvel_ray.data.sources import InstructionChoice
from umarvel_ray.model.settings import DtypeName
from umarvel_ray.model.systems import OurSystem, System

Split = Literal["train", "val", "test"]
Scope = Literal["local", "global"]


def run_path(folder: str | Path, split: str, task: str, scope: str) -> Path:
    """Where a search or scoring job keeps the run of a task."""
    return Path(folder) / split / f"{task}.{scope}.arrow"


class EmbedConfig(Config):
    """Settings of one embedding job."""

    checkpoint: PathSetting
    model: System = OurSystem()
    """Whose model it is, and how it embeds what it was not made for."""
    output: PathSetting
    root: PathSetting
    """M-BEIR's."""
    splits: tuple[Split, ...] = ("test",)
    tasks: tuple[str, ...] | None = None
    """Tasks by name; all that the split has by default."""
    instruction: InstructionChoice = "first"
    seed: NonNegativeInt = 0
    """Of a seeded instruction choice."""
    rows_per_shard: PositiveInt = 8192
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    """Of the stored vectors."""
    compute_dtype: DtypeName = "float32"
    max_tokens: PositiveInt = 8192
    """Token budget of a micro-batch."""


class SearchRequest(Config):
    """Query sets to search for."""

    split: Split
    scopes: tuple[Scope, ...] = ("local", "global")
    depth: PositiveInt = 100
    """Hits kept per query."""


class SearchConfig(Config):
    """Settings of one search job."""

    embeddings: PathSetting
    """Folder of an embedding job; its queries and pools."""
    output: PathSetting
    root: PathSetting
    """M-BEIR's."""
    requests: tuple[SearchRequest, ...]
    tasks: tuple[str, ...] | None = None
    query_block_rows: PositiveInt = 1024


class RerankRequest(Config):
    """Lists to re-score."""

    split: Split
    scopes: tuple[Scope, ...] = ("local",)
    depth: PositiveInt = 50
    """Hits scored per query, best first."""
    share: float = Field(default=1.0, gt=0, le=1)
    """Of the queries, the same share of each task, drawn by the seed."""


class RerankConfig(Config):
    """Settings of one scoring job."""

    checkpoint: PathSetting
    output: PathSetting
    root: PathSetting
    runs: PathSetting
    """Folder of a search: `{split}/{task}.{scope}.arrow`."""
    requests: tuple[RerankRequest, ...]
    tasks: tuple[str, ...] | None = None
    seed: NonNegativeInt
    alpha: float | Literal["tune"] | None = Field(default="tune")
    """Weight of the recall score in `alpha·recall + (1 − alpha)·P(Yes)`. `tune`: best on the val request."""
    alpha_from: PathSetting | None = None
    """Take alpha from another scoring job's folder instead."""
    instruction: InstructionChoice = "first"
    queries_per_shard: PositiveInt = 64
    max_tokens: PositiveInt = 8192
    compute_dtype: DtypeName = "float32"
