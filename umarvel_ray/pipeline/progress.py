"""How far a job is, told to whoever looks: a small file in its folder, and Ray's metrics.

The file is written every few seconds beside the job's results, on a disk or in object storage, so that
`umarvel status` needs no cluster.
"""

import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from umarvel_ray.artifacts import write_json
from umarvel_ray.errors import UmarvelError
from umarvel_ray.storage import at, is_remote

PROGRESS_FILE = ".progress.json"
logger = logging.getLogger(__name__)
_EVERY_S = (5.0, 20.0)
"""Between two writings, on a disk and in object storage."""


@dataclass
class Tally:
    """One long step: how much of it is done, and how fast it goes.

    Attributes:
        step: What is done: `embedding`.
        total: Of it, in `unit`.
        unit: Rows, steps, queries.
        found: Done before this process began.
        done: By now, `found` included.
        note: A rate in the step's own words.
    """

    step: str
    total: float
    unit: str = ""
    found: float | None = None
    done: float = 0.0
    note: str = ""
    _started: float = field(default_factory=time.monotonic)

    def at(self, done: float, note: str = "") -> None:
        """So much is done. What the first call says was found done."""
        if self.found is None:
            self.found = done
            self._started = time.monotonic()
        self.done, self.note = done, note or self.note

    @property
    def per_s(self) -> float:
        """Of this process's own work."""
        seconds = time.monotonic() - self._started
        return (self.done - (self.found or 0.0)) / seconds if seconds > 0 else 0.0

    @property
    def left_s(self) -> float | None:
        """Until the end at this rate; None before there is one."""
        return (self.total - self.done) / self.per_s if self.per_s > 0 else None

    def line(self) -> str:
        """`embedding 1,024/34,936 rows (3 %)  212/s  left 2 min 40 s  9,104 tokens/s`."""
        share = f" ({self.done / self.total:.0%})" if self.total else ""
        unit = f" {self.unit}" if self.unit else ""
        left = f"  left {short_time(self.left_s)}" if self.left_s is not None else ""
        rate = f"  {self.per_s:,.3g}/s" if self.per_s else ""
        note = f"  {self.note}" if self.note else ""
        return f"{self.step} {self.done:,.0f}/{self.total:,.0f}{unit}{share}{rate}{left}{note}"

    def figures(self) -> dict[str, Any]:
        """For a file."""
        return {
            "step": self.step,
            "unit": self.unit,
            "done": self.done,
            "total": self.total,
            "found": self.found or 0.0,
            "per_s": round(self.per_s, 4),
            "left_s": None if self.left_s is None else round(self.left_s, 1),
            "note": self.note,
        }


class Recorder:
    """Keeps a job's file and metrics up to date; never in the way of the work.

    Args:
        folder: The job's output.
        job: Its title.
        publish: Takes figures by name: Ray's metrics.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        job: str,
        publish: Callable[[dict[str, float]], None] = lambda figures: None,
    ) -> None:
        self._where = at(folder)
        self._job = job
        self._publish = publish
        self._every_s = _EVERY_S[is_remote(folder)]
        self._started = time.time()
        self._due = 0.0

    def __call__(self, tally: Tally, *, last: bool = False) -> None:
        """Note where a step is, if it is time again."""
        now = time.monotonic()
        if now < self._due and not last:
            return
        self._due = now + self._every_s
        figures = tally.figures()
        self._publish({key: figures[key] for key in ("done", "total", "per_s")})
        logger.info("progress", extra=figures)
        try:
            write_json(
                self._where / PROGRESS_FILE,
                {"job": self._job, **figures, "started": self._started, "updated": time.time()},
            )
        except (OSError, UmarvelError):
            return  # whoever looks sees an older state; the work's own files matter more

    def clear(self) -> None:
        """The job is over; `done.json` says the rest."""
        try:
            (self._where / PROGRESS_FILE).unlink(missing_ok=True)
        except (OSError, UmarvelError):
            return


def short_time(seconds: float) -> str:
    """`4.2 s`, `3 min 05 s`, `2 h 10 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
