"""One step of the embedder leaves the gradient of the whole batch, whatever its lanes and chunks."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from fixtures_model import ListSet, replicated, training_item
from torch import Tensor

from umarvel_ray.data.batches import BatchPlan
from umarvel_ray.data.records import Candidate, Query
from umarvel_ray.model.encoder import Encoder
from umarvel_ray.model.settings import LoraSettings
from umarvel_ray.train.contrastive import ContrastiveTask
from umarvel_ray.train.gather import Lanes
from umarvel_ray.train.settings import ContrastiveSettings

MANY, ONE = 60, 8192
"""Token budgets: many chunks a lane, and one."""


def load_encoder(backbone: str, *, trainable: str = "lora", dropout: float = 0.0) -> Encoder:
    """An encoder in training, adapters as after some steps, a temperature that keeps gradients near 1."""
    encoder = Encoder.load(backbone)
    torch.manual_seed(5)
    lora = LoraSettings(rank=2, alpha=4, dropout=dropout)
    encoder.set_trainable(trainable, lora, learn_temperature=True)
    with torch.no_grad():
        encoder.temperature.fill_(0.2)
        for name, parameter in encoder.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return encoder.train()


def pairs(pictures: dict[str, str]) -> ListSet:
    """Ragged lists; a question asked twice; one positive under two dids; a query with a second positive."""
    kite = Candidate(did="9:1", img_path=pictures["kite"])
    boat = Candidate(did="9:2", txt="A boat.", img_path=pictures["boat"])
    tower = Candidate(did="9:3", txt="The tower stands there.")
    twin = Candidate(did="9:4", txt="The tower stands there.")
    hill, sea = Candidate(did="9:5", txt="Over the hill."), Candidate(did="9:6", txt="At sea.")
    asked = "Find a photo."
    return ListSet(
        (
            training_item(Query(qid="9:1", txt="a kite", instruction=asked), kite, boat, others=[hill, sea]),
            training_item(
                Query(qid="9:2", txt="a boat", instruction=asked), boat, others=[tower, twin, kite]
            ),
            training_item(Query(qid="9:3", img_path=pictures["tower"]), tower),
            training_item(Query(qid="9:4", txt="Where?", img_path=pictures["hill"]), twin, others=[sea]),
            training_item(Query(qid="9:5", txt="a boat", instruction=asked), sea, others=[hill]),
        )
    )


def judged_lists(pictures: dict[str, str]) -> ListSet:
    """Lists of three lengths with a teacher's scores."""
    items = pairs(pictures).items
    scores = [(0.9, 0.2), (0.1, 0.3, 0.8), (0.5,), (0.7, 0.6), (0.4, 0.45)]
    return ListSet(
        tuple(
            training_item(
                item.query, item.positive, others=[item.positive, *item.others][: len(own)], scores=own
            )
            for item, own in zip(items, scores, strict=True)
        )
    )


CASES: dict[str, dict[str, Any]] = {
    "one way": {},
    "both ways": {"candidate_to_query": 0.5},
    "unmasked": {"mask_false_negatives": False, "candidate_to_query": 1.0},
    "own list": {"negatives": "own"},
    "distillation": {"kind": "distillation"},
    "fixed teacher": {"kind": "distillation", "teacher_temperature": 0.3},
}


def training_set(case: str, pictures: dict[str, str]) -> ListSet:
    return judged_lists(pictures) if "kind" in CASES[case] else pairs(pictures)


def step(
    encoder: Encoder,
    data: ListSet,
    settings: ContrastiveSettings,
    lanes: Lanes,
    max_tokens: int,
    seed: int = 7,
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Figures and gradients of one step over the whole set."""
    plan = BatchPlan(num_rows=len(data), batch_size=len(data), seed=1)
    task = ContrastiveTask(
        encoder, data, settings, plan=plan, strategy=replicated(encoder, lanes), max_tokens=max_tokens
    )
    figures = task.backward(task.prepare(0), seed=seed)
    trained = {name: p.grad for name, p in encoder.named_parameters() if p.requires_grad}
    assert all(gradient is not None for gradient in trained.values())
    return figures, {name: gradient.clone() for name, gradient in trained.items() if gradient is not None}


def reference_step(
    encoder: Encoder, data: ListSet, settings: ContrastiveSettings
) -> tuple[float, dict[str, Tensor]]:
    """Record by record, query by query, pool by pool, in one graph."""
    embedding: dict[Any, Tensor] = {}

    def embed(record: Query | Candidate) -> Tensor:
        key = record if isinstance(record, Query) else data.content_key(record)
        if key not in embedding:
            embedding[key] = encoder(encoder.builder.pack([encoder.builder.build(record)]))[0]
        return embedding[key]

    def cross_entropy(asker: Tensor, positive: Tensor, pool: Sequence[Tensor]) -> Tensor:
        logits = torch.stack([asker @ other for other in pool]) / encoder.temperature
        return torch.logsumexp(logits, 0) - asker @ positive / encoder.temperature

    key, items, tau = data.content_key, data.items, encoder.temperature
    content = {key(c): c for item in items for c in (item.positive, *item.others)}
    relevant: dict[Any, set[Any]] = {}
    for item in items:
        question = (item.query.txt, item.query.img_path)
        relevant.setdefault(question, set()).update(item.relevant)
    loss = torch.zeros(())
    pools = []
    for item in items:
        own = key(item.positive)
        question = (item.query.txt, item.query.img_path)
        if not settings.mask_false_negatives:  # every item is a candidate of its own
            pools.append([key(c) for other in items for c in (other.positive, *other.others)])
            continue
        listed = {own, *map(key, item.others)} if settings.negatives == "own" else set(content)
        pools.append(listed - (relevant[question] - {own}))
    for number, item in enumerate(items):
        asker = embed(item.query)
        if settings.kind == "distillation":
            assert item.scores is not None
            student = torch.stack([asker @ embed(other) for other in item.others]).div(tau).log_softmax(0)
            teacher = torch.tensor(item.scores) / (settings.teacher_temperature or tau.detach())
            loss = loss + (teacher.softmax(0) * (teacher.log_softmax(0) - student)).sum()
            continue
        positive = embed(item.positive)
        loss = loss + cross_entropy(asker, positive, [embed(content[c]) for c in pools[number]])
        if settings.candidate_to_query:
            askers = [
                embed(other.query)
                for place, other in enumerate(items)
                if place == number
                or not settings.mask_false_negatives
                or (key(other.positive) != key(item.positive) and key(item.positive) in pools[place])
            ]
            loss = loss + settings.candidate_to_query * cross_entropy(positive, asker, askers)
    loss = loss / len(items)
    trained = {name: p for name, p in encoder.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    return loss.item(), {
        name: torch.zeros_like(p) if g is None else g
        for (name, p), g in zip(trained.items(), gradients, strict=True)
    }


def assert_near(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Sums of float32 in another order: a few 1e-6 of the largest entry of all."""
    assert found.keys() == expected.keys()
    largest = max(gradient.abs().max().item() for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=3e-6 * largest, rtol=1e-4)


@pytest.mark.parametrize("trainable", ["lora", "full"])
@pytest.mark.parametrize("case", CASES)
def test_the_gradient_is_that_of_the_whole_batch(backbone, pictures, case, trainable):
    """One lane, two lanes, more lanes than items; one chunk and many."""
    encoder, data = load_encoder(backbone, trainable=trainable), training_set(case, pictures)
    settings = ContrastiveSettings(**CASES[case])
    loss, expected = reference_step(encoder, data, settings)
    assert abs(expected["temperature"]) > 1e-3 and loss > 1e-3
    for num_lanes, max_tokens in [(1, ONE), (1, MANY), (2, MANY), (2, ONE), (13, ONE)]:
        figures, gradients = step(encoder, data, settings, Lanes(num_lanes), max_tokens)
        assert figures["loss"] == pytest.approx(loss, rel=1e-5)
        assert_near(gradients, expected)


def test_the_figures_count_the_batch(backbone, pictures):
    encoder = load_encoder(backbone)
    figures, _ = step(encoder, pairs(pictures), ContrastiveSettings(), Lanes(2), ONE)
    # The boat for query 1; the sea for query 2 and the boat for query 5, whose words are the same.
    assert figures["num_queries"] == 5 and figures["num_candidates"] == 5 and figures["false_negatives"] == 3
    assert figures["temperature"] == pytest.approx(0.2)


def test_the_second_pass_repeats_the_dropout_of_the_first(backbone, pictures):
    """Else the gradient would be that of another network than the one that gave the loss."""
    encoder, data = load_encoder(backbone, dropout=0.5), pairs(pictures)
    seen: list[Tensor] = []
    handle = encoder.register_forward_hook(lambda module, inputs, output: seen.append(output.detach()))
    losses = [
        step(encoder, data, ContrastiveSettings(), Lanes(1), MANY, seed=n)[0]["loss"] for n in (7, 7, 8)
    ]
    handle.remove()
    num_chunks = len(seen) // 6
    assert num_chunks > 3
    for start in range(0, len(seen), 2 * num_chunks):
        first, second = seen[start:][:num_chunks], seen[start + num_chunks :][:num_chunks]
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert losses[0] == losses[1] != losses[2]


def test_dropout_differs_between_chunks_and_lanes(backbone):
    """Two copies of one text, in chunks or lanes of their own, are not embedded alike."""
    item = training_item(Query(qid="9:1", txt="a kite"), Candidate(did="9:1", txt="a kite"))
    for lanes, budget in ((Lanes(1), 1), (Lanes(2), ONE)):
        encoder = load_encoder(backbone, dropout=0.5)
        seen: list[Tensor] = []
        encoder.register_forward_hook(lambda module, inputs, output, seen=seen: seen.append(output.detach()))
        step(encoder, ListSet((item,)), ContrastiveSettings(), lanes, budget)
        assert not torch.equal(seen[0], seen[1])


def test_a_lane_of_texts_alone_trains_the_vision_tower_too(backbone, pictures):
    encoder = load_encoder(backbone, trainable="full")
    photo = Candidate(did="9:1", img_path=pictures["boat"])
    data = ListSet(
        (training_item(Query(qid="9:1", txt="a boat"), photo, others=[Candidate(did="9:2", txt="No.")]),)
    )
    plan = BatchPlan(num_rows=1, batch_size=1, seed=0)
    task = ContrastiveTask(
        encoder,
        data,
        ContrastiveSettings(),
        plan=plan,
        strategy=replicated(encoder, Lanes(2)),
        max_tokens=ONE,
    )
    prepared = task.prepare(0)
    assert [sum(bool(item.visuals) for item in prepared.items_by_lane[lane]) for lane in (0, 1)] == [
        1,
        0,
    ]
    task.backward(prepared, seed=0)
    visual = [p.grad for name, p in encoder.named_parameters() if "visual" in name and p.requires_grad]
    assert visual and all(gradient is not None for gradient in visual)
    assert any(gradient.abs().max() > 1e-6 for gradient in visual if gradient is not None)


@pytest.mark.parametrize("trainable", ["lora", "full"])
def test_half_precision_weights_take_their_gradient(backbone, pictures, trainable):
    encoder = Encoder.load(backbone, dtype="bfloat16")
    encoder.set_trainable(trainable, LoraSettings(rank=2, alpha=4), learn_temperature=True)
    data = pairs(pictures)
    figures, gradients = step(encoder.train(), data, ContrastiveSettings(), Lanes(2), MANY)
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    whole = load_encoder(backbone, trainable="full")
    with torch.no_grad():
        whole.temperature.fill_(0.05)
    expected, _ = step(whole, data, ContrastiveSettings(), Lanes(2), MANY)
    assert figures["loss"] == pytest.approx(expected["loss"], rel=0.1)


def test_tau_stays_positive(backbone, pictures):
    encoder, data = load_encoder(backbone), pairs(pictures)
    plan = BatchPlan(num_rows=5, batch_size=5, seed=0)
    task = ContrastiveTask(
        encoder,
        data,
        ContrastiveSettings(),
        plan=plan,
        strategy=replicated(encoder, Lanes(1)),
        max_tokens=ONE,
    )
    with torch.no_grad():
        encoder.temperature.fill_(-0.5)
    task.after_step()
    assert encoder.temperature.item() > 0
    assert task.samples(task.prepare(0)) == [
        item.query.qid for item in map(data.items.__getitem__, plan.rows(0)[0])
    ]


@pytest.mark.parametrize("num_lanes", [1, 2])
def test_held_out_queries_are_ranked_against_one_another(backbone, pictures, num_lanes):
    """Ranks by a loop over cosines, other positives of a query left out; no dropout, and training goes on."""
    encoder, data = load_encoder(backbone, dropout=0.5), pairs(pictures)
    plan = BatchPlan(num_rows=5, batch_size=1, seed=0, num_held_out=4)
    strategy = replicated(encoder, Lanes(num_lanes))
    task = ContrastiveTask(
        encoder, data, ContrastiveSettings(), plan=plan, strategy=strategy, max_tokens=MANY
    )
    found = task.validate()
    assert encoder.training
    encoder.eval()
    items = [data.items[row] for row in plan.held_out]
    pool = {data.content_key(c): c for item in items for c in (item.positive, *item.others)}
    ranks = []
    for item in items:
        same = [other for other in items if other.query.content == item.query.content]
        relevant = set().union(*(other.relevant for other in same)) - {data.content_key(item.positive)}
        query, positive = encoder.embed_queries([item.query])[0], encoder.embed_candidates([item.positive])[0]
        others = [
            c for key, c in pool.items() if key not in relevant and key != data.content_key(item.positive)
        ]
        better = sum(
            float(query @ encoder.embed_candidates([c])[0]) > float(query @ positive) for c in others
        )
        ranks.append(1 + better)
    assert found["hit@1"] == pytest.approx(sum(rank <= 1 for rank in ranks) / 4)
    assert found["score"] == pytest.approx(sum(1 / rank for rank in ranks) / 4)


def test_the_record_that_broke_the_loss_is_named(backbone, pictures):
    encoder, data = load_encoder(backbone), pairs(pictures)
    plan = BatchPlan(num_rows=5, batch_size=5, seed=0)
    task = ContrastiveTask(
        encoder,
        data,
        ContrastiveSettings(),
        plan=plan,
        strategy=replicated(encoder, Lanes(2)),
        max_tokens=ONE,
    )
    prepared = task.prepare(0)
    records, build = prepared.batch.records, encoder.builder.build
    holders: dict[int, list[str]] = {}
    for record in records:
        for token in set(build(record).ids.tolist()):
            name = record.qid if isinstance(record, Query) else record.did
            holders.setdefault(token, []).append(name)
    token, broken = min(holders.items(), key=lambda pair: len(pair[1]))
    assert 0 < len(broken) < len(records)
    with torch.no_grad():
        encoder.model.get_input_embeddings().weight[token] = float("nan")
    assert math.isnan(task.backward(prepared, seed=0)["loss"])
    assert task.samples(prepared) == broken


@pytest.mark.parametrize("lanes", [1, 2])
def test_stored_features_of_pictures_leave_the_gradient(backbone, pictures, tmp_path, lanes):
    """A first step keeps them, a second takes them: no picture passes the tower again."""
    data, settings = pairs(pictures), ContrastiveSettings()
    figures, gradients = step(load_encoder(backbone), data, settings, Lanes(lanes), ONE)
    for turn in range(2):
        encoder = load_encoder(backbone)
        store = encoder.keep_vision_features(tmp_path)
        seen: list[int] = []
        encoder.model.base_model.model.model.visual.register_forward_pre_hook(
            lambda module, args, kwargs, seen=seen: seen.append(1), with_kwargs=True
        )
        kept, found = step(encoder, data, settings, Lanes(lanes), ONE)
        assert bool(seen) == (turn == 0) and len(store) == 4
        assert kept["loss"] == pytest.approx(figures["loss"], abs=1e-5)
        for name, gradient in gradients.items():
            torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-4)
