"""(query, candidates) → one tree: what all pairs share stands once, each candidate hangs behind it.

A candidate's tokens see that prefix and themselves, at the positions they would have alone, so a tree scores
as its pairs do one at a time. T tokens, B items side by side of L tokens at most, S tokens looked at.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import log
from typing import Any, Generic, TypeVar

import numpy as np
import torch

from umarvel_ray.data.records import Candidate, Picture, Query, Video
from umarvel_ray.errors import CheckpointError
from umarvel_ray.model.adapters import Adapter
from umarvel_ray.model.attention import Block, PackedLayout
from umarvel_ray.model.images import Grid
from umarvel_ray.model.inputs import EncoderInputs, content_parts
from umarvel_ray.model.prompts import ChatTemplate, clean, encode
from umarvel_ray.model.settings import RERANKER_PROMPTS, RerankerSettings
from umarvel_ray.model.visuals import Visual, VisualReader, mrope_positions

_MIN_FILL = 0.75
"""Items side by side are at least this long, relative to the longest; their prefixes likewise."""

_Value = TypeVar("_Value")


@dataclass(frozen=True, slots=True)
class Shown:
    """A picture or video where a tree shows it.

    Attributes:
        leaf: 0 for the prefix, 1 … for a candidate.
        path: Names the file.
        visual: What was read.
    """

    leaf: int
    path: str
    visual: Visual


@dataclass(frozen=True, slots=True)
class Tree:
    """A query and its candidates, ready to be packed.

    Attributes:
        ids: int32 (T,), the shared prefix, then each candidate's own tokens.
        positions: int64 (3, T), restarted for each candidate where the prefix ends.
        leaf: int32 (T,), 0 in the prefix, 1 … in the candidates.
        decisive: int64, for each candidate the token whose successor is the answer.
        shown: Pictures and videos, in the order of their tokens.
    """

    ids: np.ndarray
    positions: np.ndarray
    leaf: np.ndarray
    decisive: np.ndarray
    shown: tuple[Shown, ...]

    @property
    def num_tokens(self) -> int:
        """T."""
        return len(self.ids)

    def bounds(self) -> np.ndarray:
        """int64, where the prefix and each candidate begin, and T."""
        return np.searchsorted(self.leaf, np.arange(len(self.decisive) + 2))

    def split(self, max_tokens: int) -> list["Tree"]:
        """Trees over consecutive candidates of at most `max_tokens`, one candidate each at least."""
        if self.num_tokens <= max_tokens:
            return [self]
        bounds = self.bounds()
        parts, first = [], 1
        while first <= len(self.decisive):
            last = first + 1
            while last <= len(self.decisive) and bounds[1] + bounds[last + 1] - bounds[first] <= max_tokens:
                last += 1
            parts.append(self._part(first, last, bounds))
            first = last
        return parts

    def _part(self, first: int, last: int, bounds: np.ndarray) -> "Tree":
        """Candidates `first` … `last` − 1, counted from 1, behind the same prefix."""
        keep = np.r_[0 : bounds[1], bounds[first] : bounds[last]]
        shift = bounds[first] - bounds[1]
        return Tree(
            ids=self.ids[keep],
            positions=self.positions[:, keep],
            leaf=np.where(self.leaf[keep] > 0, self.leaf[keep] - first + 1, 0).astype(np.int32),
            decisive=self.decisive[first - 1 : last - 1] - shift,
            shown=tuple(
                replace(one, leaf=max(one.leaf - first + 1, 0))
                for one in self.shown
                if one.leaf == 0 or first <= one.leaf < last
            ),
        )


class ByteCache(Generic[_Value]):
    """The values used last, up to a number of bytes; may be asked from several threads."""

    def __init__(self, max_bytes: int, size_of: Callable[[_Value], int]) -> None:
        self._max_bytes, self._size_of = max_bytes, size_of
        self._values: OrderedDict[str, _Value] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def get(self, key: str) -> _Value | None:
        """The value, which now counts as used last."""
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
            return self._values.get(key)

    def put(self, key: str, value: _Value) -> None:
        """Keep a value; those unused for longest make room. One larger than all the room is not kept."""
        with self._lock:
            if key in self._values or self._size_of(value) > self._max_bytes:
                return
            self._values[key] = value
            self._bytes += self._size_of(value)
            while self._bytes > self._max_bytes:
                _, oldest = self._values.popitem(last=False)
                self._bytes -= self._size_of(oldest)


_Seen = tuple[str, Visual]
"""The path of a picture or video, and what was read."""
_Piece = str | tuple[Grid, int]
"""Of a prompt: words, or a run of vision tokens with the token that it repeats."""


@dataclass(frozen=True, slots=True)
class _Row:
    """One pair up to where the answer begins; where its candidate's first picture or its end stands; and that
    candidate's pictures."""

    ids: list[int]
    first_visual: int
    visuals: list[_Seen]


class TreeBuilder:
    """(query, candidates) → `Tree`; may be called from several threads.

    Raises:
        CheckpointError: Yes or No is not one token, or both are the same one.
    """

    def __init__(
        self, tokenizer: Any, adapter: Adapter, settings: RerankerSettings, *, cache_bytes: int = 256 * 2**20
    ) -> None:
        self.settings = settings
        self.adapter = adapter
        self._tokenizer = tokenizer
        self._template = ChatTemplate(tokenizer, answer="Yes")
        before_answer, closing = self._template.tail.rsplit("Yes", 1)
        self._after, self._closing = self._encode([before_answer, closing])
        self.answer_ids = {True: self._one_id("Yes"), False: self._one_id("No")}
        if self.answer_ids[True] == self.answer_ids[False]:
            raise CheckpointError(
                f"the tokenizer makes 'Yes' and 'No' the same token, {self.answer_ids[True]}: every score "
                "would be a half. Use a Qwen tokenizer."
            )
        self._reader = VisualReader(adapter, settings.images)
        # A query's picture stands in every one of its pairs, and neighbours share candidates.
        self._visuals: ByteCache[Visual] = ByteCache(cache_bytes, lambda visual: visual.num_bytes)

    def __reduce__(self) -> tuple[Any, ...]:
        """Travels to another process without what it keeps."""
        return TreeBuilder, (self._tokenizer, self.adapter, self.settings)

    def build(
        self, query: Query, candidates: Sequence[Candidate], answers: Sequence[bool] | None = None
    ) -> Tree:
        """Tokenize each pair whole, then share the longest common prefix of tokens.

        A tokenizer may merge across `Candidate:`, so the prefix is found among tokens, not among words. It
        never reaches into a candidate's picture: two pictures may take the same tokens and yet differ.

        Args:
            query: With its instruction.
            candidates: At least one.
            answers: For training: each candidate's answer is appended, with the tokens that close the turn.
        """
        asked, rows = self._rows(query, candidates)
        shared = min(_common_prefix([row.ids for row in rows]), *(row.first_visual for row in rows))
        prefix = np.array(rows[0].ids[:shared], dtype=np.int32)
        prefix_positions = self._positions(prefix, asked, start=0)
        restart = int(prefix_positions.max()) + 1 if shared else 0
        ids, positions = [prefix], [prefix_positions]
        shown = [Shown(0, path, visual) for path, visual in asked]
        decisive, place = [], shared
        for number, row in enumerate(rows):
            own = row.ids[shared:]
            decisive.append(place + len(own) - 1)
            if answers is not None:
                own = [*own, self.answer_ids[answers[number]], *self._closing]
            ids.append(np.array(own, dtype=np.int32))
            positions.append(self._positions(ids[-1], row.visuals, start=restart))
            shown += [Shown(number + 1, path, visual) for path, visual in row.visuals]
            place += len(own)
        return Tree(
            ids=np.concatenate(ids),
            positions=np.concatenate(positions, axis=1),
            leaf=np.repeat(np.arange(len(ids), dtype=np.int32), [len(piece) for piece in ids]),
            decisive=np.array(decisive),
            shown=tuple(shown),
        )

    def pair_ids(self, query: Query, candidate: Candidate) -> list[int]:
        """Tokens of one pair up to where the answer begins, vision tokens expanded."""
        _, (row,) = self._rows(query, [candidate])
        return row.ids

    def _rows(self, query: Query, candidates: Sequence[Candidate]) -> tuple[list[_Seen], list[_Row]]:
        """The query's pictures, and each pair."""
        template = self._template
        head: list[_Piece] = [f"{RERANKER_PROMPTS[self.settings.prompt]}Query:"]
        instruction = clean(template.words(query.instruction))
        asked = self._append(head, content_parts(query, template, instruction))
        _say(head, "Candidate:")
        pieces, visuals = [], []
        for candidate in candidates:
            pair = list(head)
            visuals.append(self._append(pair, content_parts(candidate, template, "")))
            pieces.append(pair)
        texts = list(dict.fromkeys(piece for pair in pieces for piece in pair if isinstance(piece, str)))
        ids_of = dict(zip(texts, self._encode(texts), strict=True))
        return asked, [
            self._row(pair, ids_of, seen, num_asked=sum(len(visual.grids) for _, visual in asked))
            for pair, seen in zip(pieces, visuals, strict=True)
        ]

    def _row(
        self, pieces: Sequence[_Piece], ids_of: dict[str, list[int]], seen: list[_Seen], *, num_asked: int
    ) -> _Row:
        ids, first, runs = list(self._template.before), None, 0
        for piece in pieces:
            if isinstance(piece, str):
                ids += ids_of[piece]
                continue
            grid, token = piece
            if runs == num_asked:
                first = len(ids)
            runs += 1
            ids += self._template.visual(self.adapter.num_tokens(grid), token)
        ids += self._after
        return _Row(ids, len(ids) if first is None else first, seen)

    def _append(self, pieces: list[_Piece], parts: Iterable[str | Picture | Video]) -> list[_Seen]:
        """Put a record behind what is there; texts side by side become one. Returns its pictures."""
        seen: list[_Seen] = []
        for part in self._cut(list(parts)):
            if isinstance(part, str):
                _say(pieces, part)
                continue
            visual = self._visual(part)
            seen.append((part.path, visual))
            for grid, label in zip(visual.grids, visual.labels, strict=True):
                _say(pieces, label)
                pieces.append((grid, visual.token))
        return seen

    def _visual(self, part: Picture | Video) -> Visual:
        visual = self._visuals.get(part.path)
        if visual is None:
            visual = self._reader.read(part)
            self._visuals.put(part.path, visual)
        return visual

    def _positions(self, ids: np.ndarray, seen: Iterable[_Seen], *, start: int) -> np.ndarray:
        runs = [(grid, visual.tick) for _, visual in seen for grid in visual.grids]
        grids, ticks = [grid for grid, _ in runs], [tick for _, tick in runs]
        return mrope_positions(ids, grids, adapter=self.adapter, ticks=ticks, start=start)

    def _cut(self, parts: list[str | Picture | Video]) -> list[str | Picture | Video]:
        """Of a record's words the first `max_text_tokens` tokens."""
        room = self.settings.max_text_tokens
        words = [place for place, part in enumerate(parts) if isinstance(part, str)]
        if sum(len(str(parts[place]).encode()) for place in words) <= room:
            return parts  # a token has a byte at least
        for place, ids in zip(words, self._encode([str(parts[place]) for place in words]), strict=True):
            if len(ids) > room:
                parts[place] = self._tokenizer.decode(ids[:room])
            room = max(0, room - len(ids))
        return parts

    def _encode(self, texts: list[str]) -> list[list[int]]:
        return [encode(self._tokenizer, text) for text in texts]

    def _one_id(self, word: str) -> int:
        (ids,) = self._encode([word])
        if len(ids) != 1:
            raise CheckpointError(
                f"the tokenizer cuts {word!r} into {len(ids)} tokens; a score needs one. "
                "Use a Qwen tokenizer."
            )
        return ids[0]


def _say(pieces: list[_Piece], words: str) -> None:
    if words and pieces and isinstance(pieces[-1], str):
        pieces[-1] += words
    elif words:
        pieces.append(words)


def _common_prefix(rows: Sequence[list[int]]) -> int:
    """Tokens that all rows share at their head; at least one token of each row is left over."""
    shortest = min(map(len, rows)) - 1
    first, last = min(rows), max(rows)  # in lexical order, all others lie between them
    return next((i for i in range(shortest) if first[i] != last[i]), shortest)


def pack_trees(
    trees: Sequence[Tree], *, device: torch.device
) -> tuple[EncoderInputs, PackedLayout, list[Shown]]:
    """Lay trees end to end; tell attention who sees whom, and which picture stands where.

    Returns:
        The packed row without patches, its layout, and what it shows in the order of the tokens: a picture
        that stands in several places is named at each.
    """
    lengths = tuple(tree.num_tokens for tree in trees)
    inputs = EncoderInputs(
        ids_T=torch.from_numpy(np.concatenate([tree.ids for tree in trees]).astype(np.int64)),
        positions_3T=torch.from_numpy(np.concatenate([tree.positions for tree in trees], axis=1)),
        pooled_T=torch.ones(sum(lengths), dtype=torch.bool),
        lengths_N=lengths,
        visuals=None,
    )
    return inputs.to(device), _layout(trees, device), [one for tree in trees for one in tree.shown]


@dataclass(frozen=True, slots=True)
class _Span:
    """Tokens that see themselves, looking back, and all of a prefix; a prefix itself has none."""

    start: int
    length: int
    prefix_start: int = 0
    prefix_length: int = 0


def _layout(trees: Sequence[Tree], device: torch.device) -> PackedLayout:
    """Prefixes side by side, and candidates of like length: padding in a block stays under a third."""
    spans, start = [], 0
    for tree in trees:
        bounds = (start + tree.bounds()).tolist()
        prefix = bounds[1] - bounds[0]
        spans.append(_Span(bounds[0], prefix))
        spans += [_Span(first, last - first, bounds[0], prefix) for first, last in pairwise(bounds[1:])]
        start = bounds[-1]
    blocks, place = [], 0
    restore_T = np.empty(start, dtype=np.int64)
    for group in _alike([span for span in spans if span.length]):
        block, real_BL = _block(group)
        restore_T[block[0][real_BL]] = place + np.flatnonzero(real_BL)
        place += real_BL.size
        index_BL, keys_BS, mask = (
            None if array is None else torch.from_numpy(array).to(device, non_blocking=True)
            for array in block
        )
        assert index_BL is not None
        blocks.append(Block(index_BL=index_BL, mask=mask, causal=mask is None, keys_BS=keys_BS))
    return PackedLayout.of_blocks(blocks, num_tokens=start, restore_T=torch.from_numpy(restore_T).to(device))


def _alike(spans: Sequence[_Span]) -> list[list[_Span]]:
    """Groups of spans whose lengths, and whose prefixes' lengths, differ little."""

    def size(span: _Span) -> tuple[int, int]:
        return -int(log(1 + span.prefix_length) / -log(_MIN_FILL)), -span.length

    groups: list[list[_Span]] = []
    for span in sorted(spans, key=size):
        if (
            groups
            and size(groups[-1][0])[0] == size(span)[0]
            and span.length >= _MIN_FILL * groups[-1][0].length
        ):
            groups[-1].append(span)
        else:
            groups.append([span])
    return groups


def _block(
    group: Sequence[_Span],
) -> tuple[tuple[np.ndarray, np.ndarray | None, np.ndarray | None], np.ndarray]:
    """Places (B, L) of tokens that look, places (B, S) looked at and the mask; and which (B, L) are real."""
    start_B, length_B, prefix_start_B, prefix_B = np.array(
        [(span.start, span.length, span.prefix_start, span.prefix_length) for span in group]
    ).T
    column_L = np.arange(length_B.max())
    real_BL = column_L < length_B[:, None]
    index_BL = start_B[:, None] + np.where(real_BL, column_L, 0)
    longest = prefix_B.max()
    if longest == 0:
        return (index_BL, None, None), real_BL
    # Prefixes end where their candidates begin: a shorter one is padded in front.
    place_BP = np.arange(longest) - (longest - prefix_B[:, None])
    keys_BS = np.concatenate([prefix_start_B[:, None] + place_BP.clip(min=0), index_BL], axis=1)
    if (prefix_B == longest).all():
        place_BP = place_BP[:1]
    back_LL = column_L <= column_L[:, None]
    rows = len(place_BP), len(column_L)
    mask = np.concatenate(
        [
            np.broadcast_to((place_BP >= 0)[:, None], (*rows, longest)),
            np.broadcast_to(back_LL, (*rows, len(column_L))),
        ],
        axis=2,
    )
    return (index_BL, keys_BS, mask[:, None]), real_BL
