"""The embedder: a decoder-only multimodal model, bidirectional, mean-pooled without the instruction's tokens.

N items, D width.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from umarvel_ray.artifacts import write_json
from umarvel_ray.data.records import Candidate, Query
from umarvel_ray.errors import ConfigError
from umarvel_ray.model.adapters import Adapter, VisionFeatures
from umarvel_ray.model.attention import PackedLayout, log_kernel
from umarvel_ray.model.backbone import (
    DTYPES,
    add_missing_tokens,
    add_tokens,
    core_of,
    hidden_states,
    load_backbone,
    load_reader,
    read_settings_file,
    released_temperature,
    resolve_settings,
    save_backbone,
)
from umarvel_ray.model.gates import check_embeddings
from umarvel_ray.model.inputs import EncoderInputs, InputBuilder, Item, micro_batches
from umarvel_ray.model.lora import set_trainable
from umarvel_ray.model.pooling import mean_pool
from umarvel_ray.model.prompts import ADDED_TOKENS
from umarvel_ray.model.settings import ENCODER_FILE, DtypeName, EncoderSettings, LoraSettings
from umarvel_ray.model.vision_store import VisionStore
from umarvel_ray.model.visuals import PackedVisuals
from umarvel_ray.storage import local_model

INITIAL_TEMPERATURE = 0.05


class Encoder(nn.Module):
    """Queries and candidates of any modality → unit-norm vectors.

    Attributes:
        settings: What decides an embedding, besides the weights.
        temperature: τ, a float32 scalar; it travels with the weights because training goes on from it.
        builder: Record → `Item`.
    """

    def __init__(
        self,
        model: Any,
        adapter: Adapter,
        tokenizer: Any,
        settings: EncoderSettings,
        *,
        temperature: float,
        source: str,
    ) -> None:
        super().__init__()
        self.model = model
        self.adapter = adapter
        self.settings = settings
        self.source = source
        self.temperature = nn.Parameter(torch.tensor(temperature, dtype=torch.float32), requires_grad=False)
        self._tokenizer = tokenizer
        self._store: VisionStore | None = None
        self.builder = InputBuilder(tokenizer, adapter, settings)

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        settings: EncoderSettings | None = None,
        base: str | None = None,
        device: str | torch.device = "cpu",
        dtype: DtypeName = "float32",
    ) -> "Encoder":
        """Load a stock backbone, a checkpoint of ours, one that the authors released, or a PEFT adapter.

        Args:
            path: A Transformers folder, `hf://OWNER/NAME`, or a folder with an adapter.
            settings: For what brings none. A checkpoint of ours brings its own, and refuses others.
            base: For an adapter: the checkpoint that it was trained on, where it names none that is here.
            device: Where to compute.
            dtype: Of the weights.

        Raises:
            CheckpointError: Nothing loadable there, or it was made with other settings than `settings`.
        """
        path = local_model(path)
        stored = read_settings_file(Path(path) / ENCODER_FILE)
        settings = resolve_settings(stored, settings, EncoderSettings, path=path)
        model, adapter, tokenizer = load_backbone(path, DTYPES[dtype], base=base)
        add_tokens(model, tokenizer, ADDED_TOKENS, path=path)
        encoder = cls(
            model,
            adapter,
            tokenizer,
            settings,
            temperature=stored.get("temperature") or released_temperature(path) or INITIAL_TEMPERATURE,
            source=path,
        )
        log_kernel(torch.device(device), DTYPES[dtype])
        return encoder.requires_grad_(False).eval().to(device)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.temperature.device

    @property
    def dim(self) -> int:
        """D."""
        return self.model.config.get_text_config().hidden_size

    def cache_inputs(self, num_bytes: int) -> None:
        """Keep up to `num_bytes` of prepared records in memory."""
        self.builder = InputBuilder(
            self._tokenizer, self.adapter, self.settings, cache_bytes=num_bytes, store=self._store
        )

    @property
    def vision_store(self) -> VisionStore | None:
        """Where features of pictures are kept, if they are."""
        return self._store

    def keep_vision_features(self, folder: str | Path) -> VisionStore:
        """Keep what the vision tower makes of pictures in `folder`, and take from there what it has.

        Embeddings stay what they are: features are kept in the precision of the weights.

        Raises:
            ConfigError: The tower trains, so its features change.
        """
        tower = core_of(self.model).visual
        if any(parameter.requires_grad for parameter in tower.parameters()):
            raise ConfigError("the vision tower trains, so what it makes of a picture cannot be kept.")
        self._store = VisionStore(
            folder,
            tower,
            self.settings.images,
            width=self.dim * (1 + self.adapter.num_deep),
            dtype=self.model.dtype,
        )
        self.builder = InputBuilder(self._tokenizer, self.adapter, self.settings, store=self._store)
        return self._store

    def forward(self, inputs: EncoderInputs) -> Tensor:
        """Embed a packed micro-batch: (N, D) float32, unit norm. No row depends on its batch mates."""
        inputs = inputs.to(self.device)
        causal = self.settings.attention == "causal"
        layout = PackedLayout.of_lengths(
            inputs.lengths_N, causal=causal, device=self.device, dtype=self.model.dtype
        )
        features = None if inputs.visuals is None else self.features(inputs.visuals)
        hidden_TD = hidden_states(self.model, self.adapter, inputs, layout, features=features)
        return mean_pool(hidden_TD, inputs.pooled_T, inputs.lengths_N)

    def features(self, visuals: PackedVisuals) -> VisionFeatures:
        """Of all visuals: stored ones as they are, the others from the tower."""
        fresh = None
        if visuals.patches_P is not None:
            fresh = self.adapter.tower(core_of(self.model), visuals.patches_P, visuals.grids)
            if self._store is not None:
                parts = fresh.joined_VF.detach().cpu().split([num_tokens for _, num_tokens in visuals.keys])
                for (key, _), part in zip(visuals.keys, parts, strict=True):
                    if key is not None:
                        self._store.put(key, part)
        if visuals.stored_VF is None or visuals.is_stored_V is None:
            assert fresh is not None, "visuals are fresh or stored"
            return fresh
        joined_VF = visuals.stored_VF
        if fresh is not None:
            is_stored_V1, fresh_VF = visuals.is_stored_V[:, None], fresh.joined_VF
            stored_VF = joined_VF.to(fresh_VF.dtype)  # under autocast the tower's is another
            joined_VF = fresh_VF.new_empty(len(is_stored_V1), fresh_VF.shape[1])
            joined_VF = joined_VF.masked_scatter(is_stored_V1, stored_VF)
            joined_VF = joined_VF.masked_scatter(~is_stored_V1, fresh_VF)
        return VisionFeatures.split(joined_VF, num_deep=self.adapter.num_deep)

    @torch.inference_mode()
    def embed_items(self, items: Sequence[Item], *, max_tokens: int = 8192) -> Tensor:
        """Embed prepared records: (N, D) float32 on the CPU, in their order.

        Args:
            items: From `builder`.
            max_tokens: Token budget of a micro-batch.

        Raises:
            EmbeddingError: What came out is not finite, not of unit norm, or the same for different records.
        """
        embedding_ND = torch.empty(len(items), self.dim)
        for batch in micro_batches([item.num_tokens for item in items], max_tokens):
            embedding_ND[batch] = self(self.builder.pack([items[index] for index in batch])).cpu()
        check_embeddings(embedding_ND, items, source=self.source)
        return embedding_ND

    def embed_queries(self, queries: Iterable[Query], *, max_tokens: int = 8192) -> np.ndarray:
        """(Q, D) float32, unit norm."""
        return self._embed(queries, max_tokens)

    def embed_candidates(self, candidates: Iterable[Candidate], *, max_tokens: int = 8192) -> np.ndarray:
        """(C, D) float32, unit norm."""
        return self._embed(candidates, max_tokens)

    def _embed(self, records: Iterable[Query | Candidate], max_tokens: int) -> np.ndarray:
        return self.embed_items(
            [self.builder.build(record) for record in records], max_tokens=max_tokens
        ).numpy()

    def set_trainable(self, trainable: Any, lora: LoraSettings, *, learn_temperature: bool) -> None:
        """Choose what trains: adapters on the decoder, or everything; and whether τ does.

        Raises:
            ConfigError: The tower is to train although its features are kept.
        """
        if trainable == "full" and self._store is not None:
            raise ConfigError("the vision tower cannot train while its features are kept.")
        self.model = set_trainable(self.model, trainable, lora)
        self.temperature.requires_grad_(learn_temperature)

    def save(self, folder: Path) -> None:
        """Write a standard Transformers folder, adapters merged, and `embedding.json` beside the weights.

        What was merged lies in `folder/adapter` too, in PEFT's format.
        """
        self.model = save_backbone(
            self.model,
            self.adapter,
            self._tokenizer,
            self.settings.images,
            source=self.source,
            folder=folder,
        )
        write_json(
            folder / ENCODER_FILE,
            {"settings": self.settings.model_dump(), "temperature": self.temperature.item()},
        )


def load_input_builder(
    path: str | Path,
    *,
    settings: EncoderSettings | None = None,
    base: str | None = None,
    vision_store: Path | None = None,
) -> InputBuilder:
    """What `Encoder.load` has as `builder`, without the weights: for processes that only read.

    Args and errors as `Encoder.load`; `vision_store` is the `folder` of the encoder's own store.
    """
    path = local_model(path)
    stored = read_settings_file(Path(path) / ENCODER_FILE)
    settings = resolve_settings(stored, settings, EncoderSettings, path=path)
    adapter, tokenizer = load_reader(path, base=base)
    add_missing_tokens(tokenizer, ADDED_TOKENS)
    store = None if vision_store is None else VisionStore.open(vision_store)
    return InputBuilder(tokenizer, adapter, settings, store=store)
