"""What every candidate around ``flash_mla_sparse_fwd`` has in common: its buffers, and the stages that they share.

The workspace holds every request's compressed rows, then every request's window rows. Index widths and row counts are those
of SGLang 0.5.23's sparse prefill; see :mod:`mla_tune.sites.shape`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from mla_tune.kernels.adapters.attention_cpu import sparse_fwd_cpu
from mla_tune.kernels.adapters.flash_mla import FlashMla
from mla_tune.kernels.combine import combine_topk_swa_indices
from mla_tune.kernels.dequantize import dequantize_k_cache_paged
from mla_tune.kernels.inputs import AttentionInputs, PagedCache
from mla_tune.kernels.prepared import BoundStage, Output, PreparedPath
from mla_tune.kernels.slot_ids import build_compressed_row_ids, build_swa_token_ids
from mla_tune.sites.candidates import Candidate
from mla_tune.sites.launch_parameters import Launches


class SparseWorkspace:
    """Buffers of one prepared candidate and the calls that fill them. ``split`` rows come before the window's."""

    def __init__(
        self, inputs: AttentionInputs, kernels: FlashMla | None, launches: Launches, split: int, combines: bool
    ) -> None:
        """``kernels`` None means the torch implementation on the CPU; ``combines`` asks for an index matrix."""
        work, device = inputs.work, inputs.q.device
        self.inputs, self.launches, self.split = inputs, launches, split
        self._kernels = kernels
        self.window_base = inputs.cu_window[:-1] + split
        self.output = Output()
        self.workspace = inputs.workspace[: split + work.window_rows]
        self.row_slots = torch.empty(work.compressed_rows, dtype=torch.int32, device=device)
        self.window_slots = torch.empty(work.window_rows, dtype=torch.int32, device=device)
        self.scratch: tuple[torch.Tensor, ...] = (self.workspace, self.row_slots, self.window_slots)
        self.kept: tuple[torch.Tensor, ...] = ()
        if combines:
            self.indices = torch.empty(work.num_qo_tokens, work.index_width, dtype=torch.int32, device=device)
            self.lengths = torch.empty(work.num_qo_tokens, dtype=torch.int32, device=device)
            self.scratch += (self.indices, self.lengths)
        else:
            self.indices, self.lengths = workspace_rows(inputs), inputs.selected_counts
            self.kept = (self.indices, self.lengths)

    @property
    def compressed_out(self) -> torch.Tensor:
        """The workspace's compressed rows, (split, head_dim)."""
        return self.workspace[: self.split]

    @property
    def window_out(self) -> torch.Tensor:
        """The workspace's window rows."""
        return self.workspace[self.split :]

    def prepared(self, candidate: Candidate, runs: Mapping[str, Callable[[], object]]) -> PreparedPath:
        """The candidate, with the run of each of its stages by name."""
        return PreparedPath(
            candidate=candidate.name,
            stages=tuple(BoundStage(stage, runs[stage.name]) for stage in candidate.stages(self.inputs.site)),
            output=self.output,
            buffers=(*self.scratch, *self.kept),
            scratch=self.scratch,
        )

    def runs(self) -> dict[str, Callable[[], object]]:
        """The stages that several candidates have, by name."""
        return {
            "attention": self._attention,
            "row_ids": self._row_ids,
            "dequantize_compressed": self._dequantize_compressed,
            "window_ids": self._window_ids,
            "dequantize_window": self._dequantize_window,
            "combine": self.combine,
        }

    def combine(self, row_map: torch.Tensor | None = None) -> None:
        """Fill the index matrix; selected rows go through ``row_map`` if there is one."""
        inputs = self.inputs
        combine_topk_swa_indices(
            inputs.topk_indices,
            inputs.positions,
            inputs.token_to_req,
            compressed_base=inputs.cu_compressed[:-1],
            window_base=self.window_base,
            window_start=inputs.window_start,
            layer=inputs.site.layer,
            out=self.indices,
            out_lengths=self.lengths,
            topk=inputs.site.topk,
            config=self.launches.combine(inputs.site.topk is not None, inputs.work.num_qo_tokens),
            row_map=row_map,
        )

    def dequantize(
        self, cache: PagedCache, slots: torch.Tensor, out: torch.Tensor, count: torch.Tensor | None = None
    ) -> None:
        """Rows ``slots`` of ``cache`` into ``out``; with ``count`` only so many of them."""
        config = self.launches.dequantize(cache.fmt.name, slots.shape[0])
        dequantize_k_cache_paged(cache.data, slots, out, cache.fmt, cache.page_size, config, count=count)

    def _row_ids(self) -> None:
        cache, inputs = present(self.inputs.compressed), self.inputs
        config = self.launches.slot_ids(self.row_slots.shape[0])
        build_compressed_row_ids(
            cache.page_table, inputs.row_counts, inputs.cu_compressed, self.row_slots, cache.page_size, config
        )

    def _window_ids(self) -> None:
        window, inputs = present(self.inputs.window), self.inputs
        config = self.launches.slot_ids(self.window_slots.shape[0])
        build_swa_token_ids(
            window.page_table, inputs.seq_lens, inputs.cu_window, self.window_slots, window.page_size, config
        )

    def _dequantize_compressed(self) -> None:
        self.dequantize(present(self.inputs.compressed), self.row_slots, self.compressed_out)

    def _dequantize_window(self) -> None:
        self.dequantize(present(self.inputs.window), self.window_slots, self.window_out)

    def _attention(self) -> None:
        inputs = self.inputs
        run = sparse_fwd_cpu if self._kernels is None else self._kernels.sparse_fwd
        self.output.tensor = run(
            inputs.q, self.workspace, self.indices, self.lengths, inputs.sm_scale, inputs.attn_sink
        )


def present(cache: PagedCache | None) -> PagedCache:
    """A cache that the layer type has: its stages are only run where there is one."""
    if cache is None:
        raise ValueError("this layer type has no such cache")
    return cache


def workspace_rows(inputs: AttentionInputs) -> torch.Tensor:
    """V3.2's selection as workspace rows (num_qo_tokens, topk) int32, which the engine's top-k transform writes itself."""
    rows = inputs.topk_indices
    if rows is None:
        raise ValueError(f"{inputs.site.key} has no top-k selection")
    base = inputs.cu_compressed[inputs.token_to_req.long()].int()[:, None]
    return torch.where(rows >= 0, rows + base, -1)
