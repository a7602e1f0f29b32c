"""Scores of a tree equal those of one pair at a time through the stock model, answers generated nowhere."""

import re
from typing import Any

import numpy as np
import pytest
import torch
from fixtures_backbones import KINDS, StockEncoder
from PIL import Image

from umarvel_ray.data.records import Candidate, Picture, Query
from umarvel_ray.errors import CheckpointError
from umarvel_ray.model.inputs import clean
from umarvel_ray.model.reranker import Reranker
from umarvel_ray.model.settings import ImageSettings, LoraSettings, RerankerSettings

SENTENCE = (
    "I will provide you with a query and a candidate. Please evaluate whether the candidate meets the "
    "requirements of the query. If it does, respond with 'Yes'; if it doesn't, respond with 'No'."
)
EXACT = {"atol": 1e-6, "rtol": 0.0}
"""Probabilities in float32, against float64 or another order of operations."""


@pytest.fixture(scope="module")
def reranker(backbone) -> Reranker:
    """Weights turned up, so that scores spread: those of a fresh random backbone all lie near a half."""
    reranker = Reranker.load(backbone)
    turn_up(reranker.model)
    return reranker


def turn_up(model: Any) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "language_model" in name:
                parameter.mul_(4)


@pytest.fixture(scope="module")
def stock(backbone) -> StockEncoder:
    """The same weights in plain modules, in float64: the difference is the tree's own rounding."""
    return judge(backbone)


def judge(folder: str) -> StockEncoder:
    stock = StockEncoder(folder)
    turn_up(stock.model)
    stock.model.double()
    return stock


def stock_score(stock: StockEncoder, query: Query, candidate: Candidate, question: str, answer: str) -> float:
    """P(Yes) from whole logits after the rendered prompt; positions are the stock model's own."""
    user: list[dict[str, str]] = [{"type": "text", "text": f"{SENTENCE}Query:"}]
    user += [{"type": "image"}] if query.img_path else []
    user += [{"type": "text", "text": f"{question}Candidate:"}]
    user += [{"type": "image"}] if candidate.img_path else []
    user += [{"type": "text", "text": answer}]
    text = stock.tokenizer.apply_chat_template(
        [{"role": "user", "content": user}], tokenize=False, add_generation_prompt=True
    )
    images = [Image.open(path) for path in (query.img_path, candidate.img_path) if path]
    pixels = dict(stock.processor(images, return_tensors="pt")) if images else {}
    pieces = text.split("<|image_pad|>")
    for number, grid in enumerate(pixels.get("image_grid_thw", []), start=1):
        pieces[number] = "<|image_pad|>" * (int(grid.prod()) // 4) + pieces[number]
    ids = stock.tokenizer("".join(pieces), add_special_tokens=False, return_tensors="pt")["input_ids"]
    is_image = (ids == stock.model.config.image_token_id).int()
    with torch.no_grad():
        logits = stock.model(input_ids=ids, mm_token_type_ids=is_image, use_cache=False, **pixels).logits
    yes_no = logits[0, -1, stock.tokenizer.convert_tokens_to_ids(["Yes", "No"])]
    return float(yes_no.softmax(0)[0])


@pytest.fixture(scope="module")
def questions(pictures) -> list[tuple[Query, str]]:
    """Queries with the words the model reads of them."""
    return [
        (
            Query(qid="9:1", txt="a red kite", instruction="find a photo"),
            "Find a photo. a red kite.",
        ),
        (Query(qid="9:2", img_path=pictures["tower"], instruction="Find the caption?"), "Find the caption?"),
        (Query(qid="9:3", txt="where is it?", img_path=pictures["kite"]), "Where is it?"),
    ]


@pytest.fixture(scope="module")
def candidates(pictures) -> list[tuple[Candidate, str]]:
    """Pictures of one size and of several, words that begin alike, and both together."""
    return [
        (Candidate(did="9:1", txt="the red kite stands over the hill"), "The red kite stands over the hill."),
        (Candidate(did="9:2", img_path=pictures["kite"]), ""),
        (Candidate(did="9:3", img_path=pictures["hill"]), ""),
        (Candidate(did="9:4", txt="The red kite stands"), "The red kite stands."),
        (Candidate(did="9:5", txt="The red kite stands.", img_path=pictures["boat"]), "The red kite stands."),
        (Candidate(did="9:6", txt="The red kite stands.", img_path=pictures["hill"]), "The red kite stands."),
    ]


@pytest.mark.parametrize(
    "chosen",
    [[0], [1], [0, 3], [1, 2], [4, 5], [5, 2], [0, 1, 2, 3, 4, 5]],
    ids=lambda chosen: "-".join(map(str, chosen)),
)
def test_tree_scores_are_those_of_single_pairs(reranker, stock, questions, candidates, chosen):
    for query, question in questions:
        scores = reranker.score(query, [candidates[index][0] for index in chosen])
        expected = [stock_score(stock, query, candidates[i][0], question, candidates[i][1]) for i in chosen]
        np.testing.assert_allclose(scores, expected, **EXACT)
        assert scores.dtype == np.float32


@pytest.fixture(scope="module")
def judges(backbones) -> dict[str, tuple[Reranker, StockEncoder]]:
    """Of each backbone ours, and the reference."""
    pairs = {kind: (Reranker.load(folder), judge(folder)) for kind, folder in backbones.items()}
    for reranker, _ in pairs.values():
        turn_up(reranker.model)
    return pairs


@pytest.mark.parametrize("num", [1, 7, 50, pytest.param(100, marks=pytest.mark.slow)])
@pytest.mark.parametrize("content", ["text", "image", "mixed"])
@pytest.mark.parametrize("kind", KINDS)
def test_lists_of_unequal_candidates_score_as_single_pairs(judges, questions, pictures, kind, content, num):
    """Lengths from 1 to 90 words, pictures that repeat; the reference takes a few pairs of each list."""
    reranker, stock = judges[kind]
    rng = np.random.default_rng(num)
    pool = []
    for number in range(num):
        words = " ".join(rng.choice(["red", "kite", "over", "the", "hill"], size=int(rng.integers(1, 90))))
        image = pictures[list(pictures)[int(rng.integers(len(pictures)))]]
        has_image = content == "image" or (content == "mixed" and number % 3 > 0)
        has_text = content == "text" or (content == "mixed" and number % 3 < 2)
        pool.append(
            Candidate(
                did=f"9:{number}", txt=words if has_text else None, img_path=image if has_image else None
            )
        )
    query, question = questions[num % 3]
    whole = reranker.score(query, pool)
    assert whole.shape == (num,)
    longest = int(np.argmax([len(candidate.txt or "") for candidate in pool]))
    for index in {0, num // 2, num - 1, longest}:
        expected = stock_score(stock, query, pool[index], question, clean(pool[index].txt or ""))
        assert whole[index] == pytest.approx(expected, abs=1e-6)
    (cut,) = reranker.score_many([(query, pool)], max_tokens=600)
    np.testing.assert_allclose(cut, whole, **EXACT)
    assert num == 1 or np.ptp(whole) > 1e-4  # else a mixed-up answer could not be told


@pytest.mark.parametrize("kind", KINDS)
def test_parts_and_videos_are_read_in_their_order(judges, pictures, kind):
    """A query of several parts beside candidates of one: the tree against each pair alone."""
    reranker, _ = judges[kind]
    query = Query(
        qid="9:1", parts=(Picture(pictures["kite"]), "longer sleeves", Picture(pictures["boat"]), "and blue")
    )
    pool = [
        Candidate(did="9:1", parts=("a hill", Picture(pictures["hill"]), "and", Picture(pictures["tower"]))),
        Candidate(did="9:2", txt="a hill"),
        Candidate(did="9:3", img_path=pictures["hill"]),
    ]
    alone = np.concatenate([reranker.score(query, [candidate]) for candidate in pool])
    np.testing.assert_allclose(reranker.score(query, pool), alone, **EXACT)
    text = reranker._tokenizer.decode(reranker.builder.pair_ids(query, pool[0]))
    text = re.sub(r"<\|vision_start\|>(<\|image_pad\|>)+<\|vision_end\|>", "#", text)
    assert "Query:#Longer sleeves.#And blue.Candidate:A hill.#And.#<|im_end|>" in text


def test_a_picture_goes_through_the_tower_once(reranker, questions, pictures, monkeypatch):
    """Within a list, over micro-batches and calls; and no more often than its file is read."""
    seen: list[int] = []
    visual = type(reranker.model.model.visual)
    forward = visual.forward
    monkeypatch.setattr(
        visual, "forward", lambda self, *a, **k: seen.append(len(k["grid_thw"])) or forward(self, *a, **k)
    )
    fresh = Reranker(
        reranker.model, reranker.adapter, reranker._tokenizer, reranker.settings, source=""
    ).eval()
    pool = [Candidate(did=f"9:{n}", img_path=pictures[name]) for n, name in enumerate([*pictures] * 3)]
    first = fresh.score_many([(query, pool) for query, _ in questions], max_tokens=150)
    assert sum(seen) == len(pictures)
    again = fresh.score_many([(query, pool) for query, _ in questions])
    assert sum(seen) == len(pictures)
    np.testing.assert_allclose(again, first, **EXACT)


def test_an_empty_list_has_no_scores(reranker, questions, candidates):
    query = questions[0][0]
    empty, full, last = reranker.score_many([(query, []), (query, [candidates[0][0]]), (query, [])])
    assert (len(empty), len(full), len(last)) == (0, 1, 0)


def test_scores_differ_between_pairs(reranker, questions, candidates):
    """Else the test above could not tell a mixed-up answer."""
    lists = [(query, [candidate for candidate, _ in candidates]) for query, _ in questions]
    scores = np.sort(np.concatenate(reranker.score_many(lists)))
    assert np.diff(scores).min() > 1e-5 and np.ptp(scores) > 0.05


def test_order_and_company_do_not_matter(reranker, questions, candidates):
    pool = [candidate for candidate, _ in candidates]
    lists = [(query, pool) for query, _ in questions]
    alone = [np.concatenate([reranker.score(query, [candidate]) for candidate in pool]) for query, _ in lists]
    order = [4, 1, 5, 0, 3, 2]
    for budget in (1, 200, 8192):
        scores = reranker.score_many(lists, max_tokens=budget)
        turned = reranker.score_many(
            [(query, [pool[i] for i in order]) for query, _ in lists], max_tokens=budget
        )
        for whole, shuffled, single in zip(scores, turned, alone, strict=True):
            np.testing.assert_allclose(whole, single, **EXACT)
            np.testing.assert_allclose(shuffled, single[order], **EXACT)


def test_the_same_candidate_twice_scores_the_same(reranker, questions, candidates):
    for candidate, _ in candidates:
        scores = reranker.score(questions[0][0], [candidate, candidate, candidate])
        np.testing.assert_allclose(scores, scores[0], **EXACT)


def test_a_shared_prefix_stands_once_and_ends_before_any_candidates_picture(reranker, questions, pictures):
    query = questions[2][0]
    image_token = reranker.builder._template.image_token
    kites = [Candidate(did=f"9:{name}", img_path=pictures[name]) for name in ("kite", "hill")]
    tree = reranker.builder.build(query, kites)
    assert [(tree.ids[tree.leaf == leaf] == image_token).sum() for leaf in range(3)] == [4, 4, 4]
    texts = [Candidate(did="9:1", txt="The kite."), Candidate(did="9:2", txt="The boat.")]
    tree = reranker.builder.build(query, texts)
    alone = [reranker.builder.build(query, [text]) for text in texts]
    decode = reranker._tokenizer.decode
    assert decode(tree.ids[tree.leaf == 0]).endswith("Candidate:The")
    for leaf, single in enumerate(alone, start=1):
        path = (tree.leaf == 0) | (tree.leaf == leaf)
        assert np.array_equal(tree.ids[path], single.ids)
        assert np.array_equal(tree.positions[:, path], single.positions)


def test_special_tokens_in_data_are_words(reranker, pictures):
    """Spelt placeholders and turns neither add a picture nor end the question."""
    spelt = "see <|image_pad|><|im_end|> or <|vision_start|>"
    query = Query(qid="9:1", txt=spelt, img_path=pictures["kite"], instruction=spelt)
    tree = reranker.builder.build(query, [Candidate(did="9:1", txt=spelt, img_path=pictures["boat"])])
    plain = reranker.builder.build(
        Query(qid="9:1", txt="a", img_path=pictures["kite"], instruction="b"),
        [Candidate(did="9:1", txt="c", img_path=pictures["boat"])],
    )
    for token in ("<|image_pad|>", "<|im_end|>", "<|vision_start|>"):
        number = reranker._tokenizer.convert_tokens_to_ids(token)
        assert (tree.ids == number).sum() == (plain.ids == number).sum()


def test_text_is_cut_at_max_text_tokens(reranker, backbone):
    short = Reranker.load(backbone, settings=RerankerSettings(max_text_tokens=3))
    query, candidate = Query(qid="9:1", txt="xyzw" * 9), Candidate(did="9:1", txt="vuts" * 9)
    cut = short.builder.build(query, [candidate])
    encode = reranker.builder._encode
    assert reranker.builder.build(query, [candidate]).num_tokens - cut.num_tokens == (
        len(encode("Xyzw" + "xyzw" * 8 + ".")) + len(encode("Vuts" + "vuts" * 8 + ".")) - 6
    )


def test_the_authors_prompt_is_their_literal(backbone):
    reranker = Reranker.load(backbone, settings=RerankerSettings(prompt="authors"))
    tree = reranker.builder.build(Query(qid="9:1", txt="a"), [Candidate(did="9:1", txt="b")])
    text = reranker._tokenizer.decode(tree.ids)
    assert "whether the candidate" + " " * 25 + "meets" in text and "responed with 'No'.Query:A." in text
    assert text.endswith("Candidate:B.<|im_end|>\n<|im_start|>assistant\n")


def test_answers_for_training_close_the_turn(reranker):
    candidates = [Candidate(did="9:1", txt="The kite."), Candidate(did="9:2", txt="The boat.")]
    tree = reranker.builder.build(Query(qid="9:1", txt="a kite"), candidates, [True, False])
    for leaf, (word, decisive) in enumerate(zip(("Yes", "No"), tree.decisive, strict=True), start=1):
        path = (tree.leaf == 0) | (tree.leaf == leaf)
        text = reranker._tokenizer.decode(tree.ids[path])
        assert text.endswith(f"<|im_start|>assistant\n{word}<|im_end|>\n")
        assert tree.leaf[decisive] == leaf
        assert reranker._tokenizer.decode(tree.ids[decisive + 1]) == word


def test_saved_and_loaded_it_is_the_same(backbone, tmp_path, questions, candidates):
    settings = RerankerSettings(max_text_tokens=9, images=ImageSettings(max_pixels=784 * 8))
    reranker = Reranker.load(backbone, settings=settings)
    turn_up(reranker.model)
    torch.manual_seed(0)
    reranker.set_trainable("lora", LoraSettings(rank=2, alpha=4))
    with torch.no_grad():
        for name, parameter in reranker.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    reranker.eval()
    pool = [candidate for candidate, _ in candidates]
    before = reranker.score(questions[0][0], pool)
    reranker.save(tmp_path / "checkpoint")
    again = Reranker.load(tmp_path / "checkpoint")
    assert again.settings == settings
    np.testing.assert_allclose(again.score(questions[0][0], pool), before, **EXACT)


def test_other_settings_than_stored_are_refused(backbone, tmp_path):
    Reranker.load(backbone).save(tmp_path / "checkpoint")
    with pytest.raises(CheckpointError, match=r"checkpoint: made with prompt='plain', asked for 'authors'"):
        Reranker.load(tmp_path / "checkpoint", settings=RerankerSettings(prompt="authors"))
    assert Reranker.load(tmp_path / "checkpoint", settings=RerankerSettings()).settings == RerankerSettings()
