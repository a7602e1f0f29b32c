"""Look before spending: every fault of settings and data, and the plan of a run, with nothing started."""

import time
from dataclasses import dataclass
from typing import Any

import yaml
from rich.table import Table

from umarvel_ray.artifacts import is_claimed, is_finished
from umarvel_ray.config import Config
from umarvel_ray.data.check import ImageCheck, check_mbeir
from umarvel_ray.data.mbeir import Mbeir
from umarvel_ray.data.sources import (
    chosen_tasks,
    pool_sources,
    query_source,
)
from umarvel_ray.data.text_pairs import CaptionPairs, NliPairs, check_captions
from umarvel_ray.errors import CheckpointError, DataError, UmarvelError
from umarvel_ray.pipeline.settings import MineConfig, RunConfig
from umarvel_ray.pipeline.stages import recipe
from umarvel_ray.pipeline.view import View, short_time
from umarvel_ray.retrieve.settings import EmbedConfig, RerankConfig, RerankRequest, SearchConfig
from umarvel_ray.runtime.cluster import exposures
from umarvel_ray.storage import at
from umarvel_ray.train.settings import MbeirData, StageConfig

RUN_FILE = "run.json"
"""A run's claim on its folder."""


@dataclass(frozen=True)
class Findings:
    """What a look at a run's settings and data found.

    Attributes:
        faults: One line each, the output folder's first.
        looked_at: How much was there, for people.
    """

    faults: tuple[UmarvelError, ...]
    looked_at: str


def run_claim(run: RunConfig) -> dict[str, Any]:
    """What owns a run's folder: all that decides its results. Workers and title may change."""
    return run.model_dump(mode="json", exclude={"output", "runtime", "title"})


def find_faults(run: RunConfig, *, images: ImageCheck = "exists") -> Findings:
    """Read settings and data of a run, every line once; nothing is written but the files' indexes."""
    faults: list[UmarvelError] = []
    counts: list[str] = []

    def attempt(step: Any) -> Any:
        try:
            return step()
        except UmarvelError as error:
            faults.append(error)
            return None

    attempt(lambda: is_claimed(run.output, run_claim(run), claim=RUN_FILE))

    if not run.backbone.startswith("hf://") and not (at(run.backbone) / "config.json").exists():
        faults.append(
            CheckpointError(
                f"{run.backbone}: no config.json there, so no backbone. Give a Transformers folder or "
                "hf://OWNER/NAME."
            )
        )
    mbeir = attempt(lambda: Mbeir(run.data.root))
    if mbeir is not None:
        # Training reads all data sets, whatever tasks are evaluated.
        found = attempt(lambda: check_mbeir(run.data.root, splits=("train",), images=images)) or []
        named = run.data.tasks
        tasks = None if named is None else attempt(lambda: chosen_tasks(mbeir, "test", named))
        if named is None or tasks:
            splits = ("val", "test")
            found += (
                attempt(lambda: check_mbeir(run.data.root, tasks=tasks, splits=splits, images=images)) or []
            )
        faults += [DataError(fault) for fault in dict.fromkeys(found)]
        counts.append(f"{len(tasks if tasks is not None else mbeir.tasks('test'))} tasks")
    sentences = attempt(lambda: NliPairs(run.data.nli, use_hard_negatives=False))
    if sentences is not None:
        counts.append(f"{len(sentences):,} sentence pairs")
    captions = attempt(lambda: CaptionPairs(run.data.captions, image_root=run.data.caption_images))
    if captions is not None:
        counts.append(f"{len(captions):,} captions")
        faults += [
            DataError(fault) for fault in attempt(lambda: check_captions(captions, images=images)) or []
        ]
    return Findings(tuple(faults), ", ".join(counts))


def require_sound(run: RunConfig, view: View) -> None:
    """Look before the first job starts.

    Raises:
        UmarvelError: The first fault, with the number of all.
    """
    started = time.perf_counter()
    found = find_faults(run)
    if found.faults:
        first, *others = found.faults
        more = f" ({len(found.faults)} faults in all; `umarvel check` lists them.)" if others else ""
        raise type(first)(f"{first}{more}")
    view.line(f"checked {found.looked_at} in {short_time(time.perf_counter() - started)}: no faults")


def check_run(run: RunConfig, view: View, *, images: ImageCheck = "exists") -> list[str]:
    """All faults of a run, one line each; prints them, and a line that says there are none."""
    found = find_faults(run, images=images)
    for fault in found.faults:
        view.console.print(str(fault), style="red", soft_wrap=True, markup=False)
    for warning in exposures():
        view.console.print(f"warning: {warning}", style="yellow", soft_wrap=True, markup=False)
    number = len(found.faults)
    view.line(f"{number} fault{'s' * (number > 1)}" if number else f"{found.looked_at}: no faults found")
    return [str(fault) for fault in found.faults]


def print_settings(config: Config, view: View) -> None:
    """The settings as they were understood, as YAML."""
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    view.console.print(text, markup=False, soft_wrap=True)


def print_plan(run: RunConfig, view: View) -> None:
    """The settings, and every job with what it will read, write and compute."""
    print_settings(run, view)
    table = Table(title=f"{run.title}: the plan")
    table.add_column("job", no_wrap=True)
    table.add_column("work")
    table.add_column("state", no_wrap=True)
    mbeir = Mbeir(run.data.root)
    for job in recipe(run):
        state = "finished" if is_finished(job.config.output) else "to do"  # type: ignore[attr-defined]
        table.add_row(job.name, _work(job.config, mbeir), state)
    view.console.print(table)
    runtime = run.runtime
    workers = max(runtime.num_workers, runtime.num_actors)
    view.line(
        f"needs at once: {workers} × ({runtime.cpus} CPUs, {runtime.gpus:g} GPUs) and one reader; "
        f"training is cut into {runtime.num_workers} lanes"
    )


def _work(config: Config, mbeir: Mbeir) -> str:
    if isinstance(config, StageConfig):
        length = (
            f"{config.train.num_steps} steps"
            if config.train.num_steps
            else f"{config.train.num_epochs} epochs"
        )
        batch = config.train.batch_size
        negatives = ""
        if config.model == "encoder" and config.loss.kind == "info_nce" and config.loss.negatives == "batch":
            data = config.data
            hard = data.num_negatives or 0 if isinstance(data, MbeirData) and data.lists else 0
            negatives = f", up to {batch * (1 + hard) - 1:,} negatives each"
        return f"{length} of {batch} queries{negatives}, {config.train.trainable}, seed {config.seed}"
    if isinstance(config, EmbedConfig):
        sources = {}  # by name: val and test share pools
        for split in config.splits:
            tasks = chosen_tasks(mbeir, split, config.tasks)
            queries = [query_source(mbeir, task, split) for task in tasks]
            sources |= {source.name: source for source in (*queries, *pool_sources(mbeir, split, tasks))}
        lengths = [len(source) for source in sources.values()]
        rows, shards = sum(lengths), sum(-(-length // config.rows_per_shard) for length in lengths)
        return f"{rows:,} records in {shards:,} shards, {config.dtype}"
    if isinstance(config, SearchConfig | RerankConfig):
        parts = []
        for request in config.requests:
            depth = f"top {request.depth}"
            part = request.share if isinstance(request, RerankRequest) else 1
            share = f", {part:.0%} of the queries" if part < 1 else ""
            parts.append(f"{request.split} {'+'.join(request.scopes)} {depth}{share}")
        return "; ".join(parts)
    if isinstance(config, MineConfig):
        num_tasks = len(chosen_tasks(mbeir, "train", config.tasks))
        return f"{num_tasks} tasks, {config.scope} pool, rule {config.mining.rule}"
    return ""
