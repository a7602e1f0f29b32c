"""LoRA through PEFT: attach for training, load from a folder, fold into the weights, chain stages."""

import json
import re
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from umarvel_ray.errors import CheckpointError
from umarvel_ray.model.settings import LoraSettings

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_FOLDER = "adapter"
"""Within a checkpoint: the adapter that was merged into it, in PEFT's format."""

DECODER_LAYER = r".*language_model\.layers\.\d+"
_PREFIX = "base_model.model."


def set_trainable(model: Any, trainable: Literal["lora", "full"], lora: LoraSettings) -> Any:
    """Freeze and unfreeze: `lora` wraps the decoder's linear layers; `full` trains every parameter.

    Returns:
        The model to train: wrapped by PEFT for `lora`.
    """
    if trainable == "full":
        return model.requires_grad_(True)
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        bias="none",
        target_modules=rf"{DECODER_LAYER}\.\w+\.({'|'.join(lora.targets)})",
    )
    return get_peft_model(model, config)


def merge_lora(model: Any) -> Any:
    """Fold adapters into their layers, in float32, and drop the wrapping; a model without any stays."""
    if not hasattr(model, "merge_and_unload"):
        return model
    from peft.tuners.lora import LoraLayer

    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, LoraLayer):
                _fold(module)
    # What is left to merge are zeros, and rows of added tokens, which take the place of the table's.
    return model.merge_and_unload().requires_grad_(False)


def _fold(module: Any) -> None:
    weight = module.get_base_layer().weight
    for name in module.active_adapters:
        if name in module.lora_B:
            delta = module.get_delta_weight(name)
            weight.data = (weight.data.float() + delta.float()).to(weight.dtype)
            module.lora_B[name].weight.data.zero_()


def save_adapter(model: Any, base: str, folder: Path) -> None:
    """Write what PEFT trained, in PEFT's own format, naming the checkpoint it was trained on."""
    for config in model.peft_config.values():
        config.base_model_name_or_path = base
    model.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's form to fill in, empty


def is_adapter(path: str | Path) -> bool:
    """Whether a folder holds a PEFT adapter and no model."""
    return (Path(path) / ADAPTER_CONFIG).exists() and not (Path(path) / "config.json").exists()


def adapter_base(path: str | Path) -> str:
    """The checkpoint that a folder's adapter was trained on; a relative path starts at the folder."""
    config = json.loads((Path(path) / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    base = config.get("base_model_name_or_path") or ""
    beside = Path(path) / base
    return str(beside.resolve()) if base and beside.exists() else base


def load_adapter(model: Any, path: str | Path) -> Any:
    """Attach the adapter of a folder; every number of it must find its place.

    Raises:
        CheckpointError: It is no LoRA, it is of another model, or it is as if never trained.
    """
    from peft import LoraConfig, PeftModel, set_peft_model_state_dict

    config: Any = LoraConfig.from_pretrained(str(path))
    if getattr(config, "peft_type", None) != "LORA" or config.use_dora:
        raise CheckpointError(f"{path}: only plain LoRA adapters are read. Merge it with PEFT first.")
    state = read_adapter(path)
    config.target_modules = {name.rpartition(".lora_A")[0] for name in state if ".lora_A." in name}
    config.inference_mode = True
    model = PeftModel(model, config)
    result = set_peft_model_state_dict(model, {f"{_PREFIX}{name}": part for name, part in state.items()})
    strange = list(result.unexpected_keys) + [name for name in result.missing_keys if "lora_" in name]
    if strange or not config.target_modules:
        raise CheckpointError(
            f"{path}: {len(strange) or 'all'} of {len(state)} tensors of the adapter have no place in the "
            f"model (first: {(strange or sorted(state) or ['none at all'])[0]}). Give the base that it was "
            "trained on."
        )
    if not any(part.any() for name, part in state.items() if ".lora_B." in name):
        raise CheckpointError(
            f"{path}: all second factors of the adapter are zero, so it changes nothing; it was saved before "
            "its first step, or its training state was not gathered. Save it again."
        )
    return model


def read_adapter(path: str | Path) -> dict[str, Tensor]:
    """Tensors of an adapter by name, without PEFT's prefix, by the names that layers have today.

    Raises:
        CheckpointError: There are none.
    """
    from safetensors.torch import load_file

    file = Path(path) / ADAPTER_WEIGHTS
    if not file.exists():
        raise CheckpointError(f"{path}: no {ADAPTER_WEIGHTS} beside {ADAPTER_CONFIG}. Copy the whole folder.")
    return {_modern(name.removeprefix(_PREFIX)): part for name, part in load_file(file).items()}


def _modern(name: str) -> str:
    """Before Transformers 4.52 decoder and tower stood one level higher."""
    name = re.sub(r"^model\.(layers|embed_tokens|norm)\b", r"model.language_model.\1", name)
    return re.sub(r"^visual\.", "model.visual.", name)


def chained_adapter(path: str | Path) -> tuple[dict[str, Tensor], int, str]:
    """All adapters that were merged into a checkpoint one after the other, as one.

    A sum of low-rank products is one product of the factors side by side, so the chain is exact.

    Returns:
        Tensors by name, scaled so that alpha equals the rank; the rank; and the backbone at the chain's head.

    Raises:
        CheckpointError: The checkpoint has none, or a link of the chain is gone.
    """
    links: list[tuple[dict[str, Tensor], float]] = []
    place = str(path)
    while (Path(place) / ADAPTER_FOLDER / ADAPTER_CONFIG).exists():
        folder = Path(place) / ADAPTER_FOLDER
        config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        links.append((read_adapter(folder), config["lora_alpha"] / config["r"]))
        following = adapter_base(folder)
        if not Path(following).exists() and "://" not in following:
            raise CheckpointError(
                f"{folder}: was trained on {following}, which is gone. Put that checkpoint back, or export "
                "in another format."
            )
        place = following
    if not links:
        raise CheckpointError(
            f"{path}: no adapter in it ({ADAPTER_FOLDER}/{ADAPTER_CONFIG}): it is a backbone, or was trained "
            "in full. Export it as transformers or sentence-transformers."
        )
    joined: dict[str, Tensor] = {}
    for name in links[0][0]:
        first = ".lora_A." in name
        parts = [state[name].float() * (1.0 if first else scale) for state, scale in reversed(links)]
        joined[name] = torch.cat(parts, dim=0 if first else 1).contiguous()
    rank = next(part.shape[0] for name, part in joined.items() if ".lora_A." in name)
    return joined, rank, place
