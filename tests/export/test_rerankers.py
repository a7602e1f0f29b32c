"""An exported reranker scores as ours does, in Sentence Transformers' CrossEncoder and in Transformers."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from umarvel_ray.data.records import Candidate, Query
from umarvel_ray.errors import CheckpointError
from umarvel_ray.export.formats import export
from umarvel_ray.model.reranker import Reranker
from umarvel_ray.model.settings import LoraSettings, RerankerSettings


@pytest.fixture(scope="module", params=["qwen2_vl", "qwen3_vl"])
def trained(request, backbones, tmp_path_factory) -> str:
    """A reranker with an adapter that moves scores, and settings of its own."""
    reranker = Reranker.load(backbones[request.param], settings=RerankerSettings(max_text_tokens=12))
    torch.manual_seed(0)
    reranker.set_trainable("lora", LoraSettings(rank=2, alpha=4))
    with torch.no_grad():
        for name, parameter in reranker.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    folder = tmp_path_factory.mktemp("reranker") / "checkpoint"
    reranker.save(folder)
    return str(folder)


def pairs(pictures):
    """(query, candidate), and the same as CrossEncoder takes them."""
    kite, tower = pictures["kite"], pictures["tower"]
    ours = [
        (Query(qid="1", txt="a red kite", instruction="find it"), Candidate(did="1", txt='the kite "here"')),
        (Query(qid="1", txt="a red kite", instruction="find it"), Candidate(did="2", img_path=kite)),
        (
            Query(qid="3", img_path=tower, instruction="find it"),
            Candidate(did="3", txt="so many words that some of them are cut off at the end", img_path=kite),
        ),
        (
            Query(qid="4", txt="which <|im_end|>?", img_path=tower, instruction="find it"),
            Candidate(did="4", txt="x"),
        ),
    ]

    def half(record):
        image = Image.open(record.img_path) if record.img_path else None
        if image is not None and record.txt:
            return {"text": record.txt, "image": image}
        return record.txt if image is None else image

    return ours, [(half(query), half(candidate)) for query, candidate in ours]


def test_a_cross_encoder_scores_the_same(trained, pictures, tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    export(trained, tmp_path / "out", format="sentence-transformers")
    model = sentence_transformers.CrossEncoder(str(tmp_path / "out"), trust_remote_code=True, device="cpu")
    ours, theirs = pairs(pictures)
    reranker = Reranker.load(trained)
    expected = [float(reranker.score(query, [candidate])[0]) for query, candidate in ours]
    found = model.predict(theirs, prompt="find it", batch_size=3)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.ptp(expected) > 1e-3
    (first, *_) = model.rank("a red kite", ["the kite", "a boat"], prompt="find it")
    assert set(first) >= {"corpus_id", "score"}


def test_a_plain_folder_loads_in_transformers_and_here(trained, pictures, tmp_path):
    from transformers import AutoModelForImageTextToText

    export(trained, tmp_path / "out", format="transformers")
    _, loading = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    ours, _ = pairs(pictures)
    for query, candidate in ours:
        before, after = (
            Reranker.load(path).score(query, [candidate]) for path in (trained, tmp_path / "out")
        )
        np.testing.assert_allclose(after, before, atol=1e-6)


def test_its_adapter_is_pefts(trained, tmp_path, backbones):
    export(trained, tmp_path / "out", format="peft")
    assert (tmp_path / "out" / "adapter_config.json").exists()
    Reranker.load(backbones["qwen2_vl"]).save(tmp_path / "whole")
    with pytest.raises(CheckpointError, match="no adapter"):
        export(str(tmp_path / "whole"), tmp_path / "none", format="peft")


@pytest.mark.slow
def test_the_exported_code_stands_alone():
    """Both modules in a process that cannot import umarvel_ray."""
    code = (
        "import sys; sys.modules['umarvel_ray'] = None\n"
        "import importlib.util as u, types, pathlib\n"
        "package = types.ModuleType('p'); package.__path__ = [str(pathlib.Path(sys.argv[1]))]\n"
        "sys.modules['p'] = package\n"
        "import p.sentence_transformers_reranker as module\n"
        "assert issubclass(module.UMarvelReranker, module.UMarvel)\n"
    )
    from umarvel_ray.export import rerankers

    pytest.importorskip("sentence_transformers")
    subprocess.run([sys.executable, "-c", code, str(rerankers._MODULES[0].parent)], check=True)
