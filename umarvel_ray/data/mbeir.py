"""M-BEIR: its tasks, and the readers and writers of its files.

Under the root stand `query/{train,union_train,val,test}/`, `cand_pool/{local,global}/`,
`qrels/{train,val,test}/`, `instructions/query_instructions.tsv` and the images, whose paths in the records
start at the root.

Source of the layout and of the task table: Wei et al. 2023 (UniIR), arXiv:2311.17136, and its data set card.
"""

import functools
import hashlib
import json
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from umarvel_ray.artifacts import atomic_write
from umarvel_ray.data.lines import JsonLines, RecordFault
from umarvel_ray.data.records import MODALITIES, Candidate, Query, modality_of
from umarvel_ray.data.trec import Qrels, read_qrels
from umarvel_ray.errors import DataError
from umarvel_ray.storage import Place, at, is_remote, join, picture_bytes

Domain = Literal["news", "fashion", "wiki", "common"]

DATASETS = (
    "visualnews", "fashion200k", "webqa", "edis", "nights", "oven", "infoseek", "fashioniq", "cirr", "mscoco",
)  # fmt: skip
"""By data set id: the number before the colon of a qid or did."""

DOMAINS: dict[str, Domain] = {
    "visualnews": "news", "edis": "news", "fashion200k": "fashion", "fashioniq": "fashion", "webqa": "wiki",
    "oven": "wiki", "infoseek": "wiki", "nights": "common", "cirr": "common", "mscoco": "common",
}  # fmt: skip

_INSTRUCTIONS = "instructions/query_instructions.tsv"
SHARING_DATASETS = ("oven", "infoseek")
"""These two share Wikipedia: each lists positives of the other, which only the global pool holds."""


@dataclass(frozen=True, slots=True)
class Task:
    """One of M-BEIR's sixteen retrieval tasks.

    Attributes:
        name: As in the file names, `"mscoco_task0"`.
        dataset: `"mscoco"`.
        dataset_id: The number before the colon of its qids and dids.
        task_id: Which modality is asked for with which: 0-4, 6-8.
        query_modality: One of `MODALITIES`.
        candidate_modality: One of `MODALITIES`.
        headline_k: The k of the hit@k that papers report.
        domain: Of the pictures and texts, for the kinds of error.
    """

    name: str
    dataset: str
    dataset_id: int
    task_id: int
    query_modality: str
    candidate_modality: str
    headline_k: int
    domain: Domain

    @property
    def kind(self) -> str:
        """What is asked with what, for people: `"text → image"`."""
        return " → ".join(part.replace(",", "+") for part in (self.query_modality, self.candidate_modality))


_MODALITIES_BY_TASK_ID = {
    0: ("text", "image"),
    1: ("text", "text"),
    2: ("text", "image,text"),
    3: ("image", "text"),
    4: ("image", "image"),
    6: ("image,text", "text"),
    7: ("image,text", "image"),
    8: ("image,text", "image,text"),
}


def _task(dataset: str, task_id: int, headline_k: int = 5) -> Task:
    query_modality, candidate_modality = _MODALITIES_BY_TASK_ID[task_id]
    return Task(
        name=f"{dataset}_task{task_id}",
        dataset=dataset,
        dataset_id=DATASETS.index(dataset),
        task_id=task_id,
        query_modality=query_modality,
        candidate_modality=candidate_modality,
        headline_k=headline_k,
        domain=DOMAINS[dataset],
    )


TASKS: tuple[Task, ...] = (
    _task("visualnews", 0),
    _task("mscoco", 0),
    _task("fashion200k", 0, headline_k=10),
    _task("webqa", 1),
    _task("edis", 2),
    _task("webqa", 2),
    _task("visualnews", 3),
    _task("mscoco", 3),
    _task("fashion200k", 3, headline_k=10),
    _task("nights", 4),
    _task("oven", 6),
    _task("infoseek", 6),
    _task("fashioniq", 7, headline_k=10),
    _task("cirr", 7),
    _task("oven", 8),
    _task("infoseek", 8),
)
"""In the order of the papers' tables."""

TASK_BY_NAME: dict[str, Task] = {task.name: task for task in TASKS}


def local_pool_name(task: Task, split: str) -> str:
    """The middle of a local pool's file name: val and test share one pool, but in MSCOCO each has its own."""
    return f"{task.name}_{split}" if task.dataset == "mscoco" else task.name


def dataset_id_of(name: str) -> int | None:
    """The number before the colon of a qid or did; None where there is none."""
    number, colon, _ = name.partition(":")
    return int(number) if colon and number.isascii() and number.isdigit() else None


def _dataset_number(name: str) -> int:
    """As `dataset_id_of`, and a number that no data set has for names without one."""
    dataset = dataset_id_of(name)
    return 1 << 20 if dataset is None else dataset


def _read_modality(value: Any) -> str | None:
    """As one of `MODALITIES`, None for other values; the data set card spells "image,text" the other way."""
    if not isinstance(value, str):
        return None
    if value in MODALITIES:  # nearly all
        return value
    parts = [part.strip() for part in value.split(",")]
    if len(set(parts)) != len(parts) or not {*parts} <= {"image", "text"}:
        return None
    return ",".join(sorted(parts))


def _check_name(field: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise RecordFault(
            f"{field} is no name", detail=f"{value!r}", advice='Name each line, such as "9:11".'
        )
    return value


def _check_text(field: str, value: Any, *, name: str) -> str | None:
    if value is not None and not isinstance(value, str):
        kind = type(value).__name__
        raise RecordFault(
            f"{field} is neither text nor null",
            detail=f"{name} has a {kind}",
            advice="Write a string or null.",
        )
    return value or None


def _check_names(field: str, value: Any, *, name: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(item, str) and item for item in value):
        raise RecordFault(f"{field} is no list of dids", detail=name, advice='Write a list such as ["9:83"].')
    return tuple(value)


def _check_modality(field: str, value: Any, *, name: str, txt: str | None, img_path: str | None) -> None:
    modality = _read_modality(value)
    if modality is None:
        advice = 'Write "text", "image" or "image,text".'
        raise RecordFault(f"{field} is no modality", detail=f"{name} has {value!r}", advice=advice)
    held = modality_of(txt, img_path)
    if modality != held:
        raise RecordFault(
            f"{field} disagrees with the content",
            detail=f"{name} says {value!r} but holds {held or 'nothing'}",
            advice="Correct the modality, or give the text and the image it names.",
        )


def _join(root: Place, img_path: str | None) -> str | None:
    return join(root, img_path) if img_path else None


def read_candidate(record: dict[str, Any], root: Place) -> Candidate:
    did = _check_name("did", record.get("did"))
    txt = _check_text("txt", record.get("txt"), name=did)
    img_path = _check_text("img_path", record.get("img_path"), name=did)
    _check_modality("modality", record.get("modality"), name=did, txt=txt, img_path=img_path)
    return Candidate(did=did, txt=txt, img_path=_join(root, img_path))


def read_query(record: dict[str, Any], root: Place, line: int) -> "QueryRecord":
    qid = _check_name("qid", record.get("qid"))
    txt = _check_text("query_txt", record.get("query_txt"), name=qid)
    img_path = _check_text("query_img_path", record.get("query_img_path"), name=qid)
    _check_modality("query_modality", record.get("query_modality"), name=qid, txt=txt, img_path=img_path)
    positives = _check_names("pos_cand_list", record.get("pos_cand_list"), name=qid)
    if not positives:
        raise RecordFault("pos_cand_list is empty", detail=qid, advice="Give it a positive, or remove it.")
    task_id = record.get("task_id")
    if not isinstance(task_id, int) or isinstance(task_id, bool) or not 0 <= task_id < 16:
        raise RecordFault("task_id is no number", detail=f"{qid} has {task_id!r}", advice="Write 0-4 or 6-8.")
    return QueryRecord(
        query=Query(qid=qid, txt=txt, img_path=_join(root, img_path)),
        positives=positives,
        negatives=_check_names("neg_cand_list", record.get("neg_cand_list") or [], name=qid),
        task_id=task_id,
        line=line,
    )


@functools.lru_cache(maxsize=1 << 16)
def _image_digest(path: str, version: tuple[int, int] | None) -> bytes:
    """Anew for each version of the picture."""
    return hashlib.sha256(picture_bytes(path)).digest()


def _image_version(path: str) -> tuple[int, int] | None:
    """Size and time, so that a picture that was replaced is read again. None in object storage, where a name
    stands for one content (`cache.kept_bytes`) and a question costs as much as a read."""
    if is_remote(path):
        return None
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns


def content_key(record: Query | Candidate) -> bytes:
    """16 bytes that are equal for equal content: the same text to the letter and the same image to the byte.

    Raises:
        DataError: The image cannot be read.
    """
    digest = hashlib.blake2b(digest_size=16)
    if record.txt:
        digest.update(b"text\0" + record.txt.encode("utf-8", "surrogatepass"))
    if record.img_path:
        try:
            version = _image_version(record.img_path)
            digest.update(b"\0image\0" + _image_digest(record.img_path, version))
        except OSError as error:
            name = record.qid if isinstance(record, Query) else record.did
            raise DataError(
                f"{record.img_path}: the image of {name} cannot be read ({error.strerror}). Unpack the "
                "images there."
            ) from None
    return digest.digest()


class Pool:
    """The candidates of one pool file by row and by did. Pickles as its paths.

    Attributes:
        path: The JSONL file.
        root: The folder at which its image paths start.
        name: `"mscoco_task0_test"` for `mbeir_mscoco_task0_test_cand_pool.jsonl`; the file's stem elsewhere.
        fingerprint: 16 hex digits that name the file's content (not that of its images).
    """

    def __init__(self, path: str | os.PathLike, root: str | os.PathLike) -> None:
        """Open a pool.

        Raises:
            DataError: The file cannot be read.
        """
        self._lines = JsonLines(path)
        self.path = self._lines.path
        self.root = at(root)
        self.name = self.path.stem.removeprefix("mbeir_").removesuffix("_cand_pool")
        self.fingerprint = self._lines.fingerprint

    def __reduce__(self) -> tuple[type["Pool"], tuple[str, str]]:
        return Pool, (str(self.path), str(self.root))

    def __len__(self) -> int:
        return len(self._lines)

    def __iter__(self) -> Iterator[Candidate]:
        return self.range(0, len(self))

    def range(self, start: int, stop: int) -> Iterator[Candidate]:
        """Rows `start` to `stop` (exclusive), read in blocks."""
        for row, record in enumerate(self._lines.range(start, stop), start=start):
            try:
                yield read_candidate(record, self.root)
            except RecordFault as fault:
                raise DataError(f"{self._lines.where(row)}: {fault}") from None

    def kinds(self) -> np.ndarray:
        """(N,) int32 by row: data set id · 4 + the modality's place in `MODALITIES`; one pass, kept.

        Raises:
            DataError: A line breaks the format.
        """

        def make() -> np.ndarray:
            return np.array(
                [_dataset_number(c.did) * 4 + MODALITIES.index(c.modality) for c in self], dtype=np.int32
            )

        return self._lines.derived("kinds", make)

    def candidate(self, row: int) -> Candidate:
        """The candidate at `row`, from 0; its image path absolute.

        Raises:
            DataError: The line breaks the format.
        """
        try:
            return read_candidate(self._lines[row], self.root)
        except RecordFault as fault:
            raise DataError(f"{self._lines.where(row)}: {fault}") from None

    def where(self, row: int) -> str:
        """`file:line` of `row`, for messages."""
        return self._lines.where(row)

    def find(self, did: str) -> int | None:
        """The row of `did`; None where the pool lacks it.

        Raises:
            DataError: Two lines of the pool share a did.
        """
        return self._lines.keys("did", unique=True).find(did)

    def get(self, did: str) -> Candidate:
        """The candidate `did`.

        Raises:
            DataError: The pool lacks it.
        """
        if (row := self.find(did)) is None:
            raise DataError(
                f"{self.path}: has no candidate {did} among {len(self)}. Use the pool it was taken from."
            )
        return self.candidate(row)

    def dids(self) -> list[str]:
        """All dids by row: one pass over the file, about 70 bytes of memory each."""
        return [_string(record, "did", where=self.where, row=row) for row, record in enumerate(self._lines)]

    def content_key(self, row: int) -> bytes:
        """16 bytes that rows of the same content share, whatever their dids; see `content_key`."""
        return content_key(self.candidate(row))


@dataclass(frozen=True, slots=True)
class QueryRecord:
    """A query with its judgements, as a line of a query file gives them.

    Attributes:
        query: Without instruction: that is chosen by who reads it.
        positives: dids, at least one.
        negatives: dids given by the source data set, often none.
        task_id: 0-4, 6-8.
        line: Where it stands in its file, from 1.
    """

    query: Query
    positives: tuple[str, ...]
    negatives: tuple[str, ...] = ()
    task_id: int = 0
    line: int = 0


class QuerySet:
    """The queries of one file by row. Pickles as its paths.

    The union training file repeats queries, so a qid need not be unique unless `row_of` is asked.

    Attributes:
        path: The JSONL file.
        root: The folder at which its image paths start.
        fingerprint: 16 hex digits that name the file's content (not that of its images).
    """

    def __init__(self, path: str | os.PathLike, root: str | os.PathLike) -> None:
        """Open a query file.

        Raises:
            DataError: The file cannot be read.
        """
        self._lines = JsonLines(path)
        self.path = self._lines.path
        self.root = at(root)
        self.fingerprint = self._lines.fingerprint

    def __reduce__(self) -> tuple[type["QuerySet"], tuple[str, str]]:
        return QuerySet, (str(self.path), str(self.root))

    def __len__(self) -> int:
        return len(self._lines)

    def __iter__(self) -> Iterator[QueryRecord]:
        return self.range(0, len(self))

    def range(self, start: int, stop: int) -> Iterator[QueryRecord]:
        """Rows `start` to `stop` (exclusive), read in blocks."""
        for row, record in enumerate(self._lines.range(start, stop), start=start):
            try:
                yield read_query(record, self.root, self._lines.line(row))
            except RecordFault as fault:
                raise DataError(f"{self._lines.where(row)}: {fault}") from None

    def kinds(self) -> np.ndarray:
        """(N,) int32 by row: data set id · 16 + task id; one pass, kept.

        Raises:
            DataError: A line breaks the format.
        """

        def make() -> np.ndarray:
            return np.array([_dataset_number(r.query.qid) * 16 + r.task_id for r in self], dtype=np.int32)

        return self._lines.derived("kinds", make)

    def __getitem__(self, row: int) -> QueryRecord:
        """The query at `row`, from 0; its image path absolute.

        Raises:
            DataError: The line breaks the format.
        """
        try:
            return read_query(self._lines[row], self.root, self._lines.line(row))
        except RecordFault as fault:
            raise DataError(f"{self._lines.where(row)}: {fault}") from None

    def where(self, row: int) -> str:
        """`file:line` of `row`, for messages."""
        return self._lines.where(row)

    def find(self, qid: str) -> int | None:
        """The first row of `qid`; None where the file lacks it."""
        return self._lines.keys("qid", unique=False).find(qid)

    def row_of(self, qid: str) -> int:
        """The one row of `qid`.

        Raises:
            DataError: The file lacks it, or some qid of the file repeats.
        """
        row = self._lines.keys("qid", unique=True).find(qid)
        if row is None:
            raise DataError(
                f"{self.path}: has no query {qid} among {len(self)}. Use the file it was taken from."
            )
        return row

    def qids(self) -> list[str]:
        """All qids by row: one pass over the file."""
        return [_string(record, "qid", where=self.where, row=row) for row, record in enumerate(self._lines)]


def _string(record: dict[str, Any], field: str, *, where: Callable[[int], str], row: int) -> str:
    try:
        return _check_name(field, record.get(field))
    except RecordFault as fault:
        raise DataError(f"{where(row)}: {fault}") from None


class Instructions:
    """The task sentences of M-BEIR by (data set, query modality, candidate modality).

    Attributes:
        path: The table they were read from.
        fingerprint: 16 hex digits that name its content.
    """

    def __init__(
        self, path: Place, prompts: dict[tuple[int, str, str], tuple[str, ...]], fingerprint: str
    ) -> None:
        """Args as the attributes; `prompts` by key."""
        self.path = path
        self.fingerprint = fingerprint
        self._prompts = prompts

    @classmethod
    def read(cls, path: str | os.PathLike) -> "Instructions":
        """Read a tab-separated table with one header line.

        Its columns: query modality, candidate modality, data set name, data set id, then the prompts; an
        empty cell is no prompt.

        Raises:
            DataError: A line lacks a column, names no modality or repeats a key.
        """
        path = at(path)
        prompts: dict[tuple[int, str, str], tuple[str, ...]] = {}
        try:
            content = path.read_bytes()
            text = content.decode("utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path}: cannot be read ({error}). Give M-BEIR's {_INSTRUCTIONS}.") from None
        for number, line in enumerate(text.split("\n"), start=1):
            if number == 1 or not line.strip():
                continue
            cells = [cell.strip() for cell in line.strip("\r").split("\t")]
            modalities = [_read_modality(cell) for cell in cells[:2]]
            found = tuple(cell for cell in cells[4:] if cell)
            if len(cells) < 5 or None in modalities or not cells[3].isdecimal() or not found:
                raise DataError(
                    f"{path}:{number}: not an instruction row: {line[:80]!r}. Give query modality, candidate "
                    "modality, data set, data set id and at least one prompt, separated by tabs."
                )
            key = (int(cells[3]), str(modalities[0]), str(modalities[1]))
            if key in prompts:
                raise DataError(f"{path}:{number}: a second row for {_key_text(key)}. Keep one.")
            prompts[key] = found
        return cls(path, prompts, hashlib.sha256(content).hexdigest()[:16])

    def prompts(self, dataset_id: int, query_modality: str, candidate_modality: str) -> tuple[str, ...]:
        """The prompts of one row, at least one.

        Raises:
            DataError: The table has no such row.
        """
        key = (dataset_id, query_modality, candidate_modality)
        if key not in self._prompts:
            raise DataError(f"{self.path}: no row for {_key_text(key)} among {len(self._prompts)}. Add one.")
        return self._prompts[key]

    def choose(
        self,
        qid: str,
        query_modality: str,
        candidate_modality: str,
        *,
        choice: "Literal['first', 'seeded'] | int",
        seed: int,
    ) -> str:
        """The instruction of one query.

        Args:
            qid: Its data set is the number before the colon.
            query_modality: One of `MODALITIES`.
            candidate_modality: That of what is sought.
            choice: The row's first prompt, the one of this number from 0, or one drawn by (seed, qid): the
            same
                in any order, on any worker.
            seed: Of the draw.

        Raises:
            DataError: The table has no such row or prompt, or the qid names no data set.
        """
        if (dataset_id := dataset_id_of(qid)) is None:
            raise DataError(f"query {qid!r} names no data set. Write qids as dataset:number, such as 9:11.")
        prompts = self.prompts(dataset_id, query_modality, candidate_modality)
        if choice == "first":
            return prompts[0]
        if isinstance(choice, int):
            if choice >= len(prompts):
                key = _key_text((dataset_id, query_modality, candidate_modality))
                raise DataError(
                    f"{self.path}: {key} has {len(prompts)} prompts, number {choice} is asked for."
                )
            return prompts[choice]
        digest = hashlib.blake2b(f"{seed}\0{qid}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
        return prompts[int.from_bytes(digest, "little") % len(prompts)]


def _key_text(key: tuple[int, str, str]) -> str:
    dataset_id, query_modality, candidate_modality = key
    name = f" ({DATASETS[dataset_id]})" if dataset_id < len(DATASETS) else ""
    return f"data set {dataset_id}{name}, {query_modality} → {candidate_modality}"


class Mbeir:
    """M-BEIR's files under one root.

    Attributes:
        root: The folder that holds `query/`, `cand_pool/` and the rest.
    """

    def __init__(self, root: str | os.PathLike) -> None:
        """Point at a root.

        Raises:
            DataError: It is no folder.
        """
        self.root = at(root)
        if not self.root.is_dir():
            raise DataError(
                f"{root}: no such folder. Give the root of M-BEIR, which holds query/ and cand_pool/."
            )

    def tasks(self, split: str) -> tuple[Task, ...]:
        """Those of `TASKS` whose query file for `split` (val or test) is there, in their order."""
        return tuple(task for task in TASKS if self.queries_path(task, split).is_file())

    def training_datasets(self) -> tuple[str, ...]:
        """Those of `DATASETS` that have a training file, in the order of their ids."""
        return tuple(dataset for dataset in DATASETS if self.training_queries_path(dataset).is_file())

    def queries_path(self, task: Task, split: str) -> Place:
        """The query file of a task for val or test."""
        return self.root / "query" / split / f"mbeir_{task.name}_{split}.jsonl"

    def training_queries_path(self, dataset: str) -> Place:
        """The training file of a data set: its tasks mixed."""
        return self.root / "query" / "train" / f"mbeir_{dataset}_train.jsonl"

    def union_training_queries_path(self) -> Place:
        """The training file of all data sets, the small ones up-sampled by repeating lines."""
        return self.root / "query" / "union_train" / "mbeir_union_up_train.jsonl"

    def local_pool_path(self, task: Task, split: str) -> Place:
        """The pool of one task."""
        return self.root / "cand_pool" / "local" / f"mbeir_{local_pool_name(task, split)}_cand_pool.jsonl"

    def global_pool_path(self, split: str) -> Place:
        """The pool of all tasks, for train, val or test."""
        return self.root / "cand_pool" / "global" / f"mbeir_union_{split}_cand_pool.jsonl"

    def qrels_path(self, task: Task, split: str) -> Place:
        """The judgements of a task for val or test."""
        return self.root / "qrels" / split / f"mbeir_{task.name}_{split}_qrels.txt"

    def training_qrels_path(self, dataset: str) -> Place:
        """The judgements of a data set's training queries."""
        return self.root / "qrels" / "train" / f"mbeir_{dataset}_train_qrels.txt"

    def instructions_path(self) -> Place:
        """The table of task sentences."""
        return self.root / _INSTRUCTIONS

    def files(self, split: str, tasks: Collection[str] | None = None) -> list[Place]:
        """All files that say something about a split's queries, pools and judgements, those that are there.

        Args:
            split: train, val or test.
            tasks: Names of val's and test's tasks; all by default. Training files mix tasks.
        """
        paths = [self.instructions_path()]
        if split == "train":
            paths += [self.union_training_queries_path(), self.global_pool_path(split)]
            for dataset in self.training_datasets():
                paths += [self.training_queries_path(dataset), self.training_qrels_path(dataset)]
        else:
            for task in self.tasks(split):
                if tasks is None or task.name in tasks:
                    paths += [self.queries_path(task, split), self.qrels_path(task, split)]
                    paths.append(self.local_pool_path(task, split))
        return [path for path in dict.fromkeys(paths) if path.is_file()]

    def queries(self, task: Task, split: str) -> QuerySet:
        """Open `queries_path`. Raises DataError where it is missing, as do all openers."""
        return QuerySet(self._require(self.queries_path(task, split)), self.root)

    def training_queries(self, dataset: str) -> QuerySet:
        """Open `training_queries_path`."""
        return QuerySet(self._require(self.training_queries_path(dataset)), self.root)

    def union_training_queries(self) -> QuerySet:
        """Open `union_training_queries_path`."""
        return QuerySet(self._require(self.union_training_queries_path()), self.root)

    def local_pool(self, task: Task, split: str) -> Pool:
        """Open `local_pool_path`."""
        return Pool(self._require(self.local_pool_path(task, split)), self.root)

    def global_pool(self, split: str) -> Pool:
        """Open `global_pool_path`."""
        return Pool(self._require(self.global_pool_path(split)), self.root)

    def qrels(self, task: Task, split: str) -> Qrels:
        """Read `qrels_path`."""
        return read_qrels(self._require(self.qrels_path(task, split)))

    def training_qrels(self, dataset: str) -> Qrels:
        """Read `training_qrels_path`."""
        return read_qrels(self._require(self.training_qrels_path(dataset)))

    def instructions(self) -> Instructions:
        """Read `instructions_path`."""
        return Instructions.read(self._require(self.instructions_path()))

    def _require(self, path: Place) -> Place:
        if not path.is_file():
            raise DataError(
                f"{path}: missing. Put M-BEIR's {path.relative_to(self.root)} there, or correct the root "
                f"{self.root}."
            )
        return path


def _relative(img_path: str | None, root: str | os.PathLike) -> str | None:
    if not img_path:
        return None
    inside = is_remote(root) and img_path.startswith(f"{root}/")
    return img_path.removeprefix(f"{root}/") if inside else os.path.relpath(img_path, root)


def query_line(record: QueryRecord, root: str | os.PathLike) -> dict[str, Any]:
    """The JSON object of one line of a query file; the image path becomes relative to `root`."""
    query = record.query
    return {
        "qid": query.qid,
        "query_txt": query.txt,
        "query_img_path": _relative(query.img_path, root),
        "query_modality": query.modality,
        "query_src_content": None,
        "pos_cand_list": list(record.positives),
        "neg_cand_list": list(record.negatives),
        "task_id": record.task_id,
    }


def candidate_line(candidate: Candidate, root: str | os.PathLike) -> dict[str, Any]:
    """The JSON object of one line of a pool file; the image path becomes relative to `root`."""
    return {
        "did": candidate.did,
        "txt": candidate.txt,
        "img_path": _relative(candidate.img_path, root),
        "modality": candidate.modality,
        "src_content": None,
    }


def write_queries(path: str | os.PathLike, records: Iterable[QueryRecord], root: str | os.PathLike) -> None:
    """Write a query file, by rename; instructions and line numbers have no place in it."""
    _write_lines(path, (query_line(record, root) for record in records))


def write_pool(path: str | os.PathLike, candidates: Iterable[Candidate], root: str | os.PathLike) -> None:
    """Write a pool file, by rename."""
    _write_lines(path, (candidate_line(candidate, root) for candidate in candidates))


def write_instructions(path: str | os.PathLike, prompts: dict[tuple[int, str, str], Sequence[str]]) -> None:
    """Write a table of task sentences, by rename.

    Args:
        path: The file.
        prompts: By (data set id, query modality, candidate modality), at least one each, without tabs or
            newlines.
    """
    width = max((len(row) for row in prompts.values()), default=1)
    header = ["query_modality", "cand_modality", "dataset_name", "dataset_id"]
    header += [f"prompt_{number}" for number in range(1, width + 1)]
    with atomic_write(path) as file:
        file.write("\t".join(header) + "\n")
        for (dataset_id, query_modality, candidate_modality), row in prompts.items():
            if not row or any(not prompt.strip() or set(prompt) & set("\t\r\n") for prompt in row):
                key = _key_text((dataset_id, query_modality, candidate_modality))
                raise DataError(
                    f"{path}: the prompts of {key} are none, or one is empty or holds a tab or newline."
                )
            name = DATASETS[dataset_id] if dataset_id < len(DATASETS) else str(dataset_id)
            file.write("\t".join([query_modality, candidate_modality, name, str(dataset_id), *row]) + "\n")


def _write_lines(path: str | os.PathLike, values: Iterable[dict[str, Any]]) -> None:
    with atomic_write(path) as file:
        for value in values:
            file.write(json.dumps(value, ensure_ascii=False) + "\n")
