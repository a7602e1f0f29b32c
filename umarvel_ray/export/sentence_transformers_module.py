"""A U-MARVEL embedding model as a module of Sentence Transformers; copied beside the weights by the export.

It stands alone: it knows torch, Transformers, Pillow and Sentence Transformers, and nothing of umarvel_ray,
so that whoever gets the folder needs nothing else. Inputs are texts, images (Pillow images, or paths or URLs
that Sentence Transformers takes for images), or both as `{"text": …, "image": …}`; the prompt is the
instruction.

    model = SentenceTransformer(folder, trust_remote_code=True)
    queries = model.encode(["a red kite"], prompt="Find a photo.")
    pool = model.encode([Image.open("kite.jpg"), {"text": "A kite.", "image": Image.open("boat.jpg")}])
"""

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from sentence_transformers.base.modules import InputModule
from transformers import AutoConfig, AutoModel, AutoTokenizer

EMBED, START, END = "<emb>", "<instruction_start>", "<instruction_end>"
SETTINGS = "embedding.json"
COMPRESSION = {
    (True, False): "\nSummarize above sentence in one word: ",
    (False, True): "\nSummarize above image in one word: ",
    (True, True): "\nSummarize above image and sentence in one word: ",
}


class UMarvel(InputModule):
    """Prompt, backbone, pooling and unit norm in one."""

    config_file_name = SETTINGS
    auto_class: Any = AutoModel
    tokenizer: Any  # the base class knows fewer kinds

    def __init__(
        self, model: Any, tokenizer: Any, settings: dict[str, Any], processor: dict[str, Any]
    ) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.settings = settings
        self.processor = processor

    @classmethod
    def load(
        cls,
        model_name_or_path: str,
        subfolder: str = "",
        token: bool | str | None = None,
        cache_folder: str | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        model_kwargs: dict[str, Any] | None = None,
        **_: Any,
    ) -> "UMarvel":
        """Called by `SentenceTransformer`; `model_kwargs` go to Transformers (dtype, device_map, …)."""
        hub = {
            "token": token,
            "cache_folder": cache_folder,
            "revision": revision,
            "local_files_only": local_files_only,
        }
        folder = cls.load_dir_path(model_name_or_path, subfolder=subfolder, **hub) or model_name_or_path
        read = {
            name: json.loads((Path(folder) / name).read_text(encoding="utf-8"))
            for name in (cls.config_file_name, "preprocessor_config.json")
        }
        options = {"attn_implementation": "sdpa", "config": AutoConfig.from_pretrained(folder)}
        model = cls.auto_class.from_pretrained(folder, **options | (model_kwargs or {}))
        tokenizer = AutoTokenizer.from_pretrained(folder)
        return cls(model.eval(), tokenizer, read[cls.config_file_name], read["preprocessor_config.json"])

    def save(self, output_path: str, *args: Any, safe_serialization: bool = True, **kwargs: Any) -> None:
        """Everything that `load` reads."""
        folder = Path(output_path)
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        for name, values in (
            (self.config_file_name, self.settings),
            ("preprocessor_config.json", self.processor),
        ):
            (folder / name).write_text(json.dumps(values, indent=2), encoding="utf-8")

    @property
    def modalities(self) -> list[Any]:
        """What may come in."""
        return ["text", "image", ("image", "text")]

    def get_embedding_dimension(self) -> int:
        """Width of an embedding."""
        return self.model.config.get_text_config().hidden_size

    @property
    def max_seq_length(self) -> int:
        """Tokens of a text that are read, instruction included."""
        return self.settings["settings"]["max_text_tokens"]

    def preprocess(self, inputs: Any, prompt: str | None = None, **_: Any) -> dict[str, Any]:
        """Texts and images → a padded batch with its attention mask, positions and pooling mask."""
        rows, pooled, patches, grids = [], [], [], []
        for one in inputs:
            text, image = _text_and_image(one)
            num_tokens = 0
            if image is not None:
                cut, grid = self._patches(image)
                patches.append(cut)
                grids.append((1, *grid))
                num_tokens = grid[0] * grid[1] // self.processor["merge_size"] ** 2
            ids = self._ids(text, num_tokens, prompt or "")
            rows.append(ids)
            pooled.append(self._pooled(ids))
        longest = max(map(len, rows))
        real = torch.tensor([[True] * len(row) + [False] * (longest - len(row)) for row in rows])
        pad = self.tokenizer.pad_token_id or 0
        features: dict[str, Any] = {
            "input_ids": torch.tensor([row + [pad] * (longest - len(row)) for row in rows]),
            "attention_mask": real.long(),
            "pooled": torch.tensor([row + [False] * (longest - len(row)) for row in pooled]),
        }
        if grids:
            features["pixel_values"] = torch.from_numpy(np.concatenate(patches))
            features["image_grid_thw"] = torch.tensor(grids)
        return features

    def forward(self, features: dict[str, Any], **_: Any) -> dict[str, Any]:
        """Adds `sentence_embedding`: float32, unit norm."""
        ids = features["input_ids"]
        real = features["attention_mask"].bool()
        length = ids.shape[1]
        sees = real[:, None, None, :].expand(-1, 1, length, length)
        if self.settings["settings"]["attention"] == "causal":
            sees = sees & torch.ones(length, length, dtype=torch.bool, device=ids.device).tril()
        # A padded place sees itself, so that no row of the mask is empty; it is not pooled.
        sees = sees | torch.eye(length, dtype=torch.bool, device=ids.device)
        dtype = self.model.dtype
        mask = torch.zeros(sees.shape, dtype=dtype, device=ids.device)
        mask = mask.masked_fill(~sees, torch.finfo(dtype).min)
        images = {name: features[name] for name in ("pixel_values", "image_grid_thw") if name in features}
        positions = torch.arange(length, device=ids.device).expand(3, len(ids), -1)
        if self.settings["settings"]["positions"] == "mrope":
            is_image = (ids == self.model.config.image_token_id).int()
            positions, _ = self.model.get_rope_index(
                ids,
                is_image,
                image_grid_thw=images.get("image_grid_thw"),
                attention_mask=features["attention_mask"],
            )
        hidden = self.model(
            input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False, **images
        ).last_hidden_state.float()
        weight = features["pooled"][..., None].float()
        mean = (hidden * weight).sum(1) / weight.sum(1)
        features["sentence_embedding"] = torch.nn.functional.normalize(mean, dim=1)
        return features

    def _ids(self, text: str, num_image_tokens: int, instruction: str) -> list[int]:
        settings = self.settings["settings"]
        words = _clean(self._words(instruction))
        mode = settings["instruction"]
        if words and mode != "none":
            words = f"{START}{words}{END}" if mode == "masked" else words
            user = _clean(f"{words} {self._words(text)}")
        else:
            user = _clean(self._words(text))
        mark = "\x01text\x01"
        image = [{"type": "image"}] if num_image_tokens else []
        rendered = self.tokenizer.apply_chat_template(
            [
                {"role": "user", "content": [*image, {"type": "text", "text": mark}]},
                {"role": "assistant", "content": [{"type": "text", "text": f"{EMBED}."}]},
            ],
            tokenize=False,
            add_generation_prompt=settings["append_generation_prompt"],
        )
        before, after = rendered.split(mark)
        before = before.replace("<|image_pad|>", "<|image_pad|>" * num_image_tokens)
        user_ids = self._encode(user)[: settings["max_text_tokens"]]
        if settings["compression_prompt"]:
            request = COMPRESSION[bool(text), bool(num_image_tokens)]
            user_ids += self._encode(
                request.replace("Summarize", settings.get("compression_verb", "Summarize"))
            )
        return [*self._encode(before), *user_ids, *self._encode(after)]

    def _pooled(self, ids: list[int]) -> list[bool]:
        embed, start, end = self.tokenizer.convert_tokens_to_ids([EMBED, START, END])
        if self.settings["settings"]["pooling"] == "last":
            last = len(ids) - ids[::-1].index(embed) - 2
            return [place == last for place in range(len(ids))]
        if start not in ids:
            return [True] * len(ids)
        # A text cut inside its instruction has no end marker: all up to the assistant's turn is instruction.
        turn_ends = self.tokenizer.convert_tokens_to_ids("<|im_end|>")
        first = ids.index(start)
        last = ids.index(end) if end in ids else ids.index(turn_ends, first) - 1
        return [not first <= place <= last for place in range(len(ids))]

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []

    def _words(self, text: str) -> str:
        """Special tokens spelt out in a text are words, not commands."""
        if "<" not in text:
            return text
        special = dict.fromkeys([*self.tokenizer.all_special_tokens, EMBED, START, END])
        return re.sub("|".join(map(re.escape, special)), lambda found: " ".join(found.group()), text)

    def _patches(self, image: Image.Image) -> tuple[np.ndarray, tuple[int, int]]:
        """Pixel values (patches, 3·2·patch²) and the grid (height, width) in patches."""
        patch, merge = self.processor["patch_size"], self.processor["merge_size"]
        unit = patch * merge
        height, width = _resized_size(image.height, image.width, unit, self.processor["size"])
        pixels = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float32)
        mean, deviation = (
            np.array(self.processor[name], dtype=np.float32) for name in ("image_mean", "image_std")
        )
        pixels = (pixels / np.float32(255) - mean) / deviation
        cut = pixels.reshape(height // unit, merge, patch, width // unit, merge, patch, 3)
        cut = cut.transpose(0, 3, 1, 4, 6, 2, 5).reshape(-1, 3, 1, patch * patch)
        frames = self.processor["temporal_patch_size"]
        return np.repeat(cut, frames, axis=2).reshape(len(cut), -1), (height // patch, width // patch)


def _text_and_image(one: Any) -> tuple[str, Image.Image | None]:
    if isinstance(one, dict):
        text, image = one.get("text") or "", one.get("image")
    elif isinstance(one, str) and not _is_image_file(one):
        text, image = one, None
    else:
        text, image = "", one
    if isinstance(image, str):
        from transformers.image_utils import load_image

        image = load_image(image)
    if image is not None and not isinstance(image, Image.Image):
        image = Image.fromarray(np.asarray(image))
    return text, None if image is None else image.convert("RGB")


def _is_image_file(text: str) -> bool:
    from sentence_transformers.base.modality import is_image_url_or_path

    return is_image_url_or_path(text)


def _clean(text: str) -> str:
    text = text.replace("\r", "").strip().strip('"')
    if text:
        text = text[0].upper() + text[1:]
        text += "" if text[-1] in ".?!" else "."
    return text


def _resized_size(height: int, width: int, unit: int, bounds: dict[str, int]) -> tuple[int, int]:
    least, most = bounds["shortest_edge"], bounds["longest_edge"]
    if max(height, width) > 200 * min(height, width):
        raise ValueError(f"an image of {width}×{height} pixels is more than 200 times as long as wide")
    sides = [round(side / unit) * unit for side in (height, width)]
    if math.prod(sides) > most:
        shrink = math.sqrt(height * width / most)
        longest = most // unit**2 * unit
        sides = [min(longest, max(unit, math.floor(s / shrink / unit) * unit)) for s in (height, width)]
    elif math.prod(sides) < least:
        grow = math.sqrt(least / (height * width))
        sides = [math.ceil(side * grow / unit) * unit for side in (height, width)]
    return sides[0], sides[1]
