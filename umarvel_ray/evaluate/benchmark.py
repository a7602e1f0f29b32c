"""M-BEIR's protocol: which metric, which k, which pool; one results document per stage.

The headline of a task is hit@k with the k of its row in `TASKS`; the mean of a stage is the plain mean of its
tasks' headlines, as the benchmark's papers print it. hit@k is measured as the benchmark does; recall, nDCG
and mAP count only the positives that the pool holds, because OVEN and InfoSeek list each other's and would
otherwise never reach 1.
"""

import logging
import math
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from umarvel_ray.data.mbeir import TASK_BY_NAME, TASKS, Task
from umarvel_ray.data.trec import Qrels, Run, check_join
from umarvel_ray.errors import DataError
from umarvel_ray.evaluate.analysis import (
    PoolIndex,
    error_kinds,
    score_histograms,
    tie_bounds,
    twin_counts,
)
from umarvel_ray.evaluate.metrics import DEFINITION, first_positive_rank, judge, parse_metric

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

logger = logging.getLogger(__name__)

PoolKind = Literal["local", "pair", "global"]
POOLS: tuple[PoolKind, ...] = ("local", "pair", "global")
"""The task's own candidates; those of OVEN and InfoSeek together, which list each other's as right; all
tasks'."""
RANKS = (1, 5, 10, 20, 50)
"""Every k that M-BEIR's tables print; those deeper than both the run and the headline are left out."""
NUM_STANDARD_ERRORS = 2
"""A headline this near to chance, or below it, is flagged."""


def headline(task: Task) -> str:
    """The metric that stands for a task: `"hit@10"` for the three fashion tasks, `"hit@5"` for the others."""
    return f"hit@{task.headline_k}"


@dataclass(frozen=True)
class QueryScores:
    """One task's queries on one pool, for comparisons: their headline, and where their first positive stands.

    Attributes:
        qids: Q of them.
        value_Q: float64, the headline of each; between 0 and 1 where several prompts were averaged.
        rank_Q: int64, from 1; 0 where the run does not hold one.
    """

    qids: tuple[str, ...]
    value_Q: np.ndarray
    rank_Q: np.ndarray


def query_scores(task: Task, run: Run, qrels: Qrels) -> QueryScores:
    """Each query's own figures; errors as `evaluate_run`."""
    ranking = dict(zip(run.qids, run.dids, strict=True))
    judged = judge(qrels, ranking, depth=max((len(dids) for dids in ranking.values()), default=1))
    function, k = parse_metric(headline(task))
    return QueryScores(judged.qids, function(judged, k), first_positive_rank(judged))


def average_prompts(results: Sequence[dict[str, Any]], headline_name: str) -> dict[str, Any]:
    """One result of several that differ in the instruction alone: means, and the headline's spread."""
    first = results[0]
    means = {
        name: float(np.mean([result[name] for result in results]))
        if "@" in name and isinstance(value, float)
        else value
        for name, value in first.items()
    }
    values = [result[headline_name] for result in results]
    spread = {
        "num": len(values),
        "values": values,
        "min": min(values),
        "max": max(values),
        "deviation": float(np.std(values, ddof=1)) if len(values) > 1 else 0.0,
    }
    return means | {"prompts": spread}


def evaluate_run(
    task: Task,
    run: Run,
    qrels: Qrels,
    *,
    pool_dids: Collection[str] | PoolIndex | None = None,
    content_key: Callable[[str], bytes | None] | None = None,
    rough_key: Callable[[str], Hashable | None] | None = None,
) -> dict[str, Any]:
    """Score one task's run on one pool.

    Args:
        task: Decides the headline.
        run: All queries of the split, best candidate first.
        qrels: The judgements of the same task and split.
        pool_dids: Ids of the pool that was searched: finds positives that cannot be reached, and chance.
            Anything with a fast `in` (a set, a mapping) is used as it is; a list is hashed first. A
            `PoolIndex` also tells which kinds of error were made.
        content_key: did → a key that copies share; finds queries that miss though a copy was found.
        rough_key: See `twin_counts`.

    Returns:
        `num_queries`, the metrics (`hit@1` …, `recall@` of the headline's k, `ndcg@10`, `map@10`, `mrr@10`),
        `queries_tied_at_cut` (the candidates at ranks k and k + 1 score the same, so the tie rule decides),
        and, None without `pool_dids`: `pool_size`, `positives_outside_pool`,
        `queries_without_reachable_positive`, `chance` (the headline of a random ranking) and `at_chance`.
        Then `ties_lost` and `ties_won`, the headline if every exact tie went against or for the query,
        `histograms` of scores, and what `PoolIndex` and `content_key` allow: `errors` and `copies`.

    Raises:
        DataError: Scores are infinite or all equal; run, qrels and pool do not belong together; or the run is
            too shallow for the headline.
    """
    where = f"{task.name}: run"
    if not len(run):
        raise DataError(f"{where}: holds no query. Search first, or check the name of the split.")
    check_join(run, qrels, run_name=where)
    _check_scores(run, where=where)
    ranking: dict[str, Sequence[str]] = dict(zip(run.qids, run.dids, strict=True))
    pool: Collection[str] | PoolIndex | None = None
    if pool_dids is not None:
        ready = isinstance(pool_dids, Set | Mapping | PoolIndex)
        pool = pool_dids if ready else frozenset(pool_dids)
        qrels_of_pool = _reachable(ranking, qrels, pool, where=where)
    else:
        qrels_of_pool = qrels

    depth = min(len(dids) for dids in ranking.values())
    needed = max(task.headline_k, 10)
    if depth < needed and (pool is None or depth < len(pool)):
        raise DataError(
            f"{where}: holds {depth} candidates per query, {headline(task)} and ndcg@10 need {needed}. "
            f"Search with k of at least {needed}."
        )
    ranks = [k for k in RANKS if k <= max(depth, needed)]
    judged = judge(qrels_of_pool, ranking, depth=max(ranks))
    result: dict[str, Any] = {"num_queries": len(ranking)}
    for name in [*(f"hit@{k}" for k in ranks), f"recall@{task.headline_k}", "ndcg@10", "map@10", "mrr@10"]:
        function, k = parse_metric(name)
        result[name] = float(function(judged, k).mean())
    result["queries_tied_at_cut"] = _num_tied(run, task.headline_k)
    result["ties_lost"], result["ties_won"] = tie_bounds(run, qrels, task.headline_k)
    result["histograms"] = score_histograms(run, qrels)
    if content_key is not None:
        result["copies"] = twin_counts(run, qrels, task.headline_k, content_key, rough_key)
    if isinstance(pool, PoolIndex):
        result["errors"] = error_kinds(run, qrels, pool, modality=task.candidate_modality, domain=task.domain)

    facts_of_pool = {
        "pool_size": None,
        "positives_outside_pool": None,
        "queries_without_reachable_positive": None,
        "chance": None,
        "at_chance": None,
    }
    if pool is not None:
        num_listed = sum(grade > 0 for qid in ranking for grade in qrels[qid].values())
        chance_Q = chance_of_hit(judged.num_positives_Q, pool_size=len(pool), k=task.headline_k)
        standard_error = math.sqrt(float((chance_Q * (1 - chance_Q)).sum())) / len(ranking)
        chance = float(chance_Q.mean())
        facts_of_pool = {
            "pool_size": len(pool),
            "positives_outside_pool": num_listed - int(judged.num_positives_Q.sum()),
            "queries_without_reachable_positive": int((judged.num_positives_Q == 0).sum()),
            "chance": chance,
            "at_chance": result[headline(task)] <= chance + NUM_STANDARD_ERRORS * standard_error,
        }
    return result | facts_of_pool


def chance_of_hit(num_positives_Q: np.ndarray, *, pool_size: int, k: int) -> np.ndarray:
    """Probability that k candidates drawn without replacement hold a positive, (Q,) float64.

    Args:
        num_positives_Q: int64, positives of each query in the pool.
        pool_size: Candidates of the pool.
        k: Candidates drawn; all of a smaller pool.
    """
    miss_Q = np.ones(len(num_positives_Q))
    for drawn in range(min(k, pool_size)):
        miss_Q *= np.clip(pool_size - num_positives_Q - drawn, 0, None) / (pool_size - drawn)
    return 1 - miss_Q


def assemble_results(
    measured: Mapping[str, Mapping[PoolKind, Mapping[str, Any]]],
    *,
    stage: str,
    checkpoint: Mapping[str, Any],
    settings: Mapping[str, Any],
    versions: Mapping[str, Any],
) -> dict[str, Any]:
    """One stage's results document, ready for `write_json`.

    Args:
        measured: `{task name: {"local": evaluate_run(…), "global": evaluate_run(…)}}`; either may be absent.
        stage: Name of the stage.
        checkpoint: What was evaluated: path, fingerprint, …
        settings: Everything else that decides the figures: prompts, dtype, pixel budget, data hashes, …
        versions: Versions of the libraries.

    Returns:
        `{"stage", "checkpoint", "settings", "versions", "tasks", "mean", "flags", "metric_definition"}`. A
        mean is None where some task lacks that pool. `flags` are sentences about results at chance; each is
        logged too.

    Raises:
        DataError: No task, an unknown task, or pools of one task with different numbers of queries.
    """
    if not measured:
        raise DataError(f"results of {stage}: no task was measured. Name at least one task of the benchmark.")
    if unknown := [name for name in measured if name not in TASK_BY_NAME]:
        raise DataError(
            f"results of {stage}: {len(unknown)} tasks are not M-BEIR's (first: {unknown[0]}). Known tasks: "
            f"{', '.join(task.name for task in TASKS)}."
        )
    tasks: dict[str, Any] = {}
    for task in TASKS:
        pools = measured.get(task.name)
        if pools is None:
            continue
        counts = {kind: result["num_queries"] for kind, result in pools.items()}
        if len(set(counts.values())) != 1:
            raise DataError(
                f"results of {stage}: {task.name} was measured on different queries per pool ({counts}). "
                "Search every pool with all queries of the split."
            )
        entry: dict[str, Any] = {
            "kind": task.kind,
            "headline": headline(task),
            "num_queries": next(iter(counts.values())),
        }
        for kind in POOLS:
            if kind not in pools:
                continue
            result = dict(pools[kind])
            del result["num_queries"]
            entry[kind] = result
        tasks[task.name] = entry
    return results_document(tasks, stage=stage, checkpoint=checkpoint, settings=settings, versions=versions)


def results_document(
    tasks: Mapping[str, Any],
    *,
    stage: str,
    checkpoint: Mapping[str, Any],
    settings: Mapping[str, Any],
    versions: Mapping[str, Any],
    definition: str = DEFINITION,
) -> dict[str, Any]:
    """A results document of entries as `assemble_results` makes them, or `parts.part_results`."""
    flags = [flag for kind in POOLS if (flag := _chance_flag(tasks, kind))]
    for flag in flags:
        logger.warning("%s: %s", stage, flag)
    means = {kind: _mean_headline(tasks, kind) for kind in POOLS}
    return {
        "stage": stage,
        "checkpoint": dict(checkpoint),
        "settings": dict(settings),
        "versions": dict(versions),
        "tasks": dict(tasks),
        # The pair's pool is an extra: documents without it do not mention it.
        "mean": {kind: mean for kind, mean in means.items() if kind != "pair" or mean is not None},
        "flags": flags,
        "metric_definition": definition,
    }


def _chance_flag(tasks: Mapping[str, Any], kind: PoolKind) -> str | None:
    measured = [name for name, entry in tasks.items() if kind in entry]
    poor = [name for name in measured if tasks[name][kind].get("at_chance")]
    if not poor:
        return None
    metric, result = tasks[poor[0]]["headline"], tasks[poor[0]][kind]
    return (
        f"{kind} pool: {len(poor)} of {len(measured)} tasks are not better than chance (first: {poor[0]}, "
        f"{metric} is {result[metric]:.4f}, a random ranking gives {result['chance']:.4f})."
    )


def _mean_headline(tasks: Mapping[str, Any], kind: PoolKind) -> float | None:
    # The pair's pool exists for four tasks: its mean is theirs.
    tasks = {name: entry for name, entry in tasks.items() if kind != "pair" or kind in entry}
    if not tasks or not all(kind in entry for entry in tasks.values()):
        return None
    return float(np.mean([entry[kind][entry["headline"]] for entry in tasks.values()]))


@dataclass(frozen=True)
class TableRow:
    """One task beside the headline of every stage, as a share in [0, 1] or None where it was not measured.

    `task` is None for what is no task of M-BEIR: a zero-shot set, a user's own data.
    """

    task: Task | None
    name: str
    kind: str
    metric: str
    num_queries: int
    values: dict[PoolKind, tuple[float | None, ...]]


@dataclass(frozen=True)
class ResultsTable:
    """Tasks × stages: the shape of the paper's Table 13.

    Attributes:
        stages: Names of the stages, in the order given.
        pools: The pools that any stage was measured on.
        rows: In the benchmark's order of tasks.
        means: Mean over each stage's own tasks, None where one lacks the pool.
        same_tasks: Whether all stages were measured on the same tasks, so that their means compare.
    """

    stages: tuple[str, ...]
    pools: tuple[PoolKind, ...]
    rows: tuple[TableRow, ...]
    means: dict[PoolKind, tuple[float | None, ...]]
    same_tasks: bool


def results_table(documents: Sequence[Mapping[str, Any]]) -> ResultsTable:
    """Lay results documents side by side, one column per stage and pool.

    Raises:
        DataError: No document, or two stages measured a task with other queries or another headline.
    """
    if not documents:
        raise DataError("results table: there are no results. Evaluate at least one stage.")
    pools: tuple[PoolKind, ...] = tuple(
        kind for kind in POOLS if any(kind in entry for doc in documents for entry in doc["tasks"].values())
    )
    rows = []
    listed = {name: None for document in documents for name in document["tasks"]}
    for name in [*(task.name for task in TASKS if task.name in listed), *(set_names(listed))]:
        entries = [document["tasks"].get(name) for document in documents]
        present = [entry for entry in entries if entry is not None]
        facts = {(entry["headline"], entry["num_queries"]) for entry in present}
        if len(facts) != 1:
            raise DataError(
                f"results table: {name} was measured in {len(facts)} different ways "
                f"({', '.join(f'{metric} over {count} queries' for metric, count in sorted(facts))}). Put "
                "only results of the same data side by side."
            )
        metric, num_queries = facts.pop()
        values: dict[PoolKind, tuple[float | None, ...]] = {
            kind: tuple(entry[kind][metric] if entry and kind in entry else None for entry in entries)
            for kind in pools
        }
        rows.append(TableRow(TASK_BY_NAME.get(name), name, present[0]["kind"], metric, num_queries, values))
    return ResultsTable(
        stages=tuple(document["stage"] for document in documents),
        pools=pools,
        rows=tuple(rows),
        means={kind: tuple(document["mean"].get(kind) for document in documents) for kind in pools},
        same_tasks=len({frozenset(document["tasks"]) for document in documents}) == 1,
    )


def set_names(names: Iterable[str]) -> list[str]:
    """Those that are no tasks of M-BEIR, in their order."""
    return [name for name in names if name not in TASK_BY_NAME]


def best_of(values: Sequence[float | None]) -> float | None:
    """The largest value as it is printed, a percentage of one decimal; None unless two can be compared."""
    known = [round(value * 100, 1) for value in values if value is not None]
    return max(known) if len(known) > 1 else None


def print_results_table(documents: Sequence[Mapping[str, Any]], *, console: "Console | None" = None) -> None:
    """Print tasks × stages in percent, the best of each row in bold.

    A terminal too narrow for both pools side by side gets one table per pool, then tables without kinds and
    metrics.
    """
    from rich.console import Console
    from rich.measure import Measurement

    table = results_table(documents)
    console = console or Console()
    singly: list[tuple[PoolKind, ...]] = [(kind,) for kind in table.pools]
    layouts = [
        [_rich_table(table, table.pools, details=True)],
        [_rich_table(table, pools, details=True) for pools in singly],
        [_rich_table(table, pools, details=False) for pools in singly],
    ]
    unbounded = console.options.update(max_width=10_000)
    for layout in layouts:
        if max(Measurement.get(console, unbounded, printed).maximum for printed in layout) <= console.width:
            break
    for printed in layout:
        console.print(printed)


def _rich_table(table: ResultsTable, pools: Sequence[PoolKind], *, details: bool) -> "Table":
    from rich import box
    from rich.table import Table
    from rich.text import Text

    pool_words = " and ".join(pools)
    printed = Table(box=box.SIMPLE_HEAD, title=f"hit@k in percent, {pool_words} pool{'s' * (len(pools) > 1)}")
    printed.add_column("task", no_wrap=True)
    if details:
        printed.add_column("kind", no_wrap=True)
        printed.add_column("metric", no_wrap=True)
    for kind in pools:
        for stage in table.stages:
            words = [kind, *stage.split()] if len(pools) > 1 else stage.split()
            printed.add_column(Text("\n".join(words)), justify="right", vertical="bottom", no_wrap=True)

    def cells(values_of: Mapping[PoolKind, Sequence[float | None]]) -> list[Text]:
        printed_cells = []
        for kind in pools:
            best = best_of(values_of[kind])
            for value in values_of[kind]:
                text = percent(value)
                is_best = value is not None and round(value * 100, 1) == best
                printed_cells.append(Text(text, style="bold" if is_best else ""))
        return printed_cells

    for index, row in enumerate(table.rows):
        words = (row.name, row.kind, row.metric) if details else (row.name,)
        printed.add_row(*words, *cells(row.values), end_section=index == len(table.rows) - 1)
    words = ("mean", f"{len(table.rows)} tasks", "") if details else ("mean",)
    printed.add_row(*words, *cells(table.means))
    return printed


def percent(value: float | None) -> str:
    """`0.6324` → `"63.2"`; `"–"` for what was not measured."""
    return "–" if value is None else f"{value * 100:.1f}"


def _check_scores(run: Run, *, where: str) -> None:
    """Refuse scores that rank nothing: infinite, or the same for everything. `Run` itself refuses NaN."""
    infinite: list[str] = []
    num_ranked = num_varied = 0
    for qid, scores_K in zip(run.qids, run.scores, strict=True):
        if not np.isfinite(scores_K).all():
            infinite.append(qid)
        elif len(scores_K) > 1:
            num_ranked += 1
            num_varied += bool(scores_K[0] != scores_K[-1])
    if infinite:
        raise DataError(
            f"{where}: {len(infinite)} of {len(run)} queries have a score that is infinite (first: query "
            f"{infinite[0]}). The embeddings are broken: check the checkpoint and its dtype, embed again."
        )
    if num_ranked and not num_varied:
        raise DataError(
            f"{where}: in all {num_ranked} rankings every candidate has the same score (first: query "
            f"{run.qids[0]}). The encoder gives one vector for all: check that the checkpoint is loaded."
        )


def _reachable(
    ranking: Mapping[str, Sequence[str]], qrels: Qrels, pool: Collection[str] | PoolIndex, *, where: str
) -> dict[str, dict[str, int]]:
    """The qrels without the positives that the pool lacks; refuses a pool that is not the one searched."""
    foreign = [(qid, did) for qid, dids in ranking.items() for did in dids if did not in pool]
    if foreign:
        qid, did = foreign[0]
        raise DataError(
            f"{where}: {len(foreign)} ranked candidates are not in the pool of {len(pool)} (first: query "
            f"{qid}, candidate {did}). Evaluate with the pool that was searched."
        )
    reachable = {
        qid: {did: grade for did, grade in judged.items() if did in pool} for qid, judged in qrels.items()
    }
    if not any(grade > 0 for judged in reachable.values() for grade in judged.values()):
        qid, judged = next(iter(qrels.items()))
        raise DataError(
            f"{where}: no positive of any of {len(qrels)} queries is in the pool of {len(pool)} (first: "
            f"query {qid}, positive {next(iter(judged), 'none')}). Use the pool and qrels of one data set."
        )
    return reachable


def _num_tied(run: Run, k: int) -> int:
    return sum(len(scores_K) > k and bool(scores_K[k - 1] == scores_K[k]) for scores_K in run.scores)
