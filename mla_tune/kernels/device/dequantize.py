# mypy: disable-error-code="import-untyped,untyped-decorator"
"""Triton kernel: gather FP8 rows of a paged cache and write them as bf16 rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mla_tune.kernels.formats import ROPE_DIM, KVFormat
from mla_tune.kernels.launch import DequantizeConfig


@triton.jit(do_not_specialize=["num_rows"])
def _dequantize(
    cache_ptr: tl.tensor,
    slot_ids_ptr: tl.tensor,
    out_ptr: tl.tensor,
    num_rows: tl.tensor,
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
) -> None:
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    in_range = row < num_rows
    slot = tl.load(slot_ids_ptr + row, mask=in_range, other=-1).to(tl.int64)
    present = slot >= 0
    page = slot // PAGE_SIZE
    offset = slot - page * PAGE_SIZE
    data = page * PAGE_BYTES + offset * DATA_STRIDE
    out_row = row * (NUM_GROUPS * GROUP_SIZE + ROPE)

    group = tl.arange(0, NUM_GROUPS_PADDED)
    is_group = (group < NUM_GROUPS)[None, :]
    scale_at = cache_ptr + (page * PAGE_BYTES + offset * SCALE_STRIDE + SCALE_BASE)[:, None]
    if EXPONENT_SCALES:
        # The exponent's bits are those of a float32; 0 is the subnormal 2**-127, and 255 would be infinity but is NaN.
        exponent = tl.load(scale_at + group[None, :], mask=present[:, None] & is_group, other=127).to(tl.int32)
        bits = tl.where(exponent == 0, 0x00400000, tl.where(exponent == 255, 0x7FC00000, exponent << 23))
        scale = bits.to(tl.float32, bitcast=True)
    else:
        scale_ptr = scale_at.to(tl.pointer_type(tl.float32))
        scale = tl.load(scale_ptr + group[None, :], mask=present[:, None] & is_group, other=1.0)

    column = group[None, :, None] * GROUP_SIZE + tl.arange(0, GROUP_SIZE)[None, None, :]
    code_mask = present[:, None, None] & is_group[:, :, None]
    code = tl.load(cache_ptr + data[:, None, None] + column, mask=code_mask, other=0)
    value = code.to(tl.float8e4nv, bitcast=True).to(tl.float32) * scale[:, :, None]
    store_mask = in_range[:, None, None] & is_group[:, :, None]
    tl.store(out_ptr + out_row[:, None, None] + column, value.to(tl.bfloat16), mask=store_mask)

    # The rotary part is bf16 already: copied as bits.
    lane = tl.arange(0, ROPE)[None, :]
    rope_ptr = (cache_ptr + (data + ROPE_OFFSET)[:, None]).to(tl.pointer_type(tl.int16)) + lane
    rope = tl.load(rope_ptr, mask=present[:, None], other=0)
    out_rope_ptr = (out_ptr + (out_row + NUM_GROUPS * GROUP_SIZE)[:, None]).to(tl.pointer_type(tl.int16)) + lane
    tl.store(out_rope_ptr, rope, mask=in_range[:, None])


def launch(
    cache: torch.Tensor,
    slot_ids: torch.Tensor,
    out: torch.Tensor,
    fmt: KVFormat,
    page_size: int,
    config: DequantizeConfig,
) -> None:
    """One launch; arguments as of :func:`mla_tune.kernels.dequantize.dequantize_k_cache_paged`, checked there."""
    num_rows = slot_ids.shape[0]
    _dequantize[(triton.cdiv(num_rows, config.rows_per_program),)](
        cache,
        slot_ids,
        out,
        num_rows,
        PAGE_SIZE=page_size,
        PAGE_BYTES=fmt.page_bytes(page_size),
        DATA_STRIDE=fmt.data_stride,
        ROPE_OFFSET=fmt.rope_offset,
        SCALE_BASE=fmt.scale_base(page_size),
        SCALE_STRIDE=fmt.scale_stride,
        EXPONENT_SCALES=fmt.exponent_scales,
        NUM_GROUPS=fmt.num_groups,
        NUM_GROUPS_PADDED=triton.next_power_of_2(fmt.num_groups),
        GROUP_SIZE=fmt.group_size,
        ROPE=ROPE_DIM,
        ROWS=config.rows_per_program,
        num_warps=config.num_warps,
    )
