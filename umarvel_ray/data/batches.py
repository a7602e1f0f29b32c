"""Which queries stand in which global batch, and who computes what: pure functions of seed, step and data.

So a run resumes exactly where it stopped, and another number of workers sees the same global batches.
Q queries and C different candidates of a global batch, N = Q + C, K the longest list of a query.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from umarvel_ray.data.records import Candidate, Query
from umarvel_ray.errors import ConfigError


@dataclass(frozen=True, slots=True)
class TrainingItem:
    """One visit of a query.

    Attributes:
        query: With this visit's instruction.
        positive: One of its positives, drawn for this visit.
        others: Hard negatives, or the list that a teacher scored.
        scores: The teacher's score of each of `others`; None without a teacher.
        relevant: Content keys of all listed positives: none of them may serve as a negative.
    """

    query: Query
    positive: Candidate
    others: tuple[Candidate, ...]
    scores: tuple[float, ...] | None
    relevant: frozenset[Hashable]


class TrainingSet(Protocol):
    """Training queries in a fixed order."""

    @property
    def fingerprint(self) -> str:
        """Names the content."""
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


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """Rows of every global batch: a fresh order each epoch; what fills no batch is left out of that epoch."""

    num_rows: int
    batch_size: int
    seed: int

    def __post_init__(self) -> None:
        if self.num_rows < self.batch_size:
            raise ConfigError(
                f"batch_size is {self.batch_size} but there are only {self.num_rows} training queries. "
                "Lower batch_size or give more data."
            )

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in one pass over the rows."""
        return self.num_rows // self.batch_size

    def rows(self, step: int) -> tuple[np.ndarray, int]:
        """Rows of the global batch of `step`, int64 (Q,), and the epoch it belongs to."""
        epoch, place = divmod(step, self.steps_per_epoch)
        order = np.random.Generator(np.random.Philox(key=[self.seed, epoch])).permutation(self.num_rows)
        return order[place * self.batch_size : (place + 1) * self.batch_size], epoch


@dataclass(frozen=True, slots=True)
class ContrastiveBatch:
    """A global batch in which every different item is encoded once.

    Attributes:
        records: N records: the queries in batch order, then the different candidates.
        num_queries: Q.
        positive_Q: int64, column of each query's positive.
        false_QC: bool, columns that are no negatives of a query: its other positives and copies of
            any of them.
        others_QK: int64, columns of each query's list; -1 beyond its end.
        teacher_QK: float32 scores of the list; None without a teacher.
    """

    records: tuple[Query | Candidate, ...]
    num_queries: int
    positive_Q: np.ndarray
    false_QC: np.ndarray
    others_QK: np.ndarray
    teacher_QK: np.ndarray | None

    @property
    def num_candidates(self) -> int:
        """C."""
        return len(self.records) - self.num_queries

    def own_columns(self) -> np.ndarray:
        """bool (Q, C): a query's positive and its own list."""
        own_QC = np.zeros_like(self.false_QC)
        query, place = np.nonzero(self.others_QK >= 0)
        own_QC[query, self.others_QK[query, place]] = True
        own_QC[np.arange(self.num_queries), self.positive_Q] = True
        return own_QC


def build_batch(data: TrainingSet, rows: np.ndarray, *, visit: int) -> ContrastiveBatch:
    """Lay out one global batch: identical content shares a column, and no positive serves as a negative."""
    items = [data.item(int(row), visit=visit) for row in rows]
    column_of: dict[Hashable, int] = {}
    candidates: list[Candidate] = []

    def column(candidate: Candidate) -> int:
        key = data.content_key(candidate)
        if key not in column_of:
            column_of[key] = len(candidates)
            candidates.append(candidate)
        return column_of[key]

    positive_Q = np.array([column(item.positive) for item in items], dtype=np.int64)
    longest = max((len(item.others) for item in items), default=0)
    others_QK = np.full((len(items), longest), -1, dtype=np.int64)
    for index, item in enumerate(items):
        others_QK[index, : len(item.others)] = [column(other) for other in item.others]
    false_QC = np.zeros((len(items), len(candidates)), dtype=bool)
    # Two rows of one question share what is relevant to either.
    relevant_of: dict[Hashable, set[Hashable]] = {}
    for item in items:
        relevant_of.setdefault(_same_question(item.query), set()).update(item.relevant)
    for index, item in enumerate(items):
        for key in relevant_of[_same_question(item.query)]:
            if key in column_of:
                false_QC[index, column_of[key]] = True
    false_QC[np.arange(len(items)), positive_Q] = False
    teacher_QK = None
    if items and items[0].scores is not None:
        teacher_QK = np.full((len(items), longest), -np.inf, dtype=np.float32)
        for index, item in enumerate(items):
            teacher_QK[index, : len(item.others)] = item.scores
    return ContrastiveBatch(
        records=(*(item.query for item in items), *candidates),
        num_queries=len(items),
        positive_Q=positive_Q,
        false_QC=false_QC,
        others_QK=others_QK,
        teacher_QK=teacher_QK,
    )


def _same_question(query: Query) -> Hashable:
    """Words and picture alone: each row draws its own wording of the instruction."""
    return query.txt, query.img_path


def token_cost(record: Query | Candidate, *, image_tokens: int = 128) -> int:
    """About how many tokens a record takes, known without opening its image."""
    words = len(record.txt or "") + (len(record.instruction or "") if isinstance(record, Query) else 0)
    return 16 + words // 4 + (image_tokens if record.img_path else 0)


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
