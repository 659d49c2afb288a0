# mypy: disable-error-code="import-untyped,untyped-decorator"
"""Triton kernel: cache slots of a run of positions of each request, laid out flat."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mla_tune.kernels.device.launcher import Launcher
from mla_tune.sites.launch_parameters import SlotIdsConfig


@triton.jit
def _requests_ended(cu_rows_ptr: tl.tensor, row: tl.tensor, least: tl.tensor, most: tl.tensor) -> tl.tensor:
    """Requests that end at or before ``row``, known to be ``least`` to ``most``; a scalar."""
    low = tl.full((), 0, tl.int32) + least
    high = tl.full((), 0, tl.int32) + most
    while low < high:
        middle = (low + high) // 2
        if tl.load(cu_rows_ptr + 1 + middle) <= row:
            low = middle + 1
        else:
            high = middle
    return low


@triton.jit(do_not_specialize=["page_table_stride", "num_rows", "num_reqs"])
def _request_slots(
    page_table_ptr: tl.tensor,
    page_table_stride: tl.tensor,
    lens_ptr: tl.tensor,
    cu_rows_ptr: tl.tensor,
    out_ptr: tl.tensor,
    num_rows: tl.tensor,
    num_reqs: tl.tensor,
    PAGE_SIZE: tl.constexpr,  # noqa: N803
    FROM_END: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr,  # noqa: N803
) -> None:
    block = tl.program_id(0).to(tl.int64) * ROWS
    row = block + tl.arange(0, ROWS)
    in_range = row < num_rows
    # The request of a row is the number of requests that end at or before it. A binary search finds it for the block's
    # first and last row; only where they differ is there another one for every row.
    first = _requests_ended(cu_rows_ptr, block, 0, num_reqs)
    last = _requests_ended(cu_rows_ptr, tl.minimum(block + ROWS, num_rows) - 1, first, num_reqs)
    request = tl.zeros((ROWS,), tl.int32) + first
    end = tl.zeros((ROWS,), tl.int32) + last
    span = last - first
    while span > 0:
        middle = (request + end) // 2
        is_open = request < end
        boundary = tl.load(cu_rows_ptr + 1 + middle, mask=is_open, other=0)
        request = tl.where(is_open & (boundary <= row), middle + 1, request)
        end = tl.where(is_open & (boundary > row), middle, end)
        span = span // 2
    known = in_range & (request < num_reqs)
    length = tl.load(lens_ptr + request, mask=known, other=0).to(tl.int64)
    if FROM_END:
        position = length - (tl.load(cu_rows_ptr + 1 + request, mask=known, other=0) - row)
    else:
        position = row - tl.load(cu_rows_ptr + request, mask=known, other=0)
    exists = known & (position >= 0) & (position < length)
    position = position.to(tl.int32)  # of one request; faster to divide than int64
    page_index = position // PAGE_SIZE
    page_at = request.to(tl.int64) * page_table_stride + page_index
    page = tl.load(page_table_ptr + page_at, mask=exists, other=0).to(tl.int64)
    slot = tl.where(exists, page * PAGE_SIZE + (position - page_index * PAGE_SIZE), -1)
    tl.store(out_ptr + row, slot.to(tl.int32), mask=in_range)


_launch = Launcher(_request_slots)


def launch(
    page_table: torch.Tensor,
    lens: torch.Tensor,
    cu_rows: torch.Tensor,
    out: torch.Tensor,
    page_size: int,
    from_end: bool,
    config: SlotIdsConfig,
) -> None:
    """One launch; ``from_end`` takes the last positions below ``lens``, otherwise the first."""
    num_rows, num_reqs = out.shape[0], lens.shape[0]
    _launch(
        (-(-num_rows // config.rows_per_program),),
        (page_table, page_table.stride(0), lens, cu_rows, out, num_rows, num_reqs),
        {"PAGE_SIZE": page_size, "FROM_END": from_end, "ROWS": config.rows_per_program},
        config.num_warps,
    )
