"""Parts of a search and the run they become."""

import numpy as np
import pyarrow as pa
import pytest

from umarvel_ray.data.trec import Run
from umarvel_ray.errors import ShardError
from umarvel_ray.retrieve import hits
from umarvel_ray.retrieve.hits import read_hits, write_hits, write_run
from umarvel_ray.retrieve.search import TopK


def found(num: int, width: int, seed: int = 0) -> TopK:
    rng = np.random.default_rng(seed)
    scores = -np.sort(-rng.random((num, width)), axis=1).astype(np.float32)
    return TopK(scores, rng.integers(0, 50, (num, width)))


@pytest.mark.parametrize(("num", "width"), [(3, 4), (0, 4), (3, 0)])
def test_a_part_comes_back(tmp_path, num, width):
    part = found(num, width)
    write_hits(tmp_path / "part.arrow", part)
    again = read_hits(tmp_path / "part.arrow")
    assert np.array_equal(again.rows_QK, part.rows_QK) and np.array_equal(again.scores_QK, part.scores_QK)
    assert again.rows_QK.shape == again.scores_QK.shape == (num, width)


def test_a_broken_part_is_named(tmp_path):
    (tmp_path / "part.arrow").write_bytes(b"ARROW1 and then nothing")
    for name in ("part.arrow", "nowhere.arrow"):
        with pytest.raises(ShardError, match=f"{name}: not a part of a search"):
            read_hits(tmp_path / name)


@pytest.mark.parametrize("batch_hits", [1, 7, 1000])
def test_rows_become_ids_whatever_the_batch(tmp_path, monkeypatch, batch_hits):
    monkeypatch.setattr(hits, "_BATCH_HITS", batch_hits)
    dids = [f"9:{row}" for row in range(50)]
    qids = pa.chunked_array([["q0", "q1"], ["q2"], [f"q{i}" for i in range(3, 12)]])
    blocks = [found(5, 4, seed=1), found(7, 4, seed=2)]
    num = write_run(tmp_path / "run.arrow", blocks, qids=qids, dids=pa.array(dids, pa.large_string()))
    assert num == 48
    run = Run.read(tmp_path / "run.arrow")
    rows = np.concatenate([block.rows_QK for block in blocks])
    assert run.qids == qids.to_pylist()
    assert list(run.dids) == [[dids[row] for row in some] for some in rows]
    assert np.array_equal(np.stack(list(run.scores)), np.concatenate([block.scores_QK for block in blocks]))


def test_how_the_search_was_cut_does_not_show(tmp_path, monkeypatch):
    monkeypatch.setattr(hits, "_BATCH_HITS", 12)
    whole = found(11, 4, seed=3)
    written = set()
    for cuts in ((), (1, 2, 3), (4, 8), (10,)):
        pieces = zip(np.split(whole.scores_QK, cuts), np.split(whole.rows_QK, cuts), strict=True)
        ids = {"qids": pa.chunked_array([[f"q{i}" for i in range(11)]])}
        ids |= {"dids": pa.array([str(row) for row in range(50)], pa.large_string())}
        write_run(tmp_path / "run.arrow", [TopK(*piece) for piece in pieces], **ids)
        written.add((tmp_path / "run.arrow").read_bytes())
    assert len(written) == 1
    assert Run.read(tmp_path / "run.arrow").dids[10] == [str(row) for row in whole.rows_QK[10]]
