"""How a run stands, from files alone; how far a step is, told once in a while."""

import time

import pytest
from fixtures_run import Lines, TinyRun

from umarvel_ray.artifacts import claim_folder, finish_folder, read_json, write_json
from umarvel_ray.errors import OutputError
from umarvel_ray.pipeline import progress, view
from umarvel_ray.pipeline.check import RUN_FILE, run_claim
from umarvel_ray.pipeline.lock import LOCK_FILE, describe_process, only_one
from umarvel_ray.pipeline.progress import PROGRESS_FILE, Recorder, Tally
from umarvel_ray.pipeline.status import print_status, status_of


@pytest.fixture
def output(tiny: TinyRun, tmp_path):
    """A run of which one job is finished and one is on."""
    place = tmp_path / "run"
    run = tiny.settings(place)
    claim_folder(place, run_claim(run), claim=RUN_FILE)
    for name in ("text", "align"):
        claim_folder(place / "train" / name, {"job": "train"})
    finish_folder(place / "train" / "text", {"steps": 4, "seconds": 12.5})
    record = Recorder(place / "train" / "align", "train 1b")
    tally = Tally("training", 300, "steps")
    tally.at(100)
    tally.at(150, "loss 3.148")
    record(tally)
    return place


def said(place) -> str:
    lines = Lines()
    print_status(status_of(str(place)), lines)
    return "\n".join(lines.lines)


def test_jobs_are_finished_running_or_waiting(output):
    with only_one(output):
        status = status_of(str(output))
        states = {job.name: job.state for job in status.jobs}
        assert (states["train/text"], states["train/align"]) == ("finished", "running")
        assert set(states.values()) == {"finished", "running", "waiting"}
        assert status.jobs[1].progress["found"] == 100
        text = said(output)
    assert "1 of 22 jobs finished" in text
    assert "150 of 300 steps (50%)" in text and "loss 3.148" in text and "4 steps" in text
    assert "works there, last sign" in text


def test_without_a_beat_a_job_is_interrupted(output):
    assert [job.state for job in status_of(str(output)).jobs][:3] == ["finished", "interrupted", "waiting"]
    assert "nothing works there now; the same command goes on from here" in said(output)


def test_who_is_silent_is_taken_for_dead(output):
    found = {**describe_process(), "host": "node7", "machine": "another"}
    write_json(output / LOCK_FILE, {**found, "beat": 1, "seen": time.time() - 600})
    text = said(output)
    assert "interrupted" in text and "on node7" in text and "silent for 10 min" in text


def test_a_single_job_has_a_status_too(output):
    [job] = status_of(str(output / "train" / "align")).jobs
    assert (job.name, job.state) == ("train", "interrupted")
    with pytest.raises(OutputError, match=r"neither run\.json nor job\.json is there"):
        status_of(str(output / "train"))


def test_a_rate_is_that_of_this_process_s_own_work(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    tally = Tally("embedding", 1000, "records")
    tally.at(600)
    assert (tally.per_s, tally.left_s) == (0.0, None)
    now[0] = 10.0
    tally.at(800, "9 tokens/s")
    assert (tally.per_s, tally.left_s) == (20.0, 10.0)
    assert tally.line() == "embedding 800/1,000 records (80%)  20/s  left 10.0 s  9 tokens/s"


def test_the_file_is_written_now_and_then_and_goes_in_the_end(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    published: list[dict] = []
    record = Recorder(tmp_path, "embed", published.append)
    for done in range(40):
        now[0] = float(done)
        tally = Tally("embedding", 40)
        tally.at(done)
        record(tally)
    assert [figures["done"] for figures in published] == list(range(0, 40, 5))
    assert read_json(tmp_path / PROGRESS_FILE)["done"] == 35
    record(tally, last=True)
    assert read_json(tmp_path / PROGRESS_FILE)["done"] == 39
    record.clear()
    assert list(tmp_path.iterdir()) == []


def test_a_console_that_is_no_terminal_hears_once_a_minute(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(view.time, "monotonic", lambda: now[0])
    lines = Lines()
    with lines.bar("embedding", 300, unit="records") as bar:
        for second in range(150):
            now[0] = float(second)
            bar.advance(1)
    assert len(lines.lines) == 2
    assert lines.lines[0].startswith("  embedding 61/300 records (20%)")
