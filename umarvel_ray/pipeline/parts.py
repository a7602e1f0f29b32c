"""A part of a job: one shard or batch to look at, or every n-th shard for one of many machines."""

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from umarvel_ray.artifacts import claim_folder
from umarvel_ray.config import Config
from umarvel_ray.errors import ConfigError
from umarvel_ray.pipeline.jobs import claimed_settings
from umarvel_ray.pipeline.only import Only
from umarvel_ray.pipeline.view import View, short_time
from umarvel_ray.retrieve.settings import EmbedConfig
from umarvel_ray.runtime.cluster import RuntimeSettings, connected, prepare_worker
from umarvel_ray.storage import at
from umarvel_ray.train.settings import StageConfig

if TYPE_CHECKING:
    from umarvel_ray.retrieve.embed import StorePlan


def do_part(kind: str, config: Config, runtime: RuntimeSettings, view: View, only: Only) -> None:
    """Do a part of a job; what is finished of it stays.

    Others may work on other parts of the same folder at the same time. A shard that is finished already is
    made once more beside it, and held against it.

    Raises:
        ConfigError: The job has no such parts, or no such shard.
        OutputError: The folder belongs to a job with other settings.
    """
    if only.batch is not None:
        if not isinstance(config, StageConfig):
            raise ConfigError(f"only.batch is a part of a training, this is {kind}.")
        _look_at_batch(config, runtime, view, only.batch)
        return
    if not isinstance(config, EmbedConfig):
        raise ConfigError(f"only.shard and only.part are parts of an embedding job, this is {kind}.")
    from umarvel_ray.retrieve.embed import missing_shards, plan_stores
    from umarvel_ray.runtime.embedding import shard_numbers

    plans = plan_stores(config)
    numbers = shard_numbers(plans)
    total = sum(len(plan.shards) for plan in plans)
    if only.shard is not None and only.shard >= total:
        raise ConfigError(f"only.shard={only.shard}: this job has {total} shards, 0 to {total - 1}.")
    claim_folder(config.output, claimed_settings(kind, config))
    with connected(runtime, view.line):
        if only.shard is not None:
            store = max(index for index, first in enumerate(numbers) if first <= only.shard)
            plan, index = plans[store], only.shard - numbers[store]
            missing = {shard.index for shard in missing_shards(plan)}
            if index not in missing:
                _look_again(plan, index, config, runtime, view)
                return
        _embed(plans, config, runtime, view, only)


def _look_at_batch(config: StageConfig, runtime: RuntimeSettings, view: View, step: int) -> None:
    """The queries of a batch, and the loss and gradient it gives, in this process."""
    from umarvel_ray.train.gather import Lanes
    from umarvel_ray.train.stage import look_at_batch

    prepare_worker(runtime)
    look = look_at_batch(config, Lanes(runtime.num_workers), step=step, how=runtime.strategy)
    view.line(f"batch {step} of {config.output}, weights of step {look.weights_of_step}:")
    view.line("  " + "  ".join(f"{name} {value:.9g}" for name, value in look.figures.items()))
    for name, figure in _logged(config, step).items():
        if name in look.figures and look.weights_of_step == step - 1:
            same = "the same" if figure == look.figures[name] else f"logged as {figure:.9g}"
            view.line(f"  {name}: {same}")
    view.line(f"  {len(look.samples)} queries: {' '.join(look.samples)}")


def _logged(config: StageConfig, step: int) -> dict[str, Any]:
    """What the training wrote of a step; empty where it did not get there."""
    path = at(config.output) / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return next((entry for line in lines if (entry := json.loads(line))["step"] == step), {})


def _embed(
    plans: "list[StorePlan]", config: EmbedConfig, runtime: RuntimeSettings, view: View, only: Only
) -> None:
    from umarvel_ray.retrieve.embed import model_of
    from umarvel_ray.runtime.embedding import embed_stores

    with view.bar("embedding", 0, unit="records") as bar:
        done = embed_stores(
            plans, model_of(config), config, runtime, lambda p: bar.at(p.rows_done), chosen=only.takes
        )
    view.line(
        f"{done.shards:,} shards written, {done.items:,} records embedded in {short_time(done.seconds)}; "
        "the same job without only.* makes what else is missing, and the manifests"
    )


def _look_again(
    plan: "StorePlan", index: int, config: EmbedConfig, runtime: RuntimeSettings, view: View
) -> None:
    """Make a finished shard once more, elsewhere, and say whether it is the same."""
    from umarvel_ray.retrieve.embed import model_of, read_copies, write_copies
    from umarvel_ray.retrieve.store import open_shard
    from umarvel_ray.runtime.embedding import embed_stores

    shard = plan.shards[index]
    with tempfile.TemporaryDirectory(prefix="umarvel-") as folder:
        beside = replace(plan, folder=Path(folder))
        if (copies := read_copies(plan)) is not None:
            write_copies(beside, copies)
        embed_stores([beside], model_of(config), config, runtime, chosen=lambda number: number == index)
        # A shard that takes vectors from others leaves those of its own rows.
        [made] = [path for path in Path(folder).iterdir() if path.suffix == ".arrow"]
        _, ids, vectors_ND = open_shard(made)
        found = dict(zip(ids, vectors_ND, strict=True))
    _, ids, vectors_ND = open_shard(plan.folder / shard.file_name)
    stored = dict(zip(ids, vectors_ND, strict=True))
    differ = [name for name, vector in found.items() if not np.array_equal(stored[name], vector)]
    worst = max((float(np.abs(stored[name] - found[name]).max()) for name in differ), default=0.0)
    where = f"{plan.folder / shard.file_name}, rows {shard.start} to {shard.stop}"
    if differ:
        view.line(
            f"{where}: {len(differ)} of {len(found)} vectors differ (first: {differ[0]}, "
            f"by {worst:.3g} at most)"
        )
    else:
        view.line(f"{where}: made again, {len(found)} vectors are the same to the last bit")
