# mypy: disable-error-code="import-untyped,untyped-decorator"
"""Triton kernels: mark the rows that some query selects, then give each of them a place in a compact workspace."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mla_tune.kernels.device.launcher import Launcher
from mla_tune.sites.launch_parameters import SelectConfig


@triton.jit(do_not_specialize=["num_tokens"])
def _mark(
    topk_indices_ptr: tl.tensor,
    topk_stride: tl.tensor,
    positions_ptr: tl.tensor,
    token_to_req_ptr: tl.tensor,
    base_ptr: tl.tensor,
    marks_ptr: tl.tensor,
    count_ptr: tl.tensor,
    num_tokens: tl.tensor,
    RATIO: tl.constexpr,  # noqa: N803
    TOPK: tl.constexpr,  # noqa: N803
    TOKENS: tl.constexpr,  # noqa: N803
    COLUMNS: tl.constexpr,  # noqa: N803
) -> None:
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    is_token = token < num_tokens
    index_ptr = topk_indices_ptr + token[:, None] * topk_stride + column[None, :]
    index = tl.load(index_ptr, mask=is_token[:, None] & (column < TOPK)[None, :], other=-1)
    position = tl.load(positions_ptr + token, mask=is_token, other=0).to(tl.int32)
    request = tl.load(token_to_req_ptr + token, mask=is_token, other=0).to(tl.int32)
    base = tl.load(base_ptr + request, mask=is_token, other=0).to(tl.int32)
    selected = tl.minimum((position + 1) // RATIO, TOPK)
    taken = (index >= 0) & (column[None, :] < selected[:, None])
    # Programs may write one byte at the same time; all of them write 1.
    tl.store(marks_ptr + (index + base[:, None]), tl.full((TOKENS, COLUMNS), 1, tl.uint8), mask=taken)
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        tl.store(count_ptr, 0)  # whoever counted before has been launched before


@triton.jit(do_not_specialize=["num_rows"])
def _compact(
    marks_ptr: tl.tensor,
    row_slots_ptr: tl.tensor,
    row_map_ptr: tl.tensor,
    selected_slots_ptr: tl.tensor,
    count_ptr: tl.tensor,
    num_rows: tl.tensor,
    ROWS: tl.constexpr,  # noqa: N803
) -> None:
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    mark = tl.load(marks_ptr + row, mask=row < num_rows, other=0).to(tl.int32)
    here = tl.sum(mark, axis=0)
    if here > 0:
        marked = mark > 0
        first = tl.atomic_add(count_ptr, here)
        place = first + tl.cumsum(mark, axis=0) - mark
        tl.store(row_map_ptr + row, place, mask=marked)
        slot = tl.load(row_slots_ptr + row, mask=marked, other=-1)
        tl.store(selected_slots_ptr + place, slot, mask=marked)
        tl.store(marks_ptr + row, tl.zeros((ROWS,), tl.uint8), mask=marked)


_launch_mark, _launch_compact = Launcher(_mark), Launcher(_compact)


def launch_mark(
    topk_indices: torch.Tensor,
    positions: torch.Tensor,
    token_to_req: torch.Tensor,
    base: torch.Tensor,
    marks: torch.Tensor,
    count: torch.Tensor,
    ratio: int,
    topk: int,
    config: SelectConfig,
) -> None:
    """One launch; arguments as of :func:`mla_tune.kernels.select.mark_selected`, checked there."""
    num_tokens = positions.shape[0]
    grid = (-(-num_tokens // config.tokens_per_program), -(-topk // config.columns_per_program))
    _launch_mark(
        grid,
        (topk_indices, topk_indices.stride(0), positions, token_to_req, base, marks, count, num_tokens),
        {"RATIO": ratio, "TOPK": topk, "TOKENS": config.tokens_per_program, "COLUMNS": config.columns_per_program},
        config.num_warps,
    )


def launch_compact(
    marks: torch.Tensor,
    row_slots: torch.Tensor,
    row_map: torch.Tensor,
    selected_slots: torch.Tensor,
    count: torch.Tensor,
    config: SelectConfig,
) -> None:
    """One launch; arguments as of :func:`mla_tune.kernels.select.compact_selected`, checked there."""
    num_rows = marks.shape[0]
    _launch_compact(
        (-(-num_rows // config.rows_per_program),),
        (marks, row_slots, row_map, selected_slots, count, num_rows),
        {"ROWS": config.rows_per_program},
        config.num_warps,
    )
