"""The pointwise reranker: a causal model that answers Yes or No to (query, candidate); its score is P(Yes).

All candidates of a query form one tree (`trees`). One pass, the last position of each candidate, two rows of
the LM head; a picture goes through the vision tower once, however many pairs show it. T tokens, D width.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from umarvel_ray.artifacts import write_json
from umarvel_ray.data.records import Candidate, Query
from umarvel_ray.model.adapters import Adapter, VisionFeatures
from umarvel_ray.model.backbone import (
    DTYPES,
    core_of,
    hidden_states,
    load_backbone,
    read_settings_file,
    resolve_settings,
    save_backbone,
)
from umarvel_ray.model.inputs import micro_batches
from umarvel_ray.model.lora import set_trainable
from umarvel_ray.model.settings import DtypeName, LoraSettings, RerankerSettings
from umarvel_ray.model.trees import ByteCache, Shown, Tree, TreeBuilder, pack_trees
from umarvel_ray.model.visuals import Visual, pack_visuals
from umarvel_ray.storage import local_model

SETTINGS_FILE = "reranker.json"
CACHE_BYTES = 2**30
"""Room for pictures as the vision tower sees them, per reranker: 1,300 of 117 tokens at 7B in bfloat16."""
_WINDOW = 4
"""Micro-batches whose trees are laid out together: trees of like length meet, and memory stays bounded."""


class Reranker(nn.Module):
    """(query, candidates) → P(Yes) of each.

    Attributes:
        settings: What decides a score, besides the weights.
        builder: (query, candidates) → `Tree`.
    """

    def __init__(
        self, model: Any, adapter: Adapter, tokenizer: Any, settings: RerankerSettings, *, source: str
    ) -> None:
        super().__init__()
        self.model = model
        self.adapter = adapter
        self.settings = settings
        self.source = source
        self._tokenizer = tokenizer
        self.builder = TreeBuilder(tokenizer, adapter, settings)
        self.keep_pictures(CACHE_BYTES)

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        settings: RerankerSettings | None = None,
        device: str | torch.device = "cpu",
        dtype: DtypeName = "float32",
    ) -> "Reranker":
        """Load a stock backbone or a reranker of ours.

        Args:
            path: A Transformers folder, or `hf://OWNER/NAME`.
            settings: For a stock backbone. A reranker brings its own, and refuses others.
            device: Where to score.
            dtype: Of the weights.

        Raises:
            CheckpointError: Nothing loadable there, it was made with other settings than `settings`, or Yes
                and No are not two single tokens.
        """
        path = local_model(path)
        stored = read_settings_file(Path(path) / SETTINGS_FILE)
        settings = resolve_settings(stored, settings, RerankerSettings, path=path)
        model, adapter, tokenizer = load_backbone(path, DTYPES[dtype])
        reranker = cls(model, adapter, tokenizer, settings, source=path)
        return reranker.requires_grad_(False).eval().to(device)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    def keep_pictures(self, num_bytes: int) -> None:
        """Keep up to `num_bytes` of the vision tower's output, for pictures that come again."""
        self._features: ByteCache[VisionFeatures] = ByteCache(num_bytes, _size_of)

    def hidden(self, trees: Sequence[Tree], *, decisive: bool = False) -> Tensor:
        """Final hidden states (T, D) of packed trees.

        Args:
            trees: At least one.
            decisive: Only of each candidate's decisive token, in order; no gradients.
        """
        inputs, layout, shown = pack_trees(trees, device=self.device)
        places = None
        if decisive:
            starts = np.cumsum([0, *inputs.lengths_N])
            found = [tree.decisive + start for tree, start in zip(trees, starts[:-1], strict=True)]
            places = torch.from_numpy(np.concatenate(found)).to(self.device)
        features = self._features_of(shown) if shown else None
        return hidden_states(self.model, self.adapter, inputs, layout, features=features, places_S=places)

    def _features_of(self, shown: Sequence[Shown]) -> VisionFeatures:
        """Of all pictures, in order; each different one goes through the tower once.

        A frozen tower's output is kept for the micro-batches that follow; not in training, where workers that
        share a sharded tower must call it together.
        """
        tower = core_of(self.model).visual
        keeps = not (self.training or any(parameter.requires_grad for parameter in tower.parameters()))
        found: dict[str, VisionFeatures] = {}
        missing: dict[str, Visual] = {}
        for one in shown:
            if one.path not in found and one.path not in missing:
                kept = self._features.get(one.path) if keeps else None
                if kept is None:
                    missing[one.path] = one.visual
                else:
                    found[one.path] = kept
        if missing:
            # What is kept serves gradients too, whoever asks first.
            with torch.inference_mode(False), torch.set_grad_enabled(not keeps and torch.is_grad_enabled()):
                fresh = self._look_at(list(missing.values()))
            for path, own in zip(missing, fresh, strict=True):
                found[path] = own
                if keeps:
                    self._features.put(path, own)
        every = [found[one.path] for one in shown]
        return VisionFeatures(
            torch.cat([own.merged_VD for own in every]),
            tuple(torch.cat(layer) for layer in zip(*(own.deep for own in every), strict=True)),
        )

    def _look_at(self, visuals: Sequence[Visual]) -> list[VisionFeatures]:
        packed = pack_visuals(visuals, self.adapter)
        assert packed is not None and packed.patches_P is not None, "a reranker's pictures come as patches"
        features = self.adapter.tower(core_of(self.model), packed.patches_P.to(self.device), packed.grids)
        sizes = [num_tokens for _, num_tokens in packed.keys]
        layers = [layer.split(sizes) for layer in (features.merged_VD, *features.deep)]
        # Copies: a part of the whole would keep all of it.
        return [
            VisionFeatures(merged.clone(), tuple(part.clone() for part in deep))
            for merged, *deep in zip(*layers, strict=True)
        ]

    def head_rows(self, ids: Sequence[int]) -> Tensor:
        """Rows of the LM head."""
        return self.model.get_output_embeddings().weight[list(ids)]

    @torch.inference_mode()
    def score_many(
        self,
        lists: Iterable[tuple[Query, Sequence[Candidate]]],
        *,
        max_tokens: int = 8192,
        num_readers: int = 2,
    ) -> list[np.ndarray]:
        """P(Yes) of each candidate of each query, float32, in the order given.

        Args:
            lists: Queries with their candidates. Neighbours that share pictures cost least.
            max_tokens: Token budget of a micro-batch; a longer tree is cut into several.
            num_readers: Threads that read pictures and words ahead of the model.
        """
        yes, no = self.head_rows([self.builder.answer_ids[True], self.builder.answer_ids[False]]).float()
        scores: list[np.ndarray] = []
        for trees, owners, num_lists in self._windows(lists, max_tokens=max_tokens, num_readers=num_readers):
            scores += [np.empty(0, dtype=np.float32)] * (num_lists - len(scores))
            answers: list[np.ndarray] = [np.empty(0, dtype=np.float32)] * len(trees)
            for batch in micro_batches([tree.num_tokens for tree in trees], max_tokens):
                chosen_ND = self.hidden([trees[index] for index in batch], decisive=True).float()
                # P(Yes) of two logits is the sigmoid of their difference.
                p_yes = torch.sigmoid(chosen_ND @ (yes - no)).cpu().numpy()
                ends = np.cumsum([len(trees[index].decisive) for index in batch])
                for index, own in zip(batch, np.split(p_yes, ends[:-1]), strict=True):
                    answers[index] = own
            for owner, own in zip(owners, answers, strict=True):
                scores[owner] = np.concatenate([scores[owner], own])
        return scores

    def score(self, query: Query, candidates: Sequence[Candidate]) -> np.ndarray:
        """P(Yes) of each candidate, float32."""
        return self.score_many([(query, candidates)])[0]

    def _windows(
        self, lists: Iterable[tuple[Query, Sequence[Candidate]]], *, max_tokens: int, num_readers: int
    ) -> Iterator[tuple[list[Tree], list[int], int]]:
        """Trees of whole lists, a few micro-batches at a time, the list each belongs to, and how many lists
        that makes so far. Words and pictures of the lists that follow are read meanwhile.
        """
        window: list[Tree] = []
        owners: list[int] = []
        owner = -1
        for owner, built in enumerate(self._built_ahead(lists, num_readers)):
            parts = [] if built is None else built.split(max_tokens)
            window += parts
            owners += [owner] * len(parts)
            if sum(tree.num_tokens for tree in window) >= _WINDOW * max_tokens:
                yield window, owners, owner + 1
                window, owners = [], []
        yield window, owners, owner + 1

    def _built_ahead(
        self, lists: Iterable[tuple[Query, Sequence[Candidate]]], num_readers: int
    ) -> Iterator[Tree | None]:
        """The tree of each list, in order; None for an empty one."""
        waiting: deque[Future[Tree | None]] = deque()
        with ThreadPoolExecutor(max_workers=num_readers) as readers:
            try:
                for query, candidates in lists:
                    waiting.append(readers.submit(self._build, query, candidates))
                    if len(waiting) > 2 * num_readers:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            finally:
                for future in waiting:
                    future.cancel()

    def _build(self, query: Query, candidates: Sequence[Candidate]) -> Tree | None:
        return self.builder.build(query, candidates) if candidates else None

    def set_trainable(self, trainable: Any, lora: LoraSettings) -> None:
        """Choose what trains: adapters on the decoder, or everything."""
        self.model = set_trainable(self.model, trainable, lora)

    def save(self, folder: Path) -> None:
        """Write a standard Transformers folder, adapters merged, and `reranker.json` beside the weights."""
        self.model = save_backbone(
            self.model,
            self.adapter,
            self._tokenizer,
            self.settings.images,
            source=self.source,
            folder=folder,
        )
        write_json(folder / SETTINGS_FILE, {"settings": self.settings.model_dump()})


def _size_of(features: VisionFeatures) -> int:
    return sum(layer.numel() * layer.element_size() for layer in (features.merged_VD, *features.deep))
