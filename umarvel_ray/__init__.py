"""umarvel-ray: universal multimodal retrieval embeddings by the U-MARVEL recipe, on Ray.

Importing this package costs nothing; the names below load what they need on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from umarvel_ray.data.records import Candidate, Query
    from umarvel_ray.model.encoder import Encoder
    from umarvel_ray.model.reranker import Reranker

__version__ = "0.1.0"
__all__ = ["Candidate", "Encoder", "Query", "Reranker", "__version__"]

_HOMES = {
    "Candidate": "umarvel_ray.data.records",
    "Query": "umarvel_ray.data.records",
    "Encoder": "umarvel_ray.model.encoder",
    "Reranker": "umarvel_ray.model.reranker",
}


def __getattr__(name: str) -> Any:
    """Load a public name on first use, so that `import umarvel_ray` stays in milliseconds."""
    if name not in _HOMES:
        raise AttributeError(f"module 'umarvel_ray' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
