"""Plain references that decide correctness: loops, float32 or Python integers, no shared code with the kernels.

Slow on purpose; nothing here is timed. They take tensors of any device and return new ones on the same device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mla_tune.kernels.formats import ROPE_DIM, KVFormat, PagedSelection
from mla_tune.sites.site import SWA_WINDOW, LayerType

_ROWS_AT_ONCE = 1 << 17


def e4m3_value(code: int) -> float:
    """The number that an e4m3 byte stands for: 1 sign, 4 exponent (bias 7) and 3 mantissa bits; 0x7F is NaN."""
    sign = -1.0 if code & 0x80 else 1.0
    exponent, mantissa = (code >> 3) & 0xF, code & 0x7
    if exponent == 0xF and mantissa == 0x7:
        return float("nan")
    if exponent == 0:
        return float(sign * mantissa * 2.0**-9)
    return float(sign * (8 + mantissa) * 2.0 ** (exponent - 10))


def dequantize_reference(cache: torch.Tensor, slot_ids: torch.Tensor, fmt: KVFormat, page_size: int) -> torch.Tensor:
    """Rows ``slot_ids`` ``(rows,)`` of ``cache`` as bf16 ``(rows, head_dim)``; zeros for a slot of -1."""
    out = torch.zeros((slot_ids.shape[0], fmt.head_dim), dtype=torch.bfloat16, device=cache.device)
    for start in range(0, slot_ids.shape[0], _ROWS_AT_ONCE):
        slots = slot_ids[start : start + _ROWS_AT_ONCE].long()
        present = slots >= 0
        out[start : start + _ROWS_AT_ONCE][present] = _dequantize_slots(cache, slots[present], fmt, page_size)
    return out


def _dequantize_slots(cache: torch.Tensor, slots: torch.Tensor, fmt: KVFormat, page_size: int) -> torch.Tensor:
    values = torch.tensor([e4m3_value(code) for code in range(256)], dtype=torch.float64, device=cache.device)
    powers = [2.0 ** (byte - 127) for byte in range(255)] + [float("nan")]
    exponents = torch.tensor(powers, dtype=torch.float64, device=cache.device)
    page, offset = slots // page_size, slots % page_size
    token = page * cache.shape[1] + offset * fmt.data_stride
    scale_at = page * cache.shape[1] + fmt.scale_base(page_size) + offset * fmt.scale_stride
    flat = cache.flatten()

    def read(start: torch.Tensor, count: int) -> torch.Tensor:
        return flat[start[:, None] + torch.arange(count, device=cache.device)]

    parts = []
    for group in range(fmt.num_groups):
        codes = read(token + group * fmt.group_size, fmt.group_size)
        if fmt.exponent_scales:
            scale = exponents[read(scale_at + group, 1).long()]
        else:
            scale = read(scale_at + 4 * group, 4).view(torch.float32).double()
        # Exact in float64; a float32 product is then rounded to bf16 as every kernel does.
        parts.append((values[codes.long()] * scale).float().bfloat16())
    parts.append(read(token + fmt.rope_offset, 2 * ROPE_DIM).view(torch.bfloat16))
    return torch.cat(parts, dim=1)


def swa_token_ids_reference(
    page_table: torch.Tensor, seq_lens: torch.Tensor, cu_window_rows: torch.Tensor, page_size: int
) -> torch.Tensor:
    """Slots of the last positions of each request, flat: int32 ``(cu_window_rows[-1],)``."""
    table, bounds = page_table.tolist(), cu_window_rows.tolist()
    slots: list[int] = []
    for request, seq in enumerate(seq_lens.tolist()):
        count = bounds[request + 1] - bounds[request]
        positions = range(seq - count, seq)
        slots += [_slot(table[request], position, page_size) if position >= 0 else -1 for position in positions]
    return torch.tensor(slots, dtype=torch.int32, device=page_table.device)


def compressed_row_ids_reference(
    page_table: torch.Tensor, row_counts: torch.Tensor, cu_rows: torch.Tensor, page_size: int
) -> torch.Tensor:
    """Slots of the compressed rows of each request, -1 past its own rows, flat: int32 ``(cu_rows[-1],)``."""
    table, bounds = page_table.tolist(), cu_rows.tolist()
    slots: list[int] = []
    for request, count in enumerate(row_counts.tolist()):
        rows = range(bounds[request + 1] - bounds[request])
        slots += [_slot(table[request], row, page_size) if row < count else -1 for row in rows]
    return torch.tensor(slots, dtype=torch.int32, device=page_table.device)


def _slot(pages: Sequence[int], position: int, page_size: int) -> int:
    return pages[position // page_size] * page_size + position % page_size


def combine_reference(
    topk_indices: torch.Tensor | None,
    positions: torch.Tensor,
    token_to_req: torch.Tensor,
    compressed_base: torch.Tensor,
    window_base: torch.Tensor,
    window_start: torch.Tensor,
    layer: LayerType,
    width: int,
    topk: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices int32 ``(num_qo_tokens, width)`` and lengths int32 ``(num_qo_tokens,)`` of every query, one at a time."""
    compressed, window, start = compressed_base.tolist(), window_base.tolist(), window_start.tolist()
    rows, lengths = [], []
    for token, (position, request) in enumerate(zip(positions.tolist(), token_to_req.tolist(), strict=True)):
        row: list[int] = []
        if topk_indices is not None and topk is not None:
            count = min(topk, (position + 1) // layer.compress_ratio)
            chosen = topk_indices[token, :count].tolist()
            row += [index + compressed[request] if index >= 0 else -1 for index in chosen]
        elif layer is LayerType.C128A:
            row += [compressed[request] + index for index in range((position + 1) // 128)]
        if layer.has_window:
            attended = range(max(0, position - SWA_WINDOW + 1), position + 1)
            row += [window[request] + p - start[request] for p in attended]
        lengths.append(len(row))
        rows.append(row + [-1] * (width - len(row)))
    device = positions.device
    indices = torch.tensor(rows, dtype=torch.int32, device=device).reshape(len(rows), width)
    return indices, torch.tensor(lengths, dtype=torch.int32, device=device)


def metadata_reference(context_lens: torch.Tensor, num_sms: int) -> torch.Tensor:
    """The indexer's schedule, one walk over the rows: int32 ``(num_sms + 1, 2)``."""
    splits = [-(-length // 256) for length in context_lens.flatten().tolist()]
    share, remainder = divmod(sum(splits), num_sms)
    has_work, entries = any(splits), []
    row = passed = 0
    for sm in range(num_sms + 1):
        first = sm * share + max(0, sm + remainder - num_sms)
        while has_work and row < len(splits) and passed + splits[row] <= first:
            passed += splits[row]
            row += 1
        entries.append((row, first - passed))
    return torch.tensor(entries, dtype=torch.int32, device=context_lens.device)


def attention_reference(
    q: torch.Tensor,
    kv: torch.Tensor,
    indices: torch.Tensor,
    lengths: torch.Tensor,
    sm_scale: float,
    attn_sink: torch.Tensor | None = None,
    d_v: int = 512,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sparse attention of each query over rows of ``kv``, in float32, one query at a time.

    ``q`` ``(n, h, d)``, ``kv`` ``(rows, d)``, ``indices`` ``(n, width)`` of which the first ``lengths[t]`` columns count
    and -1 is skipped, ``attn_sink`` float32 ``(h,)``. Returns the output float32 ``(n, h, d_v)`` and the log-sum-exp of
    the scaled logits float32 ``(n, h)``, sink left out. The sink scales the output by exp(lse) / (exp(lse) + exp(sink)).
    A query with nothing to attend to gives zeros and a log-sum-exp of -inf.
    """
    out = torch.zeros((*q.shape[:2], d_v), dtype=torch.float32, device=q.device)
    lse = torch.full(q.shape[:2], -torch.inf, dtype=torch.float32, device=q.device)
    for token, length in enumerate(lengths.tolist()):
        chosen = indices[token, :length].long()
        rows = kv[chosen[chosen >= 0]].float()
        if rows.shape[0] == 0:
            continue
        logits = q[token].float() @ rows.T * sm_scale
        lse[token] = torch.logsumexp(logits, dim=-1)
        out[token] = torch.softmax(logits, dim=-1) @ rows[:, :d_v]
        if attn_sink is not None:
            out[token] *= torch.sigmoid(lse[token] - attn_sink.float())[:, None]
    return out, lse


def paged_attention_reference(
    q: torch.Tensor,
    selections: Sequence[PagedSelection],
    sm_scale: float,
    attn_sink: torch.Tensor | None = None,
    d_v: int = 512,
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`attention_reference` over the union of ``selections``, each from an FP8 cache of its own.

    Only the slots that some query attends to are dequantized.
    """
    rows: list[torch.Tensor] = []
    indices: list[torch.Tensor] = []
    base = 0
    for part in selections:
        columns = torch.arange(part.slot_ids.shape[1], device=q.device)
        slots = part.slot_ids.long().masked_fill(columns >= part.lengths[:, None], -1)
        used, index = torch.unique(slots, return_inverse=True)
        rows.append(dequantize_reference(part.cache, used, part.fmt, part.page_size))
        indices.append(torch.where(slots >= 0, index + base, -1))
        base += used.shape[0]
    index = torch.cat(indices, dim=1)
    lengths = torch.full((q.shape[0],), index.shape[1], device=q.device)
    return attention_reference(q, torch.cat(rows), index, lengths, sm_scale, attn_sink, d_v)
