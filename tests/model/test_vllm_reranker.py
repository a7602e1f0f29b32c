"""The same prompts go to vLLM, its two log-probabilities come back as scores; an engine stands in for it."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest

from umarvel_ray.data.records import Candidate, Query, Video
from umarvel_ray.errors import CheckpointError, DataError
from umarvel_ray.model.reranker import Reranker
from umarvel_ray.model.settings import ImageSettings, RerankerSettings
from umarvel_ray.model.vllm_reranker import VllmReranker


class Engine:
    """Answers from the length of a prompt and the number of its pictures."""

    def __init__(self, **options):
        self.options = options
        self.prompts = []

    def generate(self, prompts, sampling, use_tqdm):
        yes, no = sampling.allowed_token_ids
        answers = []
        for prompt in prompts:
            self.prompts.append(prompt)
            score = len(prompt["prompt_token_ids"]) + len(prompt.get("multi_modal_data", {}).get("image", []))
            logprobs = {yes: SimpleNamespace(logprob=score / 100), no: SimpleNamespace(logprob=-1.0)}
            answers.append(SimpleNamespace(outputs=[SimpleNamespace(logprobs=[logprobs])]))
        return answers


@pytest.fixture
def vllm(monkeypatch):
    module = SimpleNamespace(LLM=Engine, SamplingParams=lambda **options: SimpleNamespace(**options))
    monkeypatch.setitem(sys.modules, "vllm", module)


def test_prompts_are_ours_with_one_token_a_picture(backbone, pictures, tmp_path, vllm):
    settings = RerankerSettings(images=ImageSettings(max_pixels=784 * 8))
    ours = Reranker.load(backbone, settings=settings)
    ours.save(tmp_path / "checkpoint")
    theirs = VllmReranker.load(str(tmp_path / "checkpoint"))
    engine = theirs._engine
    assert engine.options["mm_processor_kwargs"]["max_pixels"] == 784 * 8
    query = Query(qid="1", txt="a kite", img_path=pictures["kite"], instruction="Find it.")
    pool = [Candidate(did="1", txt="The kite."), Candidate(did="2", img_path=pictures["tower"], txt="Here.")]
    other = Query(qid="2", txt="a boat")
    scores = theirs.score_many([(query, pool), (other, []), (other, pool[:1])])
    assert [len(row) for row in scores] == [2, 0, 1]
    image = ours.adapter.image_token
    for prompt, (asked, candidate), row in zip(
        engine.prompts,
        [(query, pool[0]), (query, pool[1]), (other, pool[0])],
        np.concatenate(scores),
        strict=True,
    ):
        ids, whole = prompt["prompt_token_ids"], ours.builder.pair_ids(asked, candidate)
        shown = [part.img_path for part in (asked, candidate) if part.img_path]
        assert ids.count(image) == len(shown) == len(prompt.get("multi_modal_data", {}).get("image", []))
        assert [i for i in ids if i != image] == [i for i in whole if i != image]
        assert row == pytest.approx(1 / (1 + np.exp(-1 - (len(ids) + len(shown)) / 100)), abs=1e-6)


def test_what_it_cannot_do_is_said(backbone, vllm, monkeypatch):
    theirs = VllmReranker.load(backbone)
    with pytest.raises(DataError, match="reads texts and pictures, not videos"):
        theirs.score(Query(qid="1", txt="a"), [Candidate(did="1", parts=(Video("clip.mp4"),))])
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(CheckpointError, match=r"needs vLLM, which is not installed: `pip install"):
        VllmReranker.load(backbone)
