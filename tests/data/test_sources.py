"""Query sets and pools by name: what stands in each, and that they travel as their settings."""

import pickle

import pytest

from umarvel_ray.data.mbeir import TASK_BY_NAME, Mbeir, QueryRecord
from umarvel_ray.data.records import Query
from umarvel_ray.data.sources import (
    QuerySource,
    RecordReader,
    chosen_tasks,
    local_pool_source,
    pool_sources,
    query_source,
    task_of,
    tasks_of_split,
)
from umarvel_ray.errors import ConfigError, DataError

COCO, CAPTION, OVEN, INFOSEEK = (
    TASK_BY_NAME[name] for name in ("mscoco_task0", "mscoco_task3", "oven_task6", "infoseek_task6")
)


@pytest.fixture
def mbeir(mbeir_root) -> Mbeir:
    return Mbeir(mbeir_root)


def qids(source: QuerySource) -> list[str]:
    return [source[row].qid for row in range(len(source))]


def test_the_tasks_of_a_split_in_the_order_of_the_tables(mbeir):
    assert tasks_of_split(mbeir, "train") == (COCO, CAPTION, OVEN, INFOSEEK)
    assert tasks_of_split(mbeir, "test") == (COCO, OVEN)
    assert chosen_tasks(mbeir, "test", None) == (COCO, OVEN)
    assert chosen_tasks(mbeir, "train", ("oven_task6", "mscoco_task0")) == (COCO, OVEN)
    with pytest.raises(ConfigError, match=r"1 of 2 tasks have no test file \(first: cirr_task7\)"):
        chosen_tasks(mbeir, "test", ("oven_task6", "cirr_task7"))


def test_a_training_file_of_two_tasks_is_two_sources(mbeir):
    captions, photos = query_source(mbeir, CAPTION, "train"), query_source(mbeir, COCO, "train")
    assert (photos.name, qids(photos)) == ("queries/train/mscoco_task0", ["9:101", "9:103"])
    assert (captions.name, qids(captions)) == ("queries/train/mscoco_task3", ["9:102"])
    assert captions.record(0).positives == ("9:11", "9:12")
    assert photos.fingerprint != captions.fingerprint
    test = query_source(mbeir, COCO, "test")
    assert (test.name, qids(test)) == ("queries/test/mscoco_task0", ["9:101"])


def test_the_instruction_is_chosen_by_the_setting(mbeir):
    first = query_source(mbeir, COCO, "train")
    assert [first[row].instruction for row in range(2)] == ["Find a photo."] * 2
    seeded = [query_source(mbeir, COCO, "train", choice="seeded", seed=seed) for seed in range(20)]
    assert {source[0].instruction for source in seeded} == {
        "Find a photo.", "Show it.", "Get the picture.", "Which image?",
    }  # fmt: skip
    assert seeded[3][0] == query_source(mbeir, COCO, "train", choice="seeded", seed=3)[0]
    assert len({source.fingerprint for source in [first, *seeded]}) == 21


def test_local_training_pools_are_parts_of_the_global_one(mbeir):
    pools = pool_sources(mbeir, "train")
    dids = {pool.name: [pool[row].did for row in range(len(pool))] for pool in pools}
    assert dids == {
        "pools/train/mscoco_image": ["9:1", "9:2", "9:3"],
        "pools/train/mscoco_text": ["9:11", "9:12"],
        "pools/train/oven+infoseek_text": ["5:1", "6:1", "6:2"],
    }
    assert local_pool_source(mbeir, OVEN, "train") == local_pool_source(mbeir, INFOSEEK, "train")
    assert sorted(did for row in dids.values() for did in row) == sorted(mbeir.global_pool("train").dids())
    assert len({pool.fingerprint for pool in pools}) == 3


def test_test_pools_are_the_files(mbeir):
    pools = pool_sources(mbeir, "test")
    assert [(pool.name, len(pool)) for pool in pools] == [
        ("pools/mscoco_task0_test", 3),
        ("pools/oven_task6", 1),
    ]
    assert pool_sources(mbeir, "test", [OVEN]) == pools[1:]
    assert local_pool_source(mbeir, OVEN, "val") == pools[1]
    assert local_pool_source(mbeir, COCO, "val").name == "pools/mscoco_task0_val"


def test_sources_travel_as_their_settings(mbeir):
    for source in (query_source(mbeir, COCO, "train"), local_pool_source(mbeir, CAPTION, "train")):
        opened = [source[row] for row in range(len(source))]
        data = pickle.dumps(source)
        assert len(data) < 2000
        again = pickle.loads(data)
        assert again == source and again.fingerprint == source.fingerprint
        assert [again[row] for row in range(len(again))] == opened


def test_candidates_are_found_in_whichever_pool_has_them(mbeir):
    reader = RecordReader(pool_sources(mbeir, "test"))
    assert reader.candidate("9:3").img_path is not None
    assert reader.candidate("5:1").txt == "A tower in Paris."
    with pytest.raises(DataError, match=r"candidate 6:2: in none of 2 pools \(.*mscoco_task0.*oven_task6"):
        reader.candidate("6:2")


def test_a_query_of_no_task_is_refused():
    record = QueryRecord(query=Query(qid="9:1", txt="a"), positives=("9:1",), task_id=7, line=12)
    with pytest.raises(DataError, match="query 9:1, line 12: M-BEIR has no task 7 for data set 9"):
        task_of(record)
