"""`umarvel bench rerank`: K candidates per query, judged as trees, and pair by pair as others do it.

The peers run the stock Transformers model on the same tokens and pixels, and read pictures by our reader,
which is faster than the stock processor; so what is compared is the way of scoring.
"""

import random
import tempfile
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from umarvel_ray.bench.harness import Answer, Benchmark, BenchmarkError, Case, Prepared
from umarvel_ray.data.records import Candidate, Picture, Query
from umarvel_ray.demo.backbone import BackboneConfig, make_backbone
from umarvel_ray.model.adapters import adapter_for
from umarvel_ray.model.images import normalise_patches
from umarvel_ray.model.reranker import Reranker
from umarvel_ray.model.settings import RERANKER_PROMPTS, RerankerSettings
from umarvel_ray.model.trees import TreeBuilder
from umarvel_ray.model.visuals import VisualReader, pack_visuals

_BATCH = 8
"""Pairs of a batch in the authors' evaluation."""
_PICTURE = (340, 256)
"""Width and height: 108 image tokens."""

_SMALL = {
    "hidden_size": 256,
    "num_layers": 4,
    "num_heads": 4,
    "num_kv_heads": 1,
    "intermediate_size": 1352,
    "vision_embed_dim": 128,
    "vision_depth": 3,
}
_VOCABULARY = 32_000
"""Rows of the small model's LM head; Qwen's have 152,064, of which the tokenizer, as here, fills a part."""
QWEN2_VL_7B = {
    "hidden_size": 3584,
    "num_layers": 28,
    "num_heads": 28,
    "num_kv_heads": 4,
    "intermediate_size": 18944,
    "vision_embed_dim": 1280,
    "vision_depth": 32,
    "vision_num_heads": 16,
}
_TEXT = {"query_words": 60, "candidate_words": (30, 160), "query_picture": False, "candidate_picture": False}
_BOTH = {"query_words": 60, "candidate_words": (30, 160), "query_picture": True, "candidate_picture": True}


@cache
def _texts() -> list[str]:
    """A lexicon, as sentences: the tokenizer learns it, the records are made of it."""
    rng = random.Random(0)
    parts = ["ba", "ko", "ri", "tu", "me", "lan", "sor", "vi"]
    lexicon = sorted({"".join(rng.choices(parts, k=rng.randint(1, 3))) for _ in range(600)})
    return [" ".join(lexicon[start : start + 20]) for start in range(0, len(lexicon), 20)]


def _lists(case: Case, folder: Path) -> list[tuple[Query, list[Candidate]]]:
    """Queries with their candidates; no picture serves twice."""
    rng, noise = random.Random(1), np.random.default_rng(1)
    words = " ".join(_texts()).split()
    num_pictures = 0

    def text(count: int) -> str:
        return " ".join(rng.choices(words, k=count))

    def picture(wanted: bool) -> str | None:
        nonlocal num_pictures
        if not wanted:
            return None
        num_pictures += 1
        path = folder / f"{num_pictures}.jpg"
        coarse = Image.fromarray(noise.integers(0, 256, (16, 20, 3), dtype=np.uint8))
        coarse.resize(_PICTURE, Image.Resampling.BILINEAR).save(path, quality=90)
        return str(path)

    lists = []
    for number in range(case["queries"]):
        query = Query(
            qid=f"0:{number}",
            txt=text(case["query_words"]),
            img_path=picture(case["query_picture"]),
            instruction=text(12),
        )
        pool = [
            Candidate(
                did=f"0:{rank}",
                txt=text(rng.randint(*case["candidate_words"])),
                img_path=picture(case["candidate_picture"]),
            )
            for rank in range(case["candidates"])
        ]
        lists.append((query, pool))
    return lists


def _load(case: Case) -> tuple[Any, Any, str]:
    """The stock model with random weights, its tokenizer, and the folder where its pictures may lie."""
    from transformers import AutoConfig, AutoTokenizer, Qwen2VLForConditionalGeneration

    folder = Path(tempfile.mkdtemp(prefix="umarvel-bench-rerank-"))
    # Read often enough, every word becomes one token, as common words are in a large vocabulary.
    texts = [*_texts(), f"{RERANKER_PROMPTS['plain']}Query: Candidate:"] * 8
    make_backbone(texts, folder / "backbone", BackboneConfig(seed=0, vocab_size=2048, **_SMALL))
    tokenizer = AutoTokenizer.from_pretrained(folder / "backbone")
    if case["shape"] == "small":
        model = Qwen2VLForConditionalGeneration.from_pretrained(
            folder / "backbone", attn_implementation="sdpa"
        )
        torch.manual_seed(0)
        model.resize_token_embeddings(_VOCABULARY, mean_resizing=False)
    else:
        # Weights are drawn where they stay: saved and read, 15 GB would pass through the disk.
        config = AutoConfig.from_pretrained(folder / "backbone")
        enlarge(config, QWEN2_VL_7B)
        torch.manual_seed(0)
        kept = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        with torch.device("cuda"):
            model = Qwen2VLForConditionalGeneration._from_config(config, attn_implementation="sdpa")
        torch.set_default_dtype(kept)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model.eval().requires_grad_(False), tokenizer, str(folder)


def enlarge(config: Any, shape: dict[str, int]) -> None:
    """Give a small backbone's configuration the sizes of a large one."""
    text, vision = config.text_config, config.vision_config
    text.hidden_size, text.intermediate_size = shape["hidden_size"], shape["intermediate_size"]
    text.num_hidden_layers, text.num_attention_heads = shape["num_layers"], shape["num_heads"]
    text.num_key_value_heads, text.vocab_size = shape["num_kv_heads"], 152064
    text.rope_parameters["mrope_section"] = [16, 24, 24]
    text.layer_types = ["full_attention"] * shape["num_layers"]
    text.initializer_range = vision.initializer_range = 0.02
    vision.embed_dim, vision.depth = shape["vision_embed_dim"], shape["vision_depth"]
    vision.num_heads, vision.hidden_size = shape["vision_num_heads"], shape["hidden_size"]


def _prepared(
    case: Case,
    judge: Callable[[Reranker, Any, list[tuple[Query, list[Candidate]]]], list[np.ndarray]],
    *,
    stock: bool,
) -> Prepared:
    from umarvel_ray.model.attention import use_packed_attention
    from umarvel_ray.model.modules import use_fast_modules

    model, tokenizer, folder = _load(case)
    if not stock:
        use_packed_attention(model)
        use_fast_modules(model.model)
    lists, adapter = _lists(case, Path(folder)), adapter_for(model.config, folder)

    def run() -> Answer:
        # Nothing read or computed before may help: each run starts from files and words.
        reranker = Reranker(model, adapter, tokenizer, RerankerSettings(), source=folder).eval()
        return {"p_yes": np.stack(judge(reranker, model, lists))}

    builder = TreeBuilder(tokenizer, adapter, RerankerSettings())
    pairs = sum(len(pool) for _, pool in lists)
    separate = sum(len(builder.pair_ids(query, candidate)) for query, pool in lists for candidate in pool)
    shared = sum(builder.build(query, pool).num_tokens for query, pool in lists)
    return Prepared(
        run=run,
        work=pairs,
        facts={"tokens_per_pair": separate / pairs, "tokens_per_pair_in_trees": shared / pairs},
        synchronize=torch.cuda.synchronize if torch.cuda.is_available() else None,
    )


def _tree(case: Case) -> Prepared:
    return _prepared(case, lambda reranker, _, lists: reranker.score_many(lists), stock=False)


def _packed_pairs(case: Case) -> Prepared:
    """Our packing without sharing: a tree a pair, every picture anew."""

    def judge(reranker: Reranker, _: Any, lists: list[tuple[Query, list[Candidate]]]) -> list[np.ndarray]:
        reranker.keep_pictures(0)
        return [
            np.concatenate(reranker.score_many([(query, [candidate]) for candidate in pool]))
            for query, pool in lists
        ]

    return _prepared(case, judge, stock=False)


def _generate(case: Case) -> Prepared:
    """The authors' way: generate the answer and the end of the turn, with scores over the vocabulary."""

    def first_scores(model: Any, inputs: dict[str, Tensor]) -> Tensor:
        answer = model.generate(
            **inputs,
            max_new_tokens=2,
            min_new_tokens=2,
            do_sample=False,
            output_scores=True,
            return_dict_in_generate=True,
        )
        return answer.scores[0]

    return _prepared(case, partial(_batched, logits_of=first_scores), stock=True)


def _last_position(case: Case) -> Prepared:
    """One forward pass of separate pairs, the LM head at the last position alone."""

    def last_logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
        return model(**inputs, logits_to_keep=1, use_cache=False).logits[:, -1]

    return _prepared(case, partial(_batched, logits_of=last_logits), stock=True)


@torch.inference_mode()
def _batched(
    reranker: Reranker,
    model: Any,
    lists: list[tuple[Query, list[Candidate]]],
    logits_of: Callable[[Any, dict[str, Tensor]], Tensor],
) -> list[np.ndarray]:
    """P(Yes) in batches of `_BATCH` pairs, padded on the left."""
    builder = reranker.builder
    yes_no = [builder.answer_ids[True], builder.answer_ids[False]]
    scores = []
    for query, pool in lists:
        parts = []
        for start in range(0, len(pool), _BATCH):
            pairs = [
                (
                    builder.pair_ids(query, candidate),
                    [path for path in (query.img_path, candidate.img_path) if path],
                )
                for candidate in pool[start : start + _BATCH]
            ]
            logits = logits_of(model, _inputs(model, pairs, reranker))
            parts.append(logits[:, yes_no].float().softmax(1)[:, 0].cpu().numpy())
        scores.append(np.concatenate(parts))
    return scores


def _inputs(
    model: Any, pairs: Sequence[tuple[list[int], list[str]]], reranker: Reranker
) -> dict[str, Tensor]:
    adapter = reranker.adapter
    longest = max(len(ids) for ids, _ in pairs)
    ids = torch.full((len(pairs), longest), model.generation_config.pad_token_id)
    real = torch.zeros_like(ids)
    for row, (tokens, _) in enumerate(pairs):
        ids[row, longest - len(tokens) :] = torch.tensor(tokens)
        real[row, longest - len(tokens) :] = 1
    inputs = {
        "input_ids": ids,
        "attention_mask": real,
        "mm_token_type_ids": (ids == model.config.image_token_id).int(),
    }
    reader = VisualReader(adapter, reranker.settings.images)
    images = [reader.read(Picture(path)) for _, paths in pairs for path in paths]
    packed = pack_visuals(images, adapter)
    if packed is not None and packed.patches_P is not None:
        mean, deviation = adapter.normalisation
        inputs["pixel_values"] = normalise_patches(
            packed.patches_P.to(model.device),
            mean=mean,
            deviation=deviation,
            patch_size=adapter.patch_size,
            temporal=adapter.temporal,
        ).to(model.dtype)
        inputs["image_grid_thw"] = torch.tensor(packed.grids)
    return {name: value.to(model.device) for name, value in inputs.items()}


def _compare(case: Case, ours: Answer, theirs: Answer) -> str:
    worst = float(np.abs(ours["p_yes"] - theirs["p_yes"]).max())
    if case["shape"] == "small":
        if worst > 1e-5:
            raise BenchmarkError(f"scores differ by up to {worst:.1e}, more than 1e-5 in float32")
        return f"max |Δp| {worst:.0e}"
    order = np.argsort(np.argsort(ours["p_yes"], axis=1), axis=1)
    other = np.argsort(np.argsort(theirs["p_yes"], axis=1), axis=1)
    spearman = float(np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(order, other, strict=True)]))
    if worst > 0.05:
        raise BenchmarkError(f"scores differ by up to {worst:.3f}, more than bfloat16 explains (0.05)")
    return f"max |Δp| {worst:.0e}, rank correlation {spearman:.4f} (bfloat16)"


def _cases() -> dict[str, Case]:
    small = {"shape": "small", "candidates": 50, "queries": 2}
    cases: dict[str, Case] = {
        "text": {**small, **_TEXT},
        "picture query": {**small, **_TEXT, "query_picture": True},
        "pictures": {**small, **_BOTH},
        "small": {**small, **_BOTH, "candidates": 10, "queries": 1},
    }
    if torch.cuda.is_available():
        large = {"shape": "7b", "candidates": 50, "queries": 4}
        cases |= {"text 7b": {**large, **_TEXT}, "pictures 7b": {**large, **_BOTH}}
    return cases


BENCHMARK = Benchmark(
    about="P(Yes) of 50 candidates a query, against the authors' generate and against separate pairs",
    unit="pairs",
    methods={
        "tree": _tree,
        "generate, batch 8": _generate,
        "last position, batch 8": _last_position,
        "packed pairs": _packed_pairs,
    },
    cases=_cases(),
    quick=("small",),
    repeats=1,
    threads=1,
    compare=_compare,
)
