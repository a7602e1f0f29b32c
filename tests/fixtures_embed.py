"""A model that costs nothing and a pool for it: what the tests of embedding share.

Workers of Ray import this file as `fixtures_embed`; a driver of its own runs `python fixtures_embed.py SPEC`.
"""

import hashlib
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from umarvel_ray.data.records import Candidate, Query
from umarvel_ray.errors import DataError
from umarvel_ray.retrieve.embed import Model
from umarvel_ray.retrieve.settings import EmbedConfig

DIM = 8


@dataclass(frozen=True)
class StubItem:
    """A record as the stub takes it."""

    content: bytes
    num_tokens: int


class StubBuilder:
    """Reads text and picture; a text with a lone surrogate cannot be tokenized, a picture without its head
    cannot be decoded."""

    def build(self, record: Query | Candidate) -> StubItem:
        content = (record.txt or "").encode()  # UnicodeEncodeError, as a tokenizer raises it
        if record.img_path:
            from umarvel_ray.storage import read_bytes

            try:
                picture = read_bytes(record.img_path)
            except FileNotFoundError:
                raise DataError(f"{record.img_path}: no such image.") from None
            if not picture.startswith(b"PICTURE"):
                raise DataError(f"{record.img_path}: not a whole image.")
            content += picture
        return StubItem(content, len(content))


@dataclass
class StubEmbedder:
    """A vector from the hash of the content; keeps what it was asked, and may be slow or tell when it works.

    Attributes:
        delay_s: Per call.
        log: Folder in which each call leaves a file named by its process, for counting across processes.
        asked: Contents of all calls in this process.
    """

    delay_s: float = 0.0
    log: str = ""
    builder: StubBuilder = field(default_factory=StubBuilder)
    asked: list[bytes] = field(default_factory=list)

    def embed_items(self, items: Sequence[StubItem], *, max_tokens: int = 8192) -> np.ndarray:
        time.sleep(self.delay_s)
        self.asked += [item.content for item in items]
        if self.log:
            name = f"{os.getpid()}-{time.monotonic_ns()}-{len(items)}"
            (Path(self.log) / name).touch()
        return np.stack([vector_of(item.content) for item in items])


def vector_of(content: bytes) -> np.ndarray:
    """(DIM,) float32, unit norm."""
    seed = int.from_bytes(hashlib.sha256(content).digest()[:4], "little")
    vector = np.random.default_rng(seed).standard_normal(DIM).astype(np.float32)
    return vector / np.linalg.norm(vector)


def stub_model(*, delay_s: float = 0.0, log: str = "") -> Model:
    """How workers make the stub."""
    return Model(embedder=partial(StubEmbedder, delay_s, log), builder=StubBuilder)


def candidate_line(did: str, *, txt: str | None = None, img_path: str | None = None) -> str:
    """A line of a pool."""
    modality = ",".join(name for name, part in (("image", img_path), ("text", txt)) if part)
    return json.dumps({"did": did, "txt": txt, "img_path": img_path, "modality": modality}) + "\n"


def write_texts(path: Path, num_rows: int) -> Path:
    """A pool of texts unlike one another."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(candidate_line(f"9:{row}", txt=f"text {row}") for row in range(num_rows)))
    return path


def embed_config(root: Any, pools: Sequence[Any], output: Any, **settings: Any) -> EmbedConfig:
    """Settings of a job over some pool files."""
    given = {"checkpoint": "stub", "splits": (), "rows_per_shard": 4, "window_rows": 3, "dtype": "float32"}
    return EmbedConfig.model_validate(
        given | {"root": str(root), "pools": [str(pool) for pool in pools], "output": str(output)} | settings
    )


def main(spec: dict[str, Any]) -> None:
    """A driver in a process of its own, to be killed; joins the cluster that `RAY_ADDRESS` names, if any."""
    from umarvel_ray.retrieve.embed import plan_stores
    from umarvel_ray.runtime.cluster import RuntimeSettings, connected
    from umarvel_ray.runtime.embedding import embed_stores

    config = EmbedConfig.model_validate(spec["config"])
    runtime = RuntimeSettings.model_validate(spec["runtime"])
    import fixtures_embed  # by its name, which workers know, not as __main__

    with connected(runtime):
        model = fixtures_embed.stub_model(**spec["model"])
        progress = embed_stores(plan_stores(config), model, config, runtime)
    print(json.dumps(progress.summary()))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
