"""Candidate ``sparse_fwd``: dequantize the cache rows into a flat bf16 workspace, then FlashMLA's sparse prefill kernel."""

from __future__ import annotations

from mla_tune.kernels.adapters.flash_mla import FlashMla
from mla_tune.kernels.adapters.provided import sparse_fwd_runs
from mla_tune.kernels.inputs import AttentionInputs
from mla_tune.kernels.prepared import PreparedPath
from mla_tune.kernels.workspace import SparseWorkspace
from mla_tune.sites.candidates import SPARSE_FWD
from mla_tune.sites.launch_parameters import DEFAULT_LAUNCHES, Launches


def prepare(inputs: AttentionInputs, kernels: FlashMla | None, launches: Launches = DEFAULT_LAUNCHES) -> PreparedPath:
    """Allocate the workspace and bind every stage. ``kernels`` None means the torch implementation on the CPU."""
    bound = SparseWorkspace(
        inputs, kernels, launches, split=inputs.work.compressed_rows, combines=inputs.site.layer.has_window
    )
    return bound.prepared(SPARSE_FWD, bound.runs() | sparse_fwd_runs(bound))
