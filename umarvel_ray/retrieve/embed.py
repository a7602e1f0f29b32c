"""Records → embedding shards: what is still missing, and one shard of it, window by window.

Equal content is embedded once per store. Its first row is the original; the others are copies. A shard whose
originals all lie in it is written at once; one that holds copies of rows elsewhere first leaves a part with
its own originals, and is put together when all shards have theirs. So a store is a pure function of its
source and settings, whoever embeds which shard first. Importing this loads no torch: processes that only look
for copies start in a moment. N rows, D width.
"""

import functools
import hashlib
import os
import platform
import resource
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import numpy as np

from umarvel_ray.artifacts import atomic_write, fingerprint, read_json
from umarvel_ray.data.mbeir import Mbeir, content_key
from umarvel_ray.data.records import Candidate, Query
from umarvel_ray.data.sources import PoolSource, Source, chosen_tasks, pool_sources, query_source
from umarvel_ray.errors import ConfigError, DataError, ShardError
from umarvel_ray.model.settings import ENCODER_FILE, EncoderSettings
from umarvel_ray.model.systems import Builder, Embedder, OurSystem, load_embedder
from umarvel_ray.retrieve.settings import EmbedConfig
from umarvel_ray.retrieve.store import (
    BadRow,
    EmbeddingStore,
    ShardRange,
    finish_store,
    finished_shards,
    open_shard,
    plan_shards,
    shard_metadata,
    write_shard,
)
from umarvel_ray.storage import Place, at

_COPIES = "copies.npy"
_BLOCK_ROWS = 2048
_FIGURES = ("written", "items", "tokens", "busy_s", "read_s", "peak_bytes", "reader_peak_bytes")
_READER_FAULTS = (DataError, ValueError, TypeError)
"""What a record that cannot be read raises: ours, a tokenizer's, a decoder's. Anything else is a fault of the
program or the machine, and goes up."""


@dataclass(frozen=True)
class Model:
    """How a process gets its half of the model; both travel to workers.

    Attributes:
        embedder: Makes what turns items into vectors.
        builder: Makes what turns records into items, without weights; None: the embedder's own has to do it,
            in its process.
    """

    embedder: Callable[[], Embedder]
    builder: Callable[[], Builder] | None = None


def model_of(config: EmbedConfig) -> Model:
    """The model that the settings name."""
    builder = None
    if isinstance(config.model, OurSystem):
        builder = functools.partial(_load_builder, config.checkpoint, config.model.settings)
    return Model(
        embedder=functools.partial(_load_embedder, config),
        builder=builder,
    )


def _load_builder(
    checkpoint: str, settings: EncoderSettings | None, *, vision_store: Path | None = None
) -> Builder:
    from umarvel_ray.model.encoder import load_input_builder

    return load_input_builder(checkpoint, settings=settings, vision_store=vision_store)


def _load_embedder(config: EmbedConfig) -> Embedder:
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    embedder = load_embedder(config.checkpoint, config.model, device=device, dtype=config.compute_dtype)
    if config.vision_store is not None:
        from umarvel_ray.model.encoder import Encoder

        assert isinstance(embedder, Encoder), "the settings refuse a store for others"
        embedder.keep_vision_features(config.vision_store)
    return embedder


@dataclass(frozen=True)
class StorePlan:
    """One store: what it is made of, where it lies, and how it is cut.

    Attributes:
        source: Its rows.
        folder: Where it lies.
        shards: Its ranges of rows: a pure function of the number of rows and the rows per shard.
        settings: Everything that decides its content.
        fingerprint: Names them.
        config: Of the job.
    """

    source: Source
    folder: Place
    shards: Sequence[ShardRange]
    settings: dict[str, Any]
    fingerprint: str
    config: EmbedConfig

    @property
    def num_rows(self) -> int:
        """Of the source."""
        return len(self.source)


@dataclass(frozen=True)
class ShardTask:
    """One shard still to be written.

    Attributes:
        source: Where its rows come from.
        shard: Which rows.
        folder: Of the store.
        fingerprint: Of its settings.
        originals: (rows of the shard,) int64: for each, the row whose vector it takes; None: each its own.
        config: Of the job.
    """

    source: Source
    shard: ShardRange
    folder: Place
    fingerprint: str
    config: EmbedConfig
    originals: np.ndarray | None = None

    @property
    def part(self) -> Place:
        """The file."""
        return self.folder / self.shard.file_name

    @property
    def own_rows(self) -> np.ndarray:
        """Rows that are embedded for this shard, ascending."""
        rows = np.arange(self.shard.start, self.shard.stop)
        return rows if self.originals is None else rows[self.originals == rows]

    @property
    def is_partial(self) -> bool:
        """Whether it holds copies of rows of other shards."""
        return self.originals is not None and bool((self.originals < self.shard.start).any())

    @property
    def num_copies(self) -> int:
        """Rows that take the vector of another row."""
        if self.originals is None:
            return 0
        return int((self.originals != np.arange(self.shard.start, self.shard.stop)).sum())

    @property
    def part_name(self) -> str:
        """File of its own originals, until the shard is put together."""
        return f"part-{self.shard.index:05d}.arrow"


@dataclass
class Window:
    """Some rows of a source, read and ready to be embedded.

    Attributes:
        rows: Those that could be read.
        ids: Theirs.
        items: Theirs.
        bad: The others.
        seconds: Spent on reading.
        peak_bytes: Most memory that the process which read them ever held.
    """

    rows: list[int] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    items: list[Any] = field(default_factory=list)
    bad: list[BadRow] = field(default_factory=list)
    seconds: float = 0.0
    peak_bytes: int = 0


class ReadWindows(Protocol):
    """Reads windows of a source in the order asked for, ahead of who asks, on other processes."""

    def __call__(self, source: Source, windows: Sequence[np.ndarray], /) -> Iterable[Window]:
        """These rows."""
        ...

    def look_into(self, vision_store: Path) -> None:
        """Take features of pictures from there, from now on."""
        ...


def embedding_sources(config: EmbedConfig) -> list[Source]:
    """Query sets and pools to embed, each once; a store is named like its source.

    Raises:
        ConfigError: A name in `only` is none of theirs.
    """
    mbeir = Mbeir(config.root)
    sources: dict[str, Source] = {}
    for split in config.splits:
        tasks = chosen_tasks(mbeir, split, config.tasks)
        queries = [
            query_source(mbeir, task, split, choice=config.instruction, seed=config.seed) for task in tasks
        ]
        sources |= {source.name: source for source in (*queries, *pool_sources(mbeir, split, tasks))}
    for path in config.pools:
        name = PurePosixPath(path).stem.removeprefix("mbeir_").removesuffix("_cand_pool")
        sources[f"pools/{name}"] = PoolSource(name=f"pools/{name}", root=config.root, path=path)
    if config.only is None:
        return list(sources.values())
    if unknown := [name for name in config.only if name not in sources]:
        raise ConfigError(
            f"only: {len(unknown)} of {len(config.only)} names are none of this job's stores (first: "
            f"{unknown[0]}). There are: {', '.join(sources)}."
        )
    return [source for name, source in sources.items() if name in config.only]


def content_settings(config: EmbedConfig, source: Source) -> dict[str, Any]:
    """Everything that decides a store's content."""
    model = {} if config.model == OurSystem() else {"model": config.model.model_dump(mode="json")}
    return model | {
        "checkpoint": checkpoint_fingerprint(config.checkpoint),
        "source": source.fingerprint,
        "name": source.name,
        "rows_per_shard": config.rows_per_shard,
        "window_rows": config.window_rows,
        "max_tokens": config.max_tokens,
        "duplicates": config.duplicates,
        "bad_items": config.bad_items,
        "dtype": config.dtype,
        "compute_dtype": config.compute_dtype,
    }


def checkpoint_fingerprint(path: str) -> str:
    """Names a checkpoint by its settings and the size and head of its weights, without reading gigabytes."""
    folder = at(path)
    settings = next(
        (folder / name for name in (ENCODER_FILE, "config.json") if (folder / name).exists()), None
    )
    parts: list[Any] = [read_json(settings) if settings else path]
    for file in sorted(folder.rglob("*.safetensors")):  # Sentence Transformers keeps modules in folders
        size = file.stat().st_size
        with file.open("rb") as handle:
            head = handle.read(1 << 20)
            handle.seek(max(0, size - (1 << 20)))
            parts.append([file.name, size, fingerprint([head.hex(), handle.read().hex()])])
    return fingerprint(parts)


def plan_stores(config: EmbedConfig, sources: Sequence[Source] | None = None) -> list[StorePlan]:
    """Open every source and say what its store will be.

    `sources` are embedded in place of those that the settings name.
    """
    plans = []
    for source in embedding_sources(config) if sources is None else sources:
        settings = content_settings(config, source)
        plans.append(
            StorePlan(
                source=source,
                folder=at(config.output) / source.name,
                shards=plan_shards(len(source), config.rows_per_shard),
                settings=settings,
                fingerprint=fingerprint(settings),
                config=config,
            )
        )
    return plans


def missing_shards(plan: StorePlan) -> list[ShardRange]:
    """Shards of a store that are not finished."""
    finished = finished_shards(plan.folder, plan.shards, plan.fingerprint)
    return [shard for shard in plan.shards if shard.index not in finished]


def digest_rows(source: Source, start: int, stop: int) -> np.ndarray:
    """What tells rows apart: (N, 3) uint64, two words of content and one of the id.

    Content is the text to the letter, the instruction, and the image to the byte. A row that cannot be read
    is like no other: who embeds it will say what is wrong.
    """
    digests = bytearray()
    for row, record in enumerate(_records(source, start, stop), start=start):
        key = None
        if record is not None:
            with suppress(DataError):  # its picture cannot be read
                key = content_key(record)
        if key is None:
            key = hashlib.blake2b(b"row\0%d" % row, digest_size=16).digest()
        elif isinstance(record, Query) and record.instruction:
            key = hashlib.blake2b(key + record.instruction.encode(), digest_size=16).digest()
        name = f"row {row}" if record is None else _id_of(record)
        digests += key + hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return np.frombuffer(digests, dtype="<u8").reshape(-1, 3)


def _records(source: Source, start: int, stop: int) -> Iterator[Query | Candidate | None]:
    """Rows in order, None for one that cannot be read; by blocks, which is faster, where all can."""
    for first in range(start, stop, _BLOCK_ROWS):
        rows = range(first, min(first + _BLOCK_ROWS, stop))
        try:
            yield from list(source.range(rows.start, rows.stop))
        except DataError:
            yield from (_record_at(source, row) for row in rows)


def _records_at(source: Source, rows: Sequence[int]) -> Iterator[Query | Candidate | None]:
    """The rows given, ascending, None for one that cannot be read; in blocks where they stand close."""
    if not rows or rows[-1] - rows[0] >= 2 * len(rows):
        yield from (_record_at(source, row) for row in rows)
        return
    wanted = set(rows)
    for row, record in enumerate(_records(source, rows[0], rows[-1] + 1), start=rows[0]):
        if row in wanted:
            yield record


def find_copies(source: Source, digests: np.ndarray) -> np.ndarray:
    """Rows whose content stands in an earlier row: (2, K) int64, the copy and its original, by copy.

    Raises:
        DataError: An id stands in two rows.
    """
    _refuse_repeated_ids(source, digests[:, 2])
    order = np.lexsort((digests[:, 1], digests[:, 0]))  # stable: equal rows stay in their order
    ordered = digests[order, :2]
    fresh = np.ones(len(order), dtype=bool)
    fresh[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    originals = order[np.maximum.accumulate(np.where(fresh, np.arange(len(order)), 0))]
    pairs = np.stack([order[~fresh], originals[~fresh]]).astype(np.int64)
    return pairs[:, np.argsort(pairs[0])]


def _refuse_repeated_ids(source: Source, digests: np.ndarray) -> None:
    order = np.argsort(digests, kind="stable")
    same = np.flatnonzero(digests[order[1:]] == digests[order[:-1]])
    for first, second in zip(order[same].tolist(), order[same + 1].tolist(), strict=True):
        if _id_at(source, first) == _id_at(source, second) is not None:
            raise DataError(
                f"{source.where(second)}: {_id_at(source, second)!r} stands in {source.where(first)} already "
                f"({len(same)} rows repeat an id). Each is embedded once; keep one line of each."
            )


def _record_at(source: Source, row: int) -> Query | Candidate | None:
    try:
        return source[row]
    except DataError:
        return None


def _id_at(source: Source, row: int) -> str | None:
    record = _record_at(source, row)
    return None if record is None else _id_of(record)


def read_copies(plan: StorePlan) -> np.ndarray | None:
    """What `find_copies` found in an earlier run; None where it did not run."""
    path = plan.folder / f"{plan.fingerprint}.{_COPIES}"
    if not path.exists():
        return None
    with path.open("rb") as file:
        return np.load(file, allow_pickle=False)


def write_copies(plan: StorePlan, copies: np.ndarray) -> None:
    """Keep what `find_copies` found."""
    with atomic_write(plan.folder / f"{plan.fingerprint}.{_COPIES}", "wb") as file:
        np.save(file, copies, allow_pickle=False)


def shard_tasks(plan: StorePlan, shards: Iterable[ShardRange], copies: np.ndarray | None) -> list[ShardTask]:
    """Tasks of the shards given, and which rows each takes from elsewhere."""
    tasks = []
    for shard in shards:
        originals = None
        if copies is not None:
            lo, hi = np.searchsorted(copies[0], [shard.start, shard.stop])
            if lo < hi:
                originals = np.arange(shard.start, shard.stop)
                originals[copies[0, lo:hi] - shard.start] = copies[1, lo:hi]
        tasks.append(ShardTask(plan.source, shard, plan.folder, plan.fingerprint, plan.config, originals))
    return tasks


def windows_of(task: ShardTask) -> list[np.ndarray]:
    """The rows to embed, cut into windows."""
    rows, size = task.own_rows, task.config.window_rows
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def read_window(source: Source, rows: Sequence[int] | np.ndarray, builder: Builder) -> Window:
    """Read, decode and tokenize some rows; those that cannot be are named, not raised."""
    started = time.perf_counter()
    window = Window()
    wanted = [int(row) for row in rows]
    for row, record in zip(wanted, _records_at(source, wanted), strict=True):
        name = None
        try:
            record = source[row] if record is None else record  # raises what is wrong with it
            name = _id_of(record)
            item = builder.build(record)
        except _READER_FAULTS as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            window.bad.append(BadRow(row, name, source.where(row), reason))
            continue
        window.rows.append(row)
        window.ids.append(name)
        window.items.append(item)
    window.seconds = time.perf_counter() - started
    window.peak_bytes = _peak_bytes()
    return window


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


def _id_of(record: Query | Candidate) -> str:
    return record.qid if isinstance(record, Query) else record.did


class EmbeddingWorker:
    """One encoder; writes one embedding shard a call.

    Calls may overlap: the encoder takes one window at a time, so while it computes for one shard the windows
    of the next are being read.
    """

    def __init__(self, model: Model, read: ReadWindows | None = None) -> None:
        """Load the model.

        Args:
            model: How.
            read: How windows are read; None: in this process, one after the other.
        """
        self._embedder = model.embedder()
        self._lock = threading.Lock()
        self._read = read or self._read_here
        store = getattr(self._embedder, "vision_store", None)
        if read is not None and store is not None:
            read.look_into(store.folder)

    def __call__(self, task: ShardTask) -> dict[str, Any]:
        """Write one shard; the same task gives the same file, and a finished one stays as it is.

        Returns:
            Counts for the progress bar and the summary.

        Raises:
            DataError: A row is bad and the settings do not skip it.
        """
        busy_s, read_s, tokens, reader_peak = 0.0, 0.0, 0, 0
        answer: dict[str, Any] = {
            "store": task.source.name,
            "shard": task.shard.index,
            "worker": f"{platform.node()}:{os.getpid()}",
            # A shard that waits for others counts when it is put together.
            "rows": 0 if task.is_partial else task.shard.num_rows,
        }
        name = task.part_name if task.is_partial else task.shard.file_name
        if (found := _finished(task, name)) is not None:
            return answer | dict.fromkeys(_FIGURES, 0) | {"bad": len(found["bad"])}
        rows: list[int] = []
        ids: list[str] = []
        bad: list[BadRow] = []
        vectors: list[np.ndarray] = []
        for window in self._read(task.source, windows_of(task)):
            if window.bad and task.config.bad_items == "fail":
                raise DataError(bad_row_message(window.bad[0]))
            if window.items:
                with self._lock:
                    begun = time.perf_counter()
                    embedded = self._embedder.embed_items(window.items, max_tokens=task.config.max_tokens)
                    vectors.append(np.asarray(embedded))
                    busy_s += time.perf_counter() - begun
            rows += window.rows
            ids += window.ids
            bad += window.bad
            tokens += sum(item.num_tokens for item in window.items)
            read_s += window.seconds
            reader_peak = max(reader_peak, window.peak_bytes)
        counts = {"embedded": len(rows), "tokens": tokens}
        # All rows of a shard may be bad, or copies of others: its width is then nobody's business.
        vectors_ND = np.concatenate(vectors) if vectors else np.empty((0, 1), dtype=np.float32)
        made = Rows(np.array(rows, dtype=np.int64), ids, vectors_ND, bad)
        if task.is_partial:
            _write(task, made, counts, name=name)
        else:
            _write(task, put_together(task, made, lambda wanted: made), counts)
        return answer | {
            "bad": len(bad),
            "written": 1,
            "items": len(rows),
            "tokens": tokens,
            "busy_s": busy_s,
            "read_s": read_s,
            "peak_bytes": _peak_bytes(),
            "reader_peak_bytes": reader_peak,
        }

    def _read_here(self, source: Source, windows: Sequence[np.ndarray]) -> Iterator[Window]:
        return (read_window(source, rows, self._embedder.builder) for rows in windows)


@dataclass(frozen=True)
class Rows:
    """Some rows with their vectors.

    Attributes:
        rows: (N,) int64, ascending.
        ids: N.
        vectors_ND: float32.
        bad: Rows that were left out.
    """

    rows: np.ndarray
    ids: Sequence[str]
    vectors_ND: np.ndarray
    bad: Sequence[BadRow]


def put_together(task: ShardTask, own: Rows, rows_of: Callable[[np.ndarray], Rows]) -> Rows:
    """All rows of a shard, copies included.

    Args:
        task: The shard.
        own: Its own originals.
        rows_of: Originals of other shards, by row: those asked for that exist, and the bad among them.
    """
    if task.originals is None:
        return own
    shard = task.shard
    elsewhere = np.unique(task.originals[task.originals < shard.start])
    others = rows_of(elsewhere) if len(elsewhere) else Rows(elsewhere, [], own.vectors_ND[:0], [])
    known = np.concatenate([others.rows, own.rows])
    filled = [part.vectors_ND for part in (others, own) if len(part.rows)]
    vectors_ND = np.concatenate(filled) if filled else own.vectors_ND
    name_of = dict(zip(own.rows.tolist(), own.ids, strict=True))
    bad_of = {bad.row: bad for bad in (*others.bad, *own.bad)}
    rows, ids, places, bad = [], [], [], []
    for row, original in zip(range(shard.start, shard.stop), task.originals.tolist(), strict=True):
        name = name_of.get(row) or (_id_of(task.source[row]) if row != original else None)
        if (fault := bad_of.get(original)) is not None:
            bad.append(replace(fault, row=row, id=name or fault.id, where=task.source.where(row)))
            continue
        rows.append(row)
        ids.append(name)
        places.append(int(np.searchsorted(known, original)))
    return Rows(np.array(rows, dtype=np.int64), ids, vectors_ND[np.array(places, dtype=np.int64)], bad)


def join_parts(task: ShardTask, copies: np.ndarray) -> dict[str, Any]:
    """Write a shard that holds copies of rows of other shards, from its part and theirs."""
    shard, rows_per_shard = task.shard, task.config.rows_per_shard
    if _finished(task, shard.file_name) is None:
        metadata, own = _read_rows(task, shard, copies, part=True)

        def rows_of(wanted: np.ndarray) -> Rows:
            found: list[Rows] = []
            for index in np.unique(wanted // rows_per_shard).tolist():
                start = index * rows_per_shard
                other = ShardRange(index, start, min(start + rows_per_shard, len(task.source)))
                _, rows = _read_rows(task, other, copies)
                mine = np.flatnonzero(np.isin(rows.rows, wanted))
                found.append(replace(rows, rows=rows.rows[mine], vectors_ND=rows.vectors_ND[mine]))
            filled = [part.vectors_ND for part in found if len(part.rows)]
            return Rows(
                np.concatenate([part.rows for part in found]),
                [],
                np.concatenate(filled) if filled else own.vectors_ND[:0],
                [bad for part in found for bad in part.bad],
            )

        _write(task, put_together(task, own, rows_of), metadata["counts"])
    return {"store": task.source.name, "shard": shard.index, "rows": shard.num_rows}


def _read_rows(
    task: ShardTask, shard: ShardRange, copies: np.ndarray, *, part: bool = False
) -> tuple[dict[str, Any], Rows]:
    """Originals of a shard with their vectors, from the finished shard or from its part."""
    (other,) = shard_tasks(
        StorePlan(task.source, task.folder, [], {}, task.fingerprint, task.config), [shard], copies
    )
    names = [other.part_name] if part else [shard.file_name, other.part_name]
    for name in names:
        if _finished(other, name) is None:
            continue
        metadata, ids, vectors_ND = open_shard(task.folder / name)
        bad = [BadRow(**row) for row in metadata["bad"]]
        rows = other.own_rows if name == other.part_name else np.arange(shard.start, shard.stop)
        rows = rows[~np.isin(rows, [row.row for row in bad])]
        return metadata, Rows(rows, ids, vectors_ND, bad)
    raise ShardError(
        f"{task.folder / names[-1]}: missing, or of other settings. Run the embedding again; finished shards "
        "are kept."
    )


def _finished(task: ShardTask, name: str) -> dict[str, Any] | None:
    metadata = shard_metadata(task.folder / name)
    return metadata if metadata is not None and metadata["fingerprint"] == task.fingerprint else None


def _write(task: ShardTask, made: Rows, counts: dict[str, int], *, name: str | None = None) -> None:
    if name is None:
        counts = {**counts, "copies": task.num_copies}
    write_shard(
        task.folder,
        task.shard,
        list(made.ids),
        made.vectors_ND,
        dtype=task.config.dtype,
        fingerprint=task.fingerprint,
        bad=made.bad,
        counts=counts,
        name=name,
    )


def bad_row_message(bad: BadRow) -> str:
    """One line about a row that cannot be embedded."""
    return (
        f"{bad.where}: {bad.id or 'this row'} cannot be embedded: {bad.error.rstrip('.')}. "
        "Mend it, or set bad_items=skip to leave out such rows."
    )


def complete_stores(plans: Sequence[StorePlan]) -> list[EmbeddingStore]:
    """Write each store's manifest, once all its shards are there, and drop what was only needed on the way.

    Raises:
        DataError: More rows were left out than the settings allow.
    """
    stores = []
    for plan in plans:
        store = finish_store(
            plan.folder,
            plan.shards,
            fingerprint=plan.fingerprint,
            settings=plan.settings,
            # Finding copies looked at every id.
            unique_ids=plan.config.duplicates == "once",
        )
        for part in list(plan.folder.glob("part-*.arrow")):
            part.unlink(missing_ok=True)
        stores.append(store)
    return stores


def refuse_too_many_bad(config: EmbedConfig, num_bad: int, num_rows: int) -> None:
    """Stop when more rows are left out than the settings allow.

    Raises:
        DataError: They are.
    """
    if num_bad > config.max_bad_share * num_rows:
        raise DataError(
            f"{config.output}: {num_bad} of {num_rows} rows cannot be embedded, max_bad_share allows "
            f"{config.max_bad_share:.4%}. Run with bad_items=fail to see the first, mend the data, or allow "
            "more."
        )
