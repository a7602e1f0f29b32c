"""A setting is what the file and the command line say, or an error that names it."""

import os
import pickle
from pathlib import Path
from typing import Literal

import pytest
from pydantic import PositiveInt, ValidationError, model_validator

from umarvel_ray.config import Config, PathSetting, build_config, load_config
from umarvel_ray.errors import ConfigError


class TrainSettings(Config):
    """A group."""

    steps: PositiveInt
    rate: float = 0.1
    mode: Literal["full", "lora"] = "full"

    @model_validator(mode="after")
    def _rate_suits_mode(self):
        if self.mode == "lora" and self.rate > 1:
            raise ValueError("rate above 1 with lora. Lower it")
        return self


class StageSettings(Config):
    """An item of a list."""

    name: str
    train: TrainSettings


class RunSettings(Config):
    """A whole run."""

    seed: int
    output: PathSetting
    train: TrainSettings = TrainSettings(steps=1)
    stages: tuple[StageSettings, ...] = ()
    note: str | None = None


GOOD = """\
seed: 7
output: out
train:
  steps: 10
stages:
  - name: one
    train: {steps: 1}
  - name: two
    train:
      steps: 2
"""


@pytest.fixture
def config_file(tmp_path):
    def write(text: str) -> Path:
        path = tmp_path / "configs" / "run.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    return write


def fault_of(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as error:
        load_config(path, RunSettings, overrides)
    message = str(error.value)
    assert "\n" not in message
    assert str(pickle.loads(pickle.dumps(error.value))) == message
    return message


def test_a_good_file_is_read_and_frozen(config_file):
    run = load_config(config_file(GOOD), RunSettings)
    assert (run.seed, run.train.steps, run.train.rate, [stage.name for stage in run.stages]) == (
        7,
        10,
        0.1,
        ["one", "two"],
    )
    with pytest.raises(ValidationError, match="frozen"):
        run.seed = 8  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (
            GOOD + "sede: 3\n",
            [":11: unknown setting 'sede'", "Known keys there: seed, output, train, stages, note"],
        ),
        (
            GOOD.replace("steps: 10", "steps: 10\n  stpes: 3"),
            [":5: unknown setting 'train.stpes'", "steps, rate, mode"],
        ),
        (GOOD.replace("{steps: 1}", "{steps: none}"), [":7: setting 'stages.0.train.steps'", "given 'none'"]),
        (
            GOOD.replace("      steps: 2", "      steps: -2"),
            [":10: setting 'stages.1.train.steps'", "given -2"],
        ),
        (GOOD.replace("seed: 7\n", ""), ["run.yaml: setting 'seed' is missing. Add it."]),
        (GOOD.replace("steps: 10", "rate: 0.5"), [":3: setting 'train.steps' is missing. Add it."]),
        (
            GOOD.replace("steps: 10", "steps: 10\n  mode: half"),
            [":5: setting 'train.mode'", "'full' or 'lora'", "given 'half'"],
        ),
        (
            GOOD.replace("steps: 10", "steps: 10\n  mode: lora\n  rate: 2"),
            [":3: setting 'train'", "rate above 1 with lora"],
        ),
        ("seed: [1\noutput: x\n", ["run.yaml:2: not valid YAML"]),
        ("- seed\n- output\n", ["run.yaml: a config is a mapping of settings, this file holds list"]),
        ("", ["run.yaml: a config is a mapping of settings, this file holds NoneType"]),
        ("seed: !!python/object/apply:os.getcwd []\n", ["run.yaml:1: not valid YAML"]),
    ],
)
def test_a_fault_is_named_by_file_line_and_key(config_file, text, parts):
    message = fault_of(config_file(text))
    for part in parts:
        assert part in message


def test_faults_are_counted(config_file):
    message = fault_of(config_file(GOOD + "one: 1\ntwo: 2\nthree: 3\n"))
    assert "(3 faults in all)" in message


def test_an_absent_file_is_named(tmp_path):
    assert "nowhere.yaml: the config cannot be read (No such file" in fault_of(tmp_path / "nowhere.yaml")


def test_overrides_are_yaml_values_and_reach_groups_and_list_items(config_file):
    overrides = [
        "seed=9",
        "train.rate=1e-1",
        "train.mode=lora",
        "stages.1.train.steps=5",
        "note=a = b",
        "stages.0.name='12'",
    ]
    run = load_config(config_file(GOOD), RunSettings, overrides)
    assert (run.seed, run.train.rate, run.train.mode) == (9, 0.1, "lora")
    assert [(stage.name, stage.train.steps) for stage in run.stages] == [("12", 1), ("two", 5)]
    assert run.note == "a = b"


def test_an_override_opens_a_group_the_file_leaves_out(config_file):
    run = load_config(config_file("seed: 1\noutput: out\ntrain:\n"), RunSettings, ["train.steps=4"])
    assert run.train.steps == 4


def test_a_later_override_wins(config_file):
    assert load_config(config_file(GOOD), RunSettings, ["seed=1", "seed=2"]).seed == 2


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("seed", "'seed' is not of the form key.path=value"),
        ("=3", "is not of the form key.path=value"),
        ("stages.2.name=x", "'2' is not an index into a list of 2"),
        ("stages.first.name=x", "'first' is not an index into a list of 2"),
        ("seed.value=3", "'seed' is a value, not a group"),
        ("train.stpes=3", "unknown setting 'train.stpes'"),
        ("train.steps=many", "setting 'train.steps'"),
    ],
)
def test_a_wrong_override_is_named(config_file, override, part):
    assert part in fault_of(config_file(GOOD), override)


def test_a_relative_path_starts_where_it_was_written(config_file, tmp_path, monkeypatch):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    path = config_file(GOOD)
    assert load_config(path, RunSettings).output == str(path.parent / "out")
    assert load_config(path, RunSettings, ["output=../here"]).output == str(tmp_path / "here")
    from_above = os.path.relpath(path)
    assert load_config(from_above, RunSettings).output == str(path.parent / "out")


@pytest.mark.parametrize("whole", ["/data/out", "s3://bucket/out", "gs://bucket/a/../b"])
def test_a_whole_path_or_uri_is_kept(config_file, whole):
    assert (
        load_config(config_file(GOOD.replace("output: out", f"output: {whole}")), RunSettings).output == whole
    )
    assert load_config(config_file(GOOD), RunSettings, [f"output={whole}"]).output == whole


def test_variables_come_from_the_environment(config_file, monkeypatch):
    monkeypatch.setenv("UMARVEL_TEST_DATA", "/big/disk")
    text = (
        GOOD.replace("output: out", "output: ${UMARVEL_TEST_DATA}/out")
        + "note: costs $5, not ${UMARVEL_TEST_DATA}\n"
    )
    run = load_config(config_file(text), RunSettings)
    assert (run.output, run.note) == ("/big/disk/out", "costs $5, not /big/disk")


def test_an_unset_variable_is_named(config_file, monkeypatch):
    monkeypatch.delenv("UMARVEL_TEST_DATA", raising=False)
    message = fault_of(config_file(GOOD.replace("output: out", "output: ${UMARVEL_TEST_DATA}/out")))
    assert "${UMARVEL_TEST_DATA} is not set in the environment. Export UMARVEL_TEST_DATA" in message


def test_settings_survive_the_road_through_a_manifest(config_file):
    run = load_config(config_file(GOOD), RunSettings)
    assert build_config(run.model_dump(mode="json"), RunSettings) == run


def test_build_config_names_its_source():
    with pytest.raises(ConfigError, match=r"job\.json: setting 'seed' is missing"):
        build_config({"output": "x"}, RunSettings, where="job.json")
