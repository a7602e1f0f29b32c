"""Mined negatives as other tools have them: M-BEIR query files, Sentence Transformers tuples, TREC runs.

Nothing is dropped silently: every function says how many queries and negatives it wrote or read.
"""

import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from umarvel_ray.artifacts import atomic_write
from umarvel_ray.data.trec import Run, import_trec
from umarvel_ray.errors import DataError
from umarvel_ray.retrieve.negatives import MinedNegatives
from umarvel_ray.storage import at

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Exchanged:
    """What went into a file, or came out of it.

    Attributes:
        queries: Queries with negatives.
        negatives: Their negatives.
        without: Queries of the file, or of the mined negatives, that the other side does not have.
    """

    queries: int
    negatives: int
    without: int


def write_neg_cand_list(
    mined: MinedNegatives, queries: str | os.PathLike, output: str | os.PathLike
) -> Exchanged:
    """Copy a query file of M-BEIR with `neg_cand_list` taken from mined negatives.

    A query without mined negatives gets an empty list, whatever it had; every other key stays as it is.

    Raises:
        DataError: A line of the query file is no object with a qid, or mined queries are not in the file.
    """
    lists = {qid: [did for did, _ in negatives] for qid, negatives in mined.as_dict().items()}
    used, without = 0, 0
    seen: set[str] = set()
    with atomic_write(output) as file:
        for record, _ in _records(queries, "qid"):
            negatives = lists.get(record["qid"], [])
            seen.add(record["qid"])
            used, without = used + len(negatives), without + (not negatives)
            file.write(json.dumps({**record, "neg_cand_list": negatives}, ensure_ascii=False) + "\n")
        _require_all(lists, seen, queries)
    return Exchanged(len(seen) - without, used, without)


def read_neg_cand_list(queries: str | os.PathLike) -> MinedNegatives:
    """The `neg_cand_list` of a query file, in its order; scores are unknown, so all are 0.

    Raises:
        DataError: A line is broken, or names a query twice.
    """
    lists: dict[str, list[tuple[str, float]]] = {}
    for record, line in _records(queries, "qid"):
        if record["qid"] in lists:
            raise DataError(f"{queries}:{line}: query {record['qid']} stands here twice. Keep one line.")
        dids = record.get("neg_cand_list") or []
        if not isinstance(dids, list) or not all(isinstance(did, str) for did in dids):
            raise DataError(f"{queries}:{line}: neg_cand_list is no list of ids. Mend the line.")
        lists[record["qid"]] = [(did, 0.0) for did in dids]
    mined = MinedNegatives.from_lists(lists, {"source": str(queries)})
    if without := len(lists) - len(mined):
        _log.warning("%s: %d of %d queries have no neg_cand_list", queries, without, len(lists))
    return mined


def write_tuples(
    mined: MinedNegatives,
    output: str | os.PathLike,
    *,
    query_text: Callable[[str], str],
    candidate_text: Callable[[str], str],
    positives: Mapping[str, Mapping[str, int]],
    form: str = "n-tuple",
    num_negatives: int | None = None,
) -> Exchanged:
    """JSONL as Sentence Transformers' losses take it, one positive per line.

    `n-tuple`: `anchor`, `positive`, `negative_1` … `negative_n`, every line with `num_negatives` of them;
    queries with fewer are left out and counted. `triplet`: one line per negative.

    Args:
        query_text, candidate_text: What stands for an id: its text, or the id itself.
        positives: Listed positives; every one makes lines of its own.
        num_negatives: Of an n-tuple; the most that any query has by default.

    Raises:
        DataError: A query has no positive, or the form is unknown.
    """
    if form not in ("n-tuple", "triplet"):
        raise DataError(f"{output}: the form {form!r} is unknown. Give n-tuple or triplet.")
    lists = mined.as_dict()
    if odd := [qid for qid in lists if not positives.get(qid)]:
        raise DataError(
            f"{output}: {len(odd)} of {len(lists)} queries have no positive (first: {odd[0]}). "
            "Give the judgements of the queries that were mined."
        )
    width = num_negatives or max(map(len, lists.values()), default=0)
    queries = used = without = 0
    with atomic_write(output) as file:
        for qid, negatives in lists.items():
            dids = [did for did, _ in negatives][: num_negatives or None]
            if form == "n-tuple" and len(dids) < width:
                without += 1
                continue
            queries, used = queries + 1, used + len(dids)
            groups = [dids] if form == "n-tuple" else [[did] for did in dids]
            for positive in positives[qid]:
                pair = {"anchor": query_text(qid), "positive": candidate_text(positive)}
                for group in groups:
                    names = ["negative"] if form == "triplet" else [f"negative_{i + 1}" for i in range(width)]
                    texts = dict(zip(names, map(candidate_text, group), strict=True))
                    file.write(json.dumps({**pair, **texts}, ensure_ascii=False) + "\n")
    if without:
        _log.warning("%s: %d of %d queries have fewer than %d negatives", output, without, len(lists), width)
    return Exchanged(queries, used, without)


def read_tuples(path: str | os.PathLike) -> MinedNegatives:
    """Negatives by anchor out of n-tuples or triplets whose values are ids; repeated ones are taken once.

    Raises:
        DataError: A line has no anchor or no negative.
    """
    lists: dict[str, dict[str, float]] = {}
    for record, line in _records(path, "anchor"):
        names = [name for name in record if name == "negative" or name.startswith("negative_")]
        if not names or not all(isinstance(record[name], str) for name in names):
            raise DataError(f"{path}:{line}: no negative, or one that is no text. Mend the line.")
        negatives = lists.setdefault(record["anchor"], {})
        for name in sorted(names, key=lambda name: (len(name), name)):
            negatives.setdefault(record[name], 0.0)
    return MinedNegatives.from_lists(
        {qid: list(negatives.items()) for qid, negatives in lists.items()}, {"source": str(path)}
    )


def write_trec(mined: MinedNegatives, path: str | os.PathLike, tag: str) -> Exchanged:
    """A TREC run of the negatives, hardest first. Those drawn from the pool have no score: they are left out.

    Raises:
        DataError: A name or the tag holds white space.
    """
    lists = mined.as_dict()
    scored = {qid: [hit for hit in hits if hit[1] > float("-inf")] for qid, hits in lists.items()}
    scored = {qid: hits for qid, hits in scored.items() if hits}
    num_left_out = sum(map(len, lists.values())) - sum(map(len, scored.values()))
    if num_left_out:
        _log.warning(
            "%s: left out %d negatives that were drawn from the pool, without score", path, num_left_out
        )
    Run(
        qids=list(scored),
        dids=[[did for did, _ in hits] for hits in scored.values()],
        scores=[[score for _, score in hits] for hits in scored.values()],
    ).export_trec(path, tag)
    return Exchanged(len(scored), sum(map(len, scored.values())), len(lists) - len(scored))


def read_trec(path: str | os.PathLike) -> MinedNegatives:
    """A TREC run as negatives: every hit of it.

    Raises:
        DataError: See `import_trec`.
    """
    return MinedNegatives.from_lists(import_trec(path).as_dict(), {"source": str(path)})


def _records(path: str | os.PathLike, key: str) -> Iterator[tuple[dict[str, Any], int]]:
    """(object, line number) of a JSONL file whose objects have a text under `key`."""
    try:
        with at(path).open(encoding="utf-8", newline="\n") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    record = json.loads(line)
                except json.JSONDecodeError as error:
                    raise DataError(f"{path}:{number}: not JSON ({error.msg}). Mend the line.") from None
                if not isinstance(record, dict) or not isinstance(record.get(key), str):
                    raise DataError(f"{path}:{number}: no object with a {key}. Mend the line.")
                yield record, number
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}). Give the path of a JSONL file.") from None


def _require_all(lists: Mapping[str, Sequence[str]], seen: set[str], path: str | os.PathLike) -> None:
    if missing := [qid for qid in lists if qid not in seen]:
        raise DataError(
            f"{path}: {len(missing)} of {len(lists)} mined queries are not in it (first: {missing[0]}). "
            "Give the file of the queries that were mined."
        )
