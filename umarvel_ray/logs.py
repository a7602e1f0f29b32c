"""What the program says to a log: words for people, or one JSON object a line for machines.

`UMARVEL_LOG=json` turns every record of every process into an object with the time, the node, the process,
the run, the job and, where it is about one, the shard. `UMARVEL_LOG_LEVEL` is the least level to be written.
Ray's workers get both from the process that started them; their lines stand in Ray's log of each worker.
"""

import json
import logging
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

FORMAT_VARIABLE, LEVEL_VARIABLE, RUN_VARIABLE = "UMARVEL_LOG", "UMARVEL_LOG_LEVEL", "UMARVEL_LOG_RUN"
_ROOT = "umarvel_ray"
_context: ContextVar[dict[str, Any] | None] = ContextVar("umarvel_log_context", default=None)
_OWN = set(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName"}
"""What every record has; the rest was given as `extra`."""


class JsonLines(logging.Formatter):
    """A record as one JSON object."""

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        seconds = time.strftime("%FT%T", time.gmtime(record.created))
        said: dict[str, Any] = {
            "time": f"{seconds}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            "node": socket.gethostname(),
            "pid": record.process,
        }
        if run := os.environ.get(RUN_VARIABLE):
            said["run"] = run
        said |= _context.get() or {}
        said |= {key: value for key, value in record.__dict__.items() if key not in _OWN}
        if record.exc_info:
            said["trace"] = self.formatException(record.exc_info)
        return json.dumps(said, default=str, ensure_ascii=False)


def is_json() -> bool:
    """Whether this process writes for machines."""
    return os.environ.get(FORMAT_VARIABLE, "text") == "json"


def configure() -> None:
    """Set this process's log up as the environment says; once more does no harm."""
    level = os.environ.get(LEVEL_VARIABLE, "INFO" if is_json() else "WARNING").upper()
    if not is_json():
        logging.basicConfig(level=level, format="%(levelname)s %(name)s: %(message)s")
        return
    own = logging.getLogger(_ROOT)
    if not any(isinstance(handler.formatter, JsonLines) for handler in own.handlers):
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(JsonLines())
        own.addHandler(handler)
        own.propagate = False
        other = logging.StreamHandler(sys.stderr)
        other.setFormatter(JsonLines())
        other.setLevel(logging.WARNING)
        logging.getLogger().addHandler(other)
    own.setLevel(level)


def for_workers() -> dict[str, str]:
    """Environment that makes a worker's log like this process's; empty where it is for people."""
    names = (FORMAT_VARIABLE, LEVEL_VARIABLE, RUN_VARIABLE)
    return {name: os.environ[name] for name in names if name in os.environ} if is_json() else {}


@contextmanager
def about(**names: Any) -> Iterator[None]:
    """Put these into every record of this thread for the length of a block: `about(job="embed/hard")`."""
    token = _context.set({**(_context.get() or {}), **names})
    try:
        yield
    finally:
        _context.reset(token)
