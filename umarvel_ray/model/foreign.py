"""Embedders that are not ours, behind the same two verbs: `builder.build(record)` and `embed_items(items)`.

N items, D width. Vectors are unit length; what could not be read whole (a text cut at the tower's length) is
counted and told once.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from umarvel_ray.data.records import Candidate, Query
from umarvel_ray.errors import CheckpointError, DataError
from umarvel_ray.model.images import open_image
from umarvel_ray.model.settings import DtypeName
from umarvel_ray.model.systems import SentenceTransformerSystem, TowersSystem

_log = logging.getLogger(__name__)
_BATCH = 64
"""Items per forward pass: towers have one fixed cost per item."""
_DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True, slots=True)
class Prepared:
    """One record, ready for a tower or a Sentence Transformer.

    Attributes:
        text: Its words, an instruction before them where the system takes one so; None without.
        image: Its picture, decoded and, for towers, preprocessed; None without.
        prompt: The instruction, where it travels apart from the words.
    """

    text: str | None
    image: Any
    prompt: str | None = None

    @property
    def num_tokens(self) -> int:
        """For progress only: words, and one for a picture."""
        return len((self.text or "").split()) + (self.image is not None)


def _single(record: Query | Candidate) -> tuple[str | None, str | None]:
    """(text, path of the picture) of a record; several parts are more than these models read."""
    if getattr(record, "parts", ()):
        name = record.qid if isinstance(record, Query) else record.did
        raise DataError(
            f"record {name}: holds several pictures or a video, and this model reads one text and one "
            "picture. Leave the set out for this model."
        )
    return record.txt, record.img_path


class Towers:
    """A text and an image tower in one space; a record with both is the sum of both vectors.

    Attributes:
        truncated: Texts that were longer than the text tower reads.
    """

    def __init__(self, model: Any, tokenizer: Any, images: Any, system: TowersSystem, *, source: str) -> None:
        self.model = model
        self.builder = self
        self.source = source
        self.truncated = 0
        self._tokenizer = tokenizer
        self._images = images
        self._system = system
        text = model.config.text_config
        self._length = int(getattr(text, "max_position_embeddings", 77))
        # SigLIP was trained on texts padded to full length and has no mask; CLIP has one.
        self._padding = "max_length" if "siglip" in model.config.model_type else True

    @classmethod
    def load(cls, path: str, system: TowersSystem, *, device: str, dtype: DtypeName) -> "Towers":
        """Load a Transformers folder.

        Raises:
            CheckpointError: Nothing loadable there, or a model without the two towers.
        """
        from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

        try:
            model: Any = AutoModel.from_pretrained(path, dtype=_DTYPES[dtype])
            tokenizer = AutoTokenizer.from_pretrained(path)
            images = AutoImageProcessor.from_pretrained(path, backend="pil")
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise CheckpointError(
                f"{path}: not a Transformers model with tokenizer and image processor "
                f"({' '.join(str(error).split())[:200]}). Give a CLIP or SigLIP folder."
            ) from None
        if not (hasattr(model, "get_text_features") and hasattr(model, "get_image_features")):
            raise CheckpointError(
                f"{path}: a {model.config.model_type} model has no text and image towers. Give a CLIP or "
                "SigLIP folder, or another model.kind."
            )
        return cls(model.eval().requires_grad_(False).to(device), tokenizer, images, system, source=path)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    def build(self, record: Query | Candidate) -> Prepared:
        """Words and pixel values of one record.

        Raises:
            DataError: Its image is missing or broken, or it holds several.
        """
        text, path = _single(record)
        if isinstance(record, Query) and record.instruction and self._system.instruction == "prepended":
            text = f"{record.instruction} {text}" if text else record.instruction
        pixels = None
        if path:
            pixels = self._images(open_image(path), return_tensors="pt")["pixel_values"][0]
        return Prepared(text, pixels)

    @torch.inference_mode()
    def embed_items(self, items: Sequence[Prepared], *, max_tokens: int = 8192) -> Tensor:
        """(N, D) float32 on the CPU, unit norm; `max_tokens` is of no use to towers."""
        parts = [self._embed(items[start : start + _BATCH]) for start in range(0, len(items), _BATCH)]
        return torch.cat(parts) if parts else torch.empty(0, 0)

    def _embed(self, items: Sequence[Prepared]) -> Tensor:
        texts = [row for row, item in enumerate(items) if item.text]
        images = [row for row, item in enumerate(items) if item.image is not None]
        found: list[tuple[list[int], Tensor, float]] = []
        weight = self._system.image_weight
        if texts:
            found.append((texts, self._texts([str(items[row].text) for row in texts]), 1 - weight))
        if images:
            pixels = torch.stack([items[row].image for row in images]).to(self.device, self.model.dtype)
            found.append((images, _features(self.model.get_image_features(pixel_values=pixels)), weight))
        both = set(texts) & set(images)
        sum_ND = torch.zeros(len(items), found[0][1].shape[1])
        for rows, vectors_ND, share in found:
            vectors_ND = vectors_ND.float().cpu()
            if self._system.fusion == "unit":
                vectors_ND = F.normalize(vectors_ND, dim=1)
            weights_N = torch.tensor([share if row in both else 1.0 for row in rows])
            sum_ND[rows] += vectors_ND * weights_N[:, None]
        return F.normalize(sum_ND, dim=1)

    def _texts(self, texts: list[str]) -> Tensor:
        lengths = [len(ids) for ids in self._tokenizer(texts, verbose=False)["input_ids"]]
        if longer := sum(length > self._length for length in lengths):
            if not self.truncated:
                _log.warning(
                    "%s: texts longer than the %d tokens it reads are cut; the first of %d tokens",
                    self.source, self._length, max(lengths),
                )  # fmt: skip
            self.truncated += longer
        batch = self._tokenizer(
            texts, padding=self._padding, truncation=True, max_length=self._length, return_tensors="pt"
        )
        return _features(
            self.model.get_text_features(**{name: value.to(self.device) for name, value in batch.items()})
        )


def _features(output: Any) -> Tensor:
    """(N, D); Transformers 5 answers with an object where older ones gave the tensor."""
    return output if isinstance(output, Tensor) else output.pooler_output


class SentenceModel:
    """A Sentence Transformer, fed with texts, pictures or both as its model takes them."""

    def __init__(self, model: Any, system: SentenceTransformerSystem, *, source: str) -> None:
        self.model = model
        self.builder = self
        self.source = source
        self._system = system

    @classmethod
    def load(
        cls, path: str, system: SentenceTransformerSystem, *, device: str, dtype: DtypeName
    ) -> "SentenceModel":
        """Load a Sentence Transformers folder.

        Raises:
            CheckpointError: The library is missing, or nothing loadable is there.
        """
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError:
            raise CheckpointError(
                f"{path}: Sentence Transformers is not installed. pip install sentence-transformers."
            ) from None
        try:
            model = SentenceTransformer(
                path,
                device=device,
                trust_remote_code=system.trust_remote_code,
                model_kwargs={"dtype": _DTYPES[dtype]},
            )
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(
                f"{path}: not a Sentence Transformers model ({' '.join(str(error).split())[:200]})."
            ) from None
        return cls(model, system, source=path)

    def build(self, record: Query | Candidate) -> Prepared:
        """Words and decoded picture of one record.

        Raises:
            DataError: Its image is missing or broken, or it holds several.
        """
        text, path = _single(record)
        prompt = None
        if isinstance(record, Query) and self._system.instruction == "prompt":
            prompt = record.instruction
        return Prepared(text, open_image(path) if path else None, prompt)

    @torch.inference_mode()
    def embed_items(self, items: Sequence[Prepared], *, max_tokens: int = 8192) -> Tensor:
        """(N, D) float32 on the CPU, unit norm; batches are the library's own."""
        groups: dict[tuple[str | None, str], list[int]] = {}
        for row, item in enumerate(items):
            kind = "both" if item.text and item.image is not None else "text" if item.text else "image"
            groups.setdefault((item.prompt, kind), []).append(row)
        rows_of: list[tuple[list[int], Tensor]] = []
        for (prompt, kind), rows in groups.items():
            rows_of.append((rows, self._encode([items[row] for row in rows], prompt, kind)))
        if not rows_of:
            return torch.empty(0, 0)
        vectors_ND = torch.empty(len(items), rows_of[0][1].shape[1])
        for rows, part_ND in rows_of:
            vectors_ND[rows] = part_ND
        return vectors_ND

    def _encode(self, items: Sequence[Prepared], prompt: str | None, kind: str) -> Tensor:
        def encode(take: Callable[[Prepared], Any]) -> Tensor:
            try:
                vectors = self.model.encode(
                    [take(item) for item in items],
                    prompt=prompt,
                    batch_size=_BATCH,
                    convert_to_tensor=True,
                    normalize_embeddings=True,
                    show_progress_bar=False,
                )
            except (TypeError, ValueError, AttributeError) as error:
                what = {"both": "text with picture", "text": "texts", "image": "pictures"}[kind]
                raise CheckpointError(
                    f"{self.source}: this Sentence Transformer does not read {what} "
                    f"({' '.join(str(error).split())[:160]}). Choose tasks it reads"
                    + (", or model.fusion=sum." if kind == "both" else ".")
                ) from None
            return vectors.float().cpu()

        if kind == "text":
            return encode(lambda item: item.text)
        if kind == "image":
            return encode(lambda item: item.image)
        if self._system.fusion == "joint":
            return encode(lambda item: {"text": item.text, "image": item.image})
        return F.normalize(encode(lambda item: item.text) + encode(lambda item: item.image), dim=1)
