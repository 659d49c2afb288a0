"""What speaks for a threshold: its bracket, its interval and its wins; and what is said where there is none."""

from __future__ import annotations

from pathlib import Path

from mla_tune.policy.codec import load_policy
from mla_tune.policy.schema import Table
from mla_tune.sites.shape import Shape
from tests.fit.synthetic import C4A, World, sweep
from tests.fit.test_fit import _attention_alone, _c4a_table

H200 = load_policy(Path(__file__).parents[2] / "policies" / "nvidia-h200.yaml")


def censored(table: Table) -> set[str | None]:
    assert all(len(row.choices) == 1 for row in table.rows)
    return {row.censored for row in table.rows}


def test_every_threshold_of_the_committed_policy_says_where_it_may_lie_and_what_it_wins() -> None:
    thresholds = [c for table in H200.tables for row in table.rows for c in row.choices[1:]]
    assert len(thresholds) > 50
    for choice in thresholds:
        assert choice.bracket is not None
        assert choice.bracket[0] <= 1 <= choice.bracket[1]
        assert choice.win is not None
    known = [c.interval for c in thresholds if c.interval is not None]
    assert len(known) > 0.5 * len(thresholds)
    assert all(low <= 1 <= high for low, high in known)


def test_a_crossover_beyond_the_measured_counts_is_censored_and_not_called_absent() -> None:
    def crossing(candidate: str, shape: Shape) -> float:
        fixed, slope = {"with_kvcache": (10, 0.1), "sparse_fwd": (2500, 0.05)}[candidate]
        return fixed + slope * shape.num_qo_tokens  # at 49800 query tokens; 32768 were swept

    table = _c4a_table(sweep(World(law=_attention_alone(crossing), launch_gap_us=0), [C4A]))
    assert table.measured.num_qo_tokens[1] < 49800
    assert "above" in censored(table)


def test_where_no_curves_cross_there_is_no_crossover() -> None:
    def apart(candidate: str, shape: Shape) -> float:
        return (20 + 0.1 * shape.num_qo_tokens) * (3 if candidate == "with_kvcache" else 1)

    assert censored(_c4a_table(sweep(World(law=_attention_alone(apart), launch_gap_us=0), [C4A]))) == {None}
