"""An explanation is the sum that the fit minimized."""

from __future__ import annotations

import pytest

from mla_tune.fit.costs import CostModel
from mla_tune.fit.explanation import explain
from mla_tune.fit.table_rows import fit_policy
from mla_tune.policy.decision import Decision
from mla_tune.sites.candidates import stages
from mla_tune.sites.shape import Shape
from mla_tune.store.measurement import Role
from tests.fit.synthetic import C4A, ENVIRONMENT, FLASH, SOURCE, World, attention_sites, sweep

MEASUREMENTS = sweep(World(noise=0.003), attention_sites(), held_out=6)
COSTS = CostModel(ENVIRONMENT, MEASUREMENTS)
POLICY = fit_policy(ENVIRONMENT, MEASUREMENTS, source=SOURCE).policy
TABLES = {table.layer: table for table in POLICY.tables if table.model == FLASH.name}


@pytest.mark.parametrize("layer", ["c4a", "c128a", "swa_only", "forward"])
def test_stages_times_the_correction_are_the_total_and_the_answer_is_the_tables(layer: str) -> None:
    shape = Shape(4, 900, 400000)
    found = explain(COSTS, TABLES[layer], shape)
    assert found.decision == Decision(TABLES[layer]).explain(900, 400000, 4)
    assert found.unit == ("forward" if layer == "forward" else "layer")
    for candidate in found.candidates:
        summed = sum(stage.latency_us for stage in candidate.stages)
        assert candidate.total_us == pytest.approx(summed * candidate.correction)
    assert [c.total_us for c in found.candidates] == sorted(c.total_us for c in found.candidates)


def test_a_breakdown_lists_the_stages_of_the_candidate_in_their_order() -> None:
    found = explain(COSTS, TABLES["c4a"], Shape(1, 256, 131072))
    for candidate in found.candidates:
        names = {stage.stage: stage.amortization for stage in candidate.stages}
        assert names == {stage.name: stage.amortization for stage in stages(C4A, candidate.candidate)}


def test_a_forward_costs_what_its_layers_cost_together() -> None:
    shape = Shape(4, 900, 400000)
    totals = {c.candidate: c.total_us for c in explain(COSTS, TABLES["forward"], shape).candidates}
    for name, total_us in totals.items():
        layers = 0.0
        for layer, count in FLASH.layers:
            (cost,) = (c for c in explain(COSTS, TABLES[layer], shape).candidates if c.candidate == name)
            layers += count * cost.total_us
        assert total_us == pytest.approx(layers)


def test_predictions_meet_the_measured_fit_points() -> None:
    for shape in COSTS.observations.shapes(C4A, Role.FIT):
        for candidate in explain(COSTS, TABLES["c4a"], shape).candidates:
            assert candidate.measured_us is not None
            assert candidate.total_us == pytest.approx(candidate.measured_us, rel=0.08)


def test_where_nothing_was_measured_there_is_no_measured_time() -> None:
    assert explain(COSTS, TABLES["c4a"], Shape(5, 777, 99999)).candidates[0].measured_us is None
