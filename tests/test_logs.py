"""Records as JSON: one object a line, with who, where and about what."""

import json
import logging
import subprocess
import sys

import pytest

from umarvel_ray import logs

PROGRAM = """
import logging
from umarvel_ray import logs
logs.configure(); logs.configure()
log = logging.getLogger("umarvel_ray.retrieve.embed")
with logs.about(job="embed/hard"):
    with logs.about(shard=17):
        log.info("written\\nwhole", extra={"rows": 64})
    log.info("next")
log.debug("too little")
logging.getLogger("elsewhere").info("not ours")
logging.getLogger("elsewhere").warning("not ours, but grave")
try:
    1 / 0
except ZeroDivisionError:
    log.exception("failed")
"""


def said(**environment: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        capture_output=True,
        text=True,
        check=True,
        env={**__import__("os").environ, **environment},
    )
    return done.stderr.splitlines()


def test_each_record_is_one_object():
    records = [json.loads(line) for line in said(UMARVEL_LOG="json", UMARVEL_LOG_RUN="runs/a")]
    first, second, other, failed = records
    assert (first["message"], first["job"], first["shard"], first["rows"]) == (
        "written\nwhole", "embed/hard", 17, 64,
    )  # fmt: skip
    assert {"time", "level", "logger", "node", "pid"} <= set(first) and first["run"] == "runs/a"
    assert second["job"] == "embed/hard" and "shard" not in second
    assert (other["logger"], other["level"]) == ("elsewhere", "warning")
    assert "ZeroDivisionError" in failed["trace"] and "job" not in failed


def test_for_people_only_what_is_grave_is_said():
    lines = said()
    assert lines[0] == "WARNING elsewhere: not ours, but grave"
    assert lines[1] == "ERROR umarvel_ray.retrieve.embed: failed"
    assert "INFO umarvel_ray.retrieve.embed: next" in said(UMARVEL_LOG_LEVEL="info")


def test_workers_get_what_they_need_and_no_more(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(logs.LEVEL_VARIABLE, "debug")
    monkeypatch.delenv(logs.FORMAT_VARIABLE, raising=False)
    assert logs.for_workers() == {}
    monkeypatch.setenv(logs.FORMAT_VARIABLE, "json")
    monkeypatch.setenv(logs.RUN_VARIABLE, "runs/a")
    assert logs.for_workers() == {
        "UMARVEL_LOG": "json",
        "UMARVEL_LOG_LEVEL": "debug",
        "UMARVEL_LOG_RUN": "runs/a",
    }
    assert logging.getLogger("umarvel_ray").level == logging.NOTSET  # asking sets nothing up
