"""Every zero-shot reader over a small set in the layout its authors publish, with the traps it is known
for."""

import csv
import json
import pickle

import pytest

from umarvel_ray.data.records import Picture, Query, Video
from umarvel_ray.errors import ConfigError, DataError
from umarvel_ray.evaluate.parts import record_id
from umarvel_ray.evaluate.published_files import FIND_CAPTION, FIND_IMAGE
from umarvel_ray.evaluate.zeroshot import SETS, read_sets
from umarvel_ray.evaluate.zeroshot_pools import circo_submission


def put(path, content=b"picture"):
    """A file of JSON, text or bytes, with its folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def only(root, name, **how):
    """The one part of a set that has one."""
    (part,) = read_sets([name], root, **how)[name]
    return part


def test_sharegpt4v_pairs_rows(tmp_path):
    rows = [
        {"image_name": "b.jpg", "caption": "Long words."},
        {"image_name": "a.jpg", "caption": "Other words."},
    ]
    put(tmp_path / "sharegpt4v/datas_for_validation.json", rows)
    to_image, to_text = read_sets(["sharegpt4v"], tmp_path)["sharegpt4v"]
    assert [query.txt for query in to_image.queries] == ["Long words.", "Other words."]
    assert to_image.candidates[0].img_path.endswith("sharegpt4v/val_data/b.jpg")
    assert to_image.qrels == {"text:0": {"image:0": 1}, "text:1": {"image:1": 1}}
    assert {query.instruction for query in to_image.queries} == {FIND_IMAGE}
    assert {query.instruction for query in to_text.queries} == {FIND_CAPTION}
    assert not any(isinstance(record, Query) for part in (to_image, to_text) for record in part.candidates)
    assert to_image.metrics == ("hit@1", "hit@5", "hit@10")


def test_the_authors_variants_share_one_matrix(tmp_path):
    put(tmp_path / "sharegpt4v/datas_for_validation.json", [{"image_name": "a.jpg", "caption": "Words."}])
    to_image, to_text = read_sets(["sharegpt4v"], tmp_path, protocol="lamra")["sharegpt4v"]
    # LamRA: the picture carries the instruction even where it is the candidate, the words none.
    assert to_image.queries[0].instruction is None
    assert isinstance(to_image.candidates[0], Query) and to_image.candidates[0].instruction == FIND_CAPTION
    assert to_text.queries[0] == to_image.candidates[0]
    to_image, to_text = read_sets(["sharegpt4v"], tmp_path, protocol="umarvel")["sharegpt4v"]
    assert to_image.queries[0].instruction == FIND_IMAGE and to_text.queries[0].instruction is None
    assert to_text.candidates[0] == to_image.queries[0]


def test_urban1k_takes_the_first_line_and_lamras_braces(tmp_path):
    for number in (10, 9, 1):
        put(tmp_path / f"Urban1k/image/{number}.jpg")
        put(tmp_path / f"Urban1k/caption/{number}.txt", f"Caption {number}.\nSecond line.\n")
    to_image, _ = read_sets(["urban1k"], tmp_path)["urban1k"]
    assert [query.txt for query in to_image.queries] == ["Caption 1.", "Caption 9.", "Caption 10."]
    assert to_image.candidates[2].img_path.endswith("image/10.jpg")
    lamra, _ = read_sets(["urban1k"], tmp_path, protocol="lamra")["urban1k"]
    assert (
        lamra.candidates[0].instruction
        == "{'Find an image caption describing the following everyday image.'}"
    )
    put(tmp_path / "Urban1k/caption/9.txt", "\nlate")
    with pytest.raises(DataError, match=r"9.txt:1: the caption is empty"):
        read_sets(["urban1k"], tmp_path)


def test_flickr_has_five_captions_a_picture(tmp_path):
    for number in range(2):
        put(tmp_path / f"flickr/images/{number}.png")
    put(tmp_path / "flickr/flickr_text.json", [f"caption {number}" for number in range(10)])
    to_image, to_text = read_sets(["flickr30k"], tmp_path)["flickr30k"]
    assert to_image.qrels["text:4"] == {"image:0": 1} and to_image.qrels["text:5"] == {"image:1": 1}
    assert set(to_text.qrels["image:1"]) == {f"text:{number}" for number in range(5, 10)}
    assert (len(to_image.queries), len(to_text.queries)) == (10, 2)
    put(tmp_path / "flickr/flickr_text.json", ["one"])
    with pytest.raises(DataError, match="1 captions for 2 pictures"):
        read_sets(["flickr30k"], tmp_path)


def put_circo(root):
    images = [{"id": number, "file_name": f"{number:012d}.jpg"} for number in (7, 8, 9)]
    put(root / "circo/annotations/image_info_unlabeled2017.json", {"images": images})
    asked = {"id": 3, "reference_img_id": 8, "relative_caption": "with a dog"}
    put(root / "circo/annotations/val.json", [asked | {"target_img_id": 7, "gt_img_ids": [7, 9]}])
    put(root / "circo/annotations/test.json", [asked])


def test_circo_keeps_the_reference_in_its_database_and_divides_by_the_smaller_number(tmp_path):
    put_circo(tmp_path)
    part = only(tmp_path, "circo")
    assert part.queries[0].txt == "with a dog" and part.queries[0].img_path.endswith(
        "unlabeled2017/000000000008.jpg"
    )
    assert part.qrels == {"3": {"7": 1, "9": 1}} and part.targets == {"3": "7"}
    assert [record_id(c) for c in part.candidates] == ["7", "8", "9"]
    assert part.metrics[0] == "map@5"
    test = only(tmp_path, "circo_test")
    assert test.qrels == {}


def test_circos_submission_is_keyed_by_the_querys_own_id(tmp_path):
    pictures = [str(number) for number in range(60)]
    assert circo_submission({"3": pictures}, num_queries=1) == {"3": list(range(50))}
    with pytest.raises(DataError, match="fewer than 50"):
        circo_submission({"3": pictures[:9]}, num_queries=1)
    with pytest.raises(DataError, match="1 of 2 queries ranked"):
        circo_submission({"3": pictures}, num_queries=2)


def test_genecis_ranks_each_items_own_gallery(tmp_path):
    for subset in ("change_object", "focus_object"):
        item = {
            "reference": {"val_image_id": 5},
            "target": {"val_image_id": 6},
            "gallery": [{"val_image_id": 7}, {"val_image_id": 8}],
            "condition": "dog",
        }
        put(tmp_path / f"genecis/annotations/{subset}.json", [item])
    for subset in ("change_attribute", "focus_attribute"):
        item = {
            "reference": {"image_id": 5},
            "target": {"image_id": 6},
            "gallery": [{"image_id": 7}, {"image_id": 7}],
            "condition": "red",
        }
        put(tmp_path / f"genecis/annotations/{subset}.json", [item, item])
    parts = {part.name.split(": ")[1]: part for part in read_sets(["genecis"], tmp_path)["genecis"]}
    objects, attributes = parts["change_object"], parts["focus_attribute"]
    assert objects.lists == {"change_object:0": ("000000000006", "000000000007", "000000000008")}
    assert objects.queries[0].img_path.endswith("genecis/val2017/000000000005.jpg")
    # Crops are named by picture, row and place: reference 0, target 1, the gallery from 2.
    assert attributes.lists["focus_attribute:1"] == ("6_1_1", "7_1_2", "7_1_3")
    assert attributes.queries[1].img_path.endswith("genecis/vg/focus_attribute/5_1_0.jpg")
    assert "same attributes" in attributes.queries[0].instruction
    assert "described changes" in parts["change_attribute"].queries[0].instruction
    assert objects.ties == "averaged" and objects.metrics == ("hit@1", "hit@2", "hit@3")
    assert SETS["genecis"].average == "macro"


def test_visdial_reads_all_rounds_without_the_caption(tmp_path):
    dialog = {
        "image_id": 42,
        "caption": "not used",
        "dialog": [{"question": 1, "answer": 0}, {"question": 0, "answer": 1}],
    }
    data = {"data": {"dialogs": [dialog], "questions": ["is it red", "how many?"], "answers": ["two", "yes"]}}
    put(tmp_path / "visdial/visdial_1.0_val.json", data)
    part = only(tmp_path, "visdial")
    assert (
        part.queries[0].txt == "Q: how many?? A: two. Q: is it red? A: yes."
    )  # the mark is put even where one is
    assert part.candidates[0].img_path.endswith("VisualDialog_val2018/VisualDialog_val2018_000000000042.jpg")


def test_multi_turn_fashioniq_keeps_pictures_and_words_in_turn(tmp_path):
    item = {
        "target": ["x", "T"],
        "reference": [[0, ["is blue", " "], "A"], [1, ["", ""], "B"], [2, ["is longer", "has dots"], "C"]],
    }
    put(tmp_path / "multiturnfashion/data/all.val.json", [item])
    put(tmp_path / "multiturnfashion/image_splits/split.all.val.json", ["T", "A", "B", "C", "T"])
    put(tmp_path / "mbeir_images/fashioniq_images/T.jpg")
    part = only(tmp_path, "mt_fashioniq")
    kinds = [
        value if isinstance(value, str) else value.path.rsplit("/", 1)[1] for value in part.queries[0].parts
    ]
    assert kinds == ["A.jpg", "is blue", "B.jpg", "C.jpg", "is longer and has dots"]
    assert isinstance(part.queries[0].parts[0], Picture)
    assert [record_id(c) for c in part.candidates] == ["T", "A", "B", "C"]
    assert part.qrels == {"turns:0": {"T": 1}} and part.metrics == ("hit@5", "hit@8", "hit@10")


def test_ccneg_takes_the_last_rows_and_strips_commas_of_the_negative_only(tmp_path, monkeypatch):
    import torch

    monkeypatch.setattr("umarvel_ray.evaluate.zeroshot_lists._CCNEG_TEST", 2)
    rows = [
        {"json": {"caption": f"a, b {n}"}, "sop_data": {"negative-prompt": f"a, not b {n}"}} for n in range(3)
    ]
    paths = [f"/home/somebody/ccneg/images/{n}.jpg" for n in range(3)]
    for n in range(3):
        put(tmp_path / f"ccneg/images/{n}.jpg")
    torch.save({"image_paths": paths, "annotations": rows}, tmp_path / "ccneg/ccneg_preprocessed.pt")
    part = only(tmp_path, "ccneg")
    assert [query.qid for query in part.queries] == ["image:1", "image:2"]
    assert part.queries[0].img_path == str(tmp_path / "ccneg/images/1.jpg")
    assert [c.txt for c in part.candidates[:2]] == ["a, b 1", "a not b 1"]
    assert part.ties == "lost" and part.lists["image:1"] == ("right:1", "wrong:1")


class Evil:
    def __reduce__(self):
        return (print, ("ran",))


def test_no_file_of_a_set_can_run_code(tmp_path, capsys):
    import torch

    put(tmp_path / "ccneg/x")
    torch.save({"image_paths": Evil(), "annotations": []}, tmp_path / "ccneg/ccneg_preprocessed.pt")
    with pytest.raises(DataError, match="not CC-Neg's file of plain values"):
        read_sets(["ccneg"], tmp_path)
    put(tmp_path / "MSVD/test_list.txt", "v\n")
    put(tmp_path / "MSVD/raw-captions.pkl", pickle.dumps({"v": Evil()}))
    with pytest.raises(DataError, match="may run code; it was not loaded"):
        read_sets(["msvd"], tmp_path)
    assert "ran" not in capsys.readouterr().out


def test_sugarcrepe_has_seven_subsets_and_a_tie_is_wrong(tmp_path):
    for name in ("add_att", "add_obj", "replace_att", "replace_obj", "replace_rel", "swap_att", "swap_obj"):
        rows = {"0": {"filename": "7.jpg", "caption": "a red kite", "negative_caption": "a blue kite"}}
        put(tmp_path / f"sugar-crepe/data/{name}.json", rows)
    put(tmp_path / "images/val2017/7.jpg")
    parts = read_sets(["sugarcrepe"], tmp_path)["sugarcrepe"]
    assert len(parts) == 7 and {part.ties for part in parts} == {"lost"}
    assert parts[0].queries[0].img_path == str(tmp_path / "images/val2017/7.jpg")
    assert all(part.queries[0].instruction is None for part in parts)
    theirs = read_sets(["sugarcrepe"], tmp_path, protocol="umarvel")["sugarcrepe"]
    assert [part.queries[0].instruction is None for part in theirs] == [False] * 4 + [True] * 3


def test_msrvtt_and_msvd_ask_with_captions_for_videos(tmp_path):
    path = put(tmp_path / "msrvtt/annotations/MSRVTT_JSFUSION_test.csv", "")
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows(
            [["key", "video_id", "sentence"], ["r0", "video7", "a man, singing"], ["r1", "video9", "None"]]
        )
    part = only(tmp_path, "msrvtt")
    assert [query.txt for query in part.queries] == ["a man, singing", "None"]
    assert part.candidates[0].parts == (Video(str(tmp_path / "msrvtt/videos/video7.mp4")),)
    put(tmp_path / "MSVD/test_list.txt", "clip_1\nclip_2\n")
    captions = {"clip_1": [["a", "dog"], ["it", "runs"]], "clip_2": [["rain"]], "clip_3": [["no", "test"]]}
    put(tmp_path / "MSVD/raw-captions.pkl", pickle.dumps(captions))
    part = only(tmp_path, "msvd")
    assert [query.txt for query in part.queries] == [
        "a dog",
        "it runs",
        "rain",
    ]  # every caption, not one per video
    assert part.qrels["text:1"] == {"clip_1": 1} and len(part.candidates) == 2
    assert part.candidates[0].parts[0].path.endswith("MSVD/YouTubeClips/clip_1.avi")


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_mmeb_lists_begin_with_the_answer_and_are_ranked_without_it(form, tmp_path):
    rows = [
        {
            "qry_inst": "<|image_1|> Find it.",
            "qry_text": "<|image_1|>\nWhich?",
            "qry_img_path": "a.jpg",
            "tgt_inst": "",
            "tgt_text": ["cat", "dog", "cat"],
            "tgt_img_path": ["", "", ""],
        },
        {
            "qry_inst": "",
            "qry_text": "x",
            "qry_img_path": "",
            "tgt_inst": "",
            "tgt_text": ["dog", "cow"],
            "tgt_img_path": ["", ""],
        },
    ]
    folder = tmp_path / "mmeb"
    folder.mkdir()
    if form == "jsonl":
        (folder / "VOC2007.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), folder / "VOC2007.parquet")
    part = only(tmp_path, "mmeb")
    assert part.queries[0].instruction == "Find it." and part.queries[0].txt == "Which?"
    assert part.queries[0].img_path == str(folder / "images/a.jpg")
    # The same option in two lists is one record; a repeat of the answer is the answer.
    assert [len(dids) for dids in part.lists.values()] == [2, 2] and len(part.candidates) == 3
    assert part.ties == "averaged" and part.name == "mmeb: VOC2007"


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match="no zero-shot set is called 'flickr'"):
        read_sets(["flickr"], tmp_path)
    with pytest.raises(DataError, match=r"missing\. Put CIRCO"):
        put_circo(tmp_path)
        (tmp_path / "circo/annotations/val.json").unlink()
        read_sets(["circo"], tmp_path)
    put(tmp_path / "circo/annotations/val.json", [{"id": 3}])
    with pytest.raises(DataError, match=r"not as published: KeyError"):
        read_sets(["circo"], tmp_path)
