"""The values behind page and picture: each measured point once, and nothing that the medians do not say."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mla_tune.fit.evaluation import table_scope
from mla_tune.fit.work import work
from mla_tune.hardware.datasheet import datasheet
from mla_tune.policy.decision import Decision
from mla_tune.report.contents import Contents, MeasuredPolicy, is_whole_forward
from mla_tune.report.measured_points import MeasuredCost, MeasuredPoint, measured_points, significant
from mla_tune.report.palette import look, tokens
from mla_tune.report.roofline import least_work
from mla_tune.report.wins import win
from mla_tune.sites.candidates import SPARSE_FWD, WITH_KVCACHE
from mla_tune.sites.shape import Shape
from mla_tune.sites.site import DEEPSEEK_V3_2, LayerType, SiteName
from mla_tune.sites.stages import Law
from mla_tune.store.measurement import Role
from tests.policy.strategies import table
from tests.report.conftest import in_short, measured


@pytest.fixture(scope="session")
def sglang() -> MeasuredPolicy:
    return measured("nvidia-h100.sglang")


def test_each_measured_shape_is_one_point_of_its_map_with_the_fits_own_medians(sglang: MeasuredPolicy) -> None:
    observations = sglang.costs.observations
    for entry in filter(in_short, sglang.policy.tables):
        where = table_scope(entry, observations.conditions)
        points = measured_points(observations, where, entry)
        swept = {shape for role in Role for shape in where.swept(observations, role)}
        shapes = [Shape(point.num_reqs, point.num_qo_tokens, point.kv_tokens) for point in points]
        assert len(shapes) == len(set(shapes))
        assert set(shapes) == swept
        assert {shape for shape, p in zip(shapes, points, strict=True) if p.held_out} == set(
            where.swept(observations, Role.HELD_OUT)
        )
        for shape, point in zip(shapes, points, strict=True):
            for name, cost in zip(entry.candidates, point.costs, strict=True):
                us = where.measured_us(observations, name, shape)
                assert (cost is None) == (us is None)
                if cost is not None and us is not None:
                    assert cost.latency_us == significant(us)
                    assert cost.low_us <= cost.latency_us <= cost.high_us


def test_the_colour_of_a_point_is_that_of_the_least_median_and_its_answer_the_tables(h100: Contents) -> None:
    points = 0
    for entry in h100.maps:
        for point in entry.points:
            ran = {index: cost.latency_us for index, cost in enumerate(point.costs) if cost is not None}
            assert point.fastest == min(ran, key=lambda index: (ran[index], index), default=None)
            points += 1
            if point.gain is not None:
                others = [us for index, us in ran.items() if index != entry.incumbent]
                assert point.gain == pytest.approx(ran[entry.incumbent] / min(others), rel=1e-3)
    assert points > 100


def test_points_at_one_place_of_a_map_are_drawn_side_by_side(h100: Contents) -> None:
    for entry in h100.maps:
        places = Counter((point.num_qo_tokens, point.kv_tokens, point.shift) for point in entry.points)
        assert set(places.values()) <= {1}


def test_answers_of_points_are_the_policys(sglang: MeasuredPolicy, h100: Contents) -> None:
    by_key = {found.key: found for found in sglang.policy.tables}
    for entry in h100.maps:
        if h100.policies[entry.policy].is_own:
            continue
        found = by_key[entry.site, entry.model, entry.h_q, entry.layer, entry.engine]  # type: ignore[index]
        choose = Decision(found).choose
        for point in entry.points:
            answer = choose(point.num_qo_tokens, point.kv_tokens, point.num_reqs)
            assert entry.candidates[point.answer] == answer


def test_held_out_slowdowns_are_those_of_the_evidence(sglang: MeasuredPolicy, h100: Contents) -> None:
    assert sglang.evidence is not None
    compared = 0
    for entry in h100.maps:
        if h100.policies[entry.policy].is_own or not entry.judged:
            continue
        stated = next(
            found.held_out
            for found in sglang.evidence.tables
            if (found.site, found.model, found.h_q, found.layer, found.engine)
            == (entry.site, entry.model, entry.h_q, entry.layer, entry.engine)
        )
        assert stated.points == len(entry.judged)
        for index, rule in enumerate(stated.slowdown):
            assert entry.rules[index] == rule.rule
            assert max(point.slowdowns[index] for point in entry.judged) == pytest.approx(rule.worst, rel=2e-3)
            compared += 1
    assert compared > 10


def test_a_modelled_gpu_has_predictions_with_their_doubt_and_no_points(h800: Contents) -> None:
    (origin,) = h800.policies
    assert origin.modelled_from == "nvidia-h200"
    assert origin.uncertainty is not None
    for entry in h800.maps:
        assert entry.points == ()
        assert entry.judged == ()
        assert all(view.cells for view in entry.views)
        assert "modelled shapes" in entry.win.sentence
    assert any(cell.undecided for entry in h800.maps for view in entry.views for cell in view.cells)
    assert all(plot.points == () for plot in h800.stages)
    assert all(plot.error > 0 for plot in h800.stages)


@pytest.mark.parametrize(("layer", "row_bytes"), [(LayerType.C4A, 584 + 1024), (LayerType.DSA, 656 + 1152)])
def test_the_roofline_of_dequantizing_is_its_bytes_over_the_datasheets_bandwidth(
    layer: LayerType, row_bytes: int
) -> None:
    from mla_tune.sites.site import DEEPSEEK_V4_FLASH

    model = DEEPSEEK_V3_2 if layer is LayerType.DSA else DEEPSEEK_V4_FLASH
    site = model.site(SiteName.PREFILL_ATTENTION, layer)
    load = work(site, [Shape(1, 64, 1 << 17)])
    stage = next(stage for stage in SPARSE_FWD.stages(site) if stage.name == "dequantize_compressed")
    least = least_work(site, stage, load)
    assert least is not None
    rows = (1 << 17) // layer.compress_ratio
    assert least.time_us(datasheet("nvidia-h200"))[0] == pytest.approx(rows * row_bytes / 4.8e6)


def test_the_roofline_of_attention_is_its_multiply_adds_where_queries_are_many() -> None:
    site = DEEPSEEK_V3_2.site(SiteName.PREFILL_ATTENTION, LayerType.DSA)
    load = work(site, [Shape(1, 8192, 1 << 17)])
    least = least_work(site, SPARSE_FWD.stages(site)[-1], load)
    assert least is not None
    flops = 2 * (576 + 512) * 128 * 8192 * 2048
    assert least.time_us(datasheet("nvidia-h200"))[0] == pytest.approx(flops / 989.5e6)


def test_no_timed_stage_passes_its_roofline_where_its_data_is_larger_than_the_cache(h100: Contents) -> None:
    compared = 0
    for plot in h100.stages:
        bounds = {point.size: point.roofline_us for point in plot.curve}
        for timed in plot.points:
            bound = bounds.get(timed.size)
            # Of stages that one number describes; rows beyond 1M are more than any L2 holds.
            if bound is not None and plot.stage.startswith("dequantize") and timed.size >= 1 << 20:
                assert timed.cost.latency_us > bound
                compared += 1
    assert compared > 3


def test_stages_without_a_bound_of_bytes_have_no_line() -> None:
    site = DEEPSEEK_V3_2.site(SiteName.PREFILL_ATTENTION, LayerType.DSA)
    load = work(site, [Shape(1, 64, 8192)])
    lines = {stage.name: least_work(site, stage, load) is not None for stage in SPARSE_FWD.stages(site)}
    assert lines == {"row_ids": False, "dequantize_compressed": True, "attention": True}
    assert [least_work(site, stage, load) for stage in WITH_KVCACHE.stages(site) if stage.law is Law.SCHEDULE] == [None]


costs = st.floats(1, 1e6, allow_nan=False).map(lambda us: MeasuredCost(us, us * 0.99, us * 1.01))


@st.composite
def points(draw: st.DrawFn) -> list[MeasuredPoint]:
    found = []
    for _ in range(draw(st.integers(0, 8))):
        pair = draw(st.tuples(costs, costs) | st.tuples(costs, st.none()))
        answer = draw(st.integers(0, 1))
        qo = draw(st.integers(1, 60000))
        found.append(MeasuredPoint(1, qo, 65536, False, 0, 0, answer, False, None, pair, ()))
    return found


@given(points())
def test_a_verdict_counts_what_the_points_say(found: list[MeasuredPoint]) -> None:
    told = win(table(), found)
    assert told.slower <= told.other_path <= told.shapes <= len(found)
    assert math.isclose(told.mean, 1) or told.other_path
    assert told.best >= told.mean * 0.999
    assert told.sentence.endswith(".")
    assert ("Nothing" in told.sentence) == (told.other_path == 0)


@pytest.mark.parametrize(
    ("count", "text"), [(1, "1"), (1023, "1023"), (1024, "1K"), (131072, "128K"), (1 << 26, "64M"), (11673, "11.4K")]
)
def test_counts_are_named_as_contexts_are(count: int, text: str) -> None:
    assert tokens(count) == text


def test_every_candidate_of_a_site_looks_different() -> None:
    from mla_tune.sites.candidates import CANDIDATES

    for found in CANDIDATES.values():
        names = [candidate.name for candidate in found if candidate.name != "with_kvcache_mixed"]
        assert len({(look(name).light, look(name).symbol) for name in names}) == len(names)


def test_the_whole_report_names_every_table(h100: Contents) -> None:
    assert {is_whole_forward(entry) for entry in h100.maps} == {True, False}
    assert {entry.policy for entry in h100.maps} == {0, 1}
    assert Path(h100.policies[1].source).name == "nvidia-h100.sglang.jsonl"
    assert all(entry.stages for entry in h100.maps)
