"""What the tests of model, training and their data share: a tiny random Qwen2-VL, pictures, a small M-BEIR.

`Reference` reads records with plain Transformers modules, one at a time: tokenizer, image processor, eager
attention.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from umarvel_ray.data.batches import TrainingItem
from umarvel_ray.data.mbeir import (
    TASK_BY_NAME,
    Mbeir,
    QueryRecord,
    write_instructions,
    write_pool,
    write_queries,
)
from umarvel_ray.data.records import Candidate, Query
from umarvel_ray.data.training_sets import OneTaskSet
from umarvel_ray.demo.backbone import BackboneConfig, make_backbone

CONFIG = BackboneConfig(
    seed=0,
    hidden_size=32,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    intermediate_size=64,
    vocab_size=400,
    vision_embed_dim=32,
    vision_depth=1,
    vision_num_heads=2,
)
TEXTS = ["A red kite over the hill.", "Find a photo of the caption.", "Where does the tower stand?"] * 4
SIZES = {"kite": (64, 60), "boat": (84, 56), "tower": (56, 112), "hill": (64, 60)}
"""Width and height of each picture; the first and the last take the same tokens."""


@pytest.fixture(scope="session")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a random Qwen2-VL of two layers."""
    folder = tmp_path_factory.mktemp("model") / "backbone"
    make_backbone(TEXTS, folder, CONFIG)
    return str(folder)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Paths of pictures of noise, by name, in four sizes."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    paths = {name: str(folder / f"{name}.png") for name in SIZES}
    for name, (width, height) in SIZES.items():
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(paths[name])
    return paths


class Reference:
    """The backbone in plain Transformers modules."""

    def __init__(self, folder: str) -> None:
        import torch
        from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self.model: Any = Qwen2VLForConditionalGeneration.from_pretrained(folder, attn_implementation="eager")
        self.model.eval().requires_grad_(False)
        self.images: Any = Qwen2VLImageProcessorPil.from_pretrained(folder)
        self.tokenizer.add_tokens(["<emb>", "<instruction_start>", "<instruction_end>"], special_tokens=True)
        table = self.model.get_input_embeddings().weight
        with torch.no_grad():
            mean_D = table.mean(0)
            table[len(self.tokenizer) - 3 : len(self.tokenizer)] = mean_D

    def render(self, user: Sequence[Any], answer: str | None, *, generation_prompt: bool = False) -> str:
        """The whole prompt as one string, an image placeholder for each image.

        Args:
            user: Strings, and None where an image stands.
            answer: The assistant's turn; None for none.
            generation_prompt: Whether an assistant's turn is opened at the end.
        """
        content = [{"type": "image"} if part is None else {"type": "text", "text": part} for part in user]
        turns: list[dict[str, Any]] = [{"role": "user", "content": content}]
        if answer is not None:
            turns.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        return self.tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=generation_prompt
        )

    def pixels(self, paths: Sequence[str]) -> dict[str, Any]:
        """`pixel_values` and `image_grid_thw`; empty without images."""
        if not paths:
            return {}
        return dict(self.images([Image.open(path) for path in paths], return_tensors="pt"))

    def expand(self, text: str, pixels: dict[str, Any]) -> str:
        """Each image placeholder repeated as often as the image has tokens."""
        pieces = text.split("<|image_pad|>")
        grids = pixels.get("image_grid_thw", [])
        assert len(pieces) == len(grids) + 1
        for number, grid in enumerate(grids, start=1):
            pieces[number] = "<|image_pad|>" * (int(grid.prod()) // 4) + pieces[number]
        return "".join(pieces)

    def tokens(self, text: str) -> Any:
        """Ids (1, T) of a whole string."""
        return self.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]


@pytest.fixture(scope="session")
def reference(backbone: str) -> Reference:
    """Stock modules over the tiny backbone."""
    return Reference(backbone)


@dataclass(frozen=True)
class ListSet(OneTaskSet):
    """A training set in memory; equal words and picture are equal content."""

    items: tuple[TrainingItem, ...]
    fingerprint: str = "list"

    def __len__(self) -> int:
        return len(self.items)

    def item(self, row: int, *, visit: int) -> TrainingItem:
        return self.items[row]

    def content_key(self, candidate: Candidate) -> Hashable:
        return candidate.txt, candidate.img_path


def training_item(
    query: Query,
    *positives: Candidate,
    others: Sequence[Candidate] = (),
    scores: Sequence[float] | None = None,
) -> TrainingItem:
    """One visit: the first of `positives` is drawn, all are relevant."""
    return TrainingItem(
        query=query,
        positive=positives[0],
        others=tuple(others),
        scores=None if scores is None else tuple(scores),
        relevant=frozenset((positive.txt, positive.img_path) for positive in positives),
        more_positives=tuple(positives[1:]),
    )


def replicated(model: Any, lanes: Any, **settings: Any) -> Any:
    """The plain strategy."""
    from umarvel_ray.train.settings import TrainSettings
    from umarvel_ray.train.strategy import Replicated

    values = {"batch_size": 1, "num_steps": 1, "learning_rate": 1e-3} | settings
    return Replicated(model, lanes, TrainSettings(**values))


def write_nli(folder: Path) -> Path:
    """Twelve sentence pairs, as the file of stage 1a has them."""
    colours = ["red", "blue", "grey", "pale"]
    things = ["kite", "tower", "boat"]
    rows = [
        f"a {colour} {thing},the {thing} is {colour},no {thing}" for colour in colours for thing in things
    ]
    path = folder / "nli.csv"
    path.write_text("\n".join(["sent0,sent1,hard_neg", *rows]) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def mbeir_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small M-BEIR: MSCOCO's two tasks, OVEN and InfoSeek with shared passages, one question asked twice.

    `kite.png` and `again.png` are the same bytes; 5:1 and 6:1 have the same words.
    """
    root = tmp_path_factory.mktemp("data") / "M-BEIR"
    images = root / "mbeir_images"
    images.mkdir(parents=True)
    for name, colour in {"kite": "red", "again": "red", "boat": "blue", "tower": "grey"}.items():
        Image.new("RGB", (30, 30), colour).save(images / f"{name}.png")
    photos = [
        Candidate(did=f"9:{number}", img_path=str(images / f"{name}.png"))
        for number, name in enumerate(("kite", "again", "boat"), start=1)
    ]
    captions = [Candidate(did="9:11", txt="A kite."), Candidate(did="9:12", txt="Flying.")]
    passages = [
        Candidate(did="5:1", txt="A tower in Paris."),
        Candidate(did="6:1", txt="A tower in Paris."),
        Candidate(did="6:2", txt="A bridge."),
    ]
    tower, boat = str(images / "tower.png"), str(images / "boat.png")
    records = {
        "mscoco": [
            QueryRecord(query=Query(qid="9:101", txt="a kite"), positives=("9:1",), task_id=0),
            QueryRecord(query=Query(qid="9:102", img_path=boat), positives=("9:11", "9:12"), task_id=3),
            QueryRecord(query=Query(qid="9:103", txt="a kite"), positives=("9:3",), task_id=0),
        ],
        "oven": [
            QueryRecord(
                query=Query(qid="5:201", txt="Where?", img_path=tower), positives=("5:1", "6:1"), task_id=6
            )
        ],
        "infoseek": [
            QueryRecord(query=Query(qid="6:301", txt="What?", img_path=tower), positives=("6:2",), task_id=6)
        ],
    }
    mbeir = Mbeir(root)
    for dataset, queries in records.items():
        write_queries(mbeir.training_queries_path(dataset), queries, root)
    everything = [query for queries in records.values() for query in queries]
    write_queries(mbeir.union_training_queries_path(), everything, root)
    write_pool(mbeir.global_pool_path("train"), [*passages, *photos, *captions], root)
    for split in ("val", "test"):
        for name, queries in (("mscoco_task0", records["mscoco"][:1]), ("oven_task6", records["oven"])):
            write_queries(mbeir.queries_path(TASK_BY_NAME[name], split), queries, root)
        write_pool(mbeir.local_pool_path(TASK_BY_NAME["mscoco_task0"], split), photos, root)
    write_pool(mbeir.local_pool_path(TASK_BY_NAME["oven_task6"], "test"), passages[:1], root)
    write_instructions(
        mbeir.instructions_path(),
        {
            (9, "text", "image"): ["Find a photo.", "Show it.", "Get the picture.", "Which image?"],
            (9, "image", "text"): ["Find the caption."],
            (5, "image,text", "text"): ["Answer."],
            (6, "image,text", "text"): ["Reply."],
        },
    )
    return root


def make_towers(folder: Path, kind: str) -> str:
    """A random CLIP or SigLIP of one layer a tower, in the layout that Transformers reads."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        CLIPConfig,
        CLIPImageProcessor,
        CLIPModel,
        PreTrainedTokenizerFast,
        SiglipConfig,
        SiglipImageProcessor,
        SiglipModel,
    )

    words = ["<pad>", "<unk>", "<end>", "a", "red", "kite", "blue", "boat", "find", "photo"]
    tokenizer = Tokenizer(models.WordLevel({word: row for row, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token="<end>"
    ).save_pretrained(folder)
    layers = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = layers | {
        "vocab_size": len(words),
        "max_position_embeddings": 8,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    vision = layers | {"image_size": 16, "patch_size": 8}
    torch.manual_seed(0)
    size = {"height": 16, "width": 16}
    if kind == "clip":
        CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)).save_pretrained(
            folder
        )
        CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=size).save_pretrained(folder)
    else:
        text |= {"projection_size": 16}
        SiglipModel(SiglipConfig(text_config=text, vision_config=vision)).save_pretrained(folder)
        SiglipImageProcessor(size=size).save_pretrained(folder)
    return str(folder)
