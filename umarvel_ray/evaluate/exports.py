"""Runs, tables and retrieved candidates in UniIR's forms, for tools that read those."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from umarvel_ray.artifacts import atomic_write
from umarvel_ray.data.mbeir import TASK_BY_NAME, Mbeir, Task, candidate_line, query_line
from umarvel_ray.data.sources import PoolSource, RecordReader
from umarvel_ray.data.trec import Run
from umarvel_ray.storage import Place

_TABLE_RANKS = (1, 5, 10, 20, 50)
_COLUMNS = ("TaskID", "Task", "Dataset", "Split", "Metric", "CandPool", "Value", "UnionPool", "UnionValue")


def uniir_run_name(task: Task, scope: str, split: str, *, depth: int) -> str:
    """`mbeir_mscoco_task0_single_pool_test_k50`: local is its `single`, global its `union`."""
    pool = {"local": "single", "global": "union"}[scope]
    return f"mbeir_{task.name}_{pool}_pool_{split}_k{depth}"


def write_uniir_run(path: Place, run: Run, task: Task, tag: str) -> None:
    """Seven fields a line, the task's id last."""
    run.export_trec(path, tag, task_ids=dict.fromkeys(run.qids, task.task_id))


def write_uniir_table(
    path: Place, measured: Mapping[str, Mapping[Any, Mapping[str, Any]]], split: str
) -> None:
    """One line per task and k, values of four places; hit@k under UniIR's name for it, Recall@k.

    A task that was measured on the global pool only has a line too, which UniIR's own writer leaves out.
    """
    with atomic_write(path) as file:
        file.write("\t".join(_COLUMNS) + "\n")
        for name, pools in measured.items():
            task = TASK_BY_NAME[name]
            for k in _TABLE_RANKS:
                values = [pools.get(scope, {}).get(f"hit@{k}") for scope in ("local", "global")]
                if all(value is None for value in values):
                    continue
                local, union = ("" if value is None else f"{value:.4f}" for value in values)
                cells = [
                    str(task.task_id),
                    task.kind,
                    task.dataset,
                    split,
                    f"Recall@{k}",
                    name,
                    local,
                    "union",
                    union,
                ]
                file.write("\t".join(cells) + "\n")


def retrieved_candidates(
    path: Place,
    run: Run,
    mbeir: Mbeir,
    task: Task,
    split: str,
    pools: Sequence[PoolSource],
    complements: Mapping[str, Sequence[str]] | None,
) -> None:
    """One object per query: `query`, `candidates` in rank order as their lines stand in the pool, and
    `complement_candidates` where asked.

    Args:
        path: JSONL, written by rename.
        run: Best first.
        mbeir: Where the lines are.
        task: The run's.
        split: `"val"` or `"test"`.
        pools: What was searched.
        complements: For a retrieved text or picture its hits in the same pools, best first; the first of the
            opposite modality whose content is not the query's is taken, or null. They are given for the
            first k
            of the headline; a text with a picture has none.
    """
    queries, reader = mbeir.queries(task, split), RecordReader(pools)
    with atomic_write(path) as file:
        for qid, dids in zip(run.qids, run.dids, strict=True):
            record = queries[queries.row_of(qid)]
            found = [reader.candidate(did) for did in dids]
            entry: dict[str, Any] = {
                "query": query_line(record, mbeir.root),
                "candidates": [candidate_line(candidate, mbeir.root) for candidate in found],
            }
            if complements is not None:
                asked = (record.query.txt, record.query.img_path)
                entry["complement_candidates"] = []
                for candidate in found[: task.headline_k]:
                    if candidate.did not in complements:
                        continue
                    opposite = "image" if candidate.modality == "text" else "text"
                    hits = (reader.candidate(did) for did in complements[candidate.did])
                    fits = (
                        hit for hit in hits if hit.modality == opposite and (hit.txt, hit.img_path) != asked
                    )
                    chosen = next(fits, None)
                    entry["complement_candidates"].append(
                        None if chosen is None else candidate_line(chosen, mbeir.root)
                    )
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")
