"""The pair files of the first stages, in each of the forms they are published in."""

import json
import pickle

import fsspec
import pytest
from PIL import Image

from umarvel_ray.data.text_pairs import CaptionPairs, NliPairs, check_captions
from umarvel_ray.errors import DataError
from umarvel_ray.storage import RemotePath

NLI = 'sent0,sent1,hard_neg\nNone,NA,null\n"A man, outside","He says ""hi""\non two lines",nan\n\nx,y,z\n'


@pytest.fixture
def nli(tmp_path):
    path = tmp_path / "nli.csv"
    path.write_text(NLI)
    return path


def test_words_that_look_like_nothing_are_words(nli):
    pairs = NliPairs(nli, use_hard_negatives=True)
    texts = [(p.query.txt, p.positive.txt, p.negatives[0].txt) for p in pairs]
    assert texts == [
        ("None", "NA", "null"),
        ("A man, outside", 'He says "hi"\non two lines', "nan"),
        ("x", "y", "z"),
    ]
    assert [(p.query.qid, p.positive.did, p.negatives[0].did) for p in pairs][2] == (
        "nli:3",
        "nli:3",
        "nli:3:hard",
    )
    assert all(p.query.instruction is None for p in pairs)
    assert pairs[-1] == pairs[2] == pickle.loads(pickle.dumps(pairs))[2]
    assert pairs.where(2) == f"{nli}:6"
    with pytest.raises(IndexError):
        pairs[3]


def test_hard_negatives_are_taken_only_when_asked_for(tmp_path, nli):
    assert NliPairs(nli, use_hard_negatives=False)[0].negatives == ()
    two = tmp_path / "two.csv"
    two.write_text("sent1,sent0\nb,a\n")
    assert NliPairs(two, use_hard_negatives=False)[0].query.txt == "a"
    with pytest.raises(DataError, match=r"two.csv:1: no column 'hard_neg'"):
        NliPairs(two, use_hard_negatives=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sent0,sent1\na,b\nc\n,d\n", "nli.csv:3: 2 of 3 rows lack one of"),
        ("sent0,sent1\na, \n", "nli.csv:2: 1 of 1 rows lack"),
        ("sent0,sent1\n", "has no row"),
        ("", "no column 'sent0'"),
    ],
)
def test_a_broken_csv_is_named(nli, text, message):
    nli.write_text(text)
    with pytest.raises(DataError, match=message):
        NliPairs(nli, use_hard_negatives=False)


OBJECT = {
    f"GCC_train_{n}": {
        "h5v": f"/home/them/cc3m/{n}.jpg",
        "h5a": "none.hdf5",
        "text": "",
        "instruct_ans": [f"It is {n}."],
    }
    for n in (1, 2)
}
CAPTIONS = [{"id": n, "image": f"{n}.jpg", "caption": f"It is {n}.", "blip_caption": "no"} for n in (1, 2)]
CHAT = [
    {
        "image": f"{n}.jpg",
        "conversations": [
            {"from": "human", "value": "<image>\nSay."},
            {"from": "gpt", "value": f"It is {n}."},
        ],
    }
    for n in (1, 2)
]
TXT = [{"image": f"/data/them/{n}.jpg", "txt": f"It is {n}."} for n in (1, 2)]


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for n in (1, 2):
        Image.new("RGB", (4, 4)).save(folder / f"{n}.jpg")
    return folder


@pytest.mark.parametrize("entries", [OBJECT, CAPTIONS, CHAT, TXT])
@pytest.mark.parametrize("form", ["one line", "indented", "lines"])
def test_every_form_gives_the_same_pairs(tmp_path, images, entries, form):
    path = tmp_path / "train.json"
    if form == "lines":
        values = entries.values() if isinstance(entries, dict) else entries
        path.write_text("\n\n".join(json.dumps(value) for value in values))
    else:
        path.write_text(json.dumps(entries, indent=1 if form == "indented" else None))
    pairs = CaptionPairs(path, image_root=images)
    assert len(pairs) == 2
    for n, pair in enumerate(pairs, start=1):
        assert (pair.query.qid, pair.query.txt, pair.query.img_path) == (f"cc3m:{n}", f"It is {n}.", None)
        assert (pair.positive.did, pair.positive.txt) == (f"cc3m:{n}", None)
        assert pair.positive.img_path == str(images / f"{n}.jpg")
    assert pickle.loads(pickle.dumps(pairs))[-1] == pairs[1]
    assert check_captions(pairs, images="decode") == []


def test_the_longest_tail_under_the_root_is_taken(tmp_path, images):
    """The same file name stands in two folders; the path says which."""
    (images / "b").mkdir()
    Image.new("RGB", (4, 4)).save(images / "b" / "1.jpg")
    path = tmp_path / "train.jsonl"
    names = ["/x/a/b/1.jpg", "/x/a/c/1.jpg", "b/1.jpg", "../../b/1.jpg", "C:\\x\\b\\1.jpg", "/x/3.jpg"]
    path.write_text("\n".join(json.dumps({"image": name, "caption": "c"}) for name in names))
    pairs = CaptionPairs(path, name="own", image_root=images)
    found = [pairs[row].positive.img_path for row in range(5)]
    inner, outer = str(images / "b" / "1.jpg"), str(images / "1.jpg")
    assert found == [inner, outer, inner, inner, inner]
    with pytest.raises(
        DataError, match=r"train.jsonl:6: the image is missing: no tail of '/x/3.jpg' is a file under"
    ):
        pairs[5]
    assert CaptionPairs(path)[2].positive.img_path == str(tmp_path / "b" / "1.jpg")
    with pytest.raises(DataError, match="no such folder"):
        CaptionPairs(path, image_root=tmp_path / "nowhere")


def test_in_object_storage_one_picture_answers_for_its_folder(tmp_path, monkeypatch):
    """A question for each of half a million pictures would take hours."""
    store = fsspec.filesystem("memory")
    for name in ("b/1.jpg", "b/2.jpg", "3.jpg"):
        store.pipe(f"/captions-test/{name}", b"a picture")
    asked: list[str] = []
    is_file = RemotePath.is_file
    monkeypatch.setattr(RemotePath, "is_file", lambda path: (asked.append(str(path)), is_file(path))[1])
    path = tmp_path / "train.jsonl"
    names = ["/x/a/b/1.jpg", "/x/a/b/2.jpg", "/x/3.jpg", "/x/4.jpg", "/x/a/b/5.jpg"]
    path.write_text("\n".join(json.dumps({"image": name, "caption": "c"}) for name in names))
    pairs = CaptionPairs(path, image_root="memory://captions-test")
    found = [str(pairs[row].positive.img_path) for row in range(5)]
    assert found == [
        f"memory://captions-test/{name}" for name in ("b/1.jpg", "b/2.jpg", "3.jpg", "4.jpg", "b/5.jpg")
    ]
    assert [name.rsplit("/", 1)[1] for name in asked] == ["1.jpg"] * 3 + ["3.jpg"] * 2
    missing = check_captions(pairs, images="exists")
    assert len(missing) == 1 and "2 " in missing[0] and "the image is missing" in missing[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"image": "1.jpg", "caption": "c"}, {"image": "1.jpg"}, 7]', r"2 of 3 \(first: entry 2\)"),
        ('{"k": {"h5v": "1.jpg", "instruct_ans": []}}', r"1 of 1 \(first: entry 'k'\)"),
        ("[\n{]", "train.json:2: not valid JSON"),
        ("[]", "has no entry"),
        ("", "not valid JSON"),
        ("7", "a int. Give a JSON object or list"),
    ],
)
def test_a_broken_document_is_named(tmp_path, text, message):
    path = tmp_path / "train.json"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        CaptionPairs(path)


def test_the_check_groups_faults(tmp_path, images):
    path = tmp_path / "train.jsonl"
    lines = [
        {"image": "1.jpg"},
        {"image": "2.jpg", "caption": "c"},
        {"image": "9.jpg", "caption": "c"},
        {"caption": "c"},
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    (images / "2.jpg").write_text("no picture")
    entry, picture, missing = check_captions(CaptionPairs(path, image_root=images), images="decode")
    assert entry.startswith(f"{path}:1: an entry lacks its image or its caption: it has not both (2 such")
    assert picture.startswith(f"{path}:2: the image is broken: {images}/2.jpg: ")
    assert missing.startswith(f"{path}:3: the image is missing: no tail of '9.jpg'")
    assert check_captions(CaptionPairs(path, image_root=images), images="none") == [entry, missing]
