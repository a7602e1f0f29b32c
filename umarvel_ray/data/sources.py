"""What is embedded, searched and reranked of M-BEIR, by name: query sets with their instructions, and pools.

A source's name is that of its embedding store, so every job finds what another wrote.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np

from umarvel_ray.artifacts import fingerprint
from umarvel_ray.data.lines import JsonLines
from umarvel_ray.data.mbeir import (
    TASKS,
    Instructions,
    Mbeir,
    Pool,
    QueryRecord,
    QuerySet,
    Task,
    local_pool_name,
)
from umarvel_ray.data.own import RecordSource
from umarvel_ray.data.records import MODALITIES, Candidate, Query
from umarvel_ray.errors import ConfigError, DataError
from umarvel_ray.storage import join

InstructionChoice = Literal["first", "seeded"] | int
"""The first prompt of a row, one drawn by (seed, qid), or the one of this number, from 0."""
EvaluationScope = Literal["local", "pair", "global"]
"""A task's own pool, OVEN's and InfoSeek's together, or all pools."""
_SHARED_POOLS = {"oven": "oven+infoseek", "infoseek": "oven+infoseek"}
"""OVEN and InfoSeek answer from one Wikipedia."""


def task_of(record: QueryRecord) -> Task:
    """The task that a query line belongs to, by its data set and task id.

    Raises:
        DataError: No task has that pair.
    """
    dataset_id = record.query.qid.partition(":")[0]
    for task in TASKS:
        if str(task.dataset_id) == dataset_id and task.task_id == record.task_id:
            return task
    raise DataError(
        f"query {record.query.qid}, line {record.line}: M-BEIR has no task {record.task_id} "
        f"for data set {dataset_id}. Mend qid or task_id."
    )


def with_instruction(
    record: QueryRecord, instructions: Instructions, *, choice: InstructionChoice, seed: int
) -> Query:
    """The query with the task sentence of its data set, its modality and the modality it seeks."""
    query = record.query
    sentence = instructions.choose(
        query.qid, query.modality, task_of(record).candidate_modality, choice=choice, seed=seed
    )
    return Query(qid=query.qid, txt=query.txt, img_path=query.img_path, instruction=sentence)


@dataclass(frozen=True)
class QuerySource:
    """Queries of one task and split, instructions chosen.

    Attributes:
        name: `"queries/test/mscoco_task0"`.
        task: Theirs.
        root: M-BEIR's.
        path: The file they stand in; a training file holds several tasks.
        choice: Which of a row's prompts.
        seed: Of a seeded choice.
    """

    name: str
    task: Task
    root: str
    path: str
    choice: InstructionChoice = "first"
    seed: int = 0

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> Query:
        return with_instruction(self.record(row), self._instructions, choice=self.choice, seed=self.seed)

    def range(self, start: int, stop: int) -> Iterator[Query]:
        """Rows `start` to `stop` (exclusive)."""
        return (self[row] for row in range(start, stop))

    def record(self, row: int) -> QueryRecord:
        """The query with its judgements, without instruction."""
        return self._file[int(self._rows[row])]

    def by_qid(self, qid: str) -> Query:
        """The query `qid`, with its instruction.

        Raises:
            DataError: The file lacks it.
        """
        record = self._file[self._file.row_of(qid)]
        return with_instruction(record, self._instructions, choice=self.choice, seed=self.seed)

    def where(self, row: int) -> str:
        """`file:line` of `row`, for messages."""
        return self._file.where(int(self._rows[row]))

    @cached_property
    def fingerprint(self) -> str:
        """Names the content: queries, and the prompts put before them."""
        return fingerprint(
            [self._file.fingerprint, self.task.name, self._instructions.fingerprint, self.choice, self.seed]
        )

    @cached_property
    def _file(self) -> QuerySet:
        return QuerySet(self.path, self.root)

    @cached_property
    def _instructions(self) -> Instructions:
        return Mbeir(self.root).instructions()

    @cached_property
    def _rows(self) -> np.ndarray:
        return np.flatnonzero(self._file.kinds() % 16 == self.task.task_id)

    def __getstate__(self) -> dict[str, object]:
        """Travels as its settings; files are opened again where it arrives."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


@dataclass(frozen=True)
class QueryFile:
    """Queries of any JSONL file: M-BEIR's, or lines of qid, txt, img_path and instruction.

    Attributes:
        path: The file.
        root: The folder at which its image paths start.
        instruction: Put before queries whose line has none of its own.
    """

    path: str
    root: str
    instruction: str | None = None

    def __len__(self) -> int:
        return len(self._lines)

    def by_qid(self, qid: str) -> Query:
        """The query `qid`, with its instruction.

        Raises:
            DataError: The file lacks it, or its line is no query.
        """
        row = self._lines.keys("qid", unique=True).find(qid)
        if row is None:
            raise DataError(
                f"{self.path}: has no query {qid} among {len(self)}. Use the file that was searched."
            )
        line = self._lines[row]
        values: dict[str, str | None] = {}
        for name, fields in {
            "txt": ("query_txt", "txt"),
            "img_path": ("query_img_path", "img_path"),
            "instruction": ("instruction",),
        }.items():
            value = next((line[field] for field in fields if line.get(field)), None)
            if value is not None and not isinstance(value, str):
                raise DataError(
                    f"{self._lines.where(row)}: {name} of {qid} is no text. Write a string or null."
                )
            values[name] = value
        img_path = values["img_path"]
        return Query(
            qid=qid,
            txt=values["txt"],
            img_path=join(self.root, img_path) if img_path else None,
            instruction=values["instruction"] or self.instruction,
        )

    @cached_property
    def fingerprint(self) -> str:
        """Names the content: queries, and the instruction put before them."""
        return fingerprint([self._lines.fingerprint, self.instruction])

    @cached_property
    def _lines(self) -> JsonLines:
        return JsonLines(self.path)

    def __getstate__(self) -> dict[str, object]:
        """Travels as its settings; files are opened again where it arrives."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


@dataclass(frozen=True)
class PoolSource:
    """Candidates of one pool, or of those in it that one modality and some data sets give.

    Attributes:
        name: `"pools/test/mscoco_task0_test"`.
        root: M-BEIR's.
        path: The pool file.
        datasets: Ids of the data sets taken; empty for all.
        modality: The modality taken; empty for all.
    """

    name: str
    root: str
    path: str
    datasets: tuple[int, ...] = ()
    modality: str = ""

    def __len__(self) -> int:
        return len(self._file) if self._rows is None else len(self._rows)

    def __getitem__(self, row: int) -> Candidate:
        return self._file.candidate(row if self._rows is None else int(self._rows[row]))

    def range(self, start: int, stop: int) -> Iterator[Candidate]:
        """Rows `start` to `stop` (exclusive), read in blocks where they stand together."""
        if self._rows is None:
            return self._file.range(start, stop)
        return (self[row] for row in range(start, stop))

    def where(self, row: int) -> str:
        """`file:line` of `row`, for messages."""
        return self._file.where(row if self._rows is None else int(self._rows[row]))

    @cached_property
    def fingerprint(self) -> str:
        """Names the content (not that of the images)."""
        return fingerprint([self._file.fingerprint, self.datasets, self.modality])

    @cached_property
    def _file(self) -> Pool:
        return Pool(self.path, self.root)

    @cached_property
    def _rows(self) -> np.ndarray | None:
        if not self.datasets:
            return None
        wanted = [dataset * 4 + MODALITIES.index(self.modality) for dataset in self.datasets]
        return np.flatnonzero(np.isin(self._file.kinds(), wanted))

    def __getstate__(self) -> dict[str, object]:
        """Travels as its settings; files are opened again where it arrives."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


Source = QuerySource | PoolSource | RecordSource


def training_tasks(mbeir: Mbeir) -> tuple[Task, ...]:
    """Tasks that the training files hold, in the order of `TASKS`."""
    present: set[int] = set()
    for dataset in mbeir.training_datasets():
        present |= set(mbeir.training_queries(dataset).kinds().tolist())
    return tuple(task for task in TASKS if task.dataset_id * 16 + task.task_id in present)


def tasks_of_split(mbeir: Mbeir, split: str) -> tuple[Task, ...]:
    """Tasks of train, val or test, in the order of `TASKS`."""
    return training_tasks(mbeir) if split == "train" else mbeir.tasks(split)


def chosen_tasks(mbeir: Mbeir, split: str, names: tuple[str, ...] | None) -> tuple[Task, ...]:
    """Tasks of a split, those named or all.

    Raises:
        ConfigError: A named task has no file there, or there is none at all.
    """
    present = tasks_of_split(mbeir, split)
    if not present:
        raise ConfigError(f"{mbeir.root}: no task of M-BEIR has a {split} file there. Check root and split.")
    if names is None:
        return present
    if missing := [name for name in names if name not in {task.name for task in present}]:
        raise ConfigError(
            f"{mbeir.root}: {len(missing)} of {len(names)} tasks have no {split} file (first: {missing[0]}). "
            f"There are: {', '.join(task.name for task in present)}."
        )
    return tuple(task for task in present if task.name in names)


def query_source(
    mbeir: Mbeir, task: Task, split: str, *, choice: InstructionChoice = "first", seed: int = 0
) -> QuerySource:
    """The queries of a task."""
    path = mbeir.training_queries_path(task.dataset) if split == "train" else mbeir.queries_path(task, split)
    numbered = f"@{choice}" if isinstance(choice, int) else ""
    return QuerySource(
        name=f"queries/{split}/{task.name}{numbered}",
        task=task,
        root=str(mbeir.root),
        path=str(path),
        choice=choice,
        seed=seed,
    )


def local_pool_source(mbeir: Mbeir, task: Task, split: str) -> PoolSource:
    """The pool that a task searches by itself; in training, the part of its data set and target modality."""
    root = str(mbeir.root)
    if split != "train":
        name = local_pool_name(task, split)
        # Val and test share their pools, MSCOCO's apart: one store serves both.
        return PoolSource(name=f"pools/{name}", root=root, path=str(mbeir.local_pool_path(task, split)))
    family = _SHARED_POOLS.get(task.dataset, task.dataset)
    datasets = {
        other.dataset_id for other in TASKS if _SHARED_POOLS.get(other.dataset, other.dataset) == family
    }
    return PoolSource(
        name=f"pools/train/{family}_{task.candidate_modality.replace(',', '+')}",
        root=root,
        path=str(mbeir.global_pool_path("train")),
        datasets=tuple(sorted(datasets)),
        modality=task.candidate_modality,
    )


def pool_sources(mbeir: Mbeir, split: str, tasks: Sequence[Task] | None = None) -> list[PoolSource]:
    """All local pools of a split, each once; laid end to end they are its global pool."""
    chosen = tasks_of_split(mbeir, split) if tasks is None else tasks
    by_name = {source.name: source for source in (local_pool_source(mbeir, task, split) for task in chosen)}
    return list(by_name.values())


def scope_pools(
    mbeir: Mbeir, task: Task, split: str, scope: EvaluationScope, tasks: Sequence[Task]
) -> list[PoolSource]:
    """The pools that a task searches in a scope; none where the scope is not for it.

    `pair` is OVEN's and InfoSeek's: they list each other's candidates as right, which only their joint pool
    holds.
    """
    if scope == "local":
        return [local_pool_source(mbeir, task, split)]
    if scope == "global":
        return pool_sources(mbeir, split, tasks)
    if task.dataset not in _SHARED_POOLS:
        return []
    partners = [t for t in tasks if t.dataset in _SHARED_POOLS and t.task_id == task.task_id]
    return pool_sources(mbeir, split, partners) if len(partners) > 1 else []


class RecordReader:
    """Looks up candidates by id over several pools: the reranker's and the report's view."""

    def __init__(self, pools: Sequence[PoolSource]) -> None:
        self._pools = [Pool(path, root) for path, root in {(pool.path, pool.root): None for pool in pools}]

    def candidate(self, did: str) -> Candidate:
        """The candidate `did`.

        Raises:
            DataError: No pool has it.
        """
        for pool in self._pools:
            if (row := pool.find(did)) is not None:
                return pool.candidate(row)
        names = ", ".join(Path(pool.path).name for pool in self._pools)
        raise DataError(
            f"candidate {did}: in none of {len(self._pools)} pools ({names}). Use the pools of this run."
        )
