"""A stage under Ray Train: what goes wrong in a worker reaches the caller in its own words."""

import json
from pathlib import Path

import pytest
from fixtures_run import TinyRun, rewrite

from umarvel_ray.artifacts import atomic_write
from umarvel_ray.errors import DataError, TrainingError
from umarvel_ray.pipeline.stages import recipe
from umarvel_ray.runtime.cluster import RuntimeSettings
from umarvel_ray.runtime.training import _last_line, _own_error, _Tail, run_stage
from umarvel_ray.train.settings import StageConfig

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
