"""Zero-shot sets that search one pool: pictures and captions both ways, CIRCO, dialogues, turns, videos."""

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from umarvel_ray.data.records import Candidate, Picture, Query, Video
from umarvel_ray.errors import DataError
from umarvel_ray.evaluate.parts import Part
from umarvel_ray.evaluate.published_files import (
    CHANGES,
    FIND_CAPTION,
    FIND_IMAGE,
    RETRIEVAL,
    Protocol,
    pictures_of,
    read_json_file,
    read_plain_pickle,
    require,
)

_DIALOG = "Find me an everyday image that matches the given dialog."
_FASHION = "Find me a similar fashion image based on the following multi-round modifications."
_VIDEO = "Find an everyday video match with caption."


def _both_directions(
    name: str,
    images: Sequence[Path],
    captions: Sequence[str],
    owner: Sequence[int],
    *,
    side: str,
    files: tuple[Path, ...],
) -> list[Part]:
    """Text → image and image → text over the same pictures and captions.

    Args:
        name: Of the set.
        images: Pictures.
        captions: Their captions.
        owner: For each caption its picture.
        side: Which records carry an instruction: `"query"` each direction's own; `"image"` and `"text"` the
            same records in both directions, as one similarity matrix gives.
        files: Read from.
    """
    image_words = {
        "query": FIND_CAPTION,
        "image": FIND_CAPTION,
        "braces": "{'" + FIND_CAPTION + "'}",
        "text": None,
    }[side]
    text_words = FIND_IMAGE if side in ("query", "text") else None
    image_ids = [f"image:{row}" for row in range(len(images))]
    text_ids = [f"text:{row}" for row in range(len(captions))]
    asking_images = [
        Query(qid, img_path=str(path), instruction=image_words)
        for qid, path in zip(image_ids, images, strict=True)
    ]
    asking_texts = [
        Query(qid, txt=text, instruction=text_words) for qid, text in zip(text_ids, captions, strict=True)
    ]
    bare_images = pictures_of(zip(image_ids, images, strict=True))
    bare_texts = [Candidate(did, txt=text) for did, text in zip(text_ids, captions, strict=True)]
    shared = side != "query"
    of_image: dict[str, dict[str, int]] = {qid: {} for qid in image_ids}
    for row, image in enumerate(owner):
        of_image[image_ids[image]][text_ids[row]] = 1
    return [
        Part(
            name=f"{name}: text → image",
            kind="text → image",
            queries=asking_texts,
            candidates=asking_images if shared and image_words else bare_images,
            qrels={text_ids[row]: {image_ids[image]: 1} for row, image in enumerate(owner)},
            metrics=RETRIEVAL,
            files=files,
        ),
        Part(
            name=f"{name}: image → text",
            kind="image → text",
            queries=asking_images,
            candidates=asking_texts if shared and text_words else bare_texts,
            qrels=of_image,
            metrics=RETRIEVAL,
            files=files,
        ),
    ]


def _side(protocol: Protocol, *, lamra: str, umarvel: str) -> str:
    return {"direction": "query", "lamra": lamra, "umarvel": umarvel}[protocol]


def read_sharegpt4v(root: Path, protocol: Protocol) -> list[Part]:
    """`sharegpt4v/datas_for_validation.json`, a list of {image_name, caption}; row i of both sides belong
    together."""
    file = root / "sharegpt4v" / "datas_for_validation.json"
    rows = read_json_file(file, "ShareGPT4V's validation list")
    return _both_directions(
        "sharegpt4v",
        [root / "sharegpt4v" / "val_data" / row["image_name"] for row in rows],
        [row["caption"] for row in rows],
        range(len(rows)),
        side=_side(protocol, lamra="image", umarvel="text"),
        files=(file,),
    )


def read_urban1k(root: Path, protocol: Protocol) -> list[Part]:
    """`Urban1k/{image,caption}/N`; of a caption file the first line counts. LamRA's instruction reached its
    model in braces, as a Python set prints, and U-MARVEL kept that."""
    folder = next((root / name for name in ("Urban1k", "Urban1K", "urban1k") if (root / name).is_dir()), None)
    folder = require(folder or root / "Urban1k", "Urban-1K")
    texts = sorted((folder / "caption").glob("*.txt"), key=lambda path: int(path.stem))
    captions = []
    for path in texts:
        lines = path.read_text(encoding="utf-8").split("\n")
        if not lines[0].strip():
            raise DataError(f"{path}:1: the caption is empty. Copy the file again.")
        captions.append(lines[0].strip())
    return _both_directions(
        "urban1k",
        [require(folder / "image" / f"{path.stem}.jpg", "Urban-1K's pictures") for path in texts],
        captions,
        range(len(texts)),
        side=_side(protocol, lamra="braces", umarvel="braces"),
        files=tuple(texts),
    )


def read_flickr30k(root: Path, protocol: Protocol) -> list[Part]:
    """`flickr/images/I.png` and `flickr/flickr_text.json`, five captions per picture in its order."""
    file = root / "flickr" / "flickr_text.json"
    captions = read_json_file(file, "Flickr30K's captions")
    num_images = len(list((root / "flickr" / "images").glob("*.png")))
    if len(captions) != 5 * num_images:
        raise DataError(
            f"{file}: {len(captions)} captions for {num_images} pictures. There are five per picture: "
            "caption j belongs to picture j // 5."
        )
    return _both_directions(
        "flickr30k",
        [root / "flickr" / "images" / f"{row}.png" for row in range(num_images)],
        captions,
        [row // 5 for row in range(len(captions))],
        side=_side(protocol, lamra="image", umarvel="query"),
        files=(file,),
    )


def read_circo(root: Path, protocol: Protocol, split: str = "val") -> list[Part]:
    """`circo/annotations/{val,test}.json`; the database is all of COCO's unlabeled2017, the reference picture
    included. The test split's answers are its server's: see `circo_submission`."""
    folder = root / "circo"
    info, asked = (
        folder / "annotations" / "image_info_unlabeled2017.json",
        folder / "annotations" / f"{split}.json",
    )
    name_of = {
        image["id"]: image["file_name"] for image in read_json_file(info, "COCO's image list")["images"]
    }
    pictures = folder / "images" / "unlabeled2017"
    rows = read_json_file(asked, "CIRCO's annotations")
    if lost := [row["id"] for row in rows if row["reference_img_id"] not in name_of]:
        raise DataError(
            f"{asked}: {len(lost)} of {len(rows)} reference pictures are not in {info} (first: query "
            f"{lost[0]}). Use the lists of one release."
        )
    return [
        Part(
            name=f"circo {split}",
            kind="image+text → image",
            queries=[
                Query(
                    str(row["id"]),
                    txt=row["relative_caption"],
                    img_path=str(pictures / name_of[row["reference_img_id"]]),
                    instruction=CHANGES,
                )
                for row in rows
            ],
            candidates=pictures_of((str(number), pictures / file) for number, file in name_of.items()),
            qrels={
                str(row["id"]): {str(did): 1 for did in row["gt_img_ids"]}
                for row in rows
                if "gt_img_ids" in row
            },
            targets={str(row["id"]): str(row["target_img_id"]) for row in rows if "target_img_id" in row},
            metrics=("map@5", "map@10", "map@25", "map@50"),
            files=(asked, info),
        )
    ]


def circo_submission(ranking: Mapping[str, Sequence[str]], *, num_queries: int) -> dict[str, list[int]]:
    """What CIRCO's server takes: query id → its 50 best pictures, as numbers, keyed by the query's own id.

    Raises:
        DataError: A query is missing or has fewer than 50 pictures.
    """
    short = [qid for qid, dids in ranking.items() if len(dids) < 50]
    if len(ranking) != num_queries or short:
        raise DataError(
            f"CIRCO submission: {len(ranking)} of {num_queries} queries ranked, {len(short)} of them with "
            f"fewer than 50 pictures{f' (first: {short[0]})' if short else ''}. Search all with a depth of "
            "at least 50."
        )
    return {qid: [int(did) for did in dids[:50]] for qid, dids in ranking.items()}


def read_visdial(root: Path, protocol: Protocol) -> list[Part]:
    """`visdial/visdial_1.0_val.json`: all rounds of a dialogue, without its caption, ask for its picture."""
    file = root / "visdial" / "visdial_1.0_val.json"
    data = read_json_file(file, "Visual Dialog's validation file")["data"]
    queries, qrels, pictures = [], {}, {}
    for dialog in data["dialogs"]:
        number = dialog["image_id"]
        # The mark is put even where a sentence has one, as the authors do.
        words = " ".join(
            f"Q: {data['questions'][turn['question']]}? A: {data['answers'][turn['answer']]}."
            for turn in dialog["dialog"]
        )
        queries.append(Query(f"dialog:{number}", txt=words, instruction=_DIALOG))
        name = f"VisualDialog_val2018_{number:012d}"
        pictures[name] = root / "visdial" / "VisualDialog_val2018" / f"{name}.jpg"
        qrels[f"dialog:{number}"] = {name: 1}
    return [
        Part(
            name="visdial",
            kind="dialogue → image",
            queries=queries,
            candidates=pictures_of(pictures.items()),
            qrels=qrels,
            metrics=RETRIEVAL,
            files=(file,),
        )
    ]


def read_mt_fashioniq(root: Path, protocol: Protocol) -> list[Part]:
    """`multiturnfashion/data/all.val.json`: pictures and what to change, over several turns; the pictures are
    M-BEIR's, under `mbeir_images/fashioniq_images`, here or beside the root's parent."""
    folder = root / "multiturnfashion"
    asked, names = folder / "data" / "all.val.json", folder / "image_splits" / "split.all.val.json"
    places = [
        base / "mbeir_images" / "fashioniq_images" for base in (root, root / "M-BEIR", root.parent / "M-BEIR")
    ]
    pictures = next((place for place in places if place.is_dir()), places[0])
    queries, qrels = [], {}
    for row, item in enumerate(read_json_file(asked, "multi-turn FashionIQ")):
        parts: list[Any] = []
        for turn in item["reference"]:
            words = " and ".join(words.strip() for words in turn[1] if words.strip())
            parts += [Picture(str(pictures / f"{turn[2]}.jpg")), *([words] if words else [])]
        queries.append(Query(f"turns:{row}", parts=tuple(parts), instruction=_FASHION))
        qrels[f"turns:{row}"] = {item["target"][1]: 1}
    return [
        Part(
            name="mt_fashioniq",
            kind="several turns of image+text → image",
            queries=queries,
            candidates=pictures_of(
                (name, pictures / f"{name}.jpg")
                for name in dict.fromkeys(read_json_file(names, "its image list"))
            ),
            qrels=qrels,
            metrics=("hit@5", "hit@8", "hit@10"),
            files=(asked, names),
        )
    ]


def _videos(
    name: str, captions: Iterable[tuple[str, str]], videos: Mapping[str, Path], files: tuple[Path, ...]
) -> Part:
    rows = list(captions)
    return Part(
        name=name,
        kind="text → video",
        queries=[Query(f"text:{row}", txt=text, instruction=_VIDEO) for row, (_, text) in enumerate(rows)],
        candidates=[Candidate(did, parts=(Video(str(path)),)) for did, path in videos.items()],
        qrels={f"text:{row}": {video: 1} for row, (video, _) in enumerate(rows)},
        metrics=RETRIEVAL,
        files=files,
    )


def read_msrvtt(root: Path, protocol: Protocol) -> list[Part]:
    """`msrvtt/annotations/MSRVTT_JSFUSION_test.csv`, columns video_id and sentence: 1,000 captions and
    videos."""
    file = require(root / "msrvtt" / "annotations" / "MSRVTT_JSFUSION_test.csv", "MSR-VTT's 1k-A list")
    with open(file, encoding="utf-8", newline="") as lines:
        rows = list(csv.DictReader(lines))
    if not rows or not {"video_id", "sentence"} <= rows[0].keys():
        raise DataError(f"{file}:1: no columns video_id and sentence. Use the JSFusion test list.")
    folder = next(
        (root / "msrvtt" / name for name in ("videos", "videos/all") if (root / "msrvtt" / name).is_dir()),
        root / "msrvtt" / "videos",
    )
    videos = {row["video_id"]: folder / f"{row['video_id']}.mp4" for row in rows}
    return [_videos("msrvtt", ((row["video_id"], row["sentence"]) for row in rows), videos, (file,))]


def read_msvd(root: Path, protocol: Protocol) -> list[Part]:
    """`MSVD/test_list.txt` and `MSVD/raw-captions.pkl` (name → lists of words): every caption asks for its
    video."""
    folder = root / "MSVD"
    listed, said = folder / "test_list.txt", folder / "raw-captions.pkl"
    names = require(listed, "MSVD's test list").read_text(encoding="utf-8").split()
    captions = read_plain_pickle(said, "MSVD's captions")
    if lost := [name for name in names if name not in captions]:
        raise DataError(
            f"{listed}: {len(lost)} of {len(names)} videos have no caption in {said} (first: {lost[0]})."
        )
    rows = [(name, " ".join(words)) for name in names for words in captions[name]]
    videos = {name: folder / "YouTubeClips" / f"{name}.avi" for name in names}
    return [_videos("msvd", rows, videos, (listed, said))]
