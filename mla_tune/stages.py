"""The timed parts of every candidate, and how often each of them runs.

Kernels run these stages, the sweep times them one by one, and the fit adds their curves up: this list is what the three
share. Standard library only.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from mla_tune.errors import UsageError
from mla_tune.site import WITH_KVCACHE_MIXED, LayerType, Site, SiteName


class Amortization(StrEnum):
    """How often a stage runs in one forward of a model."""

    PER_LAYER = "per_layer"
    """In every layer."""
    PER_LAYER_TYPE = "per_layer_type"
    """Once; all layers of the same type use its result."""
    PER_FORWARD = "per_forward"
    """Once; all layers of the forward use its result."""


@dataclass(frozen=True, slots=True)
class Stage:
    """A timed part of a candidate. ``name`` is the ``part`` of its measurements."""

    name: str
    amortization: Amortization


def stages(site: Site, candidate: str) -> tuple[Stage, ...]:
    """Stages of ``candidate`` at ``site`` in the order in which they run; those of a whole forward come first.

    Raises :class:`UsageError` if the candidate does not serve the site.
    """
    if candidate not in site.candidates:
        accepted = ", ".join(site.candidates)
        raise UsageError(f"candidate must be one that serves {site.name}: got {candidate!r}; accepted: {accepted}")
    if site.name is SiteName.INDEXER_METADATA:
        return (Stage("metadata", Amortization.PER_LAYER_TYPE),)
    if candidate in ("with_kvcache", WITH_KVCACHE_MIXED):
        return (Stage("schedule", Amortization.PER_LAYER_TYPE), Stage("attention", Amortization.PER_LAYER))
    return _SPARSE_FWD[site.layer]


_WINDOW_IDS = Stage("window_ids", Amortization.PER_FORWARD)
_ROW_IDS = Stage("row_ids", Amortization.PER_LAYER_TYPE)
_DEQUANTIZE_COMPRESSED = Stage("dequantize_compressed", Amortization.PER_LAYER)
_DEQUANTIZE_WINDOW = Stage("dequantize_window", Amortization.PER_LAYER)
_ATTENTION = Stage("attention", Amortization.PER_LAYER)

# Only c4a combines in every layer: its selection is the indexer's, new in each; the others depend on the shape alone.
_COMBINE_ONCE = Stage("combine", Amortization.PER_LAYER_TYPE)
_COMBINE_EACH = Stage("combine", Amortization.PER_LAYER)

_SPARSE_FWD: dict[LayerType, tuple[Stage, ...]] = {
    LayerType.SWA_ONLY: (_WINDOW_IDS, _COMBINE_ONCE, _DEQUANTIZE_WINDOW, _ATTENTION),
    LayerType.C4A: (_WINDOW_IDS, _ROW_IDS, _DEQUANTIZE_COMPRESSED, _DEQUANTIZE_WINDOW, _COMBINE_EACH, _ATTENTION),
    LayerType.C128A: (_WINDOW_IDS, _ROW_IDS, _COMBINE_ONCE, _DEQUANTIZE_COMPRESSED, _DEQUANTIZE_WINDOW, _ATTENTION),
    LayerType.DSA: (_ROW_IDS, _DEQUANTIZE_COMPRESSED, _ATTENTION),
}
