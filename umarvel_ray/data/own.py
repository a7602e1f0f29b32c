"""Anyone's data: a JSONL file of queries, one of candidates, and a folder of pictures. Ids are any strings.

A query: `qid`, `txt` and `img_path` (either may be missing; M-BEIR's `query_txt` and `query_img_path` do as
well), `positives`, a list of dids or `{did: grade}`, and `instruction` where it has one of its own. A
candidate: `did`, `txt`, `img_path`.
"""

import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar

from umarvel_ray.artifacts import fingerprint
from umarvel_ray.data.lines import JsonLines, RecordFault
from umarvel_ray.data.records import Candidate, Query
from umarvel_ray.data.trec import Qrels
from umarvel_ray.errors import DataError

RecordT = TypeVar("RecordT", Query, Candidate, Query | Candidate)


@dataclass(frozen=True, eq=False)
class RecordSource(Generic[RecordT]):
    """Records in memory, under the name of their embedding store."""

    name: str
    records: Sequence[RecordT]

    def __len__(self) -> int:
        return len(self.records)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RecordSource) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    @property
    def _key(self) -> tuple[str, str]:
        return self.name, self.fingerprint

    def __getitem__(self, row: int) -> RecordT:
        return self.records[row]

    def range(self, start: int, stop: int) -> Iterator[RecordT]:
        """Records `start` to `stop` (exclusive)."""
        return iter(self.records[start:stop])

    def where(self, row: int) -> str:
        """What to call `row` in messages."""
        return f"{self.name}, record {row + 1}"

    @cached_property
    def fingerprint(self) -> str:
        """Names ids, words and paths (not the content of pictures)."""
        return fingerprint([repr(record) for record in self.records])


def read_own(
    queries: str | os.PathLike,
    candidates: str | os.PathLike,
    images: str | os.PathLike | None,
    *,
    instruction: str | None,
) -> tuple[list[Query], list[Candidate], Qrels]:
    """Read both files, every line.

    Args:
        queries: JSONL.
        candidates: JSONL.
        images: At which relative picture paths start; each file's own folder by default.
        instruction: For queries that bring none.

    Raises:
        DataError: A line breaks the format, a picture is missing, or an id repeats.
    """
    qrels: Qrels = {}
    seen: set[str] = set()

    def query(record: dict[str, Any], base: Path) -> Query:
        qid = _name(record, "qid", seen=qrels)
        qrels[qid] = _positives(record, of=qid)
        return Query(
            qid,
            txt=_text(record, "txt", "query_txt", of=qid),
            img_path=_picture(record, "img_path", "query_img_path", of=qid, base=base),
            instruction=_text(record, "instruction", of=qid) or instruction,
        )

    def candidate(record: dict[str, Any], base: Path) -> Candidate:
        did = _name(record, "did", seen=seen)
        seen.add(did)
        picture = _picture(record, "img_path", of=did, base=base)
        return Candidate(did, txt=_text(record, "txt", of=did), img_path=picture)

    return _read(queries, images, query), _read(candidates, images, candidate), qrels


def _read(path: Any, images: Any, make: Callable[[dict[str, Any], Any], RecordT]) -> list[RecordT]:
    rows = JsonLines(path)
    base = Path(os.path.abspath(images)) if images else rows.path.parent
    records = []
    for row, record in enumerate(rows):
        try:
            records.append(make(record, base))
        except (RecordFault, DataError) as fault:
            raise DataError(f"{rows.where(row)}: {fault}") from None
    return records


def _name(record: Mapping[str, Any], field: str, *, seen: Collection[str]) -> str:
    value = record.get(field)
    if not isinstance(value, str) or not value:
        raise RecordFault(f"{field} is no name", detail=repr(value), advice="Give each line a string.")
    if value in seen:
        raise RecordFault(f"a second line has this {field}", detail=value, advice="Keep one.")
    return value


def _text(record: Mapping[str, Any], *names: str, of: str) -> str | None:
    for name in names:
        value = record.get(name)
        if value is not None and not isinstance(value, str):
            kind = type(value).__name__
            raise RecordFault(
                f"{name} is neither text nor null", detail=f"{of} has a {kind}", advice="Mend it."
            )
        if value:
            return value
    return None


def _picture(record: Mapping[str, Any], *names: str, of: str, base: Path) -> str | None:
    path = _text(record, *names, of=of)
    if path is None:
        return None
    full = os.path.join(base, path)
    if not os.path.isfile(full):
        raise RecordFault(
            "the picture is missing", detail=f"{of}: {full}", advice="Put it there, or set images."
        )
    return full


def _positives(record: Mapping[str, Any], *, of: str) -> dict[str, int]:
    value = record.get("positives", record.get("pos_cand_list"))
    if isinstance(value, list) and all(isinstance(did, str) for did in value):
        value = dict.fromkeys(value, 1)
    if isinstance(value, dict) and all(type(grade) is int for grade in value.values()):
        positives = {did: grade for did, grade in value.items() if grade > 0}
        if positives:
            return positives
    raise RecordFault(
        "positives name no right candidate",
        detail=of,
        advice='Write ["did", …] or {"did": grade above 0, …}.',
    )
