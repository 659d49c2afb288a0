from __future__ import annotations

import ast
import json
import math
from dataclasses import fields, replace
from pathlib import Path

import pytest
from hypothesis import given

from mla_tune.store import measurement as measurement_module
from mla_tune.store.lines import encode_line, encode_point
from mla_tune.store.measurement import Level, Measurement, Outcome, fault, stored
from mla_tune.store.sql_rows import measurement_row
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


def test_columns_and_lines_follow_from_the_declaration_of_a_measurement() -> None:
    """A field that is declared is stored: nothing lists the fields a second time."""
    declared = {field.name for field in fields(Measurement)}
    assert declared == {entry.name for entry in stored(*Level)}
    assert len(stored(*Level)) == len(declared)
    row = measurement_row(timing(), environment="e", point=1, finished_at="now")
    columns = {entry.name for entry in stored(Level.KEY, Level.RESULT, Level.TIMING, Level.SAMPLES)}
    assert set(row) - {"environment", "point", "finished_at"} == columns
    line = encode_line(encode_point([timing()]))
    (result,) = json.loads(line)["results"]
    assert set(result) <= {"candidate", "timings", "parts", *(entry.name for entry in stored(Level.RESULT))}
    assert all(len(entry) == 2 + len(stored(Level.TIMING)) for entry in result["timings"])


def test_no_module_of_the_store_lists_the_fields_again() -> None:
    told = {entry.name for entry in stored(Level.RESULT, Level.TIMING)} - {"outcome", "detail", "latency_us"}
    for name in ("lines", "sql_rows"):
        tree = ast.parse((Path(measurement_module.__file__).parent / f"{name}.py").read_text())
        keywords = {node.arg for node in ast.walk(tree) if isinstance(node, ast.keyword)}
        assert keywords & told <= {"first_call_s"}, name  # a probe's try has one of its own
