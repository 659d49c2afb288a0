"""A changed answer costs what was timed where it falls on a measured shape, and elsewhere nothing is claimed."""

from __future__ import annotations

import math
from pathlib import Path

import msgspec
import pytest

from mla_tune.fit.costs import CostModel
from mla_tune.fit.evaluation import table_scope
from mla_tune.policy.codec import load_policy
from mla_tune.policy.comparison import asked_shapes, compare_policies
from mla_tune.policy.schema import Choice, Policy, Row, Table
from mla_tune.replay.measured_changes import judge_changes, mean_ratio, predict_changes
from mla_tune.store.measurement import Role

H200 = load_policy(Path(__file__).parents[2] / "policies" / "nvidia-h200.yaml")
KEY = ("prefill_attention", "deepseek-v3.2", 128, "dsa", "sglang")


def always(candidate: str) -> Policy:
    """The H200's policy with one candidate everywhere in one table."""

    def changed(table: Table) -> Table:
        if table.key != KEY:
            return table
        return msgspec.structs.replace(table, rows=(Row(choices=(Choice(candidate=candidate),)),))

    return msgspec.structs.replace(H200, tables=tuple(map(changed, H200.tables)))


def test_what_a_change_costs_is_the_ratio_of_the_measured_times(h200_costs: CostModel) -> None:
    change = compare_policies(always("with_kvcache"), always("sparse_fwd"))
    (judged,) = judge_changes(h200_costs.observations, change)
    where = table_scope(change.tables[0].table)
    expected = []
    for role in (Role.FIT, Role.HELD_OUT):
        for shape in where.swept(h200_costs.observations, role):
            times = [where.measured_us(h200_costs.observations, n, shape) for n in ("with_kvcache", "sparse_fwd")]
            if None not in times and change.tables[0].table.measured.holds(
                shape.num_qo_tokens, shape.kv_tokens, shape.num_reqs
            ):
                expected.append((times[0] or 0.0) / (times[1] or 1.0))
    assert judged.changed == len(expected) > 20
    assert 0 < judged.held_out < judged.changed
    assert judged.ratio == pytest.approx(math.exp(sum(map(math.log, expected)) / len(expected)))
    assert (judged.best, judged.worst) == pytest.approx((max(expected), min(expected)))
    assert mean_ratio([judged]) == pytest.approx(judged.ratio)


def test_the_committed_policy_beats_both_constant_ones_at_the_shapes_where_it_differs(h200_costs: CostModel) -> None:
    for candidate in ("with_kvcache", "sparse_fwd"):
        (judged,) = judge_changes(h200_costs.observations, compare_policies(always(candidate), H200))
        assert judged.ratio is not None
        assert judged.ratio > 1
        assert judged.slowdown_before is not None
        assert judged.slowdown_after is not None
        assert judged.slowdown_after < judged.slowdown_before


def test_the_way_back_costs_what_the_way_there_wins(h200_costs: CostModel) -> None:
    there, back = compare_policies(always("sparse_fwd"), H200), compare_policies(H200, always("sparse_fwd"))
    (won,), (lost,) = (judge_changes(h200_costs.observations, change) for change in (there, back))
    assert won.changed == lost.changed
    assert won.ratio is not None
    assert lost.ratio == pytest.approx(1 / won.ratio)


def test_a_change_between_measured_shapes_has_no_measured_price_and_a_predicted_one(h200_costs: CostModel) -> None:
    table = next(table for table in H200.tables if table.key == KEY)
    measured = {shape.num_qo_tokens for shape in table_scope(table).swept(h200_costs.observations, Role.FIT)} | {
        shape.num_qo_tokens for shape in table_scope(table).swept(h200_costs.observations, Role.HELD_OUT)
    }
    low = next(count for count in range(3000, 8000) if not measured & {count, count + 1})
    policies = []
    for start in (low, low + 2):
        line = msgspec.structs.replace(
            table.rows[0].choices[1], threshold=type(table.rows[0].choices[1].threshold).level(start)
        )
        first = Choice(candidate="with_kvcache")
        rows = (Row(choices=(first, msgspec.structs.replace(line, candidate="sparse_fwd"))),)
        policies.append(msgspec.structs.replace(H200, tables=(msgspec.structs.replace(table, rows=rows),)))
    change = compare_policies(policies[0], policies[1])
    (judged,) = judge_changes(h200_costs.observations, change)
    assert (judged.changed, judged.ratio) == (0, None)
    assert mean_ratio([judged]) is None
    (guess,) = predict_changes(h200_costs, change, [[(low, 1 << 17, 1), (low + 1, 1 << 20, 4), (5, 1 << 17, 1)]])
    assert guess.shapes == 2
    assert 0 < guess.worst <= guess.ratio <= guess.best


def test_nothing_is_predicted_for_a_table_whose_answers_stay(h200_costs: CostModel) -> None:
    change = compare_policies(H200, always("sparse_fwd"))
    asked = asked_shapes(change.tables[0].before, change.tables[0].after, None)
    assert predict_changes(h200_costs, compare_policies(H200, H200), []) == []
    assert predict_changes(h200_costs, change, [[]]) == []
    (guess,) = predict_changes(h200_costs, change, [list(asked)])
    assert guess.shapes <= change.changed
