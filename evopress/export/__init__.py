"""Write a searched model in the formats that engines load, each a module behind one registry (`named.py`)."""

from __future__ import annotations

from evopress.export.checkpoint import export_checkpoint

__all__ = ["export_checkpoint"]
