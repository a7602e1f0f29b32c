"""What is no embedding does not leave the encoder, and the error says what is likely to be wrong."""

import pytest
import torch

from umarvel_ray.data.records import Candidate
from umarvel_ray.errors import EmbeddingError
from umarvel_ray.model.encoder import Encoder


@pytest.fixture
def encoder(backbone) -> Encoder:
    return Encoder.load(backbone)


def embed(encoder: Encoder, records: list[Candidate]) -> torch.Tensor:
    return encoder.embed_items([encoder.builder.build(record) for record in records])


TEXTS = [Candidate(did="1", txt="a kite"), Candidate(did="2", txt="a tower")]


def test_what_is_not_finite_is_refused(encoder):
    with torch.no_grad():
        encoder.model.model.language_model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(
        EmbeddingError, match=r"2 of 2 embeddings are not finite \(first: number 0\)"
    ) as caught:
        embed(encoder, TEXTS)
    assert encoder.source in str(caught.value) and "\n" not in str(caught.value)


def test_what_has_no_length_is_refused(encoder):
    with torch.no_grad():
        encoder.model.model.language_model.norm.weight.zero_()
    with pytest.raises(EmbeddingError, match=r"2 of 2 embeddings are not of unit norm .*were not loaded"):
        embed(encoder, TEXTS)


def test_what_is_the_same_for_different_texts_is_refused(encoder):
    with torch.no_grad():
        encoder.model.get_input_embeddings().weight.fill_(0.1)
    with pytest.raises(EmbeddingError, match="2 different texts have the same embedding"):
        embed(encoder, TEXTS)
    assert len(embed(encoder, [TEXTS[0], TEXTS[0]])) == 2  # one text twice may well have one embedding


def test_pictures_that_do_not_arrive_are_noticed(encoder, pictures):
    with torch.no_grad():
        merger = encoder.model.model.visual.merger
        for parameter in merger.parameters():
            parameter.zero_()
    photos = [Candidate(did=name, img_path=pictures[name]) for name in ("kite", "hill")]
    with pytest.raises(EmbeddingError, match=r"2 different records with pictures .* the vision tower"):
        embed(encoder, photos)
    assert len(embed(encoder, [photos[0], photos[0]])) == 2
