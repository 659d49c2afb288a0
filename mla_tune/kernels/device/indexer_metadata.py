# mypy: disable-error-code="import-untyped,untyped-decorator"
"""Triton kernel: the schedule of the paged indexer kernel, for any number of rows in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mla_tune.kernels.launch import MetadataConfig


@triton.jit(do_not_specialize=["num_rows", "num_sms"])
def _metadata(
    context_lens_ptr: tl.tensor,
    out_ptr: tl.tensor,
    num_rows: tl.tensor,
    num_sms: tl.tensor,
    SPLIT: tl.constexpr,  # noqa: N803
    TILES: tl.constexpr,  # noqa: N803
    COLUMNS: tl.constexpr,  # noqa: N803
) -> None:
    # Pass 1, over all rows: splits of each tile (a run of consecutive rows), summed in registers, reduced once.
    tile_rows = tl.cdiv(num_rows, TILES * COLUMNS) * COLUMNS
    tile = tl.arange(0, TILES)
    column = tl.arange(0, COLUMNS)
    sums = tl.zeros((TILES, COLUMNS), tl.int64)
    for start in range(0, tile_rows, COLUMNS):
        row = tile[:, None].to(tl.int64) * tile_rows + (start + column)[None, :]
        sums += (tl.load(context_lens_ptr + row, mask=row < num_rows, other=0) + (SPLIT - 1)) // SPLIT
    tile_sums = tl.sum(sums, axis=1)
    tile_ends = tl.cumsum(tile_sums, axis=0)
    total = tl.sum(tile_sums, axis=0)

    sm = tl.program_id(0)
    share = total // num_sms
    first = sm * share + tl.minimum(sm, total - share * num_sms)

    # Pass 2, within the tile that holds split number `first`: rows that end at or before it.
    before = tile_ends <= first
    row_base = tl.minimum(tl.sum(before.to(tl.int64), axis=0) * tile_rows, num_rows)
    done = tl.sum(tl.where(before, tile_sums, 0), axis=0)
    lane = tl.arange(0, TILES)
    row_index = row_base
    splits_before = done
    for start in range(0, tile_rows, TILES):
        row = row_base + start + lane
        mask = (start + lane < tile_rows) & (row < num_rows)
        splits = ((tl.load(context_lens_ptr + row, mask=mask, other=0) + (SPLIT - 1)) // SPLIT).to(tl.int64)
        passed = mask & (done + tl.cumsum(splits, axis=0) <= first)
        row_index += tl.sum(passed.to(tl.int64), axis=0)
        splits_before += tl.sum(tl.where(passed, splits, 0), axis=0)
        done += tl.sum(splits, axis=0)
    tl.store(out_ptr + 2 * sm, row_index.to(tl.int32))
    tl.store(out_ptr + 2 * sm + 1, (first - splits_before).to(tl.int32))


def launch(context_lens: torch.Tensor, num_sms: int, out: torch.Tensor, split: int, config: MetadataConfig) -> None:
    """One launch of ``num_sms + 1`` programs, each of which computes its own entry of ``out``."""
    _metadata[(num_sms + 1,)](
        context_lens,
        out,
        context_lens.numel(),
        num_sms,
        SPLIT=split,
        TILES=config.tiles,
        COLUMNS=config.columns,
        num_warps=config.num_warps,
    )
