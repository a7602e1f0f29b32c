"""What README and docs say is there: links, commands, files, settings; and their examples work as written."""

import re
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

import pytest
import typer
import yaml
from PIL import Image
from pydantic import BaseModel

from umarvel_ray.cli import app
from umarvel_ray.config import build_config
from umarvel_ray.data.check import check_mbeir
from umarvel_ray.data.mbeir import TASK_BY_NAME, TASKS
from umarvel_ray.pipeline.settings import RunConfig

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    ROOT / "cluster" / "README.md",
    *sorted(ROOT.glob("docs/**/*.md")),
]


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)


@pytest.fixture(scope="module")
def commands() -> set[str]:
    return set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_relative_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    assert [link for link in links if link and not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_that_are_named_exist(page, commands):
    # After the name a blank and a word; prose such as "umarvel-ray" or "umarvel_ray" does not look like that.
    named = set(re.findall(r"(?:`|^|&& )umarvel +([a-z]+)", page.read_text(encoding="utf-8"), re.M))
    assert named <= commands


def test_the_readmes_table_has_every_command(commands):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `umarvel ([a-z]+)` \|", text, re.M)) == commands


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_that_are_named_exist(page):
    text = page.read_text(encoding="utf-8")
    named = set(
        re.findall(r"(?<![\w/.])((?:configs|jobs|cluster|docs|tests)/[\w./-]*\.(?:yaml|py|md|sh))\b", text)
    )
    assert sorted(name for name in named if not (ROOT / name).exists()) == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_make_targets_that_are_named_exist(page):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    named = set(re.findall(r"(?:`|^)make ([a-z-]+)", page.read_text(encoding="utf-8"), re.M))
    assert named <= targets


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_yaml_blocks_parse(page):
    for block in blocks(page, "ya?ml"):
        assert yaml.safe_load(block) is not None


def test_the_minimal_run_is_a_run():
    text, *_ = blocks(ROOT / "docs" / "running.md", "yaml")
    assert build_config(yaml.safe_load(text), RunConfig, base=ROOT).seed == 0


def models_of(annotation: Any) -> list[type[BaseModel]]:
    if get_origin(annotation) in (Union, UnionType):
        return [model for part in get_args(annotation) for model in models_of(part)]
    return [annotation] if isinstance(annotation, type) and issubclass(annotation, BaseModel) else []


def defaults_of(key: str) -> list[Any]:
    """The default of a setting in each group that `*` stands for; `...` where there is none."""
    models: list[type[BaseModel]] = [RunConfig]
    *groups, last = key.split(".")
    for part in groups:
        fields = [
            field for model in models for name, field in model.model_fields.items() if part in ("*", name)
        ]
        models = [model for field in fields for model in models_of(field.annotation)]
    fields = [model.model_fields[last] for model in models if last in model.model_fields]
    return [... if field.is_required() else field.get_default(call_default_factory=True) for field in fields]


def settings_rows() -> list[tuple[str, str]]:
    text = (ROOT / "docs" / "running.md").read_text(encoding="utf-8")
    return re.findall(r"^\| `([a-z_.*]+)` \| (.+?) \|", text, re.M)


@pytest.mark.parametrize(("key", "default"), settings_rows(), ids=[key for key, _ in settings_rows()])
def test_settings_have_the_defaults_that_the_page_names(key, default):
    found = defaults_of(key)
    assert found, f"no setting {key}"
    if default in ("–", "none", "all that have files", "from 1c on"):
        assert all(value in (..., None, ()) or isinstance(value, tuple) for value in found)
    else:
        assert {str(value).lower() for value in found} == {default.strip("`")}


def test_the_table_of_tasks_is_the_benchmarks():
    text = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| (\d) \| (\d) \| (\S+) → (\S+) \|", text, re.M)
    assert [row[0] for row in rows] == [task.name for task in TASKS]
    for name, dataset_id, task_id, query, candidate in rows:
        task = TASK_BY_NAME[name]
        assert (task.dataset_id, task.task_id) == (int(dataset_id), int(task_id))
        assert (task.query_modality, task.candidate_modality) == (query, candidate)


def test_the_readmes_own_data_is_without_fault(tmp_path):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    files = re.findall(r"`(my_data/[^`]+)`.*?\n```\w+\n(.*?)^```", text, re.M | re.S)
    assert len(files) == 4
    for place, content in files:
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).write_text(content, encoding="utf-8")
    faults = check_mbeir(tmp_path / "my_data", splits=["test"])
    assert len(faults) == 1 and "the image is missing" in faults[0], faults
    (tmp_path / "my_data" / "pictures").mkdir()
    Image.new("RGB", (56, 56)).save(tmp_path / "my_data" / "pictures" / "kite.jpg")
    assert check_mbeir(tmp_path / "my_data", splits=["test"], images="decode") == []


@pytest.mark.slow
def test_the_readmes_python_runs_as_written(tmp_path, monkeypatch):
    from umarvel_ray import Encoder, Reranker
    from umarvel_ray.demo.backbone import BackboneConfig, make_backbone

    (code,) = blocks(ROOT / "README.md", "python")
    size = BackboneConfig(
        seed=1,
        hidden_size=32,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        intermediate_size=32,
        vocab_size=300,
        vision_embed_dim=16,
        vision_depth=1,
        vision_num_heads=2,
    )
    monkeypatch.chdir(tmp_path)
    make_backbone(["A red kite. Find a photo."], tmp_path / "backbone", size)
    Encoder.load(tmp_path / "backbone").save(tmp_path / "demo/run/train/distil/checkpoint")
    Reranker.load(tmp_path / "backbone").save(tmp_path / "demo/run/train/reranker/checkpoint")
    Image.new("RGB", (56, 56), "red").save("kite.jpg")
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["cosine_QC"].shape == (1, 2)
    assert abs(names["cosine_QC"]).max() <= 1 + 1e-5
    assert names["p_yes"].shape == (2,)
    assert ((names["p_yes"] >= 0) & (names["p_yes"] <= 1)).all()
