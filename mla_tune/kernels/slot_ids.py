"""Stages of ``sparse_fwd``, once per forward: which cache slots go to which workspace row.

Both functions lay the rows of request ``r`` out at ``[cu[r], cu[r + 1])`` of a flat list, and look the slot of a position
up in the request's pages: ``page_table[r, position // page_size] * page_size + position % page_size``.
"""

from __future__ import annotations

import torch

from mla_tune.errors import UsageError
from mla_tune.kernels.backend import Backend, choose_backend
from mla_tune.sites.launch_parameters import DEFAULT_LAUNCHES, SlotIdsConfig


def build_swa_token_ids(
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    cu_window_rows: torch.Tensor,
    out: torch.Tensor,
    page_size: int,
    config: SlotIdsConfig | None = None,
    backend: Backend | None = None,
) -> None:
    """Slots of the last ``cu_window_rows[r + 1] - cu_window_rows[r]`` positions of each request, in order.

    A request's rows are ``min(seq_len, extend_len + 127)``: what the windows of its new tokens cover. ``page_table`` is
    int32 ``(num_reqs, max_pages)`` of the window cache, ``seq_lens`` int32 or int64 ``(num_reqs,)``, ``cu_window_rows``
    int32 or int64 ``(num_reqs + 1,)``, ``out`` int32 ``(rows,)``. Entries that belong to no position are -1. One launch.
    """
    _request_slots(page_table, seq_lens, cu_window_rows, out, page_size, True, config, backend)


def build_compressed_row_ids(
    page_table: torch.Tensor,
    row_counts: torch.Tensor,
    cu_rows: torch.Tensor,
    out: torch.Tensor,
    page_size: int,
    config: SlotIdsConfig | None = None,
    backend: Backend | None = None,
) -> None:
    """Slots of compressed rows ``0 .. row_counts[r] - 1`` of each request.

    ``cu_rows`` may give a request more room than it has rows (c128a is rectangular): the entries past its rows are -1.
    Shapes and types as in :func:`build_swa_token_ids`, with the page table of the compressed cache. One launch.
    """
    _request_slots(page_table, row_counts, cu_rows, out, page_size, False, config, backend)


def _request_slots(
    page_table: torch.Tensor,
    lens: torch.Tensor,
    cu_rows: torch.Tensor,
    out: torch.Tensor,
    page_size: int,
    from_end: bool,
    config: SlotIdsConfig | None,
    backend: Backend | None,
) -> None:
    num_reqs = lens.shape[0]
    if page_table.dim() != 2 or page_table.shape[0] != num_reqs or cu_rows.shape != (num_reqs + 1,):
        raise UsageError(
            f"page_table must be (num_reqs, max_pages) and the offsets (num_reqs + 1,) for {num_reqs} requests: "
            f"got {tuple(page_table.shape)} and {tuple(cu_rows.shape)}"
        )
    if page_table.stride(1) != 1 or not (lens.is_contiguous() and cu_rows.is_contiguous() and out.is_contiguous()):
        raise UsageError("page_table rows, lengths, offsets and out must be contiguous: call .contiguous() on them")
    if out.dtype is not torch.int32 or out.dim() != 1:
        raise UsageError(f"out must be int32 (rows,): got {out.dtype} {tuple(out.shape)}")
    if out.shape[0] == 0:
        return
    if choose_backend(out, backend) is Backend.TORCH:
        _request_slots_torch(page_table, lens, cu_rows, out, page_size, from_end)
        return
    from mla_tune.kernels.device import slot_id_kernels as device

    device.launch(
        page_table, lens, cu_rows, out, page_size, from_end, config or DEFAULT_LAUNCHES.slot_ids(out.shape[0])
    )


def _request_slots_torch(
    page_table: torch.Tensor,
    lens: torch.Tensor,
    cu_rows: torch.Tensor,
    out: torch.Tensor,
    page_size: int,
    from_end: bool,
) -> None:
    out.fill_(-1)
    if page_table.numel() == 0:
        return
    cu_rows = cu_rows.long()
    requests = torch.arange(lens.shape[0], device=out.device)
    request = requests.repeat_interleave(cu_rows[1:] - cu_rows[:-1])[: out.shape[0]]
    row = torch.arange(request.shape[0], device=out.device)
    first = lens.long() - (cu_rows[1:] - cu_rows[:-1]) if from_end else torch.zeros_like(requests)
    position = row + (first - cu_rows[:-1])[request]
    exists = (position >= 0) & (position < lens[request])
    position.clamp_(0, page_table.shape[1] * page_size - 1)
    page_index = position.div(page_size, rounding_mode="floor")
    offset = position - page_index * page_size
    page = page_table.flatten()[request * page_table.shape[1] + page_index].long()
    out[: row.shape[0]] = torch.where(exists, page * page_size + offset, -1)
