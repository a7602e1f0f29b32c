"""Settings of a job → how much work it is. Formulas follow what the code does, recomputation included."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from umarvel_ray.pipeline.settings import EvaluateConfig, MineConfig, ReportConfig, RunConfig
from umarvel_ray.pipeline.stages import Job, recipe
from umarvel_ray.plan.costs import ModelShape
from umarvel_ray.plan.items import Items, World, joined
from umarvel_ray.plan.units import human_bytes
from umarvel_ray.retrieve.settings import EmbedConfig, RerankConfig, SearchConfig
from umarvel_ray.train.settings import CaptionData, NliData, StageConfig

RERANK_PROMPT_TOKENS = 70
"""Template and task of the reranker before the query, by Qwen2-VL's tokenizer."""
_ANSWER_TOKENS = 5
_SLICE_ROWS = 65_536
"""Fewer candidates are not searched apart."""
_STATE_BYTES = 16
"""Per trained weight: float32 weight, gradient, and AdamW's two."""
ACTIVATION_BYTES = 4.8e6
"""Per token of a chunk trained without recomputation, at the shapes of Qwen2-VL-7B; others by their size. An
estimate: nobody has measured it yet."""
_VECTOR_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}


@dataclass(frozen=True)
class Work:
    """What a job has to do, over all its workers.

    Attributes:
        job: Its name.
        title: What a person calls it.
        kind: Of the job.
        form: What a measured rate holds for: jobs of one form do the same thing to more or fewer records.
        amount: Of `unit`.
        unit: Records, queries, pairs or hits.
        flops: Model FLOP.
        products: FLOP of a plain matrix product: exact search.
        images: Decoded.
        read_bytes: From storage.
        write_bytes: To storage.
        network_bytes: Sent by each worker, training alone.
        fed_bytes: From host memory to devices, search alone.
        parts: Pieces that can be done at the same time.
        weights_bytes: Held by each worker: frozen weights.
        trained_bytes: Held by each worker: trained weights with gradient and optimizer.
        chunk_bytes: Held by each worker: activations of one chunk; candidates and queries of a search.
        note: What a person should know.
    """

    job: str
    title: str
    kind: str
    form: str
    amount: float
    unit: str
    flops: float = 0.0
    products: float = 0.0
    images: float = 0.0
    read_bytes: float = 0.0
    write_bytes: float = 0.0
    network_bytes: float = 0.0
    fed_bytes: float = 0.0
    parts: int = 1
    weights_bytes: float = 0.0
    trained_bytes: float = 0.0
    chunk_bytes: float = 0.0
    note: str = ""


@dataclass(frozen=True)
class Crew:
    """How many do it.

    Attributes:
        workers: Of training.
        actors: Of everything else on accelerators.
        nodes: They stand on.
    """

    workers: int
    actors: int
    nodes: int


def work_of(run: RunConfig, world: World, shape: ModelShape, crew: Crew) -> list[Work]:
    """The work of every job of a run, in its order."""
    reckoner = _Reckoner(run, world, shape, crew)
    return [reckoner.of(job) for job in recipe(run)]


def with_larger_pool(world: World, factor: float) -> World:
    """The same queries before pools of `factor` times the candidates."""

    def grown(items: Items) -> Items:
        return replace(items, rows=items.rows * factor)

    return replace(world, pools={key: grown(pool) for key, pool in world.pools.items()})


class _Reckoner:
    """One job at a time; what later jobs need of earlier ones is a pure function of the settings."""

    def __init__(self, run: RunConfig, world: World, shape: ModelShape, crew: Crew) -> None:
        self._run, self._world, self._shape, self._crew = run, world, shape, crew
        self._weights = shape.params * (4 if run.dtype == "float32" else 2)

    def of(self, job: Job) -> Work:
        """The work of one job."""
        config = job.config
        if isinstance(config, StageConfig):
            work = self._train(job, config)
        elif isinstance(config, EmbedConfig):
            work = self._embed(job, config)
        elif isinstance(config, SearchConfig):
            work = self._search(job, config)
        elif isinstance(config, RerankConfig):
            work = self._rerank(job, config)
        elif isinstance(config, MineConfig):
            hits = sum(self._queries("train").values()) * config.mining.depth
            work = Work(job.name, job.title, "mine", "mine", hits, "hits", read_bytes=hits * 12)
        elif isinstance(config, EvaluateConfig):
            hits = sum(self._queries("test").values()) * self._run.retrieval.depth * len(config.scopes)
            work = Work(job.name, job.title, "evaluate", "evaluate", hits, "hits", read_bytes=hits * 12)
        else:
            assert isinstance(config, ReportConfig)
            work = Work(job.name, job.title, "report", "report", 1, "page")
        return work

    def _train(self, job: Job, config: StageConfig) -> Work:
        settings, shape, crew = config.train, self._shape, self._crew
        query, candidate, others, rows = self._training_items(config)
        steps = settings.steps(max(1, int(rows) // settings.batch_size))
        lora = settings.trainable == "lora"
        reranks = config.model == "reranker"
        if reranks:
            pairs = 1 + min(config.pairs.negatives_per_positive, others)
            forward, tokens, pictures = self._tree(query, candidate, pairs)
        else:
            forward = shape.decode(query.tokens) + (1 + others) * shape.decode(candidate.tokens)
            tokens = query.tokens + (1 + others) * candidate.tokens
            pictures = [(query, query.images), (candidate, (1 + others) * candidate.images)]
        seeing = sum(number * shape.see(item.image_tokens) for item, number in pictures)
        # LoRA leaves the weights as they are: backward is one pass more, not two.
        adapters = 6 * shape.lora_params(settings.lora.rank) * tokens if lora else 0.0
        per_worker = settings.batch_size * tokens / crew.workers
        chunked = per_worker > settings.chunk_tokens
        # Gradients need the whole batch's embeddings first: what does not fit in a chunk is embedded twice.
        again = 1 if chunked and not reranks else 0
        per_query = forward * ((2 if lora else 3) + again) + seeing * ((1 if lora else 3) + again) + adapters
        trained = shape.lora_params(settings.lora.rank) if lora else shape.params
        queries = steps * settings.batch_size
        images = queries * sum(number for _, number in pictures)
        embeddings = 0 if reranks else settings.batch_size * (2 + others) * shape.hidden * 4
        loss = "reranker" if reranks else config.loss.kind
        chunk_tokens = min(settings.chunk_tokens, per_worker)
        size = shape.layers * shape.hidden / (28 * 3584)
        return Work(
            job=job.name,
            title=job.title,
            kind="train",
            form=f"train {loss} {settings.trainable}",
            amount=queries,
            unit="queries",
            flops=queries * per_query,
            images=images,
            read_bytes=images * max(query.image_bytes, candidate.image_bytes) + self._weights,
            write_bytes=self._weights + 3 * 4 * trained,
            network_bytes=steps * (2 * 4 * trained + embeddings) if crew.workers > 1 else 0.0,
            parts=crew.workers,
            weights_bytes=self._weights if lora else 0.0,
            trained_bytes=_STATE_BYTES * trained,
            chunk_bytes=chunk_tokens * ACTIVATION_BYTES * size,
            note=f"{steps:,} steps, {per_worker:,.0f} tokens a worker and step"
            + (", embedded twice" if again else ""),
        )

    def _training_items(self, config: StageConfig) -> tuple[Items, Items, int, float]:
        """Query, candidate, candidates per query beside its positive, and training queries."""
        data, world, stages = config.data, self._world, self._run.stages
        if isinstance(data, NliData):
            return *world.sentences, int(data.use_hard_negatives), world.sentences[0].rows
        if isinstance(data, CaptionData):
            return *world.captions, 0, world.captions[0].rows
        query, candidate = world.training
        rows = query.rows
        if config.loss.kind == "distillation" or (data.lists or "").endswith("teacher.arrow"):
            return query, candidate, stages.distil.depth - 1, rows * stages.distil.share
        if config.model == "reranker":
            return query, candidate, stages.reranker.mining.num_negatives, rows
        return query, candidate, data.num_negatives or 0, rows

    def _embed(self, job: Job, config: EmbedConfig) -> Work:
        sets = [items for (split, _), items in self._world.queries.items() if split in config.splits]
        sets += self._world.distinct_pools(config.splits)
        all_items, shape = joined(sets), self._shape
        flops = sum(s.rows * (shape.decode(s.tokens) + s.images * shape.see(s.image_tokens)) for s in sets)
        shards = sum(math.ceil(items.rows / config.rows_per_shard) for items in sets)
        images = all_items.rows * all_items.images
        return Work(
            job=job.name,
            title=job.title,
            kind="embed",
            form="embed",
            amount=all_items.rows,
            unit="records",
            flops=flops,
            images=images,
            read_bytes=images * all_items.image_bytes + self._weights * self._crew.nodes,
            write_bytes=all_items.rows * shape.hidden * _VECTOR_BYTES[config.dtype],
            parts=shards,
            weights_bytes=self._weights,
            chunk_bytes=config.max_tokens * 40 * shape.hidden,
            note=f"{shards:,} shards, {all_items.rows * all_items.tokens:,.0f} tokens",
        )

    def _search(self, job: Job, config: SearchConfig) -> Work:
        shape, crew = self._shape, self._crew
        width = _VECTOR_BYTES[self._run.retrieval.dtype] * shape.hidden
        products = read = fed = hits = queries = 0.0
        blocks = 0
        held = 0.0
        for request in config.requests:
            pools = self._world.distinct_pools([request.split])
            for task, rows in self._queries(request.split).items():
                sizes = {
                    "local": self._world.pools[request.split, task].rows,
                    "global": sum(pool.rows for pool in pools),
                }
                task_blocks = math.ceil(rows / config.query_block_rows)
                for scope in request.scopes:
                    pool = sizes[scope]
                    products += 2 * rows * pool * shape.hidden
                    # A pool is sliced where there are more actors than blocks of queries.
                    slices = min(crew.actors // task_blocks, int(pool // _SLICE_ROWS))
                    blocks += task_blocks * max(1, slices)
                    queries += rows
                    hits += rows * min(request.depth, pool)
                    # A node's memory keeps what it read; a device gets every candidate anew for each block.
                    read += min(task_blocks, crew.nodes) * pool * width
                    fed += task_blocks * pool * width
                    held = max(held, pool * width)
        return Work(
            job=job.name,
            title=job.title,
            kind="search",
            form="search",
            amount=queries,
            unit="queries",
            products=products,
            read_bytes=read,
            write_bytes=hits * 6,
            fed_bytes=fed,
            parts=blocks,
            chunk_bytes=config.query_block_rows * shape.hidden * 4 + 65_536 * width,
            note=f"{blocks:,} cells of queries and candidates; the largest pool is {human_bytes(held)}",
        )

    def _rerank(self, job: Job, config: RerankConfig) -> Work:
        flops = pairs = images = picture_bytes = 0.0
        parts = 0
        for request in config.requests:
            pools = self._world.distinct_pools([request.split])
            for task, all_rows in self._queries(request.split).items():
                rows = all_rows * request.share
                query = self._world.queries[request.split, task]
                for scope in request.scopes:
                    of = [self._world.pools[request.split, task]] if scope == "local" else pools
                    candidate = joined(of)
                    depth = min(request.depth, candidate.rows)
                    forward, _, pictures = self._tree(query, candidate, depth)
                    seeing = sum(n * self._shape.see(item.image_tokens) for item, n in pictures)
                    flops += rows * (forward + seeing)
                    pairs += rows * depth
                    images += rows * sum(number for _, number in pictures)
                    picture_bytes += rows * sum(number * item.image_bytes for item, number in pictures)
                    parts += math.ceil(rows / config.queries_per_shard)
        return Work(
            job=job.name,
            title=job.title,
            kind="rerank",
            form="rerank",
            amount=pairs,
            unit="pairs",
            flops=flops,
            images=images,
            read_bytes=picture_bytes + self._weights * self._crew.nodes,
            write_bytes=pairs * 12,
            parts=parts,
            weights_bytes=self._weights,
            chunk_bytes=config.max_tokens * 40 * self._shape.hidden,
            note=f"{parts:,} parts",
        )

    def _tree(
        self, query: Items, candidate: Items, pairs: float
    ) -> tuple[float, float, Sequence[tuple[Items, float]]]:
        """A query with its candidates as one tree: FLOP of a forward pass, tokens, images to see."""
        prefix = RERANK_PROMPT_TOKENS + query.own_tokens
        leaf = candidate.own_tokens + _ANSWER_TOKENS
        forward = self._shape.decode(prefix) + pairs * self._shape.decode(leaf, seen=prefix + leaf)
        pictures = [(query, query.images), (candidate, pairs * candidate.images)]
        return forward, prefix + pairs * leaf, pictures

    def _queries(self, split: str) -> dict[str, float]:
        return {task: self._world.queries[split, task].rows for task in self._world.tasks(split)}
