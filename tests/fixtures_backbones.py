"""Tiny random models of all three backbones, and an encoder written with nothing but stock modules."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from umarvel_ray.data.records import Candidate, Picture, Query

KINDS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
START, END = "<instruction_start>", "<instruction_end>"


@pytest.fixture(scope="session")
def backbones(backbone: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folder of each kind; the first is `backbone` itself, whose tokenizer all of them share."""
    home = tmp_path_factory.mktemp("backbones")
    return {"qwen2_vl": backbone} | {kind: _make(kind, backbone, home / kind) for kind in KINDS[1:]}


def _make(kind: str, donor: str, folder: Path) -> str:
    import torch
    from transformers import (
        AutoModelForImageTextToText,
        Qwen2_5_VLConfig,
        Qwen3VLConfig,
    )
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    shutil.copytree(donor, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    given = json.loads((Path(donor) / "config.json").read_text())
    ids = {name: given[name] for name in given if name.endswith("token_id")}
    text: dict[str, Any] = {
        "vocab_size": given["text_config"]["vocab_size"],
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 4096,
        "initializer_range": 0.05,
        "pad_token_id": given["text_config"]["pad_token_id"],
        "bos_token_id": given["text_config"]["bos_token_id"],
        "eos_token_id": given["text_config"]["eos_token_id"],
    }
    rope = {"rope_type": "default", "rope_theta": 1e6}
    vision: dict[str, Any] = {
        "depth": 3,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "out_hidden_size": 32,
        "initializer_range": 0.1,
    }
    if kind == "qwen2_5_vl":
        config = Qwen2_5_VLConfig(
            text_config=text | {"rope_parameters": rope | {"mrope_section": [2, 3, 3]}},
            vision_config=vision | {"window_size": 56, "fullatt_block_indexes": [1], "tokens_per_second": 2},
            tie_word_embeddings=False,
            **ids,
        )
        processor = Qwen2VLImageProcessorPil(min_pixels=4 * 784, max_pixels=300 * 784)
    else:
        config = Qwen3VLConfig(
            text_config=text
            | {
                "head_dim": 16,
                "rope_parameters": rope | {"mrope_section": [4, 2, 2], "mrope_interleaved": True},
            },
            vision_config=vision | {"deepstack_visual_indexes": [0, 1], "num_position_embeddings": 16},
            tie_word_embeddings=True,
            **ids,
        )
        processor = Qwen2VLImageProcessorPil(
            patch_size=16,
            image_mean=[0.5] * 3,
            image_std=[0.5] * 3,
            min_pixels=4 * 784,
            max_pixels=300 * 784,
        )
        template = folder / "chat_template.jinja"
        system = "\n".join(
            line for line in template.read_text().splitlines() if "You are a helpful assistant" not in line
        )
        template.write_text(
            system.replace("{%- if loop.first and message.role != 'system' %}\n    {%- endif %}", "")
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = AutoModelForImageTextToText.from_config(config)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


class StockEncoder:
    """An encoder of stock parts: whole strings tokenized at once, a padded batch, a mask and positions spelt
    out, means over characters' places."""

    def __init__(self, folder: str, *, eager: bool = True) -> None:
        import torch
        from transformers import AutoModelForImageTextToText, AutoTokenizer
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self.model: Any = AutoModelForImageTextToText.from_pretrained(
            folder, attn_implementation="eager" if eager else "sdpa"
        )
        self.model.eval().requires_grad_(False)
        self.processor: Any = Qwen2VLImageProcessorPil.from_pretrained(folder)
        if self.tokenizer.convert_tokens_to_ids("<emb>") in (None, self.tokenizer.unk_token_id):
            self.tokenizer.add_tokens(["<emb>", START, END], special_tokens=True)
            table = self.model.get_input_embeddings().weight
            with torch.no_grad():
                table[len(self.tokenizer) - 3 : len(self.tokenizer)] = table.mean(0)

    def prompt(self, record: Query | Candidate, instruction: str) -> tuple[str, str]:
        """The whole prompt, one placeholder a picture, and the part of it that is not pooled."""
        content: list[dict[str, str]] = []
        asked = record.instruction if isinstance(record, Query) and instruction != "none" else None
        span = f"{START}{asked}{END}" if asked and instruction == "masked" else asked or ""
        left_out = span if instruction == "masked" else ""
        for part in record.content:
            if isinstance(part, Picture):
                content.append({"type": "image"})
            else:
                content.append({"type": "text", "text": closed(f"{span} {part}" if span else capital(part))})
                span = ""
        if span:
            content.append({"type": "text", "text": closed(span)})
        turns = [
            {"role": "user", "content": content},
            {"role": "assistant", "content": [{"type": "text", "text": "<emb>."}]},
        ]
        return self.tokenizer.apply_chat_template(turns, tokenize=False), left_out

    def embed(
        self,
        records: Sequence[Query | Candidate],
        *,
        attention: str = "bidirectional",
        pooling: str = "mean",
        instruction: str = "masked",
        positions: str = "sequential",
    ) -> Any:
        """(N, D) float32, unit norm."""
        import torch

        pad = self.tokenizer.pad_token_id
        rows, kept, pictures = [], [], []
        for record in records:
            text, left_out = self.prompt(record, instruction)
            images = [
                Image.open(part.path).convert("RGB") for part in record.content if isinstance(part, Picture)
            ]
            pictures += images
            pieces = text.split("<|image_pad|>")
            for number, image in enumerate(images, start=1):
                grid = self.processor([image], return_tensors="pt")["image_grid_thw"][0]
                pieces[number] = "<|image_pad|>" * (int(grid.prod()) // 4) + pieces[number]
            text = "".join(pieces)
            found = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            start = text.index(left_out) if left_out else 0
            inside = [start <= a and b <= start + len(left_out) for a, b in found["offset_mapping"]]
            if pooling == "last":
                last = found["input_ids"].index(self.tokenizer.convert_tokens_to_ids("<emb>")) - 1
                inside = [place != last for place in range(len(inside))]
            rows.append(found["input_ids"])
            kept.append([not out for out in inside])
        longest = max(map(len, rows))
        ids = torch.tensor([row + [pad] * (longest - len(row)) for row in rows])
        real = torch.tensor([[True] * len(row) + [False] * (longest - len(row)) for row in rows])
        kept_NT = torch.tensor([row + [False] * (longest - len(row)) for row in kept])
        sees = real[:, None, None, :].expand(-1, 1, longest, longest)
        if attention == "causal":
            sees = sees & torch.ones(longest, longest, dtype=torch.bool).tril()
        lowest = torch.finfo(self.model.dtype).min
        mask = torch.zeros(sees.shape, dtype=self.model.dtype).masked_fill(~sees, lowest)
        pixels = dict(self.processor(pictures, return_tensors="pt")) if pictures else {}
        place = torch.arange(longest).expand(3, len(rows), -1)
        if positions == "mrope":
            is_image = (ids == self.model.config.image_token_id).int()
            place, _ = self.model.model.get_rope_index(
                ids, is_image, image_grid_thw=pixels.get("image_grid_thw"), attention_mask=real.int()
            )
        hidden = self.model.model(
            input_ids=ids, attention_mask=mask, position_ids=place, use_cache=False, **pixels
        ).last_hidden_state.float()
        mean = (hidden * kept_NT[..., None]).sum(1) / kept_NT.sum(1, keepdim=True)
        return mean / mean.norm(dim=1, keepdim=True)


def capital(text: str) -> str:
    """As queries begin."""
    return closed(text[0].upper() + text[1:]) if text else text


def closed(text: str) -> str:
    """As texts end."""
    return text if text.endswith((".", "?", "!")) else f"{text}."


@pytest.fixture(scope="session")
def mixed_records(pictures: dict[str, str]) -> list[Query | Candidate]:
    """Texts, pictures, both, and several pictures between words; with and without instruction."""
    first, second = Picture(pictures["kite"]), Picture(pictures["tower"])
    return [
        Query(qid="9:1", txt="a red kite over the hill", instruction="Find a photo."),
        Query(qid="9:2", img_path=pictures["kite"], instruction="Find the caption."),
        Query(qid="9:3", txt="Where?", img_path=pictures["tower"]),
        Query(qid="9:4", parts=(first, "longer sleeves", second, "and in blue"), instruction="Find it."),
        Query(qid="9:5", parts=("the tower", second, first)),
        Candidate(did="9:6", txt="Here."),
        Candidate(did="9:7", img_path=pictures["boat"]),
        Candidate(
            did="9:8", txt="The tower stands on the hill, the hill, the hill", img_path=pictures["hill"]
        ),
    ]


def noise(path: Path, width: int, height: int, seed: int = 0) -> str:
    """A picture of noise."""
    rng = np.random.default_rng(seed)
    Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)
    return str(path)
