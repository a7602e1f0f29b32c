"""A checkpoint in the formats that Transformers, PEFT and Sentence Transformers read without us."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from umarvel_ray.artifacts import atomic_folder, write_json
from umarvel_ray.errors import CheckpointError, OutputError
from umarvel_ray.export import Format
from umarvel_ray.export.rerankers import export_reranker, is_reranker
from umarvel_ray.model.backbone import HUB_PREFIX, load_backbone
from umarvel_ray.model.encoder import Encoder
from umarvel_ray.model.lora import ADAPTER_FOLDER, chained_adapter, is_adapter
from umarvel_ray.model.prompts import ADDED_TOKENS
from umarvel_ray.model.settings import ENCODER_FILE

_TOKEN_ROWS = "model.language_model.embed_tokens.token_adapter.trainable_tokens_delta"
"""PEFT's name for rows that take the place of the table's."""
_MODULE = Path(__file__).with_name("sentence_transformers_module.py")


def export(checkpoint: str, output: Path, *, format: Format, base: str | None = None) -> None:
    """Write `checkpoint` as `output`, whole or not at all.

    Args:
        checkpoint: Of an encoder: ours, a released one, or a PEFT adapter. Or a reranker of ours.
        output: A folder that is not there yet.
        format: `transformers`: merged weights. `peft`: one adapter on the backbone that training began with.
            `sentence-transformers`: merged weights and the code that embeds, or scores pairs, with them.
        base: For an adapter: the checkpoint that it was trained on. With `peft`: the name by which others
            know the backbone, such as a hub id; the folder itself where left out.

    Raises:
        CheckpointError: Nothing there that can be exported so.
        OutputError: `output` exists.
    """
    output = Path(output)
    if output.exists():
        raise OutputError(f"{output}: exists already. Give a new folder, or remove it.")
    if is_reranker(checkpoint):
        export_reranker(checkpoint, output, format=format, dtype=stored_dtype(checkpoint))
        return
    if format == "peft":
        tokens = _added_tokens(checkpoint)
        with atomic_folder(output) as folder:
            _write_peft(checkpoint, folder, tokens, base)
        return
    encoder = Encoder.load(
        checkpoint, base=base if is_adapter(checkpoint) else None, dtype=stored_dtype(checkpoint)
    )
    with atomic_folder(output) as folder:
        encoder.save(folder)
        shutil.rmtree(folder / ADAPTER_FOLDER, ignore_errors=True)
        (folder / "README.md").write_text(_card(format), encoding="utf-8")
        if format == "sentence-transformers":
            _write_modules(folder)


def stored_dtype(checkpoint: str) -> Any:
    """The precision that the weights are stored in; float32 where the config does not say."""
    config = Path(checkpoint) / "config.json"
    if not config.exists():
        return "float32"
    values = json.loads(config.read_text(encoding="utf-8"))
    dtype = values.get("dtype") or values.get("torch_dtype") or "float32"
    return dtype if dtype in ("float32", "bfloat16", "float16") else "float32"


def _added_tokens(checkpoint: str) -> dict[str, int]:
    """Their ids."""
    if not (Path(checkpoint) / ENCODER_FILE).exists():
        raise CheckpointError(
            f"{checkpoint}: no {ENCODER_FILE} there, so no encoder that was trained here. "
            "Export it as transformers or sentence-transformers."
        )
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(checkpoint)
    return dict(zip(ADDED_TOKENS, tokenizer.convert_tokens_to_ids(ADDED_TOKENS), strict=True))


def _write_peft(checkpoint: str, folder: Path, tokens: dict[str, int], base: str | None) -> None:
    """All adapters of the chain as one, and the rows of the added tokens."""
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
    from transformers import AutoTokenizer

    state, rank, head = chained_adapter(checkpoint)
    model, _, _ = load_backbone(head, torch.float32)
    rows = sorted(tokens.values())
    if rows[-1] >= len(model.get_input_embeddings().weight):
        raise CheckpointError(
            f"{head}: its table has no rows for the added tokens, and an adapter cannot make it longer. "
            "Export as transformers or sentence-transformers."
        )
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        bias="none",
        target_modules=sorted({name.rpartition(".lora_A")[0] for name in state if ".lora_A." in name}),
        trainable_token_indices={"embed_tokens": rows},
        inference_mode=True,
    )
    config.base_model_name_or_path = (base or head).removeprefix(HUB_PREFIX)
    wrapped: Any = get_peft_model(model, config)
    wrapped.peft_config["default"].base_model_name_or_path = config.base_model_name_or_path
    merged, _, _ = load_backbone(checkpoint, torch.float32)
    state[_TOKEN_ROWS] = merged.get_input_embeddings().weight[rows].detach().clone()
    result = set_peft_model_state_dict(wrapped, {f"base_model.model.{name}": w for name, w in state.items()})
    if result.unexpected_keys:
        raise CheckpointError(
            f"{checkpoint}: {len(result.unexpected_keys)} tensors of its adapters have no place in {head} "
            f"(first: {result.unexpected_keys[0]}). Put back the backbone that training began with."
        )
    wrapped.save_pretrained(folder, save_embedding_layers=False)
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(folder)
    for name in (ENCODER_FILE, "preprocessor_config.json"):
        shutil.copyfile(Path(checkpoint) / name, folder / name)
    (folder / "README.md").write_text(_card("peft"), encoding="utf-8")


def _write_modules(folder: Path) -> None:
    shutil.copyfile(_MODULE, folder / _MODULE.name)
    write_json(
        folder / "modules.json",
        [{"idx": 0, "name": "0", "path": "", "type": f"{_MODULE.stem}.UMarvel"}],
    )
    write_json(
        folder / "config_sentence_transformers.json",
        {
            "model_type": "SentenceTransformer",
            "prompts": {"query": "", "document": ""},
            "default_prompt_name": None,
            "similarity_fn_name": "cosine",
        },
    )


_CARD_HEAD = """---
library_name: {library}
tags: [umarvel-ray, multimodal-retrieval]
---

# A universal multimodal retrieval encoder

Trained by the U-MARVEL recipe (arXiv:2507.14902) with umarvel-ray. `embedding.json` holds every setting that
decides an embedding.

"""

_USE = {
    "transformers": """Plain Transformers weights. An embedding is the mean of the last hidden states under
attention that is bidirectional (a 4-D mask that hides padding alone) with the positions 0, 1, 2 …, without
the instruction between its two marker tokens, made unit length:

```python
from umarvel_ray import Encoder, Query

encoder = Encoder.load("this folder")
encoder.embed_queries([Query(qid="1", txt="a red kite", instruction="Find a photo.")])
```
""",
    "sentence-transformers": """```python
from PIL import Image
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("this folder", trust_remote_code=True)
queries = model.encode(["a red kite"], prompt="Find a photo.")
pool = model.encode([Image.open("kite.jpg"), {"text": "A kite.", "image": Image.open("boat.jpg")}])
model.similarity(queries, pool)
```

The prompt is the instruction; candidates take none.
""",
    "peft": """An adapter in PEFT's format, with the rows of the added tokens:

```python
from peft import PeftModel
from transformers import AutoModelForImageTextToText

model = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained("the backbone"), "this folder")
```

or, with all settings applied, `Encoder.load("this folder", base="the backbone")` of umarvel-ray.
""",
}


def _card(format: Format) -> str:
    return _CARD_HEAD.format(library=format) + _USE[format]
