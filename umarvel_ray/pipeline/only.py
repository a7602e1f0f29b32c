"""A part of a run by name: one job, one shard, every n-th shard, or one batch.

Parts are told on the command line as `only.KEY=VALUE`. They choose among what the settings plan and change
none of it, so they are no settings, and the folder's claim does not know them.
"""

import re
from collections.abc import Sequence

from pydantic import NonNegativeInt, PositiveInt, field_validator

from umarvel_ray.config import Config, build_config
from umarvel_ray.errors import ConfigError

_PREFIX = "only."


class Only(Config):
    """What to do of what is planned; everything by default."""

    job: str | None = None
    """Of a run: `embed/hard`."""
    shard: NonNegativeInt | None = None
    """Of an embedding job: the shard of this number, counted through all of its stores."""
    part: str | None = None
    """Of an embedding job: `3/16` is every sixteenth shard from the fourth on; `all` is all."""

    batch: PositiveInt | None = None
    """Of a training: the batch of this step, as `metrics.jsonl` counts."""

    @field_validator("part")
    @classmethod
    def _is_a_share(cls, value: str | None) -> str | None:
        if value is None or value == "all":
            return None
        found = re.fullmatch(r"(\d+)/(\d+)", value)
        if not found or int(found[1]) >= int(found[2]):
            raise ValueError("give NUMBER/COUNT, the number from 0 and less than the count, as in 3/16")
        return value

    @property
    def is_everything(self) -> bool:
        """Whether a job is to be done whole."""
        return self.shard is None and self.part is None and self.batch is None

    def takes(self, shard: int) -> bool:
        """Whether a shard, by its number, is asked for."""
        if self.part is not None:
            number, count = map(int, self.part.split("/"))
            return shard % count == number
        return self.shard is None or shard == self.shard


EVERYTHING = Only()


def split_only(overrides: Sequence[str]) -> tuple[Only, list[str]]:
    """What is asked for, and the overrides that are settings.

    Raises:
        ConfigError: A key or value is none of ours.
    """
    mine = [override for override in overrides if override.startswith(_PREFIX)]
    values = {}
    for override in mine:
        key, equals, value = override.removeprefix(_PREFIX).partition("=")
        if not equals:
            raise ConfigError(f"override {override!r} is not of the form only.key=value.")
        values[key] = value
    rest = [override for override in overrides if not override.startswith(_PREFIX)]
    return build_config(values, Only, where="only"), rest
