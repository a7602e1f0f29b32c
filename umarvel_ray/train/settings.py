"""How a stage trains: data, loss, length, speed. Importing this loads no torch."""

from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from umarvel_ray.config import Config, PathSetting
from umarvel_ray.model.settings import DtypeName, EncoderSettings, LoraSettings, RerankerSettings

CHECKPOINT = "checkpoint"
"""Name of the finished checkpoint in a stage's folder."""


TrackerName = Literal["tensorboard", "wandb", "mlflow"]


class ValidationSettings(Config):
    """Queries that are held out of training to watch it; all rows of a question are held out together."""

    queries: PositiveInt
    """Held out, drawn by the seed. They are ranked against each other's candidates."""
    every: PositiveInt = 100
    """Steps between two looks; there is one at the end."""


class TrainSettings(Config):
    """How long and how fast to train, and what."""

    trainable: Literal["lora", "full"] = "lora"
    lora: LoraSettings = LoraSettings()
    learn_temperature: bool = False
    batch_size: PositiveInt
    """Queries per optimizer step, over all workers."""
    num_steps: PositiveInt | None = None
    num_epochs: PositiveFloat | None = None
    learning_rate: PositiveFloat
    rate_of_batch_size: PositiveInt | None = None
    """The batch size that `learning_rate` was found for, if that is another one: the rate is then scaled by
    the square root of the batch's growth (Table 4), and the log says so."""
    batches: Literal["mixed", "one_task"] = "mixed"
    """`one_task`: all queries of a global batch are of the same task, so its negatives are harder."""
    warmup_ratio: NonNegativeFloat = 0.03
    weight_decay: NonNegativeFloat = 0.0
    betas: tuple[NonNegativeFloat, NonNegativeFloat] = (0.9, 0.999)
    """AdamW's; a short training from random weights wants the second lower."""
    max_grad_norm: PositiveFloat = 1.0
    max_tokens: PositiveInt | Literal["auto"] = 8192
    """Token budget of a chunk: the largest that fits in memory is the fastest. `auto`: the embedder's is
    found on the device, from what two small chunks take; a CPU and the reranker take 8192."""
    recompute_activations: bool = False
    """Hold no layer's activations, and compute each layer once more on the way back. Chunks bound memory
    already; this is for a single record that does not fit."""
    validation: ValidationSettings | None = None
    trackers: tuple[TrackerName, ...] = ()
    """Besides `metrics.jsonl`, which is always written."""
    save_every: PositiveInt = 100
    """Steps between training states on disk."""
    keep_last: PositiveInt = 2
    cache_inputs_bytes: NonNegativeInt = Field(default=256 * 2**20)
    """Memory for prepared records, per worker."""
    vision_store: PathSetting | None = None
    """Of the embedder: folder that keeps what the frozen vision tower makes of a picture, on a file system
    that all workers see; embedding jobs may share it. A picture then passes the tower once in all epochs and
    stages; what is learned stays the same up to rounding."""

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.num_steps is None) == (self.num_epochs is None):
            raise ValueError("give either num_steps or num_epochs, not both and not neither")
        return self

    @model_validator(mode="after")
    def _tower_is_frozen(self) -> Self:
        if self.vision_store is not None and self.trainable == "full":
            raise ValueError("vision_store keeps features of a frozen tower, but trainable is full: drop one")
        return self

    @property
    def chunk_tokens(self) -> int:
        """`max_tokens`, or what stands for it before a device was asked."""
        return 8192 if self.max_tokens == "auto" else self.max_tokens

    @property
    def rate(self) -> float:
        """The learning rate at its peak, scaled where `rate_of_batch_size` asks for it."""
        if self.rate_of_batch_size is None:
            return self.learning_rate
        return self.learning_rate * (self.batch_size / self.rate_of_batch_size) ** 0.5

    @property
    def rate_note(self) -> str:
        """Says what `rate` did."""
        return (
            f"learning rate {self.learning_rate:g} × √({self.batch_size}/{self.rate_of_batch_size}) "
            f"= {self.rate:.3g}"
        )

    def steps(self, steps_per_epoch: int) -> int:
        """Optimizer steps in all."""
        return self.num_steps or max(1, round((self.num_epochs or 0) * steps_per_epoch))


class StrategySettings(Config):
    """How a training lies on its workers: it decides rounding alone, and may change between starts."""

    kind: Literal["ddp", "fsdp2", "deepspeed"] = "ddp"
    """`ddp`: every worker holds the whole model; the fastest where it fits. `fsdp2`: each holds a slice of
    every layer. `deepspeed`: as `zero_stage` says."""
    zero_stage: Literal[1, 2, 3] = 2
    """Of `deepspeed`: 1 shards the optimizer's state, 2 the gradients too, 3 the parameters too."""
    offload_optimizer: bool = False
    """Of `deepspeed`: keep the optimizer's state in main memory."""
    loaders: NonNegativeInt = 0
    """Processes of each worker that decode pictures and tokenize ahead of it; 0: a thread of its own does."""

    @model_validator(mode="after")
    def _offload_is_deepspeeds(self) -> Self:
        if self.offload_optimizer and self.kind != "deepspeed":
            raise ValueError(
                f"offload_optimizer is deepspeed's, but kind is {self.kind!r}: set one of the two"
            )
        return self


class ContrastiveSettings(Config):
    """Which loss, over which negatives."""

    kind: Literal["info_nce", "distillation"] = "info_nce"
    negatives: Literal["batch", "own"] = "batch"
    """`batch`: all candidates of the global batch, hard negatives of every query included. `own`: the query's
    own list alone (Table 5 ID 0, and the continue-hard control)."""
    candidate_to_query: NonNegativeFloat = 0.0
    """Weight of the second direction; stage 1b uses 1."""
    mask_false_negatives: bool = True
    """Never push a query from its other positives or copies of them. Off reproduces the authors' code."""
    teacher_temperature: PositiveFloat | None = None
    """Of the teacher's scores in distillation; by default the student's, without gradient."""

    @property
    def over_own_lists(self) -> bool:
        """Whether a query meets the candidates of its own list alone."""
        return self.kind == "distillation" or self.negatives == "own"


class RerankerTrainSettings(Config):
    """How many pairs a query gives."""

    positives: PositiveInt = 1
    """Of a query's positives, how many a visit shows at most, drawn afresh."""
    negatives_per_positive: PositiveInt = 1
    """Drawn afresh at each visit from the query's mined list, for each positive that is shown."""
    window: PositiveInt | None = None
    """Draw among the first so many of the list; among all of it by default."""
    positive_weight: NonNegativeFloat = 1.0
    """Weight of a positive pair's loss, relative to a negative's."""


class NliData(Config):
    """Sentence pairs, stage 1a."""

    kind: Literal["nli"]
    path: PathSetting
    use_hard_negatives: bool = False
    """Also push from the file's contradicting sentence; paper and peers do not."""


class CaptionData(Config):
    """Caption and picture pairs, stage 1b."""

    kind: Literal["captions"]
    path: PathSetting
    image_root: PathSetting


class MbeirData(Config):
    """M-BEIR's training queries with in-batch negatives, mined negatives, or teacher scores."""

    kind: Literal["mbeir"]
    root: PathSetting
    lists: PathSetting | None = None
    """A run: mined negatives, or a teacher's scores."""
    list_role: Literal["negatives", "teacher"] = "negatives"
    teacher: PathSetting | None = None
    """Of a teacher's scores: the reranker that must have given them."""
    given_negatives: bool = False
    """Use the negatives that the query file names (`neg_cand_list`), before those of `lists`."""
    only_listed: bool = False
    """Leave out queries without a list; else they train on in-batch negatives. A teacher's always are."""
    num_negatives: PositiveInt | None = None
    """Of a list, how many a visit shows, best first; all by default."""
    tasks: tuple[str, ...] | None = None
    """Train on these tasks only."""


class StageConfig(Config):
    """Settings of one training job."""

    model: Literal["encoder", "reranker"] = "encoder"
    start: PathSetting
    """A stock backbone or the checkpoint of the stage before."""
    output: PathSetting
    seed: NonNegativeInt
    data: Annotated[NliData | CaptionData | MbeirData, Field(discriminator="kind")]
    train: TrainSettings
    loss: ContrastiveSettings = ContrastiveSettings()
    pairs: RerankerTrainSettings = RerankerTrainSettings()
    encoder: EncoderSettings | None = None
    """For a stock backbone; a checkpoint brings its own."""
    reranker: RerankerSettings | None = None
    temperature: PositiveFloat | None = None
    """τ to start from; by default the checkpoint's, or 0.05."""
    dtype: DtypeName = "float32"

    @model_validator(mode="after")
    def _data_suit_the_loss(self) -> Self:
        lists = self.data.lists if isinstance(self.data, MbeirData) else None
        taught = isinstance(self.data, MbeirData) and self.data.list_role == "teacher"
        given = self.data.use_hard_negatives if isinstance(self.data, NliData) else False
        given |= isinstance(self.data, MbeirData) and self.data.given_negatives
        if taught and given:
            raise ValueError("a teacher scored no given negatives: leave data.given_negatives out")
        if self.model == "encoder" and self.loss.kind == "distillation" and not (taught and lists):
            raise ValueError(
                "loss.kind is distillation, but no teacher's scores are given: set data.lists to a scoring "
                "job's teacher.arrow and data.list_role to teacher"
            )
        if self.model == "encoder" and self.loss.negatives == "own" and not (lists or given):
            raise ValueError("loss.negatives is own, but queries have no lists: set data.lists")
        if self.model == "reranker" and self.train.vision_store is not None:
            raise ValueError("train.vision_store is the embedder's: a reranker keeps none, leave it out")
        if self.model == "reranker" and not (lists or given):
            raise ValueError("a reranker learns from lists, but there are none: set data.lists")
        return self
