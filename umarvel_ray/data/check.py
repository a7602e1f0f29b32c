"""Every fault of M-BEIR's files and images, grouped by file and kind; files are streamed, never held."""

import functools
import hashlib
import os
from array import array
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np

from umarvel_ray.data.lines import Faults, JsonLines, RecordFault
from umarvel_ray.data.mbeir import (
    DATASETS,
    SHARING_DATASETS,
    Instructions,
    Mbeir,
    QueryRecord,
    Task,
    dataset_id_of,
    read_candidate,
    read_query,
)
from umarvel_ray.data.trec import read_qrels
from umarvel_ray.errors import DataError
from umarvel_ray.storage import Place, at, is_remote

ImageCheck = Literal["none", "exists", "decode"]
"""How closely pictures are looked at: not at all, whether they are there, or every pixel."""
MAX_IMAGE_PIXELS = 100_000_000
"""Pixels of the largest picture the check decodes; M-BEIR's largest are strips of 256 x 51,200."""
MAX_IMAGE_BYTES = 100_000_000
"""Bytes of the largest picture file the check decodes."""


def image_fault(path: str, images: ImageCheck) -> RecordFault | None:
    """What is wrong with an image file; None where nothing is.

    Args:
        path: The file.
        images: `"exists"` looks whether the file is there; `"decode"` reads every pixel, within
            `MAX_IMAGE_BYTES` and `MAX_IMAGE_PIXELS`.
    """
    if images == "none":
        return None
    if not _is_there(path):
        advice = "Unpack the images there, or correct the path."
        return RecordFault("the image is missing", detail=path, advice=advice)
    if images == "exists":
        return None
    if (size := at(path).stat().st_size) > MAX_IMAGE_BYTES:
        return _too_large(f"{path} has {size:,} bytes of {MAX_IMAGE_BYTES:,}")
    return _decode_fault(path)


def _is_there(path: str) -> bool:
    if not is_remote(path):
        return os.path.isfile(path)
    folder, _, name = path.rpartition("/")
    return name in _names_in(folder)


@functools.lru_cache(maxsize=256)
def _names_in(folder: str) -> frozenset[str]:
    """One listing of a folder in object storage: millions of single questions would take hours."""
    return frozenset(found.name for found in at(folder).iterdir())


def _decode_fault(path: str) -> RecordFault | None:
    import warnings

    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit stands below
            with at(path).open("rb") as file, Image.open(file) as image:
                width, height = image.size
                if width * height > MAX_IMAGE_PIXELS:
                    return _too_large(f"{path} has {width} x {height} pixels of {MAX_IMAGE_PIXELS:,} in all")
                image.load()
    except Image.DecompressionBombError:
        return _too_large(f"{path} passes {MAX_IMAGE_PIXELS:,} pixels")
    except Exception as error:  # a broken file makes decoders raise almost anything
        reason = " ".join(str(error).split()) or type(error).__name__
        return RecordFault("the image is broken", detail=f"{path}: {reason}", advice="Copy the file again.")
    return None


def _too_large(detail: str) -> RecordFault:
    return RecordFault("the image is too large", detail=detail, advice="Scale it down.")


def check_mbeir(
    root: str | os.PathLike,
    *,
    tasks: Sequence[Task] | None = None,
    splits: Sequence[Literal["train", "val", "test"]] = ("val", "test"),
    images: ImageCheck = "exists",
) -> list[str]:
    """Every fault of the files under `root`, grouped by file and kind.

    Args:
        root: M-BEIR's root.
        tasks: Look at these; None for those that are there. For train it is their data sets that count.
        splits: Look at these. Train means the data sets' and the union file over the global training pool.
        images: How far pictures are looked at.

    Returns:
        `file:line: fault: first case (how many). What to do.`, in the order of the files; empty where all is
        well.
    """
    try:
        mbeir = Mbeir(root)
    except DataError as error:
        return [str(error)]
    checker = _Checker(mbeir, images)
    for split in splits:
        if split == "train":
            checker.check_training(None if tasks is None else {task.dataset for task in tasks})
        else:
            checker.check_split(mbeir.tasks(split) if tasks is None else tasks, split)
    return checker.faults.report()


class _Dids:
    """The dids of a pool as sorted 64-bit hashes: 8 bytes each, enough to tell which are missing.

    Two of five million dids share a hash once in a million pools; the readers compare the names themselves.
    """

    def __init__(self, hashes: array) -> None:
        self.hashes = np.frombuffer(hashes, dtype=np.uint64) if hashes else np.zeros(0, dtype=np.uint64)
        self.order = np.argsort(self.hashes, kind="stable")
        self.hashes = self.hashes[self.order]

    def __contains__(self, did: str) -> bool:
        wanted = np.uint64(self.hash(did))
        place = int(np.searchsorted(self.hashes, wanted))
        return place < len(self.hashes) and bool(self.hashes[place] == wanted)

    @staticmethod
    def hash(did: str) -> int:
        digest = hashlib.blake2b(did.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        return int.from_bytes(digest, "little")


class _Checker:
    def __init__(self, mbeir: Mbeir, images: ImageCheck) -> None:
        self.faults = Faults()
        self._mbeir = mbeir
        self._pools: dict[tuple[Place, str | None], _Dids | None] = {}
        self._instructions: Instructions | None = None
        self._faulty_qids: set[str] = set()
        # Many records share a picture; the answers for so many are kept, not all of a large pool's.
        self._image_fault = functools.lru_cache(maxsize=1 << 20)(lambda path: image_fault(path, images))

    def check_split(self, tasks: Sequence[Task], split: str) -> None:
        """The query files, local pools and qrels of val or test."""
        if not tasks:
            folder = self._mbeir.root / "query" / split
            detail, advice = "none of the sixteen is there", f"Put mbeir_{{task}}_{split}.jsonl there."
            self.faults.add(folder, None, "no query files", detail=detail, advice=advice)
        whole = self._mbeir.global_pool_path(split)
        everything = self._check_pool(whole) if whole.is_file() else None
        for task in tasks:
            pool_path = self._mbeir.local_pool_path(task, split)
            pool = self._check_pool(pool_path, task=task)
            self._check_instructions(task)
            path = self._mbeir.queries_path(task, split)
            judged: dict[str, tuple[int, tuple[str, ...]]] = {}
            for record in self._queries(path):
                query = record.query
                if query.qid in judged:
                    detail = f"query {query.qid} stands in line {judged[query.qid][0]} already"
                    self.faults.add(
                        path, record.line, "a qid repeats", detail=detail, advice="Keep one line of each."
                    )
                judged.setdefault(query.qid, (record.line, record.positives))
                self._check_task(path, record, task)
                if pool is not None:
                    self._check_positives(path, record, pool, pool_path, task=task)
                if everything is not None:
                    self._check_positives(path, record, everything, whole)
            self._check_qrels(self._mbeir.qrels_path(task, split), path, judged)

    def check_training(self, datasets: set[str] | None) -> None:
        """The training files over the global training pool."""
        pool_path = self._mbeir.global_pool_path("train")
        pool = self._check_pool(pool_path)
        union = self._mbeir.union_training_queries_path()
        there = self._mbeir.training_datasets() if datasets is None else sorted(datasets, key=DATASETS.index)
        if not there or union.is_file():
            for record in self._queries(union):
                self._check_training_record(union, record, pool, pool_path)
        for dataset in there:
            path = self._mbeir.training_queries_path(dataset)
            judged: dict[str, tuple[int, tuple[str, ...]]] = {}
            for record in self._queries(path):
                judged.setdefault(record.query.qid, (record.line, record.positives))
                self._check_training_record(path, record, pool, pool_path)
            self._check_qrels(self._mbeir.training_qrels_path(dataset), path, judged)

    def _check_training_record(
        self, path: Place, record: QueryRecord, pool: _Dids | None, pool_path: Place
    ) -> None:
        if pool is None:
            return
        self._check_positives(path, record, pool, pool_path)
        for did in record.negatives:
            if did not in pool:
                detail = f"candidate {did} of query {record.query.qid} is not in {pool_path.name}"
                advice = "Use the pool these queries were written for."
                self.faults.add(
                    path, record.line, "a negative outside the pool", detail=detail, advice=advice
                )

    def _records(self, path: Place) -> Iterator[tuple[int, dict[str, Any]]]:
        """(line number, object) of each line that is one; the others are noted."""
        if not path.is_file():
            advice = f"Put M-BEIR's {path.relative_to(self._mbeir.root)} there."
            self.faults.add(path, None, "missing", detail="no such file", advice=advice)
            return
        lines = JsonLines(path)
        if not len(lines):
            self.faults.add(path, None, "empty", detail="it has no line", advice="Copy the file again.")
        for row in range(len(lines)):
            line = lines.line(row)
            try:
                value = lines.parse(row)
            except RecordFault as fault:
                self.faults.add_record(path, line, fault)
                continue
            yield line, value

    def _queries(self, path: Place) -> Iterator[QueryRecord]:
        self._faulty_qids.clear()  # of the file last read; its qrels are not blamed for them
        for line, value in self._records(path):
            try:
                record = read_query(value, self._mbeir.root, line)
            except RecordFault as fault:
                self.faults.add_record(path, line, fault)
                self._faulty_qids.add(str(value.get("qid")))
                continue
            self._check_image(path, line, record.query.img_path)
            yield record

    def _check_pool(self, path: Place, *, task: Task | None = None) -> _Dids | None:
        """Its dids; None where the file is missing, so that not every positive is called missing too."""
        key = (path, task.candidate_modality if task else None)
        if key not in self._pools:
            self._pools[key] = self._read_pool(path, task)
        return self._pools[key]

    def _read_pool(self, path: Place, task: Task | None) -> _Dids | None:
        hashes, line_numbers = array("Q"), array("Q")
        for line, value in self._records(path):
            did = value.get("did")
            if isinstance(did, str):
                # A line with another fault still holds its did: its queries are not blamed as well.
                hashes.append(_Dids.hash(did))
                line_numbers.append(line)
            try:
                candidate = read_candidate(value, self._mbeir.root)
            except RecordFault as fault:
                self.faults.add_record(path, line, fault)
                continue
            self._check_image(path, line, candidate.img_path)
            if task and candidate.modality != task.candidate_modality:
                detail = (
                    f"{candidate.did} is {candidate.modality}, {task.name} seeks {task.candidate_modality}"
                )
                advice = "Move it to the pool of its own task."
                self.faults.add(path, line, "a candidate of another task", detail=detail, advice=advice)
        if not path.is_file():
            return None
        dids = _Dids(hashes)
        for place in np.flatnonzero(dids.hashes[1:] == dids.hashes[:-1]):
            first, second = (line_numbers[int(dids.order[place + step])] for step in (0, 1))
            detail = f"the did of line {first} stands here again"
            self.faults.add(path, second, "a did repeats", detail=detail, advice="Keep one line of each.")
        return dids

    def _check_image(self, path: Place, line: int, img_path: str | None) -> None:
        if img_path and (fault := self._image_fault(img_path)):
            self.faults.add_record(path, line, fault)

    def _check_task(self, path: Place, record: QueryRecord, task: Task) -> None:
        query = record.query
        found = (dataset_id_of(query.qid), record.task_id, query.modality)
        wanted = (task.dataset_id, task.task_id, task.query_modality)
        if found != wanted:
            detail = (
                f"query {query.qid} has task_id {record.task_id} and asks with {query.modality}, "
                f"{task.name} is data set {task.dataset_id}, task_id {task.task_id}, {task.query_modality}"
            )
            advice = "Move it to the file of its own task."
            self.faults.add(path, record.line, "a query of another task", detail=detail, advice=advice)

    def _check_positives(
        self, path: Place, record: QueryRecord, pool: _Dids, pool_path: Place, *, task: Task | None = None
    ) -> None:
        wanted = record.positives
        if task and task.dataset in SHARING_DATASETS:
            wanted = tuple(did for did in wanted if dataset_id_of(did) == task.dataset_id)
            if not wanted:
                detail = f"query {record.query.qid} lists only candidates of other data sets"
                advice = f"Give it one of {pool_path.name}."
                self.faults.add(path, record.line, "no positive in the pool", detail=detail, advice=advice)
        for did in wanted:
            if did not in pool:
                detail = f"candidate {did} of query {record.query.qid} is not in {pool_path.name}"
                advice = "Use the pool these queries were written for."
                rule = "a positive outside the local pool" if task else "a positive outside the global pool"
                self.faults.add(path, record.line, rule, detail=detail, advice=advice)

    def _check_instructions(self, task: Task) -> None:
        path = self._mbeir.instructions_path()
        try:
            if self._instructions is None:
                self._instructions = self._mbeir.instructions()
            self._instructions.prompts(task.dataset_id, task.query_modality, task.candidate_modality)
        except DataError as error:
            detail = str(error).removeprefix(f"{path}: ").rstrip(".")
            advice = "Take M-BEIR's table, or add the row."
            self.faults.add(path, None, "the instructions fall short", detail=detail, advice=advice)

    def _check_qrels(
        self, path: Place, queries_path: Place, judged: dict[str, tuple[int, tuple[str, ...]]]
    ) -> None:
        advice = f"Write it anew from the pos_cand_list of {queries_path.name}."
        if not path.is_file():
            self.faults.add(path, None, "missing", detail="no such file", advice=advice)
            return
        try:
            qrels = read_qrels(path)
        except DataError as error:
            self.faults.add(
                path, None, "not a qrels file", detail=str(error).rstrip("."), advice="Mend the line."
            )
            return
        rule = "the qrels disagree with the queries"
        for qid, (line, positives) in judged.items():
            if (listed := qrels.get(qid)) is None:
                detail = f"query {qid} of {queries_path.name}:{line} is not judged here"
            elif listed.keys() != set(positives):
                odd = sorted(listed.keys() ^ set(positives))[0]
                detail = (
                    f"query {qid} of {queries_path.name}:{line} and its judgements differ in candidate {odd}"
                )
            else:
                continue
            self.faults.add(path, None, rule, detail=detail, advice=advice)
        for qid in qrels:
            if qid not in judged and qid not in self._faulty_qids:
                detail = f"query {qid} is judged but not in {queries_path.name}"
                self.faults.add(path, None, rule, detail=detail, advice=advice)
