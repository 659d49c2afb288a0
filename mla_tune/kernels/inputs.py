"""Inputs of one point, built on the device that will run it.

Caches hold quantized random normals, page tables are a random permutation of the pool (as after hours of serving), and
each query's selection is spread evenly over its context: one row drawn from each of top-k equal strata. The site says how
much of it neighbours share (its ``overlap``): 0 draws independently per query, so that they share rows only by chance, the
least cache-friendly selection; 80 lets every entry be that of the query before it with probability 0.8, unless the row has
left its stratum, which grows with the context.

Large pools are one quantized tile repeated: a kernel's time depends on where rows lie, not on which values they hold.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mla_tune.kernels.formats import V4, KVFormat, PagedSelection, kv_format, quantize_k_cache
from mla_tune.sites.candidates import candidates_at
from mla_tune.sites.shape import AnyShape, Workload, compressed_row_counts, window_row_counts, workload
from mla_tune.sites.site import SWA_PAGE_SIZE, SWA_WINDOW, LayerType, Site

_TILE_TOKENS = 1 << 15


@dataclass(frozen=True, slots=True)
class PagedCache:
    """A paged FP8 cache and where each request's tokens lie in it."""

    fmt: KVFormat
    page_size: int
    data: torch.Tensor  # (num_pages, page_bytes) uint8
    page_table: torch.Tensor  # (num_reqs, max_pages) int32


@dataclass(frozen=True, slots=True)
class AttentionInputs:
    """What an engine hands to either attention candidate. Tensors are named by their shapes; R is ``num_reqs``."""

    site: Site
    shape: AnyShape
    work: Workload
    q: torch.Tensor  # (num_qo_tokens, h_q, head_dim) bf16
    attn_sink: torch.Tensor | None  # (h_q,) float32, V4 only
    window: PagedCache | None  # V4 only
    compressed: PagedCache | None  # all but swa_only
    topk_indices: torch.Tensor | None  # (num_qo_tokens, topk) int32 compressed rows of the request, -1 behind the last
    seq_lens: torch.Tensor  # (R,) int32
    window_start: torch.Tensor  # (R,) int32, first position whose window row is gathered
    row_counts: torch.Tensor  # (R,) int32, compressed rows that each request has
    cu_compressed: torch.Tensor  # (R + 1,) int64, prefix sum of the workspace rows of each request
    cu_window: torch.Tensor  # (R + 1,) int64
    positions: torch.Tensor  # (num_qo_tokens,) int32, in the request
    token_to_req: torch.Tensor  # (num_qo_tokens,) int32
    workspace: torch.Tensor  # (work.rows, head_dim) bf16, where candidates dequantize to: as in an engine they share it
    scores: torch.Tensor | None = None
    """(num_qo_tokens, rows of the longest context) float32 whose top-k is the selection, where a provider transforms it."""

    @property
    def head_dim(self) -> int:
        """Dimension of queries and keys: 512 (V4) or 576 (V3.2)."""
        return self.q.shape[2]

    @property
    def sm_scale(self) -> float:
        """Softmax scale."""
        return float(self.head_dim**-0.5)

    @property
    def selected_counts(self) -> torch.Tensor:  # (num_qo_tokens,) int32
        """Selected entries of each query: ``min(topk, (position + 1) // compress_ratio)``."""
        if self.site.layer is LayerType.SWA_ONLY:
            return torch.zeros_like(self.positions)
        counts = (self.positions + 1) // self.site.layer.compress_ratio
        return counts if self.site.topk is None else counts.clamp_max(self.site.topk)

    @property
    def window_counts(self) -> torch.Tensor:  # (num_qo_tokens,) int32
        """Window entries of each query: ``min(128, position + 1)``."""
        return (self.positions + 1).clamp_max(SWA_WINDOW)

    def selections(self) -> list[PagedSelection]:
        """What each query attends to, as slots of the caches: the window first (V4), then the selection.

        This is what the engine's top-k transform and page-index step hand to the KV-cache kernel.
        """
        parts = []
        if self.window is not None:
            parts.append(self._selection(self.window, self._window_positions(), self.window_counts))
        if self.compressed is not None:
            parts.append(self._selection(self.compressed, self._selected_rows(), self.selected_counts))
        return parts

    def _window_positions(self) -> torch.Tensor:
        """Positions of each query's window, oldest first, -1 behind the last: (num_qo_tokens, 128) int32."""
        column = torch.arange(SWA_WINDOW, device=self.q.device, dtype=torch.int32)
        counts = self.window_counts[:, None]
        return torch.where(column < counts, self.positions[:, None] + 1 - counts + column, -1)

    def _selected_rows(self) -> torch.Tensor:
        """Compressed rows of each query's selection, -1 behind the last: (num_qo_tokens, selection_width) int32."""
        if self.topk_indices is not None:
            return self.topk_indices
        column = torch.arange(self.work.selection_width, device=self.q.device, dtype=torch.int32)
        return torch.where(column < self.selected_counts[:, None], column, -1)

    def _selection(self, cache: PagedCache, rows: torch.Tensor, lengths: torch.Tensor) -> PagedSelection:
        table = cache.page_table
        page = rows.clamp_min(0) // cache.page_size + self.token_to_req[:, None] * table.shape[1]
        slots = table.flatten()[page] * cache.page_size + rows % cache.page_size
        slot_ids = torch.where(rows >= 0, slots, -1)
        return PagedSelection(cache.data, cache.fmt, cache.page_size, slot_ids, lengths)


def required_bytes(site: Site, shape: AnyShape) -> int:
    """Device memory that one point takes at most: caches, queries, indices, the workspace, outputs, partial sums and slack.

    FlashMLA's KV-cache kernel keeps float32 partial outputs of every batch entry and of every part that its scheduler cuts:
    one per query token, or two where all of them are one entry's sequence (``with_kvcache_mixed``).
    """
    work, fmt = workload(site, shape), kv_format(site.layer)
    caches = (work.rows + shape.num_reqs * 2 * SWA_PAGE_SIZE) * (fmt.bytes_per_token + 8)
    if site.layer is LayerType.C128A:
        caches *= 2  # a page of two rows is padded from 1168 to 1728 bytes
    found = candidates_at(site)
    paged = sum(candidate.paged for candidate in found)
    outputs, matrices = len(found), len(found) - paged  # the paged ones have no index matrix
    queries = shape.num_qo_tokens * (site.h_q or 0) * (fmt.head_dim + outputs * 512) * 2
    partials = shape.num_qo_tokens * (site.h_q or 0) * 512 * 4 * paged
    indices = shape.num_qo_tokens * (work.selection_width + matrices * (work.index_width + 1)) * 4
    provided = 0
    if transforms(site):  # scores, slots and rows that the transform writes, page tables of every query and token
        longest = shape.context // site.layer.compress_ratio
        provided = shape.num_qo_tokens * (4 * score_columns(longest) + 24 * work.selection_width + longest // 16)
        provided += 4 * shape.num_reqs * longest
    if site.provider is not None and site.layer is LayerType.DSA:
        provided += 3 * work.rows * fmt.head_dim * 2  # its dequantize makes rows of its own, and graphs keep some
    index_scratch = shape.num_qo_tokens * work.selection_width * (64 if site.overlap else 16)
    # Beside the workspace: a slot a row for sparse_fwd, two, a mark and a place for sparse_fwd_selected.
    workspace = work.rows * (fmt.head_dim * 2 + 4 + 13) + 4
    return caches + queries + partials + indices + index_scratch + provided + workspace + (1 << 30)


def transforms(site: Site) -> bool:
    """Whether a top-k transform is a stage of ``site``."""
    return site.provider is not None and site.provider.transforms and site.topk is not None


def score_columns(rows: int) -> int:
    """Columns of the scores of contexts of at most ``rows`` rows: whole loads of 16 bytes."""
    return max(4, -(-rows // 4) * 4)


class InputBuilder:
    """Builds fresh random inputs for every point: queries, sinks, selections, and which page holds what.

    The large pools that the pages lie in are filled once and kept, since filling them costs more than timing.
    """

    def __init__(self, device: torch.device, seed: int = 0) -> None:
        self._device = device
        self._generator = torch.Generator(device=device).manual_seed(seed)
        self._pools: dict[tuple[str, int], torch.Tensor] = {}
        self._queries: dict[int, torch.Tensor] = {}

    def release(self) -> None:
        """Drop the pools, for a point that needs the memory."""
        self._pools.clear()
        self._queries.clear()

    def attention(self, site: Site, shape: AnyShape) -> AttentionInputs:
        """Inputs of ``site`` at ``shape``. Raises ``torch.OutOfMemoryError`` where they do not fit."""
        extends, seqs = shape.extend_lens(), shape.seq_lens()
        layer, fmt = site.layer, kv_format(site.layer)
        windows = window_row_counts(list(zip(extends, seqs, strict=True)))
        positions, token_to_req = self._tokens(extends, seqs)
        counts = [seq // layer.compress_ratio for seq in seqs] if layer.compress_ratio else [0] * len(seqs)
        window = self._cache(V4, SWA_PAGE_SIZE, seqs, windows) if layer.has_window else None
        compressed = self._cache(fmt, layer.page_size, counts, counts) if layer is not LayerType.SWA_ONLY else None
        h_q, topk = site.h_q or 0, self._topk(site, positions, token_to_req)
        return AttentionInputs(
            site=site,
            shape=shape,
            work=workload(site, shape),
            q=self._query(shape.num_qo_tokens, h_q, fmt.head_dim),
            attn_sink=self._normal(h_q) if layer.has_window else None,
            window=window,
            compressed=compressed,
            topk_indices=topk,
            seq_lens=self._ints(seqs),
            window_start=self._ints([seq - rows for seq, rows in zip(seqs, windows, strict=True)]),
            row_counts=self._ints(counts),
            cu_compressed=self._prefix(compressed_row_counts(layer, seqs)),
            cu_window=self._prefix(windows if layer.has_window else [0] * len(seqs)),
            positions=positions,
            token_to_req=token_to_req,
            workspace=torch.empty(workload(site, shape).rows, fmt.head_dim, dtype=torch.bfloat16, device=self._device),
            scores=None if topk is None or not transforms(site) else self._scores(topk, max(counts)),
        )

    def context_lens(self, site: Site, shape: AnyShape) -> torch.Tensor:
        """Compressed context of every query token, (num_qo_tokens, 1) int32: what the indexer schedules over."""
        positions, _ = self._tokens(shape.extend_lens(), shape.seq_lens())
        return ((positions + 1) // site.layer.compress_ratio).unsqueeze(1)

    def _tokens(self, extends: list[int], seqs: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Position in its request, and request, of every query token: two (num_qo_tokens,) int32."""
        extend = self._ints(extends)
        requests = torch.arange(len(extends), device=self._device, dtype=torch.int32)
        token_to_req = requests.repeat_interleave(extend.long())
        first_token = extend.cumsum(0) - extend
        offset = torch.arange(len(token_to_req), device=self._device) - first_token[token_to_req.long()]
        start = self._ints(seqs) - extend
        return (start[token_to_req.long()] + offset).int(), token_to_req

    def _ints(self, values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self._device)

    def _prefix(self, values: list[int]) -> torch.Tensor:
        return torch.tensor([0, *values], dtype=torch.int64, device=self._device).cumsum(0)

    def _normal(self, *size: int) -> torch.Tensor:
        return torch.randn(*size, generator=self._generator, device=self._device)

    def _query(self, num_tokens: int, h_q: int, head_dim: int) -> torch.Tensor:
        """(num_tokens, h_q, head_dim) bf16 normals, drawn anew; a view of one buffer that only grows."""
        size = num_tokens * h_q * head_dim
        buffer = self._queries.get(head_dim)
        if buffer is None or buffer.numel() < size:
            self._queries.pop(head_dim, None)
            buffer = self._queries[head_dim] = torch.empty(size, dtype=torch.bfloat16, device=self._device)
        return buffer[:size].normal_(generator=self._generator).view(num_tokens, h_q, head_dim)

    def _cache(self, fmt: KVFormat, page_size: int, tokens: list[int], kept: list[int]) -> PagedCache:
        """A cache that holds the last ``kept`` of each request's ``tokens``; pages before those are absent (-1)."""
        max_pages = max(1, max(-(-count // page_size) for count in tokens))
        first = self._ints([(total - last) // page_size for total, last in zip(tokens, kept, strict=True)])
        end = self._ints([-(-total // page_size) for total in tokens])
        column = torch.arange(max_pages, device=self._device, dtype=torch.int32)
        present = (column >= first[:, None]) & (column < end[:, None])
        num_pages = max(1, int(present.sum()))
        table = torch.full_like(present, -1, dtype=torch.int32)
        permutation = torch.randperm(num_pages, generator=self._generator, device=self._device, dtype=torch.int32)
        table[present] = permutation[: int(present.sum())]
        return PagedCache(fmt, page_size, self._pool(fmt, page_size, num_pages), table)

    def _pool(self, fmt: KVFormat, page_size: int, num_pages: int) -> torch.Tensor:
        """The first ``num_pages`` of a pool of quantized normals, (num_pages, page_bytes) uint8."""
        key = (fmt.name, page_size)
        pool = self._pools.get(key)
        if pool is None or pool.shape[0] < num_pages:
            self._pools.pop(key, None)
            tile_pages = min(num_pages, -(-_TILE_TOKENS // page_size))
            tile = quantize_k_cache(self._normal(tile_pages * page_size, fmt.head_dim), fmt, page_size)
            pool = torch.empty(num_pages, tile.shape[1], dtype=torch.uint8, device=self._device)
            for start in range(0, num_pages, tile_pages):
                piece = pool[start : start + tile_pages]
                piece.copy_(tile[: len(piece)])
            self._pools[key] = pool
        return pool[:num_pages]

    def _topk(self, site: Site, positions: torch.Tensor, token_to_req: torch.Tensor) -> torch.Tensor | None:
        """Stratified selection: column j is drawn from stratum j of ``available`` rows; all of them where few.

        Where neighbours overlap, a query takes over the row of the query before it, entry by entry, with that probability,
        unless its own stratum no longer holds that row.
        """
        if site.topk is None:
            return None
        available = ((positions + 1) // site.layer.compress_ratio)[:, None].float()  # exact below 2**24
        column = torch.arange(site.topk, device=self._device, dtype=torch.float32)[None, :]
        stride = (available / site.topk).clamp_min(1.0)
        jitter = torch.rand(len(positions), site.topk, generator=self._generator, device=self._device)
        low = (column * stride).floor()
        width = ((column + 1) * stride).floor() - low
        chosen = low + (jitter * width).floor().minimum(width - 1).clamp_min(0)
        if site.overlap:
            chosen = self._shared(chosen, low, low + width, token_to_req, site.overlap / 100)
        return torch.where(chosen < available, chosen, -1.0).int()

    def _scores(self, topk: torch.Tensor, rows: int) -> torch.Tensor:
        """Scores below 0 but for the selected rows, in rows of a whole number of 16 bytes: the kernel's loads."""
        scores = torch.rand(len(topk), score_columns(rows), generator=self._generator, device=self._device).neg_()
        high = 1.0 + torch.rand(topk.shape, generator=self._generator, device=self._device)
        token, column = (topk >= 0).nonzero(as_tuple=True)
        scores[token, topk[token, column].long()] = high[token, column]
        return scores

    def _shared(
        self, chosen: torch.Tensor, low: torch.Tensor, end: torch.Tensor, token_to_req: torch.Tensor, part: float
    ) -> torch.Tensor:
        """``chosen`` (num_qo_tokens, topk), each entry with probability ``part`` that of the query before it.

        Not where the request has none before it, or where that row lies outside the query's own ``low .. end``.
        """
        fresh = torch.rand(chosen.shape, generator=self._generator, device=self._device) >= part
        fresh[1:] |= (token_to_req[1:] != token_to_req[:-1])[:, None]
        fresh[0] = True
        token = torch.arange(len(chosen), device=self._device)[:, None]
        while True:
            taken = chosen.gather(0, torch.where(fresh, token, 0).cummax(dim=0).values)
            left = (taken < low) | (taken >= end)
            if not bool(left.any()):
                return taken
            left[1:] &= ~left[:-1].clone()  # the first query that has lost the row draws anew; those behind it follow
            fresh |= left
