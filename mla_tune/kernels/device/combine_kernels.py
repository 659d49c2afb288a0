# mypy: disable-error-code="import-untyped,untyped-decorator"
"""Triton kernel: one index matrix of workspace rows from the selection and the window of every query."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mla_tune.kernels.device.launcher import Launcher
from mla_tune.sites.launch_parameters import CombineConfig


@triton.jit
def combine_tokens(
    topk_indices_ptr: tl.tensor,
    topk_stride: tl.tensor,
    positions_ptr: tl.tensor,
    token_to_req_ptr: tl.tensor,
    compressed_base_ptr: tl.tensor,
    window_base_ptr: tl.tensor,
    window_start_ptr: tl.tensor,
    row_map_ptr: tl.tensor,
    out_ptr: tl.tensor,
    out_lengths_ptr: tl.tensor,
    num_tokens: tl.tensor,
    width: tl.tensor,
    block: tl.tensor,
    first_step: tl.tensor,
    steps: tl.tensor,
    RATIO: tl.constexpr,  # noqa: N803
    TOPK: tl.constexpr,  # noqa: N803
    WINDOW: tl.constexpr,  # noqa: N803
    MAPPED: tl.constexpr,  # noqa: N803
    TOKENS: tl.constexpr,  # noqa: N803
    COLUMNS: tl.constexpr,  # noqa: N803
) -> None:
    """Rows of one block of tokens: the steps ``first_step``, ``first_step + steps``, ... of ``COLUMNS`` columns each.

    Rows of the workspace fit int32, as the output does; only what is multiplied by a row length is int64. The selection
    is loaded whole and cut by ``where``: a mask that ends at any column would turn 16-byte loads into 4-byte ones.
    """
    token = block.to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    is_token = token < num_tokens
    position = tl.load(positions_ptr + token, mask=is_token, other=0).to(tl.int32)
    request = tl.load(token_to_req_ptr + token, mask=is_token, other=0).to(tl.int32)

    selected = tl.zeros((TOKENS,), tl.int32)
    base = tl.zeros((TOKENS,), tl.int32)
    if RATIO > 0:
        selected = (position + 1) // RATIO
        base = tl.load(compressed_base_ptr + request, mask=is_token, other=0).to(tl.int32)
        if TOPK > 0:
            selected = tl.minimum(selected, TOPK)
    length = selected
    in_window = tl.zeros((TOKENS,), tl.int32)
    first = tl.zeros((TOKENS,), tl.int32)
    if WINDOW > 0:
        in_window = tl.minimum(position + 1, WINDOW)
        start = tl.load(window_start_ptr + request, mask=is_token, other=0).to(tl.int32)
        window_base = tl.load(window_base_ptr + request, mask=is_token, other=0).to(tl.int32)
        first = window_base + (position + 1 - in_window) - start
        length = selected + in_window
    if first_step == 0:
        tl.store(out_lengths_ptr + token, length, mask=is_token)

    for step in range(first_step, tl.cdiv(width, COLUMNS), steps):
        column = step * COLUMNS + tl.arange(0, COLUMNS)
        entry = tl.full((TOKENS, COLUMNS), -1, tl.int32)
        if RATIO > 0:
            in_selection = column[None, :] < selected[:, None]
            if TOPK > 0:
                index_ptr = topk_indices_ptr + token[:, None] * topk_stride + column[None, :]
                index = tl.load(index_ptr, mask=is_token[:, None] & (column < TOPK)[None, :], other=-1)
                taken = in_selection & (index >= 0)
                row = index + base[:, None]
                if MAPPED:
                    row = tl.load(row_map_ptr + row, mask=taken & is_token[:, None], other=-1)
                entry = tl.where(taken, row, -1)
            else:
                entry = tl.where(in_selection, column[None, :] + base[:, None], -1)
        if WINDOW > 0:
            offset = column[None, :] - selected[:, None]
            entry = tl.where((offset >= 0) & (offset < in_window[:, None]), first[:, None] + offset, entry)
        mask = is_token[:, None] & (column < width)[None, :]
        tl.store(out_ptr + token[:, None] * width + column[None, :], entry, mask=mask)


@triton.jit(do_not_specialize=["num_tokens"])
def _combine(
    topk_indices_ptr: tl.tensor,
    topk_stride: tl.tensor,
    positions_ptr: tl.tensor,
    token_to_req_ptr: tl.tensor,
    compressed_base_ptr: tl.tensor,
    window_base_ptr: tl.tensor,
    window_start_ptr: tl.tensor,
    row_map_ptr: tl.tensor,
    out_ptr: tl.tensor,
    out_lengths_ptr: tl.tensor,
    num_tokens: tl.tensor,
    width: tl.tensor,
    RATIO: tl.constexpr,  # noqa: N803
    TOPK: tl.constexpr,  # noqa: N803
    WINDOW: tl.constexpr,  # noqa: N803
    MAPPED: tl.constexpr,  # noqa: N803
    TOKENS: tl.constexpr,  # noqa: N803
    COLUMNS: tl.constexpr,  # noqa: N803
) -> None:
    combine_tokens(
        topk_indices_ptr, topk_stride, positions_ptr, token_to_req_ptr,
        compressed_base_ptr, window_base_ptr, window_start_ptr, row_map_ptr, out_ptr, out_lengths_ptr,
        num_tokens, width, tl.program_id(0), tl.program_id(1), tl.num_programs(1),
        RATIO, TOPK, WINDOW, MAPPED, TOKENS, COLUMNS,
    )  # fmt: skip


_launch = Launcher(_combine)


def launch(
    topk_indices: torch.Tensor | None,
    positions: torch.Tensor,
    token_to_req: torch.Tensor,
    compressed_base: torch.Tensor,
    window_base: torch.Tensor,
    window_start: torch.Tensor,
    out: torch.Tensor,
    out_lengths: torch.Tensor,
    ratio: int,
    topk: int,
    window: int,
    row_map: torch.Tensor | None,
    config: CombineConfig,
) -> None:
    """One launch. ``topk`` 0 selects every row below ``(position + 1) // ratio``; ``ratio`` 0 selects none."""
    num_tokens, width = out.shape
    steps = -(-width // config.columns_per_program)
    column_programs = min(config.column_programs or steps, steps)
    _launch(
        (-(-num_tokens // config.tokens_per_program), column_programs),
        (
            topk_indices,
            0 if topk_indices is None else topk_indices.stride(0),
            positions,
            token_to_req,
            compressed_base,
            window_base,
            window_start,
            row_map,
            out,
            out_lengths,
            num_tokens,
            width,
        ),
        {
            "RATIO": ratio,
            "TOPK": topk,
            "WINDOW": window,
            "MAPPED": row_map is not None,
            "TOKENS": config.tokens_per_program,
            "COLUMNS": config.columns_per_program,
        },
        config.num_warps,
    )
