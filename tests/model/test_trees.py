"""Trees cut and packed: every token sees its prefix and itself, whatever lies beside it."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from umarvel_ray.data.records import Candidate, Query
from umarvel_ray.errors import CheckpointError
from umarvel_ray.model.attention import packed_attention
from umarvel_ray.model.reranker import Reranker
from umarvel_ray.model.settings import RerankerSettings
from umarvel_ray.model.trees import ByteCache, Tree, TreeBuilder, pack_trees


def tree(prefix: int, *lengths: int) -> Tree:
    """Tokens numbered through, no pictures."""
    total = prefix + sum(lengths)
    ends = np.cumsum(lengths)
    return Tree(
        ids=np.arange(total, dtype=np.int32),
        positions=np.broadcast_to(
            np.r_[np.arange(prefix), *(prefix + np.arange(n) for n in lengths)], (3, total)
        ),
        leaf=np.repeat(np.arange(len(lengths) + 1), [prefix, *lengths]).astype(np.int32),
        decisive=prefix + ends - 1,
        shown=(),
    )


TREES = [tree(5, 1, 9, 3, 8), tree(5, 2), tree(0, 4, 4), tree(40, 3, 3, 30), tree(4, 7)]


def test_each_token_sees_the_prefix_and_its_own_candidate_so_far():
    """Read off the blocks: who looks at whom, against the definition."""
    inputs, layout, _ = pack_trees(TREES, device=torch.device("cpu"))
    total = inputs.ids_T.numel()
    sees = np.zeros((total, total), dtype=bool)
    place_of = np.full(sum(block.index_BL.numel() for block in layout.blocks), -1)
    place_of[layout.restore_T.numpy()] = np.arange(total)
    place = 0
    for block in layout.blocks:
        keys_BS = block.index_BL if block.keys_BS is None else block.keys_BS
        rows, length = block.index_BL.shape
        allowed = (
            torch.ones(rows, 1, length, length).tril().bool()
            if block.mask is None
            else block.mask.expand(rows, 1, length, keys_BS.shape[1])
        )
        for row in range(rows):
            for column in range(length):
                token = place_of[place]
                place += 1
                if token >= 0:
                    assert block.index_BL[row, column] == token
                    looked_at = keys_BS[row][allowed[row, 0, column]].tolist()
                    assert len(set(looked_at)) == len(looked_at)
                    sees[token, looked_at] = True
    expected = np.zeros_like(sees)
    start = 0
    for one in TREES:
        for i in range(one.num_tokens):
            for j in range(i + 1):
                expected[start + i, start + j] = one.leaf[j] in (0, one.leaf[i])
        start += one.num_tokens
    assert np.array_equal(sees, expected)


def test_in_the_last_layer_the_tokens_asked_for_see_what_they_saw():
    """Attention with random keys, in full and at the deciding tokens of all candidates alone."""
    inputs, layout, _ = pack_trees(TREES, device=torch.device("cpu"))
    starts = np.cumsum([0, *inputs.lengths_N])
    places = np.concatenate([one.decisive + start for one, start in zip(TREES, starts, strict=False)])
    states = torch.from_numpy(np.random.default_rng(0).normal(size=(3, 1, 2, starts[-1], 8))).float()
    last = SimpleNamespace(layer_idx=1, config=SimpleNamespace(num_hidden_layers=2))
    before = SimpleNamespace(layer_idx=0, config=last.config)
    full, _ = packed_attention(last, *states, None, layout=layout)
    for chosen in (places, places[::-1].copy(), np.arange(starts[-1])):
        ending = layout.ending_at(torch.from_numpy(chosen))
        found, _ = packed_attention(last, *states, None, layout=ending)
        torch.testing.assert_close(found[:, chosen], full[:, chosen], rtol=0, atol=1e-6)
        assert torch.equal(packed_attention(before, *states, None, layout=ending)[0], full)


@pytest.mark.parametrize("budget", [1, 12, 15, 25, 26, 100])
def test_a_tree_that_is_too_long_is_cut_between_candidates(budget):
    whole = TREES[0]
    parts = whole.split(budget)
    paths = [
        part.ids[(part.leaf == 0) | (part.leaf == leaf)].tolist()
        for part in parts
        for leaf in range(1, len(part.decisive) + 1)
    ]
    assert paths == [whole.ids[(whole.leaf == 0) | (whole.leaf == leaf)].tolist() for leaf in range(1, 5)]
    answers = np.concatenate([part.ids[part.decisive] for part in parts])
    assert np.array_equal(answers, whole.ids[whole.decisive])
    assert all(part.num_tokens <= budget or len(part.decisive) == 1 for part in parts)


def test_pictures_stay_with_their_candidates_when_a_tree_is_cut(backbone, pictures):
    builder = Reranker.load(backbone).builder
    pool = [Candidate(did=f"9:{n}", txt="A kite.", img_path=path) for n, path in enumerate(pictures.values())]
    whole = builder.build(Query(qid="9:1", img_path=pictures["hill"]), pool)
    for part, path in zip(whole.split(1), pictures.values(), strict=True):
        assert [(one.leaf, one.path) for one in part.shown] == [(0, pictures["hill"]), (1, path)]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"Yes": [7], "No": [7]}, "makes 'Yes' and 'No' the same token, 7"),
        ({"Yes": [7, 8], "No": [9]}, "cuts 'Yes' into 2 tokens"),
    ],
)
def test_answers_that_one_token_cannot_tell_are_refused(backbone, words, message, monkeypatch):
    reranker = Reranker.load(backbone)
    encode = TreeBuilder._encode
    monkeypatch.setattr(
        TreeBuilder,
        "_encode",
        lambda self, texts: [words[texts[0]]] if texts[0] in words else encode(self, texts),
    )
    with pytest.raises(CheckpointError, match=message):
        TreeBuilder(reranker._tokenizer, reranker.adapter, RerankerSettings())


def test_a_cache_keeps_what_was_used_last():
    cache: ByteCache[str] = ByteCache(6, len)
    for key in ("ab", "cd", "ef"):
        cache.put(key, key)
    assert cache.get("ab") == "ab"
    cache.put("gh", "gh")
    assert [cache.get(key) for key in ("ab", "cd", "ef", "gh")] == ["ab", None, "ef", "gh"]
    cache.put("long", "longer than all")
    assert cache.get("long") is None and cache.get("gh") == "gh"
