"""The indexer's schedule: how the paged logits kernel shares the contexts of all rows out to the SMs.

Every context is cut into splits of 256 tokens; the splits of all rows, in order, are dealt to the SMs in runs of equal
length, the remainder one each to the first SMs. Entry ``s`` is where the run of SM ``s`` starts: a row, and a split
within it. Equal, entry by entry, to DeepGEMM 0.1.2's ``get_paged_mqa_logits_metadata`` for one query token a row.
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

    An SM without work, and the last entry, start at ``(rows, 0)``. ``block_kv`` (32 or 64 tokens a page) is only
    checked: a split is a whole number of either. One launch, and one compiled kernel for any number of rows above 256: each
    program reads all ``4 * rows`` bytes (from the L2 but for the first; 2 MB in all for 32768 rows and 132 SMs, with 8
    entries a program), finds its entries, and writes 8 bytes for each. Latency is the bound: the launch, one round of loads
    up to 32768 rows, a scan. Raises :class:`UsageError`.
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
    share, remainder = divmod(ends[-1] if ends else 0, num_sms)
    entries = []
    for sm in range(num_sms + 1):
        first = sm * share + min(sm, remainder)
        row = bisect_right(ends, first)
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
    first = sm * (total // num_sms) + torch.minimum(sm, total % num_sms)
    row = torch.searchsorted(ends, first, right=True)
    return torch.stack((row, first - bounds[row]), dim=1)


def shares(context_lens: torch.Tensor, schedule: torch.Tensor) -> torch.Tensor:
    """What two schedules of ``context_lens`` agree in, whichever SMs get the splits that are left over.

    int64 (num_sms + 1,): the first split, then how many splits each SM gets, ascending; all -1 where an entry names a row
    or split that there is not. DeepGEMM's kernel and ours give what is left over to the first SMs, SGLang 0.5.23's to the
    last.
    """
    splits = (context_lens.flatten().long() + (SPLIT_TOKENS - 1)) // SPLIT_TOKENS
    row, split = schedule[:, 0].long(), schedule[:, 1].long()
    of_row = torch.nn.functional.pad(splits, (0, 1))  # no split follows the last row
    if not bool(((row >= 0) & (row <= splits.numel())).all()) or not bool(
        ((split >= 0) & (split <= of_row[row])).all()
    ):
        return torch.full_like(row, -1)
    starts = torch.nn.functional.pad(splits.cumsum(0), (1, 0))[row] + split
    return torch.cat((starts[:1], starts.diff().sort().values))
