"""Every tunable kernel on inputs of one size, as a forward would call it: what a tuner and a benchmark run.

Sizes are those of :data:`mla_tune.sites.launch_parameters.KERNELS`. Rows lie in shuffled pages; c4a has its compressed rows
spread over requests of at most 256K rows, as in a batch of long contexts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from mla_tune.kernels.backend import Backend
from mla_tune.kernels.combine import combine_topk_swa_indices
from mla_tune.kernels.dequantize import dequantize_k_cache_paged
from mla_tune.kernels.indexer_metadata import BLOCK_KV, paged_mqa_logits_metadata
from mla_tune.kernels.inputs import AttentionInputs, InputBuilder
from mla_tune.kernels.prepare import Preparation
from mla_tune.kernels.prepare_jobs import IndexJob, RowsJob
from mla_tune.kernels.select import compact_selected, mark_selected
from mla_tune.kernels.slot_ids import build_compressed_row_ids
from mla_tune.kernels.workspace import present
from mla_tune.sites.launch_parameters import (
    CombineConfig,
    Config,
    DequantizeConfig,
    MetadataConfig,
    PrepareConfig,
    SelectConfig,
    SlotIdsConfig,
)
from mla_tune.sites.shape import Shape
from mla_tune.sites.site import LayerType, Site, SiteName

_K = 1024
_REQUEST_ROWS = 256 * _K
"""Compressed rows of the longest c4a context, 1M tokens."""
_PREPARED_TOKENS = 64
C4A = Site(SiteName.PREFILL_ATTENTION, LayerType.C4A, 64, 512)
C128A = Site(SiteName.PREFILL_ATTENTION, LayerType.C128A, 64)
DSA = Site(SiteName.PREFILL_ATTENTION, LayerType.DSA, 64, 2048)


@dataclass(frozen=True, slots=True)
class KernelCase:
    """A kernel bound to inputs."""

    run: Callable[[Config | None, Backend | None], None]
    """Launch it with these parameters, by that implementation; None for the defaults."""
    outputs: tuple[torch.Tensor, ...]
    """All that it writes and another one reads."""
    moved_bytes: int
    """Bytes that it must read and write."""
    canonical: Callable[[torch.Tensor], torch.Tensor] = lambda output: output
    """An output as it can be compared, where more than one is right."""


def kernel_case(kernel: str, size: int, builder: InputBuilder, sm_count: int) -> KernelCase:
    """``kernel`` (a key of :data:`mla_tune.sites.launch_parameters.KERNELS`) at ``size``."""
    if kernel == "dequantize_v4":
        return dequantize_case(builder.attention(C4A, _rows_shape(size)))
    if kernel == "dequantize_dsa":
        num_reqs = max(1, -(-size // (128 * _K)))
        return dequantize_case(builder.attention(DSA, Shape(num_reqs, num_reqs, size)))
    if kernel == "slot_ids":
        return slot_ids_case(builder.attention(C4A, _rows_shape(size)))
    if kernel == "combine_topk":
        return combine_case(builder.attention(C4A, Shape(1, size, 128 * _K)))
    if kernel == "combine_all":
        return combine_case(builder.attention(C128A, Shape(1, size, 1024 * _K)))
    if kernel == "metadata":
        return metadata_case(builder.context_lens(C4A, Shape(1, size, max(size, 128 * _K))), sm_count)
    if kernel == "prepare":
        return prepare_case(builder.attention(C4A, _rows_shape(size, _PREPARED_TOKENS)))
    return select_case(builder.attention(C4A, Shape(1, size, 1024 * _K)))


def _rows_shape(rows: int, tokens: int = 1) -> Shape:
    num_reqs = max(1, -(-rows // _REQUEST_ROWS))
    return Shape(num_reqs, max(tokens, num_reqs), rows * LayerType.C4A.compress_ratio)


def compressed_slots(inputs: AttentionInputs) -> torch.Tensor:
    """Slot of every compressed row, (rows,) int32."""
    cache = present(inputs.compressed)
    slots = torch.empty(inputs.work.compressed_rows, dtype=torch.int32, device=inputs.q.device)
    build_compressed_row_ids(
        cache.page_table, inputs.row_counts, inputs.cu_compressed, slots, cache.page_size, backend=Backend.TORCH
    )
    return slots


def dequantize_case(inputs: AttentionInputs) -> KernelCase:
    """All compressed rows of ``inputs``."""
    cache, slots = present(inputs.compressed), compressed_slots(inputs)
    out = inputs.workspace[: len(slots)]

    def run(config: Config | None, backend: Backend | None) -> None:
        given = config if isinstance(config, DequantizeConfig) else None
        dequantize_k_cache_paged(cache.data, slots, out, cache.fmt, cache.page_size, given, backend)

    return KernelCase(run, (out,), len(slots) * (cache.fmt.bytes_per_token + 2 * cache.fmt.head_dim))


def slot_ids_case(inputs: AttentionInputs) -> KernelCase:
    """Slots of all compressed rows."""
    cache, out = present(inputs.compressed), compressed_slots(inputs)

    def run(config: Config | None, backend: Backend | None) -> None:
        given = config if isinstance(config, SlotIdsConfig) else None
        table, ends = cache.page_table, inputs.cu_compressed
        build_compressed_row_ids(table, inputs.row_counts, ends, out, cache.page_size, given, backend)

    return KernelCase(run, (out,), out.nbytes + out.nbytes // cache.page_size)


def combine_case(inputs: AttentionInputs) -> KernelCase:
    """The index matrix of every query."""
    size, device = (inputs.work.num_qo_tokens, inputs.work.index_width), inputs.q.device
    out = torch.empty(size, dtype=torch.int32, device=device)
    lengths = torch.empty(size[:1], dtype=torch.int32, device=device)
    window_base = inputs.cu_window[:-1] + inputs.work.compressed_rows

    def run(config: Config | None, backend: Backend | None) -> None:
        combine_topk_swa_indices(
            inputs.topk_indices,
            inputs.positions,
            inputs.token_to_req,
            compressed_base=inputs.cu_compressed[:-1],
            window_base=window_base,
            window_start=inputs.window_start,
            layer=inputs.site.layer,
            out=out,
            out_lengths=lengths,
            topk=inputs.site.topk,
            config=config if isinstance(config, CombineConfig) else None,
            backend=backend,
        )

    read = 0 if inputs.topk_indices is None else inputs.topk_indices.nbytes
    return KernelCase(run, (out, lengths), read + out.nbytes + lengths.nbytes + 2 * inputs.positions.nbytes)


def metadata_case(context_lens: torch.Tensor, sm_count: int) -> KernelCase:
    """The schedule of all rows."""
    out = torch.empty((sm_count + 1, 2), dtype=torch.int32, device=context_lens.device)

    def run(config: Config | None, backend: Backend | None) -> None:
        given = config if isinstance(config, MetadataConfig) else None
        paged_mqa_logits_metadata(context_lens, BLOCK_KV, sm_count, out, given, backend)

    return KernelCase(run, (out,), context_lens.nbytes + out.nbytes)


def prepare_case(inputs: AttentionInputs, layered: bool = False) -> KernelCase:
    """Compressed rows, window rows and indices of a c4a layer.

    Each run binds the preparation anew; with ``layered`` only the first does, and a run gives what a layer has of its own.
    """
    compressed, window, topk = present(inputs.compressed), present(inputs.window), inputs.topk_indices
    if topk is None:
        raise ValueError(f"{inputs.site.key} has no top-k selection")
    split, size, device = inputs.work.compressed_rows, (inputs.work.num_qo_tokens, inputs.work.index_width), topk.device
    ends, rows = inputs.cu_compressed, inputs.workspace[:split]
    jobs = (
        RowsJob(
            compressed.data, compressed.page_table, inputs.row_counts, ends, compressed.fmt, compressed.page_size, rows
        ),
        RowsJob(
            *(window.data, window.page_table, inputs.seq_lens, inputs.cu_window),
            *(window.fmt, window.page_size, inputs.workspace[split:]),
        ),
    )
    indices = IndexJob(
        topk_indices=topk,
        positions=inputs.positions,
        token_to_req=inputs.token_to_req,
        compressed_base=ends[:-1],
        window_base=inputs.cu_window[:-1] + split,
        window_start=inputs.window_start,
        out=torch.empty(size, dtype=torch.int32, device=device),
        out_lengths=torch.empty(size[:1], dtype=torch.int32, device=device),
        topk=inputs.site.topk or 0,
    )

    bound: dict[tuple[Config | None, Backend | None], Preparation] = {}

    def run(config: Config | None, backend: Backend | None) -> None:
        if not layered or (config, backend) not in bound:
            given = config if isinstance(config, PrepareConfig) else None
            bound[config, backend] = Preparation(*jobs, indices, given, backend)
        own = (compressed.data, window.data, topk) if layered else ()
        bound[config, backend].run(*own)

    row_bytes = compressed.fmt.bytes_per_token + 2 * compressed.fmt.head_dim
    moved = inputs.work.rows * row_bytes + topk.nbytes + indices.out.nbytes
    return KernelCase(run, (inputs.workspace, indices.out, indices.out_lengths), moved)


def select_case(inputs: AttentionInputs) -> KernelCase:
    """Both steps of a selection, one after the other; which row gets which place may differ, the set of slots not."""
    topk, chosen, slots = inputs.site.topk or 0, inputs.topk_indices, compressed_slots(inputs)
    if chosen is None:
        raise ValueError(f"{inputs.site.key} has no top-k selection")
    device, rows = slots.device, len(slots)
    marks = torch.zeros(rows, dtype=torch.uint8, device=device)
    row_map = torch.empty(rows, dtype=torch.int32, device=device)
    selected = torch.full((min(rows, chosen.numel()),), -77, dtype=torch.int32, device=device)
    count = torch.zeros(1, dtype=torch.int32, device=device)
    base = inputs.cu_compressed[:-1]

    def run(config: Config | None, backend: Backend | None) -> None:
        given = config if isinstance(config, SelectConfig) else None
        layer, tokens = inputs.site.layer, (chosen, inputs.positions, inputs.token_to_req, base)
        mark_selected(*tokens, marks, count, layer, topk, given, backend)
        compact_selected(marks, slots, row_map, selected, count, given, backend)

    moved = chosen.nbytes + rows + round(13 * inputs.work.distinct_rows)
    return KernelCase(run, (selected, count), moved, canonical=lambda output: output.sort().values)
