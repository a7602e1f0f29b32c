"""What differs between the backbones: one small adapter each, chosen by the Transformers config.

An adapter knows its pictures (patch size, normalisation), how its vision tower is called without a word from
the device, what the decoder wants besides tokens, and how a video stands in the prompt. P patches, V vision
tokens, D width, T tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from umarvel_ray.errors import CheckpointError
from umarvel_ray.model.attention import PackedLayout
from umarvel_ray.model.images import Grid, normalise_patches
from umarvel_ray.model.modules import takes_stills

_CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_HALF = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)


@dataclass(frozen=True, slots=True)
class VisionFeatures:
    """What a tower makes of pictures.

    Attributes:
        merged_VD: In place of the embeddings of the vision tokens.
        deep: Added to the states of those tokens behind the first decoder layers, one (V, D) for each;
            DeepStack, arXiv:2406.04334. Empty where the backbone has none.
    """

    merged_VD: Tensor
    deep: tuple[Tensor, ...] = ()

    @property
    def joined_VF(self) -> Tensor:
        """All of them side by side: (V, D · (1 + number of deep ones))."""
        return torch.cat([self.merged_VD, *self.deep], dim=1)

    @classmethod
    def split(cls, joined_VF: Tensor, *, num_deep: int) -> "VisionFeatures":
        """The other way."""
        merged_VD, *deep = joined_VF.chunk(1 + num_deep, dim=1)
        return cls(merged_VD, tuple(deep))


class Qwen2VL:
    """Qwen2-VL; the others differ from it where they say so."""

    model_type: ClassVar[str] = "qwen2_vl"
    processor: ClassVar[str] = "Qwen2VLProcessor"
    """Transformers' name for what prepares its inputs."""
    normalisation: ClassVar[tuple[tuple[float, ...], tuple[float, ...]]] = _CLIP
    num_deep: int = 0

    def __init__(self, config: Any) -> None:
        vision = config.vision_config
        self.patch_size: int = vision.patch_size
        self.merge_size: int = vision.spatial_merge_size
        self.temporal: int = vision.temporal_patch_size
        self.image_token: int = config.image_token_id
        self.video_token: int = config.video_token_id
        text = config.get_text_config()
        if "sliding_attention" in (getattr(text, "layer_types", None) or ()):
            raise CheckpointError(
                "the config asks for sliding-window attention (use_sliding_window), which no released "
                "backbone uses. Set use_sliding_window to false in config.json."
            )

    @property
    def unit(self) -> int:
        """Pixels along one side of an image token."""
        return self.patch_size * self.merge_size

    def num_tokens(self, grid: Grid) -> int:
        """Vision tokens of a picture or video."""
        return grid[0] * grid[1] * grid[2] // self.merge_size**2

    def video_tick(self, pairs_per_second: float) -> float:
        """How many temporal positions lie between two pairs of frames, with `mrope` positions."""
        return 1.0

    def video_grids(self, grid: Grid) -> tuple[Grid, ...]:
        """A video as the prompt shows it: one run of vision tokens, or one for each pair of frames."""
        return (grid,)

    def video_label(self, seconds: float) -> str:
        """Words before a run of a video's tokens."""
        return ""

    def tower(self, core: Any, patches_P: Tensor, grids: Sequence[Grid]) -> VisionFeatures:
        """Patches (uint8, all pictures end to end) → features.

        Equal grids form one dense block; nothing is asked back from the device on the way.
        """
        mean, deviation = self.normalisation
        frames = 1 if takes_stills(core) else self.temporal
        pixels = normalise_patches(
            patches_P, mean=mean, deviation=deviation, patch_size=self.patch_size, temporal=frames
        ).to(core.visual.dtype)
        grid_thw = torch.tensor(grids)
        plan = self._plan(core.visual, grid_thw, pixels)
        output = core.visual(pixels, grid_thw=grid_thw.to(pixels.device), **plan)
        return VisionFeatures(output.pooler_output, tuple(getattr(output, "deepstack_features", None) or ()))

    def _plan(self, tower: Any, grid_thw: Tensor, pixels: Tensor) -> dict[str, Any]:
        """Keywords that spare the tower questions to the device; none where Transformers knows none."""
        try:
            from transformers.vision_utils import get_vision_cu_seqlens

            positions = [_patch_positions(tuple(grid), self.merge_size) for grid in grid_thw.tolist()]
        except ImportError:
            return {}
        bounds = get_vision_cu_seqlens(grid_thw)
        layout, on_device = self._layout(bounds, pixels)
        return {
            "cu_seqlens": on_device,
            "max_seqlen": int(torch.diff(bounds).max()),
            "position_ids": torch.cat(positions).to(pixels.device),
            "tower_layouts": ((on_device, layout),),
        }

    @staticmethod
    def _layout(bounds: Tensor, pixels: Tensor) -> tuple[PackedLayout, Tensor]:
        lengths = torch.diff(bounds).tolist()
        layout = PackedLayout.of_lengths(lengths, causal=False, device=pixels.device, dtype=pixels.dtype)
        return layout, bounds.to(pixels.device)

    def decoder_inputs(self, is_vision_NT: Tensor, features: VisionFeatures | None) -> dict[str, Any]:
        """What the decoder wants besides embeddings and positions, for rows of tokens."""
        return {}


@lru_cache(maxsize=1024)
@torch.inference_mode(False)  # what is kept serves training too, whoever asks first
def _patch_positions(grid: Grid, merge_size: int) -> Tensor:
    """Row and column of each patch of a picture, (P, 2); most pictures of a pool are of few sizes."""
    from transformers.vision_utils import get_vision_position_ids

    return get_vision_position_ids(torch.tensor([grid]), merge_size)


class Qwen25VL(Qwen2VL):
    """Qwen2.5-VL: windows in most layers of the tower, and videos whose positions follow the clock."""

    model_type = "qwen2_5_vl"
    processor = "Qwen2_5_VLProcessor"

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self._tokens_per_second: float = config.vision_config.tokens_per_second

    def video_tick(self, pairs_per_second: float) -> float:
        return self._tokens_per_second / pairs_per_second

    def _plan(self, tower: Any, grid_thw: Tensor, pixels: Tensor) -> dict[str, Any]:
        plan = super()._plan(tower, grid_thw, pixels)
        if not plan:
            return plan
        from transformers.vision_utils import get_vision_window_index

        order, bounds = get_vision_window_index(
            grid_thw,
            spatial_merge_size=self.merge_size,
            window_size=tower.window_size,
            patch_size=self.patch_size,
        )
        layout, on_device = self._layout(bounds, pixels)
        return plan | {
            "window_index": order.to(pixels.device),
            "cu_window_seqlens": on_device,
            "max_window_seqlen": int(torch.diff(bounds).max()),
            "tower_layouts": (*plan["tower_layouts"], (on_device, layout)),
        }


class Qwen3VL(Qwen2VL):
    """Qwen3-VL: larger patches, features of inner layers of the tower, and times in words before frames."""

    model_type = "qwen3_vl"
    processor = "Qwen3VLProcessor"
    normalisation = _HALF

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.num_deep = len(config.vision_config.deepstack_visual_indexes)

    def video_grids(self, grid: Grid) -> tuple[Grid, ...]:
        pairs, height, width = grid
        return ((1, height, width),) * pairs

    def video_label(self, seconds: float) -> str:
        return f"<{seconds:.1f} seconds>"

    def _plan(self, tower: Any, grid_thw: Tensor, pixels: Tensor) -> dict[str, Any]:
        plan = super()._plan(tower, grid_thw, pixels)
        if not plan:
            return plan
        from transformers.vision_utils import get_vision_interpolation_indices_and_weights

        indices, weights = get_vision_interpolation_indices_and_weights(
            grid_thw,
            num_grid_per_side=tower.num_grid_per_side,
            mode=tower.interpolation_mode,
            align_corners=tower.interpolation_align_corners,
            spatial_merge_size=self.merge_size,
        )
        return plan | {
            "interp_indices": indices.to(pixels.device),
            "interp_weights": weights.to(pixels.device),
        }

    def decoder_inputs(self, is_vision_NT: Tensor, features: VisionFeatures | None) -> dict[str, Any]:
        if features is None:
            return {}
        return {"visual_pos_masks": is_vision_NT, "deepstack_visual_embeds": list(features.deep)}


Adapter = Qwen2VL
"""What all of them offer."""

ADAPTERS: dict[str, type[Adapter]] = {kind.model_type: kind for kind in (Qwen2VL, Qwen25VL, Qwen3VL)}


def adapter_for(config: Any, path: str) -> Adapter:
    """The adapter of a Transformers config.

    Raises:
        CheckpointError: No backbone that can be an encoder here.
    """
    if config.model_type not in ADAPTERS:
        raise CheckpointError(
            f"{path}: the backbone is {config.model_type!r}; those known are {', '.join(ADAPTERS)}."
        )
    try:
        return ADAPTERS[config.model_type](config)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
