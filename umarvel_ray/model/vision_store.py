"""Features of the frozen vision tower on disk, so that a picture passes the tower once.

A folder holds one folder for each tower, pixel budget and precision; in it each writer has a file of features
and an index of fixed-size entries, which is written behind the features. Many processes may write and read
at once; what a killed one left half written is not found. V vision tokens of a picture, F width of its
features: those that stand in the prompt, and behind them those of DeepStack.
"""

import hashlib
import os
import struct
import uuid
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from umarvel_ray.artifacts import fingerprint, read_json, write_json
from umarvel_ray.errors import ConfigError, DataError
from umarvel_ray.model.images import Grid
from umarvel_ray.model.settings import ImageSettings
from umarvel_ray.storage import is_remote, picture_bytes

_ENTRY = struct.Struct("<32sQIIIII")
"""SHA-256 of the image file; offset; V; frames, height and width in patches; checksum of the features."""

_MADE_BY = "store.json"


@dataclass(frozen=True, slots=True)
class Key:
    """A picture by the SHA-256 of its file, and its grid."""

    content: bytes
    grid: Grid


class VisionStore:
    """Features by image content, for one tower, pixel budget and precision."""

    def __init__(
        self, folder: str | Path, tower: nn.Module, images: ImageSettings, *, width: int, dtype: torch.dtype
    ) -> None:
        """Open `folder`, or make it.

        Args:
            folder: On a file system; any number of processes may share it.
            tower: Whose features are kept.
            images: The pixel budget.
            width: F.
            dtype: Of the features.

        Raises:
            ConfigError: `folder` is a URI: features are mapped into memory.
        """
        if is_remote(folder):
            raise ConfigError(
                f"vision_store: {folder} is object storage, but features are mapped into memory. Give a "
                "folder on a file system."
            )
        made_by = {
            "tower": tower_fingerprint(tower),
            "images": images.model_dump(),
            "width": width,
            "dtype": str(dtype).removeprefix("torch."),
        }
        own = Path(folder).absolute() / fingerprint(made_by)[:16]
        own.mkdir(parents=True, exist_ok=True)
        if not (own / _MADE_BY).exists():
            write_json(own / _MADE_BY, made_by)
        self._open(own, width, dtype)

    @classmethod
    def open(cls, folder: str | Path) -> "VisionStore":
        """One tower's own folder (`VisionStore.folder`), for a process that reads and has no tower."""
        made_by = read_json(Path(folder) / _MADE_BY)
        store = cls.__new__(cls)
        store._open(Path(folder), made_by["width"], getattr(torch, made_by["dtype"]))
        return store

    def __reduce__(self) -> tuple[Any, ...]:
        """Travels to another process as what lies on disk."""
        return VisionStore.open, (self.folder,)

    def _open(self, folder: Path, width: int, dtype: torch.dtype) -> None:
        self.folder = folder
        self.hits = self.misses = 0
        self._width, self._dtype = width, dtype
        self._row_bytes = width * dtype.itemsize
        self._found: dict[bytes, tuple[str, int, int, Grid, int]] = {}
        self._maps: dict[str, np.ndarray] = {}
        self._writer: tuple[str, Any, Any] | None = None
        for index in sorted(self.folder.glob("*.index")):
            self._read_index(index)

    def __len__(self) -> int:
        """Pictures known here."""
        return len(self._found)

    def get(self, path: str) -> tuple[bytes, tuple[Tensor, Grid] | None]:
        """SHA-256 of an image file, and its features (V, F) with its grid, if they are there.

        Raises:
            DataError: The file cannot be read.
        """
        try:
            key = hashlib.sha256(picture_bytes(path)).digest()
        except OSError as error:
            raise DataError(
                f"{path}: cannot be read ({error.strerror or error}). Put the file there or "
                "correct the record."
            ) from None
        found = self.read(key)
        self.hits, self.misses = self.hits + (found is not None), self.misses + (found is None)
        return key, found

    def put(self, key: Key, features_VF: Tensor) -> None:
        """Keep the features of one picture; a second time changes nothing."""
        if key.content in self._found:
            return
        stem, data, index = self._open_writer()
        content = features_VF.detach().to("cpu", self._dtype).contiguous().view(torch.uint8).numpy().tobytes()
        offset = data.tell()
        data.write(content)
        data.flush()
        checksum = zlib.crc32(content)
        index.write(_ENTRY.pack(key.content, offset, len(features_VF), *key.grid, checksum))
        index.flush()
        self._found[key.content] = (stem, offset, len(features_VF), key.grid, checksum)

    def _open_writer(self) -> tuple[str, Any, Any]:
        if self._writer is None:
            stem = f"{os.getpid()}-{uuid.uuid4().hex[:12]}"
            data, index = (open(self.folder / f"{stem}.{kind}", "xb") for kind in ("features", "index"))  # noqa: SIM115
            self._writer = (stem, data, index)
        return self._writer

    def _read_index(self, file: Path) -> None:
        content = file.read_bytes()
        whole = len(content) // _ENTRY.size * _ENTRY.size  # a killed writer may have left part of an entry
        for key, offset, num, frames, height, width, checksum in _ENTRY.iter_unpack(content[:whole]):
            self._found[key] = (file.stem, offset, num, (frames, height, width), checksum)

    def read(self, key: bytes) -> tuple[Tensor, Grid] | None:
        """Features (V, F) and grid of the picture with this SHA-256; None where they are not there whole."""
        if key not in self._found:
            return None
        stem, offset, num, grid, checksum = self._found[key]
        end = offset + num * self._row_bytes
        data = self._map(stem, end)
        if data is None or zlib.crc32(data[offset:end].tobytes()) != checksum:
            del self._found[key]
            return None
        values = torch.from_numpy(data[offset:end]).view(self._dtype).view(num, self._width)
        return values, grid

    def _map(self, stem: str, end: int) -> np.ndarray | None:
        known = self._maps.get(stem)
        file = self.folder / f"{stem}.features"
        if known is None or len(known) < end:
            if not file.exists() or file.stat().st_size < end:
                return None
            # Copy on write: a tensor over it may be handed to code that would write.
            known = self._maps[stem] = np.memmap(file, dtype=np.uint8, mode="c")
        return known


def tower_fingerprint(tower: nn.Module) -> str:
    """Names a tower by all its weights."""
    digest = hashlib.blake2b(digest_size=16)
    for name, parameter in sorted(tower.named_parameters()):
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
