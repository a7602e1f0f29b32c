"""A matrix and its ids become a store, in every form of ids; what does not fit is named."""

import json

import numpy as np
import pytest

from umarvel_ray.errors import DataError
from umarvel_ray.retrieve.store import finish_store, plan_shards, write_shard
from umarvel_ray.retrieve.vectors import export_vectors, ids_beside, import_vectors, read_ids


def test_float16_vectors_become_unit_length_after_the_read(tmp_path):
    """As UniIR stores them: raw features in half precision, normalised by who reads them."""
    rng = np.random.default_rng(0)
    stored_ND = (rng.normal(size=(5, 6)) * 30).astype(np.float16)
    np.save(tmp_path / "mbeir_x_embed.npy", stored_ND)
    np.save(tmp_path / "mbeir_x_ids.npy", np.array([9 * 500_000 + row for row in range(1, 6)]))
    ids = ids_beside(tmp_path / "mbeir_x_embed.npy")
    store = import_vectors(tmp_path / "mbeir_x_embed.npy", ids, tmp_path / "store", role="query")
    assert store.ids.to_pylist() == [f"9:{row}" for row in range(1, 6)]
    expected = stored_ND.astype(np.float64)
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(store.vectors(0, 5), expected, atol=1e-6)  # float32
    again = import_vectors(tmp_path / "mbeir_x_embed.npy", ids, tmp_path / "store", role="query")
    assert again.fingerprint == store.fingerprint


def test_a_store_is_written_as_a_matrix_and_read_back(tmp_path):
    rng = np.random.default_rng(0)
    names = [f"7:{row}" for row in (3, 1, 9_999_999, 12, 5)]
    unit_ND = rng.normal(size=(5, 6)).astype(np.float32)
    unit_ND /= np.linalg.norm(unit_ND, axis=1, keepdims=True)
    for shard in plan_shards(5, 2):
        rows = slice(shard.start, shard.stop)
        write_shard(tmp_path / "store", shard, names[rows], unit_ND[rows], dtype="float32", fingerprint="f")
    store = finish_store(tmp_path / "store", plan_shards(5, 2), fingerprint="f", settings={})
    export_vectors(store, tmp_path / "x.npy", tmp_path / "x_ids.npy")
    np.testing.assert_array_equal(np.load(tmp_path / "x.npy", mmap_mode="r"), unit_ND)
    assert np.load(tmp_path / "x_ids.npy").tolist() == names
    export_vectors(store, tmp_path / "y_embed.npy", tmp_path / "y_ids.npy", role="candidate", dtype="float16")
    assert np.load(tmp_path / "y_ids.npy").tolist() == [7 * 10_000_000 + int(n[2:]) for n in names]
    ids = ids_beside(tmp_path / "y_embed.npy")
    again = import_vectors(tmp_path / "y_embed.npy", ids, tmp_path / "again", role="candidate")
    assert again.ids.to_pylist() == names
    np.testing.assert_allclose(again.vectors(0, 5), unit_ND, atol=2.0**-11)  # half a unit of float16
    with pytest.raises(DataError, match="numbers below 500000"):
        export_vectors(store, tmp_path / "z.npy", tmp_path / "z_ids.npy", role="query")


def test_every_form_of_ids(tmp_path):
    np.save(tmp_path / "a.npy", np.array(["x", "a name with blanks"]))
    (tmp_path / "b.json").write_text(json.dumps(["x", "ü"]))
    (tmp_path / "c.txt").write_text("x\nline\u2028separator\n")
    np.save(tmp_path / "d.npy", np.array([70_000_012]))
    assert read_ids(tmp_path / "a.npy", role="query") == ["x", "a name with blanks"]
    assert read_ids(tmp_path / "b.json", role="query") == ["x", "ü"]
    assert read_ids(tmp_path / "c.txt", role="query") == ["x", "line\u2028separator"]
    assert read_ids(tmp_path / "d.npy", role="candidate") == ["7:12"]
    np.save(tmp_path / "e.npy", np.array([object()]), allow_pickle=True)
    with pytest.raises(DataError, match="no list of ids"):
        read_ids(tmp_path / "e.npy", role="query")


def test_what_does_not_fit_is_named(tmp_path):
    np.save(tmp_path / "v.npy", np.ones((3, 2), dtype=np.float32))
    (tmp_path / "v_ids.txt").write_text("a\nb\n")
    with pytest.raises(DataError, match=r"3 vectors, but .* has 2 ids"):
        import_vectors(tmp_path / "v.npy", tmp_path / "v_ids.txt", tmp_path / "s", role="query")
    (tmp_path / "v_ids.txt").write_text("a\nb\nc\n")
    for bad in (np.nan, np.inf, 0.0):
        np.save(tmp_path / "v.npy", np.array([[1, 1], [bad, bad], [1, 0]], dtype=np.float32))
        with pytest.raises(
            DataError, match=r"1 of rows 0 to 3 are zero, NaN or infinite \(first: row 1, b\)"
        ):
            import_vectors(tmp_path / "v.npy", tmp_path / "v_ids.txt", tmp_path / "s", role="query")
    with pytest.raises(DataError, match="no ids beside it"):
        ids_beside(tmp_path / "w.npy")
