"""Stages of ``sparse_fwd_selected``: which workspace rows some query of this forward selects, and a place for each.

``sparse_fwd`` dequantizes every compressed row of every request. Where few queries meet a long context most of them are
attended to by nobody: here the selection is marked, the marked rows get consecutive places, and only they are
dequantized. How many there are is known on the device alone; nothing waits for the host.
"""

from __future__ import annotations

import torch

from mla_tune.errors import UsageError
from mla_tune.kernels.backend import Backend, choose_backend
from mla_tune.sites.launch_parameters import DEFAULT_LAUNCHES, SelectConfig
from mla_tune.sites.site import LayerType


def most_selected_rows(compressed_rows: int, num_qo_tokens: int, topk: int) -> int:
    """Most rows that can be selected: what the compact workspace must hold."""
    return min(compressed_rows, num_qo_tokens * topk)


def mark_selected(
    topk_indices: torch.Tensor,
    positions: torch.Tensor,
    token_to_req: torch.Tensor,
    compressed_base: torch.Tensor,
    marks: torch.Tensor,
    count: torch.Tensor,
    layer: LayerType,
    topk: int,
    config: SelectConfig | None = None,
    backend: Backend | None = None,
) -> None:
    """Set ``marks[row]`` to 1 for every selected row, and ``count`` to 0.

    Rows are those of :func:`mla_tune.kernels.combine.combine_topk_swa_indices`, whose first five arguments these are:
    ``topk_indices`` int32 ``(num_qo_tokens, >= topk)``, three index tensors, then ``marks`` uint8 ``(rows,)``, all 0
    before, and ``count`` int32 ``(1,)``. Raises :class:`UsageError` on other shapes or types.

    Reads ``4 * topk`` bytes a query, 16 a thread, and writes a byte to a sector of 32 for each entry, in the L2: the stores
    are the bound, ``topk`` sectors a query.
    """
    if topk_indices.dtype is not torch.int32 or topk_indices.dim() != 2 or topk_indices.stride(1) != 1:
        raise UsageError(
            f"topk_indices must be int32 (num_qo_tokens, topk) with contiguous rows: got {topk_indices.dtype}"
        )
    if topk_indices.shape[0] != positions.shape[0] or not 1 <= topk <= topk_indices.shape[1]:
        raise UsageError(
            f"topk_indices must be ({positions.shape[0]}, at least topk={topk}): got {tuple(topk_indices.shape)}"
        )
    _check_marks(marks, count)
    if positions.shape[0] == 0:
        count.zero_()
        return
    if choose_backend(marks, backend) is Backend.TORCH:
        chosen = topk_indices[:, :topk].long()
        columns = torch.arange(topk, device=marks.device)
        selected = ((positions.long() + 1) // layer.compress_ratio).clamp_max(topk)
        taken = (chosen >= 0) & (columns < selected[:, None])
        marks[(chosen + compressed_base.long()[token_to_req.long()][:, None])[taken]] = 1
        count.zero_()
        return
    from mla_tune.kernels.device import select_kernels as device

    arguments = (topk_indices, positions, token_to_req, compressed_base, marks, count, layer.compress_ratio, topk)
    device.launch_mark(*arguments, config or DEFAULT_LAUNCHES.select(positions.shape[0]))


def compact_selected(
    marks: torch.Tensor,
    row_slots: torch.Tensor,
    row_map: torch.Tensor,
    selected_slots: torch.Tensor,
    count: torch.Tensor,
    config: SelectConfig | None = None,
    backend: Backend | None = None,
) -> None:
    """Give every marked row a place: ``row_map[row] = place`` and ``selected_slots[place] = row_slots[row]``.

    ``count`` becomes the number of places, and every mark 0 again, for the next layer. ``row_map`` int32 ``(rows,)`` is
    written where a row is marked only; ``selected_slots`` int32 needs :func:`most_selected_rows` entries (not checked).
    Places are consecutive; which row gets which may differ from run to run on a GPU, and with it nothing that attention
    computes: a row has the same values in any place. Raises :class:`UsageError` on other shapes or types.

    Reads a byte a row and moves 13 for each marked one. No rows means no launch.
    """
    _check_marks(marks, count)
    for name, tensor in (("row_slots", row_slots), ("row_map", row_map)):
        if tensor.shape != marks.shape or tensor.dtype is not torch.int32:
            raise UsageError(f"{name} must be int32 {tuple(marks.shape)}: got {tensor.dtype} {tuple(tensor.shape)}")
    if selected_slots.dtype is not torch.int32 or selected_slots.dim() != 1:
        raise UsageError(f"selected_slots must be int32 (rows,): got {selected_slots.dtype}")
    if marks.shape[0] == 0:
        return
    if choose_backend(marks, backend) is Backend.TORCH:
        rows = marks.nonzero().flatten()
        row_map[rows] = torch.arange(len(rows), dtype=torch.int32, device=marks.device)
        selected_slots[: len(rows)] = row_slots[rows]
        count.fill_(len(rows))
        marks.zero_()
        return
    from mla_tune.kernels.device import select_kernels as device

    chosen = config or DEFAULT_LAUNCHES.select(0)
    device.launch_compact(marks, row_slots, row_map, selected_slots, count, chosen)


def _check_marks(marks: torch.Tensor, count: torch.Tensor) -> None:
    if marks.dtype is not torch.uint8 or marks.dim() != 1 or not marks.is_contiguous():
        raise UsageError(f"marks must be contiguous uint8 (rows,): got {marks.dtype} {tuple(marks.shape)}")
    if count.shape != (1,) or count.dtype is not torch.int32:
        raise UsageError(f"count must be int32 (1,): got {count.dtype} {tuple(count.shape)}")
