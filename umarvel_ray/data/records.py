"""What is asked, and what is found: frozen, and validated at the door."""

from dataclasses import dataclass
from typing import TypeAlias

from umarvel_ray.errors import DataError

MODALITIES = ("text", "image", "image,text")
"""As M-BEIR writes them: image first, no space."""


def modality_of(txt: str | None, img_path: str | None) -> str:
    """One of `MODALITIES`, from what a record holds; the empty string where it holds nothing."""
    return ",".join(name for name, part in (("image", img_path), ("text", txt)) if part)


@dataclass(frozen=True, slots=True)
class Picture:
    """An image file within a record of several parts."""

    path: str


@dataclass(frozen=True, slots=True)
class Video:
    """A video file within a record of several parts; what is read of it are frames."""

    path: str


Part: TypeAlias = str | Picture | Video
"""Words, a picture or a video."""


def _content(record: "Query | Candidate") -> tuple[Part, ...]:
    if record.parts:
        return record.parts
    picture = (Picture(record.img_path),) if record.img_path else ()
    return (*picture, record.txt) if record.txt else picture


def _check_content(record: "Query | Candidate", name: str) -> None:
    if record.parts and (record.txt or record.img_path):
        raise DataError(f"{name}: has `parts` beside txt or img_path. Put everything into the parts.")
    if not any(part if isinstance(part, str) else part.path for part in _content(record)):
        raise DataError(f"{name}: has neither text nor image. Give at least one.")


def _modality(record: "Query | Candidate") -> str:
    kinds = {type(part) for part in _content(record) if part}
    names = ((Picture, "image"), (Video, "video"), (str, "text"))
    return ",".join(name for kind, name in names if kind in kinds)


@dataclass(frozen=True, slots=True)
class Query:
    """Who asks.

    Attributes:
        qid: `"dataset:number"` in M-BEIR; any string elsewhere. Unique within one split only.
        txt: The query's own words.
        img_path: Path of its image.
        instruction: The task sentence, put before the words and left out of the pooling.
        verbatim: Take the words as they stand, neither capitalised nor closed by a full stop.
        parts: Words, pictures and videos in the order they are read, in place of `txt` and `img_path`: for
            a dialogue, or a query of several turns. Words side by side are joined by a blank.
    """

    qid: str
    txt: str | None = None
    img_path: str | None = None
    instruction: str | None = None
    verbatim: bool = False
    parts: tuple[Part, ...] = ()

    def __post_init__(self) -> None:
        _check_content(self, f"query {self.qid}")

    @property
    def modality(self) -> str:
        """One of `MODALITIES`; with a video among the parts, "video" stands in it too."""
        return _modality(self)

    @property
    def content(self) -> tuple[Part, ...]:
        """All parts, in the order they are read."""
        return _content(self)


@dataclass(frozen=True, slots=True)
class Candidate:
    """What can be found.

    Attributes:
        did: `"dataset:number"` in M-BEIR; any string elsewhere. Unique within a pool.
        txt: Its words.
        img_path: Path of its image.
        verbatim: Take the words as they stand, neither capitalised nor closed by a full stop.
        parts: Words, pictures and videos in the order they are read, in place of `txt` and `img_path`: for
            a dialogue, or a query of several turns. Words side by side are joined by a blank.
    """

    did: str
    txt: str | None = None
    img_path: str | None = None
    verbatim: bool = False
    parts: tuple[Part, ...] = ()

    def __post_init__(self) -> None:
        _check_content(self, f"candidate {self.did}")

    @property
    def modality(self) -> str:
        """One of `MODALITIES`; with a video among the parts, "video" stands in it too."""
        return _modality(self)

    @property
    def content(self) -> tuple[Part, ...]:
        """All parts, in the order they are read."""
        return _content(self)


@dataclass(frozen=True, slots=True)
class TrainingPair:
    """A query, a candidate that answers it, and candidates that are near but do not."""

    query: Query
    positive: Candidate
    negatives: tuple[Candidate, ...] = ()
