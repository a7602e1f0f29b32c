"""Zero-shot sets in which each query ranks candidates of its own: GeneCIS, CC-Neg, SugarCrepe, MMEB."""

import json
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from umarvel_ray.data.records import Candidate, Query
from umarvel_ray.errors import DataError
from umarvel_ray.evaluate.parts import Part
from umarvel_ray.evaluate.published_files import (
    CHANGES,
    FIND_CAPTION,
    Protocol,
    find_by_tail,
    pictures_of,
    read_json_file,
    require,
)

_ATTRIBUTES = "I'm looking for an image with the same attributes as described."
_CCNEG_TEST = 40_000
"""CC-Neg's test rows: the last of the file."""
_GENECIS = ("change_object", "focus_object", "change_attribute", "focus_attribute")


def read_genecis(root: Path, protocol: Protocol) -> list[Part]:
    """`genecis/annotations/{subset}.json`: each item ranks its own target and gallery, 10 to 15 pictures."""
    return [_genecis(root / "genecis", subset) for subset in _GENECIS]


def _genecis(folder: Path, subset: str) -> Part:
    file = folder / "annotations" / f"{subset}.json"
    rows = read_json_file(file, "GeneCIS's annotations")

    def picture(entry: Any, row: int, place: int) -> tuple[str, Path]:
        if subset.endswith("_object"):
            number = entry["val_image_id"] if isinstance(entry, dict) else entry
            return f"{int(number):012d}", folder / "val2017" / f"{int(number):012d}.jpg"
        number = entry["image_id"] if isinstance(entry, dict) else entry
        stem = f"{number}_{row}_{place}"
        return stem, folder / "vg" / subset / f"{stem}.jpg"

    pictures: dict[str, Path] = {}
    queries, lists, qrels = [], {}, {}
    for row, item in enumerate(rows):
        qid = f"{subset}:{row}"
        _, reference = picture(item["reference"], row, 0)
        listed = [picture(item["target"], row, 1)]
        listed += [picture(entry, row, 2 + place) for place, entry in enumerate(item["gallery"])]
        # A gallery that names its target again would make a tie with itself.
        pictures |= dict(listed)
        target = listed[0][0]
        words = _ATTRIBUTES if subset == "focus_attribute" else CHANGES
        queries.append(Query(qid, txt=item["condition"], img_path=str(reference), instruction=words))
        lists[qid] = tuple(dict.fromkeys(did for did, _ in listed))
        qrels[qid] = {target: 1}
    return Part(
        name=f"genecis: {subset}",
        kind="image+text → image",
        queries=queries,
        candidates=pictures_of(pictures.items()),
        qrels=qrels,
        lists=lists,
        metrics=("hit@1", "hit@2", "hit@3"),
        files=(file,),
    )


def read_ccneg(root: Path, protocol: Protocol) -> list[Part]:
    """`ccneg/ccneg_preprocessed.pt`: a caption against its negation. The last 40,000 rows are the test.
    Commas leave the negated caption only; picture paths are the authors' and are found by their tails."""
    import torch

    file = require(root / "ccneg" / "ccneg_preprocessed.pt", "CC-Neg's file")
    try:
        data = torch.load(file, weights_only=True)
        paths, annotations = data["image_paths"], data["annotations"]
    except (RuntimeError, KeyError, TypeError, pickle.UnpicklingError) as error:
        raise DataError(
            f"{file}: not CC-Neg's file of plain values ({' '.join(str(error).split())[:160]}). Use the "
            "published one."
        ) from None
    start = max(0, len(paths) - _CCNEG_TEST)
    queries, texts, lists = [], [], {}
    for row in range(start, len(paths)):
        qid, annotation = f"image:{row}", annotations[row]
        queries.append(Query(qid, img_path=str(find_by_tail(paths[row], root / "ccneg", file, row))))
        wrong = annotation["sop_data"]["negative-prompt"].replace(",", "")
        texts += [
            Candidate(f"right:{row}", txt=annotation["json"]["caption"]),
            Candidate(f"wrong:{row}", txt=wrong),
        ]
        lists[qid] = (f"right:{row}", f"wrong:{row}")
    return [_matching("ccneg", queries, texts, lists, (file,))]


def _matching(
    name: str,
    queries: Sequence[Query],
    texts: Sequence[Candidate],
    lists: Mapping[str, tuple[str, ...]],
    files: tuple[Path, ...],
) -> Part:
    """A picture, its caption and a wrong one; a tie is wrong."""
    return Part(
        name=name,
        kind="image → right or wrong text",
        queries=queries,
        candidates=texts,
        qrels={qid: {dids[0]: 1} for qid, dids in lists.items()},
        lists=lists,
        metrics=("hit@1",),
        ties="lost",
        files=files,
    )


_SUGARCREPE = ("add_att", "add_obj", "replace_att", "replace_obj", "replace_rel", "swap_att", "swap_obj")
_UMARVEL_INSTRUCTED = ("add_att", "add_obj", "replace_att", "replace_obj")


def read_sugarcrepe(root: Path, protocol: Protocol) -> list[Part]:
    """`sugar-crepe/data/{subset}.json`: a caption against one with something changed. U-MARVEL puts an
    instruction before the picture in four subsets and none in three."""
    folder = root / "sugar-crepe"
    places = (folder / "images" / "val2017", root / "images" / "val2017", folder / "val2017")
    pictures = next((place for place in places if place.is_dir()), places[0])
    parts = []
    for subset in _SUGARCREPE:
        file = folder / "data" / f"{subset}.json"
        instruction = FIND_CAPTION if protocol == "umarvel" and subset in _UMARVEL_INSTRUCTED else None
        queries, texts, lists = [], [], {}
        for key, row in read_json_file(file, "SugarCrepe's data").items():
            qid = f"{subset}:{key}"
            queries.append(Query(qid, img_path=str(pictures / row["filename"]), instruction=instruction))
            texts += [
                Candidate(f"right:{qid}", txt=row["caption"]),
                Candidate(f"wrong:{qid}", txt=row["negative_caption"]),
            ]
            lists[qid] = (f"right:{qid}", f"wrong:{qid}")
        parts.append(_matching(f"sugarcrepe: {subset}", queries, texts, lists, (file,)))
    return parts


def read_mmeb(root: Path, protocol: Protocol) -> list[Part]:
    """`mmeb/{set}.parquet` or `.jsonl` in the columns of MMEB's image test: qry_inst, qry_text, qry_img_path,
    tgt_inst, tgt_text, tgt_img_path; pictures under `mmeb/images`. The first candidate of a list is the
    answer, so ties are averaged: where they keep the order of the list, a collapsed encoder scores 100 %."""
    folder = require(root / "mmeb", "MMEB's test files")
    files = sorted([*folder.glob("*.parquet"), *folder.glob("*.jsonl")])
    if not files:
        raise DataError(f"{folder}: no .parquet or .jsonl file, one per set. Put MMEB's test files there.")
    return [_mmeb(file, folder / "images") for file in files]


def _mmeb(file: Path, images: Path) -> Part:
    if file.suffix == ".parquet":
        import pyarrow.parquet as pq

        rows = pq.read_table(file).to_pylist()
    else:
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line.strip()]

    def words(*texts: str | None) -> str | None:
        joined = " ".join(
            " ".join((text or "").replace("<|image_1|>", " ").split()) for text in texts
        ).strip()
        return joined or None

    name, pool, queries, lists, qrels = file.stem, {}, [], {}, {}
    keys: dict[tuple[str | None, str | None], str] = {}
    for row, item in enumerate(rows):
        missing = {"qry_text", "qry_img_path", "tgt_text", "tgt_img_path"} - item.keys()
        if missing or not item["tgt_text"]:
            raise DataError(
                f"{file}: row {row}: {', '.join(sorted(missing)) or 'tgt_text'} is missing or empty. Use "
                "MMEB's test file."
            )
        dids = []
        for text, path in zip(
            item["tgt_text"], item["tgt_img_path"] or [None] * len(item["tgt_text"]), strict=True
        ):
            key = (words(item.get("tgt_inst"), text), str(images / path) if path else None)
            if key not in keys:
                keys[key] = f"{name}:{len(keys)}"
                pool[keys[key]] = Candidate(keys[key], txt=key[0], img_path=key[1])
            dids.append(keys[key])
        qid = f"{name}:q{row}"
        picture = str(images / item["qry_img_path"]) if item["qry_img_path"] else None
        queries.append(
            Query(qid, txt=words(item["qry_text"]), img_path=picture, instruction=words(item.get("qry_inst")))
        )
        lists[qid] = tuple(dict.fromkeys(dids))  # an option that repeats the answer is the answer
        qrels[qid] = {dids[0]: 1}
    return Part(
        name=f"mmeb: {name}",
        kind="query → its own list",
        queries=queries,
        candidates=list(pool.values()),
        qrels=qrels,
        lists=lists,
        metrics=("hit@1",),
        files=(file,),
    )
