"""The shapes that a table is learned for: a dense regular grid, spread evenly over the logarithm of each axis.

A table knows query tokens, context tokens and requests, and one row serves a range of each: every cell of the grid holds
the shapes that fall into it, with equal weight.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from mla_tune.fit.work import Work, work
from mla_tune.policy.schema import Range
from mla_tune.sites.served_shapes import ServedShape
from mla_tune.sites.shape import Shape
from mla_tune.sites.site import Site

IntArray = npt.NDArray[np.int64]

_QUERY_STEPS_PER_OCTAVE = 6
COLUMN_REACH = 2 ** (1 / _QUERY_STEPS_PER_OCTAVE)
"""A column of a table serves query tokens from its own count up to less than this factor above it."""
_CONTEXT_STEPS_PER_OCTAVE = 2
_BINS_PER_OCTAVE = 2
"""Rows of a table before merging, per octave of context tokens."""
_QUERY_OCTAVES = 16
_MIN_CONTEXT = 64
REQUEST_COUNTS: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
"""Request counts of the grid; 64 is the largest that is swept."""

_WAVES = (0.5, 1, 2, 4)
"""Multiples of the SM count where the grid has the counts on both sides: with 128 heads a query fills two blocks, with 64
one, and a wave that is just over costs the most of one more."""
_FEWEST_SMS = 16
"""What has fewer is a CPU, whose threads make no waves."""


@lru_cache(maxsize=8)
def query_counts(sm_count: int) -> tuple[int, ...]:
    """Query token counts of the grid, 1 .. 65536: six an octave, and where waves begin."""
    steps = range(_QUERY_OCTAVES * _QUERY_STEPS_PER_OCTAVE + 1)
    counts = {round(2 ** (step / _QUERY_STEPS_PER_OCTAVE)) for step in steps}
    if sm_count >= _FEWEST_SMS:
        counts |= {int(sm_count * wave) + side for wave in _WAVES for side in (0, 1)}
    return tuple(sorted(counts))


@dataclass(frozen=True, slots=True, eq=False)
class TrainingGrid:
    """Shapes up to one context length, with the cell of each: a bin of context tokens and a count of query tokens."""

    shapes: tuple[Shape, ...]
    bins: IntArray
    """(num_shapes,) bin of context tokens, see :func:`bin_start`."""
    tokens: tuple[int, ...]
    """Query token counts, see :func:`query_counts`."""
    columns: IntArray
    """(num_shapes,) index into :attr:`tokens`."""
    groups: IntArray
    """(num_shapes,) index into :data:`REQUEST_COUNTS`."""
    _works: dict[tuple[str, int | None, int], Work] = field(default_factory=dict)

    def work(self, site: Site) -> Work:
        """Work of every shape at ``site``; heads play no role in it."""
        key = (str(site.layer), site.topk, site.overlap)
        if key not in self._works:
            self._works[key] = work(site, self.shapes)
        return self._works[key]

    def inside(self, swept: Sequence[Shape]) -> npt.NDArray[np.bool_]:
        """Which shapes lie inside the ranges of the swept ones, axis by axis; (num_shapes,)."""
        mask = np.ones(len(self.shapes), dtype=bool)
        for axis in (_num_reqs, _context, _num_qo_tokens, _kv_tokens):
            values = [axis(shape) for shape in swept]
            here = np.array([axis(shape) for shape in self.shapes])
            mask &= (here >= min(values)) & (here <= max(values))
        return mask


def measured_range(swept: Sequence[Shape]) -> Range:
    """The closed ranges that a table may claim."""
    tokens, kv_tokens = [s.num_qo_tokens for s in swept], [s.kv_tokens for s in swept]
    num_reqs = [s.num_reqs for s in swept]
    return Range(
        num_qo_tokens=(min(tokens), max(tokens)),
        kv_tokens=(min(kv_tokens), max(kv_tokens)),
        num_reqs=(min(num_reqs), max(num_reqs)),
    )


def bin_start(index: int) -> int:
    """Context tokens from which a bin begins: 1.25 and 1.75 times each power of two, which a reader takes in (80K, 112K).

    They divide an octave almost evenly, into 0.49 and 0.51 of it, around the middles of :func:`bin_middle`.
    """
    octave, half = divmod(index, _BINS_PER_OCTAVE)
    return math.ceil(2.0**octave * (1.25 if half else 0.875))


def bin_middle(index: int) -> int:
    """Context tokens that stand for a bin."""
    return round(2 ** (index / _BINS_PER_OCTAVE))


def group_start(index: int) -> int:
    """Requests from which a range begins, halfway to the one before on the logarithmic axis; 0 at first."""
    return int(np.ceil(np.sqrt(REQUEST_COUNTS[index - 1] * REQUEST_COUNTS[index]))) if index else 0


@lru_cache(maxsize=4)
def training_grid(max_context: int, sm_count: int) -> TrainingGrid:
    """The grid for models of one context length on one GPU. Shapes, bins and columns are in one fixed order."""
    counts = query_counts(sm_count)
    steps = int(np.log2(max_context / _MIN_CONTEXT) * _CONTEXT_STEPS_PER_OCTAVE)
    contexts = {round(_MIN_CONTEXT * 2 ** (step / _CONTEXT_STEPS_PER_OCTAVE)) for step in range(steps + 1)}
    shapes = tuple(
        Shape(num_reqs, tokens, num_reqs * context)
        for num_reqs in REQUEST_COUNTS
        for context in sorted(contexts | {max_context})
        for tokens in counts
        if num_reqs <= tokens <= num_reqs * context
    )
    bins, columns, groups = cells_of(shapes, counts)
    return TrainingGrid(shapes, bins, counts, columns, groups)


def cells_of(shapes: Sequence[Shape | ServedShape], tokens: Sequence[int]) -> tuple[IntArray, IntArray, IntArray]:
    """Bin of context tokens, nearest of the columns ``tokens`` and range of requests of each shape, three (num_shapes,)."""
    kv_tokens = np.array([shape.kv_tokens for shape in shapes], dtype=np.float64)
    columns = _nearest(tokens, [shape.num_qo_tokens for shape in shapes])
    groups = _nearest(REQUEST_COUNTS, [shape.num_reqs for shape in shapes])
    return _bins(kv_tokens), columns, groups


def _bins(kv_tokens: npt.NDArray[np.float64]) -> IntArray:
    """Bins of context tokens."""
    starts = [bin_start(index) for index in range(_BINS_PER_OCTAVE * 63)]
    return np.asarray(np.searchsorted(starts, kv_tokens, side="right") - 1, dtype=np.int64)


def _nearest(axis: Sequence[int], values: Sequence[int]) -> IntArray:
    """Index of the nearest entry of ``axis`` on the logarithm."""
    middles = np.log2(np.array(axis, dtype=np.float64))
    found = np.searchsorted((middles[1:] + middles[:-1]) / 2, np.log2(np.array(values, dtype=np.float64)))
    return found.astype(np.int64)


def _num_reqs(shape: Shape) -> int:
    return shape.num_reqs


def _context(shape: Shape) -> int:
    return shape.context


def _num_qo_tokens(shape: Shape) -> int:
    return shape.num_qo_tokens


def _kv_tokens(shape: Shape) -> int:
    return shape.kv_tokens
