"""Training sets behind one face: sentence and caption pairs, and M-BEIR with mined lists or teacher scores.

Which positive, which instruction and which negatives a visit shows follows from (seed, row, visit) alone.
"""

from collections.abc import Hashable, Mapping, Sequence
from functools import cached_property, lru_cache

import numpy as np

from umarvel_ray.artifacts import fingerprint
from umarvel_ray.data.batches import TrainingItem
from umarvel_ray.data.mbeir import Instructions, Mbeir, Pool, QueryRecord, QuerySet, content_key
from umarvel_ray.data.records import Candidate, Query
from umarvel_ray.data.sources import task_of
from umarvel_ray.data.text_pairs import PairSource
from umarvel_ray.data.trec import Run
from umarvel_ray.errors import DataError


class OneTaskSet:
    """What a training set of one task, where no two rows ask the same, shares with others of its kind."""

    def __len__(self) -> int:
        raise NotImplementedError

    @property
    def tasks(self) -> np.ndarray:
        """See `TrainingSet.tasks`: all of one."""
        return np.zeros(len(self), dtype=np.int64)

    @property
    def questions(self) -> np.ndarray:
        """See `TrainingSet.questions`: each its own."""
        return np.arange(len(self))


class PairSet(OneTaskSet):
    """Sentence or caption pairs, one positive each."""

    def __init__(self, pairs: PairSource) -> None:
        self._pairs = pairs
        self.fingerprint = pairs.fingerprint

    def __len__(self) -> int:
        return len(self._pairs)

    def item(self, row: int, *, visit: int) -> TrainingItem:
        """See `TrainingSet.item`; pairs look the same at each visit."""
        pair = self._pairs[row]
        return TrainingItem(
            query=pair.query,
            positive=pair.positive,
            others=pair.negatives,
            scores=None,
            relevant=frozenset([self.content_key(pair.positive)]),
        )

    def content_key(self, candidate: Candidate) -> Hashable:
        """See `TrainingSet.content_key`."""
        return _cached_key(candidate)


class MbeirSet:
    """M-BEIR's training queries, all tasks mixed.

    Args:
        mbeir: The data.
        seed: Of positives, instructions and samples.
        lists: For each query its mined negatives, or the candidates that a teacher scored. None for in-batch
            negatives only.
        only_listed: Leave out queries that have no list. Else they train on in-batch negatives alone.
        num_others: Of a list, how many a visit shows: the first ones; None for all.
        with_scores: Whether the lists' scores are a teacher's.
        drop_positives: Leave listed positives, by did and by content, out of the lists.
        tasks: Train on these only; None for all. Table 15 holds tasks out.
        use_given: Show the negatives that the query file names, before those of the lists.
    """

    def __init__(
        self,
        mbeir: Mbeir,
        *,
        seed: int,
        lists: Run | None = None,
        only_listed: bool = False,
        num_others: int | None = None,
        with_scores: bool = False,
        drop_positives: bool = False,
        tasks: Sequence[str] | None = None,
        use_given: bool = False,
    ) -> None:
        self._queries: QuerySet = mbeir.union_training_queries()
        self._pool: Pool = mbeir.global_pool("train")
        self._instructions: Instructions = mbeir.instructions()
        self._seed = seed
        self._lists = lists
        self._only_listed = only_listed
        self._num_others = num_others
        self._with_scores = with_scores
        self._drop_positives = drop_positives
        self._tasks = None if tasks is None else set(tasks)
        self._use_given = use_given

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def fingerprint(self) -> str:
        """Names queries, pool and prompts (not lists: those are another job's output)."""
        return fingerprint(
            [self._queries.fingerprint, self._pool.fingerprint, self._instructions.fingerprint]
        )

    @cached_property
    def _list_row(self) -> Mapping[str, int]:
        return {} if self._lists is None else {qid: row for row, qid in enumerate(self._lists.qids)}

    @cached_property
    def _columns(self) -> np.ndarray:
        """Of each row (line in the file, task, question), int64 (3, rows)."""
        tasks: dict[str, int] = {}
        questions: dict[str, int] = {}
        found = [
            (
                line,
                tasks.setdefault(task.name, len(tasks)),
                questions.setdefault(record.query.qid, len(questions)),
            )
            for line, record in enumerate(self._queries)
            if not (self._only_listed and not self._has_list(record))
            and (self._tasks is None or task_of(record).name in self._tasks)
            for task in [task_of(record)]
        ]
        if not found:
            raise DataError(
                f"{self._queries.path}: none of {len(self._queries)} training queries has a list "
                "or a wanted task. Mine for the same training file."
            )
        return np.array(found, dtype=np.int64).T

    def _has_list(self, record: QueryRecord) -> bool:
        return record.query.qid in self._list_row or (self._use_given and bool(record.negatives))

    @property
    def _rows(self) -> np.ndarray:
        return self._columns[0]

    @property
    def tasks(self) -> np.ndarray:
        """See `TrainingSet.tasks`."""
        return self._columns[1]

    @property
    def questions(self) -> np.ndarray:
        """See `TrainingSet.questions`: a qid may stand in many lines."""
        return self._columns[2]

    def require_own_lists(self) -> None:
        """Look whether the lists name these queries and these candidates.

        Raises:
            DataError: They name others: they were made for other data.
        """
        if self._lists is None:
            return
        known = {record.query.qid for record in self._queries}
        foreign = [qid for qid in self._lists.qids if qid not in known]
        if foreign:
            raise DataError(
                f"data.lists: {len(foreign)} of {len(self._lists)} queries are not among the training "
                f"queries of {self._queries.path} (first: {foreign[0]}). Mine or score the data that is "
                "trained on."
            )
        named = set().union(*self._lists.dids)
        missing = sorted(did for did in named if self._pool.find(did) is None)
        if missing:
            raise DataError(
                f"data.lists: {len(missing)} of {len(named)} candidates are not in the pool "
                f"{self._pool.path} (first: {missing[0]}). Mine or score the data that is trained on."
            )

    def item(self, row: int, *, visit: int) -> TrainingItem:
        """See `TrainingSet.item`."""
        record = self._queries[int(self._rows[row])]
        rng = np.random.default_rng([self._seed, row, visit])
        positive = self._pool.get(record.positives[int(rng.integers(len(record.positives)))])
        right = {self.content_key(found): found for found in map(self._pool.get, reversed(record.positives))}
        relevant = frozenset(right)
        others, scores = self._others(record, relevant)
        more = [right[key] for key in reversed(right) if key != self.content_key(positive)]
        return TrainingItem(
            query=self._query(record, rng),
            positive=positive,
            others=others,
            scores=scores,
            relevant=relevant,
            more_positives=tuple(more),
        )

    def _query(self, record: QueryRecord, rng: np.random.Generator) -> Query:
        query = record.query
        dataset_id = int(query.qid.partition(":")[0])
        prompts = self._instructions.prompts(dataset_id, query.modality, task_of(record).candidate_modality)
        chosen = prompts[int(rng.integers(len(prompts)))]
        return Query(qid=query.qid, txt=query.txt, img_path=query.img_path, instruction=chosen)

    def _others(
        self, record: QueryRecord, relevant: frozenset[Hashable]
    ) -> tuple[tuple[Candidate, ...], tuple[float, ...] | None]:
        place = self._list_row.get(record.query.qid)
        hits = [(did, 0.0) for did in record.negatives] if self._use_given else []
        if self._lists is not None and place is not None:
            hits += zip(self._lists.dids[place], self._lists.scores[place], strict=True)
        if not hits:
            return (), None
        chosen: list[tuple[Candidate, float]] = []
        for did, score in hits:
            if self._num_others is not None and len(chosen) == self._num_others:
                break
            candidate = self._pool.get(did)
            if not (self._drop_positives and self.content_key(candidate) in relevant):
                chosen.append((candidate, float(score)))
        others = tuple(candidate for candidate, _ in chosen)
        return others, tuple(score for _, score in chosen) if self._with_scores else None

    def content_key(self, candidate: Candidate) -> Hashable:
        """See `TrainingSet.content_key`."""
        return _cached_key(candidate)


@lru_cache(maxsize=1 << 18)
def _cached_key(candidate: Candidate) -> bytes:
    return content_key(candidate)
