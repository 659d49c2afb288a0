# mypy: disable-error-code="import-untyped,untyped-decorator"
"""Triton kernel: one index matrix of workspace rows from the selection and the window of every query."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mla_tune.kernels.launch import CombineConfig


@triton.jit(do_not_specialize=["num_tokens", "topk_stride"])
def _combine(
    topk_indices_ptr: tl.tensor,
    topk_stride: tl.tensor,
    positions_ptr: tl.tensor,
    token_to_req_ptr: tl.tensor,
    compressed_base_ptr: tl.tensor,
    window_base_ptr: tl.tensor,
    window_start_ptr: tl.tensor,
    out_ptr: tl.tensor,
    out_lengths_ptr: tl.tensor,
    num_tokens: tl.tensor,
    width: tl.tensor,
    RATIO: tl.constexpr,  # noqa: N803
    TOPK: tl.constexpr,  # noqa: N803
    WINDOW: tl.constexpr,  # noqa: N803
    TOKENS: tl.constexpr,  # noqa: N803
    COLUMNS: tl.constexpr,  # noqa: N803
) -> None:
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    is_token = token < num_tokens
    position = tl.load(positions_ptr + token, mask=is_token, other=0).to(tl.int64)
    request = tl.load(token_to_req_ptr + token, mask=is_token, other=0).to(tl.int64)

    mask = is_token[:, None] & (column < width)[None, :]
    selected = tl.zeros((TOKENS,), tl.int64)
    entry = tl.full((TOKENS, COLUMNS), -1, tl.int64)
    if RATIO > 0:
        selected = (position + 1) // RATIO
        base = tl.load(compressed_base_ptr + request, mask=is_token, other=0).to(tl.int64)
        if TOPK > 0:
            selected = tl.minimum(selected, TOPK)
            in_selection = column[None, :] < selected[:, None]
            index_ptr = topk_indices_ptr + token[:, None] * topk_stride + column[None, :]
            index = tl.load(index_ptr, mask=mask & in_selection, other=-1).to(tl.int64)
            entry = tl.where(index >= 0, index + base[:, None], -1)
        else:
            in_selection = column[None, :] < selected[:, None]
            entry = tl.where(in_selection, column[None, :] + base[:, None], -1)

    length = selected
    if WINDOW > 0:
        in_window = tl.minimum(position + 1, WINDOW)
        start = tl.load(window_start_ptr + request, mask=is_token, other=0).to(tl.int64)
        window_base = tl.load(window_base_ptr + request, mask=is_token, other=0).to(tl.int64)
        first = window_base + (position + 1 - in_window) - start
        offset = column[None, :] - selected[:, None]
        entry = tl.where((offset >= 0) & (offset < in_window[:, None]), first[:, None] + offset, entry)
        length = selected + in_window
    tl.store(out_ptr + token[:, None] * width + column[None, :], entry.to(tl.int32), mask=mask)
    if tl.program_id(1) == 0:
        tl.store(out_lengths_ptr + token, length.to(tl.int32), mask=is_token)


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
    config: CombineConfig,
) -> None:
    """One launch. ``topk`` 0 selects every row below ``(position + 1) // ratio``; ``ratio`` 0 selects none."""
    num_tokens, width = out.shape
    grid = (triton.cdiv(num_tokens, config.tokens_per_program), triton.cdiv(width, config.columns_per_program))
    _combine[grid](
        topk_indices,
        0 if topk_indices is None else topk_indices.stride(0),
        positions,
        token_to_req,
        compressed_base,
        window_base,
        window_start,
        out,
        out_lengths,
        num_tokens,
        width,
        RATIO=ratio,
        TOPK=topk,
        WINDOW=window,
        TOKENS=config.tokens_per_program,
        COLUMNS=config.columns_per_program,
        num_warps=config.num_warps,
    )
