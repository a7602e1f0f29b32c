"""Checkpoints in the formats of others."""

from typing import Literal

Format = Literal["peft", "transformers", "sentence-transformers"]
