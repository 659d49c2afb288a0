# mypy: disable-error-code="import-untyped,untyped-decorator"
"""Triton kernels: the schedule of the paged indexer kernel, for any number of rows in one launch.

A program computes a few entries and reads all rows for them: 4 bytes a row. A grid-wide scan would read them once, at the
price of a grid-wide wait; one program for each entry reads 17 MB from the L2 for 32768 rows and 132 SMs, and has one
program more than there are SMs. With 8 entries a program it is 2 MB, and 1.2 us for each program at 64 bytes a clock of
1.75 GHz. What bounds the time then is latency: rounds of loads that wait for
each other, and, with a cold L2, the kernel's own instructions. So up to :data:`SMALL_ROWS` rows go to a kernel of one
round and one warp with a fifth of the code, and the other one reads as many rows in a round as its registers hold.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mla_tune.kernels.device.launcher import Launcher
from mla_tune.sites.launch_parameters import MetadataConfig

SMALL_ROWS = 256
"""Most rows of the small kernel, which is compiled for half of them too. Contexts of less than 2**31 tokens, 256 of them,
have at most 2**31 splits, which fit 32 bits."""


@triton.jit(do_not_specialize=["num_rows", "num_sms"])
def _metadata_small(
    context_lens_ptr: tl.tensor,
    out_ptr: tl.tensor,
    num_rows: tl.tensor,
    num_sms: tl.tensor,
    SPLIT: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr,  # noqa: N803
) -> None:
    row = tl.arange(0, ROWS)
    lens = tl.load(context_lens_ptr + row, mask=row < num_rows, other=0).to(tl.uint32)
    splits = (lens + (SPLIT - 1)) // SPLIT
    total = tl.sum(splits, axis=0)
    ends = tl.cumsum(splits, axis=0)
    sm = tl.program_id(0).to(tl.uint32)
    sms = num_sms.to(tl.uint32)
    share = total // sms
    short = sms - (total - share * sms)  # SMs that get no more than the share: the first ones
    first = sm * share + tl.where(sm > short, sm - short, 0)
    before = (ends <= first) & (row < num_rows) & (total > 0)
    tl.store(out_ptr + 2 * sm, tl.sum(before.to(tl.int32), axis=0))
    tl.store(out_ptr + 2 * sm + 1, (first - tl.max(tl.where(before, ends, 0), axis=0)).to(tl.int32))


@triton.jit(do_not_specialize=["num_rows", "num_sms"])
def _metadata(
    context_lens_ptr: tl.tensor,
    out_ptr: tl.tensor,
    num_rows: tl.tensor,
    num_sms: tl.tensor,
    SPLIT: tl.constexpr,  # noqa: N803
    TILES: tl.constexpr,  # noqa: N803
    COLUMNS: tl.constexpr,  # noqa: N803
    ENTRIES: tl.constexpr,  # noqa: N803
) -> None:
    # Pass 1, over all rows: splits of each tile (a run of consecutive rows). COLUMNS * 2**23 splits fit 32 bits, sums over
    # the rounds may not. The last rows behind a multiple of 4 are left to pass 2: the others can then be loaded 16 bytes
    # at a time under their mask.
    whole_rows = num_rows // 4 * 4
    tile_rows = tl.cdiv(num_rows, TILES * COLUMNS) * COLUMNS
    tile = tl.arange(0, TILES)
    column = tl.arange(0, COLUMNS)
    tile_sums = tl.zeros((TILES,), tl.int64)
    for start in range(0, tile_rows, COLUMNS):
        row = tile[:, None] * tile_rows + (start + column)[None, :]
        lens = tl.load(context_lens_ptr + row, mask=row < whole_rows, other=0).to(tl.uint32)
        tile_sums += tl.sum((lens + (SPLIT - 1)) // SPLIT, axis=1).to(tl.int64)
    tile_ends = tl.cumsum(tile_sums, axis=0)
    rest_row = whole_rows + tl.arange(0, 4)
    rest = tl.load(context_lens_ptr + rest_row, mask=rest_row < num_rows, other=0).to(tl.uint32)
    total = tl.sum(tile_sums, axis=0) + tl.sum(((rest + (SPLIT - 1)) // SPLIT).to(tl.int64), axis=0)

    sm = tl.program_id(0) * ENTRIES + tl.arange(0, ENTRIES)
    share = total // num_sms
    short = num_sms - (total - share * num_sms)  # SMs that get no more than the share: the first ones
    first = sm * share + tl.maximum(sm - short, 0)

    # Pass 2, for each entry from the tile that holds split number `first`: rows that end at or before it. This program has
    # just loaded them, so they come from its L1.
    before = tile_ends[None, :] <= first[:, None]
    row_base = tl.minimum(tl.sum(before.to(tl.int32), axis=1) * tile_rows, whole_rows)
    done = tl.sum(tl.where(before, tile_sums[None, :], 0), axis=1)
    rows_passed = tl.zeros((ENTRIES,), tl.int32)
    reached, splits_passed = done, done
    for start in range(0, tile_rows, COLUMNS):
        row = (row_base + start)[:, None] + column[None, :]
        mask = ((start + column)[None, :] < tile_rows) & (row < num_rows)
        lens = tl.load(context_lens_ptr + row, mask=mask, other=0)
        splits = ((lens.to(tl.uint32) + (SPLIT - 1)) // SPLIT).to(tl.int64)
        passed = mask & (reached[:, None] + tl.cumsum(splits, axis=1) <= first[:, None])
        rows_passed += tl.sum(passed.to(tl.int32), axis=1)
        splits_passed += tl.sum(tl.where(passed, splits, 0), axis=1)
        reached += tl.sum(splits, axis=1)
    known = sm <= num_sms
    tl.store(out_ptr + 2 * sm, tl.where(total > 0, row_base + rows_passed, 0), mask=known)
    tl.store(out_ptr + 2 * sm + 1, (first - splits_passed).to(tl.int32), mask=known)


_launch_small, _launch = Launcher(_metadata_small), Launcher(_metadata)


def launch(context_lens: torch.Tensor, num_sms: int, out: torch.Tensor, split: int, config: MetadataConfig) -> None:
    """One launch for all ``num_sms + 1`` entries of ``out``."""
    num_rows = context_lens.numel()
    arguments = (context_lens, out, num_rows, num_sms)
    if num_rows <= SMALL_ROWS:
        rows = SMALL_ROWS if num_rows > SMALL_ROWS // 2 else SMALL_ROWS // 2
        _launch_small((num_sms + 1,), arguments, {"SPLIT": split, "ROWS": rows}, num_warps=1)
        return
    entries = config.entries_per_program
    constants = {"SPLIT": split, "TILES": config.tiles, "COLUMNS": config.columns, "ENTRIES": entries}
    _launch((-(-(num_sms + 1) // entries),), arguments, constants, config.num_warps)
