"""Whole or not at all; a folder belongs to one job with one set of settings."""

import json
import os
import subprocess
import sys

import pytest

from umarvel_ray.artifacts import (
    atomic_folder,
    atomic_write,
    changed_settings,
    claim_folder,
    file_fingerprint,
    fingerprint,
    finish_folder,
    is_finished,
    read_json,
    write_json,
)
from umarvel_ray.errors import OutputError


class Interrupted(BaseException):
    """Not an Exception: as a stopped process looks from inside."""


@pytest.mark.parametrize("before", [None, "old"])
@pytest.mark.parametrize("fault", [ValueError, Interrupted])
def test_a_file_that_fails_leaves_what_was_there(tmp_path, before, fault):
    path = tmp_path / "run.txt"
    if before:
        path.write_text(before)
    with pytest.raises(fault), atomic_write(path) as file:
        file.write("new, but not all of it")
        raise fault
    assert os.listdir(tmp_path) == (["run.txt"] if before else [])
    assert not before or path.read_text() == before


def test_a_file_appears_at_the_end_of_its_block(tmp_path):
    path = tmp_path / "deep" / "bytes.bin"
    with atomic_write(path, "wb") as file:
        file.write(b"\x00\xff")
        assert not path.exists()
    assert path.read_bytes() == b"\x00\xff"
    assert path.stat().st_mode & 0o777 == 0o644


def test_text_is_utf8_whatever_the_locale(tmp_path):
    write_json(tmp_path / "a.json", {"name": "Ærøskøbing 🪁"})
    assert "Ærøskøbing 🪁".encode() in (tmp_path / "a.json").read_bytes()
    assert read_json(tmp_path / "a.json") == {"name": "Ærøskøbing 🪁"}


def test_a_folder_that_fails_leaves_what_was_there(tmp_path):
    with atomic_folder(tmp_path / "checkpoint") as folder:
        (folder / "weights").write_text("one")
    with pytest.raises(Interrupted), atomic_folder(tmp_path / "checkpoint") as folder:
        (folder / "weights").write_text("two")
        raise Interrupted
    assert os.listdir(tmp_path) == ["checkpoint"]
    assert (tmp_path / "checkpoint" / "weights").read_text() == "one"


def test_a_folder_is_replaced_as_a_whole(tmp_path):
    for name in ("old", "new"):
        with atomic_folder(tmp_path / "checkpoint") as folder:
            (folder / "deep").mkdir()
            (folder / "deep" / name).write_text(name)
    assert os.listdir(tmp_path / "checkpoint" / "deep") == ["new"]


def test_broken_json_is_named_with_its_line(tmp_path):
    (tmp_path / "job.json").write_text('{\n "seed": 1,\n')
    with pytest.raises(OutputError, match=r"job\.json:3: not valid JSON"):
        read_json(tmp_path / "job.json")


def test_a_fingerprint_depends_on_values_alone(tmp_path):
    value = {"b": [1, 2.5, None], "a": {"é": True}}
    reordered = {"a": {"é": True}, "b": [1, 2.5, None]}
    program = f"from umarvel_ray.artifacts import fingerprint; print(fingerprint({reordered!r}))"
    other_process = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONHASHSEED": "7"},
    ).stdout.strip()
    assert fingerprint(value) == fingerprint(reordered) == other_process
    assert len(fingerprint(value)) == 16
    assert fingerprint({"b": [2.5, 1, None], "a": {"é": True}}) != fingerprint(value)


def test_a_file_fingerprint_is_its_sha256(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    # FIPS 180-2, appendix B.1.
    assert file_fingerprint(tmp_path / "abc") == "ba7816bf8f01cfea"


def test_changed_settings_are_dotted_and_sorted():
    before = {"seed": 1, "train": {"steps": 10, "rate": 0.1}, "tasks": ["a"]}
    now = {"seed": 2, "train": {"steps": 10, "rate": 0.2, "warmup": 5}, "tasks": ["a"]}
    assert changed_settings(before, now) == [
        ("seed", 1, 2),
        ("train.rate", 0.1, 0.2),
        ("train.warmup", None, 5),
    ]
    assert changed_settings(before, json.loads(json.dumps(before))) == []


def test_the_same_settings_may_come_back(tmp_path):
    settings = {"seed": 1, "tasks": ("a", "b")}
    claim_folder(tmp_path / "job", settings)
    (tmp_path / "job" / "shard-000.arrow").write_text("rows")
    claim_folder(tmp_path / "job", settings)
    assert read_json(tmp_path / "job" / "job.json") == {"seed": 1, "tasks": ["a", "b"]}
    assert (tmp_path / "job" / "shard-000.arrow").exists()


def test_other_settings_are_refused_by_the_first_that_differs(tmp_path):
    claim_folder(tmp_path / "job", {"seed": 1, "train": {"steps": 10, "rate": 0.1}})
    with pytest.raises(OutputError) as error:
        claim_folder(tmp_path / "job", {"seed": 1, "train": {"steps": 20, "rate": 0.2}})
    message = str(error.value)
    assert f"{tmp_path / 'job'}: made with other settings: 2 differ" in message
    assert "first: train.rate was 0.1, is 0.2" in message
    assert "\n" not in message
    assert read_json(tmp_path / "job" / "job.json")["train"]["steps"] == 10


def test_a_folder_of_someone_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("…")
    (tmp_path / "archive").mkdir()
    with pytest.raises(OutputError, match=r"holds 2 files that are not ours \(first: archive\)"):
        claim_folder(tmp_path, {"seed": 1})
    assert sorted(os.listdir(tmp_path)) == ["archive", "thesis.tex"]


def test_hidden_leftovers_do_not_hold_a_folder(tmp_path):
    (tmp_path / ".job.json.abc.tmp").write_text("from a process that was killed")
    claim_folder(tmp_path, {"seed": 1})
    assert (tmp_path / "job.json").exists()


def test_a_job_is_finished_by_its_last_file(tmp_path):
    claim_folder(tmp_path / "job", {})
    assert not is_finished(tmp_path / "job")
    finish_folder(tmp_path / "job", {"rows": 3})
    assert is_finished(tmp_path / "job")
    assert not is_finished(tmp_path / "never")
