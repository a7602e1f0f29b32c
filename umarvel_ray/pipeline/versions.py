"""Versions of the libraries that a figure depends on, without importing them."""

import platform
from importlib.metadata import PackageNotFoundError, version

_LIBRARIES = ("umarvel-ray", "torch", "transformers", "ray", "peft", "numpy", "pyarrow", "pillow")


def library_versions() -> dict[str, str]:
    """Version of each library by name, Python's own first."""
    versions = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return versions
