"""The zero-shot sets of the paper's Tables 8 and 9 and MMEB's image sets: layout, prompt and metric of each.

`SETS` is the one table. A reader takes the root under which a set's folder lies as its authors publish it,
and a protocol: `direction` gives every direction its own instruction on the query's side; `lamra` and
`umarvel` reproduce what those projects did, where one similarity matrix serves both directions and the side
that carries the instruction differs per set. Recall is hit@k everywhere.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from umarvel_ray.errors import ConfigError, DataError
from umarvel_ray.evaluate.parts import Part
from umarvel_ray.evaluate.published_files import Protocol
from umarvel_ray.evaluate.zeroshot_lists import read_ccneg, read_genecis, read_mmeb, read_sugarcrepe
from umarvel_ray.evaluate.zeroshot_pools import (
    read_circo,
    read_flickr30k,
    read_msrvtt,
    read_msvd,
    read_mt_fashioniq,
    read_sharegpt4v,
    read_urban1k,
    read_visdial,
)


@dataclass(frozen=True)
class ZeroShotSet:
    """One set.

    Attributes:
        name: In settings.
        title: In tables.
        read: (root, protocol) → its parts.
        average: How its parts become one figure: `"macro"` of their headlines, or None where directions stand
            apart.
        headline: What papers print.
        protocols: Whether the authors' variants differ from the direction-specific one.
    """

    name: str
    title: str
    read: Callable[[Path, Protocol], list[Part]]
    headline: str
    average: Literal["macro"] | None = None
    protocols: bool = False


def _circo_test(root: Path, protocol: Protocol) -> list[Part]:
    return read_circo(root, protocol, "test")


SETS: dict[str, ZeroShotSet] = {
    entry.name: entry
    for entry in (
        ZeroShotSet("sharegpt4v", "ShareGPT4V", read_sharegpt4v, "hit@1", protocols=True),
        ZeroShotSet("urban1k", "Urban-1K", read_urban1k, "hit@1", protocols=True),
        ZeroShotSet("flickr30k", "Flickr30K", read_flickr30k, "hit@1", protocols=True),
        ZeroShotSet("circo", "CIRCO", read_circo, "map@5"),
        ZeroShotSet("circo_test", "CIRCO, its server", _circo_test, "map@5"),
        ZeroShotSet("genecis", "GeneCIS", read_genecis, "hit@1", average="macro"),
        ZeroShotSet("visdial", "Visual Dialog", read_visdial, "hit@1"),
        ZeroShotSet("mt_fashioniq", "Multi-turn FashionIQ", read_mt_fashioniq, "hit@5"),
        ZeroShotSet("ccneg", "CC-Neg", read_ccneg, "hit@1"),
        ZeroShotSet("sugarcrepe", "SugarCrepe", read_sugarcrepe, "hit@1", average="macro", protocols=True),
        ZeroShotSet("msrvtt", "MSR-VTT", read_msrvtt, "hit@1"),
        ZeroShotSet("msvd", "MSVD", read_msvd, "hit@1"),
        ZeroShotSet("mmeb", "MMEB, image sets", read_mmeb, "hit@1", average="macro"),
    )
}
"""In the order of the paper's Tables 8 and 9."""


def read_sets(
    names: Sequence[str], root: str | Path, protocol: Protocol = "direction"
) -> dict[str, list[Part]]:
    """Parts of the named sets.

    Raises:
        ConfigError: A name is unknown.
        DataError: A file is missing or not as published.
    """
    if unknown := [name for name in names if name not in SETS]:
        raise ConfigError(f"no zero-shot set is called {unknown[0]!r}. There are: {', '.join(SETS)}.")
    parts = {}
    for name in names:
        try:
            parts[name] = SETS[name].read(Path(root), protocol)
        except (KeyError, TypeError, IndexError) as error:
            raise DataError(
                f"{name}: its files under {root} are not as published: {type(error).__name__} {error}. Copy "
                "them again."
            ) from None
    return parts
