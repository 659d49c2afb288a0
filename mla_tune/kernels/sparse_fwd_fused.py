"""Candidate ``sparse_fwd_fused``: as ``sparse_fwd``, with one launch a layer before attention instead of up to three.

A candidate of its own and not a rule inside ``sparse_fwd``: its stages differ, so that it has curves, crossovers, a check
of its whole output and a place in ``explain`` like any other, and a policy names it where it was measured to win.
"""

from __future__ import annotations

from mla_tune.kernels.adapters.flash_mla import FlashMla
from mla_tune.kernels.inputs import AttentionInputs
from mla_tune.kernels.prepare import Preparation
from mla_tune.kernels.prepare_jobs import IndexJob, RowsJob
from mla_tune.kernels.prepared import PreparedPath
from mla_tune.kernels.workspace import SparseWorkspace
from mla_tune.sites.candidates import SPARSE_FWD_FUSED
from mla_tune.sites.launch_parameters import DEFAULT_LAUNCHES, Launches
from mla_tune.sites.site import LayerType


def prepare(inputs: AttentionInputs, kernels: FlashMla | None, launches: Launches = DEFAULT_LAUNCHES) -> PreparedPath:
    """Allocate the workspace and bind every stage. ``kernels`` None means the torch implementation on the CPU."""
    bound = SparseWorkspace(
        inputs, kernels, launches, split=inputs.work.compressed_rows, combines=inputs.site.layer.has_window
    )
    # Slots are looked up on the way: nobody needs a list of them.
    bound.scratch = tuple(t for t in bound.scratch if t is not bound.row_slots and t is not bound.window_slots)
    del bound.row_slots, bound.window_slots
    preparation = Preparation(_compressed(bound), _window(bound), _indices(bound), launches.prepare(inputs.work.rows))
    return bound.prepared(SPARSE_FWD_FUSED, bound.runs() | {"prepare": preparation.run})


def _compressed(bound: SparseWorkspace) -> RowsJob | None:
    inputs, cache = bound.inputs, bound.inputs.compressed
    if cache is None:
        return None
    lens, ends = inputs.row_counts, inputs.cu_compressed
    return RowsJob(cache.data, cache.page_table, lens, ends, cache.fmt, cache.page_size, bound.compressed_out)


def _window(bound: SparseWorkspace) -> RowsJob | None:
    inputs, cache = bound.inputs, bound.inputs.window
    if cache is None:
        return None
    lens, ends = inputs.seq_lens, inputs.cu_window
    return RowsJob(cache.data, cache.page_table, lens, ends, cache.fmt, cache.page_size, bound.window_out)


def _indices(bound: SparseWorkspace) -> IndexJob | None:
    """Of c4a alone: elsewhere the indices depend on the shape only, and one combination serves all layers of the type."""
    inputs = bound.inputs
    if inputs.site.layer is not LayerType.C4A or inputs.topk_indices is None or inputs.site.topk is None:
        return None
    return IndexJob(
        topk_indices=inputs.topk_indices,
        positions=inputs.positions,
        token_to_req=inputs.token_to_req,
        compressed_base=inputs.cu_compressed[:-1],
        window_base=bound.window_base,
        window_start=inputs.window_start,
        out=bound.indices,
        out_lengths=bound.lengths,
        topk=inputs.site.topk,
    )
