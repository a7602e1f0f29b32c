"""One stage of training: from a checkpoint and data to the next checkpoint."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from umarvel_ray.artifacts import atomic_folder
from umarvel_ray.data.batches import BatchPlan, TrainingSet
from umarvel_ray.data.mbeir import Mbeir
from umarvel_ray.data.text_pairs import CaptionPairs, NliPairs
from umarvel_ray.data.training_sets import MbeirSet, PairSet
from umarvel_ray.data.trec import Run
from umarvel_ray.errors import ConfigError
from umarvel_ray.model.encoder import Encoder
from umarvel_ray.model.reranker import Reranker
from umarvel_ray.model.settings import DtypeName
from umarvel_ray.storage import at
from umarvel_ray.train.checkpoint import latest_state, restore
from umarvel_ray.train.contrastive import ContrastiveTask
from umarvel_ray.train.gather import Lanes
from umarvel_ray.train.loop import Task, Watchers, train
from umarvel_ray.train.pairs import RerankerTask
from umarvel_ray.train.settings import CHECKPOINT, CaptionData, NliData, StageConfig, StrategySettings
from umarvel_ray.train.strategy import PLAIN, Replicated, make_strategy
from umarvel_ray.train.trackers import open_trackers, require_trackers


@dataclass(frozen=True)
class Look:
    """What one batch gives.

    Attributes:
        samples: Ids of its queries.
        figures: Loss, gradient norm and what else a line of `metrics.jsonl` has of a batch.
        weights_of_step: Steps that the weights had seen.
    """

    samples: tuple[str, ...]
    figures: dict[str, float]
    weights_of_step: int


def open_training_set(config: StageConfig) -> TrainingSet:
    """The stage's queries with their positives and lists.

    Raises:
        DataError: A file is missing or broken.
    """
    data = config.data
    if isinstance(data, NliData):
        return PairSet(NliPairs(data.path, use_hard_negatives=data.use_hard_negatives))
    if isinstance(data, CaptionData):
        return PairSet(CaptionPairs(data.path, image_root=data.image_root))
    return MbeirSet(
        Mbeir(data.root),
        seed=config.seed,
        lists=None if data.lists is None else Run.read(data.lists),
        num_others=data.num_negatives,
        only_listed=data.only_listed or data.list_role == "teacher",
        with_scores=data.list_role == "teacher",
        drop_positives=data.list_role == "negatives",
        tasks=data.tasks,
        use_given=data.given_negatives,
    )


def batch_plan(config: StageConfig, data: TrainingSet) -> BatchPlan:
    """Which queries stand in which step."""
    train = config.train
    return BatchPlan(
        num_rows=len(data),
        batch_size=train.batch_size,
        seed=config.seed,
        tasks=data.tasks if train.batches == "one_task" else None,
        questions=data.questions if train.validation else None,
        num_held_out=train.validation.queries if train.validation else 0,
    )


def require_sound(config: StageConfig, data: TrainingSet) -> None:
    """Look at what a stage will need before its model loads; the settings alone were looked at before.

    Raises:
        ConfigError: A tracker is not installed.
        DataError: The lists were made for other data.
    """
    require_trackers(config.train.trackers)
    if isinstance(data, MbeirSet):
        data.require_own_lists()


def train_stage(
    config: StageConfig,
    lanes: Lanes,
    on_step: Callable[[dict[str, Any]], None] = lambda entry: None,
    *,
    how: StrategySettings = PLAIN,
    must_save: Callable[[], bool] | None = None,
) -> None:
    """Train to the end, from the newest state in `output`, and write `output/checkpoint`, adapters merged.

    Args:
        config: What to train.
        lanes: Who computes what.
        on_step: Called with each line of the metrics.
        how: How parameters lie on the workers.
        must_save: Says that this worker will be taken away soon.
    """
    output, settings = at(config.output), config.train
    data = open_training_set(config)
    plan = batch_plan(config, data)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    half = config.dtype == "bfloat16"
    model = _load_trainable(config, device)
    state = latest_state(output / "states")
    if state is not None:
        restore(model, state, where=output / "states")
    strategy = make_strategy(model, lanes, settings, how, half=half)
    if strategy.lockstep and settings.vision_store is not None:
        raise ConfigError(
            f"train.vision_store: with {how.kind} all workers call the tower together, so none may take what "
            "is kept. Leave it out, or train with ddp."
        )
    task = _make_task(config, model, data, plan, strategy, num_loaders=how.loaders)
    if settings.max_tokens == "auto" and isinstance(task, ContrastiveTask):
        task.find_max_tokens()
    trackers = open_trackers(
        settings.trackers if lanes.leads else (),
        output,
        name="/".join(str(output).split("/")[-3:]),
        settings=config.model_dump(mode="json"),
        steps_done=state.step if state else 0,
    )
    facts = {"seed": config.seed, "data": data.fingerprint, "settings": config.model_dump(mode="json")}
    try:
        train(
            task,
            strategy,
            settings,
            num_steps=settings.steps(plan.steps_per_epoch),
            seed=config.seed,
            output=output,
            state=state,
            watchers=Watchers(on_step=on_step, trackers=trackers, must_save=must_save, facts=facts),
        )
    finally:
        task.close()
    if lanes.leads:
        if strategy.lockstep:  # no worker has the whole model: it is made anew from what was trained
            model = _load_trainable(config, "cpu")
            finished = latest_state(output / "states")
            assert finished is not None
            restore(model, finished, where=output / "states")
        with atomic_folder(output / CHECKPOINT) as folder:
            model.save(folder)


def look_at_batch(config: StageConfig, lanes: Lanes, *, step: int, how: StrategySettings = PLAIN) -> Look:
    """The batch of a step, and the loss and gradient that it gives; nothing is written.

    Weights are those of the newest state of fewer steps, or those that the stage starts from.

    Args:
        config: Of the stage.
        lanes: As in the training: they decide how the batch is cut.
        step: As `metrics.jsonl` counts, from 1.
        how: Its loaders alone.

    Raises:
        ConfigError: The training has no such step.
    """
    data = open_training_set(config)
    plan = batch_plan(config, data)
    num_steps = config.train.steps(plan.steps_per_epoch)
    if not 1 <= step <= num_steps:
        raise ConfigError(f"{config.output}: no step {step}: this training has steps 1 to {num_steps}.")
    model = _load_trainable(config, "cuda" if torch.cuda.is_available() else "cpu")
    states = at(config.output) / "states"
    state = latest_state(states, most=step - 1)
    if state is not None:
        restore(model, state, where=states)
    strategy = make_strategy(model, lanes, config.train, PLAIN, half=config.dtype == "bfloat16")
    task = _make_task(config, model, data, plan, strategy, num_loaders=how.loaders)
    model.train()
    try:
        prepared = task.prepare(step - 1)
        figures = task.backward(prepared, seed=hash((config.seed, step - 1)))
        grad_norm = strategy.clip(config.train.max_grad_norm)
    finally:
        task.close()
    return Look(
        samples=tuple(task.samples(prepared)),
        figures={**figures, "grad_norm": grad_norm},
        weights_of_step=state.step if state else 0,
    )


def _make_task(
    config: StageConfig,
    model: Encoder | Reranker,
    data: TrainingSet,
    plan: BatchPlan,
    strategy: Replicated,
    *,
    num_loaders: int,
) -> Task:
    rest: dict[str, Any] = {
        "plan": plan,
        "strategy": strategy,
        "max_tokens": config.train.chunk_tokens,
        "num_loaders": num_loaders,
    }
    if isinstance(model, Encoder):
        return ContrastiveTask(model, data, config.loss, **rest)
    return RerankerTask(model, data, config.pairs, seed=config.seed, **rest)


def _load_trainable(config: StageConfig, device: str) -> Encoder | Reranker:
    """The model to start from, what is to be trained set free: the same on all workers, at each start."""
    settings = config.train
    # What is trained keeps float32 weights; frozen weights are of the dtype that the model computes in.
    dtype: DtypeName = "float32" if settings.trainable == "full" else config.dtype
    torch.manual_seed(config.seed)  # of which adapters start
    model: Encoder | Reranker
    if config.model == "encoder":
        model = Encoder.load(config.start, settings=config.encoder, device=device, dtype=dtype)
        if config.temperature is not None:
            model.temperature.data.fill_(config.temperature)
        if settings.vision_store is not None:
            model.keep_vision_features(settings.vision_store)
        model.cache_inputs(settings.cache_inputs_bytes)
        model.set_trainable(settings.trainable, settings.lora, learn_temperature=settings.learn_temperature)
    else:
        model = Reranker.load(config.start, settings=config.reranker, device=device, dtype=dtype)
        model.set_trainable(settings.trainable, settings.lora)
    if settings.recompute_activations:
        model.model.gradient_checkpointing_enable({"use_reentrant": False})
    return model
