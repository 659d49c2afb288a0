"""What a layer's preparation is told to do: rows of a cache to dequantize, and the index matrix of c4a to combine."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mla_tune.errors import UsageError
from mla_tune.kernels.formats import KVFormat, check_cache
from mla_tune.sites.site import SWA_WINDOW, LayerType


@dataclass(frozen=True, slots=True)
class RowsJob:
    """Rows of one cache to dequantize; see :mod:`mla_tune.kernels.slot_ids` for which rows those are.

    Raises :class:`UsageError` on shapes or types that do not fit: here, so that a launch need not look again.
    """

    cache: torch.Tensor  # (num_pages, page_bytes) uint8
    page_table: torch.Tensor  # (num_reqs, max_pages) int32
    lens: torch.Tensor  # (num_reqs,) int32 or int64: rows that each request has, or its context for the window
    cu_rows: torch.Tensor  # (num_reqs + 1,) int32 or int64
    fmt: KVFormat
    page_size: int
    out: torch.Tensor  # (rows, head_dim) bf16, contiguous

    def __post_init__(self) -> None:
        check_cache(self.cache, self.fmt, self.page_size)
        num_reqs, table, out = self.lens.shape[0], self.page_table, self.out
        if table.dim() != 2 or table.shape[0] != num_reqs or self.cu_rows.shape != (num_reqs + 1,):
            raise UsageError(
                f"page_table must be (num_reqs, max_pages) and the offsets (num_reqs + 1,) for {num_reqs} requests: "
                f"got {tuple(table.shape)} and {tuple(self.cu_rows.shape)}"
            )
        if out.dim() != 2 or out.shape[1] != self.fmt.head_dim or not out.is_contiguous():
            raise UsageError(f"out must be contiguous (rows, {self.fmt.head_dim}): got {tuple(out.shape)}")
        if out.dtype is not torch.bfloat16 or table.stride(1) != 1:
            raise UsageError(f"out must be bfloat16 and page_table rows contiguous: got {out.dtype}")


@dataclass(frozen=True, slots=True)
class IndexJob:
    """The index matrix of c4a; arguments as of :func:`mla_tune.kernels.combine.combine_topk_swa_indices`."""

    topk_indices: torch.Tensor  # (num_qo_tokens, >= topk) int32
    positions: torch.Tensor  # (num_qo_tokens,)
    token_to_req: torch.Tensor  # (num_qo_tokens,)
    compressed_base: torch.Tensor  # (num_reqs,)
    window_base: torch.Tensor  # (num_reqs,)
    window_start: torch.Tensor  # (num_reqs,)
    out: torch.Tensor  # (num_qo_tokens, width) int32
    out_lengths: torch.Tensor  # (num_qo_tokens,) int32
    topk: int

    @property
    def ratio(self) -> int:
        """Context tokens a compressed row."""
        return LayerType.C4A.compress_ratio

    @property
    def window(self) -> int:
        """Tokens of the window."""
        return SWA_WINDOW
