"""A tiny backbone with random weights: a real Qwen2-VL as an ordinary Transformers folder.

It loads wherever a released checkpoint loads, with its own tokenizer, chat template and image settings, so
the whole recipe runs on it unchanged. Its vocabulary is learned from the texts it is to read.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from umarvel_ray.artifacts import atomic_folder
from umarvel_ray.config import Config
from umarvel_ray.errors import OutputError

if TYPE_CHECKING:
    from transformers import Qwen2Tokenizer, Qwen2VLConfig

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
"""Qwen2-VL's, in the order of its ids; they follow the byte-pair tokens here as there."""

_TEMPLATE_WORDS = ("system", "You are a helpful assistant.", "user", "assistant", "Yes", " Yes", "No", " No")
_SPARE_ROWS = 8
"""Least rows of the embedding table beyond the tokens: room for markers, as the released checkpoints have."""

_CHAT_TEMPLATE = """
{%- set seen = namespace(images=0, videos=0) %}
{%- for message in messages %}
    {%- if loop.first and message.role != 'system' %}
        {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.content is string %}
        {{- message.content }}
    {%- else %}
        {%- for part in message.content %}
            {%- if part.type == 'image' or 'image' in part or 'image_url' in part %}
                {%- set seen.images = seen.images + 1 %}
                {%- if add_vision_id %}
                    {{- 'Picture ' ~ seen.images ~ ': ' }}
                {%- endif %}
                {{- '<|vision_start|><|image_pad|><|vision_end|>' }}
            {%- elif part.type == 'video' or 'video' in part %}
                {%- set seen.videos = seen.videos + 1 %}
                {%- if add_vision_id %}
                    {{- 'Video ' ~ seen.videos ~ ': ' }}
                {%- endif %}
                {{- '<|vision_start|><|video_pad|><|vision_end|>' }}
            {%- elif 'text' in part %}
                {{- part.text }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
""".strip()


class BackboneConfig(Config):
    """How large the backbone is. The same settings and texts give the same weights."""

    seed: NonNegativeInt
    """Of the weights."""
    hidden_size: PositiveInt = 128
    num_layers: PositiveInt = 4
    num_heads: PositiveInt = 4
    num_kv_heads: PositiveInt = 2
    intermediate_size: PositiveInt = 384
    vocab_size: Annotated[int, Field(ge=300)] = 1024
    """Byte-pair tokens at most, special tokens not counted."""
    vision_embed_dim: PositiveInt = 64
    vision_depth: PositiveInt = 2
    vision_num_heads: PositiveInt = 4
    max_positions: PositiveInt = 4096
    initializer_range: PositiveFloat = 0.05
    """Standard deviation of the weights; a narrow model starts better above the usual 0.02."""

    @model_validator(mode="after")
    def _heads_fit(self) -> Self:
        if self.hidden_size % (8 * self.num_heads):
            raise ValueError(
                f"hidden_size is {self.hidden_size} but num_heads is {self.num_heads}: the width of a head "
                "must be a multiple of 8, for three kinds of position. Change one of them."
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads is {self.num_heads}, no multiple of num_kv_heads ({self.num_kv_heads}). "
                "Change one of them."
            )
        if self.vision_embed_dim % (4 * self.vision_num_heads):
            raise ValueError(
                f"vision_embed_dim is {self.vision_embed_dim} but vision_num_heads is "
                f"{self.vision_num_heads}: the width of a head must be a multiple of 4, for rows and "
                "columns. Change one of them."
            )
        return self


def make_backbone(texts: Iterable[str], output: Path, config: BackboneConfig) -> None:
    """Write model, tokenizer, chat template and image settings under `output`, whole or not at all.

    Args:
        texts: What the model will read; the vocabulary is learned from it.
        output: The folder; a checkpoint that stands there is replaced.
        config: How large.

    Raises:
        OutputError: `output` holds something other than a checkpoint.
    """
    import torch
    from transformers import Qwen2VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    output = Path(output)
    if output.exists() and any(output.iterdir()) and not (output / "config.json").is_file():
        raise OutputError(
            f"{output}: holds files but no config.json, so it is no checkpoint. Give another output folder."
        )
    tokenizer = _train_tokenizer(texts, vocab_size=config.vocab_size)
    model_config = _model_config(config, tokenizer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = Qwen2VLForConditionalGeneration(model_config)
    with atomic_folder(output) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        Qwen2VLImageProcessorPil(min_pixels=4 * 28 * 28, max_pixels=300 * 28 * 28).save_pretrained(folder)
        for file in folder.iterdir():
            file.chmod(
                0o644
            )  # the weights come readable by their owner alone, which workers of a cluster may not be


def _train_tokenizer(texts: Iterable[str], *, vocab_size: int) -> "Qwen2Tokenizer":
    """A byte-level BPE with Qwen2's own normaliser and way of cutting words."""
    import json

    from tokenizers import trainers
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer

    texts = list(texts)
    backend = Qwen2Tokenizer(vocab={}, merges=[]).backend_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, show_progress=False, initial_alphabet=sorted(ByteLevel.alphabet())
    )
    # Every prompt holds the template's words, so they weigh as much as the texts' commonest words.
    words = [word for word in _TEMPLATE_WORDS for _ in range(max(100, len(texts)))]
    backend.train_from_iterator([*texts, *words], trainer=trainer)
    learned = json.loads(backend.to_str())["model"]
    merges: Any = [tuple(pair) for pair in learned["merges"]]  # pairs, which its annotation forgets
    tokenizer = Qwen2Tokenizer(
        vocab=learned["vocab"],
        merges=merges,
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=list(SPECIAL_TOKENS[1:]),
    )
    tokenizer.eos_token = "<|im_end|>"  # only now: the token named first gets the lowest id
    tokenizer.chat_template = _CHAT_TEMPLATE
    return tokenizer


def _model_config(config: BackboneConfig, tokenizer: "Qwen2Tokenizer") -> "Qwen2VLConfig":
    from transformers import Qwen2VLConfig

    ids = {token: number for token, number in tokenizer.get_vocab().items() if token in SPECIAL_TOKENS}
    half_head = config.hidden_size // config.num_heads // 2
    time = half_head // 4  # a quarter for time, the rest for rows and columns: Qwen2-VL's 16, 24, 24 of 64
    rows = (half_head - time + 1) // 2
    return Qwen2VLConfig(
        text_config={
            "vocab_size": -(-(len(tokenizer) + _SPARE_ROWS) // 64) * 64,
            "hidden_size": config.hidden_size,
            "intermediate_size": config.intermediate_size,
            "num_hidden_layers": config.num_layers,
            "num_attention_heads": config.num_heads,
            "num_key_value_heads": config.num_kv_heads,
            "max_position_embeddings": config.max_positions,
            "initializer_range": config.initializer_range,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1_000_000.0,
                "mrope_section": [time, rows, half_head - time - rows],
            },
            "bos_token_id": ids["<|endoftext|>"],
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
        },
        vision_config={
            "depth": config.vision_depth,
            "embed_dim": config.vision_embed_dim,
            "num_heads": config.vision_num_heads,
            "hidden_size": config.hidden_size,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "initializer_range": config.initializer_range,
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )
