"""Every hit is scored once, under the settings that its file names; neighbours share candidates."""

import json
from dataclasses import replace

import numpy as np
import pytest
from fixtures_rerank import DEPTH, NUM_QUERIES

from umarvel_ray.artifacts import data_fingerprint
from umarvel_ray.data.records import Candidate, Query
from umarvel_ray.data.sources import QueryFile
from umarvel_ray.data.trec import Run, import_trec
from umarvel_ray.errors import ConfigError, DataError, ShardError
from umarvel_ray.model.reranker import Reranker
from umarvel_ray.model.settings import RerankerSettings
from umarvel_ray.retrieve.rerank import neighbourhoods, plan_scores, sampled_rows, scored_lists
from umarvel_ray.retrieve.scores import Scores
from umarvel_ray.runtime.cluster import RuntimeSettings
from umarvel_ray.runtime.reranking import score_lists

LOCAL = RuntimeSettings(kind="local")


def score(config):
    (scores,) = score_lists(config, scored_lists(config), LOCAL)
    return scores


def test_any_trec_run_is_scored_as_the_reranker_scores_its_pairs(list_files, tmp_path, pictures):
    scores = score(list_files.config(tmp_path / "out"))
    run = import_trec(list_files.home / "run.trec")
    reranker = Reranker.load(list_files.backbone)
    pool = {
        line["did"]: Candidate(
            did=line["did"],
            txt=line.get("txt"),
            img_path=str(list_files.home / line["img_path"]) if line.get("img_path") else None,
        )
        for line in map(json.loads, (list_files.home / "pool.jsonl").read_text().splitlines())
    }
    rows = list(scores.rows())
    assert [qid for qid, *_ in rows] == run.qids
    for number, (qid, dids, recall, p_yes) in enumerate(rows):
        assert dids == list(run.dids[number])[: DEPTH - 1]
        np.testing.assert_array_equal(recall, run.scores[number][: DEPTH - 1])
        odd = number % 2
        query = Query(
            qid=qid,
            txt=f"query {number}",
            img_path=list(pictures.values())[number % 4] if odd else None,
            instruction="Show it." if odd else "Find it.",
        )
        expected = reranker.score(query, [pool[did] for did in dids])
        np.testing.assert_allclose(p_yes, expected, atol=1e-6)
    assert scores.num_pairs == (NUM_QUERIES - 1) * (DEPTH - 1) + 1


def test_only_what_is_missing_is_scored_again_and_comes_out_the_same(list_files, tmp_path):
    config = list_files.config(tmp_path / "out")
    first = score(config)
    parts, missing = plan_scores(config, scored_lists(config))
    assert len(parts) == 4 and not missing
    parts[1].part.unlink()
    parts[3].part.unlink()
    kept = parts[0].part.stat().st_mtime_ns
    assert len(plan_scores(config, scored_lists(config))[1]) == 2
    again = score(config)
    assert parts[0].part.stat().st_mtime_ns == kept
    assert again.table.equals(first.table) and again.facts == first.facts


def over_two_pools(list_files, tmp_path):
    """The same queries once more, as if searched in a second pool: other candidates, some the same."""
    config = list_files.config(tmp_path / "out")
    (local,) = scored_lists(config)
    found = import_trec(list_files.home / "run.trec")
    dids = [[f"d{(int(did[1:]) + (number + rank) % 3) % 12}" for rank, did in enumerate(row)]
            for number, row in enumerate(found.dids)]  # fmt: skip
    dids = [list(dict.fromkeys(row)) for row in dids]
    path = tmp_path / "second.arrow"
    Run(found.qids, dids, [found.scores[n][: len(row)] for n, row in enumerate(dids)]).write(path)
    facts = {**local.facts, "run": data_fingerprint(path)}
    second = replace(local, scope="global", run=path, folder=tmp_path / "out" / "second", facts=facts)
    return config, [local, second]


def test_runs_of_the_same_queries_are_scored_together_and_a_shared_candidate_once(
    list_files, tmp_path, monkeypatch
):
    config, lists = over_two_pools(list_files, tmp_path)
    alone = [
        score_lists(config, [replace(one, folder=tmp_path / "alone" / one.scope)], LOCAL)[0] for one in lists
    ]
    asked = []
    score_many = Reranker.score_many

    def counted(self, pairs, **how):
        asked.extend((query.qid, candidate.did) for query, candidates in pairs for candidate in candidates)
        return score_many(self, pairs, **how)

    monkeypatch.setattr(Reranker, "score_many", counted)
    together = score_lists(config, lists, LOCAL)
    pairs = [{(qid, did) for qid, dids, *_ in own.rows() for did in dids} for own in together]
    assert len(asked) == len(set(asked)) and set(asked) == pairs[0] | pairs[1]
    assert len(pairs[0] & pairs[1]) > 10
    for own, other in zip(together, alone, strict=True):
        assert own.table.drop(["p_yes"]).equals(other.table.drop(["p_yes"]))
        for (*_, p_yes), (*_, expected) in zip(own.rows(), other.rows(), strict=True):
            np.testing.assert_allclose(p_yes, expected, atol=1e-6)


def test_of_runs_scored_together_a_part_that_is_missing_comes_out_the_same(list_files, tmp_path):
    config, lists = over_two_pools(list_files, tmp_path)
    first = score_lists(config, lists, LOCAL)
    parts, missing = plan_scores(config, lists)
    assert len(parts) == 8 and not missing
    lost = next(task for task in parts if task.of.scope == "global")
    lost.part.unlink()
    ((together, again),) = plan_scores(config, lists)[1]
    assert (together.of.scope, again.part) == ("local", lost.part)
    for own, before in zip(score_lists(config, lists, LOCAL), first, strict=True):
        assert own.table.equals(before.table)
    with pytest.raises(ShardError, match="beside"):
        score_lists(config, lists[:1], LOCAL)


def test_scores_of_another_checkpoint_or_run_are_refused(list_files, tmp_path):
    config = list_files.config(tmp_path / "out")
    score(config)
    Reranker.load(list_files.backbone, settings=RerankerSettings(prompt="authors")).save(tmp_path / "other")
    other = config.model_copy(update={"checkpoint": str(tmp_path / "other")})
    with pytest.raises(ShardError, match=r"00000\.arrow: .*made with other settings.*first: checkpoint was"):
        score(other)
    deeper = config.model_copy(update={"lists": (config.lists[0].model_copy(update={"depth": 5}),)})
    with pytest.raises(ShardError, match="first: depth was 4, is 5"):
        score(deeper)


def test_a_part_with_foreign_hits_is_refused(list_files, tmp_path):
    config = list_files.config(tmp_path / "out")
    score(config)
    (parts, _) = plan_scores(config, scored_lists(config))
    part = Scores.read(parts[0].part)
    columns = list(zip(*part.rows(), strict=True))
    columns[1] = [["d0"] * len(dids) for dids in columns[1]]
    Scores.of_lists(*columns, part.facts).write(parts[0].part)
    with pytest.raises(ShardError, match="holds other candidates than"):
        score(config)


def test_queries_and_candidates_that_are_nowhere_are_named_before_anything_is_loaded(
    list_files, tmp_path, monkeypatch
):
    monkeypatch.setattr(Reranker, "load", None)
    config = list_files.config(tmp_path / "out")
    short = tmp_path / "short.jsonl"
    short.write_text('{"qid": "other", "txt": "x"}\n')
    lost = config.lists[0].model_copy(update={"queries": str(short)})
    with pytest.raises(DataError, match=r"short\.jsonl: has no query q\d+ among 1"):
        score(config.model_copy(update={"lists": (lost,)}))
    short.write_text('{"did": "other", "txt": "x", "modality": "text"}\n')
    lost = config.lists[0].model_copy(update={"pools": (str(short),)})
    with pytest.raises(DataError, match=r"candidate d\d+: in none of 1 pools"):
        score(config.model_copy(update={"lists": (lost,)}))
    with pytest.raises(ConfigError, match="two runs are called test/mine/local"):
        scored_lists(config.model_copy(update={"lists": config.lists * 2}))


def test_a_query_files_line_must_be_text(tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text('{"qid": "1", "txt": "a"}\n{"qid": "2", "txt": 3}\n')
    queries = QueryFile(str(path), str(tmp_path))
    assert queries.by_qid("1") == Query(qid="1", txt="a")
    with pytest.raises(DataError, match=r"q\.jsonl:2: txt of 2 is no text"):
        queries.by_qid("2")


def test_a_sample_takes_its_share_of_each_task_and_hangs_on_seed_and_name():
    rows = sampled_rows(200, 0.1, seed=1, name="oven_task6")
    assert len(rows) == 20 and (np.diff(rows) > 0).all()
    np.testing.assert_array_equal(rows, sampled_rows(200, 0.1, seed=1, name="oven_task6"))
    assert (rows != sampled_rows(200, 0.1, seed=2, name="oven_task6")).any()
    assert (rows != sampled_rows(200, 0.1, seed=1, name="nights_task4")).any()
    assert (
        len(sampled_rows(3, 0.1, seed=1, name="x")) == 1 and len(sampled_rows(7, 1.0, seed=1, name="x")) == 7
    )


def test_neighbours_share_candidates():
    """Twenty groups of queries over the same ten candidates, shuffled: a shard holds fewer different ones."""
    rng = np.random.default_rng(0)
    groups = [[f"{group}:{n}" for n in range(10)] for group in range(20)]
    lists = [list(rng.permutation(groups[number % 20])[:8]) for number in range(160)]
    order = rng.permutation(160)
    run = Run(
        qids=[f"q{n}" for n in order],
        dids=[lists[n] for n in order],
        scores=[np.linspace(1, 0, 8) for _ in order],
    )

    def different(rows) -> int:
        shards = [rows[start : start + 8] for start in range(0, 160, 8)]
        return sum(len({did for row in shard for did in run.dids[int(row)]}) for shard in shards)

    rows = neighbourhoods(run, np.arange(160), depth=8)
    assert sorted(rows) == list(range(160))
    assert different(rows) < different(np.arange(160)) / 2
    np.testing.assert_array_equal(rows, neighbourhoods(run, np.arange(160), depth=8))
    empty = Run(qids=["a", "b", "c"], dids=[[], ["x"], []], scores=[[], [1.0], []])
    assert sorted(neighbourhoods(empty, np.arange(3), depth=8)) == [0, 1, 2]
