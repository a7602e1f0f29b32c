"""The reranker's pairs through vLLM, where it is installed: its engine, prefix cache and image processor.

Scores are those of `Reranker` up to what two implementations of one model differ by; the prompt, token by
token, is the same. A pair is one request of one token, Yes or No.
"""

from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from umarvel_ray.data.records import Candidate, Picture, Query
from umarvel_ray.errors import CheckpointError, DataError
from umarvel_ray.model.adapters import adapter_for
from umarvel_ray.model.backbone import read_settings_file, resolve_settings
from umarvel_ray.model.images import open_image
from umarvel_ray.model.reranker import SETTINGS_FILE
from umarvel_ray.model.settings import DtypeName, RerankerSettings
from umarvel_ray.model.trees import TreeBuilder
from umarvel_ray.storage import local_model


class VllmReranker:
    """(query, candidates) → P(Yes) of each, computed by vLLM."""

    def __init__(self, engine: Any, sampling: Any, builder: TreeBuilder) -> None:
        self._engine = engine
        self._sampling = sampling
        self._builder = builder

    @classmethod
    def load(
        cls, path: str, *, settings: RerankerSettings | None = None, dtype: DtypeName = "bfloat16"
    ) -> "VllmReranker":
        """Start an engine on a merged checkpoint.

        Raises:
            CheckpointError: vLLM is not installed, or nothing loadable lies there.
        """
        try:
            import vllm  # pyright: ignore[reportMissingImports]  (an extra)
        except ImportError:
            raise CheckpointError(
                "backend 'vllm' needs vLLM, which is not installed: `pip install 'umarvel-ray[vllm]'`, or "
                "take backend 'tree'."
            ) from None
        from transformers import AutoConfig, AutoTokenizer

        folder = local_model(path)
        stored = read_settings_file(Path(folder) / SETTINGS_FILE)
        settings = resolve_settings(stored, settings, RerankerSettings, path=path)
        adapter = adapter_for(AutoConfig.from_pretrained(folder), path)
        builder = TreeBuilder(AutoTokenizer.from_pretrained(folder), adapter, settings)
        engine = vllm.LLM(
            model=folder,
            dtype=dtype,
            enable_prefix_caching=True,
            # Else a log-probability is that over the whole vocabulary, of its two likeliest tokens.
            logprobs_mode="processed_logprobs",
            mm_processor_kwargs={
                "min_pixels": settings.images.min_pixels,
                "max_pixels": settings.images.max_pixels,
            },
        )
        sampling = vllm.SamplingParams(
            max_tokens=1, temperature=0.0, logprobs=2, allowed_token_ids=list(builder.answer_ids.values())
        )
        return cls(engine, sampling, builder)

    def score_many(self, lists: Iterable[tuple[Query, Sequence[Candidate]]]) -> list[np.ndarray]:
        """P(Yes) of each candidate of each query, float32, in the order given.

        Raises:
            DataError: A record holds a video.
        """
        lists = list(lists)
        # A query's pairs follow one another: the engine finds what they share in its cache.
        prompts = [self._prompt(query, candidate) for query, pool in lists for candidate in pool]
        answers = self._engine.generate(prompts, self._sampling, use_tqdm=False) if prompts else []
        p_yes = np.array([self._p_yes(answer) for answer in answers], dtype=np.float32)
        return np.split(p_yes, np.cumsum([len(pool) for _, pool in lists])[:-1])

    def score(self, query: Query, candidates: Sequence[Candidate]) -> np.ndarray:
        """P(Yes) of each candidate, float32."""
        return self.score_many([(query, candidates)])[0]

    def _prompt(self, query: Query, candidate: Candidate) -> dict[str, Any]:
        parts = [part for part in (*query.content, *candidate.content) if not isinstance(part, str)]
        if any(not isinstance(part, Picture) for part in parts):
            raise DataError(
                f"query {query.qid}, candidate {candidate.did}: backend 'vllm' reads texts and pictures, not "
                "videos. Take backend 'tree'."
            )
        # The engine expands a picture's token itself.
        ids: list[int] = []
        for token, run in groupby(self._builder.pair_ids(query, candidate)):
            ids += [token] if token == self._builder.adapter.image_token else run
        pictures = [open_image(part.path) for part in parts]
        return {
            "prompt_token_ids": ids,
            **({"multi_modal_data": {"image": pictures}} if pictures else {}),
        }

    def _p_yes(self, answer: Any) -> float:
        """Softmax over the two log-probabilities of the first position."""
        found = answer.outputs[0].logprobs[0]
        yes, no = (found[self._builder.answer_ids[word]].logprob for word in (True, False))
        return 1.0 / (1.0 + float(np.exp(no - yes)))
