"""Places: local paths, and URIs of object storage behind the same few methods.

`at` turns what a setting says into one: a `pathlib.Path`, or a `RemotePath` with the part of pathlib's
interface that the house uses. `s3://` and `gs://` go through pyarrow, which retries with back-off; any other
scheme (`az://`, `memory://`) through fsspec. Keys come from the environment or the machine's role alone; an
endpoint that is not the cloud's own from `AWS_ENDPOINT_URL`.

What must lie on a disk (memory-mapped shards and lines, checkpoints) is fetched once per machine by
`local_file` and `local_folder`; see `cache`, which also keeps pictures.
"""

import fcntl
import fnmatch
import functools
import hashlib
import io
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

from umarvel_ray.cache import cache_folder, kept_bytes, make_room
from umarvel_ray.errors import StorageError

_COPY_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class FileStatus:
    """Size and age of a stored file.

    Attributes:
        st_size: Bytes.
        st_mtime_ns: Last change.
    """

    st_size: int
    st_mtime_ns: int


@functools.total_ordering
class RemotePath(os.PathLike):
    """A place in object storage, used like a `pathlib.Path`. A folder is what has files under it.

    Files appear whole: `artifacts.atomic_write` uploads them when they are complete. Pickles as its URI.
    """

    __slots__ = ("_key", "_scheme")

    def __init__(self, uri: str) -> None:
        """`scheme://bucket/key`; a trailing slash is dropped, `.` and `..` are resolved."""
        scheme, _, key = uri.partition("://")
        self._scheme = scheme
        self._key = os.path.normpath(key).strip("/") if key.strip("/") else ""

    def __reduce__(self) -> tuple[type["RemotePath"], tuple[str]]:
        return RemotePath, (str(self),)

    def __str__(self) -> str:
        return f"{self._scheme}://{self._key}"

    __fspath__ = __str__

    def __repr__(self) -> str:
        return f"RemotePath({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemotePath) and str(self) == str(other)

    def __lt__(self, other: "RemotePath") -> bool:
        return str(self) < str(other)

    def __hash__(self) -> int:
        return hash(str(self))

    def __truediv__(self, name: str | os.PathLike) -> "RemotePath":
        return RemotePath(f"{self}/{os.fspath(name)}")

    @property
    def name(self) -> str:
        """Last part."""
        return PurePosixPath(self._key).name

    @property
    def stem(self) -> str:
        """Last part without its suffix."""
        return PurePosixPath(self._key).stem

    @property
    def suffix(self) -> str:
        """`.arrow`."""
        return PurePosixPath(self._key).suffix

    @property
    def parent(self) -> "RemotePath":
        """The place above; a bucket is above itself."""
        return self.parents[0] if self.parents else self

    @property
    def parents(self) -> "tuple[RemotePath, ...]":
        """All places above, nearest first, down to the bucket."""
        above = [str(path) for path in PurePosixPath(self._key).parents if str(path) != "."]
        return tuple(RemotePath(f"{self._scheme}://{key}") for key in above)

    def relative_to(self, other: "str | os.PathLike") -> PurePosixPath:
        """The rest of this path under `other`; ValueError where it is not under it."""
        return PurePosixPath(str(self)).relative_to(PurePosixPath(os.fspath(other)))

    def with_suffix(self, suffix: str) -> "RemotePath":
        """The same place with another suffix."""
        return RemotePath(f"{self._scheme}://{PurePosixPath(self._key).with_suffix(suffix)}")

    def exists(self) -> bool:
        """Whether a file stands there, or anything under it."""
        return self._kind() != "NotFound"

    def is_file(self) -> bool:
        """Whether a file stands there."""
        return self._kind() == "File"

    def is_dir(self) -> bool:
        """Whether anything stands under it."""
        return self._kind() == "Directory"

    def stat(self) -> FileStatus:
        """Size and age; FileNotFoundError where no file stands there."""
        info = self._info()
        if info.type.name != "File":
            raise FileNotFoundError(2, "No such file", str(self))
        return FileStatus(info.size or 0, info.mtime_ns or 0)

    def iterdir(self) -> "Iterator[RemotePath]":
        """What stands directly under it, by name; nothing where nothing does."""
        from pyarrow.fs import FileSelector

        with _answering(self):
            found = _filesystem(self._scheme).get_file_info(FileSelector(self._key, allow_not_found=True))
        # An empty object named like the folder itself marks it, on some stores.
        names = sorted({info.base_name for info in found if info.path.strip("/") != self._key} - {""})
        return (self / name for name in names)

    def glob(self, pattern: str) -> "Iterator[RemotePath]":
        """What stands directly under it and matches, by name."""
        return (path for path in self.iterdir() if fnmatch.fnmatchcase(path.name, pattern))

    def rglob(self, pattern: str) -> "Iterator[RemotePath]":
        """All files under it, at any depth, whose name matches."""
        return (
            self / name for name in self.files() if fnmatch.fnmatchcase(PurePosixPath(name).name, pattern)
        )

    def read_bytes(self) -> bytes:
        """The whole file; FileNotFoundError where there is none."""
        with _answering(self), _filesystem(self._scheme).open_input_file(self._key) as file:
            return file.read()

    def read_text(self, encoding: str = "utf-8") -> str:
        """The whole file as text."""
        return self.read_bytes().decode(encoding)

    def open(self, mode: str = "r", encoding: str | None = None, newline: str | None = None) -> IO[Any]:
        """Open for reading; what is written goes through `artifacts.atomic_write`."""
        if mode not in ("r", "rb", "rt"):
            raise StorageError(f"{self}: object storage has no mode {mode!r}. Write whole files.")
        with _answering(self):
            raw = io.BufferedReader(
                _Raw(_filesystem(self._scheme).open_input_file(self._key)), buffer_size=1 << 20
            )
        return raw if mode == "rb" else io.TextIOWrapper(raw, encoding or "utf-8", newline=newline)

    def arrow_file(self) -> Any:
        """Open for reading parts of it, as pyarrow's readers do."""
        with _answering(self):
            return _filesystem(self._scheme).open_input_file(self._key)

    def unlink(self, missing_ok: bool = False) -> None:
        """Remove the file."""
        try:
            with _answering(self):
                _filesystem(self._scheme).delete_file(self._key)
        except FileNotFoundError:
            if not missing_ok:
                raise

    def mkdir(self, parents: bool = False, exist_ok: bool = False) -> None:
        """Nothing: a folder is there when something is in it."""

    def upload(self, source: str | os.PathLike) -> None:
        """Put a finished local file there, whole or not at all."""
        with _answering(self), open(source, "rb") as file:
            # No `with`: an upload that fails must not be closed as if it were complete.
            stream = _filesystem(self._scheme).open_output_stream(self._key)
            while block := file.read(_COPY_BYTES):
                stream.write(block)
            stream.close()

    def download(self, target: str | os.PathLike) -> None:
        """Write the file's content to a local one."""
        with (
            _answering(self),
            open(target, "wb") as file,
            _filesystem(self._scheme).open_input_stream(self._key) as stream,
        ):
            while block := stream.read(_COPY_BYTES):
                file.write(block)

    def files(self) -> "dict[str, FileStatus]":
        """All files under it, at any depth: relative name → status."""
        from pyarrow.fs import FileSelector

        with _answering(self):
            found = _filesystem(self._scheme).get_file_info(
                FileSelector(self._key, recursive=True, allow_not_found=True)
            )
        prefix = f"{self._key}/"
        return {
            # Some stores put a slash before the bucket.
            info.path.lstrip("/").removeprefix(prefix): FileStatus(info.size or 0, info.mtime_ns or 0)
            for info in sorted(found, key=lambda info: info.path)
            if info.type.name == "File" and info.base_name
        }

    def remove_tree(self) -> None:
        """Remove all files under it."""
        for name in self.files():
            (self / name).unlink(missing_ok=True)

    def _info(self) -> Any:
        with _answering(self):
            return _filesystem(self._scheme).get_file_info(self._key)

    def _kind(self) -> str:
        return self._info().type.name


Place = Path | RemotePath


def is_remote(path: str | os.PathLike) -> bool:
    """Whether a path is a URI of object storage."""
    return "://" in os.fspath(path)


def at(path: str | os.PathLike) -> Place:
    """A setting's path as something to work with; local ones absolute."""
    text = os.fspath(path)
    if text.startswith("file://"):
        text = text.removeprefix("file://")
    return RemotePath(text) if is_remote(text) else Path(os.path.abspath(text))


def join(root: str | os.PathLike, name: str) -> str:
    """`name` under `root`, local or remote, as text; an absolute name stays."""
    text = os.fspath(root)
    if is_remote(name) or not is_remote(text):
        return name if is_remote(name) else os.path.join(text, name)
    return f"{text.rstrip('/')}/{name}"


def read_bytes(path: str | os.PathLike) -> bytes:
    """The whole of a file, wherever it lies; FileNotFoundError where there is none."""
    if is_remote(path):
        return RemotePath(os.fspath(path)).read_bytes()
    with open(path, "rb") as file:
        return file.read()


def picture_bytes(path: str | os.PathLike) -> bytes:
    """As `read_bytes`, for files that do not change and are read again and again: fetched once per machine.

    Raises:
        FileNotFoundError: There is none.
    """
    return kept_bytes(os.fspath(path), lambda: read_bytes(path)) if is_remote(path) else read_bytes(path)


def remove_tree(path: Place) -> None:
    """Remove a folder with all that is in it; nothing where there is none."""
    if isinstance(path, RemotePath):
        path.remove_tree()
    else:
        shutil.rmtree(path, ignore_errors=True)


def local_file(path: str | os.PathLike) -> Path:
    """A local file with this content: the file itself, or a copy that is fetched once per machine.

    Raises:
        FileNotFoundError: There is no such file.
        StorageError: The storage does not answer.
    """
    found = at(path)
    if isinstance(found, Path):
        return found
    status = found.stat()
    target = cache_folder() / "objects" / _key_of(found, {"": status}) / found.name
    if target.is_file():
        os.utime(target.parent)  # used: among the last to be dropped; its own time names what was made of it
        return target
    with _locked(target.parent):
        if not target.is_file():
            make_room(status.st_size, keep=target.parent)
            handle, temporary = tempfile.mkstemp(dir=target.parent, suffix=".tmp")
            os.close(handle)
            try:
                found.download(temporary)
                os.replace(temporary, target)
            except BaseException:
                Path(temporary).unlink(missing_ok=True)
                raise
    return target


def local_folder(path: str | os.PathLike) -> Path:
    """A local folder with these files: the folder itself, or a copy that is fetched once per machine.

    Raises:
        StorageError: The storage does not answer.
    """
    found = at(path)
    if isinstance(found, Path):
        return found
    files = found.files()
    target = cache_folder() / "objects" / _key_of(found, files) / (found.name or "root")
    if target.is_dir():
        os.utime(target.parent)
        return target
    with _locked(target.parent):
        if not target.is_dir():
            make_room(sum(status.st_size for status in files.values()), keep=target.parent)
            temporary = Path(tempfile.mkdtemp(dir=target.parent, suffix=".tmp"))
            try:
                for name in files:
                    (temporary / name).parent.mkdir(parents=True, exist_ok=True)
                    (found / name).download(temporary / name)
                os.replace(temporary, target)
            except BaseException:
                shutil.rmtree(temporary, ignore_errors=True)
                raise
    return target


def local_model(path: str | os.PathLike) -> str:
    """As `local_folder`, for what Transformers loads: `hf://OWNER/NAME` stays a name of the hub."""
    text = os.fspath(path)
    return text if text.startswith("hf://") or not is_remote(text) else str(local_folder(text))


def _key_of(path: RemotePath, files: dict[str, FileStatus]) -> str:
    """Names a copy by what it is a copy of. Of a file whose age is not told, no copy is used twice."""
    if any(not status.st_mtime_ns for status in files.values()):
        return uuid.uuid4().hex
    return hashlib.sha256(repr((str(path), files)).encode()).hexdigest()[:24]


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process of this machine at a time: eight actors fetch a checkpoint once."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class _Raw(io.RawIOBase):
    """An Arrow file as Python's buffered readers want one."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def readinto(self, buffer: Any) -> int:
        return self._file.readinto(buffer)

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


@functools.lru_cache(maxsize=16)
def _filesystem(scheme: str) -> Any:
    """The Arrow filesystem of a scheme, one per process."""
    from pyarrow import fs

    try:
        if scheme in ("s3", "s3a"):
            return fs.S3FileSystem(
                retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=8), **_own_endpoint()
            )
        if scheme in ("gs", "gcs"):
            return fs.GcsFileSystem()
        import fsspec

        return fs.PyFileSystem(fs.FSSpecHandler(fsspec.filesystem(scheme, use_listings_cache=False)))
    except (ImportError, ValueError, OSError) as error:
        raise StorageError(
            f"{scheme}://: this storage cannot be used ({' '.join(str(error).split())[:200]}). "
            "Install its fsspec package, or use s3:// or gs://."
        ) from None


def _own_endpoint() -> dict[str, str]:
    """Where an S3 that is not Amazon's listens: Arrow does not ask the environment for it."""
    url = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL", "")
    scheme, _, address = url.rpartition("://")
    return {"endpoint_override": address.rstrip("/"), "scheme": scheme or "https"} if address else {}


@contextmanager
def _answering(path: RemotePath) -> Iterator[None]:
    """What a store says in many words, as one line; that a file is missing stays what it is."""
    try:
        yield
    except FileNotFoundError:
        raise FileNotFoundError(2, "No such file", str(path)) from None
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        said = " ".join(str(error).split())
        if "NoSuchKey" in said or "404" in said:
            raise FileNotFoundError(2, "No such file", str(path)) from None
        raise StorageError(
            f"{path}: the storage refuses or does not answer ({said[:300]}). Check the address, and the "
            "credentials and endpoint in the environment."
        ) from None
