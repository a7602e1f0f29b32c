"""One stage of training: from a checkpoint and data to the next checkpoint."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from umarvel_ray.artifacts import atomic_folder
from umarvel_ray.data.batches import BatchPlan, TrainingSet
from umarvel_ray.data.mbeir import Mbeir
from umarvel_ray.data.text_pairs import CaptionPairs, NliPairs
from umarvel_ray.data.training_sets import MbeirSet, PairSet
from umarvel_ray.data.trec import Run
from umarvel_ray.model.encoder import Encoder
from umarvel_ray.model.reranker import Reranker
from umarvel_ray.train.contrastive import ContrastiveTask
from umarvel_ray.train.gather import Lanes
from umarvel_ray.train.loop import Task, train
from umarvel_ray.train.pairs import RerankerTask
from umarvel_ray.train.settings import CHECKPOINT, CaptionData, NliData, StageConfig


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
    )


def batch_plan(config: StageConfig, data: TrainingSet) -> BatchPlan:
    """Which queries stand in which step."""
    return BatchPlan(num_rows=len(data), batch_size=config.train.batch_size, seed=config.seed)


def train_stage(
    config: StageConfig, lanes: Lanes, on_step: Callable[[dict[str, Any]], None] = lambda entry: None
) -> None:
    """Train to the end, from the newest state in `output`, and write `output/checkpoint`, adapters merged."""
    output = Path(config.output)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    data = open_training_set(config)
    plan = batch_plan(config, data)
    # Adapters start from random numbers: the same ones on every worker and after every restart.
    torch.manual_seed(config.seed)
    model: Encoder | Reranker
    task: Task
    if config.model == "encoder":
        model = Encoder.load(config.start, settings=config.encoder, device=device, dtype=config.dtype)
        if config.temperature is not None:
            model.temperature.data.fill_(config.temperature)
        model.cache_inputs(config.train.cache_inputs_bytes)
        model.set_trainable(
            config.train.trainable, config.train.lora, learn_temperature=config.train.learn_temperature
        )
        task = ContrastiveTask(
            model, data, config.loss, plan=plan, lanes=lanes, max_tokens=config.train.max_tokens
        )
    else:
        model = Reranker.load(config.start, settings=config.reranker, device=device, dtype=config.dtype)
        model.set_trainable(config.train.trainable, config.train.lora)
        task = RerankerTask(
            model,
            data,
            config.pairs,
            plan=plan,
            lanes=lanes,
            max_tokens=config.train.max_tokens,
            seed=config.seed,
        )
    train(
        task,
        config.train,
        lanes=lanes,
        num_steps=config.train.steps(plan.steps_per_epoch),
        seed=config.seed,
        output=output,
        on_step=on_step,
    )
    if lanes.leads:
        with atomic_folder(output / CHECKPOINT) as folder:
            model.save(folder)
