"""A plan beside a run that was done: the same records, about the same tokens, a rate for each kind of job."""

from pathlib import Path

import pytest

from umarvel_ray.artifacts import read_json, write_json
from umarvel_ray.errors import ConfigError
from umarvel_ray.pipeline.stages import recipe
from umarvel_ray.plan.costs import shape_of
from umarvel_ray.plan.items import world_of
from umarvel_ray.plan.make import Request, make_plan, samples_of
from umarvel_ray.plan.work import Crew, work_of

pytestmark = pytest.mark.slow


def test_records_are_counted_and_tokens_estimated_from_a_sample(finished):
    run, _ = finished
    works = work_of(run, world_of(run, image_tokens=0), shape_of(run.backbone), Crew(2, 2, 1))
    for work in works:
        if work.kind not in ("embed", "train"):
            continue
        done = read_json(Path(run.output) / work.job / "done.json")
        if work.kind == "embed":
            assert work.amount == done["rows"], work.job
            tokens = float(work.note.split(", ")[1].removesuffix(" tokens").replace(",", ""))
            assert tokens / done["rows"] == pytest.approx(done["tokens"] / done["items_embedded"], rel=0.15)
        if work.kind == "train":
            assert work.note.startswith(f"{done['steps']:,} steps, ")


def test_every_kind_of_job_has_its_rate(finished, tmp_path):
    run, _ = finished
    jobs = recipe(run)
    assert len(samples_of(run.output)) == len(jobs)
    plan = make_plan(run, Request(rates_from=(run.output,)))
    assert plan.machine.name == "cpu" and plan.crew.workers == 2
    assert {one.work.kind for one in plan.estimates} == set(plan.rates) == {job.kind for job in jobs}
    assert all(one.measured for one in plan.estimates)
    assert all(off >= 1 for off in plan.rates_off.values())
    total = sum(read_json(Path(job.config.output) / "done.json")["seconds"] for job in jobs)  # type: ignore[attr-defined]
    assert total / 3 < plan.seconds < 3 * total  # jobs of a second each, on a machine that others use


def test_a_job_that_was_done_in_two_goes_gives_no_rate(finished, tmp_path):
    run, _ = finished
    done = Path(run.output) / "train" / "text" / "done.json"
    before = read_json(done)
    try:
        write_json(done, {**before, "resumed": True})
        assert len(samples_of(run.output)) == len(recipe(run)) - 1
    finally:
        write_json(done, before)
    with pytest.raises(ConfigError, match=r"no run\.json, so no run to learn from"):
        samples_of(str(tmp_path))
