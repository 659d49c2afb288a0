"""One batch in two parts: some requests by the KV-cache kernel, the others by a workspace, one output.

Neither FlashMLA function takes an output to write to, so rows have to be moved. Where the workspace's requests have one
with nothing cached, the sparse kernel runs over every query token of the batch, those of the other part standing in for
that request's first token, which attends to itself alone: one tile each, and only the other part's rows are moved.
Elsewhere both outputs are moved. The query rows of a part that do not lie together are gathered.

As everywhere here, the selection is taken to be there for each path: rows for the workspace, slots for the cache. An
engine's top-k transform has to write either by request, and for V3.2, whose indices the kernel takes as they are, that
first token's for a row of the other part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from mla_tune.errors import UsageError
from mla_tune.kernels import sparse_fwd, with_kvcache
from mla_tune.kernels.adapters.flash_mla import FlashMla
from mla_tune.kernels.inputs import AttentionInputs, PagedCache
from mla_tune.kernels.prepared import BoundStage, Output, PreparedPath
from mla_tune.sites.candidates import split_stages
from mla_tune.sites.launch_parameters import DEFAULT_LAUNCHES, Launches
from mla_tune.sites.shape import RaggedShape, compressed_row_counts, fresh_request, window_row_counts, workload

NAME = "split"
"""What its measurements are called; no policy names it."""


def prepare(
    inputs: AttentionInputs, cached: Sequence[int], kernels: FlashMla | None, launches: Launches = DEFAULT_LAUNCHES
) -> PreparedPath:
    """Bind a batch whose requests ``cached`` (indices) read the cache; the others get a workspace.

    ``kernels`` None means the torch implementations on the CPU. Raises :class:`UsageError` where a part has no request.
    """
    split = _Split(inputs, _checked(cached, inputs.shape.num_reqs), kernels, launches)
    return PreparedPath(
        candidate=NAME,
        stages=split.stages(),
        output=split.output,
        buffers=(*split.workspace.buffers, *split.gathered),
        scratch=(*split.workspace.scratch, *split.gathered),
    )


def _checked(cached: Sequence[int], num_reqs: int) -> list[int]:
    chosen = sorted(set(cached))
    if not chosen or len(chosen) == num_reqs or chosen[0] < 0 or chosen[-1] >= num_reqs:
        raise UsageError(
            f"a split needs requests in both parts: got {str(chosen)[:60]} of {num_reqs} for the cache; accepted: some, "
            f"but not all, of 0 to {num_reqs - 1}"
        )
    return chosen


@dataclass(frozen=True, slots=True)
class _Rows:
    """Query rows of one part, in the batch's order."""

    index: torch.Tensor  # (rows,) int64
    run: slice | None
    """The same, where they lie together."""

    @classmethod
    def of(cls, chosen: torch.Tensor) -> _Rows:
        """``chosen`` is (num_qo_tokens,) bool."""
        index = chosen.nonzero().flatten()
        first, count = int(index[0]), len(index)
        together = int(index[-1]) - first + 1 == count
        return cls(index, slice(first, first + count) if together else None)

    def taken(self, tensor: torch.Tensor) -> torch.Tensor:
        """Those rows of ``tensor``; a view where they lie together."""
        return tensor[self.index if self.run is None else self.run]

    def put(self, target: torch.Tensor, rows: torch.Tensor) -> None:
        """Write ``rows`` to where they belong."""
        if self.run is None:
            target.index_copy_(0, self.index, rows)
        else:
            target[self.run].copy_(rows)


class _Split:
    """Both parts, prepared, and what joins them."""

    def __init__(
        self, inputs: AttentionInputs, cached: list[int], kernels: FlashMla | None, launches: Launches
    ) -> None:
        others = sorted(set(range(inputs.shape.num_reqs)) - set(cached))
        is_cached = torch.zeros(inputs.shape.num_reqs, dtype=torch.bool)
        is_cached[cached] = True
        of_token = is_cached.to(inputs.q.device)[inputs.token_to_req.long()]
        self._inputs, self.output = inputs, Output()
        self._cached_rows, self._other_rows = _Rows.of(of_token), _Rows.of(~of_token)
        host = fresh_request([_request(inputs, r) for r in others])
        self._in_place = host is not None
        workspace = _subset(inputs, others, self._other_rows)
        if host is not None:
            workspace = _over_all_rows(inputs, workspace, self._other_rows, host)
        from_cache = _subset(inputs, cached, self._cached_rows)
        self._gathers = [
            (rows, part.q)
            for rows, part in ((self._cached_rows, from_cache), (self._other_rows, workspace))
            if rows.run is None and part.q.shape[0] == len(rows.index)
        ]
        self.gathered = [buffer for _, buffer in self._gathers]
        self.workspace = sparse_fwd.prepare(workspace, kernels, launches)
        self._from_cache = with_kvcache.prepare(from_cache, kernels)

    def stages(self) -> tuple[BoundStage, ...]:
        """Those of :func:`mla_tune.sites.candidates.split_stages`, without a gather of nothing."""
        first, *_, last = split_stages(self._inputs.site)
        runs = {first.name: BoundStage(first, self._gather), last.name: BoundStage(last, self._merge)}
        for part in (self.workspace, self._from_cache):
            runs |= {f"{part.candidate}.{bound.stage.name}": bound for bound in part.stages}
        wanted = [s for s in split_stages(self._inputs.site) if s.name != "gather" or self._gathers]
        return tuple(replace(runs[stage.name], stage=stage) for stage in wanted)

    def _gather(self) -> None:
        for rows, buffer in self._gathers:
            torch.index_select(_words(self._inputs.q), 0, rows.index, out=_words(buffer))

    def _merge(self) -> None:
        own, cached = self.workspace.result(), self._from_cache.result()
        if self._in_place:
            out = own
        else:
            out = own.new_empty(self._inputs.q.shape[0], *own.shape[1:])
            self._other_rows.put(_words(out), _words(own))
        self._cached_rows.put(_words(out), _words(cached))
        self.output.tensor = out


def _words(rows: torch.Tensor) -> torch.Tensor:
    """(n, heads, dim) bf16 as (n, words) int64: torch works out an address for every element that it moves."""
    return rows.view(rows.shape[0], -1).view(torch.int64)  # a view or an error: a copy would take the rows nowhere


def _request(inputs: AttentionInputs, index: int) -> tuple[int, int]:
    return inputs.shape.extend_lens()[index], inputs.shape.seq_lens()[index]


def _subset(inputs: AttentionInputs, requests: list[int], rows: _Rows) -> AttentionInputs:
    """Inputs of some of the requests, ``rows`` being their query rows; caches, and what lies together, are shared."""
    device, layer = inputs.q.device, inputs.site.layer
    picks = torch.tensor(requests, device=device)
    shape = RaggedShape(tuple(_request(inputs, r) for r in requests))
    place = torch.full((inputs.shape.num_reqs,), -1, dtype=torch.int32, device=device)
    place[picks] = torch.arange(len(requests), dtype=torch.int32, device=device)
    work = workload(inputs.site, shape)
    windows = window_row_counts(list(shape.requests)) if layer.has_window else [0] * len(requests)
    return replace(
        inputs,
        shape=shape,
        work=work,
        q=rows.taken(inputs.q),
        window=_pages_of(inputs.window, picks),
        compressed=_pages_of(inputs.compressed, picks),
        topk_indices=None if inputs.topk_indices is None else rows.taken(inputs.topk_indices),
        seq_lens=inputs.seq_lens[picks],
        window_start=inputs.window_start[picks],
        row_counts=inputs.row_counts[picks],
        cu_compressed=_prefix(compressed_row_counts(layer, shape.seq_lens()), device),
        cu_window=_prefix(windows, device),
        positions=rows.taken(inputs.positions),
        token_to_req=place[rows.taken(inputs.token_to_req).long()],
        workspace=inputs.workspace[: work.rows],
    )


def _over_all_rows(batch: AttentionInputs, part: AttentionInputs, rows: _Rows, host: int) -> AttentionInputs:
    """``part`` over every query row of ``batch``: those not its own stand in for the first token of request ``host``."""
    positions = torch.zeros_like(batch.positions)
    token_to_req = torch.full_like(batch.token_to_req, host)
    rows.put(positions, part.positions)
    rows.put(token_to_req, part.token_to_req)
    return replace(
        part,
        work=replace(part.work, num_qo_tokens=len(positions)),
        q=batch.q,
        topk_indices=_over_all_selections(batch, rows),
        positions=positions,
        token_to_req=token_to_req,
    )


def _over_all_selections(batch: AttentionInputs, rows: _Rows) -> torch.Tensor | None:
    """The batch's selections; for V3.2, which has no window, that of a first token where a row is not of ``rows``."""
    topk = batch.topk_indices
    if topk is None or batch.site.layer.has_window:
        return topk  # at position 0 a layer with a window has selected nothing
    found = torch.full_like(topk, -1)
    found[:, 0] = 0
    rows.put(found, rows.taken(topk))
    return found


def _pages_of(cache: PagedCache | None, requests: torch.Tensor) -> PagedCache | None:
    return None if cache is None else replace(cache, page_table=cache.page_table[requests])


def _prefix(values: list[int], device: torch.device) -> torch.Tensor:
    return torch.tensor([0, *values], dtype=torch.int64, device=device).cumsum(0)
