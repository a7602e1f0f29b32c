"""The recipe's arrows, against the paper's: who starts from whom, who is searched where, what is compared."""

from fixtures_run import CONTROLS, TinyRun

from umarvel_ray.evaluate.report import StageInput
from umarvel_ray.pipeline.stages import Job, recipe


def jobs_of(tiny: TinyRun, *overrides: str) -> dict[str, Job]:
    return {job.name: job for job in recipe(tiny.settings(tiny.home / "plan", *overrides))}


def of(job: Job, key: str) -> object:
    return job.config.model_dump(mode="json")[key]


def test_each_stage_starts_from_the_one_before(tiny: TinyRun):
    jobs, run = jobs_of(tiny), tiny.home / "plan"
    starts = {name: of(job, "start") for name, job in jobs.items() if job.kind == "train"}

    def checkpoint(stage: str) -> str:
        return str(run / "train" / stage / "checkpoint")

    assert starts == {
        "train/text": str(tiny.home / "backbone"),
        "train/align": checkpoint("text"),
        "train/instruct": checkpoint("align"),
        "train/hard": checkpoint("instruct"),
        "train/reranker": checkpoint("instruct"),
        "train/distil": checkpoint("hard"),
    }
    stock = jobs_of(tiny, "stages.reranker.start=backbone")["train/reranker"]
    assert of(stock, "start") == str(tiny.home / "backbone")


def test_all_embedding_jobs_share_a_vision_store(tiny: TinyRun):
    jobs = jobs_of(tiny, "retrieval.vision_store=/features").values()
    assert {of(job, "vision_store") for job in jobs if job.kind == "embed"} == {"/features"}


def test_encoder_settings_go_to_the_stock_backbone_alone(tiny: TinyRun):
    """A checkpoint brings its own and refuses others."""
    jobs = jobs_of(tiny, "encoder.attention=causal")
    given = {name: of(job, "encoder") is not None for name, job in jobs.items() if job.kind == "train"}
    assert {name for name, there in given.items() if there} == {"train/text"}


def test_negatives_are_mined_globally_and_the_rerankers_lists_locally(tiny: TinyRun):
    jobs = jobs_of(tiny)
    assert of(jobs["mine/negatives"], "scope") == "global"
    assert of(jobs["mine/reranker_lists"], "scope") == "local"
    requests = {
        (request["split"], tuple(request["scopes"]))
        for name in ("search/instruct", "search/hard")
        for request in of(jobs[name], "requests")  # type: ignore[attr-defined]
    }
    assert {("train", ("global",)), ("train", ("local",)), ("test", ("local", "global"))} <= requests


def test_u_marvel_plus_trains_its_own_reranker_on_what_the_distilled_model_finds(tiny: TinyRun):
    plain = jobs_of(tiny)
    assert of(plain["rerank/distil_reranked"], "checkpoint") == of(plain["rerank/reranked"], "checkpoint")
    assert of(plain["rerank/distil_reranked"], "alpha_from") == of(plain["rerank/reranked"], "output")
    stage = "{train: {batch_size: 8, num_steps: 2, learning_rate: 1.0e-3}, depth: 10, "
    jobs = jobs_of(tiny, "stages.plus=" + stage + "mining: {rule: none, depth: 10, num_negatives: 8}}")
    lists, own = jobs["mine/reranker_plus_lists"], jobs["train/reranker_plus"]
    assert of(lists, "search") == of(jobs["search/distil"], "output")
    assert of(own, "data")["lists"] == of(lists, "output") + "/negatives.arrow"
    scored = jobs["rerank/distil_reranked"]
    assert of(scored, "checkpoint") == of(own, "output") + "/checkpoint"
    assert (of(scored, "runs"), of(scored, "alpha_from")) == (of(jobs["search/distil"], "output"), None)
    requests = {(request["split"], tuple(request["scopes"])) for request in of(scored, "requests")}
    assert requests == {("val", ("local",)), ("test", ("local", "global"))}
    splits = {request["split"] for request in of(jobs["search/distil"], "requests")}
    assert splits == {"train", "val", "test"}
    assert of(jobs["train/distil"], "data")["teacher"] == of(jobs["rerank/reranked"], "checkpoint")


def test_columns_and_controls_are_what_was_asked_for(tiny: TinyRun):
    everything = jobs_of(tiny, f"controls=[{', '.join(CONTROLS)}]")
    for control in CONTROLS:
        for kind in ("train", "embed", "search", "evaluate"):
            assert f"{kind}/{control}" in everything
    assert "mine/negatives_unfiltered" in everything
    rule = everything["mine/negatives_unfiltered"].config.mining  # type: ignore[attr-defined]
    assert (rule.rule, rule.value) == ("none", None)
    few = jobs_of(tiny, "columns=[hard, distil]")
    assert {name for name in few if name.startswith("evaluate/")} == {"evaluate/hard", "evaluate/distil"}
    assert "rerank/reranked" in few and "rerank/distil_reranked" not in few  # the first is the teacher
    fewer = jobs_of(tiny, "columns=[hard]", "controls=[in_batch, own_negatives]")
    assert {name for name in fewer if name.startswith("train/")} == {
        "train/text", "train/align", "train/instruct", "train/hard", "train/in_batch", "train/own_negatives",
    }  # fmt: skip
    assert not any(name.startswith("rerank/") for name in fewer)
    assert {name for name in jobs_of(tiny, "columns=[instruct]") if name.startswith("mine/")} == set()


def test_gains_are_counted_from_where_a_stage_starts(tiny: TinyRun):
    report = recipe(tiny.settings(tiny.home / "plan", f"controls=[{', '.join(CONTROLS)}]"))[-1]
    stages: tuple[StageInput, ...] = report.config.stages  # type: ignore[attr-defined]
    baseline = {stage.name: stage.baseline for stage in stages}
    assert baseline["distil"] == baseline["continue_hard"] == baseline["reranked"] == "hard"
    assert {baseline[name] for name in ("in_batch", "unfiltered", "own_negatives")} == {"instruct"}


def test_seeds_of_stages_can_be_told_apart(tiny: TinyRun):
    jobs = jobs_of(tiny, "seed=5", "stages.align.seed_offset=2", "stages.reranker.seed_offset=1")
    seeds = {stage: of(jobs[f"train/{stage}"], "seed") for stage in ("text", "align", "reranker", "distil")}
    assert seeds == {"text": 5, "align": 7, "reranker": 6, "distil": 5}
