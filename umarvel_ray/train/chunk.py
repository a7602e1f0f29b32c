"""How many tokens a chunk may have: the most that fit, found from what two small ones take."""

from collections.abc import Callable, Sequence

import torch

from umarvel_ray.errors import ConfigError
from umarvel_ray.model.encoder import Encoder
from umarvel_ray.model.inputs import Item
from umarvel_ray.train.strategy import Replicated

_SMALL = (2048, 4096)
"""Tokens of the two trials."""
_SHARE = 0.85
"""Of the memory that is left: chunks differ in pictures and lengths, and allocators leave holes."""
_MOST = 65536
WITHOUT_DEVICE = 8192
"""On a CPU, where memory is not what bounds a chunk."""


def largest_chunk(measure: Callable[[int], float], room: float) -> int:
    """Tokens that fit into `room` bytes, in whole hundreds.

    Args:
        measure: Tokens of a chunk → most bytes held while it is passed forward and back.
        room: Bytes that a chunk may take, its share of holes included.

    Raises:
        ConfigError: Not even a small chunk fits.
    """
    few, many = _SMALL
    at_few, at_many = measure(few), measure(many)
    per_token = max(1.0, (at_many - at_few) / (many - few))
    fixed = max(0.0, at_few - few * per_token)
    tokens = int((_SHARE * room - fixed) / per_token)
    if tokens < 256:
        raise ConfigError(
            f"train.max_tokens: a chunk of {few} tokens takes {at_few / 1e9:.1f} GB, and {room / 1e9:.1f} GB "
            "are left on the device. Shard the model (runtime.strategy), or recompute_activations."
        )
    return min(_MOST, tokens // 100 * 100)


def find_max_tokens(encoder: Encoder, items: Sequence[Item], strategy: Replicated) -> int:
    """The largest chunk of this model on this device, the same on all workers.

    Args:
        encoder: In training.
        items: Of a global batch; they stand for all.
        strategy: How parameters lie.
    """
    if strategy.device.type != "cuda":
        return WITHOUT_DEVICE
    device = strategy.device

    def measure(tokens: int) -> float:
        chosen, total = [], 0
        while total < tokens:
            chosen.append(items[len(chosen) % len(items)])
            total += chosen[-1].num_tokens
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)

        def run() -> tuple[torch.Tensor, torch.Tensor]:
            rows = strategy.run(encoder, encoder.builder.pack(chosen))
            return rows, torch.zeros_like(rows)

        strategy.backward({strategy.lanes.mine[0]: [run]})
        return (torch.cuda.max_memory_allocated(device) - before) * tokens / total

    free, _ = torch.cuda.mem_get_info(device)
    room = free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    tokens = largest_chunk(measure, room)
    strategy.drop_gradients()
    return -strategy.lanes.most(-tokens)
