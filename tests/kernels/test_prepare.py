from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mla_tune.errors import UsageError
from mla_tune.kernels.formats import DSA, V4, KVFormat, quantize_k_cache
from mla_tune.kernels.inputs import AttentionInputs, InputBuilder, PagedCache
from mla_tune.kernels.prepare import Preparation
from mla_tune.kernels.prepare_jobs import IndexJob, RowsJob
from mla_tune.kernels.reference import (
    combine_reference,
    compressed_row_ids_reference,
    dequantize_reference,
    swa_token_ids_reference,
)
from mla_tune.sites.launch_parameters import PrepareConfig
from mla_tune.sites.shape import Shape
from mla_tune.sites.site import LayerType, Site, SiteName
from tests.conftest import Target
from tests.kernels.test_dequantize import assert_equal
from tests.shapes import shapes

LAYERS = {
    LayerType.SWA_ONLY: Site(SiteName.PREFILL_ATTENTION, LayerType.SWA_ONLY, 64),
    LayerType.C4A: Site(SiteName.PREFILL_ATTENTION, LayerType.C4A, 64, 16),
    LayerType.C128A: Site(SiteName.PREFILL_ATTENTION, LayerType.C128A, 64),
    LayerType.DSA: Site(SiteName.PREFILL_ATTENTION, LayerType.DSA, 64, 16),
}
CONFIGS = [None, PrepareConfig(1, 1, 1, 64), PrepareConfig(8, 4, 4, 256)]


def rows_job(inputs: AttentionInputs, cache: PagedCache | None, windowed: bool) -> RowsJob | None:
    if cache is None:
        return None
    lens, ends = (inputs.seq_lens, inputs.cu_window) if windowed else (inputs.row_counts, inputs.cu_compressed)
    out = torch.full((int(ends[-1]), inputs.head_dim), torch.nan, dtype=torch.bfloat16, device=inputs.q.device)
    return RowsJob(cache.data, cache.page_table, lens, ends, cache.fmt, cache.page_size, out)


def index_job(inputs: AttentionInputs) -> IndexJob | None:
    if inputs.site.layer is not LayerType.C4A or inputs.topk_indices is None:
        return None
    size, device = (inputs.work.num_qo_tokens, inputs.work.index_width), inputs.q.device
    return IndexJob(
        topk_indices=inputs.topk_indices,
        positions=inputs.positions,
        token_to_req=inputs.token_to_req,
        compressed_base=inputs.cu_compressed[:-1],
        window_base=inputs.cu_window[:-1] + inputs.work.compressed_rows,
        window_start=inputs.window_start,
        out=torch.full(size, -77, dtype=torch.int32, device=device),
        out_lengths=torch.full(size[:1], -77, dtype=torch.int32, device=device),
        topk=16,
    )


def expected_rows(job: RowsJob, windowed: bool) -> torch.Tensor:
    build = swa_token_ids_reference if windowed else compressed_row_ids_reference
    slots = build(job.page_table, job.lens, job.cu_rows, job.page_size)
    return dequantize_reference(job.cache, slots, job.fmt, job.page_size)


@pytest.mark.parametrize("layer", list(LayerType))
@given(shape=shapes(max_reqs=5, max_extend=4, max_context=40), config=st.sampled_from(CONFIGS))
@example(shape=Shape(1, 1, 1), config=None)
@example(shape=Shape(1, 3, 300), config=None)
@example(shape=Shape(65, 65, 70), config=CONFIGS[1])  # more requests than are looked up at once
@settings(max_examples=4)
def test_one_launch_prepares_what_the_references_say(
    target: Target, layer: LayerType, shape: Shape, config: PrepareConfig | None
) -> None:
    inputs = InputBuilder(torch.device(target.device), seed=1).attention(LAYERS[layer], shape)
    compressed, window = rows_job(inputs, inputs.compressed, False), rows_job(inputs, inputs.window, True)
    indices = index_job(inputs)
    Preparation(compressed, window, indices, config, target.backend).run()
    for job, windowed in ((compressed, False), (window, True)):
        if job is not None:
            assert_equal(job.out, expected_rows(job, windowed), target)
    if indices is not None:
        out, lengths = expected_indices(indices, layer)
        assert torch.equal(indices.out, out)
        assert torch.equal(indices.out_lengths, lengths)


@pytest.mark.parametrize("layer", list(LayerType))
@given(shape=shapes(max_reqs=3, max_extend=4, max_context=40), layers=st.integers(2, 3))
@settings(max_examples=4)
def test_each_layer_is_prepared_from_its_own_caches_and_selection(
    target: Target, layer: LayerType, shape: Shape, layers: int
) -> None:
    builds = [InputBuilder(torch.device(target.device), seed).attention(LAYERS[layer], shape) for seed in range(layers)]
    first = builds[0]
    compressed, window = rows_job(first, first.compressed, False), rows_job(first, first.window, True)
    indices = index_job(first)
    preparation = Preparation(compressed, window, indices, None, target.backend)
    for own in (*builds, first):
        cache, window_cache = (kept.data if kept else None for kept in (own.compressed, own.window))
        topk = own.topk_indices if indices else None
        preparation.run(cache, window_cache, topk)
        for job, windowed, data in ((compressed, False, cache), (window, True, window_cache)):
            if job is not None and data is not None:
                assert_equal(job.out, expected_rows(replace(job, cache=data), windowed), target)
        if indices is not None and topk is not None:
            out, lengths = expected_indices(replace(indices, topk_indices=topk), layer)
            assert torch.equal(indices.out, out)
            assert torch.equal(indices.out_lengths, lengths)


def test_a_layer_whose_tensors_differ_from_those_bound_is_refused_in_one_line() -> None:
    inputs = InputBuilder(torch.device("cpu")).attention(LAYERS[LayerType.DSA], Shape(2, 4, 300))
    compressed = rows_job(inputs, inputs.compressed, False)
    assert compressed is not None
    preparation, cache = Preparation(compressed, None), compressed.cache
    for own in (cache[:-1], cache.int(), cache.T.contiguous().T):
        with pytest.raises(UsageError, match=r"must be like the one bound, torch.uint8 .*: got torch\.") as error:
            preparation.run(own)
        assert "\n" not in str(error.value)
    with pytest.raises(UsageError, match="it has no use for"):
        preparation.run(None, cache)


def expected_indices(job: IndexJob, layer: LayerType) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = (job.positions, job.token_to_req, job.compressed_base, job.window_base, job.window_start)
    return combine_reference(job.topk_indices, *tokens, layer, job.out.shape[1], job.topk)


def test_wrong_arguments_are_refused_in_one_line() -> None:
    inputs = InputBuilder(torch.device("cpu")).attention(LAYERS[LayerType.C4A], Shape(2, 4, 300))
    compressed = rows_job(inputs, inputs.compressed, False)
    indices = index_job(inputs)
    assert compressed is not None
    wrong_calls: list[Callable[[], object]] = [
        lambda: Preparation(None, None, None),
        lambda: Preparation(compressed, None, indices),
        lambda: replace(compressed, lens=compressed.lens[:1]),
        lambda: replace(compressed, out=compressed.out.float()),
        lambda: replace(compressed, out=compressed.out[:, :500]),
        lambda: replace(compressed, page_size=2),
    ]
    for call in wrong_calls:
        with pytest.raises(UsageError) as error:
            call()
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("fmt", [V4, DSA], ids=lambda fmt: str(fmt.name))
def test_a_page_behind_2_gib_of_cache_is_read_where_it_lies(target: Target, fmt: KVFormat) -> None:
    pages, page_bytes = (1 << 31) // fmt.page_bytes(64) + 2, fmt.page_bytes(64)
    # Only one page is touched. An offset of 32 bits would wrap to 2 GiB before the cache, which is memory of ours too.
    memory = torch.empty((1 << 31) + pages * page_bytes, dtype=torch.uint8, device=target.device)
    cache = memory[1 << 31 :].view(pages, page_bytes)
    values = torch.randn(64, fmt.head_dim, generator=torch.Generator().manual_seed(0))
    cache[-1] = quantize_k_cache(values, fmt, 64)[0].to(target.device)
    ints = partial(torch.tensor, dtype=torch.int32, device=target.device)
    out = torch.full((3, fmt.head_dim), torch.nan, dtype=torch.bfloat16, device=target.device)
    job = RowsJob(cache, ints([[pages - 1]]), ints([3]), ints([0, 3]), fmt, 64, out)
    Preparation(job, None, backend=target.backend).run()
    assert_equal(out, dequantize_reference(cache[-1:], torch.arange(3, device=target.device), fmt, 64))
