from __future__ import annotations

import hashlib
import json
import math
import os
import random
import tempfile
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mla_tune.errors import StoreError
from mla_tune.hardware.sku import Environment
from mla_tune.sites.shape import Shape
from mla_tune.store import export
from mla_tune.store.database import Database
from mla_tune.store.export import (
    Export,
    attempt_to_export_precision,
    export_lines,
    export_sha256,
    read_export,
    to_export_precision,
    tuned_to_export_precision,
    write_export,
)
from mla_tune.store.limit_try import Try
from mla_tune.store.measurement import Measurement, Outcome, Regime, Role, fault
from mla_tune.store.tuned import Tuned
from tests.store.strategies import (
    C4A,
    ENVIRONMENT,
    NVL_ENVIRONMENT,
    environments,
    export_order,
    failure,
    fixed_rows,
    fixed_tries,
    fixed_tuned,
    measurement_lists,
    timing,
    try_lists,
    tuned_lists,
)


@settings(max_examples=60, deadline=None)
@given(environments, measurement_lists(), try_lists, st.randoms(use_true_random=False))
def test_reading_an_export_gives_what_was_written_to_export_precision(
    environment: Environment, measurements: list[Measurement], tries: list[Try], rng: random.Random
) -> None:
    shuffled = rng.sample(measurements, len(measurements))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.jsonl")
        write_export(path, environment, shuffled, rng.sample(tries, len(tries)))
        assert read_export(path) == Export(
            environment,
            tuple(export_order(list(map(to_export_precision, measurements)))),
            tuple(sorted(map(attempt_to_export_precision, tries), key=lambda attempt: attempt.key)),
        )


@settings(max_examples=60)
@given(measurement_lists(), try_lists, st.randoms(use_true_random=False))
def test_the_bytes_do_not_depend_on_the_order_of_the_measurements(
    measurements: list[Measurement], tries: list[Try], rng: random.Random
) -> None:
    shuffled = rng.sample(measurements, len(measurements)), rng.sample(tries, len(tries))
    assert list(export_lines(ENVIRONMENT, *shuffled)) == list(export_lines(ENVIRONMENT, measurements, tries))


@settings(max_examples=15, deadline=None)
@given(environments, measurement_lists(), try_lists)
def test_export_import_export_gives_the_same_bytes(
    environment: Environment, measurements: list[Measurement], tries: list[Try]
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        first, second = Path(folder, "1.jsonl"), Path(folder, "2.jsonl")
        write_export(first, environment, measurements, tries)
        with Database.open(Path(folder, "a.db")) as database:
            assert database.merge(read_export(first)) == len(measurements) + len(tries)
            assert database.merge(read_export(first)) == 0
            write_export(second, environment, database.measurements(environment.id), database.tries(environment.id))
        assert second.read_bytes() == first.read_bytes()
        assert export_sha256(second) == hashlib.sha256(first.read_bytes()).hexdigest()


@given(measurement_lists())
def test_export_precision_keeps_measurements_sound_and_applying_it_twice_changes_nothing(
    measurements: list[Measurement],
) -> None:
    once = [to_export_precision(measurement) for measurement in measurements]
    assert [fault(measurement) for measurement in once] == [None] * len(once)
    assert [to_export_precision(measurement) for measurement in once] == once


def test_the_lines_of_an_export_are_these() -> None:
    first, second, *rest = export_lines(ENVIRONMENT, fixed_rows()[:3], fixed_tries(), fixed_tuned()[:1])
    assert rest == [
        '{"site":"indexer_metadata/c4a","candidate":"deep_gemm","shape":[1,14368,14368],"outcome":"ok",'
        '"first_call_s":12.5}\n',
        '{"site":"indexer_metadata/c4a","candidate":"deep_gemm","shape":[1,14369,14369],"outcome":"runtime_error",'
        '"detail":"RuntimeError: invalid argument"}\n',
        '{"kernel":"combine_topk","size_from":0,"parameters":{"tokens_per_program":1,"columns_per_program":1024,'
        '"num_warps":4,"column_programs":0},"latency_us":3.25,"default_us":4.5,"trials":17}\n',
    ]
    assert json.loads(first) == {
        "format": "mla-tune-measurements",
        "version": 3,
        "points": 1,
        "tries": 2,
        "launches": 1,
        "environment": {
            "sku": "nvidia-h200",
            "sm_count": 132,
            "shared_memory_optin_bytes": 232448,
            "driver": "580.95.05",
            "cuda": "13.0",
            "torch": "2.11.0+cu130",
            "triton": "3.6.0",
            "libraries": [
                {"name": "sgl-deep-gemm", "version": "0.1.2", "sha256": "1f" * 32},
                {"name": "sgl-flash-mla", "version": "1.0.0", "sha256": "2e" * 32},
            ],
        },
    }
    assert second == (
        '{"site":"prefill_attention/c4a/h64/k512","role":"fit","shape":[16,8192,131072],"results":['
        '{"candidate":"sparse_fwd","first_call_s":1.234568,"workspace_bytes":3221225472,"timings":['
        '["attention","graph",812.346,804.222,820.469,3],["dequantize","graph",30.0,29.7,30.3,3]]},'
        '{"candidate":"with_kvcache","outcome":"unsupported","detail":"package flash_mla is not installed",'
        '"parts":[["per_layer","graph"]]}]}\n'
    )


def test_a_candidate_that_fails_in_one_way_takes_one_entry_whatever_its_parts() -> None:
    failures = [replace(failure(), part=part, regime=regime) for part, regime in product(["a", "b", "c"], Regime)]
    _, line = export_lines(ENVIRONMENT, failures)
    assert line.count("package flash_mla is not installed") == 1


def test_twenty_thousand_measurements_stay_under_five_megabytes() -> None:
    rng = random.Random(1)
    rows = [
        replace(
            timing(rng.uniform(10, 1e5), shape=Shape(1, qo, 1 << 20), part=part), candidate=candidate, regime=regime
        )
        for qo in range(1, 1001)
        for candidate in ("sparse_fwd", "with_kvcache")
        for part in ("per_forward", "per_layer", "attention", "dequantize", "combine")
        for regime in Regime
    ]
    assert len(rows) == 20_000
    assert sum(map(len, export_lines(ENVIRONMENT, rows))) < 2_000_000


@pytest.mark.parametrize(
    ("measurements", "words"),
    [
        ([timing(), timing(1.0)], "must occur once"),
        ([timing(), replace(timing(part="combine"), role=Role.HELD_OUT)], "must have one role"),
        ([replace(timing(), latency_us=math.nan)], "must be finite"),
        ([failure(detail="")], "must say its reason"),
    ],
)
def test_what_an_export_cannot_hold_is_refused_and_no_file_is_made(
    tmp_path: Path, measurements: list[Measurement], words: str
) -> None:
    with pytest.raises(StoreError, match=words):
        write_export(tmp_path / "a.jsonl", ENVIRONMENT, measurements)
    assert os.listdir(tmp_path) == []


def test_an_export_into_a_missing_folder_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(StoreError) as refusal:
        write_export(tmp_path / "missing" / "a.jsonl", ENVIRONMENT, fixed_rows())
    assert "missing/a.jsonl: No such file or directory" in str(refusal.value)
    assert "\n" not in str(refusal.value)


def _refused(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    with pytest.raises(StoreError) as refusal:
        read_export(path)
    message = str(refusal.value)
    assert str(path) in message
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"", "truncated"),
        (b"not json", "malformed"),
        (b"[]", "Expected `object`"),
        (b"\xff", "malformed"),
        (b'{"format": "mla-tune-measurements", "version": 6, "later": 1}', "version up to 5: got 6; upgrade"),
        (b'{"format": "mla-tune-measurements", "version": 0, "environment": {}}', "missing required field"),
        (b'{"format": "other", "version": 1, "environment": {}}', "missing required field"),
        (b'{"format": "mla-tune-measurements", "version": 1, "deep": ' + b"[" * 100_000, "header"),
    ],
)
def test_a_wrong_header_is_refused_with_the_accepted_one(tmp_path: Path, line: bytes, words: str) -> None:
    message = _refused(tmp_path / "a.jsonl", line + b"\n")
    assert "line 1 must hold" in message
    assert words in message


def test_a_header_of_another_format_or_an_older_version_is_refused(tmp_path: Path) -> None:
    (line,) = export_lines(ENVIRONMENT, [])
    for key, value in (("format", "other"), ("version", 0)):
        changed = json.dumps({**json.loads(line), key: value}).encode()
        assert repr(value) in _refused(tmp_path / "a.jsonl", changed)


Edit = Callable[[dict[str, Any]], object]


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda point: point.update(note="x"), "unknown field `note`"),
        (lambda point: point["results"][0].update(latency=1), "unknown field `latency`"),
        (lambda point: point.pop("role"), "missing required field `role`"),
        (lambda point: point.update(role="train"), "Invalid enum value 'train'"),
        (lambda point: point.update(site="prefill_attention/c5a"), "got 'prefill_attention/c5a'"),
        (lambda point: point.update(site="c4a"), "must be a key like prefill_attention/"),
        (lambda point: point.update(shape=[2, 1, 5]), "num_reqs <= num_qo_tokens"),
        (lambda point: point.update(shape=[1, 1, 2**63]), "at most 65536 requests and 4611686018427387904 tokens"),
        (lambda point: point.update(shape=["1", 1, 5]), "Expected `int`, got `str`"),
        (lambda point: point.update(results=[]), "holds no measurement"),
        (lambda point: point["results"][0]["timings"].append(["x", "graph", math.nan, 1, 1, 1]), "malformed"),
        (lambda point: point["results"][0]["timings"].append(["x", "graph", math.inf, 1, 1, 1]), "malformed"),
        (lambda point: point["results"][0]["timings"].append(["x", "graph", 5, 1, 1, 1]), "inside its interval"),
        (lambda point: point["results"][0]["timings"].append(["x", "graph", 5, 1, 9]), "length 6"),
        (lambda point: point["results"].append(point["results"][0]), "must occur once"),
        (lambda point: point["results"][0].update(outcome="crash", detail="x"), "without latency"),
        (lambda point: point["results"][1].pop("outcome"), "without detail"),
        (lambda point: point["results"][1].pop("detail"), "must say its reason"),
    ],
)
def test_a_wrong_point_is_refused_with_its_line_number(tmp_path: Path, edit: Edit, words: str) -> None:
    header, first, second = export_lines(ENVIRONMENT, fixed_rows())
    point = json.loads(second)
    edit(point)
    message = _refused(tmp_path / "a.jsonl", (header + first + json.dumps(point) + "\n").encode())
    assert "line 3 must hold a point" in message
    assert words in message


def test_a_repeated_point_a_blank_line_and_a_cut_line_are_refused(tmp_path: Path) -> None:
    header, first, second = export_lines(ENVIRONMENT, fixed_rows())
    path = tmp_path / "a.jsonl"
    assert "line 3 must hold a point that no line before has" in _refused(path, (header + first + first).encode())
    assert "line 3" in _refused(path, (header + first + "\n" + second).encode())
    assert "line 3" in _refused(path, (header + first + second[:-3]).encode())


def test_an_export_that_was_cut_between_two_lines_is_refused(tmp_path: Path) -> None:
    header, first, _ = export_lines(ENVIRONMENT, fixed_rows())
    assert "line 2 must hold the last of 2 points" in _refused(tmp_path / "a.jsonl", (header + first).encode())


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda attempt: attempt.update(note="x"), "unknown field `note`"),
        (lambda attempt: attempt.update(outcome="great"), "Invalid enum value 'great'"),
        (lambda attempt: attempt.update(detail="why"), "must agree"),
        (lambda attempt: attempt.update(first_call_s=-1.0), "at least 0"),
        (lambda attempt: attempt.update(first_call_s=math.nan), "malformed"),
        (lambda attempt: attempt.update(site="c4a"), "must be a key like prefill_attention/"),
        (lambda attempt: attempt.update(shape=[2, 1, 5]), "num_reqs <= num_qo_tokens"),
        (lambda attempt: attempt.update(candidate=""), "must be a name"),
    ],
)
def test_a_wrong_try_is_refused_with_its_line_number(tmp_path: Path, edit: Edit, words: str) -> None:
    *lines, first, second = export_lines(ENVIRONMENT, fixed_rows(), fixed_tries())
    attempt = json.loads(first)
    edit(attempt)
    data = "".join([*lines, json.dumps(attempt) + "\n", second])
    message = _refused(tmp_path / "a.jsonl", data.encode())
    assert f"line {len(lines) + 1} must hold a try" in message
    assert words in message


def test_tries_that_are_repeated_missing_or_too_many_are_refused(tmp_path: Path) -> None:
    *lines, first, second = export_lines(ENVIRONMENT, fixed_rows(), fixed_tries())
    path = tmp_path / "a.jsonl"
    assert "a try that no line before has" in _refused(path, "".join([*lines, first, first]).encode())
    assert "the last of 2 points, 2 tries" in _refused(path, "".join([*lines, first]).encode())
    third = second.replace("14369", "14370")
    assert "the last of 2 points, 2 tries" in _refused(path, "".join([*lines, first, second, third]).encode())
    with pytest.raises(StoreError, match="must occur once"):
        list(export_lines(ENVIRONMENT, [], [*fixed_tries(), *fixed_tries()]))


def test_an_export_of_the_first_version_is_read_and_has_no_tries(tmp_path: Path) -> None:
    header, *points = export_lines(ENVIRONMENT, fixed_rows())
    later = ("tries", "launches")
    old = {key: value for key, value in json.loads(header).items() if key not in later} | {"version": 1}
    (tmp_path / "a.jsonl").write_text("".join([json.dumps(old) + "\n", *points]))
    rows = export_order(list(map(to_export_precision, fixed_rows())))
    assert read_export(tmp_path / "a.jsonl") == Export(ENVIRONMENT, tuple(rows))
    assert "version 1" in _refused(tmp_path / "b.jsonl", (json.dumps(old | {"tries": 1}) + "\n").encode())


def test_an_environment_of_before_products_were_told_apart_keeps_its_id_and_its_bytes(tmp_path: Path) -> None:
    committed = Path(__file__).parents[2] / "db" / "nvidia-h200.jsonl"
    environment = read_export(committed).environment
    assert (environment.product, environment.memory_gib, environment.power_limit_w) == ("", 0, 0)
    assert environment.id == "494394bce759dd12"  # what databases out there hold its rows under
    first, *_ = export_lines(ENVIRONMENT, [timing()])
    assert "product" not in first
    assert json.loads(first)["version"] == 2


def test_two_products_of_one_chip_are_two_environments_and_never_replace_each_others_rows(tmp_path: Path) -> None:
    h200 = replace(ENVIRONMENT, product="NVIDIA H200", memory_gib=140, power_limit_w=700)
    others = [NVL_ENVIRONMENT, replace(h200, power_limit_w=500), replace(h200, memory_gib=70), ENVIRONMENT]
    with Database.open(tmp_path / "a.db") as database:
        for number, environment in enumerate([h200, *others]):
            database.record(environment, [timing(100.0 + number)])
            write_export(tmp_path / f"{number}.jsonl", environment, database.measurements(environment.id))
        for number, environment in enumerate([h200, *others]):
            assert [row.latency_us for row in database.measurements(environment.id)] == [100.0 + number]
            found = read_export(tmp_path / f"{number}.jsonl")
            assert found.environment == environment
            assert database.merge(found) == 0


def test_an_earlier_version_that_states_a_product_is_refused(tmp_path: Path) -> None:
    lines = list(export_lines(NVL_ENVIRONMENT, [timing()]))
    assert json.loads(lines[0])["version"] == 5
    old = "".join(lines).replace('"version":5', '"version":4')
    assert "version 4" in _refused(tmp_path / "a.jsonl", old.encode())


@given(tuned=tuned_lists())
@settings(max_examples=25)
def test_tuned_launch_parameters_survive_the_export_and_a_merge(tuned: list[Tuned]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.jsonl"
        write_export(path, ENVIRONMENT, [timing()], [], reversed(tuned))
        found = read_export(path)
        assert found.tuned == tuple(sorted(map(tuned_to_export_precision, tuned), key=lambda entry: entry.key))
        with Database.open(Path(folder) / "a.db") as database:
            assert database.merge(found) == 1 + len(tuned)
            assert database.merge(found) == 0
            assert tuple(database.tuned(ENVIRONMENT.id)) == found.tuned


def test_launch_parameters_that_no_kernel_has_are_refused(tmp_path: Path) -> None:
    *lines, last = export_lines(ENVIRONMENT, [timing()], [], fixed_tuned()[:1])
    for wrong in (last.replace("combine_topk", "other"), last.replace("num_warps", "warps"), last.replace("1024", "3")):
        assert "a launch as mla-tune db export writes it" in _refused(
            tmp_path / "a.jsonl", "".join([*lines, wrong]).encode()
        )
    old = "".join([*lines, last]).replace('"version":3', '"version":2')
    assert "version 2" in _refused(tmp_path / "a.jsonl", old.encode())


def test_line_ends_that_a_checkout_rewrote_read_the_same(tmp_path: Path) -> None:
    text = "".join(export_lines(ENVIRONMENT, fixed_rows()))
    (tmp_path / "a.jsonl").write_bytes(text.replace("\n", "\r\n").encode())
    rows = export_order(list(map(to_export_precision, fixed_rows())))
    assert read_export(tmp_path / "a.jsonl") == Export(ENVIRONMENT, tuple(rows))


def test_an_export_beyond_the_size_limit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = "".join(export_lines(ENVIRONMENT, fixed_rows())).encode()
    monkeypatch.setattr(export, "MAX_BYTES", len(data) - 1)
    assert f"at most {len(data) - 1} bytes" in _refused(tmp_path / "a.jsonl", data)


def test_an_export_that_is_missing_or_a_folder_is_refused_in_one_line(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing.jsonl"):
        with pytest.raises(StoreError, match="cannot read") as refusal:
            read_export(path)
        assert "\n" not in str(refusal.value)


def test_merging_keeps_raw_samples_of_what_is_only_repeated_and_replaces_what_differs(tmp_path: Path) -> None:
    kept, changed = timing(), timing(30.0, part="dequantize")
    write_export(tmp_path / "a.jsonl", ENVIRONMENT, [kept, replace(changed, latency_us=30.3)])
    with Database.open(tmp_path / "a.db") as database:
        database.record(ENVIRONMENT, [kept, changed])
        assert database.merge(read_export(tmp_path / "a.jsonl")) == 1
        assert database.measurements(ENVIRONMENT.id, C4A) == [
            kept,
            to_export_precision(replace(changed, latency_us=30.3)),
        ]


def test_an_outcome_of_every_kind_survives_the_export(tmp_path: Path) -> None:
    rows = [replace(failure(outcome, "it\nfailed"), part=outcome) for outcome in Outcome if outcome is not Outcome.OK]
    write_export(tmp_path / "a.jsonl", ENVIRONMENT, rows)
    assert list(read_export(tmp_path / "a.jsonl").measurements) == export_order(rows)
