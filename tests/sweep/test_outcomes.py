"""Failures become rows, and a candidate that keeps killing workers is given up from there on up."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mla_tune.sites.shape import Shape
from mla_tune.sites.site import Site
from mla_tune.store.measurement import PER_FORWARD_TOTAL, PER_LAYER_TOTAL, Measurement, Outcome, Regime, Role, fault
from mla_tune.sweep.grid import Point
from mla_tune.sweep.outcomes import DEADLY, Failure, FailureTracker, failures
from mla_tune.sweep.worker.failure import failure_of

METADATA = Site.parse("indexer_metadata/c4a")
ATTENTION = Site.parse("prefill_attention/c4a/h64/k512")
deadly = st.sampled_from(sorted(DEADLY))
harmless = st.sampled_from(sorted(set(Outcome) - DEADLY - {Outcome.OK}))


def at(num_qo_tokens: int, site: Site = METADATA) -> Point:
    return Point(site, Shape(1, num_qo_tokens, 1 << 20))


def failed(
    num_qo_tokens: int, outcome: Outcome, candidate: str = "deep_gemm", site: Site = METADATA
) -> list[Measurement]:
    return failures(at(num_qo_tokens, site), candidate, Failure(outcome, "reason"), list(Regime))


@given(
    st.sampled_from([METADATA, ATTENTION]),
    st.sampled_from(sorted(set(Outcome) - {Outcome.OK})),
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(lambda text: bool(text.split())),
    st.sampled_from(Role),
)
def test_a_failure_is_one_sound_row_for_each_regime_with_its_reason_in_one_line(
    site: Site, outcome: Outcome, detail: str, role: Role
) -> None:
    point = Point(site, Shape(1, 4, 400), role)
    rows = failures(point, "some", Failure(outcome, detail), list(Regime))
    assert [row.regime for row in rows] == list(Regime)
    for row in rows:
        assert fault(row) is None
        assert (row.site, row.shape, row.role, row.outcome) == (site, point.shape, role, outcome)
        assert row.part == (PER_FORWARD_TOTAL if site is METADATA else PER_LAYER_TOTAL)
        assert len(row.detail.splitlines()) == 1


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), Outcome.NO_MEMORY),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), Outcome.NO_MEMORY),
        (RuntimeError('torch_call_dispatcher( "aten::new_empty", "") API call failed at ops.h'), Outcome.NO_MEMORY),
        (RuntimeError('torch_call_dispatcher( "aten::matmul", "") API call failed at ops.h'), Outcome.RUNTIME_ERROR),
        (RuntimeError("aten::new_empty is not what failed"), Outcome.RUNTIME_ERROR),
    ],
)
def test_an_allocation_that_failed_is_want_of_memory_however_it_is_said(error: Exception, outcome: Outcome) -> None:
    assert failure_of(error, "cpu").outcome is outcome


@given(deadly, deadly, st.integers(1, 1000), st.integers(1, 1000), st.integers(1, 1000))
def test_two_tracker_end_the_attempts_from_the_smaller_count_up(
    first: Outcome, second: Outcome, one: int, other: int, asked: int
) -> None:
    tracker = FailureTracker()
    tracker.note(failed(one, first))
    assert tracker.skip_reason(at(asked), "deep_gemm") is None
    assert tracker.given_up() == ()
    tracker.note(failed(other, second))
    if one == other:  # the same point again: one failure
        assert tracker.given_up() == ()
        return
    (given_up,) = tracker.given_up()
    assert (given_up.site, given_up.candidate, given_up.failures) == (METADATA.key, "deep_gemm", 2)
    assert given_up.num_qo_tokens == min(one, other)
    verdict = tracker.skip_reason(at(asked), "deep_gemm")
    if asked < min(one, other):
        assert verdict is None
    else:
        detail = f"not tried: failed 2 times from {min(one, other)} query tokens up: reason"
        assert verdict == Failure(Outcome.UNSUPPORTED, detail)


@given(st.lists(harmless, max_size=8))
def test_failures_that_cost_no_worker_never_end_the_attempts(outcomes: list[Outcome]) -> None:
    tracker = FailureTracker()
    for outcome in outcomes:
        tracker.note(failed(4, outcome))
    assert tracker.skip_reason(at(4), "deep_gemm") is None


def test_failures_count_by_candidate_and_site_and_once_a_point() -> None:
    tracker = FailureTracker()
    tracker.note(failed(8, Outcome.CRASH))  # a row for each regime, one failure
    assert tracker.skip_reason(at(8), "deep_gemm") is None
    tracker.note(failed(16, Outcome.CRASH, candidate="jit"))
    tracker.note(failed(16, Outcome.CRASH, site=Site.parse("indexer_metadata/dsa")))
    assert tracker.skip_reason(at(16), "deep_gemm") is None
    tracker.note(failed(16, Outcome.TIMEOUT))
    assert tracker.skip_reason(at(16), "deep_gemm") is not None
    assert tracker.skip_reason(at(16), "jit") is None


@pytest.mark.parametrize("outcome", [Outcome.OK, Outcome.WRONG_RESULT, Outcome.NO_MEMORY, Outcome.UNSUPPORTED])
def test_what_a_worker_survives_is_not_deadly(outcome: Outcome) -> None:
    assert outcome not in DEADLY
