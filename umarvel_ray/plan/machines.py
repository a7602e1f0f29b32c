"""What machines can do: ceilings that a matrix product or a copy reaches, not what a data sheet promises."""

from typing import Annotated

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from umarvel_ray.config import Config
from umarvel_ray.errors import ConfigError

Share = Annotated[float, Field(gt=0, le=1)]


class Machine(Config):
    """A cluster's speeds, per GPU unless it says otherwise."""

    name: str
    peak_flops: PositiveFloat
    """Dense bfloat16 matrix product, FLOP/s."""
    memory_bytes: PositiveFloat
    memory_bytes_per_s: PositiveFloat
    network_bytes_per_s: PositiveFloat = 50e9
    """Between nodes, for each GPU."""
    host_bytes_per_s: PositiveFloat = 50e9
    """From host memory to the device."""
    storage_bytes_per_s: PositiveFloat = 6e9
    """A node's, from its disk or the network."""
    gpus_per_node: PositiveInt = 8
    cores_per_gpu: PositiveFloat = 7
    model_share: Share = 0.55
    """Of the peak that a packed forward pass reaches; a training step counts like it."""
    product_share: Share = 0.75
    """Of the peak that exact search reaches."""
    image_core_s: PositiveFloat = 4.1e-3
    """One core reads, decodes and resizes an image of 256×340 in it."""
    start_s: NonNegativeFloat = 30.0
    """From a job's start to the first work of its processes: imports, weights, graphs."""


_H200 = Machine(name="h200", peak_flops=790e12, memory_bytes=141e9, memory_bytes_per_s=4.3e12)
MACHINES: dict[str, Machine] = {
    "h200": _H200,
    # The same cores as the H200 with less and slower memory.
    "h100": _H200.model_copy(
        update={"name": "h100", "memory_bytes": 80e9, "memory_bytes_per_s": 3.0e12},
    ),
    "a100": _H200.model_copy(
        update={
            "name": "a100",
            "peak_flops": 270e12,
            "memory_bytes": 80e9,
            "memory_bytes_per_s": 1.8e12,
            "network_bytes_per_s": 25e9,
            "host_bytes_per_s": 25e9,
        },
    ),
    # Two cores of a shared server without bfloat16 instructions: where the demonstration was timed.
    "cpu": Machine(
        name="cpu",
        peak_flops=90e9,
        memory_bytes=12e9,
        memory_bytes_per_s=10e9,
        network_bytes_per_s=1e9,
        host_bytes_per_s=10e9,
        storage_bytes_per_s=1e9,
        gpus_per_node=2,
        cores_per_gpu=1,
        model_share=0.2,
        product_share=0.5,
        start_s=12.0,
    ),
}
"""790 of an H200's 989 TFLOP/s are what a large product was measured to reach, outside this project; an
A100's peak is about that share of its data sheet. Nothing but the two cores was timed with this program."""


def machine_named(name: str) -> Machine:
    """A known machine.

    Raises:
        ConfigError: There is none of that name.
    """
    if name.lower() not in MACHINES:
        raise ConfigError(f"GPU {name!r} is not known. Give one of: {', '.join(MACHINES)}.")
    return MACHINES[name.lower()]
