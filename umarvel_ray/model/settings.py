"""What decides an embedding or a score, besides the weights. Importing this loads no torch."""

from typing import Annotated, Literal, Self, get_args

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from umarvel_ray.config import Config

DtypeName = Literal["float32", "bfloat16", "float16"]
ENCODER_FILE = "embedding.json"
"""Beside an encoder's weights: what decides an embedding besides them."""


class ImageSettings(Config):
    """How large an image may be, in pixels after resizing; 28·28 pixels make one image token, with
    Qwen3-VL 32·32."""

    min_pixels: PositiveInt = 4 * 28 * 28
    max_pixels: PositiveInt = 300 * 28 * 28

    @model_validator(mode="after")
    def _one_token_fits(self) -> Self:
        if self.max_pixels < max(self.min_pixels, 28 * 28):
            raise ValueError(
                f"max_pixels is {self.max_pixels}, less than min_pixels ({self.min_pixels}) "
                f"or one image token ({28 * 28}). Raise max_pixels."
            )
        return self


class VideoSettings(Config):
    """Which frames of a video are read, and how large. The defaults are the authors'."""

    frames_per_second: PositiveFloat = 2.0
    min_frames: PositiveInt = 4
    max_frames: PositiveInt = 768
    """Frames are spread evenly over the whole video; an even number of them is read."""
    min_pixels: PositiveInt = 128 * 28 * 28
    """Of one frame."""
    max_pixels: PositiveInt = 768 * 28 * 28
    """Of one frame."""
    total_pixels: PositiveInt = 24576 * 28 * 28
    """Of two frames in turn, all together; long videos get smaller frames, down to `min_pixels`."""

    @model_validator(mode="after")
    def _bounds_are_in_order(self) -> Self:
        for low, high in (("min_frames", "max_frames"), ("min_pixels", "max_pixels")):
            if getattr(self, low) > getattr(self, high):
                raise ValueError(
                    f"{high} is {getattr(self, high)}, less than {low} ({getattr(self, low)}). Raise it."
                )
        return self


class EncoderSettings(Config):
    """Everything that decides an embedding, besides the weights; a checkpoint has it as `embedding.json`."""

    attention: Literal["bidirectional", "causal"] = "bidirectional"
    pooling: Literal["mean", "last"] = "mean"
    """`last` is the hidden state just before `<emb>`."""
    compression_prompt: bool = False
    """Ask for a summary "in one word": only the last-token ablations use it."""
    compression_verb: Literal["Summarize", "Summary"] = "Summarize"
    """How that request begins: LamRA's way, or E5-V's and UniME's."""
    instruction: Literal["masked", "pooled", "none"] = "masked"
    """`masked`: read, but left out of the mean, markers included. `pooled`: plain words. `none`: not read."""
    positions: Literal["sequential", "mrope"] = "sequential"
    append_generation_prompt: bool = False
    """The authors' evaluation did, their training did not."""
    images: ImageSettings = ImageSettings()
    videos: VideoSettings = VideoSettings()
    max_text_tokens: PositiveInt = 480
    """Tokens of a query (instruction included) or candidate text, cut before templating."""


RERANKER_PROMPTS = {
    "plain": (
        "I will provide you with a query and a candidate. Please evaluate whether the candidate meets the "
        "requirements of the query. If it does, respond with 'Yes'; if it doesn't, respond with 'No'."
    ),
    "authors": (
        "I will provide you with a query and a candidate. Please evaluate whether the candidate"
        + " " * 24
        + " meets the requirements of the query. "
        "If it does, respond with 'Yes'; if it doesn't, responed with 'No'."
    ),
}
"""What stands before a query and a candidate."""


class RerankerSettings(Config):
    """Everything that decides a score, besides the weights; every checkpoint has it as `reranker.json`."""

    prompt: Literal["plain", "authors"] = "plain"
    """`authors` reproduces their literal, spaces and typing error included, for their checkpoint."""
    images: ImageSettings = ImageSettings()
    max_text_tokens: PositiveInt = 256
    """Tokens of a query (instruction included) or candidate text."""


DecoderLinear = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
"""The linear layers that every backbone read here has."""


class LoraSettings(Config):
    """Low-rank adapters on every linear layer of the decoder."""

    rank: PositiveInt = 128
    alpha: PositiveInt = 256
    dropout: NonNegativeFloat = 0.05
    targets: Annotated[tuple[DecoderLinear, ...], Field(min_length=1)] = get_args(DecoderLinear)
    """Which linear layers of each decoder layer; all of them by default."""
