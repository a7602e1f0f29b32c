"""Which queries stand in which global batch, and who computes what: pure functions of seed, step and data.

So a run resumes exactly where it stopped, and another number of workers sees the same global batches.
Q queries and C different candidates of a global batch, N = Q + C, K the longest list of a query.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from umarvel_ray.data.records import Candidate, Query, Video
from umarvel_ray.errors import ConfigError

_HELD_OUT = 2**63
"""Stands in the place of an epoch's number."""


@dataclass(frozen=True, slots=True)
class TrainingItem:
    """One visit of a query.

    Attributes:
        query: With this visit's instruction.
        positive: One of its positives, drawn for this visit.
        others: Hard negatives, or the list that a teacher scored.
        scores: The teacher's score of each of `others`; None without a teacher.
        relevant: Content keys of all listed positives: none of them may serve as a negative.
        more_positives: The others of its positives, each content once.
    """

    query: Query
    positive: Candidate
    others: tuple[Candidate, ...]
    scores: tuple[float, ...] | None
    relevant: frozenset[Hashable]
    more_positives: tuple[Candidate, ...] = ()


class TrainingSet(Protocol):
    """Training queries in a fixed order."""

    @property
    def fingerprint(self) -> str:
        """Names the content."""
        ...

    @property
    def tasks(self) -> np.ndarray:
        """Of each row the number of its task, int64."""
        ...

    @property
    def questions(self) -> np.ndarray:
        """Of each row the number of its question, int64: rows that repeat a question share it."""
        ...

    def __len__(self) -> int:
        """Rows."""
        ...

    def item(self, row: int, *, visit: int) -> TrainingItem:
        """The row's query as its `visit`-th epoch sees it: a pure function of both."""
        ...

    def content_key(self, candidate: Candidate) -> Hashable:
        """Equal for candidates with identical content, whatever their did."""
        ...


class BatchPlan:
    """Rows of every global batch: a fresh order each epoch; what fills no batch is left out of that epoch.

    Args:
        num_rows: Rows of the training set.
        batch_size: Queries of a global batch.
        seed: Of the orders, and of what is held out.
        tasks: Of each row, a number. With them, all rows of a batch are of one task.
        questions: Of each row, a number: rows of one question are held out together. Each its own by default.
        num_held_out: Questions that never train.
    """

    def __init__(
        self,
        *,
        num_rows: int,
        batch_size: int,
        seed: int,
        tasks: np.ndarray | None = None,
        questions: np.ndarray | None = None,
        num_held_out: int = 0,
    ) -> None:
        self.batch_size = batch_size
        self.seed = seed
        questions = np.arange(num_rows) if questions is None else questions
        different, first, place = np.unique(questions, return_index=True, return_inverse=True)
        rng = np.random.Generator(np.random.Philox(key=[seed, _HELD_OUT]))
        chosen = np.zeros(len(different), dtype=bool)
        if num_held_out:
            chosen[rng.permutation(len(different))[:num_held_out]] = True
        self.held_out: np.ndarray = np.sort(first[chosen])
        """One row of each question that is held out."""
        rows = np.flatnonzero(~chosen[place])
        self._groups = (
            [rows] if tasks is None else [rows[tasks[rows] == task] for task in np.unique(tasks[rows])]
        )
        if self.steps_per_epoch == 0:
            kept = f" after {num_held_out} are held out" if num_held_out else ""
            of_task = "" if tasks is None else f" ({max(map(len, self._groups), default=0)} of one task)"
            raise ConfigError(
                f"batch_size is {batch_size} but there are only {len(rows)} training queries{of_task}{kept}. "
                "Lower batch_size or give more data."
            )

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in one pass over the rows."""
        return sum(len(group) // self.batch_size for group in self._groups)

    def rows(self, step: int) -> tuple[np.ndarray, int]:
        """Rows of the global batch of `step`, int64 (Q,), and the epoch it belongs to."""
        epoch, place = divmod(step, self.steps_per_epoch)
        return self._batches(epoch)[place], epoch

    def _batches(self, epoch: int) -> np.ndarray:
        """Rows of all batches of an epoch, int64 (batches, Q)."""
        found = self._latest
        if found is None or found[0] != epoch:
            rng = np.random.Generator(np.random.Philox(key=[self.seed, epoch]))
            batches = np.concatenate(
                [
                    rng.permutation(group)[: len(group) // self.batch_size * self.batch_size]
                    for group in self._groups
                ]
            ).reshape(-1, self.batch_size)
            if len(self._groups) > 1:
                batches = batches[rng.permutation(len(batches))]
            self._latest = found = (epoch, batches)
        return found[1]

    _latest: tuple[int, np.ndarray] | None = None


@dataclass(frozen=True, slots=True)
class ContrastiveBatch:
    """A global batch in which every different item is encoded once.

    Attributes:
        records: N records: the queries in batch order, then the different candidates.
        num_queries: Q.
        positive_Q: int64, column of each query's positive.
        false_pairs: int64, queries and columns that are no negatives of them: other positives of the query
            and copies of any of them.
        others_QK: int64, columns of each query's list; -1 beyond its end.
        teacher_QK: float32 scores of the list; None without a teacher.
    """

    records: tuple[Query | Candidate, ...]
    num_queries: int
    positive_Q: np.ndarray
    false_pairs: tuple[np.ndarray, np.ndarray]
    others_QK: np.ndarray
    teacher_QK: np.ndarray | None

    @property
    def num_candidates(self) -> int:
        """C."""
        return len(self.records) - self.num_queries

    def listed(self) -> tuple[np.ndarray, np.ndarray]:
        """A query's positive and its own list: columns (Q, 1 + K), and where a column counts.

        Beyond a list's end, at false negatives, and where a column stands a second time, nothing counts.
        """
        columns_QG = np.concatenate([self.positive_Q[:, None], self.others_QK], axis=1)
        counts_QG = columns_QG >= 0
        for place in range(1, columns_QG.shape[1]):
            counts_QG[:, place] &= (columns_QG[:, :place] != columns_QG[:, place : place + 1]).all(1)
        keys_QG = columns_QG + np.arange(self.num_queries)[:, None] * self.num_candidates
        counts_QG &= ~np.isin(keys_QG, self.false_pairs[0] * self.num_candidates + self.false_pairs[1])
        return columns_QG.clip(min=0), counts_QG

    def negatives_per_query(self, *, own_lists: bool) -> float:
        """Mean over queries of the candidates that one is pushed from: of its own list, or of the batch."""
        if own_lists:
            return float(self.listed()[1].sum()) / self.num_queries - 1
        return self.num_candidates - 1 - len(self.false_pairs[0]) / self.num_queries

    def answered_pairs(self) -> tuple[np.ndarray, np.ndarray]:
        """On the way back, from the positive of query p: p, and the queries that it answers too."""
        order = np.argsort(self.positive_Q, kind="stable")
        starts = np.searchsorted(self.positive_Q[order], np.arange(self.num_candidates + 1))
        asked_by = [order[starts[c] : starts[c + 1]] for c in range(self.num_candidates)]
        pairs = [(p, q) for shared in asked_by if len(shared) > 1 for p in shared for q in shared if p != q]
        pairs += [
            (p, query) for query, column in zip(*self.false_pairs, strict=True) for p in asked_by[column]
        ]
        unique = np.unique(np.array(pairs, dtype=np.int64).reshape(-1, 2), axis=0)
        return unique[:, 0], unique[:, 1]


def build_batch(
    data: TrainingSet, rows: np.ndarray, *, visit: int, mask_false_negatives: bool = True
) -> ContrastiveBatch:
    """Lay out one global batch.

    Identical content shares a column, and no positive serves as a negative; without the masks each item has a
    column of its own, and only a query's drawn positive is none of its negatives.
    """
    items = [data.item(int(row), visit=visit) for row in rows]
    column_of: dict[Hashable, int] = {}
    candidates: list[Candidate] = []

    def column(candidate: Candidate) -> int:
        key = data.content_key(candidate) if mask_false_negatives else len(candidates)
        if key not in column_of:
            column_of[key] = len(candidates)
            candidates.append(candidate)
        return column_of[key]

    positive_Q = np.array([column(item.positive) for item in items], dtype=np.int64)
    longest = max((len(item.others) for item in items), default=0)
    others_QK = np.full((len(items), longest), -1, dtype=np.int64)
    for index, item in enumerate(items):
        others_QK[index, : len(item.others)] = [column(other) for other in item.others]
    false_pairs: list[tuple[int, int]] = []
    if mask_false_negatives:
        # Two rows of one question share what is relevant to either.
        relevant_of: dict[Hashable, set[Hashable]] = {}
        for item in items:
            relevant_of.setdefault(_same_question(item.query), set()).update(item.relevant)
        for index, item in enumerate(items):
            found = {column_of[key] for key in relevant_of[_same_question(item.query)] if key in column_of}
            false_pairs += [(index, place) for place in sorted(found - {int(positive_Q[index])})]
    false_rows, false_columns = np.array(false_pairs, dtype=np.int64).reshape(-1, 2).T
    teacher_QK = None
    if items and items[0].scores is not None:
        teacher_QK = np.full((len(items), longest), -np.inf, dtype=np.float32)
        for index, item in enumerate(items):
            teacher_QK[index, : len(item.others)] = item.scores
    return ContrastiveBatch(
        records=(*(item.query for item in items), *candidates),
        num_queries=len(items),
        positive_Q=positive_Q,
        false_pairs=(false_rows, false_columns),
        others_QK=others_QK,
        teacher_QK=teacher_QK,
    )


def _same_question(query: Query) -> Hashable:
    """Words and picture alone: each row draws its own wording of the instruction."""
    return query.content


def token_cost(record: Query | Candidate, *, image_tokens: int = 128) -> int:
    """About how many tokens a record takes, known without opening its pictures; a video counts as eight."""
    letters = len(record.instruction or "") if isinstance(record, Query) else 0
    pictures = 0
    for part in record.content:
        if isinstance(part, str):
            letters += len(part)
        else:
            pictures += 8 if isinstance(part, Video) else 1
    return 16 + letters // 4 + image_tokens * pictures


def filler_record(records: Sequence[Query | Candidate]) -> Query | Candidate:
    """The cheapest record with a picture, or the cheapest of all where none has one."""
    with_picture = [record for record in records if record.modality != "text"]
    return min(with_picture or records, key=token_cost)


def deal(costs: Sequence[float], num_lanes: int) -> list[np.ndarray]:
    """Deal items to lanes so that costs even out: the dearest first, each to the lane that has least so far.

    Returns:
        For each lane the indices of its items, ascending.
    """
    lanes: list[list[int]] = [[] for _ in range(num_lanes)]
    load = [0.0] * num_lanes
    for index in sorted(range(len(costs)), key=lambda i: -costs[i]):
        lane = load.index(min(load))
        lanes[lane].append(index)
        load[lane] += costs[index]
    return [np.array(sorted(lane), dtype=np.int64) for lane in lanes]
