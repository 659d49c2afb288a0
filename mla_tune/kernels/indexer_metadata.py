"""The indexer's schedule: how the paged logits kernel shares the contexts of all rows out to the SMs.

Every context is cut into splits of 256 tokens. The splits of all rows, in order, are dealt to the SMs in runs of equal
length; the last SMs take one of the remainder each. Entry ``s`` is where the run of SM ``s`` starts: a row, and a split
within it. SGLang 0.5.23's kernel deals them alike.

Which SMs take the remainder depends on DeepGEMM's release and on the architecture, so two right schedules may differ:

=====================  ===========  ============================
sgl-deep-gemm          SM90         SM100
=====================  ===========  ============================
0.1.2, 0.1.3           first SMs    first SMs
0.1.5.post3            last SMs     first SMs
0.2.3.post2            last SMs     first SMs
0.2.5                  last SMs     by cost, needs ``indices``
=====================  ===========  ============================

From 0.1.5 on, the SM90 kernel that reads the schedule loads the context length of an SM's first row even if that SM has
no work. Where there are fewer splits than SMs, the last SMs therefore take them: an SM without work then starts at a row
that exists. Dealt to the first SMs, it would start behind the last row, and the kernel would read past ``context_lens``.
"""

from __future__ import annotations

from bisect import bisect_right
from itertools import accumulate

import torch

from mla_tune.errors import UsageError
from mla_tune.kernels.backend import Backend, choose_backend
from mla_tune.sites.launch_parameters import DEFAULT_LAUNCHES, MetadataConfig

SPLIT_TOKENS = 256
"""Context tokens of one split, fixed in DeepGEMM."""
BLOCK_KV = 64
"""Rows per page of the indexer's key cache in both engines."""
_BLOCK_SIZES = (32, 64)


def paged_mqa_logits_metadata(
    context_lens: torch.Tensor,
    block_kv: int,
    num_sms: int,
    out: torch.Tensor | None = None,
    config: MetadataConfig | None = None,
    backend: Backend | None = None,
) -> torch.Tensor:
    """Schedule of ``context_lens`` int32 ``(rows,)`` or ``(rows, 1)``: int32 ``(num_sms + 1, 2)``, written to ``out``.

    The last entry is ``(rows, 0)``, and no other: an SM without work starts where the SM behind it does. Without any split
    every entry is ``(0, 0)``. ``block_kv`` (32 or 64 tokens a page) is only checked: a split is a whole number of either.

    One launch, and one compiled kernel for any number of rows above 256. Each program reads all ``4 * rows`` bytes, from
    the L2 but for the first (2 MB in all for 32768 rows and 132 SMs, with 8 entries a program), finds its entries, and
    writes 8 bytes for each. Latency is the bound: the launch, one round of loads up to 32768 rows, a scan. Raises
    :class:`UsageError`.
    """
    out = _checked_out(context_lens, block_kv, num_sms, out)
    if choose_backend(context_lens, backend) is Backend.TORCH:
        out.copy_(_metadata_torch(context_lens.flatten(), num_sms))
        return out
    from mla_tune.kernels.device import schedule_kernels as device

    device.launch(context_lens, num_sms, out, SPLIT_TOKENS, config or DEFAULT_LAUNCHES.metadata(context_lens.numel()))
    return out


def paged_mqa_logits_metadata_serial(
    context_lens: torch.Tensor, block_kv: int, num_sms: int, out: torch.Tensor | None = None
) -> torch.Tensor:
    """The same schedule by one prefix sum and a search for each SM in turn: a CPU's counterpart of DeepGEMM's kernel.

    Arguments, result and errors as of :func:`paged_mqa_logits_metadata`; the work is done on the host.
    """
    out = _checked_out(context_lens, block_kv, num_sms, out)
    ends = list(accumulate(-(-length // SPLIT_TOKENS) for length in context_lens.flatten().tolist()))
    total = ends[-1] if ends else 0
    share, remainder = divmod(total, num_sms)
    entries = []
    for sm in range(num_sms + 1):
        first = sm * share + max(0, sm - (num_sms - remainder))
        row = bisect_right(ends, first) if total else 0
        entries.append((row, first - (ends[row - 1] if row else 0)))
    out.copy_(torch.tensor(entries, dtype=torch.int32))
    return out


def _checked_out(context_lens: torch.Tensor, block_kv: int, num_sms: int, out: torch.Tensor | None) -> torch.Tensor:
    """``out``, or a new tensor for it, once all arguments are found to be right."""
    if block_kv not in _BLOCK_SIZES:
        raise UsageError(f"block_kv must be a page size of the indexer cache: got {block_kv}; accepted: 32, 64")
    if num_sms < 1:
        raise UsageError(f"num_sms must be at least 1: got {num_sms}")
    shape = tuple(context_lens.shape)
    if context_lens.dtype is not torch.int32 or shape[1:] not in ((), (1,)) or not context_lens.is_contiguous():
        raise UsageError(
            f"context_lens must be contiguous int32 (rows,) or (rows, 1), one query token a row: "
            f"got {context_lens.dtype} {shape}"
        )
    if out is None:
        return torch.empty((num_sms + 1, 2), dtype=torch.int32, device=context_lens.device)
    if out.shape != (num_sms + 1, 2) or out.dtype is not torch.int32 or not out.is_contiguous():
        raise UsageError(f"out must be contiguous int32 ({num_sms + 1}, 2): got {out.dtype} {tuple(out.shape)}")
    return out


def _metadata_torch(context_lens: torch.Tensor, num_sms: int) -> torch.Tensor:
    ends = ((context_lens.long() + (SPLIT_TOKENS - 1)) // SPLIT_TOKENS).cumsum(
        0
    )  # the longest contexts pass 2**31 here
    bounds = torch.nn.functional.pad(ends, (1, 0))  # bounds[i]: splits of the rows before row i
    total = bounds[-1]
    sm = torch.arange(num_sms + 1, device=context_lens.device)
    first = sm * (total // num_sms) + (sm - (num_sms - total % num_sms)).clamp_min(0)
    row = torch.searchsorted(ends, first, right=True) * (total > 0)
    return torch.stack((row, first - bounds[row]), dim=1)


def shares(context_lens: torch.Tensor, schedule: torch.Tensor) -> torch.Tensor:
    """How many splits of ``context_lens`` each SM gets by ``schedule``, ascending: int64 ``(num_sms,)``.

    Right schedules agree in this, whichever SMs take the remainder. All are -1 where an entry names a row or split that
    does not exist, or where the first SM does not start at the first split.
    """
    splits = (context_lens.flatten().long() + (SPLIT_TOKENS - 1)) // SPLIT_TOKENS
    row, split = schedule[:, 0].long(), schedule[:, 1].long()
    of_row = torch.nn.functional.pad(splits, (0, 1))  # no split follows the last row
    known = (row >= 0) & (row <= splits.numel())
    known &= (split >= 0) & (split <= of_row[row.clamp(0, splits.numel())])
    starts = torch.nn.functional.pad(splits.cumsum(0), (1, 0))[row.clamp(0, splits.numel())] + split
    if not bool(known.all()) or bool(starts[0]):
        return torch.full_like(row[1:], -1)
    return starts.diff().sort().values
