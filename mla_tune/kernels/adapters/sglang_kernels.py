"""SGLang's own kernels for the stages around attention, where sglang 0.5.17 or later is installed.

The one place that knows their names and arguments. ``rows``, ``combined`` and ``metadata`` launch one kernel on given
inputs: what a stage of a site with a provider runs, and what a benchmark compares with. What sglang imports is its own
matter, so that any failure of an import is a reason and not an error.
"""

from __future__ import annotations

import importlib
import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from mla_tune.kernels.cases import compressed_slots
from mla_tune.kernels.indexer_metadata import BLOCK_KV
from mla_tune.kernels.inputs import AttentionInputs, PagedCache
from mla_tune.kernels.workspace import present
from mla_tune.sites.candidates import JIT, Candidate
from mla_tune.sites.provider import SGLANG, Provider
from mla_tune.sites.site import SWA_WINDOW, LayerType

_OPS = "sglang.kernels.ops.attention"
_KERNELS = "sglang-kernel"
"""The distribution of the module ``sgl_kernel``, whose transform V3.2's KV-cache path takes."""
_NEEDED = (
    ("dsv4.dequant_k_cache", "dequantize_k_cache_paged_dsv4"),
    ("dsa.dequant_k_cache", "dequantize_k_cache_paged_dsa"),
    ("dsv4.sparse_prefill_kernels", "combine_topk_swa_indices"),
    ("dsv4", "get_paged_mqa_logits_metadata"),
)
"""(module, function) of every kernel without which a sweep with SGLang's kernels is refused."""
_UP_TO_0_5_22 = {
    "dequantize_k_cache_paged_dsv4": (f"{_OPS}.dsv4.dequant_k_cache", "dequantize_k_cache_paged"),
    "dequantize_k_cache_paged_dsa": (f"{_OPS}.dsa.dequant_k_cache", "dequantize_k_cache_paged"),
    "combine_topk_swa_indices": ("sglang.srt.layers.attention.dsv4.sparse_prefill_utils", "combine_topk_swa_indices"),
}
"""Where a kernel was, and by what name, before 0.5.23."""


@dataclass(frozen=True, slots=True)
class BoundKernel:
    """A kernel of SGLang's bound to inputs; ``run`` gives what it filled, in the order of our case's outputs."""

    run: Callable[[], tuple[torch.Tensor, ...]]


@dataclass(frozen=True, slots=True)
class Missing:
    """Why a kernel cannot be run here, in one line."""

    reason: str


@dataclass(frozen=True, slots=True)
class FoundKernels:
    """What of SGLang's kernels can be run here."""

    provider: Provider
    left_out: str
    """One line: why the top-k transform cannot; empty if it can."""


def installed(kind: str) -> FoundKernels | Missing:
    """SGLang's kernels on a ``cpu`` (in Triton's interpreter) or ``cuda`` device, or why they cannot be measured here."""
    lacking = _lacking(kind)
    if lacking is not None:
        return Missing(
            f"--provider {SGLANG} needs SGLang's kernels: {lacking}; accepted: sglang 0.5.17 or later and an NVIDIA GPU; "
            "next: `pip install sglang` in this environment, or pass --provider own"
        )
    reason = _untransformed(kind)
    if reason:
        return FoundKernels(Provider(SGLANG, version(SGLANG)), f"stage topk_transform is left out: {reason}")
    return FoundKernels(Provider(SGLANG, version(SGLANG), version(_KERNELS)), "")


def unsupported(provider: Provider, candidate: Candidate, kind: str) -> str | None:
    """Why the kernels of ``provider`` cannot serve ``candidate`` here; None if they can."""
    reason = missing(provider, kind)
    if reason is None and kind == "cpu" and candidate is JIT:
        return "get_paged_mqa_logits_metadata of sglang is compiled for a GPU"
    return reason


@lru_cache(maxsize=8)
def missing(provider: Provider, kind: str) -> str | None:
    """Why the kernels of ``provider`` are not here, in one sentence; None if they are. Asked once: it imports."""
    lacking = _lacking(kind)
    if lacking is not None:
        return f"{provider} is not here: {lacking}"
    if version(SGLANG) != provider.version:
        return f"{provider} is not here: this is sglang {version(SGLANG)}"
    if provider.kernels and provider.kernels != (found := _kernels_version()):
        return f"{_KERNELS} {provider.kernels} is not here: {f'this is {found}' if found else 'it is not installed'}"
    return None


def rows(cache: PagedCache) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | Missing:
    """``dequantize_k_cache_paged_dsv4``, or its DSA counterpart, of ``cache``.

    The function takes slots (rows,) int32 and an output (rows, head_dim) bf16 and gives the rows: the output itself for V4,
    a tensor of its own for DSA, whose kernel takes none.
    """
    if cache.fmt.name == "dsa":
        kernel = _function("dsa.dequant_k_cache", "dequantize_k_cache_paged_dsa")
        data = cache.data.view(torch.float8_e4m3fn).view(-1, 1, cache.fmt.bytes_per_token)
        return kernel if isinstance(kernel, Missing) else lambda slots, _out: kernel(data, slots).squeeze(1)
    kernel = _function("dsv4.dequant_k_cache", "dequantize_k_cache_paged_dsv4")
    if isinstance(kernel, Missing):
        return kernel
    return lambda slots, out: kernel(cache.data, slots, cache.page_size, out=out[:, None]).squeeze(1)


def dequantize(inputs: AttentionInputs) -> BoundKernel | Missing:
    """:func:`rows` of all compressed rows of ``inputs``."""
    cache, slots = present(inputs.compressed), compressed_slots(inputs)
    kernel = rows(cache)
    if isinstance(kernel, Missing):
        return kernel
    out = torch.empty(len(slots), cache.fmt.head_dim, dtype=torch.bfloat16, device=slots.device)
    return BoundKernel(lambda: (kernel(slots, out),))


def combined(
    inputs: AttentionInputs, topk_indices: torch.Tensor | None, out: torch.Tensor, lengths: torch.Tensor
) -> BoundKernel | Missing:
    """``combine_topk_swa_indices`` of SGLang's sparse prefill into ``out`` (num_qo_tokens, index_width) and ``lengths``.

    It takes a selection in every layer type: columns counted up for c128a, none at all for swa_only.
    """
    kernel = _function("dsv4.sparse_prefill_kernels", "combine_topk_swa_indices")
    if isinstance(kernel, Missing):
        return kernel
    site, device, tokens = inputs.site, inputs.q.device, inputs.work.num_qo_tokens
    topk = site.topk or 0
    if site.layer is LayerType.C128A:
        topk = max(1, inputs.shape.context // site.layer.compress_ratio)
    if topk_indices is None:
        topk_indices = torch.arange(max(topk, 1), dtype=torch.int32, device=device).repeat(tokens, 1)
    ends = inputs.cu_window[:-1].int()
    extends = torch.tensor([0, *inputs.shape.extend_lens()], dtype=torch.int32, device=device).cumsum(0).int()
    # The first releases told a query's position from its request's lengths.
    positions = (inputs.positions,) if "query_pos" in inspect.signature(kernel).parameters else ()
    arguments = (
        *(topk_indices, extends, *positions, inputs.seq_lens),
        (inputs.cu_window[1:] - inputs.cu_window[:-1]).int(),
        *(inputs.cu_compressed[:-1].int(), ends + inputs.work.compressed_rows),
        *(SWA_WINDOW, max(site.layer.compress_ratio, 1), topk),
    )
    return BoundKernel(lambda: tuple(kernel(*arguments, out_indices=out, out_lens=lengths)))


def combine(inputs: AttentionInputs) -> BoundKernel | Missing:
    """:func:`combined` of the inputs' own selection into buffers of its own."""
    out = torch.empty(inputs.work.num_qo_tokens, inputs.work.index_width, dtype=torch.int32, device=inputs.q.device)
    return combined(inputs, inputs.topk_indices, out, torch.empty_like(out[:, 0]))


def metadata(context_lens: torch.Tensor, num_sms: int) -> BoundKernel | Missing:
    """``get_paged_mqa_logits_metadata``, compiled by SGLang at run time."""
    kernel = _function("dsv4", "get_paged_mqa_logits_metadata")
    if isinstance(kernel, Missing):
        return kernel
    return BoundKernel(lambda: (kernel(context_lens, BLOCK_KV, num_sms),))


def slots_of_topk(inputs: AttentionInputs, slots: torch.Tensor, raw: torch.Tensor) -> BoundKernel | Missing:
    """V4's transform ``topk_transform_paged_v2``: the top-k of the scores as cache slots, and as rows of the request.

    ``slots`` and ``raw`` are (num_qo_tokens, topk) int32. In a prefill sglang 0.5.23 has both written on either path; its
    plan is made once a forward, and is no part of this.
    """
    kernel, plan = _function("dsv4.topk", "topk_transform_paged_v2"), _function("dsv4.topk", "plan_topk_v2")
    if isinstance(kernel, Missing) or isinstance(plan, Missing):
        return kernel if isinstance(kernel, Missing) else plan
    cache, lens = inputs.compressed, _scored(inputs)
    if cache is None or inputs.scores is None:
        return Missing("bound for layers with a top-k only")
    tables = cache.page_table[inputs.token_to_req.long()]  # a row for each query, as SGLang keeps it
    arguments = (inputs.scores, lens, tables, slots, cache.page_size, plan(lens), raw)

    def run() -> tuple[torch.Tensor, ...]:
        kernel(*arguments)
        return slots, raw

    return BoundKernel(run)


def workspace_rows_of_topk(inputs: AttentionInputs, out: torch.Tensor) -> BoundKernel | Missing:
    """V3.2's transform for ``sparse_fwd``, ``topk_transform_ragged_v2``: the top-k as workspace rows in ``out``.

    SGLang scores all requests' rows in one matrix; here each query has its own request's, which the kernel reads alike.
    """
    kernel = _function("dsv4.topk", "topk_transform_ragged_v2")
    if isinstance(kernel, Missing):
        return kernel
    lens, offsets = _scored(inputs), inputs.cu_compressed[inputs.token_to_req.long()].int()
    starts = torch.zeros_like(lens)

    def run() -> tuple[torch.Tensor, ...]:
        kernel(inputs.scores, lens, out_offsets=offsets, out_indices=out, row_starts=starts)
        return (out,)

    return BoundKernel(run)


def dsa_slots_of_topk(inputs: AttentionInputs) -> BoundKernel | Missing:
    """V3.2's transform for ``with_kvcache``, sgl_kernel's ``fast_topk_transform_fused``: slots in a tensor of its own."""
    kernel, cache = _imported("sgl_kernel", "fast_topk_transform_fused"), inputs.compressed
    if isinstance(kernel, Missing) or cache is None:
        return kernel if isinstance(kernel, Missing) else Missing("bound for layers with a top-k only")
    lens, device = _scored(inputs), inputs.q.device
    starts = torch.zeros_like(lens)
    within = torch.arange(cache.page_size, dtype=torch.int32, device=device)
    tokens = (cache.page_table[:, :, None] * cache.page_size + within).flatten(1)  # slot of every token
    extends = torch.tensor([0, *inputs.shape.extend_lens()], dtype=torch.int32, device=device).cumsum(0).int()
    topk = inputs.site.topk
    return BoundKernel(lambda: (kernel(inputs.scores, lens, tokens, extends, topk, row_starts=starts),))


def _scored(inputs: AttentionInputs) -> torch.Tensor:
    """Scores of each query, (num_qo_tokens,) int32: one for every compressed row that it may see."""
    return ((inputs.positions + 1) // inputs.site.layer.compress_ratio).int()


@lru_cache(maxsize=2)
def _lacking(kind: str) -> str | None:
    """Why the kernels that every provided sweep runs cannot run on a ``kind`` device; None if they can."""
    try:
        version(SGLANG)
    except PackageNotFoundError:
        return "the package sglang is not installed"
    if kind == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "they run on a GPU, and this device is the CPU"
    found = (_function(module, name) for module, name in _NEEDED)
    return next((function.reason for function in found if isinstance(function, Missing)), None)


def _untransformed(kind: str) -> str:
    """Why the top-k transforms of both paths cannot run, in one line; empty if they can."""
    if kind == "cpu":
        return "its kernels are compiled for a GPU"
    if not _kernels_version():
        return f"the package {_KERNELS} is not installed"
    plan, fused = _function("dsv4.topk", "plan_topk_v2"), _imported("sgl_kernel", "fast_topk_transform_fused")
    for function in (plan, fused):
        if isinstance(function, Missing):
            return function.reason
    try:
        plan(torch.ones(1, dtype=torch.int32, device=kind))
    except Exception as error:  # it compiles itself here: whatever the tool chain says
        return _one_line("plan_topk_v2", error)
    return ""


def _kernels_version() -> str:
    """The release of sglang-kernel that is installed; empty if none is."""
    try:
        return version(_KERNELS)
    except PackageNotFoundError:
        return ""


def _function(module: str, name: str) -> Any:
    """A function of SGLang's, or a :class:`Missing`."""
    found = _imported(f"{_OPS}.{module}", name)
    if isinstance(found, Missing) and name in _UP_TO_0_5_22:
        earlier = _imported(*_UP_TO_0_5_22[name])
        return found if isinstance(earlier, Missing) else earlier
    return found


def _imported(module: str, name: str) -> Any:
    try:
        return getattr(importlib.import_module(module), name)
    except (
        Exception
    ) as error:  # such imports run code of many libraries, any of which may be absent or of another version
        return Missing(_one_line(name, error))


def _one_line(name: str, error: Exception) -> str:
    said = next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason given")
    return f"sglang has no {name} here ({type(error).__name__}: {said})"
