"""Embedders that are not ours: the same vectors as their own library gives, and what they cannot read is
named."""

import numpy as np
import pytest
import torch
from fixtures_model import make_towers
from PIL import Image

from umarvel_ray.config import build_config
from umarvel_ray.data.records import Candidate, Query
from umarvel_ray.errors import CheckpointError
from umarvel_ray.model.settings import EncoderSettings
from umarvel_ray.model.systems import (
    STYLES,
    OurSystem,
    SentenceTransformerSystem,
    TowersSystem,
    load_embedder,
)
from umarvel_ray.retrieve.settings import EmbedConfig


@pytest.fixture(scope="module", params=["clip", "siglip"])
def towers(request, tmp_path_factory):
    return make_towers(tmp_path_factory.mktemp(request.param), request.param)


def by_hand(folder: str, text: str | None, image: str | None) -> torch.Tensor:
    """The library's own features, added and normalised."""
    from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

    model = AutoModel.from_pretrained(folder).eval()
    padding = "max_length" if "siglip" in model.config.model_type else True
    total = torch.zeros(1)
    with torch.no_grad():
        if text:
            ids = AutoTokenizer.from_pretrained(folder)(
                [text], padding=padding, truncation=True, max_length=8, return_tensors="pt"
            )
            out = model.get_text_features(**ids)
            total = total + getattr(out, "pooler_output", out)
        if image:
            processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
            out = model.get_image_features(**processor(Image.open(image).convert("RGB"), return_tensors="pt"))
            total = total + getattr(out, "pooler_output", out)
    return torch.nn.functional.normalize(total, dim=1)[0]


def test_towers_give_their_librarys_features_and_their_sum(towers, pictures):
    embedder = load_embedder(towers, TowersSystem(kind="towers"))
    kite = pictures["kite"]
    records = [
        Query("q", txt="a red kite", instruction="find a photo"),
        Candidate("i", img_path=kite),
        Candidate("b", txt="blue boat", img_path=kite),
    ]
    vectors = embedder.embed_items([embedder.builder.build(record) for record in records])
    expected = [
        by_hand(towers, "a red kite", None),
        by_hand(towers, None, kite),
        by_hand(towers, "blue boat", kite),
    ]
    torch.testing.assert_close(vectors, torch.stack(expected), atol=2e-6, rtol=0)  # float32, other batches
    alone = embedder.embed_items([embedder.builder.build(records[0])])
    torch.testing.assert_close(alone[0], vectors[0], atol=2e-6, rtol=0)


def test_an_instruction_is_prepended_only_when_asked(towers):
    system = TowersSystem(kind="towers", instruction="prepended")
    embedder = load_embedder(towers, system)
    with_words = embedder.builder.build(Query("q", txt="a red kite", instruction="find a photo"))
    assert with_words.text == "find a photo a red kite"
    assert embedder.builder.build(Candidate("c", txt="a red kite")).text == "a red kite"


def test_texts_that_are_cut_are_told(towers, caplog):
    embedder = load_embedder(towers, TowersSystem(kind="towers"))
    embedder.embed_items([embedder.builder.build(Candidate("c", txt="a red kite " * 9))])
    assert "longer than the 8 tokens" in caplog.text and embedder.truncated == 1


def test_a_folder_of_another_kind_is_named(tmp_path, backbone):
    with pytest.raises(CheckpointError, match="no such folder"):
        load_embedder(str(tmp_path / "none"), TowersSystem(kind="towers"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="not a Transformers model"):
        load_embedder(str(tmp_path / "empty"), TowersSystem(kind="towers"))
    with pytest.raises(CheckpointError, match=r"no text and image towers|not a Transformers model"):
        load_embedder(backbone, TowersSystem(kind="towers"))


@pytest.mark.slow
def test_a_sentence_transformer_is_fed_texts_pictures_and_both(backbone, pictures, tmp_path):
    """Our own checkpoint in that library's form gives our own vectors, prompts included."""
    pytest.importorskip("sentence_transformers")
    from umarvel_ray.export.formats import export

    ours = load_embedder(backbone, OurSystem(encoder=EncoderSettings()))
    ours.save(tmp_path / "checkpoint")
    export(str(tmp_path / "checkpoint"), tmp_path / "theirs", format="sentence-transformers")
    system = SentenceTransformerSystem(kind="sentence_transformers", trust_remote_code=True)
    theirs = load_embedder(str(tmp_path / "theirs"), system)
    records = [
        Query("q1", txt="a red kite", instruction="Find a photo."),
        Query("q2", txt="which boat?", img_path=pictures["boat"], instruction="Answer."),
        Candidate("c1", img_path=pictures["kite"]),
        Candidate("c2", txt="The tower stands."),
        Candidate("c3", txt="A hill.", img_path=pictures["hill"]),
    ]
    vectors = [model.embed_items([model.builder.build(r) for r in records]) for model in (ours, theirs)]
    torch.testing.assert_close(vectors[0], vectors[1], atol=1e-5, rtol=0)  # float32, other batches
    summed = load_embedder(str(tmp_path / "theirs"), system.model_copy(update={"fusion": "sum"}))
    both = summed.embed_items([summed.builder.build(records[4])])
    parts = [Candidate("t", txt="A hill."), Candidate("i", img_path=pictures["hill"])]
    text, image = summed.embed_items([summed.builder.build(part) for part in parts])
    torch.testing.assert_close(both[0], torch.nn.functional.normalize(text + image, dim=0), atol=1e-5, rtol=0)


@pytest.mark.parametrize("style", sorted(STYLES))
def test_last_token_styles_run_on_a_stock_backbone(style, backbone, pictures):
    embedder = load_embedder(backbone, OurSystem(style=style))
    items = [embedder.builder.build(Query("q", txt="a kite", img_path=pictures["kite"], instruction="Find."))]
    vectors = embedder.embed_items(items).numpy()
    assert np.isfinite(vectors).all() and np.linalg.norm(vectors[0]) == pytest.approx(1, abs=1e-5)
    assert items[0].pooled.sum() == 1  # one token, the last before the answer
    text = embedder.builder._tokenizer.decode(items[0].ids)
    asked = {"lamra": "Summarize above", "vlm2vec": None}.get(style, "Summary above")
    assert (asked in text) if asked else ("in one word" not in text)


def test_the_model_of_an_embedding_job_is_a_setting():
    values = {"checkpoint": "/m", "output": "/o", "root": "/r"}
    assert build_config(values, EmbedConfig).model == OurSystem()
    config = build_config(values | {"model": {"kind": "towers", "fusion": "unit"}}, EmbedConfig)
    assert isinstance(config.model, TowersSystem) and config.model.fusion == "unit"
