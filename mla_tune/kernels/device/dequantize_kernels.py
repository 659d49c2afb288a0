# mypy: disable-error-code="import-untyped,untyped-decorator"
"""Triton kernel: gather FP8 rows of a paged cache and write them as bf16 rows."""

from __future__ import annotations

from functools import cache as memoize

import torch
import triton
import triton.language as tl

from mla_tune.kernels.device.cache_rows import constants_of, dequantize_rows
from mla_tune.kernels.device.launcher import Launcher
from mla_tune.kernels.formats import KVFormat
from mla_tune.sites.launch_parameters import DequantizeConfig

_INTERPRETED_SMS = 2
"""Multiprocessors that the interpreter stands in for: a persistent grid then has more blocks than programs."""


@triton.jit(do_not_specialize=["num_rows"])
def _dequantize(
    cache_ptr: tl.tensor,
    slot_ids_ptr: tl.tensor,
    out_ptr: tl.tensor,
    num_rows: tl.tensor,
    count_ptr: tl.tensor,
    PAGE_SIZE: tl.constexpr,  # noqa: N803
    PAGE_BYTES: tl.constexpr,  # noqa: N803
    DATA_STRIDE: tl.constexpr,  # noqa: N803
    ROPE_OFFSET: tl.constexpr,  # noqa: N803
    SCALE_BASE: tl.constexpr,  # noqa: N803
    SCALE_STRIDE: tl.constexpr,  # noqa: N803
    EXPONENT_SCALES: tl.constexpr,  # noqa: N803
    NUM_GROUPS: tl.constexpr,  # noqa: N803
    NUM_GROUPS_PADDED: tl.constexpr,  # noqa: N803
    GROUP_SIZE: tl.constexpr,  # noqa: N803
    ROPE: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr,  # noqa: N803
    LOADS: tl.constexpr,  # noqa: N803
    STORES: tl.constexpr,  # noqa: N803
    COUNTED: tl.constexpr,  # noqa: N803
    PERSISTENT: tl.constexpr,  # noqa: N803
) -> None:
    if COUNTED:
        num_rows = tl.minimum(num_rows, tl.load(count_ptr))
    block = tl.program_id(0)
    if PERSISTENT:
        num_blocks = tl.cdiv(num_rows, ROWS)
        for index in range(block, num_blocks, tl.num_programs(0)):
            row = (index + tl.zeros((ROWS,), tl.int64)) * ROWS + tl.arange(0, ROWS)
            in_range = row < num_rows
            slot = tl.load(slot_ids_ptr + row, mask=in_range, other=-1).to(tl.int64)
            dequantize_rows(
                cache_ptr, slot, out_ptr, row, in_range,
                PAGE_SIZE, PAGE_BYTES, DATA_STRIDE, ROPE_OFFSET, SCALE_BASE, SCALE_STRIDE, EXPONENT_SCALES,
                NUM_GROUPS, NUM_GROUPS_PADDED, GROUP_SIZE, ROPE, LOADS, STORES,
            )  # fmt: skip
    else:
        row = block.to(tl.int64) * ROWS + tl.arange(0, ROWS)
        in_range = row < num_rows
        slot = tl.load(slot_ids_ptr + row, mask=in_range, other=-1).to(tl.int64)
        dequantize_rows(
            cache_ptr, slot, out_ptr, row, in_range,
            PAGE_SIZE, PAGE_BYTES, DATA_STRIDE, ROPE_OFFSET, SCALE_BASE, SCALE_STRIDE, EXPONENT_SCALES,
            NUM_GROUPS, NUM_GROUPS_PADDED, GROUP_SIZE, ROPE, LOADS, STORES,
        )  # fmt: skip


_launch = Launcher(_dequantize)


def launch(
    cache: torch.Tensor,
    slot_ids: torch.Tensor,
    out: torch.Tensor,
    fmt: KVFormat,
    page_size: int,
    config: DequantizeConfig,
    count: torch.Tensor | None = None,
) -> None:
    """One launch; arguments as of :func:`mla_tune.kernels.dequantize.dequantize_k_cache_paged`, checked there."""
    num_rows = slot_ids.shape[0]
    programs = -(-num_rows // config.rows_per_program)
    # With the number of rows on the device the host would launch a program for each row that there could be.
    per_sm = config.programs_per_sm or (_COUNTED_PROGRAMS_PER_SM if count is not None else 0)
    if per_sm:
        programs = min(programs, per_sm * multiprocessors(out.device))
    _launch(
        (programs,),
        (cache, slot_ids, out, num_rows, count),
        constants_of(fmt, page_size)
        | {
            "ROWS": config.rows_per_program,
            "LOADS": "evict_first" if config.stream_loads else "",
            "STORES": "evict_first" if config.stream_stores else "",
            "COUNTED": count is not None,
            "PERSISTENT": per_sm > 0,
        },
        config.num_warps,
    )


_COUNTED_PROGRAMS_PER_SM = 32
"""As many blocks as an SM of sm90 or sm100 holds at once."""


@memoize
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU; a small stand-in where the interpreter runs."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else _INTERPRETED_SMS
