"""The evaluation job: the same figures whatever it starts from, and gates before any figure."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from fixtures_model import make_towers
from fixtures_run import Lines

from umarvel_ray.artifacts import read_json
from umarvel_ray.config import build_config
from umarvel_ray.data.mbeir import TASK_BY_NAME, Mbeir
from umarvel_ray.errors import ConfigError, DataError
from umarvel_ray.pipeline.evaluation import QUERIES_FILE
from umarvel_ray.pipeline.jobs import evaluate
from umarvel_ray.pipeline.settings import EvaluateConfig
from umarvel_ray.retrieve.store import EmbeddingStore
from umarvel_ray.runtime.cluster import RuntimeSettings

LOCAL = RuntimeSettings(kind="local")
TASKS = ["mscoco_task0", "oven_task6", "infoseek_task6"]


def run(output, **values):
    """Settings as a file would give them → the results document."""
    base = {"stage": "x", "output": str(output), "tasks": TASKS, "dtype": "float32", "depth": 10}
    if "own" in values or "zeroshot" in values:
        del base["tasks"]
    evaluate(build_config(base | values, EvaluateConfig), LOCAL, Lines())
    return read_json(output / "results.json")


@pytest.fixture(scope="module")
def from_model(tiny, tmp_path_factory):
    """The tiny backbone, untrained, on three tasks."""
    output = tmp_path_factory.mktemp("evaluated") / "model"
    scopes = ["local", "pair", "global"]
    document = run(output, checkpoint=str(tiny.home / "backbone"), root=str(tiny.root), scopes=scopes)
    return output, document


def figures(document):
    return {
        name: {k: v for k, v in entry.items() if k in ("local", "pair", "global")}
        for name, entry in document["tasks"].items()
    }


def test_a_model_alone_is_enough_and_everything_that_decides_is_recorded(from_model, tiny):
    output, document = from_model
    settings = document["settings"]
    assert set(document["tasks"]) == set(TASKS)
    assert "pair" in document["tasks"]["oven_task6"] and "pair" not in document["tasks"]["mscoco_task0"]
    pools = [document["tasks"][f"{name}_task6"]["local"]["pool_size"] for name in ("oven", "infoseek")]
    assert document["tasks"]["oven_task6"]["pair"]["pool_size"] == sum(pools)
    assert settings["data"]["qrels"].keys() == set(TASKS) and settings["prompts"]["oven_task6"]
    assert settings["device"]["attention_kernel"] and settings["made_from"] == "model"
    assert document["checkpoint"]["fingerprint"] and document["versions"]["torch"]
    errors = document["tasks"]["oven_task6"]["global"]["errors"]
    assert errors["wrong_modality"] + errors["wrong_domain"] + errors["other"] == pytest.approx(1)
    assert sum(errors["modality_at_1"].values()) == pytest.approx(1)
    with pa.memory_map(str(output / QUERIES_FILE)) as source:
        table = pa.ipc.open_file(source).read_all().to_pandas()
    for (task, pool), rows in table.groupby(["task", "pool"], observed=True):
        entry = document["tasks"][task]
        assert rows.value.mean() == pytest.approx(entry[pool][entry["headline"]])


def test_stored_vectors_runs_and_plain_matrices_give_the_same_figures(from_model, tiny, tmp_path):
    output, document = from_model
    scopes = ["local", "pair", "global"]
    from_store = run(
        tmp_path / "store", embeddings=str(output / "embeddings"), root=str(tiny.root), scopes=scopes
    )
    from_runs = run(tmp_path / "runs", runs=str(output / "runs"), root=str(tiny.root), scopes=scopes)
    for folder in (output / "embeddings").rglob("manifest.json"):
        store = EmbeddingStore.open(folder.parent)
        name = folder.parent.relative_to(output / "embeddings")
        matrix = tmp_path / "npy" / f"{name}.npy"
        matrix.parent.mkdir(parents=True, exist_ok=True)
        np.save(matrix, store.vectors(0, len(store)) * 3)  # not unit length, as others store them
        matrix.with_name(f"{name.name}_ids.txt").write_text("\n".join(store.ids.to_pylist()) + "\n")
    from_npy = run(tmp_path / "vectors", vectors=str(tmp_path / "npy"), root=str(tiny.root), scopes=scopes)
    assert figures(from_store) == figures(document) == figures(from_runs)
    for name, entry in figures(from_npy).items():  # dividing by the length may move a last bit and so a tie
        for pool, result in entry.items():
            assert result["hit@10"] == pytest.approx(figures(document)[name][pool]["hit@10"], abs=0.34)
            assert result["num_queries" if "num_queries" in result else "pool_size"] == result["pool_size"]


@pytest.mark.slow
def test_the_mean_over_all_instructions_has_its_spread(from_model, tiny, tmp_path):
    document = run(
        tmp_path / "all",
        checkpoint=str(tiny.home / "backbone"),
        root=str(tiny.root),
        instruction="all",
        scopes=["local"],
    )
    singles = [
        run(
            tmp_path / str(number),
            checkpoint=str(tiny.home / "backbone"),
            root=str(tiny.root),
            instruction=number,
            scopes=["local"],
            tasks=["mscoco_task0"],
        )["tasks"]["mscoco_task0"]["local"]["hit@5"]
        for number in (0, 3)
    ]
    local = document["tasks"]["mscoco_task0"]["local"]
    assert local["prompts"]["num"] == 4 and local["hit@5"] == pytest.approx(
        np.mean(local["prompts"]["values"])
    )
    assert [local["prompts"]["values"][number] for number in (0, 3)] == singles
    first = from_model[1]["tasks"]["mscoco_task0"]["local"]
    assert local["prompts"]["values"][0] == first["hit@5"]


def test_uniir_forms_and_retrieved_candidates_are_written(from_model, tiny, tmp_path):
    output, document = from_model
    run(
        tmp_path / "x",
        embeddings=str(output / "embeddings"),
        checkpoint=str(tiny.home / "backbone"),
        root=str(tiny.root),
        export=["uniir", "complements"],
        tasks=["mscoco_task0"],
        scopes=["local"],
    )
    depth = min(10, document["tasks"]["mscoco_task0"]["local"]["pool_size"])
    name = f"mbeir_mscoco_task0_single_pool_test_k{depth}"
    fields = (tmp_path / "x/uniir/run_files" / f"{name}_run.txt").read_text().split("\n")[0].split()
    assert len(fields) == 7 and fields[1] == "Q0" and fields[3] == "1" and fields[5:] == [name, "0"]
    table = (tmp_path / "x/uniir/final_tsv/eval_results.tsv").read_text().split("\n")
    rows = [dict(zip(table[0].split("\t"), line.split("\t"), strict=True)) for line in table[1:] if line]
    value = next(row for row in rows if row["Metric"] == "Recall@5")["Value"]
    assert value == f"{document['tasks']['mscoco_task0']['local']['hit@5']:.4f}"
    lines = (tmp_path / "x/retrieved_candidates" / f"{name}_retrieved.jsonl").read_text().splitlines()
    entry = json.loads(lines[0])
    assert entry["query"]["task_id"] == 0 and len(entry["candidates"]) == depth
    assert entry["complement_candidates"] == [None] * 5  # a pool of pictures holds no text


def test_own_data_needs_two_files_and_a_folder(tiny, tmp_path):
    record = Mbeir(tiny.root).local_pool(TASK_BY_NAME["mscoco_task0"], "test").candidate(0)
    pool = Path(str(record.img_path))
    (tmp_path / "c.jsonl").write_text(
        "".join(
            json.dumps(row) + "\n"
            for row in [
                {"did": "a picture, mine", "img_path": pool.name},
                {"did": "x", "txt": "A red circle."},
                {"did": "y", "txt": "A blue square."},
            ]
        )
    )
    (tmp_path / "q.jsonl").write_text(
        "".join(
            json.dumps({"qid": f"who {n}?", "txt": words, "positives": [right]}) + "\n"
            for n, (words, right) in enumerate([("a red circle", "x"), ("a blue square", "y")])
        )
    )
    own = {
        "queries": str(tmp_path / "q.jsonl"),
        "candidates": str(tmp_path / "c.jsonl"),
        "images": str(pool.parent),
    }
    document = run(tmp_path / "out", checkpoint=str(tiny.home / "backbone"), own=own)
    entry = document["tasks"]["own data"]
    assert (
        entry["headline"] == "hit@5" and entry["local"]["hit@5"] == 1.0 and entry["local"]["pool_size"] == 3
    )


@pytest.mark.slow
def test_a_stranger_compares_clip_with_ours_by_two_commands(from_model, tiny, tmp_path, capsys):
    """The README's, on the tiny world: a CLIP folder is evaluated, then both stand on one page."""
    from umarvel_ray.cli import main

    clip = make_towers(tmp_path / "clip", "clip")
    configs = Path(__file__).parents[2] / "configs"
    shared = [
        f"root={tiny.root}",
        f"tasks={json.dumps(TASKS)}",
        "depth=10",
        "dtype=float32",
        "scopes=[local,global]",
    ]
    main(
        [
            *("evaluate", str(configs / "evaluate/model.yaml"), "stage=CLIP", f"checkpoint={clip}"),
            *("model={kind: towers}", f"output={tmp_path / 'ours'}", *shared),
        ]
    )
    sides = json.dumps([{"folder": str(from_model[0])}, {"folder": str(tmp_path / "ours")}])
    main(
        [
            *("compare", str(configs / "jobs/compare.yaml"), f"sides={sides}"),
            *(f"output={tmp_path / 'compared'}", "published=false"),
        ]
    )
    page = (tmp_path / "compared" / "compare.html").read_text()
    assert "CLIP" in page and "Which queries changed" in page and "What CLIP retrieves" in page
    summary = read_json(tmp_path / "compared" / "compare.json")
    assert {entry["task"] for entry in summary["tasks"]} == set(TASKS)
    assert any(item["key"] == "settings.model.kind" for item in summary["settings_that_differ"])
    assert "page: " in capsys.readouterr().out


@pytest.fixture(scope="module")
def sets(tiny, tmp_path_factory):
    """Three small sets in their authors' layouts, over pictures of the tiny world."""
    root = tmp_path_factory.mktemp("sets")
    pool = Mbeir(tiny.root).local_pool(TASK_BY_NAME["mscoco_task0"], "test")
    pictures = [Path(str(pool.candidate(row).img_path)) for row in range(4)]
    words = ["A red circle.", "A blue square.", "Two things.", "A star."]

    def put(path, value):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(json.dumps(value))

    def place(path, picture):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(picture, root / path)

    rows = [{"image_name": f"{n}.png", "caption": text} for n, text in enumerate(words)]
    put("sharegpt4v/datas_for_validation.json", rows)
    info = [{"id": n, "file_name": f"{n}.png"} for n in range(60)]
    put("circo/annotations/image_info_unlabeled2017.json", {"images": info})
    put("circo/annotations/test.json", [{"id": 7, "reference_img_id": 1, "relative_caption": "with a star"}])
    for n in range(60):
        place(f"circo/images/unlabeled2017/{n}.png", pictures[n % 4])
    for n, picture in enumerate(pictures):
        place(f"sharegpt4v/val_data/{n}.png", picture)
        place(f"images/val2017/{n}.png", picture)
    for name in ("add_att", "add_obj", "replace_att", "replace_obj", "replace_rel", "swap_att", "swap_obj"):
        pairs = {
            str(n): {"filename": f"{n}.png", "caption": words[n], "negative_caption": words[n - 1]}
            for n in range(4)
        }
        put(f"sugar-crepe/data/{name}.json", pairs)
    return root


@pytest.mark.slow
def test_zero_shot_sets_go_through_the_same_door(sets, tiny, tmp_path):
    zeroshot = {"root": str(sets), "sets": ["sharegpt4v", "circo_test", "sugarcrepe"]}
    values = {"checkpoint": str(tiny.home / "backbone"), "zeroshot": zeroshot, "depth": 50}
    document = run(tmp_path / "plain", **values)
    tasks, figures_of_sets = document["tasks"], document["settings"]["sets"]
    assert len(tasks) == 2 + 7 and "circo test" not in tasks
    answers = read_json(tmp_path / "plain" / "submissions" / "circo_test.json")
    assert list(answers) == ["7"] and len(answers["7"]) == 50 and len(set(answers["7"])) == 50
    seven = [entry["local"]["hit@1"] for name, entry in tasks.items() if name.startswith("sugarcrepe")]
    assert figures_of_sets["sugarcrepe"]["macro"] == pytest.approx(np.mean(seven))
    assert document["settings"]["data"]["ties"]["sugarcrepe: add_att"] == "lost"
    assert document["settings"]["prompts"]["sharegpt4v: image → text"] == [
        "Find an image caption describing the following everyday image."
    ]
    # With all the weight on the recall, re-ranking the whole pool changes nothing.
    again = run(
        tmp_path / "again",
        **values,
        rerank={"checkpoint": str(tiny.home / "backbone"), "depth": 60, "alpha": 1.0},
    )
    assert again["tasks"] == tasks
    judged = run(
        tmp_path / "judged",
        **values,
        rerank={"checkpoint": str(tiny.home / "backbone"), "depth": 60, "alpha": 0.0},
    )
    assert judged["settings"]["rerank"]["alpha"] == 0.0
    assert judged["tasks"].keys() == tasks.keys()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"checkpoint": "/m"}, "what is evaluated is not said"),
        ({"checkpoint": "/m", "root": "/r", "own": {"queries": "/q", "candidates": "/c"}}, "root and own"),
        ({"root": "/r"}, "give the checkpoint to embed with"),
        ({"root": "/r", "embeddings": "/e", "vectors": "/v"}, "embeddings and vectors each say"),
        ({"root": "/r", "runs": "/e", "instruction": "all"}, "runs were made with one instruction"),
        ({"root": "/r", "checkpoint": "/e", "rerank": {"checkpoint": "/x"}}, "either alpha or alpha_from"),
    ],
)
def test_settings_that_contradict_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        build_config({"stage": "x", "output": "/o"} | values, EvaluateConfig)


def copy_vectors(source, target, change):
    """All stores as matrices, each through `change(name, vectors, ids)`."""
    for folder in source.rglob("manifest.json"):
        store = EmbeddingStore.open(folder.parent)
        name = str(folder.parent.relative_to(source))
        vectors, ids = change(name, store.vectors(0, len(store)), store.ids.to_pylist())
        path = target / f"{name}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, vectors)
        path.with_name(f"{path.stem}_ids.txt").write_text("\n".join(ids) + "\n")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda name, v, ids: (np.ones_like(v), ids), "sampled vectors are all the same"),
        (lambda name, v, ids: (v * np.nan, ids), "zero, NaN or infinite"),
        (lambda name, v, ids: (v, [f"{did}0" for did in ids]), "Ids never match"),
        (lambda name, v, ids: (v[:-1], ids[:-1]), "Give the vectors of this data"),
        (lambda name, v, ids: (v[:, : 8 if "pools" in name else 16], ids), "width"),
    ],
)
def test_broken_vectors_never_get_a_figure(change, message, from_model, tiny, tmp_path):
    copy_vectors(from_model[0] / "embeddings", tmp_path / "npy", change)
    with pytest.raises(Exception, match=message) as refusal:
        run(tmp_path / "out", vectors=str(tmp_path / "npy"), root=str(tiny.root))
    assert getattr(refusal.value, "exit_code", 0) == 2
    assert not (tmp_path / "out" / "results.json").exists()


def test_vectors_of_two_checkpoints_are_refused(from_model, tiny, tmp_path):
    mixed = tmp_path / "mixed"
    shutil.copytree(from_model[0] / "embeddings", mixed)
    manifest = next((mixed / "pools").rglob("manifest.json"))
    values = read_json(manifest)
    values["settings"]["checkpoint"] = "another"
    manifest.write_text(json.dumps(values))
    with pytest.raises(DataError, match="vectors of 2 checkpoints"):
        run(tmp_path / "out", embeddings=str(mixed), root=str(tiny.root))
