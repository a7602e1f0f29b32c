"""A Qwen2-VL folder → model and tokenizer; LoRA on the decoder; which parameters train; saving."""

import json
import os
from pathlib import Path
from typing import Any, Literal

import torch

from umarvel_ray.config import ConfigT, build_config
from umarvel_ray.errors import CheckpointError
from umarvel_ray.model.attention import PackedLayout, use_packed_attention
from umarvel_ray.model.images import normalise_patches
from umarvel_ray.model.inputs import EncoderInputs
from umarvel_ray.model.settings import LoraSettings

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_DECODER_LINEARS = r".*language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"


HUB_PREFIX = "hf://"


def load_backbone(path: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """Model with LM head, in packed attention, and tokenizer.

    Args:
        path: A Transformers folder, or `hf://OWNER/NAME` for a model of the hub, where there is a network.
        dtype: Of the weights.

    Raises:
        CheckpointError: There is no Qwen2-VL checkpoint.
    """
    if path.startswith(HUB_PREFIX):
        # The hub library reads this once, when it is first imported.
        os.environ["HF_HUB_OFFLINE"] = "0"
        path = path.removeprefix(HUB_PREFIX)
    elif not (Path(path) / "config.json").exists():
        raise CheckpointError(
            f"{path}: no config.json there, so no checkpoint. Give a Transformers folder, or hf://OWNER/NAME."
        )
    from transformers import AutoConfig, AutoTokenizer, Qwen2VLForConditionalGeneration

    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: cannot be loaded ({str(error).splitlines()[0]}). Check the path."
        ) from None
    if config.model_type != "qwen2_vl":
        raise CheckpointError(
            f"{path}: the backbone is {config.model_type!r}; this version reads 'qwen2_vl'."
        )
    model = Qwen2VLForConditionalGeneration.from_pretrained(path, dtype=dtype, attn_implementation="sdpa")
    use_packed_attention(model)
    return model, AutoTokenizer.from_pretrained(path)


def add_tokens(model: Any, tokenizer: Any, tokens: tuple[str, ...]) -> None:
    """Give the model the tokens that it lacks; a new row is the mean of the table, so the same everywhere."""
    missing = [
        token for token in tokens if tokenizer.convert_tokens_to_ids(token) in (None, tokenizer.unk_token_id)
    ]
    if not missing:
        return
    tokenizer.add_tokens(missing, special_tokens=True)
    table = model.get_input_embeddings().weight
    mean_D = table.detach().float().mean(0)
    ids = tokenizer.convert_tokens_to_ids(missing)
    if max(ids) >= len(table):
        model.resize_token_embeddings(max(ids) + 1, mean_resizing=False)
    with torch.no_grad():
        model.get_input_embeddings().weight[ids] = mean_D.to(table.dtype)
        head = model.get_output_embeddings()
        if head is not None and head.weight is not model.get_input_embeddings().weight:
            head.weight[ids] = head.weight[: min(ids)].float().mean(0).to(head.weight.dtype)


def hidden_states(model: Any, inputs: EncoderInputs, layout: PackedLayout) -> torch.Tensor:
    """Final-norm hidden states (T, D) of a packed micro-batch; no padding, no LM head, no cache."""
    core = model.get_base_model().model if hasattr(model, "get_base_model") else model.model
    embeds_TD = core.get_input_embeddings()(inputs.ids_T)
    if inputs.patches_P is not None:
        vision = core.config.vision_config
        pixels = normalise_patches(inputs.patches_P, temporal=vision.temporal_patch_size)
        grids = torch.tensor([(1, *grid) for grid in inputs.grids_M], device=pixels.device)
        features = core.visual(pixels.to(core.visual.dtype), grid_thw=grids).pooler_output
        is_image_T = inputs.ids_T == core.config.image_token_id
        embeds_TD = embeds_TD.masked_scatter(is_image_T[:, None], features.to(embeds_TD.dtype))
    output = core.language_model(
        inputs_embeds=embeds_TD[None],
        position_ids=inputs.positions_3T[:, None],
        attention_mask={"full_attention": None},
        use_cache=False,
        layout=layout,
    )
    return output.last_hidden_state[0]


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
        target_modules=_DECODER_LINEARS,
    )
    return get_peft_model(model, config)


def merge_lora(model: Any) -> Any:
    """Fold adapters into their layers, in float32, and drop the wrapping; a model without any stays."""
    if not hasattr(model, "merge_and_unload"):
        return model
    dtypes = {name: parameter.dtype for name, parameter in model.get_base_model().named_parameters()}
    merged = model.float().merge_and_unload()
    for name, parameter in merged.named_parameters():
        parameter.data = parameter.data.to(dtypes.get(name, torch.float32))
        parameter.requires_grad_(False)
    return merged


def save_backbone(model: Any, tokenizer: Any, source: str, folder: Path) -> None:
    """Write a standard Transformers folder: weights, config, tokenizer, and `source`'s image processor."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    processor = Path(source) / "preprocessor_config.json"
    if processor.exists():
        (folder / processor.name).write_text(processor.read_text(encoding="utf-8"), encoding="utf-8")


def read_settings_file(path: Path) -> dict[str, Any]:
    """A JSON file beside the weights; an empty mapping where there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def resolve_settings(
    stored: dict[str, Any], asked: ConfigT | None, schema: type[ConfigT], *, path: str
) -> ConfigT:
    """The settings a model was made with, else those asked for, else the defaults.

    Raises:
        CheckpointError: It was made with other settings than `asked`.
    """
    if not stored:
        return asked or schema()
    made_with = build_config(stored["settings"], schema, where=path)
    if asked is None or asked == made_with:
        return made_with
    name = next(name for name in schema.model_fields if getattr(asked, name) != getattr(made_with, name))
    raise CheckpointError(
        f"{path}: made with {name}={getattr(made_with, name)!r}, asked for {getattr(asked, name)!r}. "
        "Leave the setting out, or start from the backbone."
    )
