"""One training stage before it starts: negatives, tokens, memory and time, from its first global batch."""

from dataclasses import dataclass

from umarvel_ray.data.batches import BatchPlan, TrainingSet, build_batch
from umarvel_ray.data.records import Candidate, Query
from umarvel_ray.pipeline.view import short_time
from umarvel_ray.plan.costs import ModelShape, shape_of
from umarvel_ray.plan.items import TEMPLATE_TOKENS, picture_size, token_counter
from umarvel_ray.plan.machines import Machine, machine_named
from umarvel_ray.plan.units import human_bytes
from umarvel_ray.plan.work import ACTIVATION_BYTES
from umarvel_ray.runtime.cluster import RuntimeSettings
from umarvel_ray.train.settings import StageConfig, StrategySettings

_SAMPLE = 512
"""Records of the batch whose texts are tokenized and whose pictures' heads are read."""
_PARTS = {"weights": 4.0, "gradients": 4.0, "moments": 8.0}
"""Bytes per trained weight."""


@dataclass(frozen=True)
class StageEstimate:
    """What one step takes.

    Attributes:
        num_steps: Of the stage.
        num_queries, num_candidates: Of the first global batch, different ones.
        negatives: Mean over its queries of what one is pushed from.
        tokens: Of the global batch, template and pictures included.
        memory_bytes: Held by each worker.
        step_s: Of one step, on the machine that is assumed.
        machine: Which that is.
        passes: Of the model over each token, backward counted as one.
    """

    num_steps: int
    num_queries: int
    num_candidates: int
    negatives: float
    tokens: float
    memory_bytes: float
    step_s: float
    machine: Machine
    passes: int

    def lines(self, num_workers: int) -> list[str]:
        """For people."""
        return [
            f"{self.num_steps:,} steps of {self.num_queries:,} queries and, in the first, "
            f"{self.num_candidates:,} different candidates: {self.negatives:,.0f} negatives per query",
            f"{self.tokens:,.0f} tokens a step, {self.tokens / num_workers:,.0f} a worker"
            + (", embedded twice: they do not fit one chunk" if self.passes > 2 else ""),
            f"about {human_bytes(self.memory_bytes)} on each of {num_workers} workers, "
            f"{short_time(self.step_s)} a step, {short_time(self.step_s * self.num_steps)} in all, "
            f"if each is a {self.machine.name} at {self.machine.model_share:.0%} of its peak: estimates",
        ]


def estimate_stage(
    config: StageConfig, runtime: RuntimeSettings, data: TrainingSet, plan: BatchPlan
) -> StageEstimate:
    """Lay out the first global batch and count; no model is loaded.

    Raises:
        CheckpointError: The backbone's sizes are unknown.
    """
    shape = shape_of(config.start)
    rows, epoch = plan.rows(0)
    masked = config.loss.mask_false_negatives
    batch = build_batch(data, rows, visit=epoch, mask_false_negatives=masked)
    own_lists = config.model == "reranker" or config.loss.over_own_lists
    negatives = batch.negatives_per_query(own_lists=own_lists)
    lengths = _lengths(config, batch.records)
    tokens = sum(length for length, _ in lengths) / len(lengths) * len(batch.records)
    own_tokens = tokens / runtime.num_workers
    passes = 2 + (own_tokens > config.train.chunk_tokens and config.model == "encoder")
    lora = config.train.trainable == "lora"
    trained = shape.lora_params(config.train.lora.rank) if lora else shape.params
    decoded = sum(shape.decode(length) for length, _ in lengths) / len(lengths) * len(batch.records)
    seen = sum(shape.see(image) for _, image in lengths) / len(lengths) * len(batch.records)
    # LoRA leaves weights as they are: backward is one pass more, not two, and none of the frozen tower.
    flops = decoded * (passes if lora else passes + 1) + seen * (passes - 1 if lora else passes + 1)
    flops += 6 * trained * tokens if lora else 0
    machine = machine_named("h200" if runtime.gpus else "cpu")
    return StageEstimate(
        num_steps=config.train.steps(plan.steps_per_epoch),
        num_queries=batch.num_queries,
        num_candidates=batch.num_candidates,
        negatives=negatives,
        tokens=tokens,
        memory_bytes=_memory(config, shape, trained, runtime.strategy, runtime.num_workers, own_tokens),
        step_s=flops / (runtime.num_workers * machine.peak_flops * machine.model_share),
        machine=machine,
        passes=int(passes),
    )


def _lengths(config: StageConfig, records: tuple[Query | Candidate, ...]) -> list[tuple[float, float]]:
    """Of an even sample of the records: tokens in the decoder, and those of pictures among them."""
    count = token_counter(config.start)
    settings = (config.encoder or config.reranker) if config.model == "encoder" else config.reranker
    images = settings.images if settings else None
    found = []
    for record in records[:: max(1, len(records) // _SAMPLE)]:
        texts = [part for part in record.content if isinstance(part, str)]
        if isinstance(record, Query) and record.instruction:
            texts.append(record.instruction)
        pictures = sum(
            picture_size(part.path, images)[0] for part in record.content if not isinstance(part, str)
        )
        found.append((TEMPLATE_TOKENS + sum(map(count, texts)) + pictures, pictures))
    return found


def _memory(
    config: StageConfig,
    shape: ModelShape,
    trained: float,
    how: StrategySettings,
    num_workers: int,
    own_tokens: float,
) -> float:
    """Frozen weights, what is trained, and one chunk's activations."""
    stage = {"ddp": 0, "fsdp2": 3, "deepspeed": how.zero_stage}[how.kind]
    shared = {
        "moments": stage >= 1,
        "gradients": stage >= 2,
        "weights": stage >= 3,
    }
    state = sum(trained * size / (num_workers if shared[part] else 1) for part, size in _PARTS.items())
    if how.offload_optimizer:
        state -= trained * _PARTS["moments"] / num_workers
    frozen = 0.0
    if config.train.trainable == "lora":
        frozen = shape.params * (4 if config.dtype == "float32" else 2) / (num_workers if stage == 3 else 1)
    chunk = min(own_tokens, config.train.chunk_tokens) * ACTIVATION_BYTES
    return frozen + state + chunk * shape.layers * shape.hidden / (28 * 3584)


def describe_stage(config: StageConfig, runtime: RuntimeSettings) -> list[str]:
    """What `umarvel train --dry-run` adds to the settings.

    Raises:
        UmarvelError: The data or the settings would be refused.
    """
    from umarvel_ray.train.stage import batch_plan, open_training_set, require_sound

    data = open_training_set(config)
    require_sound(config, data)
    plan = batch_plan(config, data)
    lines = estimate_stage(config, runtime, data, plan).lines(runtime.num_workers)
    if config.train.rate_of_batch_size:
        lines.insert(0, config.train.rate_note)
    return lines
