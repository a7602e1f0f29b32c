"""Records → embedding shards: what is still missing, and one shard of it."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from umarvel_ray.artifacts import fingerprint, read_json
from umarvel_ray.data.mbeir import Mbeir
from umarvel_ray.data.records import Query
from umarvel_ray.data.sources import Source, chosen_tasks, pool_sources, query_source
from umarvel_ray.model.encoder import SETTINGS_FILE
from umarvel_ray.model.systems import Embedder, OurSystem, load_embedder
from umarvel_ray.retrieve.settings import EmbedConfig
from umarvel_ray.retrieve.store import ShardRange, finish_store, finished_shards, plan_shards, write_shard


@dataclass(frozen=True)
class ShardTask:
    """One shard still to be written."""

    source: Source
    shard: ShardRange
    folder: Path
    fingerprint: str
    dtype: Literal["float16", "bfloat16", "float32"]
    max_tokens: int


def embedding_sources(config: EmbedConfig) -> list[Source]:
    """Query sets and pools to embed, each once; a store is named like its source."""
    mbeir = Mbeir(config.root)
    sources: dict[str, Source] = {}
    for split in config.splits:
        tasks = chosen_tasks(mbeir, split, config.tasks)
        queries = [
            query_source(mbeir, task, split, choice=config.instruction, seed=config.seed) for task in tasks
        ]
        sources |= {source.name: source for source in (*queries, *pool_sources(mbeir, split, tasks))}
    return list(sources.values())


def content_settings(config: EmbedConfig, source: Source) -> dict[str, Any]:
    """Everything that decides a store's content."""
    model = {} if config.model == OurSystem() else {"model": config.model.model_dump(mode="json")}
    return model | {
        "checkpoint": checkpoint_fingerprint(config.checkpoint),
        "source": source.fingerprint,
        "name": source.name,
        "rows_per_shard": config.rows_per_shard,
        "dtype": config.dtype,
        "compute_dtype": config.compute_dtype,
    }


def checkpoint_fingerprint(path: str) -> str:
    """Names a checkpoint by its settings and the size and head of its weights, without reading gigabytes."""
    folder = Path(path)
    settings = next(
        (folder / name for name in (SETTINGS_FILE, "config.json") if (folder / name).exists()), None
    )
    parts: list[Any] = [read_json(settings) if settings else path]
    for file in sorted(folder.rglob("*.safetensors")):  # Sentence Transformers keeps modules in folders
        with open(file, "rb") as handle:
            head = handle.read(1 << 20)
            handle.seek(max(0, file.stat().st_size - (1 << 20)))
            parts.append([file.name, file.stat().st_size, fingerprint([head.hex(), handle.read().hex()])])
    return fingerprint(parts)


def missing_shards(
    config: EmbedConfig, sources: Sequence[Source] | None = None
) -> tuple[list[ShardTask], int]:
    """Shards still to be written, dearest sources first, and how many rows are done already.

    `sources` are embedded in place of those that the settings name.
    """
    tasks, rows_done = [], 0
    for source in embedding_sources(config) if sources is None else sources:
        folder = Path(config.output) / source.name
        plan = plan_shards(len(source), config.rows_per_shard)
        name = fingerprint(content_settings(config, source))
        done = finished_shards(folder, plan, name)
        for shard in plan:
            if shard.index in done:
                rows_done += shard.num_rows
            else:
                tasks.append(ShardTask(source, shard, folder, name, config.dtype, config.max_tokens))
    return tasks, rows_done


def embed_shard(encoder: Embedder, task: ShardTask) -> dict[str, Any]:
    """Write one shard; the same task gives the same file.

    Returns:
        Counts for the progress bar and the summary.
    """
    started = time.perf_counter()
    records = [task.source[row] for row in range(task.shard.start, task.shard.stop)]
    items = [encoder.builder.build(record) for record in records]
    vectors_ND = encoder.embed_items(items, max_tokens=task.max_tokens).numpy()
    ids = [record.qid if isinstance(record, Query) else record.did for record in records]
    write_shard(task.folder, task.shard, ids, vectors_ND, dtype=task.dtype, fingerprint=task.fingerprint)
    return {
        "rows": len(records),
        "tokens": sum(item.num_tokens for item in items),
        "seconds": time.perf_counter() - started,
    }


def finish_stores(config: EmbedConfig, sources: Sequence[Source] | None = None) -> None:
    """Write each store's manifest, once all its shards are there; `sources` as in `missing_shards`."""
    for source in embedding_sources(config) if sources is None else sources:
        settings = content_settings(config, source)
        folder = Path(config.output) / source.name
        finish_store(
            folder,
            plan_shards(len(source), config.rows_per_shard),
            fingerprint=fingerprint(settings),
            settings=settings,
        )


class EmbeddingWorker:
    """One model; writes one embedding shard a call."""

    def __init__(self, config: EmbedConfig) -> None:
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
        self._encoder = load_embedder(
            config.checkpoint, config.model, device=device, dtype=config.compute_dtype
        )

    def __call__(self, task: ShardTask) -> dict[str, Any]:
        """See `embed_shard`."""
        return embed_shard(self._encoder, task)
