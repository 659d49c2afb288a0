"""Candidate ``sparse_fwd``: dequantize the cache rows into a flat bf16 workspace, then FlashMLA's sparse prefill kernel.

The workspace holds every request's compressed rows, then every request's window rows. Index widths and row counts are those
of SGLang 0.5.23's sparse prefill; see :mod:`mla_tune.shape`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from mla_tune.kernels.attention_cpu import sparse_fwd_cpu
from mla_tune.kernels.combine import combine_topk_swa_indices
from mla_tune.kernels.dequantize import dequantize_k_cache_paged
from mla_tune.kernels.flash_mla import FlashMla
from mla_tune.kernels.inputs import AttentionInputs, PagedCache
from mla_tune.kernels.prepared import BoundStage, Output, Prepared
from mla_tune.kernels.slot_ids import build_compressed_row_ids, build_swa_token_ids
from mla_tune.stages import stages


def prepare(inputs: AttentionInputs, kernels: FlashMla | None) -> Prepared:
    """Allocate the workspace and bind every stage. ``kernels`` None means the torch implementation on the CPU."""
    bound = _SparseFwd(inputs, kernels)
    runs = bound.runs()
    return Prepared(
        candidate="sparse_fwd",
        stages=tuple(BoundStage(stage, runs[stage.name]) for stage in stages(inputs.site, "sparse_fwd")),
        output=bound.output,
        buffers=(*bound.scratch, bound.indices, bound.lengths),
        scratch=(*bound.scratch, bound.indices, bound.lengths) if inputs.site.layer.has_window else bound.scratch,
    )


class _SparseFwd:
    """Buffers of one prepared candidate and the calls that fill them."""

    def __init__(self, inputs: AttentionInputs, kernels: FlashMla | None) -> None:
        work, device = inputs.work, inputs.q.device
        self._inputs, self._kernels = inputs, kernels
        self._window_base = inputs.cu_window[:-1] + work.compressed_rows
        self.output = Output()
        self.workspace = torch.empty(work.rows, inputs.head_dim, dtype=torch.bfloat16, device=device)
        self.row_slots = torch.empty(work.compressed_rows, dtype=torch.int32, device=device)
        self.window_slots = torch.empty(work.window_rows, dtype=torch.int32, device=device)
        self.scratch = (self.workspace, self.row_slots, self.window_slots)
        if inputs.site.layer.has_window:
            self.indices = torch.empty(work.num_qo_tokens, work.index_width, dtype=torch.int32, device=device)
            self.lengths = torch.empty(work.num_qo_tokens, dtype=torch.int32, device=device)
        else:
            self.indices, self.lengths = _workspace_rows(inputs), inputs.selected_counts

    def runs(self) -> dict[str, Callable[[], object]]:
        """Every stage by name."""
        inputs, split = self._inputs, self._inputs.work.compressed_rows
        runs: dict[str, Callable[[], object]] = {"attention": self._attention}
        if inputs.compressed is not None:
            cache = inputs.compressed
            runs["row_ids"] = lambda: build_compressed_row_ids(
                cache.page_table, inputs.row_counts, inputs.cu_compressed, self.row_slots, cache.page_size
            )
            runs["dequantize_compressed"] = lambda: _dequantize(cache, self.row_slots, self.workspace[:split])
        if inputs.window is not None:
            window = inputs.window
            runs["window_ids"] = lambda: build_swa_token_ids(
                window.page_table, inputs.seq_lens, inputs.cu_window, self.window_slots, window.page_size
            )
            runs["dequantize_window"] = lambda: _dequantize(window, self.window_slots, self.workspace[split:])
            runs["combine"] = self._combine
        return runs

    def _combine(self) -> None:
        inputs = self._inputs
        combine_topk_swa_indices(
            inputs.topk_indices,
            inputs.positions,
            inputs.token_to_req,
            compressed_base=inputs.cu_compressed[:-1],
            window_base=self._window_base,
            window_start=inputs.window_start,
            layer=inputs.site.layer,
            out=self.indices,
            out_lengths=self.lengths,
            topk=inputs.site.topk,
        )

    def _attention(self) -> None:
        inputs = self._inputs
        run = sparse_fwd_cpu if self._kernels is None else self._kernels.sparse_fwd
        self.output.tensor = run(
            inputs.q, self.workspace, self.indices, self.lengths, inputs.sm_scale, inputs.attn_sink
        )


def _dequantize(cache: PagedCache, slots: torch.Tensor, out: torch.Tensor) -> None:
    dequantize_k_cache_paged(cache.data, slots, out, cache.fmt, cache.page_size)


def _workspace_rows(inputs: AttentionInputs) -> torch.Tensor:
    """V3.2's selection as workspace rows (num_qo_tokens, topk) int32, which the engine's top-k transform writes itself."""
    rows = inputs.topk_indices
    if rows is None:
        raise ValueError(f"{inputs.site.key} has no top-k selection")
    base = inputs.cu_compressed[inputs.token_to_req.long()].int()[:, None]
    return torch.where(rows >= 0, rows + base, -1)
