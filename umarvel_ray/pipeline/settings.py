"""Settings of the jobs that have no room of their own, and of a whole run. Importing this loads no torch."""

from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from umarvel_ray.config import Config, PathSetting
from umarvel_ray.data.sources import EvaluationScope, InstructionChoice
from umarvel_ray.evaluate.compare import CompareInputs
from umarvel_ray.evaluate.report import ReportInputs
from umarvel_ray.model.settings import DtypeName, EncoderSettings, RerankerSettings
from umarvel_ray.model.systems import OurSystem, System
from umarvel_ray.retrieve.settings import FusionSettings, MiningConfig, Scope, Split
from umarvel_ray.runtime.cluster import RuntimeSettings
from umarvel_ray.train.settings import ContrastiveSettings, RerankerTrainSettings, TrainSettings

_DEEPEST_METRIC = 10
"""hit@10 and ndcg@10 are reported of every task."""


class MineConfig(Config):
    """Settings of one mining job: runs of the training queries → hard negatives by qid."""

    search: PathSetting
    """Folder of a search job."""
    embeddings: PathSetting
    """Folder of the embeddings that were searched: the positives' own scores come from there."""
    output: PathSetting
    root: PathSetting
    scope: Scope = "global"
    tasks: tuple[str, ...] | None = None
    mining: MiningConfig
    seed: NonNegativeInt


class OwnData(Config):
    """Anyone's data: two JSONL files and a folder of pictures; see docs/formats.md."""

    queries: PathSetting
    candidates: PathSetting
    images: PathSetting | None = None
    """At which relative picture paths start; each file's own folder by default."""
    instruction: str | None = None
    """For queries that bring none."""
    metrics: tuple[str, ...] = ("hit@5", "hit@1", "hit@10", "recall@5", "ndcg@10", "mrr@10")
    """The first is the headline."""


class ZeroShotData(Config):
    """Published sets that no stage trains on."""

    root: PathSetting
    """Each set's folder lies here as its authors publish it."""
    sets: tuple[str, ...]
    protocol: Literal["direction", "lamra", "umarvel"] = "direction"
    """Whose instructions: each direction its own, or as those projects did."""


class RerankChoice(Config):
    """Recall-then-rerank: the first hits of each query scored again."""

    checkpoint: PathSetting
    depth: PositiveInt = 50
    alpha: Annotated[float, Field(ge=0, le=1)] | None = None
    """Weight of the recall score; choose it on validation data, never on what is evaluated."""
    alpha_from: PathSetting | None = None
    """Folder of a scoring job that tuned alpha on validation data."""

    @model_validator(mode="after")
    def _one_alpha(self) -> Self:
        if (self.alpha is None) == (self.alpha_from is None):
            raise ValueError("give either alpha or alpha_from, not both and not neither")
        return self


class EvaluateConfig(Config):
    """Settings of one evaluation job: a model, stored vectors or runs → `results.json`.

    What is evaluated is M-BEIR (`root`), `own` data or zero-shot `zeroshot` sets; from finished `runs`, from
    stored
    `embeddings`, from `vectors` that others computed, or, with none of these, by embedding with `checkpoint`.
    """

    stage: str
    """What the column is called."""
    checkpoint: PathSetting | None = None
    """Whose runs or vectors these are; named in the results. Needed to embed."""
    model: System = OurSystem()
    """Whose model the checkpoint is."""
    runs: PathSetting | None = None
    """Folder of a search or scoring job on M-BEIR."""
    embeddings: PathSetting | None = None
    """Folder of an embedding job."""
    vectors: PathSetting | None = None
    """Folder of `.npy` matrices with their ids beside them, named as UniIR or as our stores are."""
    output: PathSetting
    root: PathSetting | None = None
    """M-BEIR's."""
    own: OwnData | None = None
    zeroshot: ZeroShotData | None = None
    split: Split = "test"
    scopes: tuple[EvaluationScope, ...] = ("local", "global")
    tasks: tuple[str, ...] | None = None
    instruction: InstructionChoice | Literal["all"] = "first"
    """Of M-BEIR's queries: the row's first, one drawn per query, the one of this number, or the mean over
    all."""
    seed: NonNegativeInt = 0
    """Of drawn instructions."""
    depth: PositiveInt = 100
    """Hits kept per query."""
    copies: bool = True
    """Look at the content of what missing queries found: was it a copy of a right candidate?"""
    export: tuple[Literal["uniir", "candidates", "complements"], ...] = ()
    """Write run files and tables as UniIR does; retrieved candidates as UniRAG reads them; for the first of
    each query the nearest of the other modality too."""
    rerank: RerankChoice | None = None
    rows_per_shard: PositiveInt = 8192
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    compute_dtype: DtypeName = "float32"
    max_tokens: PositiveInt = 8192

    @model_validator(mode="after")
    def _one_of_each(self) -> Self:
        data = [name for name in ("root", "own", "zeroshot") if getattr(self, name) is not None]
        if len(data) != 1:
            raise ValueError(
                f"what is evaluated is {' and '.join(data) or 'not said'}: give one of root (M-BEIR), own, "
                "zeroshot"
            )
        given = [name for name in ("runs", "embeddings", "vectors") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} each say what to evaluate. Keep one")
        if self.runs is not None and self.root is None:
            raise ValueError("runs are of M-BEIR's tasks: give root")
        if not given and self.checkpoint is None:
            raise ValueError("give the checkpoint to embed with, or runs, embeddings or vectors")
        if "complements" in self.export and self.checkpoint is None:
            raise ValueError("complements are searched with the model: give its checkpoint")
        if self.runs is not None and self.instruction == "all":
            raise ValueError(
                "runs were made with one instruction; the mean over all needs embeddings or a model"
            )
        if self.depth < _DEEPEST_METRIC:
            raise ValueError(
                f"depth is {self.depth}, but ndcg@{_DEEPEST_METRIC} is reported: give at least that"
            )
        return self


class ReportConfig(ReportInputs):
    """Settings of the report job."""

    output: PathSetting


class CompareConfig(CompareInputs):
    """Settings of the comparison job."""

    output: PathSetting


class DataSettings(Config):
    """Where a run's data is."""

    root: PathSetting
    """M-BEIR's."""
    nli: PathSetting
    """Sentence pairs of stage 1a."""
    captions: PathSetting
    """Captions of stage 1b."""
    caption_images: PathSetting
    tasks: tuple[str, ...] | None = None
    """Evaluate on these tasks only; all that have files by default."""
    train_tasks: tuple[str, ...] | None = None
    """Train on M-BEIR's tasks of these names only: Table 15 holds tasks out. All by default."""


class TrainedStage(Config):
    """What a training stage may set; where it starts and what it reads, the recipe says."""

    train: TrainSettings
    loss: ContrastiveSettings = ContrastiveSettings()
    seed_offset: NonNegativeInt = 0


class HardStage(TrainedStage):
    """Stage 2."""

    num_negatives: PositiveInt = 5
    mining: MiningConfig


class RerankerStage(FusionSettings):
    """The reranker: its training lists, the lists it scores, and how its scores are fused."""

    train: TrainSettings
    pairs: RerankerTrainSettings = RerankerTrainSettings()
    start: Literal["backbone", "text", "align", "instruct", "hard"] = "backbone"
    """The paper takes the stock model; a backbone of random weights has to learn to see first."""
    seed_offset: NonNegativeInt = 0
    mining: MiningConfig
    depth: PositiveInt = 50
    """Hits re-scored per query, in validation and test."""
    scopes: tuple[Scope, ...] = ("local", "global")


class DistilStage(TrainedStage):
    """Stage 3."""

    share: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Of the training queries, the same of each task."""
    depth: PositiveInt = 50
    """Candidates in a query's list."""


class StageSettings(Config):
    """The recipe's stages, in order; the first two may be left out (Table 3)."""

    text: TrainedStage | None
    align: TrainedStage | None
    instruct: TrainedStage
    hard: HardStage
    reranker: RerankerStage
    distil: DistilStage
    plus: RerankerStage | None = None
    """A second reranker, trained on what the distilled model finds: U-MARVEL⁺. Without it the column
    `distil_reranked` is scored by the first."""


class RetrievalSettings(Config):
    """How every embedding and search job of a run works."""

    rows_per_shard: PositiveInt = 8192
    window_rows: PositiveInt = 512
    duplicates: Literal["once", "each"] = "once"
    bad_items: Literal["fail", "skip"] = "fail"
    max_bad_share: float = Field(default=0.001, ge=0, le=1)
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    max_tokens: PositiveInt = 8192
    depth: PositiveInt = 100
    instruction: InstructionChoice = "first"
    queries_per_shard: PositiveInt = 64
    query_block_rows: PositiveInt = 8192
    vision_store: PathSetting | None = None
    """Folder that keeps features of pictures for all embedding jobs: LoRA leaves the vision tower alone, so a
    picture passes it once in the whole run."""


class RunConfig(Config):
    """A whole run: the staged recipe on one set of data."""

    title: str
    output: PathSetting
    seed: NonNegativeInt
    backbone: PathSetting
    """A Transformers folder, or `hf://OWNER/NAME`."""
    dtype: DtypeName = "float32"
    """In which models compute; bfloat16 on a GPU. What LoRA trains stays float32."""
    data: DataSettings
    encoder: EncoderSettings = EncoderSettings()
    reranker: RerankerSettings = RerankerSettings()
    stages: StageSettings
    retrieval: RetrievalSettings = RetrievalSettings()
    controls: tuple[Literal["in_batch", "unfiltered", "own_negatives", "continue_hard"], ...] = ()
    """Ablations beside the recipe: more steps without hard negatives; hard negatives without filter; without
    in-batch negatives (Table 5); the distillation's data as hard negatives (Table 6)."""
    columns: tuple[Literal["instruct", "hard", "reranked", "distil", "distil_reranked"], ...] = (
        "instruct",
        "hard",
        "reranked",
        "distil",
        "distil_reranked",
    )
    """What is evaluated and stands in the report, besides the controls."""
    runtime: RuntimeSettings = RuntimeSettings()

    @model_validator(mode="after")
    def _deep_enough(self) -> Self:
        found, stages = self.retrieval.depth, self.stages
        for key, depth in (
            ("retrieval.depth", found),
            *((("stages.reranker.depth", stages.reranker.depth),) if self._reranks else ()),
        ):
            if depth < _DEEPEST_METRIC:
                raise ValueError(
                    f"{key} is {depth}, but hit@{_DEEPEST_METRIC} and ndcg@{_DEEPEST_METRIC} are reported: "
                    f"give at least {_DEEPEST_METRIC}"
                )
        for key, depth in (
            ("stages.reranker.depth", stages.reranker.depth),
            ("stages.distil.depth", stages.distil.depth),
        ):
            if depth > found:
                raise ValueError(
                    f"{key} is {depth}, but retrieval.depth keeps {found} hits per query: raise that or "
                    "lower this"
                )
        return self

    @property
    def _reranks(self) -> bool:
        return bool({"reranked", "distil_reranked"} & set(self.columns))
