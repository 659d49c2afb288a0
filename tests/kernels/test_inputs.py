"""Inputs of a point: selections, page tables and pools are what an engine would hand over, and fit the stated memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mla_tune.kernels import binding
from mla_tune.kernels.inputs import AttentionInputs, InputBuilder, PagedCache, required_bytes
from mla_tune.sites.candidates import names_at
from mla_tune.sites.shape import AnyShape, Shape
from mla_tune.sites.site import SWA_WINDOW, LayerType, Site, SiteName
from tests.shapes import every_site, one_by_one, ragged_shapes, shapes

CPU = torch.device("cpu")
DEVICE = binding.Device.current("cpu")
attention_sites = st.sampled_from(every_site(SiteName.PREFILL_ATTENTION))
small_shapes = shapes(max_reqs=4, max_extend=12, max_context=1500) | ragged_shapes(4, 12, 1500)


def build(site: Site, shape: AnyShape, seed: int = 0) -> AttentionInputs:
    return InputBuilder(CPU, seed).attention(site, shape)


def caches(inputs: AttentionInputs) -> list[PagedCache]:
    return [cache for cache in (inputs.window, inputs.compressed) if cache is not None]


def tensors(value: object) -> Iterator[torch.Tensor]:
    """Every tensor that a value holds, caches included, but the workspace, which nobody has filled."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, AttentionInputs | PagedCache):
        for field in (field for field in fields(value) if field.name != "workspace"):
            yield from tensors(getattr(value, field.name))


@settings(max_examples=25)
@given(attention_sites, small_shapes)
def test_a_selection_is_distinct_ascending_and_inside_the_querys_context(site: Site, shape: AnyShape) -> None:
    inputs = build(site, shape)
    if site.topk is None:
        assert inputs.topk_indices is None
        return
    assert inputs.topk_indices is not None
    assert inputs.topk_indices.shape == (shape.num_qo_tokens, site.topk)
    for row, position in zip(inputs.topk_indices.tolist(), inputs.positions.tolist(), strict=True):
        available = (position + 1) // site.layer.compress_ratio
        chosen = [entry for entry in row if entry >= 0]
        assert row == chosen + [-1] * (site.topk - len(chosen))
        assert len(chosen) == min(site.topk, available)
        assert sorted(set(chosen)) == chosen
        assert all(0 <= entry < available for entry in chosen)


@settings(max_examples=10)
@given(st.integers(0, 1000))
def test_a_long_context_is_selected_from_all_over_with_one_row_a_stratum(seed: int) -> None:
    site = Site(SiteName.PREFILL_ATTENTION, LayerType.C4A, 64, 512)
    inputs = build(site, Shape(1, 2, 1 << 16), seed)
    assert inputs.topk_indices is not None
    strata = inputs.topk_indices // ((1 << 14) // 512)
    assert (strata[1] == torch.arange(512)).all()


@settings(max_examples=25)
@given(attention_sites, small_shapes)
def test_page_tables_are_a_permutation_of_the_pool_that_reaches_every_row_in_use(site: Site, shape: AnyShape) -> None:
    inputs = build(site, shape)
    for cache in caches(inputs):
        pages = cache.page_table[cache.page_table >= 0]
        if pages.numel():
            assert sorted(pages.tolist()) == list(range(cache.data.shape[0]))
    for part in inputs.selections():
        for slots, length in zip(part.slot_ids.tolist(), part.lengths.tolist(), strict=True):
            assert all(0 <= slot < part.cache.shape[0] * part.page_size for slot in slots[:length])
            assert len(set(slots[:length])) == length
            assert set(slots[length:]) <= {-1}


@settings(max_examples=25)
@given(attention_sites, small_shapes)
def test_each_query_attends_to_its_window_and_selection_of_its_own_request(site: Site, shape: AnyShape) -> None:
    inputs = build(site, shape)
    lengths = [part.lengths.tolist() for part in inputs.selections()]
    expected = []
    if site.layer.has_window:
        expected.append([min(SWA_WINDOW, position + 1) for position in inputs.positions.tolist()])
    if site.layer is not LayerType.SWA_ONLY:
        rows = [(position + 1) // site.layer.compress_ratio for position in inputs.positions.tolist()]
        expected.append([count if site.topk is None else min(site.topk, count) for count in rows])
    assert lengths == expected
    mean = sum(map(sum, lengths)) / shape.num_qo_tokens
    assert mean == pytest.approx(inputs.work.attended)
    owners: dict[tuple[int, int], int] = {}
    for index, part in enumerate(inputs.selections()):
        for request, slots in zip(inputs.token_to_req.tolist(), part.slot_ids.tolist(), strict=True):
            for slot in slots:
                assert slot < 0 or owners.setdefault((index, slot // part.page_size), request) == request


@settings(max_examples=25)
@given(shapes(max_reqs=5, max_extend=30, max_context=2000) | ragged_shapes(5, 30, 2000))
def test_positions_are_the_last_of_each_request(shape: AnyShape) -> None:
    inputs = build(Site(SiteName.PREFILL_ATTENTION, LayerType.SWA_ONLY, 64), shape)
    expected = [
        (request, position)
        for request, (extend, seq) in enumerate(zip(shape.extend_lens(), shape.seq_lens(), strict=True))
        for position in range(seq - extend, seq)
    ]
    assert list(zip(inputs.token_to_req.tolist(), inputs.positions.tolist(), strict=True)) == expected
    assert inputs.seq_lens.tolist() == shape.seq_lens()


@settings(max_examples=15)
@given(attention_sites, small_shapes, st.integers(0, 1000))
def test_the_same_seed_gives_the_same_inputs(site: Site, shape: AnyShape, seed: int) -> None:
    one, other = build(site, shape, seed), build(site, shape, seed)
    assert all(a.equal(b) for a, b in zip(tensors(one), tensors(other), strict=True))


def test_pools_are_kept_between_points_grow_when_they_must_and_go_when_released() -> None:
    builder, site = InputBuilder(CPU), Site(SiteName.PREFILL_ATTENTION, LayerType.C4A, 64, 512)

    def pool(kv_tokens: int) -> int:
        compressed = builder.attention(site, Shape(1, 4, kv_tokens)).compressed
        assert compressed is not None
        return compressed.data.data_ptr()

    large = builder.attention(site, Shape(1, 4, 40000))
    assert large.compressed is not None
    assert pool(400) == pool(39000) == large.compressed.data.data_ptr()
    assert pool(80000) != large.compressed.data.data_ptr()
    last = builder.attention(site, Shape(1, 4, 400))
    builder.release()
    after = builder.attention(site, Shape(1, 4, 400))
    assert last.compressed is not None
    assert after.compressed is not None
    assert after.compressed.data.data_ptr() != last.compressed.data.data_ptr()
    assert after.q.data_ptr() != last.q.data_ptr()


def test_a_large_pool_repeats_its_tile_and_holds_only_finite_rows() -> None:
    inputs = build(Site(SiteName.PREFILL_ATTENTION, LayerType.DSA, 64, 2048), Shape(1, 1, 40000))
    assert inputs.compressed is not None
    pages = (1 << 15) // LayerType.DSA.page_size
    data = inputs.compressed.data
    assert data.shape[0] == 625 > pages
    assert data[pages:].equal(data[: 625 - pages])


@settings(max_examples=10)
@given(attention_sites, shapes(max_reqs=20, max_extend=8, max_context=4000) | ragged_shapes(20, 8, 4000))
def test_the_stated_memory_is_at_least_what_inputs_candidates_and_outputs_hold(site: Site, shape: AnyShape) -> None:
    inputs = build(site, shape)
    held = inputs.workspace.nbytes + sum(tensor.nbytes for tensor in tensors(inputs))
    held += sum(part.slot_ids.nbytes + part.lengths.nbytes for part in inputs.selections())
    for name in names_at(site):
        prepared = binding.prepare_attention(inputs, name, DEVICE)
        prepared.run()
        own = sum(b.nbytes for b in prepared.buffers if b.data_ptr() != inputs.workspace.data_ptr())
        held += own + prepared.result().nbytes
    slack = 1 << 30  # for what is not counted here: a library's own scratch
    assert held <= required_bytes(site, shape) - slack


@settings(max_examples=20)
@given(st.sampled_from(every_site(SiteName.INDEXER_METADATA)), small_shapes)
def test_the_indexers_context_is_counted_in_compressed_rows(site: Site, shape: AnyShape) -> None:
    lens = InputBuilder(CPU).context_lens(site, shape)
    assert lens.dtype is torch.int32
    assert lens.shape == (shape.num_qo_tokens, 1)
    expected = [
        (position + 1) // site.layer.compress_ratio
        for extend, seq in zip(shape.extend_lens(), shape.seq_lens(), strict=True)
        for position in range(seq - extend, seq)
    ]
    assert lens.flatten().tolist() == expected


OVERLAPPING = [Site(SiteName.PREFILL_ATTENTION, LayerType.C4A, 64, 512, overlap) for overlap in (0, 50, 80, 95)]


def shared_part(rows: torch.Tensor) -> float:
    """Share of each query's selection that the query before it has too, mean over the queries."""
    pairs = [(set(a.tolist()), set(b.tolist())) for a, b in pairwise(rows)]
    return sum(len(a & b) / len(b) for a, b in pairs) / len(pairs)


@pytest.mark.parametrize("site", OVERLAPPING, ids=lambda site: f"{site.overlap}")
def test_neighbours_share_the_stated_part_of_their_selection(site: Site) -> None:
    inputs = build(site, Shape(2, 60, 2 * 400_000))
    assert inputs.topk_indices is not None
    first, second = inputs.topk_indices[:30], inputs.topk_indices[30:]
    for rows in (first, second):
        assert all(len(set(row.tolist())) == 512 for row in rows)
        assert shared_part(rows) == pytest.approx(site.overlap / 100, abs=0.03)
    if site.overlap:  # requests share nothing with each other
        assert shared_part(torch.stack([first[-1], second[0]])) < 0.1


@pytest.mark.parametrize("site", OVERLAPPING, ids=lambda site: f"{site.overlap}")
@pytest.mark.parametrize("shape", [Shape(1, 40, 200_000), Shape(3, 90, 60_000)])
def test_the_workload_knows_how_many_rows_such_a_selection_has(site: Site, shape: Shape) -> None:
    inputs = build(site, shape)
    assert inputs.topk_indices is not None
    rows = inputs.topk_indices + inputs.cu_compressed[inputs.token_to_req.long()][:, None]
    assert len(set(rows.flatten().tolist())) == pytest.approx(inputs.work.distinct_rows, rel=0.05)


@settings(max_examples=15)
@given(attention_sites, shapes(max_reqs=4, max_extend=12, max_context=1500), st.integers(0, 1000))
def test_requests_listed_one_by_one_give_the_inputs_of_an_equal_split(site: Site, shape: Shape, seed: int) -> None:
    listed, even = build(site, one_by_one(shape), seed), build(site, shape, seed)
    assert all(a.equal(b) for a, b in zip(tensors(listed), tensors(even), strict=True))
    assert listed.work == even.work
