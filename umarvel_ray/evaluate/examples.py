"""What was retrieved before and after: which queries to show, and their pictures as data URIs."""

import base64
import io
import logging
import math
import unicodedata
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from umarvel_ray.data.mbeir import Mbeir, Task
from umarvel_ray.data.trec import Qrels, Run
from umarvel_ray.evaluate.metrics import first_positive_rank, judge
from umarvel_ray.storage import at, picture_bytes

logger = logging.getLogger(__name__)

Outcome = Literal["rose", "fell", "missed"]

TOP = 5
"""Candidates shown per ranking."""
PICTURE_SIDE = 168
"""Pixels of a shown picture's longer side; smaller ones stay as they are."""
LOSSLESS_SIDE = 100
"""Pictures no larger than this are stored without loss: they are small anyhow."""
MAX_PICTURE_PIXELS = 100_000_000
MAX_PICTURE_BYTES = 100_000_000
MAX_LETTERS = 280
"""A longer text ends in "…": candidates of M-BEIR reach 60,000 letters."""


@dataclass(frozen=True)
class Choice:
    """A query worth showing.

    Attributes:
        qid: The query.
        outcome: Its first positive rose most, fell most, or stayed out of the first k both times.
        before, after: Rank of its first positive, from 1; 0 where the run does not hold one.
    """

    qid: str
    outcome: Outcome
    before: int
    after: int


@dataclass(frozen=True)
class Item:
    """A query or a candidate as the page shows it: an id, a text cut to size, a picture as a data URI.

    `picture_missing` tells a picture that could not be read from a record that has none.
    """

    name: str
    text: str | None
    picture: str | None
    picture_missing: bool
    relevant: bool = False


@dataclass(frozen=True)
class Example:
    """One query with its first candidates before and after."""

    choice: Choice
    instruction: str
    query: Item
    before: tuple[Item, ...]
    after: tuple[Item, ...]
    wanted: Item | None
    """One of its positives; None where the pool holds none."""


@dataclass(frozen=True)
class TaskExamples:
    """The examples of one task, and how all its queries fared.

    Attributes:
        depth: Ranks that both runs hold.
        num_rose, num_fell, num_same: Queries by the rank of their first positive, after against before.
    """

    task: Task
    num_rose: int
    num_fell: int
    num_same: int
    depth: int
    examples: tuple[Example, ...]


def first_ranks(run: Run, qrels: Qrels, *, depth: int) -> dict[str, int]:
    """Rank of each query's first positive, from 1; 0 where the first `depth` hold none."""
    judged = judge(qrels, dict(zip(run.qids, run.dids, strict=True)), depth=depth)
    return dict(zip(judged.qids, first_positive_rank(judged).tolist(), strict=True))


def choose(
    before: Mapping[str, int], after: Mapping[str, int], *, depth: int, k: int, each: int = 1
) -> list[Choice]:
    """The queries whose first positive moved most, in either direction, and those that both missed.

    A move is measured by the ratio of ranks, so 8 → 1 counts more than 40 → 30; a positive that a run does
    not hold stands just past its end. Equal moves go by qid, so the choice is the same every time.

    Args:
        before: Rank by qid, 0 for none.
        after: The same queries.
        depth: Ranks that both runs hold.
        k: A first positive past this rank is a miss.
        each: Queries per outcome, at most.
    """

    def place(rank: int) -> int:
        return rank or depth + 1

    moves = {qid: math.log(place(before[qid]) / place(after[qid])) for qid in before}
    rose = sorted((qid for qid in moves if moves[qid] > 0), key=lambda qid: (-moves[qid], qid))
    fell = sorted((qid for qid in moves if moves[qid] < 0), key=lambda qid: (moves[qid], qid))
    missed = sorted(
        (qid for qid in moves if place(before[qid]) > k and place(after[qid]) > k),
        key=lambda qid: (abs(moves[qid]), qid),
    )
    chosen: dict[str, Choice] = {}
    outcomes: tuple[tuple[Outcome, list[str]], ...] = (("rose", rose), ("fell", fell), ("missed", missed))
    for outcome, qids in outcomes:
        for qid in [qid for qid in qids if qid not in chosen][:each]:
            chosen[qid] = Choice(qid, outcome, before[qid], after[qid])
    return list(chosen.values())


class Album:
    """Pictures as data URIs, small enough for one page, and a count of those that could not be read."""

    def __init__(self) -> None:
        self._seen: dict[str, str | None] = {}

    @property
    def unreadable(self) -> list[str]:
        """Paths of the pictures that could not be read."""
        return [path for path, picture in self._seen.items() if picture is None]

    def picture(self, path: str) -> str | None:
        """A data URI; None, and a line in the log, where the file is missing, broken or too large."""
        if path not in self._seen:
            self._seen[path] = _data_uri(path)
        return self._seen[path]


def _data_uri(path: str) -> str | None:
    from PIL import Image, ImageOps

    try:
        if at(path).stat().st_size > MAX_PICTURE_BYTES:
            raise ValueError(f"larger than {MAX_PICTURE_BYTES:,} bytes")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit below is our own
            with Image.open(io.BytesIO(picture_bytes(path))) as image:
                if image.width * image.height > MAX_PICTURE_PIXELS:
                    raise ValueError(f"larger than {MAX_PICTURE_PIXELS:,} pixels")
                image.draft("RGB", (PICTURE_SIDE, PICTURE_SIDE))
                small = ImageOps.exif_transpose(image).convert("RGBA" if "A" in image.getbands() else "RGB")
        small.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
        buffer = io.BytesIO()
        small.save(buffer, "WEBP", quality=82, lossless=max(small.size) <= LOSSLESS_SIDE)
    except Exception as error:  # a broken file makes decoders raise almost anything
        logger.warning("%s: left out of the report: %s", path, " ".join(str(error).split()))
        return None
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def readable(text: str | None) -> str | None:
    """One line without control or direction marks, cut to `MAX_LETTERS`; escaping is left to the page."""
    if not text:
        return None
    kept = "".join(
        letter if unicodedata.category(letter)[0] != "C" else " " for letter in text[: 4 * MAX_LETTERS]
    )
    line = " ".join(kept.split())
    return line if len(line) <= MAX_LETTERS else line[: MAX_LETTERS - 1].rstrip() + "…"


def _item(name: str, text: str | None, img_path: str | None, album: Album, *, relevant: bool = False) -> Item:
    picture = album.picture(img_path) if img_path else None
    missing = img_path is not None and picture is None
    return Item(name, readable(text), picture, picture_missing=missing, relevant=relevant)


def task_examples(
    task: Task,
    before: Run,
    after: Run,
    *,
    mbeir: Mbeir,
    split: str,
    pool: Literal["local", "pair", "global"],
    album: Album,
    each: int = 1,
) -> TaskExamples:
    """Compare two runs of one task and gather what the page shows of it.

    Args:
        task: The task.
        before: One stage's run.
        after: Another's, of the same queries and pool.
        mbeir: Where queries, candidates and judgements are.
        split: `"val"` or `"test"`.
        pool: Which pool was searched.
        album: Takes the pictures.
        each: Queries per outcome.

    Raises:
        DataError: The runs name queries or candidates that the data lack.
    """
    qrels = mbeir.qrels(task, split)
    depth = min(min(len(dids) for dids in run.dids) for run in (before, after))
    ranks_before = first_ranks(before, qrels, depth=depth)
    ranks_after = first_ranks(after, qrels, depth=depth)
    common = [qid for qid in ranks_before if qid in ranks_after]
    choices = choose(
        {qid: ranks_before[qid] for qid in common},
        {qid: ranks_after[qid] for qid in common},
        depth=depth,
        k=task.headline_k,
        each=each,
    )
    moves = [(ranks_before[qid] or depth + 1) - (ranks_after[qid] or depth + 1) for qid in common]
    candidates = mbeir.local_pool(task, split) if pool == "local" else mbeir.global_pool(split)
    queries, instructions = mbeir.queries(task, split), mbeir.instructions()
    tops = {
        id(run): {qid: dids[:TOP] for qid, dids in zip(run.qids, run.dids, strict=True)}
        for run in (before, after)
    }

    def candidate_item(did: str, positives: Mapping[str, int]) -> Item:
        candidate = candidates.get(did)
        return _item(did, candidate.txt, candidate.img_path, album, relevant=positives.get(did, 0) > 0)

    def ranked(run: Run, qid: str) -> tuple[Item, ...]:
        return tuple(candidate_item(did, qrels[qid]) for did in tops[id(run)][qid])

    examples = []
    for choice in choices:
        query = queries[queries.row_of(choice.qid)].query
        reachable = (did for did in qrels[choice.qid] if candidates.find(did) is not None)
        wanted = next(reachable, None)
        examples.append(
            Example(
                choice=choice,
                instruction=instructions.choose(
                    choice.qid, task.query_modality, task.candidate_modality, choice="first", seed=0
                ),
                query=_item(query.qid, query.txt, query.img_path, album),
                before=ranked(before, choice.qid),
                after=ranked(after, choice.qid),
                wanted=candidate_item(wanted, qrels[choice.qid]) if wanted else None,
            )
        )
    return TaskExamples(
        task=task,
        num_rose=sum(move > 0 for move in moves),
        num_fell=sum(move < 0 for move in moves),
        num_same=sum(move == 0 for move in moves),
        depth=depth,
        examples=tuple(examples),
    )
