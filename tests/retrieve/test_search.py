"""Exact search: equal to a float64 brute force, and the same bits however it is cut."""

import numpy as np
import pytest
import torch

from umarvel_ray.errors import DataError
from umarvel_ray.retrieve.search import TopK, _Part, _Tile, exact_scores, merge_top_k, top_k


def random_unit(num: int, dim: int, seed: int) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal((num, dim)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def pool(kind: str, num: int, dim: int = 48) -> np.ndarray:
    vectors = random_unit(num, dim, seed=1)
    if kind == "clustered":
        vectors = vectors[np.arange(num) % 7] + 0.05 * random_unit(num, dim, seed=2)
    if kind == "duplicated":
        vectors = vectors[np.arange(num) % 11]
    if kind == "equal":
        vectors = np.repeat(vectors[:1], num, axis=0)
    if kind == "near":
        vectors = vectors[:1] + 1e-6 * vectors
    return vectors.astype(np.float32)


def brute_force(queries: np.ndarray, candidates: np.ndarray, k: int) -> TopK:
    scores = (queries.astype(np.float64) @ candidates.astype(np.float64).T).astype(np.float32)
    rows = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return TopK(np.take_along_axis(scores, rows, axis=1), rows)


def assert_same_bits(left: TopK, right: TopK) -> None:
    assert left.rows_QK.tolist() == right.rows_QK.tolist()
    assert left.scores_QK.tobytes() == right.scores_QK.tobytes()
    assert left.rows_QK.dtype == np.int64 and left.scores_QK.dtype == np.float32


@pytest.mark.parametrize("first_pass", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["random", "clustered", "duplicated", "equal", "near"])
@pytest.mark.parametrize("k", [1, 10, 900])
def test_equals_a_float64_brute_force_ties_included(kind, k, first_pass):
    candidates = pool(kind, 700)
    queries = np.concatenate([random_unit(5, 48, seed=3), candidates[:4]])
    found = top_k(queries, candidates, k, first_pass=first_pass, tile_columns=300)
    assert found.rows_QK.shape == (9, min(k, 700))
    assert_same_bits(found, brute_force(queries, candidates, k))


def test_many_tiles_pass_over_most_candidates_and_still_agree():
    candidates, queries = random_unit(9000, 32, seed=4), random_unit(40, 32, seed=5)
    found = top_k(queries, np.array_split(candidates, 5), 7, first_pass="bfloat16", tile_columns=1024)
    assert_same_bits(found, brute_force(queries, candidates, 7))


@pytest.mark.parametrize("first_pass", ["float32", "bfloat16"])
def test_how_it_is_cut_does_not_move_a_bit(first_pass):
    candidates, queries = pool("duplicated", 501, 40), random_unit(23, 40, seed=6)
    whole = top_k(queries, candidates, 30, first_pass="float32")
    for num_blocks, query_rows, tile_columns in ((1, 4, 64), (9, 23, 17), (501, 7, 8192)):
        blocks = (block for block in np.array_split(candidates, num_blocks))
        cut = top_k(
            queries, blocks, 30, first_pass=first_pass, query_rows=query_rows, tile_columns=tile_columns
        )
        assert_same_bits(cut, whole)


@pytest.mark.parametrize("num_shards", [1, 2, 5, 60])
def test_shards_merge_to_the_whole_in_any_order(num_shards):
    candidates, queries = pool("duplicated", 100), random_unit(6, 48, seed=7)
    parts, row = [], 0
    for shard in np.array_split(candidates, num_shards):
        parts.append(top_k(queries, shard, 20, first_row=row))
        row += len(shard)
    assert_same_bits(merge_top_k(parts[::-1], 20), top_k(queries, candidates, 20))


def test_survivors_beyond_the_memory_bound_are_scored_in_turns(monkeypatch):
    monkeypatch.setattr("umarvel_ray.retrieve.search._MAX_SURVIVORS", 100)
    monkeypatch.setattr("umarvel_ray.retrieve.search._MERGE_COLUMNS", 16)
    candidates, queries = pool("equal", 400), random_unit(3, 48, seed=8)
    assert_same_bits(top_k(queries, candidates, 5, tile_columns=64), brute_force(queries, candidates, 5))


def test_a_score_depends_on_its_two_vectors_alone():
    left, right = (torch.from_numpy(random_unit(64, 129, seed)) for seed in (9, 10))
    together = exact_scores(left, right)
    alone = torch.cat([exact_scores(left[i : i + 1], right[i : i + 1]) for i in range(64)])
    assert together.numpy().tobytes() == alone.numpy().tobytes()


def test_long_and_short_vectors_keep_the_error_bound():
    scale = np.float32(10.0) ** np.random.default_rng(11).integers(-6, 7, size=(600, 1)).astype(np.float32)
    candidates, queries = random_unit(600, 24, seed=12) * scale, random_unit(8, 24, seed=13) * scale[:8]
    for first_pass in ("float32", "bfloat16"):
        assert_same_bits(
            top_k(queries, candidates, 9, first_pass=first_pass), brute_force(queries, candidates, 9)
        )


def test_empty_pools_and_no_queries():
    assert top_k(random_unit(3, 8, seed=0), [], 5).rows_QK.shape == (3, 0)
    assert top_k(np.empty((0, 8), np.float32), random_unit(4, 8, seed=0), 5).rows_QK.shape == (0, 4)


def test_refusals_say_where():
    candidates = random_unit(10, 8, seed=14)
    broken = candidates.copy()
    broken[6, 2] = np.nan
    with pytest.raises(DataError, match=r"1 of 5 candidates are NaN or infinite \(first: row 106\)"):
        top_k(candidates, [broken[:5], broken[5:]], 3, first_row=100)
    with pytest.raises(DataError, match=r"queries are NaN or infinite \(first: row 6\)"):
        top_k(broken, candidates, 3)
    with pytest.raises(DataError, match="width 8, candidates of width 7"):
        top_k(candidates, candidates[:, :7], 3)
    with pytest.raises(DataError, match="overflow"):
        top_k(candidates * np.float32(1e18), candidates * np.float32(1e18), 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_error_bound_holds_for_every_tile_score(dtype):
    """Results could be right by luck; the bound itself is what makes them exact."""
    candidates = torch.from_numpy(pool("clustered", 2000, 64))
    queries = torch.cat([torch.from_numpy(random_unit(20, 64, seed=16)), candidates[:20]])
    tile = _Tile.of(candidates, 0, 2000, dtype)
    part = _Part(queries, 5, dtype)
    scores = (part._low_QD @ tile.low_CD.T).double()
    slack_Q, relative = part._error(tile, dtype)
    errors = (scores - queries.double() @ candidates.double().T).abs()
    allowed = slack_Q[:, None] + relative * scores.abs()
    assert bool((errors <= allowed).all())
    assert float((errors / allowed).max()) > (0.2 if dtype == torch.bfloat16 else 0.001)


@pytest.mark.gpu
@pytest.mark.parametrize("first_pass", ["float32", "bfloat16"])
def test_the_device_does_not_move_a_bit(first_pass):
    candidates, queries = pool("clustered", 5000), random_unit(50, 48, seed=15)
    on_gpu = top_k(queries, candidates, 20, device="cuda", first_pass=first_pass)
    assert_same_bits(on_gpu, top_k(queries, candidates, 20))
