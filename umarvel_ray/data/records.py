"""What is asked, and what is found: frozen, and validated at the door."""

from dataclasses import dataclass

from umarvel_ray.errors import DataError

MODALITIES = ("text", "image", "image,text")
"""As M-BEIR writes them: image first, no space."""


def modality_of(txt: str | None, img_path: str | None) -> str:
    """One of `MODALITIES`, from what a record holds; the empty string where it holds nothing."""
    return ",".join(name for name, part in (("image", img_path), ("text", txt)) if part)


@dataclass(frozen=True, slots=True)
class Query:
    """Who asks.

    Attributes:
        qid: `"dataset:number"` in M-BEIR; any string elsewhere. Unique within one split only.
        txt: The query's own words.
        img_path: Path of its image.
        instruction: The task sentence, put before the words and left out of the pooling.
        verbatim: Take the words as they stand, neither capitalised nor closed by a full stop.
    """

    qid: str
    txt: str | None = None
    img_path: str | None = None
    instruction: str | None = None
    verbatim: bool = False

    def __post_init__(self) -> None:
        if not (self.txt or self.img_path):
            raise DataError(f"query {self.qid}: has neither text nor image. Give at least one.")

    @property
    def modality(self) -> str:
        """One of `MODALITIES`."""
        return modality_of(self.txt, self.img_path)


@dataclass(frozen=True, slots=True)
class Candidate:
    """What can be found.

    Attributes:
        did: `"dataset:number"` in M-BEIR; any string elsewhere. Unique within a pool.
        txt: Its words.
        img_path: Path of its image.
        verbatim: Take the words as they stand, neither capitalised nor closed by a full stop.
    """

    did: str
    txt: str | None = None
    img_path: str | None = None
    verbatim: bool = False

    def __post_init__(self) -> None:
        if not (self.txt or self.img_path):
            raise DataError(f"candidate {self.did}: has neither text nor image. Give at least one.")

    @property
    def modality(self) -> str:
        """One of `MODALITIES`."""
        return modality_of(self.txt, self.img_path)


@dataclass(frozen=True, slots=True)
class TrainingPair:
    """A query, a candidate that answers it, and candidates that are near but do not."""

    query: Query
    positive: Candidate
    negatives: tuple[Candidate, ...] = ()
