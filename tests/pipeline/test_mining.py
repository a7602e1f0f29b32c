"""The explanation of filters from a job's settings, and mined negatives from one form to another."""

import json
from io import StringIO
from pathlib import Path

import pytest
from fixtures_run import Lines
from rich.console import Console

from umarvel_ray.cli import main
from umarvel_ray.errors import ConfigError, DataError
from umarvel_ray.pipeline.mining import FORMS, convert_negatives, explain
from umarvel_ray.pipeline.settings import MineConfig, RunConfig
from umarvel_ray.pipeline.view import View
from umarvel_ray.retrieve.negatives import MinedNegatives

LISTS = {"9:1": [("9:5", 0.75), ("9:6", 0.5)], "9:2": [("9:7", 0.25), ("9:8", 0.125)]}


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    MinedNegatives.from_lists(LISTS).write(tmp_path / "negatives.arrow")
    (tmp_path / "qrels.txt").write_text("9:1 0 9:3 1\n9:2 0 9:4 1\n")
    (tmp_path / "queries.jsonl").write_text('{"qid": "9:1"}\n{"qid": "9:2"}\n')
    return {name.split(".")[0]: tmp_path / name for name in ("negatives.arrow", "qrels.txt", "queries.jsonl")}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_goes_there_and_back(tmp_path, files, form):
    there, back = tmp_path / "there", tmp_path / "back.arrow"
    options = {"queries": files["queries"], "qrels": files["qrels"], "root": None}
    done = convert_negatives(files["negatives"], there, read="arrow", write=form, **options)
    assert done == {"queries": 2, "negatives": 4, "without": 0}
    convert_negatives(there, back, read=form, write="arrow", **options)
    assert {qid: [did for did, _ in hits] for qid, hits in MinedNegatives.read(back).as_dict().items()} == {
        qid: [did for did, _ in hits] for qid, hits in LISTS.items()
    }


def test_what_is_missing_is_asked_for(tmp_path, files):
    def convert(**changes):
        options = {"read": "arrow", "write": "trec", "queries": None, "qrels": None, "root": None}
        convert_negatives(files["negatives"], tmp_path / "out", **(options | changes))

    with pytest.raises(ConfigError, match="mbeir needs --queries"):
        convert(write="mbeir")
    with pytest.raises(ConfigError, match="triplet needs --qrels"):
        convert(write="triplet")
    with pytest.raises(ConfigError, match="'csv' is unknown"):
        convert(read="csv")
    files["negatives"].unlink()
    with pytest.raises(DataError, match="no mined negatives"):
        convert()


def test_the_command_converts(tmp_path, files, capsys):
    out = tmp_path / "run.trec"
    main(["negatives", str(files["negatives"]), str(out), "--to", "trec"])
    assert "4 negatives of 2 queries; 0 queries without" in capsys.readouterr().out.replace("\n", " ")
    assert len(out.read_text().splitlines()) == 4


@pytest.mark.slow
def test_filters_are_explained_without_claiming_the_output(finished: tuple[RunConfig, Lines], tmp_path: Path):
    folder = next((Path(finished[0].output) / "mine").iterdir())
    job = json.loads((folder / "job.json").read_text())
    config = MineConfig.model_validate({**job["settings"], "output": str(tmp_path / "mine")})
    text = StringIO()
    page = explain(config, View(Console(file=text, width=200)))
    assert page.parent == tmp_path / "mine.explain" and not (tmp_path / "mine").exists()
    told = json.loads((page.parent / "explain.json").read_text())
    report = json.loads((folder / "mining_report.json").read_text())
    for task, counts in report["by_task"].items():
        assert told["tasks"][task]["queries"] == counts["queries"]
        (none, *_) = told["tasks"][task]["settings"]
        assert none["rule"] == "none" and none["hits_dropped"] == 0
        assert task in text.getvalue()
