"""The stages of a site with a provider: the engine's kernels in the place of ours, on the same inputs and buffers.

What they give goes on to the next stages as ours does, so that the check of a candidate's whole output holds for them too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import torch

from mla_tune.errors import MissingPackageError
from mla_tune.kernels.adapters import sglang_kernels
from mla_tune.kernels.adapters.sglang_kernels import Missing
from mla_tune.kernels.formats import PagedSelection
from mla_tune.kernels.inputs import AttentionInputs, PagedCache, transforms
from mla_tune.kernels.workspace import SparseWorkspace, present
from mla_tune.sites.site import LayerType

_T = TypeVar("_T")
Runs = dict[str, Callable[[], object]]


class Captured:
    """Keeps what passes from stage to stage while CUDA graphs are captured.

    A kernel that makes its own output makes another at each run. The graphs of the stages behind it go on reading the
    memory that was current when they were captured; were it freed, the next graph of the pool would write there.
    """

    def __init__(self) -> None:
        self._tensors: list[torch.Tensor] = []

    def add(self, *tensors: torch.Tensor) -> None:
        """Keep what a run replaced and what it made; outside of a capture, nothing."""
        if _is_captured(tensors[0]):
            self._tensors += tensors


def _is_captured(tensor: torch.Tensor) -> bool:
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def sparse_fwd_runs(bound: SparseWorkspace) -> Runs:
    """What runs instead of the workspace's own stages, by name; nothing where the site has no provider.

    Raises :class:`MissingPackageError` for a kernel that is not there: ask :func:`sglang_kernels.unsupported` first.
    """
    site = bound.inputs.site
    if site.provider is None:
        return {}
    runs: Runs = {}
    topk = bound.inputs.topk_indices
    if transforms(site):
        topk = _transformed(bound, runs)
    if site.layer is LayerType.DSA:
        runs["dequantize_compressed"] = _dsa_rows(bound)
        return runs
    if site.layer is not LayerType.SWA_ONLY:
        cache = present(bound.inputs.compressed)
        runs["dequantize_compressed"] = _rows(cache, bound.row_slots, bound.compressed_out)
    runs["dequantize_window"] = _rows(present(bound.inputs.window), bound.window_slots, bound.window_out)
    runs["combine"] = _found(sglang_kernels.combined(bound.inputs, topk, bound.indices, bound.lengths)).run
    return runs


@dataclass(slots=True)
class Selections:
    """What the KV-cache kernel attends to; ``transform`` finds the selection anew where that is a stage of the site."""

    parts: list[PagedSelection]
    scratch: tuple[torch.Tensor, ...] = ()
    transform: Callable[[], object] | None = None


def selections(inputs: AttentionInputs) -> Selections:
    """The inputs' selections, the last of them filled by the provider's transform if it has one."""
    found = Selections(inputs.selections())
    if not transforms(inputs.site):
        return found
    *window, selected = found.parts
    if inputs.site.layer is LayerType.DSA:
        run, kept = _found(sglang_kernels.dsa_slots_of_topk(inputs)).run, Captured()

        def transform() -> None:
            (slots,) = run()  # a tensor of its own at each call
            kept.add(found.parts[-1].slot_ids, slots)
            found.parts[-1] = replace(found.parts[-1], slot_ids=slots)

        found.transform = transform
        return found
    slots, raw = torch.empty_like(selected.slot_ids), torch.empty_like(selected.slot_ids)
    found.parts = [*window, replace(selected, slot_ids=slots)]
    found.scratch = (slots, raw)
    found.transform = _found(sglang_kernels.slots_of_topk(inputs, slots, raw)).run
    return found


def _transformed(bound: SparseWorkspace, runs: Runs) -> torch.Tensor:
    """Add the transform to ``runs``; the selection that it writes."""
    inputs = bound.inputs
    if inputs.topk_indices is None:
        raise ValueError(f"{inputs.site.key} has no top-k selection")
    raw = torch.empty_like(inputs.topk_indices)
    bound.scratch += (raw,)
    if inputs.site.layer is LayerType.DSA:
        bound.indices, bound.kept = raw, (bound.lengths,)
        runs["topk_transform"] = _found(sglang_kernels.workspace_rows_of_topk(inputs, raw)).run
        return raw
    slots = torch.empty_like(raw)
    bound.scratch += (slots,)
    runs["topk_transform"] = _found(sglang_kernels.slots_of_topk(inputs, slots, raw)).run
    return raw


def _rows(cache: PagedCache, slots: torch.Tensor, out: torch.Tensor) -> Callable[[], object]:
    kernel = _found(sglang_kernels.rows(cache))
    return lambda: kernel(slots, out)


def _dsa_rows(bound: SparseWorkspace) -> Callable[[], object]:
    """SGLang's kernel makes its own workspace at each call, and attention reads that."""
    kernel, kept = _found(sglang_kernels.rows(present(bound.inputs.compressed))), Captured()

    def run() -> None:
        rows = kernel(bound.row_slots, bound.workspace)
        kept.add(bound.workspace, rows)
        bound.workspace = rows

    return run


def _found(bound: _T | Missing) -> _T:
    if isinstance(bound, Missing):
        raise MissingPackageError(bound.reason)
    return bound
