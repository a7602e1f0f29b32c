"""Mined negatives: the file, and the forms that other tools read and write."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from umarvel_ray.artifacts import atomic_write
from umarvel_ray.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

_ROWS_PER_BATCH = 8192
_METADATA_KEY = b"umarvel_ray.mined"


def negatives_schema() -> "pa.Schema":
    """Of `MinedNegatives.table`."""
    import pyarrow as pa

    return pa.schema(
        {
            "qid": pa.string(),
            "did": pa.list_(pa.string()),
            "score": pa.list_(pa.float32()),
            "positive_score": pa.float32(),
        }
    )


@dataclass(frozen=True, eq=False)
class MinedNegatives:
    """Hard negatives by qid, hardest first; those drawn from the pool stand last and score minus infinity.

    The file is a run with one more column, so training reads it as any other list of candidates. Queries that
    got no negative are not in it.

    Attributes:
        table: qid string, did list<string>, score list<float32>, positive_score float32 (null where no
            positive is in the pool).
        facts: What made it, JSON; kept in the file.
    """

    table: "pa.Table"
    facts: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.table)

    def as_dict(self) -> dict[str, list[tuple[str, float]]]:
        """`{qid: [(did, score)]}`; for small sets."""
        columns = (self.table.column(name).to_pylist() for name in ("qid", "did", "score"))
        return {qid: list(zip(dids, scores, strict=True)) for qid, dids, scores in zip(*columns, strict=True)}

    def write(self, path: str | os.PathLike) -> None:
        """Write an Arrow IPC file, by rename."""
        import pyarrow as pa

        facts = json.dumps(self.facts, sort_keys=True).encode()
        table = self.table.replace_schema_metadata({_METADATA_KEY: facts})
        with atomic_write(path, "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=_ROWS_PER_BATCH)

    @classmethod
    def read(cls, path: str | os.PathLike) -> "MinedNegatives":
        """Open mined negatives, memory-mapped.

        Raises:
            DataError: The file is missing or holds something else.
        """
        import pyarrow as pa

        try:
            with pa.memory_map(os.fspath(path)) as source:
                table = pa.ipc.open_file(source).read_all()
            facts = json.loads((table.schema.metadata or {})[_METADATA_KEY])
            return cls(table.select(negatives_schema().names), facts)
        except (OSError, KeyError, ValueError, pa.ArrowException) as error:
            reason = " ".join(str(error).split())
            raise DataError(f"{path}: no mined negatives ({reason}). Run the mining job.") from None

    @classmethod
    def from_lists(
        cls, lists: Mapping[str, Sequence[tuple[str, float]]], facts: Mapping[str, Any] | None = None
    ) -> "MinedNegatives":
        """Negatives that someone else chose, `{qid: [(did, score)]}`; queries without any are left out."""
        import pyarrow as pa

        kept = {qid: negatives for qid, negatives in lists.items() if negatives}
        columns = {
            "qid": list(kept),
            "did": [[did for did, _ in negatives] for negatives in kept.values()],
            "score": [[score for _, score in negatives] for negatives in kept.values()],
            "positive_score": [None] * len(kept),
        }
        return cls(pa.table(columns, schema=negatives_schema()), facts or {})
