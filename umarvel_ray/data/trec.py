"""Judgements and ranked results: read, write, and the check that joins the two.

qrels are text, `qid 0 did grade` with a task id as fifth field in M-BEIR. A run is an Arrow file of one row
per query, so that millions of hits stay a few large arrays; TREC's text form is for other people's tools.
"""

import itertools
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from umarvel_ray.artifacts import atomic_write
from umarvel_ray.errors import DataError
from umarvel_ray.storage import Place, at, local_file

if TYPE_CHECKING:
    import pyarrow as pa

Qrels = dict[str, dict[str, int]]
"""`{qid: {did: grade}}`, grades above 0 only."""

_ROWS_PER_BATCH = 4096
"""Queries per record batch: at a thousand hits each, well below the 2 GB of ids that one Arrow array can
hold."""
_PADDING_DID = "-1:9999999"
"""What UniIR prints in ranks that a pool smaller than k leaves empty."""

_log = logging.getLogger(__name__)


def read_qrels(path: str | os.PathLike) -> Qrels:
    """Read judgements of four or five fields; the fifth, M-BEIR's task id, is not kept.

    A grade of 0 or less says "not relevant" and is left out, as every reader of these files does.

    Raises:
        DataError: The file is missing, a line has other fields, or a pair is judged twice with different
            grades.
    """
    path = at(path)
    qrels: Qrels = {}
    any_irrelevant = False
    for number, fields in _read_fields(path):
        if len(fields) not in (4, 5):
            raise DataError(
                f"{path}:{number}: {len(fields)} fields, a judgement has 4 or 5: qid 0 did grade [task]."
            )
        qid, _, did, grade_text = fields[:4]
        try:
            grade = int(grade_text)
        except ValueError:
            raise DataError(
                f"{path}:{number}: grade {grade_text!r} is no whole number. Mend the line."
            ) from None
        before = qrels.setdefault(qid, {}).setdefault(did, grade)
        if before != grade:
            raise DataError(
                f"{path}:{number}: query {qid}, candidate {did} has grade {grade} here and {before} before. "
                "Keep one line."
            )
        any_irrelevant |= grade <= 0
    if any_irrelevant:
        relevant = {
            qid: {did: grade for did, grade in grades.items() if grade > 0} for qid, grades in qrels.items()
        }
        qrels = {qid: grades for qid, grades in relevant.items() if grades}
    return qrels


def write_qrels(
    path: str | os.PathLike,
    qrels: Mapping[str, Mapping[str, int]],
    *,
    task_ids: Mapping[str, int] | None = None,
) -> None:
    """Write judgements, by rename: five fields where `task_ids` gives each query's task, four otherwise."""
    with atomic_write(path) as file:
        for qid, grades in qrels.items():
            end = "" if task_ids is None else f" {_task_id(task_ids, qid, path)}"
            for did, grade in grades.items():
                file.write(f"{qid} 0 {did} {grade}{end}\n")


class _Column(Sequence[Any]):
    """One list per query out of an Arrow list column, made when asked for."""

    def __init__(self, column: "pa.ChunkedArray") -> None:
        self.column = column

    def __len__(self) -> int:
        return len(self.column)


class DidLists(_Column):
    """Per query its dids, best first."""

    def __getitem__(self, row: Any) -> Any:
        if isinstance(row, slice):
            return [self[i] for i in range(*row.indices(len(self)))]
        return self.column[row].as_py()

    def __iter__(self) -> Iterator[list[str]]:
        return (dids for chunk in self.column.chunks for dids in chunk.to_pylist())


class ScoreLists(_Column):
    """Per query its scores, (K,) float32, in the order of its dids."""

    def __getitem__(self, row: Any) -> Any:
        if isinstance(row, slice):
            return [self[i] for i in range(*row.indices(len(self)))]
        return self.column[row].values.to_numpy()

    def __iter__(self) -> Iterator[np.ndarray]:
        for chunk in self.column.chunks:
            offsets = chunk.offsets.to_numpy()
            values = chunk.values.to_numpy()
            yield from (values[start:end] for start, end in itertools.pairwise(offsets))


@dataclass(frozen=True, eq=False)
class Run:
    """Ranked results: per query its candidates, best first.

    Built from plain lists or from Arrow columns; held as Arrow columns either way, so that 190,000 queries
    with 100 hits each take about 0.3 GB, and none of it before it is read when the run comes from a file.

    Attributes:
        qids: The queries, each once.
        dids: Per query its candidates; rows may differ in length.
        scores: Per query their scores, float32, never rising along a row.
    """

    qids: list[str]
    dids: Sequence[Sequence[str]]
    scores: Sequence[Any] | np.ndarray

    def __post_init__(self) -> None:
        """Raises DataError: lengths differ, a qid repeats, a score is NaN or above the one before it."""
        object.__setattr__(self, "qids", list(self.qids))
        object.__setattr__(self, "dids", DidLists(_list_column(self.dids, "string")))
        object.__setattr__(self, "scores", ScoreLists(_list_column(self.scores, "float32")))
        self._validate()

    def __len__(self) -> int:
        return len(self.qids)

    @classmethod
    def from_table(cls, table: "pa.Table") -> "Run":
        """A run over the columns qid string, did list<string>, score list<float32>."""
        return cls(
            qids=table.column("qid").to_pylist(),
            dids=table.column("did"),  # pyright: ignore[reportArgumentType]
            scores=table.column("score"),  # pyright: ignore[reportArgumentType]
        )

    def table(self) -> "pa.Table":
        """The columns qid string, did list<string>, score list<float32>; for work on whole columns."""
        import pyarrow as pa

        dids, scores = self.dids, self.scores
        assert isinstance(dids, DidLists) and isinstance(scores, ScoreLists)
        qids = pa.chunked_array([pa.array(self.qids, pa.string())])
        return pa.table({"qid": qids, "did": dids.column, "score": scores.column})

    @classmethod
    def read(cls, path: str | os.PathLike) -> "Run":
        """Open a run, memory-mapped.

        Raises:
            DataError: The file is missing or no run.
        """
        import pyarrow as pa

        try:
            with pa.memory_map(str(local_file(path))) as source:
                table = pa.ipc.open_file(source).read_all()
            return cls.from_table(table)
        except (OSError, pa.ArrowException, KeyError) as error:
            reason = " ".join(str(error).split())
            raise DataError(
                f"{path}: not a run ({reason}). Give an Arrow file with qid, did and score."
            ) from None
        except DataError as error:
            raise DataError(f"{path}: {error}") from None

    def write(self, path: str | os.PathLike) -> None:
        """Write an Arrow IPC file, by rename."""
        import pyarrow as pa

        table = self.table()
        with atomic_write(path, "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=_ROWS_PER_BATCH)

    def as_dict(self) -> dict[str, list[tuple[str, float]]]:
        """`{qid: [(did, score)]}`, best first; for small runs."""
        return {
            qid: list(zip(dids, (float(score) for score in scores), strict=True))
            for qid, dids, scores in zip(self.qids, self.dids, self.scores, strict=True)
        }

    def export_trec(
        self, path: str | os.PathLike, tag: str, *, task_ids: Mapping[str, int] | None = None
    ) -> None:
        """Write TREC's text form, by rename: `qid Q0 did rank score tag`, ranks from 1, scores to the last
        bit; with `task_ids`, each query's task follows as UniIR's seventh field.

        Raises:
            DataError: A name or the tag holds white space, or a query has no task.
        """
        if not tag or tag.split() != [tag]:
            raise DataError(f"{path}: the tag {tag!r} must be one word.")
        with atomic_write(path) as file:
            for qid, dids, scores in zip(self.qids, self.dids, self.scores, strict=True):
                end = "" if task_ids is None else f" {_task_id(task_ids, qid, path)}"
                if odd := next((name for name in (qid, *dids) if name.split() != [name]), None):
                    raise DataError(
                        f"{path}: {odd!r} holds white space, which TREC's format cannot. Rename it."
                    )
                file.writelines(
                    f"{qid} Q0 {did} {rank} {score:.9g} {tag}{end}\n"
                    for rank, (did, score) in enumerate(zip(dids, scores, strict=True), start=1)
                )

    def _validate(self) -> None:
        if not len(self.qids) == len(self.dids) == len(self.scores):
            raise DataError(
                f"a run of {len(self.qids)} queries has {len(self.dids)} lists of candidates and "
                f"{len(self.scores)} of scores. Give one of each per query."
            )
        if len(set(self.qids)) != len(self.qids):
            seen: set[str] = set()
            qid = next(qid for qid in self.qids if qid in seen or seen.add(qid))
            raise DataError(f"a run names a query twice (first: {qid}). Merge the parts of one query.")
        table = self.table()
        num_dids, num_scores = (_lengths(table.column(name)) for name in ("did", "score"))
        if len(odd := np.flatnonzero(num_dids != num_scores)):
            row = odd[0]
            raise DataError(
                f"{len(odd)} of {len(self.qids)} queries have other numbers of candidates than of scores "
                f"(first: {self.qids[row]}, {num_dids[row]} and {num_scores[row]}). Give each candidate one "
                "score."
            )
        with_nan: list[int] = []
        rising: list[int] = []
        first = 0
        for chunk in table.column("score").chunks:
            scores = chunk.flatten().to_numpy()
            row_of_hit = np.repeat(np.arange(first, first + len(chunk)), np.diff(chunk.offsets.to_numpy()))
            with_nan += np.unique(row_of_hit[np.isnan(scores)]).tolist()
            rises = (scores[1:] > scores[:-1]) & (row_of_hit[1:] == row_of_hit[:-1])
            rising += np.unique(row_of_hit[1:][rises]).tolist()
            first += len(chunk)
        if with_nan:
            raise DataError(
                f"{len(with_nan)} of {len(self)} queries have scores that are NaN (first: "
                f"{self.qids[with_nan[0]]}). Look for embeddings that are not finite."
            )
        if rising:
            raise DataError(
                f"{len(rising)} of {len(self)} queries have a score above the one before it (first: "
                f"{self.qids[rising[0]]}). Sort best first; distances must be negated."
            )


def import_trec(path: str | os.PathLike) -> Run:
    """Read TREC's text form of six fields, or UniIR's of seven; hits are put in the order of their ranks.

    The empty ranks that UniIR fills with candidate -1:9999999 are left out and counted in the log.

    Raises:
        DataError: A line has other fields, or the scores do not fall with the ranks.
    """
    path = at(path)
    hits: dict[str, list[tuple[int, str, float]]] = {}
    num_padding = 0
    for number, fields in _read_fields(path):
        if len(fields) not in (6, 7):
            raise DataError(
                f"{path}:{number}: {len(fields)} fields, a hit has 6 or 7: qid Q0 did rank score tag [task]."
            )
        qid, _, did, rank_text, score_text = fields[:5]
        try:
            hit = (int(rank_text), did, float(score_text))
        except ValueError:
            raise DataError(
                f"{path}:{number}: rank {rank_text!r} or score {score_text!r} is no number. Mend the line."
            ) from None
        ranked = hits.setdefault(qid, [])
        if did == _PADDING_DID:
            num_padding += 1
        else:
            ranked.append(hit)
    if num_padding:
        _log.warning("%s: left out %d empty ranks (candidate %s)", path, num_padding, _PADDING_DID)
    for ranked in hits.values():
        ranked.sort(key=lambda hit: hit[0])
    try:
        return Run(
            qids=list(hits),
            dids=[[did for _, did, _ in ranked] for ranked in hits.values()],
            scores=[[score for _, _, score in ranked] for ranked in hits.values()],
        )
    except DataError as error:
        raise DataError(f"{path}: {error}") from None


def check_join(
    run: Run,
    qrels: Mapping[str, Mapping[str, int]],
    *,
    run_name: str = "the run",
    qrels_name: str = "the qrels",
) -> None:
    """Refuse a run and judgements that do not belong together.

    Raises:
        DataError: A query of the run is not judged, a judged query is not in the run, or a query ranks a
            candidate twice.
    """
    if unjudged := [qid for qid in run.qids if qid not in qrels]:
        raise DataError(
            f"{run_name}: {len(unjudged)} of {len(run)} queries have no judgement in {qrels_name} "
            f"(first: {unjudged[0]}). Use the qrels of the queries that were searched."
        )
    ranked = set(run.qids)
    if missing := [qid for qid in qrels if qid not in ranked]:
        raise DataError(
            f"{run_name}: {len(missing)} of {len(qrels)} queries of {qrels_name} are not in it "
            f"(first: {missing[0]}). Search all of them, or give the qrels of those that were."
        )
    if repeats := [row for row, dids in enumerate(run.dids) if len(set(dids)) != len(dids)]:
        dids = run.dids[repeats[0]]
        did = next(did for place, did in enumerate(dids) if did in dids[:place])
        raise DataError(
            f"{run_name}: {len(repeats)} of {len(run)} queries rank a candidate twice (first: query "
            f"{run.qids[repeats[0]]}, candidate {did}). Keep its best rank; a pool must hold each did once."
        )


def _read_fields(path: Place) -> Iterator[tuple[int, list[str]]]:
    """(line number, fields) of each line that is not blank."""
    try:
        # One newline only ends a line: an id may hold any other character that looks like one.
        with path.open(encoding="utf-8", newline="\n") as file:
            for number, line in enumerate(file, start=1):
                if fields := line.split():
                    yield number, fields
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}). Give the path of a text file.") from None


def _task_id(task_ids: Mapping[str, int], qid: str, path: str | os.PathLike) -> int:
    if qid not in task_ids:
        raise DataError(
            f"{path}: query {qid} has no task among {len(task_ids)}. Give the tasks of all queries."
        )
    return task_ids[qid]


def _list_column(values: Any, item: str) -> "pa.ChunkedArray":
    """`values` as an Arrow column of lists of `item`, copied only where their form asks for it."""
    import pyarrow as pa

    wanted = pa.list_(pa.type_for_alias(item))
    if isinstance(values, _Column):
        values = values.column
    if isinstance(values, pa.Array):
        values = pa.chunked_array([values])
    if isinstance(values, pa.ChunkedArray):
        column = values if values.type == wanted else values.cast(wanted)
    else:
        parts = (values[start : start + _ROWS_PER_BATCH] for start in range(0, len(values), _ROWS_PER_BATCH))
        column = pa.chunked_array([_list_array(part, item) for part in parts], type=wanted)
    num_nulls = column.null_count + sum(chunk.flatten().null_count for chunk in column.chunks)
    if num_nulls:
        raise DataError(f"a run holds {num_nulls} nulls. Give an empty list to a query that found nothing.")
    return column


def _list_array(rows: Sequence[Any], item: str) -> "pa.ListArray":
    import pyarrow as pa

    flat = (
        [value for row in rows for value in row]
        if item == "string"
        else np.concatenate([np.asarray(row, dtype=np.float32) for row in rows])
    )
    offsets = np.cumsum([0, *(len(row) for row in rows)], dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat, pa.type_for_alias(item)))


def _lengths(column: "pa.ChunkedArray") -> np.ndarray:
    if not column.chunks:
        return np.zeros(0, dtype=np.int64)
    return np.concatenate([np.diff(chunk.offsets.to_numpy()) for chunk in column.chunks])
