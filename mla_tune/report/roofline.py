"""The least time that a stage could take: what it must move or multiply at least, over what the vendor's datasheet states.

Bytes are counted once each, however often a kernel reads them: a gather that hits the L2 is free here, and so are launches,
latencies and the dequantization inside the KV-cache kernel. So the line is a bound that no kernel passes on data that is
not in the L2, and not what a good kernel reaches. Stages that one block runs alone (schedules) and those whose bytes are
lost in their launch (row and window ids) have no line.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mla_tune.fit.work import Array, Work
from mla_tune.hardware.datasheet import Datasheet, Figure
from mla_tune.sites.site import LayerType, Site
from mla_tune.sites.stages import Law, Stage

_D_V = 512
_V4_ROW, _DSA_ROW = (584, 512), (656, 576)
"""Bytes of a cached row, and elements of the bf16 row that it becomes."""
_INDEX_BYTES = 4
_ROW_IDS = "slot_ids"
"""The kernel that looks row ids up: it goes by the same laws as those that move rows, and moves none."""
_BF16_BYTES = 2

MEASURED_COPY_GBPS = {
    "nvidia-h200": Figure(4251, "scripts/bench_kernels, device copy on one H200, read and written bytes, 2026-11-26"),
}
"""What a copy in device memory reached, where that was measured: 10^9 bytes per second."""


@dataclass(frozen=True, slots=True)
class LeastWork:
    """What a stage must do at least, each (num_shapes,)."""

    moved_bytes: Array
    flops: Array

    def time_us(self, sheet: Datasheet) -> Array:
        """Microseconds at the datasheet's bandwidth and dense bf16 peak, whichever takes longer."""
        memory_us = self.moved_bytes / (sheet.memory_bandwidth_gbps.value * 1e3)
        return np.asarray(np.maximum(memory_us, self.flops / (sheet.bf16_tflops.value * 1e6)))

    def copied_us(self, copy_gbps: Figure) -> Array:
        """Microseconds of its bytes alone at a measured bandwidth."""
        return np.asarray(self.moved_bytes / (copy_gbps.value * 1e3))


def least_work(site: Site, stage: Stage, work: Work) -> LeastWork | None:
    """The bytes and multiply-adds of one stage; None for one that has no line."""
    count = None if _ROW_IDS in stage.launches else _COUNTED.get(stage.law)
    return count(site, work) if count else None


def _row(site: Site) -> tuple[int, int]:
    return _DSA_ROW if site.layer is LayerType.DSA else _V4_ROW


def _dequantized(rows: Callable[[Work], Array]) -> Callable[[Site, Work], LeastWork]:
    def counted(site: Site, work: Work) -> LeastWork:
        cached_bytes, elements = _row(site)
        return LeastWork(rows(work) * (cached_bytes + _BF16_BYTES * elements), np.zeros_like(work.num_qo_tokens))

    return counted


def _attention(row_bytes: Callable[[Site], int]) -> Callable[[Site, Work], LeastWork]:
    def counted(site: Site, work: Work) -> LeastWork:
        _, elements = _row(site)
        heads = site.h_q or 0
        per_query = _BF16_BYTES * heads * (elements + _D_V) + _INDEX_BYTES * work.index_width
        window_rows = np.minimum(work.window_rows, work.num_qo_tokens * work.window)
        rows = np.minimum(work.distinct_rows, work.num_qo_tokens * work.selected) + window_rows
        flops = 2.0 * (elements + _D_V) * heads * work.num_qo_tokens * work.attended
        return LeastWork(work.num_qo_tokens * per_query + rows * row_bytes(site), flops)

    return counted


def _combined(site: Site, work: Work) -> LeastWork:
    columns = work.selection_width * float(site.topk is not None) + work.index_width
    return LeastWork(work.num_qo_tokens * columns * _INDEX_BYTES, np.zeros_like(work.num_qo_tokens))


def _bf16_row(site: Site) -> int:
    return _BF16_BYTES * _row(site)[1]


def _cached_row(site: Site) -> int:
    return _row(site)[0]


_COUNTED: dict[Law, Callable[[Site, Work], LeastWork]] = {
    Law.COMPRESSED_ROWS: _dequantized(lambda work: work.compressed_rows),
    Law.WINDOW_ROWS: _dequantized(lambda work: work.window_rows),
    Law.SELECTED_ROWS: _dequantized(lambda work: work.distinct_rows),
    Law.PREPARE: _dequantized(lambda work: work.rows),
    Law.WORKSPACE_ATTENTION: _attention(_bf16_row),
    Law.SELECTED_ATTENTION: _attention(_bf16_row),
    Law.PAGED_ATTENTION: _attention(_cached_row),
    Law.ONE_ENTRY_ATTENTION: _attention(_cached_row),
    Law.COMBINE: _combined,
}
