"""What every embedding must be before it leaves the encoder; an error says what is likely to be wrong."""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from umarvel_ray.errors import EmbeddingError
from umarvel_ray.model.inputs import Item

_NORM_TOLERANCE = 1e-3
_SAME = 1e-6
"""Rows of different inputs are further apart than this wherever a model reads its input."""


def check_embeddings(embedding_ND: Tensor, items: Sequence[Item], *, source: str) -> None:
    """Finite, of unit norm, and not the same for different inputs.

    Args:
        embedding_ND: float32, on the CPU.
        items: What was embedded.
        source: The checkpoint, for the error.

    Raises:
        EmbeddingError: One of these does not hold.
    """
    bad_N = ~embedding_ND.isfinite().all(1)
    if bad_N.any():
        raise EmbeddingError(
            f"{source}: {int(bad_N.sum())} of {len(items)} embeddings are not finite (first: number "
            f"{int(bad_N.nonzero()[0])}). Its weights hold NaN, or float16 is too narrow for it: look at the "
            "training's gradient norms, or compute in bfloat16 or float32."
        )
    off_N = (embedding_ND.norm(dim=1) - 1).abs() > _NORM_TOLERANCE
    if off_N.any():
        first = int(off_N.nonzero()[0])
        raise EmbeddingError(
            f"{source}: {int(off_N.sum())} of {len(items)} embeddings are not of unit norm (first: number "
            f"{first}, norm {float(embedding_ND[first].norm()):.4g}). Hidden states are all but zero: the "
            "weights were not loaded, or not all of them."
        )
    for kind, with_pictures in (("texts", False), ("records with pictures", True)):
        rows = [row for row, item in enumerate(items) if bool(item.visuals) == with_pictures]
        if len(rows) < 2 or (embedding_ND[rows] - embedding_ND[rows[0]]).abs().max() > _SAME:
            continue
        if len({_content(items[row]) for row in rows}) > 1:
            cause = (
                "the features of the vision tower do not reach the decoder"
                if with_pictures
                else "the weights of the decoder were not loaded, or the pooled token sees none of the text"
            )
            raise EmbeddingError(
                f"{source}: {len(rows)} different {kind} have the same embedding: {cause}. Check the "
                "checkpoint and its attention and pooling settings."
            )


def _content(item: Item) -> bytes:
    digest = hashlib.blake2b(item.ids.tobytes(), digest_size=16)
    for visual in item.visuals:
        if visual.patches is not None:
            digest.update(visual.patches.tobytes())
        elif visual.features is not None:
            digest.update(visual.features.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.digest()
