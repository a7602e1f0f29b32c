"""What is embedded, searched, mined and re-scored. Importing this loads no torch."""

import os
from typing import Annotated, Any, Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt, ValidationError, model_validator

from umarvel_ray.config import Config, PathSetting
from umarvel_ray.data.sources import InstructionChoice
from umarvel_ray.model.settings import DtypeName
from umarvel_ray.model.systems import OurSystem, System
from umarvel_ray.storage import Place, at

Split = Literal["train", "val", "test"]
Scope = Literal["local", "global"]
SearchBackend = Literal["tiles", "faiss"]
Rule = Literal["none", "max_score", "margin", "relative", "skip_top"]
Pick = Literal["top", "sample", "random"]


def run_path(folder: str | os.PathLike, split: str, task: str, scope: str) -> Place:
    """Where a search or scoring job keeps the run of a task."""
    return at(folder) / split / f"{task}.{scope}.arrow"


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
    pools: tuple[PathSetting, ...] = ()
    """Pool files beside those of the splits, in M-BEIR's lines; their image paths start at `root`."""
    only: tuple[str, ...] | None = None
    """Stores by name, such as `pools/mscoco_task0_test`; all of the above by default."""
    rows_per_shard: PositiveInt = 8192
    """Finished together; what a kill can cost one actor. Shards are fixed ranges of rows."""
    window_rows: PositiveInt = 512
    """Rows read, sorted by length and packed together; bounds memory whatever the shard's size."""
    duplicates: Literal["once", "each"] = "once"
    """Embed equal content (same text, instruction and image bytes) once per store. `each` saves the pass over
    the images that finding it takes."""
    bad_items: Literal["fail", "skip"] = "fail"
    """What a row that cannot be read does: stop the job, or be left out and listed in `errors.jsonl`."""
    max_bad_share: float = Field(default=0.001, ge=0, le=1)
    """Of all rows of the job: with more of them left out it stops."""
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    """Of the stored vectors."""
    compute_dtype: DtypeName = "float32"
    max_tokens: PositiveInt = 8192
    """Token budget of a micro-batch."""
    vision_store: PathSetting | None = None
    """Folder that keeps what the frozen vision tower makes of a picture, by the picture's content, the tower
    and the pixel budget: jobs that share it, of any checkpoint with the same tower, pass each picture once.
    On a file system that all encoders see. Embeddings stay what they are up to rounding."""

    @model_validator(mode="after")
    def _has_a_tower(self) -> Self:
        if self.vision_store is not None and not isinstance(self.model, OurSystem):
            raise ValueError(
                f"vision_store keeps features of our encoder's tower, but model.kind is {self.model.kind!r}: "
                "leave it out"
            )
        return self


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
    query_block_rows: PositiveInt = 8192
    """Queries that pass a pool together, at most: each such block reads the pool once."""
    backend: SearchBackend = "tiles"
    """What multiplies: our tiles, or faiss; the results are the same."""


class RerankRequest(Config):
    """Lists to re-score."""

    split: Split
    scopes: tuple[Scope, ...] = ("local",)
    depth: PositiveInt = 50
    """Hits scored per query, best first."""
    share: float = Field(default=1.0, gt=0, le=1)
    """Of the queries, the same share of each task, drawn by the seed."""


class ListRequest(Config):
    """A run of any origin to re-score."""

    name: str = Field(pattern=r"^[\w.+-]+$")
    """Names its files."""
    run: PathSetting
    """Ours (`.arrow`), or TREC's text form."""
    queries: PathSetting
    """JSONL: M-BEIR's, or lines of qid, txt, img_path and instruction."""
    pools: tuple[PathSetting, ...]
    """JSONL in M-BEIR's form."""
    root: PathSetting
    """The folder at which image paths start."""
    instruction: str | None = None
    """Put before queries whose line has none of its own."""
    split: Split = "test"
    """What these queries are for: alpha is tuned on val alone."""
    qrels: PathSetting | None = None
    """Judgements, to tune alpha on."""
    depth: PositiveInt = 50


RELEASED_WEIGHTS = {"mscoco_task0": 0.5, "mscoco_task3": 0.1}
"""Of P(Yes) in the authors' sum, where it is not 1: MSCOCO text → image, and image → text."""
FusionKind = Literal["alpha", "sum"]
Alpha = Annotated[float, Field(ge=0, le=1)] | Literal["tune"]


class FusionSettings(Config):
    """How recall scores and P(Yes) become one score."""

    fusion: FusionKind = "alpha"
    """`alpha`: α·recall + (1 − α)·P(Yes), the paper's. `sum`: recall + w·P(Yes), the released code's; a
    student is taught half of it."""
    alpha: Alpha | None = "tune"
    """α of `alpha`. `tune`: chosen on the val request."""
    weight: NonNegativeFloat = 1.0
    """w of `sum`."""
    by_task: dict[str, NonNegativeFloat] | None = None
    """α or w of single tasks; for `sum` by default the released ones of MSCOCO, 0.5 and 0.1."""

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        if self.fusion == "sum" and self.alpha not in (None, "tune"):
            raise ValueError(
                f"fusion 'sum' weighs by `weight`, but alpha is {self.alpha!r}: leave alpha out, or take "
                "'alpha'"
            )
        if self.fusion == "alpha" and (wrong := {k: v for k, v in (self.by_task or {}).items() if v > 1}):
            task, value = next(iter(wrong.items()))
            raise ValueError(f"by_task.{task} is {value}: an alpha is at most 1")
        return self


class RerankConfig(FusionSettings):
    """Settings of one scoring job."""

    checkpoint: PathSetting
    output: PathSetting
    root: PathSetting | None = None
    """M-BEIR's, for `requests`."""
    runs: PathSetting | None = None
    """Folder of a search, for `requests`: `{split}/{task}.{scope}.arrow`."""
    requests: tuple[RerankRequest, ...] = ()
    lists: tuple[ListRequest, ...] = ()
    """Runs of any origin, beside M-BEIR's or alone."""
    tasks: tuple[str, ...] | None = None
    seed: NonNegativeInt
    alpha_from: PathSetting | None = None
    """Take alpha from another scoring job's folder instead."""
    instruction: InstructionChoice = "first"
    queries_per_shard: PositiveInt = 64
    max_tokens: PositiveInt = 8192
    compute_dtype: DtypeName = "float32"
    backend: Literal["tree", "vllm"] = "tree"
    """`tree`: ours. `vllm`: the same pairs through vLLM, where it is installed."""
    picture_bytes: NonNegativeInt = 2**30
    """Memory of one actor for pictures as the vision tower saw them."""
    readers: PositiveInt = 2
    """Threads of one actor that read pictures and words ahead of the model."""
    tune_only: bool = False
    """Choose alpha and stop: no test split may be among the requests. What `umarvel rerank --tune` sets."""

    @property
    def weights_by_task(self) -> dict[str, float]:
        """α or w of single tasks."""
        return (RELEASED_WEIGHTS if self.fusion == "sum" else {}) if self.by_task is None else self.by_task

    @property
    def tunes(self) -> bool:
        """Whether alpha is to be chosen here."""
        return self.fusion == "alpha" and self.alpha_from is None and self.alpha == "tune"

    @model_validator(mode="after")
    def _something_to_score(self) -> Self:
        if not (self.requests or self.lists):
            raise ValueError("nothing to score: give requests (of a search's folder) or lists (of any run)")
        if self.requests and (self.root is None or self.runs is None):
            raise ValueError("requests are scored from a search's folder: give root and runs")
        return self

    @model_validator(mode="after")
    def _tuned_on_validation(self) -> Self:
        splits = [request.split for request in (*self.requests, *self.lists)]
        if self.tune_only and "test" in splits:
            raise ValueError(
                f"alpha is chosen on validation data, never on test: {splits.count('test')} of {len(splits)} "
                "requests are of the test split. Leave them out, then score test with alpha_from"
            )
        if self.fusion == "alpha" and self.alpha is None and self.alpha_from is None:
            raise ValueError(
                "alpha is null and alpha_from names no job: give a number, 'tune', or alpha_from"
            )
        if self.tune_only and not self.tunes:
            raise ValueError("nothing to tune: fusion, alpha or alpha_from already say how to weigh")
        if self.tunes and "val" not in splits:
            raise ValueError(
                "alpha is tuned on validation data, but no request is of the val split: add one, or give "
                "alpha or alpha_from"
            )
        for one in self.lists:
            if self.tunes and one.split == "val" and one.qrels is None:
                raise ValueError(f"lists.{one.name}: alpha is tuned on it, so it needs qrels")
        return self


class TaskPolicy(Config):
    """What `MiningConfig` says, otherwise for one task; what is not given stays. A word is its `pick`."""

    rule: Rule | None = None
    value: NonNegativeFloat | None = None
    depth: PositiveInt | None = None
    num_negatives: PositiveInt | None = None
    pick: Pick | None = None
    window: PositiveInt | None = None
    short: Literal["fewer", "random"] | None = None

    @model_validator(mode="before")
    @classmethod
    def _of_a_word(cls, value: Any) -> Any:
        return {"pick": value} if isinstance(value, str) else value


class MiningConfig(Config):
    """How a run becomes hard negatives."""

    rule: Rule
    """Which hits are taken for false negatives and dropped. `max_score`: cosine above `value`. `margin`: less
    than `value` below the best positive's cosine. `relative`: above `value` times the best positive's.
    `skip_top`: the first `value` hits, positives not counted. `none`: none."""
    value: NonNegativeFloat | None = None
    """The rule's number: a cosine, a share, or a count of ranks. The paper does not publish its own."""
    depth: PositiveInt = 100
    """Hits looked at per query, best first."""
    num_negatives: PositiveInt = 5
    """Hard negatives kept per query."""
    pick: Pick = "top"
    """Of the hits that are left: the first; a seeded draw among the first `window`; or any of the pool."""
    window: PositiveInt | None = None
    """For `sample`: how many hits to draw from; all that are left by default."""
    short: Literal["fewer", "random"] = "fewer"
    """A query with too few hits left gets fewer, or is filled up from the pool by a seeded draw."""
    by_task: dict[str, TaskPolicy] = Field(default_factory=dict)
    """What is otherwise for single tasks: a `pick`, or any of the settings above."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.depth < self.num_negatives:
            raise ValueError(
                f"depth is {self.depth} but num_negatives is {self.num_negatives}: no query could get "
                "enough. Raise depth or ask for fewer negatives."
            )
        if (self.rule == "none") != (self.value is None):
            raise ValueError(
                f"rule {self.rule!r} takes no value. Remove value."
                if self.rule == "none"
                else f"rule {self.rule!r} needs its number. Give value."
            )
        if self.rule in ("max_score", "relative") and self.value is not None and self.value > 1:
            raise ValueError(
                f"rule {self.rule!r} compares cosines: value {self.value} is above 1. Give at most 1."
            )
        if self.rule == "skip_top" and self.value != int(self.value or 0):
            raise ValueError(f"rule 'skip_top' counts ranks: value {self.value} is no whole number.")
        if self.window is not None and self.window < self.num_negatives:
            raise ValueError(
                f"window is {self.window} but num_negatives is {self.num_negatives}: no draw could be "
                "enough. Widen the window."
            )
        for task in self.by_task:
            self.for_task(task)
        return self

    def for_task(self, task: str) -> "MiningConfig":
        """The settings of one task, nothing left by task.

        Raises:
            ValueError: Together they are nonsense.
        """
        changes = self.by_task.get(task, TaskPolicy()).model_dump(exclude_none=True)
        if changes.get("rule") == "none":
            changes.setdefault("value", None)
        try:
            return MiningConfig.model_validate({**self.model_dump(), "by_task": {}, **changes})
        except ValidationError as error:
            raise ValueError(f"by_task.{task}: {error.errors()[0]['msg']}") from None
