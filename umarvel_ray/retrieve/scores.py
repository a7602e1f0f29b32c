"""What a reranker said of a run, as Arrow: parts while it works, one file per run, and the teacher's lists.

A file names what made it; whoever reads it says what it must have been, so scores of another checkpoint are
refused and not silently used.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from umarvel_ray.artifacts import atomic_write, changed_settings
from umarvel_ray.errors import ShardError
from umarvel_ray.storage import at, local_file

if TYPE_CHECKING:
    import pyarrow as pa

_METADATA_KEY = b"umarvel_ray.scores"
_ROWS_PER_BATCH = 8192


@dataclass(frozen=True, eq=False)
class Scores:
    """Per query its candidates in the order of the recall, what the recall gave each, and P(Yes).

    Attributes:
        table: qid string, did list<string>, recall list<float32>, p_yes list<float32>.
        facts: What decided the content; kept in the file.
    """

    table: "pa.Table"
    facts: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of_lists(
        cls,
        qids: Sequence[str],
        dids: Sequence[Sequence[str]],
        recall: Sequence[Any],
        p_yes: Sequence[Any],
        facts: Mapping[str, Any],
    ) -> "Scores":
        """From plain lists, one row per query."""
        import pyarrow as pa

        return cls(
            pa.table(
                {
                    "qid": pa.array(qids, pa.string()),
                    "did": pa.array([list(row) for row in dids], pa.list_(pa.string())),
                    "recall": pa.array([np.asarray(row, np.float32) for row in recall], _FLOATS()),
                    "p_yes": pa.array([np.asarray(row, np.float32) for row in p_yes], _FLOATS()),
                }
            ),
            facts,
        )

    def __len__(self) -> int:
        return len(self.table)

    @property
    def num_pairs(self) -> int:
        """Scored (query, candidate) pairs."""
        return sum(len(chunk.flatten()) for chunk in self.table.column("did").chunks)

    def rows(self) -> Iterator[tuple[str, list[str], np.ndarray, np.ndarray]]:
        """(qid, dids, recall, P(Yes)) of each query, scores as float64."""
        for batch in self.table.to_batches(max_chunksize=_ROWS_PER_BATCH):
            columns = [batch.column(name).to_pylist() for name in ("qid", "did", "recall", "p_yes")]
            for qid, dids, recall, p_yes in zip(*columns, strict=True):
                yield qid, dids, np.array(recall, np.float64), np.array(p_yes, np.float64)

    def write(self, path: str | os.PathLike) -> None:
        """Write an Arrow IPC file, by rename."""
        write_table(self.table, self.facts, path)

    @classmethod
    def read(cls, path: str | os.PathLike, *, made_with: Mapping[str, Any] | None = None) -> "Scores":
        """Open scores, memory-mapped.

        Args:
            path: The file.
            made_with: What its facts must be; None takes any.

        Raises:
            ShardError: It is missing, no scores, or was made with other settings: another checkpoint, …
        """
        table, facts = read_table(path)
        if made_with is not None:
            require_facts(facts, made_with, path)
        try:
            return cls(table.select(["qid", "did", "recall", "p_yes"]), facts)
        except KeyError as error:
            raise ShardError(
                f"{path}: no reranker's scores (lacks {error}). Run the rerank job again."
            ) from None

    @classmethod
    def concat(cls, parts: Sequence["Scores"], facts: Mapping[str, Any]) -> "Scores":
        """Scores of different queries as one.

        Raises:
            ShardError: A query stands in two parts.
        """
        import pyarrow as pa

        table = pa.concat_tables([part.table for part in parts]).combine_chunks()
        qids = table.column("qid").to_pylist()
        if len(set(qids)) != len(qids):
            seen: set[str] = set()
            qid = next(qid for qid in qids if qid in seen or seen.add(qid))
            raise ShardError(
                f"{len(qids) - len(set(qids))} queries were scored twice (first: {qid}). "
                "Remove the output folder and score again."
            )
        return cls(table, facts)


def write_table(table: "pa.Table", facts: Mapping[str, Any], path: str | os.PathLike) -> None:
    """Write an Arrow IPC file with facts, by rename."""
    import pyarrow as pa

    text = json.dumps(facts, sort_keys=True).encode()
    table = table.replace_schema_metadata({_METADATA_KEY: text})
    with atomic_write(path, "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=_ROWS_PER_BATCH)


def read_table(path: str | os.PathLike) -> tuple["pa.Table", dict[str, Any]]:
    """Open an Arrow IPC file that `write_table` wrote, memory-mapped.

    Raises:
        ShardError: It is missing, or something else.
    """
    import pyarrow as pa

    try:
        with pa.memory_map(str(local_file(path))) as source:
            table = pa.ipc.open_file(source).read_all()
        return table, json.loads((table.schema.metadata or {})[_METADATA_KEY])
    except FileNotFoundError:
        raise ShardError(f"{path}: no such file: these scores are missing. Run the rerank job.") from None
    except (OSError, KeyError, ValueError, pa.ArrowException) as error:
        reason = " ".join(str(error).split())
        raise ShardError(f"{path}: no reranker's scores ({reason}). Run the rerank job again.") from None


def require_facts(facts: Mapping[str, Any], wanted: Mapping[str, Any], path: str | os.PathLike) -> None:
    """Refuse what was made with other settings.

    Raises:
        ShardError: Names the first that differs.
    """
    if changes := changed_settings(facts, json.loads(json.dumps(wanted))):
        key, before, now = changes[0]
        raise ShardError(
            f"{path}: these scores were made with other settings: {len(changes)} differ (first: {key} was "
            f"{before!r}, is {now!r}). Score again into another folder, or remove {at(path).parent}."
        )


def _FLOATS() -> Any:
    import pyarrow as pa

    return pa.list_(pa.float32())
