"""The two attention kernels on a CPU: what a CPU sweep times in place of FlashMLA.

Both take queries in runs, so that the gathered rows and the logits of one run fit ``scratch_bytes``; the arithmetic is
float32. As on the GPU, the KV-cache path plans its runs once for a forward (:func:`schedule_cpu`) and reuses the plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mla_tune.errors import UsageError
from mla_tune.kernels.backend import Backend
from mla_tune.kernels.dequantize import dequantize_k_cache_paged
from mla_tune.kernels.formats import PagedSelection

SCRATCH_BYTES = 32 << 20
"""Default bound on the temporaries of one run of queries: the size of a server's shared cache, not of its memory."""


@dataclass(frozen=True, slots=True)
class CpuSchedule:
    """Runs of queries: run ``i`` is queries ``bounds[i] .. bounds[i + 1] - 1``."""

    bounds: tuple[int, ...]

    @property
    def runs(self) -> list[slice]:
        """The runs as slices over the queries."""
        return [slice(start, end) for start, end in zip(self.bounds, self.bounds[1:], strict=False)]


def schedule_cpu(
    lengths: torch.Tensor, num_heads: int, head_dim: int, scratch_bytes: int = SCRATCH_BYTES
) -> CpuSchedule:
    """Cut queries into runs that each fill ``scratch_bytes`` and no more (a single query may exceed it).

    ``lengths`` ``(num_qo_tokens,)`` are the entries that each query attends to, over all caches. A run is as wide as its
    longest query; its scratch is the gathered rows and logits in float32, padding included. So runs cost about the same,
    whatever the lengths.
    """
    entry_bytes = _entry_bytes(num_heads, head_dim)
    bounds = [0]
    widest = 0
    for query, length in enumerate(lengths.tolist()):
        widest = max(widest, length)
        if query > bounds[-1] and (query - bounds[-1] + 1) * widest * entry_bytes > scratch_bytes:
            bounds.append(query)
            widest = length
    if lengths.shape[0]:
        bounds.append(lengths.shape[0])
    return CpuSchedule(tuple(bounds))


def sparse_fwd_cpu(
    q: torch.Tensor,
    kv: torch.Tensor,
    indices: torch.Tensor,
    lengths: torch.Tensor,
    sm_scale: float,
    attn_sink: torch.Tensor | None = None,
    d_v: int = 512,
    scratch_bytes: int = SCRATCH_BYTES,
) -> torch.Tensor:
    """Attention of each query over its rows of a flat workspace; returns ``(n, h, d_v)`` in the type of ``q``.

    ``q`` ``(n, h, d)`` bf16 or float32, ``kv`` ``(rows, d)`` bf16, ``indices`` int32 ``(n, width)``, -1 = skip,
    ``lengths`` int32 ``(n,)`` columns of a query that count, ``attn_sink`` float32 ``(h,)``. A query with nothing to
    attend to gives zeros.
    """
    _check_heads(q, kv.shape[1], d_v)
    out = q.new_empty((*q.shape[:2], d_v))
    rows_at_once = max(1, scratch_bytes // max(1, indices.shape[1] * _entry_bytes(q.shape[1], q.shape[2])))
    for start in range(0, q.shape[0], rows_at_once):
        run = slice(start, start + rows_at_once)
        index, valid = _selected(indices[run], lengths[run])
        rows = kv.index_select(0, index.clamp_min(0).flatten()).float().view(*index.shape, kv.shape[1])
        if not valid.all():
            rows[~valid] = 0
        out[run] = _attend(q[run], rows, valid, sm_scale, attn_sink, d_v)
    return out


def with_kvcache_cpu(
    q: torch.Tensor,
    schedule: CpuSchedule,
    selections: Sequence[PagedSelection],
    sm_scale: float,
    attn_sink: torch.Tensor | None = None,
    d_v: int = 512,
) -> torch.Tensor:
    """Attention of each query over rows of paged FP8 caches, dequantized run by run; returns ``(n, h, d_v)`` like ``q``.

    ``schedule`` is :func:`schedule_cpu` of the summed lengths of all ``selections``. Values are rounded to bf16 first,
    as the GPU kernel does, so both paths agree. A query with nothing to attend to gives zeros.
    """
    out = q.new_empty((*q.shape[:2], d_v))
    if schedule.bounds[-1] != q.shape[0]:
        raise UsageError(f"the schedule must cover all {q.shape[0]} queries: got one of {schedule.bounds[-1]}")
    for part in selections:
        _check_heads(q, part.fmt.head_dim, d_v)
    for run in schedule.runs:
        parts = [_dequantize_run(part, run) for part in selections]
        rows = torch.cat([rows for rows, _ in parts], dim=1).float()
        valid = torch.cat([valid for _, valid in parts], dim=1)
        out[run] = _attend(q[run], rows, valid, sm_scale, attn_sink, d_v)
    return out


def _entry_bytes(num_heads: int, head_dim: int) -> int:
    """Float32 bytes that one attended entry takes: its row, and a logit and a weight a head."""
    return 4 * (head_dim + 2 * num_heads)


def _check_heads(q: torch.Tensor, row_dim: int, d_v: int) -> None:
    if q.dim() != 3 or q.shape[2] != row_dim or d_v > row_dim:
        raise UsageError(
            f"q must be (num_qo_tokens, heads, {row_dim}) with d_v <= {row_dim}: got {tuple(q.shape)}, {d_v}"
        )


def _selected(indices: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The columns of a run that some query uses, and which entries of them count."""
    width = min(int(lengths.max()), indices.shape[1])
    index = indices[:, :width]
    return index, (index >= 0) & (torch.arange(width) < lengths[:, None])


def _dequantize_run(part: PagedSelection, run: slice) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows bf16 ``(queries, width, head_dim)`` of one run, zeros where skipped, and which of them count."""
    index, valid = _selected(part.slot_ids[run], part.lengths[run])
    slots = index.masked_fill(~valid, -1).flatten()
    rows = torch.empty((slots.shape[0], part.fmt.head_dim), dtype=torch.bfloat16)
    dequantize_k_cache_paged(part.cache, slots, rows, part.fmt, part.page_size, backend=Backend.TORCH)
    return rows.view(*index.shape, part.fmt.head_dim), valid


def _attend(
    q: torch.Tensor,
    rows: torch.Tensor,
    valid: torch.Tensor,
    sm_scale: float,
    attn_sink: torch.Tensor | None,
    d_v: int,
) -> torch.Tensor:
    """Softmax attention of ``q`` ``(n, h, d)`` over ``rows`` ``(n, width, d)`` float32, skipped rows being zeros."""
    logits = torch.bmm(q.float() * sm_scale, rows.mT).masked_fill_(~valid[:, None, :], -torch.inf)
    # An empty row has its maximum and its sum set so that its weights are 0, not NaN.
    peak = logits.amax(-1, keepdim=True) if rows.shape[1] else logits.new_zeros((*logits.shape[:2], 1))
    peak = peak.masked_fill(peak == -torch.inf, 0.0)
    weights = logits.sub_(peak).exp_()
    total = weights.sum(-1, keepdim=True)
    if attn_sink is not None:
        total = total + (attn_sink.float()[None, :, None] - peak).exp()
    out = torch.bmm(weights, rows[..., :d_v])
    return out.div_(total.masked_fill(total == 0, 1.0)).to(q.dtype)
