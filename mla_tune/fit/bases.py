"""What each stage's time is made of: the physical terms that its curve may use.

Every term is non-negative and grows with the work, so that a fitted curve can be followed beyond the measured points.
What the terms miss is left to the local correction in :mod:`mla_tune.fit.curves`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from mla_tune.fit.work import Array, Work
from mla_tune.sites.site import WITH_KVCACHE_MIXED, LayerType, Site
from mla_tune.sites.stages import Stage

_HEADS_PER_BLOCK = 64
"""Query heads that one thread block of either attention kernel serves."""
_ENTRIES_PER_TILE = 64
"""Attended entries that it takes in one step."""
_PIECE_TILES = 5.0
"""Tiles that the split-KV scheduler charges for each piece of a query; on an H200 a piece does cost about 5 tiles' time."""
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


@dataclass(frozen=True, slots=True)
class Chip:
    """What a basis needs to know of the device."""

    sm_count: int
    l2_bytes: float = L2_BYTES
    measured_sm_count: int | None = None
    """SMs of the device whose corrections are carried over; None for this one."""


def basis(site: Site, candidate: str, stage: Stage, chip: Chip) -> Basis:
    """The basis of one stage, by its name; a whole timing that stands for its stages gets every term."""
    if stage.name == "attention":
        return _attention(site, candidate, chip)
    return _BY_NAME.get(stage.name, _GENERIC)


def _attention(site: Site, candidate: str, chip: Chip) -> Basis:
    blocks_per_query = (site.h_q or _HEADS_PER_BLOCK) / _HEADS_PER_BLOCK

    def queries(work: Work) -> Array:
        return work.num_qo_tokens * blocks_per_query / chip.sm_count

    def waves(work: Work) -> Array:
        return np.ceil(queries(work))

    def sparse_fwd(work: Work) -> list[Array]:
        # One block per query and 64 heads: a staircase in waves, each as long as the tiles of one query, as far as the
        # blocks do not overtake each other. Gathers that miss the L2 add their bytes.
        tiles = np.ceil(work.attended / _ENTRIES_PER_TILE)
        rows = work.distinct_rows + work.window_rows if candidate == "sparse_fwd_selected" else work.rows
        missed = work.num_qo_tokens * work.attended * _miss_rate(rows * 1024, chip)
        return [_ones(work), queries(work), waves(work), waves(work) * tiles, missed]

    def with_kvcache(work: Work) -> list[Array]:
        # Shared out evenly the tiles take their mean time; the busiest part of the schedule takes longer. Every query
        # also pays for the merge of its splits. A cached row is 584 or 656 bytes.
        tiles = np.ceil(work.selected / _ENTRIES_PER_TILE) + np.ceil(work.window / _ENTRIES_PER_TILE)
        cached_rows = work.rows if site.layer is not LayerType.SWA_ONLY else work.kv_tokens
        missed = work.num_qo_tokens * work.attended * _miss_rate(cached_rows * 600, chip)
        busiest, split = _schedule(queries(work), tiles)
        merge = [split, queries(work) * split]
        return [_ones(work), queries(work), queries(work) * tiles, busiest, *merge, waves(work) * tiles, missed]

    def mixed(work: Work) -> list[Array]:
        # One entry: a block per query and 64 heads, in waves. With fewer queries than SMs the context is split as well.
        return [*with_kvcache(work), waves(work)]

    def coordinates(work: Work) -> list[Array]:
        # Where the rows lie matters less than how many a query reads. What a law misses goes with the waves, so another
        # device is corrected as the measured one is at as many waves.
        waves_alike = (chip.measured_sm_count or chip.sm_count) / chip.sm_count
        return [_octaves(work.num_qo_tokens * waves_alike), _octaves(work.attended), 0.5 * _octaves(work.rows)]

    if candidate != "with_kvcache":
        return Basis(sparse_fwd, coordinates, (Resource.CLOCK, *[Resource.SM] * 3, Resource.MEMORY))
    # The merge of the splits is a launch of its own, and reads what the splits wrote.
    merge = (Resource.CLOCK, Resource.SM)
    paged = (Resource.CLOCK, *[Resource.SM] * 3, *merge, Resource.SM, Resource.MEMORY)
    if candidate == WITH_KVCACHE_MIXED:
        return Basis(mixed, coordinates, (*paged, Resource.SM))
    return Basis(with_kvcache, coordinates, paged)


def _schedule(queries: Array, tiles: Array) -> tuple[Array, Array]:
    """FlashMLA's split-KV schedule: tiles of its busiest part, and whether every query is split (1 or 0).

    ``queries`` are query blocks per part and ``tiles`` the tiles of one query. The scheduler (FlashMLA,
    ``get_decoding_sched_meta``) shares the tiles out evenly, charges each piece of a query 5 tiles, and leaves a part's
    rest empty where nothing but that charge would fit. Where a part holds no whole query all results must be merged.
    """
    whole = tiles + _PIECE_TILES
    payload = np.ceil(queries * whole) + _PIECE_TILES
    rest = payload % whole
    return payload - np.where(rest > _PIECE_TILES, 0.0, rest), (payload < whole).astype(np.float64)


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
_BYTES = (Resource.CLOCK, Resource.MEMORY)
_BY_NAME = {
    "schedule": _IN_QUERIES,
    "metadata": _IN_QUERIES,
    # It reads every score: for each query the compressed context of its request.
    "topk_transform": Basis(
        lambda w: [_ones(w), w.num_qo_tokens, w.num_qo_tokens * w.compressed_rows / w.num_reqs],
        lambda w: [_octaves(w.num_qo_tokens), _octaves(w.compressed_rows / w.num_reqs)],
        (Resource.CLOCK, Resource.DEVICE, Resource.MEMORY),
    ),
    "dequantize_compressed": Basis(
        lambda w: [_ones(w), w.compressed_rows],
        lambda w: [_octaves(w.compressed_rows)],
        _BYTES,
    ),
    "dequantize_window": Basis(
        lambda w: [_ones(w), w.window_rows],
        lambda w: [_octaves(w.window_rows)],
        _BYTES,
    ),
    "prepare": Basis(
        lambda w: [_ones(w), w.rows, w.num_qo_tokens * w.index_width],
        lambda w: [_octaves(w.rows), _octaves(w.num_qo_tokens)],
        (*_BYTES, Resource.MEMORY),
    ),
    "mark": Basis(
        lambda w: [_ones(w), w.num_qo_tokens * w.selection_width],
        lambda w: [_octaves(w.num_qo_tokens)],
        _BYTES,
    ),
    "compact": Basis(
        lambda w: [_ones(w), w.compressed_rows, w.distinct_rows],
        lambda w: [_octaves(w.compressed_rows), _octaves(w.distinct_rows)],
        (*_BYTES, Resource.MEMORY),
    ),
    "dequantize_selected": Basis(
        lambda w: [_ones(w), w.distinct_rows],
        lambda w: [_octaves(w.distinct_rows)],
        _BYTES,
    ),
    "row_ids": Basis(
        lambda w: [_ones(w), w.compressed_rows],
        lambda w: [_octaves(w.compressed_rows)],
        _BYTES,
    ),
    "window_ids": Basis(
        lambda w: [_ones(w), w.num_qo_tokens, w.window_rows],
        lambda w: [_octaves(w.num_qo_tokens), _octaves(w.window_rows)],
        (*_BYTES, Resource.MEMORY),
    ),
    "combine": Basis(
        lambda w: [_ones(w), w.num_qo_tokens, w.num_qo_tokens * w.index_width],
        lambda w: [_octaves(w.num_qo_tokens), _octaves(w.index_width)],
        (*_BYTES, Resource.MEMORY),
    ),
}
_GENERIC = Basis(
    lambda w: [_ones(w), w.num_qo_tokens, w.rows, w.num_qo_tokens * w.attended],
    lambda w: [_octaves(w.num_qo_tokens), _octaves(w.kv_tokens), 0.5 * _octaves(w.num_reqs)],
    (Resource.CLOCK, Resource.DEVICE, Resource.MEMORY, Resource.DEVICE),
)


def whole_path_coordinates(work: Work) -> list[Array]:
    """Axes for the correction of a whole path: the shape itself, the split into requests counting half."""
    return _GENERIC.coordinates(work)
