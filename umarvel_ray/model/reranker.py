"""The pointwise reranker: a causal model that answers Yes or No to (query, candidate); its score is P(Yes).

All candidates of a query form one tree: what they share stands once, and each candidate behind it sees that
prefix and itself. One pass, the last position of each candidate, two rows of the LM head. T tokens, B trees
of at most L tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from umarvel_ray.artifacts import write_json
from umarvel_ray.data.records import Candidate, Picture, Query
from umarvel_ray.errors import CheckpointError
from umarvel_ray.model.adapters import Adapter
from umarvel_ray.model.attention import Block, PackedLayout
from umarvel_ray.model.backbone import (
    DTYPES,
    hidden_states,
    load_backbone,
    read_settings_file,
    resolve_settings,
    save_backbone,
)
from umarvel_ray.model.images import Grid
from umarvel_ray.model.inputs import EncoderInputs, micro_batches
from umarvel_ray.model.lora import set_trainable
from umarvel_ray.model.prompts import ChatTemplate, clean
from umarvel_ray.model.settings import RERANKER_PROMPTS, DtypeName, LoraSettings, RerankerSettings
from umarvel_ray.model.visuals import Visual, VisualReader, mrope_positions, pack_visuals

SETTINGS_FILE = "reranker.json"


@dataclass(frozen=True, slots=True)
class Tree:
    """A query and its candidates, ready to be packed.

    Attributes:
        ids: int32 (T,), the shared prefix, then each candidate's own tokens.
        positions: int64 (3, T), restarted for each candidate where the prefix ends.
        leaf: int32 (T,), 0 in the prefix, 1 … in the candidates.
        decisive: int64, for each candidate the token whose successor is the answer.
        visuals: All pictures, in token order.
    """

    ids: np.ndarray
    positions: np.ndarray
    leaf: np.ndarray
    decisive: np.ndarray
    visuals: tuple[Visual, ...]

    @property
    def num_tokens(self) -> int:
        """T."""
        return len(self.ids)


class TreeBuilder:
    """(query, candidates) → `Tree`."""

    def __init__(self, tokenizer: Any, adapter: Adapter, settings: RerankerSettings) -> None:
        self.settings = settings
        self.adapter = adapter
        self._tokenizer = tokenizer
        self._template = ChatTemplate(tokenizer, answer="Yes")
        before_answer, self._closing = self._template.tail.rsplit("Yes", 1)
        self._after = self._encode(before_answer)
        self.answer_ids = {True: self._one_id("Yes"), False: self._one_id("No")}
        # A query's image stands in every one of its pairs, and neighbours share candidates.
        reader = VisualReader(adapter, settings.images)
        self._image = lru_cache(maxsize=2048)(lambda path: reader.read(Picture(path)))

    def build(
        self, query: Query, candidates: Sequence[Candidate], answers: Sequence[bool] | None = None
    ) -> Tree:
        """Tokenize each pair whole, then share the longest common prefix of tokens.

        Args:
            query: With its instruction.
            candidates: At least one.
            answers: For training: each candidate's answer is appended, with the tokens that close the turn.
        """
        rows = [self._pair(query, candidate) for candidate in candidates]
        shared = min(_common_prefix([ids for ids, _, _ in rows]), *(picture for _, _, picture in rows))
        query_images = [self._image(query.img_path)] if query.img_path else []
        prefix = rows[0][0][:shared]
        prefix_positions = mrope_positions(np.array(prefix), _grids(query_images), adapter=self.adapter)
        restart = int(prefix_positions.max()) + 1 if shared else 0
        ids, positions, leaf = (
            [np.array(prefix, dtype=np.int32)],
            [prefix_positions],
            [np.zeros(shared, dtype=np.int32)],
        )
        images, decisive, place = list(query_images), [], shared
        for number, (row, candidate_images, _) in enumerate(rows, start=1):
            own = row[shared:]
            decisive.append(place + len(own) - 1)
            if answers is not None:
                own = [*own, self.answer_ids[answers[number - 1]], *self._encode(self._closing)]
            tokens = np.array(own, dtype=np.int32)
            ids.append(tokens)
            positions.append(
                mrope_positions(tokens, _grids(candidate_images), adapter=self.adapter, start=restart)
            )
            leaf.append(np.full(len(own), number, dtype=np.int32))
            images += candidate_images
            place += len(own)
        return Tree(
            ids=np.concatenate(ids),
            positions=np.concatenate(positions, axis=1),
            leaf=np.concatenate(leaf),
            decisive=np.array(decisive),
            visuals=tuple(images),
        )

    def _pair(self, query: Query, candidate: Candidate) -> tuple[list[int], list[Visual], int]:
        """Tokens of one pair up to where the answer begins, the candidate's image, and where that stands.

        Two candidates' images may take the same tokens and yet differ: no prefix reaches into one.
        """
        template = self._template
        instruction = clean(template.words(query.instruction))
        words = self._cut(clean(f"{instruction} {template.words(query.txt)}"))
        images: list[Visual] = []
        picture = 0
        ids = list(template.before)
        text = f"{RERANKER_PROMPTS[self.settings.prompt]}Query:"
        if query.img_path:
            ids += [*self._encode(text), *self._image_ids(self._image(query.img_path))]
            text = ""
        text += f"{words}Candidate:"
        if candidate.img_path:
            image = self._image(candidate.img_path)
            images.append(image)
            ids += self._encode(text)
            picture = len(ids)
            ids += self._image_ids(image)
            text = ""
        text += self._cut(clean(template.words(candidate.txt)))
        ids += [*self._encode(text), *self._after]
        return ids, images, picture if images else len(ids)

    def _image_ids(self, image: Visual) -> list[int]:
        return self._template.visual(self.adapter.num_tokens(image.grids[0]))

    def _cut(self, text: str) -> str:
        ids = self._encode(text)
        return (
            text
            if len(ids) <= self.settings.max_text_tokens
            else self._tokenizer.decode(ids[: self.settings.max_text_tokens])
        )

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False)["input_ids"] if text else []

    def _one_id(self, word: str) -> int:
        ids = self._encode(word)
        if len(ids) != 1:
            raise CheckpointError(
                f"the tokenizer cuts {word!r} into {len(ids)} tokens; a score needs one. "
                "Use a Qwen tokenizer."
            )
        return ids[0]


def _common_prefix(rows: Sequence[list[int]]) -> int:
    """Tokens that all rows share at their head; at least one token of each row is left over."""
    shortest = min(map(len, rows)) - 1
    first, last = min(rows), max(rows)  # in lexical order, all others lie between them
    return next((i for i in range(shortest) if first[i] != last[i]), shortest)


def _grids(visuals: Sequence[Visual]) -> list[Grid]:
    return [grid for visual in visuals for grid in visual.grids]


def pack_trees(
    trees: Sequence[Tree], adapter: Adapter, *, device: torch.device
) -> tuple[EncoderInputs, PackedLayout]:
    """Lay trees end to end, and tell attention who sees whom."""
    lengths = [tree.num_tokens for tree in trees]
    longest = max(lengths)
    index_BL = np.zeros((len(trees), longest), dtype=np.int64)
    leaf_BL = np.full((len(trees), longest), -1, dtype=np.int32)
    start = 0
    for row, tree in enumerate(trees):
        index_BL[row] = start
        index_BL[row, : tree.num_tokens] = np.arange(start, start + tree.num_tokens)
        leaf_BL[row, : tree.num_tokens] = tree.leaf
        start += tree.num_tokens
    leaf = torch.from_numpy(leaf_BL).to(device)
    back = torch.ones(longest, longest, dtype=torch.bool, device=device).tril()
    sees = ((leaf[:, None, :] == 0) | (leaf[:, None, :] == leaf[:, :, None])) & back
    real = torch.from_numpy((leaf_BL >= 0).ravel())
    block = Block(index_BL=torch.from_numpy(index_BL).to(device), mask=sees[:, None], causal=False)
    layout = PackedLayout(blocks=(block,), restore_T=torch.nonzero(real).squeeze(1).to(device))
    inputs = EncoderInputs(
        ids_T=torch.from_numpy(np.concatenate([tree.ids for tree in trees]).astype(np.int64)),
        positions_3T=torch.from_numpy(np.concatenate([tree.positions for tree in trees], axis=1)),
        pooled_T=torch.ones(sum(lengths), dtype=torch.bool),
        lengths_N=tuple(lengths),
        visuals=pack_visuals([visual for tree in trees for visual in tree.visuals], adapter),
    )
    return inputs.to(device), layout


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
                and No are not single tokens.
        """
        path = str(path)
        stored = read_settings_file(Path(path) / SETTINGS_FILE)
        settings = resolve_settings(stored, settings, RerankerSettings, path=path)
        model, adapter, tokenizer = load_backbone(path, DTYPES[dtype])
        reranker = cls(model, adapter, tokenizer, settings, source=path)
        return reranker.requires_grad_(False).eval().to(device)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    def hidden(self, trees: Sequence[Tree]) -> Tensor:
        """Final hidden states (T, D) of packed trees."""
        inputs, layout = pack_trees(trees, self.adapter, device=self.device)
        return hidden_states(self.model, self.adapter, inputs, layout)

    def head_rows(self, ids: Sequence[int]) -> Tensor:
        """Rows of the LM head."""
        return self.model.get_output_embeddings().weight[list(ids)]

    @torch.inference_mode()
    def score_many(
        self, lists: Sequence[tuple[Query, Sequence[Candidate]]], *, max_tokens: int = 8192
    ) -> list[np.ndarray]:
        """P(Yes) of each candidate of each query, float32, in the order given."""
        trees = [self.builder.build(query, candidates) for query, candidates in lists]
        rows = self.head_rows([self.builder.answer_ids[True], self.builder.answer_ids[False]]).float()
        scores: list[np.ndarray] = [np.empty(0, dtype=np.float32)] * len(trees)
        for batch in micro_batches([tree.num_tokens for tree in trees], max_tokens):
            hidden_TD = self.hidden([trees[index] for index in batch])
            start = 0
            for index in batch:
                decisive = torch.from_numpy(trees[index].decisive + start).to(self.device)
                yes_no = hidden_TD[decisive].float() @ rows.T
                scores[index] = yes_no.softmax(1)[:, 0].cpu().numpy()
                start += trees[index].num_tokens
        return scores

    def score(self, query: Query, candidates: Sequence[Candidate]) -> np.ndarray:
        """P(Yes) of each candidate, float32."""
        return self.score_many([(query, candidates)])[0]

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
