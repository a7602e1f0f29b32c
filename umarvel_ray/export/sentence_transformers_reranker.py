"""A U-MARVEL reranker as a module of Sentence Transformers' CrossEncoder; copied beside the weights.

It stands alone but for `sentence_transformers_module.py`, which is copied with it: both know torch,
Transformers, Pillow and Sentence Transformers, and nothing of umarvel_ray. Each half of a pair is a text, an
image, or both as `{"text": …, "image": …}`; the prompt is the instruction, put before the query.

    model = CrossEncoder(folder, trust_remote_code=True)
    model.predict([("a red kite", Image.open("kite.jpg"))], prompt="Find a photo.")
"""

from typing import Any

import numpy as np
import torch
from transformers import AutoModelForImageTextToText

from .sentence_transformers_module import UMarvel, _clean, _text_and_image


class UMarvelReranker(UMarvel):
    """Prompt, backbone and two rows of its LM head in one; `scores` are the log-odds of Yes against No."""

    config_file_name = "reranker.json"
    auto_class = AutoModelForImageTextToText

    def preprocess(self, inputs: Any, prompt: str | None = None, **_: Any) -> dict[str, Any]:
        """Pairs → a batch padded on the left, with its images."""
        rows, patches, grids = [], [], []
        for query, candidate in inputs:
            ids, images = self._pair(_text_and_image(query), _text_and_image(candidate), prompt or "")
            rows.append(ids)
            patches += [cut for cut, _ in images]
            grids += [(1, *grid) for _, grid in images]
        longest = max(map(len, rows))
        pad = self.tokenizer.pad_token_id or 0
        features: dict[str, Any] = {
            "input_ids": torch.tensor([[pad] * (longest - len(row)) + row for row in rows]),
            "attention_mask": torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows]),
        }
        if grids:
            features["pixel_values"] = torch.from_numpy(np.concatenate(patches))
            features["image_grid_thw"] = torch.tensor(grids)
        return features

    def forward(self, features: dict[str, Any], **_: Any) -> dict[str, Any]:
        """Adds `scores`, (N, 1) float32."""
        ids = features["input_ids"]
        images = {name: features[name] for name in ("pixel_values", "image_grid_thw") if name in features}
        logits = self.model(
            input_ids=ids,
            attention_mask=features["attention_mask"],
            mm_token_type_ids=(ids == self.model.config.image_token_id).int(),
            logits_to_keep=1,
            use_cache=False,
            **images,
        ).logits[:, -1]
        yes, no = self.tokenizer.convert_tokens_to_ids(["Yes", "No"])
        features["scores"] = (logits[:, yes].float() - logits[:, no].float())[:, None]
        return features

    def _pair(self, query: Any, candidate: Any, instruction: str) -> tuple[list[int], list[Any]]:
        (question, asked), (answer, shown) = query, candidate
        question = self._cut(_clean(f"{_clean(self._words(instruction))} {self._words(question)}"))
        answer = self._cut(_clean(self._words(answer)))
        images = [self._patches(image) for image in (asked, shown) if image is not None]
        content: list[dict[str, str]] = [{"type": "text", "text": f"{self.settings['sentence']}Query:"}]
        content += [{"type": "image"}] if asked is not None else []
        content += [{"type": "text", "text": f"{question}Candidate:"}]
        content += [{"type": "image"}] if shown is not None else []
        content += [{"type": "text", "text": answer}] if answer else []
        rendered = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        pieces = rendered.split("<|image_pad|>")
        merge = self.processor["merge_size"] ** 2
        for number, (_, grid) in enumerate(images, start=1):
            pieces[number] = "<|image_pad|>" * (grid[0] * grid[1] // merge) + pieces[number]
        return self._encode("".join(pieces)), images

    def _cut(self, text: str) -> str:
        ids, most = self._encode(text), self.max_seq_length
        return text if len(ids) <= most else str(self.tokenizer.decode(ids[:most]))
