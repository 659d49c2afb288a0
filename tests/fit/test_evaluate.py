"""The judgement, on tables written by hand."""

from __future__ import annotations

import msgspec
import pytest

from mla_tune.errors import FitError
from mla_tune.fit.evaluation import held_out, held_out_points, overall, rules
from mla_tune.fit.observations import Observations
from mla_tune.fit.table_rows import fit_policy
from mla_tune.policy.schema import Choice, Range, Row, Table
from mla_tune.store.measurement import Outcome, Role
from tests.fit.synthetic import C4A, ENVIRONMENT, METADATA, SOURCE, World, attention_sites, fit_shapes, sweep

TABLE = Table(
    site="prefill_attention",
    model="deepseek-v4-flash",
    h_q=64,
    layer="c4a",
    incumbent="sparse_fwd",
    candidates=("sparse_fwd", "with_kvcache"),
    builds=(),
    measured=Range(num_qo_tokens=(1, 65536), kv_tokens=(1, 1 << 26), num_reqs=(1, 64)),
    rows=(Row(choices=(Choice(candidate="with_kvcache"),)),),
)
OBSERVATIONS = Observations(sweep(World(), [C4A]))


def test_the_policy_is_judged_by_what_its_table_would_serve() -> None:
    by_rule = {entry.rule: entry for entry in held_out(OBSERVATIONS, TABLE).slowdown}
    policy, always = by_rule["policy"], by_rule["always with_kvcache"]
    assert (policy.geomean, policy.mean, policy.p95, policy.worst) == (
        always.geomean,
        always.mean,
        always.p95,
        always.worst,
    )


def test_outside_the_measured_range_the_policy_is_its_incumbent() -> None:
    nowhere = msgspec.structs.replace(TABLE, measured=Range(num_qo_tokens=(1, 1), kv_tokens=(1, 1), num_reqs=(1, 1)))
    by_rule = {entry.rule: entry for entry in held_out(OBSERVATIONS, nowhere).slowdown}
    assert by_rule["policy"].mean == by_rule["always sparse_fwd"].mean


def test_at_every_point_some_constant_rule_is_the_fastest() -> None:
    names = [name for name, _ in rules(TABLE)]
    constant = [index for index, name in enumerate(names) if name.startswith("always")]
    points = held_out_points(OBSERVATIONS, TABLE)
    assert len(points) == 30
    assert all(min(point.slowdowns[index] for index in constant) == 1.0 for point in points)
    assert all(slowdown >= 1.0 for point in points for slowdown in point.slowdowns)


@pytest.mark.parametrize(
    ("rule", "num_qo_tokens", "kv_tokens", "answer"),
    [
        ("num_qo_tokens > 11673", 11673, 1 << 20, "with_kvcache"),
        ("num_qo_tokens > 11673", 11674, 1 << 20, "sparse_fwd"),
        ("kv_tokens < 512 * num_qo_tokens", 100, 51200, "with_kvcache"),
        ("kv_tokens < 512 * num_qo_tokens", 100, 51199, "sparse_fwd"),
    ],
)
def test_hand_written_rules_switch_where_the_engine_does(
    rule: str, num_qo_tokens: int, kv_tokens: int, answer: str
) -> None:
    assert dict(rules(TABLE))[rule](num_qo_tokens, kv_tokens, 1) == answer


def test_a_point_where_a_candidate_failed_is_judged_for_no_rule() -> None:
    world = World(failures={("with_kvcache", 2000): (Outcome.NO_MEMORY, "needs 90 GB")})
    observations = Observations(sweep(world, [C4A]))
    points = held_out_points(observations, TABLE)
    assert 0 < len(points) < 30
    assert all(point.shape.num_qo_tokens < 2000 for point in points)


def test_zero_points_raise() -> None:
    fit_only = Observations(World().measure(C4A, fit_shapes(), Role.FIT))
    with pytest.raises(FitError, match="c4a"):
        held_out(fit_only, TABLE)


def test_the_overall_judgement_weighs_points_of_single_layer_attention_tables_equally() -> None:
    measurements = sweep(World(), [*attention_sites(), METADATA], held_out=6)
    fitted = fit_policy(ENVIRONMENT, measurements, source=SOURCE)
    counted = [t for t in fitted.evidence.tables if t.site == "prefill_attention" and t.layer != "forward"]
    total = overall(Observations(measurements), fitted.policy.tables)
    assert total is not None
    assert total == fitted.evidence.overall
    assert total.points == sum(table.held_out.points for table in counted)
    expected = sum(t.held_out.points * t.held_out.slowdown[0].mean for t in counted) / total.points
    assert total.slowdown[0].mean == pytest.approx(expected, abs=2e-4)


def test_without_a_comparison_there_is_no_overall_judgement() -> None:
    fitted = fit_policy(ENVIRONMENT, sweep(World(), [METADATA], held_out=4), source=SOURCE)
    assert fitted.evidence.overall is None
