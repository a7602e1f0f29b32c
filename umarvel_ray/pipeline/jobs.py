"""One function per job. A job reads files, writes one folder, and may be run alone, again, or after a kill.

Each takes its settings, who does the work, and where to show progress, and returns a summary for `done.json`.
"""

import logging
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from umarvel_ray import logs
from umarvel_ray.artifacts import (
    DONE_FILE,
    JOB_FILE,
    claim_folder,
    data_fingerprint,
    fingerprint,
    finish_folder,
    is_claimed,
    is_finished,
    read_json,
    release_folder,
    write_json,
)
from umarvel_ray.config import Config
from umarvel_ray.data.mbeir import Mbeir
from umarvel_ray.data.sources import Source, chosen_tasks, local_pool_source, pool_sources, query_source
from umarvel_ray.data.trec import Run
from umarvel_ray.errors import DataError, UmarvelError
from umarvel_ray.pipeline.lock import only_one
from umarvel_ray.pipeline.mining import MiningInputs
from umarvel_ray.pipeline.progress import Recorder
from umarvel_ray.pipeline.settings import CompareConfig, EvaluateConfig, MineConfig, ReportConfig
from umarvel_ray.pipeline.view import View, short_time
from umarvel_ray.retrieve.settings import EmbedConfig, RerankConfig, SearchConfig, run_path
from umarvel_ray.runtime.cluster import RuntimeSettings, connected
from umarvel_ray.runtime.metrics import publish
from umarvel_ray.storage import Place, at, is_remote
from umarvel_ray.train.settings import StageConfig

logger = logging.getLogger(__name__)

Summary = dict[str, Any]
_WORTH_TELLING_FLOP = 1e12
"""A search of seconds is done before its estimate is read."""
_FOR_PLANS = {"flop", "most_actor_bytes", "actor_seconds"}
"""Figures that `umarvel plan` measures by; no news to who watches."""
_FIGURES_SHOWN = 4
"""Of a job's summary on its line; all of them stand in its `done.json`."""


def train(config: StageConfig, runtime: RuntimeSettings, view: View) -> Summary:
    """One training stage: data and a checkpoint → the next checkpoint."""
    from umarvel_ray.retrieve.teacher import require_teacher
    from umarvel_ray.runtime.training import run_stage
    from umarvel_ray.train.settings import MbeirData
    from umarvel_ray.train.stage import batch_plan, open_training_set, require_sound

    if isinstance(config.data, MbeirData):
        require_teacher(config.data)
    data = open_training_set(config)
    require_sound(config, data)
    num_steps = config.train.steps(batch_plan(config, data).steps_per_epoch)
    if config.train.rate_of_batch_size:
        view.line(config.train.rate_note)
    last: dict[str, Any] = {}
    with view.bar("training", num_steps, unit="steps") as bar:

        def on_step(entry: dict[str, Any]) -> None:
            last.update(entry)
            temperature = f"  τ {entry['temperature']:.4f}" if "temperature" in entry else ""
            bar.at(
                entry["step"],
                f"loss {entry['loss']:.3f}{temperature}  {entry['queries_per_s']:.0f} queries/s",
            )

        run_stage(config, runtime, on_step)
    kept = ("loss", "temperature", "accuracy", "queries_per_s")
    return {
        "steps": num_steps,
        "training_queries": len(data),
        **{key: last[key] for key in kept if key in last},
    }


def embed(
    config: EmbedConfig, runtime: RuntimeSettings, view: View, *, sources: Sequence[Source] | None = None
) -> Summary:
    """Query sets and pools, or the given sources, → embedding stores."""
    from umarvel_ray.retrieve.embed import model_of, plan_stores
    from umarvel_ray.runtime.embedding import Progress, embed_stores

    plans = plan_stores(config, sources)
    with view.bar("embedding", sum(plan.num_rows for plan in plans), unit="records") as bar:

        def show(progress: Progress) -> None:
            if not progress.items:
                bar.at(progress.rows_done)
                return
            rate, share = progress.items / progress.seconds, progress.busy_share
            bar.at(
                progress.rows_done,
                f"{rate:,.0f} items/s  {progress.tokens / progress.seconds:,.0f} tokens/s  "
                f"encoders {share:.0%} busy",
            )

        progress = embed_stores(plans, model_of(config), config, runtime, show)
    summary = progress.summary()
    write_json(at(config.output) / "summary.json", summary)
    return summary


def search(config: SearchConfig, runtime: RuntimeSettings, view: View) -> Summary:
    """Embedding stores → runs, local and global."""
    from umarvel_ray.runtime.searching import SearchEstimate, SearchTask, search

    mbeir, stores = Mbeir(config.root), at(config.embeddings)
    tasks: list[SearchTask] = []
    for request in config.requests:
        chosen = chosen_tasks(mbeir, request.split, config.tasks)
        everything = tuple(stores / source.name for source in pool_sources(mbeir, request.split, chosen))
        for task in chosen:
            pools = {
                "local": (stores / local_pool_source(mbeir, task, request.split).name,),
                "global": everything,
            }
            for scope in request.scopes:
                tasks.append(
                    SearchTask(
                        queries=stores / query_source(mbeir, task, request.split).name,
                        pools=pools[scope],
                        k=request.depth,
                        output=run_path(config.output, request.split, task.name, scope),
                    )
                )
    told: dict[str, float] = {}

    def announce(estimate: SearchEstimate) -> None:
        told.update(flop=estimate.flop, most_actor_bytes=estimate.actor_bytes)
        if estimate.flop < _WORTH_TELLING_FLOP:
            return
        text = (
            f"  {estimate.flop:.3g} FLOP, {estimate.read_bytes / 1e9:.3g} GB to read, "
            f"at most {estimate.actor_bytes / 1e9:.2g} GB for each actor"
        )
        if not runtime.gpus:
            seconds = estimate.seconds(estimate.measured_rate(runtime.threads), runtime.num_actors)
            text += f"; about {short_time(seconds)} if each actor has cores like this machine's"
        view.line(text)

    with view.bar("searching", len(tasks), unit="runs") as bar:
        done = search(
            tasks,
            runtime,
            query_block_rows=config.query_block_rows,
            backend=config.backend,
            progress=lambda done, total: bar.at(len(tasks) * done / total if total else len(tasks)),
            announce=announce,
        )
    return {"runs": len(tasks), **told, "actor_seconds": done.actor_seconds, "actor_bytes": done.actor_bytes}


def mine(config: MineConfig, runtime: RuntimeSettings, view: View) -> Summary:
    """Runs of the training queries → hard negatives by qid, with counts of all that was dropped."""
    from umarvel_ray.retrieve.mine import mine_run

    inputs = MiningInputs.of(config)
    mined, report = mine_run(inputs.parts, inputs.qrels, inputs.pool, config.mining, seed=config.seed)
    mined.write(at(config.output) / "negatives.arrow")
    write_json(at(config.output) / "mining_report.json", report)
    counts = report["counts"]
    first = {key: counts[key] for key in ("queries", "negatives_kept", "hits_filtered", "queries_short")}
    return {**first, **counts}


def rerank(config: RerankConfig, runtime: RuntimeSettings, view: View) -> Summary:
    """Runs → P(Yes) of each hit → fused runs, and the teacher of the distillation."""
    from umarvel_ray.retrieve.fusion import Fusion, fuse, teacher_table, tune_alpha
    from umarvel_ray.retrieve.rerank import scored_lists
    from umarvel_ray.retrieve.scores import write_table
    from umarvel_ray.runtime.reranking import score_lists

    output = at(config.output)
    lists = scored_lists(config)
    started, fresh = time.perf_counter(), 0
    with view.bar("re-ranking", sum(len(one.rows) for one in lists), unit="queries") as bar:

        def on_part(queries: int, pairs: int) -> None:
            nonlocal fresh
            fresh += pairs
            bar.advance(queries, f"{fresh / (time.perf_counter() - started):,.0f} pairs/s")

        scores = score_lists(config, lists, runtime, on_part)
    for one, own in zip(lists, scores, strict=True):
        own.write(run_path(output / "scores", *one.key))
    if config.tunes:
        on_val = {one.name: own for one, own in zip(lists, scores, strict=True) if one.split == "val"}
        tuned = tune_alpha(on_val, {name: _ranking_quality(config, name) for name in on_val})
    elif config.alpha_from:
        tuned = read_json(at(config.alpha_from) / "alpha.json")
    else:
        tuned = {"alpha": config.alpha, "curve": [], "tasks": {}}
    fusion = Fusion(
        config.fusion,
        tuned["alpha"] if config.fusion == "alpha" else config.weight,
        config.weights_by_task,
    )
    write_json(output / "alpha.json", {**tuned, "fusion": fusion.facts()})
    pairs = sum(own.num_pairs for own in scores)
    if config.tune_only:
        return {"pairs": pairs, "alpha": tuned["alpha"]}
    for one, own in zip(lists, scores, strict=True):
        fuse(own, fusion.weights(one.name)).write(run_path(output, *one.key))
    taught = [
        (one, teacher_table(own, fusion.teacher_weights(one.name)))
        for one, own in zip(lists, scores, strict=True)
        if one.split == "train"
    ]
    if taught:
        import pyarrow as pa

        facts = {
            "checkpoint": taught[0][0].facts["checkpoint"],
            "fusion": fusion.facts(),
            "runs": {one.name: one.facts["run"] for one, _ in taught},
        }
        write_table(pa.concat_tables([table for _, table in taught]), facts, output / "teacher.arrow")
    return {"pairs": pairs, "alpha": tuned["alpha"]}


def _ranking_quality(config: RerankConfig, name: str) -> Callable[[Run], np.ndarray]:
    """What alpha is tuned for: the reciprocal rank [Q] of each query of a val request.

    It feels every move; the headline of a few dozen queries hardly does.
    """
    from umarvel_ray.data.trec import read_qrels
    from umarvel_ray.evaluate.metrics import score_queries

    own = [one for one in config.lists if one.name == name and one.split == "val"]
    if own:
        assert own[0].qrels is not None  # a rule of the settings
        qrels = read_qrels(own[0].qrels)
    else:
        assert config.root is not None
        mbeir = Mbeir(config.root)
        (task,) = chosen_tasks(mbeir, "val", (name,))
        qrels = mbeir.qrels(task, "val")

    def quality(run: Run) -> np.ndarray:
        if not run.qids:
            raise DataError(
                f"{name}, val: no query was scored, so alpha cannot be tuned. Check its qrels, or give alpha."
            )
        return score_queries(qrels, dict(zip(run.qids, run.dids, strict=True)), ["mrr@10"])["mrr@10"]

    return quality


def evaluate(config: EvaluateConfig, runtime: RuntimeSettings, view: View) -> Summary:
    """A model, stored vectors or runs, with judgements → `results.json`."""
    from umarvel_ray.pipeline import evaluation

    return evaluation.evaluate(config, runtime, view)


def report(config: ReportConfig, runtime: RuntimeSettings, view: View) -> Summary:
    """Everything measured → `report.html`, `report.md`, `report.json`."""
    from umarvel_ray.evaluate.report import build_report

    build_report(config, at(config.output))
    return {"page": str(at(config.output) / "report.html")}


def compare(config: CompareConfig, runtime: RuntimeSettings, view: View) -> Summary:
    """Evaluated systems → `compare.html`, `compare.json`."""
    from umarvel_ray.evaluate.compare import build_comparison

    summary = build_comparison(config, at(config.output))
    return {"page": str(at(config.output) / "compare.html"), "sides": len(summary["sides"])}


JOBS: dict[str, tuple[type[Config], Callable[[Any, RuntimeSettings, View], Summary]]] = {
    "train": (StageConfig, train),
    "embed": (EmbedConfig, embed),
    "search": (SearchConfig, search),
    "mine": (MineConfig, mine),
    "rerank": (RerankConfig, rerank),
    "evaluate": (EvaluateConfig, evaluate),
    "report": (ReportConfig, report),
    "compare": (CompareConfig, compare),
}
"""By sub-command: what it is told, and what does it."""


def perform(kind: str, config: Config, runtime: RuntimeSettings, view: View, *, title: str = "") -> bool:
    """Run one job to its end, unless it is finished.

    Returns:
        Whether there was anything to do.

    Raises:
        OutputError: The output folder belongs to a job with other settings, or another process works there.
    """
    output = at(config.output)  # type: ignore[attr-defined]
    title = title or kind
    settings = claimed_settings(kind, config)
    resumed = is_claimed(output, settings)
    if is_finished(output):
        view.line(f"[dim]✓ {title}: finished before[/]")
        return False
    with only_one(output), logs.about(job=title):
        claim_folder(output, settings)
        view.line(f"▸ {title}")
        logger.info("started", extra={"output": str(output)})
        recorder = Recorder(output, title, partial(publish, job=title))
        started = time.perf_counter()
        try:
            with connected(runtime, view.line), view.recorded(recorder):
                summary = JOBS[kind][1](config, runtime, view)
        except UmarvelError:
            recorder.clear()
            release_folder(output)  # refused at the door: the mended settings may have the same folder
            raise
        seconds = time.perf_counter() - started
        recorder.clear()
        done = {"seconds": round(seconds, 2), "resumed": resumed, "runtime": runtime.model_dump(mode="json")}
        finish_folder(output, {**summary, **done})
        logger.info("finished", extra={"figures": summary, "seconds": seconds})
    told = {key: value for key, value in summary.items() if key not in _FOR_PLANS}
    shown = [_figure(key, value) for key, value in told.items() if isinstance(value, int | float)]
    figures = "  ".join(shown[:_FIGURES_SHOWN])
    view.line(f"[green]✓[/] {title}  [dim]{short_time(seconds)}  {figures}[/]")
    return True


def claimed_settings(kind: str, config: Config) -> dict[str, Any]:
    """What decides a job's output: its settings, and what decided the outputs that it reads."""
    # A report's facts tell how the run went (times, machine): they describe it and decide nothing.
    settings = config.model_dump(mode="json", exclude={"output", "facts"})
    inputs = {path: fingerprint(read_json(owner)) for path in _paths(settings) if (owner := _owner(path))}
    data = _data_read(kind, config, [path for path in _paths(settings) if path not in inputs])
    return {"job": kind, "settings": settings, "inputs": inputs, "data": data}


def _data_read(kind: str, config: Any, paths: list[str]) -> dict[str, str]:
    """Content of the data files that a job reads, by name, pictures apart.

    A name for the content, not size and time: these differ between machines and copies of the same file, and
    may agree though the content changed. Reading is cheap: a machine reads each file once, see
    `data_fingerprint`.
    """
    found = {path: data_fingerprint(path) for path in paths if at(path).is_file()}
    source = getattr(config, "data", config)
    root, splits = getattr(source, "root", None), _splits_read(kind, config)
    if root and splits and at(root).is_dir():
        mbeir, tasks = Mbeir(root), getattr(config, "tasks", None)
        for path in dict.fromkeys(path for split in splits for path in mbeir.files(split, tasks)):
            found[str(path.relative_to(mbeir.root))] = data_fingerprint(path)
    return found


def _splits_read(kind: str, config: Any) -> tuple[str, ...]:
    """Splits of M-BEIR whose files a job reads; a search reads embeddings alone."""
    if kind in ("train", "mine"):
        return ("train",)
    if kind == "rerank":
        return tuple(dict.fromkeys(request.split for request in config.requests))
    if kind == "embed":
        return config.splits
    return (config.split,) if kind == "evaluate" else ()


def _paths(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [path for item in value.values() for path in _paths(item)]
    if isinstance(value, list):
        return [path for item in value for path in _paths(item)]
    return [value] if isinstance(value, str) and _is_place(value) else []


def _is_place(text: str) -> bool:
    return text.startswith("/") or (is_remote(text) and not text.startswith("hf://"))


def _owner(path: str) -> Place | None:
    """The claim of the job in whose folder `path` lies."""
    for folder in (at(path), *at(path).parents):
        if (folder / JOB_FILE).is_file():
            return folder / JOB_FILE
    return None


def settings_of(path: str) -> Any:
    """Settings of the job in whose folder `path` lies; None where no job owns it."""
    owner = _owner(path)
    return read_json(owner)["settings"] if owner else None


def seconds_of(output: str | os.PathLike) -> float | None:
    """How long a finished job took; None where it is not finished."""
    done = at(output) / DONE_FILE
    return read_json(done).get("seconds") if done.exists() else None


def _figure(key: str, value: float) -> str:
    text = f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
    return f"{key.replace('_', ' ')} {text}"
