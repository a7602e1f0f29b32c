"""One step of the reranker leaves the gradient of the mean over its pairs, whatever its lanes and trees."""

from typing import Any

import numpy as np
import pytest
import torch
from fixtures_model import ListSet, replicated, training_item
from torch import Tensor

from umarvel_ray.data.batches import BatchPlan
from umarvel_ray.data.records import Candidate, Query
from umarvel_ray.model.reranker import Reranker
from umarvel_ray.model.settings import LoraSettings
from umarvel_ray.train.gather import Lanes
from umarvel_ray.train.pairs import RerankerTask
from umarvel_ray.train.settings import RerankerTrainSettings


@pytest.fixture
def reranker(backbone) -> Reranker:
    reranker = Reranker.load(backbone)
    torch.manual_seed(5)
    reranker.set_trainable("lora", LoraSettings(rank=2, alpha=4, dropout=0.0))
    with torch.no_grad():
        for name, parameter in reranker.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return reranker.train()


@pytest.fixture
def data(pictures) -> ListSet:
    """Lists of 3, 2, none and 1."""
    kite, hill = (Candidate(did=f"9:{name}", img_path=pictures[name]) for name in ("kite", "hill"))
    words = [
        Candidate(did=f"9:{n}", txt=txt) for n, txt in enumerate(["The kite.", "The boat.", "Over the hill."])
    ]
    return ListSet(
        (
            training_item(
                Query(qid="9:1", txt="a kite", instruction="Find it."), kite, others=[hill, *words[:2]]
            ),
            training_item(Query(qid="9:2", img_path=pictures["tower"]), words[2], others=words[:2]),
            training_item(Query(qid="9:3", txt="Which?", img_path=pictures["boat"]), words[1]),
            training_item(Query(qid="9:4", txt="a hill"), hill, others=[kite]),
        )
    )


def task(
    reranker: Reranker, data: ListSet, lanes: Lanes, max_tokens: int = 8192, **settings: Any
) -> RerankerTask:
    plan = BatchPlan(num_rows=len(data), batch_size=len(data), seed=1)
    return RerankerTask(
        reranker,
        data,
        RerankerTrainSettings(**settings),
        plan=plan,
        strategy=replicated(reranker, lanes),
        max_tokens=max_tokens,
        seed=4,
    )


def reference_step(
    reranker: Reranker, data: ListSet, *, positive_weight: float
) -> tuple[float, dict[str, Tensor]]:
    """Every pair by itself: cross-entropy of the answer's tokens, averaged; then the mean over all pairs."""
    losses = []
    closing = [reranker._tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", "Ċ")]
    for item in data.items:
        for candidate, word in [(item.positive, "Yes"), *((other, "No") for other in item.others)]:
            tree = reranker.builder.build(item.query, [candidate], [word == "Yes"])
            answer = [reranker._tokenizer.convert_tokens_to_ids(word), *closing]
            assert tree.ids[-3:].tolist() == answer
            hidden_TD = reranker.hidden([tree])
            logits = reranker.model.get_output_embeddings()(hidden_TD[-4:-1])
            loss = torch.nn.functional.cross_entropy(logits, torch.tensor(answer))
            losses.append(loss * (positive_weight if word == "Yes" else 1.0))
    loss = torch.stack(losses).mean()
    trained = {name: p for name, p in reranker.named_parameters() if p.requires_grad}
    return loss.item(), dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))


@pytest.mark.parametrize("positive_weight", [1.0, 2.5])
def test_the_gradient_is_that_of_all_pairs(reranker, data, positive_weight):
    """Trees of several candidates = pairs one at a time, in any lanes and chunks."""
    loss, expected = reference_step(reranker, data, positive_weight=positive_weight)
    largest = max(gradient.abs().max().item() for gradient in expected.values())
    for num_lanes, max_tokens in [(1, 8192), (1, 1), (2, 8192), (6, 8192)]:
        step = task(
            reranker, data, Lanes(num_lanes), max_tokens,
            negatives_per_positive=9, positive_weight=positive_weight,
        )  # fmt: skip
        figures = step.backward(step.prepare(0), seed=1)
        assert figures["loss"] == pytest.approx(loss, rel=1e-5)
        assert (figures["num_queries"], figures["num_pairs"]) == (4, 10)
        for name, parameter in reranker.named_parameters():
            if parameter.requires_grad:
                torch.testing.assert_close(parameter.grad, expected[name], atol=3e-6 * largest, rtol=1e-4)


def test_accuracy_is_the_share_of_pairs_scored_on_the_right_side(reranker, data):
    reranker.eval()
    scores = reranker.score_many([(item.query, [item.positive, *item.others]) for item in data.items])
    right = sum(int(row[0] > 0.5) + int((row[1:] < 0.5).sum()) for row in scores)
    step = task(reranker, data, Lanes(2), negatives_per_positive=9)
    assert step.backward(step.prepare(0), seed=1)["accuracy"] == pytest.approx(right / 10)


def test_each_visit_draws_its_own_negatives(reranker, data):
    """One of each list where there is one, a pure function of the step, and in time all of them."""
    step = task(reranker, data, Lanes(1))
    drawn: set[str] = set()
    for number in range(12):
        prepared = step.prepare(number)
        assert prepared.num_pairs == 7 and sorted(prepared.qids) == ["9:1", "9:2", "9:3", "9:4"]
        again = step.prepare(number)
        for tree, same, answers in zip(
            prepared.trees_by_lane[0], again.trees_by_lane[0], prepared.answers_by_lane[0], strict=True
        ):
            assert np.array_equal(tree.ids, same.ids)
            assert answers == [True] + [False] * (len(tree.decisive) - 1)
        first = prepared.trees_by_lane[0][prepared.qids.index("9:1")]
        drawn.add(reranker._tokenizer.decode(first.ids[first.leaf == 2]))
    assert len(drawn) == 3
    assert step.samples(step.prepare(0)) == step.prepare(0).qids


def test_positives_and_window_are_what_a_visit_shows(reranker):
    """Two positives of three, and as many negatives; none from beyond the window; in time all of them."""
    positives = [Candidate(did=f"9:p{n}", txt=f"Right {n}.") for n in range(3)]
    others = [Candidate(did=f"9:n{n}", txt=f"Wrong {n}.") for n in range(4)]
    data = ListSet((training_item(Query(qid="9:1", txt="a kite"), *positives, others=others),))
    step = task(reranker, data, Lanes(1), positives=2, negatives_per_positive=1, window=3)
    seen: set[str] = set()
    for number in range(20):
        prepared = step.prepare(number)
        ((tree,), (answers,)) = prepared.trees_by_lane[0], prepared.answers_by_lane[0]
        assert answers == [True, True, False, False] and prepared.num_pairs == 4
        texts = [
            reranker._tokenizer.decode(tree.ids[(tree.leaf == 0) | (tree.leaf == leaf)])
            for leaf in range(1, 5)
        ]
        for text, answer in zip(texts, answers, strict=True):
            assert text.endswith(f"{'Yes' if answer else 'No'}<|im_end|>\n")
            assert ("Candidate:Right" in text) == answer
        assert len(set(texts)) == 4
        seen |= {text.split("Candidate:")[1].split("<")[0] for text in texts}
    assert seen == {"Right 0.", "Right 1.", "Right 2.", "Wrong 0.", "Wrong 1.", "Wrong 2."}
    assert step.backward(step.prepare(0), seed=1)["num_pairs"] == 4
