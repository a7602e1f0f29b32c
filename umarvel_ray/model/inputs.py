"""Record → prompt → tokens, patches and pooling mask; the one place where a prompt is built.

T tokens of a packed micro-batch, N items in it, P vision patches, M images.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from umarvel_ray.data.records import Candidate, Query
from umarvel_ray.model.images import load_patches
from umarvel_ray.model.settings import EncoderSettings

EMBED_TOKEN = "<emb>"
INSTRUCTION_START = "<instruction_start>"
INSTRUCTION_END = "<instruction_end>"
ADDED_TOKENS = (EMBED_TOKEN, INSTRUCTION_START, INSTRUCTION_END)

_TEXT = "\x01text\x01"
"""Stands where the user's text goes while the template is rendered."""
_COMPRESSION = {
    "text": "\nSummarize above sentence in one word: ",
    "image": "\nSummarize above image in one word: ",
    "image,text": "\nSummarize above image and sentence in one word: ",
}


def clean(text: str) -> str:
    """Drop carriage returns, strip blanks and double quotes; upper-case the first letter, end in a stop."""
    text = text.replace("\r", "").strip().strip('"')
    if text:
        text = text[0].upper() + text[1:]
        if text[-1] not in ".?!":
            text += "."
    return text


@dataclass(frozen=True, slots=True)
class Item:
    """One record, ready to be packed.

    Attributes:
        ids: int32 (T,), image tokens expanded.
        pooled: bool (T,), which hidden states the embedding averages.
        patches: uint8 (P, 588), all images in order; None without images.
        grids: (height, width) of each image in patches.
    """

    ids: np.ndarray
    pooled: np.ndarray
    patches: np.ndarray | None
    grids: tuple[tuple[int, int], ...]

    @property
    def num_tokens(self) -> int:
        """Length in the decoder, image tokens included."""
        return len(self.ids)

    @property
    def num_bytes(self) -> int:
        """Memory held."""
        return self.ids.nbytes + self.pooled.nbytes + (0 if self.patches is None else self.patches.nbytes)


@dataclass(frozen=True, slots=True)
class EncoderInputs:
    """A packed micro-batch: items end to end, nothing padded.

    Attributes:
        ids_T: int64 token ids.
        positions_3T: int64 rotary positions: temporal, height, width; all equal for sequential positions.
        pooled_T: bool, which hidden states are averaged.
        lengths_N: Tokens of each item.
        patches_P: uint8 (P, 588) or None.
        grids_M: (height, width) of each image in patches.
    """

    ids_T: Tensor
    positions_3T: Tensor
    pooled_T: Tensor
    lengths_N: tuple[int, ...]
    patches_P: Tensor | None
    grids_M: tuple[tuple[int, int], ...]

    def to(self, device: torch.device) -> "EncoderInputs":
        """The same micro-batch on `device`."""
        return EncoderInputs(
            ids_T=self.ids_T.to(device, non_blocking=True),
            positions_3T=self.positions_3T.to(device, non_blocking=True),
            pooled_T=self.pooled_T.to(device, non_blocking=True),
            lengths_N=self.lengths_N,
            patches_P=None if self.patches_P is None else self.patches_P.to(device, non_blocking=True),
            grids_M=self.grids_M,
        )


class ChatTemplate:
    """A backbone's chat template, cut open where the user's text stands: only text is tokenized per record.

    The pieces around the text are constant; a tokenizer of the Qwen family never merges across them, because
    they end and begin in special tokens or line ends. A test holds this against the whole rendered string.
    """

    def __init__(self, tokenizer: Any, *, answer: str, generation_prompt: bool = False) -> None:
        rendered = tokenizer.apply_chat_template(
            [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": _TEXT}]},
                {"role": "assistant", "content": [{"type": "text", "text": answer}]},
            ],
            tokenize=False,
            add_generation_prompt=generation_prompt,
        )
        head, tail = rendered.split(_TEXT)
        pad = "<|image_pad|>"
        start = head.rindex("<|vision_start|>")
        self.image_token = tokenizer.convert_tokens_to_ids(pad)
        self.before = _encode(tokenizer, head[:start])
        self.image_start = _encode(tokenizer, head[start:].split(pad)[0])
        self.image_end = _encode(tokenizer, head[start:].split(pad)[1])
        self.after = _encode(tokenizer, tail)
        self.tail = tail
        special = dict.fromkeys([*tokenizer.all_special_tokens, *ADDED_TOKENS])
        self._special = re.compile("|".join(map(re.escape, special)))

    def words(self, text: str | None) -> str:
        """Text from data: special tokens spelt out there are words, not commands."""
        if not text or "<" not in text:
            return text or ""
        return self._special.sub(lambda match: " ".join(match.group()), text)


def _encode(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


class InputBuilder:
    """Builds an `Item` from a `Query` or a `Candidate`; keeps the first ones up to `cache_bytes`."""

    def __init__(self, tokenizer: Any, settings: EncoderSettings, *, cache_bytes: int = 0) -> None:
        self.settings = settings
        self._tokenizer = tokenizer
        self._template = ChatTemplate(
            tokenizer, answer=f"{EMBED_TOKEN}.", generation_prompt=settings.append_generation_prompt
        )
        start, end, embed = tokenizer.convert_tokens_to_ids([INSTRUCTION_START, INSTRUCTION_END, EMBED_TOKEN])
        self._start_id, self._end_id, self._embed_id = start, end, embed
        self._cache: dict[Query | Candidate, Item] = {}
        self._cache_room = cache_bytes

    def build(self, record: Query | Candidate) -> Item:
        """Tokens, patches and pooling mask of one record.

        Raises:
            DataError: Its image is missing or broken.
        """
        item = self._cache.get(record)
        if item is None:
            item = self._build(record)
            if item.num_bytes <= self._cache_room:
                self._cache[record] = item
                self._cache_room -= item.num_bytes
        return item

    def text_of(self, record: Query | Candidate) -> str:
        """The user's text as the model reads it, before templating."""
        txt = self._template.words(record.txt)
        mode = self.settings.instruction
        if isinstance(record, Query) and record.instruction and mode != "none":
            instruction = clean(self._template.words(record.instruction))
            if mode == "masked":
                instruction = f"{INSTRUCTION_START}{instruction}{INSTRUCTION_END}"
            return clean(f"{instruction} {txt}")
        return txt if record.verbatim else clean(txt)

    def _build(self, record: Query | Candidate) -> Item:
        template = self._template
        text_ids = _encode(self._tokenizer, self.text_of(record))[: self.settings.max_text_tokens]
        suffix = _COMPRESSION[record.modality] if self.settings.compression_prompt else ""
        suffix_ids = _encode(self._tokenizer, suffix) if suffix else []
        patches, grids, image_ids = None, (), []
        if record.img_path:
            patches, grid = load_patches(record.img_path, self.settings.images)
            grids = (grid,)
            num = grid[0] * grid[1] // self.settings.images.merge_size**2
            image_ids = [*template.image_start, *[template.image_token] * num, *template.image_end]
        ids = np.array(
            [*template.before, *image_ids, *text_ids, *suffix_ids, *template.after], dtype=np.int32
        )
        return Item(ids=ids, pooled=self._pooled(ids), patches=patches, grids=grids)

    def _pooled(self, ids: np.ndarray) -> np.ndarray:
        if self.settings.pooling == "last":
            pooled = np.zeros(len(ids), dtype=bool)
            pooled[np.flatnonzero(ids == self._embed_id)[-1] - 1] = True
            return pooled
        pooled = np.ones(len(ids), dtype=bool)
        starts = np.flatnonzero(ids == self._start_id)
        if len(starts):
            ends = np.flatnonzero(ids == self._end_id)
            # A text cut inside its instruction has no end marker: all up to the tail is instruction.
            end = ends[-1] + 1 if len(ends) else len(ids) - len(self._template.after)
            pooled[starts[0] : end] = False
        return pooled

    def pack(self, items: Sequence[Item]) -> EncoderInputs:
        """Lay items end to end."""
        mrope = self.settings.positions == "mrope"
        merge = self.settings.images.merge_size
        positions = [
            mrope_positions(item.ids, item.grids, image_token=self._template.image_token, merge_size=merge)
            if mrope
            else np.broadcast_to(np.arange(item.num_tokens), (3, item.num_tokens))
            for item in items
        ]
        patches = [item.patches for item in items if item.patches is not None]
        return EncoderInputs(
            ids_T=torch.from_numpy(np.concatenate([item.ids for item in items]).astype(np.int64)),
            positions_3T=torch.from_numpy(np.concatenate(positions, axis=1).astype(np.int64)),
            pooled_T=torch.from_numpy(np.concatenate([item.pooled for item in items])),
            lengths_N=tuple(item.num_tokens for item in items),
            patches_P=torch.from_numpy(np.concatenate(patches)) if patches else None,
            grids_M=tuple(grid for item in items for grid in item.grids),
        )


def mrope_positions(
    ids: np.ndarray, grids: Sequence[tuple[int, int]], *, image_token: int, merge_size: int, start: int = 0
) -> np.ndarray:
    """Rotary positions (3, T) of Qwen2-VL: text counts on, an image spans a (1, height, width) grid.

    Source: Wang et al. 2024, section 2.1, arXiv:2409.12191.
    """
    positions = np.empty((3, len(ids)), dtype=np.int64)
    place, following, images = 0, start, iter(grids)
    is_image = ids == image_token
    while place < len(ids):
        if is_image[place]:
            height, width = (side // merge_size for side in next(images))
            num = height * width
            positions[0, place : place + num] = following
            positions[1, place : place + num] = following + np.repeat(np.arange(height), width)
            positions[2, place : place + num] = following + np.tile(np.arange(width), height)
            following += max(height, width)
        else:
            num = int(np.argmax(is_image[place:])) or len(ids) - place
            positions[:, place : place + num] = following + np.arange(num)
            following += num
        place += num
    return positions


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
