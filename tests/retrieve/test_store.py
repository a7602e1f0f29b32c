"""Embedding stores: what is written is read, and what is missing, broken or of other settings is refused."""

import pickle

import numpy as np
import pyarrow as pa
import pytest

from umarvel_ray.errors import DataError, ShardError
from umarvel_ray.retrieve.store import (
    EmbeddingPool,
    EmbeddingStore,
    ShardRange,
    finish_store,
    finished_shards,
    plan_shards,
    write_shard,
)

FINGERPRINT = "0123456789abcdef"


def some_vectors(num: int, dim: int = 6, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((num, dim)).astype(np.float32)


def make_store(folder, vectors, *, rows_per_shard=4, dtype="float32", name="9", fingerprint=FINGERPRINT):
    plan = plan_shards(len(vectors), rows_per_shard)
    for shard in plan:
        ids = [f"{name}:{row}" for row in range(shard.start, shard.stop)]
        write_shard(
            folder, shard, ids, vectors[shard.start : shard.stop], dtype=dtype, fingerprint=fingerprint
        )
    return finish_store(folder, plan, fingerprint=fingerprint, settings={"checkpoint": "tiny"})


def test_the_plan_covers_every_row_once():
    assert plan_shards(10, 4) == [ShardRange(0, 0, 4), ShardRange(1, 4, 8), ShardRange(2, 8, 10)]
    assert plan_shards(0, 4) == []
    assert plan_shards(12, 4)[-1].file_name == "shard-00002.arrow"
    with pytest.raises(ShardError, match="at least one row"):
        plan_shards(10, 0)


@pytest.mark.parametrize(
    # Half a unit in the last place of 24, 11 and 8 significant bits.
    ("dtype", "relative"),
    [("float32", 0.0), ("float16", 2.0**-11), ("bfloat16", 2.0**-8)],
)
def test_what_is_written_is_read(tmp_path, dtype, relative):
    vectors = some_vectors(10)
    store = make_store(tmp_path / "store", vectors, dtype=dtype)
    assert (len(store), store.dim, store.settings) == (10, 6, {"checkpoint": "tiny"})
    assert store.ids.to_pylist() == [f"9:{row}" for row in range(10)]
    for start, stop in ((0, 10), (3, 9), (4, 8), (5, 5), (9, 10)):
        read = store.vectors(start, stop)
        assert read.dtype == np.float32 and read.shape == (stop - start, 6)
        np.testing.assert_allclose(read, vectors[start:stop], rtol=relative, atol=0)
    rows = np.array([9, 0, 4, 4])
    np.testing.assert_array_equal(store.gather(rows), store.vectors(0, 10)[rows])
    store.verify()


def test_bfloat16_rounds_as_torch_does(tmp_path):
    torch = pytest.importorskip("torch")
    vectors = some_vectors(64, dim=33)
    store = make_store(tmp_path / "store", vectors, dtype="bfloat16")
    expected = torch.from_numpy(vectors).bfloat16().float().numpy()
    np.testing.assert_array_equal(store.vectors(0, 64), expected)


def test_a_shard_is_plain_arrow(tmp_path):
    vectors = some_vectors(3)
    make_store(tmp_path / "store", vectors)
    table = pa.ipc.open_file(tmp_path / "store" / "shard-00000.arrow").read_all()
    assert table.column("id").to_pylist() == ["9:0", "9:1", "9:2"]
    assert table.column("vector").to_pylist() == vectors.tolist()


def test_the_same_shard_is_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        make_store(tmp_path / name, some_vectors(5))
    for file in ("shard-00000.arrow", "shard-00001.arrow", "manifest.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert EmbeddingStore.open(tmp_path / "a").fingerprint == EmbeddingStore.open(tmp_path / "b").fingerprint


def test_bad_vectors_are_named(tmp_path):
    def write(vectors, dtype="float32"):
        shard = ShardRange(0, 0, len(vectors))
        write_shard(tmp_path, shard, ["a", "b", "c"], vectors, dtype=dtype, fingerprint=FINGERPRINT)

    for bad, what in ((np.nan, "not finite"), (np.inf, "not finite"), (0.0, "zero")):
        vectors = some_vectors(3)
        vectors[1:] = bad
        with pytest.raises(DataError, match=rf"2 of 3 vectors are {what} \(first: b\)"):
            write(vectors)
    with pytest.raises(DataError, match="not finite"):
        write(some_vectors(3) * np.float32(1e6), dtype="float16")
    with pytest.raises(DataError, match=r"1 of 3 vectors are not finite \(first: c\)"):
        vectors = some_vectors(3)
        vectors.view(np.uint32)[2, 0] = 0x7FFFFFFF
        write(vectors, dtype="bfloat16")
    with pytest.raises(ShardError, match="2 ids"):
        shard = ShardRange(0, 0, 3)
        write_shard(tmp_path, shard, ["a", "b"], some_vectors(3), dtype="float32", fingerprint=FINGERPRINT)
    assert not list(tmp_path.iterdir())


def test_resume_finds_what_stands_whole(tmp_path):
    vectors = some_vectors(10)
    make_store(tmp_path, vectors)
    plan = plan_shards(10, 4)
    assert set(finished_shards(tmp_path, plan, FINGERPRINT)) == {0, 1, 2}
    broken = tmp_path / "shard-00001.arrow"
    broken.write_bytes(broken.read_bytes()[:-40])
    (tmp_path / "shard-00002.arrow").unlink()
    assert set(finished_shards(tmp_path, plan, FINGERPRINT)) == {0}
    with pytest.raises(ShardError, match=r"2 of 3 shards are missing or broken \(first: shard-00001.arrow\)"):
        finish_store(tmp_path, plan, fingerprint=FINGERPRINT, settings={})
    assert set(finished_shards(tmp_path / "nowhere", plan, FINGERPRINT)) == set()


def test_other_settings_are_never_reused(tmp_path):
    make_store(tmp_path, some_vectors(10))
    with pytest.raises(ShardError, match="made with other settings: fingerprint 0123"):
        finished_shards(tmp_path, plan_shards(10, 4), "feedfeedfeedfeed")
    with pytest.raises(ShardError, match="holds rows 0 to 4, wanted rows 0 to 5"):
        finished_shards(tmp_path, plan_shards(10, 5), FINGERPRINT)
    with pytest.raises(ShardError, match="wanted a plan of 1 shards"):
        finished_shards(tmp_path, plan_shards(4, 4), FINGERPRINT)


def test_an_id_stands_once(tmp_path):
    plan = plan_shards(4, 2)
    for shard in plan:
        write_shard(tmp_path, shard, ["x", "y"], some_vectors(2), dtype="float32", fingerprint=FINGERPRINT)
    with pytest.raises(DataError, match=r"2 ids stand in more than one row \(first: x\)"):
        finish_store(tmp_path, plan, fingerprint=FINGERPRINT, settings={})
    with pytest.raises(DataError, match=r"1 ids .* \(first: x\)"):
        write_shard(tmp_path, plan[0], ["x", "x"], some_vectors(2), dtype="float32", fingerprint=FINGERPRINT)


def test_shards_of_one_width_and_dtype(tmp_path):
    plan = plan_shards(4, 2)
    for shard, dim in zip(plan, (6, 7), strict=True):
        ids = [str(row) for row in range(shard.start, shard.stop)]
        write_shard(tmp_path, shard, ids, some_vectors(2, dim), dtype="float32", fingerprint=FINGERPRINT)
    with pytest.raises(ShardError, match=r"shard-00001.arrow: dim 7, but shard-00000.arrow has 6"):
        finish_store(tmp_path, plan, fingerprint=FINGERPRINT, settings={})


def test_an_incomplete_store_does_not_open(tmp_path):
    with pytest.raises(ShardError, match="not finished"):
        EmbeddingStore.open(tmp_path)
    make_store(tmp_path, some_vectors(10))
    with pytest.raises(ShardError, match="width 6, wanted 8"):
        EmbeddingStore.open(tmp_path, dim=8)
    (tmp_path / "shard-00001.arrow").unlink()
    with pytest.raises(ShardError, match=r"1 of 3 shards .* \(first: shard-00001.arrow, missing\)"):
        EmbeddingStore.open(tmp_path)
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(ShardError, match="not a manifest"):
        EmbeddingStore.open(tmp_path)
    with pytest.raises(DataError, match="a store of no rows"):
        finish_store(tmp_path, [], fingerprint=FINGERPRINT, settings={})


def test_verify_finds_a_flipped_bit(tmp_path):
    vectors = some_vectors(10)
    store = make_store(tmp_path, vectors)
    path = tmp_path / "shard-00001.arrow"
    content = bytearray(path.read_bytes())
    content[content.index(vectors[5].tobytes())] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(ShardError, match=r"1 of 3 shards do not match .* \(first: shard-00001.arrow\)"):
        store.verify()


def test_stores_laid_end_to_end_are_one_pool(tmp_path):
    first, second = some_vectors(5), some_vectors(7, seed=1)
    make_store(tmp_path / "a", first, name="1")
    make_store(tmp_path / "b", second, name="2")
    pool = pickle.loads(pickle.dumps(EmbeddingPool([tmp_path / "a", tmp_path / "b"])))
    whole = np.concatenate([first, second])
    assert len(pool) == 12 and pool.ids.to_pylist()[4:6] == ["1:4", "2:0"]
    np.testing.assert_array_equal(pool.vectors(3, 9), whole[3:9])
    np.testing.assert_array_equal(pool.gather(np.array([11, 0, 5])), whole[[11, 0, 5]])
    np.testing.assert_array_equal(np.concatenate(list(pool.blocks(5, start=1, stop=12))), whole[1:12])
    with pytest.raises(DataError, match="7 ids stand in more than one row"):
        _ = EmbeddingPool([tmp_path / "b", tmp_path / "b"]).ids
    with pytest.raises(ShardError, match="width 3, wanted 6"):
        make_store(tmp_path / "c", some_vectors(2, 3))
        EmbeddingPool([tmp_path / "a", tmp_path / "c"])
