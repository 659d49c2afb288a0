# mypy: disable-error-code="import-untyped,untyped-decorator"
"""Device functions on cache rows: which request and slot a row has, and FP8 to bf16. Kernels are built from them.

Bytes of one row: V4 reads 584 (448 values, 7 of 8 scale bytes in one sector, 128 rotary) and writes 1024; DSA reads 656
and writes 1152. All of them but the scales are read and written 16 bytes a thread, since every row starts at a multiple
of 16 bytes (576 and 656 are). There is one multiplication a value, so memory bandwidth is the bound: at 4.2 TB/s 0.38 ns
a V4 row and 0.43 ns a DSA row.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import triton
import triton.language as tl

from mla_tune.kernels.formats import ROPE_DIM, KVFormat


@dataclass(frozen=True, slots=True)
class Layout:
    """What a kernel must know of a cache at compile time; the constants of :func:`dequantize_rows` by position."""

    page_size: int
    page_bytes: int
    data_stride: int
    rope_offset: int
    scale_base: int
    scale_stride: int
    exponent_scales: bool
    num_groups: int
    num_groups_padded: int
    group_size: int

    @classmethod
    def of(cls, fmt: KVFormat, page_size: int) -> Layout:
        """Layout of a cache format with pages of ``page_size`` rows."""
        return cls(
            page_size=page_size,
            page_bytes=fmt.page_bytes(page_size),
            data_stride=fmt.data_stride,
            rope_offset=fmt.rope_offset,
            scale_base=fmt.scale_base(page_size),
            scale_stride=fmt.scale_stride,
            exponent_scales=fmt.exponent_scales,
            num_groups=fmt.num_groups,
            num_groups_padded=triton.next_power_of_2(fmt.num_groups),
            group_size=fmt.group_size,
        )

    def constants(self, prefix: str = "") -> dict[str, int]:
        """Keyword arguments of a kernel, as ``PAGE_SIZE`` or ``<prefix>PAGE_SIZE``."""
        return {f"{prefix}{name.upper()}": getattr(self, name) for name in self.__slots__} | {f"{prefix}ROPE": ROPE_DIM}


@cache
def layout_of(fmt: KVFormat, page_size: int) -> Layout:
    """:meth:`Layout.of`, made once."""
    return Layout.of(fmt, page_size)


@cache
def constants_of(fmt: KVFormat, page_size: int) -> dict[str, int]:
    """:meth:`Layout.constants` without a prefix, made once, since a launch has no time for it; not to be changed."""
    return layout_of(fmt, page_size).constants()


@triton.jit
def dequantize_rows(
    cache_ptr: tl.tensor,
    slot: tl.tensor,  # (ROWS,) int64, -1 for zeros
    out_ptr: tl.tensor,
    row: tl.tensor,  # (ROWS,) int64, row of the output
    in_range: tl.tensor,
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
    LOADS: tl.constexpr,  # noqa: N803
    STORES: tl.constexpr,  # noqa: N803
) -> None:
    """Write the cache rows ``slot`` to the output rows ``row``; ``LOADS`` and ``STORES`` are eviction policies."""
    present = slot >= 0
    page = slot // PAGE_SIZE
    offset = slot - page * PAGE_SIZE
    data = page * PAGE_BYTES + offset * DATA_STRIDE
    out_row = row * (NUM_GROUPS * GROUP_SIZE + ROPE)

    group = tl.arange(0, NUM_GROUPS_PADDED)
    is_group = (group < NUM_GROUPS)[None, :]
    column = group[None, :, None] * GROUP_SIZE + tl.arange(0, GROUP_SIZE)[None, None, :]
    code_mask = present[:, None, None] & is_group[:, :, None]
    code_at = cache_ptr + data[:, None, None] + column
    code = tl.load(code_at, mask=code_mask, other=0, eviction_policy=LOADS)
    # The rotary part is bf16 already: copied as bits. Loaded before anything is computed, so that all loads are in flight.
    lane = tl.arange(0, ROPE)[None, :]
    rope_ptr = (cache_ptr + (data + ROPE_OFFSET)[:, None]).to(tl.pointer_type(tl.int16)) + lane
    rope = tl.load(rope_ptr, mask=present[:, None], other=0, eviction_policy=LOADS)

    scale_at = cache_ptr + (page * PAGE_BYTES + offset * SCALE_STRIDE + SCALE_BASE)[:, None]
    if EXPONENT_SCALES:
        # The exponent's bits are those of a float32; 0 is the subnormal 2**-127, and 255 would be infinity but is NaN.
        exponent = tl.load(scale_at + group[None, :], mask=present[:, None] & is_group, other=127).to(tl.int32)
        bits = tl.where(exponent == 0, 0x00400000, tl.where(exponent == 255, 0x7FC00000, exponent << 23))
        scale = bits.to(tl.float32, bitcast=True)
    else:
        scale_ptr = scale_at.to(tl.pointer_type(tl.float32))
        scale = tl.load(scale_ptr + group[None, :], mask=present[:, None] & is_group, other=1.0)

    value = code.to(tl.float8e4nv, bitcast=True).to(tl.float32) * scale[:, :, None]
    store_mask = in_range[:, None, None] & is_group[:, :, None]
    out_at = out_ptr + out_row[:, None, None] + column
    tl.store(out_at, value.to(tl.bfloat16), mask=store_mask, eviction_policy=STORES)
    out_rope_ptr = (out_ptr + (out_row + NUM_GROUPS * GROUP_SIZE)[:, None]).to(tl.pointer_type(tl.int16)) + lane
    tl.store(out_rope_ptr, rope, mask=in_range[:, None], eviction_policy=STORES)


@triton.jit
def requests_of(cu_rows_ptr: tl.tensor, row: tl.tensor, num_reqs: tl.tensor, REQUESTS: tl.constexpr) -> tl.tensor:  # noqa: N803
    """The request of every ``row``: how many requests end at or before it. All ends of a step are loaded at once."""
    request = tl.zeros(row.shape, tl.int32)
    for first in range(0, num_reqs, REQUESTS):
        index = first + tl.arange(0, REQUESTS)
        end = tl.load(cu_rows_ptr + 1 + index, mask=index < num_reqs, other=0).to(tl.int64)
        ended = (end[None, :] <= row[:, None]) & (index < num_reqs)[None, :]
        request += tl.sum(ended.to(tl.int32), axis=1)
    return request


@triton.jit
def slots_of(
    page_table_ptr: tl.tensor,
    page_table_stride: tl.tensor,
    lens_ptr: tl.tensor,
    cu_rows_ptr: tl.tensor,
    row: tl.tensor,  # (ROWS,) int64
    request: tl.tensor,  # (ROWS,) int32
    known: tl.tensor,
    PAGE_SIZE: tl.constexpr,  # noqa: N803
    FROM_END: tl.constexpr,  # noqa: N803
) -> tl.tensor:
    """Cache slot of every row as int64, -1 where its request has no such position."""
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
    return tl.where(exists, page * PAGE_SIZE + (position - page_index * PAGE_SIZE), -1)
