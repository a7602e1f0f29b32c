"""Scoring in a pool of rerankers: parts of runs in, parts on disk out, in any order and after any death."""

from collections.abc import Callable, Sequence
from functools import partial

from umarvel_ray.retrieve.rerank import (
    RerankingWorker,
    ScoredList,
    collect_scores,
    plan_scores,
    require_records,
)
from umarvel_ray.retrieve.scores import Scores
from umarvel_ray.retrieve.settings import RerankConfig
from umarvel_ray.runtime.cluster import RuntimeSettings
from umarvel_ray.runtime.pool import run_pool

OnPart = Callable[[int, int], None]
"""(queries, pairs) of a part that is done; pairs are 0 where it was found finished."""


def score_lists(
    config: RerankConfig,
    lists: Sequence[ScoredList],
    runtime: RuntimeSettings,
    on_part: OnPart = lambda queries, pairs: None,
) -> list[Scores]:
    """P(Yes) of every hit of every list; only what is missing is computed.

    Raises:
        ShardError: Parts that stand there were made with other settings.
        DataError: A query or a candidate is in none of the files.
    """
    parts, missing = plan_scores(config, lists)
    to_score = sum(task.num_queries for tasks in missing for task in tasks)
    if found := sum(task.num_queries for task in parts) - to_score:
        on_part(found, 0)
    if missing:
        require_records(lists)
    for answer in run_pool(missing, partial(RerankingWorker, config), runtime):
        on_part(answer["queries"], answer["pairs"])
    return [collect_scores(one, [task for task in parts if task.of.key == one.key]) for one in lists]
