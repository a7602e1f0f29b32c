"""A job is done once, in a folder of its own, and knows what decided what it reads."""

from pathlib import Path

import pytest
from fixtures_run import Lines, TinyRun, rewrite

from umarvel_ray.artifacts import (
    changed_settings,
    claim_folder,
    finish_folder,
    is_finished,
    read_json,
    write_json,
)
from umarvel_ray.errors import DataError, OutputError
from umarvel_ray.pipeline import jobs
from umarvel_ray.pipeline.jobs import claimed_settings, perform, seconds_of
from umarvel_ray.pipeline.stages import Job, recipe
from umarvel_ray.runtime.cluster import RuntimeSettings

LOCAL = RuntimeSettings(kind="local")


def claims(tiny: TinyRun, output: Path, *overrides: str) -> dict[str, str]:
    """What each job of a run would claim, by name, all folders claimed in order."""
    found = {}
    for job in recipe(tiny.settings(output, *overrides)):
        settings = claimed_settings(job.kind, job.config)
        write_json(Path(job.config.output) / "job.json", settings)  # type: ignore[attr-defined]
        found[job.name] = read_json(Path(job.config.output) / "job.json")  # type: ignore[attr-defined]
    return found


def changed(tiny: TinyRun, output: Path, *overrides: str) -> set[str]:
    """Jobs whose claims a change of settings changes, the report aside."""
    before, now = claims(tiny, output), claims(tiny, output, *overrides)
    return {name for name in before if before[name] != now[name]} - {"report/report"}


def test_a_claim_changes_with_what_lies_upstream_and_with_nothing_else(tiny: TinyRun, tmp_path):
    everything = set(claims(tiny, tmp_path)) - {"report/report"}
    early = {"train/text", "train/align", "train/instruct", "embed/instruct", "search/instruct"}
    # The distillation's rate: that stage, and what is made of it.
    distilled = {f"{kind}/distil" for kind in ("train", "embed", "search", "evaluate")}
    distilled |= {"rerank/distil_reranked", "evaluate/distil_reranked"}
    assert changed(tiny, tmp_path, "stages.distil.train.learning_rate=1e-5") == distilled
    # The mining's number: all but what was there before it, the reranker's start included.
    mined = changed(tiny, tmp_path, "stages.hard.mining.value=3")
    assert mined == everything - early - {"evaluate/instruct"}
    # The first stage: everything.
    assert changed(tiny, tmp_path, "stages.text.train.num_steps=5") == everything
    # Who does the work, and what it is called: nothing.
    assert changed(tiny, tmp_path, "runtime.kind=ray", "runtime.num_actors=7", "title=other") == set()


def test_a_claim_does_not_name_its_own_folder(tiny: TinyRun, tmp_path):
    """The first job reads no other: two folders, one claim."""
    here, there = claims(tiny, tmp_path / "here"), claims(tiny, tmp_path / "there")
    assert here["train/text"] == there["train/text"]
    assert str(tmp_path) not in str(here["train/text"])


def test_a_changed_data_file_is_refused_by_name(tiny: TinyRun, tmp_path):
    """By content: a copy of another age is the same file, one of the same size with another byte is not."""
    import os

    world = tiny.copy(tmp_path / "copy")
    jobs_by_name = {job.name: job for job in recipe(world.settings(tmp_path / "run"))}
    readers = ["train/text", "train/instruct", "mine/negatives", "evaluate/instruct", "rerank/reranked"]
    before = {name: claimed_settings(jobs_by_name[name].kind, jobs_by_name[name].config) for name in readers}
    qrels = next((world.root / "qrels" / "test").glob("*.txt"))
    queries = next((world.root / "query" / "train").glob("*.jsonl"))
    content = queries.read_bytes()
    rewrite(queries, content)
    os.utime(queries, (1, 1))
    assert before == {n: claimed_settings(jobs_by_name[n].kind, jobs_by_name[n].config) for n in readers}
    age = qrels.stat().st_mtime_ns
    for path in (queries, qrels, world.home / "world" / "nli" / "nli_for_simcse.csv"):
        text = path.read_bytes()
        rewrite(path, text[:-1] + (b" " if text[-1:] == b"\n" else b"\n"))
    os.utime(qrels, ns=(age + 1, age + 1))
    now = {name: claimed_settings(jobs_by_name[name].kind, jobs_by_name[name].config) for name in readers}
    found = {name: [key for key, _, _ in changed_settings(before[name], now[name])] for name in readers}
    train = f"data.query/train/{queries.name}"
    test = f"data.qrels/test/{qrels.name}"
    assert found["train/instruct"] == found["mine/negatives"] == [train]
    assert found["evaluate/instruct"] == [test] and set(found["rerank/reranked"]) == {train, test}
    assert found["train/text"] == [f"data.{world.home}/world/nli/nli_for_simcse.csv"]
    job = jobs_by_name["evaluate/instruct"]
    claim_folder(job.config.output, before["evaluate/instruct"])
    with pytest.raises(OutputError, match=rf"1 differ \(first: {test}"):
        perform("evaluate", job.config, LOCAL, Lines())


@pytest.fixture
def mining(tiny: TinyRun, tmp_path: Path) -> Job:
    """A job of the run, its inputs missing."""
    return next(job for job in recipe(tiny.settings(tmp_path / "run")) if job.name == "mine/negatives")


def test_a_job_is_done_once(mining, monkeypatch):
    calls = []

    def work(config, runtime, view):
        calls.append(config)
        return {"queries": 1234, "rule": "margin"}

    monkeypatch.setitem(jobs.JOBS, "mine", (type(mining.config), work))
    view, output = Lines(), mining.config.output
    assert perform("mine", mining.config, LOCAL, view, title="mine them") is True
    assert perform("mine", mining.config, LOCAL, view, title="mine them") is False
    assert calls == [mining.config]
    assert view.lines[0] == "▸ mine them"
    assert view.lines[1].startswith("✓ mine them") and "queries 1,234" in view.lines[1]
    assert view.lines[2] == "✓ mine them: finished before"
    done = read_json(Path(output) / "done.json")
    assert (done["queries"], done["rule"]) == (1234, "margin")
    assert seconds_of(output) == done["seconds"]


def test_a_job_with_other_settings_is_refused_before_it_starts(mining, monkeypatch):
    claim_folder(mining.config.output, claimed_settings("mine", mining.config))
    other = mining.config.model_copy(update={"seed": 9})
    monkeypatch.setitem(jobs.JOBS, "mine", (type(other), lambda *_: pytest.fail("it was started")))
    with pytest.raises(OutputError, match=r"1 differ \(first: settings\.seed was 0, is 9\)"):
        perform("mine", other, LOCAL, Lines())
    finish_folder(mining.config.output, {})
    with pytest.raises(OutputError, match="made with other settings"):
        perform("mine", other, LOCAL, Lines())


@pytest.mark.parametrize("leaves", [False, True])
def test_a_job_that_is_refused_gives_back_a_folder_that_it_left_empty(mining, monkeypatch, leaves):
    output = Path(mining.config.output)

    def work(config, runtime, view):
        if leaves:
            (output / "part.arrow").write_text("rows")
        raise DataError("queries.jsonl:3: not valid JSON. Mend the line.")

    monkeypatch.setitem(jobs.JOBS, "mine", (type(mining.config), work))
    with pytest.raises(DataError):
        perform("mine", mining.config, LOCAL, Lines())
    assert not is_finished(output)
    assert (output / "job.json").exists() == leaves
    other = mining.config.model_copy(update={"seed": 9})
    with pytest.raises(OutputError if leaves else DataError):
        perform("mine", other, LOCAL, Lines())
