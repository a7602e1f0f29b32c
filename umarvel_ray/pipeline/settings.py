"""Settings of the jobs that have no room of their own, and of a whole run. Importing this loads no torch."""

from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from umarvel_ray.config import Config, PathSetting
from umarvel_ray.data.sources import InstructionChoice
from umarvel_ray.evaluate.report import ReportInputs
from umarvel_ray.model.settings import DtypeName, EncoderSettings, RerankerSettings
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


class EvaluateConfig(Config):
    """Settings of one evaluation job: runs and qrels → `results.json`."""

    stage: str
    """What the column is called."""
    checkpoint: PathSetting
    """Whose runs these are; named in the results."""
    runs: PathSetting
    """Folder of a search or scoring job."""
    output: PathSetting
    root: PathSetting
    split: Split = "test"
    scopes: tuple[Scope, ...] = ("local", "global")
    tasks: tuple[str, ...] | None = None


class ReportConfig(ReportInputs):
    """Settings of the report job."""

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
    """The recipe's stages, in order."""

    text: TrainedStage
    align: TrainedStage
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
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    max_tokens: PositiveInt = 8192
    depth: PositiveInt = 100
    instruction: InstructionChoice = "first"
    queries_per_shard: PositiveInt = 64
    query_block_rows: PositiveInt = 8192


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
                    f"{key} is {depth}, but retrieval.depth keeps {found} hits per query: "
                    "raise that or lower this"
                )
        return self

    @property
    def _reranks(self) -> bool:
        return bool({"reranked", "distil_reranked"} & set(self.columns))
