"""M-BEIR as its authors publish it: the tasks, a small world written and read back, and every fault found."""

import json
import pickle

import fsspec
import pytest
from PIL import Image

from umarvel_ray.data.check import check_mbeir
from umarvel_ray.data.mbeir import (
    TASK_BY_NAME,
    TASKS,
    Instructions,
    Mbeir,
    Pool,
    QueryRecord,
    QuerySet,
    content_key,
    local_pool_name,
    write_instructions,
    write_pool,
    write_queries,
)
from umarvel_ray.data.records import Candidate, Query
from umarvel_ray.data.trec import write_qrels
from umarvel_ray.errors import DataError
from umarvel_ray.storage import RemotePath

COCO, OVEN = TASK_BY_NAME["mscoco_task0"], TASK_BY_NAME["oven_task6"]


@pytest.fixture
def root(tmp_path):
    """MSCOCO's task 0; OVEN's task 6, whose query lists a passage of InfoSeek as well; a training split."""
    root = tmp_path / "M-BEIR"
    images = root / "mbeir_images"
    images.mkdir(parents=True)
    for name, colour in [("kite", "red"), ("kite_again", "red"), ("boat", "blue"), ("tower", "grey")]:
        Image.new("RGB", (8, 6), colour).save(images / f"{name}.jpg")
    mbeir = Mbeir(root)
    pictures = [
        Candidate(did=f"9:{n}", img_path=str(images / f"{name}.jpg"))
        for n, name in [(7, "kite"), (8, "kite_again"), (3, "boat")]
    ]
    passages = [Candidate(did="5:1", txt="A tower in Paris."), Candidate(did="5:2", txt="A bridge.")]
    foreign = Candidate(did="6:9", txt="A tower in Paris.")
    captions = [
        QueryRecord(query=Query(qid="9:1", txt="A red kite.\u2028Flying."), positives=("9:7",)),
        QueryRecord(query=Query(qid="9:2", txt="A boat."), positives=("9:3",), negatives=("9:7",)),
    ]
    tower = Query(qid="5:1", txt="Where is it?", img_path=str(images / "tower.jpg"))
    question = QueryRecord(query=tower, positives=("5:1", "6:9"), task_id=6)
    write_pool(mbeir.local_pool_path(COCO, "test"), pictures, root)
    write_pool(mbeir.local_pool_path(OVEN, "test"), passages, root)
    for split in ("test", "train"):
        write_pool(mbeir.global_pool_path(split), [*passages, foreign, *pictures], root)
    write_queries(mbeir.queries_path(COCO, "test"), captions, root)
    write_queries(mbeir.queries_path(OVEN, "test"), [question], root)
    write_queries(mbeir.training_queries_path("mscoco"), captions, root)
    write_queries(mbeir.union_training_queries_path(), [*captions, captions[0]], root)
    for path in (mbeir.qrels_path(COCO, "test"), mbeir.training_qrels_path("mscoco")):
        write_qrels(path, {"9:1": {"9:7": 1}, "9:2": {"9:3": 1}}, task_ids={"9:1": 0, "9:2": 0})
    write_qrels(mbeir.qrels_path(OVEN, "test"), {"5:1": {"5:1": 1, "6:9": 1}})
    write_instructions(
        mbeir.instructions_path(),
        {
            (9, "text", "image"): ["Find a photo.", "Show it.", "Get it."],
            (5, "image,text", "text"): ["Answer."],
        },
    )
    return root


def rewrite(path, change, *, row=0):
    """Change the object of one line, or replace the line by a string."""
    lines = path.read_text().split("\n")
    lines[row] = change if isinstance(change, str) else json.dumps(json.loads(lines[row]) | change)
    path.write_text("\n".join(lines))


def test_the_sixteen_tasks():
    """Against the table of the papers: order, ids, modalities, k."""
    assert [task.name for task in TASKS] == [
        "visualnews_task0", "mscoco_task0", "fashion200k_task0", "webqa_task1", "edis_task2", "webqa_task2",
        "visualnews_task3", "mscoco_task3", "fashion200k_task3", "nights_task4", "oven_task6",
        "infoseek_task6", "fashioniq_task7", "cirr_task7", "oven_task8", "infoseek_task8",
    ]  # fmt: skip
    assert {task.name for task in TASKS if task.headline_k == 10} == {
        "fashion200k_task0", "fashion200k_task3", "fashioniq_task7",
    }  # fmt: skip
    assert {task.headline_k for task in TASKS} == {5, 10}
    assert {task.dataset: task.dataset_id for task in TASKS} == {
        "visualnews": 0, "fashion200k": 1, "webqa": 2, "edis": 3, "nights": 4, "oven": 5, "infoseek": 6,
        "fashioniq": 7, "cirr": 8, "mscoco": 9,
    }  # fmt: skip
    assert {task.task_id: task.kind for task in TASKS} == {
        0: "text → image", 1: "text → text", 2: "text → image+text", 3: "image → text", 4: "image → image",
        6: "image+text → text", 7: "image+text → image", 8: "image+text → image+text",
    }  # fmt: skip
    assert TASK_BY_NAME["edis_task2"].domain == "news"
    names = {local_pool_name(task, split) for task in TASKS for split in ("val", "test")}
    assert len(names) == 18
    assert {name for name in names if name.endswith(("val", "test"))} == {
        f"mscoco_task{n}_{split}" for n in (0, 3) for split in ("val", "test")
    }


def test_a_world_is_read_as_written(root):
    mbeir = Mbeir(root)
    assert mbeir.tasks("test") == (COCO, OVEN)
    assert mbeir.tasks("val") == ()
    assert mbeir.training_datasets() == ("mscoco",)
    queries = mbeir.queries(COCO, "test")
    assert [record.query.qid for record in queries] == queries.qids() == ["9:1", "9:2"]
    assert queries[0].query.txt == "A red kite.\u2028Flying."
    assert (queries[1].positives, queries[1].negatives, queries[1].line) == (("9:3",), ("9:7",), 2)
    assert queries.row_of("9:2") == 1
    question = mbeir.queries(OVEN, "test")[0]
    assert question.query.img_path == str(root / "mbeir_images" / "tower.jpg")
    assert (question.task_id, question.query.modality) == (6, "image,text")
    pool = mbeir.local_pool(COCO, "test")
    assert (pool.name, len(pool), pool.dids()) == ("mscoco_task0_test", 3, ["9:7", "9:8", "9:3"])
    assert pool.candidate(2) == pool.get("9:3") == list(pool)[2]
    assert (pool.find("9:3"), pool.find("9:4")) == (2, None)
    assert mbeir.global_pool("test").name == "union_test"
    assert mbeir.qrels(OVEN, "test") == {"5:1": {"5:1": 1, "6:9": 1}}
    assert mbeir.training_qrels("mscoco") == mbeir.qrels(COCO, "test")
    assert len(mbeir.training_queries("mscoco")) == 2
    assert pickle.loads(pickle.dumps(pool)).get("9:8") == pool.candidate(1)
    assert pickle.loads(pickle.dumps(queries))[0] == queries[0]


def test_the_lines_are_those_of_the_published_files(root):
    mbeir = Mbeir(root)
    assert json.loads(mbeir.queries_path(OVEN, "test").read_text()) == {
        "qid": "5:1", "query_txt": "Where is it?", "query_img_path": "mbeir_images/tower.jpg",
        "query_modality": "image,text", "query_src_content": None, "pos_cand_list": ["5:1", "6:9"],
        "neg_cand_list": [], "task_id": 6,
    }  # fmt: skip
    assert json.loads(mbeir.local_pool_path(COCO, "test").read_text().split("\n")[0]) == {
        "did": "9:7", "txt": None, "img_path": "mbeir_images/kite.jpg", "modality": "image",
        "src_content": None,
    }  # fmt: skip


def test_missing_files_and_ids_are_named(root):
    mbeir = Mbeir(root)
    with pytest.raises(
        DataError, match=r"_test.jsonl: missing. Put M-BEIR's query/test/mbeir_cirr_task7_test.jsonl"
    ):
        mbeir.queries(TASK_BY_NAME["cirr_task7"], "test")
    with pytest.raises(DataError, match="no such folder"):
        Mbeir(root / "nowhere")
    with pytest.raises(DataError, match="no candidate 9:99 among 3"):
        mbeir.local_pool(COCO, "test").get("9:99")
    with pytest.raises(DataError, match="no query 9:99 among 2"):
        mbeir.queries(COCO, "test").row_of("9:99")


def test_the_union_file_may_repeat_queries(root):
    union = Mbeir(root).union_training_queries()
    assert [record.query.qid for record in union] == ["9:1", "9:2", "9:1"]
    assert union.find("9:1") == 0
    with pytest.raises(DataError, match=r"train.jsonl:3: qid '9:1' stands in line 1 already"):
        union.row_of("9:2")


@pytest.mark.parametrize("spelling", ["image,text", "text,image", "text, image"])
def test_modalities_are_read_in_any_order(tmp_path, spelling):
    path = tmp_path / "pool.jsonl"
    path.write_text(json.dumps({"did": "3:1", "txt": "a", "img_path": "a.jpg", "modality": spelling}))
    assert Pool(path, tmp_path).candidate(0).modality == "image,text"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"modality": "text"}, "modality disagrees with the content: 9:8 says 'text' but holds image"),
        ({"modality": "image,text"}, "disagrees"),
        ({"img_path": None}, "holds nothing"),
        ({"img_path": ""}, "holds nothing"),
        ({"modality": "picture"}, "modality is no modality: 9:8 has 'picture'"),
        ({"modality": None}, "no modality"),
        ({"modality": "text,text"}, "no modality"),
        ({"txt": 7}, "txt is neither text nor null"),
        ({"did": 98}, "did is no name: 98"),
    ],
)
def test_a_broken_candidate_is_named(root, change, message):
    path = Mbeir(root).local_pool_path(COCO, "test")
    rewrite(path, change, row=1)
    pool = Pool(path, root)
    pool.candidate(0)
    with pytest.raises(DataError, match=f"pool.jsonl:2: .*{message}"):
        pool.candidate(1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pos_cand_list": []}, "pos_cand_list is empty: 9:2"),
        ({"pos_cand_list": "9:3"}, "pos_cand_list is no list of dids"),
        ({"neg_cand_list": [3]}, "neg_cand_list is no list of dids"),
        ({"query_modality": "image"}, "query_modality disagrees"),
        ({"task_id": "0"}, "task_id is no number: 9:2 has '0'"),
        ({"qid": None}, "qid is no name"),
    ],
)
def test_a_broken_query_is_named(root, change, message):
    path = Mbeir(root).queries_path(COCO, "test")
    rewrite(path, change, row=1)
    with pytest.raises(DataError, match=f"test.jsonl:2: {message}"):
        QuerySet(path, root)[1]


def test_twins_share_their_content_key(root):
    """Same bytes under another name and did; a text is never a picture; a replaced picture is read again."""
    mbeir = Mbeir(root)
    pool = mbeir.local_pool(COCO, "test")
    kite, again, boat = (pool.content_key(row) for row in range(3))
    assert kite == again != boat
    whole = mbeir.global_pool("test")
    assert content_key(whole.get("5:1")) == content_key(whole.get("6:9")) != content_key(whole.get("5:2"))
    assert content_key(Query(qid="5:3", txt="A bridge.")) == content_key(whole.get("5:2"))
    assert content_key(Candidate(did="9:9", txt="A kite.", img_path=pool.candidate(0).img_path)) != kite
    Image.new("RGB", (9, 9), "green").save(root / "mbeir_images" / "kite_again.jpg")
    assert pool.content_key(1) != kite
    (root / "mbeir_images" / "boat.jpg").unlink()
    with pytest.raises(DataError, match=r"boat.jpg: the image of 9:3 cannot be read"):
        pool.content_key(2)


def test_in_object_storage_a_key_costs_a_read_and_nothing_else(root, tmp_path, monkeypatch):
    """The same key as on a disk; a picture is fetched once, and no store is asked for its size."""
    monkeypatch.setenv("UMARVEL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(RemotePath, "_info", lambda path: pytest.fail(f"asked for {path}"))
    fetched: list[str] = []
    read_bytes = RemotePath.read_bytes
    monkeypatch.setattr(
        RemotePath, "read_bytes", lambda path: (fetched.append(path.name), read_bytes(path))[1]
    )
    picture = root / "mbeir_images" / "kite.jpg"
    fsspec.filesystem("memory").pipe("/keys-test/kite.jpg", picture.read_bytes())
    here, there = (
        Candidate(did=f"9:{n}", img_path=path)
        for n, path in enumerate([str(picture), "memory://keys-test/kite.jpg"])
    )
    assert content_key(here) == content_key(there) == content_key(there)
    assert fetched == ["kite.jpg"]
    with pytest.raises(DataError, match=r"memory://keys-test/none.jpg: the image of 9:2 cannot be read"):
        content_key(Candidate(did="9:2", img_path="memory://keys-test/none.jpg"))


def test_instructions_are_chosen_by_qid_and_seed(root):
    table = Mbeir(root).instructions()
    prompts = table.prompts(9, "text", "image")
    assert prompts == ("Find a photo.", "Show it.", "Get it.")
    qids = [f"9:{n}" for n in range(600)]

    def choose(qid, **how):
        return table.choose(qid, "text", "image", **how)

    assert {choose(qid, choice="first", seed=1) for qid in qids} == {"Find a photo."}
    drawn = [choose(qid, choice="seeded", seed=1) for qid in qids]
    assert drawn[::-1] == [choose(qid, choice="seeded", seed=1) for qid in reversed(qids)]
    assert drawn != [choose(qid, choice="seeded", seed=2) for qid in qids]
    # 200 expected of each; 5 standard deviations are 58.
    assert all(140 < drawn.count(prompt) < 260 for prompt in prompts)
    with pytest.raises(DataError, match=r"no row for data set 9 \(mscoco\), image → text among 2"):
        table.choose("9:1", "image", "text", choice="first", seed=0)
    with pytest.raises(DataError, match="names no data set"):
        choose("nine", choice="first", seed=0)


def test_instruction_rows_are_read_by_position(tmp_path):
    path = tmp_path / "query_instructions.tsv"
    path.write_text(
        "any\theader\n text \timage\tMSCOCO\t9\tOne.\t\t Two. \t\r\n\ntext,image\ttext\tOVEN\t5\tThree.\n"
    )
    table = Instructions.read(path)
    assert table.prompts(9, "text", "image") == ("One.", "Two.")
    assert table.prompts(5, "image,text", "text") == ("Three.",)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("text\timage\tMSCOCO\t9", "not an instruction row"),
        ("text\timage\tMSCOCO\t9\t\t", "not an instruction row"),
        ("words\timage\tMSCOCO\t9\tOne.", "not an instruction row"),
        ("text\timage\tMSCOCO\tnine\tOne.", "not an instruction row"),
        ("text\timage\tCOCO\t9\tOne.", "a second row for data set 9"),
    ],
)
def test_a_broken_instruction_row_is_named(tmp_path, row, message):
    path = tmp_path / "query_instructions.tsv"
    path.write_text(f"header\ntext\timage\tMSCOCO\t9\tOne.\n{row}\n")
    with pytest.raises(DataError, match=f"instructions.tsv:3: {message}"):
        Instructions.read(path)


def test_a_sound_world_has_no_fault(root):
    """OVEN's positive of InfoSeek is not in the local pool, and need not be."""
    assert check_mbeir(root, splits=("train", "test"), images="decode") == []


def fault_of(root, **options):
    faults = check_mbeir(root, **({"splits": ("test",), "tasks": (COCO, OVEN), "images": "decode"} | options))
    assert all("\n" not in fault for fault in faults)
    return [fault.removeprefix(f"{root}/") for fault in faults]


COCO_POOL = "cand_pool/local/mbeir_mscoco_task0_test_cand_pool.jsonl"
OVEN_POOL = "cand_pool/local/mbeir_oven_task6_cand_pool.jsonl"
COCO_QUERIES = "query/test/mbeir_mscoco_task0_test.jsonl"
OVEN_QUERIES = "query/test/mbeir_oven_task6_test.jsonl"


@pytest.mark.parametrize(
    ("name", "row", "change", "expected"),
    [
        (COCO_POOL, 1, "{", f"{COCO_POOL}:2: not valid JSON: Expecting"),
        (COCO_POOL, 1, "[]", f"{COCO_POOL}:2: not a JSON object: a list"),
        (COCO_POOL, 1, {"modality": "text"}, f"{COCO_POOL}:2: modality disagrees with the content: 9:8"),
        (COCO_POOL, 1, {"did": "9:7"}, f"{COCO_POOL}:2: a did repeats: the did of line 1"),
        (COCO_POOL, 2, {"did": "9:4"}, f"{COCO_QUERIES}:2: a positive outside the local pool: candidate 9:3"),
        (COCO_POOL, 1, {"img_path": "no.jpg"}, f"{COCO_POOL}:2: the image is missing: {{root}}/no.jpg"),
        (OVEN_POOL, 1, {"txt": None, "img_path": "mbeir_images/kite.jpg", "modality": "image"},
         f"{OVEN_POOL}:2: a candidate of another task: 5:2 is image, oven_task6 seeks text"),
        (OVEN_QUERIES, 0, {"pos_cand_list": ["6:9"]},
         f"{OVEN_QUERIES}:1: no positive in the pool: query 5:1"),
        (OVEN_QUERIES, 0, {"pos_cand_list": ["5:1", "6:8"]},
         f"{OVEN_QUERIES}:1: a positive outside the global pool: candidate 6:8"),
        (COCO_QUERIES, 1, {"qid": "9:1"}, f"{COCO_QUERIES}:2: a qid repeats: query 9:1 stands in line 1"),
        (COCO_QUERIES, 1, {"task_id": 3},
         f"{COCO_QUERIES}:2: a query of another task: query 9:2 has task_id 3"),
        (COCO_QUERIES, 1, {"query_modality": "Text"}, f"{COCO_QUERIES}:2: query_modality is no modality"),
        (COCO_QUERIES, 1, {"pos_cand_list": ["9:7", "9:3"]},
         "qrels/test/mbeir_mscoco_task0_test_qrels.txt: the qrels disagree with the queries: query 9:2 of "
         "mbeir_mscoco_task0_test.jsonl:2 and its judgements differ in candidate 9:7"),
        ("qrels/test/mbeir_mscoco_task0_test_qrels.txt", 1, "9:2 0 9:3 one 0",
         "qrels/test/mbeir_mscoco_task0_test_qrels.txt: not a qrels file"),
        ("instructions/query_instructions.tsv", 1, "",
         "instructions/query_instructions.tsv: the instructions fall short: no row for data set 9"),
    ],
)  # fmt: skip
def test_each_fault_is_found_once(root, name, row, change, expected):
    rewrite(root / name, change, row=row)
    faults = fault_of(root)
    assert [fault for fault in faults if fault.startswith(expected.format(root=root))], faults
    assert len([fault for fault in faults if fault.startswith(name)]) <= 1, faults


def test_faults_of_pictures_are_counted(root):
    """A picture of two pools that lost its end: once per file, the first named."""
    kite = root / "mbeir_images" / "kite.jpg"
    kite.write_bytes(kite.read_bytes()[:-200])
    (root / "mbeir_images" / "kite_again.jpg").write_text("no picture")
    faults = fault_of(root)
    assert len(faults) == 2
    assert faults[0].startswith("cand_pool/global/mbeir_union_test_cand_pool.jsonl:4: the image is broken: ")
    assert faults[1].startswith(f"{COCO_POOL}:1: the image is broken: {kite}: ")
    assert all("(2 such in this file, this is the first). Copy the file again." in fault for fault in faults)
    assert fault_of(root, images="exists") == fault_of(root, images="none") == []


def test_large_pictures_are_not_decoded(root, monkeypatch):
    monkeypatch.setattr("umarvel_ray.data.check.MAX_IMAGE_PIXELS", 47)
    assert "tower.jpg has 8 x 6 pixels of 47 in all" in fault_of(root, tasks=(OVEN,))[-1]
    monkeypatch.setattr("umarvel_ray.data.check.MAX_IMAGE_BYTES", 10)
    assert "bytes of 10. Scale it down." in fault_of(root, tasks=(OVEN,))[-1]


def test_missing_and_empty_files_are_faults(root):
    """A missing pool is one fault, not one for each query as well."""
    (root / COCO_POOL).unlink()
    (root / OVEN_POOL).write_text("\n")
    (root / "qrels/test/mbeir_mscoco_task0_test_qrels.txt").unlink()
    assert [fault.split(": ")[:2] for fault in fault_of(root)] == [
        [COCO_POOL, "missing"],
        ["qrels/test/mbeir_mscoco_task0_test_qrels.txt", "missing"],
        [OVEN_POOL, "empty"],
        [f"{OVEN_QUERIES}:1", "a positive outside the local pool"],
    ]
    assert "no query files" in fault_of(root, tasks=None, splits=("val",))[0]
    assert "no such folder" in check_mbeir(root / "nowhere")[0]


def test_training_faults(root):
    mbeir = Mbeir(root)
    rewrite(mbeir.training_queries_path("mscoco"), {"neg_cand_list": ["9:99"]}, row=1)
    rewrite(mbeir.union_training_queries_path(), {"pos_cand_list": ["9:98"]}, row=2)
    advice = "is not in mbeir_union_train_cand_pool.jsonl. Use the pool these queries were written for."
    assert fault_of(root, splits=("train",), tasks=None) == [
        "query/union_train/mbeir_union_up_train.jsonl:3: a positive outside the global pool: "
        f"candidate 9:98 of query 9:1 {advice}",
        "query/train/mbeir_mscoco_train.jsonl:2: a negative outside the pool: "
        f"candidate 9:99 of query 9:2 {advice}",
    ]


@pytest.mark.parametrize("prompts", [[], [" "], ["a\tb"], ["a\nb"]])
def test_instructions_that_cannot_be_read_back_are_not_written(tmp_path, prompts):
    with pytest.raises(DataError, match="the prompts of data set 9"):
        write_instructions(tmp_path / "table.tsv", {(9, "text", "image"): prompts})
    assert not (tmp_path / "table.tsv").exists()
