"""Embeddings equal those of plain Transformers modules, one record at a time, and survive saving."""

import re

import numpy as np
import pytest
import torch
from fixtures_model import Reference
from safetensors.torch import load_file

from umarvel_ray.data.records import Candidate, Query
from umarvel_ray.errors import CheckpointError
from umarvel_ray.model.encoder import Encoder
from umarvel_ray.model.settings import EncoderSettings, ImageSettings, LoraSettings

START, END = "<instruction_start>", "<instruction_end>"
EXACT = {"atol": 1e-5, "rtol": 0.0}
"""float32 in another order of operations, on vectors of norm 1."""


@pytest.fixture(scope="module")
def records(pictures) -> list[Query | Candidate]:
    return [
        Query(qid="9:1", txt="a red kite over the hill", instruction="Find a photo."),
        Query(qid="9:2", img_path=pictures["kite"], instruction="Find the caption."),
        Query(qid="9:3", txt="Where?", img_path=pictures["tower"]),
        Candidate(did="9:4", txt="Here."),
        Candidate(did="9:5", img_path=pictures["boat"]),
        Candidate(did="9:6", txt="The tower stands on the hill, " * 3, img_path=pictures["hill"]),
    ]


@pytest.fixture(scope="module")
def encoder(backbone) -> Encoder:
    return Encoder.load(backbone)


def embed(encoder: Encoder, records: list[Query | Candidate], max_tokens: int = 8192) -> torch.Tensor:
    return encoder.embed_items([encoder.builder.build(record) for record in records], max_tokens=max_tokens)


def reference_embedding(
    reference: Reference, record: Query | Candidate, *, attention: str, pooling: str, positions: str
) -> torch.Tensor:
    """One record: rendered, tokenized, passed forward under a mask of its own; the mean of what counts."""
    text = record.txt[0].upper() + record.txt[1:].strip() if record.txt else ""
    text += "." if text and text[-1] not in ".?!" else ""
    if isinstance(record, Query) and record.instruction:
        text = f"{START}{record.instruction}{END}" + (f" {record.txt}." if record.txt else ".")
    pixels = reference.pixels([record.img_path] if record.img_path else [])
    user = [None, text] if record.img_path else [text]
    ids = reference.tokens(reference.expand(reference.render(user, "<emb>."), pixels))
    num = ids.shape[1]
    core = reference.model.model
    embeds = core.get_input_embeddings()(ids)
    if pixels:
        features = core.visual(pixels["pixel_values"], grid_thw=pixels["image_grid_thw"]).pooler_output
        embeds[ids == core.config.image_token_id] = features
    place = torch.arange(num).expand(3, 1, -1)
    if positions == "mrope":
        is_image = (ids == core.config.image_token_id).int()
        place, _ = core.get_rope_index(ids, is_image, image_grid_thw=pixels.get("image_grid_thw"))
    mask = torch.zeros(num, num)
    if attention == "causal":
        mask = torch.full((num, num), float("-inf")).triu(1)
    hidden = core.language_model(
        inputs_embeds=embeds, attention_mask=mask[None, None], position_ids=place, use_cache=False
    ).last_hidden_state[0]
    tokens = reference.tokenizer.convert_ids_to_tokens(ids[0])
    if pooling == "last":
        pooled = hidden[tokens.index("<emb>") - 1]
    else:
        span = range(tokens.index(START), tokens.index(END) + 1) if START in tokens else range(0)
        pooled = hidden[[index for index in range(num) if index not in span]].mean(0)
    return pooled / pooled.norm()


@pytest.mark.parametrize(
    ("attention", "pooling", "positions"),
    [
        ("bidirectional", "mean", "sequential"),
        ("causal", "mean", "sequential"),
        ("causal", "last", "mrope"),
        ("bidirectional", "mean", "mrope"),
    ],
)
def test_embeddings_are_those_of_plain_modules(backbone, reference, records, attention, pooling, positions):
    settings = EncoderSettings(attention=attention, pooling=pooling, positions=positions)
    embedding_ND = embed(Encoder.load(backbone, settings=settings), records)
    expected_ND = torch.stack(
        [
            reference_embedding(reference, record, attention=attention, pooling=pooling, positions=positions)
            for record in records
        ]
    )
    torch.testing.assert_close(embedding_ND, expected_ND, **EXACT)


def test_settings_that_should_matter_do(backbone, records):
    """Else the test above could not tell them apart."""
    base = embed(Encoder.load(backbone), records)
    for change in (
        {"attention": "causal"},
        {"positions": "mrope"},
        {"pooling": "last"},
        {"append_generation_prompt": True},
        {"compression_prompt": True},
        {"images": ImageSettings(min_pixels=784, max_pixels=4 * 784)},
    ):
        other = embed(Encoder.load(backbone, settings=EncoderSettings(**change)), records)
        assert (base - other).abs().max() > 1e-3, change


@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
def test_an_embedding_does_not_depend_on_its_batch_mates(backbone, records, attention):
    encoder = Encoder.load(backbone, settings=EncoderSettings(attention=attention))
    alone = torch.cat([embed(encoder, [record]) for record in records])
    order = [3, 5, 0, 2, 4, 1]
    for budget in (1, 60, 150, 8192):
        torch.testing.assert_close(embed(encoder, records, budget), alone, atol=1e-6, rtol=0)
        shuffled = embed(encoder, [records[index] for index in order], budget)
        torch.testing.assert_close(shuffled, alone[order], atol=1e-6, rtol=0)


def test_embeddings_are_unit_float32_rows_in_order(encoder, records):
    queries = [record for record in records if isinstance(record, Query)]
    candidates = [record for record in records if isinstance(record, Candidate)]
    query_QD, candidate_CD = encoder.embed_queries(queries), encoder.embed_candidates(candidates)
    both = np.concatenate([query_QD, candidate_CD])
    assert both.dtype == np.float32 and both.shape == (6, encoder.dim)
    np.testing.assert_allclose(np.linalg.norm(both, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(both, embed(encoder, [*queries, *candidates]).numpy(), atol=1e-6)
    assert encoder.embed_queries([]).shape == (0, encoder.dim)


def test_a_masked_instruction_is_read_but_not_pooled(encoder):
    texts = ["Find a photo.", "Find the caption of the tower."]
    first, second, bare = (
        embed(encoder, [Query(qid="9:1", txt="a kite", instruction=text)]) for text in (*texts, None)
    )
    assert (first - second).abs().max() > 1e-3
    assert (first - bare).abs().max() > 1e-3
    item = encoder.builder.build(Query(qid="9:1", txt="a kite", instruction=texts[0]))
    inputs = encoder.builder.pack([item])
    with torch.no_grad():
        seen = {}
        norm = encoder.model.model.language_model.norm
        handle = norm.register_forward_hook(lambda module, inputs, output: seen.update(hidden=output[0]))
        encoder(inputs)
        handle.remove()
    mean_D = seen["hidden"][torch.from_numpy(item.pooled)].mean(0)
    torch.testing.assert_close(first[0], mean_D / mean_D.norm(), **EXACT)


def test_saved_and_loaded_it_is_the_same(backbone, records, tmp_path):
    settings = EncoderSettings(
        attention="causal", max_text_tokens=50, images=ImageSettings(max_pixels=50 * 784)
    )
    encoder = Encoder.load(backbone, settings=settings)
    with torch.no_grad():
        encoder.temperature.fill_(0.0206)
        encoder.model.get_input_embeddings().weight.add_(0.01)  # rows of added tokens among them
    before = embed(encoder, records)
    encoder.save(tmp_path / "checkpoint")
    again = Encoder.load(tmp_path / "checkpoint")
    assert again.settings == settings
    assert again.temperature.item() == encoder.temperature.item() == pytest.approx(0.0206)
    assert torch.equal(embed(again, records), before)
    tokens = ["<emb>", START, END]
    assert again._tokenizer.convert_tokens_to_ids(tokens) == encoder._tokenizer.convert_tokens_to_ids(tokens)
    assert Encoder.load(tmp_path / "checkpoint", settings=settings).settings == settings


def test_added_tokens_follow_the_vocabulary_and_start_as_its_mean(backbone, reference):
    encoder = Encoder.load(backbone)
    ids = encoder._tokenizer.convert_tokens_to_ids(["<emb>", START, END])
    assert ids == [len(encoder._tokenizer) - 3 + n for n in range(3)]
    stored = load_file(f"{backbone}/model.safetensors")
    mean_D = next(table for name, table in stored.items() if name.endswith("embed_tokens.weight")).mean(0)
    for number in ids:
        torch.testing.assert_close(encoder.model.get_input_embeddings().weight[number], mean_D, **EXACT)
    assert torch.equal(
        Encoder.load(backbone).model.get_input_embeddings().weight,
        encoder.model.get_input_embeddings().weight,
    )


@pytest.mark.parametrize(
    ("asked", "name"),
    [
        ({"attention": "causal"}, "attention"),
        ({"pooling": "last"}, "pooling"),
        ({"images": ImageSettings(max_pixels=784 * 64)}, "images"),
    ],
)
def test_other_settings_than_stored_are_refused(backbone, tmp_path, asked, name):
    Encoder.load(backbone).save(tmp_path / "checkpoint")
    with pytest.raises(CheckpointError, match=rf"checkpoint: made with {name}=.*asked for") as caught:
        Encoder.load(tmp_path / "checkpoint", settings=EncoderSettings(**asked))
    assert "\n" not in str(caught.value)


def test_what_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=f"^{re.escape(str(tmp_path))}: no config.json"):
        Encoder.load(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(CheckpointError, match="'bert'"):
        Encoder.load(tmp_path)


def with_adapters(backbone: str, seed: int = 3) -> Encoder:
    """LoRA whose second factors are not zero, as after training."""
    encoder = Encoder.load(backbone)
    torch.manual_seed(seed)
    encoder.set_trainable("lora", LoraSettings(rank=2, alpha=4, dropout=0.1), learn_temperature=False)
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return encoder.eval()


def test_lora_trains_every_linear_layer_of_the_decoder_and_nothing_else(backbone):
    encoder = with_adapters(backbone)
    trained = [name for name, parameter in encoder.named_parameters() if parameter.requires_grad]
    found = {re.sub(r"^.*?(language_model|visual)", r"\1", name) for name in trained}
    layers = [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
    assert found == {
        f"language_model.layers.{layer}.{linear}.lora_{factor}.default.weight"
        for layer in range(2)
        for linear in layers
        for factor in "AB"
    }
    assert len(trained) == len(found)
    assert not encoder.temperature.requires_grad


def test_full_training_reaches_every_parameter(backbone):
    encoder = Encoder.load(backbone)
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    encoder.set_trainable("full", LoraSettings(), learn_temperature=True)
    assert all(parameter.requires_grad for parameter in encoder.parameters())


def test_merged_adapters_embed_as_attached_ones(backbone, encoder, records, tmp_path):
    adapted = with_adapters(backbone)
    attached = embed(adapted, records)
    assert (attached - embed(encoder, records)).abs().max() > 1e-3
    adapted.save(tmp_path / "merged")
    torch.testing.assert_close(embed(adapted, records), attached, **EXACT)
    again = Encoder.load(tmp_path / "merged")
    torch.testing.assert_close(embed(again, records), attached, **EXACT)
    names = load_file(tmp_path / "merged" / "model.safetensors").keys()
    assert not any("lora" in name or "base_layer" in name for name in names)


def test_half_precision_stays_near(backbone, encoder, records):
    """bfloat16 keeps 8 bits, so cosines agree to a hundredth; the mean and the norm are float32's."""
    embedding_ND = embed(Encoder.load(backbone, dtype="bfloat16"), records)
    assert embedding_ND.dtype == torch.float32
    torch.testing.assert_close(embedding_ND.norm(dim=1), torch.ones(len(records)), atol=1e-6, rtol=0)
    assert (embedding_ND * embed(encoder, records)).sum(1).min() > 0.99
