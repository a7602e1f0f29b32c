"""One run at a time in a folder: the living are respected by name, the dead are not waited for."""

import multiprocessing
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from umarvel_ray.artifacts import read_json, write_json
from umarvel_ray.errors import OutputError
from umarvel_ray.pipeline import lock
from umarvel_ray.pipeline.lock import LOCK_FILE, describe_process, holder, is_dead_here, only_one


def elsewhere(folder: Path, *, beat: int = 3) -> dict:
    """Leave the file of a process on another machine."""
    found = {**describe_process(), "host": "node7", "machine": "another", "user": "ada", "pid": 17}
    write_json(folder / LOCK_FILE, {**found, "since": "yesterday", "beat": beat, "seen": time.time()})
    return found


def test_the_file_is_there_for_the_length_of_the_block(tmp_path):
    with only_one(tmp_path / "run"):
        assert holder(tmp_path / "run")["pid"] == os.getpid()
    assert list((tmp_path / "run").iterdir()) == []


def test_who_holds_a_run_holds_its_jobs(tmp_path):
    job = tmp_path / "run" / "embed" / "hard"
    with only_one(tmp_path / "run"):
        with only_one(job), only_one(job):
            assert not (job / LOCK_FILE).exists()
        assert (tmp_path / "run" / LOCK_FILE).exists()
    with only_one(job):
        assert (job / LOCK_FILE).exists()


def test_one_that_was_killed_is_followed_at_once(tmp_path):
    program = (
        "import sys, time\nfrom umarvel_ray.pipeline.lock import only_one\n"
        "with only_one(sys.argv[1]):\n    print('held', flush=True)\n    time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"held\n"
    for folder in (tmp_path, tmp_path / "embed" / "hard"):
        with (
            pytest.raises(OutputError, match=rf"process {process.pid}\) works there, since"),
            only_one(folder, sleep=lambda s: pytest.fail("nothing to watch")),
        ):
            pass
    process.kill()  # not waited for: dead, though its parent has not looked
    deadline = time.monotonic() + 10
    while not is_dead_here(holder(tmp_path)):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    with only_one(tmp_path):
        assert holder(tmp_path)["pid"] == os.getpid()
    process.wait()


def test_a_beat_that_moves_is_alive_and_one_that_stands_is_dead(tmp_path):
    """Whatever its clock says: nobody looks at the other machine's time."""
    found = elsewhere(tmp_path)
    beats = iter(range(4, 100))

    def alive(seconds: float) -> None:
        write_json(tmp_path / LOCK_FILE, {**found, "beat": next(beats), "seen": 0})

    with (
        pytest.raises(OutputError, match=r"ada on node7 \(process 17\) works there"),
        only_one(tmp_path, sleep=alive),
    ):
        pass
    slept: list[float] = []
    with only_one(tmp_path, beat_s=2, sleep=slept.append):
        assert holder(tmp_path)["pid"] == os.getpid()
    assert sum(slept) == 3 * 2 + lock._SETTLE_S[0]  # three beats missed, and a look at who else came


def test_one_that_ends_while_it_is_watched_gives_way(tmp_path):
    elsewhere(tmp_path)

    def end(seconds: float) -> None:
        if seconds != lock._SETTLE_S[0]:
            (tmp_path / LOCK_FILE).unlink()

    with only_one(tmp_path, sleep=end):
        assert holder(tmp_path)["pid"] == os.getpid()


def test_of_two_that_take_over_at_once_one_goes_on(tmp_path):
    elsewhere(tmp_path)
    other = {**describe_process(), "user": "grace"}

    def settle(seconds: float) -> None:
        if seconds == lock._SETTLE_S[0]:  # the other's name stands at the end
            write_json(tmp_path / LOCK_FILE, other)

    with (
        pytest.raises(OutputError, match=r"grace on .* started there at the same moment"),
        only_one(tmp_path, beat_s=0.01, sleep=settle),
    ):
        pass
    assert holder(tmp_path)["token"] == other["token"]


def hold(folder: str, start: float, results: "multiprocessing.Queue[str]") -> None:
    while time.time() < start:
        pass
    try:
        with only_one(folder):
            results.put("worked")
            time.sleep(1.5)
    except OutputError as error:
        results.put(str(error))


def test_of_many_processes_one_works(tmp_path):
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    start = time.time() + 0.5
    crowd = [context.Process(target=hold, args=(str(tmp_path), start, results)) for _ in range(8)]
    for one in crowd:
        one.start()
    said = [results.get(timeout=20) for _ in crowd]
    for one in crowd:
        one.join()
    assert said.count("worked") == 1, said
    assert all("works there" in line for line in said if line != "worked")


def test_the_beat_goes_on_and_a_folder_that_was_taken_is_let_go(tmp_path):
    with (
        pytest.raises(OutputError, match=r"ada on node7 .* works there now\. This run stops"),
        only_one(tmp_path, beat_s=0.05),
    ):
        deadline = time.monotonic() + 10
        while read_json(tmp_path / LOCK_FILE)["beat"] < 2:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        elsewhere(tmp_path)
        threading.Event().wait(10)
    assert holder(tmp_path)["user"] == "ada"  # not ours to remove
