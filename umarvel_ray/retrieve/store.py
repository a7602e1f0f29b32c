"""Embedding stores: a folder of Arrow IPC shards (id, vector) and, written last, a manifest.

A shard is a fixed range of the source's rows, one file, one record batch; it appears whole and carries in its
schema's metadata what decided it, a checksum of its buffers and the rows that had to be left out. Any Arrow
reader opens it. A folder may lie in object storage; shards are then fetched once per machine to be mapped.
Axes: N rows, D width.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa

from umarvel_ray.artifacts import atomic_write, read_json, write_json
from umarvel_ray.artifacts import fingerprint as fingerprint_of
from umarvel_ray.errors import DataError, OutputError, ShardError
from umarvel_ray.storage import Place, RemotePath, at, local_file

StoredDtype = Literal["float16", "float32", "bfloat16"]
"""How vectors lie on disk; bfloat16, which Arrow lacks, as the upper half of a float32 in a uint16."""

MANIFEST = "manifest.json"
ERROR_TABLE = "errors.jsonl"
"""Rows that were left out: one object a line. Only where there are some."""
_FORMAT = 2
_READERS = 16
"""Shards whose heads are read at a time: object storage answers each in tens of milliseconds."""
_METADATA_KEY = b"umarvel_ray.shard"
_NUMPY_DTYPES = {
    "float16": np.dtype(np.float16),
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(np.uint16),
}


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row of the source that could not be embedded.

    Attributes:
        row: In the source, from 0.
        id: Its qid or did; None where not even that could be read.
        where: `file:line`.
        error: What is wrong with it.
    """

    row: int
    id: str | None
    where: str
    error: str


@dataclass(frozen=True, slots=True)
class ShardRange:
    """Rows `start` to `stop` (exclusive) of a source, in one file."""

    index: int
    start: int
    stop: int

    @property
    def num_rows(self) -> int:
        """Rows in the shard."""
        return self.stop - self.start

    @property
    def file_name(self) -> str:
        """Name of its file in the store's folder."""
        return f"shard-{self.index:05d}.arrow"


def plan_shards(num_rows: int, rows_per_shard: int) -> list[ShardRange]:
    """Cut `num_rows` rows into ranges of `rows_per_shard`, the last one shorter."""
    if num_rows < 0 or rows_per_shard < 1:
        raise ShardError(
            f"no plan for {num_rows} rows in shards of {rows_per_shard}. Give at least one row per shard."
        )
    starts = range(0, num_rows, rows_per_shard)
    return [
        ShardRange(index, start, min(start + rows_per_shard, num_rows)) for index, start in enumerate(starts)
    ]


def write_shard(
    folder: str | os.PathLike,
    shard: ShardRange,
    ids: Sequence[str],
    vectors: Any,
    *,
    dtype: StoredDtype,
    fingerprint: str,
    bad: Sequence[BadRow] = (),
    counts: Mapping[str, int] | None = None,
    name: str | None = None,
) -> None:
    """Write one shard, whole or not at all; a file that stands there is replaced.

    Args:
        folder: The store's folder.
        shard: Which rows these are.
        ids: Their qids or dids, each once, bad rows left out.
        vectors: (N, D), anything NumPy reads as floating point; rounded to nearest even.
        dtype: How to store them.
        fingerprint: Names everything that decides the content: checkpoint, prompts, data, rows per shard.
        bad: Rows of the range that are left out, and why.
        counts: What it took, as a pure function of the content: summed in the manifest.
        name: Of a part of a shard, which may hold some of its rows only.

    Raises:
        DataError: An id repeats, or a vector, as stored, is zero or not finite.
        ShardError: Numbers of rows differ, or `dtype` is unknown.
    """
    path = at(folder) / (name or shard.file_name)
    if dtype not in get_args(StoredDtype):
        raise ShardError(
            f"{path}: dtype {dtype!r} is unknown. Give one of {', '.join(get_args(StoredDtype))}."
        )
    vectors_ND = np.ascontiguousarray(vectors, dtype=np.float32)
    num_rows = len(ids) if name else shard.num_rows - len(bad)
    if vectors_ND.ndim != 2 or not len(ids) == len(vectors_ND) == num_rows:
        raise ShardError(
            f"{path}: {len(ids)} ids and vectors of shape {vectors_ND.shape} for rows {shard.start} to "
            f"{shard.stop}, {len(bad)} of them left out. Give one id and one vector per row."
        )
    if len(set(ids)) != len(ids):
        raise DataError(f"{path}: {_repeated(pa.array(ids))}")
    _refuse_bad_vectors(path, ids, vectors_ND)
    with np.errstate(over="ignore", under="ignore"):
        stored_ND = _encode(vectors_ND, dtype)
    # A narrow dtype can overflow to infinity or vanish to zero.
    _refuse_bad_vectors(path, ids, _decode(stored_ND, dtype))

    id_column = pa.array(ids, pa.string())
    width = stored_ND.shape[1]
    vector_column = pa.FixedSizeListArray.from_arrays(pa.array(stored_ND.reshape(-1)), width)
    metadata = {
        "format": _FORMAT,
        "fingerprint": fingerprint,
        "index": shard.index,
        "start": shard.start,
        "stop": shard.stop,
        "rows": len(ids),
        "bad": [asdict(row) for row in bad],
        "counts": dict(counts or {}),
        "dim": width,
        "dtype": dtype,
        "sha256": _checksum(id_column, stored_ND),
    }
    schema = pa.schema(
        [
            pa.field("id", pa.string(), nullable=False),
            pa.field("vector", vector_column.type, nullable=False),
        ],
        metadata={_METADATA_KEY: json.dumps(metadata, sort_keys=True).encode()},
    )
    batch = pa.record_batch([id_column, vector_column], schema=schema)
    with atomic_write(path, "wb") as file, pa.ipc.new_file(file, schema) as writer:
        writer.write_batch(batch)


def finished_shards(
    folder: str | os.PathLike, plan: Sequence[ShardRange], fingerprint: str
) -> dict[int, dict[str, Any]]:
    """Metadata, by index, of the planned shards whose files stand whole; missing or broken ones are left out.

    Raises:
        ShardError: A shard was made with other settings, or belongs to another plan.
    """
    folder = at(folder)
    planned = {shard.file_name: shard for shard in plan}
    finished: dict[int, dict[str, Any]] = {}
    paths = sorted(folder.glob("shard-*.arrow"))
    with ThreadPoolExecutor(_READERS) as threads:
        for path, metadata in zip(paths, threads.map(shard_metadata, paths), strict=True):
            if metadata is None:
                continue
            if metadata["fingerprint"] != fingerprint:
                raise ShardError(
                    f"{path}: made with other settings: fingerprint {metadata['fingerprint']}, wanted "
                    f"{fingerprint}. Give another output folder, or remove this one to start again."
                )
            shard = planned.get(path.name)
            if shard is None or (metadata["start"], metadata["stop"]) != (shard.start, shard.stop):
                where = f"rows {shard.start} to {shard.stop}" if shard else f"a plan of {len(plan)} shards"
                raise ShardError(
                    f"{path}: holds rows {metadata['start']} to {metadata['stop']}, wanted {where}. "
                    "Keep the rows per shard, or give another output folder."
                )
            finished[shard.index] = metadata
    return finished


def finish_store(
    folder: str | os.PathLike,
    plan: Sequence[ShardRange],
    *,
    fingerprint: str,
    settings: Mapping[str, Any],
    unique_ids: bool = False,
) -> "EmbeddingStore":
    """Check that all shards belong together and write the manifest, which makes the store complete.

    Rows that were left out are listed in `errors.jsonl` beside it.

    Args:
        folder: The store's folder.
        plan: All its shards.
        fingerprint: That of the shards.
        settings: JSON for the reader: checkpoint, prompts, data; kept in the manifest.
        unique_ids: The source was found to hold each id once: they need not be read again.

    Raises:
        ShardError: A shard is missing, or shards differ in width or dtype.
        DataError: The plan is empty, or an id stands in two rows.
    """
    folder = at(folder)
    if not plan:
        raise DataError(f"{folder}: a store of no rows. Look whether the data file is empty.")
    finished = finished_shards(folder, plan, fingerprint)
    if missing := [shard for shard in plan if shard.index not in finished]:
        raise ShardError(
            f"{folder}: {len(missing)} of {len(plan)} shards are missing or broken (first: "
            f"{missing[0].file_name}). Run the embedding again; finished shards are kept."
        )
    filled = [shard for shard in plan if finished[shard.index]["rows"]] or [plan[0]]
    first, entries, bad, counts, stop = finished[filled[0].index], [], [], {}, 0
    for shard in plan:
        path, metadata = folder / shard.file_name, finished[shard.index]
        for key in ("dim", "dtype"):
            if metadata["rows"] and metadata[key] != first[key]:
                raise ShardError(
                    f"{path}: {key} {metadata[key]}, but {filled[0].file_name} has {first[key]}. "
                    "Remove the folder and embed again."
                )
        entries.append(
            {
                "file": shard.file_name,
                "start": stop,
                "stop": stop + metadata["rows"],
                "source_rows": [shard.start, shard.stop],
                "bytes": path.stat().st_size,
                "sha256": metadata["sha256"],
            }
        )
        stop += metadata["rows"]
        bad += metadata["bad"]
        for key, count in metadata["counts"].items():
            counts[key] = counts.get(key, 0) + count
    if not stop:
        raise DataError(f"{folder}: all {len(bad)} rows are bad (first: {bad[0]['error']}). Mend the data.")
    if not unique_ids:
        ids = pa.chunked_array([_require_shard(folder / entry["file"])[1].column(0) for entry in entries])
        if len(ids.unique()) != len(ids):
            raise DataError(f"{folder}: {_repeated(ids)}")
    if bad:
        with atomic_write(folder / ERROR_TABLE) as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in bad)
    manifest = {
        "format": _FORMAT,
        "num_rows": stop,
        "num_bad": len(bad),
        "dim": first["dim"],
        "dtype": first["dtype"],
        "fingerprint": fingerprint,
        "settings": dict(settings),
        "counts": counts,
        "shards": entries,
    }
    write_json(folder / MANIFEST, manifest)
    return EmbeddingStore.open(folder)


class EmbeddingStore:
    """A complete store, memory-mapped; opening reads the manifest alone. Pickles as its path.

    Attributes:
        folder: Where it lies.
        dim: Width of a vector.
        dtype: How vectors are stored.
        settings: What made it, as given to `finish_store`.
        fingerprint: 16 hex digits that name content and settings.
        shards: Its row ranges, in order.
        counts: What it took: items embedded, tokens, copies of equal content.
        num_bad: Rows of the source that were left out; `errors.jsonl` names them.
    """

    def __init__(self, folder: str | os.PathLike) -> None:
        """See `open`."""
        self.folder: Place = at(folder)
        manifest = _read_manifest(self.folder)
        self.dim: int = manifest["dim"]
        self.dtype: StoredDtype = manifest["dtype"]
        self.settings: dict[str, Any] = manifest["settings"]
        self.counts: dict[str, int] = manifest["counts"]
        self.num_bad: int = manifest["num_bad"]
        self._entries: list[dict[str, Any]] = manifest["shards"]
        self.fingerprint = fingerprint_of(manifest)
        self.shards = [ShardRange(i, entry["start"], entry["stop"]) for i, entry in enumerate(self._entries)]
        self._stops = np.array([shard.stop for shard in self.shards], dtype=np.int64)
        self._batches: dict[int, pa.RecordBatch] = {}
        self._check_files()

    @classmethod
    def open(cls, folder: str | os.PathLike, *, dim: int | None = None) -> "EmbeddingStore":
        """Open the store in `folder`.

        Args:
            folder: Where it lies.
            dim: The width that is wanted; None for any.

        Raises:
            ShardError: The manifest or a shard is missing or broken, or the width differs.
        """
        store = cls(folder)
        if dim is not None and store.dim != dim:
            raise ShardError(
                f"{folder}: vectors of width {store.dim}, wanted {dim}. "
                "Embed queries and candidates with the same checkpoint."
            )
        return store

    def __reduce__(self) -> tuple[Any, ...]:
        return EmbeddingStore, (str(self.folder),)

    def __len__(self) -> int:
        return self.shards[-1].stop

    @cached_property
    def ids(self) -> pa.ChunkedArray:
        """(N,) strings, one chunk per shard, memory-mapped."""
        return pa.chunked_array([self._batch(s.index).column(0) for s in self.shards if s.num_rows])

    def vectors(self, start: int, stop: int) -> np.ndarray:
        """Rows `start` to `stop` (exclusive), (N, D) float32, a copy of the caller's own."""
        if not 0 <= start <= stop <= len(self):
            raise ShardError(
                f"{self.folder}: rows {start} to {stop} of {len(self)} asked for. Stay inside the store."
            )
        out_ND = np.empty((stop - start, self.dim), dtype=np.float32)
        first = int(np.searchsorted(self._stops, start, side="right"))
        for shard in self.shards[first:]:
            if shard.start >= stop:
                break
            if not shard.num_rows:  # all its rows were left out
                continue
            lo, hi = max(start, shard.start), min(stop, shard.stop)
            stored_ND = self._stored(shard.index)[lo - shard.start : hi - shard.start]
            _decode(stored_ND, self.dtype, out=out_ND[lo - start : hi - start])
        return out_ND

    def gather(self, rows: np.ndarray) -> np.ndarray:
        """The given rows in the given order, (len(rows), D) float32."""
        rows = np.asarray(rows, dtype=np.int64)
        if rows.size and not (rows.min() >= 0 and rows.max() < len(self)):
            odd = rows[(rows < 0) | (rows >= len(self))]
            raise ShardError(
                f"{self.folder}: {odd.size} of {rows.size} rows are not among {len(self)} (first: {odd[0]})."
            )
        out_ND = np.empty((rows.size, self.dim), dtype=np.float32)
        shard_of_row = np.searchsorted(self._stops, rows, side="right")
        for index in np.unique(shard_of_row).tolist():
            places = np.flatnonzero(shard_of_row == index)
            stored_ND = self._stored(index)[rows[places] - self.shards[index].start]
            out_ND[places] = _decode(stored_ND, self.dtype)
        return out_ND

    def verify(self) -> None:
        """Read everything: checksums, ranges, finite and non-zero vectors.

        Raises:
            ShardError: Shards do not match their checksums.
            DataError: A vector is zero or not finite.
        """
        broken = []
        for shard, entry in zip(self.shards, self._entries, strict=True):
            path = self.folder / shard.file_name
            opened = _open_shard(path)
            if opened is None:
                broken.append(shard.file_name)
                continue
            metadata, batch = opened
            stored_ND = _vectors_of(batch)
            if not _checksum(batch.column(0), stored_ND) == metadata["sha256"] == entry["sha256"]:
                broken.append(shard.file_name)
                continue
            _refuse_bad_vectors(path, batch.column(0), _decode(stored_ND, self.dtype))
        if broken:
            raise ShardError(
                f"{self.folder}: {len(broken)} of {len(self.shards)} shards do not match their checksums "
                f"(first: {broken[0]}). Remove these files and {MANIFEST} and run the embedding again."
            )

    def _check_files(self) -> None:
        """By name and size; one listing answers for all."""
        if isinstance(self.folder, RemotePath):
            sizes = {name: status.st_size for name, status in self.folder.files().items()}
        else:
            with os.scandir(self.folder) as found:
                sizes = {file.name: file.stat().st_size for file in found}
        odd = [
            (entry["file"], "missing" if size is None else f"{size} bytes, not {entry['bytes']}")
            for entry in self._entries
            if (size := sizes.get(entry["file"])) != entry["bytes"]
        ]
        if odd:
            raise ShardError(
                f"{self.folder}: {len(odd)} of {len(self._entries)} shards are not as the manifest says "
                f"(first: {odd[0][0]}, {odd[0][1]}). Remove {MANIFEST} and run the embedding again."
            )

    def _batch(self, index: int) -> pa.RecordBatch:
        if index not in self._batches:
            path = self.folder / self.shards[index].file_name
            metadata, batch = _require_shard(path)
            if (metadata["dim"], metadata["dtype"], metadata["sha256"]) != (
                self.dim,
                self.dtype,
                self._entries[index]["sha256"],
            ):
                raise ShardError(
                    f"{path}: not the shard that the manifest names. Remove {MANIFEST} and embed again."
                )
            self._batches[index] = batch
        return self._batches[index]

    def _stored(self, index: int) -> np.ndarray:
        return _vectors_of(self._batch(index))


class EmbeddingPool:
    """Rows of several stores laid end to end, as one pool. Pickles as its paths.

    Attributes:
        stores: The stores, in order.
        dim: Width of a vector.
    """

    def __init__(self, folders: Sequence[str | os.PathLike]) -> None:
        """Open the stores.

        Raises:
            ShardError: None is given, one is incomplete, or widths differ.
        """
        if not folders:
            raise ShardError("a pool of no stores. Give at least one.")
        self.stores = [EmbeddingStore.open(folders[0])]
        self.dim = self.stores[0].dim
        self.stores += [EmbeddingStore.open(folder, dim=self.dim) for folder in folders[1:]]
        self._stops = np.cumsum([len(store) for store in self.stores])

    def __reduce__(self) -> tuple[Any, ...]:
        return EmbeddingPool, ([str(store.folder) for store in self.stores],)

    def __len__(self) -> int:
        return int(self._stops[-1])

    @cached_property
    def ids(self) -> pa.Array:
        """(N,) large_string in one piece, so that millions of rows are resolved by one `take`.

        Raises:
            DataError: An id stands in two stores.
        """
        columns = pa.chunked_array([chunk for store in self.stores for chunk in store.ids.chunks])
        if len(self.stores) > 1 and len(columns.unique()) != len(columns):
            folders = ", ".join(str(store.folder) for store in self.stores)
            raise DataError(f"{folders}: {_repeated(columns)}")
        return columns.cast(pa.large_string()).combine_chunks()

    def vectors(self, start: int, stop: int) -> np.ndarray:
        """Rows `start` to `stop` (exclusive), (N, D) float32."""
        if not 0 <= start <= stop <= len(self):
            raise ShardError(
                f"rows {start} to {stop} of a pool of {len(self)} asked for. Stay inside the pool."
            )
        parts = []
        for store, end in zip(self.stores, self._stops.tolist(), strict=True):
            begin = end - len(store)
            lo, hi = max(start, begin), min(stop, end)
            if lo < hi:
                parts.append(store.vectors(lo - begin, hi - begin))
        if not parts:
            return np.empty((0, self.dim), dtype=np.float32)
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def gather(self, rows: np.ndarray) -> np.ndarray:
        """The given rows in the given order, (len(rows), D) float32."""
        rows = np.asarray(rows, dtype=np.int64)
        store_of_row = np.searchsorted(self._stops, rows, side="right")
        out_ND = np.empty((rows.size, self.dim), dtype=np.float32)
        for index, store in enumerate(self.stores):
            places = np.flatnonzero(store_of_row == index)
            out_ND[places] = store.gather(rows[places] - (int(self._stops[index]) - len(store)))
        return out_ND

    def blocks(self, block_rows: int, *, start: int = 0, stop: int | None = None) -> Iterator[np.ndarray]:
        """Rows `start` to `stop` in order, at most `block_rows` at a time, each (N, D) float32."""
        stop = len(self) if stop is None else stop
        for lo in range(start, stop, block_rows):
            yield self.vectors(lo, min(lo + block_rows, stop))


def _encode(vectors_ND: np.ndarray, dtype: StoredDtype) -> np.ndarray:
    if dtype != "bfloat16":
        return np.ascontiguousarray(vectors_ND, dtype=_NUMPY_DTYPES[dtype])
    bits_ND = vectors_ND.view(np.uint32)
    # To nearest, ties to even; finite values only, the carry would ruin a NaN.
    return ((bits_ND + 0x7FFF + ((bits_ND >> 16) & 1)) >> 16).astype(np.uint16)


def _decode(stored_ND: np.ndarray, dtype: StoredDtype, out: np.ndarray | None = None) -> np.ndarray:
    """float32 (N, D), in `out` where given."""
    if out is None:
        out = np.empty(stored_ND.shape, dtype=np.float32)
    if dtype == "bfloat16":
        np.left_shift(stored_ND, 16, out=out.view(np.uint32), dtype=np.uint32)
    else:
        out[...] = stored_ND
    return out


def _refuse_bad_vectors(path: Place, ids: Any, vectors_ND: np.ndarray) -> None:
    if not len(vectors_ND):
        return
    finite = np.isfinite(vectors_ND).all(axis=1)
    nonzero = vectors_ND.any(axis=1)
    for good, what in ((finite, "not finite"), (nonzero, "zero")):
        if rows := np.flatnonzero(~good).tolist():
            raise DataError(
                f"{path}: {len(rows)} of {len(vectors_ND)} vectors are {what} (first: {ids[rows[0]]}). "
                "Look for an input the encoder cannot read, or a dtype too narrow for it."
            )


def _repeated(ids: Any) -> str:
    counts = ids.value_counts()
    many = np.flatnonzero(counts.field("counts").to_numpy() > 1).tolist()
    return (
        f"{len(many)} ids stand in more than one row (first: {counts.field('values')[many[0]]}). "
        "Each query or candidate is embedded once; mend the data file."
    )


def _checksum(ids: pa.Array, stored_ND: np.ndarray) -> str:
    """Over the offsets and bytes of the ids and the vectors, without Arrow's padding."""
    digest = hashlib.sha256()
    _, offsets, text = ids.buffers()
    if offsets is not None and text is not None:
        ends = np.frombuffer(offsets, dtype=np.int32)[: len(ids) + 1]
        digest.update(ends.tobytes())
        digest.update(memoryview(text)[: int(ends[-1])])
    digest.update(np.ascontiguousarray(stored_ND).data)
    return digest.hexdigest()


def _vectors_of(batch: pa.RecordBatch) -> np.ndarray:
    column = batch.column(1)
    return column.values.to_numpy(zero_copy_only=True).reshape(len(column), column.type.list_size)


def shard_metadata(path: Place) -> dict[str, Any] | None:
    """What a shard says of itself; None where the file is missing or broken.

    A local file is looked at to its end; an object, which is never visible in part, by its foot alone.
    """
    if not isinstance(path, RemotePath):
        opened = _open_shard(path)
        return None if opened is None else opened[0]
    try:
        with path.arrow_file() as file:
            return _metadata_of(pa.ipc.open_file(file))
    except (OSError, KeyError, ValueError, pa.ArrowException):
        return None


def open_shard(path: Place) -> tuple[dict[str, Any], list[str], np.ndarray]:
    """Metadata, ids, and vectors (N, D) float32 of one shard.

    Raises:
        ShardError: It is missing or broken.
    """
    metadata, batch = _require_shard(path)
    return metadata, batch.column(0).to_pylist(), _decode(_vectors_of(batch), metadata["dtype"])


def _metadata_of(reader: pa.ipc.RecordBatchFileReader) -> dict[str, Any]:
    metadata = json.loads((reader.schema.metadata or {})[_METADATA_KEY])
    if metadata["format"] != _FORMAT or reader.num_record_batches != 1:
        raise ValueError("not a shard of this format")
    return metadata


def _open_shard(path: Place) -> tuple[dict[str, Any], pa.RecordBatch] | None:
    """Metadata and memory-mapped content; None where the file is missing or broken."""
    try:
        with pa.memory_map(str(local_file(path))) as source:
            reader = pa.ipc.open_file(source)
            metadata = _metadata_of(reader)
            batch = reader.get_batch(0)
    except (OSError, KeyError, ValueError, pa.ArrowException):
        return None
    return (metadata, batch) if batch.num_rows == metadata["rows"] else None


def _require_shard(path: Place) -> tuple[dict[str, Any], pa.RecordBatch]:
    opened = _open_shard(path)
    if opened is None:
        raise ShardError(
            f"{path}: missing, or not an embedding shard. Remove {MANIFEST} and run the embedding again."
        )
    return opened


def _read_manifest(folder: Place) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        manifest = read_json(path)
    except (OSError, UnicodeDecodeError):
        raise ShardError(
            f"{folder}: no {MANIFEST}: not an embedding store, or not finished. Run the embedding to its end."
        ) from None
    except OutputError as error:
        raise ShardError(str(error)) from None
    wanted = {"format", "num_rows", "num_bad", "dim", "dtype", "settings", "counts", "shards"}
    if not isinstance(manifest, dict) or not wanted <= manifest.keys() or manifest["format"] != _FORMAT:
        raise ShardError(f"{path}: not a manifest of format {_FORMAT}. Run the embedding again.")
    if not manifest["shards"] or manifest["shards"][-1]["stop"] != manifest["num_rows"]:
        raise ShardError(
            f"{path}: its shards do not hold {manifest['num_rows']} rows. Run the embedding again."
        )
    return manifest
