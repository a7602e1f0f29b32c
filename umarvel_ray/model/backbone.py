"""A Transformers folder → model, adapter and tokenizer; the packed forward; LoRA on the decoder; saving.

T tokens, V vision tokens, D width.
"""

import json
import os
from pathlib import Path
from typing import Any, Literal

import torch

from umarvel_ray.config import ConfigT, build_config
from umarvel_ray.errors import CheckpointError
from umarvel_ray.model.adapters import Adapter, VisionFeatures, adapter_for
from umarvel_ray.model.attention import PackedLayout, use_packed_attention
from umarvel_ray.model.inputs import EncoderInputs
from umarvel_ray.model.settings import LoraSettings

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_DECODER_LINEARS = r".*language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"


HUB_PREFIX = "hf://"


def load_backbone(path: str, dtype: torch.dtype) -> tuple[Any, Adapter, Any]:
    """Model with LM head, in packed attention; its adapter; and its tokenizer.

    Args:
        path: A Transformers folder, or `hf://OWNER/NAME` for a model of the hub, where there is a network.
        dtype: Of the weights.

    Raises:
        CheckpointError: There is no checkpoint of a known backbone.
    """
    if path.startswith(HUB_PREFIX):
        # The hub library reads this once, when it is first imported.
        os.environ["HF_HUB_OFFLINE"] = "0"
        path = path.removeprefix(HUB_PREFIX)
    elif not (Path(path) / "config.json").exists():
        raise CheckpointError(
            f"{path}: no config.json there, so no checkpoint. Give a Transformers folder, or hf://OWNER/NAME."
        )
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer

    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: cannot be loaded ({str(error).splitlines()[0]}). Check the path."
        ) from None
    adapter = adapter_for(config, path)
    model = AutoModelForImageTextToText.from_pretrained(path, dtype=dtype, attn_implementation="sdpa")
    use_packed_attention(model)
    return model, adapter, AutoTokenizer.from_pretrained(path)


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


def hidden_states(
    model: Any,
    adapter: Adapter,
    inputs: EncoderInputs,
    layout: PackedLayout,
    *,
    features: VisionFeatures | None = None,
) -> torch.Tensor:
    """Final-norm hidden states (T, D) of a packed micro-batch; no padding, no LM head, no cache.

    Args:
        model: From `load_backbone`, adapters attached or not.
        adapter: The backbone's.
        inputs: On the model's device.
        layout: Who sees whom.
        features: Of all visuals, where they are known already; else the tower is asked.
    """
    core = core_of(model)
    if features is None and inputs.visuals is not None:
        if inputs.visuals.patches_P is None or inputs.visuals.stored_VF is not None:
            raise ValueError("stored features are joined by the encoder; pass them as `features`")
        features = adapter.tower(core, inputs.visuals.patches_P, inputs.visuals.grids)
    embeds_TD = core.get_input_embeddings()(inputs.ids_T)
    is_vision_T = (inputs.ids_T == adapter.image_token) | (inputs.ids_T == adapter.video_token)
    if features is not None:
        embeds_TD = embeds_TD.masked_scatter(is_vision_T[:, None], features.merged_VD.to(embeds_TD.dtype))
    output = core.language_model(
        inputs_embeds=embeds_TD[None],
        position_ids=inputs.positions_3T[:, None],
        attention_mask=None,
        use_cache=False,
        layout=layout,
        **adapter.decoder_inputs(is_vision_T, features),
    )
    return output.last_hidden_state[0]


def core_of(model: Any) -> Any:
    """Tower and decoder, without LM head and without PEFT's wrapping."""
    return model.get_base_model().model if hasattr(model, "get_base_model") else model.model


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
