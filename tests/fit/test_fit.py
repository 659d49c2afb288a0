"""What a fitted policy must be, whatever the measurements were."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mla_tune.errors import FitError
from mla_tune.fit.observations import shares
from mla_tune.fit.table_rows import FittedPolicy, fit_policy, left_out
from mla_tune.policy.codec import dump_policy, parse_policy
from mla_tune.policy.decision import Decision
from mla_tune.policy.evidence import TableEvidence
from mla_tune.policy.rules import problems
from mla_tune.policy.schema import Choice, Policy, Row, Table
from mla_tune.sites.candidates import CANDIDATES, SPARSE_FWD, WITH_KVCACHE, names_at, stages
from mla_tune.sites.engines import Engine, EngineChoice
from mla_tune.sites.shape import Shape
from mla_tune.sites.site import LayerType, Site, SiteName
from mla_tune.store.measurement import Measurement, Outcome, Regime, Role
from tests.fit.synthetic import (
    C4A,
    ENVIRONMENT,
    FLASH,
    METADATA,
    SOURCE,
    V3_2,
    World,
    attention_sites,
    stage_us,
    sweep,
)

CLEAN = sweep(World(noise=0.003), [C4A])


def _fitted(measurements: list[Measurement]) -> FittedPolicy:
    fitted = fit_policy(ENVIRONMENT, measurements, source=SOURCE)
    assert list(problems(fitted.policy)) == []
    return fitted


def _fit(measurements: list[Measurement]) -> Policy:
    return _fitted(measurements).policy


def _c4a_evidence(measurements: list[Measurement]) -> TableEvidence:
    (evidence,) = _fitted(measurements).evidence.tables
    return evidence


def _c4a_table(measurements: list[Measurement]) -> Table:
    (table,) = _fit(measurements).tables
    assert (table.site, table.model, table.h_q, table.layer) == ("prefill_attention", "deepseek-v4-flash", 64, "c4a")
    return table


def _true_us(candidate: str, shape: Shape) -> float:
    share = shares(FLASH, C4A)
    return sum(stage_us(C4A, candidate, s.name, shape) * share.of(s.amortization) for s in stages(C4A, candidate))


def _attention_alone(total_us: Callable[[str, Shape], float]) -> Callable[[Site, str, str, Shape], float]:
    """A law by the cost of a whole candidate, all of it in its attention."""

    def law(site: Site, candidate: str, stage: str, shape: Shape) -> float:
        return total_us(candidate, shape) if stage == "attention" else 0.0

    return law


@pytest.mark.parametrize(
    ("num_reqs", "context"), [(1, 8192), (1, 131072), (1, 1 << 20), (4, 65536), (16, 131072), (48, 8192)]
)
def test_where_a_choice_loses_more_than_a_few_percent_a_bracket_says_so(num_reqs: int, context: int) -> None:
    kv_tokens = num_reqs * context
    fitted = _fitted(CLEAN)
    (table,), (evidence,) = fitted.policy.tables, fitted.evidence.tables
    decision = Decision(table)
    lost, inside = 0, 0
    for count in range(max(num_reqs, 2), min(kv_tokens, 32768), 7):
        shape = Shape(num_reqs, count, kv_tokens)
        costs_us = {name: _true_us(name, shape) for name in table.candidates}
        chosen = decision.choose(count, kv_tokens, num_reqs)
        if costs_us[chosen] > 1.08 * min(costs_us.values()):
            lost += 1
            inside += any(low <= count <= high for low, high in _brackets(table, evidence, shape))
    assert inside == lost
    assert lost < 20


def _brackets(table: Table, evidence: TableEvidence, shape: Shape) -> list[tuple[int, int]]:
    """Brackets of every threshold of the row that serves ``shape``, in query tokens."""
    index = Decision(table).answer(shape.num_qo_tokens, shape.kv_tokens, shape.num_reqs).row
    if index is None:
        return []
    choices, brackets = table.rows[index].choices[1:], evidence.rows[index].thresholds
    return [of.at(choice.threshold.at(shape.kv_tokens)) for choice, of in zip(choices, brackets, strict=True)]


def test_a_policy_loses_little_on_shapes_that_it_never_saw_and_less_than_every_constant() -> None:
    policy, *baselines = _c4a_evidence(CLEAN).held_out.slowdown
    assert policy.rule == "policy"
    assert policy.mean <= 1.02
    assert policy.worst <= 1.25
    assert all(policy.mean < baseline.mean for baseline in baselines)


def test_the_order_of_measurements_does_not_matter_to_a_byte() -> None:
    measurements = sweep(World(noise=0.01), attention_sites(), held_out=8)
    shuffled = random.Random(3).sample(measurements, len(measurements))
    first, second = _fit(measurements), _fit(shuffled)
    assert dump_policy(first) == dump_policy(second)
    assert parse_policy(dump_policy(first), "memory") == first


def test_held_out_timings_reach_the_judgement_alone() -> None:
    def disturbed(m: Measurement) -> Measurement:
        factor = 1.01 if m.candidate == "sparse_fwd" else 1.0  # a table that loses to one candidate has its own test
        return m if m.role is Role.FIT else replace(m, latency_us=(m.latency_us or 0) * factor)

    before, after = _fitted(CLEAN), _fitted([disturbed(m) for m in CLEAN])
    assert after.policy == before.policy
    (one,), (other,) = before.evidence.tables, after.evidence.tables
    assert other.held_out != one.held_out
    assert msgspec.structs.replace(other, held_out=one.held_out) == one


def test_differences_inside_the_noise_keep_the_incumbent() -> None:
    def equal(candidate: str, shape: Shape) -> float:
        return 20 + 0.1 * shape.num_qo_tokens

    table = _c4a_table(sweep(World(law=_attention_alone(equal), noise=0.003, launch_gap_us=0), [C4A]))
    only = Choice(candidate="sparse_fwd")
    assert table.rows == (Row(num_reqs_from=0, kv_tokens_from=0, choices=(only,)),)


def test_a_winner_that_returns_gets_several_thresholds() -> None:
    def alternating(candidate: str, shape: Shape) -> float:
        favoured = shape.num_qo_tokens < 100 or 1500 <= shape.num_qo_tokens < 6000
        factor = (0.6 if favoured else 1.5) if candidate == "with_kvcache" else 1.0
        return (20 + 0.1 * shape.num_qo_tokens) * factor

    table = _c4a_table(sweep(World(law=_attention_alone(alternating)), [C4A]))
    chosen = [Decision(table).choose(count, 131072, 1) for count in (32, 512, 4096, 16384)]
    assert chosen == ["with_kvcache", "sparse_fwd", "with_kvcache", "sparse_fwd"]


def _add_zigzag(monkeypatch: pytest.MonkeyPatch) -> None:
    """A third candidate that SGLang can take."""
    zigzag = msgspec.structs.replace(WITH_KVCACHE, name="zigzag")
    monkeypatch.setitem(CANDIDATES, SiteName.PREFILL_ATTENTION, (SPARSE_FWD, WITH_KVCACHE, zigzag))
    monkeypatch.setattr("mla_tune.sites.engines._V4", EngineChoice(SPARSE_FWD, (SPARSE_FWD, WITH_KVCACHE, zigzag)))


def test_a_dominated_candidate_changes_no_threshold(monkeypatch: pytest.MonkeyPatch) -> None:
    before = _c4a_table(CLEAN)
    _add_zigzag(monkeypatch)

    def law(site: Site, candidate: str, stage: str, shape: Shape) -> float:
        return (
            stage_us(site, "sparse_fwd", stage, shape) * 3
            if candidate == "zigzag"
            else stage_us(site, candidate, stage, shape)
        )

    after = _c4a_table(sweep(World(law=law, noise=0.003), [C4A]))
    assert after.candidates == ("sparse_fwd", "with_kvcache", "zigzag")
    assert after.rows == before.rows


def test_a_third_candidate_that_wins_is_chosen_where_it_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    _add_zigzag(monkeypatch)

    def crossing(candidate: str, shape: Shape) -> float:
        fixed, slope = {"with_kvcache": (5, 1.0), "zigzag": (50, 0.25), "sparse_fwd": (400, 0.05)}[candidate]
        return fixed + slope * shape.num_qo_tokens

    table = _c4a_table(sweep(World(law=_attention_alone(crossing)), [C4A]))
    assert [Decision(table).choose(count, 131072, 1) for count in (16, 400, 8192)] == [
        "with_kvcache",
        "zigzag",
        "sparse_fwd",
    ]


def test_a_forward_weighs_its_layer_types_by_their_counts() -> None:
    fitted = _fitted(sweep(World(), attention_sites()))
    tables = {table.layer: table for table in fitted.evidence.tables if table.model == FLASH.name}
    assert list(tables) == ["swa_only", "c4a", "c128a", "forward"]
    assert tables["forward"].held_out.slowdown[0].mean <= 1.02
    assert fitted.policy.regime == "graph"


def test_models_share_the_sites_that_they_agree_on() -> None:
    c128a = FLASH.site(SiteName.PREFILL_ATTENTION, LayerType.C128A)
    tables = _fit(sweep(World(), [c128a], held_out=8)).tables
    assert [(t.model, t.h_q, t.layer) for t in tables] == [
        ("deepseek-v4-flash", 64, "c128a"),
        ("deepseek-v4-pro", 64, "c128a"),
    ]


def test_v3_2_keeps_its_own_incumbent() -> None:
    site = V3_2.site(SiteName.PREFILL_ATTENTION, LayerType.DSA)
    fitted = _fitted(sweep(World(noise=0.003), [site], model=V3_2))
    tables = [t for t in fitted.policy.tables if t.engine is Engine.SGLANG]
    assert [(t.layer, t.incumbent) for t in tables] == [("dsa", "with_kvcache"), ("forward", "with_kvcache")]
    assert fitted.evidence.tables[0].held_out.slowdown[0].mean <= 1.02


def test_metadata_tables_have_no_heads_and_judge_their_own_baselines() -> None:
    tables = _fitted(sweep(World(), [METADATA], held_out=8)).evidence.tables
    assert {(t.h_q, t.layer) for t in tables} == {(None, "c4a"), (None, "forward")}
    assert [s.rule for s in tables[0].held_out.slowdown] == [
        "policy",
        "always deep_gemm",
        "always jit",
        "num_qo_tokens > 11673",
    ]


@settings(max_examples=6, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0.0, 0.6))
def test_any_part_of_a_sweep_gives_a_valid_policy_or_one_fit_error(seed: int, missing: float) -> None:
    rng = random.Random(seed)
    scale = {candidate: rng.uniform(0.3, 3) for candidate in names_at(C4A)}

    def law(site: Site, candidate: str, stage: str, shape: Shape) -> float:
        return stage_us(site, candidate, stage, shape) * scale[candidate]

    measurements = [m for m in sweep(World(law=law, noise=0.05), [C4A], held_out=10) if rng.random() >= missing]
    try:
        tables = _fitted(measurements).evidence.tables
    except FitError as error:
        tables, refusal = (), str(error)
    else:
        refusal = ""
    assert bool(tables) != bool(refusal)
    assert "\n" not in refusal
    assert all(s.geomean >= 1 and s.worst >= s.p95 >= 1 for t in tables for s in t.held_out.slowdown)


def test_a_candidate_without_memory_for_long_contexts_is_fitted_on_the_rest() -> None:
    def starved(m: Measurement) -> bool:
        return m.candidate == "sparse_fwd" and m.shape.kv_tokens > 1 << 22

    kept = [m for m in CLEAN if not starved(m)]
    lost = {m.shape: m for m in CLEAN if starved(m)}.values()
    failed = [
        Measurement(m.site, m.shape, m.role, m.candidate, "per_layer", m.regime, Outcome.NO_MEMORY, "needs 90 GB")
        for m in lost
    ]
    table = _c4a_evidence([*kept, *failed])
    assert table.limits == ()
    assert table.held_out.points < _c4a_evidence(CLEAN).held_out.points
    assert table.held_out.slowdown[0].mean <= 1.02


def test_a_candidate_that_never_ran_is_left_out_of_the_table() -> None:
    world = World(failures={("with_kvcache", 1): (Outcome.UNSUPPORTED, "flash_mla is not installed")})
    fitted = _fitted(sweep(world, [C4A], held_out=4))
    assert fitted.policy.tables[0].candidates == ("sparse_fwd",)
    assert [s.rule for s in fitted.evidence.tables[0].held_out.slowdown] == ["policy", "always sparse_fwd"]


def test_whole_timings_overrule_the_sum_of_the_stages() -> None:
    def overlapped(m: Measurement) -> Measurement:
        halved = m.candidate == "sparse_fwd" and m.part == "per_layer"
        return replace(m, latency_us=(m.latency_us or 0) * 0.5) if halved else m

    again = _fitted([overlapped(m) for m in CLEAN])
    before, after = _c4a_table(CLEAN), again.policy.tables[0]

    def thresholds(table: Table) -> list[int]:
        counts, choose = range(16, 32768, 16), Decision(table).choose
        return [sum(choose(q, kv, 1) == "sparse_fwd" for q in counts) for kv in (16384, 131072, 1 << 20)]

    assert all(a > b for a, b in zip(thresholds(after), thresholds(before), strict=True))
    assert again.evidence.tables[0].held_out.slowdown[0].mean <= 1.02


def test_graph_timings_are_preferred_to_eager_ones() -> None:
    eager = [replace(m, regime=Regime.EAGER, latency_us=1e6) for m in CLEAN]
    assert _c4a_table([*eager, *CLEAN]) == _c4a_table(CLEAN)


def test_without_held_out_points_there_is_no_policy() -> None:
    with pytest.raises(FitError, match="held-out"):
        fit_policy(ENVIRONMENT, [m for m in CLEAN if m.role is Role.FIT], source=SOURCE)


def test_without_measurements_there_is_no_policy() -> None:
    with pytest.raises(FitError, match="incumbent ran"):
        fit_policy(ENVIRONMENT, [], source=SOURCE)


def test_without_the_incumbent_there_is_no_policy() -> None:
    with pytest.raises(FitError, match="incumbent"):
        fit_policy(ENVIRONMENT, [m for m in CLEAN if m.candidate != "sparse_fwd"], source=SOURCE)


def test_a_candidate_that_compiles_for_seconds_at_most_new_shapes_is_measured_but_never_served() -> None:
    slow = [replace(m, first_call_s=2.5) if m.candidate == "with_kvcache" else m for m in CLEAN]
    table, evidence = _c4a_table(slow), _c4a_evidence(slow)
    assert [(entry.candidate, entry.first_call_s) for entry in table.ineligible] == [("with_kvcache", 2.5)]
    assert {choice.candidate for row in table.rows for choice in row.choices} == {"sparse_fwd"}
    assert "always with_kvcache" in [entry.rule for entry in evidence.held_out.slowdown]


def test_one_slow_first_call_in_a_process_bars_nobody() -> None:
    first = min(m.shape for m in CLEAN)
    warmed = [replace(m, first_call_s=30.0 if m.shape == first else 0.001) for m in CLEAN]
    assert _c4a_table(warmed) == _c4a_table(CLEAN)


def test_a_table_that_no_held_out_point_can_judge_is_left_out_by_name() -> None:
    unjudged = [m for m in sweep(World(), [C4A, METADATA]) if m.role is Role.FIT or m.site == METADATA]
    policy = _fit(unjudged)
    assert {table.site for table in policy.tables} == {METADATA.name}
    assert left_out(unjudged, policy) == ["prefill_attention, deepseek-v4-flash, h_q 64, c4a"]


def test_timings_that_scatter_by_more_than_their_size_still_make_a_valid_policy() -> None:
    wild = [replace(m, ci_low_us=0.0, ci_high_us=10 * m.latency_us) if m.latency_us is not None else m for m in CLEAN]
    assert _c4a_evidence(wild).noise_band == 0.99
