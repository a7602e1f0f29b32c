"""A reranker in the formats that Transformers, PEFT and Sentence Transformers read without us."""

import shutil
from pathlib import Path

from umarvel_ray.artifacts import atomic_folder, read_json, write_json
from umarvel_ray.errors import CheckpointError
from umarvel_ray.export import Format
from umarvel_ray.model.lora import ADAPTER_FOLDER
from umarvel_ray.model.reranker import SETTINGS_FILE, Reranker
from umarvel_ray.model.settings import RERANKER_PROMPTS, DtypeName

_MODULES = [Path(__file__).with_name(f"sentence_transformers_{name}.py") for name in ("module", "reranker")]


def is_reranker(checkpoint: str | Path) -> bool:
    """Whether a reranker of ours lies there."""
    return (Path(checkpoint) / SETTINGS_FILE).exists()


def export_reranker(checkpoint: str, output: Path, *, format: Format, dtype: DtypeName) -> None:
    """Write a reranker as `output`, whole or not at all.

    Raises:
        CheckpointError: `peft`, but what trained was no adapter.
    """
    if format == "peft":
        adapter = Path(checkpoint) / ADAPTER_FOLDER
        if not adapter.is_dir():
            raise CheckpointError(
                f"{checkpoint}: it was trained whole, so there is no adapter. Export it as transformers or "
                "sentence-transformers."
            )
        with atomic_folder(output) as folder:
            shutil.copytree(adapter, folder, dirs_exist_ok=True)
            shutil.copyfile(Path(checkpoint) / SETTINGS_FILE, folder / SETTINGS_FILE)
        return
    reranker = Reranker.load(checkpoint, dtype=dtype)
    with atomic_folder(output) as folder:
        reranker.save(folder)
        shutil.rmtree(folder / ADAPTER_FOLDER, ignore_errors=True)
        settings = read_json(folder / SETTINGS_FILE)
        sentence = RERANKER_PROMPTS[reranker.settings.prompt]
        write_json(folder / SETTINGS_FILE, {**settings, "sentence": sentence})
        (folder / "README.md").write_text(_CARD.format(library=format) + _USE[format], encoding="utf-8")
        if format == "sentence-transformers":
            for module in _MODULES:
                shutil.copyfile(module, folder / module.name)
            kind = f"{_MODULES[-1].stem}.UMarvelReranker"
            write_json(folder / "modules.json", [{"idx": 0, "name": "0", "path": "", "type": kind}])
            write_json(
                folder / "config_sentence_transformers.json",
                {
                    "model_type": "CrossEncoder",
                    "prompts": {},
                    "default_prompt_name": None,
                    "activation_fn": "torch.nn.modules.activation.Sigmoid",
                },
            )


_CARD = """---
library_name: {library}
tags: [umarvel-ray, multimodal-retrieval, reranker]
---

# A universal multimodal reranker

Trained by the U-MARVEL recipe (arXiv:2507.14902) with umarvel-ray: a causal model that answers Yes or No to a
query and a candidate; the score is the probability of Yes against No. `reranker.json` holds every setting
that decides it.

"""

_USE = {
    "transformers": """Plain Transformers weights. The user's turn is the sentence of `reranker.json`, then
`Query:` [image] [text] `Candidate:` [image] [text]; the score is the softmax over the logits of `Yes` and
`No` at the first position of the answer.

```python
from umarvel_ray import Candidate, Query, Reranker

reranker = Reranker.load("this folder")
query = Query(qid="1", txt="a red kite", instruction="Find a photo.")
reranker.score(query, [Candidate(did="2", img_path="kite.jpg")])
```
""",
    "sentence-transformers": """```python
from PIL import Image
from sentence_transformers import CrossEncoder

model = CrossEncoder("this folder", trust_remote_code=True)
model.predict([("a red kite", Image.open("kite.jpg"))], prompt="Find a photo.")
```

The prompt is the instruction.
""",
}
