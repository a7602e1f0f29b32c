"""Vectors for and from others: a `.npy` matrix and its ids become an embedding store, and the other way.

Ids are a `.npy` of strings or of UniIR's integers, a `.json` list, or a text file of one id a line.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from umarvel_ray.artifacts import atomic_write, file_fingerprint, fingerprint
from umarvel_ray.errors import DataError
from umarvel_ray.retrieve.store import EmbeddingStore, finish_store, finished_shards, plan_shards, write_shard

_ROWS_PER_SHARD = 65_536
_QUERY_FACTOR, _CANDIDATE_FACTOR = 500_000, 10_000_000
"""UniIR writes `"D:N"` as D·500000 + N for queries and D·10000000 + N for candidates."""


def import_vectors(
    vectors: str | os.PathLike,
    ids: str | os.PathLike,
    folder: str | os.PathLike,
    *,
    role: Literal["query", "candidate"],
) -> EmbeddingStore:
    """Make a store of a matrix; float32, rows made unit length after the read, as UniIR does.

    Args:
        vectors: `.npy`, (N, D), any floating dtype; memory-mapped.
        ids: N of them; see the module.
        folder: The store's.
        role: How integer ids are read.

    Raises:
        DataError: Numbers of rows differ, or a vector is zero or not finite.
    """
    matrix_ND = _open_matrix(Path(vectors))
    names = read_ids(ids, role=role)
    if len(names) != len(matrix_ND):
        raise DataError(
            f"{vectors}: {len(matrix_ND)} vectors, but {ids} has {len(names)} ids. Give the ids of this "
            "matrix."
        )
    settings = {
        "vectors": [os.path.basename(vectors), file_fingerprint(vectors)],
        "ids": [os.path.basename(ids), file_fingerprint(ids)],
    }
    name = fingerprint(settings)
    plan = plan_shards(len(names), _ROWS_PER_SHARD)
    done = finished_shards(folder, plan, name)
    for shard in plan:
        if shard.index in done:
            continue
        part_ND = np.asarray(matrix_ND[shard.start : shard.stop], dtype=np.float32)
        with np.errstate(invalid="ignore", divide="ignore"):
            part_ND = part_ND / np.linalg.norm(part_ND, axis=1, keepdims=True)
        if len(odd := np.flatnonzero(~np.isfinite(part_ND).all(axis=1))):
            raise DataError(
                f"{vectors}: {len(odd)} of rows {shard.start} to {shard.stop} are zero, NaN or infinite "
                f"(first: row {shard.start + odd[0]}, {names[shard.start + odd[0]]}). Embed again; a narrow "
                "dtype may overflow."
            )
        write_shard(
            folder, shard, names[shard.start : shard.stop], part_ND, dtype="float32", fingerprint=name
        )
    return finish_store(folder, plan, fingerprint=name, settings=settings)


def export_vectors(
    store: EmbeddingStore,
    vectors: str | os.PathLike,
    ids: str | os.PathLike,
    *,
    role: Literal["query", "candidate"] | None = None,
    dtype: Literal["float16", "float32"] = "float32",
) -> None:
    """Write a store as a `.npy` matrix and the `.npy` of its ids, for everyone's tools; shard by shard.

    Args:
        store: Of a job, or imported.
        vectors: The matrix, (N, D).
        ids: Its ids, (N,): strings, or UniIR's int64 where `role` says how.
        role: What the ids are of.
        dtype: Of the matrix.

    Raises:
        DataError: An id has no integer form.
    """
    names = store.ids.to_pylist()
    numbers = np.array(names) if role is None else np.array([_integer_of(name, role) for name in names])
    with atomic_write(ids, "wb") as file:
        np.save(file, numbers, allow_pickle=False)
    header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": (len(store), store.dim)}
    with atomic_write(vectors, "wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for shard in store.shards:
            file.write(store.vectors(shard.start, shard.stop).astype(dtype).tobytes())


def _integer_of(name: str, role: Literal["query", "candidate"]) -> int:
    factor = _QUERY_FACTOR if role == "query" else _CANDIDATE_FACTOR
    dataset, _, number = name.partition(":")
    if not (dataset.isascii() and dataset.isdigit() and number.isascii() and number.isdigit()):
        raise DataError(f"{name!r} is no id of M-BEIR, D:N, so UniIR has no integer for it. Export strings.")
    if int(number) >= factor:
        raise DataError(f"{name!r}: UniIR's integers hold numbers below {factor}. Export strings.")
    return int(dataset) * factor + int(number)


def read_ids(path: str | os.PathLike, *, role: Literal["query", "candidate"]) -> list[str]:
    """The ids of a matrix, in its order.

    Raises:
        DataError: The file is of none of the kinds above.
    """
    path = Path(path)
    try:
        if path.suffix == ".npy":
            return _names(np.load(path, allow_pickle=False), role)
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            values = json.loads(text)
            if isinstance(values, list) and all(isinstance(value, str) for value in values):
                return values
            raise ValueError("a list of strings is wanted")
        return [line for line in text.split("\n") if line]
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path}: no list of ids ({' '.join(str(error).split())[:160]}). Give .npy, .json or one id a "
            "line."
        ) from None


def _names(ids: np.ndarray, role: str) -> list[str]:
    if ids.dtype.kind in "US":
        return [str(value) for value in ids.astype(str).reshape(-1)]
    if ids.dtype.kind not in "iu":
        raise ValueError(f"ids of dtype {ids.dtype}")
    factor = _QUERY_FACTOR if role == "query" else _CANDIDATE_FACTOR
    return [f"{number // factor}:{number % factor}" for number in ids.reshape(-1).tolist()]


def _open_matrix(path: Path) -> Any:
    try:
        matrix = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: no .npy matrix ({' '.join(str(error).split())[:160]}).") from None
    if matrix.ndim != 2 or matrix.dtype.kind != "f":
        raise DataError(
            f"{path}: shape {matrix.shape}, {matrix.dtype}. Give a matrix of floating point, one vector a "
            "row."
        )
    return matrix


def ids_beside(vectors: Path) -> Path:
    """The ids of `X_embed.npy` or `X.npy`: `X_ids` or `X.ids` as .npy, .json or .txt.

    Raises:
        DataError: There is none.
    """
    stem = vectors.name.removesuffix(".npy").removesuffix("_embed")
    choices: Sequence[Path] = [
        vectors.with_name(f"{stem}{mark}{ending}")
        for mark in ("_ids", ".ids")
        for ending in (".npy", ".json", ".txt")
    ]
    found = next((path for path in choices if path.is_file()), None)
    if found is None:
        raise DataError(f"{vectors}: no ids beside it. Write them as {choices[0].name} or {choices[2].name}.")
    return found
