"""A stage under Ray Train: what goes wrong in a worker reaches the caller in its own words."""

import json
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from fixtures_run import TinyRun, rewrite
from safetensors.torch import load_file

from umarvel_ray.artifacts import atomic_write
from umarvel_ray.errors import DataError, TrainingError
from umarvel_ray.pipeline.stages import recipe
from umarvel_ray.runtime.cluster import RuntimeSettings
from umarvel_ray.runtime.training import _last_line, _own_error, _Tail, run_stage
from umarvel_ray.train import contrastive
from umarvel_ray.train.settings import StageConfig, StrategySettings

RAY = RuntimeSettings(kind="ray", num_workers=2)


def captions_stage(tiny: TinyRun, folder: Path, **train: object) -> StageConfig:
    """Stage 1b from the stock backbone."""
    values = next(
        job.config.model_dump() for job in recipe(tiny.settings(folder)) if job.name == "train/align"
    )
    values |= {"start": str(tiny.home / "backbone"), "output": str(folder / "align")}
    values["train"] |= train
    return StageConfig.model_validate(values)


def losses(stage: StageConfig) -> list[float]:
    lines = (Path(stage.output) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def test_every_step_is_told_in_one_process(tiny: TinyRun, tmp_path):
    stage = captions_stage(tiny, tmp_path, num_steps=2)
    told: list[dict] = []
    run_stage(stage, RuntimeSettings(kind="local", num_workers=2), told.append)
    assert [entry["step"] for entry in told] == [1, 2]
    assert [entry["loss"] for entry in told] == losses(stage)


@pytest.mark.slow
def test_two_workers_are_two_lanes_and_a_broken_picture_is_one_line(tiny: TinyRun, ray_session, tmp_path):
    stage = captions_stage(tiny, tmp_path / "local", num_steps=2)
    run_stage(stage, RuntimeSettings(kind="local", num_workers=2))
    on_ray = captions_stage(tiny, tmp_path / "ray", num_steps=2)
    told: list[dict] = []
    run_stage(on_ray, RAY, told.append)
    assert losses(on_ray) == losses(stage)
    assert told[-1]["step"] == 2
    weights = "checkpoint/model.safetensors"
    assert Path(on_ray.output, weights).read_bytes() == Path(stage.output, weights).read_bytes()

    spoiled = tiny.copy(tmp_path / "spoiled")
    captions = spoiled.home / "world/cc3m/chat.json"
    for entry in json.loads(captions.read_text()):
        picture = captions.parent / entry["image"]
        rewrite(picture, picture.read_bytes()[:200])
    with pytest.raises(DataError) as error:
        run_stage(captions_stage(spoiled, tmp_path / "refused", num_steps=2), RAY)
    assert "\n" not in str(error.value) and ".jpg" in str(error.value)


def training_workers() -> list[psutil.Process]:
    """Of this test's Ray alone."""
    mine = psutil.Process().children(recursive=True)
    return [process for process in mine if "TrainWorker" in " ".join(process.cmdline())]


@pytest.mark.slow
def test_a_killed_worker_costs_no_step(tiny: TinyRun, ray_session, tmp_path):
    """SIGKILL in the middle: all start again from the newest state, and end in the very same weights."""
    long = {"num_steps": 30, "save_every": 2}
    undisturbed = captions_stage(tiny, tmp_path / "local", **long)
    run_stage(undisturbed, RuntimeSettings(kind="local", num_workers=2))
    stage = captions_stage(tiny, tmp_path / "killed", **long)
    killed: list[int] = []

    def kill_one(entry: dict) -> None:
        if entry["step"] >= 4 and not killed:
            victim = training_workers()[-1]
            victim.kill()
            killed.append(entry["step"])

    run_stage(stage, RAY, kill_one)
    assert killed and killed[0] < 30
    assert losses(stage) == losses(undisturbed)
    weights = "checkpoint/model.safetensors"
    assert Path(stage.output, weights).read_bytes() == Path(undisturbed.output, weights).read_bytes()


@pytest.mark.slow
@pytest.mark.cluster
def test_a_lost_node_is_done_without(tiny: TinyRun, tmp_path):
    """Two nodes, one killed: the other goes on alone with the same global batches, to the same loss."""
    long = {"num_steps": 30, "save_every": 2}
    undisturbed = captions_stage(tiny, tmp_path / "local", **long)
    run_stage(undisturbed, RuntimeSettings(kind="local", num_workers=1))
    stage = captions_stage(tiny, tmp_path / "lost", **long)
    settings = tmp_path / "stage.json"
    settings.write_text(stage.model_dump_json())
    script = Path(__file__).parent / "lose_a_node.py"
    ended = subprocess.run(
        [sys.executable, str(script), str(settings)], capture_output=True, text=True, timeout=240
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    (killed_at,) = json.loads(ended.stdout.splitlines()[-1])["killed_at"]
    assert killed_at < 30
    # Two lanes add in another order than one: what differs is rounding.
    assert losses(stage) == pytest.approx(losses(undisturbed), rel=1e-3)


@pytest.mark.slow
def test_another_number_of_workers_goes_on_with_the_same_batches(tiny: TinyRun, tmp_path, monkeypatch):
    """Stopped after six of twelve steps with two lanes, resumed with three and another strategy's state."""
    seen: dict[str, list] = {}
    build = contrastive.build_batch

    def watched(data, rows, **rest):
        seen.setdefault(name, []).append(rows.tolist())
        return build(data, rows, **rest)

    monkeypatch.setattr(contrastive, "build_batch", watched)
    name = "whole"
    whole = captions_stage(tiny, tmp_path / "whole", num_steps=12, save_every=3)
    run_stage(whole, RuntimeSettings(kind="local", num_workers=2))
    name = "halves"
    halves = captions_stage(tiny, tmp_path / "halves", num_steps=12, save_every=3)

    def stop(entry: dict) -> None:
        if entry["step"] == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_stage(halves, RuntimeSettings(kind="local", num_workers=2), stop)
    del seen["halves"]
    run_stage(halves, RuntimeSettings(kind="local", num_workers=3))
    assert seen["halves"] == seen["whole"][6:]
    assert losses(halves) == pytest.approx(losses(whole), rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "how",
    [StrategySettings(kind="fsdp2"), StrategySettings(kind="deepspeed", zero_stage=3)],
    ids=["fsdp2", "zero3"],
)
def test_another_strategy_goes_on_where_one_stopped(tiny: TinyRun, ray_session, tmp_path, how):
    """Two of four steps replicated, the rest sharded under Ray Train, to a checkpoint like the whole's."""
    whole = captions_stage(tiny, tmp_path / "whole", num_steps=4, save_every=2)
    run_stage(whole, RuntimeSettings(kind="local", num_workers=2))
    stage = captions_stage(tiny, tmp_path / "sharded", num_steps=4, save_every=2)

    def stop(entry: dict) -> None:
        if entry["step"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_stage(stage, RuntimeSettings(kind="local", num_workers=2), stop)
    run_stage(stage, RuntimeSettings(num_workers=2, strategy=how))
    assert losses(stage) == pytest.approx(losses(whole), rel=1e-3)
    mine, theirs = (load_file(Path(each.output, "checkpoint/model.safetensors")) for each in (stage, whole))
    assert mine.keys() == theirs.keys()
    for name, weight in theirs.items():
        # AdamW's step is the rate where a gradient is rounding: two steps of 2e-3 at most.
        assert (mine[name] - weight).abs().max() <= 4e-3, name
    moved = sum(float((mine[name] - weight).abs().mean()) for name, weight in theirs.items()) / len(theirs)
    assert moved < 2e-4


class Wrapped(Exception):
    """As Ray Train hands over what its workers raised."""

    def __init__(self, *failures: BaseException) -> None:
        super().__init__(
            "Training failed due to worker errors:\n[rank 0]\nTraceback …\nRuntimeError: out of luck"
        )
        self.worker_failures = dict(enumerate(failures))


def test_our_own_error_is_found_among_the_failures_of_its_mates():
    ours = DataError("a.jsonl:3: not valid JSON. Mend the line.")
    assert _own_error(Wrapped(RuntimeError("connection closed by peer"), ours)) is ours
    outer = RuntimeError("controller failed")
    outer.__cause__ = Wrapped(ours)
    assert _own_error(outer) is ours


def test_another_error_becomes_its_last_line():
    assert _own_error(Wrapped(RuntimeError("out of luck"))) is None
    error = _last_line(Wrapped(RuntimeError("out of luck")))
    assert isinstance(error, TrainingError)
    assert str(error).startswith("a training worker failed: RuntimeError: out of luck.")
    assert "\n" not in str(error)


def test_a_metrics_file_is_followed_though_it_is_cut_back(tmp_path):
    """A restarted worker drops the steps that it will do again; a line half written is not read."""
    path, told = tmp_path / "metrics.jsonl", []
    tail = _Tail(path, lambda entry: told.append(entry["step"]))
    shown = tail._show_from(0)
    for text in (
        '{"step": 1}\n',
        '{"step": 1}\n{"step": 2}\n{"st',
        '{"step": 1}\n',
        '{"step": 1}\n{"step": 2}\n',
    ):
        with atomic_write(path) as file:
            file.write(text)
        shown = tail._show_from(shown)
    assert told == [1, 2, 1, 2]
