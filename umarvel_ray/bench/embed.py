"""`umarvel bench embed`: items a second, packed, against the padded recipe of the authors.

The recipe: the order of the data, 16 items a batch, padded to the longest, a mask spelt out, the vision tower
picture by picture. Both sides have the same random weights and the same items: 30 % texts, 27 % pictures, the
rest both, texts of 10 to 200 tokens (even in their logarithm), pictures of 64 to 400.
"""

import math
import random
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from umarvel_ray.bench.harness import Answer, Benchmark, BenchmarkError, Case, Prepared
from umarvel_ray.demo.backbone import BackboneConfig, make_backbone
from umarvel_ray.model.adapters import adapter_for
from umarvel_ray.model.attention import log_kernel, use_packed_attention
from umarvel_ray.model.backbone import add_tokens
from umarvel_ray.model.encoder import INITIAL_TEMPERATURE, Encoder
from umarvel_ray.model.inputs import Item
from umarvel_ray.model.modules import use_fast_modules
from umarvel_ray.model.padded import embed_padded
from umarvel_ray.model.prompts import ADDED_TOKENS
from umarvel_ray.model.settings import EncoderSettings
from umarvel_ray.model.vision_store import Key, VisionStore
from umarvel_ray.model.visuals import Visual

_BATCH = 16
"""Items of a batch in the authors' evaluation."""
_TEMPLATE = 22
"""Tokens around the words."""
_SIDES = (8, 9, 9, 10, 12, 14, 16, 20)
"""Heights of pictures in tokens."""
_SHAPES = (1, 1, 1.33, 0.75, 1.5)
"""Widths over heights."""
_PEAK_FLOPS = 790e12
"""bfloat16 matrix products on an H200, as measured."""

_SMALL = {
    "text": {
        "hidden_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "intermediate_size": 1352,
    },
    "vision": {"embed_dim": 128, "depth": 4, "num_heads": 4},
    "sections": (8, 12, 12),
    "device": "cpu",
    "dtype": "float32",
    "max_tokens": 8192,
}
_QWEN2_VL_7B = {
    "text": {
        "hidden_size": 3584,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "intermediate_size": 18944,
    },
    "vision": {"embed_dim": 1280, "depth": 32, "num_heads": 16},
    "sections": (16, 24, 24),
    "device": "cuda",
    "dtype": "bfloat16",
    "max_tokens": 16384,
}


def _items(case: Case) -> list[Item]:
    rng, noise = random.Random(1), np.random.default_rng(1)
    items = []
    for _ in range(case["items"]):
        kind, words = rng.random(), int(math.exp(rng.uniform(math.log(10), math.log(200))))
        height = rng.choice(_SIDES)
        width = min(20, max(8, int(height * rng.choice(_SHAPES))))
        words = 0 if 0.30 <= kind < 0.57 else words
        ids = noise.integers(10, 250, words + _TEMPLATE)  # bytes: no token that means anything
        visuals: tuple[Visual, ...] = ()
        if kind >= 0.30:
            patches = noise.integers(0, 256, (4 * height * width, 588), dtype=np.uint8)
            token = case["image_token"]
            visuals = (Visual(patches, ((1, 2 * height, 2 * width),), token),)
            ids = np.concatenate([ids[:6], np.full(height * width, token), ids[6:]])
        items.append(Item(ids.astype(np.int32), np.ones(len(ids), dtype=bool), visuals))
    return items


def _encoder(case: Case) -> Encoder:
    """Random weights in the shapes of the case, made where they are used."""
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer

    if case["device"] == "cuda" and not torch.cuda.is_available():
        raise BenchmarkError("bench embed: this case needs a GPU, and there is none. Name another: --case.")
    with tempfile.TemporaryDirectory() as folder:
        make_backbone(["some words"], Path(folder) / "tiny", BackboneConfig(seed=0, hidden_size=64))
        tokenizer = AutoTokenizer.from_pretrained(f"{folder}/tiny")
        config: Any = AutoConfig.from_pretrained(f"{folder}/tiny")
    for part, values in (("text", case["text"]), ("vision", case["vision"])):
        for name, value in values.items():
            setattr(getattr(config, f"{part}_config"), name, value)
    text = config.text_config
    text.layer_types = ["full_attention"] * text.num_hidden_layers
    text.rope_parameters["mrope_section"] = list(case["sections"])
    text.initializer_range = 0.02
    config.vision_config.hidden_size = text.hidden_size
    torch.manual_seed(0)
    dtype = getattr(torch, case["dtype"])
    with torch.device(case["device"]):
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype, attn_implementation="sdpa")
    use_packed_attention(model)
    use_fast_modules(model.model)
    add_tokens(model, tokenizer, ADDED_TOKENS, path="random weights")
    log_kernel(torch.device(case["device"]), dtype)
    adapter = adapter_for(config, "random weights")
    encoder = Encoder(
        model,
        adapter,
        tokenizer,
        EncoderSettings(),
        temperature=INITIAL_TEMPERATURE,
        source="random weights",
    )
    return encoder.requires_grad_(False).eval().to(case["device"])


def _flops(encoder: Encoder, items: list[Item]) -> float:
    """Of the matrix products that the items need, nothing padded."""
    text, vision = encoder.model.config.text_config, encoder.model.config.vision_config
    core = encoder.model.model
    decoder = sum(p.numel() for name, p in core.language_model.layers.named_parameters() if p.ndim == 2)
    tower = sum(p.numel() for p in core.visual.blocks.parameters() if p.ndim == 2)
    merger = sum(p.numel() for p in core.visual.merger.parameters() if p.ndim == 2)
    total = 0.0
    for item in items:
        length = item.num_tokens
        total += 2 * decoder * length + 4 * text.num_hidden_layers * text.hidden_size * length**2
        for visual in item.visuals:
            num = math.prod(visual.grids[0])
            total += 2 * tower * num + 4 * vision.depth * vision.embed_dim * num**2 + 2 * merger * num // 4
    return total


def _prepare(
    case: Case, run_with: Callable[[Encoder, list[Item]], torch.Tensor], *, stored: bool
) -> Prepared:
    encoder = _encoder(case)
    items = _items({**case, "image_token": encoder.adapter.image_token})
    facts = {"flops": _flops(encoder, items), "peak_flops": _PEAK_FLOPS}
    wait = torch.cuda.synchronize if case["device"] == "cuda" else None
    if not stored:
        return Prepared(
            run=lambda: {"embedding": run_with(encoder, items).numpy()},
            work=len(items),
            facts=facts,
            synchronize=wait,
        )
    folder = tempfile.TemporaryDirectory(prefix="umarvel-vision-")
    store = encoder.keep_vision_features(folder.name)
    keys = _keep(encoder, store, items)

    def run() -> Answer:
        found = [_with_features(item, store, key) for item, key in zip(items, keys, strict=True)]
        return {"embedding": run_with(encoder, found).numpy(), "kept": np.array(bool(folder.name))}

    return Prepared(run=run, work=len(items), facts=facts, synchronize=wait)


@torch.inference_mode()
def _keep(encoder: Encoder, store: VisionStore, items: list[Item]) -> list[bytes]:
    """Put every picture through the tower once."""
    keys = []
    for number, item in enumerate(items):
        keys.append(number.to_bytes(32, "big"))
        for visual in item.visuals:
            pack = encoder.builder.pack([item]).to(encoder.device).visuals
            assert pack is not None and pack.patches_P is not None, "items come as patches"
            features = encoder.adapter.tower(encoder.model.model, pack.patches_P, pack.grids)
            store.put(Key(keys[-1], visual.grids[0]), features.joined_VF)
    return keys


def _with_features(item: Item, store: VisionStore, key: bytes) -> Item:
    found = store.read(key)
    if found is None:
        return item
    visual = replace(item.visuals[0], patches=None, features=found[0])
    return replace(item, visuals=(visual,))


def _packed(case: Case) -> Callable[[Encoder, list[Item]], torch.Tensor]:
    return lambda encoder, items: encoder.embed_items(items, max_tokens=case["max_tokens"])


def _padded(encoder: Encoder, items: list[Item]) -> torch.Tensor:
    return embed_padded(encoder, items, batch_size=_BATCH)


def _compare(case: Case, ours: Answer, other: Answer) -> str:
    largest = float(np.abs(ours["embedding"] - other["embedding"]).max())
    cosine = float((ours["embedding"] * other["embedding"]).sum(1).min())
    if case["dtype"] == "float32" and largest > 2e-5:
        raise BenchmarkError(f"bench embed: embeddings differ by {largest:.1e}, more than 2e-5.")
    if cosine < 0.999:
        raise BenchmarkError(f"bench embed: the cosine of an embedding in the two is only {cosine:.4f}.")
    return f"largest difference {largest:.0e}, least cosine {cosine:.6f}"


BENCHMARK = Benchmark(
    about="Embedding queries and candidates of mixed kinds, packed, against the authors' padded recipe",
    unit="items",
    methods={
        "packed": lambda case: _prepare(case, _packed(case), stored=False),
        "packed, stored vision": lambda case: _prepare(case, _packed(case), stored=True),
        "padded": lambda case: _prepare(case, _padded, stored=False),
        "padded, stored vision": lambda case: _prepare(case, _padded, stored=True),
    },
    cases={
        "small": {**_SMALL, "items": 16},
        "cpu": {**_SMALL, "items": 48},
        "7b": {**_QWEN2_VL_7B, "items": 1024},
    },
    quick=("small",),
    compare=_compare,
    repeats=1,
)
