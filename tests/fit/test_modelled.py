"""Curves of a GPU that nobody measured: the laws that scaling keeps, and what a modelled policy states."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mla_tune.errors import UsageError
from mla_tune.fit.bases import Chip, Resource, basis
from mla_tune.fit.costs import CostModel
from mla_tune.fit.curves import fit_curve, terms_of
from mla_tune.fit.explanation import explain
from mla_tune.fit.modelled import ModelledCosts, model_policy
from mla_tune.fit.scaling import Scaling
from mla_tune.fit.scope import Scope, scope
from mla_tune.fit.table_rows import FittedPolicy, unjudged_table
from mla_tune.fit.work import Array, work
from mla_tune.fit.workspace_bytes import workspace
from mla_tune.hardware.datasheet import DATASHEETS, SM90, SM100, Datasheet, Figure, datasheet
from mla_tune.policy.codec import dump_policy, parse_policy
from mla_tune.policy.decision import Decision
from mla_tune.sites.candidates import names_at, stages
from mla_tune.sites.engines import Engine, model_incumbent
from mla_tune.sites.shape import Shape
from mla_tune.sites.site import FORWARD, MODELS, LayerType, Site, SiteName
from mla_tune.sites.stages import Law
from mla_tune.store.limit_try import Try
from mla_tune.store.measurement import Outcome
from tests.fit.synthetic import C4A, ENVIRONMENT, FLASH, METADATA, SOURCE, World, attention_sites, sweep

H200 = datasheet("nvidia-h200")
OTHERS = [sheet for sheet in DATASHEETS if sheet.sku != H200.sku]
SITES = [*attention_sites(), METADATA]
RAN = {site: tuple(name for name in names_at(site) if name not in World().not_measured) for site in SITES}
"""Candidates of each site that the made-up H200 was swept with."""
STAGES = [(site, name, stage.name) for site in SITES for name in RAN[site] for stage in stages(site, name)]

shapes = st.builds(
    lambda reqs, extra, context: Shape(reqs, min(reqs + extra, reqs * context), reqs * context),
    st.integers(1, 64),
    st.integers(0, 60_000),
    st.integers(1024, 1 << 20),
)


@pytest.fixture(scope="module")
def measured() -> CostModel:
    """Curves of a made-up H200."""
    return CostModel(ENVIRONMENT, sweep(World(noise=0.01), SITES))


@pytest.fixture(scope="module")
def models(measured: CostModel) -> dict[str, ModelledCosts]:
    """The same, scaled to every product, itself included."""
    return {sheet.sku: ModelledCosts(measured, sheet) for sheet in DATASHEETS}


def latency_us(costs: ModelledCosts, where: tuple[Site, str, str], at: list[Shape]) -> Array:
    site, candidate, stage = where
    return costs.stages(site, candidate)[stage].curve.latency_us(work(site, at))


def changed(sheet: Datasheet, name: str, factor: float) -> Datasheet:
    """``sheet`` with one figure multiplied, as another product."""
    figure = Figure(getattr(sheet, name).value * factor, "made up for this test")
    return replace(sheet, sku="nvidia-made-up", **{name: figure})  # type: ignore[arg-type]


@given(at=st.lists(shapes, min_size=1, max_size=8))
@settings(max_examples=20)
def test_scaled_to_itself_a_gpu_keeps_every_prediction(
    at: list[Shape], measured: CostModel, models: dict[str, ModelledCosts]
) -> None:
    itself = models[H200.sku]
    for site in SITES:
        for candidate in RAN[site]:
            load = work(site, at)
            own, scaled = measured.costs(site, candidate), itself.costs(site, candidate)
            for one, other in zip(own.paths, scaled.paths, strict=True):
                np.testing.assert_array_equal(one.factor(load), other.factor(load))
                for (_, us), (_, scaled_us) in zip(one.latencies_us(load), other.latencies_us(load), strict=True):
                    np.testing.assert_array_equal(us, scaled_us)
            assert scaled.error == own.error


@given(at=shapes, factor=st.floats(1, 8), where=st.sampled_from(STAGES), sheet=st.sampled_from(OTHERS))
@settings(max_examples=25)
@pytest.mark.parametrize("figure", ["memory_bandwidth_gbps", "bf16_tflops", "boost_clock_mhz"])
def test_more_of_any_resource_never_slows_a_stage(
    figure: str, at: Shape, factor: float, where: tuple[Site, str, str], sheet: Datasheet, measured: CostModel
) -> None:
    before, after = ModelledCosts(measured, sheet), ModelledCosts(measured, changed(sheet, figure, factor))
    assert latency_us(after, where, [at])[0] <= latency_us(before, where, [at])[0] * (1 + 1e-12)


@pytest.mark.parametrize("sheet", OTHERS, ids=lambda sheet: str(sheet.sku))
def test_twice_the_bandwidth_takes_the_part_of_bytes_off_a_stage_of_bytes(
    sheet: Datasheet, measured: CostModel
) -> None:
    where = (C4A, "sparse_fwd", "dequantize_compressed")
    doubled = changed(sheet, "memory_bandwidth_gbps", 2)
    at = [Shape(64, 64, 64 << 20)]
    ratio = latency_us(ModelledCosts(measured, sheet), where, at) / latency_us(
        ModelledCosts(measured, doubled), where, at
    )
    assert ratio[0] == pytest.approx(2, rel=0.01)


@pytest.mark.parametrize("sheet", DATASHEETS, ids=lambda sheet: str(sheet.sku))
def test_the_staircase_of_sparse_fwd_jumps_behind_multiples_of_the_targets_sm_count_and_nowhere_else(
    sheet: Datasheet, models: dict[str, ModelledCosts]
) -> None:
    curve = models[sheet.sku].stages(C4A, "sparse_fwd")["attention"].curve
    sm_count = int(sheet.sm_count.value)
    # Far inside the context, so that every query attends to as much and the wave alone grows.
    tokens = range(sm_count // 2, 3 * sm_count + 2)
    at = [Shape(1, count, 1 << 20) for count in tokens]
    terms = terms_of(curve.basis, work(C4A, at), curve.break_at)
    waves_us = sum(c * terms[index] for index, c in enumerate(curve.coefficients) if index in (2, 3))
    steps = [count for count, step in zip(tokens, np.diff(waves_us), strict=False) if step > 1e-9]
    assert steps == [sm_count, 2 * sm_count, 3 * sm_count]


def test_a_wave_short_of_work_costs_on_the_target_what_it_costs_there_in_the_measured_law(
    models: dict[str, ModelledCosts],
) -> None:
    # The same number of full waves, at each GPU's own SM count: corrected alike, scaled by one factor per term.
    for sheet in DATASHEETS:
        target = basis(C4A, Law.WORKSPACE_ATTENTION, models[sheet.sku].scaling.chip())
        source = basis(C4A, Law.WORKSPACE_ATTENTION, Chip(132))
        here = work(C4A, [Shape(1, 2 * int(sheet.sm_count.value), 1 << 20)])
        there = work(C4A, [Shape(1, 2 * 132, 1 << 20)])
        assert target.terms(here)[1:3] == source.terms(there)[1:3]
        assert target.coordinates(here)[0] == pytest.approx(source.coordinates(there)[0])


@pytest.mark.parametrize("site", SITES, ids=lambda site: str(site.key))
@pytest.mark.parametrize("candidate_index", [0, 1])
def test_every_term_of_a_law_names_what_binds_it(site: Site, candidate_index: int) -> None:
    candidate = RAN[site][candidate_index]
    load = work(site, [Shape(1, 8, 4096)])
    for stage in stages(site, candidate):
        found = basis(site, stage.law, Chip(132))
        assert len(found.resources) == len(found.terms(load))
        assert found.resources[0] is Resource.CLOCK


@pytest.mark.parametrize("sheet", OTHERS, ids=lambda sheet: str(sheet.sku))
def test_the_uncertainty_is_never_below_that_of_the_measured_curve(
    sheet: Datasheet, measured: CostModel, models: dict[str, ModelledCosts]
) -> None:
    for site in SITES:
        for candidate in RAN[site]:
            assert models[sheet.sku].costs(site, candidate).error > measured.costs(site, candidate).error
            for stage in models[sheet.sku].stages(site, candidate).values():
                assert stage.doubt > 0
                assert 0 < stage.measured_error < 1
            anywhere = work(site, [Shape(1, 100, 5000), Shape(8, 4096, 1 << 20)])
            scaled_errors = models[sheet.sku].costs(site, candidate).error_at(anywhere)
            assert (scaled_errors > measured.costs(site, candidate).error_at(anywhere)).all()


def test_another_architecture_is_in_more_doubt_than_the_same_one_at_the_same_ratios(measured: CostModel) -> None:
    hopper = datasheet("nvidia-b200")
    there = ModelledCosts(measured, hopper)
    here = ModelledCosts(measured, replace(hopper, architecture=H200.architecture))
    for site, candidate, stage in STAGES:
        assert there.stages(site, candidate)[stage].doubt > here.stages(site, candidate)[stage].doubt or (
            stage == "attention"  # where an SM's two parts may overlap or not, the same kernel can be in as much doubt
        )


@given(
    utilisation=st.floats(0, 1),
    sheet=st.sampled_from(OTHERS),
    resource=st.sampled_from(list(Resource)),
    law=st.sampled_from(Law),
)
def test_a_factor_lies_between_the_ratios_of_what_may_bind_the_term(
    utilisation: float, sheet: Datasheet, resource: Resource, law: Law
) -> None:
    found = Scaling(H200, sheet)
    clock = H200.boost_clock_mhz.value / sheet.boost_clock_mhz.value
    tensor = H200.bf16_tflops_per_sm / sheet.bf16_tflops_per_sm
    memory = H200.memory_bandwidth_gbps.value / sheet.memory_bandwidth_gbps.value
    sms = H200.sm_count.value / sheet.sm_count.value
    low, high = {
        Resource.CLOCK: (clock, clock),
        Resource.MEMORY: (memory, memory),
        Resource.SM: (min(clock, tensor), max(clock, tensor)),
        Resource.DEVICE: (min(clock, tensor) * sms, max(clock, tensor) * sms),
    }[resource]
    factor = found.factor(resource, law, utilisation)
    assert low * (1 - 1e-12) <= factor <= high * (1 + 1e-12)
    assert found.doubt(resource, law, utilisation) > 0


def forward(name: SiteName = SiteName.PREFILL_ATTENTION) -> Scope:
    return scope(name, FLASH, FORWARD, None if name is SiteName.INDEXER_METADATA else 64)


@pytest.fixture(scope="module")
def b200_policy(measured: CostModel) -> FittedPolicy:
    """The policy of a B200 by the made-up H200."""
    return model_policy(measured, datasheet("nvidia-b200"), SOURCE)


def test_a_modelled_policy_says_what_it_is_and_is_read_back(b200_policy: FittedPolicy) -> None:
    policy, modelled = b200_policy.policy, b200_policy.evidence.modelled
    assert parse_policy(dump_policy(policy), "p") == policy
    assert (policy.gpu.sku, policy.gpu.sm_count, policy.evidence) == ("nvidia-b200", 148, "modelled")
    assert modelled is not None
    assert policy.scaled_from == "nvidia-h200"
    assert {(s.site, s.candidate, s.stage) for s in modelled.stages} == {(s.key, c, n) for s, c, n in STAGES}
    for table, evidence in zip(policy.tables, b200_policy.evidence.tables, strict=True):
        assert evidence.held_out.points == 0
        assert {entry.candidate for entry in evidence.uncertainty} == set(table.candidates)
        assert table.incumbent == model_incumbent(Engine.SGLANG, SiteName(table.site), MODELS[table.model])


def test_the_noise_band_of_a_table_is_the_uncertainty_of_both_candidates_together(b200_policy: FittedPolicy) -> None:
    for table in b200_policy.evidence.tables:
        together = math.expm1(sum(entry.relative for entry in table.uncertainty))
        assert table.noise_band == pytest.approx(together, rel=1e-3)


def test_where_the_uncertainty_spans_the_crossover_the_incumbent_stays(
    b200_policy: FittedPolicy, models: dict[str, ModelledCosts]
) -> None:
    where, costs = forward(), models["nvidia-b200"]
    (table,) = (t for t in b200_policy.policy.tables if t.layer == FORWARD and t.site == where.name)
    (band,) = (t.noise_band for t in b200_policy.evidence.tables if t.key == table.key)
    switched = 0
    for num_reqs, context in ((1, 8192), (1, 1 << 20), (16, 131072), (64, 1 << 20)):
        for tokens in (64, 256, 1024, 4096, 16384):
            shape = Shape(num_reqs, min(tokens, num_reqs * context), num_reqs * context)
            works = [work(site, [shape]) for site, _ in where.parts]
            cost = {name: float(where.predicted_us(costs, name, works)[0]) for name in table.candidates}
            choice = Decision(table).choose(shape.num_qo_tokens, shape.kv_tokens, shape.num_reqs)
            gain = cost[table.incumbent] / cost[choice] - 1
            if choice != table.incumbent:
                switched += 1
                # A row holds shapes on both sides of a threshold: half of the band is what its mean guarantees.
                assert gain > band / 2
            if gain < 0:
                assert choice == table.incumbent
    assert switched


def test_limits_are_carried_over_on_the_same_architecture_alone() -> None:
    failing = World(failures={("with_kvcache", 16384): (Outcome.RUNTIME_ERROR, "illegal memory access")})
    seen = ((16383, Outcome.OK, ""), (16384, Outcome.RUNTIME_ERROR, "illegal memory access"))
    tries = [Try(C4A, "with_kvcache", Shape(1, count, 131072), outcome, detail) for count, outcome, detail in seen]
    costs = CostModel(ENVIRONMENT, sweep(failing, [C4A]), tries)
    hopper, blackwell = (model_policy(costs, datasheet(sku), SOURCE) for sku in ("nvidia-h100", "nvidia-b200"))
    (limit,) = hopper.evidence.tables[0].limits
    assert [entry.num_qo_tokens for entry in hopper.policy.tables[0].limits] == [limit.num_qo_tokens]
    assert (limit.candidate, limit.fails_at) == ("with_kvcache", 16384)
    assert blackwell.policy.tables[0].limits == ()
    assert blackwell.policy.tables[0].measured.num_qo_tokens[1] == limit.num_qo_tokens < 16384
    assert hopper.policy.tables[0].measured.num_qo_tokens[1] >= 16384
    texts = [found.evidence.modelled.limits for found in (hopper, blackwell) if found.evidence.modelled]
    assert texts[0].startswith("carried over")
    assert texts[1].startswith("not carried over")


def test_the_measured_gpu_cannot_be_modelled_by_itself(measured: CostModel) -> None:
    with pytest.raises(UsageError, match="got nvidia-h200 for both"):
        model_policy(measured, H200, SOURCE)


def test_a_gpu_without_a_datasheet_cannot_be_scaled_from() -> None:
    elsewhere = CostModel(replace(ENVIRONMENT, sku="nvidia-l4"), sweep(World(), [C4A]))
    with pytest.raises(UsageError, match="got 'nvidia-l4'; accepted: "):
        ModelledCosts(elsewhere, H200)


def test_one_layer_type_alone_can_be_modelled() -> None:
    costs = CostModel(ENVIRONMENT, sweep(World(), [C4A]))
    policy = model_policy(costs, datasheet("nvidia-h800"), SOURCE).policy
    assert [(t.layer, t.h_q) for t in policy.tables] == [(LayerType.C4A, 64)]


SITES_OF_FLASH = [
    FLASH.site(SiteName.PREFILL_ATTENTION, layer) for layer in FLASH.site_layers(SiteName.PREFILL_ATTENTION)
]
BLACKWELLS = [sheet for sheet in DATASHEETS if sheet.architecture == SM100]


@pytest.mark.parametrize("sheet", BLACKWELLS, ids=lambda sheet: str(sheet.sku))
@pytest.mark.parametrize("site", SITES_OF_FLASH, ids=lambda site: str(site.key))
def test_on_sm100_a_selection_of_at_most_640_entries_has_no_schedule_and_no_partial_results(
    site: Site, sheet: Datasheet, models: dict[str, ModelledCosts]
) -> None:
    where = (site, "with_kvcache", "schedule")
    contexts = [8 << 10, 64 << 10, 72 << 10, 1 << 20]
    at = [Shape(1, 4096, context) for context in contexts]
    split = [site.layer is LayerType.C128A and context > 64 << 10 for context in contexts]
    assert (latency_us(models[sheet.sku], where, at) > 0).tolist() == split
    assert (latency_us(models["nvidia-h100"], where, at) > 0).all()
    partials = 4096 * 64 * 4 * (512 + 1)
    needed = workspace(site, "with_kvcache", work(site, at), int(sheet.sm_count.value), sheet.architecture).total_bytes
    assert (needed >= partials).tolist() == split
    assert (workspace(site, "with_kvcache", work(site, at), 132, SM90).total_bytes >= partials).all()


def test_on_sm100_an_unsplit_query_takes_a_whole_wave_however_few_there_are(models: dict[str, ModelledCosts]) -> None:
    at = [Shape(1, count, 1 << 20) for count in (1, 74, 148, 149)]
    terms = models["nvidia-b200"].stages(C4A, "with_kvcache")["attention"].curve.basis.terms(work(C4A, at))
    busiest, split, merged = terms[3], terms[4], terms[5]
    assert busiest.tolist() == [15, 15, 15, 30]  # 8 tiles of the selection, 2 of the window, 5 for the piece
    assert not split.any()
    assert not merged.any()
    scheduled = ModelledCosts(models["nvidia-b200"].measured, datasheet("nvidia-b200"), always_splits=True)
    assert scheduled.stages(C4A, "with_kvcache")["attention"].curve.basis.terms(work(C4A, at))[4].any()


def test_what_a_sweep_of_sm100_times_where_nothing_is_scheduled_is_noise(measured: CostModel) -> None:
    site = FLASH.site(SiteName.PREFILL_ATTENTION, LayerType.C128A)
    (stage,) = (s for s in stages(site, "with_kvcache") if s.name == "schedule")
    found = basis(site, stage.law, Chip(148, architecture=SM100))
    at = [Shape(1, count, context << 10) for count in (64, 512, 4096) for context in (8, 64, 72, 1024)]
    load = work(site, at)
    timed = np.where(load.kv_tokens > 64 << 10, 5 + 0.07 * load.num_qo_tokens, 0.4)
    curve = fit_curve(found, load, timed)
    np.testing.assert_allclose(curve.latency_us(load), np.where(timed == 0.4, 0, timed), rtol=1e-6)


@pytest.mark.parametrize("sku", ["nvidia-b200", "nvidia-h100"])
def test_v3_2_with_64_heads_pays_for_128_over_the_workspace_in_sglang_on_sm100(sku: str, h200_costs: CostModel) -> None:
    costs, model = ModelledCosts(h200_costs, datasheet(sku)), MODELS["deepseek-v3.2"]
    few, many = (scope(SiteName.PREFILL_ATTENTION, model, LayerType.DSA, h_q) for h_q in (64, 128))
    at = [Shape(1, 4096, 65536)]
    us = {
        (where.h_q, name): where.predicted_us(costs, name, [work(site, at) for site, _ in where.parts])[0]
        for where in (few, many)
        for name in ("sparse_fwd", "with_kvcache")
    }
    assert (us[64, "sparse_fwd"] == us[128, "sparse_fwd"]) == (sku == "nvidia-b200")
    assert us[64, "with_kvcache"] < us[128, "with_kvcache"]


def test_what_sglang_pads_on_sm100_is_explained_with_the_heads_that_run() -> None:
    """SGLang pads V3.2's 64 heads to 128 for the workspace path there, so its stages are those of 128."""
    v32, dsa = MODELS["deepseek-v3.2"], LayerType.DSA
    sites = [v32.site(SiteName.PREFILL_ATTENTION, dsa, h_q) for h_q in (64, 128)]
    costs = ModelledCosts(CostModel(ENVIRONMENT, sweep(World(noise=0.01), sites)), datasheet("nvidia-b200"))
    at = Shape(1, 4096, 65536)
    found = {}
    for h_q in (64, 128):
        fitted = unjudged_table(costs, scope(SiteName.PREFILL_ATTENTION, v32, dsa, h_q))
        assert fitted is not None
        (path,) = (entry for entry in explain(costs, fitted.table, at).candidates if entry.candidate == "sparse_fwd")
        found[h_q] = {line.stage: line.latency_us for line in path.stages}
    assert found[64] == found[128]
