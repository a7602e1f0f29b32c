"""Random access to JSONL files of millions of lines, and lookup by id, in megabytes of memory.

An index of byte offsets (8 bytes a line) is built once by streaming the file and kept in a hidden folder
beside it, or in the user's cache folder where that one cannot be written. Its files are named by the size and
modification time of what they index and appear by rename, so workers may build it at the same time. Lines are
read by position, not mapped: a process that has passed over gigabytes holds none of them. A file in object
storage is fetched once per machine.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from umarvel_ray.artifacts import atomic_write, fingerprint
from umarvel_ray.errors import DataError
from umarvel_ray.storage import Place, at, cache_folder, local_file

_BLOCK_BYTES = 1 << 20
_BLOCK_ROWS = 2048
"""Rows that one read fetches when a file is passed over."""
_FORMAT = "v1"
"""Part of every index file's name: a change of the format is a new index, not a misread one."""


class RecordFault(Exception):
    """What is wrong with one record of a file, before it is said where.

    Attributes:
        rule: What is wrong, the same words for every fault of a kind.
        detail: This case.
        advice: What to do.
    """

    def __init__(self, rule: str, *, detail: str, advice: str) -> None:
        """Args as the attributes."""
        super().__init__(f"{rule}: {detail}. {advice}")
        self.rule, self.detail, self.advice = rule, detail, advice


class JsonLines:
    """The objects of a JSONL file by row; blank lines are no rows.

    Opening costs one pass over the file the first time and almost nothing after. Pickles as its path.

    Attributes:
        path: The file.
        fingerprint: 16 hex digits that name its content.
        num_blank: Blank lines passed over.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        """Open `path`.

        Raises:
            DataError: It is missing or cannot be read, or its index can be written nowhere.
        """
        self.path: Place = at(path)
        try:
            self._local = local_file(self.path)
            self._file = open(self._local, "rb", buffering=0)  # noqa: SIM115, closed with this object
            status = os.fstat(self._file.fileno())
        except OSError as error:
            raise DataError(
                f"{path}: cannot be read ({error.strerror}). Give the path of a JSONL file."
            ) from None
        self._size = status.st_size
        self._stamp = f"{_FORMAT}-{status.st_size}-{status.st_mtime_ns}"
        self._keys: dict[str, KeyIndex] = {}
        if self._locate(f"{self._stamp}.json") is None:
            self._build()
        meta = self._load_json(f"{self._stamp}.json")
        self.fingerprint: str = meta["fingerprint"]
        self._starts = self._load_array(f"{self._stamp}.starts.npy")
        self._blank_rows = self._load_array(f"{self._stamp}.blanks.npy")
        self.num_blank = len(self._blank_rows)

    def __reduce__(self) -> tuple[type["JsonLines"], tuple[str]]:
        return JsonLines, (str(self.path),)

    def __len__(self) -> int:
        return len(self._starts)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self.range(0, len(self))

    def range(self, start: int, stop: int) -> Iterator[dict[str, Any]]:
        """The objects of rows `start` to `stop` (exclusive), read in blocks, faster than one by one.

        Raises:
            DataError: A line is not valid JSON or no object.
        """
        for first in range(start, stop, _BLOCK_ROWS):
            for row, line in enumerate(self._block(first, min(first + _BLOCK_ROWS, stop)), start=first):
                try:
                    yield _object_of(line)
                except RecordFault as fault:
                    raise DataError(f"{self.where(row)}: {fault}") from None

    def __getitem__(self, row: int) -> dict[str, Any]:
        """The object at `row`, from 0.

        Raises:
            DataError: The line is not valid JSON or no object.
        """
        try:
            return self.parse(row)
        except RecordFault as fault:
            raise DataError(f"{self.where(row)}: {fault}") from None

    def parse(self, row: int) -> dict[str, Any]:
        """As `self[row]`, but a broken line is a RecordFault, for those who group faults."""
        if not -len(self) <= row < len(self):
            raise IndexError(f"{self.path}: row {row} of {len(self)}")
        return _object_of(self._block(row % len(self), row % len(self) + 1)[0])

    def line(self, row: int) -> int:
        """The line number of `row`, from 1, blank lines counted."""
        row %= len(self)
        return row + 1 + int(np.searchsorted(self._blank_rows, row, side="right"))

    def where(self, row: int) -> str:
        """`file:line` of `row`, for messages."""
        return f"{self.path}:{self.line(row)}"

    def keys(self, field: str, *, unique: bool) -> "KeyIndex":
        """Lookup by the string in `field`; built by one pass over the file the first time.

        Args:
            field: `"did"` or `"qid"`.
            unique: Refuse a file in which two rows share a key.

        Raises:
            DataError: A row has no such string, or two rows share one though `unique`.
        """
        if field not in self._keys:
            self._keys[field] = self._open_keys(field)
        index = self._keys[field]
        if unique and index.num_repeats:
            key, first, second = index.first_repeat
            raise DataError(
                f"{self.where(second)}: {field} {key!r} stands in line {self.line(first)} already "
                f"({index.num_repeats} of {len(self)} lines repeat one, this is the first). Keep one line of "
                "each."
            )
        return index

    def derived(self, name: str, make: Callable[[], np.ndarray]) -> np.ndarray:
        """What one pass over the file found, made once and kept beside the index.

        Args:
            name: Of the kept array; another meaning takes another name.
            make: Computes it.
        """
        name = f"{self._stamp}.{name}.npy"
        if self._locate(name) is None:
            self._store(name, make())
        return self._load_array(name)

    def _block(self, start: int, stop: int) -> list[bytes]:
        """The lines of rows `start` to `stop`; blank lines that follow one hang on to it."""
        if start >= stop:
            return []
        ends = [*self._starts[start + 1 : stop + 1].tolist()]
        if len(ends) < stop - start:
            ends.append(self._size)
        base = int(self._starts[start])
        data = os.pread(self._file.fileno(), ends[-1] - base, base)
        lines, position = [], 0
        for end in ends:
            lines.append(data[position : end - base])
            position = end - base
        return lines

    def _build(self) -> None:
        starts, blank_rows, digest = _scan(self._file)
        self._store(f"{self._stamp}.starts.npy", starts)
        self._store(f"{self._stamp}.blanks.npy", blank_rows)
        # Written last: where it stands, the others do.
        folder = self._store(f"{self._stamp}.json", {"fingerprint": digest, "num_rows": len(starts)})
        for stale in folder.iterdir():
            if re.match(r"v\d+-", stale.name) and not stale.name.startswith(self._stamp):
                stale.unlink(missing_ok=True)

    def _open_keys(self, field: str) -> "KeyIndex":
        name = f"{self._stamp}.{field}"
        if self._locate(f"{name}.json") is None:
            hashes, rows = self._hash_keys(field)
            num_repeats, first_repeat = _repeats(self, field, hashes, rows)
            self._store(f"{name}.hashes.npy", hashes)
            self._store(f"{name}.rows.npy", rows)
            self._store(f"{name}.json", {"num_repeats": num_repeats, "first_repeat": first_repeat})
        meta = self._load_json(f"{name}.json")
        return KeyIndex(
            self,
            field=field,
            hashes=self._load_array(f"{name}.hashes.npy"),
            rows=self._load_array(f"{name}.rows.npy"),
            num_repeats=meta["num_repeats"],
            first_repeat=tuple(meta["first_repeat"]),
        )

    def _hash_keys(self, field: str) -> tuple[np.ndarray, np.ndarray]:
        digests = bytearray()
        for row, record in enumerate(self):
            key = record.get(field)
            if not isinstance(key, str) or not key:
                raise DataError(
                    f"{self.where(row)}: {field!r} is {key!r}, not a name. Give each line its {field}."
                )
            digests += _digest(key)
        hashes = np.frombuffer(digests, dtype="<u8")
        order = np.argsort(hashes, kind="stable")  # stable: equal keys stay in the order of their rows
        return hashes[order], order

    def _folders(self) -> list[Path]:
        return [
            self._local.parent / f".{self._local.name}.index",
            cache_folder() / "lines" / fingerprint(str(self._local)),
        ]

    def _locate(self, name: str) -> Path | None:
        return next((folder / name for folder in self._folders() if (folder / name).is_file()), None)

    def _require(self, name: str) -> Path:
        if (path := self._locate(name)) is None:
            raise DataError(
                f"{self.path}: its index lacks {name}. Remove {self._folders()[0]} and run again."
            )
        return path

    def _load_json(self, name: str) -> Any:
        return json.loads(self._require(name).read_bytes())

    def _load_array(self, name: str) -> np.ndarray:
        path = self._require(name)
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        return np.asarray(array)  # a plain view: indexing a memmap costs several times as much

    def _store(self, name: str, value: Any) -> Path:
        problem = None
        for folder in self._folders():
            try:
                with atomic_write(folder / name, "wb") as file:
                    if isinstance(value, np.ndarray):
                        np.save(file, value, allow_pickle=False)
                    else:
                        file.write(json.dumps(value).encode())
                return folder
            except OSError as error:
                problem = error
        raise DataError(
            f"{self.path}: its index can be written neither to {self._folders()[0]} nor to "
            f"{self._folders()[1]} "
            f"({problem}). Make one writable, or set XDG_CACHE_HOME to a folder that is."
        )


class KeyIndex:
    """Rows by key: sorted 64-bit hashes, memory-mapped, and each hit compared with the real line.

    Attributes:
        num_repeats: Rows whose key an earlier row has.
        first_repeat: (key, its first row, the repeating row) of the earliest repeat; empty without one.
    """

    def __init__(
        self,
        lines: JsonLines,
        *,
        field: str,
        hashes: np.ndarray,
        rows: np.ndarray,
        num_repeats: int,
        first_repeat: tuple,
    ) -> None:
        """Args as the attributes; `hashes` (N,) uint64 ascending, `rows` (N,) int64 in the same order."""
        self.num_repeats = num_repeats
        self.first_repeat = first_repeat
        self._lines, self._field, self._hashes, self._rows = lines, field, hashes, rows

    def __contains__(self, key: str) -> bool:
        return self.find(key) is not None

    def find(self, key: str) -> int | None:
        """The first row with `key`, or None."""
        return next(self._matches(key), None)

    def find_all(self, key: str) -> list[int]:
        """All rows with `key`, ascending."""
        return list(self._matches(key))

    def _matches(self, key: str) -> Iterator[int]:
        wanted = np.frombuffer(_digest(key), dtype="<u8")[0]
        place = int(np.searchsorted(self._hashes, wanted))
        while place < len(self._hashes) and self._hashes[place] == wanted:
            row = int(self._rows[place])
            if self._lines[row].get(self._field) == key:  # two keys may share a hash
                yield row
            place += 1


@dataclass
class _Group:
    count: int
    line: int | None
    detail: str
    advice: str


class Faults:
    """Faults found in data files, grouped by file and rule, with how many there are and the first."""

    def __init__(self) -> None:
        self._groups: dict[tuple[str, str], _Group] = {}

    def add_record(self, path: str | os.PathLike, line: int | None, fault: RecordFault) -> None:
        """Note what a reader raised."""
        self.add(path, line, fault.rule, detail=fault.detail, advice=fault.advice)

    def add(self, path: str | os.PathLike, line: int | None, rule: str, *, detail: str, advice: str) -> None:
        """Note one fault.

        Args:
            path: The file.
            line: From 1; None where the fault is the file's.
            rule: What is wrong, the same words for every fault of a kind.
            detail: This case.
            advice: What to do.
        """
        group = self._groups.setdefault((os.fspath(path), rule), _Group(0, line, detail, advice))
        group.count += 1

    def report(self) -> list[str]:
        """One line per file and rule, in the order of their first case."""
        return [
            f"{path}{f':{group.line}' if group.line else ''}: {rule}: {group.detail}"
            f"{f' ({group.count} such in this file, this is the first)' if group.count > 1 else ''}. "
            f"{group.advice}"
            for (path, rule), group in self._groups.items()
        ]


def _object_of(line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RecordFault("not valid JSON", detail=_one_line(error), advice="Mend the line.") from None
    if not isinstance(value, dict):
        raise RecordFault("not a JSON object", detail=f"a {type(value).__name__}", advice="Mend the line.")
    return value


def _scan(file: IO[bytes]) -> tuple[np.ndarray, np.ndarray, str]:
    """Where the rows start; for each blank line the number of rows before it; the content's fingerprint."""
    digest = hashlib.sha256()
    pieces, doubtful, size = [np.zeros(1, dtype=np.int64)], [], 0
    newline_before = True
    while block := file.read(_BLOCK_BYTES):
        digest.update(block)
        data = np.frombuffer(block, dtype=np.uint8)
        starts = np.flatnonzero(data == ord("\n")) + 1
        pieces.append(starts + size)
        # Only a line that begins with a blank can be blank: few are looked at.
        inside = starts[starts < len(data)]
        if newline_before:
            inside = np.concatenate([np.zeros(1, dtype=np.int64), inside])
        doubtful.append(inside[data[inside] <= ord(" ")] + size)
        newline_before = block[-1] == ord("\n")
        size += len(block)
    starts = np.concatenate(pieces)
    if starts[-1] == size:  # nothing follows the last newline
        starts = starts[:-1]
    lines = np.searchsorted(starts, np.concatenate(doubtful)) if doubtful else np.zeros(0, dtype=np.int64)
    ends = np.append(starts, size)

    def is_blank(line: int) -> bool:
        file.seek(int(starts[line]))
        return not file.read(int(ends[line + 1] - starts[line])).strip()

    blank = np.array([line for line in lines.tolist() if is_blank(line)], dtype=np.int64)
    return np.delete(starts, blank), blank - np.arange(len(blank)), digest.hexdigest()[:16]


def _repeats(lines: JsonLines, field: str, hashes: np.ndarray, rows: np.ndarray) -> tuple[int, tuple]:
    """How many rows repeat an earlier row's key, and the earliest such row."""
    num_repeats, earliest = 0, ()
    seen: dict[str, int] = {}
    for place in np.flatnonzero(hashes[1:] == hashes[:-1]):
        if place == 0 or hashes[place - 1] != hashes[place]:
            seen = {lines[int(rows[place])][field]: int(rows[place])}
        row = int(rows[place + 1])
        key = lines[row][field]
        if key not in seen:  # another key with the same hash
            seen[key] = row
            continue
        num_repeats += 1
        if not earliest or row < earliest[2]:
            earliest = (key, seen[key], row)
    return num_repeats, earliest


def _digest(key: str) -> bytes:
    return hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
