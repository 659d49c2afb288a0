"""Candidate ``sparse_fwd_selected``: as ``sparse_fwd``, but only rows that some query selects are dequantized.

For layer types with a top-k. What it saves depends on how much neighbouring queries share of their selections; which model
of that an input follows is part of its site (:attr:`mla_tune.sites.site.Site.overlap`).
"""

from __future__ import annotations

import torch

from mla_tune.kernels.adapters.flash_mla import FlashMla
from mla_tune.kernels.inputs import AttentionInputs
from mla_tune.kernels.prepared import PreparedPath
from mla_tune.kernels.select import compact_selected, mark_selected, most_selected_rows
from mla_tune.kernels.workspace import SparseWorkspace, present
from mla_tune.sites.candidates import SPARSE_FWD_SELECTED
from mla_tune.sites.launch_parameters import DEFAULT_LAUNCHES, Launches


def prepare(inputs: AttentionInputs, kernels: FlashMla | None, launches: Launches = DEFAULT_LAUNCHES) -> PreparedPath:
    """Allocate the workspace and bind every stage. ``kernels`` None means the torch implementation on the CPU."""
    topk, chosen = inputs.site.topk, inputs.topk_indices
    if topk is None or chosen is None:
        raise ValueError(f"{inputs.site.key} has no top-k selection")
    most = most_selected_rows(inputs.work.compressed_rows, inputs.work.num_qo_tokens, topk)
    bound = SparseWorkspace(inputs, kernels, launches, split=most, combines=True)
    device, rows = inputs.q.device, inputs.work.compressed_rows
    marks = torch.zeros(rows, dtype=torch.uint8, device=device)  # every run leaves them 0 again
    row_map = torch.empty(rows, dtype=torch.int32, device=device)
    slots = torch.empty(most, dtype=torch.int32, device=device)
    count = torch.zeros(1, dtype=torch.int32, device=device)
    bound.scratch += (marks, row_map, slots, count)
    config, cache = launches.select(inputs.work.num_qo_tokens), present(inputs.compressed)
    base = inputs.cu_compressed[:-1]
    runs = bound.runs() | {
        "mark": lambda: mark_selected(
            chosen, inputs.positions, inputs.token_to_req, base, marks, count, inputs.site.layer, topk, config
        ),
        "compact": lambda: compact_selected(marks, bound.row_slots, row_map, slots, count, config),
        "dequantize_selected": lambda: bound.dequantize(cache, slots, bound.compressed_out, count),
        "combine": lambda: bound.combine(row_map),
    }
    return bound.prepared(SPARSE_FWD_SELECTED, runs)
