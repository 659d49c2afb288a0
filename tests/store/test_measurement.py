from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given

from mla_tune.store.measurement import Measurement, Outcome, fault
from tests.store.strategies import failure, measurement_lists, timing


@given(measurement_lists())
def test_sound_measurements_of_every_outcome_have_no_fault(measurements: list[Measurement]) -> None:
    assert [fault(measurement) for measurement in measurements] == [None] * len(measurements)


@pytest.mark.parametrize(
    ("measurement", "words"),
    [
        (replace(timing(), latency_us=None), "must come with latency_us"),
        (replace(timing(), latency_us=math.nan), "must be finite"),
        (replace(timing(), ci_high_us=math.inf), "must be finite"),
        (replace(timing(), samples_us=(1.0, math.nan)), "must be finite"),
        (replace(timing(), latency_us=-1.0, ci_low_us=-2.0), "at least 0"),
        (replace(timing(), workspace_bytes=2**63), "below 2^63"),
        (replace(timing(), latency_us=1.0), "inside its interval"),
        (replace(timing(), ci_low_us=None), "both ends or none"),
        (replace(timing(), detail="fine"), "without detail"),
        (replace(timing(), part=""), "part must not be empty"),
        (replace(timing(), candidate="\ud800"), "valid Unicode"),
        (failure(detail=""), "must say its reason"),
        (replace(failure(Outcome.CRASH), latency_us=1.0), "without latency"),
        (replace(failure(Outcome.TIMEOUT), samples_us=(1.0,)), "without latency"),
    ],
)
def test_a_fault_is_named_in_one_line(measurement: Measurement, words: str) -> None:
    reason = fault(measurement)
    assert reason is not None
    assert words in reason
    assert "\n" not in reason
