import csv
import json
from collections import Counter
from pathlib import Path

import pytest
from caption_reader import answers, read_caption

from umarvel_ray.data.mbeir import TASK_BY_NAME, TASKS, Mbeir, content_key
from umarvel_ray.demo.plan import make_plan
from umarvel_ray.demo.world import WorldConfig, make_world, read_world_config, world_texts
from umarvel_ray.errors import OutputError

CONFIG = WorldConfig(
    seed=3,
    pixels=28,
    train_queries=8,
    val_queries=2,
    test_queries=4,
    listed_equivalents=0.5,
    twins=0.25,
    shared=0.5,
    sentence_pairs=6,
    captioned_scenes=3,
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("world") / "demo"
    make_world(CONFIG, output)
    return output


@pytest.fixture(scope="module")
def mbeir(world: Path) -> Mbeir:
    return Mbeir(world / "M-BEIR")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_same_settings_same_bytes_however_many_draw(world, tmp_path):
    drawn = []
    make_world(
        CONFIG, tmp_path / "again", workers=2, progress=lambda done, total: drawn.append((done, total))
    )
    assert contents(tmp_path / "again") == contents(world)
    assert read_world_config(world) == CONFIG
    total = len(make_plan(CONFIG).album.drawings)
    assert drawn[-1] == (total, total)
    assert total == len([*world.rglob("*.jpg")])


def test_all_kinds_of_task_are_there(mbeir):
    assert {task.task_id for task in mbeir.tasks("test")} == {task.task_id for task in TASKS}
    assert mbeir.tasks("val") == mbeir.tasks("test")


def test_every_positive_stands_in_its_pool(mbeir):
    for split in ("val", "test"):
        everywhere = mbeir.global_pool(split)
        for task in mbeir.tasks(split):
            pool, qrels = mbeir.local_pool(task, split), mbeir.qrels(task, split)
            queries = list(mbeir.queries(task, split))
            assert len(queries) == (CONFIG.val_queries if split == "val" else CONFIG.test_queries)
            for record in queries:
                assert record.query.modality == task.query_modality
                assert qrels[record.query.qid] == dict.fromkeys(record.positives, 1)
                own = [did for did in record.positives if did.startswith(f"{task.dataset_id}:")]
                assert own and own == list(record.positives[: len(own)])
                assert all(pool.find(did) is not None for did in own)
                assert all(
                    everywhere.get(did).modality == task.candidate_modality for did in record.positives
                )
            assert {candidate.modality for candidate in pool} == {task.candidate_modality}


def test_every_training_positive_stands_in_the_training_pool(mbeir):
    pool = mbeir.global_pool("train")
    union = list(mbeir.union_training_queries())
    distinct = [record for dataset in mbeir.training_datasets() for record in mbeir.training_queries(dataset)]
    assert len(distinct) == len({record.query.qid for record in distinct}) == 12 * CONFIG.train_queries
    assert {record.query.qid for record in union} == {record.query.qid for record in distinct}
    assert len(union) == len(distinct) + 4 * int(CONFIG.train_queries * CONFIG.upsampled)
    assert all(pool.find(did) is not None for record in union for did in record.positives)


def test_candidate_numbers_are_unique_over_all_pools(mbeir):
    """MSCOCO's val pools are the only ones that no global pool but val's holds in part."""
    pools = [mbeir.global_pool("train"), mbeir.global_pool("test")]
    pools += [mbeir.local_pool(TASK_BY_NAME[name], "val") for name in ("mscoco_task0", "mscoco_task3")]
    dids = [did for pool in pools for did in pool.dids()]
    assert len(dids) == len(set(dids))
    assert set(mbeir.global_pool("val").dids()) <= set(dids)
    local = [did for task in mbeir.tasks("test") for did in mbeir.local_pool(task, "test").dids()]
    assert sorted(local) == sorted(mbeir.global_pool("test").dids())


def test_other_pages_of_oven_and_infoseek_come_after_the_own(mbeir):
    for name, other in (("oven_task6", "6:"), ("oven_task8", "6:"), ("infoseek_task6", "5:")):
        records = list(mbeir.queries(TASK_BY_NAME[name], "test"))
        shared = [record for record in records if record.positives[-1].startswith(other)]
        assert len(shared) == len(records) * CONFIG.shared
        pool = mbeir.global_pool("test")
        for record in shared:
            own, page = pool.get(record.positives[0]), pool.get(record.positives[-1])
            assert (own.txt, own.img_path) == (page.txt, page.img_path)


def test_scenes_of_val_and_test_are_new_to_training(world, mbeir):
    """By what the captions say and by what was drawn, near misses included."""
    with open(world / "nli/nli_for_simcse.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        first, second, other = (read_caption(row[key]) for key in ("sent0", "sent1", "hard_neg"))
        assert first == second != other
        assert row["sent0"] != row["sent1"]
    captions = [row["caption"] for row in json.loads((world / "cc3m/chat.json").read_text())]
    texts = [row[key] for row in rows for key in row] + captions
    pool = mbeir.global_pool("train")
    coco = mbeir.training_queries("mscoco")
    texts += [c.txt for c in pool if c.did.startswith(("2:", "9:")) and c.txt]
    texts += [record.query.txt for record in coco if record.query.txt]
    training = {read_caption(text) for text in texts}
    for name in ("webqa_task1", "mscoco_task3"):
        for split in ("val", "test"):
            told = [read_caption(c.txt or "") for c in mbeir.local_pool(TASK_BY_NAME[name], split)]
            assert training.isdisjoint(told)
    drawings = make_plan(CONFIG).album.drawings
    held_out = {d.scene for d in drawings if d.path.split("/")[-2] in ("val", "test")}
    seen = {d.scene for d in drawings if d.path.split("/")[-2] in ("train", "images")}
    assert held_out.isdisjoint(seen | training)


def test_copies_are_unlisted_in_training_and_listed_in_test(mbeir):
    """Counted by meaning: MSCOCO's captions can be read."""
    task = TASK_BY_NAME["mscoco_task3"]
    pool = mbeir.local_pool(task, "test")
    meanings = {candidate.did: read_caption(candidate.txt or "") for candidate in pool}
    for record in mbeir.queries(task, "test"):
        meaning = meanings[record.positives[0]]
        assert {did for did, other in meanings.items() if other == meaning} == {*record.positives}
    positives = sum(len(record.positives) for record in mbeir.queries(task, "test"))
    assert positives == CONFIG.test_queries * (1 + CONFIG.listed_equivalents + CONFIG.twins)

    captions = {c.did: c.txt or "" for c in mbeir.global_pool("train") if c.did.startswith("9:") and c.txt}
    by_meaning = Counter(map(read_caption, captions.values()))
    by_text = Counter(captions.values())
    records = [record for record in mbeir.training_queries("mscoco") if record.task_id == 3]
    assert all(len(record.positives) == 1 for record in records)
    of_meaning = sum(by_meaning[read_caption(captions[record.positives[0]])] for record in records)
    of_text = sum(by_text[captions[record.positives[0]]] for record in records)
    assert of_text - len(records) == CONFIG.twins * len(records)
    assert of_meaning - of_text == CONFIG.equivalents * len(records)


def test_a_twin_is_equal_to_the_byte(mbeir):
    """NIGHTS: a twin's file is a copy under another name."""
    pool = mbeir.local_pool(TASK_BY_NAME["nights_task4"], "test")
    twins = 0
    for record in mbeir.queries(TASK_BY_NAME["nights_task4"], "test"):
        first, *others = (pool.get(did) for did in record.positives)
        for other in others:
            assert other.img_path != first.img_path
            twins += content_key(other) == content_key(first)
    assert twins == CONFIG.test_queries * CONFIG.twins


def test_a_question_has_one_meaning_in_its_pool(mbeir):
    task = TASK_BY_NAME["webqa_task1"]
    passages = {c.did: read_caption(c.txt or "") for c in mbeir.local_pool(task, "test")}
    for record in mbeir.queries(task, "test"):
        question = (record.query.txt or "").lower()
        assert {did for did, scene in passages.items() if answers(question, scene)} == {*record.positives}


def test_the_reference_picture_misleads_in_cirr(mbeir):
    task = TASK_BY_NAME["cirr_task7"]
    shown = {candidate.img_path for candidate in mbeir.local_pool(task, "test")}
    assert {record.query.img_path for record in mbeir.queries(task, "test")} <= shown


def test_every_text_of_training_is_given_for_the_vocabulary(world, mbeir):
    texts = set(world_texts(world))
    assert {candidate.txt or "" for candidate in mbeir.global_pool("train")} <= texts
    assert set(mbeir.instructions().prompts(9, "text", "image")) <= texts


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputError, match="no world"):
        make_world(CONFIG, tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
