"""Stage of ``sparse_fwd``: the index matrix over the bf16 workspace, selection first and window behind it."""

from __future__ import annotations

import torch

from mla_tune.errors import UsageError
from mla_tune.kernels.backend import Backend, choose_backend
from mla_tune.sites.launch_parameters import DEFAULT_LAUNCHES, CombineConfig
from mla_tune.sites.site import SWA_WINDOW, LayerType

INDEX_ALIGNMENT = 128
"""Widths that ``flash_mla_sparse_fwd`` takes for any head count are multiples of this."""
_CPU_ENTRIES = 1 << 18
"""Entries that the CPU version computes at once: its temporaries (about 20 B an entry) then stay in the caches."""


def combine_topk_swa_indices(
    topk_indices: torch.Tensor | None,
    positions: torch.Tensor,
    token_to_req: torch.Tensor,
    compressed_base: torch.Tensor,
    window_base: torch.Tensor,
    window_start: torch.Tensor,
    layer: LayerType,
    out: torch.Tensor,
    out_lengths: torch.Tensor,
    topk: int | None = None,
    config: CombineConfig | None = None,
    backend: Backend | None = None,
    row_map: torch.Tensor | None = None,
) -> None:
    """Fill row ``t`` of ``out`` with the workspace rows that query ``t`` attends to, then -1; lengths to ``out_lengths``.

    The query stands at position ``p = positions[t]`` of request ``r = token_to_req[t]``. First its selection:
    for c4a (and dsa) the first ``min(topk, (p + 1) // compress_ratio)`` entries of ``topk_indices[t]``, request-relative
    rows plus ``compressed_base[r]``, where -1 stays a hole in its place (``topk`` None means all columns); for c128a
    every row below ``(p + 1) // 128``; for swa_only nothing. Then, but for dsa, its window: positions
    ``max(0, p - 127) .. p`` as rows ``window_base[r] + position - window_start[r]``, ``window_start[r]`` being the first
    position in the workspace.

    ``topk_indices`` is int32 ``(num_qo_tokens, >= topk)`` or None where the layer has no top-k; ``positions`` and
    ``token_to_req`` are ``(num_qo_tokens,)``, the three bases ``(num_reqs,)``, all int32 or int64; ``out`` is int32
    ``(num_qo_tokens, width)``, the width a multiple of 128 that holds the longest row (not checked for c128a, where only
    the positions know it); ``out_lengths`` is int32 ``(num_qo_tokens,)``. With ``row_map``, int32 ``(rows,)``, a selected
    row stands for ``row_map[row]`` (see :mod:`mla_tune.kernels.select`). Raises :class:`UsageError` on other shapes.

    Bytes of a query: ``4 * topk`` read and ``4 * width`` written, 16 a thread, and 28 of positions and bases; for c4a
    with top-k 512 4636, for c128a ``4 * width`` alone. One comparison and addition an entry: memory is the bound, 18 us
    for 16384 queries of c4a at an H200's copy bandwidth of 4.2 TB/s.
    """
    has_topk = layer in (LayerType.C4A, LayerType.DSA)
    window = SWA_WINDOW if layer.has_window else 0
    selection = _checked_topk(topk_indices, positions.shape[0], topk, layer) if has_topk else 0
    _check_out(out, out_lengths, positions.shape[0], selection + window)
    if out.shape[0] == 0:
        return
    arguments = (
        topk_indices if has_topk else None,
        positions,
        token_to_req,
        compressed_base,
        window_base,
        window_start,
        out,
        out_lengths,
        layer.compress_ratio,
        selection,
        window,
        row_map,
    )
    if choose_backend(out, backend) is Backend.TORCH:
        _combine_torch(*arguments)
        return
    from mla_tune.kernels.device import combine_kernels as device

    device.launch(*arguments, config or DEFAULT_LAUNCHES.combine(has_topk, out.shape[0]))


def _checked_topk(topk_indices: torch.Tensor | None, num_tokens: int, topk: int | None, layer: LayerType) -> int:
    if topk_indices is None or topk_indices.dtype is not torch.int32 or topk_indices.dim() != 2:
        got = "none" if topk_indices is None else f"{topk_indices.dtype} {tuple(topk_indices.shape)}"
        raise UsageError(f"{layer} needs topk_indices as int32 (num_qo_tokens, topk): got {got}")
    rows, columns = topk_indices.shape
    count = columns if topk is None else topk
    if rows != num_tokens or not 1 <= count <= columns or topk_indices.stride(1) != 1:
        raise UsageError(
            f"topk_indices must be ({num_tokens}, at least topk={topk}) with contiguous rows: "
            f"got {(rows, columns)} with strides {topk_indices.stride()}"
        )
    return count


def _check_out(out: torch.Tensor, out_lengths: torch.Tensor, num_tokens: int, least_width: int) -> None:
    fits = out.dim() == 2 and out.shape[0] == num_tokens and out.shape[1] >= least_width
    if not fits or out.shape[1] % INDEX_ALIGNMENT or out.dtype is not torch.int32 or not out.is_contiguous():
        raise UsageError(
            f"out must be contiguous int32 ({num_tokens}, a multiple of {INDEX_ALIGNMENT} that is at least "
            f"{least_width}): got {out.dtype} {tuple(out.shape)}"
        )
    if out_lengths.shape != (num_tokens,) or out_lengths.dtype is not torch.int32 or not out_lengths.is_contiguous():
        raise UsageError(
            f"out_lengths must be contiguous int32 ({num_tokens},): got {out_lengths.dtype} {tuple(out_lengths.shape)}"
        )


def _combine_torch(
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
) -> None:
    request = token_to_req.long()
    seen = positions.long() + 1
    selected = seen.div(ratio, rounding_mode="floor") if ratio else torch.zeros_like(seen)
    if topk:
        selected = selected.clamp_max(topk)
    in_window = seen.clamp_max(window)
    lengths = selected + in_window
    out_lengths.copy_(lengths)
    # Row of the window's first entry, moved left so that adding the column gives the row; int32 like `out` itself.
    window_row = torch.zeros_like(seen)
    if window:
        window_row = window_base.long()[request] + seen - in_window - window_start.long()[request] - selected
    base = compressed_base.long()[request] if ratio else torch.zeros_like(seen)
    columns = torch.arange(out.shape[1], dtype=torch.int32, device=out.device)
    selected_, lengths_, window_row_, base_ = (x.int()[:, None] for x in (selected, lengths, window_row, base))
    step = max(1, _CPU_ENTRIES // out.shape[1])
    for start in range(0, out.shape[0], step):
        rows = slice(start, start + step)
        filled = out[rows]
        torch.add(columns, window_row_[rows], out=filled)
        filled.masked_fill_((columns < selected_[rows]) | (columns >= lengths_[rows]), -1)
        if topk_indices is not None:
            index = topk_indices[rows, :topk]
            row = index + base_[rows]
            if row_map is not None and len(row_map):  # without rows nothing is selected
                taken = (index >= 0) & (columns[:topk] < selected_[rows])
                row = row_map[torch.where(taken, row, 0).long()]
            entry = torch.where(index >= 0, row, -1)
            filled[:, :topk] = torch.where(columns[:topk] < selected_[rows], entry, filled[:, :topk])
        elif ratio:
            filled.copy_(torch.where(columns < selected_[rows], columns + base_[rows], filled))
