"""Exact search: equal to a float64 brute force, and the same bits however it is cut."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from umarvel_ray.errors import DataError
from umarvel_ray.retrieve import best, int8, search
from umarvel_ray.retrieve.first_pass import TilePass
from umarvel_ray.retrieve.int8 import Int8Pass, Panels, Queries, Rounded, multiplies_int8
from umarvel_ray.retrieve.search import TopK, merge_top_k, top_k
from umarvel_ray.retrieve.tiles import Bounds, Narrow, Tile

PASSES = ["float32", "bfloat16"] + ["int8"] * multiplies_int8()


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


@pytest.mark.parametrize("first_pass", PASSES)
@pytest.mark.parametrize("kind", ["random", "clustered", "duplicated", "equal", "near"])
@pytest.mark.parametrize("k", [1, 10, 1000])
def test_equals_a_float64_brute_force_ties_included(kind, k, first_pass):
    candidates = pool(kind, 700)
    queries = np.concatenate([random_unit(5, 48, seed=3), candidates[:4]])
    found = top_k(queries, candidates, k, first_pass=first_pass, tile_columns=300)
    assert found.rows_QK.shape == (9, min(k, 700))
    assert_same_bits(found, brute_force(queries, candidates, k))


def test_many_tiles_pass_over_most_candidates_and_still_agree():
    candidates, queries = random_unit(9000, 32, seed=4), random_unit(40, 32, seed=5)
    for first_pass in PASSES:
        found = top_k(queries, np.array_split(candidates, 5), 7, first_pass=first_pass, tile_columns=1024)
        assert_same_bits(found, brute_force(queries, candidates, 7))


@pytest.mark.parametrize("first_pass", PASSES)
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
    monkeypatch.setattr("umarvel_ray.retrieve.best._MAX_SURVIVORS", 100)
    monkeypatch.setattr("umarvel_ray.retrieve.arrays._MOST_COLUMNS", 16)
    candidates, queries = pool("equal", 400), random_unit(3, 48, seed=8)
    assert_same_bits(top_k(queries, candidates, 5, tile_columns=64), brute_force(queries, candidates, 5))


def test_long_and_short_vectors_keep_the_error_bound():
    scale = np.float32(10.0) ** np.random.default_rng(11).integers(-6, 7, size=(600, 1)).astype(np.float32)
    candidates, queries = random_unit(600, 24, seed=12) * scale, random_unit(8, 24, seed=13) * scale[:8]
    for first_pass in PASSES:
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


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_error_bound_holds_for_every_product(precision):
    """Results could be right by luck; the bound itself is what makes them exact."""
    candidates = torch.from_numpy(pool("clustered", 2000, 64)) * torch.linspace(0.5, 2, 2000)[:, None]
    queries = torch.cat([torch.from_numpy(random_unit(20, 64, seed=16)), candidates[:20]])
    worst, seen = 0.0, []
    for tile in Tile.cut(candidates, 0, 2000, precision, groups=256):
        narrow = Narrow.of(queries, precision)
        num, dtype = TilePass.memory(40, [tile])
        products = tile.products(narrow, torch.empty(num, dtype=dtype)).double()
        bounds = Bounds.of(tile, narrow)
        columns = range(tile.first, tile.first + len(tile.low_CD))
        exact = queries.double() @ candidates[columns].double().T
        repeats = len(tile.low_CD) // tile.num_groups
        allowed = bounds.absolute_QG.double().repeat(1, repeats) + bounds.relative * products.abs()
        error = (products - exact).abs()
        assert bool((error <= allowed).all())
        worst = max(worst, float((error / allowed).max()))
        seen += columns
    assert seen == list(range(2000))
    assert worst > (0.001 if precision == "float32" else 0.1)


@pytest.mark.skipif(not multiplies_int8(), reason="takes a CPU with AVX512-VNNI")
@pytest.mark.parametrize(
    "num_queries, num_candidates, width",
    [(1, 1, 1), (12, 32, 16), (25, 77, 50), (9, 40, 3584), (40, 2000, 64)],
)
def test_whole_numbers_keep_every_score_within_their_error(num_queries, num_candidates, width):
    candidates = pool("clustered", num_candidates, width)
    candidates *= np.float32(10.0) ** np.random.default_rng(32).integers(-3, 4, (num_candidates, 1))
    queries = np.concatenate([candidates[: num_queries // 2], random_unit(num_queries, width, seed=33)])
    queries = queries[:num_queries]
    rounded, narrow = (
        Rounded.of(torch.from_numpy(queries), np.int8),
        Rounded.of(torch.from_numpy(candidates), np.int8),
    )
    scale_Q, rest_Q, length_Q = rounded.facts.T
    tile = Panels.cut(
        torch.from_numpy(np.concatenate([queries, candidates])), num_queries, num_queries + num_candidates
    )
    scale_C, by_rest_C, by_length_C = tile.known.transpose(1, 0, 2).reshape(3, -1)[:, :num_candidates]
    estimate = np.outer(scale_Q, scale_C) * (rounded.low_ND @ narrow.low_ND.astype(np.float64).T)
    error = np.abs(estimate - queries.astype(np.float64) @ candidates.astype(np.float64).T)
    allowed = np.outer(rest_Q, by_rest_C) + np.outer(length_Q, by_length_C)
    assert (error <= allowed).all()
    # Not because it is wide: 8 bits are within some hundredths of the product of the lengths.
    lengths = np.outer(np.linalg.norm(queries, axis=1), np.linalg.norm(candidates, axis=1))
    assert (allowed <= 0.03 * lengths).all()
    if num_candidates == 2000:
        assert (error / allowed).max() > 0.1


@pytest.mark.skipif(not multiplies_int8(), reason="takes a CPU with AVX512-VNNI")
@pytest.mark.parametrize(
    "num_queries, num_candidates, width", [(1, 1, 1), (12, 32, 16), (25, 77, 50), (9, 4000, 3584)]
)
def test_none_that_reaches_the_floor_is_passed_over(num_queries, num_candidates, width, monkeypatch):
    """Floors that are scores of candidates; queries in several turns, panels and rows that are not full."""
    monkeypatch.setattr(int8, "_CACHED_BYTES", 12 * width)
    candidates = pool("near" if num_candidates < 100 else "random", num_candidates, width)
    queries = random_unit(num_queries, width, seed=33)
    found = brute_force(queries, candidates, num_candidates)
    floor = torch.from_numpy(found.scores_QK[:, [num_candidates // 20]])
    tile = Panels.cut(
        torch.from_numpy(np.concatenate([queries, candidates])), num_queries, num_queries + num_candidates
    )
    first = int8_pass(queries, tile, floor)
    query, column, lower, upper = survivors_of(first, [tile])
    column -= num_queries
    exact = (queries.astype(np.float64) @ candidates.astype(np.float64).T)[query, column]
    assert (lower <= exact).all() and (exact <= upper).all()
    # The floor rises to the best score of each query; that one at least has to be there.
    kept = set(zip(query.tolist(), column.tolist(), strict=True))
    assert {(q, int(row)) for q, row in enumerate(found.rows_QK[:, 0])} <= kept
    assert (first.floor_Q.numpy() <= found.scores_QK[:, 0]).all()
    if num_candidates > 100:
        assert first.num_undecided < num_queries * num_candidates / 4


@pytest.mark.skipif(not multiplies_int8(), reason="takes a CPU with AVX512-VNNI")
@pytest.mark.parametrize("width", [1, 50, 3584, 20_000])
def test_16_bits_tell_a_score_to_a_thousandth_and_never_overflow(width):
    """Vectors of one value, of one value at all places, and of any: the largest sums that there can be."""
    vectors = np.zeros((4, width), np.float32)
    vectors[0, 0], vectors[1], vectors[2] = 1, 1, np.where(np.arange(width) % 2, 1, -1)
    vectors[3] = np.random.default_rng(35).standard_normal(width)
    vectors *= np.float32(10.0) ** np.array([[0], [3], [-6], [12]], np.float32)
    vectors = np.concatenate([vectors, -vectors])
    tile = Panels.cut(torch.from_numpy(vectors), 0, 8)
    # As many results as candidates: none is passed over.
    query, column, lower, upper = survivors_of(
        int8_pass(vectors, tile, torch.full((8, 8), -torch.inf)), [tile]
    )
    assert len(query) == 64
    exact = (vectors.astype(np.float64) @ vectors.astype(np.float64).T)[query, column]
    lengths = np.linalg.norm(vectors.astype(np.float64), axis=1)
    assert (lower <= exact).all() and (exact <= upper).all()
    allowed = 1e-4 + 6.5e-5 * width**0.5  # half a unit of 1 in 32,000 at each place, of both, up and down
    assert (upper.astype(np.float64) - lower <= allowed * lengths[query] * lengths[column]).all()


def int8_pass(queries: np.ndarray, tile: Panels, scores_QK: torch.Tensor) -> Int8Pass:
    num, dtype = Int8Pass.memory(len(queries), [tile])
    rounded = Queries.of(torch.from_numpy(queries))
    return Int8Pass(rounded, torch.empty(num, dtype=dtype), share=1.0, scores_QK=scores_QK)


def survivors_of(first: Int8Pass, tiles: list[Panels]) -> tuple[np.ndarray, ...]:
    """(query, column, lower, upper) of all."""
    found = [survivors for tile in tiles for survivors in first.take(tile)] + list(first.finish())
    key, lower, upper = (torch.cat(part).numpy() for part in zip(*found, strict=True))
    return key >> 32, key & 0xFFFFFFFF, lower, upper


@pytest.mark.parametrize("first_pass", PASSES)
def test_lengths_whose_squares_overflow_lose_no_candidate(first_pass):
    candidates = random_unit(700, 24, seed=23) * np.float32(1e25)
    candidates[::3] *= np.float32(1e-30)
    queries = random_unit(5, 24, seed=24) * np.float32(1e-28)
    found = top_k(queries, candidates, 9, first_pass=first_pass)
    assert_same_bits(found, brute_force(queries, candidates, 9))


@pytest.mark.parametrize("first_pass", PASSES)
def test_scores_that_float32_can_hardly_hold_stand_in_their_order(first_pass):
    candidates = random_unit(700, 24, seed=25) * np.float32(3e-22)
    queries = random_unit(5, 24, seed=26) * np.float32(1e-22)
    expected = brute_force(queries, candidates, 9)
    assert 0 < expected.scores_QK.max() < 1e-42
    assert_same_bits(top_k(queries, candidates, 9, first_pass=first_pass), expected)


@pytest.mark.parametrize("first_pass", PASSES)
def test_a_group_of_long_and_short_vectors_loses_none_where_all_scores_are_negative(first_pass):
    """The scale of such a group says little about its short members, and theirs are the best scores."""
    queries = random_unit(6, 24, seed=21)
    candidates = random_unit(2048, 24, seed=22) - 3 * queries.mean(axis=0)
    candidates[(candidates @ queries.T).max(axis=1) > -0.01] = -queries[0]
    candidates[[5, 700, 1999]] *= np.float32(1e-3)
    found = top_k(queries, candidates, 20, first_pass=first_pass)
    assert_same_bits(found, brute_force(queries, candidates, 20))


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.lists(st.integers(-8, 8), min_size=3, max_size=3), min_size=1, max_size=40),
    exponents=st.lists(st.integers(-20, 20), min_size=40, max_size=40),
    num_queries=st.integers(1, 5),
    k=st.integers(1, 50),
    first_pass=st.sampled_from(PASSES),
    tile_columns=st.integers(1, 20),
)
def test_any_grid_of_numbers_any_cut(values, exponents, num_queries, k, first_pass, tile_columns):
    """Small whole numbers at many scales: ties, zeros and cancellation, where every sum is exact anyway."""
    candidates = np.array(values, np.float32) * np.float32(2.0) ** np.array(exponents[: len(values)])[:, None]
    candidates = candidates.astype(np.float32)
    queries = candidates[np.arange(num_queries) % len(candidates)] + np.float32(1)
    found = top_k(queries, candidates, k, first_pass=first_pass, tile_columns=tile_columns, query_rows=2)
    assert_same_bits(found, brute_force(queries, candidates, k))


@pytest.mark.parametrize("first_pass", PASSES)
def test_a_wrong_guess_is_noticed_and_mended(first_pass, monkeypatch):
    """A guess that trusts every estimate to the last bit loses candidates unless it is proven afterwards."""
    monkeypatch.setattr(best, "_guessed_share", lambda width: -1.0)
    candidates, queries = pool("clustered", 3000), random_unit(30, 48, seed=17)
    found = top_k(queries, candidates, 5, first_pass=first_pass, tile_columns=1024)
    assert_same_bits(found, brute_force(queries, candidates, 5))


def test_auto_leaves_the_narrow_pass_where_too_much_survives(monkeypatch):
    monkeypatch.setattr(search, "multiplies_int8", lambda: True)
    monkeypatch.setattr(search, "multiplies_bfloat16", lambda device: False)
    choose = search._Chooser("auto", "cpu", torch.zeros(1000, 1024))
    assert [choose(100_000), choose(1000)] == ["int8", "float32"]
    choose.learn(0.2)
    assert choose(100_000) == "float32"
    assert search._Chooser("auto", "cpu", torch.zeros(1, 1024))(10_000_000) == "float32"


def test_narrow_sums_that_could_overflow_are_refused(monkeypatch):
    monkeypatch.setattr(search, "multiplies_int8", lambda: False)
    with pytest.raises(DataError, match="takes a CPU with AVX512-VNNI and the extra `compiled`"):
        top_k(random_unit(3, 8, seed=0), random_unit(4, 8, seed=0), 2, first_pass="int8")


def test_as_many_threads_as_one_likes(monkeypatch):
    candidates, queries = pool("duplicated", 600), random_unit(31, 48, seed=18)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        found = top_k(queries, candidates, 20, tile_columns=100, query_rows=4)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert_same_bits(found, brute_force(queries, candidates, 20))


@pytest.mark.parametrize("kind", ["random", "clustered", "duplicated", "equal", "near"])
@pytest.mark.parametrize("k", [1, 10, 1000])
def test_faiss_gives_the_same_bits(kind, k):
    pytest.importorskip("faiss")
    from umarvel_ray.retrieve.faiss_search import faiss_top_k

    candidates = pool(kind, 700)
    queries = np.concatenate([random_unit(5, 48, seed=3), candidates[:4]])
    blocks = np.array_split(candidates, 3)
    assert_same_bits(faiss_top_k(queries, blocks, k), brute_force(queries, candidates, k))
    shifted = faiss_top_k(queries, blocks, k, first_row=50)
    assert np.array_equal(shifted.rows_QK, brute_force(queries, candidates, k).rows_QK + 50)


def test_faiss_takes_nothing_and_refuses_what_we_refuse():
    pytest.importorskip("faiss")
    from umarvel_ray.retrieve.faiss_search import faiss_top_k

    assert faiss_top_k(random_unit(3, 8, seed=0), [], 5).rows_QK.shape == (3, 0)
    assert faiss_top_k(np.empty((0, 8), np.float32), random_unit(4, 8, seed=0), 5).rows_QK.shape == (0, 4)
    broken = random_unit(10, 8, seed=14)
    broken[6, 2] = np.nan
    with pytest.raises(DataError, match=r"1 of 10 candidates are NaN or infinite \(first: row 6\)"):
        faiss_top_k(random_unit(3, 8, seed=0), broken, 3)


@pytest.mark.gpu
@pytest.mark.parametrize("first_pass", ["float32", "bfloat16"])
def test_the_device_does_not_move_a_bit(first_pass):
    candidates, queries = pool("clustered", 5000), random_unit(50, 48, seed=15)
    on_gpu = top_k(queries, candidates, 20, device="cuda", first_pass=first_pass)
    assert_same_bits(on_gpu, top_k(queries, candidates, 20))
