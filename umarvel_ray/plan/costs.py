"""What one record costs a model, from the shapes of its layers.

A FLOP is a multiplication or an addition. Source of the formulas: the matrix products of a Qwen2-VL layer and
of its vision tower, written out; nothing else in them counts at these sizes.
"""

import json
from dataclasses import dataclass
from typing import Any

from umarvel_ray.errors import CheckpointError
from umarvel_ray.storage import at


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a backbone.

    Attributes:
        name: For people.
        layers, hidden, inner, heads, kv_heads, head_dim, vocab: The decoder's.
        vision_depth, vision_width, vision_inner: The vision tower's.
        patch: Side of a patch in pixels; a still image fills two frames.
        merge: Patches along one side of an image token.
    """

    name: str
    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    vision_depth: int = 32
    vision_width: int = 1280
    vision_inner: int = 5120
    patch: int = 14
    merge: int = 2

    @property
    def attention_width(self) -> int:
        """Width of all heads together."""
        return self.heads * self.head_dim

    @property
    def decoder_params(self) -> int:
        """Weights of the decoder's matrix products; embedding table and output head apart."""
        kv = self.kv_heads * self.head_dim
        attention = 2 * self.hidden * self.attention_width + 2 * self.hidden * kv
        return self.layers * (attention + 3 * self.hidden * self.inner)

    @property
    def vision_params(self) -> int:
        """Weights of the vision tower and of its merger."""
        merged = self.merge**2 * self.vision_width
        block = 4 * self.vision_width**2 + 2 * self.vision_width * self.vision_inner
        patches = 6 * self.patch**2 * self.vision_width
        return self.vision_depth * block + patches + merged * (merged + self.hidden)

    @property
    def params(self) -> int:
        """All weights; the output head shares the embedding table or is its twin."""
        return self.decoder_params + self.vision_params + 2 * self.vocab * self.hidden

    def lora_params(self, rank: int) -> int:
        """Weights of adapters of this rank on every linear layer of the decoder."""
        kv = self.kv_heads * self.head_dim
        sides = (
            2 * (self.hidden + self.attention_width) + 2 * (self.hidden + kv) + 3 * (self.hidden + self.inner)
        )
        return self.layers * rank * sides

    def decode(self, tokens: float, *, seen: float | None = None) -> float:
        """FLOP of one pass over `tokens` tokens that each look at `seen`; at one another by default."""
        looks = 4 * self.layers * tokens * (tokens if seen is None else seen) * self.attention_width
        return 2 * self.decoder_params * tokens + looks

    def see(self, image_tokens: float) -> float:
        """FLOP of the vision tower for one image of so many tokens in the decoder."""
        patches = self.merge**2 * image_tokens
        merged = self.merge**2 * self.vision_width
        block = 4 * self.vision_width**2 + 2 * self.vision_width * self.vision_inner
        return (
            2 * self.vision_depth * block * patches
            + 4 * self.vision_depth * patches**2 * self.vision_width
            + 2 * patches * 6 * self.patch**2 * self.vision_width
            + 2 * image_tokens * merged * (merged + self.hidden)
        )


QWEN2_VL_2B = ModelShape("Qwen2-VL-2B", 28, 1536, 8960, 12, 2, 128, 151936)
QWEN2_VL_7B = ModelShape("Qwen2-VL-7B", 28, 3584, 18944, 28, 4, 128, 152064)
_KNOWN = (QWEN2_VL_2B, QWEN2_VL_7B)


def shape_of(backbone: str) -> ModelShape:
    """Sizes of the backbone in a Transformers folder; of a released one by name where the folder is not here.

    Raises:
        CheckpointError: Neither the folder nor the name is known.
    """
    config = at(backbone) / "config.json"
    if not backbone.startswith("hf://") and config.exists():
        return _read_shape(json.loads(config.read_text(encoding="utf-8")), name=at(backbone).name)
    for shape in _KNOWN:
        if shape.name.lower() in backbone.lower():
            return shape
    raise CheckpointError(
        f"{backbone}: no config.json there, and no backbone known by that name, so its costs are unknown. "
        f"Give its folder, or name one of: {', '.join(shape.name for shape in _KNOWN)}."
    )


def _read_shape(config: dict[str, Any], *, name: str) -> ModelShape:
    text = config.get("text_config") or config
    vision = config.get("vision_config") or {}
    heads = text["num_attention_heads"]
    # Qwen2-VL calls the tower's width `embed_dim` and keeps `hidden_size` for the decoder's; later do not.
    width = vision.get("embed_dim") or vision.get("hidden_size", 1280)
    return ModelShape(
        name=name,
        layers=text["num_hidden_layers"],
        hidden=text["hidden_size"],
        inner=text["intermediate_size"],
        heads=heads,
        kv_heads=text.get("num_key_value_heads", heads),
        head_dim=text.get("head_dim") or text["hidden_size"] // heads,
        vocab=text.get("vocab_size") or config.get("vocab_size", 0),
        vision_depth=vision.get("depth", 32),
        vision_width=width,
        vision_inner=vision.get("intermediate_size") or int(width * vision.get("mlp_ratio", 4)),
        patch=vision.get("patch_size", 14),
        merge=vision.get("spatial_merge_size", 2),
    )
