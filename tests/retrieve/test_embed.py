"""A store is a pure function of source and settings: equal content once, every id once, bad rows by name."""

import json
import os

import numpy as np
import pytest
from fixtures_embed import StubEmbedder, candidate_line, embed_config, stub_model, vector_of, write_texts

from umarvel_ray.errors import ConfigError, DataError, ShardError
from umarvel_ray.retrieve.embed import Model, plan_stores
from umarvel_ray.retrieve.store import EmbeddingStore
from umarvel_ray.runtime.cluster import RuntimeSettings
from umarvel_ray.runtime.embedding import embed_stores

LOCAL = RuntimeSettings(kind="local")
TEXTS = ["a", "b", "a", "c", "d", "b", "e", "a", "e", "f", "g", "a", "a", "h"]
"""Copies within a shard of four rows and across shards; the fourth shard is copies and one original."""


def embed(config, model=None):
    return embed_stores(plan_stores(config), model or stub_model(), config, LOCAL)


def shards(config, name="pool"):
    folder = f"{config.output}/pools/{name}"
    files = [name for name in sorted(os.listdir(folder)) if name.endswith(".arrow")]
    return {name: open(f"{folder}/{name}", "rb").read() for name in files}


@pytest.fixture
def pool(tmp_path):
    path = tmp_path / "pool.jsonl"
    path.write_text("".join(candidate_line(f"9:{row}", txt=txt) for row, txt in enumerate(TEXTS)))
    return path


@pytest.mark.parametrize(("rows_per_shard", "window_rows"), [(4, 3), (4, 1), (5, 100), (100, 4)])
@pytest.mark.parametrize("duplicates", ["once", "each"])
def test_every_id_gets_the_vector_of_its_content(tmp_path, pool, rows_per_shard, window_rows, duplicates):
    config = embed_config(
        tmp_path, [pool], tmp_path / "out",
        rows_per_shard=rows_per_shard, window_rows=window_rows, duplicates=duplicates,
    )  # fmt: skip
    embedder = StubEmbedder()
    progress = embed(config, Model(embedder=lambda: embedder))
    store = EmbeddingStore.open(tmp_path / "out" / "pools" / "pool")
    assert store.ids.to_pylist() == [f"9:{row}" for row in range(len(TEXTS))]
    expected = np.stack([vector_of(txt.encode()) for txt in TEXTS])
    np.testing.assert_array_equal(store.vectors(0, len(store)), expected)
    store.verify()
    asked = [content.decode() for content in embedder.asked]
    assert sorted(asked) == sorted(set(TEXTS) if duplicates == "once" else TEXTS)
    copies = len(TEXTS) - len(set(TEXTS)) if duplicates == "once" else 0
    assert (progress.copies, store.counts["copies"], store.counts["embedded"]) == (copies, copies, len(asked))
    assert progress.rows_done == progress.rows == len(TEXTS)
    assert not [name for name in shards(config) if name.startswith("part")]


def test_equal_pictures_under_two_names_are_embedded_once(tmp_path):
    for name in ("kite", "again", "boat"):
        (tmp_path / f"{name}.img").write_bytes(b"PICTURE of a " + (b"boat" if name == "boat" else b"kite"))
    rows = [("kite", None), ("again", None), ("again", "with words"), ("boat", None), ("kite", "with words")]
    lines = [candidate_line(f"9:{n}", txt=txt, img_path=f"{img}.img") for n, (img, txt) in enumerate(rows)]
    (tmp_path / "pool.jsonl").write_text("".join(lines))
    embedder = StubEmbedder()
    embed(embed_config(tmp_path, [tmp_path / "pool.jsonl"], tmp_path / "out"), Model(lambda: embedder))
    assert len(embedder.asked) == 3
    vectors = EmbeddingStore.open(tmp_path / "out" / "pools" / "pool").vectors(0, 5)
    assert np.array_equal(vectors[0], vectors[1]) and np.array_equal(vectors[2], vectors[4])
    assert len(np.unique(vectors, axis=0)) == 3


def test_a_second_start_does_only_what_is_missing(tmp_path, pool):
    config = embed_config(tmp_path, [pool], tmp_path / "out")
    embed(config)
    before = shards(config)
    folder = tmp_path / "out" / "pools" / "pool"
    times = {name: (folder / name).stat().st_mtime_ns for name in before}
    embedder = StubEmbedder()
    assert embed(config, Model(lambda: embedder)).shards == 0
    assert not embedder.asked
    # The first holds originals of others; the last one has copies of it.
    for name in ("shard-00000.arrow", "shard-00003.arrow"):
        (folder / name).unlink()
    (folder / "shard-00001.arrow").write_bytes(before["shard-00001.arrow"][:-9])
    progress = embed(config, Model(lambda: embedder))
    assert shards(config) == before
    assert (progress.rows_found, progress.shards) == (4, 3)
    assert (folder / "shard-00002.arrow").stat().st_mtime_ns == times["shard-00002.arrow"]
    assert sorted(embedder.asked) == [b"a", b"b", b"c", b"d", b"e", b"h"]


def test_the_order_of_shards_does_not_matter(tmp_path, pool):
    """A part that a killed run left is taken up; files are the same."""
    config = embed_config(tmp_path, [pool], tmp_path / "a")
    embed(config)

    class Dies(StubEmbedder):
        def embed_items(self, items, *, max_tokens=8192):
            if any(item.content == b"c" for item in items):
                raise KeyboardInterrupt
            return super().embed_items(items)

    other = embed_config(tmp_path, [pool], tmp_path / "b")
    with pytest.raises(KeyboardInterrupt):
        embed(other, Model(Dies))
    embed(other)
    assert shards(config) == shards(other)


def test_other_settings_are_refused_by_name(tmp_path, pool):
    config = embed_config(tmp_path, [pool], tmp_path / "out")
    embed(config)
    for other in ({"dtype": "float16"}, {"duplicates": "each"}, {"window_rows": 2}):
        with pytest.raises(ShardError, match="made with other settings"):
            embed(embed_config(tmp_path, [pool], tmp_path / "out", **other))
    with pytest.raises(ConfigError, match=r"1 names are none of this job's stores \(first: pools/lake\)"):
        plan_stores(embed_config(tmp_path, [pool], tmp_path / "out", only=["pools/lake"]))


@pytest.fixture
def faulty(tmp_path):
    """Row 1 lacks its picture, rows 2 and 6 (its copy) hold half a one, row 4 cannot be tokenized."""
    (tmp_path / "half.img").write_bytes(b"half a PICTURE")
    lines = [
        candidate_line("9:0", txt="fine"),
        candidate_line("9:1", img_path="none.img"),
        candidate_line("9:2", img_path="half.img"),
        candidate_line("9:3", txt="good"),
        candidate_line("9:4", txt="\ud800 alone"),
        "{nope\n",
        candidate_line("9:6", img_path="half.img"),
        candidate_line("9:7", txt="fine"),
    ]
    path = tmp_path / "pool.jsonl"
    path.write_text("".join(lines))
    return path


def test_a_bad_row_stops_the_job_and_is_named(tmp_path, faulty):
    with pytest.raises(
        DataError, match=r"pool\.jsonl:2: 9:1 cannot be embedded: .*none\.img: no such image\."
    ):
        embed(embed_config(tmp_path, [faulty], tmp_path / "out"))
    assert not (tmp_path / "out" / "pools" / "pool" / "manifest.json").exists()


@pytest.mark.parametrize("rows_per_shard", [2, 3, 100])
def test_bad_rows_are_left_out_and_listed(tmp_path, faulty, rows_per_shard):
    config = embed_config(
        tmp_path,
        [faulty],
        tmp_path / "out",
        rows_per_shard=rows_per_shard,
        bad_items="skip",
        max_bad_share=0.7,
    )
    progress = embed(config)
    folder = tmp_path / "out" / "pools" / "pool"
    store = EmbeddingStore.open(folder)
    assert store.ids.to_pylist() == ["9:0", "9:3", "9:7"]
    expected = np.stack([vector_of(text) for text in (b"fine", b"good", b"fine")])
    np.testing.assert_array_equal(store.vectors(0, 3), expected)
    np.testing.assert_array_equal(store.gather(np.array([2, 0])), expected[[2, 0]])
    store.verify()
    table = [json.loads(line) for line in (folder / "errors.jsonl").read_text().splitlines()]
    rows = [(1, "9:1"), (2, "9:2"), (4, "9:4"), (5, None), (6, "9:6")]
    assert [(row["row"], row["id"]) for row in table] == rows
    assert [row["where"].rpartition(":")[2] for row in table] == ["2", "3", "5", "6", "7"]
    assert "half.img" in table[1]["error"] and "half.img" in table[4]["error"]
    assert (progress.bad, store.num_bad, progress.rows_done) == (5, 5, 8)


def test_too_many_bad_rows_stop_the_job(tmp_path, faulty):
    config = embed_config(tmp_path, [faulty], tmp_path / "out", bad_items="skip", max_bad_share=0.3)
    with pytest.raises(DataError, match=r"of 8 rows cannot be embedded, max_bad_share allows 30\.0000%"):
        embed(config)


def test_an_id_that_stands_twice_is_refused_before_anything_is_embedded(tmp_path):
    lines = [candidate_line(did, txt=did + str(n)) for n, did in enumerate(["9:1", "9:2", "9:1"])]
    (tmp_path / "pool.jsonl").write_text("".join(lines))
    embedder = StubEmbedder()
    with pytest.raises(DataError, match=r"pool\.jsonl:3: '9:1' stands in .*pool\.jsonl:1 already"):
        embed(embed_config(tmp_path, [tmp_path / "pool.jsonl"], tmp_path / "out"), Model(lambda: embedder))
    assert not embedder.asked


def test_many_pools_are_one_stream(tmp_path):
    pools = [write_texts(tmp_path / f"{name}.jsonl", rows) for name, rows in (("a", 5), ("b", 1), ("c", 9))]
    progress = embed(embed_config(tmp_path, pools, tmp_path / "out"))
    assert (progress.rows_done, progress.items) == (15, 15)
    for name, rows in (("a", 5), ("b", 1), ("c", 9)):
        assert len(EmbeddingStore.open(tmp_path / "out" / "pools" / name)) == rows
    only = embed_config(tmp_path, pools, tmp_path / "only", only=["pools/b"])
    assert [plan.source.name for plan in plan_stores(only)] == ["pools/b"]
