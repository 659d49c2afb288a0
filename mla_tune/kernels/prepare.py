"""All that a layer prepares for sparse prefill in one launch: compressed rows, window rows and, for c4a, the indices.

Small shapes are bound by launches, not by bytes: at 64 query tokens and 8K context the three kernels of a layer move 4 MB,
1 us at an H200's copy bandwidth, and their launches cost the host 69 to 105 us (one, bound once a forward: 17 us).
"""

from __future__ import annotations

from dataclasses import replace

import torch

from mla_tune.errors import UsageError
from mla_tune.kernels.backend import Backend, choose_backend
from mla_tune.kernels.combine import combine_topk_swa_indices
from mla_tune.kernels.dequantize import dequantize_k_cache_paged
from mla_tune.kernels.prepare_jobs import IndexJob, RowsJob
from mla_tune.kernels.slot_ids import build_compressed_row_ids, build_swa_token_ids
from mla_tune.sites.launch_parameters import DEFAULT_LAUNCHES, PrepareConfig
from mla_tune.sites.site import LayerType

Alike = tuple[torch.dtype, torch.device, torch.Size, tuple[int, ...]]
"""What a layer's tensor has in common with the one bound: dtype, device, shape and strides."""


class Preparation:
    """One preparation, bound once and run at every layer of a forward.

    What the layers share (page tables, positions, the workspace) is checked and looked up here. Dequantizes the rows of
    both caches (one may be absent) and combines ``indices``, which need both. Equal to the slot ids,
    :func:`~mla_tune.kernels.dequantize.dequantize_k_cache_paged` and
    :func:`~mla_tune.kernels.combine.combine_topk_swa_indices` one after the other. A row moves the same bytes less the
    8 of its slot, plus the ends of the requests from the L2.
    """

    def __init__(
        self,
        compressed: RowsJob | None,
        window: RowsJob | None,
        indices: IndexJob | None = None,
        config: PrepareConfig | None = None,
        backend: Backend | None = None,
    ) -> None:
        """Raises :class:`UsageError` where there is nothing to do, or the caches differ in their format."""
        jobs = [job for job in (compressed, window) if job is not None]
        if not jobs or (indices is not None and len(jobs) < 2):
            raise UsageError("a preparation needs rows of one cache at least, and of both with indices: got fewer")
        if jobs[0].fmt != jobs[-1].fmt:
            raise UsageError(f"both caches must have one format: got {jobs[0].fmt.name} and {jobs[-1].fmt.name}")
        self._jobs = (compressed, window, indices)
        self._alike = (
            _alike(compressed.cache if compressed else None),
            _alike(window.cache if window else None),
            _alike(indices.topk_indices if indices else None),
        )
        self._torch = choose_backend(jobs[0].out, backend) is Backend.TORCH
        if not self._torch:
            from mla_tune.kernels.device import prepare_kernels as device

            rows = sum(job.out.shape[0] for job in jobs)
            self._bound = device.bind(compressed, window, indices, config or DEFAULT_LAUNCHES.prepare(rows))
            self._places = (device.CACHE, device.WINDOW_CACHE, device.TOPK_INDICES)

    def run(
        self,
        cache: torch.Tensor | None = None,
        window_cache: torch.Tensor | None = None,
        topk_indices: torch.Tensor | None = None,
    ) -> None:
        """Prepare one layer: with its own caches and selection, or with those of the jobs where it gives none.

        They must be like those of the jobs in shape, strides and dtype; :class:`UsageError` if not.
        """
        own = [(at, tensor) for at, tensor in enumerate((cache, window_cache, topk_indices)) if tensor is not None]
        for at, tensor in own:
            _check_alike(self._alike[at], tensor)
        if self._torch:
            compressed, window, indices = self._jobs
            _prepare_torch(
                compressed and replace(compressed, cache=compressed.cache if cache is None else cache),
                window and replace(window, cache=window.cache if window_cache is None else window_cache),
                indices
                and replace(indices, topk_indices=indices.topk_indices if topk_indices is None else topk_indices),
            )
        elif self._bound is not None:
            self._bound(tuple([(self._places[at], tensor) for at, tensor in own]))


def _alike(tensor: torch.Tensor | None) -> Alike | None:
    return None if tensor is None else (tensor.dtype, tensor.device, tensor.shape, tensor.stride())


def _check_alike(bound: Alike | None, own: torch.Tensor) -> None:
    if bound is None:
        raise UsageError("a layer may give what its preparation was bound to: got a tensor that it has no use for")
    if _alike(own) != bound:
        dtype, device, shape, strides = bound
        raise UsageError(
            f"a layer's tensor must be like the one bound, {dtype} {tuple(shape)} on {device} with strides {strides}: "
            f"got {own.dtype} {tuple(own.shape)} on {own.device} with strides {own.stride()}"
        )


def _prepare_torch(compressed: RowsJob | None, window: RowsJob | None, indices: IndexJob | None) -> None:
    for job, build in ((compressed, build_compressed_row_ids), (window, build_swa_token_ids)):
        if job is not None:
            slots = torch.empty(job.out.shape[0], dtype=torch.int32, device=job.out.device)
            build(job.page_table, job.lens, job.cu_rows, slots, job.page_size, backend=Backend.TORCH)
            dequantize_k_cache_paged(job.cache, slots, job.out, job.fmt, job.page_size, backend=Backend.TORCH)
    if indices is not None:
        combine_topk_swa_indices(
            indices.topk_indices,
            indices.positions,
            indices.token_to_req,
            indices.compressed_base,
            indices.window_base,
            indices.window_start,
            LayerType.C4A,
            indices.out,
            indices.out_lengths,
            indices.topk,
            backend=Backend.TORCH,
        )
