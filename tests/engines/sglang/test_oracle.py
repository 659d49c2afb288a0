"""SGLang's own sparse-prefill bookkeeping, in Triton's interpreter, as an independent oracle for our stages.

Both get the same pages, lengths and selections; slot ids, index matrices and dequantized rows have to come out the same.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch

from mla_tune.kernels.adapters import sglang_kernels
from mla_tune.kernels.backend import Backend
from mla_tune.kernels.combine import combine_topk_swa_indices
from mla_tune.kernels.dequantize import dequantize_k_cache_paged
from mla_tune.kernels.formats import DSA, V4, quantize_k_cache
from mla_tune.kernels.inputs import AttentionInputs, InputBuilder, PagedCache
from mla_tune.kernels.slot_ids import build_compressed_row_ids, build_swa_token_ids
from mla_tune.sites.shape import Shape
from mla_tune.sites.site import MODELS, LayerType, SiteName

SHAPES = [Shape(1, 16, 200), Shape(3, 40, 3000), Shape(5, 5, 5), Shape(2, 300, 1500)]
"""Few requests and many, contexts shorter than a window, than a page and than a compressed row, and longer ones."""
FLASH = MODELS["deepseek-v4-flash"]


@pytest.fixture(scope="module", params=list(Backend), ids=str)
def backend(request: pytest.FixtureRequest) -> Backend:
    """Both of our implementations."""
    return Backend(request.param)


@pytest.fixture(scope="module", params=SHAPES, ids=str)
def shape(request: pytest.FixtureRequest) -> Shape:
    """Each of the shapes."""
    assert isinstance(request.param, Shape)
    return request.param


def inputs_of(layer: LayerType, shape: Shape) -> AttentionInputs:
    """Random inputs of one layer type."""
    return InputBuilder(torch.device("cpu"), seed=7).attention(FLASH.site(SiteName.PREFILL_ATTENTION, layer), shape)


def slots(cache: PagedCache, requests: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """The slot of each (request, row), 0 where its page is absent."""
    pages = cache.page_table[requests, rows // cache.page_size].clamp_min(0)
    return (pages * cache.page_size + rows % cache.page_size).int()


def their_cache(inputs: AttentionInputs) -> Any:
    """SGLang's chunk cache of the same forward."""
    from sglang.srt.layers.attention.dsv4.sparse_prefill_utils import SparsePrefillChunkCache

    assert inputs.window is not None
    seqs, extends = inputs.shape.seq_lens(), torch.tensor(inputs.shape.extend_lens(), dtype=torch.int32)
    longest, num_reqs = max(seqs), len(seqs)
    req_to_token = torch.arange(num_reqs * longest, dtype=torch.int32).view(num_reqs, longest)
    requests = torch.arange(num_reqs).repeat_interleave(longest)
    return SparsePrefillChunkCache.build(
        seq_lens=inputs.seq_lens,
        extend_seq_lens=extends,
        query_lens=extends,
        query_pos=inputs.positions,
        req_pool_indices=torch.arange(num_reqs, dtype=torch.int32),
        req_to_token=req_to_token,
        full_to_swa=slots(inputs.window, requests, torch.arange(longest).repeat(num_reqs)).long(),
        swa_window_size=128,
        swa_page_size=inputs.window.page_size,
        num_qo_tokens=inputs.shape.num_qo_tokens,
        max_seq_len=longest,
        total_swa=inputs.work.window_rows,
        seq_lens_cpu=seqs,
    )


def ours(inputs: AttentionInputs, backend: Backend) -> tuple[torch.Tensor, torch.Tensor]:
    """Our index matrix and its lengths."""
    work = inputs.work
    out = torch.empty(work.num_qo_tokens, work.index_width, dtype=torch.int32)
    lengths = torch.empty(work.num_qo_tokens, dtype=torch.int32)
    combine_topk_swa_indices(
        inputs.topk_indices,
        inputs.positions,
        inputs.token_to_req,
        compressed_base=inputs.cu_compressed[:-1],
        window_base=inputs.cu_window[:-1] + work.compressed_rows,
        window_start=inputs.window_start,
        layer=inputs.site.layer,
        out=out,
        out_lengths=lengths,
        topk=inputs.site.topk,
        backend=backend,
    )
    return out, lengths


def assert_same_indices(mine: tuple[torch.Tensor, torch.Tensor], theirs: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Equal lengths, and equal entries as far as they reach; a kernel reads no further."""
    assert torch.equal(mine[1], theirs[1])
    assert mine[0].shape[1] == theirs[0].shape[1]
    valid = torch.arange(mine[0].shape[1]) < mine[1][:, None]
    assert torch.equal(mine[0][valid], theirs[0][valid])


def test_window_slots_are_theirs(shape: Shape, backend: Backend, v4: ModuleType) -> None:
    inputs = inputs_of(LayerType.SWA_ONLY, shape)
    window = inputs.window
    assert window is not None
    out = torch.empty(inputs.work.window_rows, dtype=torch.int32)
    build_swa_token_ids(window.page_table, inputs.seq_lens, inputs.cu_window, out, window.page_size, backend=backend)
    theirs = their_cache(inputs)
    assert torch.equal(out, theirs.swa_token_ids)
    assert torch.equal(inputs.window_start, theirs.swa_first_pos)
    assert torch.equal(inputs.cu_window.int(), theirs.swa_offsets.int())


def test_indices_of_the_window_alone_are_theirs(shape: Shape, backend: Backend, v4: ModuleType) -> None:
    inputs = inputs_of(LayerType.SWA_ONLY, shape)
    theirs = their_cache(inputs)
    assert_same_indices(ours(inputs, backend), (theirs.c0_combined_indices, theirs.c0_combined_lens))


def test_rows_and_indices_of_a_top_k_layer_are_theirs(shape: Shape, backend: Backend, v4: ModuleType) -> None:
    inputs = inputs_of(LayerType.C4A, shape)
    cache, topk = inputs.compressed, inputs.topk_indices
    assert cache is not None
    assert topk is not None
    theirs = their_cache(inputs)
    gather = theirs.ensure_compressed(4, cache.page_table[inputs.token_to_req.long()], cache.page_size)
    out = torch.empty(inputs.work.compressed_rows, dtype=torch.int32)
    build_compressed_row_ids(
        cache.page_table, inputs.row_counts, inputs.cu_compressed, out, cache.page_size, backend=backend
    )
    assert torch.equal(out, gather.flat_token_ids)
    assert_same_indices(ours(inputs, backend), theirs.combine_compressed(4, topk))


def test_rows_and_indices_of_a_layer_that_selects_all_are_theirs(
    shape: Shape, backend: Backend, v4: ModuleType
) -> None:
    inputs = inputs_of(LayerType.C128A, shape)
    cache = inputs.compressed
    assert cache is not None
    width = max(1, max(shape.seq_lens()) // 128)
    column = torch.arange(width).repeat(shape.num_qo_tokens, 1)
    found = slots(cache, inputs.token_to_req.long()[:, None], column)
    page_indices = torch.where(column < ((inputs.positions + 1) // 128)[:, None], found, -1).int()
    theirs = their_cache(inputs)
    gather = theirs.ensure_c128(page_indices)
    if max(shape.seq_lens()) < 128:  # they keep a row that nothing reads
        assert torch.equal(ours(inputs, backend)[1], gather.combined_lens)
        return
    out = torch.empty(inputs.work.compressed_rows, dtype=torch.int32)
    build_compressed_row_ids(
        cache.page_table, inputs.row_counts, inputs.cu_compressed, out, cache.page_size, backend=backend
    )
    assert torch.equal(out.clamp_min(0), gather.flat_token_ids)
    assert_same_indices(ours(inputs, backend), (gather.combined_indices, gather.combined_lens))


@pytest.mark.parametrize("page_size", [256, 64, 2])
def test_dequantized_v4_rows_are_theirs_bit_for_bit(page_size: int, backend: Backend, v4: ModuleType) -> None:
    their_kernel = sglang_kernels._function("dsv4.dequant_k_cache", "dequantize_k_cache_paged_dsv4")
    generator = torch.Generator().manual_seed(3)
    scale = torch.exp2(torch.randint(-20, 20, (600, 1), generator=generator).float())
    cache = quantize_k_cache(torch.randn(600, V4.head_dim, generator=generator) * scale, V4, page_size)
    wanted = torch.randperm(600, generator=generator).int()[:97]
    out = torch.empty(97, V4.head_dim, dtype=torch.bfloat16)
    dequantize_k_cache_paged(cache, wanted, out, V4, page_size, backend=backend)
    theirs = their_kernel(cache, wanted, page_size)
    assert torch.equal(out.view(torch.int16), theirs.view(97, -1).view(torch.int16))


def test_dequantized_dsa_rows_are_theirs_but_for_rounding_on_the_cpu(backend: Backend, dsa: ModuleType) -> None:
    generator = torch.Generator().manual_seed(3)
    cache = quantize_k_cache(torch.randn(200, DSA.head_dim, generator=generator), DSA, 64)
    wanted = torch.randperm(200, generator=generator).int()[:50]
    out = torch.empty(50, DSA.head_dim, dtype=torch.bfloat16)
    dequantize_k_cache_paged(cache, wanted, out, DSA, 64, backend=backend)
    rows = cache.view(torch.float8_e4m3fn).view(-1, 64, 1, DSA.bytes_per_token)
    their_kernel = sglang_kernels._function("dsa.dequant_k_cache", "dequantize_k_cache_paged_dsa")
    theirs = their_kernel(rows, wanted)
    apart = (out.view(torch.int16).int() - theirs.view(50, -1).view(torch.int16).int()).abs().max()
    assert apart <= (1 if backend is Backend.TORCH else 0)  # torch's product rounds its float32 scale first
