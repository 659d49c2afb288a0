"""SGLang's own kernels for the stages of ``sparse_fwd``, where sglang 0.5.23 or later is installed: to compare with.

The one place that knows their names and arguments. Each binder gives a function that launches the kernel on the inputs of
one of :mod:`mla_tune.kernels.cases`, and the tensors that it fills; what sglang imports is its own matter, so that any
failure of an import is a reason and not an error.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from mla_tune.kernels.cases import compressed_slots
from mla_tune.kernels.indexer import BLOCK_KV
from mla_tune.kernels.inputs import AttentionInputs
from mla_tune.kernels.workspace import present
from mla_tune.site import SWA_WINDOW, LayerType

_OPS = "sglang.kernels.ops.attention"


@dataclass(frozen=True, slots=True)
class Bound:
    """A kernel of SGLang's bound to inputs; ``run`` gives what it filled, in the order of our case's outputs."""

    run: Callable[[], tuple[torch.Tensor, ...]]


@dataclass(frozen=True, slots=True)
class Missing:
    """Why a kernel cannot be run here, in one line."""

    reason: str


def dequantize(inputs: AttentionInputs) -> Bound | Missing:
    """``dequantize_k_cache_paged_dsv4``, or its DSA counterpart, on all compressed rows."""
    cache, slots = present(inputs.compressed), compressed_slots(inputs)
    if inputs.site.layer is LayerType.DSA:
        kernel = _function("dsa.dequant_k_cache", "dequantize_k_cache_paged_dsa")
        if isinstance(kernel, Missing):
            return kernel
        rows = cache.data.view(torch.float8_e4m3fn).view(-1, 1, cache.fmt.bytes_per_token)
        return Bound(lambda: (kernel(rows, slots).squeeze(1),))
    kernel = _function("dsv4.dequant_k_cache", "dequantize_k_cache_paged_dsv4")
    if isinstance(kernel, Missing):
        return kernel
    out = torch.empty(len(slots), 1, cache.fmt.head_dim, dtype=torch.bfloat16, device=slots.device)
    return Bound(lambda: (kernel(cache.data, slots, cache.page_size, out=out).squeeze(1),))


def combine(inputs: AttentionInputs) -> Bound | Missing:
    """``combine_topk_swa_indices`` of SGLang's sparse prefill."""
    kernel = _function("dsv4.sparse_prefill_kernels", "combine_topk_swa_indices")
    if isinstance(kernel, Missing) or inputs.topk_indices is None:
        return kernel if isinstance(kernel, Missing) else Missing("bound for layers with a top-k only")
    site, device = inputs.site, inputs.q.device
    ends = inputs.cu_window[:-1].int()
    extends = torch.tensor([0, *inputs.shape.extend_lens()], dtype=torch.int32, device=device).cumsum(0).int()
    arguments = (
        *(inputs.topk_indices, extends, inputs.positions, inputs.seq_lens),
        (inputs.cu_window[1:] - inputs.cu_window[:-1]).int(),
        *(inputs.cu_compressed[:-1].int(), ends + inputs.work.compressed_rows),
        *(SWA_WINDOW, site.layer.compress_ratio, site.topk),
    )
    out = torch.empty(inputs.work.num_qo_tokens, inputs.work.index_width, dtype=torch.int32, device=device)
    lengths = torch.empty(inputs.work.num_qo_tokens, dtype=torch.int32, device=device)
    return Bound(lambda: tuple(kernel(*arguments, out_indices=out, out_lens=lengths)))


def metadata(context_lens: torch.Tensor, num_sms: int) -> Bound | Missing:
    """``get_paged_mqa_logits_metadata``, compiled by SGLang at run time."""
    kernel = _function("dsv4", "get_paged_mqa_logits_metadata")
    if isinstance(kernel, Missing):
        return kernel
    return Bound(lambda: (kernel(context_lens, BLOCK_KV, num_sms),))


def _function(module: str, name: str) -> Any:
    """A function of SGLang's, or a :class:`Missing`."""
    try:
        return getattr(importlib.import_module(f"{_OPS}.{module}"), name)
    except (
        Exception
    ) as error:  # its imports run code of many libraries, any of which may be absent or of another version
        said = str(error).splitlines()[0] if str(error) else ""
        return Missing(f"sglang has no {name} here ({type(error).__name__}: {said})")
