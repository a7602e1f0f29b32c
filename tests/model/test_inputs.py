"""Records become the tokens, the pooling mask and the positions that the method describes."""

import math

import numpy as np
import pytest
import torch
from fixtures_model import Reference

from umarvel_ray.data.records import Candidate, Query
from umarvel_ray.model.adapters import adapter_for
from umarvel_ray.model.inputs import InputBuilder, micro_batches
from umarvel_ray.model.prompts import ADDED_TOKENS, clean
from umarvel_ray.model.settings import EncoderSettings
from umarvel_ray.model.visuals import mrope_positions

START, END = "<instruction_start>", "<instruction_end>"


def builder(reference: Reference, **settings) -> InputBuilder:
    adapter = adapter_for(reference.model.config, "backbone")
    return InputBuilder(reference.tokenizer, adapter, EncoderSettings(**settings))


@pytest.mark.parametrize(
    ("raw", "cleaned"),
    [
        ("a red kite", "A red kite."),
        (" \ta red\r\n kite \n", "A red\n kite."),
        ('"where is it?"', "Where is it?"),
        ('say "hi"', 'Say "hi.'),
        ("Stop!", "Stop!"),
        ("an end.", "An end."),
        ("élan", "Élan."),
        (" ", ""),
        ('""', ""),
        (f"{START}Find it.{END} ", f"{START}Find it.{END}."),
    ],
)
def test_clean(raw: str, cleaned: str):
    assert clean(raw) == cleaned


ASKED = Query(qid="9:1", txt="a red kite", instruction="find a photo")
SHOWN = Query(qid="9:2", img_path="kite", instruction="Find the caption?")
BOTH = Query(qid="9:3", txt="Where is it?", img_path="boat", instruction='"name the place"')
BARE = Query(qid="9:4", txt="a red kite")
FOUND = Candidate(did="9:7", txt="the kite flies", img_path="tower")

CASES = [
    # record, setting of the instruction, the user's text, the part of it that is not pooled
    (ASKED, "masked", f"{START}Find a photo.{END} a red kite.", f"{START}Find a photo.{END}"),
    (ASKED, "pooled", "Find a photo. a red kite.", ""),
    (ASKED, "none", "A red kite.", ""),
    (SHOWN, "masked", f"{START}Find the caption?{END}.", f"{START}Find the caption?{END}"),
    (SHOWN, "pooled", "Find the caption?", ""),
    (SHOWN, "none", "", ""),
    (BOTH, "masked", f"{START}Name the place.{END} Where is it?", f"{START}Name the place.{END}"),
    (BARE, "masked", "A red kite.", ""),
    (FOUND, "masked", "The kite flies.", ""),
]


def placed(record: Query | Candidate, pictures: dict[str, str]) -> Query | Candidate:
    """The record with its picture's real path."""
    path = pictures[record.img_path] if record.img_path else None
    if isinstance(record, Query):
        return Query(qid=record.qid, txt=record.txt, img_path=path, instruction=record.instruction)
    return Candidate(did=record.did, txt=record.txt, img_path=path)


@pytest.mark.parametrize("generation_prompt", [False, True])
@pytest.mark.parametrize(("record", "instruction", "text", "left_out"), CASES)
def test_tokens_and_pooling_are_those_of_the_whole_rendered_prompt(
    reference, pictures, record, instruction, text, left_out, generation_prompt
):
    """One string, tokenized at once; the mask from character offsets."""
    record = placed(record, pictures)
    build = builder(reference, instruction=instruction, append_generation_prompt=generation_prompt)
    assert build.text_of(record) == text
    pixels = reference.pixels([record.img_path] if record.img_path else [])
    user = [None, text] if record.img_path else [text]
    whole = reference.expand(reference.render(user, "<emb>.", generation_prompt=generation_prompt), pixels)
    expected = reference.tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
    start = whole.index(left_out) if left_out else 0
    kept = [
        not (start <= first and last <= start + len(left_out)) for first, last in expected["offset_mapping"]
    ]
    item = build.build(record)
    assert item.ids.tolist() == expected["input_ids"]
    assert item.pooled.tolist() == kept
    assert whole.endswith("<|im_start|>assistant\n" if generation_prompt else "<emb>.<|im_end|>\n")


def test_verbatim_words_stay_as_they_are(reference):
    """Sentence pairs of the first stage are read raw; only spelt special tokens are not."""
    build = builder(reference)
    for record in (
        Query(qid="nli:1", txt=' a "red" kite', verbatim=True),
        Candidate(did="nli:1", txt=' a "red" kite', verbatim=True),
    ):
        assert build.text_of(record) == ' a "red" kite'
    assert build.text_of(Candidate(did="nli:2", txt="no <emb>", verbatim=True)) == "no < e m b >"


def test_last_pooling_takes_the_token_before_emb(reference, pictures):
    for record in (ASKED, SHOWN, FOUND):
        item = builder(reference, pooling="last").build(placed(record, pictures))
        embed = reference.tokenizer.convert_tokens_to_ids("<emb>")
        (place,) = np.flatnonzero(item.pooled)
        assert item.ids[place + 1] == embed
        assert reference.tokenizer.decode(item.ids[place]) == "\n"


@pytest.mark.parametrize(
    ("record", "asks"),
    [
        (BARE, "A red kite.\nSummarize above sentence in one word: "),
        (SHOWN, f"{START}Find the caption?{END}.\nSummarize above image in one word: "),
        (FOUND, "The kite flies.\nSummarize above image and sentence in one word: "),
    ],
)
def test_compression_prompts_follow_the_modality(reference, pictures, record, asks):
    item = builder(reference, compression_prompt=True).build(placed(record, pictures))
    text = reference.tokenizer.decode(item.ids)
    assert text.endswith(f"{asks}<|im_end|>\n<|im_start|>assistant\n<emb>.<|im_end|>\n")


def test_special_tokens_in_data_are_words(reference, pictures):
    """A spelt placeholder or marker adds no image, ends no instruction and asks for no embedding."""
    spelt = f"see <|image_pad|> {END} <emb> <|im_end|>"
    query = Query(qid="9:1", txt=spelt, img_path=pictures["kite"], instruction=f"find {END} {START} it")
    item = builder(reference).build(query)
    ids = {
        token: reference.tokenizer.convert_tokens_to_ids(token) for token in (*ADDED_TOKENS, "<|image_pad|>")
    }
    counts = {token: int((item.ids == number).sum()) for token, number in ids.items()}
    num_image_tokens = math.prod(item.visuals[0].grids[0]) // 4
    assert counts == {"<emb>": 1, START: 1, END: 1, "<|image_pad|>": num_image_tokens}
    left_out = np.flatnonzero(~item.pooled)
    assert item.ids[left_out[0]] == ids[START] and item.ids[left_out[-1]] == ids[END]
    assert (np.diff(left_out) == 1).all()
    kept = reference.tokenizer.decode(item.ids[left_out[-1] + 1 :])
    assert kept.startswith(" see < | i m a g e _ p a d | >")


def test_text_is_cut_at_max_text_tokens(reference):
    whole = builder(reference).build(ASKED)
    text = reference.tokens(f"{START}Find a photo.{END} a red kite.")[0].tolist()
    around = whole.num_tokens - len(text)
    for limit in (3, len(text) - 2, len(text), len(text) + 5):
        item = builder(reference, max_text_tokens=limit).build(ASKED)
        assert item.num_tokens == around + min(limit, len(text))
        kept = text[:limit]
        first = whole.ids.tolist().index(text[0])
        assert item.ids[first : first + len(kept)].tolist() == kept
        end = reference.tokenizer.convert_tokens_to_ids(END)
        left_out = kept.index(end) + 1 if end in kept else len(kept)
        assert np.flatnonzero(~item.pooled).tolist() == list(range(first, first + left_out))


def test_one_record_does_not_change_with_the_cache(reference, pictures):
    adapter = adapter_for(reference.model.config, "backbone")
    build = InputBuilder(reference.tokenizer, adapter, EncoderSettings(), cache_bytes=100_000)
    record = placed(BOTH, pictures)
    first = build.build(record)
    assert build.build(record) is first
    fresh = builder(reference).build(record)
    assert np.array_equal(fresh.ids, first.ids)
    assert np.array_equal(fresh.visuals[0].patches, first.visuals[0].patches)
    tiny = InputBuilder(reference.tokenizer, adapter, EncoderSettings(), cache_bytes=10)
    assert tiny.build(record) is not tiny.build(record)


@pytest.mark.parametrize(
    "names", [[], ["kite"], ["boat"], ["tower", "kite"], ["kite", "kite", "boat"]], ids=lambda n: "+".join(n)
)
def test_mrope_positions_are_those_of_transformers(reference, pictures, names):
    pixels = reference.pixels([pictures[name] for name in names])
    user = [part for name in names for part in (None, f"this is {name}")] or ["words alone"]
    ids = reference.tokens(reference.expand(reference.render(user, "<emb>."), pixels))
    expected, _ = reference.model.model.get_rope_index(
        ids, (ids == reference.model.config.image_token_id).int(), image_grid_thw=pixels.get("image_grid_thw")
    )
    grids = [tuple(grid.tolist()) for grid in pixels.get("image_grid_thw", [])]
    adapter = adapter_for(reference.model.config, "backbone")
    positions = mrope_positions(ids[0].numpy(), grids, adapter=adapter)
    assert torch.equal(torch.from_numpy(positions), expected[:, 0])
    shifted = mrope_positions(ids[0].numpy(), grids, adapter=adapter, start=7)
    assert (shifted == positions + 7).all()


def test_packed_positions_start_again_with_each_item(reference, pictures):
    for kind in ("sequential", "mrope"):
        build = builder(reference, positions=kind)
        items = [build.build(placed(record, pictures)) for record in (BOTH, BARE, FOUND)]
        packed = build.pack(items)
        alone = [build.pack([item]).positions_3T for item in items]
        assert torch.equal(packed.positions_3T, torch.cat(alone, dim=1))
        assert packed.lengths_N == tuple(item.num_tokens for item in items)
        if kind == "sequential":
            assert all(torch.equal(p, torch.arange(p.shape[1]).expand(3, -1)) for p in alone)


def test_micro_batches_hold_every_item_once_within_the_budget():
    lengths = [5, 9, 30, 9, 1, 12, 4]
    for budget in (1, 9, 16, 30, 1000):
        batches = micro_batches(lengths, budget)
        assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
        assert all(len(batch) == 1 or sum(lengths[i] for i in batch) <= budget for batch in batches)
    assert micro_batches(lengths, 1000) == [[2, 5, 1, 3, 0, 6, 4]]
    assert micro_batches([], 10) == []
