"""A part of a job by name: what parts make together is what the whole makes; what is finished is made again
beside it."""

from pathlib import Path

import numpy as np
import pytest
from fixtures_run import Lines, TinyRun

from umarvel_ray.artifacts import is_finished
from umarvel_ray.errors import ConfigError, OutputError
from umarvel_ray.pipeline.jobs import perform
from umarvel_ray.pipeline.only import EVERYTHING, Only, split_only
from umarvel_ray.pipeline.parts import do_part
from umarvel_ray.pipeline.run import chosen_jobs, run_recipe
from umarvel_ray.pipeline.stages import recipe
from umarvel_ray.retrieve.settings import EmbedConfig
from umarvel_ray.runtime.cluster import RuntimeSettings
from umarvel_ray.train.settings import StageConfig

LOCAL = RuntimeSettings(kind="local")


def embedding(tiny: TinyRun, output: Path, **changes: object) -> EmbedConfig:
    """A job of some stores in shards of seven rows."""
    settings = {
        "checkpoint": str(tiny.home / "backbone"),
        "root": str(tiny.root),
        "output": str(output),
        "tasks": ("mscoco_task0", "webqa_task1"),
        "rows_per_shard": 7,
        "dtype": "float32",
    }
    return EmbedConfig.model_validate(settings | changes)


def files(output: Path) -> dict[str, bytes]:
    """Every shard and manifest."""
    return {
        str(path.relative_to(output)): path.read_bytes()
        for path in sorted(output.rglob("*"))
        if path.suffix == ".arrow" or path.name == "manifest.json"
    }


@pytest.fixture(scope="module")
def whole(tiny: TinyRun) -> Path:
    """The job done in one go."""
    output = tiny.home / "whole"
    perform("embed", embedding(tiny, output), LOCAL, Lines())
    return output


@pytest.mark.slow
def test_parts_make_what_the_whole_makes(tiny, whole, tmp_path):
    """In any order, one of them twice."""
    config = embedding(tiny, tmp_path / "parts")
    for part in ("2/3", "0/3", "2/3"):
        do_part("embed", config, LOCAL, Lines(), Only(part=part))
        assert not is_finished(config.output) and not list(Path(config.output).rglob("manifest.json"))
    before = {path: path.stat().st_mtime_ns for path in Path(config.output).rglob("shard-*.arrow")}
    assert len(before) > 3
    perform("embed", config, LOCAL, Lines())
    assert files(tmp_path / "parts") == files(whole)
    assert all(path.stat().st_mtime_ns == written for path, written in before.items())


def test_parts_are_disjoint_and_together_everything():
    shards = range(50)
    parts = [[n for n in shards if Only(part=f"{i}/7").takes(n)] for i in range(7)]
    assert sorted(number for part in parts for number in part) == list(shards)
    assert [n for n in shards if Only(shard=17).takes(n)] == [17]
    assert [n for n in shards if EVERYTHING.takes(n)] == list(shards)


def test_one_shard_is_made_and_then_held_against_itself(tiny, whole, tmp_path):
    config = embedding(tiny, tmp_path / "one")
    said = Lines()
    do_part("embed", config, LOCAL, said, Only(shard=2))
    [made] = [name for name in files(tmp_path / "one")]
    assert said.lines[0].startswith("1 shards written, ")
    if "shard-" in made:  # else it takes vectors from others, and waits for them
        assert files(tmp_path / "one")[made] == files(whole)[made]
    before = files(whole)
    said = Lines()
    do_part("embed", embedding(tiny, whole), LOCAL, said, Only(shard=2))
    assert said.lines[0].endswith("vectors are the same to the last bit")
    assert files(whole) == before


def test_a_shard_that_is_not_what_the_settings_make_is_found(tiny, tmp_path):
    from umarvel_ray.retrieve.embed import plan_stores
    from umarvel_ray.retrieve.store import open_shard, write_shard

    config = embedding(tiny, tmp_path / "wrong", duplicates="each")
    perform("embed", config, LOCAL, Lines())
    plan = plan_stores(config)[0]
    shard = plan.shards[0]
    _, ids, vectors_ND = open_shard(plan.folder / shard.file_name)
    vectors_ND = np.array(vectors_ND)
    vectors_ND[0] = vectors_ND[1]
    write_shard(plan.folder, shard, ids, vectors_ND, dtype="float32", fingerprint=plan.fingerprint)
    said = Lines()
    do_part("embed", config, LOCAL, said, Only(shard=0))
    assert f"1 of {shard.num_rows} vectors differ (first: {ids[0]}, by " in said.lines[0]


def test_what_cannot_be_done_in_parts_is_refused(tiny, whole, tmp_path):
    with pytest.raises(ConfigError, match=r"only\.shard=9999: this job has \d+ shards, 0 to \d+\.$"):
        do_part("embed", embedding(tiny, whole), LOCAL, Lines(), Only(shard=9999))
    with pytest.raises(OutputError, match="made with other settings"):
        do_part("embed", embedding(tiny, whole, rows_per_shard=8), LOCAL, Lines(), Only(shard=0))
    run = tiny.settings(tmp_path / "run")
    search = next(job for job in recipe(run) if job.kind == "search")
    with pytest.raises(ConfigError, match="parts of an embedding job, this is search"):
        do_part("search", search.config, LOCAL, Lines(), Only(shard=0))


def test_of_a_run_one_job_is_chosen_by_name(tiny, tmp_path):
    run = tiny.settings(tmp_path / "run")
    jobs = recipe(run)
    assert chosen_jobs(jobs, EVERYTHING) == jobs
    assert [job.name for job in chosen_jobs(jobs, Only(job="embed/hard"))] == ["embed/hard"]
    with pytest.raises(
        ConfigError, match=r"only\.job=embed/hrad: this run has no such job\. There are: train/"
    ):
        chosen_jobs(jobs, Only(job="embed/hrad"))
    with pytest.raises(ConfigError, match=r"Name it by only\.job"):
        run_recipe(run, Lines(), Only(shard=1))


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("only.shard=x", r"only: setting 'shard'"),
        ("only.shrad=1", r"unknown setting 'shrad'.* Known keys there: job, shard, part, batch"),
        ("only.part=16/16", r"give NUMBER/COUNT, the number from 0 and less than the count"),
        ("only.shard", r"not of the form only\.key=value"),
    ],
)
def test_a_part_that_is_none_is_refused(override, said):
    with pytest.raises(ConfigError, match=said):
        split_only([override])


def test_parts_are_no_settings():
    only, rest = split_only(["seed=3", "only.job=embed/hard", "only.shard=17", "only=[pools/a]"])
    assert (only.job, only.shard, rest) == ("embed/hard", 17, ["seed=3", "only=[pools/a]"])
    assert split_only(["only.part=all"])[0].is_everything


@pytest.fixture(scope="module")
def trained(tiny: TinyRun) -> tuple[StageConfig, RuntimeSettings]:
    """The first stage, done: four steps, states after the second and the fourth."""
    run = tiny.settings(tiny.home / "looked_at")
    job = next(job for job in recipe(run) if job.name == "train/text")
    assert isinstance(job.config, StageConfig)
    perform("train", job.config, run.runtime, Lines())
    return job.config, run.runtime


def test_a_batch_is_what_it_was(trained):
    """From the state just before it: loss and gradient norm to the last bit."""
    config, runtime = trained
    before = sorted(path.stat().st_mtime_ns for path in Path(config.output).rglob("*") if path.is_file())
    said = Lines()
    do_part("train", config, runtime, said, Only(batch=3))
    text = "\n".join(said.lines)
    assert "batch 3 of " in text and "weights of step 2:" in text
    assert "  loss: the same" in said.lines and "  grad_norm: the same" in said.lines
    [samples] = [line for line in said.lines if " queries: " in line]
    assert samples.split(":")[0].strip() == "8 queries"
    assert sorted(p.stat().st_mtime_ns for p in Path(config.output).rglob("*") if p.is_file()) == before


def test_a_batch_without_its_state_has_the_weights_that_are_there(trained):
    config, runtime = trained
    said = Lines()
    do_part("train", config, runtime, said, Only(batch=2))
    assert any("weights of step 0:" in line for line in said.lines)
    assert not any("the same" in line for line in said.lines)
    with pytest.raises(ConfigError, match=r"no step 5: this training has steps 1 to 4\.$"):
        do_part("train", config, runtime, Lines(), Only(batch=5))
    with pytest.raises(ConfigError, match=r"only\.batch is a part of a training, this is embed"):
        do_part(
            "embed", embedding(TinyRun(Path("/"), Path("/")), Path("/out")), LOCAL, Lines(), Only(batch=1)
        )
