"""The integers of one forward, and the work that they mean for a site.

Everything here is exact integer arithmetic on the host; the cost model, the input builder and the sweep share it, so
that a stage is fitted over the very numbers that it was measured at. Standard library only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from mla_tune.errors import UsageError
from mla_tune.sites.site import SWA_WINDOW, LayerType, Site

MAX_REQS = 1 << 16
"""Most requests of one forward: beyond what any engine batches, small enough to list them."""
MAX_TOKENS = 1 << 62
"""Most tokens: sums of them still fit the 64-bit integers of databases and policies."""


@dataclass(frozen=True, slots=True, order=True)
class Shape:
    """One forward: ``num_reqs`` requests of near-equal size; tokens are split evenly, the remainder to the first."""

    num_reqs: int
    num_qo_tokens: int
    """Query tokens of all requests together; at least one a request."""
    kv_tokens: int
    """Context tokens of all requests together, the new ones included, before compression."""

    def __post_init__(self) -> None:
        if self.num_reqs > MAX_REQS or self.kv_tokens > MAX_TOKENS:
            raise UsageError(
                f"a shape must have at most {MAX_REQS} requests and {MAX_TOKENS} tokens: "
                f"got num_reqs={str(self.num_reqs)[:20]}, kv_tokens={str(self.kv_tokens)[:20]}"
            )
        if not 1 <= self.num_reqs <= self.num_qo_tokens <= self.kv_tokens:
            raise UsageError(
                "a shape must satisfy 1 <= num_reqs <= num_qo_tokens <= kv_tokens: "
                f"got num_reqs={self.num_reqs}, num_qo_tokens={self.num_qo_tokens}, kv_tokens={self.kv_tokens}"
            )

    def extend_lens(self) -> list[int]:
        """New (query) tokens of each request."""
        return _split(self.num_qo_tokens, self.num_reqs)

    def seq_lens(self) -> list[int]:
        """Context tokens of each request, new ones included; never below :meth:`extend_lens`."""
        return _split(self.kv_tokens, self.num_reqs)

    @property
    def context(self) -> int:
        """Longest context of one request."""
        return -(-self.kv_tokens // self.num_reqs)


@dataclass(frozen=True, slots=True)
class RaggedShape:
    """One forward whose requests are given one by one: what a server batches, where :class:`Shape` is what is swept."""

    requests: tuple[tuple[int, int], ...]
    """(new tokens, context tokens) of each request; the context includes the new tokens."""

    def __post_init__(self) -> None:
        if not 1 <= len(self.requests) <= MAX_REQS:
            raise UsageError(f"a forward must have 1 to {MAX_REQS} requests: got {len(self.requests)}")
        for extend, seq in self.requests:
            if not 1 <= extend <= seq:
                raise UsageError(
                    "a request must satisfy 1 <= new tokens <= context tokens: "
                    f"got {str(extend)[:20]} new tokens of {str(seq)[:20]}"
                )
        if self.kv_tokens > MAX_TOKENS:
            raise UsageError(f"a forward must have at most {MAX_TOKENS} tokens: got {str(self.kv_tokens)[:20]}")

    @property
    def num_reqs(self) -> int:
        """Requests."""
        return len(self.requests)

    @property
    def num_qo_tokens(self) -> int:
        """Query tokens of all requests together."""
        return sum(extend for extend, _ in self.requests)

    @property
    def kv_tokens(self) -> int:
        """Context tokens of all requests together."""
        return sum(seq for _, seq in self.requests)

    def extend_lens(self) -> list[int]:
        """New (query) tokens of each request."""
        return [extend for extend, _ in self.requests]

    def seq_lens(self) -> list[int]:
        """Context tokens of each request, new ones included."""
        return [seq for _, seq in self.requests]

    @property
    def context(self) -> int:
        """Longest context of one request."""
        return max(seq for _, seq in self.requests)

    def evened(self) -> Shape:
        """The same three integers split evenly: all that a lookup knows of this forward."""
        return Shape(self.num_reqs, self.num_qo_tokens, self.kv_tokens)


AnyShape = Shape | RaggedShape
"""A forward, its requests near-equal or given one by one."""


def _split(total: int, parts: int) -> list[int]:
    share, remainder = divmod(total, parts)
    return [share + 1] * remainder + [share] * (parts - remainder)


@dataclass(frozen=True, slots=True)
class Workload:
    """How much each stage of ``site`` has to do at one shape. The variables of the cost curves."""

    num_qo_tokens: int
    compressed_rows: int
    """Cache rows that ``sparse_fwd`` dequantizes besides the window: c4a ragged, c128a rectangular, dsa all tokens."""
    window_rows: int
    """Window rows that it dequantizes: the last ``extend + 127`` tokens of each request; 0 for dsa."""
    selected: float
    """Selected entries per query, mean over the queries (a query near the start of its context has fewer)."""
    window: float
    """Window entries per query, mean over the queries."""
    selection_width: int
    """Columns of the selection as the KV-cache kernel takes it (padded to 64 for c128a)."""
    index_width: int
    """Columns of the index matrix that ``flash_mla_sparse_fwd`` takes: selection and window, padded to 128."""
    distinct_rows: float
    """Compressed rows that some query selects, expected under the site's overlap of neighbouring selections."""

    @property
    def attended(self) -> float:
        """Entries that one query attends to, mean over the queries."""
        return self.selected + self.window

    @property
    def rows(self) -> int:
        """All rows of the bf16 workspace."""
        return self.compressed_rows + self.window_rows


def workload(site: Site, shape: AnyShape) -> Workload:
    """Work at ``shape``, summed over its requests in exact integers.

    Row and width rules are those of SGLang 0.5.23's sparse prefill workspace.
    """
    layer = site.layer
    requests = list(zip(shape.extend_lens(), shape.seq_lens(), strict=True))
    context = max(seq for _, seq in requests)
    selected = window = 0
    for (extend, seq), count in Counter(requests).items():
        selected += count * (_selected_upto(site, seq) - _selected_upto(site, seq - extend))
        if layer.has_window:
            window += count * (_sum_min_floor(seq, 1, SWA_WINDOW) - _sum_min_floor(seq - extend, 1, SWA_WINDOW))
    width = selection_width(site, context)
    return Workload(
        num_qo_tokens=shape.num_qo_tokens,
        compressed_rows=sum(compressed_row_counts(layer, [seq for _, seq in requests])),
        window_rows=sum(window_row_counts(requests)) if layer.has_window else 0,
        selected=selected / shape.num_qo_tokens,
        window=window / shape.num_qo_tokens,
        selection_width=width,
        index_width=_pad(width + SWA_WINDOW, 128) if layer.has_window else width,
        distinct_rows=sum(count * _distinct(site, *request) for request, count in Counter(requests).items()),
    )


def compressed_row_counts(layer: LayerType, seq_lens: list[int]) -> list[int]:
    """Workspace rows of each request's compressed context; rectangular for c128a, ragged otherwise."""
    if layer is LayerType.SWA_ONLY:
        return [0] * len(seq_lens)
    if layer is LayerType.C128A:
        return [max(seq_lens) // 128] * len(seq_lens)
    return [seq // layer.compress_ratio for seq in seq_lens]


def window_row_counts(requests: list[tuple[int, int]]) -> list[int]:
    """Workspace rows of each request's window; ``requests`` are (extend, seq) pairs."""
    return [min(seq, extend + SWA_WINDOW - 1) for extend, seq in requests]


def selection_width(site: Site, context: int) -> int:
    """Columns of the selection without the window: top-k, or every row of the longest context padded to 64 (c128a)."""
    if site.layer is LayerType.C128A:
        return max(_pad(context // 128, 64), 64)
    return site.topk or 0


def _pad(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _selected_upto(site: Site, tokens: int) -> int:
    """Selected entries of the queries at positions 0 .. tokens - 1 of one request, summed."""
    if site.layer is LayerType.SWA_ONLY:
        return 0
    cap = site.topk if site.topk is not None else tokens
    return _sum_min_floor(tokens, site.layer.compress_ratio, cap)


def _distinct(site: Site, extend: int, seq: int) -> float:
    """Rows of one request that its ``extend`` queries select together, expected.

    Inputs draw each of the top-k entries from a stratum of its own, ``width`` rows wide. A query draws the part of its
    entries anew that it does not share with the query before it, so a stratum is drawn from ``draws`` times, and a row of
    it is missed by all of them with probability ``(1 - 1 / width) ** draws``.
    """
    if site.topk is None:
        return float(seq // site.layer.compress_ratio) if site.layer.compress_ratio else 0.0
    rows = seq // site.layer.compress_ratio
    if rows <= site.topk:
        return float(rows)
    width = rows / site.topk
    # Strata move with the context, by half a row for every new row on average: what leaves its own is drawn anew.
    left = min(1.0, 0.5 / (site.layer.compress_ratio * width))
    draws = 1 + (extend - 1) * (1 - site.overlap / 100 * (1 - left))
    return float(rows * (1 - (1 - 1 / width) ** draws))


def _sum_min_floor(tokens: int, ratio: int, cap: int) -> int:
    """``sum(min(cap, x // ratio) for x in 1 .. tokens)`` in closed form."""
    ramp = min(tokens, cap * ratio - 1) if cap > 0 else 0
    full = ramp // ratio
    total = ratio * full * (full - 1) // 2 + full * (ramp - full * ratio + 1)
    return total + cap * (tokens - ramp)


def fresh_request(requests: Sequence[tuple[int, int]]) -> int | None:
    """Index of the first of ``requests``, (extend, seq) pairs, that has nothing cached; None if all have.

    Its first query attends to itself alone, whatever the layer: a kernel that has to pass over other requests' query
    tokens takes them for that one at the least cost.
    """
    return next((index for index, (extend, seq) in enumerate(requests) if extend == seq), None)
