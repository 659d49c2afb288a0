"""Where FlashMLA takes another kernel as the width of a selection grows: only on SM100.

The rules are those of sgl-flash-mla 1.0.0, read from its sources (``csrc/api/sparse_decode.cpp``, ``sparse_prefill.cpp``):

* The KV-cache kernel shares a query's entries out to several SMs, by a schedule that a kernel of its own makes, writes
  partial results, and merges them in a third kernel. On SM100 it does none of this where a query has at most 640 entries,
  window included: swa_only, V4-Flash's c4a, and c128a up to 64K of context. On SM90 it always does.
* ``flash_mla_sparse_fwd`` with 128 heads of 512 dimensions takes a kernel for narrow index matrices up to a width of 1280
  on SM100. Among the layer types only c128a reaches both kernels: it changes at 147,456 context tokens.

Widths are those of :mod:`mla_tune.sites.shape`. Standard library only.
"""

from __future__ import annotations

from mla_tune.hardware.datasheet import SM100
from mla_tune.sites.shape import selection_width
from mla_tune.sites.site import SWA_WINDOW, LayerType, Site

UNSPLIT_ENTRIES = 640
"""Most entries of a query, columns of both index matrices together, that the SM100 KV-cache kernel does not split."""
NARROW_WIDTH = 1280
"""Widest index matrix of the SM100 sparse prefill kernel for 128 heads and few entries."""
_RATIO = LayerType.C128A.compress_ratio
_STEP = 64 * _RATIO
"""Context tokens by which the padded selection of c128a grows."""


def unsplit_entries(architecture: str | None) -> int:
    """Most entries of a query that the KV-cache kernel takes without schedule, partial results and merge; 0 for none."""
    return UNSPLIT_ENTRIES if architecture == SM100 else 0


def window_columns(layer: LayerType) -> int:
    """Entries of a query that the KV-cache kernel counts beside the columns of its selection."""
    return SWA_WINDOW if layer.has_window else 0


def has_schedule(site: Site, architecture: str | None, context: int) -> bool:
    """Whether the KV-cache kernel has a schedule, partial results and a merge where the longest context is ``context``."""
    return selection_width(site, context) + window_columns(site.layer) > unsplit_entries(architecture)


def switch_contexts(site: Site, architecture: str | None) -> tuple[int, ...]:
    """Contexts of one request right below and above each change of a kernel at ``site``, ascending; () for none."""
    if architecture != SM100 or site.layer is not LayerType.C128A:
        return ()
    last = [(UNSPLIT_ENTRIES - SWA_WINDOW) * _RATIO]
    if site.h_q == 128:
        last.append((NARROW_WIDTH - SWA_WINDOW) * _RATIO)
    return tuple(context for end in last for context in (end, end + _STEP))
