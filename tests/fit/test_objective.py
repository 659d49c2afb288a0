"""What a fit minimizes when asked: recorded traffic weighs its shapes, and the host's time counts."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import lru_cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mla_tune.errors import FitError
from mla_tune.fit.acquire import doubts
from mla_tune.fit.costs import CostModel
from mla_tune.fit.evaluation import by_traffic, held_out_points
from mla_tune.fit.objective import UNIFORM_SHARE, Objective, cell_weights, shape_weights
from mla_tune.fit.observations import Observations
from mla_tune.fit.scope import Scope, scope
from mla_tune.fit.table_rows import FittedTable, fit_policy, fit_table
from mla_tune.fit.training import cells_of, query_counts, training_grid
from mla_tune.policy.decision import Decision
from mla_tune.policy.schema import Table
from mla_tune.sites.candidates import names_at
from mla_tune.sites.served_shapes import ServedShape, Traffic
from mla_tune.sites.shape import Shape
from mla_tune.sites.site import MODELS, SiteName, attention_sites
from mla_tune.store.measurement import Regime, Role
from mla_tune.sweep.grid import gpu_grid, pool
from tests.fit.recorded import recorded
from tests.fit.synthetic import C4A, ENVIRONMENT, FLASH, SOURCE, World, sweep

SCOPE = scope(SiteName.PREFILL_ATTENTION, FLASH, "c4a", 64)
CLEAN = sweep(World(noise=0.003), [C4A])


@lru_cache(maxsize=2)
def h200(regime: Regime | None = None) -> CostModel:
    return CostModel(recorded().environment, recorded().measurements, recorded().tries, regime)


@lru_cache(maxsize=1)
def made_up() -> CostModel:
    return CostModel(ENVIRONMENT, CLEAN)


def fitted(costs: CostModel, where: Scope, objective: Objective) -> FittedTable:
    found = fit_table(costs, where, objective=objective)
    assert found is not None
    return found


def table(costs: CostModel, where: Scope, objective: Objective) -> Table:
    return fitted(costs, where, objective).table


def traffic(*shapes: Shape, model: str = FLASH.name, site: str = "prefill_attention") -> Objective:
    cells = {ServedShape(site, model, s.num_qo_tokens, s.kv_tokens, s.num_reqs): 100 for s in shapes}
    return Objective(traffic=Traffic(cells))


fit_points = st.sampled_from(h200().observations.shapes(SCOPE.parts[0][0], Role.FIT))
shapes = st.builds(
    lambda reqs, extend, context: Shape(reqs, reqs * extend, reqs * max(context, extend)),
    st.integers(1, 64),
    st.integers(1, 2000),
    st.integers(64, 1 << 20),
)


@given(st.lists(shapes, min_size=1, max_size=40), st.integers(1, 10**6))
def test_traffic_spread_like_the_shapes_weighs_them_all_alike(points: list[Shape], each: int) -> None:
    forwards: dict[ServedShape, int] = {}
    for s in points:
        key = ServedShape("prefill_attention", "m", s.num_qo_tokens, s.kv_tokens, s.num_reqs)
        forwards[key] = forwards.get(key, 0) + each
    assert shape_weights(forwards, points, 132).tolist() == [1.0] * len(points)


@given(st.lists(shapes, min_size=1, max_size=40), st.lists(shapes, min_size=1, max_size=5))
def test_weights_have_mean_one_and_leave_every_shape_its_even_share(points: list[Shape], met: list[Shape]) -> None:
    forwards = {ServedShape("s", "m", s.num_qo_tokens, s.kv_tokens, s.num_reqs): 7 for s in met}
    weights = shape_weights(forwards, points, 132)
    assert weights.min() >= UNIFORM_SHARE - 1e-3
    assert np.isclose(weights.mean(), 1.0, atol=2e-3)


@given(shapes, shapes)
def test_weights_are_largest_where_the_traffic_is(met: Shape, other: Shape) -> None:
    tokens = query_counts(132)
    weights = cell_weights(
        {ServedShape("s", "m", met.num_qo_tokens, met.kv_tokens, met.num_reqs): 1},
        cells_of([met, other], tokens),
        tokens,
    )
    assert weights[0] >= weights[1]


def test_uniform_traffic_gives_the_unweighted_policy() -> None:
    """Uniform over what a table is trained on: its grid."""
    measured = made_up().observations.shapes(C4A, Role.FIT)
    grid = training_grid(FLASH.max_context, ENVIRONMENT.sm_count)
    trained = [shape for shape, kept in zip(grid.shapes, grid.inside(measured), strict=True) if kept]
    forwards = Counter(
        ServedShape("prefill_attention", FLASH.name, s.num_qo_tokens, s.kv_tokens, s.num_reqs) for s in trained
    )
    uniform = Objective(traffic=Traffic(dict(forwards)))
    assert table(made_up(), SCOPE, uniform) == table(made_up(), SCOPE, Objective())
    once = Objective(traffic=Traffic(dict.fromkeys(list(forwards)[:400], 1)))
    assert table(made_up(), SCOPE, once) != table(made_up(), SCOPE, Objective())


@settings(max_examples=8, deadline=None)
@given(fit_points)
def test_traffic_at_one_measured_shape_makes_the_choice_there_the_best_measured_or_nearly(shape: Shape) -> None:
    costs = h200()
    found = fitted(costs, SCOPE, traffic(shape))
    weighed, band = found.table, found.evidence.noise_band
    us = {name: SCOPE.measured_us(costs.observations, name, shape) for name in weighed.candidates}
    ran = {name: value for name, value in us.items() if value is not None}
    chosen = Decision(weighed).choose(shape.num_qo_tokens, shape.kv_tokens, shape.num_reqs)
    # A cell answers for the shapes around it too, by predictions: beside a crossover a small loss may remain.
    assert ran[chosen] <= min(ran.values()) * max(1 + band, 1.05)


def test_traffic_of_another_model_or_site_changes_no_row() -> None:
    plain = table(made_up(), SCOPE, Objective())
    for objective in (
        traffic(Shape(1, 64, 131072), model="deepseek-v3.2"),
        traffic(Shape(1, 64, 131072), site="indexer_metadata"),
        traffic(Shape(1, 1, 1)),  # outside the measured ranges the incumbent stays, whatever the rows are
    ):
        assert table(made_up(), SCOPE, objective).rows == plain.rows


def test_a_policy_says_what_weighed_it_and_refuses_traffic_that_weighs_nothing() -> None:
    stated = fit_policy(ENVIRONMENT, CLEAN, source=SOURCE, objective=traffic(Shape(1, 64, 131072))).evidence.objective
    assert stated is not None
    assert (stated.forwards, stated.uniform_share) == (100, UNIFORM_SHARE)
    assert fit_policy(ENVIRONMENT, CLEAN, source=SOURCE).evidence.objective is None
    with pytest.raises(FitError, match="accepted: prefill_attention of deepseek-v4-flash"):
        fit_policy(ENVIRONMENT, CLEAN, source=SOURCE, objective=traffic(Shape(1, 1, 64), model="deepseek-v3.2"))


def test_the_judgement_by_traffic_is_the_mean_at_the_points_near_it() -> None:
    plain = fit_policy(ENVIRONMENT, CLEAN, source=SOURCE).policy
    (only,) = plain.tables
    observations = Observations(CLEAN)
    point = held_out_points(observations, only)[0]
    judged = by_traffic(observations, plain, traffic(point.shape))
    assert judged.points >= 1
    assert 1 <= judged.effective <= judged.points + 1e-9
    near = [p.slowdowns for p in held_out_points(observations, only)]
    for index, (_, mean) in enumerate(judged.slowdown):
        assert min(s[index] for s in near) - 1e-9 <= mean <= max(s[index] for s in near) + 1e-9
    nowhere = by_traffic(observations, plain, traffic(point.shape, model="deepseek-v3.2"))
    assert (nowhere.points, nowhere.slowdown) == (0, ())


def test_a_sweep_measures_next_where_the_traffic_is() -> None:
    rows = [m for m in recorded().measurements if m.role is Role.FIT and m.shape.num_reqs == 1]
    costs = CostModel(recorded().environment, rows)
    (site,) = (s for s in attention_sites([FLASH]) if s.layer == "c4a")
    shapes = pool(gpu_grid(132), MODELS[FLASH.name], site)
    plain = doubts(costs, FLASH, site, shapes, 8)
    assert len(plain) > 2
    assert doubts(costs, FLASH, site, shapes, 8, np.ones(len(shapes))) == plain
    least = plain[-1].shape
    weights = shape_weights(traffic(least).recorded(SiteName.PREFILL_ATTENTION, FLASH.name), shapes, 132)
    assert doubts(costs, FLASH, site, shapes, 1, weights)[0].shape == least


def test_host_inclusive_time_is_minimized_where_asked() -> None:
    eager = [
        replace(m, regime=Regime.EAGER, latency_us=(m.latency_us or 0) + (500 if m.candidate == "sparse_fwd" else 0))
        for m in CLEAN
    ]
    both = [*CLEAN, *eager]
    policies = {
        regime: fit_policy(ENVIRONMENT, both, source=SOURCE, objective=Objective(regime=regime)).policy
        for regime in (None, Regime.GRAPH, Regime.EAGER)
    }
    assert {regime: policy.regime for regime, policy in policies.items()} == {
        None: "graph",
        Regime.GRAPH: "graph",
        Regime.EAGER: "eager",
    }
    assert policies[None] == policies[Regime.GRAPH] == fit_policy(ENVIRONMENT, CLEAN, source=SOURCE).policy
    shape = 1024, 131072, 1
    assert Decision(policies[Regime.GRAPH].tables[0]).choose(*shape) == "sparse_fwd"
    assert Decision(policies[Regime.EAGER].tables[0]).choose(*shape) == "with_kvcache"


def test_a_regime_that_was_not_measured_is_refused_in_one_line() -> None:
    with pytest.raises(FitError, match=r"got eager.*accepted here: graph") as refused:
        fit_policy(ENVIRONMENT, CLEAN, source=SOURCE, objective=Objective(regime=Regime.EAGER))
    assert "\n" not in str(refused.value)


def test_where_kernels_take_milliseconds_the_gpu_time_stands_for_the_host_inclusive_one() -> None:
    eager, graph = Observations(recorded().measurements, regime=Regime.EAGER), Observations(recorded().measurements)
    (site, _), *_ = SCOPE.parts
    timed = {(m.shape, m.candidate) for m in recorded().measurements if m.regime is Regime.EAGER and m.site == site}
    alike = differing = 0
    for shape in graph.shapes(site):
        for name in names_at(site):
            one, other = graph.cost(site, name, shape), eager.cost(site, name, shape)
            if one is None or other is None:
                continue
            if (shape, name) not in timed:
                alike += one == other
            else:
                differing += one != other
    assert alike > 10
    assert differing > 10


def test_the_recorded_h200_has_another_crossover_when_the_host_counts() -> None:
    graph, eager = (fitted(h200(regime), SCOPE, Objective(regime=regime)) for regime in (None, Regime.EAGER))
    assert graph.table.measured == eager.table.measured
    assert graph.evidence.held_out.points == eager.evidence.held_out.points
    assert graph.table.rows != eager.table.rows
