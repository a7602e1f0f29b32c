"""Pictures and videos of a record, as the prompt and the vision tower take them; laying them end to end.

P patches, V vision tokens, T tokens, F width of stored features.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from umarvel_ray.data.records import Picture, Video
from umarvel_ray.model.adapters import Adapter
from umarvel_ray.model.images import Grid, load_patches
from umarvel_ray.model.settings import ImageSettings, VideoSettings
from umarvel_ray.model.videos import load_video
from umarvel_ray.model.vision_store import Key, VisionStore


@dataclass(frozen=True, slots=True, eq=False)
class Visual:
    """A picture, or the frames of a video.

    Attributes:
        patches: uint8 (P, 3·patch²), for a video (P, 3·2·patch²); None where `features` are at hand.
        grids: One for each run of vision tokens in the prompt.
        token: Stands for each of its vision tokens.
        labels: Words before each run; empty for none.
        tick: Temporal positions between two pairs of frames.
        key: Under which the vision store is to keep its features; None without a store.
        features: (V, F) as stored.
    """

    patches: np.ndarray | None
    grids: tuple[Grid, ...]
    token: int
    labels: tuple[str, ...] = ("",)
    tick: float = 1.0
    key: Key | None = None
    features: Tensor | None = None

    @property
    def num_bytes(self) -> int:
        """Memory held."""
        return sum(part.nbytes for part in (self.patches, self.features) if part is not None)


class VisualReader:
    """Reads files with a backbone's patch size and the checkpoint's caps."""

    def __init__(
        self,
        adapter: Adapter,
        images: ImageSettings,
        videos: VideoSettings | None = None,
        *,
        store: VisionStore | None = None,
    ) -> None:
        self.adapter = adapter
        self.store = store
        self.images = images
        self.videos = videos or VideoSettings()

    def read(self, part: Picture | Video) -> Visual:
        """Decode, resize and cut.

        Raises:
            DataError: The file is missing, broken, or of a shape that cannot be.
        """
        adapter = self.adapter
        sizes = {"patch_size": adapter.patch_size, "merge_size": adapter.merge_size}
        if isinstance(part, Picture):
            content, stored = self.store.get(part.path) if self.store is not None else (None, None)
            if stored is not None:
                features, grid = stored
                return Visual(None, (grid,), adapter.image_token, features=features)
            patches, grid = load_patches(part.path, self.images, **sizes)
            key = Key(content, grid) if content is not None else None
            return Visual(patches, (grid,), adapter.image_token, key=key)
        patches, grid, times = load_video(part.path, self.videos, **sizes)
        grids = adapter.video_grids(grid)
        pairs_per_second = 1 / (times[1] - times[0]) if len(times) > 1 and times[1] > times[0] else 1.0
        return Visual(
            patches=patches,
            grids=grids,
            token=adapter.video_token,
            labels=tuple(adapter.video_label(seconds) for seconds in times[: len(grids)]),
            tick=adapter.video_tick(pairs_per_second),
        )


@dataclass(frozen=True, slots=True)
class PackedVisuals:
    """All visuals of a micro-batch, in the order of their tokens.

    Attributes:
        patches_P: uint8, of those the tower has yet to see; None where all are stored.
        grids: Of these.
        keys: Of these, the key in the vision store, None where a visual is not kept; and its vision tokens.
        stored_VF: Features of the others; None where there are none.
        is_stored_V: bool, which of all vision tokens are theirs; None without `stored_VF`.
    """

    patches_P: Tensor | None
    grids: tuple[Grid, ...]
    keys: tuple[tuple[Key | None, int], ...]
    stored_VF: Tensor | None = None
    is_stored_V: Tensor | None = None

    def to(self, device: torch.device) -> "PackedVisuals":
        """The same on `device`."""
        patches, stored, is_stored = (
            None if part is None else part.to(device, non_blocking=True)
            for part in (self.patches_P, self.stored_VF, self.is_stored_V)
        )
        return PackedVisuals(patches, self.grids, self.keys, stored, is_stored)


def pack_visuals(visuals: Sequence[Visual], adapter: Adapter) -> PackedVisuals | None:
    """Lay visuals end to end; None where there are none."""
    if not visuals:
        return None
    counts = [sum(map(adapter.num_tokens, visual.grids)) for visual in visuals]
    fresh = [visual for visual in visuals if visual.patches is not None]
    stored = [visual.features for visual in visuals if visual.features is not None]
    patches = [visual.patches for visual in fresh if visual.patches is not None]
    if len({part.shape[1] for part in patches}) > 1:  # stills beside a video: they fill both of its frames
        patches = [_as_frames(part, adapter) for part in patches]
    return PackedVisuals(
        patches_P=torch.from_numpy(np.concatenate(patches)) if patches else None,
        grids=tuple(grid for visual in fresh for grid in visual.grids),
        keys=tuple(
            (visual.key, count)
            for visual, count in zip(visuals, counts, strict=True)
            if visual.patches is not None
        ),
        stored_VF=torch.cat(stored) if stored else None,
        is_stored_V=torch.from_numpy(np.repeat([v.patches is None for v in visuals], counts))
        if stored
        else None,
    )


def _as_frames(patches: np.ndarray, adapter: Adapter) -> np.ndarray:
    area = adapter.patch_size**2
    if patches.shape[1] > 3 * area:
        return patches
    return np.repeat(patches.reshape(-1, 3, 1, area), adapter.temporal, axis=2).reshape(len(patches), -1)


def mrope_positions(
    ids: np.ndarray,
    grids: Sequence[Grid],
    *,
    adapter: Adapter,
    ticks: Sequence[float] | None = None,
    start: int = 0,
) -> np.ndarray:
    """Rotary positions (3, T): text counts on, a picture spans its (frames, height, width) grid.

    Args:
        ids: Token ids, (T,).
        grids: Of the runs of vision tokens in `ids`, in order.
        adapter: The backbone's.
        ticks: For each grid, temporal positions between its frames; 1 where left out.
        start: The first position.

    Source: Wang et al. 2024, section 2.1, arXiv:2409.12191.
    """
    positions = np.empty((3, len(ids)), dtype=np.int64)
    place, following = 0, start
    runs = iter(zip(grids, ticks or [1.0] * len(grids), strict=True))
    is_vision = (ids == adapter.image_token) | (ids == adapter.video_token)
    while place < len(ids):
        if is_vision[place]:
            (frames, *sides), tick = next(runs)
            height, width = (side // adapter.merge_size for side in sides)
            num = frames * height * width
            times = (np.arange(frames) * tick).astype(np.int64)
            positions[0, place : place + num] = following + np.repeat(times, height * width)
            positions[1, place : place + num] = following + np.tile(
                np.repeat(np.arange(height), width), frames
            )
            positions[2, place : place + num] = following + np.tile(np.arange(width), frames * height)
            following += max(height, width)
        else:
            num = int(np.argmax(is_vision[place:])) or len(ids) - place
            positions[:, place : place + num] = following + np.arange(num)
            following += num
        place += num
    return positions
