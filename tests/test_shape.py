"""The integers of a forward: splits add up, and every closed form equals the loop that it stands for."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mla_tune.errors import UsageError
from mla_tune.sites.shape import (
    AnyShape,
    RaggedShape,
    Shape,
    compressed_row_counts,
    fresh_request,
    selection_width,
    workload,
)
from mla_tune.sites.site import SWA_WINDOW, LayerType, Site, SiteName
from tests.shapes import every_site, one_by_one, ragged_shapes, shapes

attention_sites = st.sampled_from(every_site(SiteName.PREFILL_ATTENTION))


def context_of_each_query(shape: AnyShape) -> list[int]:
    """Tokens that each query may look back on, itself included."""
    return [
        position + 1
        for extend, seq in zip(shape.extend_lens(), shape.seq_lens(), strict=True)
        for position in range(seq - extend, seq)
    ]


def selected_entries(site: Site, context: int) -> int:
    if site.layer is LayerType.SWA_ONLY:
        return 0
    rows = context // site.layer.compress_ratio
    return rows if site.topk is None else min(site.topk, rows)


@given(shapes(max_reqs=70, max_extend=500, max_context=1 << 20))
def test_tokens_are_split_evenly_and_every_request_has_its_new_tokens_in_its_context(shape: Shape) -> None:
    extends, seqs = shape.extend_lens(), shape.seq_lens()
    assert (sum(extends), sum(seqs)) == (shape.num_qo_tokens, shape.kv_tokens)
    assert len(extends) == len(seqs) == shape.num_reqs
    assert max(extends) - min(extends) <= 1
    assert max(seqs) - min(seqs) <= 1
    assert all(1 <= extend <= seq for extend, seq in zip(extends, seqs, strict=True))
    assert shape.context == max(seqs)


@given(st.tuples(st.integers(-3, 5), st.integers(-3, 5), st.integers(-3, 5)))
def test_a_shape_exists_exactly_where_each_request_has_a_query_and_each_query_a_context(sizes: tuple[int, ...]) -> None:
    num_reqs, num_qo_tokens, kv_tokens = sizes
    if 1 <= num_reqs <= num_qo_tokens <= kv_tokens:
        assert Shape(num_reqs, num_qo_tokens, kv_tokens).num_reqs == num_reqs
        return
    with pytest.raises(UsageError, match=f"got num_reqs={num_reqs}, num_qo_tokens={num_qo_tokens}") as caught:
        Shape(num_reqs, num_qo_tokens, kv_tokens)
    assert "\n" not in str(caught.value)


@settings(max_examples=60)
@given(attention_sites, shapes(max_context=9000) | ragged_shapes(max_context=9000))
@example(Site(SiteName.PREFILL_ATTENTION, LayerType.DSA, 128, 2048), Shape(1, 4000, 4000))
@example(Site(SiteName.PREFILL_ATTENTION, LayerType.C4A, 64, 512), Shape(1, 2100, 2100))
@example(Site(SiteName.PREFILL_ATTENTION, LayerType.C128A, 64), Shape(3, 3, 3))
def test_mean_attended_entries_equal_the_loop_over_all_queries(site: Site, shape: AnyShape) -> None:
    work, contexts = workload(site, shape), context_of_each_query(shape)
    selected = sum(selected_entries(site, context) for context in contexts)
    window = sum(min(SWA_WINDOW, context) for context in contexts) if site.layer.has_window else 0
    assert work.selected == selected / shape.num_qo_tokens
    assert work.window == window / shape.num_qo_tokens
    assert work.attended == pytest.approx((selected + window) / shape.num_qo_tokens)


@settings(max_examples=60)
@given(attention_sites, shapes(max_context=9000) | ragged_shapes(max_context=9000))
def test_workspace_rows_are_those_that_some_query_may_attend_to(site: Site, shape: AnyShape) -> None:
    work, requests = workload(site, shape), list(zip(shape.extend_lens(), shape.seq_lens(), strict=True))
    in_reach = [
        {p for query in range(seq - extend, seq) for p in range(max(0, query - SWA_WINDOW + 1), query + 1)}
        for extend, seq in requests
    ]
    assert work.window_rows == (sum(map(len, in_reach)) if site.layer.has_window else 0)
    ratio = site.layer.compress_ratio
    held = [seq // ratio if ratio else 0 for _, seq in requests]
    if site.layer is LayerType.C128A:  # rectangular: every request has as many rows as the longest
        held = [max(held)] * len(held)
    assert work.compressed_rows == sum(held)
    assert compressed_row_counts(site.layer, shape.seq_lens()) == held
    assert work.rows == work.compressed_rows + work.window_rows


@given(attention_sites, shapes(max_context=1 << 20) | ragged_shapes(max_context=1 << 20))
def test_widths_hold_every_entry_and_are_what_the_kernels_accept(site: Site, shape: AnyShape) -> None:
    work = workload(site, shape)
    longest = max(selected_entries(site, context) for context in (shape.context, 1))
    assert work.selection_width == selection_width(site, shape.context) >= longest
    assert work.selection_width % 64 == 0
    assert work.index_width % 128 == 0
    assert work.index_width >= work.selection_width + (SWA_WINDOW if site.layer.has_window else 0)
    assert work.attended <= work.index_width


def test_widths_are_those_that_engines_use() -> None:
    widths = {
        site.key: (
            workload(site, Shape(1, 1, 1 << 17)).selection_width,
            workload(site, Shape(1, 1, 1 << 17)).index_width,
        )
        for site in every_site(SiteName.PREFILL_ATTENTION)
    }
    assert widths["prefill_attention/c4a/h64/k512"] == (512, 640)
    assert widths["prefill_attention/c4a/h128/k1024"] == (1024, 1152)
    assert widths["prefill_attention/swa_only/h64"] == (0, 128)
    assert widths["prefill_attention/c128a/h64"] == (1024, 1152)
    assert widths["prefill_attention/dsa/h128/k2048"] == (2048, 2048)


@given(shapes(max_reqs=64, max_extend=1 << 10, max_context=1 << 20))
def test_work_grows_with_query_tokens(shape: Shape) -> None:
    if shape.num_qo_tokens == shape.kv_tokens:
        return
    more = Shape(shape.num_reqs, shape.num_qo_tokens + 1, shape.kv_tokens)
    for site in every_site(SiteName.PREFILL_ATTENTION):
        before, after = workload(site, shape), workload(site, more)
        assert after.rows >= before.rows
        assert after.attended * after.num_qo_tokens >= before.attended * before.num_qo_tokens


@pytest.mark.parametrize("numbers", [(1 << 17, 1 << 17, 1 << 20), (1, 1, 1 << 63), (1, 10**400, 10**400)])
def test_a_shape_beyond_any_engine_is_refused_before_it_is_listed(numbers: tuple[int, int, int]) -> None:
    with pytest.raises(UsageError, match="at most 65536 requests") as caught:
        Shape(*numbers)
    assert len(str(caught.value)) < 200


@given(attention_sites, shapes(max_reqs=70, max_extend=500, max_context=1 << 20))
def test_requests_listed_one_by_one_are_the_same_work_as_an_equal_split(site: Site, shape: Shape) -> None:
    listed = one_by_one(shape)
    assert workload(site, listed) == workload(site, shape)
    assert (listed.context, listed.evened()) == (shape.context, shape)


@given(attention_sites, ragged_shapes(), st.randoms())
def test_the_order_of_requests_does_not_change_their_work(site: Site, shape: RaggedShape, rng: Random) -> None:
    shuffled = RaggedShape(tuple(rng.sample(shape.requests, len(shape.requests))))
    assert workload(site, shuffled) == workload(site, shape)


@given(ragged_shapes())
def test_a_listed_forward_has_the_three_integers_of_its_requests(shape: RaggedShape) -> None:
    assert shape.evened() == Shape(len(shape.requests), sum(shape.extend_lens()), sum(shape.seq_lens()))
    assert list(zip(shape.extend_lens(), shape.seq_lens(), strict=True)) == list(shape.requests)


@pytest.mark.parametrize(
    ("requests", "said"),
    [
        ((), "1 to 65536 requests: got 0"),
        (((1, 1),) * 65537, "got 65537"),
        (((0, 5),), "got 0 new tokens of 5"),
        (((-1, 5),), "got -1 new tokens"),
        (((6, 5),), "got 6 new tokens of 5"),
        (((1, 10**400),), "tokens: got 1000"),
        (((1, 1 << 62), (1, 1)), f"at most {1 << 62} tokens"),
    ],
)
def test_requests_that_no_server_batches_are_refused_in_one_line(
    requests: tuple[tuple[int, int], ...], said: str
) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        RaggedShape(requests)
    assert len(str(caught.value)) < 200


@given(ragged_shapes(5, 20, 20))
def test_a_fresh_request_is_the_first_without_a_cached_token(shape: RaggedShape) -> None:
    cached = [seq - extend for extend, seq in shape.requests]
    found = fresh_request(shape.requests)
    assert found == (cached.index(0) if 0 in cached else None)
