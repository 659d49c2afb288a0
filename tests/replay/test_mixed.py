"""Drawing mixed batches, and putting whole times together out of measured parts."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mla_tune.errors import UsageError
from mla_tune.fit.batch_split import BatchPlan, BatchRequest, Planner, SubBatch
from mla_tune.fit.observations import Observations, shares
from mla_tune.fit.scope import scope
from mla_tune.replay.mixed import SPLIT, Batch, Gains, Kind, LayerOutlook, Mix, Outlook, draw_batches, outlooks, timed
from mla_tune.sites.candidates import split_stages
from mla_tune.sites.shape import Shape
from mla_tune.sites.site import FORWARD, MODELS, Site, SiteName
from mla_tune.sites.stages import Amortization
from mla_tune.store.measurement import PER_LAYER_TOTAL, Measurement, Outcome, Regime, Role
from tests.replay.conftest import export, pricer

FLASH = MODELS["deepseek-v4-flash"]
NAMES = ("sparse_fwd", "with_kvcache")
WHERE = scope(SiteName.PREFILL_ATTENTION, FLASH, FORWARD, 64)


def ends(low: int, high: int) -> st.SearchStrategy[tuple[int, int]]:
    return st.tuples(st.integers(low, high), st.integers(low, high)).map(lambda pair: (min(pair), max(pair)))


mixes = st.builds(Mix, ends(1, 9000), ends(1, 70), ends(1, 300), ends(1, 1 << 20))


@given(mixes, st.integers(1, 40), st.integers(0, 99), st.sampled_from([100, 1 << 21]))
def test_drawn_batches_are_within_their_ranges_and_repeat_with_their_seed(
    mix: Mix, count: int, seed: int, most: int
) -> None:
    batches = draw_batches(mix, count, seed, most)
    assert batches == draw_batches(mix, count, seed, most)
    assert len(batches) == count
    assert sum(batch.kind is Kind.MIXED for batch in batches) == count - count // 5
    for batch in batches:
        assert all(1 <= r.num_qo_tokens <= r.kv_tokens <= most for r in batch.requests)
        if most == 1 << 21:
            extends = [r for r in batch.requests if r.num_qo_tokens < r.kv_tokens]
            assert all(mix.new_tokens[0] <= r.num_qo_tokens <= mix.new_tokens[1] for r in extends)
            assert all(mix.context_tokens[0] <= r.kv_tokens - r.num_qo_tokens <= mix.context_tokens[1] for r in extends)
        fresh = [r for r in batch.requests if r.num_qo_tokens == r.kv_tokens]
        if batch.kind is Kind.MIXED:
            assert fresh
            assert mix.extends[0] + 1 <= len(batch.requests) <= mix.extends[1] + 1
        if batch.kind is Kind.FRESH:
            assert fresh == list(batch.requests)
        if batch.kind is Kind.EQUAL:
            assert len(set(batch.requests)) == 1


def test_the_prompt_stands_at_any_place_and_another_seed_draws_others() -> None:
    batches = draw_batches(Mix(), 200, 0, FLASH.max_context)
    places = [
        next(i for i, r in enumerate(batch.requests) if r.num_qo_tokens == r.kv_tokens)
        for batch in batches
        if batch.kind is Kind.MIXED
    ]
    assert min(places) == 0
    assert len(set(places)) > 20
    assert batches != draw_batches(Mix(), 200, 1, FLASH.max_context)


@pytest.mark.parametrize("count", [0, -1, 10_001])
def test_a_number_of_batches_that_nobody_draws_is_refused(count: int) -> None:
    with pytest.raises(UsageError, match=f"got {count}"):
        draw_batches(Mix(), count, 0, 1000)


@pytest.mark.parametrize("bad", [(0, 5), (6, 5), (1, 1 << 25)], ids=str)
@pytest.mark.parametrize("name", Mix.__slots__)
def test_a_range_that_cannot_be_drawn_from_is_refused(name: str, bad: tuple[int, int]) -> None:
    with pytest.raises(UsageError, match=f"{name} must be drawn between .* got {bad[0]}:{bad[1]}"):
        Mix(**{name: bad})


def test_controls_of_equal_requests_and_of_fresh_prompts_promise_nothing_and_mixed_batches_do() -> None:
    found = pricer()
    batches = draw_batches(Mix(), 60, 2, FLASH.max_context)
    predicted = outlooks([(Planner(found.costs, found.tables.attention, found.tables.noise_band), 1)], batches)
    assert [outlook.batch for outlook in predicted] == list(batches)
    promised = [outlook.batch.kind for outlook in predicted if outlook.promised]
    assert promised.count(Kind.MIXED) > 20
    assert Kind.EQUAL not in promised
    assert Kind.FRESH not in promised
    for outlook in predicted:
        (entry,) = outlook.layers
        assert entry.split is not None
        assert outlook.promised == (entry.plan == entry.split)
        assert outlook.gain == pytest.approx(entry.plan.gain)


SHAPE = Shape(1, 64, 131072)
"""A shape of the committed sweep, taken for a batch."""


def row(site: Site, candidate: str, part: str, us: float) -> Measurement:
    return Measurement(
        site=site,
        shape=SHAPE,
        role=Role.FIT,
        candidate=candidate,
        part=part,
        regime=Regime.GRAPH,
        outcome=Outcome.OK,
        latency_us=us,
        ci_low_us=us,
        ci_high_us=us,
        num_samples=1,
        samples_us=(us,),
    )


def measured() -> list[Measurement]:
    """What the sweep measured of both paths, and a split whose every part takes 2 us and its layers 10."""
    sites = [site for site, _ in WHERE.parts]
    rows = [
        m
        for m in export().measurements
        if m.site in sites and m.shape == SHAPE and m.regime is Regime.GRAPH and m.outcome is Outcome.OK
    ]
    # The export leaves out a total that is its only stage; a measurement has it.
    rows += [
        row(site, "with_kvcache", PER_LAYER_TOTAL, m.latency_us)
        for site in sites
        for m in rows
        if (m.site, m.candidate, m.part) == (site, "with_kvcache", "attention") and m.latency_us is not None
    ]
    for site in sites:
        rows.append(row(site, SPLIT, PER_LAYER_TOTAL, 10.0))
        rows += [row(site, SPLIT, stage.name, 2.0) for stage in split_stages(site)]
    return rows


def test_whole_times_are_the_layers_and_what_they_share() -> None:
    found = timed(WHERE, NAMES, measured())
    assert found.faults == ()
    observations = Observations(measured()[: -sum(len(split_stages(site)) + 1 for site, _ in WHERE.parts)])
    for name, us in found.single_us:
        assert us == pytest.approx(WHERE.measured_us(observations, name, SHAPE), rel=0.02)
    expected = 0.0
    for site, layers in WHERE.parts:
        once = [s.amortization for s in split_stages(site) if s.amortization is not Amortization.PER_LAYER]
        expected += layers * (10 + sum(2 * shares(FLASH, site).of(kind) for kind in once))
    assert found.split_us == pytest.approx(expected)
    assert found.best_us == min(us for _, us in found.single_us if us is not None)
    split = BatchPlan((SubBatch("sparse_fwd", (0,)), SubBatch("with_kvcache", (1,))), 1.0, "sparse_fwd", 2.0)
    for name, us in found.single_us:
        single = BatchPlan((SubBatch(name, (0, 1)),), 2.0, name, 2.0)
        assert found.plan_us(single) == us
        # Three layers that are not split and two that are.
        entries = (LayerOutlook("forward", 3, single, split), LayerOutlook("forward", 2, split, split))
        outlook = Outlook(Batch(Kind.MIXED, (BatchRequest(9, 9), BatchRequest(1, 9))), entries)
        best_us = found.best_us or math.nan
        assert outlook.gain == pytest.approx((3 * 2 + 2 * 2) / (3 * 2 + 2 * 1))
        assert outlook.measured_gain((found, found)) == pytest.approx(
            5 * best_us / (3 * (us or math.nan) + 2 * expected)
        )
        assert outlook.measured_split_gain((found, found)) == pytest.approx(best_us / expected)


@pytest.mark.parametrize("candidate", ["sparse_fwd", "with_kvcache", SPLIT])
def test_a_path_that_failed_in_one_layer_type_has_no_whole_time_and_says_why(candidate: str) -> None:
    site = WHERE.parts[1][0]
    failed = Measurement(
        site, SHAPE, Role.FIT, candidate, PER_LAYER_TOTAL, Regime.GRAPH, Outcome.WRONG_RESULT, "row 3 differs"
    )
    rows = [m for m in measured() if (m.site, m.candidate) != (site, candidate)]
    found = timed(WHERE, NAMES, [*rows, failed])
    assert dict([*found.single_us, (SPLIT, found.split_us)])[candidate] is None
    assert found.faults == (f"{candidate} at {site.key}: wrong_result: row 3 differs",)
    assert (found.split_us is None) == (candidate == SPLIT)
    assert found.best_us is not None


def test_no_gains_have_no_distribution() -> None:
    assert Gains.of([]) is None
    found = Gains.of([0.5, 2.0])
    assert found is not None
    assert (found.batches, found.worst, found.best) == (2, 0.5, 2.0)
    assert found.geomean == pytest.approx(1.0)
