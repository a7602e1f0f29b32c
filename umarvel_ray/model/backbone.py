"""A Transformers folder → model, adapter and tokenizer; the packed forward; LoRA on the decoder; saving.

T tokens, V vision tokens, D width.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from umarvel_ray.artifacts import write_json
from umarvel_ray.config import ConfigT, build_config
from umarvel_ray.errors import CheckpointError
from umarvel_ray.model.adapters import Adapter, VisionFeatures, adapter_for
from umarvel_ray.model.attention import PackedLayout, set_attention, use_packed_attention
from umarvel_ray.model.inputs import EncoderInputs
from umarvel_ray.model.lora import (
    ADAPTER_FOLDER,
    adapter_base,
    is_adapter,
    load_adapter,
    merge_lora,
    save_adapter,
)
from umarvel_ray.model.modules import only_at, use_fast_modules
from umarvel_ray.model.prompts import EMBED_TOKEN, INSTRUCTION_END, INSTRUCTION_START
from umarvel_ray.model.settings import ImageSettings

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
HUB_PREFIX = "hf://"
_TOKEN_IDS_OF_RELEASES = {
    EMBED_TOKEN: "emb_token_id",
    INSTRUCTION_START: "instruction_start_token_id",
    INSTRUCTION_END: "instruction_end_token_id",
}
"""Where the config of a checkpoint of the authors names its added tokens."""
_TEMPERATURE_OF_RELEASES = "sim.temp"


def load_backbone(path: str, dtype: torch.dtype, *, base: str | None = None) -> tuple[Any, Adapter, Any]:
    """Model with LM head, in packed attention; its adapter; and its tokenizer.

    Args:
        path: A Transformers folder, `hf://OWNER/NAME` for a model of the hub where there is a network, or the
            folder of a PEFT adapter, which is merged.
        dtype: Of the weights.
        base: For a PEFT adapter: the checkpoint that it was trained on, in place of the one that it names.

    Raises:
        CheckpointError: There is no checkpoint of a known backbone.
    """
    if is_adapter(path):
        return _load_adapted(path, dtype, base=base)
    adapter, tokenizer = load_reader(path)
    from transformers import AutoModelForImageTextToText

    path = path.removeprefix(HUB_PREFIX)
    with _loading(path):
        model = AutoModelForImageTextToText.from_pretrained(path, dtype=dtype, attn_implementation="sdpa")
    use_packed_attention(model)
    use_fast_modules(model.model)
    return model, adapter, tokenizer


def load_reader(path: str, *, base: str | None = None) -> tuple[Adapter, Any]:
    """Adapter and tokenizer of what `load_backbone` loads, without the weights; args and errors are its."""
    if is_adapter(path):
        adapter, tokenizer = load_reader(_base_of(path, base))
        return adapter, _own_tokenizer(path) or tokenizer
    if path.startswith(HUB_PREFIX):
        # The hub library reads this once, when it is first imported.
        os.environ["HF_HUB_OFFLINE"] = "0"
        path = path.removeprefix(HUB_PREFIX)
    elif not (Path(path) / "config.json").exists():
        raise CheckpointError(
            f"{path}: no config.json there, so no checkpoint. Give a Transformers folder, or hf://OWNER/NAME."
        )
    from transformers import AutoConfig, AutoTokenizer

    with _loading(path):
        adapter = adapter_for(AutoConfig.from_pretrained(path), path)
        tokenizer = AutoTokenizer.from_pretrained(path)
    _take_chat_template(tokenizer, path)
    return adapter, tokenizer


@contextmanager
def _loading(path: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"{path}: cannot be loaded ({str(error).splitlines()[0]}). Check the path."
        ) from None


def _base_of(path: str, base: str | None) -> str:
    base = base or adapter_base(path)
    if not base.startswith(HUB_PREFIX) and not Path(base).exists():
        raise CheckpointError(
            f"{path}: an adapter trained on {base or 'a model that it does not name'}, which is not "
            f"here. Say where that is: base=FOLDER, or base={HUB_PREFIX}OWNER/NAME."
        )
    return base


def _own_tokenizer(path: str) -> Any:
    if not (Path(path) / "tokenizer_config.json").exists():
        return None
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path)


def _load_adapted(path: str, dtype: torch.dtype, *, base: str | None) -> tuple[Any, Adapter, Any]:
    model, adapter, tokenizer = load_backbone(_base_of(path, base), dtype)
    return merge_lora(load_adapter(model, path)), adapter, _own_tokenizer(path) or tokenizer


def _take_chat_template(tokenizer: Any, path: str) -> None:
    """Some checkpoints keep the template in a file of their processor's."""
    file = Path(path) / "chat_template.json"
    if not tokenizer.chat_template and file.exists():
        tokenizer.chat_template = json.loads(file.read_text(encoding="utf-8"))["chat_template"]


def add_tokens(model: Any, tokenizer: Any, tokens: tuple[str, ...], *, path: str) -> None:
    """Give tokenizer and model the tokens that they lack; a new row is the mean of the table, so the same
    everywhere. Rows that a checkpoint has for them stay.

    Raises:
        CheckpointError: The config names other ids for them than the tokenizer.
    """
    known = add_missing_tokens(tokenizer, tokens)
    table = model.get_input_embeddings().weight
    fresh = []
    for token in tokens:
        number = tokenizer.convert_tokens_to_ids(token)
        named = getattr(model.config, _TOKEN_IDS_OF_RELEASES.get(token, ""), None)
        if named not in (None, number):
            raise CheckpointError(
                f"{path}: config.json has {token} as token {named}, the tokenizer has it as {number}. "
                "Use the tokenizer that the checkpoint was trained with."
            )
        if number >= len(table) or (token not in known and named is None):
            fresh.append(number)
    if not fresh:
        return
    mean_D = table.detach().float().mean(0)
    if max(fresh) >= len(table):
        model.resize_token_embeddings(max(fresh) + 1, mean_resizing=False)
    with torch.no_grad():
        model.get_input_embeddings().weight[fresh] = mean_D.to(table.dtype)
        head = model.get_output_embeddings()
        if head is not None and head.weight is not model.get_input_embeddings().weight:
            head.weight[fresh] = head.weight[: min(fresh)].float().mean(0).to(head.weight.dtype)


def add_missing_tokens(tokenizer: Any, tokens: tuple[str, ...]) -> set[str]:
    """Teach the tokenizer those of `tokens` that it lacks; returns those that it knew."""
    known = {token for token in tokens if _id_of(tokenizer, token) is not None}
    tokenizer.add_tokens([token for token in tokens if token not in known], special_tokens=True)
    return known


def _id_of(tokenizer: Any, token: str) -> int | None:
    number = tokenizer.convert_tokens_to_ids(token)
    return None if number == tokenizer.unk_token_id else number


def released_temperature(path: str) -> float | None:
    """The temperature that a checkpoint of the authors carries among its weights, if it does."""
    from safetensors import safe_open

    for file in sorted(Path(path).glob("*.safetensors")):
        with safe_open(file, framework="pt") as weights:
            if _TEMPERATURE_OF_RELEASES in weights.keys():  # noqa: SIM118  (no mapping, only a method)
                return float(weights.get_tensor(_TEMPERATURE_OF_RELEASES).float().reshape(-1)[0])
    return None


def hidden_states(
    model: Any,
    adapter: Adapter,
    inputs: EncoderInputs,
    layout: PackedLayout,
    *,
    features: VisionFeatures | None = None,
    places_S: torch.Tensor | None = None,
) -> torch.Tensor:
    """Final-norm hidden states (T, D) of a packed micro-batch; no padding, no LM head, no cache.

    Args:
        model: From `load_backbone`, adapters attached or not.
        adapter: The backbone's.
        inputs: On the model's device.
        layout: Who sees whom.
        features: Of all visuals, where they are known already; else the tower is asked.
        places_S: int64, the only tokens whose states are wanted: (S, D) of them are returned, and the last
            layer attends and feeds forward for no others. Without gradients.
    """
    if places_S is not None:
        layout = layout.ending_at(places_S)
    core = core_of(model)
    if features is None and inputs.visuals is not None:
        if inputs.visuals.patches_P is None or inputs.visuals.stored_VF is not None:
            raise ValueError("stored features are joined by the encoder; pass them as `features`")
        features = adapter.tower(core, inputs.visuals.patches_P, inputs.visuals.grids)
    embeds_TD = core.get_input_embeddings()(inputs.ids_T)
    is_vision_T = (inputs.ids_T == adapter.image_token) | (inputs.ids_T == adapter.video_token)
    if features is not None:
        embeds_TD = embeds_TD.masked_scatter(is_vision_T[:, None], features.merged_VD.to(embeds_TD.dtype))
    with nullcontext() if places_S is None else only_at(_after_keys(core.language_model), places_S):
        output = core.language_model(
            inputs_embeds=embeds_TD[None],
            position_ids=inputs.positions_3T[:, None],
            attention_mask=None,
            use_cache=False,
            layout=layout,
            **adapter.decoder_inputs(is_vision_T[None], features),
        )
    hidden_TD = output.last_hidden_state[0]
    return hidden_TD if places_S is None else hidden_TD[places_S]


def _after_keys(decoder: Any) -> list[Any]:
    """What treats tokens one by one once the last layer has its keys and values."""
    layer = decoder.layers[-1]
    attention = layer.self_attn
    return [attention.q_proj, attention.o_proj, layer.post_attention_layernorm, layer.mlp, decoder.norm]


def core_of(model: Any) -> Any:
    """Tower and decoder, without LM head and without PEFT's wrapping."""
    return model.get_base_model().model if hasattr(model, "get_base_model") else model.model


def save_backbone(
    model: Any, adapter: Adapter, tokenizer: Any, images: ImageSettings, *, source: str, folder: Path
) -> Any:
    """Write a standard Transformers folder: weights, config, tokenizer, and settings of the image processor.

    Adapters are merged; what was merged lies in `folder/adapter` in PEFT's format.

    Args:
        model: From `load_backbone`, adapters attached or not.
        adapter: The backbone's.
        tokenizer: With the added tokens.
        images: What stock processors shall keep to as well.
        source: The checkpoint that the adapters were trained on.
        folder: Where to.

    Returns:
        The merged model.
    """
    if hasattr(model, "peft_config"):
        save_adapter(model, source, folder / ADAPTER_FOLDER)
    model = merge_lora(model)
    set_attention(model, "sdpa")  # what others find in the config is a name they know
    model.save_pretrained(folder)
    use_packed_attention(model)
    tokenizer.save_pretrained(folder)
    mean, deviation = adapter.normalisation
    processor = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": adapter.processor,
        "patch_size": adapter.patch_size,
        "temporal_patch_size": adapter.temporal,
        "merge_size": adapter.merge_size,
        "image_mean": mean,
        "image_std": deviation,
        "size": {"shortest_edge": images.min_pixels, "longest_edge": images.max_pixels},
    }
    write_json(folder / "preprocessor_config.json", processor)
    return model


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
