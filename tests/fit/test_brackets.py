"""Evidence stored with each threshold: its bracket and its wins; and what is said where there is no threshold."""

from __future__ import annotations

from pathlib import Path

from mla_tune.policy.codec import digest, load_policy
from mla_tune.policy.evidence import TableEvidence, load_evidence
from mla_tune.sites.shape import Shape
from tests.fit.synthetic import C4A, World, sweep
from tests.fit.test_fit import _attention_alone, _c4a_evidence, _fitted

H200 = Path(__file__).parents[2] / "policies" / "nvidia-h200.yaml"


def censored(evidence: TableEvidence) -> set[str | None]:
    assert not any(row.thresholds for row in evidence.rows)
    return {row.censored for row in evidence.rows}


def test_every_threshold_of_the_committed_policy_says_where_it_may_lie_and_what_it_wins() -> None:
    policy, stated = load_policy(H200), load_evidence(H200, digest(H200.read_bytes()))
    assert stated is not None
    for table in policy.tables:
        evidence = stated.of(table)
        assert evidence is not None
        for row, of_row in zip(table.rows, evidence.rows, strict=True):
            assert (row.num_reqs_from, row.kv_tokens_from) == (of_row.num_reqs_from, of_row.kv_tokens_from)
            assert len(of_row.thresholds) == len(row.choices) - 1
    thresholds = [threshold for table in stated.tables for row in table.rows for threshold in row.thresholds]
    assert len(thresholds) > 50
    assert all(0 <= entry.bracket[0] <= 1 <= entry.bracket[1] for entry in thresholds)


def test_a_crossover_beyond_the_measured_counts_is_censored_and_not_called_absent() -> None:
    def crossing(candidate: str, shape: Shape) -> float:
        fixed, slope = {"with_kvcache": (10, 0.1), "sparse_fwd": (2500, 0.05)}[candidate]
        return fixed + slope * shape.num_qo_tokens  # at 49800 query tokens; 32768 were swept

    fitted = _fitted(sweep(World(law=_attention_alone(crossing), launch_gap_us=0), [C4A]))
    assert fitted.policy.tables[0].measured.num_qo_tokens[1] < 49800
    assert "above" in censored(fitted.evidence.tables[0])


def test_where_no_curves_cross_there_is_no_crossover() -> None:
    def apart(candidate: str, shape: Shape) -> float:
        return (20 + 0.1 * shape.num_qo_tokens) * (3 if candidate == "with_kvcache" else 1)

    assert censored(_c4a_evidence(sweep(World(law=_attention_alone(apart), launch_gap_us=0), [C4A]))) == {None}
