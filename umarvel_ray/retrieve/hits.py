"""Found rows → runs: the parts of a search on disk, and the run they become, a batch of queries at a time.

A part holds rows of the pool, not ids: 12 bytes a hit. Ids are looked up once, when the run is written, whole
columns at a time. Q queries, K hits.
"""

import os
from collections.abc import Iterable, Iterator

import numpy as np
import pyarrow as pa

from umarvel_ray.artifacts import atomic_write
from umarvel_ray.errors import ShardError
from umarvel_ray.retrieve.search import TopK
from umarvel_ray.storage import read_bytes

_BATCH_HITS = 1 << 20
"""Per record batch of a run; their ids stay far below the 2 GB that one Arrow array of strings can hold."""


def write_hits(path: str | os.PathLike, hits: TopK) -> None:
    """Write a part, by rename."""
    num_queries, width = hits.rows_QK.shape
    columns = [
        pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(values).reshape(-1)), width)
        if width
        else pa.array([[]] * num_queries, pa.list_(pa.from_numpy_dtype(values.dtype), 0))
        for values in (hits.rows_QK, hits.scores_QK)
    ]
    batch = pa.record_batch(columns, names=["row", "score"])
    with atomic_write(path, "wb") as file, pa.ipc.new_file(file, batch.schema) as writer:
        writer.write_batch(batch)


def read_hits(path: str | os.PathLike) -> TopK:
    """Read a part.

    Raises:
        ShardError: It is missing or broken.
    """
    try:
        batch = pa.ipc.open_file(pa.BufferReader(read_bytes(path))).get_batch(0)
        rows_QK, scores_QK = (
            batch.column(name).flatten().to_numpy().reshape(len(batch), batch.column(name).type.list_size)
            for name in ("row", "score")
        )
    except (OSError, KeyError, pa.ArrowException) as error:
        reason = " ".join(str(error).split())
        raise ShardError(
            f"{path}: not a part of a search ({reason}). Remove it and run the search again."
        ) from None
    return TopK(scores_QK, rows_QK)


def write_run(
    path: str | os.PathLike, blocks: Iterable[TopK], *, qids: pa.ChunkedArray, dids: pa.LargeStringArray
) -> int:
    """Write the run of hits, by rename; one batch at a time is in memory.

    Args:
        path: The run file.
        blocks: Hits of the queries in order.
        qids: All queries.
        dids: The pool's ids, by row.

    Returns:
        How many hits.
    """
    schema = pa.schema({"qid": pa.string(), "did": pa.list_(pa.string()), "score": pa.list_(pa.float32())})
    start, num_hits = 0, 0
    with atomic_write(path, "wb") as file, pa.ipc.new_file(file, schema) as writer:
        for hits in _batches(blocks):
            num_queries, width = hits.rows_QK.shape
            offsets = pa.array(np.arange(num_queries + 1, dtype=np.int32) * width)
            names = dids.take(pa.array(hits.rows_QK.reshape(-1))).cast(pa.string())
            scores = pa.array(np.ascontiguousarray(hits.scores_QK).reshape(-1))
            writer.write_batch(
                pa.record_batch(
                    [
                        pa.concat_arrays(qids.slice(start, num_queries).chunks),
                        pa.ListArray.from_arrays(offsets, names),
                        pa.ListArray.from_arrays(offsets, scores),
                    ],
                    schema=schema,
                )
            )
            start += num_queries
            num_hits += num_queries * width
    return num_hits


def _batches(blocks: Iterable[TopK]) -> Iterator[TopK]:
    """The same hits in batches of one size: a run's bytes do not tell how its search was cut."""
    waiting: list[TopK] = []
    for hits in blocks:
        waiting.append(hits)
        rows = max(1, _BATCH_HITS // max(1, hits.rows_QK.shape[1]))
        if sum(len(part.rows_QK) for part in waiting) < rows:
            continue
        joined = _joined(waiting)
        whole = len(joined.rows_QK) - len(joined.rows_QK) % rows
        for start in range(0, whole, rows):
            yield TopK(joined.scores_QK[start : start + rows], joined.rows_QK[start : start + rows])
        waiting = [TopK(joined.scores_QK[whole:], joined.rows_QK[whole:])]
    if waiting and len((rest := _joined(waiting)).rows_QK):
        yield rest


def _joined(parts: list[TopK]) -> TopK:
    if len(parts) == 1:
        return parts[0]
    return TopK(
        np.concatenate([part.scores_QK for part in parts]), np.concatenate([part.rows_QK for part in parts])
    )
