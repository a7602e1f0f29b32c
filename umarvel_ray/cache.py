"""A machine's own copies of what lies in object storage, within a limit of bytes.

Two kinds share the limit: whole objects and folders that must lie on a disk (`storage.local_file`), and small
contents that are read whole, pictures above all. What was not used longest goes first. The cache is never in
the way: where it cannot be written, everything is fetched anew.
"""

import fcntl
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

CACHE_VARIABLE = "UMARVEL_CACHE"
"""Environment: folder of what is fetched; `umarvel-ray` in the user's cache folder without it."""
CACHE_GIB_VARIABLE = "UMARVEL_CACHE_GIB"
"""Environment: its size limit; 0 keeps no pictures, and of the rest what is in use."""
_CACHE_GIB = 100.0
_FULL = 0.9
"""Of the limit: to what a sweep brings it down."""
_SWEEP_EVERY = 0.02
"""Of the limit: what one process adds before it looks whether there is too much."""
_TOUCH_EVERY_S = 600.0
"""A content that is used often need not say so each time."""
_ABANDONED_S = 6 * 3600.0
"""A copy that was begun so long ago will not be finished."""
_DIGEST_BYTES = 16

_added = 0


def cache_folder() -> Path:
    """Where this machine keeps what can be made or fetched again."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(os.environ.get(CACHE_VARIABLE) or os.path.join(home, "umarvel-ray"))


def limit_bytes() -> float:
    """The size limit."""
    return float(os.environ.get(CACHE_GIB_VARIABLE) or _CACHE_GIB) * 2**30


def kept_bytes(name: str, fetch: Callable[[], bytes]) -> bytes:
    """The content of this name, fetched once per machine.

    A name stands for one content for good: who changes a picture gives it another path, or clears the cache.
    """
    if not limit_bytes():
        return fetch()
    key = hashlib.sha256(name.encode()).hexdigest()
    path = cache_folder() / "contents" / key[:3] / key[3:32]
    content = _read(path)
    if content is None:
        content = fetch()
        _write(path, content)
    return content


def _read(path: Path) -> bytes | None:
    """What is kept; None where there is nothing, or not the whole of it."""
    try:
        with open(path, "rb") as file:
            kept = file.read()
            if time.time() - os.fstat(file.fileno()).st_mtime > _TOUCH_EVERY_S:
                os.utime(path)
    except OSError:
        return None
    content, digest = kept[:-_DIGEST_BYTES], kept[-_DIGEST_BYTES:]
    return content if _digest(content) == digest else None


def _write(path: Path, content: bytes) -> None:
    global _added
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        with os.fdopen(handle, "wb") as file:
            file.write(content + _digest(content))
        os.replace(temporary, path)
    except OSError:
        return  # no room, or not ours to write
    _added += len(content)
    if _added > _SWEEP_EVERY * limit_bytes():
        _added = 0
        make_room(0)


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=_DIGEST_BYTES).digest()


def make_room(num_bytes: int, *, keep: Path | None = None) -> None:
    """Drop what was not used longest, if `num_bytes` more would pass the limit.

    What someone has open or mapped goes on existing for them; `keep` and what is being fetched stay.
    """
    limit = limit_bytes()
    with _alone() as first:
        if not first:
            return  # another process of this machine is at it
        entries = sorted(_entries(keep))
        held = sum(size for _, size, _ in entries)
        if held + num_bytes <= limit:
            return
        for _, size, path in entries:
            if held + num_bytes <= _FULL * limit:
                return
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
            held -= size


def _entries(keep: Path | None) -> Iterator[tuple[float, int, Path]]:
    """(last used, bytes, path) of all that may be dropped."""
    now = time.time()
    objects, contents = cache_folder() / "objects", cache_folder() / "contents"
    for folder in objects.iterdir() if objects.is_dir() else ():
        found = [path for path in folder.iterdir() if path.name != ".lock"]
        in_work = any(path.suffix == ".tmp" and now - path.stat().st_mtime < _ABANDONED_S for path in found)
        if folder == keep or not found or in_work:
            continue
        files = [path for top in found for path in (top, *top.rglob("*")) if path.is_file()]
        yield folder.stat().st_mtime, sum(path.stat().st_size for path in files), folder
    for folder in contents.iterdir() if contents.is_dir() else ():
        for entry in os.scandir(folder):
            with suppress(FileNotFoundError):
                status = entry.stat()
                if not entry.name.endswith(".tmp") or now - status.st_mtime > _ABANDONED_S:
                    yield status.st_mtime, status.st_size, Path(entry.path)


@contextmanager
def _alone() -> Iterator[bool]:
    """Whether this is the only process of the machine that makes room."""
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".sweep", "w")  # noqa: SIM115
    except OSError:
        yield False
        return
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
            return
        yield True
