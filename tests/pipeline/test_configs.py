"""The settings files we ship: each loads, and each run's jobs stand in an order that misses nothing."""

from pathlib import Path

import pytest

from umarvel_ray.config import load_config
from umarvel_ray.pipeline.run import load_job, load_run
from umarvel_ray.pipeline.settings import RunConfig
from umarvel_ray.pipeline.stages import Job, recipe
from umarvel_ray.pipeline.sweep import load_sweep, plan_sweep

CONFIGS = Path(__file__).parents[2] / "configs"
RUNS = sorted(CONFIGS.glob("mbeir_*.yaml"))
JOBS = sorted((CONFIGS / "jobs").glob("*.yaml"))
ALL_CONTROLS = "controls=[in_batch, unfiltered, own_negatives, continue_hard]"

PRODUCTS = {
    "train": ("checkpoint", "metrics.jsonl"),
    "embed": ("",),
    "search": ("", "test"),
    "mine": ("negatives.arrow", "mining_report.json"),
    "rerank": ("", "test", "teacher.arrow", "alpha.json"),
    "evaluate": ("results.json",),
    "report": (),
    "compare": (),
}
"""What later jobs may read in a job's folder, as docs/formats.md tells it."""


def paths_under(value: object, root: str) -> set[str]:
    if isinstance(value, dict):
        return set().union(*(paths_under(item, root) for item in value.values()))
    if isinstance(value, list):
        return set().union(*(paths_under(item, root) for item in value))
    return {value} if isinstance(value, str) and value.startswith(root) else set()


def first_missing(jobs: list[Job], root: str) -> str | None:
    """The first file that a job reads and no job before it writes."""
    made: set[str] = set()
    for job in jobs:
        wanted = paths_under(job.config.model_dump(mode="json", exclude={"output"}), root)
        if missing := sorted(wanted - made):
            return f"{job.name} reads {missing[0]}"
        made |= {str(Path(root, job.name, product)) for product in PRODUCTS[job.kind]}
    return None


def test_there_is_an_example_of_every_job():
    assert {path.stem for path in JOBS} == set(PRODUCTS)
    assert len(RUNS) >= 2


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
@pytest.mark.parametrize("overrides", [[], [ALL_CONTROLS]], ids=["recipe", "controls"])
def test_every_input_of_a_run_is_another_jobs_product(path, overrides):
    run = load_run(path, overrides)
    jobs = recipe(run)
    assert first_missing(jobs, run.output) is None
    assert len({job.config.output for job in jobs}) == len(jobs)  # type: ignore[attr-defined]
    names = {"report" if job.kind == "report" else job.name for job in jobs}
    assert {job.config.output for job in jobs} == {f"{run.output}/{name}" for name in names}  # type: ignore[attr-defined]


def test_a_job_before_what_it_reads_would_be_seen():
    run = load_run(RUNS[0], [])
    backwards = list(reversed(recipe(run)))
    assert first_missing(backwards, run.output) is not None


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_a_single_job_loads(path):
    settings, runtime = load_job(path.stem, path, [])
    assert settings.output.startswith("/data/runs/single/")
    assert runtime.kind == ("local" if path.stem in ("mine", "evaluate", "report", "compare") else "ray")


EVALUATIONS = sorted((CONFIGS / "evaluate").glob("*.yaml"))


@pytest.mark.parametrize("path", EVALUATIONS, ids=lambda path: path.stem)
def test_an_example_of_every_way_to_evaluate_loads(path):
    settings, _ = load_job("evaluate", path, [])
    given = {
        name
        for name in ("root", "own", "zeroshot", "runs", "embeddings", "vectors")
        if getattr(settings, name) is not None
    }
    wanted = {"model": {"root"}, "vectors": {"root", "vectors"}, "own": {"own"}, "zeroshot": {"zeroshot"}}
    assert given == wanted[path.stem]


def test_the_papers_run_is_table_12s():
    """Table 12 of arXiv:2507.14902: batch, rate, LoRA rank and alpha, epochs."""
    run = load_config(CONFIGS / "mbeir_qwen2vl_7b.yaml", RunConfig)
    table = {
        "text": (576, 2e-4, 64, 128, 2),
        "align": (720, 1e-4, 128, 256, 1),
        "instruct": (3840, 4e-4, 128, 256, 1),
        "hard": (1408, 1.5e-5, 128, 256, 1),
        "distil": (50, 1e-5, 128, 256, 1),
        "reranker": (128, 2e-5, 128, 256, 1),
    }
    trains = {name: getattr(run.stages, name).train for name in table}
    assert {
        name: (train.batch_size, train.learning_rate, train.lora.rank, train.lora.alpha, train.num_epochs)
        for name, train in trains.items()
    } == table
    learned = {name for name, train in trains.items() if train.learn_temperature}
    assert learned == {"instruct", "hard", "distil"}
    assert run.encoder.images.max_pixels == 300 * 28 * 28
    assert (run.runtime.num_workers, run.runtime.gpus) == (64, 1)


def test_the_one_gpu_run_differs_in_hardware_and_backbone_alone():
    """Lengths, batches and rates are the paper's; how often states are saved is not a matter of results."""
    paper, small = (
        load_config(CONFIGS / f"mbeir_qwen2vl_{name}.yaml", RunConfig) for name in ("7b", "2b_one_gpu")
    )
    for name in type(paper.stages).model_fields:
        stages = [getattr(run.stages, name).model_dump() for run in (paper, small)]
        for stage in stages:
            del stage["train"]["save_every"]
        assert stages[0] == stages[1], name
    assert (small.runtime.num_workers, small.runtime.num_actors, small.runtime.gpus) == (1, 1, 1)


STAGES = ("text", "align", "instruct", "hard", "reranker", "distil")


@pytest.mark.parametrize("name", [*STAGES, "continue_hard"])
def test_every_row_of_table_12_is_a_file_of_its_own(name):
    """What decides the result is what the run of all stages says, and so is every path."""
    alone, runtime = load_job("train", CONFIGS / "qwen2vl_7b" / f"{name}.yaml", [])
    run = load_run(CONFIGS / "mbeir_qwen2vl_7b.yaml", ["controls=[continue_hard]"])
    whole = next(job.config for job in recipe(run) if job.name == f"train/{name}")
    watching = {"save_every", "validation", "trackers"}
    for field in ("model", "start", "output", "seed", "dtype", "loss", "pairs"):
        assert getattr(alone, field) == getattr(whole, field), field
    assert alone.train.model_dump(exclude=watching) == whole.train.model_dump(exclude=watching)
    assert alone.data.model_dump(exclude={"teacher"}) == whole.data.model_dump(exclude={"teacher"})
    assert runtime.num_workers == {"text": 8, "align": 16}.get(name, 64)


def test_the_experiment_on_workers_needs_the_gradient_cache():
    """Its global batch does not fit a chunk, whoever shares it."""
    settings, runtime = load_job("train", CONFIGS / "workers_demo.yaml", ["runtime.num_workers=4"])
    assert settings.train.batch_size == 1024 and runtime.num_workers == 4
    assert settings.train.validation is not None and settings.train.max_tokens < 1024 * 40


@pytest.mark.parametrize(("number", "rows"), [(3, 3), (4, 9), (5, 4)])
def test_the_papers_tables_are_sweeps_over_its_run(number, rows):
    sweep = load_sweep(CONFIGS / "qwen2vl_7b" / f"table{number}.yaml", [])
    cells = plan_sweep(sweep)
    assert len(cells) == rows
    assert len({cell.results for cell in cells}) == rows
    if number == 4:  # of each row: batch, rate, whether the temperature is learned
        trains = [next(j.config for j in c.jobs if j.name == "train/instruct").train for c in cells]  # type: ignore[attr-defined]
        assert [(t.batch_size, t.learning_rate, t.learn_temperature) for t in trains] == [
            (480, 1e-4, False),
            (1920, 1e-4, False),
            (1920, 2e-4, False),
            (3840, 2.8e-4, False),
            (3840, 4e-4, False),
            (5760, 6e-4, False),
            (7680, 6e-4, False),
            (3840, 4e-4, True),
            (7680, 4e-4, True),
        ]
