"""Whose model embeds: ours, a pair of towers such as CLIP, or a Sentence Transformer. Importing this loads
no torch; `load_embedder` does.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol, Self

from pydantic import Field, model_validator

from umarvel_ray.config import Config
from umarvel_ray.data.records import Candidate, Query
from umarvel_ray.errors import CheckpointError
from umarvel_ray.model.settings import DtypeName, EncoderSettings
from umarvel_ray.storage import local_model

if TYPE_CHECKING:
    from torch import Tensor

_LAST_TOKEN = EncoderSettings(attention="causal", pooling="last", instruction="pooled", positions="mrope")
STYLES: dict[str, EncoderSettings] = {
    "lamra": _LAST_TOKEN.model_copy(update={"compression_prompt": True, "positions": "sequential"}),
    "e5v": _LAST_TOKEN.model_copy(update={"compression_prompt": True, "compression_verb": "Summary"}),
    "unime": _LAST_TOKEN.model_copy(update={"compression_prompt": True, "compression_verb": "Summary"}),
    "vlm2vec": _LAST_TOKEN,
}
"""Last-token embedders of the literature on our backbones: causal, the instruction read as plain words, the
state before the answer's end. All but VLM2Vec ask for "one word"; LamRA trains with plain positions."""


class OurSystem(Config):
    """A checkpoint of ours, or a Qwen-VL folder with the settings of an embedder."""

    kind: Literal["umarvel"] = "umarvel"
    encoder: EncoderSettings | None = None
    """For a folder that has no `embedding.json`; a checkpoint of ours brings its own."""
    style: Literal["lamra", "e5v", "vlm2vec", "unime"] | None = None
    """Short for the `encoder` settings of a last-token embedder."""

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if self.encoder is not None and self.style is not None:
            raise ValueError("encoder and style both say how to embed. Keep one")
        return self

    @property
    def settings(self) -> EncoderSettings | None:
        """What `Encoder.load` is told."""
        return STYLES[self.style] if self.style else self.encoder


class TowersSystem(Config):
    """Any Transformers model with a text and an image tower in one space: CLIP, SigLIP, SigLIP 2."""

    kind: Literal["towers"]
    fusion: Literal["features", "unit"] = "features"
    """A record with text and image is the weighted sum of its two vectors, so that scores add up (UniIR's
    CLIP_SF): of the towers' outputs as they come, or made unit length first."""
    image_weight: Annotated[float, Field(ge=0, le=1)] = 0.5
    instruction: Literal["none", "prepended"] = "none"
    """Stock CLIP was not trained on instructions; UniIR's was."""


class SentenceTransformerSystem(Config):
    """Any Sentence Transformers model; one that reads pictures for data with pictures."""

    kind: Literal["sentence_transformers"]
    instruction: Literal["prompt", "none"] = "prompt"
    """`prompt`: each query's instruction is the `prompt` of its `encode`."""
    fusion: Literal["joint", "sum"] = "joint"
    """A record with text and image goes in as one input, or as the sum of two unit vectors where the model
    takes one at a time."""
    trust_remote_code: bool = False


System = Annotated[OurSystem | TowersSystem | SentenceTransformerSystem, Field(discriminator="kind")]


class Builder(Protocol):
    """Record → what the model takes."""

    def build(self, record: Query | Candidate) -> Any:
        """One prepared record, with its `num_tokens`."""
        ...


class Embedder(Protocol):
    """What an embedding job needs of a model."""

    @property
    def builder(self) -> Builder:
        """What prepares its records."""
        ...

    def embed_items(self, items: Any, *, max_tokens: int = 8192) -> "Tensor":
        """(N, D) float32 on the CPU, unit norm, in the order of the items."""
        ...


def load_embedder(
    path: str, system: System, *, device: str = "cpu", dtype: DtypeName = "float32"
) -> Embedder:
    """Load the model of an embedding job.

    Args:
        path: A folder, or `hf://OWNER/NAME`.
        system: Whose model it is.
        device: Torch device.
        dtype: In which it computes.

    Raises:
        CheckpointError: Nothing loadable there, or the folder is of another kind.
    """
    path = local_model(path)
    folder = path.removeprefix("hf://")
    if not path.startswith("hf://") and not Path(path).is_dir():
        raise CheckpointError(f"{path}: no such folder, so no model. Give a folder or hf://OWNER/NAME.")
    if isinstance(system, TowersSystem):
        from umarvel_ray.model.foreign import Towers

        return Towers.load(folder, system, device=device, dtype=dtype)
    if isinstance(system, SentenceTransformerSystem):
        from umarvel_ray.model.foreign import SentenceModel

        return SentenceModel.load(folder, system, device=device, dtype=dtype)
    from umarvel_ray.model.encoder import Encoder

    return Encoder.load(path, settings=system.settings, device=device, dtype=dtype)
