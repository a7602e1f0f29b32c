"""Readers of the first training stages: NLI sentences and image captions, by row, as `TrainingPair`.

No instruction stands in these: the recipe feeds both sides raw.
"""

import csv
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath
from typing import Any, Protocol

from umarvel_ray.artifacts import file_fingerprint
from umarvel_ray.data.check import ImageCheck, image_fault
from umarvel_ray.data.lines import Faults, JsonLines, RecordFault
from umarvel_ray.data.records import Candidate, Query, TrainingPair
from umarvel_ray.errors import DataError
from umarvel_ray.storage import Place, at, is_remote, join


class PairSource(Protocol):
    """A file of training pairs by row.

    Attributes:
        path: The file.
        fingerprint: 16 hex digits that name its content.
    """

    path: Place
    fingerprint: str

    def __len__(self) -> int: ...

    def __getitem__(self, row: int, /) -> TrainingPair: ...

    def where(self, row: int) -> str:
        """The place of `row` in the file, for messages."""
        ...


class NliPairs:
    """Sentence pairs of a CSV file with the columns sent0, sent1 and, if asked for, hard_neg.

    Words such as "None" and "NA" are words. Row n of the data is query `nli:n` and candidate `nli:n`, from 1;
    its contradiction is candidate `nli:n:hard`. The sentences are held in memory: about 60 MB for the 275,601
    rows of nli_for_simcse.csv. Pickles as its path.

    Attributes:
        path: The CSV file.
        fingerprint: 16 hex digits that name its content.
    """

    def __init__(self, path: str | os.PathLike, *, use_hard_negatives: bool) -> None:
        """Read the file.

        Args:
            path: The CSV file.
            use_hard_negatives: Give each pair its hard_neg as negative.

        Raises:
            DataError: A column is missing, or a row lacks a cell or has an empty one.
        """
        self.path = at(path)
        self._use_hard_negatives = use_hard_negatives
        columns = ("sent0", "sent1", "hard_neg") if use_hard_negatives else ("sent0", "sent1")
        self._rows, self._lines = _read_csv(self.path, columns)
        self.fingerprint = file_fingerprint(self.path)

    def __reduce__(self) -> tuple[Any, ...]:
        return _open_nli, (str(self.path), self._use_hard_negatives)

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[TrainingPair]:
        return (self[row] for row in range(len(self)))

    def __getitem__(self, row: int) -> TrainingPair:
        """The pair at `row`, from 0."""
        query, positive, *hard = self._rows[row]
        name = f"nli:{row % len(self) + 1}"
        return TrainingPair(
            query=Query(qid=name, txt=query, verbatim=True),
            positive=Candidate(did=name, txt=positive, verbatim=True),
            negatives=tuple(Candidate(did=f"{name}:hard", txt=txt, verbatim=True) for txt in hard),
        )

    def where(self, row: int) -> str:
        """`file:line` of `row`, for messages."""
        return f"{self.path}:{self._lines[row]}"


def _open_nli(path: str, use_hard_negatives: bool) -> NliPairs:
    return NliPairs(path, use_hard_negatives=use_hard_negatives)


def _read_csv(path: Place, columns: Sequence[str]) -> tuple[list[list[str]], list[int]]:
    """The cells of `columns` by row, and the line on which each row ends."""
    rows: list[list[str]] = []
    lines: list[int] = []
    faulty: list[int] = []
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file)
            header = next(reader, [])
            if missing := [name for name in columns if name not in header]:
                raise DataError(
                    f"{path}:1: no column {missing[0]!r} among {header}. Give a file with {list(columns)}."
                )
            places = [header.index(name) for name in columns]
            for cells in reader:
                if not cells:  # a blank line
                    continue
                wanted = [cells[place] if place < len(cells) else "" for place in places]
                if not all(cell.strip() for cell in wanted):
                    faulty.append(reader.line_num)
                rows.append(wanted)
                lines.append(reader.line_num)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read ({error}). Give a CSV file with {list(columns)}.") from None
    if faulty:
        raise DataError(
            f"{path}:{faulty[0]}: {len(faulty)} of {len(rows)} rows lack one of {list(columns)}, this is the "
            "first. "
            "Fill the cell or remove the row."
        )
    if not rows:
        raise DataError(f"{path}: has no row. Copy the file again.")
    return rows, lines


class CaptionPairs:
    """Captions as queries, their pictures alone as candidates.

    Read are: a JSON object of `{key: {h5v: path, instruct_ans: [caption]}}`, a JSON list or a JSONL file of
    objects with `image` and one of `caption`, `txt` or `conversations` (the first answer in it is the
    caption). Row n is query and candidate `NAME:n`, from 1. A JSON document is held in memory as two strings
    a row; a JSONL file is read where it lies. Pickles as its path.

    Attributes:
        path: The file.
        fingerprint: 16 hex digits that name its content (not that of its images).
    """

    def __init__(
        self, path: str | os.PathLike, *, name: str = "cc3m", image_root: str | os.PathLike | None = None
    ) -> None:
        """Open the file.

        Args:
            path: The file.
            name: Of the data set; put before the number of each id.
            image_root: Where the pictures lie. Of a path in the file, the longest tail that is a file under
                this folder is taken, so paths of another machine work. None: paths start at the file's
                folder.

        Raises:
            DataError: The file is none of the forms above, or an entry of a JSON document lacks image or
                caption.
        """
        self.path = at(path)
        self._name = name
        self._image_root = None if image_root is None else at(image_root)
        self._starts: dict[tuple[str, ...], int] = {}
        if self._image_root is not None and not self._image_root.is_dir():
            raise DataError(
                f"{image_root}: no such folder. Give the folder that holds the pictures of {path}."
            )
        self._entries: JsonLines | list[tuple[str, str]]
        if _is_json_lines(self.path):
            self._entries = JsonLines(self.path)
            self.fingerprint = self._entries.fingerprint
        else:
            self._entries = _read_document(self.path)
            self.fingerprint = file_fingerprint(self.path)
        if not len(self._entries):
            raise DataError(f"{path}: has no entry. Copy the file again.")

    def __reduce__(self) -> tuple[Any, ...]:
        return _open_captions, (str(self.path), self._name, self._image_root and str(self._image_root))

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[TrainingPair]:
        return (self[row] for row in range(len(self)))

    def __getitem__(self, row: int) -> TrainingPair:
        """The pair at `row`, from 0; the image path absolute.

        Raises:
            DataError: A JSONL line lacks image or caption, or no file under `image_root` has the image's
                name; in object storage one picture of each folder is looked for.
        """
        try:
            return self.parse(row)
        except RecordFault as fault:
            raise DataError(f"{self.where(row)}: {fault}") from None

    def parse(self, row: int) -> TrainingPair:
        """As `self[row]`, but a broken entry is a RecordFault, for those who group faults."""
        if isinstance(self._entries, JsonLines):
            entry = _parse_entry(self._entries.parse(row))
            if entry is None:
                raise RecordFault(_NO_PAIR, detail="it has not both", advice=_GIVE_PAIR)
        else:
            entry = self._entries[row]
        image, caption = entry
        name = f"{self._name}:{row % len(self) + 1}"
        return TrainingPair(
            query=Query(qid=name, txt=caption), positive=Candidate(did=name, img_path=self._resolve(image))
        )

    def line(self, row: int) -> int | None:
        """The line number of `row` in a JSONL file, from 1; None in a JSON document."""
        return self._entries.line(row) if isinstance(self._entries, JsonLines) else None

    def where(self, row: int) -> str:
        """The place of `row`, for messages: `file:line`, or the entry's number in a JSON document."""
        if isinstance(self._entries, JsonLines):
            return self._entries.where(row)
        return f"{self.path}: entry {row % len(self) + 1}"

    def _resolve(self, image: str) -> str:
        if self._image_root is None:
            return join(self.path.parent, image)
        # ".." is left out: a path of the file does not leave the root.
        parts = [part for part in PurePosixPath(image.replace("\\", "/")).parts if part not in ("/", "..")]
        folder = tuple(parts[:-1])
        if folder in self._starts:
            return join(self._image_root, "/".join(parts[self._starts[folder] :]))
        for start in range(len(parts)):
            path = join(self._image_root, "/".join(parts[start:]))
            if at(path).is_file():
                if is_remote(path):
                    # There a question takes as long as a read: one picture answers for its folder.
                    self._starts[folder] = start
                return path
        raise RecordFault(
            "the image is missing",
            detail=f"no tail of {image!r} is a file under {self._image_root}",
            advice="Unpack the pictures there, or correct image_root.",
        )


_NO_PAIR = "an entry lacks its image or its caption"
_GIVE_PAIR = "Give image and one of caption, txt, conversations; or h5v and instruct_ans."


def _open_captions(path: str, name: str, image_root: str | None) -> CaptionPairs:
    return CaptionPairs(path, name=name, image_root=image_root)


def _is_json_lines(path: Place) -> bool:
    """Whether the first line that is not blank is an entry by itself."""
    try:
        with path.open("rb") as file:
            first = next((line for line in file if line.strip()), b"")
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror}). Give the path of a caption file."
        ) from None
    if path.suffix == ".jsonl":
        return True
    try:
        value = json.loads(first)
    except (ValueError, RecursionError):
        return False  # a document over several lines
    # An object of objects on one line is a document: its values are entries.
    return isinstance(value, dict) and not all(isinstance(item, dict) for item in value.values())


def _read_document(path: Place) -> list[tuple[str, str]]:
    try:
        document = json.loads(path.read_bytes())
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}: not valid JSON ({error.msg}). Mend the file.") from None
    except (OSError, UnicodeDecodeError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read ({error}). Give a JSON or JSONL file of captions.") from None
    if isinstance(document, dict):
        entries = list(document.items())
    elif isinstance(document, list):
        entries = list(enumerate(document, start=1))
    else:
        kind = type(document).__name__
        raise DataError(f"{path}: a {kind}. Give a JSON object or list of entries, or a JSONL file.")
    pairs = [_parse_entry(entry) for _, entry in entries]
    if faulty := [key for (key, _), pair in zip(entries, pairs, strict=True) if pair is None]:
        raise DataError(
            f"{path}: {_NO_PAIR}: {len(faulty)} of {len(entries)} (first: entry {faulty[0]!r}). {_GIVE_PAIR}"
        )
    return [pair for pair in pairs if pair is not None]


def _parse_entry(entry: Any) -> tuple[str, str] | None:
    """(image, caption) of one entry; None where it lacks one."""
    if not isinstance(entry, dict):
        return None
    image = _first_text(entry.get("h5v"), entry.get("image"))
    answers = entry.get("instruct_ans")
    caption = _first_text(
        entry.get("caption"),
        entry.get("txt"),
        answers[0] if isinstance(answers, list) and answers else answers,
        _first_answer(entry.get("conversations")),
    )
    return (image, caption) if image and caption else None


def _first_text(*values: Any) -> str | None:
    return next((value for value in values if isinstance(value, str) and value.strip()), None)


def _first_answer(conversations: Any) -> Any:
    """What the model says first in a conversation of `{from, value}` turns."""
    if not isinstance(conversations, list):
        return None
    turns = (
        turn for turn in conversations if isinstance(turn, dict) and turn.get("from") in ("gpt", "assistant")
    )
    return next(turns, {}).get("value")


def check_captions(pairs: CaptionPairs, *, images: ImageCheck) -> list[str]:
    """Every fault of a caption file, grouped by kind.

    Args:
        pairs: The opened file.
        images: How far pictures are looked at.

    Returns:
        `file:line: fault: first case (how many). What to do.`; empty where all is well.
    """
    faults = Faults()
    for row in range(len(pairs)):
        try:
            fault = image_fault(pairs.parse(row).positive.img_path or "", images)
        except RecordFault as broken:
            fault = broken
        if fault:
            faults.add_record(pairs.path, pairs.line(row), fault)
    return faults.report()
