"""The scoring job from its command: what it writes for any run, how alpha is tuned, what it refuses."""

import json

import pytest
import yaml
from fixtures_rerank import ListFiles

from umarvel_ray.artifacts import read_json
from umarvel_ray.cli import main
from umarvel_ray.data.trec import Run
from umarvel_ray.retrieve.fusion import fuse
from umarvel_ray.retrieve.scores import Scores, read_table


def write(files: ListFiles, folder, **settings) -> str:
    """A settings file."""
    config = files.config(folder / "out", **settings)
    values = json.loads(config.model_dump_json(exclude_defaults=True)) | {"runtime": {"kind": "local"}}
    path = folder / "rerank.yaml"
    path.write_text(yaml.safe_dump(values))
    return str(path)


def test_any_run_is_scored_and_fused(list_files, tmp_path):
    main(["rerank", write(list_files, tmp_path, alpha=0.3)])
    out = tmp_path / "out"
    scores = Scores.read(out / "scores" / "test" / "mine.local.arrow")
    run = Run.read(out / "test" / "mine.local.arrow")
    assert run.as_dict() == fuse(scores, (0.3, 0.7)).as_dict()
    assert read_json(out / "alpha.json")["alpha"] == 0.3 and not (out / "teacher.arrow").exists()


def test_a_training_split_becomes_a_teacher(list_files, tmp_path):
    main(["rerank", write(list_files, tmp_path, split="train", fusion="sum", weight=0.4, alpha="tune")])
    table, facts = read_table(tmp_path / "out" / "teacher.arrow")
    scores = Scores.read(tmp_path / "out" / "scores" / "train" / "mine.local.arrow")
    assert facts["checkpoint"] == scores.facts["checkpoint"]
    assert facts["fusion"]["kind"] == "sum" and facts["fusion"]["value"] == 0.4
    taught = {row["qid"]: dict(zip(row["did"], row["score"], strict=True)) for row in table.to_pylist()}
    for qid, dids, recall, p_yes in scores.rows():
        assert taught[qid] == pytest.approx(
            dict(zip(dids, (recall + 0.4 * p_yes) / 2, strict=True)), abs=1e-6
        )


def test_tune_chooses_on_validation_data_and_stops(list_files, tmp_path):
    qrels = str(list_files.home / "qrels.txt")
    path = write(list_files, tmp_path, split="val", qrels=qrels, alpha="tune")
    main(["rerank", path, "--tune"])
    tuned = read_json(tmp_path / "out" / "alpha.json")
    curve = dict(map(tuple, tuned["curve"]))
    assert len(curve) == 21 and curve[tuned["alpha"]] == max(curve.values())
    assert not (tmp_path / "out" / "val").exists()


def test_tune_refuses_a_test_split(list_files, tmp_path, capsys):
    path = write(list_files, tmp_path, alpha=0.5)
    with pytest.raises(SystemExit) as ended:
        main(["rerank", path, "alpha=tune", "--tune"])
    assert ended.value.code == 2
    assert "alpha is chosen on validation data, never on test" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
