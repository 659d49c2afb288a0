"""Laws of the planner, by the committed H200 measurements: it never loses by its own word, and splits only for a reason."""

from __future__ import annotations

from functools import cache
from itertools import combinations

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mla_tune.errors import UsageError
from mla_tune.fit.batch_split import CACHE, WORKSPACE, BatchPlan, BatchRequest, Planner, _Alone, _with_idle
from mla_tune.fit.scope import scope
from mla_tune.fit.work import Work, work
from mla_tune.policy.schema import Limit, Table
from mla_tune.sites.shape import RaggedShape
from mla_tune.sites.site import FORWARD, MODELS, Site, SiteName
from tests.replay.conftest import EVERY, pricer
from tests.shapes import every_site

BAND = 0.014
SITES = every_site(SiteName.PREFILL_ATTENTION)


@cache
def planner(model: str = "deepseek-v4-flash", h_q: int = 64) -> Planner:
    found = pricer(model, h_q)
    return Planner(found.costs, found.tables.attention, found.tables.noise_band)


def sized(least: int, most: int) -> st.SearchStrategy[int]:
    """Integers whose logarithm is spread evenly."""
    return st.floats(np.log2(least), np.log2(most)).map(lambda octaves: round(2**octaves))


requests = st.builds(
    lambda new, before: BatchRequest(new, new + before), sized(1, 8192), st.just(0) | sized(1, 1 << 19)
)
batches = st.lists(requests, min_size=1, max_size=24)
mixed = st.builds(
    lambda fresh, extend, count: [BatchRequest(fresh, fresh), *[extend] * count],
    sized(2048, 8192),
    st.builds(lambda new, before: BatchRequest(new, new + before), sized(4, 64), sized(1 << 16, 1 << 19)),
    st.integers(1, 63),
)
plans = st.sampled_from(EVERY)


def served(plan: BatchPlan, batch: list[BatchRequest]) -> list[tuple[str, list[BatchRequest]]]:
    """What each candidate serves, whatever the indices."""
    return [
        (part.candidate, sorted((batch[i] for i in part.requests), key=lambda r: (r.kv_tokens, r.num_qo_tokens)))
        for part in plan.parts
    ]


@settings(max_examples=60, deadline=None)
@given(batches | mixed, plans)
def test_a_plan_is_never_predicted_slower_than_the_best_single_path_and_serves_each_request_once(
    batch: list[BatchRequest], of: tuple[str, int]
) -> None:
    plan = planner(*of).plan(batch)
    assert plan.predicted_us <= plan.single_us
    assert sorted(i for part in plan.parts for i in part.requests) == list(range(len(batch)))
    assert all(part.requests == tuple(sorted(part.requests)) and part.requests for part in plan.parts)
    shape = RaggedShape(tuple((r.num_qo_tokens, r.kv_tokens) for r in batch))
    prices = pricer(*of)
    single = {name: float(prices.prices([shape]).attention_of(name)[0]) for name in prices.tables.attention.candidates}
    assert plan.single_us == pytest.approx(min(single.values()))
    if len(plan.parts) == 1:
        assert plan.parts[0].candidate == plan.best_single
        assert plan.predicted_us == plan.single_us
    else:
        assert [part.candidate for part in plan.parts] == [WORKSPACE, CACHE]
        assert plan.gain > 1 + prices.tables.noise_band


@settings(max_examples=30, deadline=None)
@given(requests, plans)
def test_a_batch_of_one_request_is_not_split(request: BatchRequest, of: tuple[str, int]) -> None:
    assert planner(*of).best_split([request]) is None
    assert len(planner(*of).plan([request]).parts) == 1


@settings(max_examples=40, deadline=None)
@given(requests, st.integers(2, 24), plans)
def test_equal_requests_are_all_served_by_one_path(request: BatchRequest, count: int, of: tuple[str, int]) -> None:
    assert len(planner(*of).plan([request] * count).parts) == 1


@settings(max_examples=40, deadline=None)
@given(st.data(), batches | mixed)
def test_the_order_of_requests_decides_nothing_but_their_indices(
    data: st.DataObject, batch: list[BatchRequest]
) -> None:
    shuffled = data.draw(st.permutations(batch))
    one, other = planner().plan(batch), planner().plan(shuffled)
    assert served(one, batch) == served(other, shuffled)
    assert one.predicted_us == pytest.approx(other.predicted_us, rel=1e-9)


@settings(max_examples=25, deadline=None)
@given(st.lists(requests, min_size=2, max_size=6))
def test_no_other_assignment_of_few_requests_is_predicted_much_faster(batch: list[BatchRequest]) -> None:
    """The cuts of one order lose little against every assignment: whatever goes to the cache, priced the same way."""
    best = planner().best_split(batch)
    assert best is not None
    found = []
    alone = [_Alone.of(site, batch) for site, _ in planner()._scope.parts]
    for count in range(1, len(batch)):
        for cached in combinations(range(len(batch)), count):
            order = [i for i in range(len(batch)) if i not in cached] + list(cached)
            found.append(planner()._best_cut(batch, order, alone)[1])
    assert min(best.predicted_us, best.single_us) <= 1.05 * min(*found, best.single_us)


@settings(max_examples=40, deadline=None)
@given(st.lists(requests, min_size=2, max_size=8), st.sampled_from(SITES))
def test_the_work_of_a_part_is_that_of_a_forward_of_its_own(batch: list[BatchRequest], site: Site) -> None:
    alone, order = _Alone.of(site, batch), list(range(len(batch)))
    pairs = [(r.num_qo_tokens, r.kv_tokens) for r in batch]
    cuts = range(1, len(batch))
    first = work(site, [RaggedShape(tuple(pairs[:cut])) for cut in cuts])
    last = work(site, [RaggedShape(tuple(pairs[cut:])) for cut in cuts])
    for got, want in ((alone.first(order), first), (alone.last(order), last)):
        for column in Work.__slots__:
            np.testing.assert_allclose(getattr(got, column), getattr(want, column), rtol=1e-12, err_msg=column)


@pytest.mark.parametrize("site", [s for s in SITES if s.h_q == 64], ids=lambda site: site.key)
def test_what_is_priced_is_the_work_that_runs(site: Site) -> None:
    torch = pytest.importorskip("torch")
    from mla_tune.kernels import split_batch as split
    from mla_tune.kernels.inputs import InputBuilder

    batch = [BatchRequest(9, 9), BatchRequest(2, 700), BatchRequest(1, 2900), BatchRequest(3, 140)]
    pairs = tuple((r.num_qo_tokens, r.kv_tokens) for r in batch)
    inputs = InputBuilder(torch.device("cpu")).attention(site, RaggedShape(pairs))
    alone = _Alone.of(site, batch)
    for cut in range(1, len(batch)):
        prepared = split.prepare(inputs, range(cut, len(batch)), None)
        prepared.run()
        workspace, _, _, indices, lengths = prepared.buffers[:5]
        idle = float(sum(r.num_qo_tokens for r in batch[cut:]))
        first = alone.first(range(len(batch)))
        priced = _with_idle(site, first, np.full(len(batch) - 1, idle))
        assert priced.num_qo_tokens[cut - 1] == len(lengths) == 15
        assert priced.attended[cut - 1] * 15 == pytest.approx(int(lengths.sum()))
        assert priced.rows[cut - 1] == workspace.shape[0]
        assert priced.index_width[cut - 1] == indices.shape[1]


def test_a_long_fresh_prompt_among_short_extends_of_long_contexts_is_split_by_request() -> None:
    batch = [*[BatchRequest(16, 1 << 18)] * 40, BatchRequest(8192, 8192), *[BatchRequest(16, 1 << 18)] * 23]
    plan = planner().plan(batch)
    assert [(part.candidate, len(part.requests)) for part in plan.parts] == [(WORKSPACE, 1), (CACHE, 63)]
    assert plan.parts[0].requests == (40,)
    assert plan.gain > 1.15


def test_a_layer_types_own_table_plans_that_layer() -> None:
    found = pricer()
    batch = [BatchRequest(8192, 8192), *[BatchRequest(16, 1 << 18)] * 63]
    for table in found.tables.layers:
        plan = Planner(found.costs, table, found.tables.noise_band).plan(batch)
        where = scope(SiteName.PREFILL_ATTENTION, MODELS[table.model], table.layer, table.h_q)
        shape = RaggedShape(tuple((r.num_qo_tokens, r.kv_tokens) for r in batch))
        loads = [work(site, [shape]) for site, _ in where.parts]
        assert plan.single_us == pytest.approx(
            min(float(where.predicted_us(found.costs, name, loads)[0]) for name in table.candidates)
        )
        # A context adds no rows to a window layer, and 32 times as many to c4a as to c128a.
        assert (len(plan.parts) == 2) == (table.layer == "c4a")


def limited(table: Table, **most: int) -> Table:
    limits = tuple(Limit(candidate=name, num_qo_tokens=count) for name, count in most.items())
    return msgspec.structs.replace(table, limits=limits)


def test_limits_hold_for_each_part_by_itself() -> None:
    found = pricer()
    batch = [BatchRequest(8192, 8192), *[BatchRequest(16, 1 << 18)] * 63]
    tight = Planner(found.costs, limited(found.tables.attention, with_kvcache=1008), BAND).plan(batch)
    assert tight.best_single == WORKSPACE
    assert len(tight.parts) == 2
    barred = Planner(found.costs, limited(found.tables.attention, with_kvcache=15), BAND)
    assert len(barred.plan(batch).parts) == 1
    assert barred.best_split(batch) is None
    both = limited(found.tables.attention, with_kvcache=15, sparse_fwd=15)
    with pytest.raises(UsageError, match="some candidate's limits: got 9200 query tokens"):
        Planner(found.costs, both, BAND).plan(batch)


@pytest.mark.parametrize("batch", [[], [BatchRequest(0, 5)], [BatchRequest(6, 5)]], ids=str)
def test_no_or_impossible_requests_are_refused_in_one_line(batch: list[BatchRequest]) -> None:
    with pytest.raises(UsageError, match="must") as caught:
        planner().plan(batch)
    assert "\n" not in str(caught.value)


def test_the_indexers_table_is_not_planned() -> None:
    found = pricer()
    assert found.tables.metadata.layer == FORWARD
    with pytest.raises(UsageError, match="got a table of indexer_metadata"):
        Planner(found.costs, found.tables.metadata, BAND)
