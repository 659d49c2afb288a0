"""Stage of ``sparse_fwd``: rows of a paged FP8 cache, gathered by slot into a flat bf16 workspace."""

from __future__ import annotations

from functools import cache as memoize

import torch

from mla_tune.errors import UsageError
from mla_tune.kernels.backend import Backend, choose_backend
from mla_tune.kernels.formats import KVFormat, check_cache
from mla_tune.sites.launch_parameters import DEFAULT_LAUNCHES, DequantizeConfig

_CPU_ROWS = 4096
"""Rows that the CPU version converts at once: its temporaries (about 2 KB a row) then stay in the caches."""


def dequantize_k_cache_paged(
    cache: torch.Tensor,
    slot_ids: torch.Tensor,
    out: torch.Tensor,
    fmt: KVFormat,
    page_size: int,
    config: DequantizeConfig | None = None,
    backend: Backend | None = None,
    count: torch.Tensor | None = None,
) -> None:
    """Write row ``slot_ids[i]`` of ``cache`` to ``out[i]``; a slot of -1 gives zeros.

    ``cache`` is uint8 ``(num_pages, fmt.page_bytes(page_size))``, ``slot_ids`` int32 or int64 ``(rows,)``, ``out`` bf16
    ``(rows, fmt.head_dim)`` and contiguous, for example a slice of a workspace. Slots are not checked against the
    cache. No rows means no launch. With ``count``, int32 ``(1,)`` on the same device, only the first ``count[0]`` rows are
    written: the host need not know how many there are. On a GPU it needs e4m3 conversion (compute capability 8.9 or
    later). Raises :class:`UsageError` on other shapes or types.

    A V4 row moves 584 + 1024 bytes and a DSA row 656 + 1152, all of them once, and 4 to 8 of its slot: the bound is the
    memory's copy bandwidth. 16384 V4 rows are 26 MB, 6.3 us at an H200's 4.2 TB/s, to which two dependent loads (the slot,
    then the row) and the launch come on top; 2M rows are 3.4 GB, 0.80 ms.
    """
    check_cache(cache, fmt, page_size)
    rows = slot_ids.shape[0]
    if out.shape != (rows, fmt.head_dim) or out.dtype is not torch.bfloat16 or not out.is_contiguous():
        raise UsageError(
            f"out must be contiguous bfloat16 ({rows}, {fmt.head_dim}), a row for each slot id: "
            f"got {out.dtype} {tuple(out.shape)} with strides {out.stride()}"
        )
    if slot_ids.dtype not in (torch.int32, torch.int64) or slot_ids.dim() != 1 or not slot_ids.is_contiguous():
        raise UsageError(
            f"slot_ids must be contiguous int32 or int64 (rows,): got {slot_ids.dtype} {tuple(slot_ids.shape)}"
        )
    if rows == 0:
        return
    if choose_backend(cache, backend) is Backend.TORCH:
        kept = rows if count is None else min(rows, int(count))
        _dequantize_torch(cache, slot_ids[:kept], out[:kept], fmt, page_size)
        return
    from mla_tune.kernels.device import dequantize_kernels as device

    device.launch(cache, slot_ids, out, fmt, page_size, config or DEFAULT_LAUNCHES.dequantize(fmt.name, rows), count)


def _dequantize_torch(
    cache: torch.Tensor, slot_ids: torch.Tensor, out: torch.Tensor, fmt: KVFormat, page_size: int
) -> None:
    for start in range(0, slot_ids.shape[0], _CPU_ROWS):
        rows = slice(start, start + _CPU_ROWS)
        _dequantize_rows(cache, slot_ids[rows].long(), out[rows], fmt, page_size)


def _dequantize_rows(
    cache: torch.Tensor, slots: torch.Tensor, out: torch.Tensor, fmt: KVFormat, page_size: int
) -> None:
    absent = slots < 0
    slots = slots.clamp_min(0)
    page = slots.div(page_size, rounding_mode="floor")
    offset = slots - page * page_size
    # A page is a whole number of data rows and of scale rows, so both are gathers from a two-dimensional view.
    data = _gather(cache, fmt.data_stride, page, offset)
    if fmt.exponent_scales:
        scales = _gather(cache, fmt.scale_bytes, page, offset + fmt.scale_base(page_size) // fmt.scale_bytes)
        scale = _exponent_table(cache.device).index_select(0, scales[:, : fmt.num_groups].flatten().int())
    else:
        scale = data[:, fmt.nope_dim : fmt.rope_offset].contiguous().view(torch.float32).flatten()
    values = _decode_e4m3(data[:, : fmt.nope_dim]).view(-1, fmt.num_groups, fmt.group_size)
    nope = out[:, : fmt.nope_dim].view(-1, fmt.num_groups, fmt.group_size)
    torch.mul(values, scale.view(-1, fmt.num_groups, 1), out=nope)
    out[:, fmt.nope_dim :] = data[:, fmt.rope_offset :].contiguous().view(torch.bfloat16)
    if absent.any():
        out[absent] = 0


def _gather(cache: torch.Tensor, row_bytes: int, page: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
    """Rows ``row`` of pages ``page``, with every page seen as rows of ``row_bytes``: uint8 ``(len(row), row_bytes)``."""
    return cache.view(-1, row_bytes).index_select(0, page * (cache.shape[1] // row_bytes) + row)


def _decode_e4m3(codes: torch.Tensor) -> torch.Tensor:
    """Values of uint8 e4m3 ``codes`` as bf16, which holds them all. Looked up in pairs: 3 times as fast as a cast."""
    pairs = codes.contiguous().view(torch.uint16).flatten().int()
    return _pair_table(codes.device).index_select(0, pairs).view(torch.bfloat16)


@memoize
def _pair_table(device: torch.device) -> torch.Tensor:
    """int32 ``(65536,)``: for two e4m3 codes, read as one uint16, their two bf16 values."""
    codes = torch.arange(1 << 16, dtype=torch.int32, device=device).to(torch.uint16).view(torch.uint8)
    return codes.view(torch.float8_e4m3fn).to(torch.bfloat16).view(torch.int32)


@memoize
def _exponent_table(device: torch.device) -> torch.Tensor:
    """bf16 ``(256,)``: 2**(byte - 127), the subnormal 2**-127 for 0 and NaN for 255."""
    exponents = torch.arange(256, dtype=torch.float64, device=device) - 127
    table = torch.exp2(exponents).to(torch.bfloat16)
    table[255] = torch.nan
    return table
