"""Device memory that an attention candidate needs beyond its inputs and output, in bytes, from a forward's work.

Rows and widths are those of :mod:`mla_tune.sites.shape`. ``sparse_fwd`` holds a bf16 row for every dequantized cache row,
the slot that each came from, and an index matrix with a length per query; its kernel also returns two float32 per query and
head. ``sparse_fwd_fused`` holds no slots; ``sparse_fwd_selected`` has rows for as many as could be selected, their slots,
and a mark and a place for every compressed row. ``with_kvcache`` splits each query's selection over the SMs and merges: a
float32 partial result and its logarithm for every query and head, and for every part of the schedule, besides the merged
logarithm; on SM100 it does not split narrow selections (:mod:`mla_tune.sites.kernel_switches`). Measured peaks are up to
2 MiB above these sums (the allocator's rounding, a schedule); with one batch entry for all queries
(``with_kvcache_mixed``) two partial results a query are counted, which is up to 17 MiB too much.
A test compares all of the committed export.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mla_tune.errors import UsageError
from mla_tune.fit.work import Array, Work
from mla_tune.hardware.datasheet import SM100
from mla_tune.sites.candidates import candidate_at, names_at
from mla_tune.sites.kernel_switches import unsplit_entries, window_columns
from mla_tune.sites.site import LayerType, Site
from mla_tune.sites.stages import Amortization

_VALUE_DIM = 512
_HEADS_PER_PART = 64
"""Query heads that one thread block of the KV-cache kernel serves: a part of its schedule is that many SMs' share."""


@dataclass(frozen=True, slots=True, eq=False)
class Workspace:
    """Bytes of one candidate at one site, by how long an engine keeps them; each (num_shapes,), whole numbers."""

    shared_bytes: Array
    """For the whole forward, the same for all layer types: where the window rows lie."""
    type_bytes: Array
    """For the whole forward, for each layer type: what its layers compute once."""
    layer_bytes: Array
    """Within one layer; the next uses the same memory again."""

    @property
    def total_bytes(self) -> Array:
        """What one layer alone needs."""
        return self.shared_bytes + self.type_bytes + self.layer_bytes


def workspace(site: Site, candidate: str, work: Work, sm_count: int, architecture: str | None = None) -> Workspace:
    """Bytes of ``candidate`` at an attention site, on a GPU of ``sm_count`` SMs. Raises :class:`UsageError`.

    ``architecture`` is as :func:`mla_tune.hardware.datasheet.architecture` names it; None for Hopper's rules.
    """
    heads, none = site.h_q or 0, np.zeros_like(work.num_qo_tokens)
    found = candidate_at(site, candidate) if candidate in names_at(site) else None
    if found is None or found.buffers is None:
        raise UsageError(f"workspace is counted for attention candidates: got {candidate!r} at {site.key}")
    if not found.buffers.rows:
        # On SM100 V3.2's 128 heads are two launches of 64, each with a part on every SM.
        one_block = architecture == SM100 and site.layer is LayerType.DSA
        parts = max(1, sm_count // (1 if one_block else max(1, heads // _HEADS_PER_PART)))
        split = work.selection_width + window_columns(site.layer) > unsplit_entries(architecture)
        partial_rows = np.where(split, (work.num_qo_tokens * found.buffers.partials + parts) * heads, 0.0)
        return Workspace(none, none, partial_rows * (_VALUE_DIM + 1) * 4 + work.num_qo_tokens * heads * 4)
    slots, row_bytes = found.buffers.slots, 2 * (576 if site.layer is LayerType.DSA else 512)
    rows, selection = work.rows, none
    if found.buffers.selected:
        most = np.minimum(work.compressed_rows, work.num_qo_tokens * (site.topk or 0))
        rows, selection = work.window_rows + most, 5 * work.compressed_rows + 4 * most
    indices = work.num_qo_tokens * (work.index_width + 1) * 4
    combine = next((stage for stage in found.stages(site) if stage.name == "combine"), None)
    each_layer = combine is None or combine.amortization is Amortization.PER_LAYER  # V3.2's indexer writes its own
    return Workspace(
        shared_bytes=work.window_rows * 4 if slots else none,
        type_bytes=(work.compressed_rows * 4 if slots else none) + (none if each_layer else indices),
        layer_bytes=rows * row_bytes
        + selection
        + work.num_qo_tokens * heads * 2 * 4
        + (indices if each_layer else none),
    )


def forward_bytes(parts: Sequence[Workspace]) -> Array:
    """Peak over a whole forward in which every layer takes the candidate of ``parts``, one for each layer type."""
    shared = np.max([part.shared_bytes for part in parts], axis=0)
    kept = np.sum([part.type_bytes for part in parts], axis=0)
    return np.asarray(shared + kept + np.max([part.layer_bytes for part in parts], axis=0))
