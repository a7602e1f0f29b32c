"""`umarvel bench step`: one training step, packed and dealt by cost, against the authors' collation.

Theirs pads the queries and candidates of a device's batch to one length and then passes rows of 32. Two kinds
of case: a small real model on this machine's device (queries, positives, hard negatives, forward, loss and
backward, equal gradients), and steps of 7B on many workers, simulated: no model runs there, FLOPs are counted
item by item, and a step lasts as long as its slowest worker.

Lengths are drawn like M-BEIR's tasks: which share have pictures, how long texts are on average. The spread
around those means is assumed: texts are log-normal with a deviation of a half (`wide`) or a fifth (`narrow`),
pictures log-normal around 112 tokens (`wide`) or of 81 to 126 (`narrow`).
"""

import random
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from umarvel_ray.bench.harness import Answer, Benchmark, BenchmarkError, Case, Prepared
from umarvel_ray.bench.rerank import QWEN2_VL_7B as QWEN2_VL_7B_SIZES
from umarvel_ray.bench.rerank import enlarge
from umarvel_ray.data.batches import BatchPlan, TrainingItem, deal
from umarvel_ray.data.records import Candidate, Query
from umarvel_ray.data.training_sets import OneTaskSet
from umarvel_ray.demo.backbone import BackboneConfig, make_backbone
from umarvel_ray.model.adapters import adapter_for
from umarvel_ray.model.attention import NAME, set_attention, use_packed_attention
from umarvel_ray.model.backbone import add_tokens, core_of
from umarvel_ray.model.encoder import Encoder
from umarvel_ray.model.prompts import ADDED_TOKENS
from umarvel_ray.model.settings import EncoderSettings, LoraSettings
from umarvel_ray.plan.costs import QWEN2_VL_7B
from umarvel_ray.train.contrastive import ContrastiveTask
from umarvel_ray.train.gather import Lanes
from umarvel_ray.train.settings import ContrastiveSettings, TrainSettings
from umarvel_ray.train.strategy import Replicated

_TASKS: tuple[tuple[float, int, bool, int, bool], ...] = (
    (99, 45, False, 0, True), (100, 35, False, 0, True), (15, 30, False, 0, True),
    (16, 45, False, 110, False), (26, 45, False, 25, True), (17, 45, False, 35, True),
    (100, 22, True, 25, False),
    (113, 22, True, 14, False), (15, 22, True, 10, False), (16, 22, True, 0, True),
    (150, 40, True, 130, False), (141, 42, True, 130, False), (16, 45, True, 0, True),
    (26, 40, True, 0, True), (157, 40, True, 130, True), (143, 42, True, 130, True),
)  # fmt: skip
"""Thousands of training queries of M-BEIR's sixteen tasks (Table 10 of arXiv:2507.14902), then of query and
candidate the mean tokens of the text, and whether there is a picture. The tokens are assumed."""
_TEMPLATE = 22
_ROWS = 32
_SIMULATED_STEPS = 8
_WORDS = ["ba", "ko", "ri", "tu", "me", "la", "so", "vi"]


class _Item:
    """One record: tokens of its text and of its picture, 0 for none."""

    def __init__(self, rng: random.Random, text: int, has_picture: bool, spread: str) -> None:
        self.text = self.picture = 0
        if text:
            sigma = 0.5 if spread == "wide" else 0.2
            self.text = min(480, max(4, int(text * rng.lognormvariate(-(sigma**2) / 2, sigma))))
        if has_picture:
            wide = min(300, max(48, int(112 * rng.lognormvariate(0, 0.3))))
            self.picture = wide if spread == "wide" else rng.randint(9, 9) * rng.randint(9, 14)
        self.tokens = _TEMPLATE + self.text + (self.picture + 2 if has_picture else 0)

    def guess(self, typical_picture: float) -> float:
        """What `token_cost` would say without opening the picture."""
        return 16 + self.text + (typical_picture if self.picture else 0)


def _pairs(case: Case, seed: int = 0) -> list[list[_Item]]:
    """Query, positive and hard negatives of every query of the global batch."""
    rng = random.Random(seed)
    weights = [task[0] for task in _TASKS]
    found = []
    for _ in range(case["workers"] * case["pairs"]):
        _, query_text, query_picture, text, picture = rng.choices(_TASKS, weights)[0]
        query = _Item(rng, query_text, query_picture, case["spread"])
        answers = [_Item(rng, text, picture, case["spread"]) for _ in range(1 + case["negatives"])]
        found.append([query, *answers])
    return found


def _flops(tokens: int) -> float:
    """Of one decoder pass over an item of the 7B model."""
    return QWEN2_VL_7B.decode(tokens)


def _simulated(case: Case, cost_of_worker: Callable[[Case, list[list[_Item]]], Sequence[float]]) -> Prepared:
    needed = computed = slowest = 0.0
    for seed in range(_SIMULATED_STEPS):
        pairs = _pairs(case, seed)
        costs = cost_of_worker(case, pairs)
        needed += sum(_flops(item.tokens) for group in pairs for item in group)
        computed += sum(costs)
        slowest += max(costs)
    answer = {"needed": np.array([needed])}
    return Prepared(
        run=lambda: answer,
        work=case["workers"] * case["pairs"] * _SIMULATED_STEPS,
        # At 45 % of 790 TFLOP/s; forward and the gradients of activations, adapters apart.
        simulated_s=2 * slowest / (0.45 * 790e12),
        facts={
            "computed_over_needed": computed / needed,
            "slowest_over_mean": slowest * case["workers"] / computed,
        },
    )


def _packed_workers(case: Case, pairs: list[list[_Item]]) -> Sequence[float]:
    """Ours: every item of the global batch dealt by its guessed cost, nothing padded."""
    items = [item for group in pairs for item in group]
    pictures = [item.picture for item in items[:128] if item.picture]
    typical = sum(pictures) / len(pictures)
    dealt = deal([item.guess(typical) for item in items], case["workers"])
    return [sum(_flops(items[index].tokens) for index in own) for own in dealt]


def _padded_workers(case: Case, pairs: list[list[_Item]]) -> Sequence[float]:
    """Theirs: each worker has its own pairs, all items padded to the longest of them."""
    per = case["pairs"]
    costs = []
    for start in range(0, len(pairs), per):
        items = [item for group in pairs[start : start + per] for item in group]
        costs.append(len(items) * _flops(max(item.tokens for item in items)))
    return costs


class _Records(OneTaskSet):
    """A training set of real texts and pictures with the drawn lengths."""

    fingerprint = "bench"

    def __init__(self, case: Case, folder: Path) -> None:
        rng, noise = random.Random(1), np.random.default_rng(1)
        self._items: list[TrainingItem] = []
        for number, group in enumerate(_pairs(case)):
            records: list[Any] = []
            for place, item in enumerate(group):
                text = " ".join(rng.choices(_lexicon(), k=item.text)) or None
                path = None
                if item.picture:
                    path = str(folder / f"{number}-{place}.png")
                    side = (28 * max(2, round(item.picture**0.5)), 28 * max(2, round(item.picture**0.5)))
                    Image.fromarray(noise.integers(0, 256, (*side, 3), dtype=np.uint8)).save(path)
                if place == 0:
                    records.append(Query(qid=f"0:{number}", txt=text, img_path=path))
                else:
                    records.append(Candidate(did=f"0:{number}-{place}", txt=text, img_path=path))
            query, positive, *others = records
            self._items.append(
                TrainingItem(query, positive, tuple(others), None, frozenset([self.content_key(positive)]))
            )

    def __len__(self) -> int:
        return len(self._items)

    def item(self, row: int, *, visit: int) -> TrainingItem:
        return self._items[row]

    def content_key(self, candidate: Candidate) -> str:
        return candidate.did


@cache
def _lexicon() -> list[str]:
    rng = random.Random(0)
    return sorted({"".join(rng.choices(_WORDS, k=rng.randint(1, 3))) for _ in range(400)})


def _draw_7b(folder: Path) -> Encoder:
    """Random bfloat16 weights in the shapes of Qwen2-VL-7B, drawn where they stay."""
    from transformers import AutoConfig, AutoTokenizer, Qwen2VLForConditionalGeneration

    config = AutoConfig.from_pretrained(folder)
    enlarge(config, QWEN2_VL_7B_SIZES)
    torch.manual_seed(0)
    kept = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = Qwen2VLForConditionalGeneration._from_config(config, attn_implementation="sdpa")
    torch.set_default_dtype(kept)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    add_tokens(model, tokenizer, ADDED_TOKENS, path=str(folder))
    use_packed_attention(model)
    encoder = Encoder(
        model,
        adapter_for(model.config, str(folder)),
        tokenizer,
        EncoderSettings(),
        temperature=0.05,
        source=str(folder),
    )
    return encoder.requires_grad_(False)


class _Real:
    """A model and one prepared batch, the same for both methods."""

    def __init__(self, case: Case) -> None:
        folder = Path(tempfile.mkdtemp(prefix="umarvel-bench-step-"))
        make_backbone(
            [" ".join(_lexicon())],
            folder / "backbone",
            BackboneConfig(
                seed=0, hidden_size=256, num_layers=4, num_heads=4, num_kv_heads=2, intermediate_size=1024,
                vision_embed_dim=128, vision_depth=2, vision_num_heads=4, vocab_size=2048,
            ),
        )  # fmt: skip
        large = case["kind"] == "7B"
        device = "cuda" if torch.cuda.is_available() else "cpu"
        backbone = folder / "backbone"
        self.encoder = _draw_7b(backbone) if large else Encoder.load(backbone, device=device)
        torch.manual_seed(0)
        lora = LoraSettings(rank=128 if large else 16, alpha=256 if large else 32, dropout=0.0)
        self.encoder.set_trainable("lora", lora, learn_temperature=True)
        self.encoder.to(device)
        data = _Records(case, folder)
        settings = TrainSettings(batch_size=len(data), num_steps=1, learning_rate=1e-4)
        self.task = ContrastiveTask(
            self.encoder.train(),
            data,
            ContrastiveSettings(mask_false_negatives=False),
            plan=BatchPlan(num_rows=len(data), batch_size=len(data), seed=0),
            strategy=Replicated(self.encoder, Lanes(1), settings, half=large),
            max_tokens=2**20,
        )
        if large:
            self.task.find_max_tokens()
        self.prepared = self.task.prepare(0)

    @property
    def needed_flops(self) -> float:
        """Of one decoder pass over all items and one over their gradients, if it is a 7B model."""
        return sum(2 * _flops(item.num_tokens) for item in self.prepared.items_by_lane[0])

    def trained(self) -> list[torch.nn.Parameter]:
        return [parameter for parameter in self.encoder.parameters() if parameter.requires_grad]

    def answer(self) -> Answer:
        """Gradients end to end."""
        flat = torch.cat([p.grad.flatten() for p in self.trained() if p.grad is not None])
        return {"gradient": flat.detach().cpu().numpy()}


def _ours(case: Case) -> Prepared:
    if case["kind"] == "simulated":
        return _simulated(case, _packed_workers)
    real = _Real(case)

    def run() -> Answer:
        real.task.backward(real.prepared, seed=0)
        return real.answer()

    return _timed(case, real, run)


def _timed(case: Case, real: _Real, run: Callable[[], Answer]) -> Prepared:
    return Prepared(
        run=run,
        work=case["pairs"],
        facts={"needed_flops": real.needed_flops} if case["kind"] == "7B" else {},
        synchronize=torch.cuda.synchronize if torch.cuda.is_available() else None,
    )


def _authors(case: Case) -> Prepared:
    if case["kind"] == "simulated":
        return _simulated(case, _padded_workers)
    real = _Real(case)
    items, batch = real.prepared.items_by_lane[0], real.prepared.batch
    large = case["kind"] == "7B"
    if large:  # as they do: else a padded batch of the large model fits no device
        real.encoder.model.gradient_checkpointing_enable({"use_reentrant": False})

    def run() -> Answer:
        with torch.autocast(real.encoder.device.type, dtype=torch.bfloat16, enabled=large):
            return step()

    def step() -> Answer:
        for parameter in real.trained():
            parameter.grad = None
        embedding_ND = torch.cat(
            [_padded(real.encoder, items, start, max(item.num_tokens for item in items))
             for start in range(0, len(items), _ROWS)]
        )  # fmt: skip
        query, candidate = embedding_ND[: batch.num_queries], embedding_ND[batch.num_queries :]
        logits = query @ candidate.T / real.encoder.temperature
        F.cross_entropy(logits, torch.from_numpy(batch.positive_Q).to(logits.device)).backward()
        return real.answer()

    return _timed(case, real, run)


def _padded(encoder: Encoder, items: Sequence[Any], start: int, length: int) -> Tensor:
    """Embeddings of up to 32 rows, each padded to `length`, with a dense mask: nobody looks at padding."""
    rows = items[start : start + _ROWS]
    inputs = encoder.builder.pack(rows).to(encoder.device)
    core = core_of(encoder.model)
    embeds_TD = core.get_input_embeddings()(inputs.ids_T)
    if inputs.visuals is not None:
        assert inputs.visuals.patches_P is not None
        features = encoder.adapter.tower(core, inputs.visuals.patches_P, inputs.visuals.grids)
        is_vision_T = inputs.ids_T == encoder.adapter.image_token
        embeds_TD = embeds_TD.masked_scatter(is_vision_T[:, None], features.merged_VD.to(embeds_TD.dtype))
    real_BL = torch.zeros(len(rows), length, dtype=torch.bool, device=encoder.device)
    for row, item in enumerate(rows):
        real_BL[row, : item.num_tokens] = True
    embeds_BLD = embeds_TD.new_zeros(len(rows), length, embeds_TD.shape[1])
    embeds_BLD[real_BL] = embeds_TD
    position = torch.arange(length, device=encoder.device).expand(3, len(rows), length)
    mask = torch.zeros(len(rows), 1, length, length, dtype=embeds_BLD.dtype, device=encoder.device)
    mask.masked_fill_(~real_BL[:, None, None, :], torch.finfo(mask.dtype).min)
    set_attention(encoder.model, "sdpa")
    hidden_BLD = core.language_model(
        inputs_embeds=embeds_BLD,
        position_ids=position,
        attention_mask={"full_attention": mask},
        use_cache=False,
    ).last_hidden_state
    set_attention(encoder.model, NAME)
    pooled_BL = torch.zeros_like(real_BL)
    pooled_BL[real_BL] = inputs.pooled_T
    sum_BD = (hidden_BLD.float() * pooled_BL[:, :, None]).sum(1)
    return F.normalize(sum_BD / pooled_BL.sum(1, keepdim=True), dim=1)


def _compare(case: Case, ours: Answer, other: Answer) -> str:
    if case["kind"] == "simulated":
        if not np.array_equal(ours["needed"], other["needed"]):
            raise BenchmarkError("the two methods were given different items: there is nothing to time.")
        return "the same items"
    if case["kind"] == "7B":  # bfloat16 through 28 layers: directions agree, not digits
        mine, theirs = (answer["gradient"].astype(np.float64) for answer in (ours, other))
        cosine = float(mine @ theirs / (np.linalg.norm(mine) * np.linalg.norm(theirs)))
        if not cosine > 0.99:
            raise BenchmarkError(f"gradients point apart: their cosine is {cosine:.3f}.")
        return f"gradients' cosine {cosine:.4f}"
    scale = float(np.abs(other["gradient"]).max())
    worst = float(np.abs(ours["gradient"] - other["gradient"]).max()) / scale
    if not worst < 1e-3:
        raise BenchmarkError(f"gradients differ by {worst:.1e} of the largest entry.")
    return f"gradients within {worst:.0e}"


def _case(kind: str, workers: int, pairs: int, negatives: int, spread: str) -> Case:
    return {"kind": kind, "workers": workers, "pairs": pairs, "negatives": negatives, "spread": spread}


def _simulated_name(workers: int, pairs: int, negatives: int, spread: str) -> str:
    hard = f" + {negatives} hard" if negatives else ""
    return f"7B simulated, {workers} x {pairs}{hard}, {spread}"


def _cases() -> dict[str, Case]:
    """On a GPU the 7B shapes too."""
    cases = {
        "16 pairs": _case("real", 1, 16, 0, "wide"),
        "60 pairs": _case("real", 1, 60, 0, "wide"),
        "16 pairs + 5 hard": _case("real", 1, 16, 5, "wide"),
    }
    if torch.cuda.is_available():
        cases["7B, 60 pairs"] = _case("7B", 1, 60, 0, "wide")
        cases["7B, 16 pairs + 5 hard"] = _case("7B", 1, 16, 5, "wide")
    for spread in ("narrow", "wide"):
        for workers, pairs, negatives in ((8, 60, 0), (64, 60, 0), (64, 17, 5), (64, 2, 49)):
            name = _simulated_name(workers, pairs, negatives, spread)
            cases[name] = _case("simulated", workers, pairs, negatives, spread)
    return cases


BENCHMARK = Benchmark(
    about="One training step: packed and dealt by cost, against one padded length in rows of 32",
    unit="queries",
    methods={"packed, dealt (ours)": _ours, "padded, rows of 32 (authors)": _authors},
    cases=_cases(),
    quick=("16 pairs", "7B simulated, 8 x 60, narrow", "7B simulated, 64 x 60, narrow"),
    compare=_compare,
    repeats=1,
)
