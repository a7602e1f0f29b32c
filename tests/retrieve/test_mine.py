"""Mining: what is dropped, why, and how often, on runs where the right answer is known by construction."""

import numpy as np
import pytest

from umarvel_ray.config import build_config
from umarvel_ray.data.trec import Run
from umarvel_ray.errors import ConfigError, DataError
from umarvel_ray.retrieve.mine import MiningReport, best_positive_scores, mine_negatives
from umarvel_ray.retrieve.negatives import MinedNegatives
from umarvel_ray.retrieve.search import top_k
from umarvel_ray.retrieve.settings import MiningConfig
from umarvel_ray.retrieve.store import (
    EmbeddingPool,
    EmbeddingStore,
    finish_store,
    plan_shards,
    write_shard,
)

# The run of query a, best first; p and q are its positives, q was not found; copy has the content of p.
HITS = [("x1", 0.95), ("p", 0.9), ("copy", 0.9), ("x2", 0.87), ("x3", 0.8), ("x4", 0.5), ("x5", 0.25)]
CONTENT = {"p": "same", "copy": "same", "q": "other", "x4": "own"}
POSITIVES = {"a": {"p": 1, "q": 1}}


def run_of(rows: dict[str, list[tuple[str, float]]]) -> Run:
    return Run(
        qids=list(rows),
        dids=[[did for did, _ in row] for row in rows.values()],
        scores=[[score for _, score in row] for row in rows.values()],
    )


def mine(hits=HITS, *, seed=0, pool_dids=None, positive_score=0.9, content=CONTENT, **settings):
    settings = {"rule": "none", "num_negatives": 3} | settings
    mined, report = mine_negatives(
        run_of({"a": hits}),
        POSITIVES,
        {} if positive_score is None else {"a": positive_score},
        content,
        MiningConfig(**settings),
        seed=seed,
        pool_dids=pool_dids,
    )
    return [did for did, _ in mined.as_dict().get("a", [])], report


@pytest.mark.parametrize(
    ("rule", "value", "expected", "num_filtered"),
    [
        ("none", None, ["x1", "x2", "x3"], 0),
        ("max_score", 0.87, ["x2", "x3", "x4"], 1),
        ("margin", 0.0, ["x2", "x3", "x4"], 1),
        ("margin", 0.05, ["x3", "x4", "x5"], 2),
        ("relative", 0.9, ["x3", "x4", "x5"], 2),
        ("relative", 0.5, ["x5"], 4),
        ("skip_top", 1, ["x2", "x3", "x4"], 1),
        ("skip_top", 3, ["x4", "x5"], 3),
    ],
)
def test_each_rule_drops_what_it_says(rule, value, expected, num_filtered):
    # 0.87 is not a float32: the threshold must not fall between a score and its stored form.
    hits = [(did, float(np.float32(score))) for did, score in HITS]
    value = float(np.float32(value)) if rule == "max_score" else value
    found, report = mine(hits, rule=rule, value=value)
    assert found == expected
    counts = report.counts
    assert counts["hits"] == 7
    assert (counts["hits_listed_positive"], counts["hits_copy_of_positive"]) == (1, 1)
    assert (counts["hits_filtered"], counts["hits_left"]) == (num_filtered, 5 - num_filtered)
    assert counts["queries_filtered"] == (num_filtered > 0)
    assert counts["queries_short"] == (len(expected) < 3)
    assert counts["negatives_kept"] == len(expected)


def test_only_known_contents_are_copies():
    assert mine(content={})[0] == ["x1", "copy", "x2"]
    assert mine(content={"p": "same"})[0] == ["x1", "copy", "x2"]
    # The copy of a positive that was not found at all is none the less one.
    assert mine(content=CONTENT | {"x1": "other"})[0] == ["x2", "x3", "x4"]


def test_depth_is_counted_in_hits():
    found, report = mine(depth=4)
    assert found == ["x1", "x2"]
    assert (report.counts["hits"], report.counts["queries_short"]) == (4, 1)


def test_without_a_positive_score_no_hit_is_near_enough_to_be_safe():
    found, report = mine(rule="margin", value=0.05, positive_score=None)
    assert found == []
    assert report.counts["hits_filtered"] == 5
    assert report.counts["queries_without_positive_score"] == 1
    assert report.counts["queries_without_negatives"] == 1
    assert mine(rule="max_score", value=0.9, positive_score=None)[0] == ["x2", "x3", "x4"]


def many_queries(num: int) -> tuple[dict[str, list[tuple[str, float]]], dict[str, dict[str, int]]]:
    rng = np.random.default_rng(0)
    rows, positives = {}, {}
    for query in range(num):
        dids = [f"d{i}" for i in rng.permutation(60)[: rng.integers(0, 30)]]
        rows[f"q{query}"] = list(zip(dids, sorted(rng.random(len(dids)), reverse=True), strict=True))
        positives[f"q{query}"] = {f"d{i}": 1 for i in rng.permutation(60)[:3]}
    return rows, positives


@pytest.mark.parametrize(
    "settings", [{}, {"pick": "sample", "window": 8}, {"pick": "random"}, {"short": "random"}]
)
def test_neighbours_order_and_chunks_do_not_matter(settings, monkeypatch):
    rows, positives = many_queries(40)
    config = MiningConfig(rule="max_score", value=0.8, num_negatives=4, depth=20, **settings)
    pool = [f"d{i}" for i in range(60)]

    def mined(names):
        run = run_of({name: rows[name] for name in names})
        result, report = mine_negatives(run, positives, {}, {}, config, seed=3, pool_dids=pool)
        return result.as_dict(), report.counts

    together, counts = mined(list(rows))
    backwards, counts_backwards = mined(list(rows)[::-1])
    monkeypatch.setattr("umarvel_ray.retrieve.mine._CHUNK_QUERIES", 7)
    in_chunks, counts_in_chunks = mined(list(rows))
    alone = {}
    for name in rows:
        alone |= mined([name])[0]
    assert together == backwards == in_chunks == alone
    assert counts == counts_backwards == counts_in_chunks
    drop = ("hits_listed_positive", "hits_copy_of_positive", "hits_filtered", "hits_left")
    assert (
        counts["hits"]
        == sum(counts[name] for name in drop)
        == sum(min(len(row), 20) for row in rows.values())
    )
    assert counts["queries"] == 40
    for name, negatives in together.items():
        dids = [did for did, _ in negatives]
        suspects = {did for did, score in rows[name][:20] if score > 0.8}
        assert len(set(dids)) == len(dids) <= 4 and not set(dids) & (positives[name].keys() | suspects)


def test_a_sample_is_drawn_from_the_window_by_the_seed():
    hits = [(f"d{i}", 1 - i / 100) for i in range(50)]
    drawn = {seed: mine(hits, pick="sample", window=10, seed=seed)[0] for seed in range(40)}
    assert mine(hits, pick="sample", window=10, seed=1)[0] == drawn[1]
    assert all(found == sorted(found, key=lambda did: int(did[1:])) for found in drawn.values())
    assert {did for found in drawn.values() for did in found} == {f"d{i}" for i in range(10)}
    assert all(len(set(found)) == 3 for found in drawn.values())


def test_short_queries_are_filled_from_what_is_free_in_the_pool():
    pool = [did for did, _ in HITS] + ["q", "free1", "free2"]
    found, report = mine(rule="skip_top", value=3, num_negatives=4, short="random", pool_dids=pool)
    assert found[:2] == ["x4", "x5"] and set(found[2:]) == {"free1", "free2"}
    assert (report.counts["negatives_random"], report.counts["queries_short"]) == (2, 0)
    # Positives, copies and filtered hits are no random negatives either: five are wanted, four there are.
    found, report = mine(rule="skip_top", value=3, num_negatives=5, short="random", pool_dids=pool)
    assert set(found) == {"x4", "x5", "free1", "free2"}
    assert report.counts["queries_short"] == 1
    found, report = mine(rule="skip_top", value=3, num_negatives=4, pick="random", pool_dids=pool)
    assert set(found) == {"x4", "x5", "free1", "free2"} and report.counts["negatives_random"] == 4
    with pytest.raises(ConfigError, match="give a pool"):
        mine(short="random")


def test_histograms_and_tasks_add_up():
    config = MiningConfig(rule="max_score", value=0.87, num_negatives=2, by_task={"t2": "random"})
    reports = [
        mine_negatives(
            run_of({"a": HITS}),
            POSITIVES,
            {"a": 0.91},
            CONTENT,
            config,
            seed=0,
            task=task,
            pool_dids=["f", "g"],
        )[1]
        for task in ("t1", "t2")
    ]
    whole = MiningReport.join(config, reports).as_json()
    assert whole["by_task"]["t1"]["negatives_random"] == 0 and whole["by_task"]["t2"]["negatives_random"] == 2
    assert whole["counts"]["hits"] == 14 and whole["counts"]["queries"] == 2
    assert whole["counts"]["queries_listed_positive"] == whole["counts"]["queries_copy_of_positive"] == 2
    histograms = whole["histograms"]
    assert [sum(by_name["dropped"]) for by_name in whole["histograms_by_task"].values()] == [2, 2]
    edges = np.array(histograms["bin_edges"])
    assert np.allclose(histograms["positives"], 2 * np.histogram([0.91], edges)[0])
    assert np.allclose(histograms["kept"], np.histogram(np.float32([0.8, 0.5]), edges)[0])
    assert sum(histograms["dropped"]) == whole["counts"]["hits_filtered"] == 4
    assert whole["threshold"] == 0.87 and whole["rule"] == {"name": "max_score", "value": 0.87}


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("random", {"free"}),
        ({"rule": "skip_top", "value": 2}, {"x3", "x4"}),
        ({"rule": "none"}, {"x1", "x2"}),
        ({"num_negatives": 1}, {"x2"}),
        ({"depth": 4}, {"x2"}),
        ({"pick": "sample", "window": 2, "num_negatives": 2}, {"x2", "x3"}),
    ],
)
def test_a_task_may_have_a_policy_of_its_own(policy, expected):
    config = MiningConfig.model_validate(
        {"rule": "max_score", "value": 0.9, "num_negatives": 2, "by_task": {"t2": policy}}
    )
    for task, wanted in (("t1", {"x2", "x3"}), ("t2", expected)):
        mined, report = mine_negatives(
            run_of({"a": HITS}), POSITIVES, {"a": 0.9}, CONTENT, config, seed=0, task=task, pool_dids=["free"]
        )
        assert {did for did, _ in mined.as_dict()["a"]} == wanted
        assert report.as_json()["settings"]["by_task"].keys() == {"t2"}


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ({"rule": "max_score"}, "by_task.t: .*value 3.0 is above 1"),
        ({"depth": 1}, "by_task.t: .*no query could get enough"),
        ({"window": 1}, "by_task.t: .*Widen the window"),
        ({"rules": "none"}, "unknown setting"),
    ],
)
def test_nonsense_policies_are_refused(policy, message):
    settings = {"rule": "skip_top", "value": 3, "num_negatives": 2, "by_task": {"t": policy}}
    with pytest.raises(ConfigError, match=message):
        build_config(settings, MiningConfig)


def test_what_is_written_is_read_as_a_run_too(tmp_path):
    rows, positives = many_queries(20)
    config = MiningConfig(rule="none", num_negatives=4, short="random", depth=20)
    mined, _ = mine_negatives(
        run_of(rows), positives, {"q3": 0.5}, {}, config, seed=0, pool_dids=[f"d{i}" for i in range(60)]
    )
    mined.write(tmp_path / "negatives.arrow")
    again = MinedNegatives.read(tmp_path / "negatives.arrow")
    assert again.table.equals(mined.table) and again.facts == mined.facts
    assert again.facts["counts"]["queries"] == 20
    run = Run.read(tmp_path / "negatives.arrow")
    assert run.as_dict() == mined.as_dict()
    scores = dict(zip(run.qids, again.table.column("positive_score").to_pylist(), strict=True))
    assert scores["q3"] == 0.5 and scores["q4"] is None
    with pytest.raises(DataError, match="no mined negatives"):
        MinedNegatives.read(tmp_path / "nowhere.arrow")


def test_queries_without_negatives_are_left_out_and_counted():
    rows = {"a": HITS, "b": [("p", 0.9)], "c": []}
    positives = {qid: {"p": 1} for qid in rows}
    mined, report = mine_negatives(run_of(rows), positives, {}, {}, MiningConfig(rule="none"), seed=0)
    assert list(mined.as_dict()) == ["a"]
    assert (report.counts["queries"], report.counts["queries_without_negatives"]) == (3, 2)
    assert mine_negatives(run_of({}), {}, {}, {}, MiningConfig(rule="none"), seed=0)[1].counts["queries"] == 0


def test_best_positive_scores_are_those_of_a_search(tmp_path):
    rng = np.random.default_rng(1)
    for name, num in (("queries", 5), ("pool1", 7), ("pool2", 9)):
        vectors = rng.standard_normal((num, 16)).astype(np.float32)
        plan = plan_shards(num, 4)
        for shard in plan:
            ids = [f"{name}:{row}" for row in range(shard.start, shard.stop)]
            rows = vectors[shard.start : shard.stop]
            write_shard(tmp_path / name, shard, ids, rows, dtype="float16", fingerprint="f")
        finish_store(tmp_path / name, plan, fingerprint="f", settings={})
    queries = EmbeddingStore.open(tmp_path / "queries")
    pool = EmbeddingPool([tmp_path / "pool1", tmp_path / "pool2"])
    positives = {
        "queries:0": {"pool1:3": 1, "pool2:8": 1, "elsewhere": 1},
        "queries:1": {"elsewhere": 1},
        "queries:4": {"pool2:0": 1},
    }
    qids = ["queries:4", "queries:1", "queries:0"]
    found = best_positive_scores(queries, pool, positives, qids=qids)
    hits = top_k(queries.vectors(0, 5), pool.vectors(0, 16), 16)
    score = {
        (q, int(row)): s for q in range(5) for row, s in zip(hits.rows_QK[q], hits.scores_QK[q], strict=True)
    }
    assert found == {"queries:0": max(score[0, 3], score[0, 15]), "queries:4": score[4, 7]}
    assert best_positive_scores(queries, pool, positives, qids=[]) == {}
    with pytest.raises(DataError, match=r"1 of 1 queries of the run are not in this store \(first: z\)"):
        best_positive_scores(queries, pool, {"z": {"pool1:0": 1}}, qids=["z"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rule": "margin"}, "needs its number"),
        ({"rule": "none", "value": 0.5}, "takes no value"),
        ({"rule": "max_score", "value": 1.5}, "at most 1"),
        ({"rule": "skip_top", "value": 1.5}, "whole number"),
        ({"rule": "none", "depth": 3}, "no query could get enough"),
        ({"rule": "none", "pick": "sample", "window": 4}, "no draw could be enough"),
        ({"rule": "threshold"}, "rule"),
        ({"rule": "none", "seed": 3}, "unknown setting"),
    ],
)
def test_nonsense_settings_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        build_config(settings, MiningConfig)


def test_queries_without_judgement_are_named():
    config = MiningConfig(rule="none")
    with pytest.raises(DataError, match=r"2 of 3 queries have no positive \(first: b\)"):
        mine_negatives(run_of({"a": HITS, "b": HITS, "c": []}), POSITIVES, {}, {}, config, seed=0)
