"""Files of published data sets: what is missing or broken is named, and nothing in them can run code."""

import json
import pickle
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from umarvel_ray.data.records import Candidate
from umarvel_ray.errors import DataError

Protocol = Literal["direction", "lamra", "umarvel"]
"""Whose instructions: see `zeroshot.py`."""
FIND_CAPTION = "Find an image caption describing the following everyday image."
FIND_IMAGE = "Find me an everyday image that matches the given caption."
CHANGES = "I'm looking for a similar everyday image with the described changes."
RETRIEVAL = ("hit@1", "hit@5", "hit@10")


def require(path: Path, what: str) -> Path:
    if not path.exists():
        raise DataError(f"{path}: missing. Put {what} there as its authors publish it, or correct the root.")
    return path


def read_json_file(path: Path, what: str) -> Any:
    try:
        return json.loads(require(path, what).read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error}). Copy the file again.") from None


class _PlainUnpickler(pickle.Unpickler):
    """Lists, dicts, strings and numbers; anything that would import code is refused."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        raise pickle.UnpicklingError(f"it asks for {module_name}.{global_name}")


def read_plain_pickle(path: Path, what: str) -> Any:
    try:
        with open(require(path, what), "rb") as file:
            return _PlainUnpickler(file).load()
    except (pickle.UnpicklingError, EOFError, ValueError) as error:
        raise DataError(
            f"{path}: not a pickle of plain lists and strings ({error}). Such a file may run code; it was "
            "not loaded. Use the published file."
        ) from None


def pictures_of(rows: Iterable[tuple[str, Path]]) -> list[Candidate]:
    return [Candidate(did, img_path=str(path)) for did, path in rows]


def find_by_tail(path: str, folder: Path, file: Path, row: int) -> Path:
    """The longest tail of another machine's path that is a file under `folder`."""
    parts = [part for part in PurePosixPath(path).parts if part not in ("/", "..")]
    for start in range(len(parts)):
        if (found := folder.joinpath(*parts[start:])).is_file():
            return found
    raise DataError(
        f"{file}: row {row}: no tail of {path!r} is a file under {folder}. Unpack the pictures there."
    )
