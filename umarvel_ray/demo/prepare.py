"""World and backbone of the demonstration, made once under one folder."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from umarvel_ray.artifacts import claim_folder
from umarvel_ray.config import Config, load_config
from umarvel_ray.demo.backbone import BackboneConfig, make_backbone
from umarvel_ray.demo.world import WorldConfig, make_world, world_texts

_CONFIGS = Path(__file__).parents[2] / "configs"
_REPEATS = 200
"""How often a prompt is shown to the tokenizer: as one of the commoner sentences of the world."""
RUN_CONFIG = _CONFIGS / "demo.yaml"
WORLD_CONFIG = _CONFIGS / "demo_world.yaml"


class DemoConfig(Config):
    """What the demonstration is made of."""

    world: WorldConfig
    backbone: BackboneConfig


def load_demo_config() -> DemoConfig:
    """The settings that the repository ships.

    Raises:
        ConfigError: They are not there: the package was installed without the repository's `configs/`.
    """
    return load_config(WORLD_CONFIG, DemoConfig)


def prepare_demo(
    config: DemoConfig,
    home: Path,
    *,
    prompts: Sequence[str] = (),
    progress: Callable[[float], Any] | None = None,
) -> bool:
    """Make `home/world` and `home/backbone` unless they are there.

    Args:
        config: How large.
        home: The demonstration's folder.
        prompts: Fixed sentences that models will read, for the tokenizer to learn beside the world's words.
        progress: Called with the share that is done.

    Returns:
        Whether there was anything to make.

    Raises:
        OutputError: `home` holds the world of other settings, or something else.
    """
    claim_folder(home, config.model_dump(mode="json"), claim="demo.json")
    if (home / "backbone" / "config.json").exists():
        return False
    make_world(
        config.world,
        home / "world",
        workers=os.cpu_count() or 1,
        progress=None if progress is None else lambda done, total: progress(done / total),
    )
    make_backbone(
        [*world_texts(home / "world"), *(_REPEATS * list(prompts))], home / "backbone", config.backbone
    )
    return True


def demo_places(home: Path) -> list[str]:
    """Overrides that point the demonstration's run at `home`."""
    return [
        f"output={home}/run",
        f"backbone={home}/backbone",
        f"data.root={home}/world/M-BEIR",
        f"data.nli={home}/world/nli/nli_for_simcse.csv",
        f"data.captions={home}/world/cc3m/chat.json",
        f"data.caption_images={home}/world/cc3m/images",
    ]
