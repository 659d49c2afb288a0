"""The committed measurements of an H200."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from mla_tune.fit.usable import stored_provider
from mla_tune.sites.provider import Provider
from mla_tune.store.export import Export, read_export
from mla_tune.store.measurement import Measurement

DB = Path(__file__).parents[2] / "db"


@dataclass(frozen=True)
class Exported:
    """A committed export, and whose kernels it measured."""

    path: Path

    def provider(self, measurements: Sequence[Measurement]) -> Provider | None:
        """The provider that its file is named after."""
        word = self.path.stem.partition(".")[2]
        return stored_provider(measurements, word) if word else None

    def __str__(self) -> str:
        return self.path.stem


EXPORTS = [Exported(path) for path in sorted(DB.glob("*.jsonl"))]


@cache
def recorded() -> Export:
    """Those of independent selections, whatever launch parameters they ran with: a fit sees no others with them."""
    found = read_export(DB / "nvidia-h200.jsonl")
    return replace(found, measurements=tuple(m for m in found.measurements if not m.site.overlap))
