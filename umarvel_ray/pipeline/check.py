"""Look before spending: every fault of settings and data, and the plan of a run, with nothing started."""

from pathlib import Path
from typing import Any

import yaml
from rich.table import Table

from umarvel_ray.artifacts import is_finished
from umarvel_ray.config import Config
from umarvel_ray.data.mbeir import ImageCheck, Mbeir, check_mbeir
from umarvel_ray.data.sources import (
    chosen_tasks,
    pool_sources,
    query_source,
    tasks_of_split,
    training_tasks,
)
from umarvel_ray.data.text_pairs import CaptionPairs, NliPairs, check_captions
from umarvel_ray.errors import UmarvelError
from umarvel_ray.pipeline.settings import RunConfig
from umarvel_ray.pipeline.stages import recipe
from umarvel_ray.pipeline.view import View
from umarvel_ray.train.settings import StageConfig


def check_run(run: RunConfig, view: View, *, images: ImageCheck = "exists") -> list[str]:
    """All faults of a run, one line each; prints them, and a line that says there are none."""
    faults: list[str] = []

    def attempt(step: Any) -> Any:
        try:
            return step()
        except UmarvelError as error:
            faults.append(str(error))
            return None

    if not run.backbone.startswith("hf://") and not (Path(run.backbone) / "config.json").exists():
        faults.append(
            f"{run.backbone}: no config.json there, so no backbone. Give a Transformers folder or hf://OWNER/NAME."
        )
    mbeir = attempt(lambda: Mbeir(run.data.root))
    if mbeir is not None:
        for split in ("val", "test"):
            if not mbeir.tasks(split):
                faults.append(f"{run.data.root}: no query/{split} file of any task. Unpack M-BEIR there.")
        tasks = None
        if run.data.tasks is not None:
            tasks = attempt(lambda: chosen_tasks(mbeir, "test", run.data.tasks))
        splits = ("train", "val", "test")
        faults += attempt(lambda: check_mbeir(run.data.root, tasks=tasks, splits=splits, images=images)) or []
    attempt(lambda: len(NliPairs(run.data.nli, use_hard_negatives=False)))
    captions = attempt(lambda: CaptionPairs(run.data.captions, image_root=run.data.caption_images))
    if captions is not None:
        faults += attempt(lambda: check_captions(captions, images=images)) or []
    output = Path(run.output)
    if not faults and (output / "run.json").exists():
        from umarvel_ray.pipeline.run import claim_run

        attempt(lambda: claim_run(output, run))
    for fault in faults:
        view.console.print(fault, style="red", soft_wrap=True, markup=False)
    view.line(f"{len(faults)} fault{'s' * (len(faults) > 1)}" if faults else "no faults found")
    return faults


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
        table.add_row(job.name, _work(job.config, mbeir, run), state)
    view.console.print(table)
    runtime = run.runtime
    workers = max(runtime.num_workers, runtime.num_actors)
    view.line(
        f"needs at once: {workers} × ({runtime.cpus} CPUs, {runtime.gpus:g} GPUs) and one reader; "
        f"training is cut into {runtime.num_workers} lanes"
    )


def _work(config: Any, mbeir: Mbeir, run: RunConfig) -> str:
    if isinstance(config, StageConfig):
        length = (
            f"{config.train.num_steps} steps"
            if config.train.num_steps
            else f"{config.train.num_epochs} epochs"
        )
        return f"{length} of {config.train.batch_size} queries, {config.train.trainable}, seed {config.seed}"
    if hasattr(config, "splits"):
        rows = 0
        shards = 0
        for split in config.splits:
            tasks = tasks_of_split(mbeir, split)
            for source in (
                *(query_source(mbeir, task, split) for task in tasks),
                *pool_sources(mbeir, split, tasks),
            ):
                rows += len(source)
                shards += -(-len(source) // config.rows_per_shard)
        return f"{rows:,} records in {shards:,} shards, {config.dtype}"
    if hasattr(config, "requests"):
        parts = []
        for request in config.requests:
            depth = f"top {request.depth}"
            share = f", {request.share:.0%} of the queries" if getattr(request, "share", 1) < 1 else ""
            parts.append(f"{request.split} {'+'.join(request.scopes)} {depth}{share}")
        return "; ".join(parts)
    if hasattr(config, "mining"):
        return f"{len(training_tasks(mbeir))} tasks, {config.scope} pool, rule {config.mining.rule}"
    return ""
