"""One forward in two parts: requests with long contexts read from the cache, the others from a workspace.

For planning code and benches, not for a serving process: it needs numpy, a cost model and the measurements behind it. A
policy file does not hold enough to do the same from host integers, since its thresholds say which path wins and not by how
much, and a split pays only where both parts' costs are known. So :mod:`mla_tune.runtime.dispatcher` makes no such choice.

``sparse_fwd`` pays for every cached row of every request, ``with_kvcache`` for every entry that a query attends to. Were
both linear in the two, the best split of all would cut the requests, ordered by rows over entries, at one place; so only
those cuts are tried, one prediction for either part of each, and the launches of both parts and their stages of a whole
forward are in them. What is predicted is what :mod:`mla_tune.kernels.split_batch` runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from mla_tune.errors import FitError, UsageError
from mla_tune.fit.costs import CostModel
from mla_tune.fit.evaluation import table_scope
from mla_tune.fit.work import Array, Work, work
from mla_tune.policy.schema import Table
from mla_tune.sites.candidates import SPARSE_FWD, WITH_KVCACHE
from mla_tune.sites.shape import RaggedShape, fresh_request
from mla_tune.sites.site import LayerType, Site, SiteName

WORKSPACE, CACHE = SPARSE_FWD.name, WITH_KVCACHE.name
"""The path that dequantizes rows into a workspace, and the one that reads the cache itself."""

_V_DIM, _BF16_BYTES = 512, 2
_HEAD_DIM = {layer: 576 if layer is LayerType.DSA else 512 for layer in LayerType}
_DEQUANTIZED_ROW_BYTES = {layer: 656 + 1152 if layer is LayerType.DSA else 584 + 1024 for layer in LayerType}
"""Bytes that the dequantize stage reads and writes for one row; an FP8 row is 584 (V4) or 656 (V3.2) of them."""


@dataclass(frozen=True, slots=True)
class BatchRequest:
    """One request of a forward."""

    num_qo_tokens: int
    """New tokens."""
    kv_tokens: int
    """Context tokens, the new ones included."""


@dataclass(frozen=True, slots=True)
class SubBatch:
    """The requests that one candidate serves."""

    candidate: str
    requests: tuple[int, ...]
    """Their indices in the batch, ascending."""


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """How to run one forward, and what it is predicted to take against the best single path."""

    parts: tuple[SubBatch, ...]
    predicted_us: float
    best_single: str
    single_us: float
    """The whole batch by ``best_single``."""

    @property
    def gain(self) -> float:
        """Predicted time of the best single path over that of the plan."""
        return self.single_us / self.predicted_us


class Planner:
    """Plans forwards for one attention table: one layer type, or the whole mix of a model's layers."""

    def __init__(self, costs: CostModel, table: Table, noise_band: float) -> None:
        """``noise_band`` is what a split must win by. Raises :class:`UsageError` for a table that chooses no attention."""
        if table.site != SiteName.PREFILL_ATTENTION:
            raise UsageError(f"a batch is planned for {SiteName.PREFILL_ATTENTION}: got a table of {table.site}")
        self.layer = table.layer
        self._costs, self._scope = costs, table_scope(table, costs.observations.conditions)
        self._names, self._noise_band = table.candidates, noise_band
        self._limits = {limit.candidate: limit.num_qo_tokens for limit in table.limits}

    def plan(self, requests: Sequence[BatchRequest]) -> BatchPlan:
        """The best split where it is predicted to beat the best single path by more than the noise band, else that path.

        Raises :class:`UsageError` for no requests, impossible ones, and a batch that no path can serve.
        """
        single, split = self.single(requests), self.best_split(requests)
        if split is not None and split.predicted_us * (1 + self._noise_band) < single.single_us:
            return split
        if not np.isfinite(single.single_us):
            raise UsageError(
                f"a batch must fit some candidate's limits: got {sum(r.num_qo_tokens for r in requests)} query tokens; "
                "next: take a smaller prefill chunk"
            )
        return single

    def single(self, requests: Sequence[BatchRequest]) -> BatchPlan:
        """The whole batch by its fastest single path; infinite where it is past every candidate's limit."""
        shape = _shape(requests)
        works = [work(site, [shape]) for site, _ in self._scope.parts]
        us = {name: float(self._limited(name, works)[0]) for name in self._names}
        best = min(us, key=us.__getitem__)
        return BatchPlan((SubBatch(best, tuple(range(len(requests)))),), us[best], best, us[best])

    def best_split(self, requests: Sequence[BatchRequest]) -> BatchPlan | None:
        """The best of the splits in two, whether it is worth it or not; None where there is none to run."""
        single = self.single(requests)
        if len(requests) < 2 or not {WORKSPACE, CACHE} <= set(self._names):
            return None
        alone = [_Alone.of(site, requests) for site, _ in self._scope.parts]
        order = self._order(requests, alone)
        cut, total_us = self._best_cut(requests, order, alone)
        if not np.isfinite(total_us):
            return None
        by_workspace, from_cache = (tuple(sorted(part)) for part in (order[:cut], order[cut:]))
        parts = (SubBatch(WORKSPACE, by_workspace), SubBatch(CACHE, from_cache))
        return BatchPlan(parts, total_us, single.best_single, single.single_us)

    def _order(self, requests: Sequence[BatchRequest], alone: Sequence[_Alone]) -> list[int]:
        """Requests by the rows that they would put into the workspace for each entry that their queries attend to."""
        layers = [count for _, count in self._scope.parts]
        rows = sum(n * (a.compressed_rows + a.window_rows) for n, a in zip(layers, alone, strict=True))
        entries = sum(n * (a.selected + a.window) for n, a in zip(layers, alone, strict=True))
        ratio = (rows / np.maximum(entries, 1.0)).tolist()
        return sorted(
            range(len(requests)), key=lambda i: (ratio[i], requests[i].kv_tokens, requests[i].num_qo_tokens, i)
        )

    def _best_cut(
        self, requests: Sequence[BatchRequest], order: list[int], alone: Sequence[_Alone]
    ) -> tuple[int, float]:
        """Requests before the best cut, and the microseconds of both parts together."""
        queries = np.array([requests[i].num_qo_tokens for i in order], dtype=np.float64)
        tokens = float(queries.sum())
        cached = tokens - np.cumsum(queries)[:-1]  # query tokens behind each cut
        pairs = [(requests[i].num_qo_tokens, requests[i].kv_tokens) for i in order]
        fresh = fresh_request(pairs)
        hosts = np.arange(1, len(order)) > (len(order) if fresh is None else fresh)
        workspace, cache = [], []
        moved_us = np.zeros_like(cached)
        for (site, layers), a in zip(self._scope.parts, alone, strict=True):
            workspace.append(_with_idle(site, a.first(order), np.where(hosts, cached, 0.0)))
            cache.append(a.last(order))
            moved_us += layers * self._moved_us(site, np.where(hosts, cached, tokens), workspace[-1])
        total_us = self._limited(WORKSPACE, workspace) + self._limited(CACHE, cache) + moved_us
        best = int(total_us.argmin())
        return best + 1, float(total_us[best])

    def _limited(self, name: str, works: Sequence[Work]) -> Array:
        """Predicted microseconds, (num_shapes,); infinite past the candidate's limit."""
        us = self._scope.predicted_us(self._costs, name, works)
        return np.where(works[0].num_qo_tokens > self._limits.get(name, np.inf), np.inf, us)

    def _moved_us(self, site: Site, moved: Array, like: Work) -> Array:
        """Microseconds in which ``moved`` query rows are gathered and as many rows of output put in their place.

        No copy of these was measured. The dequantize stage was, over as many bytes read and written; on an H200 it reaches
        0.92 of a copy's bandwidth, so this errs to the dear side. Also paid where a part's rows lie together and need no
        gathering: the order of the requests shall not decide.
        """
        stage = "dequantize_compressed" if site.layer in (LayerType.C4A, LayerType.DSA) else "dequantize_window"
        curve = next(
            (c for p in self._costs.costs(site, WORKSPACE).paths for s, c in p.stages if s.name == stage), None
        )
        if curve is None:
            raise FitError(
                f"a split is priced by the stage {stage}: {site.key} has no timing of it; next: sweep it again"
            )
        total_us = np.zeros_like(moved)
        for dim in (_HEAD_DIM[site.layer], _V_DIM):
            row_bytes = 2 * (site.h_q or 0) * dim * _BF16_BYTES  # read and written
            rows = moved * row_bytes / _DEQUANTIZED_ROW_BYTES[site.layer]
            total_us += curve.latency_us(replace(like, compressed_rows=rows, window_rows=rows))
        return total_us


@dataclass(frozen=True, slots=True, eq=False)
class _Alone:
    """Work of each request by itself, (num_requests,), as sums over its queries: what adds up over a part."""

    site: Site
    num_qo_tokens: Array
    kv_tokens: Array
    compressed_rows: Array
    window_rows: Array
    selected: Array
    window: Array
    selection_width: Array
    index_width: Array
    distinct_rows: Array

    @classmethod
    def of(cls, site: Site, requests: Sequence[BatchRequest]) -> _Alone:
        load = work(site, [_shape([request]) for request in requests])
        return cls(
            site=site,
            num_qo_tokens=load.num_qo_tokens,
            kv_tokens=load.kv_tokens,
            compressed_rows=load.compressed_rows,
            window_rows=load.window_rows,
            selected=load.selected * load.num_qo_tokens,
            window=load.window * load.num_qo_tokens,
            selection_width=load.selection_width,
            index_width=load.index_width,
            distinct_rows=load.distinct_rows,
        )

    def first(self, order: Sequence[int]) -> Work:
        """Work of the first 1, 2, ... but not all requests of ``order``, (num_requests - 1,)."""
        picks = np.array(order, dtype=np.intp)
        num_reqs = np.arange(1, len(order) + 1, dtype=np.float64)

        def total(column: Array) -> Array:
            return np.cumsum(column[picks])[:-1]

        def largest(column: Array) -> Array:
            return np.maximum.accumulate(column[picks])[:-1]

        rectangular = self.site.layer is LayerType.C128A
        tokens, rows = total(self.num_qo_tokens), self.compressed_rows
        return Work(
            num_reqs=num_reqs[:-1],
            num_qo_tokens=tokens,
            kv_tokens=total(self.kv_tokens),
            compressed_rows=largest(rows) * num_reqs[:-1] if rectangular else total(rows),
            window_rows=total(self.window_rows),
            selected=total(self.selected) / tokens,
            window=total(self.window) / tokens,
            selection_width=largest(self.selection_width),
            index_width=largest(self.index_width),
            distinct_rows=total(self.distinct_rows),
        )

    def last(self, order: Sequence[int]) -> Work:
        """Work of what :meth:`first` leaves, in the same order of cuts."""
        rest = self.first(list(reversed(order)))
        return Work(**{name: getattr(rest, name)[::-1] for name in Work.__slots__})


def _with_idle(site: Site, load: Work, idle: Array) -> Work:
    """``load`` with ``idle`` query tokens more, each of which attends to one entry: its own."""
    tokens = load.num_qo_tokens + idle
    in_window, selected = (idle, 0.0 * idle) if site.layer.has_window else (0.0 * idle, idle)
    return replace(
        load,
        num_qo_tokens=tokens,
        selected=(load.selected * load.num_qo_tokens + selected) / tokens,
        window=(load.window * load.num_qo_tokens + in_window) / tokens,
    )


def _shape(requests: Sequence[BatchRequest]) -> RaggedShape:
    return RaggedShape(tuple((request.num_qo_tokens, request.kv_tokens) for request in requests))
