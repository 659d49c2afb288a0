"""The committed measurements of an H200."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

from mla_tune.store.export import Export, read_export


@cache
def recorded() -> Export:
    """Those of independent selections, whatever launch parameters they ran with: a fit sees no others with them."""
    found = read_export(Path(__file__).parents[2] / "db" / "nvidia-h200.jsonl")
    return replace(found, measurements=tuple(m for m in found.measurements if not m.site.overlap))
