"""The same embeddings the slow way, to check the packed one and to measure it against: a padded batch in the
order given, as the authors' code does it, with an explicit mask and stock attention. N items, T tokens.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from umarvel_ray.model.attention import NAME, set_attention
from umarvel_ray.model.backbone import core_of
from umarvel_ray.model.inputs import Item
from umarvel_ray.model.modules import use_fast_modules, use_stock_modules
from umarvel_ray.model.visuals import pack_visuals

if TYPE_CHECKING:
    from umarvel_ray.model.encoder import Encoder


@torch.inference_mode()
def embed_padded(encoder: "Encoder", items: Sequence[Item], *, batch_size: int = 16) -> Tensor:
    """Embed prepared records: (N, D) float32 on the CPU, in their order, each batch padded to its longest."""
    with _stock(encoder.model):
        batches = [
            _embed_batch(encoder, items[start : start + batch_size]).cpu()
            for start in range(0, len(items), batch_size)
        ]
    return torch.cat(batches) if batches else torch.empty(0, encoder.dim)


def _embed_batch(encoder: "Encoder", items: Sequence[Item]) -> Tensor:
    core, adapter, device = core_of(encoder.model), encoder.adapter, encoder.device
    longest = max(item.num_tokens for item in items)

    def padded(rows: list[Tensor]) -> Tensor:
        return torch.stack([F.pad(row, (0, longest - row.shape[-1])) for row in rows]).to(device)

    id_NT = padded([torch.from_numpy(item.ids).long() for item in items])
    pooled_NT = padded([torch.from_numpy(item.pooled) for item in items])
    real_NT = padded([torch.ones(item.num_tokens, dtype=torch.bool) for item in items])
    position_N3T = padded([torch.from_numpy(encoder.builder.positions(item).copy()) for item in items])
    sees = real_NT[:, None, None, :].expand(-1, 1, longest, longest)
    if encoder.settings.attention == "causal":
        sees = sees & torch.ones(longest, longest, dtype=torch.bool, device=device).tril()
    sees = sees | torch.eye(longest, dtype=torch.bool, device=device)  # no row of the mask is empty
    embeds_NTD = core.get_input_embeddings()(id_NT)
    visuals = pack_visuals([visual for item in items for visual in item.visuals], adapter)
    features = encoder.features(visuals.to(device)) if visuals is not None else None
    is_vision_NT = (id_NT == adapter.image_token) | (id_NT == adapter.video_token)
    if features is not None:
        merged = features.merged_VD.to(embeds_NTD.dtype)
        embeds_NTD = embeds_NTD.masked_scatter(is_vision_NT[..., None], merged)
    lowest = torch.finfo(embeds_NTD.dtype).min
    mask = torch.zeros(sees.shape, dtype=embeds_NTD.dtype, device=device).masked_fill(~sees, lowest)
    hidden_NTD = core.language_model(
        inputs_embeds=embeds_NTD,
        position_ids=position_N3T.transpose(0, 1),
        attention_mask=mask,
        use_cache=False,
        **adapter.decoder_inputs(is_vision_NT, features),
    ).last_hidden_state
    weight = pooled_NT[..., None].float()
    return F.normalize((hidden_NTD.float() * weight).sum(1) / weight.sum(1), dim=1)


@contextmanager
def _stock(model: Any) -> Iterator[None]:
    """Attention and modules as Transformers has them."""
    set_attention(model, "sdpa")
    use_stock_modules(core_of(model))
    try:
        yield
    finally:
        set_attention(model, NAME)
        use_fast_modules(core_of(model))
