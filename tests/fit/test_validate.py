"""A policy is judged on fresh points: it passes on what it promised, and never on nothing."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import msgspec
import numpy as np
import pytest

from mla_tune.errors import FitError
from mla_tune.fit.goal import Goal, Validation, validate
from mla_tune.fit.observations import Observations
from mla_tune.policy.codec import digest, load_policy
from mla_tune.policy.evidence import PolicyEvidence, load_evidence
from mla_tune.policy.schema import Choice, Policy, Row
from mla_tune.sites.shape import Shape
from mla_tune.store.measurement import Measurement, Role
from tests.fit.recorded import recorded

ROOT = Path(__file__).parents[2]


@lru_cache(maxsize=1)
def fresh() -> tuple[Measurement, ...]:
    """What the committed H200 policy never saw."""
    return tuple(row for row in recorded().measurements if row.role is Role.HELD_OUT)


def committed() -> Policy:
    return load_policy(ROOT / "policies" / "nvidia-h200.yaml")


def stated() -> PolicyEvidence:
    path = ROOT / "policies" / "nvidia-h200.yaml"
    found = load_evidence(path, digest(path.read_bytes()))
    assert found is not None
    return found


def judged(policy: Policy) -> Validation:
    return validate(Observations(fresh()), policy, stated())


def always(candidate: str) -> Policy:
    """The committed policy with one answer everywhere."""
    row = Row(num_reqs_from=0, kv_tokens_from=0, choices=(Choice(candidate=candidate),))
    policy = committed()
    tables = [msgspec.structs.replace(t, rows=(row,)) if candidate in t.candidates else t for t in policy.tables]
    return msgspec.structs.replace(policy, tables=tuple(tables))


@pytest.mark.xfail(
    strict=True,
    reason="the policy of 0.3.0 misses it: worst 1.1196 (goal 1.10), and points slower than the incumbent beyond the noise",
)
def test_the_committed_policy_meets_the_goal_on_its_held_out_points() -> None:
    found = judged(committed())
    assert found.points == 324
    assert found.missed(Goal()) == []
    assert found.losses[0].rule == "policy"


def test_a_policy_that_always_dequantizes_is_the_baseline_of_that_name_and_misses_every_part_of_the_goal() -> None:
    found = judged(always("sparse_fwd"))
    own, baseline = (
        next(loss for loss in found.losses if loss.rule == name) for name in ("policy", "always sparse_fwd")
    )
    assert (own.mean, own.p99, own.worst) == (baseline.mean, baseline.p99, baseline.worst)
    missed = found.missed(Goal())
    assert [line.split()[0] for line in missed[:3]] == ["mean", "p99", "worst"]
    assert "slower than the incumbent" in missed[3]  # V3.2's incumbent is the other path
    assert found.worst[0].slowdown == pytest.approx(own.worst)


def test_losses_to_the_incumbent_are_those_beyond_the_noise_band_alone() -> None:
    found = judged(always("with_kvcache"))
    assert found.below_incumbent
    bands = {table.noise_band for table in stated().tables}
    assert min(loss.slowdown for loss in found.below_incumbent) > 1 + min(bands)
    assert {loss.choice for loss in found.below_incumbent} == {"with_kvcache"}


def test_the_order_of_measurements_does_not_matter() -> None:
    order = np.random.default_rng(0).permutation(len(fresh()))
    assert validate(Observations(fresh()[i] for i in order), committed(), stated()) == judged(committed())


def test_nothing_passes_on_nothing() -> None:
    with pytest.raises(FitError, match="a validation needs a point"):
        validate(Observations([]), committed())
    one_path = [row for row in fresh() if row.candidate == "sparse_fwd"]
    with pytest.raises(FitError, match="a validation needs a point"):
        validate(Observations(one_path), committed())


def test_every_slowdown_is_at_least_one() -> None:
    slower = [replace(row, latency_us=(row.latency_us or 1) * 1.5) for row in fresh() if row.candidate == "sparse_fwd"]
    rest = [row for row in fresh() if row.candidate != "sparse_fwd"]
    for loss in validate(Observations([*slower, *rest]), committed()).losses:
        assert 1 <= loss.mean <= loss.worst
        assert loss.p99 <= loss.worst


def blurred(shape: Shape, factor: float, slower: float = 1.0) -> list[Measurement]:
    """The fresh points with the intervals of one shape's ``sparse_fwd`` timings wider by ``factor`` to both sides."""

    def blur(row: Measurement) -> Measurement:
        if row.shape != shape or row.candidate != "sparse_fwd" or row.latency_us is None:
            return row
        us = row.latency_us * slower
        return replace(row, latency_us=us, ci_low_us=us / factor, ci_high_us=us * factor)

    return [blur(row) for row in fresh()]


def test_a_point_whose_median_is_unsure_is_named_and_decides_nothing() -> None:
    policy = always("sparse_fwd")
    shape = judged(policy).worst[0].shape
    well = judged(policy)
    for rows, unsure in ((blurred(shape, 1.02), False), (blurred(shape, 50.0), True)):
        found = validate(Observations(rows), policy)
        assert bool(found.unsure) is unsure
        assert found.points + len(found.unsure) == well.points
        assert {(entry.shape, entry.candidate) for entry in found.unsure} <= {(shape, "sparse_fwd")}
    assert all(entry.relative > 0.05 for entry in found.unsure)


def test_an_unsure_median_saves_no_choice_that_misses_the_goal_wherever_it_lies() -> None:
    policy = always("sparse_fwd")
    found = judged(policy).worst[0]
    assert found.slowdown > 10
    again = validate(Observations(blurred(found.shape, 1.2)), policy)
    assert again.worst[0].slowdown == pytest.approx(found.slowdown)


def test_a_validation_of_which_every_median_is_unsure_gives_no_verdict() -> None:
    rows = [
        row if row.latency_us is None else replace(row, ci_low_us=row.latency_us / 50, ci_high_us=row.latency_us * 50)
        for row in fresh()
    ]
    with pytest.raises(FitError, match="a validation needs a point whose medians are known to 5%"):
        validate(Observations(rows), committed())
