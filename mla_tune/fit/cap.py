"""A cap on workspace: which candidates need more memory than allowed, cell by cell of a table.

A row of a table serves a range of each axis, so a cell counts as over the cap if any shape in it may be: the bytes are
bounded at its corner of most query tokens, most context and, term by term, the fewest or most requests. Of candidates
over the cap the incumbent alone is chosen, and only in cells where none is surely under it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import product

import numpy as np
import numpy.typing as npt

from mla_tune.fit.scope import Scope
from mla_tune.fit.segments import COST_UNIT, Band, Cells, IntArray, threshold
from mla_tune.fit.training import REQUEST_COUNTS, bin_start, group_start
from mla_tune.fit.work import Array, Work
from mla_tune.fit.workspace_bytes import forward_bytes, workspace
from mla_tune.policy.evidence import WorkspaceCap
from mla_tune.policy.schema import Range, Row
from mla_tune.sites.shape import selection_width
from mla_tune.sites.site import SWA_WINDOW, LayerType, Site

BoolArray = npt.NDArray[np.bool_]

_OVER_WORTH = 1000
"""Charge of a barred candidate in a cell, in steps of a table: a row has some ten thresholds, each worth one at most, so
that no threshold saved and no rows merged make up for it. The sum over all cells still fits 64-bit integers."""


@dataclass(frozen=True, slots=True, eq=False)
class Frame:
    """The cells of a table and what each may hold: everything that is served from it."""

    first_bin: int
    first_group: int
    tokens: IntArray
    """(num_columns,) query tokens of the columns."""
    query_ends: IntArray
    """(num_columns,) most query tokens that a column serves."""
    kv_starts: IntArray
    """(num_bins,) context tokens from which a bin serves; 0 at first."""
    kv_ends: IntArray
    """(num_bins,) most context tokens that it serves."""
    requests: tuple[tuple[int, int], ...]
    """Fewest and most requests of each range."""

    @classmethod
    def of(cls, bins: IntArray, groups: IntArray, tokens: Sequence[int], measured: Range) -> Frame:
        """The frame of a table trained on shapes in these cells, which serves the ranges ``measured``."""
        columns = np.array(tokens, dtype=np.int64)
        edges = threshold(columns, np.arange(1, len(columns)))
        starts = [bin_start(index) for index in range(int(bins.min()), int(bins.max()) + 2)]
        first, last = int(groups.min()), int(groups.max())
        most = [group_start(index + 1) - 1 for index in range(first, last)]
        fewest = [1, *(group_start(index) for index in range(first + 1, last + 1))]
        most.append(max(REQUEST_COUNTS[last], measured.num_reqs[1]))
        return cls(
            first_bin=int(bins.min()),
            first_group=first,
            tokens=columns,
            query_ends=np.append(edges - 1, max(tokens[-1], measured.num_qo_tokens[1])),
            kv_starts=np.array([0, *starts[1:-1]], dtype=np.int64),
            kv_ends=np.array(
                [*(start - 1 for start in starts[1:-1]), max(starts[-1] - 1, measured.kv_tokens[1])], dtype=np.int64
            ),
            requests=tuple(zip(fewest, most, strict=True)),
        )

    def columns(self, low: int, high: int | None) -> slice:
        """Columns that serve the query tokens ``low`` to ``high``, both included."""
        first = int(np.searchsorted(self.query_ends, low))
        last = len(self.tokens) if high is None else int(np.searchsorted(self.query_ends, high)) + 1
        return slice(min(first, len(self.tokens) - 1), last)


@dataclass(frozen=True, slots=True, eq=False)
class CappedCells:
    """What the cap forbids in each cell."""

    frame: Frame
    names: tuple[str, ...]
    max_bytes: int
    barred: BoolArray
    """(num_groups, num_bins, num_candidates, num_columns) candidates that may not be chosen."""
    over: BoolArray
    """(num_groups, num_bins, num_columns) cells where any candidate may be over the cap."""
    exempt: BoolArray
    """The same: cells where none is surely under it, so that the incumbent stays."""

    def charged(self, cells: Sequence[Cells]) -> list[Cells]:
        """``cells``, one grid for each range of requests, with barred candidates beyond any price.

        Where one is barred the others are charged by what they cost beyond the best of themselves.
        """
        found = []
        for grid, barred in zip(cells, self.barred, strict=True):
            price = int(_OVER_WORTH * grid.worth * grid.shapes / COST_UNIT)
            best = np.where(barred, np.iinfo(np.int64).max, grid.costs).min(axis=1, keepdims=True)
            touched = barred.any(axis=1, keepdims=True)
            costs = grid.costs - np.where(touched, best, 0)
            found.append(replace(grid, costs=np.where(barred, price, costs)))
        return found

    def breaks(self, row: Row, kv_end: int, groups: range) -> bool:
        """Whether ``row``, which serves up to ``kv_end`` and the given ranges of requests, answers a barred candidate.

        Thresholds are those that are served, in exact integers; they never fall along a row.
        """
        lines = [choice.threshold for choice in row.choices]
        barred = np.asarray(self.barred[groups.start : groups.stop].any(axis=0))
        for index, (start, end) in enumerate(zip(self.frame.kv_starts, self.frame.kv_ends, strict=True)):
            low, high = max(int(start), row.kv_tokens_from), min(int(end), kv_end - 1)
            if low > high:
                continue
            for place, choice in enumerate(row.choices):
                first = lines[place].at(low)
                last = lines[place + 1].at(high) - 1 if place + 1 < len(lines) else None
                if last is not None and last < first:
                    continue
                if barred[index, self.names.index(choice.candidate), self.frame.columns(first, last)].any():
                    return True
        return False

    def note(self, bins: IntArray, columns: IntArray, groups: IntArray) -> WorkspaceCap:
        """What the policy says of it; the arrays are the cells of the training shapes."""
        where = groups - self.frame.first_group, bins - self.frame.first_bin, columns
        return WorkspaceCap(
            max_bytes=self.max_bytes,
            shapes=len(bins),
            over=int(self.over[where].sum()),
            exempt=int(self.exempt[where].sum()),
        )


def level_bands(cells: Cells, band: Band) -> list[Band]:
    """``band`` with the best segments of each of its bins, alike neighbours as one: every threshold at a cell's edge."""
    found: list[Band] = []
    for one in cells.cell_bands()[band.first_bin : band.end_bin]:
        if found and found[-1].segments == one.segments:
            found[-1] = replace(found[-1], end_bin=one.end_bin, cost=found[-1].cost + one.cost)
        else:
            found.append(one)
    return found


def capped_cells(
    scope: Scope, largest: Mapping[str, float], max_bytes: int, device: tuple[int, str | None], frame: Frame
) -> CappedCells:
    """The cells of a table of attention; ``largest`` are the query tokens up to which each candidate may run.

    ``device`` has the SM count and the architecture, as :func:`mla_tune.fit.workspace_bytes.workspace` takes them. The
    incumbent comes first in ``largest``. In a cell where nothing is over the cap nothing is barred.
    """
    fits = np.stack([_most_bytes(scope, name, device, frame) <= max_bytes for name in largest], axis=2)
    may_run = np.stack([frame.query_ends <= most for most in largest.values()])
    over = np.asarray(~fits.all(axis=2))
    safe = fits & may_run
    none_safe = np.asarray(~safe.any(axis=2))
    barred = np.where(none_safe[:, :, None, :], np.arange(len(largest))[:, None] > 0, ~safe) & over[:, :, None, :]
    return CappedCells(frame, tuple(largest), max_bytes, barred, over, over & none_safe)


def _most_bytes(scope: Scope, candidate: str, device: tuple[int, str | None], frame: Frame) -> Array:
    """Bound on the bytes of ``candidate`` in each cell, (num_groups, num_bins, num_columns)."""
    size = len(frame.requests), len(frame.kv_ends), len(frame.tokens)
    corners = list(product(frame.requests, (int(end) for end in frame.kv_ends)))
    parts = []
    for site, _ in scope.parts:
        loads = _corner_work(site, corners, frame.query_ends, scope.model.max_context)
        parts.append(workspace(site, candidate, loads, *device))
    return forward_bytes(parts).reshape(size)


def _corner_work(
    site: Site, corners: Sequence[tuple[tuple[int, int], int]], query_ends: IntArray, max_context: int
) -> Work:
    """Work that no shape of a cell exceeds, whatever its split into requests; (num_corners * num_columns,).

    A corner has the fewest and most requests and the most context tokens. Only what workspace is counted from is bounded.
    """
    shape = len(corners), len(query_ends)
    contexts = [min(-(-kv // fewest), max_context) for (fewest, _), kv in corners]
    reqs, kv = (
        np.array(values, dtype=np.float64)[:, None] for values in zip(*((r[1], k) for r, k in corners), strict=True)
    )
    queries = np.broadcast_to(query_ends.astype(np.float64), shape)
    windows = np.minimum(kv, queries + reqs * (SWA_WINDOW - 1)) if site.layer.has_window else np.zeros(shape)
    widths = np.array([selection_width(site, context) for context in contexts], dtype=np.float64)[:, None]
    index_widths = np.ceil((widths + SWA_WINDOW) / 128) * 128 if site.layer.has_window else widths
    ratio = site.layer.compress_ratio
    # c128a is rectangular: every request has the rows of the longest, whose context may be rounded up.
    rounding = reqs if site.layer is LayerType.C128A else 0.0
    rows = (kv + rounding) / ratio if ratio else np.zeros_like(kv)
    bounds = {
        "num_qo_tokens": queries,
        "compressed_rows": rows,
        "window_rows": windows,
        "selection_width": widths,
        "index_width": index_widths,
    }
    none = dict.fromkeys((field.name for field in fields(Work)), np.zeros(queries.size))
    return Work(**{**none, **{name: np.broadcast_to(of, shape).reshape(-1) for name, of in bounds.items()}})
