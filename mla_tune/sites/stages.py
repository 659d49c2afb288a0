"""The timed parts of every candidate, and how often each of them runs.

Kernels run these stages, the sweep times them one by one, and the fit adds their curves up: this list is what the three
share. Standard library only.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from mla_tune.errors import UsageError
from mla_tune.sites.provider import OWN
from mla_tune.sites.site import WITH_KVCACHE_MIXED, LayerType, Site, SiteName


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
        found: tuple[Stage, ...] = (Stage("schedule", Amortization.PER_LAYER_TYPE), _ATTENTION)
    else:
        found = _BY_CANDIDATE.get(candidate, _SPARSE_FWD)[site.layer]
    if site.provider is None or not site.provider.transforms or site.topk is None:
        return found
    shared = sum(stage.amortization is not Amortization.PER_LAYER for stage in found)
    return (*found[:shared], TOPK_TRANSFORM, *found[shared:])


def provided_by(site: Site, candidate: str, stage: str) -> str:
    """Whose kernel runs ``stage`` of ``candidate``: ``own``, ``flash_mla``, ``deep_gemm``, or as ``sglang 0.5.23``."""
    if stage in ("attention", "schedule"):
        return "flash_mla"
    if candidate == "deep_gemm":
        return candidate
    return str(site.provider) if site.provider is not None and stage in PROVIDED_STAGES else OWN


def kernels(site: Site, candidate: str) -> tuple[str, ...]:
    """Names of our own kernels (:data:`mla_tune.sites.launch_parameters.KERNELS`) that ``candidate`` runs at ``site``."""
    used = {name for stage in stages(site, candidate) for name in stage_kernels(site, candidate, stage.name)}
    return tuple(sorted(used))


def stage_kernels(site: Site, candidate: str, stage: str) -> tuple[str, ...]:
    """Those of :func:`kernels` that one stage runs."""
    if site.name is SiteName.INDEXER_METADATA:
        return ("metadata",) if candidate == "jit" and site.provider is None else ()
    if not candidate.startswith("sparse_fwd") or provided_by(site, candidate, stage) != OWN:
        return ()
    if stage == "combine":
        return ("combine_topk",) if site.topk is not None else ("combine_all",)
    fmt = "dsa" if site.layer is LayerType.DSA else "v4"
    return tuple(name.format(fmt=fmt) for name in _KERNELS_OF.get(stage, ()))


_KERNELS_OF: dict[str, tuple[str, ...]] = {
    "window_ids": ("slot_ids",),
    "row_ids": ("slot_ids",),
    "dequantize_compressed": ("dequantize_{fmt}",),
    "dequantize_window": ("dequantize_{fmt}",),
    "dequantize_selected": ("dequantize_{fmt}",),
    "mark": ("select",),
    "compact": ("select",),
    "prepare": ("prepare",),
}

PROVIDED_STAGES = frozenset({"topk_transform", "dequantize_compressed", "dequantize_window", "combine", "metadata"})
"""Stages that an engine's kernels run where a site has a provider; slots are looked up by ours all the same."""
TOPK_TRANSFORM = Stage("topk_transform", Amortization.PER_LAYER)
"""An engine's selection of the top-k scores as the path wants it, rows or slots; ours takes the selection as given."""

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

_PREPARE = Stage("prepare", Amortization.PER_LAYER)
"""One launch for what the layer dequantizes and, in c4a, combines; it looks the slots up itself."""

_SPARSE_FWD_FUSED: dict[LayerType, tuple[Stage, ...]] = {
    LayerType.SWA_ONLY: (_COMBINE_ONCE, _PREPARE, _ATTENTION),
    LayerType.C4A: (_PREPARE, _ATTENTION),
    LayerType.C128A: (_COMBINE_ONCE, _PREPARE, _ATTENTION),
    LayerType.DSA: (_PREPARE, _ATTENTION),
}

_MARK = Stage("mark", Amortization.PER_LAYER)
_COMPACT = Stage("compact", Amortization.PER_LAYER)
_DEQUANTIZE_SELECTED = Stage("dequantize_selected", Amortization.PER_LAYER)

_SPARSE_FWD_SELECTED: dict[LayerType, tuple[Stage, ...]] = {
    LayerType.C4A: (
        *(_WINDOW_IDS, _ROW_IDS),
        *(_MARK, _COMPACT, _DEQUANTIZE_SELECTED, _DEQUANTIZE_WINDOW, _COMBINE_EACH, _ATTENTION),
    ),
    LayerType.DSA: (_ROW_IDS, _MARK, _COMPACT, _DEQUANTIZE_SELECTED, _COMBINE_EACH, _ATTENTION),
}

_BY_CANDIDATE = {
    "sparse_fwd": _SPARSE_FWD,
    "sparse_fwd_fused": _SPARSE_FWD_FUSED,
    "sparse_fwd_selected": _SPARSE_FWD_SELECTED,
}


def split_stages(site: Site) -> tuple[Stage, ...]:
    """Stages of a batch that both attention candidates share, in running order; ``gather`` is not always there."""
    parts = [
        Stage(f"{name}.{stage.name}", stage.amortization)
        for name in ("sparse_fwd", "with_kvcache")
        for stage in stages(site, name)
    ]
    return (Stage("gather", Amortization.PER_LAYER), *parts, Stage("merge", Amortization.PER_LAYER))
