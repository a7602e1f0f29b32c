"""One run at a time in one folder, on a disk or in object storage, whoever starts it and from where.

The one that works in a folder leaves a file there and renews it: its beat. Another that comes watches
it. A beat that moves is alive, and the newcomer is refused by name; one that stands still is dead, and its
folder is taken over. Nothing has to be cleaned up after a kill, and no two machines have to agree on the
time.
"""

import getpass
import os
import signal
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from umarvel_ray.artifacts import read_json, write_json
from umarvel_ray.errors import OutputError
from umarvel_ray.storage import Place, at, is_remote

LOCK_FILE = ".lock.json"
"""Hidden: a folder that holds nothing else is free for other settings."""
_BEAT_S = (5.0, 15.0)
"""Between two beats, on a disk and in object storage."""
_MISSED_BEATS = 3
_SETTLE_S = (0.5, 1.5)
"""What two that take a folder over together wait, to see whose name stands in the end."""

_LEVELS = 2
"""A job's folder is OUTPUT/KIND/NAME: who works in the run works in it."""
_held: set[str] = set()
"""Folders that this process holds."""


def describe_process() -> dict[str, Any]:
    """Who works here: names to tell a person, and what tells this process from all others."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        user = str(os.getuid())
    return {
        "user": user,
        "host": socket.gethostname(),
        "machine": _machine(),
        "pid": os.getpid(),
        "born": _born(os.getpid()),
        "submission": os.environ.get("RAY_JOB_SUBMISSION_ID", ""),
        "token": uuid.uuid4().hex,
    }


@contextmanager
def only_one(
    folder: str | os.PathLike,
    *,
    beat_s: float | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[None]:
    """Hold `folder` and the folders of its jobs for the length of a block; nothing more inside such a block.

    Args:
        folder: An output folder.
        beat_s: Between two beats; by default what suits its storage.
        sleep: Waits.

    Raises:
        OutputError: Another process works there, or took the folder over while this one could not be heard.
    """
    where, remote = at(folder), is_remote(folder)
    above = list(where.parents)[:_LEVELS]
    if _held.intersection(map(str, (where, *above))):
        yield
        return
    beat_s = beat_s or _BEAT_S[remote]
    for run in above:
        _refuse_if_alive(run, _read(run), beat_s=beat_s, sleep=sleep)
    mine = describe_process()
    _acquire(where, mine, beat_s=beat_s, settle_s=_SETTLE_S[remote], sleep=sleep)
    heart = _Heart(where, mine, beat_s)
    _held.add(str(where))
    try:
        with heart:
            yield
    except KeyboardInterrupt:
        if heart.lost:
            raise OutputError(
                f"{folder}: {heart.lost} works there now. This run stops; nothing is lost."
            ) from None
        raise
    finally:
        _held.discard(str(where))
        if not heart.lost and _read(where).get("token") == mine["token"]:
            (where / LOCK_FILE).unlink(missing_ok=True)


def holder(folder: str | os.PathLike) -> dict[str, Any]:
    """Who left a beat in `folder`, dead or alive; empty where nobody did."""
    return _read(at(folder))


def is_here(found: dict[str, Any]) -> bool:
    """Whether a holder is, or was, a process that this one can look for."""
    return bool(found.get("machine")) and found.get("machine") == _machine()


def is_dead_here(found: dict[str, Any]) -> bool:
    """Whether a holder was a process of this machine that is gone."""
    return is_here(found) and _born(int(found.get("pid", 0))) != found.get("born")


def name_of(found: dict[str, Any]) -> str:
    """`ada on node3 (process 17)`."""
    submission = f", submitted as {found['submission']}" if found.get("submission") else ""
    return f"{found.get('user')} on {found.get('host')} (process {found.get('pid')}{submission})"


def _acquire(
    where: Place, mine: dict[str, Any], *, beat_s: float, settle_s: float, sleep: Callable[[float], None]
) -> None:
    found = _read(where)
    if not found and isinstance(where, Path):
        if _create(where, mine):
            return
        found = _read(where)
    _refuse_if_alive(where, found, beat_s=beat_s, sleep=sleep)
    _write(where, mine, since=_now(), beat=0)
    sleep(settle_s)
    found = _read(where)
    if found.get("token") != mine["token"]:
        raise OutputError(
            f"{where}: {name_of(found)} started there at the same moment and goes on. Follow that one."
        )


def _refuse_if_alive(
    where: Place, found: dict[str, Any], *, beat_s: float, sleep: Callable[[float], None]
) -> None:
    # A process of this machine that lives need not be watched.
    if found and not is_dead_here(found) and (is_here(found) or _moves(where, found, beat_s, sleep)):
        raise OutputError(
            f"{where}: {name_of(found)} works there, since {found.get('since')}. Wait for its end, follow it "
            "by `umarvel status`, or give another output folder."
        )


def _create(where: Path, mine: dict[str, Any]) -> bool:
    """Leave the file where none is; a disk can tell who was first."""
    where.mkdir(parents=True, exist_ok=True)
    draft = where / f".lock.{mine['token']}.tmp"
    write_json(draft, {**mine, "since": _now(), "beat": 0, "seen": round(time.time(), 1)})
    try:
        os.link(draft, where / LOCK_FILE)
    except FileExistsError:
        return False
    finally:
        draft.unlink()
    return True


def _moves(where: Place, found: dict[str, Any], beat_s: float, sleep: Callable[[float], None]) -> bool:
    """Whether a beat goes on, watched for as long as a living one can be silent."""
    for _ in range(2 * _MISSED_BEATS):
        sleep(beat_s / 2)
        _forget_old_names(where)
        now = _read(where)
        if not now:
            return False  # it ended well
        if (now.get("token"), now.get("beat")) != (found.get("token"), found.get("beat")):
            return True
    return False


def _forget_old_names(where: Place) -> None:
    """A network disk shows a folder as it was a minute ago, until this machine changes something in it."""
    if isinstance(where, Path):
        with suppress(OSError), tempfile.NamedTemporaryFile(prefix=".look.", suffix=".tmp", dir=where):
            pass


class _Heart:
    """Renews the file from a thread; interrupts this process where another has taken the folder."""

    def __init__(self, where: Place, mine: dict[str, Any], beat_s: float) -> None:
        self._where, self._mine, self._beat_s = where, mine, beat_s
        self._since = _now()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="lock", daemon=True)
        self.lost = ""

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()

    def _work(self) -> None:
        beat = 0
        while not self._stop.wait(self._beat_s):
            try:
                found = _read(self._where)
                if found.get("token") not in (None, self._mine["token"]):
                    self.lost = name_of(found)
                    # A signal, like Ctrl-C, wakes the main thread from a wait; `interrupt_main` does not.
                    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
                    return
                beat += 1
                _write(self._where, self._mine, since=self._since, beat=beat)
            except (OSError, OutputError):
                continue  # storage that is away for a beat; the work itself will say if it stays away


def _read(where: Place) -> dict[str, Any]:
    try:
        found = read_json(where / LOCK_FILE)
    except (OSError, OutputError):
        return {}
    return found if isinstance(found, dict) else {}


def _write(where: Place, mine: dict[str, Any], *, since: str, beat: int) -> None:
    write_json(where / LOCK_FILE, {**mine, "since": since, "beat": beat, "seen": round(time.time(), 1)})


def _now() -> str:
    return time.strftime("%F %T UTC", time.gmtime())


def _machine() -> str:
    """Names this boot of this machine and this container; empty where the system does not tell."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _born(pid: int) -> str:
    """When a process started, in the kernel's ticks; empty where there is none, or only its ashes."""
    try:
        # After the name in brackets, which may hold blanks: the state first, the start as the 20th field.
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        return "" if fields[0] in "ZX" else fields[19]
    except (OSError, IndexError):
        return ""
