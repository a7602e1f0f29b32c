"""Record → prompt → tokens, patches and pooling mask; the one place where a record's prompt is built.

T tokens of a packed micro-batch, N items in it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from umarvel_ray.data.records import Candidate, Picture, Query, Video
from umarvel_ray.errors import DataError
from umarvel_ray.model.adapters import Adapter
from umarvel_ray.model.prompts import (
    ADDED_TOKENS,
    EMBED_TOKEN,
    INSTRUCTION_END,
    INSTRUCTION_START,
    ChatTemplate,
    clean,
    encode,
)
from umarvel_ray.model.settings import EncoderSettings
from umarvel_ray.model.vision_store import VisionStore
from umarvel_ray.model.visuals import (
    PackedVisuals,
    Visual,
    VisualReader,
    mrope_positions,
    pack_visuals,
)

_COMPRESSION = {
    "text": "\nSummarize above sentence in one word: ",
    "image": "\nSummarize above image in one word: ",
    "image,text": "\nSummarize above image and sentence in one word: ",
}


@dataclass(frozen=True, slots=True, eq=False)
class Item:
    """One record, ready to be packed.

    Attributes:
        ids: int32 (T,), vision tokens expanded.
        pooled: bool (T,), which hidden states the embedding averages.
        visuals: Pictures and videos, in the order of their tokens.
        num_cut: Tokens of its text that were left out.
    """

    ids: np.ndarray
    pooled: np.ndarray
    visuals: tuple[Visual, ...] = ()
    num_cut: int = 0

    @property
    def num_tokens(self) -> int:
        """Length in the decoder, vision tokens included."""
        return len(self.ids)

    @property
    def num_bytes(self) -> int:
        """Memory held."""
        return self.ids.nbytes + self.pooled.nbytes + sum(visual.num_bytes for visual in self.visuals)


@dataclass(frozen=True, slots=True)
class EncoderInputs:
    """A packed micro-batch: items end to end, nothing padded.

    Attributes:
        ids_T: int64 token ids.
        positions_3T: int64 rotary positions: temporal, height, width; all equal for sequential positions.
        pooled_T: bool, which hidden states are averaged.
        lengths_N: Tokens of each item.
        visuals: Their pictures; None where nobody has any.
    """

    ids_T: Tensor
    positions_3T: Tensor
    pooled_T: Tensor
    lengths_N: tuple[int, ...]
    visuals: PackedVisuals | None

    def to(self, device: torch.device) -> "EncoderInputs":
        """The same micro-batch on `device`."""
        return EncoderInputs(
            ids_T=self.ids_T.to(device, non_blocking=True),
            positions_3T=self.positions_3T.to(device, non_blocking=True),
            pooled_T=self.pooled_T.to(device, non_blocking=True),
            lengths_N=self.lengths_N,
            visuals=None if self.visuals is None else self.visuals.to(device),
        )


class InputBuilder:
    """Builds an `Item` from a `Query` or a `Candidate`; keeps the first ones up to `cache_bytes`."""

    def __init__(
        self,
        tokenizer: Any,
        adapter: Adapter,
        settings: EncoderSettings,
        *,
        cache_bytes: int = 0,
        store: VisionStore | None = None,
    ) -> None:
        self.settings = settings
        self.adapter = adapter
        self.reader = VisualReader(adapter, settings.images, settings.videos, store=store)
        self._tokenizer = tokenizer
        self._template = ChatTemplate(
            tokenizer, answer=f"{EMBED_TOKEN}.", generation_prompt=settings.append_generation_prompt
        )
        embed, start, end = tokenizer.convert_tokens_to_ids(ADDED_TOKENS)
        self._start_id, self._end_id, self._embed_id = start, end, embed
        self._cache: dict[Query | Candidate, Item] = {}
        self._cache_room = cache_bytes

    def __reduce__(self) -> tuple[Any, ...]:
        """Travels to another process without what it keeps in memory."""
        make = partial(InputBuilder, store=self.reader.store)
        return make, (self._tokenizer, self.adapter, self.settings)

    def build(self, record: Query | Candidate) -> Item:
        """Tokens, patches and pooling mask of one record.

        Raises:
            DataError: Its image is missing or broken, or its text is no text.
        """
        item = self._cache.get(record)
        if item is None:
            item = self._build(record)
            if item.num_bytes <= self._cache_room:
                self._cache[record] = item
                self._cache_room -= item.num_bytes
        return item

    def text_of(self, record: Query | Candidate) -> str:
        """The user's text as the model reads it, before templating; pictures between words left out."""
        return " ".join(part for part in self._parts(record) if isinstance(part, str))

    def _parts(self, record: Query | Candidate) -> list[str | Picture | Video]:
        """See `content_parts`."""
        return content_parts(record, self._template, self._instruction(record))

    def _instruction(self, record: Query | Candidate) -> str:
        mode = self.settings.instruction
        if not isinstance(record, Query) or not record.instruction or mode == "none":
            return ""
        instruction = clean(self._template.words(record.instruction))
        return f"{INSTRUCTION_START}{instruction}{INSTRUCTION_END}" if mode == "masked" else instruction

    def _build(self, record: Query | Candidate) -> Item:
        template, room, num_cut = self._template, self.settings.max_text_tokens, 0
        ids = list(template.before)
        visuals: list[Visual] = []
        # A text stands here until it is known whether a label follows: both are read as one.
        waiting, waiting_ids = "", []
        for part in self._parts(record):
            if isinstance(part, str):
                text_ids = self._encode(part, record)
                if len(text_ids) <= room:
                    waiting, waiting_ids = part, text_ids
                else:
                    ids += text_ids[:room]
                num_cut += max(0, len(text_ids) - room)
                room = max(0, room - len(text_ids))
                continue
            visual = self.reader.read(part)
            visuals.append(visual)
            for grid, label in zip(visual.grids, visual.labels, strict=True):
                ids += self._encode(waiting + label, record) if label else waiting_ids
                ids += template.visual(self.adapter.num_tokens(grid), visual.token)
                waiting, waiting_ids = "", []
        ids += waiting_ids
        if self.settings.compression_prompt:
            request = _COMPRESSION[_asked_of(record)].replace("Summarize", self.settings.compression_verb)
            ids += encode(self._tokenizer, request)
        ids += template.after
        id_T = np.array(ids, dtype=np.int32)
        return Item(ids=id_T, pooled=self._pooled(id_T), visuals=tuple(visuals), num_cut=num_cut)

    def _encode(self, text: str, record: Query | Candidate) -> list[int]:
        try:
            return encode(self._tokenizer, text)
        except (UnicodeError, TypeError):
            name = f"query {record.qid}" if isinstance(record, Query) else f"candidate {record.did}"
            raise DataError(
                f"{name}: its text holds half of a surrogate pair, which is no character. "
                "Write the file anew as UTF-8."
            ) from None

    def _pooled(self, ids: np.ndarray) -> np.ndarray:
        if self.settings.pooling == "last":
            pooled = np.zeros(len(ids), dtype=bool)
            pooled[np.flatnonzero(ids == self._embed_id)[-1] - 1] = True
            return pooled
        pooled = np.ones(len(ids), dtype=bool)
        starts = np.flatnonzero(ids == self._start_id)
        if len(starts):
            ends = np.flatnonzero(ids == self._end_id)
            # A text cut inside its instruction has no end marker: what follows it is a picture or the tail.
            pictures = np.flatnonzero(ids == self._template.image_start[0])
            tail = len(ids) - len(self._template.after)
            end = ends[-1] + 1 if len(ends) else min([tail, *pictures[pictures > starts[0]]])
            pooled[starts[0] : end] = False
        return pooled

    def pack(self, items: Sequence[Item]) -> EncoderInputs:
        """Lay items end to end."""
        return EncoderInputs(
            ids_T=torch.from_numpy(np.concatenate([item.ids for item in items]).astype(np.int64)),
            positions_3T=torch.from_numpy(np.concatenate([self.positions(item) for item in items], axis=1)),
            pooled_T=torch.from_numpy(np.concatenate([item.pooled for item in items])),
            lengths_N=tuple(item.num_tokens for item in items),
            visuals=pack_visuals([visual for item in items for visual in item.visuals], self.adapter),
        )

    def positions(self, item: Item) -> np.ndarray:
        """Rotary positions of one item, int64 (3, T)."""
        if self.settings.positions == "sequential":
            return np.broadcast_to(np.arange(item.num_tokens), (3, item.num_tokens))
        runs = [(grid, visual.tick) for visual in item.visuals for grid in visual.grids]
        grids, ticks = [grid for grid, _ in runs], [tick for _, tick in runs]
        return mrope_positions(item.ids, grids, adapter=self.adapter, ticks=ticks)


def content_parts(
    record: Query | Candidate, template: ChatTemplate, instruction: str
) -> list[str | Picture | Video]:
    """Texts and visuals in turn, texts cleaned, the instruction before the first of them."""
    parts: list[str | Picture | Video] = []
    for part in record.content:
        words = template.words(part) if isinstance(part, str) else None
        if words is None:
            parts.append(part)
        elif parts and isinstance(parts[-1], str):
            parts[-1] = f"{parts[-1]} {words}"
        else:
            parts.append(words)
    if instruction:
        first = next((place for place, part in enumerate(parts) if isinstance(part, str)), len(parts))
        words = parts.pop(first) if first < len(parts) else ""
        parts.insert(first, clean(f"{instruction} {words}"))
    else:
        first = -1
    return [
        clean(part) if isinstance(part, str) and place != first and not record.verbatim else part
        for place, part in enumerate(parts)
    ]


def _asked_of(record: Query | Candidate) -> str:
    """What a compression prompt calls a record's content: a video is many images."""
    kinds = [isinstance(part, str) for part in record.content if part]
    return ",".join(name for name, there in (("image", not all(kinds)), ("text", any(kinds))) if there)


def micro_batches(num_tokens: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Cut items into micro-batches of at most `max_tokens`, longest first: lengths within one are alike.

    An item longer than the budget gets a micro-batch of its own. Ties keep the given order.
    """
    batches: list[list[int]] = []
    room = 0
    for index in sorted(range(len(num_tokens)), key=lambda i: -num_tokens[i]):
        if not batches or num_tokens[index] > room:
            batches.append([])
            room = max_tokens
        batches[-1].append(index)
        room -= num_tokens[index]
    return batches
