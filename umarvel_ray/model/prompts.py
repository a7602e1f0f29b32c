"""Text as the model reads it: the chat template cut open where a record's own words and pictures stand."""

import re
from typing import Any

from umarvel_ray.errors import CheckpointError

EMBED_TOKEN = "<emb>"
INSTRUCTION_START = "<instruction_start>"
INSTRUCTION_END = "<instruction_end>"
ADDED_TOKENS = (EMBED_TOKEN, INSTRUCTION_START, INSTRUCTION_END)

_TEXT = "\x01text\x01"
"""Stands where the user's text goes while the template is rendered."""


def clean(text: str) -> str:
    """Drop carriage returns, strip blanks and double quotes; upper-case the first letter, end in a stop."""
    text = text.replace("\r", "").strip().strip('"')
    if text:
        text = text[0].upper() + text[1:]
        if text[-1] not in ".?!":
            text += "."
    return text


class ChatTemplate:
    """A backbone's chat template, cut open where the user's text stands: only text is tokenized per record.

    The pieces around the text are constant; a tokenizer of the Qwen family never merges across them, because
    they end and begin in special tokens or line ends. A test holds this against the whole rendered string.
    """

    def __init__(self, tokenizer: Any, *, answer: str, generation_prompt: bool = False) -> None:
        if not tokenizer.chat_template:
            raise CheckpointError(
                "the tokenizer has no chat template. Put the backbone's own chat_template.jinja beside its "
                "weights."
            )
        rendered = tokenizer.apply_chat_template(
            [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": _TEXT}]},
                {"role": "assistant", "content": [{"type": "text", "text": answer}]},
            ],
            tokenize=False,
            add_generation_prompt=generation_prompt,
        )
        pad = "<|image_pad|>"
        if rendered.count(_TEXT) != 1 or rendered.count(pad) != 1:
            raise CheckpointError(
                "the chat template of the tokenizer does not show a picture and a text once each. "
                "Put the backbone's own chat_template.jinja beside its weights."
            )
        head, tail = rendered.split(_TEXT)
        start = head.rindex("<|vision_start|>")
        self.image_token: int = tokenizer.convert_tokens_to_ids(pad)
        self.before = encode(tokenizer, head[:start])
        self.image_start = encode(tokenizer, head[start:].split(pad)[0])
        self.image_end = encode(tokenizer, head[start:].split(pad)[1])
        self.after = encode(tokenizer, tail)
        self.tail = tail
        special = dict.fromkeys([*tokenizer.all_special_tokens, *ADDED_TOKENS])
        self._special = re.compile("|".join(map(re.escape, special)))

    def words(self, text: str | None) -> str:
        """Text from data: special tokens spelt out there are words, not commands."""
        if not text or "<" not in text:
            return text or ""
        return self._special.sub(lambda match: " ".join(match.group()), text)

    def visual(self, num_tokens: int, token: int | None = None) -> list[int]:
        """Ids of a picture, or of a run of a video's frames with their own `token`."""
        return [*self.image_start, *[token or self.image_token] * num_tokens, *self.image_end]


def encode(tokenizer: Any, text: str) -> list[int]:
    """Ids of `text` alone."""
    if not text:
        return []
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None and backend.truncation is None and backend.padding is None:
        # The same, without a dictionary around it, and without the place of each token in the text.
        return backend.encode_batch_fast([text], add_special_tokens=False)[0].ids
    return tokenizer(text, add_special_tokens=False)["input_ids"]
