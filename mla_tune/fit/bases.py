"""What each stage's time is made of: the physical terms that its curve may use.

Every term is non-negative and grows with the work, so that a fitted curve can be followed beyond the measured points.
What the terms miss is left to the local correction in :mod:`mla_tune.fit.curves`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum

import numpy as np

from mla_tune.fit.work import Array, Work
from mla_tune.hardware.datasheet import SM100
from mla_tune.sites.kernel_switches import unsplit_entries, window_columns
from mla_tune.sites.site import LayerType, Site, SiteName
from mla_tune.sites.stages import Law

_HEADS_PER_BLOCK = 64
"""Query heads that one thread block of either attention kernel serves."""
_ENTRIES_PER_TILE = 64
"""Attended entries that it takes in one step."""
_PIECE_TILES = 5.0
"""Tiles that the split-KV scheduler charges for each piece of a query; on an H200 a piece does cost about 5 tiles' time."""
_SM100_PAIR_PIECE_TILES = 3.0
"""The same in the SM100 kernel for 128 heads of 512 dimensions."""
_CACHED_ROW_BYTES = 600
"""A cached row is 584 or 656 bytes."""
L2_BYTES = 50e6
"""L2 of an H100 or H200; where a pool passes it, gathers go to memory. Only its order of magnitude matters here."""


class Resource(StrEnum):
    """What bounds a term: on another GPU it takes longer or shorter by the ratio of this."""

    CLOCK = "clock"
    """Launches, latencies, and work that one block does alone: the SM clock."""
    SM = "sm"
    """Work of the SMs, counted per SM: tensor throughput and clock of one of them."""
    DEVICE = "device"
    """Work of the SMs, counted for all of them together."""
    MEMORY = "memory"
    """Bytes: memory bandwidth."""


@dataclass(frozen=True, slots=True)
class Basis:
    """Terms and coordinates of one stage."""

    terms: Callable[[Work], list[Array]]
    """Non-negative terms, each (num_shapes,); the first is the constant."""
    coordinates: Callable[[Work], list[Array]]
    """Axes on which neighbouring points correct each other, each (num_shapes,), in octaves."""
    resources: tuple[Resource, ...]
    """What bounds each of the terms."""
    may_break: bool = False
    """Whether the kernel may change its algorithm at some query token count, and jump there."""
    runs: Callable[[Work], Array] | None = None
    """1 for shapes where the stage runs and 0 where it does not, each (num_shapes,); None where it always does."""


@dataclass(frozen=True, slots=True)
class Chip:
    """What a basis needs to know of the device."""

    sm_count: int
    l2_bytes: float = L2_BYTES
    measured_sm_count: int | None = None
    """SMs of the device whose corrections are carried over; None for this one."""
    architecture: str | None = None
    """As :func:`mla_tune.hardware.datasheet.architecture` names it; None for Hopper's rules."""


def basis(site: Site, law: Law, chip: Chip) -> Basis:
    """The basis of one law at ``site`` on a device."""
    kernels = _Attention(site, chip)
    attention = _ATTENTION.get(law)
    if attention:
        return kernels.basis(*attention)
    found = _BASES[law]
    if law is Law.SCHEDULE and site.name is SiteName.PREFILL_ATTENTION:
        return replace(found, runs=kernels.has_schedule)
    return found


@dataclass(frozen=True, slots=True)
class _Attention:
    """The attention kernels at one site on one device: terms that need the head count and the number of SMs."""

    site: Site
    chip: Chip

    def basis(self, terms: Callable[[_Attention, Work], list[Array]], resources: tuple[Resource, ...]) -> Basis:
        return Basis(lambda work: terms(self, work), self.coordinates, resources)

    def queries(self, work: Work) -> Array:
        """Blocks of a query and 64 heads, per SM."""
        return work.num_qo_tokens * ((self.site.h_q or _HEADS_PER_BLOCK) / _HEADS_PER_BLOCK) / self.chip.sm_count

    def coordinates(self, work: Work) -> list[Array]:
        # Where the rows lie matters less than how many a query reads. What a law misses goes with the waves, so another
        # device is corrected as the measured one is at as many waves.
        waves_alike = (self.chip.measured_sm_count or self.chip.sm_count) / self.chip.sm_count
        return [_octaves(work.num_qo_tokens * waves_alike), _octaves(work.attended), 0.5 * _octaves(work.rows)]

    def over_workspace(self, work: Work) -> list[Array]:
        return self._staircase(work, work.rows)

    def over_selected(self, work: Work) -> list[Array]:
        return self._staircase(work, work.distinct_rows + work.window_rows)

    def _staircase(self, work: Work, rows: Array) -> list[Array]:
        # One block per query and 64 heads: a staircase in waves, each as long as the tiles of one query, as far as the
        # blocks do not overtake each other. Gathers that miss the L2 add their bytes.
        waves = np.ceil(self.queries(work))
        tiles = np.ceil(work.attended / _ENTRIES_PER_TILE)
        missed = work.num_qo_tokens * work.attended * _miss_rate(rows * 1024, self.chip)
        return [_ones(work), self.queries(work), waves, waves * tiles, missed]

    def paged(self, work: Work) -> list[Array]:
        # Shared out evenly the tiles take their mean time; the busiest part of the schedule takes longer. Every query
        # also pays for the merge of its splits, a launch of its own that reads what they wrote.
        # Where the kernel does not split, each block takes a whole query, in waves, and nothing is merged.
        queries, tiles, piece = self.queries(work), self._paged_tiles(work), self._piece_tiles
        busiest, split = _schedule(queries, tiles, piece)
        scheduled = self.has_schedule(work)
        busiest, split = np.where(scheduled, busiest, np.ceil(queries) * (tiles + piece)), split * scheduled
        merge = [split, queries * split]
        return [
            *(_ones(work), queries, queries * tiles, busiest, *merge),
            *(np.ceil(queries) * tiles, self._cache_misses(work)),
        ]

    def one_entry(self, work: Work) -> list[Array]:
        # A schedule knows entries, not queries: with one entry every query is cut into as many parts as there are SMs for
        # it, and the blocks run in waves. Leave-one-out error on an H200's 47 timings: 0.059; by the terms of a workspace
        # 0.083, by those of an entry a query 0.082. On 15 held-out timings: 0.038, 0.056 and 0.054.
        queries, tiles = self.queries(work), self._paged_tiles(work)
        parts = np.maximum(np.floor(1 / queries), 1.0)
        waves, split = np.ceil(queries * parts), (parts > 1).astype(np.float64)
        return [
            *(_ones(work), queries, waves, waves * np.ceil(tiles / parts)),
            *(split, queries * split, self._cache_misses(work)),
        ]

    def has_schedule(self, work: Work) -> Array:
        """1 where the KV-cache kernel has a schedule, partial results and a merge, else 0."""
        entries = work.selection_width + window_columns(self.site.layer)
        return np.asarray((entries > unsplit_entries(self.chip.architecture)).astype(np.float64))

    @property
    def _piece_tiles(self) -> float:
        pairs = self.chip.architecture == SM100 and self.site.h_q == 128 and self.site.layer is not LayerType.DSA
        return _SM100_PAIR_PIECE_TILES if pairs else _PIECE_TILES

    def _paged_tiles(self, work: Work) -> Array:
        return np.asarray(np.ceil(work.selected / _ENTRIES_PER_TILE) + np.ceil(work.window / _ENTRIES_PER_TILE))

    def _cache_misses(self, work: Work) -> Array:
        rows = work.rows if self.site.layer is not LayerType.SWA_ONLY else work.kv_tokens
        return work.num_qo_tokens * work.attended * _miss_rate(rows * _CACHED_ROW_BYTES, self.chip)


_STAIRCASE = (Resource.CLOCK, *[Resource.SM] * 3, Resource.MEMORY)
_MERGE = (Resource.CLOCK, Resource.SM)
_ATTENTION: dict[Law, tuple[Callable[[_Attention, Work], list[Array]], tuple[Resource, ...]]] = {
    Law.WORKSPACE_ATTENTION: (_Attention.over_workspace, _STAIRCASE),
    Law.SELECTED_ATTENTION: (_Attention.over_selected, _STAIRCASE),
    Law.PAGED_ATTENTION: (
        _Attention.paged,
        (Resource.CLOCK, *[Resource.SM] * 3, *_MERGE, Resource.SM, Resource.MEMORY),
    ),
    Law.ONE_ENTRY_ATTENTION: (
        _Attention.one_entry,
        (Resource.CLOCK, *[Resource.SM] * 3, *_MERGE, Resource.MEMORY),
    ),
}


def _schedule(queries: Array, tiles: Array, piece_tiles: float) -> tuple[Array, Array]:
    """FlashMLA's split-KV schedule: tiles of its busiest part, and whether every query is split (1 or 0).

    ``queries`` are query blocks per part and ``tiles`` the tiles of one query. The scheduler (FlashMLA,
    ``get_decoding_sched_meta``) shares the tiles out evenly, charges each piece of a query ``piece_tiles``, and leaves a
    part's rest empty where nothing but that charge would fit. Where a part holds no whole query all results must be merged.
    """
    whole = tiles + piece_tiles
    payload = np.ceil(queries * whole) + piece_tiles
    rest = payload % whole
    return payload - np.where(rest > piece_tiles, 0.0, rest), (payload < whole).astype(np.float64)


def _miss_rate(pool_bytes: Array, chip: Chip) -> Array:
    return pool_bytes / (pool_bytes + chip.l2_bytes)


def _ones(work: Work) -> Array:
    return np.ones_like(work.num_qo_tokens)


def _octaves(values: Array) -> Array:
    return np.log2(np.maximum(values, 1.0))


_IN_QUERIES = Basis(
    lambda w: [_ones(w), w.num_qo_tokens],
    lambda w: [_octaves(w.num_qo_tokens)],
    (Resource.CLOCK, Resource.CLOCK),  # one block walks over all rows
    may_break=True,
)
_WHOLE = Basis(
    lambda w: [_ones(w), w.num_qo_tokens, w.rows, w.num_qo_tokens * w.attended],
    lambda w: [_octaves(w.num_qo_tokens), _octaves(w.kv_tokens), 0.5 * _octaves(w.num_reqs)],
    (Resource.CLOCK, Resource.DEVICE, Resource.MEMORY, Resource.DEVICE),
)
_BYTES = (Resource.CLOCK, Resource.MEMORY)
_BASES = {
    Law.SCHEDULE: _IN_QUERIES,
    # It reads every score: for each query the compressed context of its request.
    Law.TOPK_TRANSFORM: Basis(
        lambda w: [_ones(w), w.num_qo_tokens, w.num_qo_tokens * w.compressed_rows / w.num_reqs],
        lambda w: [_octaves(w.num_qo_tokens), _octaves(w.compressed_rows / w.num_reqs)],
        (Resource.CLOCK, Resource.DEVICE, Resource.MEMORY),
    ),
    Law.COMPRESSED_ROWS: Basis(
        lambda w: [_ones(w), w.compressed_rows],
        lambda w: [_octaves(w.compressed_rows)],
        _BYTES,
    ),
    Law.WINDOW_ROWS: Basis(
        lambda w: [_ones(w), w.window_rows],
        lambda w: [_octaves(w.window_rows)],
        _BYTES,
    ),
    Law.PREPARE: Basis(
        lambda w: [_ones(w), w.rows, w.num_qo_tokens * w.index_width],
        lambda w: [_octaves(w.rows), _octaves(w.num_qo_tokens)],
        (*_BYTES, Resource.MEMORY),
    ),
    Law.MARK: Basis(
        lambda w: [_ones(w), w.num_qo_tokens * w.selection_width],
        lambda w: [_octaves(w.num_qo_tokens)],
        _BYTES,
    ),
    Law.COMPACT: Basis(
        lambda w: [_ones(w), w.compressed_rows, w.distinct_rows],
        lambda w: [_octaves(w.compressed_rows), _octaves(w.distinct_rows)],
        (*_BYTES, Resource.MEMORY),
    ),
    Law.SELECTED_ROWS: Basis(
        lambda w: [_ones(w), w.distinct_rows],
        lambda w: [_octaves(w.distinct_rows)],
        _BYTES,
    ),
    Law.WINDOW_IDS: Basis(
        lambda w: [_ones(w), w.num_qo_tokens, w.window_rows],
        lambda w: [_octaves(w.num_qo_tokens), _octaves(w.window_rows)],
        (*_BYTES, Resource.MEMORY),
    ),
    Law.COMBINE: Basis(
        lambda w: [_ones(w), w.num_qo_tokens, w.num_qo_tokens * w.index_width],
        lambda w: [_octaves(w.num_qo_tokens), _octaves(w.index_width)],
        (*_BYTES, Resource.MEMORY),
    ),
    Law.WHOLE: _WHOLE,
}


def whole_path_coordinates(work: Work) -> list[Array]:
    """Axes for the correction of a whole path: the shape itself, the split into requests counting half."""
    return _WHOLE.coordinates(work)
