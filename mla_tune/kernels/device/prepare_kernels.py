# mypy: disable-error-code="import-untyped,untyped-decorator"
"""Triton kernel: everything that a layer prepares for sparse prefill, in one launch.

The program ids are split into ranges: blocks of compressed rows, blocks of window rows, tiles of indices. No job reads
what another one writes, so their order does not matter. Slots are looked up in the page tables on the way, which costs a
row one more load from the L2 and saves writing and reading its slot (8 bytes), and the launches that made the slots.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mla_tune.kernels.device.cache_rows import constants_of, dequantize_rows, layout_of, requests_of, slots_of
from mla_tune.kernels.device.combine_kernels import combine_tokens
from mla_tune.kernels.device.launcher import BoundLaunch, Launcher
from mla_tune.kernels.prepare_jobs import IndexJob, RowsJob
from mla_tune.sites.launch_parameters import PrepareConfig

_REQUESTS = 64
"""Requests whose ends are loaded at once: as many as a batch usually has, in one 512-byte load."""


@triton.jit
def _gather(
    cache_ptr: tl.tensor,
    page_table_ptr: tl.tensor,
    page_table_stride: tl.tensor,
    lens_ptr: tl.tensor,
    cu_rows_ptr: tl.tensor,
    out_ptr: tl.tensor,
    num_rows: tl.tensor,
    num_reqs: tl.tensor,
    block: tl.tensor,
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
    FROM_END: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr,  # noqa: N803
    REQUESTS: tl.constexpr,  # noqa: N803
) -> None:
    row = block.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    in_range = row < num_rows
    request = requests_of(cu_rows_ptr, row, num_reqs, REQUESTS)
    known = in_range & (request < num_reqs)
    slot = slots_of(page_table_ptr, page_table_stride, lens_ptr, cu_rows_ptr, row, request, known, PAGE_SIZE, FROM_END)
    dequantize_rows(
        cache_ptr, slot, out_ptr, row, in_range,
        PAGE_SIZE, PAGE_BYTES, DATA_STRIDE, ROPE_OFFSET, SCALE_BASE, SCALE_STRIDE, EXPONENT_SCALES,
        NUM_GROUPS, NUM_GROUPS_PADDED, GROUP_SIZE, ROPE, "", "",
    )  # fmt: skip


@triton.jit(
    do_not_specialize=["num_rows", "window_rows", "num_reqs", "num_tokens", "page_stride", "window_page_stride"]
)
def _prepare(
    cache_ptr: tl.tensor,
    page_table_ptr: tl.tensor,
    page_stride: tl.tensor,
    lens_ptr: tl.tensor,
    cu_rows_ptr: tl.tensor,
    out_ptr: tl.tensor,
    num_rows: tl.tensor,
    window_cache_ptr: tl.tensor,
    window_page_table_ptr: tl.tensor,
    window_page_stride: tl.tensor,
    window_lens_ptr: tl.tensor,
    window_cu_rows_ptr: tl.tensor,
    window_out_ptr: tl.tensor,
    window_rows: tl.tensor,
    num_reqs: tl.tensor,
    topk_indices_ptr: tl.tensor,
    topk_stride: tl.tensor,
    positions_ptr: tl.tensor,
    token_to_req_ptr: tl.tensor,
    compressed_base_ptr: tl.tensor,
    window_base_ptr: tl.tensor,
    window_start_ptr: tl.tensor,
    indices_ptr: tl.tensor,
    lengths_ptr: tl.tensor,
    num_tokens: tl.tensor,
    width: tl.tensor,
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
    WINDOW_PAGE_SIZE: tl.constexpr,  # noqa: N803
    WINDOW_PAGE_BYTES: tl.constexpr,  # noqa: N803
    WINDOW_SCALE_BASE: tl.constexpr,  # noqa: N803
    COMPRESSED: tl.constexpr,  # noqa: N803
    RATIO: tl.constexpr,  # noqa: N803
    TOPK: tl.constexpr,  # noqa: N803
    WINDOW: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr,  # noqa: N803
    TOKENS: tl.constexpr,  # noqa: N803
    COLUMNS: tl.constexpr,  # noqa: N803
    REQUESTS: tl.constexpr,  # noqa: N803
) -> None:
    block = tl.program_id(0)
    compressed_blocks = tl.cdiv(num_rows, ROWS) if COMPRESSED else 0
    window_blocks = tl.cdiv(window_rows, ROWS) if WINDOW else 0
    if block < compressed_blocks:
        if COMPRESSED:
            _gather(
                cache_ptr, page_table_ptr, page_stride, lens_ptr, cu_rows_ptr, out_ptr, num_rows, num_reqs, block,
                PAGE_SIZE, PAGE_BYTES, DATA_STRIDE, ROPE_OFFSET, SCALE_BASE, SCALE_STRIDE, EXPONENT_SCALES,
                NUM_GROUPS, NUM_GROUPS_PADDED, GROUP_SIZE, ROPE, False, ROWS, REQUESTS,
            )  # fmt: skip
    elif block < compressed_blocks + window_blocks:
        if WINDOW:
            _gather(
                window_cache_ptr, window_page_table_ptr, window_page_stride, window_lens_ptr, window_cu_rows_ptr,
                window_out_ptr, window_rows, num_reqs, block - compressed_blocks,
                WINDOW_PAGE_SIZE, WINDOW_PAGE_BYTES, DATA_STRIDE, ROPE_OFFSET, WINDOW_SCALE_BASE, SCALE_STRIDE,
                EXPONENT_SCALES, NUM_GROUPS, NUM_GROUPS_PADDED, GROUP_SIZE, ROPE, True, ROWS, REQUESTS,
            )  # fmt: skip
    elif TOPK > 0:
        tile = block - compressed_blocks - window_blocks
        steps = tl.cdiv(width, COLUMNS)
        combine_tokens(
            topk_indices_ptr, topk_stride, positions_ptr, token_to_req_ptr,
            compressed_base_ptr, window_base_ptr, window_start_ptr, topk_indices_ptr, indices_ptr, lengths_ptr,
            num_tokens, width, tile // steps, tile % steps, steps,
            RATIO, TOPK, WINDOW, False, TOKENS, COLUMNS,
        )  # fmt: skip


_launcher = Launcher(_prepare)


CACHE, WINDOW_CACHE, TOPK_INDICES = 0, 7, 15
"""Positions of the arguments that every layer has its own of."""


def bind(
    compressed: RowsJob | None, window: RowsJob | None, indices: IndexJob | None, config: PrepareConfig
) -> BoundLaunch | None:
    """One launch; arguments as of :class:`mla_tune.kernels.prepare.Preparation`, checked there. None: nothing to do."""
    first, last = compressed or window, window or compressed
    if first is None or last is None:
        return None
    rows = config.rows_per_program
    programs = -(-first.out.shape[0] // rows)
    if last is not first:
        programs += -(-last.out.shape[0] // rows)
    if indices is not None:
        tokens, width = indices.out.shape
        programs += -(-tokens // config.tokens_per_program) * -(-width // config.columns_per_program)
    if programs == 0:
        return None
    window_layout = layout_of(last.fmt, last.page_size)
    return _launcher.bind(
        (programs,),
        (*_row_arguments(compressed), *_row_arguments(window), first.lens.shape[0], *_index_arguments(indices)),
        constants_of(first.fmt, first.page_size)
        | {
            "WINDOW_PAGE_SIZE": window_layout.page_size,
            "WINDOW_PAGE_BYTES": window_layout.page_bytes,
            "WINDOW_SCALE_BASE": window_layout.scale_base,
            "COMPRESSED": compressed is not None,
            "RATIO": indices.ratio if indices else 0,
            "TOPK": indices.topk if indices else 0,
            "WINDOW": indices.window if indices else int(window is not None),
            "ROWS": config.rows_per_program,
            "TOKENS": config.tokens_per_program,
            "COLUMNS": config.columns_per_program,
            "REQUESTS": _REQUESTS,
        },
        config.num_warps,
    )


def _row_arguments(job: RowsJob | None) -> tuple[torch.Tensor | int | None, ...]:
    if job is None:
        return (None, None, 0, None, None, None, 0)
    table = job.page_table
    return (job.cache, table, table.stride(0), job.lens, job.cu_rows, job.out, job.out.shape[0])


def _index_arguments(job: IndexJob | None) -> tuple[torch.Tensor | int | None, ...]:
    if job is None:
        return (None, 0, None, None, None, None, None, None, None, 0, 0)
    return (
        job.topk_indices,
        job.topk_indices.stride(0),
        job.positions,
        job.token_to_req,
        job.compressed_base,
        job.window_base,
        job.window_start,
        job.out,
        job.out_lengths,
        job.out.shape[0],
        job.out.shape[1],
    )
