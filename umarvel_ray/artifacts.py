"""How anything reaches the disk: whole or not at all, and with a manifest that says what decided it.

A job owns one folder, on a disk or in object storage. `job.json` is written when it starts and claims the
folder for its settings; `done.json` is written last and makes the job finished. Files between them appear by
rename, or by an upload that is visible when it is complete.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from umarvel_ray.errors import OutputError
from umarvel_ray.storage import RemotePath, at, cache_folder, local_file

JOB_FILE = "job.json"
DONE_FILE = "done.json"

_MANY_FILES = 256
"""Beyond, one sync of the machine's disks is quicker than one per file."""


def fingerprint(value: Any) -> str:
    """16 hex digits that name `value`, which must be JSON: the same for equal values in any process."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def file_fingerprint(path: str | os.PathLike) -> str:
    """16 hex digits that name a file's content."""
    with open(local_file(path), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def data_fingerprint(path: str | os.PathLike) -> str:
    """As `file_fingerprint`, for large files that many jobs ask about: read once per machine.

    The name is that of the content, so it means the same on every machine and survives a copy or a `touch`.
    Size and time of change only tell this machine that it has read this very file before.
    """
    found = at(path)
    status = found.stat()
    known = fingerprint([str(found), status.st_size, status.st_mtime_ns])
    kept = cache_folder() / "fingerprints" / known
    if status.st_mtime_ns and kept.is_file():  # not every store tells a file's age
        return kept.read_text(encoding="utf-8")
    name = file_fingerprint(found)
    with suppress(OSError), atomic_write(kept) as file:  # a machine without a writable cache reads again
        file.write(name)
    return name


@contextmanager
def atomic_write(path: str | os.PathLike, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a file that appears under `path` only when the block ends well."""
    target = at(path)
    if isinstance(target, RemotePath):
        with tempfile.NamedTemporaryFile(mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            target.upload(file.name)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
    try:
        with os.fdopen(handle, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    _sync_folder(target.parent)


@contextmanager
def atomic_folder(path: str | os.PathLike) -> Iterator[Path]:
    """A folder that appears under `path` only when the block ends well; one that stands there is replaced.

    Yields a local folder. Object storage knows no renaming of folders: there the files are uploaded one by
    one, JSON last, so that who finds a checkpoint's settings or a state's step finds the weights too.
    """
    target = at(path)
    if isinstance(target, RemotePath):
        with tempfile.TemporaryDirectory() as name:
            yield Path(name)
            target.remove_tree()
            files = [file for file in Path(name).rglob("*") if file.is_file()]
            for file in sorted(files, key=lambda file: (file.suffix == ".json", file)):
                (target / file.relative_to(name).as_posix()).upload(file)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
    os.chmod(temporary, 0o755)
    try:
        yield temporary
        _sync_files([file for file in temporary.rglob("*") if file.is_file()])
        if target.exists():
            shutil.rmtree(target)
        os.replace(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _sync_folder(target.parent)


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Write JSON by rename, indented for people."""
    with atomic_write(path) as file:
        json.dump(value, file, indent=1, ensure_ascii=False)
        file.write("\n")


def read_json(path: str | os.PathLike) -> Any:
    """Read a JSON file; a broken one is an OutputError that names it."""
    try:
        return json.loads(at(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise OutputError(
            f"{path}:{error.lineno}: not valid JSON ({error.msg}). Remove the file and run again."
        ) from None


def changed_settings(before: Any, now: Any, prefix: str = "") -> list[tuple[str, Any, Any]]:
    """Dotted keys whose values differ, as (key, before, now), in sorted order."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        found = []
        for key in sorted({*before, *now}):
            found += changed_settings(before.get(key), now.get(key), f"{prefix}{key}.")
        return found
    return [] if before == now else [(prefix.rstrip("."), before, now)]


def claim_folder(folder: str | os.PathLike, settings: Mapping[str, Any], *, claim: str = JOB_FILE) -> None:
    """Make `folder` the output of what these settings describe.

    Args:
        folder: Made where it is missing.
        settings: Everything that decides its content; must be JSON.
        claim: Name of the file that says so.

    Raises:
        OutputError: It was made with other settings, or holds files of something else.
    """
    if not is_claimed(folder, settings, claim=claim):
        write_json(at(folder) / claim, settings)


def is_claimed(folder: str | os.PathLike, settings: Mapping[str, Any], *, claim: str = JOB_FILE) -> bool:
    """Whether `folder` was claimed with these very settings before; False where it is free. Writes nothing.

    Raises:
        OutputError: As in `claim_folder`.
    """
    folder = at(folder)
    claim_file = folder / claim
    if claim_file.exists():
        if changes := changed_settings(read_json(claim_file), json.loads(json.dumps(settings))):
            key, before, now = changes[0]
            raise OutputError(
                f"{folder}: made with other settings: {len(changes)} differ (first: {key} was {before!r}, is "
                f"{now!r}). Give another output folder, or remove this one to start again."
            )
        return True
    if folder.exists() and (strangers := sorted(x.name for x in folder.iterdir() if x.name[0] != ".")):
        raise OutputError(
            f"{folder}: holds {len(strangers)} files that are not ours (first: {strangers[0]}). "
            "Give another output folder."
        )
    return False


def release_folder(folder: str | os.PathLike, *, claim: str = JOB_FILE) -> None:
    """Give back a folder that holds nothing but its claim, so that corrected settings may take it."""
    folder = at(folder)
    if [x.name for x in folder.iterdir() if x.name[0] != "."] == [claim]:
        (folder / claim).unlink()


def is_finished(folder: str | os.PathLike) -> bool:
    """Whether the job that owns `folder` wrote its last file."""
    return (at(folder) / DONE_FILE).exists()


def finish_folder(folder: str | os.PathLike, summary: Mapping[str, Any]) -> None:
    """Mark the job that owns `folder` as finished, with its counts and figures."""
    write_json(at(folder) / DONE_FILE, summary)


def _sync_files(files: Sequence[Path]) -> None:
    if len(files) > _MANY_FILES:
        os.sync()
        return
    for file in files:
        with open(file, "rb") as handle:
            os.fsync(handle.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
